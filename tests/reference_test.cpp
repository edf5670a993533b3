// SPDX-License-Identifier: Apache-2.0
//
// The oracle against closed forms; its error bound against float implementations that are right and
// that are slightly wrong; and controls that show the instruments of support/ can fail.

#include "reference/reference.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/guard_buffer.hpp"
#include "support/random.hpp"

namespace {

using reference::problem;
using std::ptrdiff_t;
using test_support::bit_equal;
using test_support::random_source;
using test_support::seed_trace;
using test_support::within_bound;

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

struct shape {
  ptrdiff_t q_len = 1;
  ptrdiff_t kv_len = 1;
  ptrdiff_t q_heads = 1;
  ptrdiff_t kv_heads = 1;
  ptrdiff_t head_dim = 1;
  ptrdiff_t v_dim = 1;
};

// A problem and the memory it points to.
struct owned_problem {
  explicit owned_problem(const shape& s, random_source random = random_source())
      : q(random.normal_tensor(s.q_len * s.q_heads * s.head_dim)),
        k(random.normal_tensor(s.kv_len * s.kv_heads * s.head_dim)),
        v(random.normal_tensor(s.kv_len * s.kv_heads * s.v_dim)),
        p{.q_len = s.q_len,
          .kv_len = s.kv_len,
          .q_heads = s.q_heads,
          .kv_heads = s.kv_heads,
          .head_dim = s.head_dim,
          .v_dim = s.v_dim,
          .q = {q.data(), s.q_heads * s.head_dim, s.head_dim},
          .k = {k.data(), s.kv_heads * s.head_dim, s.head_dim},
          .v = {v.data(), s.kv_heads * s.v_dim, s.v_dim},
          .scale = 1 / std::sqrt(static_cast<double>(s.head_dim))} {}
  owned_problem(const owned_problem&) = delete;
  owned_problem& operator=(const owned_problem&) = delete;

