// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/plan/attention_plan.hpp>
#include <sattn/plan/plan_scope.hpp>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <exception>
#include <functional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace sattn {

/// Grow-only lists that planning needs; one per worker, kept from plan to plan.
struct plan_scratch {
  struct entry {
    index_t tile;
    key_range keys;
  };
  std::vector<entry> entries;
  std::vector<key_range> distances;
  std::vector<key_range> columns;

  // Keys for single rows: the masks of one tile by key, and which words of 64 keys it touches ...
  std::vector<std::uint16_t> mask_of_key;
  std::vector<std::uint64_t> touched;
  index_t open_tile = -1;
  // ... and the tiles that were left, in the order of leaving.
  struct row_run {
    index_t tile;
    index_t begin;  // into row_keys
  };
  std::vector<row_run> row_runs;
  std::vector<token_t> row_keys;
  std::vector<std::uint16_t> row_masks;
  // The same before tiles that were left and entered again are joined.
  struct row_piece {
    index_t tile, begin, end;
  };
  std::vector<row_piece> pieces;
  std::vector<token_t> piece_keys;
  std::vector<std::uint16_t> piece_masks;

  std::exception_ptr failure;  // of the pattern, for head failed_head
  index_t failed_head = 0;
};

/// What a pattern writes to. Ranges may come in any order and may overlap: they are sorted and
/// merged, and clipped to what the domain makes legal. Keys that do not exist are an error.
class plan_writer {
 public:
  plan_writer(const plan_scope& scope, plan_scratch& scratch)
      : scope_(scope), scratch_(scratch), tiles_(scope.tiles()) {
    scratch_.entries.clear();
    scratch_.distances.clear();
    scratch_.columns.clear();
    scratch_.row_runs.clear();
    scratch_.row_keys.clear();
    scratch_.row_masks.clear();
    if (scratch_.open_tile >= 0) {  // a pattern threw
      std::fill(scratch_.mask_of_key.begin(), scratch_.mask_of_key.end(), std::uint16_t{0});
      std::fill(scratch_.touched.begin(), scratch_.touched.end(), 0);
      scratch_.open_tile = -1;
    }
  }

  /// For every row: the keys at distances [begin, end) behind it; 0 is the row's own position.
  /// Throws: shape_error if begin < 0. Distances past the first key select nothing.
  void distances(token_t begin, token_t end) {
    require(begin >= 0, "plan_writer: distances [", begin, ", ", end, ") begin before 0");
    if (begin < end) scratch_.distances.push_back({begin, end});
  }

  /// For every row: the keys [begin, end). Throws: shape_error unless 0 <= begin, end <= kv_len.
  void columns(token_t begin, token_t end) {
    check_keys("columns", begin, end);
    if (begin < end) scratch_.columns.push_back({begin, end});
  }

  /// For the rows of one tile: the keys [begin, end).
  /// Throws: shape_error unless the tile exists and 0 <= begin, end <= kv_len.
  void range(index_t tile, token_t begin, token_t end) {
    require(tile >= 0 && tile < tiles_, "plan_writer: tile ", tile, " of ", tiles_);
    check_keys("range", begin, end);
    if (begin < end) scratch_.entries.push_back({tile, {begin, end}});
  }

  /// For the query rows [begin, end) alone: single keys in any order. Cheapest when the rows come
  /// in ascending order. Throws: shape_error unless the rows and keys exist, and where rows of a
  /// tile of more than 16 rows have keys of their own: the pattern's grid() must ask for less.
  void row_keys(token_t begin, token_t end, std::span<const token_t> keys);

  /// Sorts, merges and clips into `head`.
  void finish(plan_head& head);

 private:
  void check_keys(std::string_view what, token_t begin, token_t end) const {
    require(begin >= 0 && end <= scope_.shape.kv_len, "plan_writer: ", what, " [", begin, ", ",
            end, ") of kv_len ", scope_.shape.kv_len);
  }
  static void merge_sorted(std::vector<key_range>& ranges);
  void finish_structure(plan_head& head);
  void finish_lists(plan_head& head);
  void finish_row_keys(plan_head& head);
  void open(index_t tile);
  void leave_tile();
  bool is_dense(const plan_head& head) const;

