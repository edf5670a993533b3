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

/// What is kept of a page's keys: the smallest and the largest value of each dimension, or the
/// mean.
enum class summary_kind { bounds, mean };

/// Values of each dimension in a summary.
constexpr index_t summary_rows(summary_kind kind) { return kind == summary_kind::bounds ? 2 : 1; }

struct page_summary_options {
  index_t head_dim = 0;
  token_t page_size = 16;   // tokens that a summary covers
  dtype type = dtype::f16;  // f32, f16 or i8
  summary_kind kind = summary_kind::bounds;
};

/// Summaries of every page of the keys of one kv head, from which a query bounds its scores of the
/// page or estimates their mean (estimate/page_scores.hpp).
///
/// Bounds in f16 and int8 are rounded outwards, so that a bound stays one. A mean is the sum of the
/// keys in the order of their positions, in f32, divided by their number, then rounded to the
/// nearest of the type; before that it is off by at most page_size * 2^-24 of the mean magnitude.
/// int8 has one f32 scale a page, of bounds a power of two.
///
/// Follows a cache: update() takes in what was appended, truncate() forgets, a copy is a fork and
/// shares what is full. The summary of some keys is the same bits however they came. Every member
/// gives the strong guarantee. Summaries are of the keys as they are stored, not as they were
/// before rounding. A page whose summary its type cannot hold, as f16 above 65,504, or with a key
/// that is not finite, scores +inf: what nothing is known of is kept.
///
/// Source: Quest (arXiv:2406.10774) for bounds, MoBA (arXiv:2502.13189) for means.
class page_summaries {
 public:
  static constexpr index_t tile_pages = 64;

