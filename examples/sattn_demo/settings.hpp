// SPDX-License-Identifier: Apache-2.0
//
// What some methods need besides tensors: the layer's place in its model, and a setting for each
// head, from the files of MInference and DuoAttention or made up.
#pragma once

#include "layer.hpp"

#include <sattn/interop/minference_json.hpp>
#include <sattn/method/duo.hpp>

#include <algorithm>
#include <charconv>
#include <exception>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

namespace demo {

/// Layers of a model that nobody told the number of: as many as that of the data in the repository.
inline constexpr index_t usual_layers = 30;
/// Share of all heads that stream by DuoAttention's gates, as its authors set it.
inline constexpr double duo_sparsity = 0.5;

/// Where settings come from; what is empty is looked up in the metadata of the queries' file
/// ("layer", "layers") or made up.
struct setting_sources {
  std::optional<index_t> layer;   // counted from 0
  std::optional<index_t> layers;
  std::string minference;         // a JSON file
  std::string duo;                // a TSV file
};

struct settings {
  index_t layer;
  index_t layers;
  sattn::minference_heads minference;
  sattn::duo duo;
};

namespace detail {

inline std::optional<index_t> number_in(const tensor& t, const char* key) {
  const auto found = t.metadata.find(key);
  if (found == t.metadata.end()) return std::nullopt;
  const std::string& text = found->second;
  index_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || number < 0) return std::nullopt;
  return number;
}

// Every third head streams, the others are vertical-slash with many columns or many distances.
inline sattn::minference_heads made_up_minference(index_t q_heads) {
  using enum sattn::minference_head::kind;
  sattn::minference_heads made;
  for (index_t h = 0; h < q_heads; ++h) {
    if (h % 3 == 0) made.heads.push_back({vertical_slash, 512, 128});
    if (h % 3 == 1) made.heads.push_back({vertical_slash, 128, 512});
    if (h % 3 == 2) made.heads.push_back({streaming, 128, 512});
  }
  return made;
}

inline sattn::duo made_up_duo(index_t kv_heads) {
  sattn::duo made;
  for (index_t h = 0; h < kv_heads; ++h) made.retrieves.push_back(h % 2 == 1);
  return made;
}

inline sattn::minference_heads read_minference_file(const std::string& path, index_t layer,
                                                    index_t q_heads) {
  const std::vector<sattn::minference_heads> layers =
      sattn::read_minference(nlohmann::json::parse(read_file(path)), q_heads);
  check(layer < std::ssize(layers), "layer ", layer, " of ", layers.size());
  return layers[static_cast<std::size_t>(layer)];
}

inline sattn::duo read_duo_file(const std::string& path, index_t layer, index_t kv_heads) {
  const sattn::duo_gates gates = sattn::read_duo_gates(read_file(path));
  const sattn::duo made = sattn::duo_layer(gates, layer, duo_sparsity);
  check(std::ssize(made.retrieves) == kv_heads, made.retrieves.size(), " heads, the layer has ",
        kv_heads, " kv heads");
  return made;
}

}  // namespace detail

/// The settings for one layer.
/// Throws: std::runtime_error if a file is at fault or does not fit the layer, if it is not known
/// which of a file's layers this is, or if the model has no such layer.
inline settings make_settings(const setting_sources& sources, const layer& l) {
  const auto first_of = [](std::optional<index_t> a, std::optional<index_t> b) {
    return a ? a : b;
  };
  const std::optional<index_t> place = first_of(sources.layer, detail::number_in(l.q, "layer"));
  const std::optional<index_t> count = first_of(sources.layers, detail::number_in(l.q, "layers"));
  const index_t layers = count.value_or(std::max(usual_layers, place.value_or(0) + 1));
  settings s{place.value_or(layers / 2), layers, {}, {}};
  detail::check(s.layer < s.layers, l.name, ": layer ", s.layer, " of ", s.layers,
                ", counted from 0");
  const auto of_file = [&](const std::string& path, auto read, index_t heads) {
    try {
      detail::check(place.has_value(), "which of its layers is it? give --layer");
      return read(path, s.layer, heads);
    } catch (const std::exception& e) {
      throw std::runtime_error(path + ": " + e.what());
    }
  };
  s.minference =
      sources.minference.empty()
          ? detail::made_up_minference(l.q.heads)
          : of_file(sources.minference, detail::read_minference_file, l.q.heads);
  s.duo = sources.duo.empty() ? detail::made_up_duo(l.k.heads)
                              : of_file(sources.duo, detail::read_duo_file, l.k.heads);
  return s;
}

/// What the budget column says about settings of heads.
inline std::string origin(const std::string& file) {
  return file.empty() ? "made up" : std::filesystem::path(file).filename().string();
}

}  // namespace demo