  const plan_scope& scope_;
  plan_scratch& scratch_;
  const index_t tiles_;  // counting them divides, which would show in range()
};

/// Which keys each row attends to. A model states them for one plan head at a time:
///
///   void emit(const plan_scope& scope, plan_writer& writer) const;
///
/// It may be called from several threads at once and must write the same for the same scope. Two
/// optional members:
///
///   index_t heads() const;    // sets of data it holds: 1 (default), kv_heads or q_heads
///   tile_grid grid() const;   // tiles whose rows share a list; default: every 64 rows; or
///   tile_grid grid(index_t sharing_heads) const;   // told how many query heads share the list
template <class P>
concept attention_pattern =
    requires(const P& pattern, const plan_scope& scope, plan_writer& writer) {
      pattern.emit(scope, writer);
    };

template <attention_pattern P>
index_t pattern_heads(const P& pattern) {
  if constexpr (requires { pattern.heads(); }) {
    return pattern.heads();
  } else {
    return 1;
  }
}

template <attention_pattern P>
tile_grid pattern_grid(const P& pattern, index_t sharing_heads) {
  if constexpr (requires { pattern.grid(sharing_heads); }) {
    return pattern.grid(sharing_heads);
  } else if constexpr (requires { pattern.grid(); }) {
    return pattern.grid();
  } else {
    return {};
  }
}

/// Sorts by position and joins ranges that overlap or touch.
inline void plan_writer::merge_sorted(std::vector<key_range>& ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const key_range& a, const key_range& b) { return a.begin < b.begin; });
  std::size_t kept = 0;
  for (const key_range& r : ranges) {
    if (kept > 0 && r.begin <= ranges[kept - 1].end) {
      ranges[kept - 1].end = std::max(ranges[kept - 1].end, r.end);
    } else {
      ranges[kept++] = r;
    }
  }
  ranges.resize(kept);
}

inline void plan_writer::finish(plan_head& head) {
  head.clear();
  finish_structure(head);
  finish_row_keys(head);  // gives tiles whose rows have the same keys to the lists
  finish_lists(head);
  if (is_dense(head)) {
    head.clear();
    if (scope_.shape.kv_len > 0) {
      head.columns.push_back({0, static_cast<token_t>(scope_.shape.kv_len)});
    }
  }
  head.derive();
}

inline void plan_writer::finish_structure(plan_head& head) {
  // The left window of the domain cuts every row's distances alike, so it is applied here once.
  index_t limit = scope_.shape.q_len == 0 ? 0 : scope_.shape.position(scope_.shape.q_len - 1) + 1;
  if (scope_.legal.window > 0) limit = std::min<index_t>(limit, scope_.legal.window);
  for (key_range r : scratch_.distances) {
    r.end = static_cast<token_t>(std::min<index_t>(r.end, limit));
    if (!r.empty()) head.distances.push_back(r);
  }
  merge_sorted(head.distances);
  head.columns.assign(scratch_.columns.begin(), scratch_.columns.end());
  merge_sorted(head.columns);
}

inline void plan_writer::finish_lists(plan_head& head) {
  auto& entries = scratch_.entries;
  if (entries.empty()) return;
  const auto before = [](const plan_scratch::entry& a, const plan_scratch::entry& b) {
    return a.tile != b.tile ? a.tile < b.tile : a.keys.begin < b.keys.begin;
  };
  if (!std::is_sorted(entries.begin(), entries.end(), before)) {
    std::sort(entries.begin(), entries.end(), before);
  }
  std::size_t next = 0;
  for (index_t tile = 0; tile < tiles_; ++tile) {
    head.range_ptr.push_back(static_cast<index_t>(head.ranges.size()));
    head.token_ptr.push_back(static_cast<index_t>(head.tokens.size()));
    if (next == entries.size() || entries[next].tile != tile) continue;
    const key_range visible = scope_.visible(tile);
    key_range open{};
    const auto close = [&]() {
      open = {std::max(open.begin, visible.begin), std::min(open.end, visible.end)};
      if (open.size() == 1) head.tokens.push_back(open.begin);
      if (open.size() > 1) head.ranges.push_back(open);
    };
    for (; next < entries.size() && entries[next].tile == tile; ++next) {
      const key_range& r = entries[next].keys;
      if (open.end > open.begin && r.begin <= open.end) {
        open.end = std::max(open.end, r.end);
      } else {
        close();
        open = r;
      }
    }
    close();
  }
  head.range_ptr.push_back(static_cast<index_t>(head.ranges.size()));
  head.token_ptr.push_back(static_cast<index_t>(head.tokens.size()));
}

