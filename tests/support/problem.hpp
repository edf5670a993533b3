// SPDX-License-Identifier: Apache-2.0
//
// Attention problems that own their memory, and what runs them: every set of kernels this CPU has,
// against one oracle.
#pragma once

#include <gtest/gtest.h>
#include <sattn/attention/attend.hpp>
#include <sattn/attention/plan.hpp>
#include <sattn/parallel/executor.hpp>
#include <sattn/parallel/thread_pool.hpp>
#include <sattn/plan/expand.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "reference/reference.hpp"
#include "support/compare.hpp"
#include "support/numbers.hpp"
#include "support/random.hpp"

namespace test_support {

using sattn::index_t;
using sattn::token_t;

/// For indexing.
constexpr std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

enum class memory_layout { nhd, hnd, nhd_padded, hnd_padded };

/// A [tokens, heads, dim] tensor. Floats that are no element of it are NaN: the padding between
/// rows and the memory ahead and behind.
class owned_tensor {
 public:
  owned_tensor() : owned_tensor(0, 0, 0) {}

  /// `shift` moves the first element that many floats past a multiple of 64 bytes.
  owned_tensor(index_t tokens, index_t heads, index_t dim,
               memory_layout layout = memory_layout::nhd, index_t shift = 0)
      : tokens_(tokens), heads_(heads), dim_(dim) {
    constexpr index_t around = 16;  // floats ahead and behind
    const bool padded = layout == memory_layout::nhd_padded || layout == memory_layout::hnd_padded;
    const index_t row = dim + (padded ? 3 : 0);
    if (layout == memory_layout::nhd || layout == memory_layout::nhd_padded) {
      head_stride_ = row;
      token_stride_ = heads * row + (padded ? 5 : 0);
    } else {
      token_stride_ = row;
      head_stride_ = tokens * row + (padded ? 5 : 0);
    }
    const index_t used = tokens * token_stride_ + heads * head_stride_ + dim;
    memory_.assign(at(used + 3 * around + shift), quiet_nan);
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data() + around);
    first_ = around + static_cast<index_t>((64 - address % 64) % 64 / sizeof(float)) + shift;
  }

  sattn::tensor_view<float> view() {
    return {memory_.data() + first_, tokens_, heads_, dim_, token_stride_, head_stride_};
  }
  sattn::tensor_view<const float> view() const {
    return {memory_.data() + first_, tokens_, heads_, dim_, token_stride_, head_stride_};
  }
  reference::strided strided() const { return {view().data, token_stride_, head_stride_}; }

  float* row(index_t token, index_t head) { return view().row(token, head); }
  const float* row(index_t token, index_t head) const { return view().row(token, head); }
  void fill_row(index_t token, index_t head, float value) {
    std::fill_n(row(token, head), dim_, value);
  }
  void fill(float value) {
    for (index_t t = 0; t < tokens_; ++t) {
      for (index_t h = 0; h < heads_; ++h) fill_row(t, h, value);
    }
  }
  void fill_normal(random_source& random, double deviation = 1) {
    for (index_t t = 0; t < tokens_; ++t) {
      for (index_t h = 0; h < heads_; ++h) {
        for (index_t i = 0; i < dim_; ++i) {
          row(t, h)[i] = static_cast<float>(deviation * random.normal());
        }
      }
    }
  }

  /// The elements alone, [tokens, heads, dim].
  std::vector<float> packed() const {
    std::vector<float> elements;
    elements.reserve(at(tokens_ * heads_ * dim_));
    for (index_t t = 0; t < tokens_; ++t) {
      for (index_t h = 0; h < heads_; ++h) {
        elements.insert(elements.end(), row(t, h), row(t, h) + dim_);
      }
    }
    return elements;
  }

  /// Whether every float that is no element still holds the NaN it was given.
  ::testing::AssertionResult padding_is_untouched() const {
    std::vector<float> others = memory_;
    for (index_t t = 0; t < tokens_; ++t) {
      for (index_t h = 0; h < heads_; ++h) {
        std::fill_n(others.begin() + (row(t, h) - memory_.data()), dim_, quiet_nan);
      }
    }
    return bit_equal(others, std::vector<float>(others.size(), quiet_nan));
  }

 private:
  index_t tokens_;
  index_t heads_;
  index_t dim_;
  index_t token_stride_;
  index_t head_stride_;
  index_t first_;
  std::vector<float> memory_;
};

struct problem_extents {
  index_t q_len = 1;
  index_t kv_len = 1;
  index_t q_heads = 1;
  index_t kv_heads = 1;
  index_t head_dim = 16;
  index_t v_dim = 16;
  std::optional<token_t> q_offset = std::nullopt;  // default: the last query at the last key
  memory_layout layout = memory_layout::nhd;
  index_t shift = 0;

