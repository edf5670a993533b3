// SPDX-License-Identifier: Apache-2.0
#pragma once

// Needs nlohmann-json, so that no umbrella includes it.

#include <sattn/core/error.hpp>
#include <sattn/method/vertical_slash.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

namespace sattn {

/// Reads a configuration of MInference: a list over layers of objects that give each query head
/// ["vertical_and_slash", columns, distances, score] or ["stream_llm", first keys, last keys,
/// score]. Heads that are not listed get MInference's default, 1000 columns and 6096 distances.
/// Throws: shape_error where it is something else; unsupported for other types of heads.
inline std::vector<minference_heads> read_minference(const nlohmann::json& layers,
                                                     index_t q_heads) {
  require(layers.is_array(), "read_minference: expected a list of layers");
  require(q_heads >= 0, "read_minference: ", q_heads, " query heads");
  std::vector<minference_heads> result;
  for (const nlohmann::json& layer : layers) {
    const std::size_t place = result.size();
    require(layer.is_object(), "read_minference: layer ", place, " is no object");
    minference_heads heads{std::vector<minference_head>(static_cast<std::size_t>(q_heads))};
    for (const auto& [name, setting] : layer.items()) {
      std::size_t head = heads.heads.size();
      if (!name.empty() && name.size() < 9 &&
          name.find_first_not_of("0123456789") == std::string::npos) {
        head = std::stoul(name);
      }
      require(head < heads.heads.size(), "read_minference: layer ", place, " has a head ", name,
              ", the attention ", q_heads);
      require(setting.is_array() && setting.size() >= 3 && setting[0].is_string() &&
                  setting[1].is_number_integer() && setting[2].is_number_integer(),
              "read_minference: layer ", place, ", head ", name,
              " is not [type, number, number, score]");
      const std::string type = setting[0].get<std::string>();
      require<unsupported>(type == "vertical_and_slash" || type == "stream_llm",
                           "read_minference: layer ", place, ", head ", name, " is of type ", type);
      const auto first = setting[1].get<std::int64_t>();
      const auto second = setting[2].get<std::int64_t>();
      constexpr std::int64_t most = std::numeric_limits<token_t>::max();
      require(first >= 0 && first <= most && second >= 0 && second <= most,
              "read_minference: layer ", place, ", head ", name, " asks for ", first, " and ",
              second);
      heads.heads[head] = {type == "stream_llm" ? minference_head::kind::streaming
                                                : minference_head::kind::vertical_slash,
                           static_cast<token_t>(first), static_cast<token_t>(second)};
    }
    result.push_back(std::move(heads));
  }
  return result;
}

}  // namespace sattn
