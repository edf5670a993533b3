// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/checks.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

namespace sattn {

/// Attention over a part of the keys, as merge() reads it.
struct attention_part {
  tensor_view<const float> out;  // [tokens, heads, v_dim]
  tensor_view<const float> lse;  // [tokens, heads, 1]

  attention_part(const attention_output& from) : out(from.out), lse(from.lse) {}
  attention_part(tensor_view<const float> rows, tensor_view<const float> log_sum_exp)
      : out(rows), lse(log_sum_exp) {}
};

namespace detail {

inline void check_part(const char* name, const attention_part& part, const attention_output& into) {
  check_view(name, part.out);
  check_view(name, part.lse);
  require(part.out.tokens == into.out.tokens && part.out.heads == into.out.heads &&
              part.out.dim == into.out.dim,
          "merge: ", name, " out is [", part.out.tokens, ", ", part.out.heads, ", ", part.out.dim,
          "], into has [", into.out.tokens, ", ", into.out.heads, ", ", into.out.dim, "]");
  require(part.lse.tokens == into.out.tokens && part.lse.heads == into.out.heads &&
              part.lse.dim == 1,
          "merge: ", name, " lse is [", part.lse.tokens, ", ", part.lse.heads, ", ", part.lse.dim,
          "], expected [", into.out.tokens, ", ", into.out.heads, ", 1]");
}

/// The same elements in the same order, or no byte in common.
inline void check_same_or_apart(const char* name, const tensor_view<float>& into,
                                const tensor_view<const float>& from) {
  const bool same = into.data == from.data && into.token_stride == from.token_stride &&
                    into.head_stride == from.head_stride && into.dim == from.dim;
  require(same || !may_overlap(into, from), "merge: into's ", name,
          " overlaps a part that it does not replace element by element");
}

}  // namespace detail

/// Attention over the union of two disjoint sets of keys, from the results over each.
///
/// Shapes: all out [tokens, heads, v_dim], all lse [tokens, heads, 1], natural log. The parts are
/// computed without sink logits, which come here: [heads] or none. `into` may be the same memory as
/// a part; it then replaces it. Its lse leaves the sink out, so that merges can be chained when
/// only the last one gets the sinks. An empty part (lse = -inf) is neutral; two of them stay empty.
/// Throws: shape_error if extents differ, an lse is missing, into asks for mass, or memory overlaps
/// in another way.
/// Nothing is written when it throws.
/// Accuracy: a few roundings; exact when one part is empty and there is no sink.
inline void merge(const attention_part& a, const attention_part& b, const attention_output& into,
                  std::span<const float> sink_logits = {}) {
  check_writable("into out", into.out);
  check_writable("into lse", into.lse);
  detail::check_part("a", a, into);
  detail::check_part("b", b, into);
  detail::check_part("into", into, into);
  require(!may_overlap(into.out, into.lse), "merge: into's out overlaps its lse");
  require(into.mass.data == nullptr, "merge: into asks for mass, which parts do not have");
  for (const attention_part* part : {&a, &b}) {
    detail::check_same_or_apart("out", into.out, part->out);
    detail::check_same_or_apart("lse", into.lse, part->lse);
    require(!may_overlap(into.out, part->lse) && !may_overlap(into.lse, part->out),
            "merge: into's out or lse overlaps the other of a part");
  }
  require(sink_logits.empty() || std::ssize(sink_logits) == into.out.heads, "merge: ",
          sink_logits.size(), " sink logits for ", into.out.heads, " heads");

  constexpr float minus_inf = -std::numeric_limits<float>::infinity();
  for (index_t token = 0; token < into.out.tokens; ++token) {
    for (index_t head = 0; head < into.out.heads; ++head) {
      const float lse_a = *a.lse.row(token, head);
      const float lse_b = *b.lse.row(token, head);
      const float sink =
          sink_logits.empty() ? minus_inf : sink_logits[static_cast<std::size_t>(head)];
      const float top = std::max({lse_a, lse_b, sink});
      const auto weight = [&](float lse) { return lse == top ? 1.0f : std::exp(lse - top); };
      const bool empty = std::max(lse_a, lse_b) == minus_inf;
      const float weight_a = empty ? 0.0f : weight(lse_a);
      const float weight_b = empty ? 0.0f : weight(lse_b);
      const float weight_sink = sink == minus_inf ? 0.0f : weight(sink);
      const float all = weight_a + weight_b + weight_sink;
      const float share_a = empty ? 0.0f : weight_a / all;
      const float share_b = empty ? 0.0f : weight_b / all;
      const float* const from_a = a.out.row(token, head);
      const float* const from_b = b.out.row(token, head);
      float* const to = into.out.row(token, head);
      for (index_t i = 0; i < into.out.dim; ++i) {
        // An empty part is left out, not multiplied by 0: it may hold anything.
        to[i] = (share_a == 0.0f ? 0.0f : share_a * from_a[i]) +
                (share_b == 0.0f ? 0.0f : share_b * from_b[i]);
      }
      const float base = std::max(lse_a, lse_b);
      *into.lse.row(token, head) =
          empty ? minus_inf : base + std::log(std::exp(lse_a - base) + std::exp(lse_b - base));
    }
  }
}

}  // namespace sattn
