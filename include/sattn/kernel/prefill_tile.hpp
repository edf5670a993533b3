// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/tile_parts.hpp>
#include <sattn/simd/exp.hpp>
#include <sattn/simd/transpose.hpp>

// One block of 16 query lanes through its chunks of keys: FlashAttention-2 (arXiv:2307.08691) with
// the queries in the lanes. K and V are read row by row with scalar broadcasts, so any list of rows
// is as good as a matrix, and every softmax step is vertical.

namespace sattn::kernel {

// The parts of a lane block; see lane_block_floats.
struct lane_block {
  float* q;
  float* out;
  float* row_max;
  float* row_sum;
};

template <class Arch>
SATTN_ALWAYS_INLINE lane_block block_of(float* block, index_t head_dim, index_t v_dim) {
  float* const out = block + tile_lanes * head_dim;
  float* const row_max = out + tile_lanes * v_dim;
  return {block, out, row_max, row_max + tile_lanes};
}

/// Packs 16 query rows as [head_dim][16], scaled, and empties the state.
template <class Arch>
SATTN_NOINLINE void pack_queries(const pack_args& args) noexcept {
  using V = simd::vec<Arch>;
  constexpr index_t width = V::width;
  const lane_block block = block_of<Arch>(args.block, args.head_dim, args.v_dim);
  const V scale = V::broadcast(args.scale);
  for (index_t first = 0; first < tile_lanes; first += width) {
    index_t i = 0;
    for (; i + width <= args.head_dim; i += width) {
      V square[width];
      simd::unroll<width>([&](auto r) SATTN_INLINE_LAMBDA {
        const float* row = args.q_rows[first + r];
        square[r] = row == nullptr ? V::zero() : V::load(row + i) * scale;
      });
      simd::transpose(square);
      simd::unroll<width>([&](auto r) SATTN_INLINE_LAMBDA {
        square[r].store_aligned(block.q + (i + r) * tile_lanes + first);
      });
    }
    for (; i < args.head_dim; ++i) {
      for (index_t lane = first; lane < first + width; ++lane) {
        const float* row = args.q_rows[lane];
        block.q[i * tile_lanes + lane] = row == nullptr ? 0.0f : row[i] * args.scale;
      }
    }
  }
  for (index_t i = 0; i < tile_lanes * args.v_dim; i += width) {
    V::zero().store_aligned(block.out + i);
  }
  for (index_t lane = 0; lane < tile_lanes; lane += width) {
    V::broadcast(-__builtin_inff()).store_aligned(block.row_max + lane);
    V::zero().store_aligned(block.row_sum + lane);
  }
}

/// Asks for the packed values of a tile of keys before their scores are computed. Neighbours in a
/// panel share lines: the first and the last key stand for all of a run.
template <class Arch, int Rows>
SATTN_ALWAYS_INLINE void prefetch_panels(const tile_args& args, index_t key) {
  const void* const* const rows = args.v_rows + key;
  constexpr index_t cols = tile_rows<Arch>;
  const float* first = float_row(rows[0]);
  const float* last = float_row(rows[Rows - 1]) + cols - 1;
  for (index_t i = 0; i < args.v_dim; i += cols) {
    simd::prefetch(first);
    simd::prefetch(last);
    first += args.v_panel;
    last += args.v_panel;
  }
}

/// Spreads the prefetch of tile_args::ahead over the register tiles of a call.
class ahead_walk {
 public:
  ahead_walk(const rows_ahead* rows, index_t steps)
      : rows_(rows), left_(rows == nullptr ? 0 : rows->count), steps_(steps) {}

  SATTN_ALWAYS_INLINE void step() {
    if (left_ == 0) return;
    for (index_t n = (left_ + steps_ - 1) / steps_; n > 0; --n) {
      const float* const row = rows_->rows[--left_];
      for (index_t i = 0; i < rows_->floats; i += 16) simd::prefetch_near(row + i);
    }
    --steps_;
  }

