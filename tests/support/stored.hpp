// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <sattn/core/math.hpp>
#include <sattn/kv/layouts.hpp>
#include <string>
#include <vector>

#include "support/problem.hpp"
#include "support/random.hpp"

namespace test_support {

inline constexpr sattn::dtype all_types[] = {sattn::dtype::f32, sattn::dtype::f16,
                                             sattn::dtype::bf16, sattn::dtype::i8,
                                             sattn::dtype::q8_0};

/// The rows of a tensor rounded to a storage type, one behind the other. What they stand for, which
/// f32 holds exactly for every type, is written back to the tensor.
struct encoded_rows {
  sattn::dtype type;
  index_t tokens;
  index_t heads;
  index_t dim;
  std::vector<std::byte> bytes = {};
  std::vector<float> scales = {};  // for i8
  bool full_scales;  // i8 down to -128 with scales of all bits: what rows stand for is rounded

  encoded_rows(owned_tensor& x, sattn::dtype to, bool of_all_bits = false)
      : type(to), tokens(x.view().tokens), heads(x.view().heads), dim(x.view().dim),
        full_scales(of_all_bits) {
    for (index_t t = 0; t < tokens; ++t) {
      for (index_t h = 0; h < heads; ++h) encode(x.row(t, h));
    }
  }
  index_t row_bytes() const { return sattn::row_bytes(type, dim); }
  const std::byte* row(index_t token, index_t head) const {
    return bytes.data() + (token * heads + head) * row_bytes();
  }

