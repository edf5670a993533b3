// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/checks.hpp>
#include <sattn/attention/work.hpp>
#include <sattn/kernel/kernel_table.hpp>
#include <sattn/plan/tile_cursor.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>

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
      split_count += std::ssize(s.plan->head(s.plan->head_of(list * sharing)).splits);
    }
  }

  // Without splits a task merges its own states, and takes several short tiles to be worth its
  // while.
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

/// The query rows of a tile, ready for the row kernel, and their states, empty.
struct row_queries {
  const row_work* work;
  float* q;                // [rows][sharing heads][row_out_floats(head_dim)]
  std::uint8_t* mask_bit;  // of each of them: the row
  float* states;           // or null, for scores alone
  float soft_cap;
  bool cached;

  row_queries(const attention_sequence& s, const row_work& w, const logit_options& logits,
              key_range rows, index_t first_head, float* to, scratch_arena& scratch)
      : work(&w),
        q(scratch.take<float>(rows.size() * w.sharing * row_out_floats(w.head_dim))),
        mask_bit(scratch.take<std::uint8_t>(rows.size() * w.sharing)),
        states(to), soft_cap(logits.soft_cap), cached(!s.plan->has_splits()) {
    const index_t q_stride = row_out_floats(w.head_dim);
    for (index_t row = 0; row < rows.size(); ++row) {
      for (index_t head = 0; head < w.sharing; ++head) {
        const index_t i = row * w.sharing + head;
        const float* const from = s.q.row(rows.begin + row, first_head + head);
        float* const query = q + i * q_stride;
        for (index_t c = 0; c < w.head_dim; ++c) query[c] = from[c] * logits.pack_scale;
        std::fill(query + w.head_dim, query + q_stride, 0.0f);
        mask_bit[i] = static_cast<std::uint8_t>(row);
        if (states == nullptr) continue;
        float* const state = states + i * row_state_floats(w.v_dim);
        std::fill_n(state, row_state_floats(w.v_dim), 0.0f);
        state[row_out_floats(w.v_dim)] = -std::numeric_limits<float>::infinity();
      }
    }
  }

  /// The keys [begin, end) of the pointers for the rows [row, row + rows).
  rows_args args(index_t row, index_t rows, const readable_rows& pointers,
                 const readable_rows& next, index_t begin, index_t end,
                 const std::uint16_t* masks) const {
    const index_t first = row * work->sharing;
    return {
        .q = q + first * row_out_floats(work->head_dim),
        .queries = rows * work->sharing,
        .k_type = pointers.k.type,
        .v_type = pointers.v.type,
        .k_rows = pointers.k.rows.data() + begin,
        .v_rows = pointers.v.rows.data() + begin,
        .k_scales = pointers.k.scales_from(begin),
        .v_scales = pointers.v.scales_from(begin),
        .next_k = next.k.rows.data(),
        .next_v = next.v.rows.data(),
        .count = end - begin,
        .masks = masks,
        .mask_bit = mask_bit + first,
        .cached = cached,
        .head_dim = work->head_dim,
        .v_dim = work->v_dim,
        .soft_cap = soft_cap,
        .states = states == nullptr ? nullptr : states + first * row_state_floats(work->v_dim),
    };
  }
};

/// Bytes of scratch for row_queries and for_each_chunk_ahead().
inline std::size_t row_walk_bytes(const attention_sequence& s, const row_work& work) {
  return 2 * padded(sizeof(key_chunk)) + 2 * readable_rows::bytes(s, row_reader::rows) +
         padded(static_cast<std::size_t>(work.queries * row_out_floats(work.head_dim)) *
                sizeof(float)) +
         padded(static_cast<std::size_t>(work.queries));
}

/// Calls f(chunk, rows, next) for the chunks of a tile of which some row attends to a key: where
/// the keys lie, and where those of the chunk behind it do, or the same. `locate(rows, keys,
/// count)` finds them.
template <class Locate, class F>
void for_each_chunk_ahead(tile_cursor& cursor, key_chunk* const (&chunks)[2],
                          readable_rows* const (&rows)[2], Locate&& locate, F&& f) {
  bool more = cursor.next(*chunks[0]);
  if (more) locate(*rows[0], chunks[0]->keys.data(), chunks[0]->count);
  for (int now = 0; more; now ^= 1) {
    const int after = now ^ 1;
    more = cursor.next(*chunks[after]);
    if (more) locate(*rows[after], chunks[after]->keys.data(), chunks[after]->count);
    const key_chunk& chunk = *chunks[now];
    if (chunk.sub[0].begin != chunk.sub[0].end) f(chunk, *rows[now], *rows[more ? after : now]);
  }
}

}  // namespace sattn::detail
