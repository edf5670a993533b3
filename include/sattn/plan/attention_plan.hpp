// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/plan/domain.hpp>
#include <sattn/plan/row_sharing.hpp>
#include <sattn/plan/tile_grid.hpp>

#include <bit>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace sattn {

/// `exact`: a row attends to its selected keys and no others. `cover`: every row of a tile attends
/// to all legal keys of the hull of its tile's diagonals; MInference's kernel fills up to 64 keys.
enum class rounding { exact, cover };

// A tile of 128 rows asks for distances down to -127 when keys may lie ahead of the query.
inline constexpr index_t distance_bit_offset = 128;

/// The keys of one plan head: the union of three encodings, any of which may be empty.
struct plan_head {
  // Structured, for every row alike; O(1) for dense and windows, O(runs) for vertical-slash.
  std::vector<key_range> distances = {};  // sorted runs of position - key that do not touch
  std::vector<key_range> columns = {};    // sorted runs of keys that do not touch

  // Lists, CSR over the tiles of the grid; both pointers are empty or have tiles + 1 entries.
  std::vector<index_t> range_ptr = {};
  std::vector<key_range> ranges = {};  // sorted per tile, disjoint and not touching
  std::vector<index_t> token_ptr = {};
  std::vector<token_t> tokens = {};  // sorted per tile; single keys, to be stored in 4 bytes

  // Keys with the rows of a tile that attend to them, CSR over the tiles; tiles have at most 16
  // rows.
  std::vector<index_t> row_key_ptr = {};
  std::vector<token_t> row_keys = {};          // sorted per tile
  std::vector<std::uint16_t> row_masks = {};   // for each of them: bit r = row r of the tile

  // Where the keys of a tile are cut for decoding; empty = not at all. CSR over the tiles.
  std::vector<index_t> split_ptr = {};
  std::vector<token_t> splits = {};  // first position of each split; the first is 0

  // Derived from distances: bit d + distance_bit_offset is set for every selected distance d.
  std::vector<std::uint64_t> distance_bits = {};

  // Derived from row_masks: how many have how many bits.
  row_sharing::histogram keys_of_rows = {};

  std::int64_t row_pairs() const {
    std::int64_t pairs = 0;
    for (std::size_t rows = 0; rows < keys_of_rows.size(); ++rows) {
      pairs += keys_of_rows[rows] * static_cast<std::int64_t>(rows);
    }
    return pairs;
  }

  void derive() {
    keys_of_rows = {};
    for (const std::uint16_t mask : row_masks) {
      ++keys_of_rows[static_cast<std::size_t>(std::popcount(mask))];
    }
    distance_bits.clear();
    if (distances.empty()) return;
    const auto bits = static_cast<std::size_t>(distances.back().end + distance_bit_offset);
    distance_bits.resize(bits / 64 + 2);
    for (const key_range& run : distances) {
      for (index_t d = run.begin; d < run.end; ++d) {
        const auto bit = static_cast<std::size_t>(d + distance_bit_offset);
        distance_bits[bit / 64] |= std::uint64_t{1} << (bit % 64);
      }
    }
  }

  void clear() {
    distances.clear();
    columns.clear();
    range_ptr.clear();
    ranges.clear();
    token_ptr.clear();
    tokens.clear();
    row_key_ptr.clear();
    row_keys.clear();
    row_masks.clear();
    split_ptr.clear();
    splits.clear();
    distance_bits.clear();
    keys_of_rows = {};
  }
};

/// Everything a run needs to know besides the tensors. Plain data: read it, write it to a file,
/// make one by hand and hand it to attention_plan, which checks it.
struct plan_data {
  attention_shape shape = {};
  sattn::domain legal = {};
  tile_grid grid = {};
  sattn::rounding rounding = sattn::rounding::exact;
  head_map map = head_map::shared;
  std::vector<plan_head> heads = {};  // 1, kv_heads or q_heads, by map
};

constexpr index_t plan_head_count(const attention_shape& shape, head_map map) {
  if (map == head_map::shared) return shape.q_heads == 0 ? 0 : 1;
  return map == head_map::per_kv_head ? shape.kv_heads : shape.q_heads;
}

/// Query heads of one kv head that share a list.
constexpr index_t sharing_heads(const attention_shape& shape, head_map map) {
  return map == head_map::per_q_head ? 1 : shape.group_size();
}

/// Pairs (query head, row, key), counted over all query heads.
struct plan_stats {
  std::int64_t legal = 0;     // allowed by the domain
  std::int64_t selected = 0;  // attended to
  std::int64_t executed = 0;  // computed, with what tiles add: masked pairs and empty lanes

  double density_selected() const { return ratio(selected); }
  double density_executed() const { return ratio(executed); }

 private:
  double ratio(std::int64_t n) const {
    return legal == 0 ? 0.0 : static_cast<double>(n) / static_cast<double>(legal);
  }
};

/// Which keys each query row attends to. Immutable once made: one plan may serve many calls,
/// layers and threads at once. Made by plan_prefill and plan_decode, or from data.
class attention_plan {
 public:
  attention_plan() = default;

