// SPDX-License-Identifier: Apache-2.0
//
// Recall against budget of every method on captured attention: the last 1,024 of 4,096 tokens as a
// chunk of a prompt, some of the last tokens as decoding steps, and the first 3,072 tokens as a
// prompt whose cache is cut before the other 1,024 look at it. Prints the table of docs/methods.md;
// the ends are as many random keys and the best keys of each row.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <sattn/api.hpp>
#include <string>
#include <utility>
#include <vector>

#include "../examples/sattn_demo/layer.hpp"

namespace {

using namespace sattn;  // NOLINT(google-build-using-namespace)

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

/// Attention probabilities of some rows, in double.
class captured_layer {
 public:
  captured_layer()
      : layer_(demo::load_layer(demo::find_layers(std::filesystem::path(__FILE__).parent_path() /
                                                  "../examples/data")[0])) {}
  index_t tokens() const { return layer_.k.tokens; }
  index_t q_heads() const { return layer_.q.heads; }
  index_t group() const { return layer_.q.heads / layer_.k.heads; }
  tensor_view<const float> q(index_t begin, index_t end) const {
    return layer_.q.view().slice(begin, end);
  }
  kv_view kv(index_t end) const {
    return sattn::kv(layer_.k.view().slice(0, end), layer_.v.view().slice(0, end));
  }
  /// Of the row at a position over the keys [0, end), divided by their sum.
  std::vector<double> probabilities(index_t head, index_t position, index_t end) const {
    const index_t dim = layer_.q.dim;
    const float* const row = layer_.q.view().row(position, head);
    std::vector<double> p(at(end));
    for (index_t key = 0; key < end; ++key) {
      const float* const k = layer_.k.view().row(key, head / group());
      double sum = 0;
      for (index_t d = 0; d < dim; ++d) sum += double{row[d]} * double{k[d]};
      p[at(key)] = sum / std::sqrt(static_cast<double>(dim));
    }
    const double top = *std::max_element(p.begin(), p.end());
    double sum = 0;
    for (double& x : p) sum += x = std::exp(x - top);
    for (double& x : p) x /= sum;
    return p;
  }

 private:
  demo::layer layer_;
};

/// Means over rows and heads.
struct recall {
  double density = 0, random = 0, method = 0, best = 0;
  index_t rows = 0;

  /// Whether a row's choice is no better than its best keys, to a rounding of the sums.
  bool add(const std::vector<double>& p, const std::vector<bool>& chosen) {
    std::vector<double> sorted = p;
    std::sort(sorted.rbegin(), sorted.rend());
    double mass = 0, most = 0;
    std::size_t count = 0;
    for (std::size_t i = 0; i < p.size(); ++i) {
      if (chosen[i]) mass += p[i], most += sorted[count++];
    }
    const double share = static_cast<double>(count) / static_cast<double>(p.size());
    density += share;
    random += share;  // what as many random keys hold on average
    method += mass;
    best += most;
    ++rows;
    return mass <= most * (1 + 1e-12);
  }
  void print(const std::string& name) const {
    const auto n = static_cast<double>(rows);
    std::printf("| %-34s | %5.1f %% | %.3f | %.3f | %.3f |\n", name.c_str(), 100 * density / n,
                random / n, method / n, best / n);
  }
};

class real_data : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    std::printf("| method                             | density | random | recall | top-k |\n"
                "| ---------------------------------- | ------- | ----- | ----- | ----- |\n");
  }
  void expect_between(const std::string& name, const recall& r, bool no_row_above_top_k) {
    r.print(name);
    EXPECT_TRUE(no_row_above_top_k) << name;
    EXPECT_GT(r.method, r.random) << name;
    EXPECT_LE(r.method, r.best * (1 + 1e-12)) << name;
  }

  captured_layer layer;
  thread_pool threads{2};
  context ctx{threads};
};

