// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/stored_row.hpp>
#include <sattn/kernel/tile_parts.hpp>

// Rows of K and V as engines store them, brought into the form that the tile kernel reads.

namespace sattn::kernel {

/// Rows one behind the other: out [count][dim].
template <class Arch>
SATTN_NOINLINE void load_rows(const load_rows_args& args) noexcept {
  constexpr index_t width = simd::vec<Arch>::width;
  with_type(args.type, [&](auto* type) SATTN_INLINE_LAMBDA {
    for (index_t r = 0; r < args.count; ++r) {
      const auto* const row = static_cast<decltype(type)>(args.rows[r]);
      float* const out = args.out + r * args.dim;
      index_t i = 0;
      SATTN_NO_UNROLL
      for (; i + width <= args.dim; i += width) simd::load_as_float<Arch>(row + i).store(out + i);
      for (; i < args.dim; ++i) out[i] = to_float(row[i]);
    }
  });
}

/// Rows into panels: a key's columns of panel p go to out + p * value_panel_floats, the next key's
/// behind them; see value_block_keys. The columns are cut as pv_tile reads them.
template <class Arch>
SATTN_NOINLINE void load_values(const load_rows_args& args) noexcept {
  constexpr int cols = tile_rows<Arch>;
  constexpr index_t width = simd::vec<Arch>::width;
  with_type(args.type, [&](auto* type) SATTN_INLINE_LAMBDA {
    index_t panel = 0;
    for_each_tile<cols>(args.dim, [&](auto panel_width, index_t first) SATTN_INLINE_LAMBDA {
      float* const out = args.out + panel++ * value_panel_floats(cols);
      // A store of full width runs into the place of the next key, which is written later, or into
      // the slack; a load of full width needs columns of the same row.
      const bool whole = first + width <= args.dim && width <= value_panel_slack;
      for (index_t r = 0; r < args.count; ++r) {
        const auto* const row = static_cast<decltype(type)>(args.rows[r]) + first;
        if (whole) {
          simd::load_as_float<Arch>(row).store(out + r * cols);
        } else {
          for (index_t i = 0; i < panel_width; ++i) out[r * cols + i] = to_float(row[i]);
        }
      }
    });
  });
}

}  // namespace sattn::kernel
