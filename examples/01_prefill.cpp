// SPDX-License-Identifier: Apache-2.0
//
// Causal prefill with grouped heads: two patterns against dense attention.

#include <cmath>
#include <cstdio>
#include <random>
#include <sattn/sattn.hpp>
#include <vector>

namespace sa = sattn;

constexpr sa::index_t tokens = 2048, q_heads = 8, kv_heads = 2, dim = 64;

std::vector<float> random_floats(std::size_t count, float mean) {
  static std::minstd_rand random(1);
  std::normal_distribution<float> normal(mean, 1.0f);
  std::vector<float> x(count);
  for (float& value : x) value = normal(random);
  return x;
}

double relative_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(double{a[i]} - double{b[i]}, 2);
    size += std::pow(double{b[i]}, 2);
  }
  return std::sqrt(difference / size);
}

int main() {
  std::vector<float> q_data = random_floats(tokens * q_heads * dim, 0.5f);
  std::vector<float> k_data = random_floats(tokens * kv_heads * dim, 0.0f);
  std::vector<float> v_data = random_floats(tokens * kv_heads * dim, 0.0f);
  for (std::size_t i = 0; i < k_data.size(); ++i) {  // now and then a key that all queries look for
    if (i / (kv_heads * dim) % 97 == 5) k_data[i] += 2.0f;
  }
  const auto q = sa::nhd(q_data.data(), tokens, q_heads, dim);
  const auto kv = sa::kv(sa::nhd(k_data.data(), tokens, kv_heads, dim),
                         sa::nhd(v_data.data(), tokens, kv_heads, dim));
  const auto shape = sa::shape_of(q, kv);
  sa::context ctx;  // all cores
  const auto run = [&](const auto& pattern, std::vector<float>& out) {
    const sa::attention_plan plan = sa::plan_prefill(ctx, shape, pattern);
    sa::attend(ctx, plan, q, kv, {sa::nhd(out.data(), tokens, q_heads, dim)});
    return 100 * plan.stats().density_selected();
  };
  std::vector<float> dense(q_data.size()), local(q_data.size()), found(q_data.size());
  run(sa::dense{}, dense);
  const double local_keys = run(sa::sink{4} | sa::sliding_window{256}, local);
  const auto mass = sa::last_query_scores(ctx, shape, q, kv.k);  // of the last 64 queries
  const sa::selection rule{sa::budget::fixed(64)};
  const double found_keys = run(sa::select_vertical_slash(ctx, mass, rule, rule), found);
  const double local_error = relative_difference(local, dense);
  const double found_error = relative_difference(found, dense);
  std::printf("sink + window:  %4.1f %% of the keys, off by %.3f\n", local_keys, local_error);
  std::printf("vertical-slash: %4.1f %% of the keys, off by %.3f\n", found_keys, found_error);
  return found_error < local_error ? 0 : 1;
}
