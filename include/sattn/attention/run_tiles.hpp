// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/checks.hpp>
#include <sattn/attention/work.hpp>
#include <sattn/kernel/kernel_table.hpp>
#include <sattn/plan/tile_cursor.hpp>

#include <algorithm>
#include <array>

namespace sattn::detail {

/// How the tile kernel runs one sequence. A task is one tile of one kv head, with as many of the
/// query heads that share its list as the packed queries of fit the second-level cache.
struct tile_work {
  static constexpr index_t cached_bytes = 320 * 1024;

  index_t head_dim;
  index_t v_dim;
  lane_layout lanes;
  index_t sharing;         // query heads of one list within one kv head
  index_t blocks_per_tile; // lane blocks of 16 rows along the tile
  index_t heads_per_task;  // a multiple of lanes.heads, or all
  index_t tasks_per_list;
  index_t lists_per_kv_head;  // 1, or the group where each query head has a list of its own
  index_t tiles;
  std::size_t keys_bytes;

  explicit tile_work(const attention_sequence& s)
      : tile_work(s, s.plan->layout(), s.kv.v.dim) {}
  /// v_dim is 0 where scores are all that is wanted.
  tile_work(const attention_sequence& s, const lane_layout& layout, index_t values)
      : head_dim(s.q.dim), v_dim(values), lanes(layout), sharing(s.plan->sharing_heads()),
        blocks_per_tile(ceil_div(s.plan->grid().rows, sub_tile_rows)),
        lists_per_kv_head(sharing == 0 ? 0 : s.plan->shape().group_size() / sharing),
        tiles(s.plan->tiles()),
        keys_bytes(padded(sizeof(key_chunk)) + readable_rows::bytes(s, row_reader::tiles)) {
    const index_t block_bytes = lane_block_floats(head_dim, v_dim) * index_t{sizeof(float)};
    const index_t fit = std::max<index_t>(1, cached_bytes / (block_bytes * blocks_per_tile));
    heads_per_task = std::min(sharing, fit * lanes.heads);
    tasks_per_list = sharing == 0 ? 0 : ceil_div(sharing, heads_per_task);
  }