  friend std::ostream& operator<<(std::ostream& stream, const problem_extents& e) {
    stream << "q_len " << e.q_len << ", kv_len " << e.kv_len << ", heads " << e.q_heads << "/"
           << e.kv_heads << ", dims " << e.head_dim << "/" << e.v_dim << ", layout "
           << static_cast<int>(e.layout);
    if (e.q_offset) stream << ", q_offset " << *e.q_offset;
    return stream;
  }
};

/// One attention call, all but its plan.
struct attention_problem {
  sattn::attention_shape shape;
  index_t v_dim;
  owned_tensor q;
  owned_tensor k;
  owned_tensor v;
  std::optional<float> scale = std::nullopt;
  float soft_cap = 0;
  std::vector<float> sink_logits = {};
  bool v_is_k = false;  // V is the first v_dim elements of the rows of K

  attention_problem(random_source& random, const problem_extents& e)
      : shape{e.q_len, e.kv_len, e.q_heads, e.kv_heads,
              e.q_offset.value_or(static_cast<token_t>(e.kv_len - e.q_len))},
        v_dim(e.v_dim),
        q(e.q_len, e.q_heads, e.head_dim, e.layout, e.shift),
        k(e.kv_len, e.kv_heads, e.head_dim, e.layout, e.shift),
        v(e.kv_len, e.kv_heads, e.v_dim, e.layout, e.shift) {
    q.fill_normal(random);
    k.fill_normal(random);
    v.fill_normal(random);
  }

  sattn::kv_view kv() const {
    if (!v_is_k) return sattn::kv(k.view(), v.view());
    sattn::tensor_view<const float> part = k.view();
    part.dim = v_dim;
    return sattn::kv(k.view(), part);
  }
  sattn::attention_options options() const {
    return {.scale = scale, .soft_cap = soft_cap, .sink_logits = sink_logits};
  }
};

/// Of any sizes that are quick to check; every layout, group size and position of the queries.
inline problem_extents random_extents(random_source& random) {
  problem_extents e;
  e.q_len = random.integer(1, 140);
  e.kv_len = random.integer(1, 200);
  e.kv_heads = random.integer(1, 4);
  e.q_heads = e.kv_heads * random.pick<index_t>({1, 2, 3, 4, 5, 7, 8, 16});
  if (e.q_heads > 8) {
    e.q_len = 1 + e.q_len / 6;
    e.kv_len = 1 + e.kv_len / 2;
  }
  e.head_dim = random.integer(1, 40);
  e.v_dim = random.integer(1, 40);
  e.layout = random.pick({memory_layout::nhd, memory_layout::hnd, memory_layout::nhd_padded,
                          memory_layout::hnd_padded});
  if (random.integer(0, 3) == 0) {
    e.q_offset = static_cast<token_t>(random.integer(-e.q_len - 3, e.kv_len + 20));
  }
  return e;
}

// ---- running ------------------------------------------------------------------------------------

struct attention_result {
  std::vector<float> out;  // [q_len, q_heads, v_dim]
  std::vector<float> lse;  // [q_len, q_heads]
  std::vector<float> mass;  // [kv_len, q_heads]

  std::span<const float> rows(const attention_problem& p, index_t begin, index_t end) const {
    const index_t row = p.shape.q_heads * p.v_dim;
    return std::span(out).subspan(at(begin * row), at((end - begin) * row));
  }
};

inline ::testing::AssertionResult bit_equal(const attention_result& a, const attention_result& b) {
  ::testing::AssertionResult out = bit_equal(a.out, b.out);
  if (!out) return out << " (out)";
  ::testing::AssertionResult lse = bit_equal(a.lse, b.lse);
  if (!lse) return lse << " (lse)";
  return bit_equal(a.mass, b.mass) << " (mass)";
}

inline attention_result run(sattn::context& ctx, const sattn::attention_plan& plan,
                            const attention_problem& p,
                            memory_layout layout = memory_layout::nhd_padded, index_t shift = 0) {
  owned_tensor out(p.shape.q_len, p.shape.q_heads, p.v_dim, layout, shift);
  owned_tensor lse(p.shape.q_len, p.shape.q_heads, 1, layout, shift);
  owned_tensor mass(p.shape.kv_len, p.shape.q_heads, 1, layout, shift);
  sattn::attend(ctx, plan, p.q.view(), p.kv(), {out.view(), lse.view(), mass.view()}, p.options());
  EXPECT_TRUE(out.padding_is_untouched());
  EXPECT_TRUE(lse.padding_is_untouched());
  EXPECT_TRUE(mass.padding_is_untouched());
  return {out.packed(), lse.packed(), mass.packed()};
}

/// Sets of kernels compiled in that this CPU runs.
inline std::vector<const sattn::kernel_table*> kernel_tables() {
  std::vector<const sattn::kernel_table*> tables = {&sattn::kernels<sattn::arch::sse2>()};
#if defined(__AVX2__) && defined(__FMA__)
  tables.push_back(&sattn::kernels<sattn::arch::avx2>());
#endif
#if defined(__AVX512F__) && defined(__AVX512CD__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
  tables.push_back(&sattn::kernels<sattn::arch::avx512>());
#endif
  std::erase_if(tables, [](const sattn::kernel_table* t) { return !t->cpu_supports(); });
  return tables;
}

