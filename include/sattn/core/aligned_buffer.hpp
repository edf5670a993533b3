// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <span>

namespace sattn {

inline constexpr std::size_t cache_line = 64;  // bytes; also the alignment of every scratch array

/// Grow-only bytes, aligned to a cache line. Growing does not keep the contents.
class aligned_buffer {
 public:
  aligned_buffer() = default;

  /// Allocates when `bytes` exceeds the size; after std::bad_alloc the buffer is empty.
  void reserve(std::size_t bytes) {
    if (bytes <= bytes_) return;
    data_.reset();
    bytes_ = 0;
    data_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{cache_line})));
    bytes_ = bytes;
  }

  std::span<std::byte> bytes() const { return {data_.get(), bytes_}; }

 private:
  struct release {
    void operator()(std::byte* data) const {
      ::operator delete(data, std::align_val_t{cache_line});
    }
  };
  std::unique_ptr<std::byte, release> data_;
  std::size_t bytes_ = 0;
};

}  // namespace sattn
