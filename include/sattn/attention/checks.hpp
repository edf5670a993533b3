// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/tensor_view.hpp>
#include <sattn/kv/stored_view.hpp>
#include <sattn/plan/attention_plan.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>

namespace sattn {

struct attention_options {
  std::optional<float> scale = std::nullopt;  // of the logits; default 1 / sqrt(head_dim)
  // Logits become cap * tanh(logit / cap); 0 = off. q * scale / cap must not overflow.
  float soft_cap = 0.0f;
  std::span<const float> sink_logits = {};    // [q_heads] logits that take weight and give 0
  // Bytes of workspace for copies of K and V that are quicker to read, of as many kv heads at a
  // time as fit; 0 = everything is read in place. The results are the same bits.
  std::size_t pack_bytes = std::size_t{256} << 20;
};

/// Where results go: rows, and optionally the natural log of each row's sum of exponentials and,
/// beside it, the mass of each key: the probabilities that all query rows give it, summed, of one
/// query head or of all that share a kv head.
struct attention_output {
  tensor_view<float> out;   // [q_len, q_heads, v_dim]
  tensor_view<float> lse;   // [q_len, q_heads, 1] or empty
  tensor_view<float> mass;  // [kv_len, q_heads or kv_heads, 1] or empty

  attention_output(tensor_view<float> rows, tensor_view<float> log_sum_exp = {},
                   tensor_view<float> column_mass = {})
      : out(rows), lse(log_sum_exp), mass(column_mass) {}
};

/// One sequence of a batch.
struct attention_sequence {
  const attention_plan* plan;
  tensor_view<const float> q;
  kv_view kv;
  attention_output output;
};

namespace detail {

inline constexpr index_t max_head_dim = 1024;

inline void check_options(const attention_options& options) {
  require(std::isfinite(options.scale.value_or(1.0f)), "attend: scale ",
          options.scale.value_or(1.0f), " is not finite");
  require(std::isfinite(options.soft_cap) && options.soft_cap >= 0.0f, "attend: soft_cap ",
          options.soft_cap, ", expected a finite number >= 0");
  for (const float logit : options.sink_logits) {
    require(!std::isnan(logit), "attend: a sink logit is NaN");
  }
}

inline void check_same(const char* what, index_t got, const char* other, index_t expected) {
  require(got == expected, "attend: ", what, " is ", got, ", ", other, " is ", expected);
}

inline void check_sequence(const attention_sequence& s, const attention_options& options) {
  require(s.plan != nullptr, "attend: null plan");
  check_view("q", s.q);
  check_view("k", s.kv.k);
  check_view("v", s.kv.v);
  check_writable("out", s.output.out);
  const attention_shape& shape = s.plan->shape();
  check_same("q tokens", s.q.tokens, "the plan's q_len", shape.q_len);
  check_same("q heads", s.q.heads, "the plan's q_heads", shape.q_heads);
  check_same("k tokens", s.kv.k.tokens, "the plan's kv_len", shape.kv_len);
  check_same("k heads", s.kv.k.heads, "the plan's kv_heads", shape.kv_heads);
  check_same("v tokens", s.kv.v.tokens, "k tokens", s.kv.k.tokens);
  check_same("v heads", s.kv.v.heads, "k heads", s.kv.k.heads);
  check_same("k dim", s.kv.k.dim, "q dim", s.q.dim);
  check_same("out tokens", s.output.out.tokens, "q tokens", s.q.tokens);
  check_same("out heads", s.output.out.heads, "q heads", s.q.heads);
  check_same("out dim", s.output.out.dim, "v dim", s.kv.v.dim);
  require(s.q.dim >= 1 && s.kv.v.dim >= 1, "attend: head_dim ", s.q.dim, " and v_dim ",
          s.kv.v.dim, " must be positive");
  require<unsupported>(s.q.dim <= max_head_dim && s.kv.v.dim <= max_head_dim, "attend: head_dim ",
                       s.q.dim, " and v_dim ", s.kv.v.dim, ", at most ", max_head_dim);
  if (s.output.lse.data != nullptr || !s.output.lse.empty()) {
    check_writable("lse", s.output.lse);
    check_same("lse tokens", s.output.lse.tokens, "q tokens", s.q.tokens);
    check_same("lse heads", s.output.lse.heads, "q heads", s.q.heads);
    check_same("lse dim", s.output.lse.dim, "one value a row", 1);
  }
  if (s.output.mass.data != nullptr || !s.output.mass.empty()) {
    check_writable("mass", s.output.mass);
    check_same("mass tokens", s.output.mass.tokens, "k tokens", s.kv.k.tokens);
    require(s.output.mass.heads == s.q.heads || s.output.mass.heads == s.kv.k.heads,
            "attend: mass heads is ", s.output.mass.heads, ", expected the q heads, ", s.q.heads,
            ", or the k heads, ", s.kv.k.heads);
    check_same("mass dim", s.output.mass.dim, "one value a key", 1);
    require(s.output.lse.data != nullptr || s.q.empty(),
            "attend: mass without lse, which it is computed from");
  }
  const float scale = options.scale.value_or(1.0f / std::sqrt(static_cast<float>(s.q.dim)));
  require(options.soft_cap == 0.0f || std::isfinite(scale / options.soft_cap), "attend: scale ",
          scale, " / soft_cap ", options.soft_cap, " is not finite");
  require(options.sink_logits.empty() || std::ssize(options.sink_logits) == s.q.heads,
          "attend: ", options.sink_logits.size(), " sink logits for ", s.q.heads, " q heads");
}

/// All bytes from the first to the last that the outputs of one kind take, as one row, and whether
/// those of each sequence lie behind those of the sequence before.
struct output_span {
  const char* name;
  tensor_view<float> attention_output::*member;
  tensor_view<const std::byte> row = {};
  bool ascending = true;

