// SPDX-License-Identifier: Apache-2.0
//
// Decoding over a cache that grows in place: sink + window, and the best pages of 16 keys.

#include <cmath>
#include <cstdio>
#include <random>
#include <sattn/sattn.hpp>
#include <vector>

namespace sa = sattn;

constexpr sa::index_t capacity = 4096, prompt = 4000, q_heads = 8, kv_heads = 2, dim = 64;

int main() {
  std::minstd_rand random(1);
  std::normal_distribution<float> normal;
  // The cache is [head, token, dim] with room for `capacity` tokens; a slice of it is the sequence.
  std::vector<float> k_data(kv_heads * capacity * dim), v_data(k_data.size());
  for (float& x : v_data) x = normal(random);
  for (float& x : k_data) x = normal(random);
  const auto k_cache = sa::hnd(k_data.data(), capacity, kv_heads, dim);
  const auto v_cache = sa::hnd(v_data.data(), capacity, kv_heads, dim);
  // Sixteen keys of each head are what the queries look for.
  for (sa::index_t i = 0; i < 16 * dim; ++i) k_cache.row(768, 0)[i] += 2.0f;
  for (sa::index_t i = 0; i < 16 * dim; ++i) k_cache.row(320, 1)[i] += 2.0f;

  std::vector<float> q_data(q_heads * dim), out(q_heads * dim), dense_out(q_heads * dim);
  const auto q = sa::nhd(q_data.data(), 1, q_heads, dim);
  sa::context ctx;
  sa::attention_plan dense, window, pages;  // kept: each step uses their memory again
  double window_off = 0, pages_off = 0;
  for (sa::index_t kv_len = prompt + 1; kv_len <= capacity; ++kv_len) {
    // A model would write the token's key and value into the cache here.
    for (float& x : q_data) x = normal(random) + 0.5f;
    const auto kv = sa::kv(k_cache.slice(0, kv_len), v_cache.slice(0, kv_len));
    const auto shape = sa::shape_of(q, kv);
    const auto step = [&](sa::attention_plan& plan, const auto& pattern) {
      sa::plan_decode_into(ctx, plan, shape, pattern);
      sa::attend(ctx, plan, q, kv, {sa::nhd(out.data(), 1, q_heads, dim)});
      double off = 0;
      for (std::size_t i = 0; i < out.size(); ++i) {
        off = std::fmax(off, std::abs(out[i] - dense_out[i]));
      }
      return off;
    };
    step(dense, sa::dense{});
    dense_out = out;
    window_off = std::fmax(window_off, step(window, sa::sink{4} | sa::sliding_window{252}));
    const sa::selection rule{sa::budget::fixed(16), {.first = 1, .recent = 4}};
    const auto best = sa::select_pooled_blocks(ctx, shape, q, kv.k, rule,
                                               {.q_block = 1, .k_block = 16});
    pages_off = std::fmax(pages_off, step(pages, best));
  }
  std::printf("sink + window: %.1f %% of the keys, off by at most %.3f\n",
              100 * window.stats().density_selected(), window_off);
  std::printf("16 pages:      %.1f %% of the keys, off by at most %.3f\n",
              100 * pages.stats().density_selected(), pages_off);
  return pages_off < window_off ? 0 : 1;
}
