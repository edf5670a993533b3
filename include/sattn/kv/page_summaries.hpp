// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/aligned_buffer.hpp>
#include <sattn/core/dtype.hpp>
#include <sattn/core/error.hpp>
#include <sattn/core/math.hpp>
#include <sattn/kv/store_row.hpp>
#include <sattn/kv/stored_view.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

namespace sattn {

namespace detail {

/// The largest f16 that is not above x, and the smallest that is not below it.
inline f16 f16_below(float x) {
  const f16 nearest = to_f16(x);
  if (!(to_float(nearest) > x)) return nearest;
  if (nearest.bits == 0) return {0x8001};
  return {static_cast<std::uint16_t>(nearest.bits >> 15 != 0 ? nearest.bits + 1
                                                             : nearest.bits - 1)};
}
inline f16 f16_above(float x) {
  f16 below = f16_below(-x);
  below.bits ^= 0x8000;
  return below;
}

}  // namespace detail

struct page_summary_options {
  index_t head_dim = 0;
  token_t page_size = 16;   // tokens that a summary covers
  dtype type = dtype::f16;  // f32, f16 or i8
};

/// For every page of the keys of one kv head the smallest and the largest value of each dimension,
/// from which a query bounds its scores of the page (estimate/page_scores.hpp). f16 and int8 are
/// rounded outwards, so that a bound stays one; int8 has one f32 scale a page.
///
/// Follows a cache: update() takes in what was appended, truncate() forgets, a copy is a fork and
/// shares what is full. The summary of some keys is the same bits however they came. Every member
/// gives the strong guarantee. Summaries are of the keys as they are stored, not as they were before
/// rounding. A page with a key that is not finite has a score that means nothing.
/// Source: Quest (arXiv:2406.10774).
class page_summaries {
 public:
  static constexpr index_t tile_pages = 64;

  /// Throws: shape_error unless head_dim and page_size are positive; unsupported for other types.
  explicit page_summaries(const page_summary_options& options)
      : options_(options), tail_(2 * static_cast<std::size_t>(std::max<index_t>(options.head_dim, 0))),
        row_(tail_.size() / 2) {
    require(options.head_dim > 0 && options.page_size > 0, "page_summaries: head_dim ",
            options.head_dim, ", page_size ", options.page_size);
    require<unsupported>(options.type == dtype::f32 || options.type == dtype::f16 ||
                             options.type == dtype::i8,
                         "page_summaries: no summaries in ", name_of(options.type));
  }

  const page_summary_options& options() const { return options_; }
  index_t tokens() const { return tokens_; }
  /// Pages with at least one key.
  index_t pages() const { return ceil_div(tokens_, options_.page_size); }
  index_t tiles() const { return ceil_div(pages(), tile_pages); }

  /// Pages [64 i, 64 (i + 1)): [head_dim][min, max][64 pages] of the type, of int8 followed by
  /// [64] f32 scales. Pages that do not exist are 0.
  const void* tile(index_t i) const { return data(i); }
  /// Memory of the tiles, those that forks share included.
  std::size_t bytes() const { return index(tiles()) * tile_bytes(); }

  /// Room for `tokens` tokens in all; update() up to there does not throw for want of memory.
  /// Throws: std::bad_alloc.
  void reserve(index_t tokens) {
    const index_t wanted = ceil_div(ceil_div(tokens, options_.page_size), tile_pages);
    tiles_.reserve(static_cast<std::size_t>(wanted));
    const index_t writable = pages_before() / tile_pages;  // the first tile to be written
    if (writable < std::ssize(tiles_) && tokens > tokens_ && tiles_[index(writable)].use_count() > 1) {
      std::shared_ptr<aligned_buffer> own = new_tile();
      std::memcpy(own->bytes().data(), data(writable), tile_bytes());
      tiles_[index(writable)] = std::move(own);
    }
    while (std::ssize(tiles_) < wanted) tiles_.push_back(new_tile());
  }

  /// Takes in the keys [tokens(), k.tokens) of a head.
  /// Throws: shape_error if k has fewer tokens than were taken in, or another dim; std::bad_alloc.
  void update(const stored_view& k, index_t kv_head) {
    check(k, kv_head);
    require(k.tokens >= tokens_, "page_summaries: ", tokens_, " tokens were taken in, k has ",
            k.tokens, ": truncate() forgets");
    reserve(k.tokens);
    take_in(k.rows(kv_head), k.tokens);
  }

  /// Forgets all but the first k.tokens keys of a head, as its cache has done.
  /// Throws: shape_error if k has more tokens than were taken in, or another dim; std::bad_alloc.
  void truncate(const stored_view& k, index_t kv_head) {
    check(k, kv_head);
    require(k.tokens <= tokens_, "page_summaries: ", tokens_, " tokens were taken in, k has ",
            k.tokens, ": update() takes in more");
    const index_t whole = k.tokens / options_.page_size;
    const index_t kept_tiles = ceil_div(ceil_div(k.tokens, options_.page_size), tile_pages);
    // The page that is cut begins anew: a minimum has no inverse.
    page_summaries cut(*this);
    cut.tokens_ = whole * options_.page_size;
    cut.tiles_.resize(index(ceil_div(whole, tile_pages)));
    cut.reserve(k.tokens);
    if (kept_tiles > 0) cut.own_last_tile();
    for (index_t page = whole; page < kept_tiles * tile_pages; ++page) cut.write_page(page, true);
    cut.take_in(k.rows(kv_head), k.tokens);
    std::swap(*this, cut);
  }