/// A context for each set of kernels, on one thread and on three.
class all_contexts {
 public:
  all_contexts() {
    for (const sattn::kernel_table* table : kernel_tables()) {
      contexts_.emplace_back(serial_, *table);
      contexts_.emplace_back(pool_, *table);
    }
  }
  auto begin() { return contexts_.begin(); }
  auto end() { return contexts_.end(); }
  /// For planning, and where one set of kernels is enough: the widest, three threads.
  sattn::context& any() { return contexts_.back(); }

 private:
  sattn::serial_executor serial_;
  sattn::thread_pool pool_{3};
  std::vector<sattn::context> contexts_;
};

inline std::string name_of(const sattn::context& ctx) {
  return std::string(ctx.kernel_table().name) + ", threads " +
         std::to_string(ctx.executor().concurrency());
}

// ---- expecting ----------------------------------------------------------------------------------

/// (q_head, row, key) -> is the key seen.
using mask_function = std::function<bool(index_t, index_t, index_t)>;

/// What the oracle is asked, all but the sinks.
inline reference::problem problem_of(const attention_problem& p, mask_function selected) {
  const sattn::kv_view kv = p.kv();
  return {
      .q_len = p.shape.q_len,
      .kv_len = p.shape.kv_len,
      .q_heads = p.shape.q_heads,
      .kv_heads = p.shape.kv_heads,
      .head_dim = kv.k.dim,
      .v_dim = kv.v.dim,
      .q = p.q.strided(),
      .k = p.k.strided(),
      .v = p.v_is_k ? p.k.strided() : p.v.strided(),
      .scale = p.scale ? double{*p.scale} : 1 / std::sqrt(static_cast<double>(kv.k.dim)),
      .soft_cap = double{p.soft_cap},
      .selected = std::move(selected),
  };
}

inline reference::result expected(const attention_problem& p, mask_function selected) {
  // A sink of +infinity takes all the weight, which the oracle's arithmetic cannot express.
  std::vector<float> sinks = p.sink_logits;
  std::replace(sinks.begin(), sinks.end(), infinity, -infinity);
  reference::problem problem = problem_of(p, std::move(selected));
  if (!sinks.empty()) problem.sink_logits = sinks.data();
  reference::result r = reference::attention(problem);
  for (index_t pair = 0; pair < std::ssize(r.lse) && !sinks.empty(); ++pair) {
    if (p.sink_logits[at(pair % p.shape.q_heads)] != infinity) continue;
    std::fill_n(r.out.begin() + pair * p.v_dim, p.v_dim, 0.0);
    std::fill_n(r.out_bound.begin() + pair * p.v_dim, p.v_dim, 0.0);
  }
  for (index_t i = 0; i < std::ssize(r.mass) && !sinks.empty(); ++i) {
    if (p.sink_logits[at(i % p.shape.q_heads)] == infinity) r.mass[at(i)] = r.mass_bound[at(i)] = 0;
  }
  return r;
}

/// What a plan selects, one mask for each of its heads.
inline mask_function mask_of(const sattn::attention_plan& plan) {
  auto masks = std::make_shared<std::vector<std::vector<std::uint8_t>>>(at(plan.heads()));
  std::vector<index_t> head_of;
  for (index_t h = 0; h < plan.shape().q_heads; ++h) {
    head_of.push_back(plan.head_of(h));
    std::vector<std::uint8_t>& mask = (*masks)[at(head_of.back())];
    if (mask.empty()) mask = expand(plan, h);
  }
  return [masks, head_of, kv_len = plan.shape().kv_len](index_t h, index_t row, index_t key) {
    return (*masks)[at(head_of[at(h)])][at(row * kv_len + key)] != 0;
  };
}

/// The problem through the plan in every context, against one result of the oracle.
inline ::testing::AssertionResult within_bound(all_contexts& contexts,
                                               const sattn::attention_plan& plan,
                                               const attention_problem& p,
                                               const reference::result& want) {
  for (sattn::context& ctx : contexts) {
    const attention_result got = run(ctx, plan, p);
    for (::testing::AssertionResult result :
         {within_bound(got.out, got.lse, want),
          elements_within_bound("mass", got.mass, want.mass, want.mass_bound)}) {
      if (!result) return result << " (" << name_of(ctx) << ")";
    }
  }
  return ::testing::AssertionSuccess();
}
inline ::testing::AssertionResult within_bound(all_contexts& contexts,
                                               const sattn::attention_plan& plan,
                                               const attention_problem& p) {
  return within_bound(contexts, plan, p, expected(p, mask_of(plan)));
}

}  // namespace test_support
