// SPDX-License-Identifier: Apache-2.0
//
// A pattern of one's own, and what it selects together with the library's.

#include <algorithm>
#include <cstdio>
#include <sattn/sattn.hpp>

namespace sa = sattn;

/// Every `step`-th key behind the row, itself included, `count` of them.
struct dilated_window {
  sa::token_t step = 4;
  sa::token_t count = 8;

  void emit(const sa::plan_scope&, sa::plan_writer& writer) const {
    for (sa::token_t i = 0; i < count; ++i) writer.distances(i * step, i * step + 1);
  }
};

/// Key blocks 0, 2, 4, ... for all rows. Rows of a tile share a list; causality needs no care.
struct every_other_block {
  sa::token_t block = 8;

  sa::tile_grid grid() const { return {.rows = 16, .period = 0}; }
  void emit(const sa::plan_scope& scope, sa::plan_writer& writer) const {
    for (sa::index_t tile = 0; tile < scope.tiles(); ++tile) {
      const sa::key_range seen = scope.visible(tile);
      for (sa::token_t key = 0; key < seen.end; key += 2 * block) {
        writer.range(tile, key, std::min(key + block, seen.end));
      }
    }
  }
};

static_assert(sa::attention_pattern<dilated_window> && sa::attention_pattern<every_other_block>);

int main() {
  sa::context ctx;
  const sa::attention_shape shape{
      .q_len = 32, .kv_len = 48, .q_heads = 1, .kv_heads = 1, .q_offset = 16};
  const auto pattern = sa::sliding_window{3} | dilated_window{} | every_other_block{};
  const sa::attention_plan plan = sa::plan_prefill(ctx, shape, pattern);

  int wrong = 0;
  const auto mask = sa::expand(plan, 0);  // [q_len, kv_len]
  for (sa::index_t row = 0; row < shape.q_len; ++row) {
    for (sa::index_t key = 0; key < shape.kv_len; ++key) {
      const bool selected = mask[static_cast<std::size_t>(row * shape.kv_len + key)] != 0;
      const sa::index_t distance = shape.position(row) - key;
      const bool wanted = distance < 3 || (distance % 4 == 0 && distance < 32) || key / 8 % 2 == 0;
      wrong += selected != (wanted && distance >= 0);
      std::putchar(selected ? '#' : distance >= 0 ? '.' : ' ');
    }
    std::putchar('\n');
  }
  std::printf("%.1f %% of the causal keys\n", 100 * plan.stats().density_selected());
  return wrong;
}
