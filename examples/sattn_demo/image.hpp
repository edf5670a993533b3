// SPDX-License-Identifier: Apache-2.0
//
// A picture in memory: rectangles, words, and a PNG file.
#pragma once

#include <sattn/core/types.hpp>

#include <stb_easy_font.h>
#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb_image_write.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace demo {

using sattn::index_t;

using color = std::array<std::uint8_t, 3>;

inline constexpr color paper{255, 255, 255};
inline constexpr color ink{40, 40, 40};

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

}  // namespace demo
