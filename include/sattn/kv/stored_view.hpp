// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/dtype.hpp>
#include <sattn/core/tensor_view.hpp>
#include <sattn/kv/row_source.hpp>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <type_traits>

namespace sattn {

/// Element types whose rows need nothing beside them.
template <class T>
concept kv_element = std::same_as<T, float> || std::same_as<T, f16> || std::same_as<T, bf16>;

/// One f32 for each row of a type that needs it: what its elements are to be multiplied by.
struct scale_map {
  const float* data = nullptr;
  index_t token_stride = 0;  // floats
  index_t head_stride = 0;
  index_t page_stride = 0;
};

/// Token t of head h is slot t % size of page table[h * head_stride + t / size].
struct page_map {
  std::span<const std::int32_t> table = {};
  index_t size = 0;         // tokens of a page; 0 = no pages
  index_t stride = 0;       // bytes from a page to the next
  index_t pool = 0;         // pages that exist
  index_t head_stride = 0;  // entries of the table; 0 = all heads share it
};

/// Token t is slot (first + t) % slots.
struct ring_map {
  index_t first = 0;
  index_t slots = 0;  // 0 = no ring
};

/// Keys or values [token, kv_head, dim] as an engine stores them: elements of a type known at run
/// time, tokens at a stride, in the pages of a pool, or in a ring. A tensor_view of f32, f16 or
/// bf16 converts to one; kv/layouts.hpp makes the others.
struct stored_view {
  const void* data = nullptr;  // of slot 0, of page 0 where there are pages, head 0
  dtype type = dtype::f32;
  index_t tokens = 0;
  index_t heads = 0;
  index_t dim = 0;
  index_t token_stride = 0;  // bytes, between the slots of a page where there are pages
  index_t head_stride = 0;

  scale_map scales = {};
  page_map pages = {};
  ring_map ring = {};

  stored_view() = default;
  template <class T>
    requires kv_element<std::remove_const_t<T>>
  stored_view(const tensor_view<T>& view)
      : data(view.data), type(dtype_of<std::remove_const_t<T>>), tokens(view.tokens),
        heads(view.heads), dim(view.dim),
        token_stride(view.token_stride * static_cast<index_t>(sizeof(T))),
        head_stride(view.head_stride * static_cast<index_t>(sizeof(T))) {}

  /// True where tokens follow each other at one stride.
  bool strided() const { return pages.size == 0 && ring.slots == 0; }

  /// The rows of one head, of a view that check_view() accepts.
  row_source rows(index_t head) const {
    row_source source{nullptr, 0, type};
    if (tokens == 0) return source;  // there may be no memory
    source.data = static_cast<const std::byte*>(data) + head * head_stride;
    source.stride = token_stride;
    if (scales.data != nullptr) source.scales = scales.data + head * scales.head_stride;
    source.scale_stride = scales.token_stride;
    if (pages.size != 0) source.page_table = pages.table.data() + head * pages.head_stride;
    source.page_size = pages.size;
    source.page_stride = pages.stride;
    source.scale_page_stride = scales.page_stride;
    source.ring_first = ring.first;
    source.ring_slots = ring.slots;
    return source;
  }

  /// The heads [begin, end) alone.
  stored_view head_slice(index_t begin, index_t end) const {
    stored_view part = *this;
    part.heads = end - begin;
    if (tokens == 0) return part;
    part.data = static_cast<const std::byte*>(data) + begin * head_stride;
    if (scales.data != nullptr) part.scales.data += begin * scales.head_stride;
    part.pages.table = pages.table.subspan(static_cast<std::size_t>(begin * pages.head_stride));
    return part;
  }

