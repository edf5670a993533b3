// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/aligned_buffer.hpp>
#include <sattn/core/error.hpp>
#include <sattn/core/math.hpp>
#include <sattn/core/tensor_view.hpp>
#include <sattn/kv/layouts.hpp>
#include <sattn/kv/page_store.hpp>
#include <sattn/kv/page_summaries.hpp>
#include <sattn/kv/page_tables.hpp>
#include <sattn/kv/rotary.hpp>
#include <sattn/kv/store_row.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace sattn {

struct kv_cache_options {
  index_t kv_heads = 1;
  index_t head_dim = 0;    // of keys
  index_t v_dim = 0;       // of values; 0 = head_dim
  token_t page_size = 16;  // tokens of a page
  index_t capacity = 0;    // tokens of one sequence, or of all together if they fill their pages
  // Which page_summaries to keep, in f32, f16 or i8.
  std::optional<dtype> summaries = std::nullopt;  // bounds
  std::optional<dtype> means = std::nullopt;
};

/// What a cache takes and has, in bytes. Pages that sequences share count once in `used`.
struct kv_cache_bytes {
  std::size_t capacity;  // of all pages, for all sequences of the store
  std::size_t used;      // of pages that some sequence holds
  std::size_t held;      // of pages that this sequence holds
  std::size_t counts;    // of holders of each page, and the list of free ones, of the store
  std::size_t tables;    // of this sequence
  std::size_t summaries;  // of this sequence, bounds and means; forks share most of them
};

/// The keys and values of one sequence in pages, stored as K and V: float, f16, bf16, std::int8_t
/// (with one f32 scale a row) or q8_0.
///
/// A page belongs to one kv head and holds K and then V of page_size tokens, so that heads can be
/// of different lengths and what is read together lies together. Sequences made from each other by
/// fork() and new_sequence() draw from the same pages; forks share them, and whoever writes to a
/// shared page first gets a copy.
///
/// Every member gives the strong guarantee: when it throws, nothing has changed. Not synchronised:
/// sequences of one store must not be changed at the same time, and views are good until their
/// sequence changes. The destructor gives the pages back.
template <class K, class V = K>
class paged_kv_cache {
 public:
  /// An empty sequence and a store of pages of its own, for `capacity` tokens of all heads.
  /// Throws: shape_error for extents that make no cache; std::bad_alloc.
  explicit paged_kv_cache(const kv_cache_options& options)
      : shape_(options),
        store_(make_store()),
        tables_(options.kv_heads, options.page_size),
        summaries_(empty_summaries()) {}

  paged_kv_cache(paged_kv_cache&&) noexcept = default;
  paged_kv_cache& operator=(paged_kv_cache&& other) noexcept {
    paged_kv_cache taken(std::move(other));
    std::swap(shape_, taken.shape_);
    std::swap(store_, taken.store_);
    std::swap(tables_, taken.tables_);
    std::swap(summaries_, taken.summaries_);
    return *this;
  }
  ~paged_kv_cache() {
    if (store_ != nullptr) tables_.clear(*store_);
  }

  /// An empty sequence on the same store.
  paged_kv_cache new_sequence() const {
    return paged_kv_cache(shape_, store_, page_tables(shape_.kv_heads, shape_.page_size),
                          empty_summaries());
  }

  /// The same tokens once more, in the same pages: prefixes, beams, drafts.
  /// Cost: the tables. Throws: std::bad_alloc.
  paged_kv_cache fork() const {
    page_tables tables(tables_);
    std::vector<page_summaries> summaries(summaries_);
    tables.hold(*store_);  // from here on nothing throws
    return paged_kv_cache(shape_, store_, std::move(tables), std::move(summaries));
  }

  /// Adds tokens behind the last one of every head.
  ///
  /// Shapes: k [n, kv_heads, head_dim], v [n, kv_heads, v_dim], f32.
  /// Throws: shape_error if extents differ, or a type meets a number that it cannot express
  /// (can_store_row); capacity_error where the store has too few free pages; std::bad_alloc.
  /// Cost: the rows, and copies of the last pages where they are shared.
  void append(const tensor_view<const float>& k, const tensor_view<const float>& v) {
    check_rows(k, v);
    reserve_pages(tables_.pages_to_append(*store_, k.tokens));
    for (page_summaries& s : summaries_) s.reserve(s.tokens() + k.tokens);
    tables_.grow(k.tokens);
    for (index_t h = 0; h < shape_.kv_heads; ++h) {
      const index_t first = tables_.tokens(h);
      tables_.append(*store_, h, k.tokens, [&](std::int32_t to, std::int32_t from) {
        std::memcpy(store_->page(to), store_->page(from),
                    static_cast<std::size_t>(store_->page_bytes()));
      });
      for (index_t t = 0; t < k.tokens; ++t) {
        const page_slot slot = tables_.find(h, first + t);
        store_row<K>(k.row(t, h), shape_.head_dim, k_row(slot), k_scale(slot));
        store_row<V>(v.row(t, h), v_dim(), v_row(slot), v_scale(slot));
      }
    }
    tables_.add_tokens(k.tokens);
    update_summaries();
  }

