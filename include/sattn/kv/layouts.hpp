// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/tensor_view.hpp>
#include <sattn/kv/stored_view.hpp>

#include <cstdint>
#include <span>

// Views of the places where engines keep K and V. None owns memory, and all compose: a page may
// hold scaled int8, a ring q8_0. docs/caches.md maps the layouts of several engines to them.

namespace sattn {

/// int8 rows with one scale each: element i of a row stands for x[i] * scale.
///
/// Shapes: x [tokens, heads, dim], scales [tokens, heads, 1], any strides.
/// Throws: shape_error if the extents differ.
inline stored_view scaled(const tensor_view<const std::int8_t>& x,
                          const tensor_view<const float>& scales) {
  require(scales.tokens == x.tokens && scales.heads == x.heads && scales.dim == 1,
          "scaled: scales are [", scales.tokens, ", ", scales.heads, ", ", scales.dim,
          "] for rows [", x.tokens, ", ", x.heads, "]");
  stored_view view;
  view.data = x.data;
  view.type = dtype::i8;
  view.tokens = x.tokens;
  view.heads = x.heads;
  view.dim = x.dim;
  view.token_stride = x.token_stride;
  view.head_stride = x.head_stride;
  view.scales = {scales.data, scales.token_stride, scales.head_stride, 0};
  return view;
}

/// ggml's q8_0: rows of dim / 32 blocks of an f16 scale and 32 int8.
///
/// Shapes: blocks [tokens, heads, dim / 32], any strides.
inline stored_view quantised(const tensor_view<const q8_0>& blocks) {
  constexpr index_t bytes = sizeof(q8_0);
  stored_view view;
  view.data = blocks.data;
  view.type = dtype::q8_0;
  view.tokens = blocks.tokens;
  view.heads = blocks.heads;
  view.dim = blocks.dim * block_of(dtype::q8_0);
  view.token_stride = blocks.token_stride * bytes;
  view.head_stride = blocks.head_stride * bytes;
  return view;
}

/// Pages of an engine's pool that all look like `page`, which is page 0: a view of page_size tokens
/// in any layout. Page p begins p * page_bytes bytes behind it, its scales scale_floats floats.
struct page_pool {
  stored_view page;
  index_t pages = 0;
  index_t page_bytes = 0;
  index_t scale_floats = 0;
};

/// The first `tokens` tokens of the pages that `table` names, in its order; the last page may be
/// partly filled. The table is read while planning and running; it must outlive the view.
/// Throws: shape_error if the pool's page has pages or is a ring; what the table names is checked
/// by whoever reads the view.
inline stored_view paged(const page_pool& pool, std::span<const std::int32_t> table,
                         index_t tokens) {
  require(pool.page.strided() && pool.page.tokens > 0, "paged: a page must be a strided view of ",
          "one token or more, it has ", pool.page.tokens);
  stored_view view = pool.page;
  view.tokens = tokens;
  view.scales.page_stride = pool.scale_floats;
  view.pages = {table, pool.page.tokens, pool.page_bytes, pool.pages, 0};
  return view;
}

/// The same where every kv head has pages of its own: the pool's page holds one head, and head h
/// begins at table[h * table_stride]. Throws: shape_error also if the page has more heads.
inline stored_view paged_by_head(const page_pool& pool, std::span<const std::int32_t> table,
                                 index_t table_stride, index_t heads, index_t tokens) {
  require(pool.page.heads == 1, "paged_by_head: a page holds ", pool.page.heads,
          " heads, expected 1");
  stored_view view = paged(pool, table, tokens);
  view.heads = heads;
  view.head_stride = view.scales.head_stride = 0;  // a head is chosen by its pages
  view.pages.head_stride = table_stride;
  return view;
}

/// A ring buffer: `tokens` tokens, the oldest in slot `first`, the others behind it, from the end
/// of the buffer on at its start. Token 0 of the view is the oldest one.
/// Throws: shape_error if the slots have pages or are a ring; the rest is checked by whoever reads.
inline stored_view ring(const stored_view& slots, index_t first, index_t tokens) {
  require(slots.strided() && slots.tokens > 0, "ring: the slots must be a strided view of one ",
          "token or more, it has ", slots.tokens);
  stored_view view = slots;
  view.tokens = tokens;
  view.ring = {first, slots.tokens};
  return view;
}

}  // namespace sattn
