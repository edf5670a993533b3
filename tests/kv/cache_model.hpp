// SPDX-License-Identifier: Apache-2.0
//
// What a paged_kv_cache should hold, as simply as it can be said: the rows of each head.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <sattn/kv/paged_cache.hpp>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "support/compare.hpp"
#include "support/problem.hpp"
#include "support/random.hpp"

namespace test_support {

/// A row as it comes back: its bytes and its scale.
struct stored_bytes {
  std::vector<std::byte> bytes;
  float scale = 0;
  bool operator==(const stored_bytes&) const = default;
};

inline stored_bytes read_row(const sattn::stored_view& view, index_t head, index_t token) {
  const sattn::row_source source = view.rows(head);
  const auto key = static_cast<sattn::token_t>(token);
  const void* row = nullptr;
  source.locate(&key, 1, &row);
  stored_bytes result;
  const auto* const first = static_cast<const std::byte*>(row);
  result.bytes.assign(first, first + sattn::row_bytes(view.type, view.dim));
  if (sattn::has_row_scale(view.type)) source.read_scales(&key, 1, &result.scale);
  return result;
}

template <class T>
stored_bytes encode(const float* x, index_t dim) {
  stored_bytes result;
  result.bytes.resize(at(sattn::row_bytes(sattn::dtype_of<T>, dim)));
  alignas(64) std::byte buffer[4096];
  sattn::store_row<T>(x, dim, buffer, result.scale);
  std::copy_n(buffer, result.bytes.size(), result.bytes.begin());
  if (!sattn::has_row_scale(sattn::dtype_of<T>)) result.scale = 0;
  return result;
}

/// One sequence of the model.
struct sequence_model {
  std::vector<std::vector<std::pair<stored_bytes, stored_bytes>>> heads;  // rows of K and V
  index_t tokens = 0;
  index_t evicted_at = 0;
};

/// Sequences of one store beside their models. Every step checks its promise: success means what
/// the model does, an error means that nothing changed.
template <class K, class V>
class cache_machine {
 public:
  using cache = sattn::paged_kv_cache<K, V>;

  cache_machine(const sattn::kv_cache_options& options, std::uint64_t seed)
      : random_(seed), options_(options) {
    caches_.emplace_back(options);
    models_.push_back(empty());
  }

  /// One random operation.
  void step() {
    const std::size_t i = pick();
    switch (random_.integer(0, 10)) {
      case 0: case 1: case 2: case 3:
        append(i, random_.pick<index_t>({1, 1, 1, 0, 2, 7, 20}));
        break;
      case 4: case 5: truncate(i); break;
      case 6: fork(i); break;
      case 7: drop(i); break;
      case 8: evict(i); break;
      default: fresh(i); break;
    }
    if (!caches_.empty()) check(std::min(i, caches_.size() - 1));
    check_pages();
  }

  void check_all() const {
    for (std::size_t i = 0; i < caches_.size(); ++i) check(i);
  }
  const std::map<std::string, int>& counts() const { return counts_; }

  /// The store and its only holder, once all but one sequence are gone.
  void drop_all() {
    while (caches_.size() > 1) drop(0);
    caches_[0] = caches_[0].new_sequence();
    models_[0] = empty();
    check_pages();
  }

 private:
  sequence_model empty() const {
    sequence_model m;
    m.heads.resize(at(options_.kv_heads));
    return m;
  }
  std::size_t pick() { return at(random_.integer(0, std::ssize(caches_))); }

  // The pages that a sequence's head holds, told by its view.
  std::vector<std::int32_t> pages_of(std::size_t i, index_t head) const {
    const sattn::stored_view k = caches_[i].view(head).k;
    const auto used = sattn::ceil_div(k.tokens, options_.page_size);
    return {k.pages.table.begin(), k.pages.table.begin() + used};
  }
  std::map<std::int32_t, int> holders() const {
    std::map<std::int32_t, int> count;
    for (std::size_t i = 0; i < caches_.size(); ++i) {
      for (index_t h = 0; h < options_.kv_heads; ++h) {
        for (const std::int32_t page : pages_of(i, h)) ++count[page];
      }
    }
    return count;
  }

