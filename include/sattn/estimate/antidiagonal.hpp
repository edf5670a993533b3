// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/estimate/blocks.hpp>

#include <algorithm>
#include <array>
#include <span>
#include <vector>

namespace sattn {

struct antidiagonal_options {
  token_t stride = 16;  // rows and keys that make one of the estimate
  token_t block = 128;  // of rows and of keys; a multiple of the stride
  logit_rules rules = {};
};

namespace detail {

/// The largest multiple of `step` that is not above x, divided by it.
constexpr index_t floor_div(index_t x, index_t step) {
  return x >= 0 ? x / step : -ceil_div(-x, step);
}

/// The same attention with `stride` rows and keys as one: a pair is legal where some pair of theirs
/// is, the last rows filled up to a group.
struct strided_problem {
  attention_shape shape;
  domain legal;

  strided_problem(const attention_shape& s, const domain& d, index_t stride)
      : shape{ceil_div(s.q_len, stride), ceil_div(s.kv_len, stride), s.q_heads, s.kv_heads,
              static_cast<token_t>(floor_div(index_t{s.q_offset} + stride - 1, stride))},
        legal(d) {
    if (d.window > 0) {
      // The first row of a group sees the window's oldest key, the last row says where it stands.
      const index_t behind = s.q_offset - floor_div(s.q_offset, stride) * stride;
      legal.window = static_cast<token_t>((behind > 0 ? 2 : 1) +
                                          floor_div(d.window + stride - 2 - behind, stride));
    }
    legal.prefix = static_cast<token_t>(ceil_div(d.prefix, stride));
  }
};

/// The estimate of the rows [begin, end) of one query head, of up to max_tiles * 16 of them, for
/// all keys: sums over antidiagonals, then probabilities, in tiles of 16 rows.
class antidiagonal_tiles {
 public:
  static constexpr index_t max_tiles = 4;  // that share what is loaded of K

  static std::size_t bytes(const strided_problem& p, const stored_view& k, index_t stride) {
    const auto blocks = static_cast<std::size_t>(max_tiles * stride);
    return key_rows::bytes(k) + blocks * query_block::bytes(k.dim) +
           padded(chunk_keys * tile_lanes * sizeof(float)) +
           static_cast<std::size_t>(max_tiles) * tile_bytes(p);
  }
  antidiagonal_tiles(scratch_arena arena, const kernel_table& kernels, const strided_problem& p,
                     const tensor_view<const float>& q, const stored_view& k, index_t stride,
                     const logit_rules& rules)
      : kernels_(kernels), problem_(p), q_(q), k_(k), stride_(stride), factors_(q.dim, rules),
        keys_(arena, k), part_(arena.take<float>(chunk_keys * tile_lanes)) {
    factors_.pack_scale /= static_cast<float>(stride);
    for (index_t i = 0; i < max_tiles; ++i) {
      scores_[static_cast<std::size_t>(i)] = arena.take<float>(tile_floats(p));
    }
    blocks_.reserve(static_cast<std::size_t>(max_tiles * stride));
    for (index_t i = 0; i < max_tiles * stride; ++i) blocks_.emplace_back(arena, q.dim);
  }

  void compute(index_t q_head, index_t begin, index_t end) {
    const index_t tiles = ceil_div(end - begin, tile_lanes);
    key_range all{0, 0};
    for (index_t tile = 0; tile < tiles; ++tile) {
      const index_t first = begin + tile * tile_lanes;
      rows_[static_cast<std::size_t>(tile)] = std::min(tile_lanes, end - first);
      const key_range keys = visible_keys(problem_.shape, problem_.legal, first,
                                          rows_[static_cast<std::size_t>(tile)]);
      visible_[static_cast<std::size_t>(tile)] = keys;
      all.begin = tile == 0 ? keys.begin : std::min(all.begin, keys.begin);
      all.end = std::max(all.end, keys.end);
      for (index_t t = 0; t < stride_; ++t) {
        block(tile, t).pack(kernels_, factors_, [&](index_t lane) {
          const index_t row = (first + lane) * stride_ + stride_ - 1 - t;
          return first + lane < end && row < q_.tokens ? q_.row(row, q_head) : nullptr;
        });
      }
    }
    const row_source source = k_.rows(q_head / problem_.shape.group_size());
    for (index_t key = all.begin / chunk_keys * chunk_keys; key < all.end; key += chunk_keys) {
      const index_t count = std::min<index_t>(chunk_keys, all.end - key);
      for (index_t t = 0; t < stride_; ++t) {
        // The last group of keys may be short: nothing is added where there is none.
        const index_t last = (key + count - 1) * stride_ + t;
        const index_t loaded = last < k_.tokens ? count : count - 1;
        if (loaded == 0) continue;
        keys_.load(kernels_, source, key * stride_ + t, loaded, stride_);
        for (index_t tile = 0; tile < tiles; ++tile) {
          const key_range& keys = visible_[static_cast<std::size_t>(tile)];
          if (key >= keys.end || key + count <= keys.begin) continue;
          float* const sums = scores_[static_cast<std::size_t>(tile)] + key * tile_lanes;
          float* const to = t == 0 ? sums : part_;
          const index_t seen = std::min<index_t>(loaded, keys.end - key);
          keys_.score(kernels_, block(tile, t), factors_, nullptr, to, seen);
          for (index_t i = 0; i < seen * tile_lanes && t > 0; ++i) sums[i] += part_[i];
        }
      }
    }
    for (index_t tile = 0; tile < tiles; ++tile) mask(tile, begin + tile * tile_lanes);
    for (index_t tile = 0; tile < tiles; ++tile) {
      const key_range& keys = visible_[static_cast<std::size_t>(tile)];
      kernels_.softmax_lanes(scores_[static_cast<std::size_t>(tile)] + keys.begin * tile_lanes,
                             keys.size());
    }
  }

