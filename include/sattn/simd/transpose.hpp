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

/// sums[i] = the sum of the lanes of rows[i], each in the same order.
template <class Arch, int N>
SATTN_ALWAYS_INLINE void reduce_each(const vec<Arch> (&rows)[N], float* sums) {
  unroll<N>([&](auto i) SATTN_INLINE_LAMBDA { sums[i] = reduce_add(rows[i]); });
}

#if defined(__AVX2__) && defined(__FMA__)
template <int N>
SATTN_ALWAYS_INLINE void reduce_each(const vec<arch::avx2> (&rows)[N], float* sums) {
  // Four rows become one register of half sums each; the halves of two such registers change places.
  __m256 quad[(N + 3) / 4];
  unroll<(N + 3) / 4>([&](auto i) SATTN_INLINE_LAMBDA {
    constexpr auto row = [](int r) { return r < N ? r : N - 1; };
    quad[i] = _mm256_hadd_ps(
        _mm256_hadd_ps(rows[row(4 * i)].reg, rows[row(4 * i + 1)].reg),
        _mm256_hadd_ps(rows[row(4 * i + 2)].reg, rows[row(4 * i + 3)].reg));
  });
  unroll<N / 8>([&](auto i) SATTN_INLINE_LAMBDA {
    const __m256 low = quad[2 * i];
    const __m256 high = quad[2 * i + 1];
    const __m256 halves = _mm256_permute2f128_ps(low, high, 0x21);
    _mm256_store_ps(sums + 8 * i, _mm256_add_ps(_mm256_blend_ps(low, high, 0xF0), halves));
  });
  unroll<(N + 3) / 4 - N / 8 * 2>([&](auto i) SATTN_INLINE_LAMBDA {
    const __m256 last = quad[N / 8 * 2 + i];
    alignas(16) float four[4];
    _mm_store_ps(four, _mm_add_ps(_mm256_castps256_ps128(last), _mm256_extractf128_ps(last, 1)));
    constexpr int first = N / 8 * 8 + 4 * i;
    for (int j = 0; j < (N - first < 4 ? N - first : 4); ++j) sums[first + j] = four[j];
  });
}
#endif

}  // namespace sattn::simd
