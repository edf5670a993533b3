// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/dtype.hpp>
#include <sattn/core/types.hpp>

#include <cstddef>

namespace sattn {

/// Where the rows of K or V of one kv head lie: what remains of a view once a head is chosen.
struct row_source {
  const std::byte* data = nullptr;  // of token 0
  index_t stride = 0;               // bytes from a token to the next
  dtype type = dtype::f32;

  /// Writes the addresses of the rows of `keys`.
  void locate(const token_t* keys, index_t count, const void** rows) const {
    for (index_t i = 0; i < count; ++i) rows[i] = data + keys[i] * stride;
  }
};

}  // namespace sattn
