// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/decode_rows.hpp>
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

/// sums[key] = the sum of the lanes that are set in `lanes` and in the key's mask. Lanes are
/// chosen, not multiplied by 0: what the others hold may be a NaN.
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

/// scores = e^(score - log_sum) of up to four queries, key by key.
template <class Arch, int Queries>
SATTN_NOINLINE void row_probabilities(float* SATTN_RESTRICT scores, index_t count,
                                      const float* log_sums) noexcept {
  using V = simd::vec<Arch>;
  constexpr index_t stride = score_stride<Queries>;
  alignas(64) float lane[V::width];
  for (index_t i = 0; i < V::width; ++i) {
    lane[i] = log_sums[i % stride < Queries ? i % stride : 0];
  }
  const V log_sum = V::load_aligned(lane);
  const index_t padded = padded_scores<Arch, Queries>(count);
  SATTN_NO_UNROLL
  for (index_t i = 0; i < padded; i += V::width) {
    const V below = simd::floor_at(log_sum - V::load_aligned(scores + i), 0.0f);
    simd::exp_nonpositive(V::zero() - below).store_aligned(scores + i);
  }
}

template <class Arch>
SATTN_NOINLINE void column_mass_rows(const rows_mass_args& args) noexcept {
  const rows_args& rows = args.rows;
  for (index_t column = 0; column < args.column_count; ++column) {
    for (index_t key = 0; key < rows.count; ++key) args.sums[column * chunk_keys + key] = 0.0f;
  }
  for_each_row_group(rows, [&](auto queries, index_t first, index_t begin, index_t count,
                               const void* const* next_k, const void* const*) SATTN_INLINE_LAMBDA {
    constexpr index_t stride = score_stride<queries>;
    alignas(64) float scores[stride * chunk_keys];
    score_row_group<Arch, queries>(rows, first, begin, count, next_k, scores);
    row_probabilities<Arch, queries>(scores, count, args.log_sums + first);
    for (index_t n = 0; n < queries; ++n) {
      float* const sums = args.sums + args.columns[first + n] * chunk_keys + begin;
      for (index_t key = 0; key < count; ++key) {
        // A row's log_sum may be a NaN, which must not reach keys that it does not attend to.
        if (rows.masks != nullptr &&
            (rows.masks[begin + key] >> rows.mask_bit[first + n] & 1) == 0) {
          continue;
        }
        sums[key] += scores[key * stride + n];
      }
    }
  });
}

}  // namespace sattn::kernel
