// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "layer.hpp"

#include <sattn/attention/plan.hpp>
#include <sattn/estimate/last_queries.hpp>
#include <sattn/estimate/pooled_blocks.hpp>
#include <sattn/estimate/row_scores.hpp>

#include <functional>
#include <set>
#include <string>
#include <vector>

namespace demo {

using sattn::any_pattern;
using sattn::budget;
using sattn::context;
using sattn::token_t;

/// One line of the table: a sparse pattern at one budget.
struct method {
  std::string pattern;
  std::string budget;
  // Looks at q and k where the pattern needs that, and says what to keep.
  std::function<any_pattern(context&, const layer&)> estimate;
  sattn::plan_options options = {};
  bool pictured = false;  // stands for its pattern in the picture of masks
};

inline constexpr const char* budget_legend =
    "w: window behind 4 sink keys; b: key blocks of 64 per 64 rows; v, s: columns and diagonals; "
    "k: keys per row";

inline constexpr token_t sink_keys = 4;
inline constexpr token_t local_distances = 16;
// Every query head chooses for itself: the same density recalls more than a choice per kv head.
inline constexpr sattn::logit_rules own_heads{.reduce = sattn::head_reduce::none};

inline method window(token_t size) {
  return {"sink-window", "w=" + std::to_string(size), [=](context&, const layer&) {
            return any_pattern(sattn::sink{sink_keys} | sattn::sliding_window{size});
          }};
}

inline method block_top_k(index_t blocks) {
  const sattn::selection rule{budget::fixed(blocks), {.first = 1, .diagonal = true}};
  return {"block-top-k", "b=" + std::to_string(blocks), [=](context& ctx, const layer& l) {
            const sattn::score_tensor scores = sattn::pooled_block_scores(
                ctx, l.shape(), l.q.view(), l.k.view(), {.rules = own_heads});
            return any_pattern(sattn::select_blocks(l.shape(), scores, rule));
          }};
}

inline method vertical_slash(index_t columns, index_t distances, sattn::rounding rounding) {
  const sattn::selection column_rule{budget::fixed(columns), {.first = sink_keys}};
  const sattn::selection distance_rule{budget::fixed(distances), {.first = local_distances}};
  return {rounding == sattn::rounding::exact ? "vertical-slash" : "vertical-slash-cover",
          "v=" + std::to_string(columns) + " s=" + std::to_string(distances),
          [=](context& ctx, const layer& l) {
            const sattn::last_query_sums sums =
                sattn::last_query_scores(ctx, l.shape(), l.q.view(), l.k.view(), 64, own_heads);
            return any_pattern(sattn::select_vertical_slash(sums, column_rule, distance_rule));
          },
          {.rounding = rounding}};
}

inline method token_top_k(index_t keys) {
  return {"token-top-k", "k=" + std::to_string(keys), [=](context& ctx, const layer& l) {
            return any_pattern(sattn::select_tokens(ctx, l.shape(), l.q.view(), l.k.view(),
                                                    {budget::fixed(keys)}, own_heads));
          }};
}

/// Every pattern at every budget, one pattern after the other. Dense attention comes first.
inline std::vector<method> all_methods() {
  using enum sattn::rounding;
  std::vector<method> methods = {
      {"dense", "all", [](context&, const layer&) { return any_pattern(sattn::dense{}); }},
      window(128),
      window(256),
      window(512),
      window(1024),
      window(2048),
      block_top_k(4),
      block_top_k(8),
      block_top_k(16),
      block_top_k(32)};
  for (const sattn::rounding rounding : {exact, cover}) {
    methods.push_back(vertical_slash(64, 64, rounding));
    methods.push_back(vertical_slash(512, 64, rounding));
    methods.push_back(vertical_slash(512, 128, rounding));
    methods.push_back(vertical_slash(1024, 256, rounding));
  }
  for (const index_t keys : {32, 64, 128, 256, 512, 1024}) methods.push_back(token_top_k(keys));
  for (method& m : methods) {
    m.pictured = m.budget == "w=512" || m.budget == "b=8" || m.budget == "v=512 s=128" ||
                 m.budget == "k=256";
  }
  return methods;
}

inline std::set<std::string> pattern_names(const std::vector<method>& methods) {
  std::set<std::string> names;
  for (const method& m : methods) names.insert(m.pattern);
  return names;
}

}  // namespace demo
