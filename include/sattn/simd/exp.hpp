// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/simd/vec.hpp>

namespace sattn::simd {

/// e^x for x <= 0: exactly 1 at 0, exactly 0 at -inf and below -87.69, NaN for NaN.
///
/// Accuracy: relative error below 2^-22 + 1.25 * 2^-24 |x| (the second term is the rounding of
/// log2(e) and of its product with x) down to FLT_MIN; tests/simd/exp_test.cpp holds the bound.
/// What is smaller becomes 0 but for a strip of a third of a unit, [-87.69, -87.33], of subnormals
/// with an absolute error below FLT_MIN / 4: more of them would cost a hundred cycles each on some
/// CPUs.
///
/// 2^f on [-1/2, 1/2] is a minimax polynomial of degree 5 with relative error 2.1e-7.
template <class Arch>
SATTN_ALWAYS_INLINE vec<Arch> exp_nonpositive(vec<Arch> x) {
  using V = vec<Arch>;
  const V y = floor_at(x * V::broadcast(1.44269504088896341f), -127.0f);
  // Adding 1.5 * 2^23 rounds to a whole number, which then is the low bits of the sum: the exponent
  // of the result with the bias of a float, where 0 stands for 0.
  const V magic = V::broadcast(12582912.0f + 127.0f);
  const V exponent = y + magic;
  const V f = y - (exponent - magic);
  V p = V::broadcast(0.001327647198f);
  p = fma(p, f, V::broadcast(0.009675541334f));
  p = fma(p, f, V::broadcast(0.05550713274f));
  p = fma(p, f, V::broadcast(0.2402211972f));
  p = fma(p, f, V::broadcast(0.6931469671f));
  p = fma(p, f, V::broadcast(1.0f));
  return p * power_of_two(exponent);
}

/// tanh(x); NaN for NaN.
///
/// Accuracy: absolute error below 3e-7 and, for |x| < 0.55, relative error below 3e-7
/// (tests/simd/exp_test.cpp). The logit error of a soft cap is that times the cap.
template <class Arch>
SATTN_ALWAYS_INLINE vec<Arch> tanh(vec<Arch> x) {
  using V = vec<Arch>;
  const V magnitude = abs(x);
  // Large: (1 - e^-2|x|) / (1 + e^-2|x|), with the sign of x.
  const V e = exp_nonpositive(magnitude * V::broadcast(-2.0f));
  const V one = V::broadcast(1.0f);
  const V large = (one - e) / (one + e);
  const V with_sign = select_less(x, V::zero(), V::zero() - large, large);
  // Small: the difference above cancels, so x + x^3 p(x^2), fitted on [0, 0.55].
  const V x2 = x * x;
  V p = V::broadcast(-0.0062749779f);
  p = fma(p, x2, V::broadcast(0.0210727919f));
  p = fma(p, x2, V::broadcast(-0.0538527385f));
  p = fma(p, x2, V::broadcast(0.1333259191f));
  p = fma(p, x2, V::broadcast(-0.3333331779f));
  const V small = fma(x * x2, p, x);
  return select_less(magnitude, V::broadcast(0.55f), small, with_sign);
}

}  // namespace sattn::simd
