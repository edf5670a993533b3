// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/types.hpp>

#include <array>
#include <cstddef>
#include <cstdint>

namespace sattn {

/// Which keys of a tile whose rows have lists of their own run in the tile kernel, for all 16
/// lanes, and which run row by row. A key goes to the tile where enough rows share it; a tile that
/// would gain too little is left to the rows altogether. A key costs the tile 16 lanes at 0.85 of
/// the FMA peak for every head, a row about 0.2 of it alone and 0.4 in a group of four: 4 and 7
/// rows even out.
class row_sharing {
 public:
  explicit row_sharing(index_t heads) : least_rows_(heads >= 4 ? 7 : heads >= 2 ? 5 : 4) {}

  /// How many keys any number of rows of their tile have.
  using histogram = std::array<std::int64_t, 17>;

  /// Whether the tile kernel takes all keys of a plan's tiles sooner than the keys and rows divided
  /// as above: dividing costs 19 % of the time of what it leaves where each head has lists of its
  /// own, 4 % where two or three share them, nothing measurable from four (docs/performance.md).
  /// `tile_heads` run together in the 16 lanes of the tile kernel.
  static bool whole_tiles_pay(const histogram& keys_of_rows, index_t heads, index_t tile_heads) {
    const row_sharing divide(heads);
    const index_t lanes = 16 * ((heads + tile_heads - 1) / tile_heads);
    std::int64_t whole = 0;
    std::int64_t divided = 0;  // in lanes of the tile kernel, as are rows by what they cost
    for (index_t rows = 1; rows <= 16; ++rows) {
      const std::int64_t keys = keys_of_rows[static_cast<std::size_t>(rows)];
      whole += keys * lanes;
      divided += keys * heads * 16 * (divide.shared(rows) ? divide.least_rows_ : rows);
    }
    const int percent = heads >= 4 ? 100 : heads >= 2 ? 104 : 119;
    return whole > 0 && whole * divide.least_rows_ * 100 <= divided * percent;
  }

  /// Whether a key that this many rows attend to may go to the tile.
  bool shared(index_t rows) const { return rows >= least_rows_; }

  /// Counts the keys of a tile, one by one.
  void add(index_t rows) {
    if (shared(rows)) {
      ++shared_keys_;
      shared_pairs_ += rows;
    } else {
      row_pairs_ += rows;
    }
  }
  bool tile_pays() const { return shared_pairs_ >= least_pairs; }
  index_t tile_keys() const { return tile_pays() ? shared_keys_ : 0; }
  index_t row_pairs() const { return row_pairs_ + (tile_pays() ? 0 : shared_pairs_); }

  static constexpr index_t least_pairs = 256;  // fewer than a full chunk of shared keys holds

 private:
  index_t least_rows_;
  index_t shared_keys_ = 0;
  index_t shared_pairs_ = 0;
  index_t row_pairs_ = 0;
};

}  // namespace sattn