TEST_F(real_data, prefill_methods_recall_more_than_random_keys_and_less_than_the_best) {
  constexpr index_t rows = 1024, step = 73;
  const index_t n = layer.tokens(), first = n - rows;
  std::vector<std::vector<double>> p;  // [head][sample]
  for (index_t h = 0; h < layer.q_heads(); ++h) {
    for (index_t row = step - 1; row < rows; row += step) {
      p.push_back(layer.probabilities(h, first + row, first + row + 1));
    }
  }
  const auto measure = [&](const std::string& name, const auto& method) {
    const attention_plan plan =
        plan_prefill(ctx, layer.q(first, n), layer.kv(n), method).plan;
    recall r;
    bool below = true;
    std::size_t sample = 0;
    for (index_t h = 0; h < layer.q_heads(); ++h) {
      const std::vector<std::uint8_t> mask = expand(plan, h);
      for (index_t row = step - 1; row < rows; row += step, ++sample) {
        const auto begin = mask.begin() + row * n;
        below = r.add(p[sample], std::vector<bool>(begin, begin + first + row + 1)) && below;
      }
    }
    expect_between(name, r, below);
  };
  for (const token_t w : {128, 384, 1024}) {
    measure("a_shape 4 + " + std::to_string(w), a_shape{4, w});
  }
  for (const token_t b : {128, 256, 512}) {
    measure("sf_vertical_slash " + std::to_string(b), sf_vertical_slash(b, b));
  }
  for (const token_t b : {100, 200, 400}) {
    measure("minference " + std::to_string(b), minference(b, 2 * b));
  }
  for (const double c : {0.3, 0.5, 0.65}) {
    measure("sf_flexprefill " + std::to_string(c).substr(0, 4), sf_flexprefill(c, 512, 128));
  }
  for (const double c : {0.3, 0.6, 0.9}) {
    measure("flexprefill " + std::to_string(c).substr(0, 4),
            flexprefill{.coverage = c, .min_budget = 128, .block_size = 64});
  }
  for (const index_t b : {12, 24, 64}) {
    measure("sf_block_sparse 16 x " + std::to_string(b), sf_block_sparse(16, b));
  }
  for (const index_t b : {4, 8, 16}) {
    measure("sf_block_sparse 64 x " + std::to_string(b), sf_block_sparse(64, b));
  }
  for (const index_t b : {4, 8, 16}) {
    measure("minference_block " + std::to_string(b), minference_block(b));
  }
  for (const double c : {0.5, 0.7, 0.9}) {
    measure("xattention " + std::to_string(c).substr(0, 4), xattention{.threshold = c});
  }
  for (const index_t b : {64, 256, 1024}) measure("top_k " + std::to_string(b), top_k(b));
}

TEST_F(real_data, decode_methods_recall_more_than_random_keys_and_less_than_the_best) {
  const index_t n = layer.tokens();
  std::vector<page_summaries> summaries;
  paged_kv_cache<std::int8_t> copy({.kv_heads = layer.kv(n).k.heads, .head_dim = layer.kv(n).k.dim,
                                    .page_size = 64, .capacity = n});
  const tensor_view<const float> k{static_cast<const float*>(layer.kv(n).k.data), n,
                                   layer.kv(n).k.heads, layer.kv(n).k.dim,
                                   layer.kv(n).k.token_stride / 4, layer.kv(n).k.head_stride / 4};
  copy.append(k, k);
  // One step at each of the last positions that are sampled.
  const auto measure = [&](const std::string& name, const auto& method_for) {
    recall r;
    bool below = true;
    for (index_t position = n - 1; position > n - 300; position -= 37) {
      const index_t keys = position + 1;
      summaries.clear();
      for (index_t h = 0; h < k.heads; ++h) {
        summaries.emplace_back(page_summary_options{k.dim, 16, dtype::f16});
        summaries.back().update(layer.kv(keys).k, h);
      }
      stored_view shadow = copy.view().k;
      shadow.tokens = keys;
      const attention_plan plan =
          plan_decode(ctx, layer.q(position, keys), layer.kv(keys), method_for(shadow),
                      {.summaries = summaries})
              .plan;
      for (index_t h = 0; h < layer.q_heads(); ++h) {
        const std::vector<std::uint8_t> mask = expand(plan, h);
        below = r.add(layer.probabilities(h, position, keys),
                      std::vector<bool>(mask.begin(), mask.end())) && below;
      }
    }
    expect_between(name, r, below);
  };
  for (const index_t b : {128, 256, 512, 1024}) {
    const std::string budget = std::to_string(b);
    measure("streaming 4 + " + budget, [=](const stored_view&) { return a_shape{4, token_t(b)}; });
    measure("quest " + budget, [=](const stored_view&) { return quest(b); });
    measure("sf_quest " + budget, [=](const stored_view&) { return sf_quest(b); });
    measure("twilight of sf_quest " + budget,
            [=](const stored_view& s) { return twilight(sf_quest(b), 0.85, s); });
    measure("shadow_top_k " + budget,
            [=](const stored_view& s) { return shadow_top_k(b, s); });
    measure("top_k " + budget, [=](const stored_view&) { return top_k(b); });
  }
}

