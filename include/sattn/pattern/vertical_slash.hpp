// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/plan/plan_writer.hpp>

#include <limits>
#include <vector>

namespace sattn {

/// Single keys for every row (columns) and single distances behind every row (slashes).
///
/// Any order, duplicates count once. The plan's rounding decides what happens around a slash:
/// `exact` attends to the selected distances alone, `cover` to the whole hull of a tile.
/// Throws: shape_error, while planning, if a column is outside [0, kv_len) or a distance negative.
/// Source: MInference (arXiv:2407.02490), section 3; the exact rounding is ours.
struct vertical_slash {
  std::vector<token_t> columns;
  std::vector<token_t> distances;

  // Short tiles: the hull of one diagonal is as wide as the tile is tall.
  tile_grid grid() const { return {distances.empty() ? max_tile_rows : token_t{16}, 0}; }
  void emit(const plan_scope& scope, plan_writer& writer) const {
    for (const token_t c : columns) {
      require(c >= 0 && c < scope.shape.kv_len, "vertical_slash: column ", c, ", kv_len is ",
              scope.shape.kv_len);
      writer.columns(c, c + 1);
    }
    for (const token_t d : distances) {
      require(d >= 0, "vertical_slash: distance ", d, " is negative");
      if (d < std::numeric_limits<token_t>::max()) writer.distances(d, d + 1);
    }
  }
};

}  // namespace sattn
