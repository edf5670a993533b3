// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "safetensors.hpp"

#include <sattn/kv/contiguous.hpp>
#include <sattn/plan/domain.hpp>

#include <filesystem>
#include <string>
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

  sattn::kv_view<float> kv() const { return sattn::kv(k.view(), v.view()); }
  sattn::attention_shape shape() const {
    return {q.tokens, k.tokens, q.heads, k.heads, static_cast<sattn::token_t>(k.tokens - q.tokens)};
  }
};

/// The layers of a folder: every NAME_q.safetensors with NAME_k and NAME_v beside it, by name.
/// Throws: std::runtime_error if there is none or a file is missing.
std::vector<layer_files> find_layers(const std::filesystem::path& folder);

/// Throws: std::runtime_error if a file is at fault or the shapes do not fit together. Warns on
/// stderr about values that are not finite.
layer load_layer(const layer_files& files);

}  // namespace demo
