// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/plan/plan_writer.hpp>

#include <algorithm>
#include <limits>
#include <vector>

namespace sattn {

/// Single keys for every row (columns) and single distances behind every row (slashes).
///
/// Any order, duplicates count once; planning copies distances that are not sorted. The plan's
/// rounding decides what happens around a slash:
/// `exact` attends to the selected distances alone, `cover` to the whole hull of a tile.
/// Throws: shape_error, while planning, if a column is outside [0, kv_len) or a distance negative.
/// Source: MInference (arXiv:2407.02490), section 3; the exact rounding is ours.
struct vertical_slash {
  std::vector<token_t> columns;
  std::vector<token_t> distances;

  /// The hull of a diagonal is as wide as the tile is tall, so short tiles compute less, and
  /// compute it more slowly. Takes the height with the least time, by what each cost on AVX2. Under
  /// rounding::cover the height decides what is selected: set plan_options::tile_rows there.
  tile_grid grid(index_t sharing_heads) const {
    if (distances.empty()) return {max_tile_rows, 0};
    if (!std::is_sorted(distances.begin(), distances.end())) {
      std::vector<token_t> sorted = distances;
      std::sort(sorted.begin(), sorted.end());
      return grid_of(sorted, sharing_heads);
    }
    return grid_of(distances, sharing_heads);
  }
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

 private:
  tile_grid grid_of(const std::vector<token_t>& sorted, index_t sharing_heads) const {
    struct height {
      token_t rows;
      index_t heads;  // in the lanes of one block
      double cost;    // of a lane and key, relative to tall tiles
    };
    token_t best = 16;
    double least = std::numeric_limits<double>::infinity();
    for (const height h : {height{64, 1, 1.0}, {16, 1, 1.04}, {8, 2, 1.10}, {4, 4, 1.24}}) {
      if (h.heads > sharing_heads) break;
      const double lanes = 16.0 * static_cast<double>(ceil_div(sharing_heads, h.heads)) /
                           static_cast<double>(std::min<index_t>(h.rows, 16) * sharing_heads);
      const double keys = static_cast<double>(hull_keys(sorted, h.rows)) +
                          static_cast<double>(columns.size());
      const double time = keys * lanes * h.cost;
      if (time < least) {
        least = time;
        best = h.rows;
      }
    }
    return {best, 0};
  }

  /// Keys under the diagonals of a tile of `rows` rows, each counted once.
  static index_t hull_keys(const std::vector<token_t>& sorted, token_t rows) {
    index_t keys = 0;
    index_t covered = std::numeric_limits<index_t>::min();  // distances below it are counted
    for (const token_t d : sorted) {  // the diagonal takes the distances (d - rows, d]
      const index_t end = index_t{d} + 1;
      keys += end - std::max(covered, end - rows);
      covered = end;
    }
    return keys;
  }
};

}  // namespace sattn
