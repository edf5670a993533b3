// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/aligned_buffer.hpp>
#include <sattn/core/config.hpp>
#include <sattn/core/math.hpp>
#include <sattn/core/types.hpp>

#include <cstddef>
#include <span>

namespace sattn::detail {

/// Bytes up to the end of a cache line.
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

}  // namespace sattn::detail