inline void plan_writer::row_keys(token_t begin, token_t end, std::span<const token_t> keys) {
  require(begin >= 0 && begin <= end && end <= scope_.shape.q_len, "plan_writer: rows [", begin,
          ", ", end, ") of q_len ", scope_.shape.q_len);
  for (const token_t key : keys) {
    require(key >= 0 && key < scope_.shape.kv_len, "plan_writer: key ", key, " of rows [", begin,
            ", ", end, "), kv_len is ", scope_.shape.kv_len);
  }
  while (begin < end) {
    const index_t tile = scope_.grid.tile_of(begin);
    const key_range rows = scope_.rows(tile);
    const token_t stop = std::min(end, rows.end);
    if (begin == rows.begin && stop == rows.end) {
      for (const token_t key : keys) scratch_.entries.push_back({tile, {key, key + 1}});
    } else {
      require(scope_.grid.rows <= 16, "plan_writer: rows [", begin, ", ", stop,
              ") have keys of their own in a tile of ", scope_.grid.rows,
              " rows, at most 16 can: grid() of the pattern must say so");
      open(tile);
      const auto mask = static_cast<std::uint16_t>(((1u << (stop - begin)) - 1)
                                                   << (begin - rows.begin));
      std::uint16_t* const mask_of_key = scratch_.mask_of_key.data();
      std::uint64_t* const touched = scratch_.touched.data();
      for (const token_t key : keys) {
        mask_of_key[key] |= mask;
        touched[key >> 6] |= std::uint64_t{1} << (key & 63);
      }
    }
    begin = stop;
  }
}

inline void plan_writer::open(index_t tile) {
  if (scratch_.open_tile == tile) return;
  leave_tile();
  const auto keys = static_cast<std::size_t>(scope_.shape.kv_len);
  if (scratch_.mask_of_key.size() < keys) scratch_.mask_of_key.resize(keys);
  if (scratch_.touched.size() < keys / 64 + 1) scratch_.touched.resize(keys / 64 + 1);
  scratch_.open_tile = tile;
}

/// Moves the open tile's keys to the end of the lists, ascending; to the entries if all rows have
/// them that may see them, every one.
inline void plan_writer::leave_tile() {
  const index_t tile = scratch_.open_tile;
  if (tile < 0) return;
  const std::size_t first = scratch_.row_keys.size();
  scratch_.row_runs.push_back({tile, static_cast<index_t>(first)});
  bool whole = true;
  const key_range rows = scope_.rows(tile);
  const token_t top = scope_.shape.position(rows.begin);
  const std::size_t words = static_cast<std::size_t>(scope_.shape.kv_len) / 64 + 1;
  for (std::size_t w = 0; w < words; ++w) {
    for (std::uint64_t bits = std::exchange(scratch_.touched[w], 0); bits != 0; bits &= bits - 1) {
      const auto key = static_cast<token_t>(w * 64) + std::countr_zero(bits);
      const unsigned see = scope_.legal.rows_that_see(key, top, rows.size());
      const unsigned mask =
          std::exchange(scratch_.mask_of_key[static_cast<std::size_t>(key)], std::uint16_t{0}) &
          see;
      if (mask == 0) continue;
      whole &= mask == see;
      scratch_.row_keys.push_back(key);
      scratch_.row_masks.push_back(static_cast<std::uint16_t>(mask));
    }
  }
  if (whole) {
    for (std::size_t i = first; i < scratch_.row_keys.size(); ++i) {
      scratch_.entries.push_back({tile, {scratch_.row_keys[i], scratch_.row_keys[i] + 1}});
    }
    scratch_.row_keys.resize(first);
    scratch_.row_masks.resize(first);
  }
  scratch_.open_tile = -1;  // last: until here a failed allocation leaves marks to clean up
}

