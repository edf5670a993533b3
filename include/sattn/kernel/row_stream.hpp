// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/kernel_args.hpp>
#include <sattn/kernel/stored_row.hpp>
#include <sattn/simd/transpose.hpp>

// The two products of the row kernel for one query whose rows come from memory: row by row in their
// order, as memory delivers them best, with the output in the first-level cache. Beside each row
// the row of the next piece is prefetched: no hardware sees ahead where K and V take turns. The
// sums are those of row_products.hpp to the last bit.

namespace sattn::kernel {

/// Elements of a row that a loop takes at once: a cache line.
template <class T>
inline constexpr index_t streamed = 64 / static_cast<index_t>(sizeof(T));

/// scores[key] = q . k[key]. A row is one chain; the processor overlaps as many rows as it sees.
template <class Arch, class T>
SATTN_NOINLINE void qk_stream(const void* const* k_rows, const void* const* next_k, index_t count,
                              const float* q, index_t head_dim,
                              float* SATTN_RESTRICT scores) noexcept {
  using V = simd::vec<Arch>;
  using row_type = stored_row<Arch, T>;
  constexpr index_t width = V::width;
  constexpr int keys = 8;
  const auto row_sum = [&](index_t key) SATTN_INLINE_LAMBDA {
    const row_type k(k_rows[key]);
    const row_type next(next_k[key]);
    V sum = V::zero();
    index_t i = 0;
    SATTN_NO_UNROLL
    for (; i + streamed<T> <= head_dim; i += streamed<T>) {
      next.prefetch(i);
      simd::unroll<streamed<T> / width>([&](auto u) SATTN_INLINE_LAMBDA {
        sum = simd::fma(V::load_aligned(q + i + u * width), k.load(i + u * width), sum);
      });
    }
    SATTN_NO_UNROLL
    for (; i + width <= head_dim; i += width) {
      sum = simd::fma(V::load_aligned(q + i), k.load(i), sum);
    }
    if (i < head_dim) {
      sum = simd::fma(V::load_aligned(q + i), k.load_partial(i, head_dim - i), sum);
    }
    return sum;
  };
  const auto sums = [&](auto rows, index_t key) SATTN_INLINE_LAMBDA {
    V sum[rows];
    simd::unroll<rows>([&](auto r) SATTN_INLINE_LAMBDA { sum[r] = row_sum(key + r); });
    simd::reduce_each(sum, scores + key);
  };
  index_t key = 0;
  SATTN_NO_UNROLL
  for (; key + keys <= count; key += keys) sums(std::integral_constant<int, keys>{}, key);
  SATTN_NO_UNROLL
  for (; key < count; ++key) sums(std::integral_constant<int, 1>{}, key);
}

/// out = out * rescale + sum over keys of p[key] v[key], a few rows at a time, because one would be
/// bound by the stores; together they are half a page or less, so that memory still sees an order.
template <class Arch, class T>
SATTN_NOINLINE void pv_stream(const void* const* v_rows, const void* const* next_v, index_t count,
                              index_t v_dim, const float* p, float rescale,
                              float* SATTN_RESTRICT out) noexcept {
  using V = simd::vec<Arch>;
  using row_type = stored_row<Arch, T>;
  constexpr index_t width = V::width;
  constexpr int at_once = sizeof(T) == 1 ? 4 : 2;
  // The first rows also rescale what is there.
  const auto add = [&](auto rows, auto first, index_t key) SATTN_INLINE_LAMBDA {
    const V factor = V::broadcast(rescale);
    row_type v[rows];
    row_type next[rows];
    V weight[rows];
    simd::unroll<rows>([&](auto r) SATTN_INLINE_LAMBDA {
      v[r] = row_type(v_rows[key + r]);
      next[r] = row_type(next_v[key + r]);
      weight[r] = V::broadcast(p[key + r]);
    });
    const auto column = [&](index_t i, auto&& load) SATTN_INLINE_LAMBDA {
      V sum = V::load_aligned(out + i);
      if constexpr (first) sum = sum * factor;
      simd::unroll<rows>(
          [&](auto r) SATTN_INLINE_LAMBDA { sum = simd::fma(weight[r], load(r), sum); });
      sum.store_aligned(out + i);
    };
    index_t i = 0;
    SATTN_NO_UNROLL
    for (; i + streamed<T> <= v_dim; i += streamed<T>) {
      simd::unroll<rows>([&](auto r) SATTN_INLINE_LAMBDA { next[r].prefetch(i); });
      simd::unroll<streamed<T> / width>([&](auto u) SATTN_INLINE_LAMBDA {
        column(i + u * width, [&](auto r) SATTN_INLINE_LAMBDA { return v[r].load(i + u * width); });
      });
    }
    SATTN_NO_UNROLL
    for (; i + width <= v_dim; i += width) {
      column(i, [&](auto r) SATTN_INLINE_LAMBDA { return v[r].load(i); });
    }
    if (i < v_dim) {
      column(i, [&](auto r) SATTN_INLINE_LAMBDA { return v[r].load_partial(i, v_dim - i); });
    }
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, at_once> several;
  constexpr std::true_type first;
  constexpr std::false_type later;
  index_t key = 0;
  if (count >= at_once) {
    add(several, first, 0);
    SATTN_NO_UNROLL
    for (key = at_once; key + at_once <= count; key += at_once) add(several, later, key);
  } else {
    add(one, first, 0);
    key = 1;
  }
  SATTN_NO_UNROLL
  for (; key < count; ++key) add(one, later, key);
}

}  // namespace sattn::kernel
