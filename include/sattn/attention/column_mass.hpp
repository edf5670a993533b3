// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/row_work.hpp>
#include <sattn/attention/run_tiles.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

namespace sattn::detail {

/// How the probabilities that each key receives are summed once every lse is known: a task is some
/// keys of one kv head, for all query rows, so that no two tasks write the same sum and its order
/// is that of the rows. How many keys changes no bit.
struct mass_work {
  /// The lanes of a lane block by what they add to: [first_column, first_column + columns).
  struct alignas(cache_line) block_lanes {
    std::array<float, tile_lanes> log_sums;
    std::array<std::uint16_t, tile_lanes> of_column;
    index_t first_column;
    index_t columns;
  };

  tile_work tiles;
  row_work rows;
  bool by_rows;              // the row kernel takes the scores
  index_t heads_per_column;  // query heads whose probabilities are summed
  index_t task_keys;
  index_t key_tasks;  // of one kv head

  explicit mass_work(const attention_sequence& s)
      : tiles(s, lane_layout(rows_of(s), s.plan->sharing_heads()), 0), rows(s),
        by_rows(s.plan->layout().single_rows && !rows.row_keys),
        heads_per_column(s.output.mass.heads == 0 ? 1 : s.q.heads / s.output.mass.heads),
        task_keys(keys_of_a_task(s.kv.k.tokens)),
        key_tasks(ceil_div(s.kv.k.tokens, task_keys)) {}

