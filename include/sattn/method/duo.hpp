// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/budget/budget.hpp>
#include <sattn/method/method.hpp>
#include <sattn/pattern/basic.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>
#include <string_view>
#include <system_error>
#include <vector>

namespace sattn {

/// Heads that retrieve see everything, the others stream: first keys and last ones. The pattern
/// file of Llama 3.1 comes with 128 and 256 of them.
/// Source: DuoAttention (arXiv:2410.10819).
struct duo {
  std::vector<bool> retrieves;  // [kv_heads]
  token_t sinks = 64;
  token_t window = 256;  // the row's own position counts

  /// Throws: shape_error unless there is an entry for each kv head.
  per_head choose(context&, const method_inputs& in) const {
    require(std::ssize(retrieves) == in.shape.kv_heads, "duo: ", retrieves.size(),
            " heads, the attention has ", in.shape.kv_heads, " kv heads");
    per_head heads;
    for (const bool all : retrieves) {
      if (all) {
        heads.patterns.emplace_back(dense{});
      } else {
        heads.patterns.emplace_back(sink{sinks} | sliding_window{window});
      }
    }
    return heads;
  }
};

/// How much each head of each layer retrieves, [layers][kv_heads].
using duo_gates = std::vector<std::vector<double>>;

/// Reads DuoAttention's full_attention_heads.tsv: a line for each layer, numbers between blanks.
/// Throws: shape_error where that is something else, or lines differ in length.
inline duo_gates read_duo_gates(std::string_view text) {
  duo_gates gates;
  index_t line = 1;
  gates.emplace_back();
  for (std::size_t at = 0; at < text.size();) {
    const char c = text[at];
    if (c == '\n') {
      if (!gates.back().empty()) gates.emplace_back();
      ++line;
    }
    if (c == '\n' || c == ' ' || c == '\t' || c == '\r') {
      ++at;
      continue;
    }
    double gate = 0.0;
    const auto [end, error] =
        std::from_chars(text.data() + at, text.data() + text.size(), gate);
    require(error == std::errc() && std::isfinite(gate), "read_duo_gates: no number in line ",
            line);
    gates.back().push_back(gate);
    at = static_cast<std::size_t>(end - text.data());
  }
  if (gates.back().empty()) gates.pop_back();
  for (const std::vector<double>& layer : gates) {
    require(layer.size() == gates.front().size(), "read_duo_gates: layers of ",
            gates.front().size(), " and of ", layer.size(), " heads");
  }
  return gates;
}

/// The heads of one layer when a share of all heads of all layers is to stream: those whose gate is
/// at least the quantile of all gates there. Of equal gates the earlier heads retrieve, where the
/// original decides by noise.
/// Throws: shape_error unless sparsity is in [0, 1] and the layer exists.
inline duo duo_layer(const duo_gates& gates, index_t layer, double sparsity, token_t sinks = 64,
                     token_t window = 256) {
  require(sparsity >= 0.0 && sparsity <= 1.0, "duo_layer: sparsity ", sparsity,
          " is outside [0, 1]");
  require(layer >= 0 && layer < std::ssize(gates), "duo_layer: layer ", layer, " of ",
          gates.size());
  std::vector<double> all;
  for (const std::vector<double>& of_layer : gates) {
    all.insert(all.end(), of_layer.begin(), of_layer.end());
  }
  const index_t heads = std::ssize(gates[static_cast<std::size_t>(layer)]);
  std::vector<index_t> order(all.size());
  std::iota(order.begin(), order.end(), index_t{0});
  std::sort(order.begin(), order.end(), [&](index_t a, index_t b) {
    const double gate_a = all[static_cast<std::size_t>(a)];
    const double gate_b = all[static_cast<std::size_t>(b)];
    return gate_a != gate_b ? gate_a > gate_b : a < b;
  });
  // The quantile lies at place sparsity * (n - 1) of the ascending gates; at 1 all heads stream.
  const auto streaming = static_cast<index_t>(
      detail::share_up(sparsity, static_cast<double>(std::ssize(all) - 1)));
  const index_t kept = sparsity == 1.0 ? 0 : std::ssize(all) - streaming;
  duo result{std::vector<bool>(static_cast<std::size_t>(heads), false), sinks, window};
  for (index_t i = 0; i < kept; ++i) {
    const index_t head = order[static_cast<std::size_t>(i)] - layer * heads;
    if (head >= 0 && head < heads) result.retrieves[static_cast<std::size_t>(head)] = true;
  }
  return result;
}

}  // namespace sattn
