// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/simd/vec.hpp>

namespace sattn::simd {

/// e^x for x <= 0: exactly 1 at 0, exactly 0 at -inf and below -87.34, NaN for NaN.
///
/// Accuracy: relative error below 2^-22 + 1.25 * 2^-24 |x| (the second term is the rounding of
/// log2(e) and of its product with x); tests/simd/exp_test.cpp holds the bound. Results below
/// FLT_MIN are 0, never subnormal: a subnormal costs a hundred cycles on some CPUs.
///
/// 2^f on [-1/2, 1/2] is a minimax polynomial of degree 5 with relative error 2.1e-7.
template <class Arch>
SATTN_ALWAYS_INLINE vec<Arch> exp_nonpositive(vec<Arch> x) {
  using V = vec<Arch>;
  using batch = typename V::batch;
  const V scaled = x * V::broadcast(1.44269504088896341f);
  // select, not max: max(constant, NaN) is the constant on some versions of xsimd.
  // Below 2^-126 the exponent becomes -127, which stands for 0.
  const V floor = V::broadcast(-126.0f);
  const batch y = select_less(scaled, floor, V::broadcast(-127.0f), scaled).as_batch();
  const auto exponent = xsimd::nearbyint_as_int(y);
  const V f = V::of(y - xsimd::to_float(exponent));
  V p = V::broadcast(0.001327647198f);
  p = fma(p, f, V::broadcast(0.009675541334f));
  p = fma(p, f, V::broadcast(0.05550713274f));
  p = fma(p, f, V::broadcast(0.2402211972f));
  p = fma(p, f, V::broadcast(0.6931469671f));
  p = fma(p, f, V::broadcast(1.0f));
  // (exponent + 127) << 23 is the float 2^exponent, and +0 for -127.
  return V::of(xsimd::ldexp(p.as_batch(), exponent));
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
