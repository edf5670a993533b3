// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/dtype.hpp>
#include <sattn/core/tensor_view.hpp>
#include <sattn/kv/row_source.hpp>

#include <concepts>
#include <string_view>
#include <type_traits>

namespace sattn {

template <class T>
concept kv_element = std::same_as<T, float> || std::same_as<T, f16> || std::same_as<T, bf16>;

/// A tensor_view whose element type is known at run time: keys or values as an engine stores them.
struct stored_view {
  const void* data = nullptr;
  dtype type = dtype::f32;
  index_t tokens = 0;
  index_t heads = 0;
  index_t dim = 0;
  index_t token_stride = 0;  // elements
  index_t head_stride = 0;

  stored_view() = default;
  template <class T>
    requires kv_element<std::remove_const_t<T>>
  stored_view(const tensor_view<T>& view)
      : data(view.data), type(dtype_of<std::remove_const_t<T>>), tokens(view.tokens),
        heads(view.heads), dim(view.dim), token_stride(view.token_stride),
        head_stride(view.head_stride) {}

  const void* row(index_t token, index_t head) const {
    return static_cast<const char*>(data) +
           (token * token_stride + head * head_stride) * static_cast<index_t>(size_of(type));
  }

  row_source rows(index_t head) const {
    if (tokens == 0) return {nullptr, 0, type};  // there may be no memory
    return {static_cast<const std::byte*>(row(0, head)),
            token_stride * static_cast<index_t>(size_of(type)), type};
  }

  /// Calls f with the tensor_view that this is.
  template <class F>
  decltype(auto) visit(F&& f) const {
    const auto as = [&]<class T>(const T* first) {
      return tensor_view<const T>{first, tokens, heads, dim, token_stride, head_stride};
    };
    if (type == dtype::f16) return f(as(static_cast<const f16*>(data)));
    if (type == dtype::bf16) return f(as(static_cast<const bf16*>(data)));
    return f(as(static_cast<const float*>(data)));
  }
};

/// Throws shape_error unless every element of the view can be addressed.
inline void check_view(std::string_view name, const stored_view& view) {
  view.visit([&](const auto& typed) { check_view(name, typed); });
}

/// True when two checked views may share a byte.
template <class T>
bool may_overlap(const tensor_view<T>& a, const stored_view& b) {
  return b.visit([&](const auto& typed) { return may_overlap(a, typed); });
}

/// Keys and values of one sequence, each [token, kv_head, dim] in any strided layout of f32, f16 or
/// bf16. Dims and types may differ, and V may alias K (multi-head latent attention).
struct kv_view {
  stored_view k;
  stored_view v;
};

inline kv_view kv(const stored_view& k, const stored_view& v) { return {k, v}; }

}  // namespace sattn
