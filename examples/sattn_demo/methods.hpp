// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "layer.hpp"

#include <sattn/method/a_shape.hpp>
#include <sattn/method/block_sparse.hpp>
#include <sattn/method/eviction.hpp>
#include <sattn/method/flexprefill.hpp>
#include <sattn/method/quest.hpp>
#include <sattn/method/snapkv.hpp>
#include <sattn/method/top_k.hpp>
#include <sattn/method/vertical_slash.hpp>

#include <array>
#include <functional>
#include <numeric>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace demo {

using sattn::any_pattern;
using sattn::context;
using sattn::token_t;

/// When a method chooses: for a whole prompt, for each token that follows, or once behind the
/// prompt, what its cache keeps.
enum class phase { prefill, decode, cache };

inline constexpr std::array<const char*, 3> phase_names = {"prefill", "decode", "cache"};

/// What a method looks at.
struct sight {
  sattn::method_inputs inputs;
  sattn::stored_view copy = {};  // of the keys, in int8; for decoding
  const sattn::attention_history* history = nullptr;  // of the prompt; for caches
};

/// One line of a table: a method at one budget.
struct method {
  phase when;
  std::string name;
  std::string budget;
  std::function<any_pattern(context&, const sight&)> choose = {};
  std::function<sattn::keep_lists(context&, const sight&)> choose_kept = {};  // of a cache
  sattn::plan_options options = {};
  bool pictured = false;  // in the picture of masks
};

inline constexpr const char* budget_legend =
    "w: window behind 4 sink keys; v, s: columns and diagonals; b: blocks a row of blocks; "
    "p: share of\nthe estimated attention; k: keys per row, or that a head keeps";

inline std::vector<method> prefill_methods() {
  std::vector<method> all;
  using enum sattn::rounding;
  const auto add = [&](const char* name, std::string budget, auto chosen, bool pictured = false,
                       sattn::rounding rounding = exact) {
    const auto choose = [=](context& ctx, const sight& seen) {
      return any_pattern(chosen.choose(ctx, seen.inputs));
    };
    all.push_back({phase::prefill, name, std::move(budget), choose, {}, {.rounding = rounding},
                   pictured});
  };
  const auto number = [](const char* what, auto value) {
    std::ostringstream text;
    text << what << '=' << value;
    return text.str();
  };
  for (const token_t w : {128, 256, 512, 1024, 2048}) {
    add("a_shape", number("w", w), sattn::a_shape{4, w}, w == 512);
  }
  for (const token_t w : {256, 1024}) {
    add("tri_shape", number("w", w), sattn::tri_shape{4, w});
  }
  struct columns_and_distances {
    token_t v, s;
  };
  for (const auto& [v, s] : {columns_and_distances{64, 64}, {512, 64}, {512, 128}, {1024, 256}}) {
    add("sf_vertical_slash", number("v", v) + number(" s", s), sattn::sf_vertical_slash(v, s),
        v == 512 && s == 128);
  }
  for (const auto& [v, s] : {columns_and_distances{64, 128}, {512, 128}, {1024, 256}}) {
    add("minference (cover)", number("v", v) + number(" s", s), sattn::minference(v, s), false,
        cover);
  }
  for (const double p : {0.65, 0.8, 0.9}) {
    add("sf_flexprefill", number("p", p), sattn::sf_flexprefill(p, 512, 64));
  }
  for (const double p : {0.65, 0.8, 0.9}) {
    add("flexprefill", number("p", p), sattn::flexprefill{.coverage = p, .min_budget = 128});
  }
  for (const double p : {0.65, 0.8, 0.9}) {
    add("xattention", number("p", p), sattn::xattention{16, p, 64});
  }
  for (const index_t b : {16, 32, 64, 128}) {
    add("sf_block_sparse", number("b", b), sattn::sf_block_sparse(16, b));
  }
  for (const index_t b : {4, 8, 16, 32}) {
    add("minference_block", number("b", b), sattn::minference_block(b), b == 8);
  }
  for (const index_t k : {64, 256, 1024}) add("top_k", number("k", k), sattn::top_k(k), k == 256);
  return all;
}

