// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/types.hpp>

#include <bit>
#include <cstddef>
#include <cstdint>

namespace sattn {

/// IEEE 754 binary16, for storage: 5 bits of exponent, 10 of fraction.
struct f16 {
  std::uint16_t bits = 0;
};

/// bfloat16, for storage: the upper half of a float.
struct bf16 {
  std::uint16_t bits = 0;
};

/// ggml's block of 32 elements, values[i] * scale each.
struct q8_0 {
  f16 scale;
  std::int8_t values[32] = {};
};
static_assert(sizeof(q8_0) == 34 && alignof(q8_0) == 2);

/// How the elements of K or V are stored. Arithmetic is f32, whatever the storage.
/// i8 rows have one f32 scale each, which lies elsewhere.
enum class dtype : std::uint8_t { f32, f16, bf16, i8, q8_0 };

template <class T>
inline constexpr dtype dtype_of = dtype::f32;
template <>
inline constexpr dtype dtype_of<f16> = dtype::f16;
template <>
inline constexpr dtype dtype_of<bf16> = dtype::bf16;
template <>
inline constexpr dtype dtype_of<std::int8_t> = dtype::i8;
template <>
inline constexpr dtype dtype_of<q8_0> = dtype::q8_0;

/// Elements that are stored together: a row has a multiple of them.
constexpr index_t block_of(dtype type) { return type == dtype::q8_0 ? 32 : 1; }
/// Bytes of a row of `dim` elements, or of the part before element `dim`.
constexpr index_t row_bytes(dtype type, index_t dim) {
  switch (type) {
    case dtype::f32: return dim * 4;
    case dtype::f16:
    case dtype::bf16: return dim * 2;
    case dtype::i8: return dim;
    case dtype::q8_0: return dim / 32 * 34;
  }
  return 0;
}
constexpr std::size_t alignment_of(dtype type) {
  return type == dtype::f32 ? 4 : type == dtype::i8 ? 1 : 2;
}
constexpr bool has_row_scale(dtype type) { return type == dtype::i8; }
constexpr const char* name_of(dtype type) {
  switch (type) {
    case dtype::f32: return "f32";
    case dtype::f16: return "f16";
    case dtype::bf16: return "bf16";
    case dtype::i8: return "i8";
    case dtype::q8_0: return "q8_0";
  }
  return "?";
}

constexpr float to_float(std::int8_t x) { return x; }
constexpr float to_float(float x) { return x; }
constexpr float to_float(bf16 x) { return std::bit_cast<float>(std::uint32_t{x.bits} << 16); }

constexpr float to_float(f16 x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16;
  const std::uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x0400u) return std::bit_cast<float>(sign | ((rest << 13) + (112u << 23)));
  // Zero or subnormal: rest * 2^-24, exact in f32.
  const float magnitude = static_cast<float>(rest) * 0x1p-24f;
  return sign == 0 ? magnitude : -magnitude;
}

/// Rounds to the nearest, ties to even; NaN stays NaN, what is too large becomes infinite.
constexpr bf16 to_bf16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

constexpr f16 to_f16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const std::uint32_t rest = bits & 0x7fffffffu;
  const auto with_sign = [&](std::uint32_t magnitude) {
    return f16{static_cast<std::uint16_t>(sign | magnitude)};
  };
  if (rest > 0x7f800000u) return with_sign(0x7e00u | (rest >> 13 & 0x3ffu));  // NaN
  if (rest >= 0x477ff000u) return with_sign(0x7c00u);  // 65520 and more round to infinity
  if (rest < 0x38800000u) {
    // Below 2^-14 the result is subnormal: adding 0.5 leaves it, rounded, in the lowest bits.
    const float shifted = std::bit_cast<float>(rest) + 0.5f;
    return with_sign(std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u);
  }
  return with_sign((rest + 0xfffu + (rest >> 13 & 1u) - (112u << 23)) >> 13);
}

}  // namespace sattn
