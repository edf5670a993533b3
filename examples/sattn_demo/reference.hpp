// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "layer.hpp"

#include <sattn/exec/context.hpp>

#include <vector>

namespace demo {

/// Dense causal attention of some rows, computed in double by two plain loops.
struct reference {
  std::vector<index_t> rows;  // spread evenly, the first and the last included
  std::vector<double> out;    // [rows, q_heads, v_dim]
};

reference make_reference(sattn::context& ctx, const layer& l, index_t row_count);

/// ||out - reference|| / ||reference|| over the reference's rows; out is [q_len, q_heads, v_dim].
double relative_error(const reference& expected, const sattn::tensor_view<const float>& out);

}  // namespace demo
