// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/error.hpp>
#include <sattn/core/math.hpp>
#include <sattn/core/types.hpp>

#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <type_traits>

namespace sattn {

/// A non-owning [token, head, dim] tensor. The last axis is contiguous; strides count elements.
template <class T>
struct tensor_view {
  T* data = nullptr;
  index_t tokens = 0;
  index_t heads = 0;
  index_t dim = 0;
  index_t token_stride = 0;
  index_t head_stride = 0;

  constexpr T* row(index_t token, index_t head) const {
    return data + token * token_stride + head * head_stride;
  }
  constexpr bool empty() const { return tokens == 0 || heads == 0 || dim == 0; }

  /// The tokens [begin, end) of the same tensor.
  constexpr tensor_view slice(index_t begin, index_t end) const {
    return {data + begin * token_stride, end - begin, heads, dim, token_stride, head_stride};
  }

  /// The heads [begin, end) of the same tensor.
  constexpr tensor_view head_slice(index_t begin, index_t end) const {
    return {data + begin * head_stride, tokens, end - begin, dim, token_stride, head_stride};
  }

  constexpr operator tensor_view<const T>() const
    requires(!std::is_const_v<T>)
  {
    return {data, tokens, heads, dim, token_stride, head_stride};
  }
};

/// The layout [token, head, dim]: all heads of a token lie together.
template <class T>
constexpr tensor_view<T> nhd(T* data, index_t tokens, index_t heads, index_t dim) {
  return {data, tokens, heads, dim, heads * dim, dim};
}

/// The layout [head, token, dim]: all tokens of a head lie together.
template <class T>
constexpr tensor_view<T> hnd(T* data, index_t tokens, index_t heads, index_t dim) {
  return {data, tokens, heads, dim, dim, tokens * dim};
}

/// A view of an engine's tensor with any number of axes, described at run time: `extents` and
/// `strides` (elements) must have the three axes token, head, dim, and a contiguous dim.
/// Throws: shape_error otherwise.
template <class T>
tensor_view<T> view_of(T* data, std::span<const index_t> extents,
                       std::span<const index_t> strides) {
  require(extents.size() == 3 && strides.size() == 3, "view_of: a tensor has rank ",
          extents.size(), " and ", strides.size(), " strides, expected 3 [token, head, dim]");
  require(strides[2] == 1 || extents[2] <= 1, "view_of: the stride of dim is ", strides[2],
          ", expected 1");
  return {data, extents[0], extents[1], extents[2], strides[0], strides[1]};
}

namespace detail {

// First and one-past-last element that a view can touch, as offsets; false on overflow.
template <class T>
bool view_extent(const tensor_view<T>& view, index_t& elements) {
  index_t tokens = 0;
  index_t heads = 0;
  index_t bytes = 0;
  return multiply(view.tokens - 1, view.token_stride, tokens) &&
         multiply(view.heads - 1, view.head_stride, heads) && add(tokens, heads, elements) &&
         add(elements, view.dim, elements) && multiply(elements, sizeof(T), bytes);
}

}  // namespace detail

/// Throws shape_error unless every element of the view can be addressed.
template <class T>
void check_view(std::string_view name, const tensor_view<T>& view) {
  require(view.tokens >= 0 && view.heads >= 0 && view.dim >= 0, name, ": negative extent [",
          view.tokens, ", ", view.heads, ", ", view.dim, "]");
  require(view.token_stride >= 0 && view.head_stride >= 0, name, ": negative stride [",
          view.token_stride, ", ", view.head_stride, ", 1]");
  require(view.tokens <= std::numeric_limits<token_t>::max(), name, " has ", view.tokens,
          " tokens, positions are 32 bit: at most ", std::numeric_limits<token_t>::max());
  if (view.empty()) return;
  require(view.data != nullptr, name, ": null data for extents [", view.tokens, ", ", view.heads,
          ", ", view.dim, "]");
  const auto address = reinterpret_cast<std::uintptr_t>(view.data);
  require(address % alignof(T) == 0, name, ": address is ", address % alignof(T),
          " bytes off the alignment of its type, ", alignof(T));
  index_t elements = 0;
  require(detail::view_extent(view, elements), name, ": extents [", view.tokens, ", ", view.heads,
          ", ", view.dim, "] with strides [", view.token_stride, ", ", view.head_stride,
          ", 1] overflow the address space");
}

/// Throws shape_error unless the (token, head) rows of an output lie apart: the heads within a
/// token or the tokens within a head.
template <class T>
void check_writable(std::string_view name, const tensor_view<T>& view) {
  check_view(name, view);
  if (view.empty()) return;
  const bool token_outer = (view.heads == 1 || view.head_stride >= view.dim) &&
                           (view.tokens == 1 ||
                            view.token_stride >= (view.heads - 1) * view.head_stride + view.dim);
  const bool head_outer = (view.tokens == 1 || view.token_stride >= view.dim) &&
                          (view.heads == 1 ||
                           view.head_stride >= (view.tokens - 1) * view.token_stride + view.dim);
  require(token_outer || head_outer, name, ": rows of ", view.dim,
          " elements overlap each other with strides [", view.token_stride, ", ",
          view.head_stride, ", 1]");
}

/// True when two checked views may share a byte. Exact for views of one buffer that interleave with
/// a common stride of tokens (a fused [token, q | out]) or of heads (sequences packed in
/// [head, token, dim]); otherwise by address range.
template <class T, class U>
bool may_overlap(const tensor_view<T>& a, const tensor_view<U>& b) {
  if (a.empty() || b.empty()) return false;
  using bytes = std::uintptr_t;
  index_t a_elements = 0;
  index_t b_elements = 0;
  detail::view_extent(a, a_elements);
  detail::view_extent(b, b_elements);
  const auto a_begin = reinterpret_cast<bytes>(a.data);
  const auto b_begin = reinterpret_cast<bytes>(b.data);
  const bytes a_end = a_begin + static_cast<bytes>(a_elements) * sizeof(T);
  const bytes b_end = b_begin + static_cast<bytes>(b_elements) * sizeof(U);
  if (a_end <= b_begin || b_end <= a_begin) return false;

  // Both repeat every `period` bytes: compare the parts they take of one period.
  const auto interleaved = [&](bytes period, bytes a_part, bytes b_part) {
    if (period == 0) return false;
    const bytes gap = b_begin >= a_begin ? (b_begin - a_begin) % period
                                         : (period - (a_begin - b_begin) % period) % period;
    return gap >= a_part && gap + b_part <= period;
  };
  const auto part = [](const auto& view, index_t count, index_t stride, std::size_t size) {
    return static_cast<bytes>((count - 1) * stride + view.dim) * size;
  };
  const auto stride_bytes = [](index_t stride, std::size_t size) {
    return static_cast<bytes>(stride) * size;
  };
  if (stride_bytes(a.token_stride, sizeof(T)) == stride_bytes(b.token_stride, sizeof(U)) &&
      interleaved(stride_bytes(a.token_stride, sizeof(T)),
                  part(a, a.heads, a.head_stride, sizeof(T)),
                  part(b, b.heads, b.head_stride, sizeof(U)))) {
    return false;
  }
  return stride_bytes(a.head_stride, sizeof(T)) != stride_bytes(b.head_stride, sizeof(U)) ||
         !interleaved(stride_bytes(a.head_stride, sizeof(T)),
                      part(a, a.tokens, a.token_stride, sizeof(T)),
                      part(b, b.tokens, b.token_stride, sizeof(U)));
}

}  // namespace sattn
