// SPDX-License-Identifier: Apache-2.0
//
// The methods that choose for a whole prompt.
#pragma once

#include "method.hpp"

#include <sattn/method/a_shape.hpp>
#include <sattn/method/block_sparse.hpp>
#include <sattn/method/flexprefill.hpp>
#include <sattn/method/top_k.hpp>
#include <sattn/method/vertical_slash.hpp>

#include <string>
#include <utility>
#include <vector>

namespace demo {

namespace detail {

/// Blocks by scores from elsewhere. Here the means of blocks stand in for a learned gate; the first
/// block and the row's own are protected.
inline any_pattern choose_scored_blocks(context& ctx, const sattn::method_inputs& in,
                                        index_t blocks) {
  const sattn::score_tensor gate = sattn::pooled_block_scores(
      ctx, in.shape, in.q, in.k, {.rules = in.rules(sattn::head_reduce::none)});
  const sattn::selection best{sattn::budget::fixed(blocks), {.first = 1, .diagonal = true}};
  return sattn::scored_blocks{gate, best}.choose(ctx, in);
}

}  // namespace detail

/// Each at several budgets. `sources` names the files that budgets mention.
inline std::vector<method> prefill_methods(const setting_sources& sources) {
  std::vector<method> all;
  const auto add_choice = [&](const char* name, std::string budget, auto choose) -> method& {
    all.push_back({.when = phase::prefill, .name = name, .budget = std::move(budget),
                   .choose = choose});
    return all.back();
  };
  const auto add = [&](const char* name, std::string budget, auto chosen) -> method& {
    return add_choice(name, std::move(budget), [=](context& ctx, const sight& seen) {
      return any_pattern(chosen.choose(ctx, seen.inputs));
    });
  };
  for (const token_t w : {128, 256, 512, 1024, 2048}) {
    add("a_shape", number("w", w), sattn::a_shape{4, w}).pictured = w == 512;
  }
  for (const token_t w : {256, 1024}) {
    add("tri_shape", number("w", w), sattn::tri_shape{4, w});
  }
  struct columns_and_distances {
    token_t v, s;
    std::string text() const { return number("v", v) + number(" s", s); }
  };
  for (const columns_and_distances& b : {columns_and_distances{64, 64}, {512, 64}, {512, 128},
                                         {1024, 256}}) {
    add("sf_vertical_slash", b.text(), sattn::sf_vertical_slash(b.v, b.s)).pictured = b.s == 128;
  }
  for (const columns_and_distances& b : {columns_and_distances{64, 128}, {512, 128},
                                         {1024, 256}}) {
    add("minference", b.text() + " cover", sattn::minference(b.v, b.s)).options.rounding =
        sattn::rounding::cover;
  }
  add_choice("minference_heads", origin(sources.minference), [](context& ctx, const sight& seen) {
    return any_pattern(seen.model.minference.choose(ctx, seen.inputs));
  }).options.rounding = sattn::rounding::cover;
  for (const double p : {0.65, 0.8, 0.9}) {
    add("sf_flexprefill", number("p", p), sattn::sf_flexprefill(p, 512, 64));
  }
  for (const double p : {0.65, 0.8, 0.9}) {
    add("flexprefill", number("p", p), sattn::flexprefill(p, 0.1, 128));
  }
  for (const double p : {0.65, 0.8, 0.9}) {
    add("xattention", number("p", p), sattn::xattention{16, p, 64});
  }
  for (const index_t b : {16, 32, 64, 128}) {
    add("sf_block_sparse", number("b", b), sattn::sf_block_sparse(16, b));
  }
  for (const index_t b : {4, 8, 16, 32}) {
    add("minference_block", number("b", b), sattn::minference_block(b)).pictured = b == 8;
  }
  for (const index_t b : {4, 8, 16}) {
    add_choice("scored_blocks", number("b", b), [b](context& ctx, const sight& seen) {
      return detail::choose_scored_blocks(ctx, seen.inputs, b);
    });
  }
  add_choice("duo", origin(sources.duo), [](context& ctx, const sight& seen) {
    return any_pattern(seen.model.duo.choose(ctx, seen.inputs));
  });
  for (const index_t k : {64, 256, 1024}) {
    add("top_k", number("k", k), sattn::top_k(k)).pictured = k == 256;
  }
  add("twilight", "p=0.85", sattn::twilight(0.85));
  return all;
}

}  // namespace demo
