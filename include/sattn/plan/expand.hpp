// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/plan/attention_plan.hpp>

#include <cstdint>
#include <vector>

namespace sattn {

/// The mask [q_len, kv_len] of one query head, 1 where the row attends to the key.
///
/// For tests and for looking: written from the meaning of the encodings, pair by pair, without the
/// cursor that runs them. Throws: shape_error if there is no such head.
inline std::vector<std::uint8_t> expand(const attention_plan& plan, index_t q_head) {
  const plan_data& data = plan.data();
  const attention_shape& shape = data.shape;
  require(q_head >= 0 && q_head < shape.q_heads, "expand: query head ", q_head, " of ",
          shape.q_heads);
  const plan_head& head = plan.head(plan.head_of(q_head));
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(shape.q_len * shape.kv_len));

  for (index_t tile = 0; tile < plan.tiles(); ++tile) {
    const key_range rows = data.grid.row_range(tile, shape.q_len);
    const token_t top = shape.position(rows.begin);
    const token_t bottom = shape.position(rows.end - 1);
    for (index_t row = rows.begin; row < rows.end; ++row) {
      const token_t position = shape.position(row);
      const key_range legal = data.legal.legal(position, shape.kv_len);
      std::uint8_t* const out = mask.data() + row * shape.kv_len;
      const auto select = [&](index_t begin, index_t end) {
        for (index_t k = std::max<index_t>(begin, legal.begin);
             k < std::min<index_t>(end, legal.end); ++k) {
          out[k] = 1;
        }
      };
      for (const key_range& run : head.columns) select(run.begin, run.end);
      for (const key_range& run : head.distances) {
        if (data.rounding == rounding::cover) {
          select(index_t{top} - run.end + 1, index_t{bottom} - run.begin + 1);
        } else {
          select(index_t{position} - run.end + 1, index_t{position} - run.begin + 1);
        }
      }
      const auto t = static_cast<std::size_t>(tile);
      if (!head.range_ptr.empty()) {
        for (index_t i = head.range_ptr[t]; i < head.range_ptr[t + 1]; ++i) {
          const key_range run = head.ranges[static_cast<std::size_t>(i)];
          select(run.begin, run.end);
        }
      }
      if (!head.token_ptr.empty()) {
        for (index_t i = head.token_ptr[t]; i < head.token_ptr[t + 1]; ++i) {
          const token_t key = head.tokens[static_cast<std::size_t>(i)];
          select(key, index_t{key} + 1);
        }
      }
      if (!head.row_key_ptr.empty()) {
        for (index_t i = head.row_key_ptr[t]; i < head.row_key_ptr[t + 1]; ++i) {
          const auto at = static_cast<std::size_t>(i);
          const token_t key = head.row_keys[at];
          if ((head.row_masks[at] >> (row - rows.begin) & 1) != 0) select(key, index_t{key} + 1);
        }
      }
    }
  }
  return mask;
}

}  // namespace sattn
