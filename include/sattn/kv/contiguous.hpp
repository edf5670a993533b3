// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/tensor_view.hpp>

namespace sattn {

/// Keys and values of one sequence, each [token, kv_head, dim] in any strided layout; their dims
/// may differ, and V may alias K (multi-head latent attention).
template <class T>
struct kv_view {
  tensor_view<const T> k;
  tensor_view<const T> v;
};

template <class T, class U>
kv_view<std::remove_const_t<T>> kv(tensor_view<T> k, tensor_view<U> v) {
  static_assert(std::is_same_v<std::remove_const_t<T>, std::remove_const_t<U>>);
  return {k, v};
}

}  // namespace sattn
