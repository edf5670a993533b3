// SPDX-License-Identifier: Apache-2.0
//
// All lines of the demo's tables.
#pragma once

#include "cache_methods.hpp"
#include "decode_methods.hpp"
#include "prefill_methods.hpp"

#include <numeric>
#include <set>
#include <string>
#include <vector>

namespace demo {

inline constexpr const char* budget_legend =
    "w: window behind 4 sink keys; v, s: columns and diagonals; b: blocks a row of blocks;\n"
    "p: share of the estimated attention; k: keys per row, or that a head keeps (pyramid,\n"
    "by_layer: mean over the layers); made up: settings of heads without a file (--minference, "
    "--duo)";

/// Every method at several budgets; in each phase dense attention comes first.
inline std::vector<method> all_methods(const setting_sources& sources) {
  const auto dense = [](context&, const sight&) { return any_pattern(sattn::dense{}); };
  const auto keep_all = [](context&, const sight& seen) {
    std::vector<token_t> list(static_cast<std::size_t>(seen.inputs.shape.kv_len));
    std::iota(list.begin(), list.end(), 0);
    return sattn::keep_lists(static_cast<std::size_t>(seen.inputs.shape.kv_heads), list);
  };
  std::vector<method> all = {{.when = phase::prefill, .name = "dense", .budget = "all",
                              .choose = dense}};
  const auto append = [&](const std::vector<method>& more) {
    all.insert(all.end(), more.begin(), more.end());
  };
  append(prefill_methods(sources));
  append({{.when = phase::decode, .name = "dense", .budget = "all", .choose = dense}});
  append(decode_methods(sources));
  append({{.when = phase::cache, .name = "dense", .budget = "all", .choose_kept = keep_all,
           .needs_prompt = true}});
  append(cache_methods());
  return all;
}

inline std::set<std::string> method_names(const std::vector<method>& methods) {
  std::set<std::string> names;
  for (const method& m : methods) names.insert(m.name);
  return names;
}

}  // namespace demo
