// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/checks.hpp>
#include <sattn/attention/work.hpp>
#include <sattn/kernel/kernel_table.hpp>
#include <sattn/plan/row_sharing.hpp>
#include <sattn/plan/tile_cursor.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

namespace sattn::detail {

/// How the row kernel runs one sequence: every (list, tile, split) leaves a state per query row,
/// and the states of a row are merged in the order of the splits.
struct row_work {
  index_t head_dim;
  index_t v_dim;
  index_t sharing;  // query heads of one list within one kv head
  index_t lists;
  index_t tiles;
  index_t queries;  // rows x heads of one tile, at most
  index_t lists_per_kv_head;
  bool row_keys;
  index_t split_count = 0;  // over all lists and tiles

  explicit row_work(const attention_sequence& s)
      : head_dim(s.q.dim), v_dim(s.kv.v.dim), sharing(s.plan->sharing_heads()),
        lists(sharing == 0 ? 0 : s.plan->shape().q_heads / sharing), tiles(s.plan->tiles()),
        queries(std::min<index_t>(s.plan->grid().rows, s.plan->shape().q_len) * sharing),
        lists_per_kv_head(sharing == 0 ? 0 : s.plan->shape().group_size() / sharing),
        row_keys(s.plan->has_row_keys()) {
    for (index_t list = 0; list < lists; ++list) {
      for (index_t tile = 0; s.plan->has_splits() && tile < tiles; ++tile) {
        split_count += s.plan->splits(s.plan->head_of(list * sharing), tile);
      }
    }
  }

  // Without splits a task merges its own states, and takes several short tiles to be worth its while.
  index_t tiles_per_task() const { return row_keys ? 1 : 16; }
  index_t tasks(const attention_plan& plan, key_range kv_heads) const {
    return plan.has_splits()
               ? split_count
               : kv_heads.size() * lists_per_kv_head * ceil_div(tiles, tiles_per_task());
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
};

/// The keys that many rows of a tile share, through the tile kernel: 16 rows of one head a block.
class shared_keys {
 public:
  static std::size_t bytes(const row_work& work) {
    return padded(sizeof(shared_keys)) + padded(block_bytes(work)) +
           padded(sizeof(float) * chunk_keys * tile_lanes);
  }
  static shared_keys& take(scratch_arena& arena, const row_work& work) {
    shared_keys& keys = *arena.take<shared_keys>(1);
    keys.blocks_ = arena.take<float>(static_cast<index_t>(block_bytes(work) / sizeof(float)));
    keys.scores_ = arena.take<float>(chunk_keys * tile_lanes);
    keys.count_ = 0;
    keys.started_ = false;
    return keys;
  }

  /// True when the chunk is full.
  bool add(token_t key, std::uint16_t mask) {
    keys_[static_cast<std::size_t>(count_)] = key;
    masks_[static_cast<std::size_t>(count_)] = mask;
    return ++count_ == chunk_keys;
  }
  bool started() const { return started_; }

  void flush(const attention_sequence& s, const row_work& work, const kv_rows& kv,
             const logit_options& logits, const kernel_table& kernels, key_range rows,
             index_t first_head, row_pointers& pointers) {
    if (count_ == 0) return;
    for (index_t head = 0; head < work.sharing && !started_; ++head) {
      pack_args pack{{}, work.head_dim, work.v_dim, logits.pack_scale, block(work, head)};
      for (index_t row = 0; row < rows.size(); ++row) {
        pack.q_rows[row] = s.q.row(rows.begin + row, first_head + head);
      }
      kernels.pack_queries(pack);
    }
    started_ = true;
    pointers.locate(keys_.data(), count_, kv, kernels);
    for (index_t head = 0; head < work.sharing; ++head) {
      kernels.attend_tile({
          .k_rows = pointers.k.data(),
          .v_rows = pointers.v.data(),
          .v_panel = kv.v_panel,
          .count = count_,
          .masks = masks_.data(),
          .head_dim = work.head_dim,
          .v_dim = work.v_dim,
          .soft_cap = logits.soft_cap,
          .prefetch_values = head == 0,
          .ahead = nullptr,
          .block = block(work, head),
          .scores = scores_,
      });
    }
    count_ = 0;
  }

  /// Writes what the rows got as states of the row kernel.
  void finish(const row_work& work, const kernel_table& kernels, index_t rows, float* states) {
    for (index_t head = 0; head < work.sharing; ++head) {
      finish_args finish{block(work, head), work.head_dim, work.v_dim, {}, {}, {}};
      std::fill_n(finish.sink_logit, tile_lanes, -std::numeric_limits<float>::infinity());
      const auto state_of = [&](index_t row) {
        return states + (row * work.sharing + head) * row_state_floats(work.v_dim);
      };
      for (index_t row = 0; row < rows; ++row) {
        finish.out_rows[row] = state_of(row);
        finish.lse[row] = state_of(row) + row_out_floats(work.v_dim);
      }
      kernels.finish_tile(finish);
      // Divided by its sum already: the log of the sum is the maximum, and the sum is 1.
      for (index_t row = 0; row < rows; ++row) {
        float* const max_and_sum = finish.lse[row];
        std::fill(state_of(row) + work.v_dim, max_and_sum, 0.0f);
        max_and_sum[1] = max_and_sum[0] == -std::numeric_limits<float>::infinity() ? 0.0f : 1.0f;
      }
    }
  }

