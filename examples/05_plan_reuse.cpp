// SPDX-License-Identifier: Apache-2.0
//
// One plan for all layers, in the caller's memory: nothing is allocated after planning.

#include <cstdio>
#include <random>
#include <sattn/sattn.hpp>
#include <vector>

namespace sa = sattn;

constexpr sa::index_t tokens = 1024, q_heads = 8, kv_heads = 2, dim = 64;

struct layer {
  std::vector<float> q_data = floats(q_heads), out_data = floats(q_heads);
  std::vector<float> k_data = floats(kv_heads), v_data = floats(kv_heads);

  static std::vector<float> floats(sa::index_t heads) {
    static std::minstd_rand random(1);
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<std::size_t>(tokens * heads * dim));
    for (float& value : x) value = normal(random);
    return x;
  }
  auto q() { return sa::nhd(q_data.data(), tokens, q_heads, dim); }
  auto out() { return sa::nhd(out_data.data(), tokens, q_heads, dim); }
  auto kv() {
    return sa::kv(sa::nhd(k_data.data(), tokens, kv_heads, dim),
                  sa::nhd(v_data.data(), tokens, kv_heads, dim));
  }
};

int main() {
  std::vector<layer> layers(6);
  layer& first = layers.front();
  // Which blocks matter is decided in the first layer; the others follow it.
  sa::context ctx;
  const auto shape = sa::shape_of(first.q(), first.kv());
  const auto plan = sa::plan_prefill(
      ctx, shape,
      sa::select_pooled_blocks(ctx, shape, first.q(), first.kv().k,
                               {sa::budget::fixed(4), {.recent = 1}}));

  sa::aligned_buffer memory;  // or any memory that starts at a multiple of 64
  memory.reserve(sa::workspace_bytes(ctx, plan, first.q(), first.kv(), first.out()));
  ctx.use_workspace(memory.bytes());
  for (layer& l : layers) sa::attend(ctx, plan, l.q(), l.kv(), {l.out()});
  std::printf("%zu layers: %.1f %% of the keys, plan of %zu bytes, workspace of %zu\n",
              layers.size(), 100 * plan.stats().density_selected(), plan.bytes(),
              memory.bytes().size());

  ctx.use_workspace(memory.bytes().first(memory.bytes().size() - 1));
  try {
    sa::attend(ctx, plan, first.q(), first.kv(), {first.out()});
  } catch (const sa::shape_error& e) {
    std::printf("a byte less: %s\n", e.what());
    return 0;
  }
  return 1;
}
