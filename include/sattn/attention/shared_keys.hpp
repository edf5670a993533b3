// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/row_work.hpp>

#include <algorithm>
#include <array>
#include <limits>

namespace sattn::detail {

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
             index_t first_head, readable_rows& pointers) {
    if (count_ == 0) return;
    for (index_t head = 0; head < work.sharing && !started_; ++head) {
      pack_args pack{{}, work.head_dim, work.v_dim, logits.pack_scale, block(work, head)};
      for (index_t row = 0; row < rows.size(); ++row) {
        pack.q_rows[row] = s.q.row(rows.begin + row, first_head + head);
      }
      kernels.pack_queries(pack);
    }
    started_ = true;
    pointers.locate(keys_.data(), count_, kv, s.kv, kernels);
    for (index_t head = 0; head < work.sharing; ++head) {
      kernels.attend_tile({
          .k_rows = pointers.k.rows.data(),
          .v_rows = pointers.v.rows.data(),
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

}  // namespace sattn::detail
