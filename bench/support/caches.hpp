// SPDX-License-Identifier: Apache-2.0
//
// So many caches of one kv head that a walk over them finds none in the processor's: decoding reads
// memory. Rows apart as two arrays, or in pages that hold K and then V, as paged_kv_cache has them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <sattn/sattn.hpp>
#include <vector>

#include "support/machine.hpp"
#include "support/workload.hpp"

namespace bench {

class stored_caches {
 public:
  /// page_size = 0: no pages. `least` caches even where fewer exceed what processors hold.
  stored_caches(sattn::dtype type, index_t tokens, index_t dim, index_t v_dim, index_t page_size,
                bool v_is_k, index_t least = 2)
      : type_(type), tokens_(tokens), dim_(dim), v_dim_(v_dim), page_size_(page_size),
        v_is_k_(v_is_k), k_row_(sattn::row_bytes(type, dim)),
        v_row_(v_is_k ? 0 : sattn::row_bytes(type, v_dim)),
        slots_(page_size == 0 ? tokens : page_size) {
    v_at_ = sattn::round_up(slots_ * k_row_, 64);
    scales_at_ = v_at_ + sattn::round_up(slots_ * v_row_, 64);
    const index_t scales = sattn::has_row_scale(type) ? 2 * slots_ * index_t{sizeof(float)} : 0;
    page_bytes_ = sattn::round_up(scales_at_ + scales, 64);
    pages_ = tokens / slots_;
    count_ = std::max<index_t>(least, 2 * uncached_bytes() / (pages_ * page_bytes_));
    memory_.reserve(static_cast<std::size_t>(count_ * pages_ * page_bytes_));
    table_.resize(static_cast<std::size_t>(count_ * pages_));
    std::iota(table_.begin(), table_.end(), 0);
    fill();
  }

  index_t count() const { return count_; }
  index_t tokens() const { return tokens_; }
  index_t dim() const { return dim_; }
  index_t v_dim() const { return v_dim_; }
  sattn::dtype type() const { return type_; }
  /// Bytes of K and V of one token, scales included.
  index_t token_bytes() const {
    return k_row_ + v_row_ + (sattn::has_row_scale(type_) ? 2 * index_t{sizeof(float)} : 0);
  }

  /// The first `tokens` tokens of a cache, or of several, one behind the other, as the kv heads of
  /// one sequence.
  sattn::kv_view view(index_t cache, index_t tokens, index_t heads = 1) const {
    const std::byte* const first = memory_.bytes().data() + cache * pages_ * page_bytes_;
    const auto part = [&](index_t at, index_t row, index_t dim, index_t scale_at) {
      sattn::stored_view slots;
      slots.data = first + at;
      slots.type = type_;
      slots.tokens = slots_;
      slots.heads = page_size_ == 0 ? heads : 1;
      slots.dim = dim;
      slots.token_stride = row;
      slots.head_stride = page_bytes_;  // without pages a cache is one page
      const index_t floats = page_bytes_ / index_t{sizeof(float)};
      if (sattn::has_row_scale(type_)) {
        slots.scales = {reinterpret_cast<const float*>(first + scale_at), 1, floats, 0};
      }
      if (page_size_ != 0) {
        return sattn::paged_by_head({slots, heads * pages_, page_bytes_, floats}, table_, pages_,
                                    heads, tokens);
      }
      slots.tokens = tokens;
      return slots;
    };
    const sattn::stored_view k = part(0, k_row_, dim_, scales_at_);
    if (v_is_k_) return {k, k.columns(0, v_dim_)};
    const index_t v_scales = scales_at_ + slots_ * index_t{sizeof(float)};
    return {k, part(v_at_, v_row_, v_dim_, v_scales)};
  }
  sattn::kv_view view(index_t cache) const { return view(cache, tokens_); }

 private:
  // Rows repeat, at a distance that no power of two divides.
  void fill() {
    constexpr index_t patterns = 509;
    const index_t width = std::max(dim_, v_dim_);
    const std::vector<float> values = random_floats(patterns * width, 2);
    const index_t row = std::max(k_row_, v_row_);
    std::vector<std::byte> rows(static_cast<std::size_t>(patterns * row));
    std::vector<float> scales(static_cast<std::size_t>(patterns));
    for (index_t i = 0; i < patterns; ++i) {
      const float* const x = values.data() + i * width;
      std::byte* const to = rows.data() + i * row;
      float& scale = scales[static_cast<std::size_t>(i)];
      switch (type_) {
        case sattn::dtype::f32: sattn::store_row<float>(x, width, to, scale); break;
        case sattn::dtype::f16: sattn::store_row<sattn::f16>(x, width, to, scale); break;
        case sattn::dtype::bf16: sattn::store_row<sattn::bf16>(x, width, to, scale); break;
        case sattn::dtype::i8: sattn::store_row<std::int8_t>(x, width, to, scale); break;
        case sattn::dtype::q8_0: sattn::store_row<sattn::q8_0>(x, width, to, scale); break;
      }
    }
    index_t at = 0;
    for (index_t page = 0; page < count_ * pages_; ++page) {
      std::byte* const first = memory_.bytes().data() + page * page_bytes_;
      auto* const scale = reinterpret_cast<float*>(first + scales_at_);
      for (index_t slot = 0; slot < slots_; ++slot) {
        const index_t k = at++ % patterns;
        const index_t v = (k + 77) % patterns;
        std::memcpy(first + slot * k_row_, rows.data() + k * row, static_cast<std::size_t>(k_row_));
        std::memcpy(first + v_at_ + slot * v_row_, rows.data() + v * row,
                    static_cast<std::size_t>(v_row_));
        if (!sattn::has_row_scale(type_)) continue;
        scale[slot] = scales[static_cast<std::size_t>(k)];
        scale[slots_ + slot] = scales[static_cast<std::size_t>(v)];
      }
    }
  }

  sattn::dtype type_;
  index_t tokens_, dim_, v_dim_, page_size_;
  bool v_is_k_;
  index_t k_row_, v_row_, slots_;
  index_t v_at_ = 0, scales_at_ = 0, page_bytes_ = 0, pages_ = 0, count_ = 0;
  sattn::aligned_buffer memory_;
  std::vector<std::int32_t> table_;
};

}  // namespace bench
