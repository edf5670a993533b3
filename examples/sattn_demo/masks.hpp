// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "methods.hpp"

#include <sattn/core/math.hpp>
#include <sattn/plan/expand.hpp>

#include <stb_easy_font.h>
#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb_image_write.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace demo {

using color = std::array<std::uint8_t, 3>;

inline constexpr color paper{255, 255, 255};
inline constexpr color ink{40, 40, 40};
inline constexpr color frame{190, 190, 190};
inline constexpr color not_legal{228, 228, 228};
inline constexpr color selected{16, 44, 132};

inline constexpr index_t panel = 256;
inline constexpr index_t gap = 8;
inline constexpr index_t text_line = 14;
inline constexpr index_t max_pairs = index_t{1} << 30;  // bytes of one head's mask

class image {
 public:
  image(index_t width, index_t height)
      : width_(width), height_(height), pixels_(static_cast<std::size_t>(width * height), paper) {}

  color& at(index_t x, index_t y) { return pixels_[static_cast<std::size_t>(y * width_ + x)]; }

  void fill(index_t x, index_t y, index_t width, index_t height, color c) {
    for (index_t j = std::max<index_t>(y, 0); j < std::min(y + height, height_); ++j) {
      for (index_t i = std::max<index_t>(x, 0); i < std::min(x + width, width_); ++i) at(i, j) = c;
    }
  }

  // The font comes as rectangles: four vertices (x, y, z, color) of 16 bytes each.
  void write(index_t x, index_t y, std::string words) {
    std::vector<float> vertices(words.size() * 128 + 128);
    const int quads = stb_easy_font_print(0.0f, 0.0f, words.data(), nullptr, vertices.data(),
                                          static_cast<int>(vertices.size() * sizeof(float)));
    for (int i = 0; i < quads; ++i) {
      const float* const from = vertices.data() + index_t{i} * 16;
      const float* const to = from + 8;
      fill(x + std::lround(from[0]), y + std::lround(from[1]), std::lround(to[0] - from[0]),
           std::lround(to[1] - from[1]), ink);
    }
  }

  bool save(const std::filesystem::path& path) const {
    std::ofstream file(path, std::ios::binary);
    const auto append = [](void* stream, void* bytes, int count) {
      static_cast<std::ofstream*>(stream)->write(static_cast<const char*>(bytes), count);
    };
    const int encoded =
        stbi_write_png_to_func(append, &file, static_cast<int>(width_), static_cast<int>(height_),
                               3, pixels_.data(), static_cast<int>(width_ * 3));
    file.close();
    return encoded != 0 && file.good();
  }

 private:
  index_t width_;
  index_t height_;
  std::vector<color> pixels_;
};

// Indices [begin, end) of `count` that fall on one pixel; at least one.
inline sattn::key_range under_pixel(index_t pixel, index_t count) {
  const index_t begin = pixel * count / panel;
  const index_t end = std::max(begin + 1, (pixel + 1) * count / panel);
  return {static_cast<sattn::token_t>(begin), static_cast<sattn::token_t>(end)};
}

inline color shade(index_t chosen, index_t legal) {
  if (legal == 0) return not_legal;
  // The square root keeps single keys visible.
  const double weight = std::sqrt(static_cast<double>(chosen) / static_cast<double>(legal));
  color c;
  for (std::size_t i = 0; i < 3; ++i) {
    c[i] = static_cast<std::uint8_t>(std::lround((1.0 - weight) * paper[i] + weight * selected[i]));
  }
  return c;
}

inline void draw_panel(image& picture, index_t x, index_t y, const sattn::attention_plan& plan,
                       index_t head) {
  const sattn::attention_shape& shape = plan.shape();
  const sattn::domain& domain = plan.data().legal;
  const std::vector<std::uint8_t> mask = sattn::expand(plan, head);
  picture.fill(x - 1, y - 1, panel + 2, panel + 2, frame);
  index_t all_chosen = 0;
  index_t all_legal = 0;
  for (index_t row = 0; row < shape.q_len; ++row) {
    all_legal += domain.legal(shape.position(row), shape.kv_len).size();
  }
  for (const std::uint8_t m : mask) all_chosen += m;
  for (index_t j = 0; j < panel; ++j) {
    const sattn::key_range rows = under_pixel(j, shape.q_len);
    for (index_t i = 0; i < panel; ++i) {
      const sattn::key_range keys = under_pixel(i, shape.kv_len);
      index_t chosen = 0;
      index_t legal = 0;
      for (index_t row = rows.begin; row < rows.end; ++row) {
        const sattn::key_range visible = domain.legal(shape.position(row), shape.kv_len);
        const index_t begin = std::max(keys.begin, visible.begin);
        const index_t end = std::min(keys.end, visible.end);
        for (index_t key = begin; key < end; ++key) {
          chosen += mask[static_cast<std::size_t>(row * shape.kv_len + key)];
        }
        legal += std::max<index_t>(end - begin, 0);
      }
      picture.at(x + i, y + j) = shade(chosen, legal);
    }
  }
  char label[64];
  std::snprintf(label, sizeof(label), "head %td: %.1f%%", head,
                100.0 * static_cast<double>(all_chosen) / static_cast<double>(all_legal));
  picture.write(x, y - text_line + 3, label);
}

/// Writes a PNG of the masks of the pictured methods: one row of panels per method, one panel per
/// query head, query rows downwards and keys to the right. The darker, the more of the legal pairs
/// under a pixel are selected; grey where none is legal.
/// Throws: std::runtime_error if the masks are too large to expand or the file cannot be written.
inline void write_masks(const std::filesystem::path& file, sattn::context& ctx, const layer& l,
                        const std::vector<method>& methods) {
  const sattn::attention_shape shape = l.shape();
  sattn::require<std::runtime_error>(shape.q_len <= max_pairs / shape.kv_len,
                                     "--masks: ", shape.q_len, " x ", shape.kv_len,
                                     " pairs are too many to draw, at most ", max_pairs);
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
        sattn::plan_prefill(ctx, shape, m.choose(ctx, {l.inputs()}), m.options);
    picture.write(gap, y + 4, m.name + " " + m.budget);
    ctx.executor().parallel_for(shape.q_heads, [&](index_t head, index_t) {
      draw_panel(picture, gap + head * (panel + gap), y + 2 * text_line, plan, head);
    });
    y += row_height;
  }
  if (!picture.save(file)) throw std::runtime_error(file.string() + ": cannot write the picture");
}

}  // namespace demo
