// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/kernel_args.hpp>
#include <sattn/kernel/stored_row.hpp>

// Scores of pages from their summaries, the smallest and largest values of their keys or the means:
// a product of a matrix and a vector, with pages in the lanes.

namespace sattn::kernel {

/// Of means, scores[page] = sum over d of q[d] mean[d]. Of bounds, the sum of max(q[d] min[d],
/// q[d] max[d]), where q comes as its negative and its positive part: for one query one of the two
/// products is 0 in each step, so that the sum has the roundings of q . k in the same order and a
/// bound stays one to the last bit. The scale of int8, a power of two for bounds, comes last.
template <class Arch, class T, int Rows>
SATTN_NOINLINE void score_tile_of_pages(const page_scores_args& args) noexcept {
  using V = simd::vec<Arch>;
  constexpr index_t width = V::width;
  constexpr int vecs = 64 / width < 8 ? 64 / width : 8;
  constexpr index_t line = 64 / static_cast<index_t>(sizeof(T));
  // Far enough ahead to hide memory, which no hardware does across the end of a tile.
  constexpr index_t distance = 4096 / static_cast<index_t>(sizeof(T));
  const T* const tile = static_cast<const T*>(args.tile);
  const T* const next = static_cast<const T*>(args.next_tile);
  const index_t elements = Rows * args.head_dim * tile_pages;
  for (index_t first = 0; first < tile_pages; first += vecs * width) {
    V acc[vecs];
    simd::unroll<vecs>([&](auto i) SATTN_INLINE_LAMBDA { acc[i] = V::zero(); });
    SATTN_NO_UNROLL
    for (index_t d = 0; d < args.head_dim; ++d) {
      const index_t at = Rows * d * tile_pages;
      if (first == 0) {
        const index_t ahead = at + distance;
        const T* const from = ahead < elements ? tile + ahead : next + (ahead - elements);
        simd::unroll<static_cast<int>(Rows * tile_pages / line)>(
            [&](auto i) SATTN_INLINE_LAMBDA { simd::prefetch(from + i * line); });
      }
      V q[Rows];
      simd::unroll<Rows>([&](auto row) SATTN_INLINE_LAMBDA {
        q[row] = V::broadcast(args.q[row * args.head_dim + d]);
      });
      const T* const values = tile + at + first;
      simd::unroll<vecs>([&](auto i) SATTN_INLINE_LAMBDA {
        simd::unroll<Rows>([&](auto row) SATTN_INLINE_LAMBDA {
          const T* const from = values + row * tile_pages + i * width;
          acc[i] = simd::fma(q[row], simd::load_as_float<Arch>(from), acc[i]);
        });
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

/// The scores of the 64 pages of a tile.
template <class Arch>
SATTN_NOINLINE void score_pages(const page_scores_args& args) noexcept {
  const auto of = [&]<class T>(const T*) {
    args.rows == 2 ? score_tile_of_pages<Arch, T, 2>(args) : score_tile_of_pages<Arch, T, 1>(args);
  };
  switch (args.type) {
    case dtype::f16: return of(static_cast<const f16*>(nullptr));
    case dtype::i8: return of(static_cast<const std::int8_t*>(nullptr));
    default: return of(static_cast<const float*>(nullptr));
  }
}

}  // namespace sattn::kernel