  /// Gives the keys that were not flushed to f(key, mask) instead.
  template <class F>
  void give_back(F&& f) {
    for (std::size_t i = 0; i < static_cast<std::size_t>(count_); ++i) f(keys_[i], masks_[i]);
    count_ = 0;
  }

 private:
  static std::size_t block_bytes(const row_work& work) {
    return static_cast<std::size_t>(work.sharing * lane_block_floats(work.head_dim, work.v_dim)) *
           sizeof(float);
  }
  float* block(const row_work& work, index_t head) const {
    return blocks_ + head * lane_block_floats(work.head_dim, work.v_dim);
  }

  std::array<token_t, chunk_keys> keys_;
  std::array<std::uint16_t, chunk_keys> masks_;
  index_t count_;
  bool started_;
  float* blocks_;
  float* scores_;
};

/// The query rows of a tile, ready for the row kernel, and their states.
struct row_queries {
  const row_work* work;
  const kernel_table* kernels;
  float* q;                // [rows][sharing heads][row_out_floats(head_dim)]
  std::uint8_t* mask_bit;  // of each of them: the row
  float* scores;
  float* states;
  float soft_cap;
  bool scattered;

  row_queries(const attention_sequence& s, const row_work& w, const logit_options& logits,
              const kernel_table& table, key_range rows, index_t first_head, float* to,
              scratch_arena& scratch)
      : work(&w), kernels(&table),
        q(scratch.take<float>(rows.size() * w.sharing * row_out_floats(w.head_dim))),
        mask_bit(scratch.take<std::uint8_t>(rows.size() * w.sharing)),
        scores(scratch.take<float>(4 * chunk_keys)), states(to), soft_cap(logits.soft_cap),
        scattered(!s.plan->has_splits()) {
    const index_t q_stride = row_out_floats(w.head_dim);
    for (index_t row = 0; row < rows.size(); ++row) {
      for (index_t head = 0; head < w.sharing; ++head) {
        const index_t i = row * w.sharing + head;
        const float* const from = s.q.row(rows.begin + row, first_head + head);
        float* const query = q + i * q_stride;
        for (index_t c = 0; c < w.head_dim; ++c) query[c] = from[c] * logits.pack_scale;
        std::fill(query + w.head_dim, query + q_stride, 0.0f);
        mask_bit[i] = static_cast<std::uint8_t>(row);
        float* const state = states + i * row_state_floats(w.v_dim);
        std::fill_n(state, row_state_floats(w.v_dim), 0.0f);
        state[row_out_floats(w.v_dim)] = -std::numeric_limits<float>::infinity();
      }
    }
  }

  /// The keys [begin, end) of the pointers for the rows [row, row + rows).
  void attend(index_t row, index_t rows, const row_pointers& pointers, index_t begin, index_t end,
              const std::uint16_t* masks) const {
    const index_t first = row * work->sharing;
    kernels->attend_rows({
        .q = q + first * row_out_floats(work->head_dim),
        .queries = rows * work->sharing,
        .k_rows = pointers.k.data() + begin,
        .v_rows = pointers.v.data() + begin,
        .count = end - begin,
        .masks = masks,
        .mask_bit = mask_bit + first,
        .scattered = scattered,
        .head_dim = work->head_dim,
        .v_dim = work->v_dim,
        .soft_cap = soft_cap,
        .states = states + first * row_state_floats(work->v_dim),
        .scores = scores,
    });
  }
};

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

  key_chunk& chunk = *scratch.take<key_chunk>(1);
  row_pointers& pointers = row_pointers::take(scratch, s);
  const row_queries queries(s, work, logits, kernels, rows, first_head, states, scratch);
  tile_cursor cursor(plan, plan_head, tile, sub_tile_rows,
                     plan.split_range(plan_head, tile, split));
  if (!work.row_keys) {
    while (cursor.next(chunk)) {
      const key_chunk::sub_tile& part = chunk.sub[0];
      if (part.begin == part.end) continue;
      pointers.locate(chunk.keys.data(), chunk.count, kv, kernels);
      queries.attend(0, rows.size(), pointers, part.begin, part.end,
                     part.masked ? chunk.masks[0].data() + part.begin : nullptr);
    }
    return 1;
  }

  row_lists& lists = *scratch.take<row_lists>(1);
  lists.counts.fill(0);
  const auto flush_row = [&](index_t row) {
    const auto r = static_cast<std::size_t>(row);
    pointers.locate(lists.keys[r].data(), lists.counts[r], kv, kernels);
    queries.attend(row, 1, pointers, 0, std::exchange(lists.counts[r], 0), nullptr);
  };
  shared_keys& shared = shared_keys::take(scratch, work);
  const auto flush_shared = [&] {
    shared.flush(s, work, kv, logits, kernels, rows, first_head, pointers);
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
      if (plan.has_splits() || !sharing.shared(row_count)) {
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
  const auto floats = [](index_t count) {
    return padded(static_cast<std::size_t>(count) * sizeof(float));
  };
  const std::size_t own_states = work.row_keys ? 2 : 1;
  return padded(sizeof(key_chunk)) + row_pointers::bytes(s) +
         floats(work.queries * row_out_floats(work.head_dim)) +
         padded(static_cast<std::size_t>(work.queries)) + floats(4 * chunk_keys) +
         (work.row_keys ? padded(sizeof(row_lists)) + shared_keys::bytes(work) : 0) +
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