  /// Forgets everything.
  void clear() {
    tokens_ = 0;
    tiles_.clear();
  }

 private:
  static std::size_t index(index_t i) { return static_cast<std::size_t>(i); }
  index_t pages_before() const { return tokens_ / options_.page_size; }  // that are full
  std::size_t tile_bytes() const {
    const auto elements = index(options_.head_dim * 2 * tile_pages);
    return options_.type == dtype::i8 ? elements + tile_pages * sizeof(float)
                                      : elements * index(row_bytes(options_.type, 1));
  }
  std::byte* data(index_t i) const { return tiles_[index(i)]->bytes().data(); }
  std::shared_ptr<aligned_buffer> new_tile() const {
    auto tile = std::make_shared<aligned_buffer>();
    tile->reserve(tile_bytes());
    std::memset(tile->bytes().data(), 0, tile_bytes());
    return tile;
  }
  void own_last_tile() {
    std::shared_ptr<aligned_buffer>& last = tiles_.back();
    if (last.use_count() == 1) return;
    std::shared_ptr<aligned_buffer> own = new_tile();
    std::memcpy(own->bytes().data(), last->bytes().data(), tile_bytes());
    last = std::move(own);
  }

  void check(const stored_view& k, index_t kv_head) const {
    check_view("page_summaries: k", k);
    require(k.dim == options_.head_dim && kv_head >= 0 && kv_head < k.heads,
            "page_summaries: k has ", k.heads, " heads of dim ", k.dim, "; head ", kv_head,
            " of dim ", options_.head_dim, " is asked for");
  }

  void take_in(const row_source& rows, index_t end) {
    const index_t dim = options_.head_dim;
    float* const low = tail_.data();
    float* const high = low + dim;
    for (; tokens_ < end; ++tokens_) {
      const auto key = static_cast<token_t>(tokens_);
      const void* row = nullptr;
      float scale = 1.0f;
      rows.locate(&key, 1, &row);
      if (has_row_scale(rows.type)) rows.read_scales(&key, 1, &scale);
      load_row(rows.type, row, scale, dim, row_.data());
      const bool first = tokens_ % options_.page_size == 0;
      for (index_t d = 0; d < dim; ++d) {
        const float x = row_[index(d)];
        low[d] = first ? x : std::min(low[d], x);
        high[d] = first ? x : std::max(high[d], x);
      }
      const bool last = tokens_ + 1 == end || (tokens_ + 1) % options_.page_size == 0;
      if (last) write_page(tokens_ / options_.page_size);
    }
  }

  /// Puts the summary of the page at hand into its tile, or zeros.
  void write_page(index_t page, bool clear = false) {
    if (clear) std::fill(tail_.begin(), tail_.end(), 0.0f);
    const index_t dim = options_.head_dim;
    const float* const low = tail_.data();
    const float* const high = low + dim;
    std::byte* const tile = data(page / tile_pages);
    const index_t lane = page % tile_pages;
    const auto each = [&](auto* to, auto&& below, auto&& above) {
      for (index_t d = 0; d < dim; ++d) {
        to[2 * d * tile_pages + lane] = below(low[d]);
        to[(2 * d + 1) * tile_pages + lane] = above(high[d]);
      }
    };
    const auto same = [](float x) { return x; };
    if (options_.type == dtype::f32) return each(reinterpret_cast<float*>(tile), same, same);
    if (options_.type == dtype::f16) {
      return each(reinterpret_cast<f16*>(tile), detail::f16_below, detail::f16_above);
    }
    float top = 0.0f;
    for (index_t d = 0; d < dim; ++d) top = std::max({top, -low[d], high[d]});
    const float scale = std::max(top / 126.0f, std::numeric_limits<float>::min());
    const auto above = [&](float x) {
      float q = std::ceil(x / scale);
      if (double{scale} * double{q} < double{x}) q += 1.0f;  // the quotient was rounded
      return static_cast<std::int8_t>(q >= -127.0f && q <= 127.0f ? q : 127.0f);
    };
    const auto below = [&](float x) { return static_cast<std::int8_t>(-above(-x)); };
    each(reinterpret_cast<std::int8_t*>(tile), below, above);
    reinterpret_cast<float*>(tile + 2 * dim * tile_pages)[lane] = clear ? 0.0f : scale;
  }

  page_summary_options options_;
  index_t tokens_ = 0;
  std::vector<std::shared_ptr<aligned_buffer>> tiles_;
  std::vector<float> tail_;  // of the last page: [min, max][head_dim]
  std::vector<float> row_;   // a key
};

}  // namespace sattn
