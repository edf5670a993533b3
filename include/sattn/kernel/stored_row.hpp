// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/dtype.hpp>
#include <sattn/simd/convert.hpp>

#include <type_traits>

namespace sattn::kernel {

/// A row of K or V as it is stored, read as f32.
template <class Arch, class T>
struct stored_row {
  using V = simd::vec<Arch>;
  // Elements that loops take at once: of a cache line, where registers suffice for their addresses.
  static constexpr index_t line = sizeof(T) == 1 ? 32 : 64 / static_cast<index_t>(sizeof(T));

  static constexpr bool loads_anywhere = true;  // load(i) takes any i

  const T* data;

  stored_row() = default;
  SATTN_ALWAYS_INLINE explicit stored_row(const void* row) : data(static_cast<const T*>(row)) {}

  SATTN_ALWAYS_INLINE V load(index_t i) const { return simd::load_as_float<Arch>(data + i); }
  SATTN_ALWAYS_INLINE V load_partial(index_t i, index_t count) const {
    if constexpr (std::is_same_v<T, float>) return V::load_partial(data + i, count);
    alignas(64) float buffer[V::width] = {};
    for (index_t j = 0; j < count; ++j) buffer[j] = at(i + j);
    return V::load_aligned(buffer);
  }
  SATTN_ALWAYS_INLINE float at(index_t i) const { return to_float(data[i]); }
  SATTN_ALWAYS_INLINE void prefetch(index_t i) const { simd::prefetch_near(data + i); }
};

/// Blocks of 32 elements with a scale: vectors are loaded at multiples of their width.
template <class Arch>
struct stored_row<Arch, q8_0> {
  using V = simd::vec<Arch>;
  static constexpr bool loads_anywhere = false;

  const q8_0* data;

  stored_row() = default;
  SATTN_ALWAYS_INLINE explicit stored_row(const void* row) : data(static_cast<const q8_0*>(row)) {}

  SATTN_ALWAYS_INLINE V load(index_t i) const {
    const q8_0& block = block_at(i);
    return simd::load_as_float<Arch>(block.values + i % block_size) *
           simd::broadcast_as_float<Arch>(block.scale);
  }
  SATTN_ALWAYS_INLINE V load_partial(index_t i, index_t count) const {
    alignas(64) float buffer[V::width] = {};
    for (index_t j = 0; j < count; ++j) buffer[j] = at(i + j);
    return V::load_aligned(buffer);
  }
  SATTN_ALWAYS_INLINE float at(index_t i) const {
    const q8_0& block = block_at(i);
    return to_float(block.values[i % block_size]) * to_float(block.scale);
  }

 private:
  static constexpr index_t block_size = block_of(dtype::q8_0);

  SATTN_ALWAYS_INLINE const q8_0& block_at(index_t i) const {
    return data[static_cast<std::size_t>(i) / block_size];
  }
};

/// Calls f with a null pointer of the storage type.
template <class F>
SATTN_ALWAYS_INLINE void with_type(dtype type, F&& f) {
  switch (type) {
    case dtype::f32: return f(static_cast<const float*>(nullptr));
    case dtype::f16: return f(static_cast<const f16*>(nullptr));
    case dtype::bf16: return f(static_cast<const bf16*>(nullptr));
    case dtype::i8: return f(static_cast<const std::int8_t*>(nullptr));
    case dtype::q8_0: return f(static_cast<const q8_0*>(nullptr));
  }
}

/// Calls f with a null pointer of the storage type, which has no blocks.
template <class F>
SATTN_ALWAYS_INLINE void with_plain_type(dtype type, F&& f) {
  with_type(type, [&]<class T>(const T* null) SATTN_INLINE_LAMBDA {
    if constexpr (block_of(dtype_of<T>) == 1) f(null);
  });
}

}  // namespace sattn::kernel
