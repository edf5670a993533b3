// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/error.hpp>
#include <sattn/core/math.hpp>
#include <sattn/core/types.hpp>
#include <sattn/kv/page_store.hpp>

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace sattn {

struct page_slot {
  std::int32_t page;
  index_t slot;
};

/// Which pages of a store hold the tokens of each kv head of a sequence. What may fail is asked
/// first (pages_to_append, pages_to_keep, grow, check_...); what changes the tables does not throw.
class page_tables {
 public:
  page_tables(index_t heads, index_t page_size)
      : page_size_(page_size), tokens_of_(static_cast<std::size_t>(heads), 0) {}

  index_t tokens() const { return tokens_; }
  index_t tokens(index_t head) const { return tokens_of_[static_cast<std::size_t>(head)]; }
  bool uniform() const {
    return std::all_of(tokens_of_.begin(), tokens_of_.end(),
                       [&](index_t n) { return n == tokens_of_.front(); });
  }
  index_t pages() const {
    index_t total = 0;
    for (const index_t n : tokens_of_) total += ceil_div(n, page_size_);
    return total;
  }
  std::size_t bytes() const {
    return entries_.size() * sizeof(std::int32_t) + tokens_of_.size() * sizeof(index_t);
  }
  /// Entries from the first one of a head to the first one of the next.
  index_t stride() const { return stride_; }
  std::span<const std::int32_t> entries(index_t first_head) const {
    return std::span(entries_).subspan(static_cast<std::size_t>(first_head * stride_));
  }
  page_slot find(index_t head, index_t token) const {
    return {entries_[at(head, token / page_size_)], token % page_size_};
  }

  void hold(page_store& store) const {
    for_each_page([&](std::int32_t page) { store.hold(page); });
  }
  void clear(page_store& store) {
    for_each_page([&](std::int32_t page) { store.release(page); });
    std::fill(tokens_of_.begin(), tokens_of_.end(), 0);
  }

  /// Free pages that `count` more tokens of every head take: new ones, and copies of last pages
  /// that are not full and that others hold too.
  index_t pages_to_append(const page_store& store, index_t count) const {
    index_t needed = 0;
    for (index_t h = 0; h < heads() && count > 0; ++h) {
      needed += ceil_div(tokens(h) + count, page_size_) - ceil_div(tokens(h), page_size_);
      if (last_is_shared(store, h)) ++needed;
    }
    return needed;
  }

  /// Makes room in the tables. Throws: std::bad_alloc.
  void grow(index_t count) {
    index_t most = 0;
    for (const index_t n : tokens_of_) most = std::max(most, ceil_div(n + count, page_size_));
    if (most <= stride_) return;
    const index_t wider = std::max(most, 2 * stride_);
    std::vector<std::int32_t> moved(static_cast<std::size_t>(heads() * wider));
    for (index_t h = 0; h < heads(); ++h) {
      std::copy_n(entries_.begin() + h * stride_, ceil_div(tokens(h), page_size_),
                  moved.begin() + h * wider);
    }
    entries_.swap(moved);
    stride_ = wider;
  }

  /// Gives a head the pages for `count` more tokens; copy(to, from) for a page that others hold.
  template <class Copy>
  void append(page_store& store, index_t head, index_t count, Copy&& copy) {
    if (count == 0) return;
    index_t& length = tokens_of_[static_cast<std::size_t>(head)];
    if (last_is_shared(store, head)) {
      std::int32_t& last = entries_[at(head, length / page_size_)];
      const std::int32_t own = store.take();
      copy(own, last);
      store.release(last);
      last = own;
    }
    const index_t used = ceil_div(length, page_size_);
    const index_t wanted = ceil_div(length + count, page_size_);
    for (index_t i = used; i < wanted; ++i) entries_[at(head, i)] = store.take();
    length += count;
  }
  void add_tokens(index_t count) { tokens_ += count; }

  void check_truncate(index_t tokens) const {
    require(tokens >= evicted_at_ && tokens <= tokens_, "truncate: to ", tokens, " of ", tokens_,
            " tokens; the first ", evicted_at_, " went through evict()");
  }
  void truncate(page_store& store, index_t tokens) {
    for (index_t h = 0; h < heads(); ++h) shorten(store, h, this->tokens(h) - (tokens_ - tokens));
    tokens_ = tokens;
  }

  void check_keep(std::span<const std::vector<token_t>> keep) const {
    require(std::ssize(keep) == heads(), "evict: ", keep.size(), " lists for ", heads(),
            " kv heads");
    for (index_t h = 0; h < heads(); ++h) {
      token_t previous = -1;
      for (const token_t key : keep[static_cast<std::size_t>(h)]) {
        require(key > previous && key < tokens(h), "evict: key ", key, " of head ", h, " follows ",
                previous, "; the head has ", tokens(h), " keys, lists ascend");
        previous = key;
      }
    }
  }

  /// Free pages that keep() takes: pages to write to that others hold too. Pages whose keys all
  /// stay where they are stay shared.
  index_t pages_to_keep(const page_store& store,
                        std::span<const std::vector<token_t>> keep) const {
    index_t needed = 0;
    for (index_t h = 0; h < heads(); ++h) {
      const auto& keys = keep[static_cast<std::size_t>(h)];
      for (index_t i = 0; i < ceil_div(std::ssize(keys), page_size_); ++i) {
        if (!stays(keys, i) && store.shared(entries_[at(h, i)])) ++needed;
      }
    }
    return needed;
  }

  /// Moves the keys that stay together, move(to, from, places) each; releases what is left over.
  template <class Move>
  void keep(page_store& store, std::span<const std::vector<token_t>> lists, Move&& move) {
    for (index_t h = 0; h < heads(); ++h) {
      const auto& keys = lists[static_cast<std::size_t>(h)];
      const index_t pages = ceil_div(std::ssize(keys), page_size_);
      // A key moves to the front if at all: what is overwritten was moved before, or is not kept.
      for (index_t i = 0; i < pages; ++i) {
        if (stays(keys, i)) continue;
        std::int32_t& entry = entries_[at(h, i)];
        const std::int32_t before = entry;
        const bool copied = store.shared(before);
        if (copied) entry = store.take();
        const index_t end = std::min((i + 1) * page_size_, static_cast<index_t>(keys.size()));
        for (index_t key = i * page_size_; key < end; ++key) {
          const index_t from = keys[static_cast<std::size_t>(key)];
          page_slot source = find(h, from);
          if (from / page_size_ == i) source.page = before;
          move(page_slot{entry, key % page_size_}, source, key - from);
        }
        if (copied) store.release(before);
      }
      shorten(store, h, std::ssize(keys));
    }
    evicted_at_ = tokens_;
  }

 private:
  index_t heads() const { return std::ssize(tokens_of_); }
  std::size_t at(index_t head, index_t page) const {
    return static_cast<std::size_t>(head * stride_ + page);
  }
  template <class F>
  void for_each_page(F&& f) const {
    for (index_t h = 0; h < heads(); ++h) {
      for (index_t i = 0; i < ceil_div(tokens(h), page_size_); ++i) f(entries_[at(h, i)]);
    }
  }
  /// True when the next token goes to a page that others hold.
  bool last_is_shared(const page_store& store, index_t head) const {
    const index_t n = tokens(head);
    return n % page_size_ != 0 && store.shared(entries_[at(head, n / page_size_)]);
  }
  /// True when all keys of page i of a list are where they belong.
  bool stays(const std::vector<token_t>& keys, index_t i) const {
    const index_t last = std::min((i + 1) * page_size_, static_cast<index_t>(keys.size())) - 1;
    return keys[static_cast<std::size_t>(last)] == last;  // lists ascend
  }
  void shorten(page_store& store, index_t head, index_t length) {
    index_t& n = tokens_of_[static_cast<std::size_t>(head)];
    for (index_t i = ceil_div(length, page_size_); i < ceil_div(n, page_size_); ++i) {
      store.release(entries_[at(head, i)]);
    }
    n = length;
  }

  index_t page_size_;
  index_t stride_ = 0;
  index_t tokens_ = 0;
  index_t evicted_at_ = 0;
  std::vector<index_t> tokens_of_;
  std::vector<std::int32_t> entries_;  // [heads][stride]
};

}  // namespace sattn