TEST_F(real_data, cache_methods_recall_more_than_random_keys_and_less_than_the_best) {
  constexpr index_t prompt = 3072, step = 73;
  const index_t n = layer.tokens();
  std::vector<std::vector<double>> p;
  for (index_t h = 0; h < layer.q_heads(); ++h) {
    for (index_t row = prompt + step - 1; row < n; row += step) {
      p.push_back(layer.probabilities(h, row, prompt));
    }
  }
  const method_inputs in{shape_of(layer.q(0, prompt), layer.kv(prompt)), layer.q(0, prompt),
                         layer.kv(prompt).k};
  const auto measure = [&](const std::string& name, const keep_lists& kept) {
    recall r;
    bool below = true;
    std::size_t sample = 0;
    for (index_t h = 0; h < layer.q_heads(); ++h) {
      std::vector<bool> chosen(at(prompt));
      for (const token_t key : kept[at(h / layer.group())]) chosen[at(key)] = true;
      for (index_t row = prompt + step - 1; row < n; row += step, ++sample) {
        below = r.add(p[sample], chosen) && below;
      }
    }
    expect_between(name, r, below);
  };
  attention_history history(layer.kv(prompt).k.heads);
  std::vector<float> out(at(prompt * layer.q_heads() * layer.kv(n).v.dim)),
      lse(at(prompt * layer.q_heads())), mass(at(prompt * history.kv_heads()));
  attend(ctx, plan_prefill(ctx, in.shape, dense{}), in.q, layer.kv(prompt),
         {nhd(out.data(), prompt, layer.q_heads(), layer.kv(n).v.dim),
          nhd(lse.data(), prompt, layer.q_heads(), 1),
          hnd(mass.data(), prompt, history.kv_heads(), 1)});
  for (index_t h = 0; h < history.kv_heads(); ++h) {
    history.add(h, nhd<const float>(mass.data() + h * prompt, prompt, 1, 1));
  }
  for (const index_t b : {256, 512, 1024}) {
    const std::string budget = std::to_string(b);
    measure("snapkv " + budget, snapkv(b).choose_kept(ctx, in));
    measure("sf_snapkv " + budget, sf_snapkv(b).choose_kept(ctx, in));
    measure("ada_snapkv " + budget, ada_snapkv(b).choose_kept(ctx, in));
    measure("sf_ada_snapkv " + budget, sf_ada_snapkv(b).choose_kept(ctx, in));
    measure("pyramid, layer 20 of 30, " + budget, pyramid(20, 30, prompt, b).choose_kept(ctx, in));
    measure("h2o " + budget, h2o{b / 2, b / 2}.choose_kept(history));
    measure("tova " + budget, tova{b}.choose_kept(ctx, in));
  }
}

}  // namespace
