// SPDX-License-Identifier: Apache-2.0
//
// The queries, keys and values of one attention layer, from three files.
#pragma once

#include "safetensors.hpp"

#include <sattn/core/error.hpp>
#include <sattn/kv/stored_view.hpp>
#include <sattn/method/method.hpp>
#include <sattn/plan/domain.hpp>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace demo {

/// Where one layer's tensors lie.
struct layer_files {
  std::string name;
  std::filesystem::path q;
  std::filesystem::path k;
  std::filesystem::path v;
};

/// Queries, keys and values of one attention layer. Causal; the last query stands at the last key.
struct layer {
  std::string name;
  tensor q;  // [q_len, q_heads, head_dim]
  tensor k;  // [kv_len, kv_heads, head_dim]
  tensor v;  // [kv_len, kv_heads, v_dim]

  sattn::kv_view kv() const { return sattn::kv(k.view(), v.view()); }
  /// `number`: the layer's place in its model.
  sattn::method_inputs inputs(index_t number) const {
    return {.shape = shape(), .q = q.view(), .k = kv().k, .layer = number};
  }
  sattn::attention_shape shape() const {
    return {q.tokens, k.tokens, q.heads, k.heads, static_cast<sattn::token_t>(k.tokens - q.tokens)};
  }
};

/// The layers of a folder: every NAME_q.safetensors with NAME_k and NAME_v beside it, by name.
/// Throws: std::runtime_error if there is none or a file is missing.
inline std::vector<layer_files> find_layers(const std::filesystem::path& folder) {
  namespace fs = std::filesystem;
  if (!fs::is_directory(folder)) throw std::runtime_error(folder.string() + ": no such folder");
  constexpr std::string_view ending = "_q.safetensors";
  std::vector<layer_files> layers;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const std::string file = entry.path().filename().string();
    if (!file.ends_with(ending)) continue;
    const std::string name = file.substr(0, file.size() - ending.size());
    layers.push_back({name, entry.path(), folder / (name + "_k.safetensors"),
                      folder / (name + "_v.safetensors")});
  }
  if (layers.empty()) throw std::runtime_error(folder.string() + ": no file *_q.safetensors");
  std::sort(layers.begin(), layers.end(),
            [](const layer_files& a, const layer_files& b) { return a.name < b.name; });
  return layers;
}

inline void check_shapes(const layer& l) {
  const auto same = [&](index_t a, const char* a_name, index_t b, const char* b_name) {
    sattn::require<std::runtime_error>(a == b, l.name, ": ", a_name, " is ", a, ", ", b_name,
                                       " is ", b);
  };
  same(l.v.tokens, "tokens of v", l.k.tokens, "tokens of k");
  same(l.v.heads, "heads of v", l.k.heads, "heads of k");
  same(l.q.dim, "dim of q", l.k.dim, "dim of k");
  sattn::require<std::runtime_error>(l.q.heads % l.k.heads == 0, l.name, ": the ", l.q.heads,
                                     " heads of q are not a multiple of the ", l.k.heads,
                                     " heads of k");
  sattn::require<std::runtime_error>(l.q.tokens <= l.k.tokens, l.name, ": q has ", l.q.tokens,
                                     " tokens, k has only ", l.k.tokens);
}

/// Throws: std::runtime_error if a file is at fault or the shapes do not fit together. Warns on
/// stderr about values that are not finite.
inline layer load_layer(const layer_files& files) {
  layer l{files.name, read_safetensors(files.q, "q"), read_safetensors(files.k, "k"),
          read_safetensors(files.v, "v")};
  check_shapes(l);
  for (const tensor* t : {&l.q, &l.k, &l.v}) {
    if (const index_t bad = t->count_not_finite(); bad > 0) {
      std::fprintf(stderr, "sattn-demo: warning: %s: %td values of tensor %s are not finite\n",
                   l.name.c_str(), bad, t->name.c_str());
    }
  }
  return l;
}

}  // namespace demo