  /// The columns [begin, end) of every row: values that are a part of the keys, as multi-head
  /// latent attention stores them. Throws: shape_error unless they exist and, where elements come
  /// in blocks, begin on one.
  stored_view columns(index_t begin, index_t end) const {
    require(begin >= 0 && begin <= end && end <= dim && begin % block_of(type) == 0,
            "columns: [", begin, ", ", end, ") of ", dim, " in ", name_of(type));
    stored_view part = *this;
    part.dim = end - begin;
    if (data != nullptr) part.data = static_cast<const std::byte*>(data) + row_bytes(type, begin);
    return part;
  }
};

namespace detail {

/// The slots of a strided view or a ring, or of page 0, in bytes.
inline tensor_view<const std::byte> slots_of(const stored_view& view) {
  const index_t slots = view.pages.size != 0   ? view.pages.size
                        : view.ring.slots != 0 ? view.ring.slots
                                               : view.tokens;
  return {static_cast<const std::byte*>(view.data), slots, view.heads,
          row_bytes(view.type, view.dim), view.token_stride, view.head_stride};
}

inline tensor_view<const float> scale_slots_of(const stored_view& view) {
  return {view.scales.data, slots_of(view).tokens, view.heads, 1, view.scales.token_stride,
          view.scales.head_stride};
}

/// The same as one row for each page of the pool; `stride` in elements.
template <class T>
tensor_view<T> pages_of(const tensor_view<T>& page, const page_map& pages,
                        index_t stride) {
  if (pages.size == 0) return page;
  index_t elements = 0;
  view_extent(page, elements);
  return {page.data, pages.pool, 1, elements, stride, 0};
}

inline void check_pages(std::string_view name, const stored_view& view) {
  const page_map& pages = view.pages;
  require(pages.size > 0 && pages.pool >= 0 && pages.stride >= 0 && pages.head_stride >= 0 &&
              view.scales.page_stride >= 0,
          name, ": page size ", pages.size, ", ", pages.pool, " pages in the pool, strides ",
          pages.stride, ", ", pages.head_stride, " and ", view.scales.page_stride);
  require(view.ring.slots == 0, name, ": both pages and a ring");
  const index_t used = ceil_div(view.tokens, pages.size);
  index_t needed = 0;
  require(multiply(view.heads - 1, pages.head_stride, needed) && add(needed, used, needed) &&
              needed <= std::ssize(pages.table),
          name, ": the page table has ", pages.table.size(), " entries; ", view.tokens,
          " tokens take ", used, " for each of ", view.heads, " heads, ", pages.head_stride,
          " apart");
  const index_t lists = pages.head_stride == 0 ? 1 : view.heads;
  for (index_t list = 0; list < lists; ++list) {
    const std::int32_t* const table = pages.table.data() + list * pages.head_stride;
    std::uint32_t worst = 0;  // a negative id is larger than any pool
    for (index_t i = 0; i < used; ++i) {
      worst = std::max(worst, static_cast<std::uint32_t>(table[i]));
    }
    require(used == 0 || worst < pages.pool, name, ": the page table names page ",
            static_cast<std::int32_t>(worst), ", the pool has ", pages.pool);
  }
}

inline void check_ring(std::string_view name, const stored_view& view) {
  const ring_map& ring = view.ring;
  require(ring.slots > 0 && ring.first >= 0 && ring.first < ring.slots &&
              view.tokens <= ring.slots,
          name, ": ", view.tokens, " tokens from slot ", ring.first, " of a ring of ", ring.slots);
}

}  // namespace detail

/// Throws shape_error unless every row of the view can be addressed.
inline void check_view(std::string_view name, const stored_view& view) {
  require(view.tokens >= 0 && view.heads >= 0 && view.dim >= 0, name, ": negative extent [",
          view.tokens, ", ", view.heads, ", ", view.dim, "]");
  require(view.dim % block_of(view.type) == 0, name, ": dim ", view.dim, ", ", name_of(view.type),
          " comes in blocks of ", block_of(view.type));
  check_view(name, tensor_view<const std::byte>{nullptr, view.tokens, 0, 0, 0, 0});
  if (view.tokens == 0 || view.heads == 0 || view.dim == 0) return;
  if (view.pages.size != 0) detail::check_pages(name, view);
  if (view.ring.slots != 0) detail::check_ring(name, view);
  const auto slots = detail::slots_of(view);
  check_view(name, slots);
  check_view(name, detail::pages_of(slots, view.pages, view.pages.stride));
  const index_t align = static_cast<index_t>(alignment_of(view.type));
  const auto address = static_cast<index_t>(reinterpret_cast<std::uintptr_t>(view.data) %
                                            alignment_of(view.type));
  require(address == 0, name, ": address is ", address, " bytes off the alignment of ",
          name_of(view.type), ", ", align);
  require(view.token_stride % align == 0 && view.head_stride % align == 0 &&
              view.pages.stride % align == 0,
          name, ": strides of ", view.token_stride, ", ", view.head_stride, " and ",
          view.pages.stride, " bytes off the alignment of ", name_of(view.type), ", ", align);
  require((view.scales.data != nullptr) == has_row_scale(view.type), name, ": ",
          name_of(view.type), view.scales.data == nullptr ? " without" : " with",
          " a scale for each row");
  if (view.scales.data == nullptr) return;
  const auto scales = detail::scale_slots_of(view);
  check_view(name, scales);
  check_view(name, detail::pages_of(scales, view.pages, view.scales.page_stride));
}

/// True when two checked views may share a byte; of a pool of pages every page counts.
template <class T>
bool may_overlap(const tensor_view<T>& a, const stored_view& b) {
  if (b.tokens == 0) return false;
  const auto overlaps = [&](const auto& slots, index_t page_stride) {
    return may_overlap(a, detail::pages_of(slots, b.pages, page_stride));
  };
  return overlaps(detail::slots_of(b), b.pages.stride) ||
         (b.scales.data != nullptr && overlaps(detail::scale_slots_of(b), b.scales.page_stride));
}

/// Keys and values of one sequence, each [token, kv_head, dim]. Dims, types and layouts may differ,
/// and V may alias K (multi-head latent attention).
struct kv_view {
  stored_view k;
  stored_view v;

  kv_view head_slice(index_t begin, index_t end) const {
    return {k.head_slice(begin, end), v.head_slice(begin, end)};
  }
};

inline kv_view kv(const stored_view& k, const stored_view& v) { return {k, v}; }

}  // namespace sattn
