// SPDX-License-Identifier: Apache-2.0
//
// Random patterns, each with its meaning written a second time, without plans.
#pragma once

#include <sattn/pattern/basic.hpp>
#include <sattn/pattern/block_mask.hpp>
#include <sattn/pattern/compose.hpp>
#include <sattn/pattern/token_lists.hpp>
#include <sattn/pattern/vertical_slash.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "support/problem.hpp"

namespace test_support {

struct pattern_case {
  std::string name;
  sattn::any_pattern pattern;
  mask_function selected;  // before the domain
};

enum class pattern_kind {
  dense,
  sink,
  window,
  block_mask,
  block_lists,
  vertical_slash,
  row_lists,
  tile_lists,
  any_of,
  per_head,
};
inline constexpr int pattern_kinds = 10;

namespace detail {

// The set of data that a query head reads.
inline index_t set_of(const sattn::attention_shape& shape, index_t sets, index_t q_head) {
  if (sets == 1) return 0;
  return sets == shape.q_heads ? q_head : q_head / shape.group_size();
}

inline pattern_case random_blocks(random_source& random, const sattn::attention_shape& shape,
                                  index_t sets, bool as_lists) {
  const auto q_block = random.pick<token_t>({1, 4, 16, 20, 33, 64, 128, 200});
  const auto k_block = random.pick<token_t>({1, 7, 16, 32, 64, 128});
  const index_t rows = sattn::ceil_div(shape.q_len, q_block);
  const index_t cols = sattn::ceil_div(shape.kv_len, k_block);
  auto mask = std::make_shared<std::vector<std::uint8_t>>(at(sets * rows * cols));
  for (std::uint8_t& chosen : *mask) chosen = random.integer(0, 3) == 0 ? 1 : 0;
  mask_function selected = [=](index_t h, index_t row, index_t key) {
    const index_t set = set_of(shape, sets, h);
    return (*mask)[at((set * rows + row / q_block) * cols + key / k_block)] != 0;
  };
  const std::string name = "blocks of " + std::to_string(q_block) + " x " + std::to_string(k_block);
  if (!as_lists) {
    const sattn::block_mask pattern{q_block, k_block, *mask, sets};
    return {name, pattern, std::move(selected)};
  }
  sattn::block_lists pattern{q_block, k_block, {0}, {}, sets};
  for (index_t r = 0; r < sets * rows; ++r) {
    for (index_t c = 0; c < cols; ++c) {
      if ((*mask)[at(r * cols + c)] != 0) pattern.indices.push_back(static_cast<token_t>(c));
    }
    pattern.indptr.push_back(std::ssize(pattern.indices));
  }
  return {"BSR " + name, std::move(pattern), std::move(selected)};
}

// In any order and with duplicates, as the patterns allow.
inline std::vector<token_t> random_tokens(random_source& random, index_t end, index_t most) {
  std::vector<token_t> tokens;
  if (end == 0) return tokens;
  for (index_t n = random.integer(0, most + 1); n > 0; --n) {
    tokens.push_back(static_cast<token_t>(random.integer(0, end)));
  }
  return tokens;
}

inline pattern_case random_vertical_slash(random_source& random,
                                          const sattn::attention_shape& shape) {
  const sattn::vertical_slash pattern{random_tokens(random, shape.kv_len, 12),
                                      random_tokens(random, shape.kv_len + 5, 12)};
  const std::set<index_t> columns(pattern.columns.begin(), pattern.columns.end());
  const std::set<index_t> distances(pattern.distances.begin(), pattern.distances.end());
  return {"vertical-slash", pattern, [=](index_t, index_t row, index_t key) {
            return columns.contains(key) || distances.contains(shape.q_offset + row - key);
          }};
}

inline pattern_case random_lists(random_source& random, const sattn::attention_shape& shape,
                                 index_t sets, token_t rows_per_list) {
  const index_t lists = sattn::ceil_div(shape.q_len, rows_per_list);
  sattn::token_lists pattern{rows_per_list, {0}, {}, sets};
  auto keys = std::make_shared<std::vector<std::set<index_t>>>();
  for (index_t i = 0; i < sets * lists; ++i) {
    const std::vector<token_t> list = random_tokens(random, shape.kv_len, 30);
    pattern.tokens.insert(pattern.tokens.end(), list.begin(), list.end());
    pattern.indptr.push_back(std::ssize(pattern.tokens));
    keys->emplace_back(list.begin(), list.end());
  }
  return {"lists for " + std::to_string(rows_per_list) + " rows", std::move(pattern),
          [=](index_t h, index_t row, index_t key) {
            const index_t set = set_of(shape, sets, h);
            return (*keys)[at(set * lists + row / rows_per_list)].contains(key);
          }};
}

}  // namespace detail

/// `sets`: how many sets of data the kinds that hold any may have; 0 = choose.
inline pattern_case random_pattern(random_source& random, const sattn::attention_shape& shape,
                                   pattern_kind kind, index_t sets = 0) {
  if (sets == 0) sets = random.pick<index_t>({1, shape.kv_heads, shape.q_heads});
  switch (kind) {
    case pattern_kind::dense:
      return {"dense", sattn::dense{}, [](index_t, index_t, index_t) { return true; }};
    case pattern_kind::sink: {
      const auto count = static_cast<token_t>(random.integer(0, shape.kv_len + 3));
      return {"sink " + std::to_string(count), sattn::sink{count},
              [=](index_t, index_t, index_t key) { return key < count; }};
    }
    case pattern_kind::window: {
      const auto size = static_cast<token_t>(random.integer(0, shape.kv_len + 3));
      return {"window " + std::to_string(size), sattn::sliding_window{size},
              [=](index_t, index_t row, index_t key) {
                const index_t distance = shape.q_offset + row - key;
                return distance >= 0 && distance < size;
              }};
    }
    case pattern_kind::block_mask:
      return detail::random_blocks(random, shape, sets, false);
    case pattern_kind::block_lists:
      return detail::random_blocks(random, shape, sets, true);
    case pattern_kind::vertical_slash:
      return detail::random_vertical_slash(random, shape);
    case pattern_kind::row_lists:
      return detail::random_lists(random, shape, sets, 1);
    case pattern_kind::tile_lists:
      return detail::random_lists(random, shape, sets,
                                  random.pick<token_t>({2, 5, 8, 16, 30, 64, 128, 300}));
    case pattern_kind::any_of: {
      const auto simple = [&] { return static_cast<pattern_kind>(random.integer(0, 8)); };
      pattern_case a = random_pattern(random, shape, simple(), sets);
      pattern_case b = random_pattern(random, shape, simple());
      return {a.name + " | " + b.name, a.pattern | b.pattern,
              [first = a.selected, second = b.selected](index_t h, index_t row, index_t key) {
                return first(h, row, key) || second(h, row, key);
              }};
    }
    case pattern_kind::per_head: {
      const index_t count = random.pick<index_t>({shape.kv_heads, shape.q_heads});
      sattn::per_head pattern;
      std::vector<mask_function> parts;
      std::string name = "per head:";
      for (index_t i = 0; i < count; ++i) {
        pattern_case part =
            random_pattern(random, shape, static_cast<pattern_kind>(random.integer(0, 8)), 1);
        pattern.patterns.push_back(part.pattern);
        parts.push_back(part.selected);
        name += " " + part.name;
      }
      return {name, std::move(pattern), [=](index_t h, index_t row, index_t key) {
                return parts[at(detail::set_of(shape, count, h))](h, row, key);
              }};
    }
  }
  return {"none", sattn::sink{0}, [](index_t, index_t, index_t) { return false; }};
}

inline sattn::domain random_domain(random_source& random, const sattn::attention_shape& shape) {
  sattn::domain legal;
  if (random.integer(0, 4) == 0) legal.causal = false;
  if (random.integer(0, 3) == 0) {
    legal.window = static_cast<token_t>(random.integer(1, shape.kv_len + 3));
  }
  if (random.integer(0, 4) == 0) {
    legal.prefix = static_cast<token_t>(random.integer(1, shape.kv_len + 3));
  }
  return legal;
}

/// A list for every row and kv head: `common` of the keys are those of all its neighbours, `own`
/// are its own.
inline sattn::token_lists alike_lists(random_source& random, const sattn::attention_shape& shape,
                                      index_t common, index_t own) {
  sattn::token_lists lists{1, {0}, {}, shape.kv_heads};
  const auto any_key = [&] { return static_cast<token_t>(random.integer(0, shape.kv_len)); };
  std::vector<token_t> shared(at(common));
  for (index_t i = 0; i < shape.kv_heads * shape.q_len; ++i) {
    if (i % 24 == 0) std::generate(shared.begin(), shared.end(), any_key);
    lists.tokens.insert(lists.tokens.end(), shared.begin(), shared.end());
    for (index_t n = 0; n < own; ++n) lists.tokens.push_back(any_key());
    lists.indptr.push_back(std::ssize(lists.tokens));
  }
  return lists;
}

/// The tile kernel, the row kernel, and splits, each with masks.
inline std::vector<std::pair<std::string, sattn::attention_plan>> every_kind_of_plan(
    sattn::context& ctx, const sattn::attention_shape& shape) {
  using namespace sattn;  // NOLINT(google-build-using-namespace)
  random_source random;
  std::vector<std::pair<std::string, attention_plan>> plans;
  const auto add = [&](std::string name, attention_plan plan) {
    plans.emplace_back(std::move(name), std::move(plan));
  };
  const auto lists = random_pattern(random, shape, pattern_kind::row_lists);
  const auto alike = alike_lists(random, shape, 40, 10);
  const auto blocks = random_pattern(random, shape, pattern_kind::block_mask, shape.q_heads);
  add("dense", plan_prefill(ctx, shape, dense{}));
  add("vertical-slash", plan_prefill(ctx, shape, vertical_slash{{0, 5, 90}, {0, 1, 30, 60}}));
  add("blocks", plan_prefill(ctx, shape, blocks.pattern));
  add("row lists", plan_prefill(ctx, shape, lists.pattern));
  add("row lists that share keys", plan_prefill(ctx, shape, alike));
  add("row lists that share almost all keys",
      plan_prefill(ctx, shape, alike_lists(random, shape, shape.kv_len, 0), {.tile_rows = 8}));
  add("splits of row lists that share keys", plan_decode(ctx, shape, alike, {.split_keys = 9}));
  add("splits", plan_decode(ctx, shape, dense{}, {.split_keys = 11}));
  add("splits of row lists", plan_decode(ctx, shape, lists.pattern, {.split_keys = 7}));
  return plans;
}

}  // namespace test_support
