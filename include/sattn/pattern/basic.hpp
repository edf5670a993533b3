// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/plan/plan_writer.hpp>

#include <algorithm>

namespace sattn {

/// All legal keys: the baseline of every comparison.
struct dense {
  tile_grid grid() const { return {max_tile_rows, 0}; }
  void emit(const plan_scope& scope, plan_writer& writer) const {
    writer.columns(0, static_cast<token_t>(scope.shape.kv_len));
  }
};

/// The first `count` keys, which softmax uses as a place to put weight.
/// Source: StreamingLLM (arXiv:2309.17453).
struct sink {
  token_t count = 4;

  tile_grid grid() const { return {max_tile_rows, 0}; }
  /// Throws: shape_error if count is negative. More than kv_len means all.
  void emit(const plan_scope& scope, plan_writer& writer) const {
    require(count >= 0, "sink: count ", count, " is negative");
    writer.columns(0, static_cast<token_t>(std::min<index_t>(count, scope.shape.kv_len)));
  }
};

/// The last `size` keys of each row, its own position included.
struct sliding_window {
  token_t size = 1024;

  tile_grid grid() const { return {max_tile_rows, 0}; }
  /// Throws: shape_error if size is negative.
  void emit(const plan_scope&, plan_writer& writer) const {
    require(size >= 0, "sliding_window: size ", size, " is negative");
    writer.distances(0, size);
  }
};

/// All legal keys of the query rows from `first` on, and none of the rows before.
struct rows_from {
  token_t first = 0;

  /// Tiles begin anew at the row.
  tile_grid grid() const { return {64, std::max<token_t>(first, 0)}; }
  /// Throws: shape_error if first is negative.
  void emit(const plan_scope& scope, plan_writer& writer) const {
    require(first >= 0, "rows_from: row ", first, " is negative");
    for (index_t tile = 0; tile < scope.tiles(); ++tile) {
      const key_range rows = scope.rows(tile);
      if (rows.begin < first) continue;
      const key_range keys = scope.visible(tile);
      writer.range(tile, keys.begin, std::max(keys.begin, keys.end));
    }
  }
};

}  // namespace sattn
