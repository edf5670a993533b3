// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/kernel_args.hpp>
#include <sattn/kernel/prefill_tile.hpp>
#include <sattn/kernel/row_products.hpp>
#include <sattn/kernel/row_stream.hpp>
#include <sattn/simd/exp.hpp>

// A few query rows against chunks of keys, with the head dimension in the lanes: for decoding and
// for lists that belong to a single row, where 16 query lanes would stand mostly empty. Rows of K
// and V are read and widened once for up to four query rows.

namespace sattn::kernel {

template <class Arch>
constexpr index_t padded_keys(index_t count) {
  constexpr index_t width = simd::vec<Arch>::width;
  return (count + width - 1) / width * width;
}

/// Soft cap and masks, in this order, over the scores of one query; -inf behind the last key.
template <class Arch>
SATTN_NOINLINE void adjust_row(const rows_args& args, index_t query, index_t begin, index_t count,
                               float* SATTN_RESTRICT s) noexcept {
  using V = simd::vec<Arch>;
  const float minus_inf = -__builtin_inff();
  const index_t padded = padded_keys<Arch>(count);
  if (args.soft_cap != 0.0f) {
    const V cap = V::broadcast(args.soft_cap);
    for (index_t i = count; i < padded; ++i) s[i] = 0.0f;
    for (index_t i = 0; i < padded; i += V::width) {
      (cap * simd::tanh(V::load_aligned(s + i))).store_aligned(s + i);
    }
  }
  if (args.masks != nullptr) {
    const int bit = args.mask_bit[query];
    for (index_t i = 0; i < count; ++i) {
      if ((args.masks[begin + i] >> bit & 1) == 0) s[i] = minus_inf;
    }
  }
  for (index_t i = count; i < padded; ++i) s[i] = minus_inf;
}

/// rows[n][i] *= factors[i], of which a whole vector behind the last is read.
template <class Arch, int Queries>
SATTN_NOINLINE void scale_rows(float* SATTN_RESTRICT rows, const float* SATTN_RESTRICT factors,
                               index_t count) noexcept {
  using V = simd::vec<Arch>;
  for (index_t i = 0; i < padded_keys<Arch>(count); i += V::width) {
    const V factor = V::load(factors + i);
    simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
      float* const at = rows + n * chunk_keys + i;
      (V::load_aligned(at) * factor).store_aligned(at);
    });
  }
}

/// Scores of a piece to probabilities, against the running maxima; rescale[n] becomes the factor of
/// what query n has accumulated before.
template <class Arch, int Queries>
SATTN_NOINLINE void softmax_rows(float* SATTN_RESTRICT scores, index_t count,
                                 float* SATTN_RESTRICT max_and_sum, index_t state_stride,
                                 float* SATTN_RESTRICT rescale) noexcept {
  using V = simd::vec<Arch>;
  constexpr int width = V::width;
  static_assert(Queries <= width);
  const index_t padded = padded_keys<Arch>(count);
  const float minus_inf = -__builtin_inff();
  alignas(64) float change[width] = {};
  V sum[Queries];
  simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
    float* const s = scores + n * chunk_keys;
    float& row_max = max_and_sum[n * state_stride];
    V top = V::load_aligned(s);
    for (index_t i = width; i < padded; i += width) top = simd::max(top, V::load_aligned(s + i));
    const float piece_max = simd::reduce_max(top);
    const float after = piece_max > row_max ? piece_max : row_max;
    // -inf - -inf would be NaN; with base 0 every masked score still becomes exactly 0.
    const float base = after == minus_inf ? 0.0f : after;
    change[n] = row_max - base;
    row_max = after;
    const V vec_base = V::broadcast(base);
    sum[n] = V::zero();
    SATTN_NO_UNROLL
    for (index_t i = 0; i < padded; i += width) {
      const V p = simd::exp_nonpositive(V::load_aligned(s + i) - vec_base);
      p.store_aligned(s + i);
      sum[n] = sum[n] + p;
    }
  });
  simd::exp_nonpositive(V::load_aligned(change)).store_aligned(rescale);
  simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
    float& row_sum = max_and_sum[n * state_stride + 1];
    row_sum = row_sum * rescale[n] + simd::reduce_add(sum[n]);
  });
}