 private:
  const rows_ahead* rows_;
  index_t left_;
  index_t steps_;
};

/// The soft cap and the mask, in this order, over raw scores; maxima of the result. A pass of its
/// own: in the epilogue of qk_tile it cost registers that g++ then lacked in the loop.
template <class Arch, bool Capped, bool Masked>
SATTN_NOINLINE void adjust_scores(const tile_args& args, float* SATTN_RESTRICT maxima) noexcept {
  using V = simd::vec<Arch>;
  constexpr int width = V::width;
  const V cap = V::broadcast(args.soft_cap);
  const V masked = V::broadcast(-__builtin_inff());
  // One register a pass: the constants of tanh leave no room for a second one.
  simd::unroll<lane_vecs<Arch>>([&](auto c) SATTN_INLINE_LAMBDA {
    V top = masked;
    SATTN_NO_UNROLL
    for (index_t key = 0; key < args.count; ++key) {
      float* const at = args.scores + key * tile_lanes + c * width;
      V s = V::load_aligned(at);
      if constexpr (Capped) s = cap * simd::tanh(s);
      if constexpr (Masked) s = simd::select_bits<c * width>(args.masks[key], s, masked);
      s.store_aligned(at);
      top = simd::max(top, s);
    }
    top.store_aligned(maxima + c * width);
  });
}

/// Scores of the chunk into args.scores, [key][16]: scale, soft cap, mask, in this order.
template <class Arch>
SATTN_ALWAYS_INLINE void chunk_scores(const tile_args& args, const float* q, float* maxima,
                                      ahead_walk& ahead) {
  using V = simd::vec<Arch>;
  for (index_t lane = 0; lane < tile_lanes; lane += V::width) {
    V::broadcast(-__builtin_inff()).store_aligned(maxima + lane);
  }
  for_each_tile<tile_rows<Arch>>(args.count, [&](auto rows, index_t key) SATTN_INLINE_LAMBDA {
    float* const scores = args.scores + key * tile_lanes;
    ahead.step();
    if (args.prefetch_values && args.v_panel == 0) {
      qk_tile<Arch, rows, (rows >= tile_rows<Arch> - 1)>(args.k_rows + key, args.v_rows + key,
                                                         args.head_dim, q, scores, maxima);
    } else {
      if (args.prefetch_values) prefetch_panels<Arch, rows>(args, key);
      qk_tile<Arch, rows, false>(args.k_rows + key, nullptr, args.head_dim, q, scores, maxima);
    }
  });
  if (args.soft_cap == 0.0f) {
    if (args.masks != nullptr) adjust_scores<Arch, false, true>(args, maxima);
  } else if (args.masks != nullptr) {
    adjust_scores<Arch, true, true>(args, maxima);
  } else {
    adjust_scores<Arch, true, false>(args, maxima);
  }
}

template <class Arch>
SATTN_NOINLINE void score_tile(const tile_args& args) noexcept {
  alignas(64) float maxima[tile_lanes];
  ahead_walk none(nullptr, 0);
  chunk_scores<Arch>(args, args.block, maxima, none);
}

/// Turns scores into probabilities relative to the new row maxima; `rescale` gets the factor of
/// what was accumulated before. A row without a key so far keeps max = -inf and sum = 0.
template <class Arch>
SATTN_NOINLINE void softmax_chunk(float* SATTN_RESTRICT scores, index_t count, const float* maxima,
                                  float* SATTN_RESTRICT row_max, float* SATTN_RESTRICT row_sum,
                                  float* SATTN_RESTRICT rescale) noexcept {
  using V = simd::vec<Arch>;
  constexpr int width = V::width;
  constexpr int vecs = lane_vecs<Arch>;
  V base[vecs];
  V sum[vecs];
  simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
    const V before = V::load_aligned(row_max + c * width);
    const V after = simd::max(before, V::load_aligned(maxima + c * width));
    after.store_aligned(row_max + c * width);
    // -inf - -inf would be NaN; with base 0 every masked score still becomes exactly 0.
    base[c] = simd::select_equal(after, V::broadcast(-__builtin_inff()), V::zero(), after);
    const V factor = simd::exp_nonpositive(before - base[c]);
    factor.store_aligned(rescale + c * width);
    sum[c] = V::zero();
  });
  SATTN_NO_UNROLL
  for (index_t key = 0; key < count; ++key) {
    simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
      float* const at = scores + key * tile_lanes + c * width;
      const V p = simd::exp_nonpositive(V::load_aligned(at) - base[c]);
      p.store_aligned(at);
      sum[c] = sum[c] + p;
    });
  }
  simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
    float* const at = row_sum + c * width;
    simd::fma(V::load_aligned(at), V::load_aligned(rescale + c * width), sum[c]).store_aligned(at);
  });
}

