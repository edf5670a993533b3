// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace sattn {

using token_t = std::int32_t;    // a position in a sequence, or a distance between two
using index_t = std::ptrdiff_t;  // an extent, a stride or an element offset

/// Positions [begin, end).
struct key_range {
  token_t begin = 0;
  token_t end = 0;

  constexpr bool empty() const { return end <= begin; }
  constexpr index_t size() const { return empty() ? 0 : index_t{end} - begin; }
  constexpr bool operator==(const key_range&) const = default;
};

}  // namespace sattn
