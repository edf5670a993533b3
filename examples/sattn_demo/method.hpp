// SPDX-License-Identifier: Apache-2.0
//
// One line of the demo's tables: a method at a budget, and what it looks at.
#pragma once

#include "settings.hpp"

#include <sattn/method/eviction.hpp>
#include <sattn/method/method.hpp>

#include <array>
#include <functional>
#include <sstream>
#include <string>

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
  sattn::method_inputs inputs;  // of the prompt, or of a step
  const settings& model;
  sattn::stored_view copy = {};                       // of the keys, in int8; for decoding
  const sattn::attention_history* history = nullptr;  // of the prompt; for caches
  index_t step = 0;                                   // since the prompt; for decoding
};

struct method {
  phase when;
  std::string name;    // that of its preset
  std::string budget;
  std::function<any_pattern(context&, const sight&)> choose = {};             // but for caches
  std::function<sattn::keep_lists(context&, const sight&)> choose_kept = {};  // of a cache
  // What it does behind the prompt, before the first step of each run. Not in its times.
  std::function<void(context&, const sight&)> begin = {};
  sattn::plan_options options = {};
  bool pictured = false;      // in the picture of masks
  bool needs_copy = false;    // looks at the int8 copy
  bool needs_prompt = false;  // looks at queries of the prompt behind which it chooses
};

/// "w=512"
template <class T>
std::string number(const char* what, T value) {
  std::ostringstream text;
  text << what << '=' << value;
  return text.str();
}

}  // namespace demo