  /// Tiles no taller than there are rows: the other lanes are for heads.
  static tile_grid rows_of(const attention_sequence& s) {
    tile_grid grid = s.plan->grid();
    grid.rows = static_cast<token_t>(std::clamp<index_t>(s.q.tokens, 1, grid.rows));
    return grid;
  }
  // Fewer would pack every tile's queries too often, more would leave threads without a task.
  static index_t keys_of_a_task(index_t keys) {
    constexpr index_t tasks = 16;
    return std::clamp<index_t>(round_up(ceil_div(keys, tasks), chunk_keys), 512, 4096);
  }
  index_t tasks(const attention_sequence& s) const { return s.kv.k.heads * key_tasks; }
  std::size_t scratch_bytes(const attention_sequence& s) const {
    if (by_rows) {
      const auto bytes = [](index_t count, std::size_t size) {
        return padded(static_cast<std::size_t>(count) * size);
      };
      return row_walk_bytes(s, rows) + bytes(rows.queries, sizeof(float)) +
             bytes(rows.queries, sizeof(std::uint16_t)) +
             bytes(rows.sharing * chunk_keys, sizeof(float));
    }
    return tiles.scratch_bytes() +
           padded(static_cast<std::size_t>(tiles.blocks()) * sizeof(block_lanes)) +
           padded(tile_lanes * chunk_keys * sizeof(float));
  }
};

/// What exponentials of scores are divided by, as a logarithm: the sink has joined.
inline float with_sink(float lse, float sink) {
  if (sink == -std::numeric_limits<float>::infinity()) return lse;
  const float top = std::max(lse, sink);
  return lse == sink ? top + std::log(2.0f) : top + std::log1p(std::exp(-std::abs(lse - sink)));
}

/// Adds the sums [columns][chunk_keys] of a part of a chunk to its keys' mass.
inline void add_sums(const attention_sequence& s, const key_chunk& chunk,
                     const key_chunk::sub_tile& part, const float* sums, index_t first_column,
                     index_t columns) {
  for (index_t column = 0; column < columns; ++column) {
    const float* const of_column = sums + column * chunk_keys;
    for (index_t i = 0; i < part.end - part.begin; ++i) {
      *s.output.mass.row(chunk.keys[static_cast<std::size_t>(part.begin + i)],
                         first_column + column) += of_column[i];
    }
  }
}

/// Adds what the rows of one tile, of the heads [first_head, first_head + heads) that share a list,
/// give to `keys`.
inline void add_tile_mass(const attention_sequence& s, const mass_work& work, index_t first_head,
                          index_t heads, index_t tile, key_range keys, const logit_options& logits,
                          const kernel_table& kernels, scratch_arena scratch) {
  const attention_plan& plan = *s.plan;
  const tile_work& tiles = work.tiles;
  const key_range rows = plan.grid().row_range(tile, plan.shape().q_len);
  const row_source k = s.kv.k.rows(first_head / plan.shape().group_size());

  key_chunk& chunk = *scratch.take<key_chunk>(1);
  readable_rows& pointers = readable_rows::take(scratch, s, row_reader::tiles);
  float* const scores = scratch.take<float>(chunk_keys * tile_lanes);
  const index_t block_floats = lane_block_floats(tiles.head_dim, 0);
  const index_t blocks = ceil_div(heads, tiles.lanes.heads) * tiles.blocks_per_tile;
  float* const queries = scratch.take<float>(blocks * block_floats);
  auto* const lanes_of = scratch.take<mass_work::block_lanes>(blocks);
  float* const sums = scratch.take<float>(tile_lanes * chunk_keys);

  const auto pack_block = [&](index_t b) {
    pack_args pack{{}, tiles.head_dim, 0, logits.pack_scale, queries + b * block_floats};
    mass_work::block_lanes& lanes = lanes_of[b];
    lanes = {};
    const index_t block_head = first_head + b / tiles.blocks_per_tile * tiles.lanes.heads;
    lanes.first_column = block_head / work.heads_per_column;
    for_each_lane(tiles, b, rows.size(), heads, [&](index_t lane, index_t row, index_t head) {
      const index_t token = rows.begin + row;
      const index_t q_head = first_head + head;
      const float lse = *s.output.lse.row(token, q_head);
      if (lse == -std::numeric_limits<float>::infinity()) return;
      const auto l = static_cast<std::size_t>(lane);
      const index_t column = q_head / work.heads_per_column - lanes.first_column;
      pack.q_rows[lane] = s.q.row(token, q_head);
      lanes.log_sums[l] = with_sink(lse, logits.sink(q_head));
      lanes.of_column[static_cast<std::size_t>(column)] |= static_cast<std::uint16_t>(1u << lane);
      lanes.columns = std::max(lanes.columns, column + 1);
    });
    kernels.pack_queries(pack);
  };

  tile_cursor cursor(plan, plan.head_of(first_head), tile, tiles.lanes.rows, keys);
  for (bool packed = false; cursor.next(chunk); packed = true) {
    for (index_t b = 0; b < blocks && !packed; ++b) pack_block(b);
    pointers.locate_k(chunk.keys.data(), chunk.count, k, s.kv, kernels);
    for (index_t b = 0; b < blocks; ++b) {
      const index_t sub = b % tiles.blocks_per_tile;
      if (sub * sub_tile_rows >= rows.size()) continue;
      const key_chunk::sub_tile& part = chunk.sub[static_cast<std::size_t>(sub)];
      if (part.begin == part.end) continue;
      const mass_work::block_lanes& lanes = lanes_of[b];
      const std::uint16_t* const masks =
          part.masked ? chunk.masks[static_cast<std::size_t>(sub)].data() + part.begin : nullptr;
      kernels.score_tile({
          .k_rows = pointers.k.rows.data() + part.begin,
          .v_rows = nullptr,
          .v_panel = 0,
          .count = part.end - part.begin,
          .masks = nullptr,
          .head_dim = tiles.head_dim,
          .v_dim = 0,
          .soft_cap = logits.soft_cap,
          .prefetch_values = false,
          .ahead = nullptr,
          .block = queries + b * block_floats,
          .scores = scores,
      });
      kernels.column_mass({
          .scores = scores,
          .count = part.end - part.begin,
          .masks = masks,
          .log_sums = lanes.log_sums.data(),
          .lanes = lanes.of_column.data(),
          .columns = lanes.columns,
          .sums = sums,
      });
      add_sums(s, chunk, part, sums, lanes.first_column, lanes.columns);
    }
  }
}

/// The same for all heads of a list, where the row kernel runs the plan.
inline void add_row_mass(const attention_sequence& s, const mass_work& work, index_t list,
                         index_t tile, key_range keys, const logit_options& logits,
                         const kernel_table& kernels, scratch_arena scratch) {
  const attention_plan& plan = *s.plan;
  const index_t sharing = work.rows.sharing;
  const index_t first_head = list * sharing;
  const index_t first_column = first_head / work.heads_per_column;
  const key_range rows = plan.grid().row_range(tile, plan.shape().q_len);
  const row_source k = s.kv.k.rows(first_head / plan.shape().group_size());

  key_chunk* const chunks[] = {scratch.take<key_chunk>(1), scratch.take<key_chunk>(1)};
  readable_rows* const rows_of_chunk[] = {&readable_rows::take(scratch, s, row_reader::rows),
                                          &readable_rows::take(scratch, s, row_reader::rows)};
  const row_queries queries(s, work.rows, logits, rows, first_head, nullptr, scratch);
  float* const log_sums = scratch.take<float>(rows.size() * sharing);
  auto* const columns = scratch.take<std::uint16_t>(rows.size() * sharing);
  float* const sums = scratch.take<float>(sharing * chunk_keys);
  for (index_t i = 0; i < rows.size() * sharing; ++i) {
    const index_t q_head = first_head + i % sharing;
    const float lse = *s.output.lse.row(rows.begin + i / sharing, q_head);
    const bool has_keys = lse != -std::numeric_limits<float>::infinity();
    log_sums[i] = has_keys ? with_sink(lse, logits.sink(q_head))
                           : std::numeric_limits<float>::infinity();
    columns[i] = static_cast<std::uint16_t>(q_head / work.heads_per_column - first_column);
  }

  const auto locate = [&](readable_rows& to, const token_t* of, index_t count) {
    to.locate_k(of, count, k, s.kv, kernels);
    to.v.type = to.k.type;
  };
  const auto add_chunk = [&](const key_chunk& chunk, const readable_rows& pointers,
                             const readable_rows& after) {
    const key_chunk::sub_tile& part = chunk.sub[0];
    const index_t column_count = ceil_div(sharing, work.heads_per_column);
    kernels.column_mass_rows({
        .rows = queries.args(0, rows.size(), pointers, after, part.begin, part.end,
                             part.masked ? chunk.masks[0].data() + part.begin : nullptr),
        .log_sums = log_sums,
        .columns = columns,
        .column_count = column_count,
        .sums = sums,
    });
    add_sums(s, chunk, part, sums, first_column, column_count);
  };
  tile_cursor cursor(plan, plan.head_of(first_head), tile, sub_tile_rows, keys);
  for_each_chunk_ahead(cursor, chunks, rows_of_chunk, locate, add_chunk);
}

/// One task: the mass of some keys of one kv head.
inline void run_column_mass(const attention_sequence& s, const mass_work& work,
                            const logit_options& logits, const kernel_table& kernels, index_t task,
                            scratch_arena scratch) {
  const tile_work& tiles = work.tiles;
  const index_t kv_head = task / work.key_tasks;
  const index_t first_key = task % work.key_tasks * work.task_keys;
  const key_range keys = {
      static_cast<token_t>(first_key),
      static_cast<token_t>(std::min(first_key + work.task_keys, s.kv.k.tokens))};
  const index_t columns = s.output.mass.heads / s.kv.k.heads;
  for (index_t column = kv_head * columns; column < (kv_head + 1) * columns; ++column) {
    for (index_t key = keys.begin; key < keys.end; ++key) *s.output.mass.row(key, column) = 0.0f;
  }
  const index_t lists = tiles.lists_per_kv_head;
  for (index_t list = kv_head * lists; list < (kv_head + 1) * lists; ++list) {
    for (index_t tile = 0; tile < tiles.tiles; ++tile) {
      if (work.by_rows) {
        add_row_mass(s, work, list, tile, keys, logits, kernels, scratch);
        continue;
      }
      for (index_t head = 0; head < tiles.sharing; head += tiles.heads_per_task) {
        add_tile_mass(s, work, list * tiles.sharing + head,
                      std::min(tiles.heads_per_task, tiles.sharing - head), tile, keys, logits,
                      kernels, scratch);
      }
    }
  }
}

}  // namespace sattn::detail
