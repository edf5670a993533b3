// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/plan/attention_plan.hpp>
#include <sattn/plan/row_sharing.hpp>
#include <sattn/plan/tile_cursor.hpp>

#include <bit>
#include <memory>

// What a plan can tell about itself: whether it keeps its rules, and what it costs.

namespace sattn {

namespace detail {

inline void check_ranges(const char* what, index_t head, const std::vector<key_range>& ranges,
                         index_t begin, index_t end, index_t limit) {
  require(begin >= 0 && begin <= end && end <= static_cast<index_t>(ranges.size()), "plan: ", what,
          " of head ", head, ": pointers [", begin, ", ", end, ") into ", ranges.size());
  index_t previous = -1;
  for (index_t i = begin; i < end; ++i) {
    const key_range r = ranges[static_cast<std::size_t>(i)];
    require(!r.empty() && r.begin >= 0 && r.end <= limit, "plan: ", what, " [", r.begin, ", ",
            r.end, ") of head ", head, " is empty or leaves [0, ", limit, ")");
    require(r.begin > previous, "plan: ", what, " [", r.begin, ", ", r.end, ") of head ", head,
            " touches or precedes one that ends at ", previous);
    previous = r.end;
  }
}

inline void check_pointers(const char* what, index_t head, const std::vector<index_t>& ptr,
                           index_t tiles, std::size_t size) {
  if (ptr.empty()) {
    require(size == 0, "plan: ", size, " ", what, " of head ", head, " without pointers");
    return;
  }
  require(static_cast<index_t>(ptr.size()) == tiles + 1, "plan: ", what, " pointers of head ",
          head, " have ", ptr.size(), " entries, expected ", tiles, " + 1");
  require(ptr.front() == 0 && ptr.back() == static_cast<index_t>(size), "plan: ", what,
          " pointers of head ", head, " run from ", ptr.front(), " to ", ptr.back(), " of ", size);
  for (std::size_t t = 0; t + 1 < ptr.size(); ++t) {
    require(ptr[t] <= ptr[t + 1], "plan: ", what, " pointers of head ", head, " decrease at tile ",
            t);
  }
}

}  // namespace detail

inline void attention_plan::validate() const {
  check_shape(data_.shape, data_.legal);
  require(data_.grid.rows >= 1 && data_.grid.rows <= max_tile_rows, "plan: tiles of ",
          data_.grid.rows, " rows, expected 1 to ", max_tile_rows);
  require(data_.grid.period >= 0, "plan: grid period ", data_.grid.period, " is negative");
  require(static_cast<index_t>(data_.heads.size()) >= heads(), "plan: ", data_.heads.size(),
          " heads, expected ", heads());
  const index_t kv_len = data_.shape.kv_len;
  index_t distances = std::max<index_t>(index_t{data_.shape.q_offset} + data_.shape.q_len, 0);
  if (data_.legal.window > 0) distances = std::min<index_t>(distances, data_.legal.window);
  for (index_t i = 0; i < heads(); ++i) {
    const plan_head& h = head(i);
    detail::check_ranges("distances", i, h.distances, 0, std::ssize(h.distances), distances);
    detail::check_ranges("columns", i, h.columns, 0, std::ssize(h.columns), kv_len);
    detail::check_pointers("range", i, h.range_ptr, tiles(), h.ranges.size());
    detail::check_pointers("token", i, h.token_ptr, tiles(), h.tokens.size());
    detail::check_pointers("row key", i, h.row_key_ptr, tiles(), h.row_keys.size());
    require(h.row_masks.size() == h.row_keys.size(), "plan: head ", i, " has ", h.row_keys.size(),
            " row keys and ", h.row_masks.size(), " masks");
    require(h.row_keys.empty() || data_.grid.rows <= sub_tile_rows, "plan: tiles of ",
            data_.grid.rows, " rows have keys for single rows, at most ", sub_tile_rows,
            " rows can");
    detail::check_pointers("split", i, h.split_ptr, tiles(), h.splits.size());
    require(h.split_ptr.empty() || data_.grid.rows <= sub_tile_rows, "plan: tiles of ",
            data_.grid.rows, " rows have splits, at most ", sub_tile_rows, " rows can");
    require(h.split_ptr.empty() == head(0).split_ptr.empty(),
            "plan: head ", i, " and head 0 differ in having splits");
    for (index_t t = 0; t < tiles(); ++t) {
      const auto at = static_cast<std::size_t>(t);
      if (!h.range_ptr.empty()) {
        detail::check_ranges("ranges", i, h.ranges, h.range_ptr[at], h.range_ptr[at + 1], kv_len);
      }
      if (!h.token_ptr.empty()) {
        token_t previous = -1;
        for (index_t k = h.token_ptr[at]; k < h.token_ptr[at + 1]; ++k) {
          const token_t token = h.tokens[static_cast<std::size_t>(k)];
          require(token > previous && token < kv_len, "plan: token ", token, " after ", previous,
                  " in tile ", t, " of head ", i, ", kv_len is ", kv_len);
          previous = token;
        }
      }
      if (!h.row_key_ptr.empty()) {
        const index_t rows = data_.grid.row_range(t, data_.shape.q_len).size();
        token_t previous = -1;
        for (index_t k = h.row_key_ptr[at]; k < h.row_key_ptr[at + 1]; ++k) {
          const token_t key = h.row_keys[static_cast<std::size_t>(k)];
          const unsigned mask = h.row_masks[static_cast<std::size_t>(k)];
          require(key > previous && key < kv_len, "plan: row key ", key, " after ", previous,
                  " in tile ", t, " of head ", i, ", kv_len is ", kv_len);
          require(mask != 0 && mask >> rows == 0, "plan: row key ", key, " in tile ", t,
                  " of head ", i, " has mask ", mask, " for ", rows, " rows");
          const unsigned see = data_.legal.rows_that_see(
              key, data_.shape.position(data_.grid.row_range(t, data_.shape.q_len).begin), rows);
          require((mask & ~see) == 0, "plan: row key ", key, " in tile ", t, " of head ", i,
                  " has mask ", mask, ", of whose rows ", see, " may see it");
          previous = key;
        }
      }
      if (!h.split_ptr.empty()) {
        require(h.split_ptr[at] < h.split_ptr[at + 1], "plan: tile ", t, " of head ", i,
                " has no split");
        token_t previous = -1;
        for (index_t k = h.split_ptr[at]; k < h.split_ptr[at + 1]; ++k) {
          const token_t split = h.splits[static_cast<std::size_t>(k)];
          require(split > previous && (previous >= 0 || split == 0), "plan: split at ", split,
                  " after ", previous, " in tile ", t, " of head ", i);
          previous = split;
        }
      }
    }
  }
}

inline attention_plan::attention_plan(plan_data data) : data_(std::move(data)) {
  validate();  // first: the bits are as many as the distances say
  data_.heads.resize(static_cast<std::size_t>(heads()));
  for (plan_head& h : data_.heads) h.derive();
}

inline std::int64_t attention_plan::legal_pairs() const {
  const attention_shape& shape = data_.shape;
  std::int64_t pairs = 0;
  for (index_t row = 0; row < shape.q_len; ++row) {
    pairs += data_.legal.legal(shape.position(row), shape.kv_len).size();
  }
  return pairs;
}

inline plan_stats attention_plan::stats() const {
  plan_stats stats;
  stats.legal = legal_pairs() * data_.shape.q_heads;
  if (heads() == 0 || data_.shape.q_heads == 0) return stats;
  const index_t heads_of_list =
      data_.map == head_map::shared ? data_.shape.q_heads : sharing_heads();
  for (index_t i = 0; i < heads(); ++i) add_pairs(i, heads_of_list, stats);
  return stats;
}

inline plan_stats attention_plan::stats(index_t q_head) const {
  require(q_head >= 0 && q_head < data_.shape.q_heads, "attention_plan: q head ", q_head, " of ",
          data_.shape.q_heads);
  plan_stats stats;
  stats.legal = legal_pairs();
  if (heads() == 0) return stats;
  add_pairs(head_of(q_head), sharing_heads(), stats);
  stats.selected /= sharing_heads();
  stats.executed /= sharing_heads();
  return stats;
}

/// Adds what a list selects and executes for so many query heads, a multiple of those that share it
/// within a kv head.
inline void attention_plan::add_pairs(index_t list, index_t heads_of_list,
                                      plan_stats& stats) const {
  const lane_layout lanes = layout();
  const index_t sharing = sharing_heads();
  const auto chunk = std::make_unique<key_chunk>();
  const key_range all{0, static_cast<token_t>(data_.shape.kv_len)};
  std::int64_t selected = 0;
  std::int64_t executed_keys = 0;
  std::int64_t executed_rows = 0;
  std::int64_t shared_keys = 0;  // of plans with row keys
  std::int64_t single_rows = 0;
  for (index_t tile = 0; tile < tiles(); ++tile) {
    tile_cursor cursor(*this, list, tile, sub_tile_rows, all);
    row_sharing shares(sharing);
    while (cursor.next(*chunk)) {
      for (index_t s = 0; s < cursor.sub_tiles(); ++s) {
        const key_chunk::sub_tile& sub = chunk->sub[static_cast<std::size_t>(s)];
        executed_keys += sub.end - sub.begin;
        executed_rows += (sub.end - sub.begin) * cursor.sub_rows(s);
        for (index_t k = sub.begin; k < sub.end; ++k) {
          const index_t rows =
              sub.masked ? std::popcount(chunk->masks[static_cast<std::size_t>(s)]
                                                     [static_cast<std::size_t>(k)])
                         : cursor.sub_rows(s);
          selected += rows;
          shares.add(rows);
        }
      }
    }
    shared_keys += shares.tile_keys();
    single_rows += shares.row_pairs();
  }
  stats.selected += selected * heads_of_list;
  // All 16 lanes of a block are computed, whether a row and a head stand in them or not.
  const index_t blocks = heads_of_list / sharing * ceil_div(sharing, lanes.heads);
  const index_t lane_rows = blocks * lane_layout::lanes;
  if (has_splits() && has_row_keys()) {
    stats.executed += selected * heads_of_list;
  } else if (has_row_keys() && lanes.single_rows) {
    stats.executed += (shared_keys * lane_layout::lanes + single_rows) * heads_of_list;
  } else {
    stats.executed +=
        lanes.single_rows ? executed_rows * heads_of_list : executed_keys * lane_rows;
  }
}

}  // namespace sattn
