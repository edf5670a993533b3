// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/types.hpp>
#include <sattn/simd/exp.hpp>

namespace sattn::kernel {

/// One row of scores becomes probabilities, in place; all 0 when every score is -inf.
template <class Arch>
SATTN_NOINLINE void softmax(float* scores, index_t count) noexcept {
  using V = simd::vec<Arch>;
  constexpr index_t width = V::width;
  const V minus_inf = V::broadcast(-__builtin_inff());
  const index_t whole = count / width * width;
  V top_lanes = minus_inf;
  for (index_t i = 0; i < whole; i += width) top_lanes = simd::max(top_lanes, V::load(scores + i));
  float top = simd::reduce_max(top_lanes);
  for (index_t i = whole; i < count; ++i) top = scores[i] > top ? scores[i] : top;
  const V base = V::broadcast(top == -__builtin_inff() ? 0.0f : top);
  V sum_lanes = V::zero();
  for (index_t i = 0; i < whole; i += width) {
    const V p = simd::exp_nonpositive(V::load(scores + i) - base);
    p.store(scores + i);
    sum_lanes = sum_lanes + p;
  }
  float sum = simd::reduce_add(sum_lanes);
  for (index_t i = whole; i < count; ++i) {
    simd::exp_nonpositive(V::broadcast(scores[i]) - base).store_partial(scores + i, 1);
    sum += scores[i];
  }
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (index_t i = 0; i < whole; i += width) {
    (V::load(scores + i) * V::broadcast(factor)).store(scores + i);
  }
  for (index_t i = whole; i < count; ++i) scores[i] *= factor;
}

}  // namespace sattn::kernel
