// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/config.hpp>
#include <sattn/core/types.hpp>
#include <sattn/simd/arch.hpp>

#include <cstdint>
#include <type_traits>
#include <utility>
#include <xsimd/xsimd.hpp>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace sattn::simd {

namespace detail {
template <class Arch>
struct xsimd_arch;
template <>
struct xsimd_arch<arch::sse2> {
  using type = xsimd::sse2;
};
template <>
struct xsimd_arch<arch::avx2> {
  using type = xsimd::fma3<xsimd::avx2>;
};
template <>
struct xsimd_arch<arch::avx512> {
  using type = xsimd::avx512bw;
};
}  // namespace detail

/// One register of floats. It holds xsimd's raw register and becomes a batch only inside an
/// operation: with xsimd 14, arrays of batches as accumulators are spilled by clang.
template <class Arch>
struct vec {
  using batch = xsimd::batch<float, typename detail::xsimd_arch<Arch>::type>;
  using int_batch = xsimd::batch<std::int32_t, typename detail::xsimd_arch<Arch>::type>;
  static constexpr int width = static_cast<int>(batch::size);

  typename batch::register_type reg;

  static SATTN_ALWAYS_INLINE vec of(const batch& b) { return {b}; }
  SATTN_ALWAYS_INLINE batch as_batch() const { return batch(reg); }

  static SATTN_ALWAYS_INLINE vec broadcast(float x) { return of(batch(x)); }
  static SATTN_ALWAYS_INLINE vec zero() { return broadcast(0.0f); }
  static SATTN_ALWAYS_INLINE vec load(const float* p) { return of(batch::load_unaligned(p)); }
  static SATTN_ALWAYS_INLINE vec load_aligned(const float* p) { return of(batch::load_aligned(p)); }
  SATTN_ALWAYS_INLINE void store(float* p) const { as_batch().store_unaligned(p); }
  SATTN_ALWAYS_INLINE void store_aligned(float* p) const { as_batch().store_aligned(p); }

  /// The first `count` floats at p, zeros behind them; reads nothing else.
  static SATTN_ALWAYS_INLINE vec load_partial(const float* p, index_t count) {
    alignas(64) float buffer[width] = {};
    for (index_t i = 0; i < count; ++i) buffer[i] = p[i];
    return load_aligned(buffer);
  }
  SATTN_ALWAYS_INLINE void store_partial(float* p, index_t count) const {
    alignas(64) float buffer[width];
    store_aligned(buffer);
    for (index_t i = 0; i < count; ++i) p[i] = buffer[i];
  }

  friend SATTN_ALWAYS_INLINE vec operator+(vec a, vec b) {
    return of(a.as_batch() + b.as_batch());
  }
  friend SATTN_ALWAYS_INLINE vec operator-(vec a, vec b) {
    return of(a.as_batch() - b.as_batch());
  }
  friend SATTN_ALWAYS_INLINE vec operator*(vec a, vec b) {
    vec product = of(a.as_batch() * b.as_batch());
#ifdef __FMA__
    // Where an architecture without it is compiled with flags that allow it, compilers fuse
    // products with what is added to them, here so and there otherwise.
    if constexpr (std::is_same_v<Arch, arch::sse2>) __asm__("" : "+x"(product.reg));
#endif
    return product;
  }
  friend SATTN_ALWAYS_INLINE vec operator/(vec a, vec b) {
    return of(a.as_batch() / b.as_batch());
  }
};

/// a * b + c, fused where the instruction set has it.
template <class Arch>
SATTN_ALWAYS_INLINE vec<Arch> fma(vec<Arch> a, vec<Arch> b, vec<Arch> c) {
#ifdef __AVX512F__
  // xsimd 8.1 has none for AVX-512 and multiplies, then adds.
  if constexpr (std::is_same_v<Arch, arch::avx512>) {
    return {_mm512_fmadd_ps(a.reg, b.reg, c.reg)};
  }
#endif
  if constexpr (std::is_same_v<Arch, arch::sse2>) return a * b + c;
  return vec<Arch>::of(xsimd::fma(a.as_batch(), b.as_batch(), c.as_batch()));
}

/// The larger lane. With a NaN on either side the result is either side: callers let the NaN pass
/// through another path (xsimd's operand order differs between versions).
template <class Arch>
SATTN_ALWAYS_INLINE vec<Arch> max(vec<Arch> a, vec<Arch> b) {
  return vec<Arch>::of(xsimd::max(a.as_batch(), b.as_batch()));
}

/// The larger of a lane and a constant; a NaN stays a NaN.
template <class Arch>
SATTN_ALWAYS_INLINE vec<Arch> floor_at(vec<Arch> a, float floor) {
#if defined(__AVX2__) && defined(__FMA__)
  // The instruction returns its second operand where one is a NaN.
  if constexpr (std::is_same_v<Arch, arch::avx2>) {
    return {_mm256_max_ps(_mm256_set1_ps(floor), a.reg)};
  }
#endif
  const auto limit = typename vec<Arch>::batch(floor);
  return vec<Arch>::of(xsimd::select(a.as_batch() < limit, limit, a.as_batch()));
}

