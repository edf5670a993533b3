// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/error.hpp>
#include <sattn/core/types.hpp>

#include <algorithm>
#include <limits>

namespace sattn {

/// Extents of one sequence's attention. Query row i stands at position q_offset + i of the keys.
struct attention_shape {
  index_t q_len = 0;     // [tokens]
  index_t kv_len = 0;    // [tokens]
  index_t q_heads = 0;   // a multiple of kv_heads; q head h reads kv head h / group_size()
  index_t kv_heads = 0;
  token_t q_offset = 0;  // kv_len - q_len unless said otherwise: bottom-right causal alignment

  constexpr index_t group_size() const { return kv_heads == 0 ? 0 : q_heads / kv_heads; }
  constexpr token_t position(index_t row) const { return static_cast<token_t>(q_offset + row); }
  constexpr bool operator==(const attention_shape&) const = default;
};

/// The keys that are legal for a query, whatever the pattern: one interval per row, whose ends
/// never move left as the position grows.
struct domain {
  bool causal = true;   // keys up to the query's own position
  token_t window = 0;   // only the last `window` keys up to the position, itself included; 0 = all
  token_t prefix = 0;   // keys [0, prefix) may lie ahead of the query (prefix language models)

  /// No mask at all: every query may see every key (encoders, cross attention).
  static constexpr domain full() { return {.causal = false, .window = 0, .prefix = 0}; }

  constexpr key_range legal(token_t position, index_t kv_len) const {
    const index_t at = position;
    index_t begin = window > 0 ? at - window + 1 : 0;
    index_t end = causal ? std::max<index_t>(at + 1, prefix) : kv_len;
    begin = std::clamp<index_t>(begin, 0, kv_len);
    end = std::clamp<index_t>(end, begin, kv_len);
    return {static_cast<token_t>(begin), static_cast<token_t>(end)};
  }
  /// Bit r: the row at position top + r may see the key; of the first `rows` rows, at most 16.
  constexpr unsigned rows_that_see(token_t key, token_t top, index_t rows) const {
    unsigned mask = (1u << rows) - 1;
    // Rows before the key's own position do not see it, unless it belongs to the prefix.
    const index_t ahead = index_t{key} - top;
    if (causal && ahead > 0 && key >= prefix) mask &= ahead >= rows ? 0 : ~0u << ahead;
    if (window > 0) {
      const index_t visible = index_t{key} + window - top;  // rows [0, visible) see it
      if (visible < rows) mask &= (1u << std::max<index_t>(visible, 0)) - 1;
    }
    return mask;
  }
  constexpr bool operator==(const domain&) const = default;
};

/// Throws shape_error unless the numbers describe an attention problem.
inline void check_shape(const attention_shape& shape, const domain& legal) {
  constexpr index_t limit = std::numeric_limits<token_t>::max();
  require(shape.q_len >= 0 && shape.kv_len >= 0 && shape.q_heads >= 0 && shape.kv_heads >= 0,
          "attention_shape: negative extent: q_len ", shape.q_len, ", kv_len ", shape.kv_len,
          ", q_heads ", shape.q_heads, ", kv_heads ", shape.kv_heads);
  require(shape.q_len <= limit && shape.kv_len <= limit && shape.q_heads <= limit &&
              shape.kv_heads <= limit,
          "attention_shape: q_len ", shape.q_len, ", kv_len ", shape.kv_len, ", q_heads ",
          shape.q_heads, " or kv_heads ", shape.kv_heads, " exceeds ", limit);
  require(shape.kv_heads > 0 ? shape.q_heads % shape.kv_heads == 0 : shape.q_heads == 0,
          "attention_shape: q_heads ", shape.q_heads, " is not a multiple of kv_heads ",
          shape.kv_heads);
  require(index_t{shape.q_offset} + shape.q_len <= limit &&
              index_t{shape.q_offset} > -limit,
          "attention_shape: positions from q_offset ", shape.q_offset, " for q_len ", shape.q_len,
          " rows leave the range of 32-bit positions");
  require(legal.window >= 0, "domain: window ", legal.window, " is negative (0 = unlimited)");
  require(legal.prefix >= 0, "domain: prefix ", legal.prefix, " is negative");
}

}  // namespace sattn
