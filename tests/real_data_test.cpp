// SPDX-License-Identifier: Apache-2.0
//
// Recall against budget of every method on captured attention: the last 1,024 of 4,096 tokens as a
// chunk of a prompt, some of the last tokens as decoding steps, and the first 3,072 tokens as a
// prompt whose cache is cut before the other 1,024 look at it. Prints the table of docs/methods.md;
// the ends are as many random keys and the best keys of each row.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <numeric>
#include <sattn/api.hpp>
#include <string>
#include <utility>
#include <vector>

#include "../examples/sattn_demo/layer.hpp"

namespace {

using namespace sattn;  // NOLINT(google-build-using-namespace)

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

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
  /// The most attention that 0, 1, 2 ... of the keys [0, end) hold for the row at a position.
  std::vector<float> best(index_t head, index_t position, index_t end) const {
    const index_t dim = layer_.q.dim;
    const float* const row = layer_.q.view().row(position, head);
    std::vector<double> p(at(end));
    for (index_t key = 0; key < end; ++key) {
      const float* const k = layer_.k.view().row(key, head / group());
      const auto product = [&](index_t d) { return double{row[d]} * double{k[d]}; };
      double sum = 0;  // four products at a time: an addition waits for the last one
      for (index_t d = 0; d < dim; d += 4) {
        sum += (product(d) + product(d + 1)) + (product(d + 2) + product(d + 3));
      }
      p[at(key)] = sum / std::sqrt(static_cast<double>(dim));
    }
    const double top = *std::max_element(p.begin(), p.end());
    double sum = 0;
    for (double& x : p) sum += x = std::exp(x - top);
    std::sort(p.begin(), p.end(), std::greater<>());
    std::vector<float> most{0};
    double mass = 0;
    for (const double x : p) most.push_back(static_cast<float>((mass += x) / sum));
    return most;
  }
  /// How far the difference of two lse in f32 may be off, by the largest |q| |k| and the number of
  /// keys: the derivation in reference.cpp.
  double lse_error() const {
    const auto longest = [](const tensor_view<const float>& x) {
      double most = 0;
      for (index_t t = 0; t < x.tokens; ++t) {
        for (index_t h = 0; h < x.heads; ++h) {
          const float* const row = x.row(t, h);
          most = std::max(most, std::sqrt(std::inner_product(row, row + x.dim, row, 0.0)));
        }
      }
      return most;
    };
    const auto dim = static_cast<double>(layer_.q.dim);
    const double logit = longest(layer_.q.view()) * longest(layer_.k.view()) / std::sqrt(dim);
    return 2 * 0x1p-24 * ((dim + 4 + 6 + 3) * logit + 1.5 * static_cast<double>(tokens()));
  }

 private:
  demo::layer layer_;
};

/// The most that as many keys as each row of a plan selects can hold, and how many those are of all
/// that it may see: means over rows and heads.
struct limits {
  double density = 0;  // what as many random keys hold on average
  double best = 0;
};

class real_data : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    std::printf("| method                             | density | random | recall | top-k |\n"
                "| ---------------------------------- | ------- | ----- | ----- | ----- |\n");
  }
  /// best[head][row]: what captured_layer::best gives for the rows of the plan.
  using best_sums = std::vector<std::vector<std::vector<float>>>;
  /// Of the rows [begin, end), which see the keys up to their position and below kv_len.
  best_sums best_of(index_t begin, index_t end, index_t kv_len) {
    best_sums best(at(layer.q_heads()));
    for (std::vector<std::vector<float>>& of_head : best) of_head.resize(at(end - begin));
    ctx.executor().parallel_for(layer.q_heads() * (end - begin), [&](index_t task, index_t) {
      const index_t head = task / (end - begin), row = task % (end - begin);
      best[at(head)][at(row)] = layer.best(head, begin + row, std::min(begin + row + 1, kv_len));
    });
    return best;
  }
  static limits limits_of(const attention_plan& plan, const best_sums& best) {
    limits sum;
    const attention_shape& shape = plan.shape();
    for (index_t h = 0; h < shape.q_heads; ++h) {
      const std::vector<std::uint8_t> mask = expand(plan, h);
      for (index_t row = 0; row < shape.q_len; ++row) {
        const std::vector<float>& of_row = best[at(h)][at(row)];
        const auto begin = mask.begin() + row * shape.kv_len;
        const auto keys = std::count(begin, begin + shape.kv_len, 1);
        sum.density += static_cast<double>(keys) / static_cast<double>(of_row.size() - 1);
        sum.best += double{of_row[at(keys)]};
      }
    }
    const auto rows = static_cast<double>(shape.q_heads * shape.q_len);
    return {sum.density / rows, sum.best / rows};
  }
  void expect_between(const std::string& name, double recall, const limits& between) {
    std::printf("| %-34s | %5.1f %% | %.3f | %.3f | %.3f |\n", name.c_str(), 100 * between.density,
                between.density, recall, between.best);
    EXPECT_GT(recall, between.density) << name;
    EXPECT_LE(recall, between.best * std::exp(layer.lse_error())) << name;
  }

  captured_layer layer;
  thread_pool threads{2};
  context ctx{threads};
};