  /// Keeps the first `tokens` tokens that were ever appended: what comes after is forgotten, as
  /// when drafted tokens are refused. Pages that become empty are given back.
  /// Throws: shape_error unless the tokens to forget came after the last evict().
  void truncate(index_t tokens) {
    tables_.check_truncate(tokens);
    std::vector<page_summaries> cut(summaries_);
    for (std::size_t i = 0; i < cut.size(); ++i) {
      stored_view k = view(head_of_summary(i)).k;
      k.tokens -= this->tokens() - tokens;
      cut[i].truncate(k, 0);
    }
    tables_.truncate(*store_, tokens);
    summaries_.swap(cut);
  }

  /// Keeps of each head the keys that its list names, ascending; key i of a head then is what was
  /// key keep[head][i]. Other pages go back to the store, for all its sequences. Lengths may differ
  /// from head to head.
  /// Throws: shape_error unless there is a list for each head, ascending and of keys that exist;
  /// capacity_error where pages that forks share must be copied and too few are free.
  /// Source: what SnapKV (arXiv:2404.14469) and Ada-KV (arXiv:2407.11550) do with their choices.
  void evict(std::span<const std::vector<token_t>> keep) { evict(keep, nullptr, nullptr); }

  /// The same, and keys that move are turned to the positions where they then are: a key that
  /// `embedding` was applied to at position keep[head][i] ends as if it had been at i. Types in
  /// steps (int8, q8_0) are rounded once more. The next token's position is tokens(kv_head).
  /// Throws: shape_error also where the embedding does not fit, or a turned key cannot be stored.
  /// Source: positions within the cache, StreamingLLM (arXiv:2309.17453).
  void evict(std::span<const std::vector<token_t>> keep, const rotary_embedding& embedding) {
    rotary rotation(embedding, shape_.head_dim);
    std::vector<float> row(static_cast<std::size_t>(shape_.head_dim));
    evict(keep, &rotation, row.data());
  }

  const kv_cache_options& options() const { return shape_; }
  /// Tokens appended and not truncated; the position of the next one.
  index_t tokens() const { return tables_.tokens(); }
  /// Keys of one head: fewer where some were evicted.
  index_t tokens(index_t kv_head) const { return tables_.tokens(kv_head); }
  /// True when all heads have the same number of keys.
  bool uniform() const { return tables_.uniform(); }
  /// Free pages of the store; a token takes one of each kv head whenever pages are full.
  index_t free_pages() const { return store_->free_pages(); }
  kv_cache_bytes bytes() const {
    const auto of = [&](index_t pages) {
      return static_cast<std::size_t>(pages * store_->page_bytes());
    };
    return {of(store_->pages()), of(store_->pages() - store_->free_pages()), of(tables_.pages()),
            store_->count_bytes(), tables_.bytes(), summary_bytes()};
  }
  /// The bounds of the pages of each head, of its keys as they are stored; empty if the options
  /// asked for none.
  std::span<const page_summaries> summaries() const {
    return std::span(summaries_).first(bounds_count());
  }
  /// Their means, likewise.
  std::span<const page_summaries> means() const {
    return std::span(summaries_).subspan(bounds_count());
  }

  /// All heads, for attend(). Throws: shape_error where heads differ in length.
  kv_view view() const {
    require(uniform(), "paged_kv_cache: heads have different numbers of keys, view(kv_head) shows ",
            "one");
    return view_of_heads(0, shape_.kv_heads);
  }
  /// One head, as a sequence of one head.
  kv_view view(index_t kv_head) const {
    require(kv_head >= 0 && kv_head < shape_.kv_heads, "paged_kv_cache: head ", kv_head, " of ",
            shape_.kv_heads);
    return view_of_heads(kv_head, kv_head + 1);
  }

 private:
  static constexpr index_t max_dim = index_t{1} << 20;

  // Where things lie in a page, in bytes.
  struct page_layout {
    index_t k_row, v_row;
    index_t v, k_scales, v_scales, bytes;
  };

  paged_kv_cache(const kv_cache_options& shape, std::shared_ptr<page_store> store,
                 page_tables tables, std::vector<page_summaries> summaries)
      : shape_(shape), store_(std::move(store)), tables_(std::move(tables)),
        summaries_(std::move(summaries)) {}

