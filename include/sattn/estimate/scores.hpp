// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/aligned_buffer.hpp>
#include <sattn/core/tensor_view.hpp>
#include <sattn/exec/context.hpp>
#include <sattn/exec/located_rows.hpp>
#include <sattn/exec/scratch_arena.hpp>
#include <sattn/kv/stored_view.hpp>
#include <sattn/plan/domain.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
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

/// Throws: shape_error where things do not fit.
inline void check_estimate(const char* name, const attention_shape& shape,
                           const tensor_view<const float>& q, const stored_view& k,
                           const logit_rules& rules) {
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

/// What logits are made of besides the products.
struct logit_factors {
  float pack_scale;  // queries are packed with it
  float soft_cap;

  logit_factors(index_t head_dim, const logit_rules& rules)
      : pack_scale(rules.scale.value_or(1.0f / std::sqrt(static_cast<float>(head_dim)))),
        soft_cap(rules.soft_cap) {
    if (soft_cap != 0.0f) pack_scale /= soft_cap;
  }
};

/// Up to 16 query rows in the lanes of the tile kernel.
class query_block {
 public:
  static std::size_t bytes(index_t head_dim) {
    return padded(static_cast<std::size_t>(lane_block_floats(head_dim, 0)) * sizeof(float));
  }
  query_block(scratch_arena& arena, index_t head_dim)
      : head_dim_(head_dim), block_(arena.take<float>(lane_block_floats(head_dim, 0))) {}

  /// row_of(lane) is a query row, or null for none.
  template <class RowOf>
  void pack(const kernel_table& kernels, const logit_factors& factors, const RowOf& row_of) {
    pack_args pack{{}, head_dim_, 0, factors.pack_scale, block_};
    for (index_t lane = 0; lane < tile_lanes; ++lane) pack.q_rows[lane] = row_of(lane);
    kernels.pack_queries(pack);
  }
  index_t head_dim() const { return head_dim_; }
  float* data() const { return block_; }

 private:
  index_t head_dim_;
  float* block_;
};

/// Up to chunk_keys rows of K as f32, whatever they are stored as.
class key_rows {
 public:
  static std::size_t bytes(const stored_view& k) {
    return padded(static_cast<std::size_t>(widened_floats(k)) * sizeof(float));
  }
  key_rows(scratch_arena& arena, const stored_view& k)
      : dim_(k.dim), widened_(arena.take<float>(widened_floats(k))) {}

  /// At least one key.
  void load(const kernel_table& kernels, const row_source& source, std::span<const token_t> keys) {
    located_.locate(keys.data(), std::ssize(keys), source, row_reader::tiles, dim_, kernels,
                    widened_);
  }
  /// The keys first, first + step, ..., at least one.
  void load(const kernel_table& kernels, const row_source& source, index_t first, index_t count,
            index_t step = 1) {
    for (index_t i = 0; i < count; ++i) {
      keys_[static_cast<std::size_t>(i)] = static_cast<token_t>(first + i * step);
    }
    load(kernels, source, std::span(keys_).first(static_cast<std::size_t>(count)));
  }

  const float* row(index_t i) const {
    return static_cast<const float*>(located_.rows[static_cast<std::size_t>(i)]);
  }
  /// Scores of all rows, or of the first `count`, for a block of queries, [count][16]; `masks` as
  /// in tile_args.
  void score(const kernel_table& kernels, const query_block& queries, const logit_factors& factors,
             const std::uint16_t* masks, float* scores) const {
    score(kernels, queries, factors, masks, scores, located_.count);
  }
  void score(const kernel_table& kernels, const query_block& queries, const logit_factors& factors,
             const std::uint16_t* masks, float* scores, index_t count) const {
    kernels.score_tile({.k_rows = located_.rows.data(),
                        .v_rows = nullptr,
                        .v_panel = 0,
                        .count = count,
                        .masks = masks,
                        .head_dim = queries.head_dim(),
                        .v_dim = 0,
                        .soft_cap = factors.soft_cap,
                        .prefetch_values = false,
                        .ahead = nullptr,
                        .block = queries.data(),
                        .scores = scores});
  }

 private:
  static index_t widened_floats(const stored_view& k) {
    return located_rows::widened_floats(k, row_reader::tiles);
  }

  index_t dim_;
  float* widened_;
  std::array<token_t, chunk_keys> keys_;
  located_rows located_;
};

/// The parts of the workspace that the workers of a call have, each of `bytes`.
class worker_scratch {
 public:
  worker_scratch(context& ctx, std::size_t bytes)
      : bytes_(bytes),
        memory_(ctx.workspace(bytes * static_cast<std::size_t>(ctx.executor().concurrency()))) {}
  scratch_arena of(index_t worker) const {
    return scratch_arena(memory_.subspan(static_cast<std::size_t>(worker) * bytes_, bytes_));
  }

 private:
  std::size_t bytes_;
  std::span<std::byte> memory_;
};

/// Scores [count][16] of one lane, one behind the other.
inline void copy_lane(const float* scores, index_t count, index_t lane, float* out) {
  for (index_t i = 0; i < count; ++i) out[i] = scores[i * tile_lanes + lane];
}

/// Keys that some of `rows` rows from first_row on may see.
inline key_range visible_keys(const attention_shape& shape, const domain& legal, index_t first_row,
                              index_t rows) {
  const key_range keys{
      legal.legal(shape.position(first_row), shape.kv_len).begin,
      legal.legal(shape.position(first_row + rows - 1), shape.kv_len).end};
  return {keys.begin, std::max(keys.begin, keys.end)};
}

/// Scores and probabilities of up to 16 rows of one query head against all keys that they may see,
/// [key][16]: as the tile kernel leaves them.
class score_lanes {
 public:
  static std::size_t bytes(const attention_shape& shape, const stored_view& k) {
    return query_block::bytes(k.dim) + key_rows::bytes(k) +
           padded(static_cast<std::size_t>(round_up(shape.kv_len, chunk_keys) * tile_lanes) *
                  sizeof(float));
  }
  score_lanes(scratch_arena& arena, const kernel_table& kernels, const attention_shape& shape,
              const tensor_view<const float>& q, const stored_view& k, const logit_rules& rules)
      : kernels_(kernels), shape_(shape), q_(q), k_(k), legal_(rules.legal),
        factors_(q.dim, rules), block_(arena, q.dim), rows_(arena, k),
        scores_(arena.take<float>(round_up(shape.kv_len, chunk_keys) * tile_lanes)) {}

  /// Scores of rows [first_row, first_row + rows) of a query head; -inf where a row may not look.
  void score(index_t q_head, index_t first_row, index_t rows) {
    keys_ = visible_keys(shape_, legal_, first_row, rows);
    block_.pack(kernels_, factors_, [&](index_t lane) {
      return lane < rows ? q_.row(first_row + lane, q_head) : nullptr;
    });
    const row_source source = k_.rows(q_head / shape_.group_size());
    const token_t top = shape_.position(first_row);
    const auto all = static_cast<std::uint16_t>((1u << rows) - 1);
    std::array<std::uint16_t, chunk_keys> masks;
    for (index_t key = keys_.begin; key < keys_.end; key += chunk_keys) {
      const index_t count = std::min<index_t>(chunk_keys, keys_.end - key);
      bool masked = rows < tile_lanes;
      for (index_t i = 0; i < count; ++i) {
        const unsigned mask = legal_.rows_that_see(static_cast<token_t>(key + i), top, rows);
        masks[static_cast<std::size_t>(i)] = static_cast<std::uint16_t>(mask);
        masked = masked || mask != all;
      }
      rows_.load(kernels_, source, key, count);
      rows_.score(kernels_, block_, factors_, masked ? masks.data() : nullptr,
                  scores_ + (key - keys_.begin) * tile_lanes);
    }
  }
  /// Turns them into probabilities, 0 where a row may not look.
  void normalise() { kernels_.softmax_lanes(scores_, keys_.size()); }

  key_range keys() const { return keys_; }
  /// Of keys().begin.
  float* data() const { return scores_; }

 private:
  const kernel_table& kernels_;
  attention_shape shape_;
  tensor_view<const float> q_;
  stored_view k_;
  domain legal_;
  logit_factors factors_;
  query_block block_;
  key_rows rows_;
  float* scores_;
  key_range keys_;
};

}  // namespace detail

}  // namespace sattn