  std::vector<float> q, k, v;
  problem p;
};

bool causal(const problem& p, ptrdiff_t row, ptrdiff_t key) {
  return key <= row + p.kv_len - p.q_len;
}

// ---- float implementations
// -------------------------------------------------------------------------

struct float_result {
  std::vector<float> out;
  std::vector<float> lse;
};

using float_row = void (*)(const problem&, std::span<const float> logits,
                           std::span<const float* const> values, float* out, float& sum,
                           float& max);

// Logits as written: dot, scale, cap.
float naive_logit(const problem& p, const float* q, const float* k) {
  float dot = 0;
  for (ptrdiff_t i = 0; i < p.head_dim; ++i) dot += q[i] * k[i];
  const auto cap = static_cast<float>(p.soft_cap);
  const float s = dot * static_cast<float>(p.scale);
  return cap > 0 ? cap * std::tanh(s / cap) : s;
}

// Three passes.
void naive_row(const problem& p, std::span<const float> logits,
               std::span<const float* const> values, float* out, float& sum, float& max) {
  for (const float s : logits) max = std::max(max, s);
  for (const float s : logits) sum += std::exp(s - max);
  for (std::size_t j = 0; j < logits.size(); ++j) {
    const float weight = std::exp(logits[j] - max);
    for (ptrdiff_t i = 0; i < p.v_dim; ++i) out[i] += weight * values[j][i];
  }
}

// Online softmax over chunks of 16 keys, exp by way of exp2, fused accumulation: unlike naive_row
// in every rounding.
void streaming_row(const problem& p, std::span<const float> logits,
                   std::span<const float* const> values, float* out, float& sum, float& max) {
  constexpr float log2e = 1.44269504F;
  constexpr std::size_t chunk = 16;
  for (std::size_t begin = 0; begin < logits.size(); begin += chunk) {
    const std::size_t end = std::min(begin + chunk, logits.size());
    const float old_max = max;
    for (std::size_t j = begin; j < end; ++j) max = std::max(max, logits[j]);
    const float rescale = std::exp2((old_max - max) * log2e);
    sum *= rescale;
    for (ptrdiff_t i = 0; i < p.v_dim; ++i) out[i] *= rescale;
    for (std::size_t j = begin; j < end; ++j) {
      const float weight = std::exp2((logits[j] - max) * log2e);
      sum += weight;
      for (ptrdiff_t i = 0; i < p.v_dim; ++i) out[i] = std::fma(weight, values[j][i], out[i]);
    }
  }
}

float_result run(const problem& p, float_row row_of) {
  float_result r;
  for (ptrdiff_t row = 0; row < p.q_len; ++row) {
    for (ptrdiff_t head = 0; head < p.q_heads; ++head) {
      const ptrdiff_t kv_head = head / (p.q_heads / p.kv_heads);
      std::vector<float> logits;
      std::vector<const float*> values;
      for (ptrdiff_t key = 0; key < p.kv_len; ++key) {
        if (p.selected && !p.selected(head, row, key)) continue;
        logits.push_back(
            naive_logit(p, p.q.data + row * p.q.token_stride + head * p.q.head_stride,
                        p.k.data + key * p.k.token_stride + kv_head * p.k.head_stride));
        values.push_back(p.v.data + key * p.v.token_stride + kv_head * p.v.head_stride);
      }
      std::vector<float> out(static_cast<std::size_t>(p.v_dim), 0.F);
      float max = -infinity;
      float sum = 0;
      if (!logits.empty()) row_of(p, logits, values, out.data(), sum, max);
      r.lse.push_back(logits.empty() ? -infinity : max + std::log(sum));
      if (p.sink_logits != nullptr) sum += std::exp(p.sink_logits[head] - max);
      for (const float o : out) r.out.push_back(logits.empty() ? 0.F : o / sum);
    }
  }
  return r;
}

// Over `problems` problems of mixed shapes, masks, logit sizes, caps and sinks.
void expect_within_bound(float_row row_of, int problems) {
  const seed_trace trace;
  random_source random;
  for (int n = 0; n < problems; ++n) {
    SCOPED_TRACE("problem " + std::to_string(n));
    const ptrdiff_t kv_heads = random.pick({1, 2, 3});
    owned_problem x({.q_len = random.integer(1, 12),
                     .kv_len = random.pick({1, 2, 3, 15, 16, 17, 63, 65, 129, 500, 1025}),
                     .q_heads = kv_heads * random.pick({1, 2, 4}),
                     .kv_heads = kv_heads,
                     .head_dim = random.pick({1, 2, 3, 7, 8, 17, 64, 80, 128, 130, 256}),
                     .v_dim = random.pick({1, 5, 16, 64, 96, 128})},
                    random_source(test_support::test_seed() + static_cast<std::uint64_t>(n)));
    x.p.scale *= random.pick({0.01, 1.0, 1.0, 5.0, 30.0, -1.0});
    x.p.soft_cap = random.pick({0.0, 0.0, 0.5, 30.0});
    const std::vector<float> sinks = random.normal_tensor(x.p.q_heads);
    if (random.pick({0, 0, 1}) == 1) x.p.sink_logits = sinks.data();
    const ptrdiff_t stride = random.integer(1, 4);
    x.p.selected = [&x, stride](ptrdiff_t head, ptrdiff_t row, ptrdiff_t key) {
      return causal(x.p, row, key) && (head + row + key) % stride == 0;
    };
    const float_result got = run(x.p, row_of);
    EXPECT_TRUE(within_bound(got.out, got.lse, reference::attention(x.p)));
  }
}

// ---- closed forms
// ----------------------------------------------------------------------------------

TEST(reference_attention, equal_scores_give_the_mean_of_v) {
  owned_problem x({.kv_len = 7, .head_dim = 5, .v_dim = 3});
  std::fill(x.q.begin(), x.q.end(), 0.F);
  const reference::result r = reference::attention(x.p);
  for (std::size_t i = 0; i < 3; ++i) {
    double mean = 0;
    for (std::size_t j = 0; j < 7; ++j) mean += double{x.v[3 * j + i]} / 7;
    EXPECT_NEAR(r.out[i], mean, 1e-15);
  }
  EXPECT_NEAR(r.lse[0], std::log(7.0), 1e-15);
}

TEST(reference_attention, one_key_gives_its_value_and_logit) {
  owned_problem x({.kv_len = 9, .head_dim = 2, .v_dim = 4});
  x.p.selected = [](ptrdiff_t, ptrdiff_t, ptrdiff_t key) { return key == 5; };
  const reference::result r = reference::attention(x.p);
  for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(r.out[i], double{x.v[4 * 5 + i]});
  const double dot = double{x.q[0]} * double{x.k[10]} + double{x.q[1]} * double{x.k[11]};
  EXPECT_DOUBLE_EQ(r.lse[0], dot / std::sqrt(2.0));
}

TEST(reference_attention, two_keys_give_the_logistic_function) {
  owned_problem x({.kv_len = 2});
  x.q = {1.F};
  x.k = {3.F, 1.F};
  x.v = {1.F, 0.F};
  x.p.q.data = x.q.data();
  x.p.k.data = x.k.data();
  x.p.v.data = x.v.data();
  EXPECT_DOUBLE_EQ(reference::attention(x.p).out[0], 1 / (1 + std::exp(-2.0)));
}

TEST(reference_attention, strides_and_head_groups_address_the_right_rows) {
  owned_problem x({.q_len = 2, .kv_len = 3, .q_heads = 4, .kv_heads = 2, .head_dim = 1});
  for (std::size_t i = 0; i < x.v.size(); ++i) x.v[i] = static_cast<float>(i);
  x.p.selected = [](ptrdiff_t head, ptrdiff_t row, ptrdiff_t key) {
    return key == (head + row) % 3;
  };
  const reference::result r = reference::attention(x.p);
  for (ptrdiff_t row = 0; row < 2; ++row) {
    for (ptrdiff_t head = 0; head < 4; ++head) {
      const auto pair = static_cast<std::size_t>(row * 4 + head);
      EXPECT_EQ(r.out[pair], static_cast<double>((head + row) % 3 * 2 + head / 2));
    }
  }
  x.p.kv_heads = 3;
  EXPECT_THROW(reference::attention(x.p), std::invalid_argument);
}

TEST(reference_attention, sink_equals_an_extra_key_of_value_zero) {
  owned_problem x({.kv_len = 6, .head_dim = 1, .v_dim = 2});
  const std::vector<float> sink = {1.5F};
  const reference::result without = reference::attention(x.p);
  x.p.sink_logits = sink.data();
  const reference::result with = reference::attention(x.p);

  x.k.push_back(1.5F / x.q[0]);
  x.v.insert(x.v.end(), {0.F, 0.F});
  x.p.k.data = x.k.data();
  x.p.v.data = x.v.data();
  x.p.kv_len = 7;
  x.p.sink_logits = nullptr;
  const reference::result extra = reference::attention(x.p);
  EXPECT_EQ(with.lse, without.lse);
  for (std::size_t i = 0; i < 2; ++i) EXPECT_NEAR(with.out[i], extra.out[i], 1e-6);
}

TEST(reference_attention, sink_far_above_the_keys_takes_everything_and_minus_infinity_nothing) {
  owned_problem x({.kv_len = 6, .head_dim = 1, .v_dim = 2});
  const reference::result without = reference::attention(x.p);
  std::vector<float> sink = {1e5F};
  x.p.sink_logits = sink.data();
  const reference::result with = reference::attention(x.p);
  EXPECT_EQ(with.out, std::vector<double>(2, 0.0));
  EXPECT_EQ(with.lse, without.lse);
  sink[0] = -infinity;
  EXPECT_EQ(reference::attention(x.p).out, without.out);
}

TEST(reference_attention, soft_cap_is_the_identity_when_large_and_the_sign_when_small) {
  owned_problem x({.kv_len = 40, .head_dim = 8});
  const double uncapped = reference::attention(x.p).lse[0];
  x.p.soft_cap = 1e6;
  EXPECT_NEAR(reference::attention(x.p).lse[0], uncapped, 1e-9);

  x.p.scale = 1e6;
  x.p.soft_cap = 2;
  double sum = 0;
  for (std::size_t j = 0; j < 40; ++j) {
    const double dot = std::inner_product(x.q.begin(), x.q.end(), x.k.data() + 8 * j, 0.0);
    sum += std::exp(dot > 0 ? 2.0 : -2.0);
  }
  EXPECT_NEAR(reference::attention(x.p).lse[0], std::log(sum), 1e-9);
}

TEST(reference_attention, shifting_all_logits_shifts_only_the_lse) {
  // The second dim of every key is 1, so the second dim of q is a shift.
  owned_problem x({.kv_len = 30, .head_dim = 2, .v_dim = 3});
  x.p.scale = 1;
  for (std::size_t j = 0; j < 30; ++j) x.k[2 * j + 1] = 1;
  x.q[1] = 0;
  const reference::result base = reference::attention(x.p);
  for (const float shift : {-1e4F, -100.F, 100.F, 1e4F}) {
    x.q[1] = shift;
    const reference::result r = reference::attention(x.p);
    for (std::size_t i = 0; i < 3; ++i) EXPECT_NEAR(r.out[i], base.out[i], 1e-11);
    EXPECT_NEAR(r.lse[0], base.lse[0] + double{shift}, 1e-11);
  }
}

TEST(reference_attention, rows_without_keys_are_zero_and_exact) {
  owned_problem x({.q_len = 3, .kv_len = 2, .q_heads = 2, .head_dim = 4, .v_dim = 2});
  const std::vector<float> sinks = {0.F, 1.F};
  x.p.sink_logits = sinks.data();
  x.p.selected = [](ptrdiff_t head, ptrdiff_t row, ptrdiff_t) { return row == 1 && head == 0; };
  const reference::result r = reference::attention(x.p);
  for (std::size_t pair = 0; pair < 6; ++pair) {
    if (pair == 2) continue;
    EXPECT_EQ(r.lse[pair], -std::numeric_limits<double>::infinity());
    for (std::size_t i = 2 * pair; i < 2 * pair + 2; ++i) {
      EXPECT_EQ(r.out[i], 0);
      EXPECT_EQ(r.out_bound[i], 0);
    }
  }
  EXPECT_TRUE(std::isfinite(r.lse[2]));
  x.p.kv_len = 0;
  EXPECT_EQ(reference::attention(x.p).out, std::vector<double>(12, 0.0));
}

TEST(reference_attention, keys_with_logit_minus_infinity_count_as_absent) {
  owned_problem x({.kv_len = 3});
  x.q[0] = 1;
  x.k[1] = -infinity;
  const reference::result r = reference::attention(x.p);
  x.p.selected = [](ptrdiff_t, ptrdiff_t, ptrdiff_t key) { return key != 1; };
  EXPECT_EQ(r.out, reference::attention(x.p).out);
  x.p.selected = [](ptrdiff_t, ptrdiff_t, ptrdiff_t key) { return key == 1; };
  EXPECT_EQ(reference::attention(x.p).out[0], 0);
}

TEST(reference_attention, nan_reaches_what_it_must_and_nothing_else) {
  owned_problem x({.q_len = 2, .kv_len = 4, .v_dim = 2});
  x.p.selected = [](ptrdiff_t, ptrdiff_t row, ptrdiff_t key) { return key <= row; };
  x.k[3] = x.v[6] = x.v[7] = nan;  // never selected
  x.v[2] = nan;                    // key 1, column 0: only row 1 sees it
  const reference::result r = reference::attention(x.p);
  const std::vector<bool> expected = {false, false, true, false};
  for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(std::isnan(r.out[i]), expected[i]);
  for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(std::isnan(r.out_bound[i]), expected[i]);
  EXPECT_TRUE(std::isfinite(r.lse[1]));
  x.k[1] = nan;
  EXPECT_TRUE(std::isnan(reference::attention(x.p).lse[1]));
  EXPECT_TRUE(std::isfinite(reference::attention(x.p).lse[0]));
}

TEST(reference_probabilities, sum_to_one_less_the_sink_and_weigh_v) {
  owned_problem x({.q_len = 2, .kv_len = 33, .q_heads = 2, .head_dim = 4});
  x.p.selected = [](ptrdiff_t, ptrdiff_t, ptrdiff_t key) { return key % 3 != 0; };
  const std::vector<float> sinks = {-1.F, 0.5F};
  x.p.sink_logits = sinks.data();
  const std::vector<double> p = reference::probabilities(x.p, 1, 1);
  const reference::result r = reference::attention(x.p);
  const double kept = 1 / (1 + std::exp(0.5 - r.lse[3]));
  EXPECT_NEAR(std::accumulate(p.begin(), p.end(), 0.0), kept, 1e-14);
  EXPECT_NEAR(std::inner_product(p.begin(), p.end(), x.v.begin(), 0.0), r.out[3], 1e-14);
  EXPECT_EQ(p[3], 0);
}

TEST(reference_top_k, breaks_ties_by_position_and_returns_positions_in_order) {
  const std::vector<double> scores = {1, 5, 2, 5, 5, -infinity};
  EXPECT_EQ(reference::top_k(scores, 0), (std::vector<ptrdiff_t>{}));
  EXPECT_EQ(reference::top_k(scores, 2), (std::vector<ptrdiff_t>{1, 3}));
  EXPECT_EQ(reference::top_k(scores, 4), (std::vector<ptrdiff_t>{1, 2, 3, 4}));
  EXPECT_EQ(reference::top_k(scores, 9), (std::vector<ptrdiff_t>{0, 1, 2, 3, 4, 5}));
}

// ---- the bound
// -------------------------------------------------------------------------------------

TEST(reference_bound, holds_for_a_naive_float_implementation) {
  expect_within_bound(naive_row, 300);
}

TEST(reference_bound, holds_for_a_streaming_float_implementation) {
  expect_within_bound(streaming_row, 300);
}

TEST(reference_bound, holds_for_logits_whose_error_exceeds_one) {
  owned_problem x({.q_len = 4, .kv_len = 100, .head_dim = 16, .v_dim = 8});
  for (const double scale : {1e6, 1e9, 1e30}) {
    x.p.scale = scale;
    const float_result got = run(x.p, naive_row);
    EXPECT_TRUE(within_bound(got.out, got.lse, reference::attention(x.p)));
  }
}

TEST(reference_bound, holds_where_float_underflows) {
  owned_problem x({.q_len = 4, .kv_len = 100, .head_dim = 16, .v_dim = 8});
  for (float& value : x.v) value *= 1e-38F;
  for (float& value : x.k) value *= 1e-39F;
  const float_result got = run(x.p, naive_row);
  EXPECT_TRUE(within_bound(got.out, got.lse, reference::attention(x.p)));
}

TEST(reference_bound, catches_one_dropped_key_of_fifty) {
  const seed_trace trace;
  owned_problem x({.q_len = 8, .kv_len = 50, .head_dim = 64, .v_dim = 64});
  const reference::result want = reference::attention(x.p);
  for (ptrdiff_t dropped = 0; dropped < 50; ++dropped) {
    x.p.selected = [=](ptrdiff_t, ptrdiff_t row, ptrdiff_t key) {
      return row != 3 || key != dropped;  // in a single row
    };
    const float_result got = run(x.p, naive_row);
    EXPECT_FALSE(within_bound(got.out, {}, want));
    EXPECT_FALSE(test_support::elements_within_bound("lse", got.lse, want.lse, want.lse_bound));
  }
}

// With dense random V the worst case of 4096 additions hides the lightest key. With few keys in
// each column, and a large value in the key's row, it shows: the bound follows the column's own
// terms. Long tests want such V.
TEST(reference_bound, catches_the_lightest_key_of_4096_when_v_is_sparse) {
  const seed_trace trace;
  constexpr ptrdiff_t kv_len = 4096;
  constexpr ptrdiff_t v_dim = 128;
  owned_problem x({.kv_len = kv_len, .head_dim = 64, .v_dim = v_dim});
  for (ptrdiff_t i = 0; i < kv_len * v_dim; ++i) {
    if (i % v_dim != i / v_dim % v_dim) x.v[static_cast<std::size_t>(i)] = 0;
  }
  const std::vector<double> p = reference::probabilities(x.p, 0, 0);
  const ptrdiff_t lightest = std::min_element(p.begin(), p.end()) - p.begin();
  x.v[static_cast<std::size_t>(lightest * v_dim + lightest % v_dim)] = 16;
  const reference::result want = reference::attention(x.p);
  float_result got = run(x.p, streaming_row);
  EXPECT_TRUE(within_bound(got.out, got.lse, want));
  x.p.selected = [=](ptrdiff_t, ptrdiff_t, ptrdiff_t key) { return key != lightest; };
  got = run(x.p, streaming_row);
  EXPECT_FALSE(within_bound(got.out, {}, want));
}

TEST(reference_bound, catches_a_scale_that_is_off_by_1e_4) {
  const seed_trace trace;
  for (const ptrdiff_t head_dim : {16, 64, 128}) {
    owned_problem x({.q_len = 8, .kv_len = 50, .head_dim = head_dim, .v_dim = 64});
    const reference::result want = reference::attention(x.p);
    x.p.scale *= 1 + 1e-4;
    const float_result got = run(x.p, naive_row);
    EXPECT_FALSE(within_bound(got.out, got.lse, want)) << "head_dim " << head_dim;
  }
}

TEST(reference_bound, catches_a_bias_that_no_element_shows) {
  const seed_trace trace;
  owned_problem x({.q_len = 20, .kv_len = 50, .head_dim = 64, .v_dim = 64});
  const reference::result want = reference::attention(x.p);
  float_result got = run(x.p, naive_row);
  EXPECT_TRUE(within_bound(got.out, got.lse, want));
  for (std::size_t i = 0; i < got.out.size(); ++i) {
    got.out[i] += static_cast<float>(want.out_bound[i] * 0.1);
  }
  EXPECT_FALSE(within_bound(got.out, got.lse, want));
}

// ---- controls of the instruments
// -------------------------------------------------------------------

TEST(within_bound, fails_on_nan_wrong_infinity_and_wrong_size) {
  owned_problem x({.q_len = 2, .kv_len = 4, .v_dim = 2});
  x.p.selected = [](ptrdiff_t, ptrdiff_t row, ptrdiff_t) { return row == 1; };
  const reference::result want = reference::attention(x.p);
  const float_result right = run(x.p, naive_row);
  EXPECT_TRUE(within_bound(right.out, right.lse, want));

  float_result wrong = right;
  wrong.out[3] = nan;
  EXPECT_FALSE(within_bound(wrong.out, wrong.lse, want));
  wrong = right;
  wrong.out[0] = std::numeric_limits<float>::denorm_min();  // the row without keys is exact
  EXPECT_FALSE(within_bound(wrong.out, wrong.lse, want));
  wrong = right;
  wrong.lse[0] = std::numeric_limits<float>::lowest();
  EXPECT_FALSE(within_bound(wrong.out, wrong.lse, want));
  wrong = right;
  wrong.out.pop_back();
  EXPECT_FALSE(within_bound(wrong.out, wrong.lse, want));
}

TEST(within_bound, wants_nan_where_the_reference_is_nan) {
  owned_problem x({.kv_len = 4});
  x.v[2] = nan;
  const reference::result want = reference::attention(x.p);
  EXPECT_TRUE(within_bound(std::vector<float>{nan}, {}, want));
  EXPECT_FALSE(within_bound(std::vector<float>{0.F}, {}, want));
}

TEST(bit_equal, tells_signed_zeros_apart_and_equates_a_nan_with_itself) {
  EXPECT_TRUE(bit_equal(std::vector<float>{nan, 1.F}, std::vector<float>{nan, 1.F}));
  EXPECT_FALSE(bit_equal(std::vector<float>{0.F}, std::vector<float>{-0.F}));
  EXPECT_FALSE(bit_equal(std::vector<float>{0.F}, std::vector<float>{}));
}

TEST(guard_buffer, faults_on_the_first_element_outside_and_on_writes_when_read_only) {
  using test_support::faults;
  using test_support::guard;
  for (const ptrdiff_t size : {0, 1, 7, 1024, 1025}) {
    test_support::guard_buffer<float> after(size, guard::after);
    test_support::guard_buffer<float> before(size, guard::before);
    volatile float* past = after.end();
    volatile float* ahead = before.begin() - 1;
    EXPECT_EQ(faults([&] { (void)*past; }), 1);
    EXPECT_EQ(faults([&] { (void)*ahead; }), 1);
    if (size == 0) continue;
    volatile float* last = past - 1;
    EXPECT_EQ(faults([&] { *last = 1; }), 0);
    after.read_only();
    EXPECT_EQ(faults([&] { (void)*last; }), 0);
    EXPECT_EQ(faults([&] { *last = 1; }), 1);
    EXPECT_TRUE(std::all_of(before.begin(), before.end(), [](float x) { return std::isnan(x); }));
  }
}

TEST(random_source, repeats_for_a_seed_and_stays_in_its_range) {
  EXPECT_TRUE(bit_equal(random_source(5).normal_tensor(9), random_source(5).normal_tensor(9)));
  EXPECT_FALSE(bit_equal(random_source(5).normal_tensor(9), random_source(6).normal_tensor(9)));
  random_source random;
  for (int n = 0; n < 1000; ++n) {
    const ptrdiff_t x = random.integer(-2, 3);
    EXPECT_GE(x, -2);
    EXPECT_LT(x, 3);
  }
}

}  // namespace
