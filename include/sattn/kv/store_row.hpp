// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/dtype.hpp>
#include <sattn/core/types.hpp>
#include <sattn/kv/row_source.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>

// Rows of f32 into the types of a cache, and back.

namespace sattn {

/// Whether T can express the row. f16 and bf16 take NaN, infinities and what rounds to a finite
/// number; int8 takes magnitudes up to 3.4e38, so that 127 * scale does not overflow, and q8_0
/// those whose scale f16 holds.
template <class T>
bool can_store_row(const float* x, index_t dim) {
  const auto all = [&](auto&& fits) { return std::all_of(x, x + dim, fits); };
  if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>) {
    constexpr float limit = std::is_same_v<T, f16> ? 65520.0f : 0x1.ffp127f;  // rounds to infinity
    return all([](float e) { return std::abs(e) < limit || !std::isfinite(e); });
  } else if constexpr (std::is_same_v<T, std::int8_t> || std::is_same_v<T, q8_0>) {
    constexpr float limit = std::is_same_v<T, q8_0> ? 127.0f * 65504.0f : 3.4e38f;
    return all([](float e) { return std::abs(e) <= limit; });  // false for NaN
  }
  return true;
}

/// Writes a row of f32 as T, each element rounded to the nearest: row_bytes(dtype_of<T>, dim) bytes
/// at `to`, which has the alignment of T. int8: the largest magnitude becomes 127 * scale. q8_0: as
/// ggml does it, with an f16 scale for every 32 elements.
template <class T>
void store_row(const float* x, index_t dim, std::byte* to, float& scale) {
  const auto largest = [](const float* first, index_t count) {
    float top = 0.0f;
    for (index_t i = 0; i < count; ++i) top = std::max(top, std::abs(first[i]));
    return top;
  };
  const auto quantise = [](const float* first, index_t count, float factor, std::int8_t* out) {
    for (index_t i = 0; i < count; ++i) {
      out[i] = static_cast<std::int8_t>(std::lrint(first[i] * factor));
    }
  };
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(to, x, static_cast<std::size_t>(dim) * sizeof(float));
  } else if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>) {
    T* const out = reinterpret_cast<T*>(to);
    for (index_t i = 0; i < dim; ++i) {
      if constexpr (std::is_same_v<T, f16>) out[i] = to_f16(x[i]);
      if constexpr (std::is_same_v<T, bf16>) out[i] = to_bf16(x[i]);
    }
  } else if constexpr (std::is_same_v<T, std::int8_t>) {
    const float top = largest(x, dim);
    scale = top / 127.0f;
    // Rows so small that 127 / top overflows become 0.
    const float factor = scale > 0.0f ? std::min(127.0f / top, 1e38f) : 0.0f;
    quantise(x, dim, factor, reinterpret_cast<std::int8_t*>(to));
  } else {
    static_assert(std::is_same_v<T, q8_0>);
    q8_0* const out = reinterpret_cast<q8_0*>(to);
    for (index_t b = 0; b * 32 < dim; ++b) {
      const float* const first = x + b * 32;
      const float top = largest(first, 32);
      out[b].scale = to_f16(top / 127.0f);
      const float factor = top > 0.0f ? std::min(127.0f / top, 1e38f) : 0.0f;
      quantise(first, 32, factor, out[b].values);
    }
  }
}

/// A stored row as f32. `scale` counts for types that have one a row.
inline void load_row(dtype type, const void* row, float scale, index_t dim, float* out) {
  const auto each = [&](const auto* x) {
    for (index_t i = 0; i < dim; ++i) out[i] = to_float(x[i]);
  };
  switch (type) {
    case dtype::f32: return each(static_cast<const float*>(row));
    case dtype::f16: return each(static_cast<const f16*>(row));
    case dtype::bf16: return each(static_cast<const bf16*>(row));
    case dtype::i8:
      each(static_cast<const std::int8_t*>(row));
      for (index_t i = 0; i < dim; ++i) out[i] *= scale;
      return;
    case dtype::q8_0:
      const auto* const blocks = static_cast<const q8_0*>(row);
      for (index_t i = 0; i < dim; ++i) {
        out[i] = to_float(blocks[i / 32].values[i % 32]) * to_float(blocks[i / 32].scale);
      }
      return;
  }
}

/// The row of one key as f32, wherever it lies.
inline void load_row(const row_source& rows, token_t key, index_t dim, float* out) {
  const void* row = nullptr;
  float scale = 1.0f;
  rows.locate(&key, 1, &row);
  if (has_row_scale(rows.type)) rows.read_scales(&key, 1, &scale);
  load_row(rows.type, row, scale, dim, out);
}

}  // namespace sattn
