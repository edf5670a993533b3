// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/plan/attention_plan.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

namespace sattn {

inline constexpr index_t max_chunk_keys = 128;
inline constexpr index_t sub_tile_rows = 16;
inline constexpr index_t max_sub_tiles = max_tile_rows / sub_tile_rows;

/// The next keys of a tile, ascending, and which of its rows attend to each.
struct key_chunk {
  // What 16 rows of the tile (or, below 16 rows, rows x heads) do with the chunk.
  struct sub_tile {
    index_t begin = 0;  // keys [begin, end) of the chunk concern it
    index_t end = 0;
    bool masked = false;  // false: every row attends to all of them
  };

  index_t count = 0;
  std::array<token_t, max_chunk_keys> keys;
  std::array<sub_tile, max_sub_tiles> sub;
  std::array<std::array<std::uint16_t, max_chunk_keys>, max_sub_tiles> masks;  // where masked

  // Keys that not every row attends to: those on a selected diagonal and those of the mask.
  std::array<bool, max_chunk_keys> partial;
  std::array<std::uint16_t, max_chunk_keys> row_mask;
};

/// Turns the encodings of a plan head into chunks of keys for one tile, while the tile runs.
/// Allocates nothing. Chunks hold 128 keys (the last one fewer), counted from the tile's first key,
/// so that a row's arithmetic does not depend on how the keys were encoded.
class tile_cursor {
 public:
  /// `lane_rows`: rows of a lane block, lane_layout::rows for the tile kernel; the mask of a tile
  /// below 16 rows is repeated for each head of the block. 16 for the row kernel: bit = row.
  tile_cursor(const attention_plan& plan, index_t head, index_t tile, index_t lane_rows,
              key_range within);

  /// False when no keys are left.
  bool next(key_chunk& chunk);

  /// The next run of consecutive keys, instead of chunks; false when none is left.
  bool next_range(key_range& keys) {
    if (!next_segment()) return false;
    keys = segment_;
    return true;
  }

  index_t sub_tiles() const { return ceil_div(rows_, sub_tile_rows); }
  index_t sub_rows(index_t sub) const {
    return std::min(sub_tile_rows, rows_ - sub * sub_tile_rows);
  }

 private:
  static constexpr token_t no_key = std::numeric_limits<token_t>::max();

  struct stream {  // sorted ranges, consumed from the front
    const key_range* at = nullptr;
    const key_range* end = nullptr;
    void skip_before(token_t key) {
      while (at != end && at->end <= key) ++at;
    }
  };

  bool next_segment();
  index_t fill_plain(key_chunk& chunk, bool& any_partial);
  void advance_hull();
  bool next_row_keys(key_chunk& chunk);
  /// Away from the diagonal, without a window: no row from `top` on fails to see keys up to `last`.
  bool seen_by_all_rows(token_t last, token_t top) const {
    return legal_->window == 0 && (!legal_->causal || last <= top);
  }
  void mask_sub_tile(key_chunk& chunk, index_t sub) const;
  std::uint16_t distance_mask(token_t position, token_t key) const;

