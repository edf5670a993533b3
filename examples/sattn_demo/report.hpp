// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "measure.hpp"

#include <string>
#include <vector>

namespace demo {

/// The head of a layer's table.
void print_heading(const layer& l, const sattn::context& ctx, int repeats);
void print_line(const measurement& m);
/// The same as one JSON object on a line of its own.
void print_json(const std::string& layer_name, const measurement& m);

/// Says in words, from the measurements, where dense attention is the faster one and what is the
/// best choice otherwise. The first measurement is dense.
void print_conclusions(const std::vector<measurement>& all);

}  // namespace demo
