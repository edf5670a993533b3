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

/// Floats of the scores of so many keys up to a whole register, and to four keys.
template <class Arch, int Queries>
constexpr index_t padded_scores(index_t count) {
  constexpr index_t four = 4 * score_stride<Queries>;
  constexpr index_t unit = simd::vec<Arch>::width > four ? simd::vec<Arch>::width : four;
  return (count * score_stride<Queries> + unit - 1) / unit * unit;
}

/// Soft cap and masks, in this order; -inf behind the last key.
template <class Arch, int Queries>
SATTN_NOINLINE void adjust_rows(const rows_args& args, index_t first, index_t begin, index_t count,
                                float* SATTN_RESTRICT s) noexcept {
  using V = simd::vec<Arch>;
  constexpr index_t stride = score_stride<Queries>;
  const float minus_inf = -__builtin_inff();
  const index_t padded = padded_scores<Arch, Queries>(count);
  if (args.soft_cap != 0.0f) {
    const V cap = V::broadcast(args.soft_cap);
    for (index_t i = count * stride; i < padded; ++i) s[i] = 0.0f;
    for (index_t i = 0; i < padded; i += V::width) {
      (cap * simd::tanh(V::load_aligned(s + i))).store_aligned(s + i);
    }
  }
  if (args.masks != nullptr) {
    for (index_t key = 0; key < count; ++key) {
      const unsigned mask = args.masks[begin + key];
      for (index_t n = 0; n < Queries; ++n) {
        if ((mask >> args.mask_bit[first + n] & 1) == 0) s[key * stride + n] = minus_inf;
      }
    }
  }
  for (index_t i = count * stride; i < padded; ++i) s[i] = minus_inf;
}

/// The scores of key i times factors[i].
template <int Queries>
SATTN_NOINLINE void scale_rows(float* SATTN_RESTRICT scores, const float* SATTN_RESTRICT factors,
                               index_t count) noexcept {
  constexpr index_t stride = score_stride<Queries>;
  for (index_t key = 0; key < count; ++key) {
    for (index_t n = 0; n < stride; ++n) scores[key * stride + n] *= factors[key];
  }
}

/// Scores of a piece to probabilities, against the running maxima; rescale[n] becomes the factor of
/// what query n has accumulated before. The bits of a query do not depend on those beside it.
template <class Arch, int Queries>
SATTN_NOINLINE void softmax_rows(float* SATTN_RESTRICT scores, index_t count,
                                 float* SATTN_RESTRICT max_and_sum, index_t state_stride,
                                 float* SATTN_RESTRICT rescale) noexcept {
  using V = simd::vec<Arch>;
  constexpr int width = V::width;
  constexpr int stride = score_stride<Queries>;
  static_assert(stride <= width);
  const index_t padded = padded_scores<Arch, Queries>(count);
  V top = V::load_aligned(scores);
  for (index_t i = width; i < padded; i += width) top = simd::max(top, V::load_aligned(scores + i));
  alignas(64) float lane[width];
  for (int i = 0; i < width; ++i) {
    lane[i] = max_and_sum[(i % stride < Queries ? i % stride : 0) * state_stride];
  }
  const V before = V::load_aligned(lane);
  const V after = simd::max(before, simd::max_of_residues<stride>(top));
  // -inf - -inf would be NaN; with base 0 every masked score still becomes exactly 0.
  const V base = simd::select_equal(after, V::broadcast(-__builtin_inff()), V::zero(), after);
  simd::exp_nonpositive(before - base).store_aligned(rescale);
  SATTN_NO_UNROLL
  for (index_t i = 0; i < padded; i += width) {
    simd::exp_nonpositive(V::load_aligned(scores + i) - base).store_aligned(scores + i);
  }
  // Every fourth key in a sum of its own, whatever the width of a register.
  using four = simd::vec<arch::sse2>;
  four sum[stride];
  simd::unroll<stride>([&](auto i) SATTN_INLINE_LAMBDA { sum[i] = four::zero(); });
  SATTN_NO_UNROLL
  for (index_t i = 0; i < padded; i += 4 * stride) {
    simd::unroll<stride>([&](auto j) SATTN_INLINE_LAMBDA {
      sum[j] = sum[j] + four::load_aligned(scores + i + 4 * j);
    });
  }
  alignas(16) float part[4 * stride];
  simd::unroll<stride>([&](auto i) SATTN_INLINE_LAMBDA { sum[i].store_aligned(part + 4 * i); });
  after.store_aligned(lane);
  for (int n = 0; n < Queries; ++n) {
    float* const state = max_and_sum + n * state_stride;
    state[0] = lane[n];
    state[1] = state[1] * rescale[n] + ((part[n] + part[stride + n]) +
                                        (part[2 * stride + n] + part[3 * stride + n]));
  }
}

