// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/stored_row.hpp>
#include <sattn/kernel/tile_parts.hpp>

// Rows of K and V as engines store them, brought into the form that the tile kernel reads.

namespace sattn::kernel {

/// Row r of what is to be loaded, times its scale where it has one.
template <class Arch, class T>
class scaled_row {
 public:
  using V = simd::vec<Arch>;
  static constexpr bool loads_anywhere = stored_row<Arch, T>::loads_anywhere;

  SATTN_ALWAYS_INLINE scaled_row(const load_rows_args& args, index_t r) : row_(args.rows[r]) {
    if constexpr (has_row_scale(dtype_of<T>)) factor_ = V::broadcast(args.scales[r]);
  }
  SATTN_ALWAYS_INLINE V load(index_t i) const { return scaled(row_.load(i)); }
  SATTN_ALWAYS_INLINE V load_partial(index_t i, index_t count) const {
    return scaled(row_.load_partial(i, count));
  }

 private:
  SATTN_ALWAYS_INLINE V scaled(V x) const {
    if constexpr (has_row_scale(dtype_of<T>)) return x * factor_;
    return x;
  }

  stored_row<Arch, T> row_;
  V factor_;
};

/// Rows one behind the other: out [count][dim].
template <class Arch>
SATTN_NOINLINE void load_rows(const load_rows_args& args) noexcept {
  constexpr index_t width = simd::vec<Arch>::width;
  with_type(args.type, [&]<class T>(const T*) SATTN_INLINE_LAMBDA {
    for (index_t r = 0; r < args.count; ++r) {
      const scaled_row<Arch, T> row(args, r);
      float* const out = args.out + r * args.dim;
      index_t i = 0;
      SATTN_NO_UNROLL
      for (; i + width <= args.dim; i += width) row.load(i).store(out + i);
      if (i < args.dim) row.load_partial(i, args.dim - i).store_partial(out + i, args.dim - i);
    }
  });
}

/// Rows into panels: a key's columns of panel p go to out + p * value_panel_floats, the next key's
/// behind them; see value_block_keys. The columns are cut as pv_tile reads them.
template <class Arch>
SATTN_NOINLINE void load_values(const load_rows_args& args) noexcept {
  constexpr int cols = tile_rows<Arch>;
  constexpr index_t width = simd::vec<Arch>::width;
  with_type(args.type, [&]<class T>(const T*) SATTN_INLINE_LAMBDA {
    using row_type = scaled_row<Arch, T>;
    index_t panel = 0;
    for_each_tile<cols>(args.dim, [&](auto panel_width, index_t first) SATTN_INLINE_LAMBDA {
      float* const out = args.out + panel++ * value_panel_floats(cols);
      // A store of full width runs into the place of the next key, which is written later, or into
      // the slack; a load of full width needs columns of the same row.
      const bool whole =
          row_type::loads_anywhere && first + width <= args.dim && width <= value_panel_slack;
      for (index_t r = 0; r < args.count; ++r) {
        const row_type row(args, r);
        if (whole) {
          row.load(first).store(out + r * cols);
        } else {
          row.load_partial(first, panel_width).store_partial(out + r * cols, panel_width);
        }
      }
    });
  });
}

}  // namespace sattn::kernel
