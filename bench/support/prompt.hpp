// SPDX-License-Identifier: Apache-2.0
//
// A prompt that has what methods look for, and what their benchmarks register and report alike.
#pragma once

#include <random>
#include <sattn/sattn.hpp>
#include <string>
#include <vector>

#include "support/measure.hpp"
#include "support/workload.hpp"

namespace bench {

/// Queries, keys and values of one layer, head_dim 128: a slow walk for each kv head that its
/// queries and keys follow (neighbours are alike), a sink, and noise.
class prompt {
 public:
  static constexpr index_t dim = 128;

  prompt(index_t len, index_t kv_heads, index_t group)
      : shape_{len, len, kv_heads * group, kv_heads, 0},
        q_(static_cast<std::size_t>(len * kv_heads * group * dim)),
        k_(static_cast<std::size_t>(len * kv_heads * dim)),
        v_(random_floats(len * kv_heads * dim, 3)), out_(q_.size()) {
    std::minstd_rand random(1);
    std::normal_distribution<float> normal;
    std::vector<float> walk(static_cast<std::size_t>(kv_heads * dim));
    for (float& x : walk) x = normal(random);
    for (index_t t = 0; t < len; ++t) {
      for (index_t i = 0; i < kv_heads * dim; ++i) {
        const index_t head = i / dim, d = i % dim;
        float& w = walk[static_cast<std::size_t>(i)];
        w = 0.995f * w + 0.1f * normal(random);
        for (index_t h = head * group; h < (head + 1) * group; ++h) {
          q_[static_cast<std::size_t>((t * shape_.q_heads + h) * dim + d)] =
              w + normal(random) + (d % 16 == 0 ? 2.0f : 0.0f);
        }
        k_[static_cast<std::size_t>(t * kv_heads * dim + i)] =
            0.7f * w + 0.7f * normal(random) + (t < 4 && d % 16 == 0 ? 6.0f : 0.0f);
      }
    }
  }

  const attention_shape& shape() const { return shape_; }
  sattn::tensor_view<const float> q_view() const {
    return sattn::nhd<const float>(q_.data(), shape_.q_len, shape_.q_heads, dim);
  }
  sattn::tensor_view<const float> k_view() const {
    return sattn::nhd<const float>(k_.data(), shape_.kv_len, shape_.kv_heads, dim);
  }
  sattn::tensor_view<const float> v_view() const {
    return sattn::nhd<const float>(v_.data(), shape_.kv_len, shape_.kv_heads, dim);
  }
  sattn::kv_view kv() const { return sattn::kv(k_view(), v_view()); }
  sattn::tensor_view<float> out_view() {
    return sattn::nhd(out_.data(), shape_.q_len, shape_.q_heads, dim);
  }

 private:
  attention_shape shape_;
  std::vector<float> q_, k_, v_, out_;
};

inline void report_pairs(benchmark::State& state, const sattn::plan_stats& stats) {
  state.counters["density"] = stats.density_executed();
  state.counters["density_selected"] = stats.density_selected();
}

/// Registers run(state). Smoke: not a measurement.
template <class F>
void add_case(const std::string& name, bool smoke, F run) {
  benchmark::RegisterBenchmark((name + (smoke ? "/smoke" : "")).c_str(), run)
      ->Unit(benchmark::kMillisecond);
}

}  // namespace bench
