// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/checks.hpp>

#include <algorithm>
#include <cmath>

namespace sattn {

/// Attention over the union of two disjoint sets of keys, from the results over each.
///
/// Shapes: all out [tokens, heads, v_dim], all lse [tokens, heads, 1] (natural log, without sink).
/// `into` may be the same memory as `a` or `b`. An empty result (lse = -inf) is neutral; the merge
/// of two empty rows is empty.
/// Throws: shape_error if extents differ or an lse is missing. Nothing is written when it throws.
/// Accuracy: a few roundings; exact when one side is empty.
inline void merge(const attention_output& a, const attention_output& b,
                  const attention_output& into) {
  for (const attention_output* o : {&a, &b, &into}) {
    check_writable("out", o->out);
    check_writable("lse", o->lse);
    require(o->out.tokens == into.out.tokens && o->out.heads == into.out.heads &&
                o->out.dim == into.out.dim,
            "merge: out is [", o->out.tokens, ", ", o->out.heads, ", ", o->out.dim,
            "], expected [", into.out.tokens, ", ", into.out.heads, ", ", into.out.dim, "]");
    require(o->lse.tokens == into.out.tokens && o->lse.heads == into.out.heads && o->lse.dim == 1,
            "merge: lse is [", o->lse.tokens, ", ", o->lse.heads, ", ", o->lse.dim,
            "], expected [", into.out.tokens, ", ", into.out.heads, ", 1]");
  }
  for (index_t token = 0; token < into.out.tokens; ++token) {
    for (index_t head = 0; head < into.out.heads; ++head) {
      const float lse_a = *a.lse.row(token, head);
      const float lse_b = *b.lse.row(token, head);
      const float top = std::max(lse_a, lse_b);
      float weight_a = 0.0f;
      float weight_b = 0.0f;
      if (top != -std::numeric_limits<float>::infinity()) {
        weight_a = std::exp(lse_a - top);
        weight_b = std::exp(lse_b - top);
      }
      const float sum = weight_a + weight_b;
      const float share_a = sum == 0.0f ? 0.0f : weight_a / sum;
      const float share_b = sum == 0.0f ? 0.0f : weight_b / sum;
      const float* const from_a = a.out.row(token, head);
      const float* const from_b = b.out.row(token, head);
      float* const to = into.out.row(token, head);
      for (index_t i = 0; i < into.out.dim; ++i) {
        // An empty side is left out, not multiplied by 0: it may hold anything.
        to[i] = (share_a == 0.0f ? 0.0f : share_a * from_a[i]) +
                (share_b == 0.0f ? 0.0f : share_b * from_b[i]);
      }
      *into.lse.row(token, head) =
          sum == 0.0f ? -std::numeric_limits<float>::infinity() : top + std::log(sum);
    }
  }
}

}  // namespace sattn
