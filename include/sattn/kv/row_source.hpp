// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/dtype.hpp>
#include <sattn/core/types.hpp>

#include <cstddef>
#include <cstdint>

namespace sattn {

/// Where the rows of K or V of one kv head lie: what remains of a view once a head is chosen.
struct row_source {
  const std::byte* data = nullptr;  // of slot 0
  index_t stride = 0;               // bytes from a slot to the next
  dtype type = dtype::f32;

  const float* scales = nullptr;    // of the slots, for types that have one a row
  index_t scale_stride = 0;         // floats

  // Pages: token t is slot t % page_size of page page_table[t / page_size].
  const std::int32_t* page_table = nullptr;  // null = no pages
  index_t page_size = 0;
  index_t page_stride = 0;        // bytes
  index_t scale_page_stride = 0;  // floats

  // A ring: token t is slot (ring_first + t) % ring_slots.
  index_t ring_first = 0;
  index_t ring_slots = 0;  // 0 = no ring

  /// Writes the addresses of the rows of `keys`; quickest where neighbours lie in the same page.
  void locate(const token_t* keys, index_t count, const void** rows) const {
    for_each_slot(keys, count, [&](index_t i, index_t page, index_t slot) {
      rows[i] = data + page * page_stride + slot * stride;
    });
  }
  /// Reads the scales of `keys`.
  void read_scales(const token_t* keys, index_t count, float* to) const {
    for_each_slot(keys, count, [&](index_t i, index_t page, index_t slot) {
      to[i] = scales[page * scale_page_stride + slot * scale_stride];
    });
  }

 private:
  /// Calls f(i, page, slot) for each key.
  template <class F>
  void for_each_slot(const token_t* keys, index_t count, F&& f) const {
    if (page_table != nullptr) {
      std::uint32_t first = 1;  // token of the current page
      std::uint32_t size = 0;   // 0 until there is one
      index_t page = 0;
      for (index_t i = 0; i < count; ++i) {
        const auto key = static_cast<std::uint32_t>(keys[i]);
        if (key - first >= size) {
          size = static_cast<std::uint32_t>(page_size);
          const std::uint32_t entry = key / size;
          first = entry * size;
          page = page_table[entry];
        }
        f(i, page, static_cast<index_t>(key - first));
      }
    } else if (ring_slots != 0) {
      for (index_t i = 0; i < count; ++i) {
        const index_t slot = ring_first + keys[i];
        f(i, index_t{0}, slot < ring_slots ? slot : slot - ring_slots);
      }
    } else {
      for (index_t i = 0; i < count; ++i) f(i, index_t{0}, index_t{keys[i]});
    }
  }
};

}  // namespace sattn