  /// Keys that the rows of a tile may see.
  key_range keys(index_t tile) const { return visible_[static_cast<std::size_t>(tile)]; }
  /// Probabilities of key j and lane l of a tile, at j * 16 + l.
  const float* probabilities(index_t tile) const { return scores_[static_cast<std::size_t>(tile)]; }

 private:
  static index_t tile_floats(const strided_problem& p) {
    return round_up(p.shape.kv_len, chunk_keys) * tile_lanes;
  }
  static std::size_t tile_bytes(const strided_problem& p) {
    return padded(static_cast<std::size_t>(tile_floats(p)) * sizeof(float));
  }
  query_block& block(index_t tile, index_t t) {
    return blocks_[static_cast<std::size_t>(tile * stride_ + t)];
  }
  void mask(index_t tile, index_t first) {
    const key_range& keys = visible_[static_cast<std::size_t>(tile)];
    const index_t rows = rows_[static_cast<std::size_t>(tile)];
    const token_t top = problem_.shape.position(first);
    for (index_t key = keys.begin; key < keys.end; ++key) {
      const unsigned seen =
          problem_.legal.rows_that_see(static_cast<token_t>(key), top, rows);
      if (seen == (1u << tile_lanes) - 1) continue;
      float* const at = scores_[static_cast<std::size_t>(tile)] + key * tile_lanes;
      for (index_t lane = 0; lane < tile_lanes; ++lane) {
        if ((seen >> lane & 1) == 0) at[lane] = not_legal;
      }
    }
  }

  const kernel_table& kernels_;
  strided_problem problem_;
  tensor_view<const float> q_;
  stored_view k_;
  index_t stride_;
  logit_factors factors_;
  key_rows keys_;
  float* part_;
  std::vector<query_block> blocks_;  // [max_tiles][stride]
  std::array<float*, max_tiles> scores_;
  std::array<key_range, max_tiles> visible_;
  std::array<index_t, max_tiles> rows_;
};

/// The estimator of blocks by sums over antidiagonals.
class antidiagonal_blocks {
 public:
  antidiagonal_blocks(context& ctx, const attention_shape& shape,
                      const tensor_view<const float>& q, const stored_view& k,
                      const antidiagonal_options& options)
      : kernels_(ctx.kernel_table()), options_(options), q_(q), k_(k),
        blocks_{shape, options.rules.legal, options.block, options.block},
        strided_(shape, options.rules.legal, options.stride) {}

  const block_extents& blocks() const { return blocks_; }
  index_t sets() const { return score_sets(blocks_.shape, options_.rules.reduce); }
  index_t rows_of_task() const { return std::max<index_t>(1, most_rows / units()); }
  std::size_t bytes() const {
    return antidiagonal_tiles::bytes(strided_, k_, options_.stride) +
           padded(static_cast<std::size_t>(rows_of_task() * blocks_.cols()) * sizeof(float));
  }