  /// Derives what can be derived; throws shape_error unless the data keeps its rules.
  explicit attention_plan(plan_data data);

  const plan_data& data() const { return data_; }
  const attention_shape& shape() const { return data_.shape; }
  const tile_grid& grid() const { return data_.grid; }

  index_t heads() const { return plan_head_count(data_.shape, data_.map); }
  const plan_head& head(index_t i) const { return data_.heads[static_cast<std::size_t>(i)]; }
  /// The plan head of a query head.
  index_t head_of(index_t q_head) const {
    if (data_.map == head_map::shared) return 0;
    return data_.map == head_map::per_q_head ? q_head : q_head / data_.shape.group_size();
  }
  /// Query heads of one kv head that share a list.
  index_t sharing_heads() const { return sattn::sharing_heads(data_.shape, data_.map); }
  index_t tiles() const { return data_.grid.tiles(data_.shape.q_len); }
  lane_layout layout() const;

  /// Number of splits of a tile, 1 where nothing is cut.
  index_t splits(index_t head, index_t tile) const;
  /// Key positions of one split.
  key_range split_range(index_t head, index_t tile, index_t split) const;
  bool has_splits() const;
  /// True when some head has keys for single rows.
  bool has_row_keys() const;
  /// True when these keys overlap so much that whole tiles run faster than single rows.
  bool has_dense_row_keys() const;

  /// Pairs legal, selected and executed. Cost: one walk over every tile's keys, a small share of a
  /// run; nothing is cached.
  plan_stats stats() const;
  /// The same of one query head: its share of what the heads that share its list execute together.
  /// Throws: shape_error unless the head exists.
  plan_stats stats(index_t q_head) const;

  /// Throws shape_error when the data breaks a rule; holds for every plan that the library makes.
  void validate() const;

  /// Memory of the plan's arrays in bytes, by what they hold.
  std::size_t bytes() const;

 private:
  // Planning fills a plan in place, so that a decode loop reaches a steady state without
  // allocation.
  friend struct plan_access;
  std::int64_t legal_pairs() const;  // of one head
  void add_pairs(index_t list, index_t heads_of_list, plan_stats& stats) const;

  plan_data data_;
};

inline lane_layout attention_plan::layout() const {
  lane_layout layout(data_.grid, sharing_heads());
  // Only row states can be merged, and keys of few rows are gathered for the row kernel.
  if (has_splits() || (has_row_keys() && !has_dense_row_keys())) layout.single_rows = true;
  return layout;
}

inline bool attention_plan::has_splits() const {
  return heads() > 0 && !head(0).split_ptr.empty();
}

inline bool attention_plan::has_row_keys() const {
  for (index_t i = 0; i < heads(); ++i) {
    if (!head(i).row_keys.empty()) return true;
  }
  return false;
}

inline bool attention_plan::has_dense_row_keys() const {
  row_sharing::histogram keys_of_rows = {};
  for (index_t i = 0; i < heads(); ++i) {
    for (std::size_t rows = 0; rows < keys_of_rows.size(); ++rows) {
      keys_of_rows[rows] += head(i).keys_of_rows[rows];
    }
  }
  return row_sharing::whole_tiles_pay(keys_of_rows, sharing_heads(),
                                      lane_layout(data_.grid, sharing_heads()).heads);
}

inline index_t attention_plan::splits(index_t head_index, index_t tile) const {
  const plan_head& h = head(head_index);
  if (h.split_ptr.empty()) return 1;
  const auto t = static_cast<std::size_t>(tile);
  return h.split_ptr[t + 1] - h.split_ptr[t];
}

inline key_range attention_plan::split_range(index_t head_index, index_t tile,
                                             index_t split) const {
  const plan_head& h = head(head_index);
  const auto kv_len = static_cast<token_t>(data_.shape.kv_len);
  if (h.split_ptr.empty()) return {0, kv_len};
  const index_t at = h.split_ptr[static_cast<std::size_t>(tile)] + split;
  const bool last = at + 1 == h.split_ptr[static_cast<std::size_t>(tile) + 1];
  return {h.splits[static_cast<std::size_t>(at)],
          last ? kv_len : h.splits[static_cast<std::size_t>(at) + 1]};
}

inline std::size_t attention_plan::bytes() const {
  std::size_t total = 0;
  for (index_t i = 0; i < heads(); ++i) {
    const plan_head& h = head(i);
    total += (h.distances.size() + h.columns.size() + h.ranges.size()) * sizeof(key_range) +
             (h.range_ptr.size() + h.token_ptr.size() + h.split_ptr.size()) * sizeof(index_t) +
             (h.tokens.size() + h.row_keys.size() + h.splits.size()) * sizeof(token_t) +
             h.row_key_ptr.size() * sizeof(index_t) + h.row_masks.size() * sizeof(std::uint16_t) +
             h.distance_bits.size() * sizeof(std::uint64_t);
  }
  return total;
}

}  // namespace sattn
