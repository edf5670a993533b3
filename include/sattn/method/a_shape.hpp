// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/method/method.hpp>
#include <sattn/pattern/basic.hpp>

namespace sattn {

/// The first keys and the last ones, for every row: streaming attention, which estimates nothing.
/// Source: StreamingLLM (arXiv:2309.17453); A-shape in MInference (arXiv:2407.02490).
struct a_shape {
  token_t sinks;   // n_init
  token_t window;  // n_local; the row's own position counts

  explicit constexpr a_shape(token_t first = 128, token_t last = 3968)
      : sinks(first), window(last) {}

  auto choose(context&, const method_inputs&) const {
    return sink{sinks} | sliding_window{window};
  }
};

/// The same by the name that decoding has for it: 4 sinks and a window.
inline a_shape streaming(token_t sinks, token_t window) {
  return a_shape(sinks, window);
}

/// The same, and the last rows of the call attend to everything.
/// Source: tri-shape in SCBench (arXiv:2412.10319) and MInference's code.
struct tri_shape {
  token_t sinks;
  token_t window;
  token_t last_rows;

  explicit constexpr tri_shape(token_t first = 128, token_t last = 3968, token_t dense_rows = 100)
      : sinks(first), window(last), last_rows(dense_rows) {}

  /// Throws: shape_error if last_rows is negative.
  auto choose(context&, const method_inputs& in) const {
    require(last_rows >= 0, "tri_shape: last_rows ", last_rows, " is negative");
    const auto first = static_cast<token_t>(std::max<index_t>(0, in.shape.q_len - last_rows));
    return sink{sinks} | sliding_window{window} | rows_from{first};
  }
};

}  // namespace sattn
