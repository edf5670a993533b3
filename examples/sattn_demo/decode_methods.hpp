// SPDX-License-Identifier: Apache-2.0
//
// The methods that choose for each token behind a prompt.
#pragma once

#include "method.hpp"

#include <sattn/method/a_shape.hpp>
#include <sattn/method/compose.hpp>
#include <sattn/method/duo.hpp>
#include <sattn/method/quest.hpp>
#include <sattn/method/snapkv.hpp>
#include <sattn/method/top_k.hpp>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace demo {

namespace detail {

/// Keys by scores from elsewhere, the same for all heads. Here the mean probability of all heads by
/// the int8 copy stands in for a learned indexer.
inline any_pattern choose_scored_tokens(context& ctx, const sight& seen, index_t keys) {
  const sattn::method_inputs& in = seen.inputs;
  const auto rows = static_cast<token_t>(in.shape.q_len);
  const sattn::score_tensor of_heads = sattn::row_scores(
      ctx, in.shape, in.q, seen.copy, {0, rows}, in.rules(sattn::head_reduce::mean));
  sattn::score_tensor scores(1, of_heads.rows, of_heads.cols, 0.0f);
  const std::size_t size = scores.values.size();
  for (std::size_t i = 0; i < of_heads.values.size(); ++i) {
    scores.values[i % size] += of_heads.values[i];
  }
  return sattn::scored_tokens{scores, {sattn::budget::fixed(keys)}}.choose(ctx, in);
}

/// Quest among the pages of the keys that SnapKV keeps of the prompt.
inline method quest_within_snapkv(index_t keys, index_t preselected) {
  const auto pages = std::make_shared<sattn::preselected_pages>();
  method m{.when = phase::decode, .name = "quest",
           .budget = std::to_string(keys) + " in snapkv " + std::to_string(preselected),
           .needs_prompt = true};
  m.begin = [=](context& ctx, const sight& prompt) {
    *pages = sattn::pages_of(sattn::snapkv(preselected).choose_kept(ctx, prompt.inputs), 16,
                             prompt.inputs.shape.kv_len);
  };
  m.choose = [=](context& ctx, const sight& seen) {
    sattn::quest_method quest = sattn::quest(keys);
    quest.within = *pages;
    return quest.choose(ctx, seen.inputs);
  };
  return m;
}

/// Quest, whose choice serves several steps.
inline method reused_quest(index_t keys, index_t steps) {
  const auto choices =
      std::make_shared<sattn::reused<sattn::quest_method>>(sattn::sf_quest(keys), steps);
  method m{.when = phase::decode, .name = "reused",
           .budget = "sf_quest " + std::to_string(keys) + ", " + std::to_string(steps) + " steps"};
  m.begin = [=](context&, const sight&) { choices->forget(); };
  m.choose = [=](context& ctx, const sight& seen) {
    return choices->at(seen.step).choose(ctx, seen.inputs);
  };
  return m;
}

/// Quest with PyramidKV's budgets: the fewer keys the later the layer.
inline any_pattern choose_by_layer(context& ctx, const sight& seen, index_t keys) {
  const sattn::by_layer quest{[&](index_t layer) {
    return sattn::sf_quest(sattn::pyramid_capacity(layer, seen.model.layers,
                                                   seen.inputs.shape.kv_len, keys));
  }};
  return any_pattern(quest.choose(ctx, seen.inputs));
}

}  // namespace detail

/// Each at several budgets. `sources` names the files that budgets mention.
inline std::vector<method> decode_methods(const setting_sources& sources) {
  std::vector<method> all;
  const auto add_choice = [&](const char* name, std::string budget, auto choose) -> method& {
    all.push_back({.when = phase::decode, .name = name, .budget = std::move(budget),
                   .choose = choose});
    return all.back();
  };
  const auto add = [&](const char* name, std::string budget, auto chosen) {
    add_choice(name, std::move(budget), [=](context& ctx, const sight& seen) {
      return any_pattern(chosen.choose(ctx, seen.inputs));
    });
  };
  // made_for(copy) makes the method.
  const auto add_with_copy = [&](const char* name, std::string budget, auto made_for) {
    add_choice(name, std::move(budget), [=](context& ctx, const sight& seen) {
      return any_pattern(made_for(seen.copy).choose(ctx, seen.inputs));
    }).needs_copy = true;
  };
  using copy = sattn::stored_view;
  const std::vector<index_t> budgets = {128, 256, 512, 1024};
  for (const index_t k : budgets) {
    add("streaming", number("k", k), sattn::streaming(4, static_cast<token_t>(k - 4)));
  }
  add_choice("duo", origin(sources.duo), [](context& ctx, const sight& seen) {
    return any_pattern(seen.model.duo.choose(ctx, seen.inputs));
  });
  for (const index_t k : budgets) add("quest", number("k", k), sattn::quest(k));
  all.push_back(detail::quest_within_snapkv(512, 1024));
  for (const index_t k : budgets) add("sf_quest", number("k", k), sattn::sf_quest(k));
  add("sf_quest", "k=512 of each head", sattn::sf_quest(512, 16, false));
  all.push_back(detail::reused_quest(512, 4));
  add_choice("by_layer", "sf_quest k=512", [](context& ctx, const sight& seen) {
    return detail::choose_by_layer(ctx, seen, 512);
  });
  for (const double p : {0.85, 0.95}) {
    add_with_copy("twilight", number("p", p),
                  [p](const copy& keys) { return sattn::twilight(p, keys); });
  }
  for (const index_t k : budgets) {
    add_with_copy("twilight", "p=0.85, sf_quest " + std::to_string(k), [k](const copy& keys) {
      return sattn::twilight(sattn::sf_quest(k), 0.85, keys);
    });
  }
  for (const index_t k : budgets) {
    add_with_copy("shadow_top_k", number("k", k),
                  [k](const copy& keys) { return sattn::shadow_top_k(k, keys); });
  }
  for (const index_t k : {256, 512}) {
    add_choice("scored_tokens", number("k", k), [k](context& ctx, const sight& seen) {
      return detail::choose_scored_tokens(ctx, seen, k);
    }).needs_copy = true;
  }
  for (const index_t k : budgets) add("top_k", number("k", k), sattn::top_k(k));
  return all;
}

}  // namespace demo
