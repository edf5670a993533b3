// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/simd/vec.hpp>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

namespace sattn::simd {

/// Transposes a width x width square of registers: lane j of row i becomes lane i of row j.
/// Written out because xsimd 8.1 has no transpose and its zips work within 128-bit halves on AVX.
template <class Arch>
SATTN_ALWAYS_INLINE void transpose(vec<Arch> (&row)[vec<Arch>::width]) {
  using V = vec<Arch>;
  constexpr int width = V::width;
  alignas(64) float square[width][width];
  unroll<width>([&](auto i) SATTN_INLINE_LAMBDA { row[i].store_aligned(square[i]); });
  for (int i = 0; i < width; ++i) {
    for (int j = 0; j < i; ++j) {
      const float t = square[i][j];
      square[i][j] = square[j][i];
      square[j][i] = t;
    }
  }
  unroll<width>([&](auto i) SATTN_INLINE_LAMBDA { row[i] = V::load_aligned(square[i]); });
}

#if defined(__AVX2__) && defined(__FMA__)
template <>
SATTN_ALWAYS_INLINE void transpose<arch::avx2>(vec<arch::avx2> (&row)[8]) {
  __m256 pair[8];
  unroll<4>([&](auto i) SATTN_INLINE_LAMBDA {
    pair[2 * i] = _mm256_unpacklo_ps(row[2 * i].reg, row[2 * i + 1].reg);
    pair[2 * i + 1] = _mm256_unpackhi_ps(row[2 * i].reg, row[2 * i + 1].reg);
  });
  __m256 quad[8];
  unroll<2>([&](auto h) SATTN_INLINE_LAMBDA {
    constexpr int b = 4 * h;
    quad[b] = _mm256_shuffle_ps(pair[b], pair[b + 2], 0x44);
    quad[b + 1] = _mm256_shuffle_ps(pair[b], pair[b + 2], 0xEE);
    quad[b + 2] = _mm256_shuffle_ps(pair[b + 1], pair[b + 3], 0x44);
    quad[b + 3] = _mm256_shuffle_ps(pair[b + 1], pair[b + 3], 0xEE);
  });
  unroll<4>([&](auto i) SATTN_INLINE_LAMBDA {
    row[i].reg = _mm256_permute2f128_ps(quad[i], quad[4 + i], 0x20);
    row[4 + i].reg = _mm256_permute2f128_ps(quad[i], quad[4 + i], 0x31);
  });
}
#endif

/// sums[i] = the sum of the lanes of rows[i]: halves are added until one lane is left.
template <class Arch, int N>
SATTN_ALWAYS_INLINE void reduce_each(const vec<Arch> (&rows)[N], float* sums) {
  constexpr int width = vec<Arch>::width;
  alignas(64) float lane[width];
  for (int i = 0; i < N; ++i) {
    rows[i].store_aligned(lane);
    for (int half = width / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    sums[i] = lane[0];
  }
}

#if defined(__AVX2__) && defined(__FMA__)
namespace detail {

// Four rows in the lanes of half a register, each its two halves added: then the rows change places
// as their lanes are added. Shuffles share a port with products, blends do not.
SATTN_ALWAYS_INLINE __m128 reduce_four(__m256 a, __m256 b, __m256 c, __m256 d) {
  const auto halves = [](__m256 x) SATTN_INLINE_LAMBDA {
    return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  };
  const auto pairs = [](__m128 x, __m128 y) SATTN_INLINE_LAMBDA {
    return _mm_add_ps(_mm_blend_ps(x, y, 0b1100), _mm_shuffle_ps(x, y, 0x4E));
  };
  const __m128 ac = pairs(halves(a), halves(c));
  const __m128 bd = pairs(halves(b), halves(d));
  return _mm_add_ps(_mm_blend_ps(ac, bd, 0b1010),
                    _mm_permute_ps(_mm_blend_ps(ac, bd, 0b0101), 0xB1));
}

SATTN_ALWAYS_INLINE __m256 reduce_eight(const vec<arch::avx2>* rows) {
  const auto halves = [](__m256 x, __m256 y) SATTN_INLINE_LAMBDA {
    return _mm256_add_ps(_mm256_blend_ps(x, y, 0xF0), _mm256_permute2f128_ps(x, y, 0x21));
  };
  const auto pairs = [](__m256 x, __m256 y) SATTN_INLINE_LAMBDA {
    return _mm256_add_ps(_mm256_blend_ps(x, y, 0xCC), _mm256_shuffle_ps(x, y, 0x4E));
  };
  const __m256 even = pairs(halves(rows[0].reg, rows[4].reg), halves(rows[2].reg, rows[6].reg));
  const __m256 odd = pairs(halves(rows[1].reg, rows[5].reg), halves(rows[3].reg, rows[7].reg));
  return _mm256_add_ps(_mm256_blend_ps(even, odd, 0xAA),
                       _mm256_permute_ps(_mm256_blend_ps(even, odd, 0x55), 0xB1));
}

}  // namespace detail

template <int N>
SATTN_ALWAYS_INLINE void reduce_each(const vec<arch::avx2> (&rows)[N], float* sums) {
  unroll<N / 8>([&](auto i) SATTN_INLINE_LAMBDA {
    _mm256_storeu_ps(sums + 8 * i, detail::reduce_eight(rows + 8 * i));
  });
  constexpr auto row = [](int r) { return r < N ? r : N - 1; };
  unroll<(N % 8 + 3) / 4>([&](auto i) SATTN_INLINE_LAMBDA {
    constexpr int first = N / 8 * 8 + 4 * i;
    const __m128 four = detail::reduce_four(rows[first].reg, rows[row(first + 1)].reg,
                                            rows[row(first + 2)].reg, rows[row(first + 3)].reg);
    if constexpr (first + 4 <= N) {
      _mm_storeu_ps(sums + first, four);
    } else {
      alignas(16) float lane[4];
      _mm_store_ps(lane, four);
      for (int j = 0; first + j < N; ++j) sums[first + j] = lane[j];
    }
  });
}
#endif

/// Lane i becomes the largest of the lanes i mod Stride, for every i.
template <int Stride, class Arch>
SATTN_ALWAYS_INLINE vec<Arch> max_of_residues(vec<Arch> a) {
  using V = vec<Arch>;
  constexpr int width = V::width;
#if defined(__AVX2__) && defined(__FMA__)
  if constexpr (std::is_same_v<Arch, arch::avx2>) {
    __m256 m = a.reg;
    if constexpr (Stride <= 4) m = _mm256_max_ps(m, _mm256_permute2f128_ps(m, m, 1));
    if constexpr (Stride <= 2) m = _mm256_max_ps(m, _mm256_permute_ps(m, 0x4E));
    if constexpr (Stride <= 1) m = _mm256_max_ps(m, _mm256_permute_ps(m, 0xB1));
    return {m};
  }
#endif
  alignas(64) float lane[width];
  a.store_aligned(lane);
  for (int i = Stride; i < width; ++i) {
    lane[i % Stride] = lane[i] > lane[i % Stride] ? lane[i] : lane[i % Stride];
  }
  for (int i = Stride; i < width; ++i) lane[i] = lane[i % Stride];
  return V::load_aligned(lane);
}

}  // namespace sattn::simd
