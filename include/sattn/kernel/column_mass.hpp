// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/kernel_args.hpp>
#include <sattn/kernel/tile_parts.hpp>
#include <sattn/simd/exp.hpp>
#include <sattn/simd/transpose.hpp>

#include <cstdint>
#include <type_traits>

namespace sattn::kernel {

/// scores = e^(score - log_sum). A score above its row's log_sum, which takes a rounding, counts as
/// equal to it.
template <class Arch>
SATTN_NOINLINE void chunk_probabilities(float* SATTN_RESTRICT scores, index_t count,
                                        const float* log_sums) noexcept {
  using V = simd::vec<Arch>;
  constexpr int vecs = lane_vecs<Arch>;
  V log_sum[vecs];
  simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
    log_sum[c] = V::load_aligned(log_sums + c * V::width);
  });
  SATTN_NO_UNROLL
  for (index_t key = 0; key < count; ++key) {
    simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
      float* const at = scores + key * tile_lanes + c * V::width;
      const V below = simd::floor_at(log_sum[c] - V::load_aligned(at), 0.0f);
      simd::exp_nonpositive(V::zero() - below).store_aligned(at);
    });
  }
}

/// sums[key] = the sum of the lanes that are set in `lanes` and in the key's mask. Lanes are chosen,
/// not multiplied by 0: what the others hold may be a NaN.
template <class Arch, bool Masked>
SATTN_NOINLINE void sum_lanes(const float* probabilities, index_t count,
                              const std::uint16_t* masks, std::uint16_t lanes,
                              float* SATTN_RESTRICT sums) noexcept {
  using V = simd::vec<Arch>;
  constexpr int vecs = lane_vecs<Arch>;
  constexpr int keys = 4;
  const auto some = [&](auto n, index_t key) SATTN_INLINE_LAMBDA {
    V sum[n];
    simd::unroll<n>([&](auto i) SATTN_INLINE_LAMBDA {
      unsigned chosen = lanes;
      if constexpr (Masked) chosen &= masks[key + i];
      sum[i] = V::zero();
      simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
        const V p = V::load_aligned(probabilities + (key + i) * tile_lanes + c * V::width);
        sum[i] = sum[i] + simd::select_bits<c * V::width>(static_cast<std::uint16_t>(chosen), p,
                                                          V::zero());
      });
    });
    simd::reduce_each(sum, sums + key);
  };
  index_t key = 0;
  SATTN_NO_UNROLL
  for (; key + keys <= count; key += keys) some(std::integral_constant<int, keys>{}, key);
  SATTN_NO_UNROLL
  for (; key < count; ++key) some(std::integral_constant<int, 1>{}, key);
}

template <class Arch>
SATTN_NOINLINE void column_mass(const column_mass_args& args) noexcept {
  chunk_probabilities<Arch>(args.scores, args.count, args.log_sums);
  for (index_t column = 0; column < args.columns; ++column) {
    const auto run = args.masks == nullptr ? &sum_lanes<Arch, false> : &sum_lanes<Arch, true>;
    run(args.scores, args.count, args.masks, args.lanes[column], args.sums + column * chunk_keys);
  }
}

}  // namespace sattn::kernel
