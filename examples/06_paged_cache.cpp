// SPDX-License-Identifier: Apache-2.0
//
// Decoding over a cache in pages: attention to those that promise most, and drafts on a fork.

#include <cmath>
#include <cstdio>
#include <random>
#include <sattn/sattn.hpp>
#include <vector>

namespace sa = sattn;

constexpr sa::index_t prompt = 2000, steps = 60, q_heads = 8, kv_heads = 2, head_dim = 64;
constexpr sa::token_t page_size = 16;
using cache_type = sa::paged_kv_cache<sa::f16>;

std::vector<float> random_rows(sa::index_t rows, float mean = 0.0f) {
  static std::minstd_rand random(1);
  std::normal_distribution<float> normal(mean, 1.0f);
  std::vector<float> x(static_cast<std::size_t>(rows * head_dim));
  for (float& value : x) value = normal(random);
  return x;
}

sa::tensor_view<const float> view(const std::vector<float>& x, sa::index_t heads) {
  return sa::nhd(x.data(), std::ssize(x) / (heads * head_dim), heads, head_dim);
}

int main() {
  sa::kv_cache_options options{.kv_heads = kv_heads, .head_dim = head_dim, .page_size = page_size};
  options.capacity = prompt + steps + 100;
  options.summaries = sa::dtype::f16;  // bounds of the keys of each page
  cache_type cache(options);
  std::vector<float> prompt_k = random_rows(prompt * kv_heads);
  const auto keys = sa::nhd(prompt_k.data(), prompt, kv_heads, head_dim);
  for (sa::index_t i = 0; i < 16 * head_dim; ++i) {  // what all queries look for: 16 keys a head
    keys.row(768 + i / head_dim, 0)[i % head_dim] += 2.0f;
    keys.row(320 + i / head_dim, 1)[i % head_dim] += 2.0f;
  }
  cache.append(keys, view(random_rows(prompt * kv_heads), kv_heads));

  sa::context ctx;
  sa::score_tensor scores;  // kept, as the plan is: each step uses their memory again
  sa::attention_plan plan;
  const auto attend = [&](const cache_type& c, const std::vector<float>& q, const auto& pattern) {
    sa::plan_decode_into(ctx, plan, sa::shape_of(view(q, q_heads), c.view()), pattern);
    std::vector<float> out(q.size());
    const auto rows = sa::nhd(out.data(), plan.shape().q_len, q_heads, head_dim);
    sa::attend(ctx, plan, view(q, q_heads), c.view(), {rows});
    return out;
  };
  const auto best_pages = [&](const cache_type& c, const std::vector<float>& q) {
    sa::page_scores_into(ctx, scores, view(q, q_heads), c.summaries());
    const sa::selection rule{sa::budget::fixed(16), {.first = 1, .recent = 2}};
    const sa::attention_shape shape = sa::shape_of(view(q, q_heads), c.view());
    return sa::select_blocks(ctx, shape, scores, rule, 1, page_size);
  };

  double off = 0;
  for (sa::index_t step = 0; step < steps; ++step) {  // a model would make k, v and q
    const auto k = random_rows(kv_heads), v = random_rows(kv_heads), q = random_rows(q_heads, 1.0f);
    cache.append(view(k, kv_heads), view(v, kv_heads));
    const auto dense = attend(cache, q, sa::dense{}), few = attend(cache, q, best_pages(cache, q));
    for (std::size_t i = 0; i < q.size(); ++i) off = std::fmax(off, std::abs(few[i] - dense[i]));
  }
  const sa::kv_cache_bytes bytes = cache.bytes();
  std::printf("%td tokens: %zu KiB of keys and values, %zu KiB of bounds\n", cache.tokens(),
              bytes.held / 1024, bytes.summaries / 1024);
  std::printf("16 pages: %.1f %% of the keys, off by at most %.3f\n",
              100 * plan.stats().density_selected(), off);

  // Six tokens are drafted on a fork and run as six rows; the first two of them are accepted.
  const auto k = random_rows(6 * kv_heads), v = random_rows(6 * kv_heads);
  cache_type draft = cache.fork();
  draft.append(view(k, kv_heads), view(v, kv_heads));
  const auto rows = random_rows(6 * q_heads, 1.0f), next = random_rows(q_heads, 1.0f);
  attend(draft, rows, best_pages(draft, rows));
  const std::size_t used = draft.bytes().used;
  draft.truncate(cache.tokens() + 2);
  cache.append(view(k, kv_heads).slice(0, 2), view(v, kv_heads).slice(0, 2));  // for comparison
  const bool same =
      attend(draft, next, best_pages(draft, next)) == attend(cache, next, best_pages(cache, next));
  std::printf("six drafts take %zu KiB; once four are refused, %s bits as if never drafted\n",
              (used - bytes.used) / 1024, same ? "the same" : "DIFFERENT");
  return off < 0.05 && same ? 0 : 1;
}
