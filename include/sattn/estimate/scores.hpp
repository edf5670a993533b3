// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/aligned_buffer.hpp>
#include <sattn/core/tensor_view.hpp>
#include <sattn/exec/context.hpp>
#include <sattn/kv/stored_view.hpp>
#include <sattn/plan/domain.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <vector>

namespace sattn {

/// Estimated importance of units (keys, blocks, distances) for rows of something, per set of heads.
/// Scores by row mark what the row may not see with -inf; sums over many rows hold 0 there.
struct score_tensor {
  index_t sets = 0;  // kv_heads, or q_heads where heads are not reduced
  index_t rows = 0;
  index_t cols = 0;
  std::vector<float> values;  // [sets, rows, cols]

  score_tensor() = default;
  score_tensor(index_t set_count, index_t row_count, index_t col_count, float fill)
      : sets(set_count), rows(row_count), cols(col_count),
        values(static_cast<std::size_t>(set_count * row_count * col_count), fill) {}

  std::span<float> row(index_t set, index_t r) {
    return {values.data() + (set * rows + r) * cols, static_cast<std::size_t>(cols)};
  }
  std::span<const float> row(index_t set, index_t r) const {
    return {values.data() + (set * rows + r) * cols, static_cast<std::size_t>(cols)};
  }
};

/// How the query heads of one kv head become one decision. `none` keeps every query head apart.
enum class head_reduce { none, sum, mean, max };

/// What an estimator needs to know of the attention it estimates.
struct logit_rules {
  domain legal = {};
  std::optional<float> scale = std::nullopt;  // default 1 / sqrt(head_dim)
  float soft_cap = 0.0f;
  head_reduce reduce = head_reduce::mean;
};

namespace detail {

inline void check_scores(const char* name, const score_tensor& scores) {
  require(scores.sets >= 0 && scores.rows >= 0 && scores.cols >= 0 &&
              std::ssize(scores.values) == scores.sets * scores.rows * scores.cols,
          name, ": scores hold ", scores.values.size(), " values for [", scores.sets, ", ",
          scores.rows, ", ", scores.cols, "]");
}

inline constexpr float not_legal = -std::numeric_limits<float>::infinity();

/// Returns the keys. Throws: shape_error where things do not fit; unsupported for keys that are not
/// f32.
inline tensor_view<const float> check_estimate(const char* name, const attention_shape& shape,
                                               const tensor_view<const float>& q,
                                               const stored_view& k, const logit_rules& rules) {
  check_shape(shape, rules.legal);
  check_view("q", q);
  check_view("k", k);
  require(q.tokens == shape.q_len && q.heads == shape.q_heads && k.tokens == shape.kv_len &&
              k.heads == shape.kv_heads,
          name, ": q is [", q.tokens, ", ", q.heads, "] and k is [", k.tokens, ", ", k.heads,
          "], the shape says [", shape.q_len, ", ", shape.q_heads, "] and [", shape.kv_len, ", ",
          shape.kv_heads, "]");
  require(q.dim == k.dim && q.dim > 0, name, ": q dim is ", q.dim, ", k dim is ", k.dim);
  require(std::isfinite(rules.scale.value_or(1.0f)), name, ": scale is not finite");
  require(std::isfinite(rules.soft_cap) && rules.soft_cap >= 0.0f, name, ": soft_cap ",
          rules.soft_cap, ", expected a finite number >= 0");
  require<unsupported>(k.type == dtype::f32, name, ": k is ", name_of(k.type),
                       ", estimators read f32 so far");
  require<unsupported>(k.strided(), name,
                       ": k is in pages or a ring, estimators read tokens at one ",
                       "stride so far");
  constexpr index_t bytes = sizeof(float);
  return {static_cast<const float*>(k.data), k.tokens, k.heads, k.dim, k.token_stride / bytes,
          k.head_stride / bytes};
}

inline index_t score_sets(const attention_shape& shape, head_reduce reduce) {
  return reduce == head_reduce::none ? shape.q_heads : shape.kv_heads;
}

/// Query heads [begin, end) that make one set.
inline key_range heads_of_set(const attention_shape& shape, head_reduce reduce, index_t set) {
  const index_t each = reduce == head_reduce::none ? 1 : shape.group_size();
  return {static_cast<token_t>(set * each), static_cast<token_t>((set + 1) * each)};
}

/// Joins the scores of one more head: `seen` of them were joined before. The last of a mean
/// divides. What is legal is the same for all heads, so that -inf meets only -inf.
inline void join_head(std::span<float> joined, std::span<const float> head, index_t seen,
                      index_t heads, head_reduce reduce) {
  for (std::size_t i = 0; i < joined.size(); ++i) {
    if (head[i] == not_legal || seen == 0) {
      joined[i] = head[i];
    } else {
      joined[i] = reduce == head_reduce::max ? std::max(joined[i], head[i]) : joined[i] + head[i];
    }
    if (reduce == head_reduce::mean && seen + 1 == heads) {
      joined[i] /= static_cast<float>(heads);
    }
  }
}

/// Computes logits of up to 16 rows of one query head at a time with the tile kernel.
class logit_tile {
 public:
  logit_tile(const kernel_table& kernels, index_t head_dim, const logit_rules& rules)
      : kernels_(kernels), head_dim_(head_dim), soft_cap_(rules.soft_cap),
        scale_(rules.scale.value_or(1.0f / std::sqrt(static_cast<float>(head_dim)))) {
    if (soft_cap_ != 0.0f) scale_ /= soft_cap_;
    buffer_.reserve(static_cast<std::size_t>(lane_block_floats(head_dim, 0) +
                                             chunk_keys * tile_lanes) *
                    sizeof(float));
  }

  /// logits[r * stride + key] for rows [first_row, first_row + rows) and keys [begin, end).
  void compute(const tensor_view<const float>& q, index_t q_head, index_t first_row, index_t rows,
               const tensor_view<const float>& k, index_t kv_head, key_range keys, float* logits,
               index_t stride) {
    auto* const block = reinterpret_cast<float*>(buffer_.bytes().data());
    float* const scores = block + lane_block_floats(head_dim_, 0);
    pack_args pack{{}, head_dim_, 0, scale_, block};
    for (index_t r = 0; r < rows; ++r) pack.q_rows[r] = q.row(first_row + r, q_head);
    kernels_.pack_queries(pack);
    const void* k_rows[chunk_keys + prefetch_rows];
    for (index_t key = keys.begin; key < keys.end; key += chunk_keys) {
      const index_t count = std::min<index_t>(chunk_keys, keys.end - key);
      for (index_t i = 0; i < count + prefetch_rows; ++i) {
        k_rows[i] = k.row(key + std::min(i, count - 1), kv_head);
      }
      kernels_.score_tile({.k_rows = k_rows,
                           .v_rows = nullptr,
                           .v_panel = 0,
                           .count = count,
                           .masks = nullptr,
                           .head_dim = head_dim_,
                           .v_dim = 0,
                           .soft_cap = soft_cap_,
                           .prefetch_values = false,
                           .ahead = nullptr,
                           .block = block,
                           .scores = scores});
      for (index_t r = 0; r < rows; ++r) {
        for (index_t i = 0; i < count; ++i) {
          logits[r * stride + key + i] = scores[i * tile_lanes + r];
        }
      }
    }
  }

 private:
  const kernel_table& kernels_;
  index_t head_dim_;
  float soft_cap_;
  float scale_;
  aligned_buffer buffer_;
};

}  // namespace detail

}  // namespace sattn
