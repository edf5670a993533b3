// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/error.hpp>
#include <sattn/core/types.hpp>

#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

namespace sattn {

/// Which two elements of a row a rotary embedding turns together.
enum class rotary_pairs {
  halves,     // i and i + dims / 2: GPT-NeoX, Hugging Face's Llama
  neighbours  // 2 i and 2 i + 1: GPT-J, ggml's normal mode
};

/// A rotary position embedding. Source: RoFormer (arXiv:2104.09864).
struct rotary_embedding {
  index_t first = 0;  // element of a row where it begins
  index_t dims = 0;   // elements that it turns; 0 = all the rest
  double base = 10000.0;
  rotary_pairs pairs = rotary_pairs::halves;
  // Radians a position of each pair where they are not base^(-2 i / dims): scaled embeddings.
  std::vector<double> frequencies = {};
};

/// Turns rows that a rotary embedding was applied to to other positions. Keeps the angles of the
/// last number of positions; one per thread.
class rotary {
 public:
  /// For rows of `dim` elements. Throws: shape_error unless the elements that turn are an even
  /// number of those that exist, the base finite and positive, and frequencies finite and none or
  /// one for each pair; std::bad_alloc.
  rotary(const rotary_embedding& embedding, index_t dim)
      : first_(embedding.first), pairs_(embedding.pairs) {
    const index_t dims = embedding.dims == 0 ? dim - first_ : embedding.dims;
    require(first_ >= 0 && dims >= 0 && dims % 2 == 0 && dims <= dim - first_,
            "rotary: ", dims, " elements from ", first_, " of ", dim,
            ", expected an even number of them");
    require(std::isfinite(embedding.base) && embedding.base > 0.0, "rotary: base ",
            embedding.base);
    frequencies_ = embedding.frequencies;
    for (const double f : frequencies_) require(std::isfinite(f), "rotary: frequency ", f);
    require(frequencies_.empty() || std::ssize(frequencies_) == dims / 2, "rotary: ",
            frequencies_.size(), " frequencies for ", dims / 2, " pairs");
    for (index_t i = std::ssize(frequencies_); i < dims / 2; ++i) {
      frequencies_.push_back(
          std::pow(embedding.base, -2.0 * static_cast<double>(i) / static_cast<double>(dims)));
    }
    turns_.resize(frequencies_.size(), {1.0, 0.0});
  }

  /// Moves a row to a position so much later, or earlier where negative.
  /// Accuracy: angles in double; each element is rounded once.
  void turn(float* row, index_t positions) {
    if (positions == 0) return;
    if (positions != positions_) {
      for (std::size_t i = 0; i < turns_.size(); ++i) {
        const double angle = frequencies_[i] * static_cast<double>(positions);
        turns_[i] = {std::cos(angle), std::sin(angle)};
      }
      positions_ = positions;
    }
    const bool halves = pairs_ == rotary_pairs::halves;
    float* const x = row + first_;
    float* const y = x + (halves ? std::ssize(turns_) : 1);
    const index_t step = halves ? 1 : 2;
    for (index_t i = 0; i < std::ssize(turns_); ++i) {
      const auto [cosine, sine] = turns_[static_cast<std::size_t>(i)];
      const double a = double{x[i * step]};
      const double b = double{y[i * step]};
      x[i * step] = static_cast<float>(a * cosine - b * sine);
      y[i * step] = static_cast<float>(a * sine + b * cosine);
    }
  }

 private:
  index_t first_;
  rotary_pairs pairs_;
  index_t positions_ = 0;  // of turns_
  std::vector<double> frequencies_;
  std::vector<std::pair<double, double>> turns_;  // cosine and sine
};

}  // namespace sattn
