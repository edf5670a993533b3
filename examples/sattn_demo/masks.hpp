// SPDX-License-Identifier: Apache-2.0
//
// Pictures of what methods choose.
#pragma once

#include "image.hpp"
#include "method.hpp"

#include <sattn/plan/tile_cursor.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace demo {

inline constexpr color frame{190, 190, 190};
inline constexpr color not_legal{228, 228, 228};
inline constexpr color selected{16, 44, 132};

inline constexpr index_t panel = 256;
inline constexpr index_t gap = 8;
inline constexpr index_t text_line = 14;

/// The mask of one query head at the resolution of a panel, however long the sequence: how many
/// pairs of row and key are legal and selected in each cell. Lengths below a panel's have a cell
/// for each row or key.
class coarse_mask {
 public:
  coarse_mask(const sattn::attention_plan& plan, index_t q_head)
      : q_len_(plan.shape().q_len), kv_len_(plan.shape().kv_len), rows_(std::min(panel, q_len_)),
        cols_(std::min(panel, kv_len_)), chosen_(static_cast<std::size_t>(rows_ * cols_)),
        legal_(chosen_) {
    for (index_t row = 0; row < q_len_; ++row) add_legal(plan, row);
    const index_t head = plan.head_of(q_head);
    for (index_t tile = 0; tile < plan.tiles(); ++tile) add_chosen(plan, head, tile);
  }

  struct pairs {
    std::int64_t chosen, legal;
  };
  /// Under a pixel of a panel.
  pairs at(index_t x, index_t y) const {
    const auto cell = static_cast<std::size_t>(y * rows_ / panel * cols_ + x * cols_ / panel);
    return {chosen_[cell], legal_[cell]};
  }
  pairs total() const {
    return {std::reduce(chosen_.begin(), chosen_.end()), std::reduce(legal_.begin(), legal_.end())};
  }

 private:
  std::size_t cell(index_t row, index_t key) const {
    return static_cast<std::size_t>(row * rows_ / q_len_ * cols_ + key * cols_ / kv_len_);
  }
  void add_legal(const sattn::attention_plan& plan, index_t row) {
    const sattn::key_range keys =
        plan.data().legal.legal(plan.shape().position(row), plan.shape().kv_len);
    for (index_t key = keys.begin; key < keys.end;) {
      // The keys of one cell at once.
      const index_t next = sattn::ceil_div((key * cols_ / kv_len_ + 1) * kv_len_, cols_);
      const index_t end = std::min<index_t>(next, keys.end);
      legal_[cell(row, key)] += end - key;
      key = end;
    }
  }
  void add_chosen(const sattn::attention_plan& plan, index_t head, index_t tile) {
    const sattn::key_range rows = plan.grid().row_range(tile, q_len_);
    sattn::tile_cursor cursor(plan, head, tile, sattn::sub_tile_rows,
                              {0, static_cast<sattn::token_t>(kv_len_)});
    sattn::key_chunk chunk;
    while (cursor.next(chunk)) {
      for (index_t s = 0; s < cursor.sub_tiles(); ++s) {
        const sattn::key_chunk::sub_tile& sub = chunk.sub[static_cast<std::size_t>(s)];
        const index_t first = rows.begin + s * sattn::sub_tile_rows;
        const auto all = static_cast<std::uint16_t>((1u << cursor.sub_rows(s)) - 1);
        for (index_t i = sub.begin; i < sub.end; ++i) {
          const auto at = static_cast<std::size_t>(i);
          std::uint16_t mask = sub.masked ? chunk.masks[static_cast<std::size_t>(s)][at] : all;
          for (; mask != 0; mask = static_cast<std::uint16_t>(mask & (mask - 1))) {
            ++chosen_[cell(first + std::countr_zero(mask), chunk.keys[at])];
          }
        }
      }
    }
  }

  index_t q_len_, kv_len_;
  index_t rows_, cols_;                // of cells
  std::vector<std::int64_t> chosen_;   // [rows_, cols_]
  std::vector<std::int64_t> legal_;
};

inline color shade(const coarse_mask::pairs& pairs) {
  if (pairs.legal == 0) return not_legal;
  // The square root keeps single keys visible.
  const double weight =
      std::sqrt(static_cast<double>(pairs.chosen) / static_cast<double>(pairs.legal));
  color c;
  for (std::size_t i = 0; i < 3; ++i) {
    c[i] = static_cast<std::uint8_t>(std::lround((1.0 - weight) * paper[i] + weight * selected[i]));
  }
  return c;
}

inline void draw_panel(image& picture, index_t x, index_t y, const sattn::attention_plan& plan,
                       index_t head) {
  const coarse_mask mask(plan, head);
  picture.fill(x - 1, y - 1, panel + 2, panel + 2, frame);
  for (index_t j = 0; j < panel; ++j) {
    for (index_t i = 0; i < panel; ++i) picture.at(x + i, y + j) = shade(mask.at(i, j));
  }
  const coarse_mask::pairs total = mask.total();
  char label[64];
  std::snprintf(label, sizeof(label), "head %td: %.1f%%", head,
                100.0 * static_cast<double>(total.chosen) / static_cast<double>(total.legal));
  picture.write(x, y - text_line + 3, label);
}

/// Writes a PNG of the masks of the pictured methods: one row of panels per method, one panel per
/// query head, query rows downwards and keys to the right. The darker, the more of the legal pairs
/// under a pixel are selected; grey where none is legal.
/// Throws: std::runtime_error if the file cannot be written.
inline void write_masks(const std::filesystem::path& file, sattn::context& ctx, const layer& l,
                        const settings& model, const std::vector<method>& methods) {
  const sattn::attention_shape shape = l.shape();
  const auto rows =
      std::count_if(methods.begin(), methods.end(), [](const method& m) { return m.pictured; });
  constexpr index_t row_height = 2 * text_line + panel + gap;
  image picture(gap + shape.q_heads * (panel + gap), text_line + gap + rows * row_height);
  picture.write(gap, gap,
                l.name +
                    ": selected share of the legal pairs, rows downwards, keys to "
                    "the right; grey: not legal");
  index_t y = text_line + gap;
  for (const method& m : methods) {
    if (!m.pictured) continue;
    const sattn::attention_plan plan =
        sattn::plan_prefill(ctx, shape, m.choose(ctx, {l.inputs(model.layer), model}), m.options);
    picture.write(gap, y + 4, m.name + " " + m.budget);
    ctx.executor().parallel_for(shape.q_heads, [&](index_t head, index_t) {
      draw_panel(picture, gap + head * (panel + gap), y + 2 * text_line, plan, head);
    });
    y += row_height;
  }
  if (!picture.save(file)) throw std::runtime_error(file.string() + ": cannot write the picture");
}

}  // namespace demo