  std::shared_ptr<page_store> make_store() const {
    const kv_cache_options& o = shape_;
    require(o.kv_heads > 0 && o.head_dim > 0 && o.v_dim >= 0 && o.page_size > 0 && o.capacity >= 0,
            "paged_kv_cache: ", o.kv_heads, " heads, dims ", o.head_dim, " and ", o.v_dim,
            ", pages of ", o.page_size, ", capacity ", o.capacity);
    require(o.head_dim % block_of(dtype_of<K>) == 0 &&
                (o.v_dim == 0 ? o.head_dim : o.v_dim) % block_of(dtype_of<V>) == 0,
            "paged_kv_cache: dims ", o.head_dim, " and ", o.v_dim, " in blocks of 32");
    index_t pages = 0;
    index_t bytes = 0;
    require(o.head_dim <= max_dim && o.v_dim <= max_dim &&
                o.capacity <= std::numeric_limits<token_t>::max() &&
                multiply(ceil_div(o.capacity, o.page_size), o.kv_heads, pages) &&
                pages <= std::numeric_limits<std::int32_t>::max() &&
                multiply(pages, layout().bytes, bytes),
            "paged_kv_cache: a capacity of ", o.capacity, " tokens of ", o.kv_heads,
            " heads, dims ",
            o.head_dim, " and ", o.v_dim, ", in pages of ", o.page_size, " cannot be counted");
    return std::make_shared<page_store>(pages, layout().bytes);
  }

  index_t v_dim() const { return shape_.v_dim == 0 ? shape_.head_dim : shape_.v_dim; }
  page_layout layout() const {
    constexpr index_t line = cache_line;
    page_layout l{};
    l.k_row = row_bytes(dtype_of<K>, shape_.head_dim);
    l.v_row = row_bytes(dtype_of<V>, v_dim());
    l.v = round_up(shape_.page_size * l.k_row, line);
    l.k_scales = l.v + round_up(shape_.page_size * l.v_row, line);
    const index_t scales = shape_.page_size * index_t{sizeof(float)};
    l.v_scales = l.k_scales + (has_row_scale(dtype_of<K>) ? scales : 0);
    l.bytes = round_up(l.v_scales + (has_row_scale(dtype_of<V>) ? scales : 0), line);
    return l;
  }

  std::byte* k_row(const page_slot& s) { return store_->page(s.page) + s.slot * layout().k_row; }
  std::byte* v_row(const page_slot& s) {
    return store_->page(s.page) + layout().v + s.slot * layout().v_row;
  }
  float& k_scale(const page_slot& s) {
    if (!has_row_scale(dtype_of<K>)) return no_scale_;
    return reinterpret_cast<float*>(store_->page(s.page) + layout().k_scales)[s.slot];
  }
  float& v_scale(const page_slot& s) {
    if (!has_row_scale(dtype_of<V>)) return no_scale_;
    return reinterpret_cast<float*>(store_->page(s.page) + layout().v_scales)[s.slot];
  }

  void check_rows(const tensor_view<const float>& k, const tensor_view<const float>& v) const {
    check_view("append: k", k);
    check_view("append: v", v);
    require(k.heads == shape_.kv_heads && k.dim == shape_.head_dim && v.heads == shape_.kv_heads &&
                v.dim == v_dim() && v.tokens == k.tokens,
            "append: k is [", k.tokens, ", ", k.heads, ", ", k.dim, "] and v [", v.tokens, ", ",
            v.heads, ", ", v.dim, "], expected [n, ", shape_.kv_heads, ", ", shape_.head_dim,
            "] and [n, ", shape_.kv_heads, ", ", v_dim(), "]");
    require(tokens() + k.tokens <= std::numeric_limits<token_t>::max(), "append: ", tokens(),
            " and ",
            k.tokens, " tokens, positions are 32 bit");
    for (index_t t = 0; t < k.tokens; ++t) {
      for (index_t h = 0; h < k.heads; ++h) {
        require(can_store_row<K>(k.row(t, h), k.dim) && can_store_row<V>(v.row(t, h), v.dim),
                "append: token ", t, ", head ", h, " holds a number that ", name_of(dtype_of<K>),
                " or ", name_of(dtype_of<V>), " cannot express");
      }
    }
  }

