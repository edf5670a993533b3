// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/dtype.hpp>
#include <sattn/simd/vec.hpp>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace sattn::simd {

/// vec::width elements at p, widened to f32. Subnormals and infinities keep their values.
template <class Arch>
SATTN_ALWAYS_INLINE vec<Arch> load_as_float(const float* p) {
  return vec<Arch>::load(p);
}

template <class Arch>
SATTN_ALWAYS_INLINE vec<Arch> load_as_float(const std::int8_t* p) {
  using V = vec<Arch>;
#if defined(__AVX2__) && defined(__FMA__)
  if constexpr (std::is_same_v<Arch, arch::avx2>) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
  }
#endif
#ifdef __AVX512F__
  if constexpr (std::is_same_v<Arch, arch::avx512>) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
  }
#endif
  alignas(64) float buffer[V::width];
  for (int i = 0; i < V::width; ++i) buffer[i] = to_float(p[i]);
  return V::load_aligned(buffer);
}

/// f16 or bf16.
template <class Arch, class Half>
SATTN_ALWAYS_INLINE vec<Arch> load_as_float(const Half* p) {
  using V = vec<Arch>;
#if defined(__AVX2__) && defined(__FMA__)
  if constexpr (std::is_same_v<Arch, arch::avx2>) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (std::is_same_v<Half, bf16>) {
      return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
    }
#ifdef __F16C__
    if constexpr (std::is_same_v<Half, f16>) return {_mm256_cvtph_ps(bits)};
#endif
  }
#endif
#ifdef __AVX512F__
  if constexpr (std::is_same_v<Arch, arch::avx512>) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (std::is_same_v<Half, bf16>) {
      return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
    } else {
      return {_mm512_cvtph_ps(bits)};
    }
  }
#endif
  alignas(64) float buffer[V::width];
  for (int i = 0; i < V::width; ++i) buffer[i] = to_float(p[i]);
  return V::load_aligned(buffer);
}

/// One element in all lanes.
template <class Arch>
SATTN_ALWAYS_INLINE vec<Arch> broadcast_as_float(f16 x) {
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
  if constexpr (std::is_same_v<Arch, arch::avx2>) {
    return {_mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(x.bits)))};
  }
#endif
#ifdef __AVX512F__
  if constexpr (std::is_same_v<Arch, arch::avx512>) {
    return {_mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(x.bits)))};
  }
#endif
  return vec<Arch>::broadcast(to_float(x));
}

}  // namespace sattn::simd
