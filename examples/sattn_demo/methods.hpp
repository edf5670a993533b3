// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "layer.hpp"

#include <sattn/attention/plan.hpp>
#include <sattn/pattern/compose.hpp>

#include <functional>
#include <string>
#include <vector>

namespace demo {

/// One line of the table: a sparse pattern at one budget.
struct method {
  std::string pattern;
  std::string budget;
  // Looks at q and k where the pattern needs that, and says what to keep.
  std::function<sattn::any_pattern(sattn::context&, const layer&)> estimate;
  sattn::plan_options options = {};
  bool pictured = false;  // stands for its pattern in the picture of masks
};

const std::vector<std::string>& pattern_names();

/// Every pattern at every budget; the baseline, dense, is not among them.
std::vector<method> all_methods();

/// What the letters of the budgets mean.
extern const char* const budget_legend;

}  // namespace demo