  template <class F>
  bool changes(const char* name, std::size_t i, index_t needed_pages, F&& f) {
    const index_t free = caches_[i].free_pages();
    try {
      f();
    } catch (const sattn::capacity_error&) {
      ++counts_[std::string(name) + " without room"];
      EXPECT_GT(needed_pages, free) << name;
      EXPECT_EQ(caches_[i].free_pages(), free) << name;
      return false;
    }
    ++counts_[name];
    EXPECT_LE(needed_pages, free) << name;
    return true;
  }

  void append(std::size_t i, index_t n) {
    owned_tensor k(n, options_.kv_heads, options_.head_dim);
    const index_t v_dim = options_.v_dim == 0 ? options_.head_dim : options_.v_dim;
    owned_tensor v(n, options_.kv_heads, v_dim);
    k.fill_normal(random_);
    v.fill_normal(random_);
    auto count = holders();
    index_t needed = 0;
    for (index_t h = 0; h < options_.kv_heads && n > 0; ++h) {
      const index_t before = std::ssize(models_[i].heads[at(h)]);
      needed += sattn::ceil_div(before + n, options_.page_size) -
                sattn::ceil_div(before, options_.page_size);
      if (before % options_.page_size != 0 && count[pages_of(i, h).back()] > 1) ++needed;
    }
    if (!changes("append", i, needed, [&] { caches_[i].append(k.view(), v.view()); })) return;
    for (index_t t = 0; t < n; ++t) {
      for (index_t h = 0; h < options_.kv_heads; ++h) {
        models_[i].heads[at(h)].emplace_back(encode<K>(k.row(t, h), options_.head_dim),
                                             encode<V>(v.row(t, h), v_dim));
      }
    }
    models_[i].tokens += n;
  }

  void truncate(std::size_t i) {
    sequence_model& m = models_[i];
    const index_t to = random_.integer(0, 2) == 0 && m.tokens > m.evicted_at
                           ? m.tokens - 1
                           : random_.integer(0, m.tokens + 2);
    try {
      caches_[i].truncate(to);
    } catch (const sattn::shape_error&) {
      ++counts_["truncate refused"];
      EXPECT_TRUE(to < m.evicted_at || to > m.tokens);
      return;
    }
    ++counts_["truncate"];
    EXPECT_TRUE(to >= m.evicted_at && to <= m.tokens);
    for (auto& head : m.heads) head.resize(head.size() - at(m.tokens - to));
    m.tokens = to;
  }

  void fork(std::size_t i) {
    if (caches_.size() == 6) return drop(i);
    ++counts_["fork"];
    caches_.push_back(caches_[i].fork());
    models_.push_back(models_[i]);
  }
  void drop(std::size_t i) {
    if (caches_.size() == 1) return;
    ++counts_["drop"];
    caches_[i] = std::move(caches_.back());
    caches_.pop_back();
    models_[i] = models_.back();
    models_.pop_back();
  }
  void fresh(std::size_t i) {
    if (caches_.size() == 6) return;
    ++counts_["new"];
    caches_.push_back(caches_[i].new_sequence());
    models_.push_back(empty());
  }

  void evict(std::size_t i) {
    sequence_model& m = models_[i];
    std::vector<std::vector<sattn::token_t>> keep(m.heads.size());
    const double share = random_.uniform();
    for (std::size_t h = 0; h < keep.size(); ++h) {
      const double of_head = random_.integer(0, 3) == 0 ? random_.uniform() : share;
      const auto prefix = random_.integer(0, 2) * random_.integer(0, std::ssize(m.heads[h]) + 1);
      for (index_t t = 0; t < std::ssize(m.heads[h]); ++t) {
        if (t < prefix || random_.uniform() < of_head) {
          keep[h].push_back(static_cast<sattn::token_t>(t));
        }
      }
    }
    auto count = holders();
    index_t needed = 0;
    for (std::size_t h = 0; h < keep.size(); ++h) {
      const auto pages = pages_of(i, static_cast<index_t>(h));
      for (index_t p = 0; p * options_.page_size < std::ssize(keep[h]); ++p) {
        bool moved = false;
        for (index_t t = p * options_.page_size;
             t < std::min<index_t>((p + 1) * options_.page_size, std::ssize(keep[h])); ++t) {
          moved = moved || keep[h][at(t)] != t;
        }
        if (moved && count[pages[at(p)]] > 1) ++needed;
      }
    }
    if (!changes("evict", i, needed, [&] { caches_[i].evict(keep); })) return;
    for (std::size_t h = 0; h < keep.size(); ++h) {
      std::vector<std::pair<stored_bytes, stored_bytes>> kept;
      for (const sattn::token_t t : keep[h]) kept.push_back(m.heads[h][at(t)]);
      m.heads[h] = kept;
    }
    m.evicted_at = m.tokens;
  }