inline std::vector<method> decode_methods() {
  std::vector<method> all;
  const auto add = [&](const char* name, auto made_for) {
    for (const index_t k : {128, 256, 512, 1024}) {
      all.push_back({phase::decode, name, "k=" + std::to_string(k),
                     [=](context& ctx, const sight& seen) {
                       return any_pattern(made_for(k, seen.copy).choose(ctx, seen.inputs));
                     }});
    }
  };
  using copy = sattn::stored_view;
  add("streaming",
      [](index_t k, const copy&) { return sattn::streaming(4, static_cast<token_t>(k - 4)); });
  add("quest", [](index_t k, const copy&) { return sattn::quest(k); });
  add("sf_quest", [](index_t k, const copy&) { return sattn::sf_quest(k); });
  add("twilight of sf_quest", [](index_t k, const copy& keys) {
    return sattn::twilight(sattn::sf_quest(k), 0.85, keys);
  });
  add("shadow_top_k", [](index_t k, const copy& keys) { return sattn::shadow_top_k(k, keys); });
  add("top_k", [](index_t k, const copy&) { return sattn::top_k(k); });
  return all;
}

inline std::vector<method> cache_methods() {
  std::vector<method> all;
  const auto add = [&](const char* name, auto kept) {
    for (const index_t k : {256, 512, 1024}) {
      all.push_back({phase::cache, name, "k=" + std::to_string(k), {},
                     [=](context& ctx, const sight& seen) { return kept(ctx, seen, k); }});
    }
  };
  const auto add_made = [&](const char* name, auto make) {
    add(name, [=](context& ctx, const sight& seen, index_t k) {
      return make(k).choose_kept(ctx, seen.inputs);
    });
  };
  add_made("snapkv", [](index_t k) { return sattn::snapkv(k); });
  add_made("sf_snapkv", [](index_t k) { return sattn::sf_snapkv(k); });
  add_made("ada_snapkv", [](index_t k) { return sattn::ada_snapkv(k); });
  add_made("sf_ada_snapkv", [](index_t k) { return sattn::sf_ada_snapkv(k); });
  add("pyramid (20 of 30)", [](context& ctx, const sight& seen, index_t k) {
    return sattn::pyramid(20, 30, seen.inputs.shape.kv_len, k).choose_kept(ctx, seen.inputs);
  });
  add_made("tova", [](index_t k) { return sattn::tova{k}; });
  add("h2o", [](context&, const sight& seen, index_t k) {
    return sattn::h2o{k / 2, k / 2}.choose_kept(*seen.history);
  });
  return all;
}

/// Every method at several budgets; in each phase dense attention comes first.
inline std::vector<method> all_methods() {
  const auto dense = [](context&, const sight&) { return any_pattern(sattn::dense{}); };
  const auto keep_all = [](context&, const sight& seen) {
    std::vector<token_t> list(static_cast<std::size_t>(seen.inputs.shape.kv_len));
    std::iota(list.begin(), list.end(), 0);
    return sattn::keep_lists(static_cast<std::size_t>(seen.inputs.shape.kv_heads), list);
  };
  std::vector<method> all = {{phase::prefill, "dense", "all", dense}};
  const auto append = [&](const std::vector<method>& more) {
    all.insert(all.end(), more.begin(), more.end());
  };
  append(prefill_methods());
  append({{phase::decode, "dense", "all", dense}});
  append(decode_methods());
  append({{phase::cache, "dense", "all", {}, keep_all}});
  append(cache_methods());
  return all;
}

inline std::set<std::string> method_names(const std::vector<method>& methods) {
  std::set<std::string> names;
  for (const method& m : methods) names.insert(m.name);
  return names;
}

}  // namespace demo
