// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/math.hpp>
#include <sattn/plan/domain.hpp>

#include <algorithm>
#include <bit>
#include <numeric>

namespace sattn {

inline constexpr token_t max_tile_rows = 128;

/// How the query rows are cut into tiles that share one list of keys: every `rows` rows, and anew
/// at every multiple of `period`, so that a tile never straddles two query blocks of a mask.
struct tile_grid {
  token_t rows = 64;    // 1 .. 128
  token_t period = 0;   // 0 = none

  constexpr index_t tiles(index_t q_len) const {
    if (period == 0) return ceil_div(q_len, rows);
    return q_len / period * ceil_div(period, rows) + ceil_div(q_len % period, rows);
  }

  /// Rows [begin, end) of the tile.
  constexpr key_range row_range(index_t tile, index_t q_len) const {
    const index_t per_period = period == 0 ? 0 : ceil_div(period, rows);
    const index_t base = period == 0 ? 0 : tile / per_period * period;
    const index_t limit = period == 0 ? q_len : std::min<index_t>(base + period, q_len);
    const index_t begin = base + (period == 0 ? tile : tile % per_period) * rows;
    return {static_cast<token_t>(begin),
            static_cast<token_t>(std::min<index_t>(begin + rows, limit))};
  }

  /// The tile that a row belongs to.
  constexpr index_t tile_of(index_t row) const { return tiles(row + 1) - 1; }

  /// The same tiles, with the height that they really have.
  constexpr tile_grid fitted() const {
    return {period > 0 ? std::min(rows, period) : rows, period};
  }

  /// The grid that respects both: tiles are no taller, and break at the multiples of both periods.
  friend constexpr tile_grid operator&(const tile_grid& a, const tile_grid& b) {
    return tile_grid{std::min(a.rows, b.rows), std::gcd(a.period, b.period)}  // gcd(x, 0) = x
        .fitted();
  }
  constexpr bool operator==(const tile_grid&) const = default;
};

/// Which heads share a list of keys.
enum class head_map { shared, per_kv_head, per_q_head };

/// How query rows and the heads that share their list fill the 16 lanes of the tile kernel:
/// 16 rows of one head, or 8 x 2, 4 x 4, 2 x 8, 1 x 16 rows x heads. Short tiles keep the hull of a
/// diagonal narrow, and heads in the lanes keep the tile full all the same.
struct lane_layout {
  index_t rows = 16;   // rows of one lane block, a power of two
  index_t heads = 1;   // heads of one lane block
  bool single_rows = false;  // the row kernel runs it: too few lanes would be used

  static constexpr index_t lanes = 16;

  constexpr lane_layout() = default;
  constexpr lane_layout(const tile_grid& grid, index_t sharing_heads) {
    rows = static_cast<index_t>(
        std::bit_ceil(static_cast<unsigned>(std::min<token_t>(grid.rows, lanes))));
    heads = lanes / rows;
    // With up to 8 of 16 lanes in use the row kernel is as fast or faster.
    single_rows =
        std::min<index_t>(grid.rows, rows) * std::min(sharing_heads, heads) <= lanes / 2 &&
        grid.rows < lanes;
  }
};

}  // namespace sattn
