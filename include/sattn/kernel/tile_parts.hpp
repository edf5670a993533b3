// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/kernel_args.hpp>
#include <sattn/simd/vec.hpp>

#include <type_traits>

namespace sattn::kernel {

/// How many key rows (or value columns) one register tile holds against 16 query lanes.
/// AVX2: 6 x 2 registers = 12 accumulators + 2 loads + 1 broadcast = 15 of 16. The accumulators
/// must also cover the FMA latency: 4 cycles x 2 ports = 8 chains.
template <class Arch>
inline constexpr int tile_rows = 6;
template <>
inline constexpr int tile_rows<arch::sse2> = 2;  // 2 x 4 registers
template <>
inline constexpr int tile_rows<arch::avx512> = 8;  // 8 x 1 of 32 registers

template <class Arch>
inline constexpr int lane_vecs = static_cast<int>(tile_lanes) / simd::vec<Arch>::width;

/// Calls f(integral_constant<rows>, offset) for tiles that cover [0, count): as many of Rows and of
/// Rows - 1 as fit without a thin remainder, which every count >= (Rows - 1)^2 allows. A tile of
/// one or two rows has too few accumulators to keep the FMA units busy.
template <int Rows, class F>
SATTN_ALWAYS_INLINE void for_each_tile(index_t count, F&& f) {
  index_t short_tiles = (Rows - count % Rows) % Rows;
  if (short_tiles * (Rows - 1) > count) short_tiles = 0;
  index_t offset = 0;
  for (; offset + Rows <= count - short_tiles * (Rows - 1); offset += Rows) {
    f(std::integral_constant<int, Rows>{}, offset);
  }
  if constexpr (Rows > 1) {
    for (index_t i = 0; i < short_tiles; ++i, offset += Rows - 1) {
      f(std::integral_constant<int, Rows - 1>{}, offset);
    }
    simd::unroll<Rows - 1>([&](auto i) SATTN_INLINE_LAMBDA {
      if (count - offset == i + 1) f(std::integral_constant<int, i + 1>{}, offset);
    });
  }
}

SATTN_ALWAYS_INLINE const float* float_row(const void* row) {
  return static_cast<const float*>(row);
}

/// Scores of Rows keys against 16 query lanes, and the running row maxima.
/// k_rows[0 .. Rows) in place; k_rows[Rows .. 2 Rows) are only prefetched, which pays even from the
/// second-level cache: no hardware prefetcher follows six short streams. With Values, so are
/// v_rows[0 .. Rows), whose lines come in one by one instead of all at once.
template <class Arch, int Rows, bool Values>
SATTN_NOINLINE void qk_tile(const void* const* k_rows, const void* const* v_rows,
                            index_t head_dim, const float* q, float* SATTN_RESTRICT scores,
                            float* SATTN_RESTRICT maxima) noexcept {
  using V = simd::vec<Arch>;
  constexpr int width = V::width;
  constexpr int vecs = lane_vecs<Arch>;
  // Floats of a row per trip: one cache line to prefetch. Thin remainder tiles stay small code.
  constexpr int depth_step = Rows >= tile_rows<Arch> - 1 ? 16 : 4;

  V acc[Rows][vecs];
  const float* k[Rows];
  simd::unroll<Rows>([&](auto r) SATTN_INLINE_LAMBDA {
    k[r] = float_row(k_rows[r]);
    simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA { acc[r][c] = V::zero(); });
  });
  const auto depth = [&](index_t i) SATTN_INLINE_LAMBDA {
    V lanes[vecs];
    simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
      lanes[c] = V::load_aligned(q + i * tile_lanes + c * width);
    });
    simd::unroll<Rows>([&](auto r) SATTN_INLINE_LAMBDA {
      const V x = V::broadcast(k[r][i]);
      simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
        acc[r][c] = simd::fma(x, lanes[c], acc[r][c]);
      });
    });
  };
  index_t i = 0;
  SATTN_NO_UNROLL
  for (; i + depth_step <= head_dim; i += depth_step) {
    if constexpr (depth_step == 16) {
      simd::unroll<Rows>(
          [&](auto r) SATTN_INLINE_LAMBDA { simd::prefetch(float_row(k_rows[Rows + r]) + i); });
      if constexpr (Values) {
        simd::unroll<Rows>(
            [&](auto r) SATTN_INLINE_LAMBDA { simd::prefetch(float_row(v_rows[r]) + i); });
      }
    }
    simd::unroll<depth_step>([&](auto u) SATTN_INLINE_LAMBDA { depth(i + u); });
  }
  SATTN_NO_UNROLL
  for (; i < head_dim; ++i) depth(i);

  simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
    V top = V::load_aligned(maxima + c * width);
    simd::unroll<Rows>([&](auto r) SATTN_INLINE_LAMBDA {
      acc[r][c].store_aligned(scores + r * tile_lanes + c * width);
      top = simd::max(top, acc[r][c]);
    });
    top.store_aligned(maxima + c * width);
  });
}

/// out [Cols][16] = out * rescale + sum over keys of value column x probability lane; the columns
/// begin `offset` floats behind v_rows. The rescale rides on the load of the accumulators, so no
/// key is special.
template <class Arch, int Cols>
SATTN_NOINLINE void pv_tile(const void* const* v_rows, index_t offset, index_t count,
                            const float* probabilities, const float* rescale,
                            float* SATTN_RESTRICT out) noexcept {
  using V = simd::vec<Arch>;
  constexpr int width = V::width;
  constexpr int vecs = lane_vecs<Arch>;
  constexpr int key_step = 4;

  V acc[Cols][vecs];
  simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
    const V factor = V::load_aligned(rescale + c * width);
    simd::unroll<Cols>([&](auto r) SATTN_INLINE_LAMBDA {
      acc[r][c] = V::load_aligned(out + r * tile_lanes + c * width) * factor;
    });
  });
  const auto one_key = [&](index_t key) SATTN_INLINE_LAMBDA {
    const float* v = float_row(v_rows[key]) + offset;
    V p[vecs];
    simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
      p[c] = V::load_aligned(probabilities + key * tile_lanes + c * width);
    });
    simd::unroll<Cols>([&](auto r) SATTN_INLINE_LAMBDA {
      const V x = V::broadcast(v[r]);
      simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
        acc[r][c] = simd::fma(x, p[c], acc[r][c]);
      });
    });
  };
  index_t key = 0;
  SATTN_NO_UNROLL
  for (; key + key_step <= count; key += key_step) {
    simd::unroll<key_step>([&](auto u) SATTN_INLINE_LAMBDA { one_key(key + u); });
  }
  SATTN_NO_UNROLL
  for (; key < count; ++key) one_key(key);
  simd::unroll<Cols>([&](auto r) SATTN_INLINE_LAMBDA {
    simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
      acc[r][c].store_aligned(out + r * tile_lanes + c * width);
    });
  });
}

}  // namespace sattn::kernel
