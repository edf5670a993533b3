// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/dtype.hpp>
#include <sattn/core/types.hpp>

#include <cstdint>

namespace sattn {

// Arguments of the kernels: plain pointers and extents. No kernel sees a pattern, a plan, a head
// count or a thread. Every array named here is aligned to a cache line unless it is the caller's.

inline constexpr index_t tile_lanes = 16;   // query rows (or rows x heads) of one lane block
inline constexpr index_t chunk_keys = 128;  // keys that one kernel call takes at most
inline constexpr index_t prefetch_rows = 64;  // extra entries behind lists of rows

/// State of 16 query lanes while their keys stream by, in floats:
/// q [head_dim][16], pre-scaled and transposed; out [v_dim][16]; row_max [16]; row_sum [16].
constexpr index_t lane_block_floats(index_t head_dim, index_t v_dim) {
  return tile_lanes * (head_dim + v_dim + 2);
}

struct pack_args {
  const float* q_rows[tile_lanes];  // [head_dim] each, any alignment; null for a dead lane
  index_t head_dim;
  index_t v_dim;
  float scale;
  float* block;  // set to the packed queries and the empty state
};

// Packed values: for every value_block_keys keys one block of panels of a few columns, in which the
// keys follow each other. A panel has the width of the register tile that reads it; the columns are
// split as that kernel splits them. A pass over the keys then reads memory in order, where rows in
// place would meet again and again in a few sets of the first-level cache.
inline constexpr index_t value_block_keys = 128;
inline constexpr index_t value_panel_slack = 16;  // floats behind a panel, for stores of full width
constexpr index_t value_panel_floats(index_t panel_cols) {
  return value_block_keys * panel_cols + value_panel_slack;
}
constexpr index_t value_block_floats(index_t v_dim, index_t panel_cols) {
  return (v_dim + panel_cols - 1) / panel_cols * value_panel_floats(panel_cols);
}

/// Rows that later calls read or write, to be brought into the second-level cache meanwhile.
struct rows_ahead {
  const float* rows[2 * tile_lanes];
  index_t count;
  index_t floats;  // of a row, at most
};

struct tile_args {
  const void* const* k_rows;   // [count + prefetch_rows] f32; the extra ones are only prefetched
  const void* const* v_rows;   // [count] f32; of packed values, the key's place in its first panel;
                               // null for score_tile
  index_t v_panel;             // floats between panels of packed values; 0 = rows in place
  index_t count;               // 1 .. chunk_keys
  const std::uint16_t* masks;  // [count], bit = lane that attends to the key; null = all lanes
  index_t head_dim;
  index_t v_dim;
  float soft_cap;  // 0 = off; otherwise the queries are packed with scale / soft_cap
  bool prefetch_values;  // they may be far away
  const rows_ahead* ahead;  // or null
  float* block;
  float* scores;  // [chunk_keys][16], scratch
};

/// Rows of K or V as they are stored, to be widened to f32.
struct load_rows_args {
  const void* const* rows;  // [count] of type `type`, any alignment that it allows
  const float* scales;      // [count] where the type has one a row
  dtype type;
  index_t count;
  index_t dim;
  float* out;  // [count][dim], or packed values: the first row's place in its first panel
};

/// The probabilities of a chunk of keys, summed over some query lanes.
struct column_mass_args {
  float* scores;               // [count][16], as score_tile leaves them; become probabilities
  index_t count;               // 1 .. chunk_keys
  const std::uint16_t* masks;  // as in tile_args
  const float* log_sums;       // [16], of each row, its sink included
  const std::uint16_t* lanes;  // [columns], bit = lane that counts in the column
  index_t columns;
  float* sums;  // [columns][chunk_keys]
};

/// The probabilities of a chunk of keys for 16 rows that follow each other, to be added up.
struct lane_sums_args {
  const float* probabilities;  // [count][16]; 0 in dead lanes
  index_t count;               // 1 .. chunk_keys
  float* columns;    // [count], raised by the sums over the lanes; or null
  float* distances;  // place of row 0 at key 0; row r at key i is at [r - i]; or null
};

struct finish_args {
  const float* block;
  index_t head_dim;
  index_t v_dim;
  float* out_rows[tile_lanes];    // [v_dim] each; null for a dead lane
  float* lse[tile_lanes];         // one float each; null where not wanted
  float sink_logit[tile_lanes];   // -inf = none
};

/// State of one query row in the row kernel: out [round_up(v_dim, 16)], then max, then sum.
constexpr index_t row_out_floats(index_t v_dim) { return (v_dim + 15) / 16 * 16; }
constexpr index_t row_state_floats(index_t v_dim) { return row_out_floats(v_dim) + 16; }

// Keys that the row kernel takes at a time: in short pieces the reads of K and V take turns at
// every page or so, which memory answers faster than longer runs of either.
inline constexpr index_t stream_piece = 16;
inline constexpr index_t stream_piece_of_bytes = 64;  // K and V in int8
static_assert(prefetch_rows >= stream_piece && prefetch_rows >= stream_piece_of_bytes,
              "a piece looks as far behind the list");

struct rows_args {
  const float* q;  // [queries][round_up(head_dim, 16)], pre-scaled, zero behind head_dim
  index_t queries;
  dtype k_type;  // without blocks
  dtype v_type;
  const void* const* k_rows;  // [count + prefetch_rows]; the extra ones are not read
  const void* const* v_rows;  // [count + prefetch_rows]
  const float* k_scales;      // [count] where the type has one a row, otherwise null
  const float* v_scales;      // the same
  const void* const* next_k;  // rows of a later call, one for each key of this call's last piece
  const void* const* next_v;  // the same
  index_t count;              // 1 .. chunk_keys
  const std::uint16_t* masks;  // [count] or null; query i attends where bit mask_bit[i] is set
  const std::uint8_t* mask_bit;  // [queries]; not read without masks
  bool cached;  // the rows lie anywhere in a cache; otherwise they come from memory, ascending
  index_t head_dim;
  index_t v_dim;
  float soft_cap;
  float* states;  // [queries][row_state_floats(v_dim)]
};

/// The probabilities of a chunk of keys, summed over some query rows.
struct rows_mass_args {
  rows_args rows;                // V and the states are not read, v_type is K's
  const float* log_sums;         // [queries], their sinks included; +inf for a row without keys
  const std::uint16_t* columns;  // [queries]: the column that a query counts in
  index_t column_count;
  float* sums;  // [column_count][chunk_keys]
};

/// Scores of a chunk of keys, row by row.
struct rows_scores_args {
  rows_args rows;  // V and the states are not read, v_type is K's
  float* scores;   // of query i and key j at [i * stride + j]
  index_t stride;
};

inline constexpr index_t tile_pages = 64;  // pages whose summaries lie together

/// Summaries of tile_pages pages: [head_dim][rows][tile_pages] of f32, f16 or i8, of i8 followed by
/// [tile_pages] f32 scales.
struct page_scores_args {
  const void* tile;
  const void* next_tile;  // of a later call, only prefetched
  dtype type;
  index_t rows;  // of each dimension: 2, min and max, or 1, the mean
  index_t head_dim;
  const float* q;  // [rows][head_dim]: of 2 rows the negative parts, then the positive ones
  float* scores;   // [tile_pages]
};

struct merge_args {
  const float* states;   // first of `count` states of one query row
  index_t state_stride;  // floats between them
  index_t count;
  index_t v_dim;
  float* out;        // [v_dim]
  float* lse;        // or null
  float sink_logit;  // -inf = none
};

}  // namespace sattn