  const domain* legal_ = nullptr;
  const std::uint64_t* distance_bits_ = nullptr;
  index_t last_bit_ = -1;
  index_t distance_end_ = 0;          // larger distances concern no row
  const key_range* runs_ = nullptr;   // of distances
  index_t runs_left_ = 0;             // consumed from the back: far diagonals are early keys
  stream columns_;
  stream ranges_;
  const token_t* token_ = nullptr;
  const token_t* token_end_ = nullptr;
  const token_t* row_key_ = nullptr;
  const token_t* row_key_end_ = nullptr;
  const std::uint16_t* row_mask_ = nullptr;  // of row_key_
  bool only_row_keys_ = false;
  bool plain_ = false;  // distances and columns alone
  key_range hull_;                    // of the diagonals around the next key
  key_range segment_;                 // keys still to hand out
  bool segment_partial_ = false;      // only some rows attend: diagonals and segment_mask_
  std::uint16_t segment_mask_ = 0;
  bool cover_ = false;
  token_t next_key_ = 0;
  token_t end_key_ = 0;
  index_t kv_len_ = 0;
  token_t first_ = 0;                 // position of the first row
  index_t rows_ = 0;
  std::uint16_t repeat_ = 1;          // copies a mask of rows to every head of a lane block
};

inline tile_cursor::tile_cursor(const attention_plan& plan, index_t head, index_t tile,
                                index_t lane_rows, key_range within) {
  const plan_data& data = plan.data();
  const plan_head& h = plan.head(head);
  const key_range rows = data.grid.row_range(tile, data.shape.q_len);
  legal_ = &data.legal;
  kv_len_ = data.shape.kv_len;
  first_ = data.shape.position(rows.begin);
  rows_ = rows.size();
  cover_ = data.rounding == rounding::cover;
  for (index_t shift = lane_rows; shift < sub_tile_rows; shift += lane_rows) {
    repeat_ = static_cast<std::uint16_t>(repeat_ | 1u << shift);
  }
  next_key_ = std::max(within.begin, legal_->legal(first_, kv_len_).begin);
  end_key_ = std::min(
      within.end, legal_->legal(static_cast<token_t>(first_ + rows_ - 1), kv_len_).end);
  columns_ = {h.columns.data(), h.columns.data() + h.columns.size()};
  const auto t = static_cast<std::size_t>(tile);
  if (!h.range_ptr.empty()) {
    ranges_ = {h.ranges.data() + h.range_ptr[t], h.ranges.data() + h.range_ptr[t + 1]};
  }
  if (!h.token_ptr.empty()) {
    token_ = h.tokens.data() + h.token_ptr[t];
    token_end_ = h.tokens.data() + h.token_ptr[t + 1];
  }
  if (!h.row_key_ptr.empty()) {
    row_key_ = h.row_keys.data() + h.row_key_ptr[t];
    row_key_end_ = h.row_keys.data() + h.row_key_ptr[t + 1];
    row_mask_ = h.row_masks.data() + h.row_key_ptr[t];
  }
  if (next_key_ > 0) {  // a window or a later split: do not walk there
    columns_.at = std::partition_point(columns_.at, columns_.end,
                                       [&](const key_range& r) { return r.end <= next_key_; });
    ranges_.at = std::partition_point(ranges_.at, ranges_.end,
                                      [&](const key_range& r) { return r.end <= next_key_; });
    token_ = std::lower_bound(token_, token_end_, next_key_);
    const token_t* const row_key = std::lower_bound(row_key_, row_key_end_, next_key_);
    row_mask_ += row_key - row_key_;
    row_key_ = row_key;
  }
  row_key_end_ = std::lower_bound(row_key_, row_key_end_, end_key_);
  plain_ = ranges_.at == ranges_.end && token_ == token_end_ && row_key_ == row_key_end_;
  only_row_keys_ = !plain_ && h.distances.empty() && columns_.at == columns_.end &&
                   ranges_.at == ranges_.end && token_ == token_end_;
  if (!h.distances.empty()) {
    distance_bits_ = h.distance_bits.data();
    last_bit_ = h.distances.back().end - 1 + distance_bit_offset;
    runs_ = h.distances.data();
    // Runs so far that their hull ends at or before the first key are of no use.
    const index_t last = index_t{first_} + rows_ - 1;
    // What the window makes illegal at every distance is left out; a hull that covers is for all
    // rows, whatever their own distance.
    distance_end_ = legal_->window > 0 && !cover_ ? legal_->window : no_key;
    const key_range* useful =
        std::partition_point(runs_, runs_ + h.distances.size(), [&](const key_range& run) {
          return last - run.begin >= next_key_ && run.begin < distance_end_;
        });
    runs_left_ = useful - runs_;
    advance_hull();
  }
}

/// Moves hull_ to the next one, merging hulls that touch: a run [a, b) of distances reaches the
/// keys [first - b + 1, last - a] of the rows first .. last.
inline void tile_cursor::advance_hull() {
  const index_t last = index_t{first_} + rows_ - 1;
  const auto hull_begin = [&](const key_range& run) {
    return index_t{first_} - std::min<index_t>(run.end, distance_end_) + 1;
  };
  if (runs_left_ == 0) {
    hull_ = {no_key, no_key};
    return;
  }
  const key_range& run = runs_[--runs_left_];
  const index_t begin = hull_begin(run);
  index_t end = last - run.begin + 1;
  while (runs_left_ > 0 && hull_begin(runs_[runs_left_ - 1]) <= end) {
    end = last - runs_[--runs_left_].begin + 1;
  }
  hull_ = {static_cast<token_t>(std::max<index_t>(begin, 0)), static_cast<token_t>(end)};
}

/// Finds the next keys that share one reason to be there; false at the end.
inline bool tile_cursor::next_segment() {
  if (next_key_ >= end_key_) return false;
  columns_.skip_before(next_key_);
  ranges_.skip_before(next_key_);
  while (token_ != token_end_ && *token_ < next_key_) ++token_;
  while (row_key_ != row_key_end_ && *row_key_ < next_key_) {
    ++row_key_;
    ++row_mask_;
  }
  while (hull_.end <= next_key_) advance_hull();

  // Keys for all rows come before others at the same place.
  key_range whole = {no_key, no_key};
  const auto consider = [&](key_range r) {
    r.begin = std::max(r.begin, next_key_);
    if (r.begin < whole.begin) whole = r;
  };
  if (columns_.at != columns_.end) consider(*columns_.at);
  if (ranges_.at != ranges_.end) consider(*ranges_.at);
  if (token_ != token_end_) consider({*token_, *token_ + 1});
  const token_t hull_begin = std::max(hull_.begin, next_key_);

  const token_t row_key = row_key_ != row_key_end_ ? *row_key_ : no_key;
  const token_t partial_begin = std::min(hull_begin, row_key);
  if (std::min(whole.begin, partial_begin) >= end_key_) return false;
  segment_partial_ = partial_begin < whole.begin && !(cover_ && hull_begin == partial_begin);
  segment_mask_ = 0;
  if (partial_begin >= whole.begin) {
    segment_ = whole;
  } else if (row_key == partial_begin) {  // on a diagonal or not
    segment_ = {row_key, row_key + 1};
    segment_mask_ = *row_mask_;
  } else {
    segment_ = {hull_begin, std::min({hull_.end, whole.begin, row_key})};
  }
  segment_.end = std::min(segment_.end, end_key_);
  next_key_ = segment_.end;
  return true;
}

/// The keys of a chunk from distances and columns, as next_segment would give them one by one.
inline index_t tile_cursor::fill_plain(key_chunk& chunk, bool& any_partial) {
  index_t count = 0;
  while (count < max_chunk_keys && next_key_ < end_key_) {
    columns_.skip_before(next_key_);
    while (hull_.end <= next_key_) advance_hull();
    const token_t column =
        columns_.at == columns_.end ? no_key : std::max(columns_.at->begin, next_key_);
    const token_t hull = std::max(hull_.begin, next_key_);
    const bool whole = column <= hull;  // keys for all rows come first at the same place
    const token_t begin = whole ? column : hull;
    if (begin >= end_key_) break;
    const token_t end = std::min(whole ? columns_.at->end : std::min(hull_.end, column), end_key_);
    const index_t take = std::min<index_t>(end - begin, max_chunk_keys - count);
    const bool partial = !whole && !cover_;
    const auto at = static_cast<std::size_t>(count);
    for (index_t i = 0; i < take; ++i) {
      chunk.keys[at + static_cast<std::size_t>(i)] = static_cast<token_t>(begin + i);
      chunk.partial[at + static_cast<std::size_t>(i)] = partial;
    }
    any_partial |= partial;
    count += take;
    next_key_ = static_cast<token_t>(begin + take);
  }
  return count;
}

/// A chunk of keys of single rows alone: their masks are what the plan holds.
inline bool tile_cursor::next_row_keys(key_chunk& chunk) {
  const index_t count = std::min<index_t>(max_chunk_keys, row_key_end_ - row_key_);
  chunk.count = count;
  if (count == 0) return false;
  std::copy_n(row_key_, count, chunk.keys.begin());
  chunk.sub[0] = {0, count, true};
  if (seen_by_all_rows(row_key_[count - 1], first_)) {
    for (index_t i = 0; i < count; ++i) {
      chunk.masks[0][static_cast<std::size_t>(i)] =
          static_cast<std::uint16_t>(row_mask_[i] * repeat_);
    }
  } else {
    std::copy_n(row_mask_, count, chunk.row_mask.begin());
    std::fill_n(chunk.partial.begin(), count, true);
    mask_sub_tile(chunk, 0);
  }
  row_key_ += count;
  row_mask_ += count;
  return true;
}

inline bool tile_cursor::next(key_chunk& chunk) {
  index_t count = 0;
  bool any_partial = false;
  if (only_row_keys_) return next_row_keys(chunk);
  if (plain_) count = fill_plain(chunk, any_partial);
  while (count < max_chunk_keys && !plain_) {
    if (segment_.empty() && !next_segment()) break;
    const index_t take = std::min(segment_.size(), max_chunk_keys - count);
    for (index_t i = 0; i < take; ++i) {
      chunk.keys[static_cast<std::size_t>(count + i)] = static_cast<token_t>(segment_.begin + i);
      chunk.partial[static_cast<std::size_t>(count + i)] = segment_partial_;
      chunk.row_mask[static_cast<std::size_t>(count + i)] = segment_mask_;
    }
    any_partial |= segment_partial_;
    count += take;
    segment_.begin = static_cast<token_t>(segment_.begin + take);
  }
  chunk.count = count;
  if (count == 0) return false;

  const token_t* const keys = chunk.keys.data();
  for (index_t s = 0; s < sub_tiles(); ++s) {
    const auto top = static_cast<token_t>(first_ + s * sub_tile_rows);
    const auto bottom = static_cast<token_t>(top + sub_rows(s) - 1);
    const key_range of_top = legal_->legal(top, kv_len_);
    const key_range of_bottom = legal_->legal(bottom, kv_len_);
    key_chunk::sub_tile& sub = chunk.sub[static_cast<std::size_t>(s)];
    sub.begin = keys[0] >= of_top.begin
                    ? 0
                    : std::lower_bound(keys, keys + count, of_top.begin) - keys;
    sub.end = keys[count - 1] < of_bottom.end
                  ? count
                  : std::lower_bound(keys, keys + count, of_bottom.end) - keys;
    if (sub.begin >= sub.end) {
      sub.begin = sub.end = 0;
      continue;
    }
    sub.masked = any_partial || keys[sub.begin] < of_bottom.begin ||
                 keys[sub.end - 1] >= of_top.end;
    if (sub.masked) mask_sub_tile(chunk, s);
  }
  return true;
}

/// Bit r: the distance of row position + r to the key is selected.
inline std::uint16_t tile_cursor::distance_mask(token_t position, token_t key) const {
  const index_t bit = index_t{position} - key + distance_bit_offset;
  if (bit < 0 || bit > last_bit_) return 0;  // last_bit_ is -1 without distances
  static_assert(std::endian::native == std::endian::little);
  std::uint32_t bits;
  std::memcpy(&bits, reinterpret_cast<const char*>(distance_bits_) + (bit >> 3), sizeof bits);
  return static_cast<std::uint16_t>(bits >> (bit & 7));
}

/// Writes the masks, drops keys without a row at both ends, and clears `masked` where none is
/// needed after all (the inside of a window).
inline void tile_cursor::mask_sub_tile(key_chunk& chunk, index_t s) const {
  key_chunk::sub_tile& sub = chunk.sub[static_cast<std::size_t>(s)];
  std::uint16_t* const masks = chunk.masks[static_cast<std::size_t>(s)].data();
  const index_t rows = sub_rows(s);
  const auto top = static_cast<token_t>(first_ + s * sub_tile_rows);
  const unsigned all = (1u << rows) - 1;
  unsigned common = all;
  const auto fill = [&](auto&& mask_of) {
    for (index_t i = sub.begin; i < sub.end; ++i) {
      const unsigned mask = mask_of(static_cast<std::size_t>(i));
      common &= mask;
      masks[i] = static_cast<std::uint16_t>(mask * repeat_);
    }
  };
  const auto partial_mask = [&](std::size_t i) {
    if (!chunk.partial[i]) return all;
    const unsigned selected = distance_mask(top, chunk.keys[i]);
    return (plain_ ? selected : selected | chunk.row_mask[i]) & all;
  };
  if (seen_by_all_rows(chunk.keys[static_cast<std::size_t>(sub.end - 1)], top)) {
    fill(partial_mask);
  } else {
    fill([&](std::size_t i) {
      return partial_mask(i) & legal_->rows_that_see(chunk.keys[i], top, rows);
    });
  }
  while (sub.begin < sub.end && masks[sub.begin] == 0) ++sub.begin;
  while (sub.begin < sub.end && masks[sub.end - 1] == 0) --sub.end;
  if (common == all) sub.masked = false;
}

}  // namespace sattn
