// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/column_mass.hpp>
#include <sattn/kernel/kernel_args.hpp>
#include <sattn/kernel/prefill_tile.hpp>

// What estimators do with the scores of 16 query rows as score_tile leaves them, [key][16].

namespace sattn::kernel {

/// The largest score of each lane.
template <class Arch>
SATTN_NOINLINE void lane_maxima(const float* scores, index_t count,
                                float* SATTN_RESTRICT maxima) noexcept {
  using V = simd::vec<Arch>;
  constexpr int width = V::width;
  constexpr int vecs = lane_vecs<Arch>;
  V top[vecs];
  simd::unroll<vecs>(
      [&](auto c) SATTN_INLINE_LAMBDA { top[c] = V::broadcast(-__builtin_inff()); });
  SATTN_NO_UNROLL
  for (index_t key = 0; key < count; ++key) {
    simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
      top[c] = simd::max(top[c], V::load_aligned(scores + key * tile_lanes + c * width));
    });
  }
  simd::unroll<vecs>(
      [&](auto c) SATTN_INLINE_LAMBDA { top[c].store_aligned(maxima + c * width); });
}

/// Multiplies each lane by its factor.
template <class Arch>
SATTN_NOINLINE void scale_lanes(float* SATTN_RESTRICT values, index_t count,
                                const float* factors) noexcept {
  using V = simd::vec<Arch>;
  constexpr int width = V::width;
  constexpr int vecs = lane_vecs<Arch>;
  V factor[vecs];
  simd::unroll<vecs>(
      [&](auto c) SATTN_INLINE_LAMBDA { factor[c] = V::load_aligned(factors + c * width); });
  SATTN_NO_UNROLL
  for (index_t key = 0; key < count; ++key) {
    simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
      float* const at = values + key * tile_lanes + c * width;
      (V::load_aligned(at) * factor[c]).store_aligned(at);
    });
  }
}

/// Scores of all keys of 16 rows become probabilities, in place; all 0 in rows whose scores are all
/// -inf.
template <class Arch>
SATTN_NOINLINE void softmax_lanes(float* scores, index_t count) noexcept {
  alignas(64) float maxima[tile_lanes];
  alignas(64) float row_max[tile_lanes];
  alignas(64) float row_sum[tile_lanes] = {};
  alignas(64) float factors[tile_lanes];
  lane_maxima<Arch>(scores, count, maxima);
  for (float& top : row_max) top = -__builtin_inff();
  softmax_chunk<Arch>(scores, count, maxima, row_max, row_sum, factors);
  for (index_t lane = 0; lane < tile_lanes; ++lane) {
    factors[lane] = row_sum[lane] == 0.0f ? 0.0f : 1.0f / row_sum[lane];
  }
  scale_lanes<Arch>(scores, count, factors);
}

/// Adds probabilities along keys and along distances: the lane of row r at key i counts at distance
/// r - i from that of row 0 at key 0.
template <class Arch>
SATTN_NOINLINE void sum_probabilities(const lane_sums_args& args) noexcept {
  using V = simd::vec<Arch>;
  constexpr int width = V::width;
  constexpr int vecs = lane_vecs<Arch>;
  if (args.columns != nullptr) {
    alignas(64) float sums[chunk_keys];
    sum_lanes<Arch, false>(args.probabilities, args.count, nullptr, 0xffff, sums);
    for (index_t key = 0; key < args.count; ++key) args.columns[key] += sums[key];
  }
  if (args.distances == nullptr) return;
  // Key by key, so that all distances add up their rows in the same order and equal sums have equal
  // bits, although each key's 16 places wait for those of the key before.
  SATTN_NO_UNROLL
  for (index_t key = 0; key < args.count; ++key) {
    simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
      float* const sum = args.distances - key + c * width;
      const V p = V::load_aligned(args.probabilities + key * tile_lanes + c * width);
      (V::load(sum) + p).store(sum);
    });
  }
}

}  // namespace sattn::kernel
