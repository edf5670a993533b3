// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/checks.hpp>
#include <sattn/core/aligned_buffer.hpp>
#include <sattn/core/math.hpp>
#include <sattn/exec/scratch_arena.hpp>
#include <sattn/kernel/kernel_table.hpp>
#include <sattn/kv/stored_view.hpp>

#include <algorithm>
#include <cstddef>
#include <numeric>

namespace sattn::detail {

/// How the rows of one kv head are reached: in place or packed.
struct kv_rows {
  row_source k;
  row_source v;
  index_t v_panel = 0;  // floats between panels of packed values; 0 = rows
  index_t v_block = 0;  // floats between their blocks of keys

  /// The key's place in its first panel.
  const float* packed_v(token_t key) const {
    return reinterpret_cast<const float*>(v.data + key % value_block_keys * v.stride) +
           key / value_block_keys * v_block;
  }
};

/// Pairs of the query rows and heads of one kv head with keys, at most; on average over kv heads.
inline index_t pairs_of_a_kv_head(const attention_plan& plan) {
  const attention_shape& shape = plan.shape();
  const bool single_rows = plan.layout().single_rows;
  index_t pairs = 0;
  for (index_t i = 0; i < plan.heads(); ++i) {
    const plan_head& h = plan.head(i);
    index_t all_rows = 0;
    for (const key_range& run : h.distances) all_rows += run.size();
    for (const key_range& run : h.columns) all_rows += run.size();
    index_t whole_tiles = std::ssize(h.tokens) + (single_rows ? 0 : std::ssize(h.row_keys));
    for (const key_range& run : h.ranges) whole_tiles += run.size();
    pairs += std::min(all_rows, shape.kv_len) * shape.q_len + whole_tiles * plan.grid().rows +
             (single_rows ? h.row_pairs() : 0);
  }
  return plan.heads() == 0 ? 0 : pairs / plan.heads() * shape.group_size();
}

/// What is copied of every kv head of a sequence before its queries run, and how much memory that
/// takes. Copies pay where each key meets many query rows, panels where lane blocks share chunks.
class kv_packing {
 public:
  kv_packing() = default;
  /// `lane_blocks` take each chunk of keys together; 0 where the row kernel runs.
  kv_packing(const attention_sequence& s, index_t lane_blocks, const kernel_table& kernels,
             std::size_t limit)
      : keys_(s.kv.k.tokens), k_dim_(s.kv.k.dim), v_dim_(s.kv.v.dim),
        panel_cols_(kernels.panel_cols) {
    // A copy of a row of K and V costs as much as a few pairs; each must meet many more.
    constexpr index_t pairs_worth_it = 256;
    if (keys_ == 0 || pairs_of_a_kv_head(*s.plan) < pairs_worth_it * keys_) return;
    // Rows of a power of two bytes that do not lie side by side meet in few sets of the caches. The
    // row kernel multiplies scores and weights by the scales of rows, not elements: other bits.
    const auto scattered = [&](const stored_view& view) {
      if (lane_blocks == 0 && has_row_scale(view.type)) return false;
      return view.type != dtype::f32 ||
             (lane_blocks > 0 && view.token_stride != row_bytes(view.type, view.dim));
    };
    constexpr index_t blocks_worth_it = 4;
    k_rows_ = scattered(s.kv.k);
    v_panels_ = lane_blocks >= blocks_worth_it;
    v_rows_ = !v_panels_ && scattered(s.kv.v);
    if (head_bytes() > limit) *this = kv_packing();
  }

  /// Bytes for one kv head; 0 = everything stays in place.
  std::size_t head_bytes() const { return k_bytes() + v_bytes(); }
  /// Blocks of keys of one kv head, each a task.
  index_t blocks() const { return head_bytes() == 0 ? 0 : ceil_div(keys_, value_block_keys); }

  /// Where the rows of a kv head are once its blocks are packed into `memory`.
  kv_rows rows(const kv_view& kv, index_t kv_head, const std::byte* memory) const {
    constexpr index_t bytes = sizeof(float);
    kv_rows rows{kv.k.rows(kv_head), kv.v.rows(kv_head)};
    if (k_rows_) rows.k = {memory, k_dim_ * bytes, dtype::f32};
    if (v_rows_) rows.v = {memory + k_bytes(), v_dim_ * bytes, dtype::f32};
    if (v_panels_) {
      rows.v = {memory + k_bytes(), panel_cols_ * bytes, dtype::f32};
      rows.v_panel = value_panel_floats(panel_cols_);
      rows.v_block = value_block_floats(v_dim_, panel_cols_);
    }
    return rows;
  }

  void pack_block(const kv_view& kv, index_t kv_head, index_t block, const kernel_table& kernels,
                  std::byte* memory) const {
    auto* const packed = reinterpret_cast<float*>(memory);
    const void* from[value_block_keys];
    float scales[value_block_keys];
    token_t keys[value_block_keys];
    const index_t first = block * value_block_keys;
    const index_t count = std::min(value_block_keys, keys_ - first);
    std::iota(keys, keys + count, static_cast<token_t>(first));
    const auto block_rows = [&](const stored_view& view, float* out) {
      const row_source source = view.rows(kv_head);
      source.locate(keys, count, from);
      if (has_row_scale(view.type)) source.read_scales(keys, count, scales);
      return load_rows_args{from, scales, view.type, count, view.dim, out};
    };
    if (k_rows_) kernels.load_rows(block_rows(kv.k, packed + first * k_dim_));
    float* const values = packed + k_bytes() / sizeof(float);
    if (v_panels_) {
      kernels.load_values(
          block_rows(kv.v, values + block * value_block_floats(v_dim_, panel_cols_)));
    } else if (v_rows_) {
      kernels.load_rows(block_rows(kv.v, values + first * v_dim_));
    }
  }

 private:
  static std::size_t float_bytes(index_t count) {
    return padded(static_cast<std::size_t>(count) * sizeof(float));
  }
  std::size_t k_bytes() const { return k_rows_ ? float_bytes(keys_ * k_dim_) : 0; }
  std::size_t v_bytes() const {
    if (v_rows_) return float_bytes(keys_ * v_dim_);
    return v_panels_ ? float_bytes(ceil_div(keys_, value_block_keys) *
                                   value_block_floats(v_dim_, panel_cols_))
                     : 0;
  }

  index_t keys_ = 0;
  index_t k_dim_ = 0;
  index_t v_dim_ = 0;
  index_t panel_cols_ = 1;
  bool k_rows_ = false;    // f32, one behind the other
  bool v_rows_ = false;    // the same
  bool v_panels_ = false;  // see value_block_keys
};

}  // namespace sattn::detail
