// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/error.hpp>
#include <sattn/core/types.hpp>

#include <algorithm>
#include <limits>
#include <span>
#include <vector>

namespace sattn {

enum class pooling { average, maximum };

/// Smooths scores along the keys, in place: each becomes the average or the maximum of those within
/// width / 2 of it. An average always divides by the width, as if zeros lay behind both ends.
/// Throws: shape_error unless the width is odd and positive.
/// Source: the pool1d of SnapKV (arXiv:2404.14469).
inline void smooth(std::span<float> scores, index_t width, pooling kind) {
  require(width > 0 && width % 2 == 1, "smooth: width ", width, ", expected an odd number");
  if (width == 1) return;
  const std::vector<float> before(scores.begin(), scores.end());
  const index_t n = std::ssize(scores);
  for (index_t i = 0; i < n; ++i) {
    const index_t begin = std::max<index_t>(0, i - width / 2);
    const index_t end = std::min(n, i + width / 2 + 1);
    float sum = 0.0f;
    float top = -std::numeric_limits<float>::infinity();
    for (index_t j = begin; j < end; ++j) {
      const float x = before[static_cast<std::size_t>(j)];
      sum += x;
      top = std::max(top, x);
    }
    scores[static_cast<std::size_t>(i)] =
        kind == pooling::average ? sum / static_cast<float>(width) : top;
  }
}

}  // namespace sattn
