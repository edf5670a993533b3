// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/kernel_table.hpp>
#include <sattn/kv/stored_view.hpp>

#include <algorithm>
#include <array>

namespace sattn::detail {

/// Which kernel reads rows of K and V.
enum class row_reader { tiles, rows };

/// The tile kernel reads f32; the row kernel all types but those in blocks, for whose scales it has
/// no registers left.
constexpr bool reads(row_reader reader, dtype type) {
  return type == dtype::f32 || (reader == row_reader::rows && block_of(type) == 1);
}

/// Where the rows of K or V of up to chunk_keys keys lie, and extra entries for what kernels
/// prefetch.
struct located_rows {
  std::array<const void*, chunk_keys + prefetch_rows> rows;
  std::array<float, chunk_keys> scales;  // where the type has one for each row
  dtype type;
  index_t count;

  /// Floats of room for rows that must be widened for a reader.
  static index_t widened_floats(const stored_view& view, row_reader reader) {
    return reads(reader, view.type) ? 0 : chunk_keys * view.dim;
  }

  /// In a type that the reader reads: other rows are widened to f32 in `room`. key_count > 0.
  void locate(const token_t* keys, index_t key_count, const row_source& source, row_reader reader,
              index_t dim, const kernel_table& kernels, float* room) {
    count = key_count;
    type = source.type;
    source.locate(keys, count, rows.data());
    if (has_row_scale(type)) source.read_scales(keys, count, scales.data());
    if (!reads(reader, type)) {
      kernels.load_rows({rows.data(), scales.data(), type, count, dim, room});
      for (index_t i = 0; i < count; ++i) rows[static_cast<std::size_t>(i)] = room + i * dim;
      type = dtype::f32;
    }
    pad();
  }
  /// Repeats the last row behind the others.
  void pad() {
    std::fill(rows.begin() + count, rows.end(), rows[static_cast<std::size_t>(count - 1)]);
  }

  /// From row `first` on; null where the type has none.
  const float* scales_from(index_t first) const {
    return has_row_scale(type) ? scales.data() + first : nullptr;
  }
};

}  // namespace sattn::detail
