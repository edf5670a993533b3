// SPDX-License-Identifier: Apache-2.0
//
// Masks written pair by pair from the meaning of a plan, and plans to compare with them.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <sattn/attention/plan.hpp>
#include <sattn/plan/expand.hpp>
#include <string>
#include <utility>
#include <vector>

#include "support/random.hpp"

namespace test_support {

using sattn::index_t;
using sattn::token_t;

/// Whether a row at `position` may see `key`.
inline bool sees(const sattn::domain& legal, index_t position, index_t key) {
  const bool recent = legal.window == 0 || position - key < legal.window;
  const bool known = !legal.causal || key <= position || key < legal.prefix;
  return recent && known;
}

/// Whether every query head attends to exactly the keys with `wanted(q_head, row, key)` that its
/// rows may see.
template <class F>
::testing::AssertionResult selects(const sattn::attention_plan& plan, F&& wanted) {
  const sattn::attention_shape& shape = plan.shape();
  for (index_t head = 0; head < shape.q_heads; ++head) {
    const std::vector<std::uint8_t> mask = expand(plan, head);
    for (index_t row = 0; row < shape.q_len; ++row) {
      for (index_t key = 0; key < shape.kv_len; ++key) {
        const bool want =
            sees(plan.data().legal, shape.q_offset + row, key) && wanted(head, row, key);
        const bool got = mask[static_cast<std::size_t>(row * shape.kv_len + key)] != 0;
        if (got != want) {
          return ::testing::AssertionFailure()
                 << "head " << head << ", row " << row << " at position " << shape.q_offset + row
                 << (want ? " lacks" : " has") << " key " << key;
        }
      }
    }
  }
  return ::testing::AssertionSuccess();
}

/// A plan_head by the names of its fields.
struct head_fields {
  std::vector<sattn::key_range> distances = {};
  std::vector<sattn::key_range> columns = {};
  std::vector<index_t> range_ptr = {};
  std::vector<sattn::key_range> ranges = {};
  std::vector<index_t> token_ptr = {};
  std::vector<token_t> tokens = {};
  std::vector<index_t> row_key_ptr = {};
  std::vector<token_t> row_keys = {};
  std::vector<std::uint16_t> row_masks = {};
  std::vector<index_t> split_ptr = {};
  std::vector<token_t> splits = {};

  operator sattn::plan_head() const {
    return {distances,   columns,  range_ptr, ranges,    token_ptr, tokens,
            row_key_ptr, row_keys, row_masks, split_ptr, splits,    {}};
  }
};

/// The plan of one query head, exact.
inline sattn::plan_data one_head(const sattn::attention_shape& shape, const sattn::domain& legal,
                                 const sattn::tile_grid& grid, sattn::plan_head head) {
  sattn::plan_data data;
  data.shape = shape;
  data.legal = legal;
  data.grid = grid;
  data.heads.push_back(std::move(head));
  return data;
}

/// A context for planning: one thread and no kernels.
class planning_context {
 public:
  sattn::context& get() { return context_; }

 private:
  static sattn::kernel_table no_kernels() {
    sattn::kernel_table table = {};
    table.name = "none";
    table.cpu_supports = [] { return true; };
    return table;
  }

