// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/plan.hpp>
#include <sattn/estimate/scores.hpp>
#include <sattn/exec/context.hpp>
#include <sattn/kv/page_summaries.hpp>
#include <sattn/kv/stored_view.hpp>
#include <sattn/pattern/compose.hpp>

#include <algorithm>
#include <chrono>
#include <concepts>
#include <functional>
#include <limits>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace sattn {

/// What a method looks at: the queries and keys of one sequence, and what attend() will make of
/// them. Of a chunk of a prompt these are the queries of the chunk and all keys so far.
struct method_inputs {
  attention_shape shape;
  tensor_view<const float> q;  // [q_len, q_heads, head_dim]
  stored_view k;               // [kv_len, kv_heads, head_dim], any type and layout
  domain legal = {};
  std::optional<float> scale = std::nullopt;  // default 1 / sqrt(head_dim)
  float soft_cap = 0.0f;
  std::span<const page_summaries> summaries = {};  // of each kv head, for methods that ask for them
  index_t layer = no_layer;  // of the model, for methods that treat some apart

  static constexpr index_t no_layer = std::numeric_limits<index_t>::max();

  logit_rules rules(head_reduce reduce) const { return {legal, scale, soft_cap, reduce}; }
};

/// A recipe that chooses what each row attends to: it estimates, applies a budget and returns a
/// pattern. It owns no kernel. All but those of `reused` are plain data that keep nothing from call
/// to call.
///
///   P choose(context& ctx, const method_inputs& in) const;   // P: an attention_pattern
template <class M>
concept attention_method = requires(const M& method, context& ctx, const method_inputs& in) {
  { method.choose(ctx, in) } -> attention_pattern;
};

/// Any method as a value of one type.
class any_method {
 public:
  template <attention_method M>
    requires(!std::same_as<M, any_method>)
  any_method(M method)  // NOLINT(google-explicit-constructor): converts as patterns do
      : choose_([m = std::move(method)](context& ctx, const method_inputs& in) {
          return any_pattern(m.choose(ctx, in));
        }) {}

  any_pattern choose(context& ctx, const method_inputs& in) const { return choose_(ctx, in); }

 private:
  std::function<any_pattern(context&, const method_inputs&)> choose_;
};

struct method_options {
  plan_options plan = {};
  std::optional<float> scale = std::nullopt;  // as in attention_options
  float soft_cap = 0.0f;
  index_t layer = method_inputs::no_layer;
};

struct method_decode_options {
  decode_options plan = {};
  std::optional<float> scale = std::nullopt;
  float soft_cap = 0.0f;
  index_t layer = method_inputs::no_layer;
  std::span<const page_summaries> summaries = {};
};

/// What a method did.
struct method_report {
  plan_stats pairs;                  // density_selected(), density_executed()
  std::vector<double> keys_of_head;  // [q_heads]: keys of a row, on average
  double estimate_ms;                // to look and choose
  double plan_ms;                    // to write the plan
};

/// A plan that a method made.
struct method_plan {
  attention_plan plan;
  double estimate_ms = 0.0;
  double plan_ms = 0.0;

  /// Cost: a walk over the plan for each query head.
  method_report report() const {
    method_report result{plan.stats(), {}, estimate_ms, plan_ms};
    const attention_shape& shape = plan.shape();
    for (index_t h = 0; h < shape.q_heads; ++h) {
      const auto rows = static_cast<double>(std::max<index_t>(shape.q_len, 1));
      result.keys_of_head.push_back(static_cast<double>(plan.stats(h).selected) / rows);
    }
    return result;
  }
};

namespace detail {

/// Says what each of several pieces of work took.
class stopwatch {
 public:
  /// Milliseconds since the last lap, or since it was made.
  double lap_ms() {
    const clock::time_point from = std::exchange(last_, clock::now());
    return std::chrono::duration<double, std::milli>(last_ - from).count();
  }

 private:
  using clock = std::chrono::steady_clock;
  clock::time_point last_ = clock::now();
};

/// Runs choose() and then write(pattern), each under a clock.
template <attention_method M, class Write>
void choose_and_write(context& ctx, const method_inputs& in, const M& method, method_plan& result,
                      const Write& write) {
  stopwatch watch;
  const auto pattern = method.choose(ctx, in);
  result.estimate_ms = watch.lap_ms();
  write(pattern);
  result.plan_ms = watch.lap_ms();
}

}  // namespace detail

/// Plans attention of many rows by a method.
///
/// Shapes: q [q_len, q_heads, head_dim], kv [kv_len, kv_heads, dim].
/// Throws: shape_error as the method and plan_prefill do.
/// See: docs/methods.md; examples/08_methods.cpp.
template <attention_method M>
method_plan plan_prefill(context& ctx, const tensor_view<const float>& q, const kv_view& kv,
                         const M& method, const method_options& options = {}) {
  const method_inputs in{shape_of(q, kv),  q,  kv.k,         options.plan.legal, options.scale,
                         options.soft_cap, {}, options.layer};
  method_plan result;
  detail::choose_and_write(ctx, in, method, result, [&](const auto& pattern) {
    plan_prefill_into(ctx, result.plan, in.shape, pattern, options.plan);
  });
  return result;
}

/// Plans attention of one or a few rows by a method, into a plan whose memory is used again.
///
/// Shapes: as above; options.summaries one for each kv head where the method asks for them.
/// Throws: shape_error as the method and plan_decode do.
template <attention_method M>
void plan_decode_into(context& ctx, method_plan& result, const tensor_view<const float>& q,
                      const kv_view& kv, const M& method,
                      const method_decode_options& options = {}) {
  const method_inputs in{shape_of(q, kv),    q,
                         kv.k,               options.plan.legal,
                         options.scale,      options.soft_cap,
                         options.summaries,  options.layer};
  detail::choose_and_write(ctx, in, method, result, [&](const auto& pattern) {
    plan_decode_into(ctx, result.plan, in.shape, pattern, options.plan);
  });
}

/// The same as a new plan.
template <attention_method M>
method_plan plan_decode(context& ctx, const tensor_view<const float>& q, const kv_view& kv,
                        const M& method, const method_decode_options& options = {}) {
  method_plan result;
  plan_decode_into(ctx, result, q, kv, method, options);
  return result;
}

}  // namespace sattn