/// The keys [begin, begin + count) for the queries [first, first + Queries). `next_k` and `next_v`
/// are the rows that come after them.
template <class Arch, int Queries>
SATTN_ALWAYS_INLINE void attend_row_group(const rows_args& args, index_t first, index_t begin,
                                          index_t count, const void* const* next_k,
                                          const void* const* next_v) {
  const index_t q_stride = row_out_floats(args.head_dim);
  const index_t state_stride = row_state_floats(args.v_dim);
  const float* const q = args.q + first * q_stride;
  float* const states = args.states + first * state_stride;
  alignas(64) float scores[Queries * chunk_keys];
  alignas(64) float rescale[simd::vec<Arch>::width];
  // One query alone is bound by the cache that delivers its own rows.
  constexpr look_ahead in_cache = Queries == 1 ? look_ahead::none : look_ahead::beside;
  with_plain_type(args.k_type, [&]<class T>(const T*) SATTN_INLINE_LAMBDA {
    if constexpr (Queries == 1 && streams<T>) {
      if (!args.cached) {
        return qk_stream<Arch, T>(args.k_rows + begin, count, q, args.head_dim, scores);
      }
    }
    const auto run = args.cached ? &qk_rows<Arch, Queries, T, in_cache>
                                 : &qk_rows<Arch, Queries, T, look_ahead::beside>;
    run(args.k_rows + begin, next_k, count, q, q_stride, args.head_dim, scores);
  });
  if (args.k_scales != nullptr) scale_rows<Arch, Queries>(scores, args.k_scales + begin, count);
  if (count % simd::vec<Arch>::width != 0 || args.masks != nullptr || args.soft_cap != 0.0f) {
    for (int n = 0; n < Queries; ++n) {
      adjust_row<Arch>(args, first + n, begin, count, scores + n * chunk_keys);
    }
  }
  softmax_rows<Arch, Queries>(scores, count, states + row_out_floats(args.v_dim), state_stride,
                              rescale);
  if (args.v_scales != nullptr) scale_rows<Arch, Queries>(scores, args.v_scales + begin, count);
  with_plain_type(args.v_type, [&]<class T>(const T*) SATTN_INLINE_LAMBDA {
    if constexpr (Queries == 1 && streams<T>) {
      if (!args.cached) {
        return pv_stream<Arch, T>(args.v_rows + begin, count, args.v_dim, scores, rescale[0], states);
      }
    }
    const auto run = args.cached ? &pv_rows<Arch, Queries, T, in_cache>
                                 : &pv_rows<Arch, Queries, T, look_ahead::in_order>;
    run(args.v_rows + begin, next_v, count, args.v_dim, scores, rescale, states, state_stride);
  });
}

/// One chunk of keys for every query row, piece by piece, four rows (then three, two or one) at a
/// time.
template <class Arch>
SATTN_NOINLINE void attend_rows(const rows_args& args) noexcept {
  SATTN_ASSERT(args.count > 0 && args.count <= chunk_keys);
  const index_t piece = args.cached ? chunk_keys : stream_piece;
  for (index_t begin = 0; begin < args.count; begin += piece) {
    const index_t end = begin + piece < args.count ? begin + piece : args.count;
    const void* const* const next_k = end < args.count ? args.k_rows + end : args.next_k;
    const void* const* const next_v = end < args.count ? args.v_rows + end : args.next_v;
    const auto run = [&](auto queries, index_t first) SATTN_INLINE_LAMBDA {
      attend_row_group<Arch, queries>(args, first, begin, end - begin, next_k, next_v);
    };
    index_t first = 0;
    for (; first + 4 <= args.queries; first += 4) run(std::integral_constant<int, 4>{}, first);
    switch (args.queries - first) {
      case 3: run(std::integral_constant<int, 3>{}, first); break;
      case 2: run(std::integral_constant<int, 2>{}, first); break;
      case 1: run(std::integral_constant<int, 1>{}, first); break;
      default: break;
    }
  }
}

/// Combines the partial states of one query row in the order given and writes the row.
template <class Arch>
SATTN_NOINLINE void merge_rows(const merge_args& args) noexcept {
  using V = simd::vec<Arch>;
  constexpr index_t width = V::width;
  const index_t at_max = row_out_floats(args.v_dim);
  const float minus_inf = -__builtin_inff();
  const auto state = [&](index_t i) SATTN_INLINE_LAMBDA {
    return args.states + i * args.state_stride;
  };
  float top = minus_inf;
  for (index_t i = 0; i < args.count; ++i) {
    const float m = state(i)[at_max];
    top = top > m ? top : m;
  }
  const float base = top == minus_inf ? 0.0f : top;
  const auto weight = [&](index_t i) SATTN_INLINE_LAMBDA {
    return simd::exp_nonpositive(V::broadcast(state(i)[at_max] - base));
  };
  V sum = V::zero();
  for (index_t i = 0; i < args.count; ++i) {
    sum = simd::fma(V::broadcast(state(i)[at_max + 1]), weight(i), sum);
  }
  const V factor =
      output_factor(V::broadcast(top), sum, V::broadcast(args.sink_logit));
  constexpr int vecs = 8;  // columns that share an evaluation of the weights
  for (index_t first = 0; first < args.v_dim; first += vecs * width) {
    V out[vecs];
    simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA { out[c] = V::zero(); });
    for (index_t i = 0; i < args.count; ++i) {
      const V share = weight(i);
      simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
        const index_t col = first + c * width;
        if (col < args.v_dim) out[c] = simd::fma(V::load_aligned(state(i) + col), share, out[c]);
      });
    }
    simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
      const index_t col = first + c * width;
      const V row = out[c] * factor;
      if (col + width <= args.v_dim) {
        row.store(args.out + col);
      } else if (col < args.v_dim) {
        row.store_partial(args.out + col, args.v_dim - col);
      }
    });
  }
  if (args.lse != nullptr) {
    alignas(64) float lane[width];
    sum.store_aligned(lane);
    *args.lse = top + __builtin_logf(lane[0]);
  }
}

}  // namespace sattn::kernel