  void check(std::size_t i) const {
    const cache& c = caches_[i];
    const sequence_model& m = models_[i];
    ASSERT_EQ(c.tokens(), m.tokens);
    bool uniform = true;
    for (index_t h = 0; h < options_.kv_heads; ++h) {
      const auto& rows = m.heads[at(h)];
      ASSERT_EQ(c.tokens(h), std::ssize(rows));
      uniform = uniform && rows.size() == m.heads[0].size();
      const sattn::kv_view view = c.view(h);
      check_view("k", view.k);
      check_view("v", view.v);
      for (index_t t = 0; t < std::ssize(rows); ++t) {
        ASSERT_EQ(read_row(view.k, 0, t), rows[at(t)].first) << "key " << t << " of head " << h;
        ASSERT_EQ(read_row(view.v, 0, t), rows[at(t)].second) << "value " << t << " of head " << h;
      }
    }
    check_summaries(c);
    ASSERT_EQ(c.uniform(), uniform);
    if (!uniform) return;
    const sattn::kv_view all = c.view();
    for (index_t h = 0; h < options_.kv_heads && all.k.tokens > 0; ++h) {
      const index_t last = all.k.tokens - 1;
      ASSERT_EQ(read_row(all.k, h, last), m.heads[at(h)].back().first);
      ASSERT_EQ(read_row(all.v, h, last), m.heads[at(h)].back().second);
    }
  }

  void check_summaries(const cache& c) const {
    std::size_t bytes = 0;
    const auto check_all = [&](std::span<const sattn::page_summaries> got,
                               std::optional<sattn::dtype> type, sattn::summary_kind kind) {
      ASSERT_EQ(got.size(), type ? at(options_.kv_heads) : 0);
      for (index_t h = 0; h < std::ssize(got); ++h) {
        sattn::page_summaries anew({options_.head_dim, options_.page_size, *type, kind});
        anew.update(c.view(h).k, 0);
        check_same(got[at(h)], anew);
        bytes += anew.bytes();
      }
    };
    check_all(c.summaries(), options_.summaries, sattn::summary_kind::bounds);
    check_all(c.means(), options_.means, sattn::summary_kind::mean);
    ASSERT_EQ(c.bytes().summaries, bytes);
  }

  static void check_same(const sattn::page_summaries& got, const sattn::page_summaries& want) {
    ASSERT_EQ(got.options().kind, want.options().kind);
    ASSERT_EQ(got.tokens(), want.tokens());
    ASSERT_EQ(got.tiles(), want.tiles());
    ASSERT_EQ(got.bytes(), want.bytes());
    for (index_t i = 0; i < want.tiles(); ++i) {
      ASSERT_EQ(std::memcmp(got.tile(i), want.tile(i), want.bytes() / at(want.tiles())), 0)
          << "tile " << i;
    }
  }

  // Every page is free or held, and the accounts say so.
  void check_pages() const {
    const auto count = holders();
    const sattn::kv_cache_bytes first = caches_[0].bytes();
    const index_t pages =
        sattn::ceil_div(options_.capacity, options_.page_size) * options_.kv_heads;
    ASSERT_EQ(caches_[0].free_pages() + std::ssize(count), pages);
    const std::size_t page_bytes = first.capacity / at(pages);
    ASSERT_EQ(first.used, count.size() * page_bytes);
    ASSERT_EQ(first.counts, 2 * sizeof(std::int32_t) * at(pages));
    for (std::size_t i = 0; i < caches_.size(); ++i) {
      std::size_t held = 0;
      for (index_t h = 0; h < options_.kv_heads; ++h) held += pages_of(i, h).size();
      ASSERT_EQ(caches_[i].bytes().held, held * page_bytes);
    }
  }

  random_source random_;
  sattn::kv_cache_options options_;
  std::vector<cache> caches_;
  std::vector<sequence_model> models_;
  std::map<std::string, int> counts_;
};

}  // namespace test_support
