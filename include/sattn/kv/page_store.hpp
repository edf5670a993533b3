// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/aligned_buffer.hpp>
#include <sattn/core/config.hpp>
#include <sattn/core/types.hpp>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sattn {

/// Pages of equal size in one piece of memory, each with the number of its holders. All memory is
/// allocated at once (systems commit it page by page, at the first touch); nothing throws later.
class page_store {
 public:
  /// Throws: std::bad_alloc. pages <= 2^31 - 1; page_bytes a multiple of a cache line.
  page_store(index_t pages, index_t page_bytes)
      : page_bytes_(page_bytes), holders_(static_cast<std::size_t>(pages), 0) {
    memory_.reserve(static_cast<std::size_t>(pages * page_bytes));
    free_.reserve(holders_.size());
    for (index_t id = pages; id-- > 0;) free_.push_back(static_cast<std::int32_t>(id));
  }

  index_t pages() const { return std::ssize(holders_); }
  index_t free_pages() const { return std::ssize(free_); }
  index_t page_bytes() const { return page_bytes_; }
  /// Of what is kept beside the pages.
  std::size_t count_bytes() const {
    return (holders_.capacity() + free_.capacity()) * sizeof(std::int32_t);
  }
  std::byte* data() const { return memory_.bytes().data(); }
  std::byte* page(std::int32_t id) const { return data() + id * page_bytes_; }

  /// A page with one holder. Requires: one is free.
  std::int32_t take() {
    SATTN_ASSERT(!free_.empty());
    const std::int32_t id = free_.back();
    free_.pop_back();
    holders(id) = 1;
    return id;
  }
  void hold(std::int32_t id) { ++holders(id); }
  void release(std::int32_t id) {
    SATTN_ASSERT(holders(id) > 0);
    if (--holders(id) == 0) free_.push_back(id);  // its room was reserved
  }
  bool shared(std::int32_t id) const { return holders_[static_cast<std::size_t>(id)] > 1; }

 private:
  std::int32_t& holders(std::int32_t id) { return holders_[static_cast<std::size_t>(id)]; }

  index_t page_bytes_;
  aligned_buffer memory_;
  std::vector<std::int32_t> holders_;
  std::vector<std::int32_t> free_;
};

}  // namespace sattn