  index_t tasks(key_range kv_heads) const {
    return tiles * kv_heads.size() * lists_per_kv_head * tasks_per_list;
  }
  index_t blocks() const {
    return ceil_div(heads_per_task, lanes.heads) * blocks_per_tile;
  }
  std::size_t scratch_bytes() const {
    return keys_bytes +
           static_cast<std::size_t>(chunk_keys * tile_lanes +
                                    blocks() * lane_block_floats(head_dim, v_dim)) *
               sizeof(float);
  }
};

/// Calls f(lane, row, head) for the lanes of a block that hold a row of a head; rows and heads
/// count from the first of the task.
template <class F>
void for_each_lane(const tile_work& work, index_t block, index_t rows, index_t heads, F&& f) {
  const index_t first_head = block / work.blocks_per_tile * work.lanes.heads;
  const index_t first_row = block % work.blocks_per_tile * sub_tile_rows;
  for (index_t h = 0; h < std::min(work.lanes.heads, heads - first_head); ++h) {
    for (index_t r = 0; r < std::min(work.lanes.rows, rows - first_row); ++r) {
      f(h * work.lanes.rows + r, first_row + r, first_head + h);
    }
  }
}

/// One tile, one of the kv heads [kv_heads.begin, kv_heads.end), some of its query heads: all their
/// keys, then the rows of the output. `rows_of(kv_head)` is where the rows are.
template <class RowsOf>
void run_tile(const attention_sequence& s, const tile_work& work, key_range kv_heads,
              const RowsOf& rows_of, const logit_options& logits, const kernel_table& kernels,
              index_t task, scratch_arena scratch) {
  const attention_plan& plan = *s.plan;
  // One kv head after the other, whose keys then stay in the cache; the last tiles go first, which
  // have the most keys under a causal domain, each with all lists of the kv head.
  const index_t tasks_per_tile = work.lists_per_kv_head * work.tasks_per_list;
  const index_t kv_index = task / (tasks_per_tile * work.tiles);
  const index_t tile = work.tiles - 1 - task / tasks_per_tile % work.tiles;
  const index_t list = (kv_heads.begin + kv_index) * work.lists_per_kv_head +
                       task / work.tasks_per_list % work.lists_per_kv_head;
  const index_t first_head =
      list * work.sharing + task % work.tasks_per_list * work.heads_per_task;
  const index_t heads =
      std::min(work.heads_per_task, (list + 1) * work.sharing - first_head);
  const key_range tile_rows = plan.grid().row_range(tile, plan.shape().q_len);
  const index_t rows = tile_rows.size();
  const kv_rows kv = rows_of(first_head / plan.shape().group_size());

  key_chunk& chunk = *scratch.take<key_chunk>(1);
  readable_rows& pointers = readable_rows::take(scratch, s, row_reader::tiles);
  float* const scores = scratch.take<float>(chunk_keys * tile_lanes);
  const index_t block_floats = lane_block_floats(work.head_dim, work.v_dim);
  const index_t blocks = ceil_div(heads, work.lanes.heads) * work.blocks_per_tile;
  const index_t row_blocks = ceil_div(rows, sub_tile_rows);
  float* const state = scratch.take<float>(blocks * block_floats);

  const auto pack_block = [&](index_t b) {
    pack_args pack{{}, work.head_dim, work.v_dim, logits.pack_scale, state + b * block_floats};
    for_each_lane(work, b, rows, heads, [&](index_t lane, index_t row, index_t head) {
      pack.q_rows[lane] = s.q.row(tile_rows.begin + row, first_head + head);
    });
    kernels.pack_queries(pack);
  };
  // What a block writes in the end and what the next block packs come in while keys are multiplied.
  rows_ahead ahead;
  ahead.floats = std::max(work.head_dim, work.v_dim);
  const auto look_ahead = [&](index_t b) {
    ahead.count = 0;
    for_each_lane(work, b, rows, heads, [&](index_t, index_t row, index_t head) {
      ahead.rows[ahead.count++] = s.output.out.row(tile_rows.begin + row, first_head + head);
    });
    if (b + 1 == blocks) return;
    for_each_lane(work, b + 1, rows, heads, [&](index_t, index_t row, index_t head) {
      ahead.rows[ahead.count++] = s.q.row(tile_rows.begin + row, first_head + head);
    });
  };

  tile_cursor cursor(plan, plan.head_of(first_head), tile, work.lanes.rows,
                     {0, static_cast<token_t>(plan.shape().kv_len)});
  bool more = cursor.next(chunk);
  for (bool packed = false; more || !packed; packed = true, more = cursor.next(chunk)) {
    if (more) pointers.locate(chunk.keys.data(), chunk.count, kv, s.kv, kernels);
    bool first = true;  // the first block to touch the chunk brings it in
    for (index_t b = 0; b < blocks; ++b) {
      const index_t sub = b % work.blocks_per_tile;
      if (sub >= row_blocks) continue;
      if (!packed) {
        pack_block(b);
        look_ahead(b);
      }
      if (!more) continue;  // no keys at all
      const key_chunk::sub_tile& part = chunk.sub[static_cast<std::size_t>(sub)];
      if (part.begin == part.end) continue;
      kernels.attend_tile({
          .k_rows = pointers.k.rows.data() + part.begin,
          .v_rows = pointers.v.rows.data() + part.begin,
          .v_panel = kv.v_panel,
          .count = part.end - part.begin,
          .masks = part.masked
                       ? chunk.masks[static_cast<std::size_t>(sub)].data() + part.begin
                       : nullptr,
          .head_dim = work.head_dim,
          .v_dim = work.v_dim,
          .soft_cap = logits.soft_cap,
          .prefetch_values = first,
          .ahead = packed ? nullptr : &ahead,
          .block = state + b * block_floats,
          .scores = scores,
      });
      first = false;
    }
  }

  for (index_t b = 0; b < blocks; ++b) {
    if (b % work.blocks_per_tile >= row_blocks) continue;
    finish_args finish{state + b * block_floats, work.head_dim, work.v_dim, {}, {}, {}};
    std::fill_n(finish.sink_logit, tile_lanes, -std::numeric_limits<float>::infinity());
    for_each_lane(work, b, rows, heads, [&](index_t lane, index_t row, index_t head) {
      const index_t token = tile_rows.begin + row;
      finish.out_rows[lane] = s.output.out.row(token, first_head + head);
      if (s.output.lse.data != nullptr) {
        finish.lse[lane] = s.output.lse.row(token, first_head + head);
      }
      finish.sink_logit[lane] = logits.sink(first_head + head);
    });
    kernels.finish_tile(finish);
  }
}

}  // namespace sattn::detail
