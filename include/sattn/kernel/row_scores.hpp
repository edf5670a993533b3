// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/decode_rows.hpp>
#include <sattn/kernel/kernel_args.hpp>

namespace sattn::kernel {

/// Scores of a chunk of keys for a few query rows, row by row.
template <class Arch>
SATTN_NOINLINE void score_rows(const rows_scores_args& args) noexcept {
  for_each_row_group(args.rows, [&](auto queries, index_t first, index_t begin, index_t count,
                                    const void* const* next_k,
                                    const void* const*) SATTN_INLINE_LAMBDA {
    constexpr index_t stride = score_stride<queries>;
    alignas(64) float scores[stride * chunk_keys];
    score_row_group<Arch, queries>(args.rows, first, begin, count, next_k, scores);
    for (index_t n = 0; n < queries; ++n) {
      float* const to = args.scores + (first + n) * args.stride + begin;
      for (index_t key = 0; key < count; ++key) to[key] = scores[key * stride + n];
    }
  });
}

}  // namespace sattn::kernel
