// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/column_mass.hpp>
#include <sattn/kernel/decode_rows.hpp>
#include <sattn/kernel/kernel_table.hpp>
#include <sattn/kernel/lane_sums.hpp>
#include <sattn/kernel/load_rows.hpp>
#include <sattn/kernel/page_scores.hpp>
#include <sattn/kernel/prefill_tile.hpp>
#include <sattn/kernel/row_scores.hpp>
#include <sattn/kernel/softmax.hpp>
#include <sattn/simd/cpu.hpp>

namespace sattn {

// The one list of kernels.
template <class Arch>
const kernel_table& kernels() {
  static constexpr kernel_table table = {
      Arch::name,
      &simd::cpu_supports<Arch>,
      kernel::tile_rows<Arch>,
      &kernel::load_rows<Arch>,
      &kernel::load_values<Arch>,
      &kernel::pack_queries<Arch>,
      &kernel::attend_tile<Arch>,
      &kernel::score_tile<Arch>,
      &kernel::finish_tile<Arch>,
      &kernel::column_mass<Arch>,
      &kernel::attend_rows<Arch>,
      &kernel::merge_rows<Arch>,
      &kernel::column_mass_rows<Arch>,
      &kernel::score_rows<Arch>,
      &kernel::score_pages<Arch>,
      &kernel::softmax<Arch>,
      &kernel::softmax_lanes<Arch>,
      &kernel::sum_probabilities<Arch>,
  };
  return table;
}

}  // namespace sattn