  void score(scratch_arena arena, index_t set, index_t first, index_t rows, float* scores) const {
    const index_t cols = blocks_.cols();
    const index_t first_row = first * units();
    const index_t end_row = std::min((first + rows) * units(), strided_.shape.q_len);
    float* const mass = arena.take<float>(rows * cols);
    antidiagonal_tiles tiles(arena, kernels_, strided_, q_, k_, options_.stride, options_.rules);
    const key_range heads = heads_of_set(blocks_.shape, options_.rules.reduce, set);
    for (index_t head = heads.begin; head < heads.end; ++head) {
      std::fill_n(mass, rows * cols, 0.0f);
      for (index_t row = first_row; row < end_row; row += most_rows) {
        const index_t end = std::min(row + most_rows, end_row);
        tiles.compute(head, row, end);
        for (index_t tile = 0; row + tile * tile_lanes < end; ++tile) {
          const index_t begin = row + tile * tile_lanes;
          add(tiles, tile, begin - first_row, std::min(tile_lanes, end - begin), mass);
        }
      }
      for (index_t r = 0; r < rows; ++r) {
        const key_range seen = blocks_.seen(first + r);
        const index_t at = r * cols + seen.begin;
        const auto count = static_cast<std::size_t>(seen.size());
        join_head({scores + at, count}, {mass + at, count}, head - heads.begin, heads.size(),
                  options_.rules.reduce);
      }
    }
  }

 private:
  static constexpr index_t most_rows = antidiagonal_tiles::max_tiles * tile_lanes;
  /// Of a block.
  index_t units() const { return options_.block / options_.stride; }

  /// Adds what a tile of rows gives the blocks; `begin` is its first row behind the first of mass.
  void add(const antidiagonal_tiles& tiles, index_t tile, index_t begin, index_t rows,
           float* mass) const {
    const float* const p = tiles.probabilities(tile);
    const key_range keys = tiles.keys(tile);
    for (index_t j = keys.begin / units(); j * units() < keys.end; ++j) {
      float sums[tile_lanes] = {};
      const index_t last = std::min<index_t>((j + 1) * units(), keys.end);
      for (index_t key = std::max<index_t>(j * units(), keys.begin); key < last; ++key) {
        for (index_t lane = 0; lane < tile_lanes; ++lane) {
          sums[lane] += p[key * tile_lanes + lane];
        }
      }
      for (index_t lane = 0; lane < rows; ++lane) {
        mass[(begin + lane) / units() * blocks_.cols() + j] += sums[lane];
      }
    }
  }

  const sattn::kernel_table& kernels_;
  antidiagonal_options options_;
  tensor_view<const float> q_;
  stored_view k_;
  block_extents blocks_;
  strided_problem strided_;
};

inline void check_antidiagonal(const char* name, const attention_shape& shape,
                               const tensor_view<const float>& q, const stored_view& k,
                               const antidiagonal_options& options) {
  check_estimate(name, shape, q, k, options.rules);
  require(options.stride > 0 && options.block > 0 && options.block % options.stride == 0, name,
          ": stride ", options.stride, " does not divide block ", options.block);
  require(options.rules.soft_cap == 0.0f, name, ": soft_cap ", options.rules.soft_cap,
          " has no meaning for sums of products");
}

}  // namespace detail

/// Attention mass of blocks of keys for blocks of queries, from sums over antidiagonals: `stride`
/// rows of q in reverse order against as many of k are one score, and a block's mass is what the
/// softmax of these scores, over all keys of each row of them, gives it.
///
/// Shapes: q [q_len, q_heads, head_dim], k [kv_len, kv_heads, head_dim] of any type and layout;
/// result [sets, ceil(q_len / block), ceil(kv_len / block)], -inf where no pair is legal.
/// With chunked prefill blocks count from the first row of the chunk.
/// Throws: shape_error if shapes do not fit, the stride does not divide the block, a soft cap is
/// set, or a borrowed workspace is too small.
/// Cost: 1 / stride of dense scores; parallel over sets and rows of blocks; for each worker 64 *
/// kv_len / stride floats and the queries of 64 * stride rows.
/// Source: XAttention (arXiv:2503.16428).
inline score_tensor antidiagonal_block_scores(context& ctx, const attention_shape& shape,
                                              const tensor_view<const float>& q,
                                              const stored_view& k,
                                              const antidiagonal_options& options = {}) {
  detail::check_antidiagonal("antidiagonal_block_scores", shape, q, k, options);
  const detail::antidiagonal_blocks rows(ctx, shape, q, k, options);
  return detail::score_blocks(ctx, rows);
}

/// The blocks with most of this mass for every row of blocks, without storing it all.
///
/// Shapes and cost as above; protected units as of select_blocks().
/// Throws: shape_error as above or if protected counts are negative; std::bad_alloc.
inline block_lists select_antidiagonal_blocks(context& ctx, const attention_shape& shape,
                                              const tensor_view<const float>& q,
                                              const stored_view& k, const selection& rule,
                                              const antidiagonal_options& options = {}) {
  detail::check_antidiagonal("select_antidiagonal_blocks", shape, q, k, options);
  check_selection(rule);
  const detail::antidiagonal_blocks rows(ctx, shape, q, k, options);
  return detail::choose_blocks(ctx, rows, rule);
}

}  // namespace sattn
