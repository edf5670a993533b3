// SPDX-License-Identifier: Apache-2.0
//
// The methods that choose, once behind a prompt, what its cache keeps.
#pragma once

#include "method.hpp"

#include <sattn/method/eviction.hpp>
#include <sattn/method/snapkv.hpp>

#include <vector>

namespace demo {

/// Each at several budgets.
inline std::vector<method> cache_methods() {
  std::vector<method> all;
  const auto add = [&](const char* name, auto kept) {
    for (const index_t k : {256, 512, 1024}) {
      all.push_back({.when = phase::cache, .name = name, .budget = number("k", k),
                     .choose_kept = [=](context& ctx, const sight& seen) {
                       return kept(ctx, seen, k);
                     },
                     .needs_prompt = true});
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
  add("pyramid", [](context& ctx, const sight& seen, index_t k) {
    const settings& model = seen.model;
    return sattn::pyramid(model.layer, model.layers, seen.inputs.shape.kv_len, k)
        .choose_kept(ctx, seen.inputs);
  });
  add_made("tova", [](index_t k) { return sattn::tova{k}; });
  add("h2o", [](context&, const sight& seen, index_t k) {
    return sattn::h2o{k / 2, k / 2}.choose_kept(*seen.history);
  });
  return all;
}

}  // namespace demo