 private:
  template <class T>
  void put(const T& value) {
    const auto* const from = reinterpret_cast<const std::byte*>(&value);
    bytes.insert(bytes.end(), from, from + sizeof(T));
  }
  static float largest(const float* x, index_t count) {
    float top = 0;
    for (index_t i = 0; i < count; ++i) top = std::max(top, std::fabs(x[i]));
    return top;
  }
  // A scale of few bits, so that its products with int8 are exact.
  static float scale_of(const float* x, index_t count) {
    return sattn::to_float(sattn::to_f16(largest(x, count) / 126 + 1e-3f));
  }
  // The largest is half a step beyond 127 or -128.
  static float full_scale_of(const float* x, index_t count) { return largest(x, count) / 127.5f; }
  static std::int8_t quantise(float& x, float scale, float least = -127.0f) {
    const auto q = static_cast<std::int8_t>(std::clamp(std::round(x / scale), least, 127.0f));
    x = static_cast<float>(q) * scale;
    return q;
  }
  void encode(float* row) {
    switch (type) {
      case sattn::dtype::f32:
        for (index_t i = 0; i < dim; ++i) put(row[i]);
        break;
      case sattn::dtype::f16:
        for (index_t i = 0; i < dim; ++i) {
          put(sattn::to_f16(row[i]));
          row[i] = sattn::to_float(sattn::to_f16(row[i]));
        }
        break;
      case sattn::dtype::bf16:
        for (index_t i = 0; i < dim; ++i) {
          put(sattn::to_bf16(row[i]));
          row[i] = sattn::to_float(sattn::to_bf16(row[i]));
        }
        break;
      case sattn::dtype::i8:
        scales.push_back(full_scales ? full_scale_of(row, dim) : scale_of(row, dim));
        for (index_t i = 0; i < dim; ++i) {
          put(quantise(row[i], scales.back(), full_scales ? -128.0f : -127.0f));
        }
        break;
      case sattn::dtype::q8_0:
        for (index_t i = 0; i < dim; i += 32) {
          sattn::q8_0 block;
          const float scale = scale_of(row + i, 32);
          block.scale = sattn::to_f16(scale);
          for (index_t j = 0; j < 32; ++j) block.values[j] = quantise(row[i + j], scale);
          put(block);
        }
        break;
    }
  }
};

enum class storage_layout { strided, paged, paged_per_head, ring };
inline constexpr storage_layout all_layouts[] = {storage_layout::strided, storage_layout::paged,
                                                 storage_layout::paged_per_head,
                                                 storage_layout::ring};

/// Encoded rows in a layout that an engine might use, all random: axes, gaps, page size and order,
/// the start of a ring. Every byte that holds no row is 0xff: NaN in all types, or in their scales.
class stored_tensor {
 public:
  stored_tensor(const encoded_rows& rows, storage_layout layout, random_source& random) {
    const index_t tokens = rows.tokens;
    index_t slots = tokens + random.integer(0, 3);
    index_t pages = 1;
    const bool paged = layout == storage_layout::paged || layout == storage_layout::paged_per_head;
    const index_t table_heads = layout == storage_layout::paged_per_head ? rows.heads : 1;
    const index_t page_heads = layout == storage_layout::paged_per_head ? 1 : rows.heads;
    index_t used = 0;
    if (paged) {
      slots = random.pick<index_t>({1, 2, 7, 16, 40});
      used = sattn::ceil_div(tokens, slots);
      pages = used * table_heads + random.integer(1, 4);
    }
    // Axes [token, head] or [head, token] within a page, with gaps that keep the alignment.
    const auto align = static_cast<index_t>(sattn::alignment_of(rows.type));
    const index_t row = rows.row_bytes() + align * random.integer(0, 3);
    const bool nhd = random.integer(0, 2) == 0;
    const index_t token_stride = nhd ? page_heads * row : row;
    const index_t head_stride = nhd ? row : slots * row;
    const index_t page_bytes = slots * page_heads * row + align * random.integer(0, 5);
    const index_t page_scales = slots * page_heads + random.integer(0, 3);
    const index_t lead = 4 * random.integer(0, 4);
    memory_.assign(at(lead + pages * page_bytes), std::byte{0xff});
    scales_.assign(at(pages * page_scales), quiet_nan);

    stored_view slots_view;
    slots_view.data = memory_.data() + lead;
    slots_view.type = rows.type;
    slots_view.tokens = slots;
    slots_view.heads = page_heads;
    slots_view.dim = rows.dim;
    slots_view.token_stride = token_stride;
    slots_view.head_stride = head_stride;
    const index_t scale_token = nhd ? page_heads : 1;
    const index_t scale_head = nhd ? 1 : slots;
    if (sattn::has_row_scale(rows.type)) {
      slots_view.scales = {scales_.data(), scale_token, scale_head, 0};
    }
    index_t first = 0;
    index_t table_stride = 0;
    if (paged) {
      std::vector<std::int32_t> ids(at(pages));
      std::iota(ids.begin(), ids.end(), 0);
      for (std::size_t i = ids.size(); i > 1; --i) {
        std::swap(ids[i - 1], ids[at(random.integer(0, static_cast<index_t>(i)))]);
      }
      table_stride = table_heads == 1 ? 0 : used + random.integer(0, 3);
      table_.assign(at((table_heads - 1) * table_stride + used), -1);
      for (index_t h = 0; h < table_heads; ++h) {
        std::copy_n(ids.begin() + h * used, used, table_.begin() + h * table_stride);
      }
      const sattn::page_pool pool{slots_view, pages, page_bytes, page_scales};
      view = table_heads == 1
                 ? sattn::paged(pool, table_, tokens)
                 : sattn::paged_by_head(pool, table_, table_stride, rows.heads, tokens);
    } else if (layout == storage_layout::ring) {
      first = random.integer(0, slots);
      view = sattn::ring(slots_view, first, tokens);
    } else {
      view = slots_view;
      view.tokens = tokens;
    }
    for (index_t h = 0; h < rows.heads; ++h) {
      for (index_t t = 0; t < tokens; ++t) {
        index_t slot = layout == storage_layout::ring ? (first + t) % slots : t;
        index_t page = 0;
        if (paged) {
          page = table_[at((table_heads == 1 ? 0 : h) * table_stride + t / slots)];
          slot = t % slots;
        }
        const index_t head = table_heads == 1 ? h : 0;
        std::memcpy(memory_.data() + lead + page * page_bytes + head * head_stride +
                        slot * token_stride,
                    rows.row(t, h), at(rows.row_bytes()));
        if (rows.scales.empty()) continue;
        scales_[at(page * page_scales + head * scale_head + slot * scale_token)] =
            rows.scales[at(t * rows.heads + h)];
      }
    }
  }
  stored_tensor(const stored_tensor&) = delete;
  stored_tensor& operator=(const stored_tensor&) = delete;

 private:
  std::vector<std::byte> memory_;
  std::vector<float> scales_;
  std::vector<std::int32_t> table_;

 public:
  using stored_view = sattn::stored_view;
  stored_view view;
};

}  // namespace test_support
