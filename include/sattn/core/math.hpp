// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/types.hpp>

namespace sattn {

constexpr index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }
constexpr index_t round_up(index_t a, index_t b) { return ceil_div(a, b) * b; }

/// a * b into `product`; false when it does not fit.
constexpr bool multiply(index_t a, index_t b, index_t& product) {
  return !__builtin_mul_overflow(a, b, &product);
}

/// a + b into `sum`; false when it does not fit.
constexpr bool add(index_t a, index_t b, index_t& sum) {
  return !__builtin_add_overflow(a, b, &sum);
}

}  // namespace sattn
