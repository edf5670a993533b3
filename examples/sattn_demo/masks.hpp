// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "methods.hpp"

#include <filesystem>
#include <vector>

namespace demo {

/// Writes a PNG of the masks of the pictured methods: one row of panels per method, one panel per
/// query head, query rows downwards and keys to the right. The darker, the more of the legal pairs
/// under a pixel are selected; grey where none is legal.
/// Throws: std::runtime_error if the masks are too large to expand or the file cannot be written.
void write_masks(const std::filesystem::path& file, sattn::context& ctx, const layer& l,
                 const std::vector<method>& methods);

}  // namespace demo
