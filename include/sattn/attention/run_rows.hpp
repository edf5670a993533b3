// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/checks.hpp>
#include <sattn/attention/work.hpp>
#include <sattn/kernel/kernel_table.hpp>
#include <sattn/plan/tile_cursor.hpp>

#include <algorithm>
#include <array>

namespace sattn::detail {

/// How the row kernel runs one sequence: every (list, tile, split) leaves one state per query row,
/// and the states of a row are merged in the order of the splits.
struct row_work {
  index_t head_dim;
  index_t v_dim;
  index_t sharing;  // query heads of one list within one kv head
  index_t lists;
  index_t tiles;
  index_t queries;  // rows x heads of one tile, at most
  index_t lists_per_kv_head;
  std::size_t keys_bytes;
  index_t split_count = 0;  // over all lists and tiles

  explicit row_work(const attention_sequence& s)
      : head_dim(s.q.dim), v_dim(s.kv.v.dim), sharing(s.plan->sharing_heads()),
        lists(sharing == 0 ? 0 : s.plan->shape().q_heads / sharing), tiles(s.plan->tiles()),
        queries(std::min<index_t>(s.plan->grid().rows, s.plan->shape().q_len) * sharing),
        lists_per_kv_head(sharing == 0 ? 0 : s.plan->shape().group_size() / sharing),
        keys_bytes(key_scratch::bytes(s)) {
    for (index_t list = 0; list < lists; ++list) {
      for (index_t tile = 0; s.plan->has_splits() && tile < tiles; ++tile) {
        split_count += s.plan->splits(s.plan->head_of(list * sharing), tile);
      }
    }
  }

  // Without splits a task merges its own states, and takes several tiles to be worth its while.
  static constexpr index_t tiles_per_task = 16;
  index_t tasks(const attention_plan& plan, key_range kv_heads) const {
    return plan.has_splits()
               ? split_count
               : kv_heads.size() * lists_per_kv_head * ceil_div(tiles, tiles_per_task);
  }
  index_t merge_tasks(const attention_plan& plan) const {
    return plan.has_splits() ? lists * tiles : 0;
  }
  index_t tile_state_floats() const { return queries * row_state_floats(v_dim); }
  /// States that outlive their task, shared by all workers.
  std::size_t shared_bytes(const attention_plan& plan) const {
    return plan.has_splits() ? padded(static_cast<std::size_t>(split_count * tile_state_floats()) *
                                      sizeof(float))
                             : 0;
  }
  std::size_t scratch_bytes() const {
    return keys_bytes + padded(static_cast<std::size_t>(queries)) +
           static_cast<std::size_t>(4 * chunk_keys) * sizeof(float) +
           padded(static_cast<std::size_t>(queries * row_out_floats(head_dim)) * sizeof(float)) +
           padded(static_cast<std::size_t>(tile_state_floats()) * sizeof(float));
  }
};

/// All keys of one split for the rows of a tile and the heads of a list, into `states`.
inline void run_row_split(const attention_sequence& s, const row_work& work,
                          const kv_rows& kv, const logit_options& logits,
                          const kernel_table& kernels, index_t list, index_t tile, index_t split,
                          float* states, scratch_arena scratch) {
  const attention_plan& plan = *s.plan;
  const index_t first_head = list * work.sharing;
  const index_t plan_head = plan.head_of(first_head);
  const key_range rows = plan.grid().row_range(tile, plan.shape().q_len);
  const index_t queries = rows.size() * work.sharing;

  key_scratch& keys = key_scratch::take(scratch, s);
  std::uint8_t* const mask_bit = scratch.take<std::uint8_t>(queries);
  float* const scores = scratch.take<float>(4 * chunk_keys);
  const index_t q_stride = row_out_floats(work.head_dim);
  float* const q = scratch.take<float>(queries * q_stride);

  for (index_t row = 0; row < rows.size(); ++row) {
    for (index_t head = 0; head < work.sharing; ++head) {
      const index_t i = row * work.sharing + head;
      const float* const from = s.q.row(rows.begin + row, first_head + head);
      float* const to = q + i * q_stride;
      for (index_t c = 0; c < work.head_dim; ++c) to[c] = from[c] * logits.pack_scale;
      std::fill(to + work.head_dim, to + q_stride, 0.0f);
      mask_bit[i] = static_cast<std::uint8_t>(row);
      float* const state = states + i * row_state_floats(work.v_dim);
      std::fill_n(state, row_state_floats(work.v_dim), 0.0f);
      state[row_out_floats(work.v_dim)] = -std::numeric_limits<float>::infinity();
    }
  }
  tile_cursor cursor(plan, plan_head, tile, sub_tile_rows,
                     plan.split_range(plan_head, tile, split));
  while (cursor.next(keys.chunk)) {
    const key_chunk::sub_tile& part = keys.chunk.sub[0];
    if (part.begin == part.end) continue;
    keys.locate_rows(kv, kernels);
    kernels.attend_rows({
        .q = q,
        .queries = queries,
        .k_rows = keys.k_rows.data() + part.begin,
        .v_rows = keys.v_rows.data() + part.begin,
        .count = part.end - part.begin,
        .masks = part.masked ? keys.chunk.masks[0].data() + part.begin : nullptr,
        .mask_bit = mask_bit,
        .head_dim = work.head_dim,
        .v_dim = work.v_dim,
        .soft_cap = logits.soft_cap,
        .states = states,
        .scores = scores,
    });
  }
}

/// Combines the states of a tile's splits and writes its rows.
inline void merge_row_splits(const attention_sequence& s, const row_work& work,
                             const logit_options& logits, const kernel_table& kernels,
                             index_t list, index_t tile, index_t splits, const float* states) {
  const attention_plan& plan = *s.plan;
  const key_range rows = plan.grid().row_range(tile, plan.shape().q_len);
  for (index_t row = 0; row < rows.size(); ++row) {
    for (index_t head = 0; head < work.sharing; ++head) {
      const index_t token = rows.begin + row;
      const index_t q_head = list * work.sharing + head;
      kernels.merge_rows({
          .states = states + (row * work.sharing + head) * row_state_floats(work.v_dim),
          .state_stride = work.tile_state_floats(),
          .count = splits,
          .v_dim = work.v_dim,
          .out = s.output.out.row(token, q_head),
          .lse = s.output.lse.data == nullptr ? nullptr : s.output.lse.row(token, q_head),
          .sink_logit = logits.sink(q_head),
      });
    }
  }
}

/// The (list, tile, split) of a task of a plan with splits, and where its states lie.
struct row_task {
  index_t list = 0;
  index_t tile = 0;
  index_t split = 0;
  index_t first_split = 0;  // of the tile, counted over the whole sequence

