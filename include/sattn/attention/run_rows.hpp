// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/row_work.hpp>
#include <sattn/attention/shared_keys.hpp>
#include <sattn/plan/row_sharing.hpp>
#include <sattn/plan/tile_cursor.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

namespace sattn::detail {

/// All keys of one split for the rows of a tile and the heads of a list, into `states`: chunks that
/// all rows share as they are, and the keys of single rows gathered row by row. Where the plan has
/// no splits, keys that many rows share go through the tile kernel into states of their own behind
/// the others; returns the number of states of a row, 1 or 2.
inline index_t run_row_split(const attention_sequence& s, const row_work& work, const kv_rows& kv,
                             const logit_options& logits, const kernel_table& kernels, index_t list,
                             index_t tile, index_t split, float* states, scratch_arena scratch) {
  const attention_plan& plan = *s.plan;
  const index_t first_head = list * work.sharing;
  const index_t plan_head = plan.head_of(first_head);
  const key_range rows = plan.grid().row_range(tile, plan.shape().q_len);

  readable_rows* const rows_of_chunk[] = {&readable_rows::take(scratch, s, row_reader::rows),
                                          &readable_rows::take(scratch, s, row_reader::rows)};
  const auto locate = [&](readable_rows& to, const token_t* keys, index_t count) {
    to.locate(keys, count, kv, s.kv, kernels);
  };
  const row_queries queries(s, work, logits, rows, first_head, states, scratch);
  tile_cursor cursor(plan, plan_head, tile, sub_tile_rows,
                     plan.split_range(plan_head, tile, split));
  if (!work.row_keys) {
    key_chunk* const chunks[] = {scratch.take<key_chunk>(1), scratch.take<key_chunk>(1)};
    const auto attend_chunk = [&](const key_chunk& chunk, const readable_rows& pointers,
                                  const readable_rows& after) {
      const key_chunk::sub_tile& part = chunk.sub[0];
      kernels.attend_rows(queries.args(0, rows.size(), pointers, after, part.begin, part.end,
                                       part.masked ? chunk.masks[0].data() + part.begin : nullptr));
    };
    for_each_chunk_ahead(cursor, chunks, rows_of_chunk, locate, attend_chunk);
    return 1;
  }

  key_chunk& chunk = *scratch.take<key_chunk>(1);
  readable_rows& pointers = *rows_of_chunk[0];
  readable_rows& next = *rows_of_chunk[1];
  readable_rows& shared_rows = readable_rows::take(scratch, s, row_reader::tiles);

  const bool has_splits = plan.has_splits();
  row_lists& lists = *scratch.take<row_lists>(1);
  lists.counts.fill(0);
  const auto flush_row = [&](index_t row) {
    const auto r = static_cast<std::size_t>(row);
    const index_t count = std::exchange(lists.counts[r], 0);
    locate(pointers, lists.keys[r].data(), count);
    if (work.sharing == 1 && !has_splits) {  // the kernel does not look ahead
      return kernels.attend_rows(queries.args(row, 1, pointers, pointers, 0, count, nullptr));
    }
    const auto fullest = static_cast<std::size_t>(
        std::max_element(lists.counts.begin(), lists.counts.end()) - lists.counts.begin());
    next.locate_beside(pointers, lists.keys[fullest].data(), lists.counts[fullest], kv);
    kernels.attend_rows(queries.args(row, 1, pointers, next, 0, count, nullptr));
  };
  shared_keys& shared = shared_keys::take(scratch, work);
  const auto flush_shared = [&] {
    shared.flush(s, work, kv, logits, kernels, rows, first_head, shared_rows);
  };
  static_assert(chunk_keys * 4 >= row_sharing::least_pairs, "a full chunk is worth a tile");
  row_sharing sharing(work.sharing);
  const unsigned all = (1u << rows.size()) - 1;
  while (cursor.next(chunk)) {
    const key_chunk::sub_tile& part = chunk.sub[0];
    for (index_t i = part.begin; i < part.end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const unsigned mask = part.masked ? chunk.masks[0][at] : all;
      const index_t row_count = std::popcount(mask);
      sharing.add(row_count);
      if (has_splits || !sharing.shared(row_count)) {
        lists.add(chunk.keys[at], mask, flush_row);
      } else if (shared.add(chunk.keys[at], static_cast<std::uint16_t>(mask))) {
        flush_shared();
      }
    }
  }
  if (sharing.tile_pays()) {
    flush_shared();
  } else {
    shared.give_back([&](token_t key, unsigned mask) { lists.add(key, mask, flush_row); });
  }
  lists.finish(flush_row);
  if (!shared.started()) return 1;
  shared.finish(work, kernels, rows.size(), states + work.tile_state_floats());
  return 2;
}

inline std::size_t row_scratch_bytes(const attention_sequence& s, const row_work& work) {
  const std::size_t own_states = work.row_keys ? 2 : 1;
  return row_walk_bytes(s, work) +
         (work.row_keys
              ? padded(sizeof(row_lists)) + shared_keys::bytes(work) +
                    readable_rows::bytes(s, row_reader::tiles)
              : 0) +
         padded(static_cast<std::size_t>(work.tile_state_floats()) * own_states * sizeof(float));
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

/// The first split of a (list, tile) of a plan with splits, counted over the whole sequence.
inline index_t first_split(const attention_plan& plan, const row_work& work, index_t list,
                           index_t tile) {
  index_t first = 0;
  for (index_t l = 0; l < list; ++l) {
    first += std::ssize(plan.head(plan.head_of(l * work.sharing)).splits);
  }
  const plan_head& head = plan.head(plan.head_of(list * work.sharing));
  return first + head.split_ptr[static_cast<std::size_t>(tile)];
}

/// The (list, tile, split) of a task of a plan with splits.
struct row_task {
  index_t list = 0;
  index_t tile;
  index_t split;

  row_task(const attention_plan& plan, const row_work& work, index_t task) {
    const auto head = [&]() -> const plan_head& {
      return plan.head(plan.head_of(list * work.sharing));
    };
    for (; task >= std::ssize(head().splits); ++list) task -= std::ssize(head().splits);
    const std::vector<index_t>& begins = head().split_ptr;
    tile = std::upper_bound(begins.begin(), begins.end(), task) - begins.begin() - 1;
    split = task - begins[static_cast<std::size_t>(tile)];
  }
};

/// One task of the row kernel for the kv heads [kv_heads.begin, kv_heads.end), all of them where
/// the plan has splits; `shared` holds the states of such a sequence. `rows_of(kv_head)` is where
/// the rows are.
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
  float* const states = scratch.take<float>(work.tile_state_floats() * (work.row_keys ? 2 : 1));
  const index_t groups = ceil_div(work.tiles, work.tiles_per_task());
  const index_t kv_index = task / (work.lists_per_kv_head * groups);
  const index_t list = (kv_heads.begin + kv_index) * work.lists_per_kv_head +
                       task % work.lists_per_kv_head;
  const index_t group =
      groups - 1 - task / work.lists_per_kv_head % groups;  // the last rows have the most keys
  const kv_rows kv = rows_of(list / work.lists_per_kv_head);
  const index_t end = std::min((group + 1) * work.tiles_per_task(), work.tiles);
  for (index_t tile = group * work.tiles_per_task(); tile < end; ++tile) {
    const index_t count =
        run_row_split(s, work, kv, logits, kernels, list, tile, 0, states, scratch);
    merge_row_splits(s, work, logits, kernels, list, tile, count, states);
  }
}

/// Writes the rows of one (list, tile) of a plan with splits.
inline void merge_rows(const attention_sequence& s, const row_work& work,
                       const logit_options& logits, const kernel_table& kernels, index_t task,
                       const float* shared) {
  const attention_plan& plan = *s.plan;
  const index_t list = task / work.tiles;
  const index_t tile = task % work.tiles;
  merge_row_splits(s, work, logits, kernels, list, tile,
                   plan.splits(plan.head_of(list * work.sharing), tile),
                   shared + first_split(plan, work, list, tile) * work.tile_state_floats());
}

}  // namespace sattn::detail