  /// `rotation` may be null; `row` is scratch for a key.
  void evict(std::span<const std::vector<token_t>> keep, rotary* rotation, float* row) {
    tables_.check_keep(keep);
    if (rotation != nullptr) check_turned(keep, *rotation, row);
    reserve_pages(tables_.pages_to_keep(*store_, keep));
    std::vector<page_summaries> kept = empty_summaries();
    for (std::size_t i = 0; i < kept.size(); ++i) {
      kept[i].reserve(std::ssize(keep[static_cast<std::size_t>(head_of_summary(i))]));
    }
    tables_.keep(*store_, keep, [&](const page_slot& to, const page_slot& from, index_t places) {
      if (rotation != nullptr && places != 0) {
        load_row(dtype_of<K>, k_row(from), k_scale(from), shape_.head_dim, row);
        rotation->turn(row, places);
        store_row<K>(row, shape_.head_dim, k_row(to), k_scale(to));
      } else {
        std::memmove(k_row(to), k_row(from), static_cast<std::size_t>(layout().k_row));
        k_scale(to) = k_scale(from);
      }
      std::memmove(v_row(to), v_row(from), static_cast<std::size_t>(layout().v_row));
      v_scale(to) = v_scale(from);
    });
    summaries_.swap(kept);
    update_summaries();
  }
  /// Turned keys can be longer in single elements: what was finite must remain so.
  void check_turned(std::span<const std::vector<token_t>> keep, rotary& rotation, float* row) {
    for (index_t h = 0; h < shape_.kv_heads; ++h) {
      const auto& keys = keep[static_cast<std::size_t>(h)];
      for (index_t i = 0; i < std::ssize(keys); ++i) {
        const index_t key = keys[static_cast<std::size_t>(i)];
        const page_slot slot = tables_.find(h, key);
        if (key == i) continue;
        load_row(dtype_of<K>, k_row(slot), k_scale(slot), shape_.head_dim, row);
        const bool finite = all_finite(row);
        rotation.turn(row, i - key);
        require(!finite || (can_store_row<K>(row, shape_.head_dim) && all_finite(row)),
                "evict: key ", key, " of head ", h, ", turned to position ", i,
                ", holds a number that ", name_of(dtype_of<K>), " cannot express");
      }
    }
  }

  bool all_finite(const float* row) const {
    return std::all_of(row, row + shape_.head_dim, [](float x) { return std::isfinite(x); });
  }

  void reserve_pages(index_t needed) const {
    require<capacity_error>(needed <= store_->free_pages(), "paged_kv_cache: ", needed,
                            " pages of ", shape_.page_size, " tokens needed, ",
                            store_->free_pages(), " of ", store_->pages(), " are free");
  }

  std::vector<page_summaries> empty_summaries() const {
    std::vector<page_summaries> all;
    const auto add = [&](std::optional<dtype> type, summary_kind kind) {
      if (!type) return;
      all.insert(all.end(), static_cast<std::size_t>(shape_.kv_heads),
                 page_summaries({shape_.head_dim, shape_.page_size, *type, kind}));
    };
    add(shape_.summaries, summary_kind::bounds);
    add(shape_.means, summary_kind::mean);
    return all;
  }
  std::size_t bounds_count() const {
    return shape_.summaries ? static_cast<std::size_t>(shape_.kv_heads) : 0;
  }
  index_t head_of_summary(std::size_t i) const { return static_cast<index_t>(i) % shape_.kv_heads; }
  std::size_t summary_bytes() const {
    std::size_t total = 0;
    for (const page_summaries& s : summaries_) total += s.bytes();
    return total;
  }
  /// Of the keys that are new; room for them was reserved.
  void update_summaries() {
    for (std::size_t i = 0; i < summaries_.size(); ++i) {
      summaries_[i].update(view(head_of_summary(i)).k, 0);
    }
  }

  kv_view view_of_heads(index_t begin, index_t end) const {
    const page_layout l = layout();
    const auto part = [&](dtype type, index_t width, index_t row, index_t at, index_t scales) {
      stored_view first;  // the first page of the store
      if (store_->pages() > 0) first.data = store_->data() + at;
      first.type = type;
      first.tokens = shape_.page_size;
      first.heads = 1;
      first.dim = width;
      first.token_stride = row;
      if (has_row_scale(type) && store_->pages() > 0) {
        first.scales = {reinterpret_cast<const float*>(store_->data() + scales), 1, 0, 0};
      }
      const index_t floats = l.bytes / index_t{sizeof(float)};
      return paged_by_head({first, store_->pages(), l.bytes, floats}, tables_.entries(begin),
                           tables_.stride(), end - begin, tables_.tokens(begin));
    };
    return {part(dtype_of<K>, shape_.head_dim, l.k_row, 0, l.k_scales),
            part(dtype_of<V>, v_dim(), l.v_row, l.v, l.v_scales)};
  }

  kv_cache_options shape_;
  std::shared_ptr<page_store> store_;
  page_tables tables_;
  std::vector<page_summaries> summaries_;  // bounds of each kv head, then means, if any
  float no_scale_ = 0.0f;  // what rows without a scale write to
};

}  // namespace sattn
