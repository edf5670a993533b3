// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/types.hpp>

#include <cstdint>

namespace sattn {

/// Which keys of a tile whose rows have lists of their own run in the tile kernel, for all 16 lanes,
/// and which run row by row. A key goes to the tile where enough rows share it; a tile that would
/// gain too little is left to the rows altogether. A key costs the tile 16 lanes at 0.85 of the FMA
/// peak for every head, a row about 0.2 of it alone and 0.4 in a group of four: 4 and 7 rows even out.
class row_sharing {
 public:
  explicit row_sharing(index_t heads) : least_rows_(heads >= 4 ? 7 : heads >= 2 ? 5 : 4) {}

  /// Whether lists overlap so much, on average over a plan, that the tile kernel takes whole tiles
  /// sooner than any division: from 4.5 rows a key, 7 where two heads share the lists, 11.5 where
  /// four do (docs/performance.md).
  static bool whole_tiles_pay(index_t heads, std::int64_t pairs, std::int64_t keys) {
    return 2 * pairs >= (heads >= 4 ? 23 : heads >= 2 ? 14 : 9) * keys;
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
