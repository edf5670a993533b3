// SPDX-License-Identifier: Apache-2.0
//
// Small problems, the plans that methods make of them, and the comparison of a plan with what a
// formula chooses.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <sattn/method/method.hpp>
#include <span>
#include <vector>

#include "method/formulas.hpp"
#include "support/plans.hpp"
#include "support/problem.hpp"

namespace test_support {

/// The last rows of a longer sequence.
inline attention_problem decode_problem(random_source& random, index_t kv_len, index_t rows = 1,
                                        index_t q_heads = 4, index_t kv_heads = 2) {
  return attention_problem(random, {.q_len = rows, .kv_len = kv_len, .q_heads = q_heads,
                                    .kv_heads = kv_heads, .head_dim = 16, .v_dim = 8});
}

/// A whole prompt; the larger the queries, the fewer keys a row looks at.
inline attention_problem prompt(random_source& random, index_t len, index_t q_heads = 4,
                                index_t kv_heads = 2, double deviation = 1.5) {
  attention_problem p = decode_problem(random, len, len, q_heads, kv_heads);
  p.q.fill_normal(random, deviation);
  return p;
}

/// A prompt, or a chunk of one behind any number of keys.
inline attention_problem prompt_or_chunk(random_source& random, index_t len, index_t q_heads,
                                         index_t kv_heads, double deviation = 1.5) {
  const index_t before =
      random.pick<index_t>({0, 64, random.integer(1, 64), random.integer(65, 300)});
  attention_problem p = decode_problem(random, before + len, len, q_heads, kv_heads);
  p.q.fill_normal(random, deviation);
  return p;
}

/// Some rows of a problem over its first keys, the positions as they were.
inline attention_problem part_of(const attention_problem& p, index_t row, index_t rows,
                                 index_t keys) {
  attention_problem part = p;
  const auto first_rows = [](const owned_tensor& x, index_t first, index_t count) {
    const auto from = x.view();
    owned_tensor copy(count, from.heads, from.dim);
    for (index_t t = 0; t < count; ++t) {
      for (index_t h = 0; h < from.heads; ++h) {
        std::copy_n(x.row(first + t, h), from.dim, copy.row(t, h));
      }
    }
    return copy;
  };
  part.shape.q_len = rows;
  part.shape.kv_len = keys;
  part.shape.q_offset += static_cast<token_t>(row);
  part.q = first_rows(p.q, row, rows);
  part.k = first_rows(p.k, 0, keys);
  part.v = first_rows(p.v, 0, keys);
  return part;
}

inline sattn::method_inputs inputs(const attention_problem& p,
                                   std::span<const sattn::page_summaries> summaries = {}) {
  sattn::method_inputs in{p.shape, p.q.view(), p.k.view()};
  in.summaries = summaries;
  return in;
}

inline std::vector<sattn::page_summaries> summaries_of(const attention_problem& p,
                                                       token_t page_size) {
  std::vector<sattn::page_summaries> all(
      at(p.shape.kv_heads),
      sattn::page_summaries({p.k.view().dim, page_size, sattn::dtype::f32}));
  for (index_t h = 0; h < p.shape.kv_heads; ++h) all[at(h)].update(p.k.view(), h);
  return all;
}

template <sattn::attention_method M>
sattn::attention_plan prefill_plan(sattn::context& ctx, const attention_problem& p, const M& method,
                                   const sattn::plan_options& options = {}) {
  return plan_prefill(ctx, p.q.view(), p.kv(), method, {.plan = options}).plan;
}
template <sattn::attention_method M>
sattn::attention_plan decode_plan(sattn::context& ctx, const attention_problem& p, const M& method,
                                  std::span<const sattn::page_summaries> summaries = {},
                                  index_t layer = sattn::method_inputs::no_layer) {
  return plan_decode(ctx, p.q.view(), p.kv(), method, {.layer = layer, .summaries = summaries})
      .plan;
}

/// What every query head attends to.
inline std::vector<std::vector<std::uint8_t>> masks_of(const sattn::attention_plan& plan) {
  std::vector<std::vector<std::uint8_t>> masks;
  for (index_t h = 0; h < plan.shape().q_heads; ++h) masks.push_back(expand(plan, h));
  return masks;
}

/// Whether each row attends to exactly the keys, up to its position, of the units of `width` keys
/// that `choice_of(head, row)` has chosen, where rounding could not make it another; counts such
/// rows.
template <class F>
::testing::AssertionResult selects_choices(const sattn::attention_plan& plan, index_t width,
                                           int& clear, F&& choice_of) {
  const sattn::attention_shape& shape = plan.shape();
  for (index_t head = 0; head < shape.q_heads; ++head) {
    const std::vector<std::uint8_t> mask = expand(plan, head);
    for (index_t row = 0; row < shape.q_len; ++row) {
      const formulas::choice& want = choice_of(head, row);
      if (want.gap < 0) continue;
      ++clear;
      for (index_t key = 0; key < shape.kv_len; ++key) {
        const bool wanted = key <= shape.q_offset + row && want.chosen.contains(key / width);
        if ((mask[at(row * shape.kv_len + key)] != 0) == wanted) continue;
        return ::testing::AssertionFailure() << "head " << head << ", row " << row
                                             << (wanted ? " lacks" : " has") << " key " << key;
      }
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace test_support