  /// Throws: shape_error unless head_dim and page_size are positive; unsupported for other types.
  explicit page_summaries(const page_summary_options& options)
      : options_(options),
        row_(index(std::max<index_t>(options.head_dim, 0))),
        tail_(row_.size() * index(rows())) {
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

  /// Pages [64 i, 64 (i + 1)): [head_dim][min, max][64 pages] or [head_dim][64 pages] means of the
  /// type, of int8 followed by [64] f32 scales. Pages that do not exist are 0.
  const void* tile(index_t i) const { return data(i); }
  /// Memory of the tiles of pages(), those that forks share included.
  std::size_t bytes() const { return index(tiles()) * tile_bytes(); }

  /// Room for `tokens` tokens in all; update() up to there does not throw for want of memory.
  /// Throws: std::bad_alloc.
  void reserve(index_t tokens) {
    const index_t wanted = ceil_div(ceil_div(tokens, options_.page_size), tile_pages);
    tiles_.reserve(static_cast<std::size_t>(wanted));
    // Every tile that may be written to, those reserved before among them: a copy shares them all.
    const index_t end = tokens > tokens_ ? std::min<index_t>(wanted, std::ssize(tiles_)) : 0;
    for (index_t i = pages_before() / tile_pages; i < end; ++i) own_tile(i);
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
    // The page that is cut begins anew: a minimum has no inverse, nor has a rounded sum.
    page_summaries cut(*this);
    cut.tokens_ = whole * options_.page_size;
    cut.tiles_.resize(index(ceil_div(whole, tile_pages)));
    cut.reserve(k.tokens);
    if (whole < kept_tiles * tile_pages) {
      cut.own_tile(kept_tiles - 1);
      cut.zero_last_tile(whole % tile_pages);
    }
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
  index_t rows() const { return summary_rows(options_.kind); }
  index_t pages_before() const { return tokens_ / options_.page_size; }  // that are full
  std::size_t tile_bytes() const {
    return index(value_bytes()) + (options_.type == dtype::i8 ? tile_pages * sizeof(float) : 0);
  }
  /// Of a tile without its scales.
  index_t value_bytes() const {
    return row_bytes(options_.type, options_.head_dim * rows() * tile_pages);
  }
  std::byte* data(index_t i) const { return tiles_[index(i)]->bytes().data(); }
  std::shared_ptr<aligned_buffer> new_tile() const {
    auto tile = std::make_shared<aligned_buffer>();
    tile->reserve(tile_bytes());
    std::memset(tile->bytes().data(), 0, tile_bytes());
    return tile;
  }
  void own_tile(index_t i) {
    std::shared_ptr<aligned_buffer>& tile = tiles_[index(i)];
    if (tile.use_count() == 1) return;
    std::shared_ptr<aligned_buffer> own = new_tile();
    std::memcpy(own->bytes().data(), tile->bytes().data(), tile_bytes());
    tile = std::move(own);
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
    float* const sum = tail_.data();
    const float* const x = row_.data();
    for (; tokens_ < end; ++tokens_) {
      load_row(rows, static_cast<token_t>(tokens_), dim, row_.data());
      const index_t count = tokens_ % options_.page_size + 1;  // keys of the page so far
      const bool first = count == 1;
      if (options_.kind == summary_kind::mean) {
        for (index_t d = 0; d < dim; ++d) sum[d] = first ? x[d] : sum[d] + x[d];
      } else {
        for (index_t d = 0; d < dim; ++d) {
          // A NaN stays one.
          if (first || x[d] < low[d] || x[d] != x[d]) low[d] = x[d];
          if (first || x[d] > high[d] || x[d] != x[d]) high[d] = x[d];
        }
      }
      const bool last = tokens_ + 1 == end || count == options_.page_size;
      if (last) write_page(tokens_ / options_.page_size, count);
    }
  }

  /// Puts the summary of the page at hand, of `count` keys, into its tile.
  void write_page(index_t page, index_t count) {
    const index_t dim = options_.head_dim;
    const bool mean = options_.kind == summary_kind::mean;
    if (mean) {
      const auto keys = static_cast<float>(count);
      for (index_t d = 0; d < dim; ++d) row_[index(d)] = tail_[index(d)] / keys;
    }
    const std::vector<float>& values = mean ? row_ : tail_;  // [rows()][head_dim]
    std::byte* const tile = data(page / tile_pages);
    const index_t lane = page % tile_pages;
    const auto put = [&](auto* to, index_t row, auto&& rounded) {
      for (index_t d = 0; d < dim; ++d) {
        to[(d * rows() + row) * tile_pages + lane] = rounded(values[index(row * dim + d)]);
      }
    };
    const auto each = [&](auto* to, auto&& below, auto&& above, auto&& nearest) {
      if (mean) return put(to, 0, nearest);
      put(to, 0, below);
      put(to, 1, above);
    };
    const auto same = [](float x) { return x; };
    if (options_.type == dtype::f32) return each(reinterpret_cast<float*>(tile), same, same, same);
    if (options_.type == dtype::f16) {
      return each(reinterpret_cast<f16*>(tile), detail::f16_below, detail::f16_above, to_f16);
    }
    float top = 0.0f;
    bool finite = true;
    for (const float x : values) {
      top = std::max(top, std::abs(x));
      finite = finite && std::isfinite(x);
    }
    if (!finite) {  // no number of steps says that: what is multiplied by the scale will
      const auto zero = [](float) { return std::int8_t{0}; };
      each(reinterpret_cast<std::int8_t*>(tile), zero, zero, zero);
      scales(tile)[lane] = std::numeric_limits<float>::infinity();
      return;
    }
    // Of bounds a power of two: products of the steps then round as products of the values would,
    // and a bound stays one to the last bit.
    constexpr float least = std::numeric_limits<float>::min();
    float scale = std::max(top / 127.0f, least);
    if (!mean) {
      scale = std::max(std::ldexp(1.0f, std::ilogb(std::max(top, least)) - 6), least);
      if (std::ceil(top / scale) > 127.0f) scale *= 2.0f;
    }
    const auto step = [](double x) { return static_cast<std::int8_t>(x); };
    const auto nearest = [&](float x) {
      return step(std::clamp(std::nearbyint(x / scale), -127.0f, 127.0f));
    };
    // In double, where the quotient by a power of two neither rounds nor underflows.
    const auto below = [&](float x) { return step(std::floor(double{x} / double{scale})); };
    const auto above = [&](float x) { return step(std::ceil(double{x} / double{scale})); };
    each(reinterpret_cast<std::int8_t*>(tile), below, above, nearest);
    scales(tile)[lane] = scale;
  }

  /// Zeros the pages of the last tile from one on.
  void zero_last_tile(index_t first_lane) {
    std::byte* const tile = data(std::ssize(tiles_) - 1);
    const index_t line = row_bytes(options_.type, tile_pages);
    const index_t kept = row_bytes(options_.type, first_lane);
    for (index_t at = 0; at < value_bytes(); at += line) {
      std::memset(tile + at + kept, 0, index(line - kept));
    }
    if (options_.type == dtype::i8) {
      std::fill_n(scales(tile) + first_lane, tile_pages - first_lane, 0.0f);
    }
  }
  float* scales(std::byte* tile) const { return reinterpret_cast<float*>(tile + value_bytes()); }

  page_summary_options options_;
  index_t tokens_ = 0;
  std::vector<std::shared_ptr<aligned_buffer>> tiles_;
  std::vector<float> row_;   // a key, or a mean
  std::vector<float> tail_;  // of the last page: [min, max][head_dim] or its sum [head_dim]
};

}  // namespace sattn