TEST_F(real_data, prefill_methods_recall_more_than_random_keys_and_less_than_the_best) {
  constexpr index_t rows = 1024;
  const index_t n = layer.tokens(), first = n - rows;
  const best_sums best = best_of(first, n, n);
  const auto measure = [&](const std::string& name, const auto& method) {
    const attention_plan plan =
        plan_prefill(ctx, layer.q(first, n), layer.kv(n), method).plan;
    expect_between(name, measure_recall(ctx, plan, layer.q(first, n), layer.kv(n)).mean,
                   limits_of(plan, best));
  };
  for (const token_t w : {128, 384, 1024}) {
    measure("a_shape 4 + " + std::to_string(w), a_shape{4, w});
  }
  for (const token_t w : {128, 1024}) {
    measure("tri_shape 4 + " + std::to_string(w), tri_shape{4, w});
  }
  for (const token_t b : {128, 256, 512}) {
    measure("sf_vertical_slash " + std::to_string(b), sf_vertical_slash(b, b));
  }
  for (const token_t b : {100, 200, 400}) {
    measure("minference " + std::to_string(b), minference(b, 2 * b));
  }
  // Every second head streams.
  for (const token_t b : {100, 400}) {
    using kind = minference_head::kind;
    minference_heads heads;
    for (index_t h = 0; h < layer.q_heads(); ++h) {
      heads.heads.push_back(h % 2 == 0 ? minference_head{kind::vertical_slash, b, 2 * b}
                                       : minference_head{kind::streaming, 4, 2 * b});
    }
    measure("minference_heads " + std::to_string(b), heads);
  }
  for (const double c : {0.3, 0.5, 0.65}) {
    measure("sf_flexprefill " + std::to_string(c).substr(0, 4), sf_flexprefill(c, 512, 128));
  }
  for (const double c : {0.3, 0.6, 0.9}) {
    measure("flexprefill " + std::to_string(c).substr(0, 4),
            flexprefill(c, 0.1, 128, 4096, 64));
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
    measure("xattention " + std::to_string(c).substr(0, 4), xattention(16, c));
  }
  for (const index_t b : {64, 256, 1024}) measure("top_k " + std::to_string(b), top_k(b));
  for (const double c : {0.5, 0.9}) {
    measure("twilight " + std::to_string(c).substr(0, 4), twilight(c));
  }
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
  constexpr index_t steps = 9, apart = 37;
  std::vector<best_sums> best;
  for (index_t step = 0; step < steps; ++step) {
    best.push_back(best_of(n - 1 - step * apart, n - step * apart, n));
  }
  const auto measure = [&](const std::string& name, const auto& method_for) {
    double recall = 0;
    limits between;
    for (index_t step = 0; step < steps; ++step) {
      const index_t keys = n - step * apart;
      summaries.clear();
      for (index_t h = 0; h < k.heads; ++h) {
        summaries.emplace_back(page_summary_options{k.dim, 16, dtype::f16});
        summaries.back().update(layer.kv(keys).k, h);
      }
      stored_view shadow = copy.view().k;
      shadow.tokens = keys;
      const attention_plan plan =
          plan_decode(ctx, layer.q(keys - 1, keys), layer.kv(keys), method_for(shadow),
                      {.summaries = summaries})
              .plan;
      const limits of_step = limits_of(plan, best[at(step)]);
      recall += measure_recall(ctx, plan, layer.q(keys - 1, keys), layer.kv(keys)).mean / steps;
      between.density += of_step.density / steps;
      between.best += of_step.best / steps;
    }
    expect_between(name, recall, between);
  };
  for (const index_t b : {128, 256, 512, 1024}) {
    const std::string budget = std::to_string(b);
    measure("streaming 4 + " + budget, [=](const stored_view&) { return a_shape{4, token_t(b)}; });
    // The first kv head retrieves.
    measure("duo 4 + " + budget, [&](const stored_view&) {
      duo heads{std::vector<bool>(at(k.heads), false), 4, token_t(b)};
      heads.retrieves[0] = true;
      return heads;
    });
    measure("quest " + budget, [=](const stored_view&) { return quest(b); });
    measure("sf_quest " + budget, [=](const stored_view&) { return sf_quest(b); });
    measure("twilight of sf_quest " + budget,
            [=](const stored_view& s) { return twilight(sf_quest(b), 0.85, s); });
    measure("shadow_top_k " + budget,
            [=](const stored_view& s) { return shadow_top_k(b, s); });
    measure("top_k " + budget, [=](const stored_view&) { return top_k(b); });
  }
  for (const double c : {0.5, 0.9}) {
    measure("twilight of all keys " + std::to_string(c).substr(0, 4),
            [=](const stored_view&) { return twilight(c); });
  }
}

TEST_F(real_data, cache_methods_recall_more_than_random_keys_and_less_than_the_best) {
  constexpr index_t prompt = 3072;
  const index_t n = layer.tokens();
  const best_sums best = best_of(prompt, n, prompt);
  const method_inputs in{shape_of(layer.q(0, prompt), layer.kv(prompt)), layer.q(0, prompt),
                         layer.kv(prompt).k};
  // The rows that follow look at what is left of the prompt.
  const auto measure = [&](const std::string& name, const keep_lists& kept) {
    attention_shape shape = shape_of(layer.q(prompt, n), layer.kv(prompt));
    shape.q_offset = prompt;
    const attention_plan plan = plan_prefill(ctx, shape, columns_of(kept));
    expect_between(name,
                   measure_recall(ctx, plan, layer.q(prompt, n), layer.kv(prompt)).mean,
                   limits_of(plan, best));
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