/// One chunk of keys: scores, online softmax, values.
template <class Arch>
SATTN_NOINLINE void attend_tile(const tile_args& args) noexcept {
  SATTN_ASSERT(args.count > 0 && args.count <= chunk_keys);
  const lane_block block = block_of<Arch>(args.block, args.head_dim, args.v_dim);
  alignas(64) float maxima[tile_lanes];
  alignas(64) float rescale[tile_lanes];
  constexpr index_t rows = tile_rows<Arch>;
  ahead_walk ahead(args.ahead, (args.count + rows - 1) / rows + (args.v_dim + rows - 1) / rows);
  chunk_scores<Arch>(args, block.q, maxima, ahead);
  softmax_chunk<Arch>(args.scores, args.count, maxima, block.row_max, block.row_sum, rescale);
  index_t panel = 0;
  for_each_tile<rows>(args.v_dim, [&](auto cols, index_t col) SATTN_INLINE_LAMBDA {
    ahead.step();
    const index_t offset = args.v_panel == 0 ? col : panel++ * args.v_panel;
    pv_tile<Arch, cols>(args.v_rows, offset, args.count, args.scores, rescale,
                        block.out + col * tile_lanes);
  });
}

/// Factor by which a row's accumulated values become its output, given its state and the logit of
/// its sink (-inf = none). The sink joins the sum and brings no value.
template <class Arch>
SATTN_ALWAYS_INLINE simd::vec<Arch> output_factor(simd::vec<Arch> row_max, simd::vec<Arch> row_sum,
                                                  simd::vec<Arch> sink) {
  using V = simd::vec<Arch>;
  const V minus_inf = V::broadcast(-__builtin_inff());
  const V top = simd::max(row_max, sink);
  const V base = simd::select_equal(top, minus_inf, V::zero(), top);
  // Equal operands are special because inf - inf is NaN, for a sink of +inf.
  const V one = V::broadcast(1.0f);
  const V row_weight =
      simd::select_equal(row_max, base, one, simd::exp_nonpositive(row_max - base));
  const V sink_weight = simd::select_equal(sink, base, one, simd::exp_nonpositive(sink - base));
  const V sum = simd::fma(row_sum, row_weight, sink_weight);
  return simd::select_equal(sum, V::zero(), V::zero(), row_weight / sum);
}

/// Divides by the sums and writes rows; 0 and lse = -inf for a row without keys.
template <class Arch>
SATTN_NOINLINE void finish_tile(const finish_args& args) noexcept {
  using V = simd::vec<Arch>;
  constexpr index_t width = V::width;
  const lane_block block =
      block_of<Arch>(const_cast<float*>(args.block), args.head_dim, args.v_dim);
  for (index_t first = 0; first < tile_lanes; first += width) {
    const V factor =
        output_factor(V::load_aligned(block.row_max + first),
                      V::load_aligned(block.row_sum + first), V::load(args.sink_logit + first));
    index_t i = 0;
    for (; i + width <= args.v_dim; i += width) {
      V square[width];
      simd::unroll<width>([&](auto r) SATTN_INLINE_LAMBDA {
        square[r] = V::load_aligned(block.out + (i + r) * tile_lanes + first) * factor;
      });
      simd::transpose(square);
      simd::unroll<width>([&](auto r) SATTN_INLINE_LAMBDA {
        if (args.out_rows[first + r] != nullptr) square[r].store(args.out_rows[first + r] + i);
      });
    }
    alignas(64) float lane_factor[width];
    factor.store_aligned(lane_factor);
    for (index_t lane = first; lane < first + width; ++lane) {
      if (args.out_rows[lane] == nullptr) continue;
      for (index_t j = i; j < args.v_dim; ++j) {
        args.out_rows[lane][j] = block.out[j * tile_lanes + lane] * lane_factor[lane - first];
      }
    }
  }
  for (index_t lane = 0; lane < tile_lanes; ++lane) {
    if (args.lse[lane] == nullptr) continue;
    *args.lse[lane] = block.row_max[lane] + __builtin_logf(block.row_sum[lane]);
  }
}

}  // namespace sattn::kernel
