// SPDX-License-Identifier: Apache-2.0
//
// Published methods by their names: a prompt by vertical-slash, what that costs in error, decoding
// by Quest, and a cache cut by SnapKV.

#include <cmath>
#include <cstdio>
#include <random>
#include <sattn/sattn.hpp>
#include <vector>

namespace sa = sattn;

constexpr sa::index_t prompt = 2048, q_heads = 8, kv_heads = 2, dim = 64;

int main() {
  // Keys and queries that follow one slow walk: neighbours attend to each other.
  std::minstd_rand random(1);
  std::normal_distribution<float> normal;
  std::vector<float> q_data(prompt * q_heads * dim), k_data(prompt * kv_heads * dim),
      v_data(k_data.size()), out(q_data.size()), walk(dim);
  for (float& x : v_data) x = normal(random);
  for (sa::index_t t = 0; t < prompt; ++t) {
    for (sa::index_t d = 0; d < dim; ++d) {
      float& w = walk[static_cast<std::size_t>(d)];
      w = 0.99f * w + 0.14f * normal(random);
      for (sa::index_t h = 0; h < q_heads; ++h) {
        q_data[static_cast<std::size_t>((t * q_heads + h) * dim + d)] = w + normal(random);
      }
      for (sa::index_t h = 0; h < kv_heads; ++h) {
        k_data[static_cast<std::size_t>((t * kv_heads + h) * dim + d)] = w + normal(random);
      }
    }
  }
  const sa::tensor_view<const float> q = sa::nhd(q_data.data(), prompt, q_heads, dim);
  const sa::tensor_view<const float> k = sa::nhd(k_data.data(), prompt, kv_heads, dim);
  const sa::tensor_view<const float> v = sa::nhd(v_data.data(), prompt, kv_heads, dim);
  sa::context ctx;

  const sa::kv_view kv = sa::kv(k, v);
  const sa::method_plan prefill = sa::plan_prefill(ctx, q, kv, sa::sf_vertical_slash(64, 128));
  sa::attend(ctx, prefill.plan, q, kv, {sa::nhd(out.data(), prompt, q_heads, dim)});
  const sa::method_report report = prefill.report();
  const sa::recall_report recall = sa::measure_recall(ctx, prefill.plan, q, kv);
  std::printf("vertical-slash: %.1f %% of the pairs, %.0f keys a row in head 0, estimate %.1f ms\n",
              100 * report.pairs.density_selected(), report.keys_of_head[0], report.estimate_ms);
  std::printf("recall: %.3f, at least %.3f; no output is off by more than %.2f\n", recall.mean,
              recall.least, recall.error_bound);

  sa::paged_kv_cache<sa::f16> cache({.kv_heads = kv_heads, .head_dim = dim, .page_size = 16,
                                     .capacity = prompt + 64, .summaries = sa::dtype::i8});
  cache.append(k, v);
  const auto last = q.slice(prompt - 1, prompt);
  sa::method_plan step;
  sa::plan_decode_into(ctx, step, last, cache.view(), sa::sf_quest(256),
                       {.summaries = cache.summaries()});
  std::vector<float> row(q_heads * dim);
  sa::attend(ctx, step.plan, last, cache.view(), {sa::nhd(row.data(), 1, q_heads, dim)});
  const double kept = sa::measure_recall(ctx, step.plan, last, cache.view()).mean;
  std::printf("quest: %.1f %% of the keys hold %.3f of the attention\n",
              100 * step.plan.stats().density_selected(), kept);

  cache.evict(sa::snapkv(512).choose_kept(ctx, {sa::shape_of(q, kv), q, cache.view().k}));
  std::printf("snapkv: %td of %td keys stay\n", cache.tokens(0), cache.tokens());
  return recall.mean > report.pairs.density_selected() && kept > 0.2 && cache.tokens(0) == 512
             ? 0
             : 1;
}
