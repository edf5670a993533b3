// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/stored_row.hpp>
#include <sattn/kernel/tile_parts.hpp>

// Rows of K and V as engines store them, brought into the form that the tile kernel reads.

namespace sattn::kernel {

/// Calls f(row, scaled) for each row, where scaled(x) gives elements their meaning.
template <class Arch, class F>
SATTN_ALWAYS_INLINE void for_each_stored_row(const load_rows_args& args, F&& f) {
  using V = simd::vec<Arch>;
  with_type(args.type, [&]<class T>(const T*) SATTN_INLINE_LAMBDA {
    for (index_t r = 0; r < args.count; ++r) {
      const stored_row<Arch, T> row(args.rows[r]);
      if constexpr (has_row_scale(dtype_of<T>)) {
        const V factor = V::broadcast(args.scales[r]);
        f(r, row, [&](V x) SATTN_INLINE_LAMBDA { return x * factor; });
      } else {
        f(r, row, [](V x) SATTN_INLINE_LAMBDA { return x; });
      }
    }
  });
}

/// Rows one behind the other: out [count][dim].
template <class Arch>
SATTN_NOINLINE void load_rows(const load_rows_args& args) noexcept {
  constexpr index_t width = simd::vec<Arch>::width;
  for_each_stored_row<Arch>(args, [&](index_t r, auto row, auto scaled) SATTN_INLINE_LAMBDA {
    float* const out = args.out + r * args.dim;
    index_t i = 0;
    SATTN_NO_UNROLL
    for (; i + width <= args.dim; i += width) scaled(row.load(i)).store(out + i);
    if (i < args.dim) {
      scaled(row.load_partial(i, args.dim - i)).store_partial(out + i, args.dim - i);
    }
  });
}

/// Rows into panels: a key's columns of panel p go to out + p * value_panel_floats, the next key's
/// behind them; see value_block_keys. The columns are cut as pv_tile reads them.
template <class Arch>
SATTN_NOINLINE void load_values(const load_rows_args& args) noexcept {
  constexpr int cols = tile_rows<Arch>;
  constexpr index_t width = simd::vec<Arch>::width;
  for_each_stored_row<Arch>(args, [&](index_t r, auto row, auto scaled) SATTN_INLINE_LAMBDA {
    index_t panel = 0;
    for_each_tile<cols>(args.dim, [&](auto panel_width, index_t first) SATTN_INLINE_LAMBDA {
      float* const out = args.out + panel++ * value_panel_floats(cols) + r * cols;
      // A store of full width runs into the place of the next key, which is written later, or into
      // the slack; a load of full width needs columns of the same row.
      if (row.loads_anywhere && first + width <= args.dim && width <= value_panel_slack) {
        scaled(row.load(first)).store(out);
      } else {
        scaled(row.load_partial(first, panel_width)).store_partial(out, panel_width);
      }
    });
  });
}

}  // namespace sattn::kernel