/// Scores of the keys [begin, begin + count) for the queries [first, first + Queries), adjusted and
/// padded. `next_k` are the rows that come after them.
template <class Arch, int Queries>
SATTN_ALWAYS_INLINE void score_row_group(const rows_args& args, index_t first, index_t begin,
                                         index_t count, const void* const* next_k, float* scores) {
  const index_t q_stride = row_out_floats(args.head_dim);
  const float* const q = args.q + first * q_stride;
  with_plain_type(args.k_type, [&]<class T>(const T*) SATTN_INLINE_LAMBDA {
    if constexpr (Queries == 1) {
      if (!args.cached) {
        return qk_stream<Arch, T>(args.k_rows + begin, next_k, count, q, args.head_dim, scores);
      }
    }
    // One query alone is bound by the cache that delivers its own rows.
    constexpr look_ahead ahead = Queries == 1 ? look_ahead::none : look_ahead::beside;
    qk_rows<Arch, Queries, T, ahead>(args.k_rows + begin, next_k, count, q, q_stride, args.head_dim,
                                     scores);
  });
  if (args.k_scales != nullptr) scale_rows<Queries>(scores, args.k_scales + begin, count);
  if (padded_scores<Arch, Queries>(count) != count * score_stride<Queries> ||
      args.masks != nullptr || args.soft_cap != 0.0f) {
    adjust_rows<Arch, Queries>(args, first, begin, count, scores);
  }
}

/// The keys [begin, begin + count) for the queries [first, first + Queries). `next_k` and `next_v`
/// are the rows that come after them.
template <class Arch, int Queries>
SATTN_ALWAYS_INLINE void attend_row_group(const rows_args& args, index_t first, index_t begin,
                                          index_t count, const void* const* next_k,
                                          const void* const* next_v) {
  const index_t state_stride = row_state_floats(args.v_dim);
  float* const states = args.states + first * state_stride;
  alignas(64) float scores[score_stride<Queries> * chunk_keys];
  alignas(64) float rescale[simd::vec<Arch>::width];
  score_row_group<Arch, Queries>(args, first, begin, count, next_k, scores);
  softmax_rows<Arch, Queries>(scores, count, states + row_out_floats(args.v_dim), state_stride,
                              rescale);
  if (args.v_scales != nullptr) scale_rows<Queries>(scores, args.v_scales + begin, count);
  with_plain_type(args.v_type, [&]<class T>(const T*) SATTN_INLINE_LAMBDA {
    if constexpr (Queries == 1) {
      if (!args.cached) {
        return pv_stream<Arch, T>(args.v_rows + begin, next_v, count, args.v_dim, scores,
                                  rescale[0], states);
      }
      pv_rows<Arch, 1, T, look_ahead::none>(args.v_rows + begin, next_v, count, args.v_dim, scores,
                                            rescale, states, state_stride);
    } else {
      const auto run = args.cached ? &pv_rows<Arch, Queries, T, look_ahead::beside>
                                   : &pv_rows<Arch, Queries, T, look_ahead::in_order>;
      run(args.v_rows + begin, next_v, count, args.v_dim, scores, rescale, states, state_stride);
    }
  });
}

/// Calls f(queries, first, begin, count, next_k, next_v) for one chunk of keys and every query row,
/// piece by piece, four rows (then three, two or one) at a time.
template <class F>
SATTN_ALWAYS_INLINE void for_each_row_group(const rows_args& args, F&& f) {
  SATTN_ASSERT(args.count > 0 && args.count <= chunk_keys);
  const bool bytes = args.k_type == dtype::i8 && args.v_type == dtype::i8;
  const index_t piece = args.cached ? chunk_keys : bytes ? stream_piece_of_bytes : stream_piece;
  for (index_t begin = 0; begin < args.count; begin += piece) {
    const index_t end = begin + piece < args.count ? begin + piece : args.count;
    const void* const* const next_k = end < args.count ? args.k_rows + end : args.next_k;
    const void* const* const next_v = end < args.count ? args.v_rows + end : args.next_v;
    const auto run = [&](auto queries, index_t first) SATTN_INLINE_LAMBDA {
      f(queries, first, begin, end - begin, next_k, next_v);
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

/// One chunk of keys for every query row.
template <class Arch>
SATTN_NOINLINE void attend_rows(const rows_args& args) noexcept {
  for_each_row_group(args, [&](auto queries, index_t first, index_t begin, index_t count,
                               const void* const* next_k,
                               const void* const* next_v) SATTN_INLINE_LAMBDA {
    attend_row_group<Arch, queries>(args, first, begin, count, next_k, next_v);
  });
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