/// The float whose exponent field is the low 8 bits of each lane and whose fraction is 0.
template <class Arch>
SATTN_ALWAYS_INLINE vec<Arch> power_of_two(vec<Arch> a) {
  // Between registers, because xsimd's bitwise_cast has changed its template arguments.
  using ints = typename vec<Arch>::int_batch;
  using int_register = typename ints::register_type;
  const int_register shifted = ints(__builtin_bit_cast(int_register, a.reg)) << 23;
  return {__builtin_bit_cast(typename vec<Arch>::batch::register_type, shifted)};
}

template <class Arch>
SATTN_ALWAYS_INLINE vec<Arch> abs(vec<Arch> a) {
  return vec<Arch>::of(xsimd::abs(a.as_batch()));
}

/// x < y ? a : b, lane by lane; a NaN compares false.
template <class Arch>
SATTN_ALWAYS_INLINE vec<Arch> select_less(vec<Arch> x, vec<Arch> y, vec<Arch> a, vec<Arch> b) {
  return vec<Arch>::of(
      xsimd::select(x.as_batch() < y.as_batch(), a.as_batch(), b.as_batch()));
}

/// x == y ? a : b, lane by lane; a NaN compares false.
template <class Arch>
SATTN_ALWAYS_INLINE vec<Arch> select_equal(vec<Arch> x, vec<Arch> y, vec<Arch> a, vec<Arch> b) {
  return vec<Arch>::of(
      xsimd::select(x.as_batch() == y.as_batch(), a.as_batch(), b.as_batch()));
}

namespace detail {
template <class Arch, int First>
struct lane_bit_table {
  alignas(64) std::int32_t bit[vec<Arch>::width];
  constexpr lane_bit_table() : bit() {
    for (int i = 0; i < vec<Arch>::width; ++i) bit[i] = 1 << (First + i);
  }
};
template <class Arch, int First>
inline constexpr lane_bit_table<Arch, First> lane_bits;
}  // namespace detail

/// Lane i keeps x where bit (First + i) of the mask is set and becomes `otherwise` elsewhere.
/// First + width <= 16.
template <int First, class Arch>
SATTN_ALWAYS_INLINE vec<Arch> select_bits(std::uint16_t mask, vec<Arch> x, vec<Arch> otherwise) {
  using ints = typename vec<Arch>::int_batch;
  constexpr int width = vec<Arch>::width;
  static_assert(First + width <= 16);
  const auto bit = ints::load_aligned(detail::lane_bits<Arch, First>.bit);
  const auto bits = ints(std::int32_t{mask}) & bit;
#if defined(__AVX2__) && defined(__FMA__)
  if constexpr (std::is_same_v<Arch, arch::avx2>) {
    const __m256i set = _mm256_cmpeq_epi32(bits, bit);
    return {_mm256_blendv_ps(otherwise.reg, x.reg, _mm256_castsi256_ps(set))};
  }
#endif
  // The bit of the lane or 0; both are exact as floats, whose mask selects floats.
  const auto clear = xsimd::to_float(bits) == typename vec<Arch>::batch(0.0f);
  return vec<Arch>::of(xsimd::select(clear, otherwise.as_batch(), x.as_batch()));
}

template <class Arch>
SATTN_ALWAYS_INLINE float reduce_add(vec<Arch> a) {
  // Found by argument-dependent lookup: xsimd 8 calls it hadd, later versions reduce_add.
  const auto b = a.as_batch();
  if constexpr (requires { hadd(b); }) {
    return hadd(b);
  } else {
    return reduce_add(b);
  }
}

template <class Arch>
SATTN_ALWAYS_INLINE float reduce_max(vec<Arch> a) {
#if defined(__AVX2__) && defined(__FMA__)
  if constexpr (std::is_same_v<Arch, arch::avx2>) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.reg), _mm256_extractf128_ps(a.reg, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
#endif
  constexpr int width = vec<Arch>::width;
  alignas(64) float lane[width];
  a.store_aligned(lane);
  float best = lane[0];
  for (int i = 1; i < width; ++i) best = lane[i] > best ? lane[i] : best;
  return best;
}

/// Asks for the cache line at p; never faults, whatever the address.
// Inline to the top: to g++ a call of a function that only prefetches has no effect and goes.
SATTN_ALWAYS_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
/// Into the second-level cache.
SATTN_ALWAYS_INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 2); }

namespace detail {
template <class F, int... I>
SATTN_ALWAYS_INLINE void unroll(F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
}  // namespace detail

/// f(0) ... f(N - 1) with constants as arguments. Mark the lambda SATTN_INLINE_LAMBDA: register
/// arrays indexed by constants stay in registers on every compiler, loops and pragmas do not.
template <int N, class F>
SATTN_ALWAYS_INLINE void unroll(F&& f) {
  detail::unroll(f, std::make_integer_sequence<int, N>{});
}

}  // namespace sattn::simd