inline void plan_writer::finish_row_keys(plan_head& head) {
  leave_tile();
  auto& runs = scratch_.row_runs;
  if (runs.empty()) return;
  const auto by_tile = [](const plan_scratch::row_run& a, const plan_scratch::row_run& b) {
    return a.tile < b.tile;
  };
  const auto again = [&] {
    return std::adjacent_find(runs.begin(), runs.end(), std::not_fn(by_tile)) != runs.end();
  };
  if (again()) {  // a tile was left and entered again, or tiles came in another order
    auto& keys = scratch_.piece_keys;
    auto& masks = scratch_.piece_masks;
    auto& pieces = scratch_.pieces;
    keys.assign(scratch_.row_keys.begin(), scratch_.row_keys.end());
    masks.assign(scratch_.row_masks.begin(), scratch_.row_masks.end());
    scratch_.row_keys.clear();
    scratch_.row_masks.clear();
    pieces.clear();
    for (std::size_t i = 0; i < runs.size(); ++i) {
      pieces.push_back({runs[i].tile, runs[i].begin,
                        i + 1 < runs.size() ? runs[i + 1].begin : std::ssize(keys)});
    }
    runs.clear();
    std::sort(pieces.begin(), pieces.end(),
              [](const auto& a, const auto& b) { return a.tile < b.tile; });
    for (const plan_scratch::row_piece& p : pieces) {
      open(p.tile);
      for (auto i = static_cast<std::size_t>(p.begin); i < static_cast<std::size_t>(p.end); ++i) {
        const auto key = static_cast<std::size_t>(keys[i]);
        scratch_.mask_of_key[key] |= masks[i];
        scratch_.touched[key / 64] |= std::uint64_t{1} << (key % 64);
      }
    }
    leave_tile();
  }
  std::size_t run = 0;
  for (index_t tile = 0; tile < tiles_; ++tile) {
    while (run < runs.size() && runs[run].tile < tile) ++run;
    head.row_key_ptr.push_back(run < runs.size() ? runs[run].begin
                                                 : std::ssize(scratch_.row_keys));
  }
  head.row_key_ptr.push_back(std::ssize(scratch_.row_keys));
  head.row_keys.assign(scratch_.row_keys.begin(), scratch_.row_keys.end());
  head.row_masks.assign(scratch_.row_masks.begin(), scratch_.row_masks.end());
}

/// True when every row attends to all of its legal keys: such a head runs as the dense plan does.
inline bool plan_writer::is_dense(const plan_head& head) const {
  const auto whole = key_range{0, static_cast<token_t>(scope_.shape.kv_len)};
  if (head.columns.size() == 1 && head.columns[0] == whole) return true;
  if (head.distances.size() == 1 && head.distances[0].begin == 0 && scope_.legal.causal &&
      scope_.legal.prefix == 0 &&
      (head.distances[0].end > scope_.shape.position(scope_.shape.q_len - 1) ||
       head.distances[0].end == scope_.legal.window)) {
    return true;
  }
  if (head.range_ptr.empty() || !head.row_keys.empty()) return false;
  for (index_t tile = 0; tile < tiles_; ++tile) {
    const key_range visible = scope_.visible(tile);
    const auto t = static_cast<std::size_t>(tile);
    const index_t count = head.range_ptr[t + 1] - head.range_ptr[t];
    if (visible.size() == 1) {
      if (head.token_ptr[t + 1] == head.token_ptr[t]) return false;
    } else if (visible.size() > 1) {
      if (count != 1 || head.ranges[static_cast<std::size_t>(head.range_ptr[t])] != visible) {
        return false;
      }
    }
  }
  return true;
}

}  // namespace sattn
