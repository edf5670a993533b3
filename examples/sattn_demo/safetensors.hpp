// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/tensor_view.hpp>

#include <filesystem>
#include <string>
#include <vector>

namespace demo {

using sattn::index_t;

/// A [token, head, dim] tensor in memory, converted to float.
struct tensor {
  std::string name;
  std::vector<float> values;
  index_t tokens = 0;
  index_t heads = 0;
  index_t dim = 0;

  sattn::tensor_view<const float> view() const {
    return sattn::nhd(values.data(), tokens, heads, dim);
  }
  index_t count_not_finite() const;
};

/// Reads the tensor `name` of a safetensors file, or the first one if none has that name.
/// F16, BF16 and F32 of rank 3 are read. Throws: std::runtime_error, with the file's path, if the
/// file cannot be read, is truncated or breaks the format.
tensor read_safetensors(const std::filesystem::path& path, const std::string& name);

}  // namespace demo