  output_span(const char* kind, tensor_view<float> attention_output::*view,
              std::span<const attention_sequence> sequences)
      : name(kind), member(view) {
    std::uintptr_t first = std::numeric_limits<std::uintptr_t>::max();
    std::uintptr_t last = 0;
    for (const attention_sequence& s : sequences) {
      const tensor_view<float>& out = of(s);
      if (out.empty()) continue;
      index_t elements = 0;
      view_extent(out, elements);
      const auto begin = reinterpret_cast<std::uintptr_t>(out.data);
      ascending = ascending && begin >= last;
      first = std::min(first, begin);
      last = std::max(last, begin + static_cast<std::uintptr_t>(elements) * sizeof(float));
    }
    if (first >= last) return;
    const auto bytes = static_cast<index_t>(last - first);
    row = {reinterpret_cast<const std::byte*>(first), 1, 1, bytes, bytes, bytes};
  }
  const tensor_view<float>& of(const attention_sequence& s) const { return s.output.*member; }
};

/// Outputs may share memory with nothing, inputs with each other. Of a batch single pairs are
/// compared only where all outputs together do not show it.
inline void check_aliasing(std::span<const attention_sequence> sequences) {
  const output_span spans[] = {{"out", &attention_output::out, sequences},
                               {"lse", &attention_output::lse, sequences},
                               {"mass", &attention_output::mass, sequences}};
  for (const output_span& outputs : spans) {
    const auto check_inputs = [&](const char* name, const auto& input) {
      if (!may_overlap(outputs.row, input)) return;
      for (const attention_sequence& s : sequences) {
        require(!may_overlap(outputs.of(s), input), "attend: ", outputs.name, " overlaps ", name);
      }
    };
    for (const attention_sequence& s : sequences) {
      check_inputs("q", s.q);
      check_inputs("k", s.kv.k);
      check_inputs("v", s.kv.v);
    }
    for (const output_span& others : spans) {
      const bool same = &others == &outputs;
      if (same ? outputs.ascending : !may_overlap(outputs.row, others.row)) continue;
      for (const attention_sequence& s : sequences) {
        for (const attention_sequence& t : sequences) {
          require((same && &s == &t) || !may_overlap(outputs.of(s), others.of(t)), "attend: ",
                  outputs.name, " overlaps ", &s == &t ? "" : "another sequence's ", others.name);
        }
      }
    }
  }
}

// What the kernels are given for one sequence, derived once.
struct logit_options {
  float pack_scale;  // multiplies the queries
  float soft_cap;
  std::span<const float> sinks;

  logit_options(const attention_options& options, index_t head_dim)
      : pack_scale(options.scale.value_or(1.0f / std::sqrt(static_cast<float>(head_dim)))),
        soft_cap(options.soft_cap),
        sinks(options.sink_logits) {
    if (soft_cap != 0.0f) pack_scale /= soft_cap;
  }
  float sink(index_t q_head) const {
    return sinks.empty() ? -std::numeric_limits<float>::infinity()
                         : sinks[static_cast<std::size_t>(q_head)];
  }
};

}  // namespace detail

}  // namespace sattn
