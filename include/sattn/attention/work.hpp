// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/aligned_buffer.hpp>
#include <sattn/core/config.hpp>
#include <sattn/core/math.hpp>
#include <sattn/kernel/kernel_args.hpp>
#include <sattn/kv/contiguous.hpp>
#include <sattn/plan/tile_cursor.hpp>

#include <array>
#include <new>
#include <span>

namespace sattn::detail {

static_assert(max_chunk_keys == chunk_keys, "plans and kernels agree on the size of a chunk");
static_assert(sub_tile_rows == tile_lanes);

constexpr std::size_t padded(std::size_t bytes) {
  return static_cast<std::size_t>(round_up(static_cast<index_t>(bytes), cache_line));
}

/// Hands out pieces of a worker's part of the workspace, each on its own cache line.
class scratch_arena {
 public:
  explicit scratch_arena(std::span<std::byte> memory) : memory_(memory) {}

  template <class T>
  T* take(index_t count) {
    const std::size_t bytes = padded(static_cast<std::size_t>(count) * sizeof(T));
    SATTN_ASSERT(bytes <= memory_.size());
    T* const first = reinterpret_cast<T*>(memory_.data());
    memory_ = memory_.subspan(bytes);
    return first;
  }

 private:
  std::span<std::byte> memory_;
};

/// A chunk of keys and where its rows lie.
struct key_scratch {
  key_chunk chunk;
  std::array<const float*, chunk_keys + prefetch_rows> k_rows;
  std::array<const float*, chunk_keys> v_rows;

  static constexpr std::size_t bytes() { return padded(sizeof(key_scratch)); }

  void locate_rows(const kv_view<float>& kv, index_t kv_head) {
    const float* const k = kv.k.row(0, kv_head);
    const float* const v = kv.v.row(0, kv_head);
    for (index_t i = 0; i < chunk.count; ++i) {
      const auto at = static_cast<std::size_t>(i);
      k_rows[at] = k + chunk.keys[at] * kv.k.token_stride;
      v_rows[at] = v + chunk.keys[at] * kv.v.token_stride;
    }
    for (index_t i = chunk.count; i < chunk.count + prefetch_rows; ++i) {
      k_rows[static_cast<std::size_t>(i)] = k_rows[static_cast<std::size_t>(chunk.count - 1)];
    }
  }
};

}  // namespace sattn::detail
