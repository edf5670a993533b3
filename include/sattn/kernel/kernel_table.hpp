// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/kernel_args.hpp>
#include <sattn/simd/arch.hpp>

namespace sattn {

/// The closed set of kernels for one instruction set. Above this line nothing depends on it.
/// All are noexcept, allocate nothing and may run on several threads with distinct state.
struct kernel_table {
  const char* name;
  bool (*cpu_supports)();

  // K and V in the form that the other kernels read.
  index_t panel_cols;  // columns of a panel of packed values
  void (*load_rows)(const load_rows_args&) noexcept;
  void (*load_values)(const load_rows_args&) noexcept;  // up to the end of one block of keys

  // Prefill: 16 query lanes against chunks of keys.
  void (*pack_queries)(const pack_args&) noexcept;
  void (*attend_tile)(const tile_args&) noexcept;   // scores, online softmax, values
  void (*score_tile)(const tile_args&) noexcept;    // scores only, into tile_args::scores
  void (*finish_tile)(const finish_args&) noexcept;
  void (*column_mass)(const column_mass_args&) noexcept;  // of what score_tile leaves

  // Decode and per-row lists: single query rows against chunks of keys.
  void (*attend_rows)(const rows_args&) noexcept;
  void (*merge_rows)(const merge_args&) noexcept;
  void (*column_mass_rows)(const rows_mass_args&) noexcept;

  // Estimators.
  void (*score_rows)(const rows_scores_args&) noexcept;
  void (*score_pages)(const page_scores_args&) noexcept;
  // Scores [count] in place to probabilities; all 0 when every score is -inf.
  void (*softmax)(float* scores, index_t count) noexcept;
  // The same for 16 rows at once, [count][16], as score_tile leaves them.
  void (*softmax_lanes)(float* scores, index_t count) noexcept;
  void (*sum_probabilities)(const lane_sums_args&) noexcept;
};

/// The kernels of one instruction set; defined in kernel_table_impl.hpp.
template <class Arch>
const kernel_table& kernels();

}  // namespace sattn