  row_task(const attention_plan& plan, const row_work& work, index_t split_index) {
    for (;;) {
      const index_t count = plan.splits(plan.head_of(list * work.sharing), tile);
      if (split_index < first_split + count) break;
      first_split += count;
      if (++tile == work.tiles) {
        tile = 0;
        ++list;
      }
    }
    split = split_index - first_split;
  }
};

/// One task of the row kernel for the kv heads [kv_heads.begin, kv_heads.end), all of them where the
/// plan has splits; `shared` holds the states of such a sequence. `rows_of(kv_head)` is where the
/// rows are.
template <class RowsOf>
void run_rows(const attention_sequence& s, const row_work& work, key_range kv_heads,
              const RowsOf& rows_of, const logit_options& logits, const kernel_table& kernels,
              index_t task, float* shared, scratch_arena scratch) {
  const attention_plan& plan = *s.plan;
  if (plan.has_splits()) {
    const row_task at(plan, work, task);
    run_row_split(s, work, rows_of(at.list / work.lists_per_kv_head), logits, kernels, at.list,
                  at.tile, at.split, shared + task * work.tile_state_floats(), scratch);
    return;
  }
  float* const states = scratch.take<float>(work.tile_state_floats());
  const index_t groups = ceil_div(work.tiles, row_work::tiles_per_task);
  const index_t lists = kv_heads.size() * work.lists_per_kv_head;
  const index_t list = kv_heads.begin * work.lists_per_kv_head + task % lists;
  const index_t group = groups - 1 - task / lists;  // the last rows have the most keys
  const kv_rows kv = rows_of(list / work.lists_per_kv_head);
  const index_t end = std::min((group + 1) * row_work::tiles_per_task, work.tiles);
  for (index_t tile = group * row_work::tiles_per_task; tile < end; ++tile) {
    run_row_split(s, work, kv, logits, kernels, list, tile, 0, states, scratch);
    merge_row_splits(s, work, logits, kernels, list, tile, 1, states);
  }
}

/// Writes the rows of one (list, tile) of a plan with splits.
inline void merge_rows(const attention_sequence& s, const row_work& work,
                       const logit_options& logits, const kernel_table& kernels, index_t task,
                       const float* shared) {
  const attention_plan& plan = *s.plan;
  const index_t list = task / work.tiles;
  const index_t tile = task % work.tiles;
  index_t first_split = 0;
  for (index_t l = 0; l <= list; ++l) {
    const index_t tiles = l == list ? tile : work.tiles;
    for (index_t t = 0; t < tiles; ++t) {
      first_split += plan.splits(plan.head_of(l * work.sharing), t);
    }
  }
  merge_row_splits(s, work, logits, kernels, list, tile,
                   plan.splits(plan.head_of(list * work.sharing), tile),
                   shared + first_split * work.tile_state_floats());
}

}  // namespace sattn::detail
