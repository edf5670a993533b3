// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/types.hpp>

#include <cstdint>

namespace sattn {

// Arguments of the kernels: plain pointers and extents. No kernel sees a pattern, a plan, a head
// count or a thread. Every array named here is aligned to a cache line unless it is the caller's.

inline constexpr index_t tile_lanes = 16;   // query rows (or rows x heads) of one lane block
inline constexpr index_t chunk_keys = 128;  // keys that one kernel call takes at most
inline constexpr index_t prefetch_rows = 8;  // extra entries behind tile_args::k_rows

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

struct tile_args {
  const float* const* k_rows;  // [count + prefetch_rows]; the extra ones are only prefetched
  const float* const* v_rows;  // [count]
  index_t count;               // 1 .. chunk_keys
  const std::uint16_t* masks;  // [count], bit = lane that attends to the key; null = all lanes
  index_t head_dim;
  index_t v_dim;
  float soft_cap;  // 0 = off; otherwise the queries are packed with scale / soft_cap
  bool prefetch;   // the rows may be far away
  float* block;
  float* scores;  // [chunk_keys][16], scratch
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

struct rows_args {
  const float* q;  // [queries][round_up(head_dim, 16)], pre-scaled, zero behind head_dim
  index_t queries;
  const float* const* k_rows;  // [count]
  const float* const* v_rows;  // [count]
  index_t count;               // 1 .. chunk_keys
  const std::uint16_t* masks;  // [count] or null; query i attends where bit mask_bit[i] is set
  const std::uint8_t* mask_bit;  // [queries]
  index_t head_dim;
  index_t v_dim;
  float soft_cap;
  float* states;  // [queries][row_state_floats(v_dim)]
  float* scores;  // [4][chunk_keys], scratch
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
