// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/kernel_args.hpp>
#include <sattn/simd/transpose.hpp>

// The two products of the row kernel for rows of K and V that are scattered and expected in a
// cache: several rows in lock step and the output in registers. Rows that stream from memory in
// ascending order want decode_rows.hpp.

namespace sattn::kernel {

inline constexpr int list_chains = 8;  // accumulators: two FMA units times their latency

// The rows of the next list come in while this one is multiplied, at the same places. One query
// alone is bound by the cache that delivers its own rows.
template <int Queries>
inline constexpr bool prefetch_next = Queries > 1;

/// scores[n][key] = q[n] . k[key]: list_chains / Queries keys at a time, one chain for each product,
/// so that the bits of a query do not depend on how many there are.
template <class Arch, int Queries>
SATTN_NOINLINE void qk_lists(const float* const* k_rows, const float* const* next_k,
                             index_t count, const float* q, index_t q_stride, index_t head_dim,
                             float* SATTN_RESTRICT scores) noexcept {
  using V = simd::vec<Arch>;
  constexpr index_t width = V::width;
  constexpr int keys = list_chains / Queries;
  SATTN_NO_UNROLL
  for (index_t key = 0; key < count; key += keys) {
    const float* k[keys];
    const float* next[keys];
    simd::unroll<keys>([&](auto r) SATTN_INLINE_LAMBDA {
      const index_t at = key + r < count ? key + r : count - 1;
      k[r] = k_rows[at];
      next[r] = next_k[at];
    });
    V acc[list_chains];
    simd::unroll<list_chains>([&](auto i) SATTN_INLINE_LAMBDA { acc[i] = V::zero(); });
    const auto add = [&](index_t i, const V (&row)[keys]) SATTN_INLINE_LAMBDA {
      simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
        const V query = V::load_aligned(q + n * q_stride + i);
        simd::unroll<keys>([&](auto r) SATTN_INLINE_LAMBDA {
          acc[n * keys + r] = simd::fma(query, row[r], acc[n * keys + r]);
        });
      });
    };
    V row[keys];
    index_t i = 0;
    SATTN_NO_UNROLL
    for (; i + width <= head_dim; i += width) {
      simd::unroll<keys>([&](auto r) SATTN_INLINE_LAMBDA { row[r] = V::load(k[r] + i); });
      add(i, row);
      if (prefetch_next<Queries> && i % 16 == 0) {
        simd::unroll<keys>([&](auto r) SATTN_INLINE_LAMBDA { simd::prefetch_near(next[r] + i); });
      }
    }
    if (i < head_dim) {
      simd::unroll<keys>([&](auto r) SATTN_INLINE_LAMBDA {
        row[r] = V::load_partial(k[r] + i, head_dim - i);
      });
      add(i, row);
    }
    alignas(64) float sums[list_chains];
    simd::reduce_each(acc, sums);
    simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
      simd::unroll<keys>([&](auto r) SATTN_INLINE_LAMBDA {
        scores[n * chunk_keys + key + r] = sums[n * keys + r];
      });
    });
  }
}

/// out[n] = out[n] * rescale[n] + sum over keys of p[n][key] v[key] for the columns of Cols
/// registers that begin at `col`.
template <class Arch, int Queries, int Cols, bool Partial>
SATTN_ALWAYS_INLINE void pv_list_cols(const float* const* v_rows, const float* const* next_v,
                                      index_t count, index_t v_dim,
                                      index_t col, const float* p, const float* rescale,
                                      float* SATTN_RESTRICT out, index_t out_stride) {
  using V = simd::vec<Arch>;
  constexpr int width = V::width;
  V acc[Queries][Cols];
  simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
    simd::unroll<Cols>([&](auto c) SATTN_INLINE_LAMBDA {
      acc[n][c] = V::load_aligned(out + n * out_stride + col + c * width) *
                  V::broadcast(rescale[n]);
    });
  });
  SATTN_NO_UNROLL
  for (index_t key = 0; key < count; ++key) {
    const float* const v = v_rows[key] + col;
    if constexpr (prefetch_next<Queries>) simd::prefetch_near(next_v[key] + col);
    V row[Cols];
    simd::unroll<Cols>([&](auto c) SATTN_INLINE_LAMBDA {
      row[c] = Partial ? V::load_partial(v, v_dim - col) : V::load(v + c * width);
    });
    simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
      const V weight = V::broadcast(p[n * chunk_keys + key]);
      simd::unroll<Cols>([&](auto c) SATTN_INLINE_LAMBDA {
        acc[n][c] = simd::fma(weight, row[c], acc[n][c]);
      });
    });
  }
  simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
    simd::unroll<Cols>([&](auto c) SATTN_INLINE_LAMBDA {
      acc[n][c].store_aligned(out + n * out_stride + col + c * width);
    });
  });
}

/// The same for all columns: whole cache lines of every row at a time.
template <class Arch, int Queries>
SATTN_NOINLINE void pv_lists(const float* const* v_rows, const float* const* next_v,
                             index_t count, index_t v_dim,
                             const float* p, const float* rescale, float* SATTN_RESTRICT out,
                             index_t out_stride) noexcept {
  constexpr index_t width = simd::vec<Arch>::width;
  constexpr int cols = list_chains / Queries;
  index_t col = 0;
  for (; col + cols * width <= v_dim; col += cols * width) {
    pv_list_cols<Arch, Queries, cols, false>(v_rows, next_v, count, v_dim, col, p, rescale, out,
                                             out_stride);
  }
  for (; col + width <= v_dim; col += width) {
    pv_list_cols<Arch, Queries, 1, false>(v_rows, next_v, count, v_dim, col, p, rescale, out,
                                           out_stride);
  }
  if (col < v_dim) {
    pv_list_cols<Arch, Queries, 1, true>(v_rows, next_v, count, v_dim, col, p, rescale, out,
                                           out_stride);
  }
}

}  // namespace sattn::kernel
