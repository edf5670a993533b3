// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/types.hpp>

namespace sattn {

/// Which keys of a tile whose rows have lists of their own run in the tile kernel, for all 16 lanes,
/// and which run row by row. A key goes to the tile where enough rows share it; a tile that would
/// gain too little is left to the rows altogether. The numbers are in docs/performance.md.
class row_sharing {
 public:
  explicit row_sharing(index_t heads) : least_rows_(heads >= 4 ? 7 : heads >= 2 ? 5 : 4) {}

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

  static constexpr index_t least_pairs = 256;

 private:
  index_t least_rows_;
  index_t shared_keys_ = 0;
  index_t shared_pairs_ = 0;
  index_t row_pairs_ = 0;
};

}  // namespace sattn
