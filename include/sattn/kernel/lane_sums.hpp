// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/column_mass.hpp>
#include <sattn/kernel/kernel_args.hpp>
#include <sattn/simd/exp.hpp>

// What estimators do with the scores of 16 query rows as score_tile leaves them, [key][16].

namespace sattn::kernel {

/// Scores of all keys of 16 rows become probabilities, in place; all 0 in rows whose scores are all
/// -inf.
template <class Arch>
SATTN_NOINLINE void softmax_lanes(float* scores, index_t count) noexcept {
  using V = simd::vec<Arch>;
  constexpr int width = V::width;
  constexpr int vecs = lane_vecs<Arch>;
  V top[vecs];
  V sum[vecs];
  const auto each = [&](index_t key, auto&& f) SATTN_INLINE_LAMBDA {
    simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
      f(c, scores + key * tile_lanes + c * width);
    });
  };
  simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
    top[c] = V::broadcast(-__builtin_inff());
    sum[c] = V::zero();
  });
  SATTN_NO_UNROLL
  for (index_t key = 0; key < count; ++key) {
    each(key, [&](auto c, const float* at) SATTN_INLINE_LAMBDA {
      top[c] = simd::max(top[c], V::load_aligned(at));
    });
  }
  simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
    top[c] = simd::select_equal(top[c], V::broadcast(-__builtin_inff()), V::zero(), top[c]);
  });
  SATTN_NO_UNROLL
  for (index_t key = 0; key < count; ++key) {
    each(key, [&](auto c, float* at) SATTN_INLINE_LAMBDA {
      const V p = simd::exp_nonpositive(V::load_aligned(at) - top[c]);
      p.store_aligned(at);
      sum[c] = sum[c] + p;
    });
  }
  simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
    sum[c] = simd::select_equal(sum[c], V::zero(), V::zero(), V::broadcast(1.0f) / sum[c]);
  });
  SATTN_NO_UNROLL
  for (index_t key = 0; key < count; ++key) {
    each(key, [&](auto c, float* at) SATTN_INLINE_LAMBDA {
      (V::load_aligned(at) * sum[c]).store_aligned(at);
    });
  }
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
