// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/kernel_args.hpp>
#include <sattn/kernel/stored_row.hpp>
#include <sattn/simd/transpose.hpp>

// The two products of the row kernel for one query whose rows come from memory: row by row in their
// order, as memory delivers them best, with the output in the first-level cache. The sums are those
// of row_products.hpp to the last bit.

namespace sattn::kernel {

/// Types that are quicker so. A piece of f32 rows takes two pages of memory, and int8 is bound by its
/// conversion: both prefer the register tiles and their prefetch (docs/dead_ends.md).
template <class T>
inline constexpr bool streams = sizeof(T) == 2;

/// scores[key] = q . k[key]. A row is one chain; the processor overlaps as many rows as it sees.
template <class Arch, class T>
SATTN_NOINLINE void qk_stream(const void* const* k_rows, index_t count, const float* q,
                              index_t head_dim, float* SATTN_RESTRICT scores) noexcept {
  using V = simd::vec<Arch>;
  using row_type = stored_row<Arch, T>;
  constexpr index_t width = V::width;
  constexpr int keys = 4;
  const auto row_sum = [&](index_t key) SATTN_INLINE_LAMBDA {
    const row_type k(k_rows[key]);
    V sum = V::zero();
    index_t i = 0;
    SATTN_NO_UNROLL
    for (; i + row_type::line <= head_dim; i += row_type::line) {
      simd::unroll<row_type::line / width>([&](auto u) SATTN_INLINE_LAMBDA {
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
  index_t key = 0;
  SATTN_NO_UNROLL
  for (; key + keys <= count; key += keys) {
    V sum[keys];
    simd::unroll<keys>([&](auto r) SATTN_INLINE_LAMBDA { sum[r] = row_sum(key + r); });
    alignas(64) float sums[keys];
    simd::reduce_each(sum, sums);
    simd::unroll<keys>([&](auto r) SATTN_INLINE_LAMBDA { scores[key + r] = sums[r]; });
  }
  SATTN_NO_UNROLL
  for (; key < count; ++key) {
    V sum[1] = {row_sum(key)};
    alignas(64) float sums[1];
    simd::reduce_each(sum, sums);
    scores[key] = sums[0];
  }
}

/// out = out * rescale + sum over keys of p[key] v[key], two rows at a time: one would be bound by its
/// stores.
template <class Arch, class T>
SATTN_NOINLINE void pv_stream(const void* const* v_rows, index_t count, index_t v_dim,
                              const float* p, float rescale, float* SATTN_RESTRICT out) noexcept {
  using V = simd::vec<Arch>;
  using row_type = stored_row<Arch, T>;
  constexpr index_t width = V::width;
  const auto add = [&](auto rows, index_t key, V factor) SATTN_INLINE_LAMBDA {
    row_type v[rows];
    V weight[rows];
    simd::unroll<rows>([&](auto r) SATTN_INLINE_LAMBDA {
      v[r] = row_type(v_rows[key + r]);
      weight[r] = V::broadcast(p[key + r]);
    });
    const auto column = [&](index_t i, auto&& load) SATTN_INLINE_LAMBDA {
      V sum = V::load_aligned(out + i) * factor;
      simd::unroll<rows>([&](auto r) SATTN_INLINE_LAMBDA { sum = simd::fma(weight[r], load(r), sum); });
      sum.store_aligned(out + i);
    };
    index_t i = 0;
    SATTN_NO_UNROLL
    for (; i + row_type::line <= v_dim; i += row_type::line) {
      simd::unroll<row_type::line / width>([&](auto u) SATTN_INLINE_LAMBDA {
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
  const V one = V::broadcast(1.0f);
  V factor = V::broadcast(rescale);
  index_t key = 0;
  SATTN_NO_UNROLL
  for (; key + 2 <= count; key += 2) {
    add(std::integral_constant<int, 2>{}, key, factor);
    factor = one;
  }
  if (key < count) add(std::integral_constant<int, 1>{}, key, factor);
}

}  // namespace sattn::kernel