  sattn::serial_executor threads_;
  sattn::kernel_table kernels_ = no_kernels();
  sattn::context context_{threads_, kernels_};
};

template <sattn::attention_pattern P>
sattn::attention_plan plan_of(const sattn::attention_shape& shape, const P& pattern,
                              const sattn::plan_options& options = {}) {
  planning_context ctx;
  return plan_prefill(ctx.get(), shape, pattern, options);
}

/// A shape whose last query stands at the last key.
inline sattn::attention_shape aligned_shape(index_t q_len, index_t kv_len, index_t q_heads = 1,
                                            index_t kv_heads = 1) {
  return {q_len, kv_len, q_heads, kv_heads, static_cast<token_t>(kv_len - q_len)};
}

// ---- random plans

inline sattn::domain random_domain(random_source& random, token_t keys) {
  sattn::domain legal;
  legal.causal = random.integer(0, 3) != 0;
  if (random.integer(0, 2) == 0) legal.window = static_cast<token_t>(random.integer(1, keys + 20));
  if (random.integer(0, 3) == 0) legal.prefix = static_cast<token_t>(random.integer(1, keys + 20));
  return legal;
}

/// Sorted ranges in [0, limit) that do not touch, from none to about `limit` / `gap`; short ones
/// are the more frequent.
inline std::vector<sattn::key_range> random_ranges(random_source& random, index_t limit,
                                                   index_t gap, index_t shortest = 1) {
  std::vector<sattn::key_range> ranges;
  index_t at = random.integer(0, gap + 1);
  while (at + shortest <= limit) {
    const index_t length = shortest + random.integer(0, random.pick<index_t>({1, 4, 40, 200}));
    const index_t end = std::min(at + length, limit);
    ranges.push_back({static_cast<token_t>(at), static_cast<token_t>(end)});
    at = end + 1 + random.integer(0, gap + 1);
  }
  return ranges;
}

/// The lists of one tile: what random_ranges gives, single keys as tokens.
inline void add_random_list(sattn::plan_head& head, random_source& random, index_t kv_len) {
  for (const sattn::key_range& r : random_ranges(random, kv_len, random.pick<index_t>({3, 30}))) {
    if (r.size() == 1) {
      head.tokens.push_back(r.begin);
    } else {
      head.ranges.push_back(r);
    }
  }
}

/// Keys of one tile that some of its rows attend to: few of them, about half, or any.
inline void add_random_row_keys(sattn::plan_head& head, random_source& random,
                                const sattn::plan_data& data, index_t tile) {
  const index_t kv_len = data.shape.kv_len;
  const sattn::key_range rows = data.grid.row_range(tile, data.shape.q_len);
  const index_t gap = random.pick<index_t>({1, 1, 4, 60, 400});
  const index_t kind = random.integer(0, 3);
  for (index_t key = random.integer(0, gap); key < kv_len; key += random.integer(1, gap + 1)) {
    unsigned mask = 0;
    for (index_t row = rows.begin; row < rows.end; ++row) {
      const bool chosen = kind == 0 ? random.integer(0, 10) == 0 : random.integer(0, 4) >= kind;
      if (chosen && sees(data.legal, data.shape.q_offset + row, key)) {
        mask |= 1u << (row - rows.begin);
      }
    }
    if (mask == 0) continue;
    head.row_keys.push_back(static_cast<token_t>(key));
    head.row_masks.push_back(static_cast<std::uint16_t>(mask));
  }
}

inline sattn::plan_head random_plan_head(random_source& random, const sattn::plan_data& data) {
  const index_t kv_len = data.shape.kv_len;
  index_t positions = std::max<index_t>(data.shape.q_offset + data.shape.q_len, 0);
  if (data.legal.window > 0) positions = std::min<index_t>(positions, data.legal.window);
  sattn::plan_head head;
  const index_t gap = random.pick<index_t>({2, 20, 120, 400});
  if (random.integer(0, 3) != 0) head.distances = random_ranges(random, positions, gap);
  if (random.integer(0, 3) != 0) head.columns = random_ranges(random, kv_len, gap);
  if (random.integer(0, 3) != 0) {
    head.range_ptr.push_back(0);
    head.token_ptr.push_back(0);
    for (index_t tile = 0; tile < data.grid.tiles(data.shape.q_len); ++tile) {
      if (random.integer(0, 4) != 0) add_random_list(head, random, kv_len);
      head.range_ptr.push_back(std::ssize(head.ranges));
      head.token_ptr.push_back(std::ssize(head.tokens));
    }
  }
  if (data.grid.rows <= 16 && random.integer(0, 2) != 0) {
    head.row_key_ptr.push_back(0);
    for (index_t tile = 0; tile < data.grid.tiles(data.shape.q_len); ++tile) {
      add_random_row_keys(head, random, data, tile);
      head.row_key_ptr.push_back(std::ssize(head.row_keys));
    }
  }
  return head;
}

/// Any of the encodings together, either rounding, rows before, among and behind the keys, and
/// tiles of any height. Rows and keys are below `longest`.
inline sattn::plan_data random_plan_data(random_source& random, index_t longest = 300) {
  sattn::plan_data data;
  data.shape.q_len = random.integer(1, random.pick<index_t>({8, 70, longest}));
  data.shape.kv_len = random.integer(1, random.pick<index_t>({8, 70, longest}));
  data.shape.kv_heads = random.integer(1, 4);
  data.shape.q_heads = data.shape.kv_heads * random.integer(1, 6);
  const index_t aligned = data.shape.kv_len - data.shape.q_len;
  data.shape.q_offset = static_cast<token_t>(
      random.pick<index_t>({aligned, aligned, 0, random.integer(-longest, longest)}));
  data.legal = random_domain(random, static_cast<token_t>(data.shape.kv_len));
  data.grid.rows = random.pick<token_t>({1, 2, 3, 4, 8, 13, 16, 24, 64, 100, 128});
  data.grid.period = random.pick<token_t>({0, 0, 0, 1, 3, 24, 60, 100, 131, 1000});
  data.rounding = random.integer(0, 3) == 0 ? sattn::rounding::cover : sattn::rounding::exact;
  data.map = random.pick(
      {sattn::head_map::shared, sattn::head_map::per_kv_head, sattn::head_map::per_q_head});
  for (index_t i = 0; i < plan_head_count(data.shape, data.map); ++i) {
    data.heads.push_back(random_plan_head(random, data));
  }
  return data;
}

/// What a failing random case is about.
inline std::string describe(const sattn::plan_data& data) {
  const sattn::attention_shape& s = data.shape;
  return "q_len " + std::to_string(s.q_len) + ", kv_len " + std::to_string(s.kv_len) +
         ", q_offset " + std::to_string(s.q_offset) + ", heads " + std::to_string(s.q_heads) + "/" +
         std::to_string(s.kv_heads) + ", map " + std::to_string(static_cast<int>(data.map)) +
         ", causal " + std::to_string(data.legal.causal) + ", window " +
         std::to_string(data.legal.window) + ", prefix " + std::to_string(data.legal.prefix) +
         ", tiles of " + std::to_string(data.grid.rows) + " rows, period " +
         std::to_string(data.grid.period) +
         (data.rounding == sattn::rounding::cover ? ", cover" : ", exact");
}

}  // namespace test_support
