// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/kernel_args.hpp>
#include <sattn/kernel/stored_row.hpp>

// Bounds of a query's scores from the smallest and largest keys of pages: a product of a matrix and
// a vector, with pages in the lanes.

namespace sattn::kernel {

/// scores[page] = sum over d of max(q[d] min[d], q[d] max[d]), where q comes as its positive and its
/// negative part: for one query one of the two products is 0 in each step, so that the sum has the
/// roundings of q . k in the same order and a bound stays one to the last bit.
template <class Arch, class T>
SATTN_NOINLINE void score_tile_of_pages(const page_scores_args& args) noexcept {
  using V = simd::vec<Arch>;
  constexpr index_t width = V::width;
  constexpr int vecs = 64 / width < 8 ? 64 / width : 8;
  constexpr index_t line = 64 / static_cast<index_t>(sizeof(T));
  // Far enough ahead to hide memory, which no hardware does across the end of a tile.
  constexpr index_t distance = 1024 / static_cast<index_t>(sizeof(T));
  const T* const tile = static_cast<const T*>(args.tile);
  const T* const next = static_cast<const T*>(args.next_tile);
  const float* const negative = args.q + args.head_dim;
  const index_t elements = 2 * args.head_dim * tile_pages;
  for (index_t first = 0; first < tile_pages; first += vecs * width) {
    V acc[vecs];
    simd::unroll<vecs>([&](auto i) SATTN_INLINE_LAMBDA { acc[i] = V::zero(); });
    SATTN_NO_UNROLL
    for (index_t d = 0; d < args.head_dim; ++d) {
      const T* const low = tile + 2 * d * tile_pages + first;
      const T* const high = low + tile_pages;
      if (first == 0) {
        const index_t ahead = 2 * d * tile_pages + distance;
        const T* const from = ahead < elements ? tile + ahead : next + (ahead - elements);
        simd::unroll<static_cast<int>(2 * tile_pages / line)>(
            [&](auto i) SATTN_INLINE_LAMBDA { simd::prefetch(from + i * line); });
      }
      const V below = V::broadcast(negative[d]);
      const V above = V::broadcast(args.q[d]);
      simd::unroll<vecs>([&](auto i) SATTN_INLINE_LAMBDA {
        acc[i] = simd::fma(below, simd::load_as_float<Arch>(low + i * width), acc[i]);
        acc[i] = simd::fma(above, simd::load_as_float<Arch>(high + i * width), acc[i]);
        __asm__ volatile("" ::: "memory");  // clang 14 loads further ahead than it has registers
      });
    }
    simd::unroll<vecs>([&](auto i) SATTN_INLINE_LAMBDA {
      const index_t at = first + i * width;
      if constexpr (sizeof(T) == 1) {
        const auto* const scales = reinterpret_cast<const float*>(tile + elements);
        acc[i] = acc[i] * V::load(scales + at);
      }
      acc[i].store(args.scores + at);
    });
  }
}

/// The bounds of the 64 pages of a tile.
template <class Arch>
SATTN_NOINLINE void score_pages(const page_scores_args& args) noexcept {
  switch (args.type) {
    case dtype::f16: return score_tile_of_pages<Arch, f16>(args);
    case dtype::i8: return score_tile_of_pages<Arch, std::int8_t>(args);
    default: return score_tile_of_pages<Arch, float>(args);
  }
}

}  // namespace sattn::kernel
