// SPDX-License-Identifier: Apache-2.0
#include "methods.hpp"

#include <sattn/budget/budget.hpp>
#include <sattn/estimate/last_queries.hpp>
#include <sattn/estimate/pooled_blocks.hpp>
#include <sattn/estimate/row_scores.hpp>
#include <sattn/pattern/basic.hpp>

namespace demo {

namespace {

using sattn::any_pattern;
using sattn::budget;
using sattn::context;
using sattn::token_t;

constexpr token_t sink_keys = 4;
constexpr token_t local_distances = 16;
// Every query head chooses for itself.
constexpr sattn::logit_rules own_heads{.reduce = sattn::head_reduce::none};

method window(token_t size) {
  return {"sink-window", "w=" + std::to_string(size), [=](context&, const layer&) {
            return any_pattern(sattn::sink{sink_keys} | sattn::sliding_window{size});
          }};
}

method block_top_k(index_t blocks) {
  const sattn::selection rule{budget::fixed(blocks), {.first = 1, .diagonal = true}};
  return {"block-top-k", "b=" + std::to_string(blocks), [=](context& ctx, const layer& l) {
            const sattn::score_tensor scores = sattn::pooled_block_scores(
                ctx, l.shape(), l.q.view(), l.k.view(), {.rules = own_heads});
            return any_pattern(sattn::select_blocks(l.shape(), scores, rule));
          }};
}

method vertical_slash(index_t columns, index_t distances, sattn::rounding rounding) {
  const sattn::selection column_rule{budget::fixed(columns), {.first = sink_keys}};
  const sattn::selection distance_rule{budget::fixed(distances), {.first = local_distances}};
  return {rounding == sattn::rounding::exact ? "vertical-slash" : "vertical-slash-cover",
          "v=" + std::to_string(columns) + " s=" + std::to_string(distances),
          [=](context& ctx, const layer& l) {
            const sattn::last_query_sums sums = sattn::last_query_scores(
                ctx, l.shape(), l.q.view(), l.k.view(), 64, own_heads);
            return any_pattern(sattn::select_vertical_slash(sums, column_rule, distance_rule));
          },
          {.rounding = rounding}};
}

method token_top_k(index_t keys) {
  return {"token-top-k", "k=" + std::to_string(keys), [=](context& ctx, const layer& l) {
            return any_pattern(sattn::select_tokens(ctx, l.shape(), l.q.view(), l.k.view(),
                                                    {budget::fixed(keys)}, own_heads));
          }};
}

}  // namespace

const std::vector<std::string>& pattern_names() {
  static const std::vector<std::string> names = {"sink-window", "block-top-k", "vertical-slash",
                                                 "vertical-slash-cover", "token-top-k"};
  return names;
}

std::vector<method> all_methods() {
  using enum sattn::rounding;
  std::vector<method> methods;
  // The middle budget of each pattern is the one in the picture.
  const auto add = [&](std::vector<method> budgets) {
    budgets[budgets.size() / 2].pictured = true;
    methods.insert(methods.end(), budgets.begin(), budgets.end());
  };
  add({window(128), window(256), window(512), window(1024), window(2048)});
  add({block_top_k(4), block_top_k(8), block_top_k(16), block_top_k(32)});
  for (const sattn::rounding rounding : {exact, cover}) {
    add({vertical_slash(64, 64, rounding), vertical_slash(128, 128, rounding),
         vertical_slash(256, 256, rounding), vertical_slash(512, 512, rounding)});
  }
  add({token_top_k(32), token_top_k(64), token_top_k(128), token_top_k(256), token_top_k(512),
       token_top_k(1024)});
  return methods;
}

const char* const budget_legend =
    "w: window behind 4 sink keys; b: key blocks of 64 per 64 rows; v, s: columns and diagonals; "
    "k: keys per row";

}  // namespace demo
