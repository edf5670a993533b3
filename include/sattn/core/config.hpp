// SPDX-License-Identifier: Apache-2.0
#pragma once

// The only macros of the library, and the only compiler-specific spellings.

#ifdef __FINITE_MATH_ONLY__
#if __FINITE_MATH_ONLY__
// Masked scores are -inf and a NaN must stay a NaN; finite-math-only removes both.
#error "sattn needs infinities and NaN: build without -ffast-math / -ffinite-math-only"
#endif
#endif

#define SATTN_ALWAYS_INLINE inline __attribute__((always_inline))
#define SATTN_INLINE_LAMBDA __attribute__((always_inline))
#define SATTN_NOINLINE __attribute__((noinline))
#define SATTN_RESTRICT __restrict__

// Keeps a loop rolled: clang 14 unrolls the depth loop 16 times and spills (58 % of peak, not 84).
#ifdef __clang__
#define SATTN_NO_UNROLL _Pragma("clang loop unroll(disable)")
#else
#define SATTN_NO_UNROLL _Pragma("GCC unroll 1")
#endif

// States a precondition of code that must not throw; checked where SATTN_CHECKED is defined.
#ifdef SATTN_CHECKED
#define SATTN_ASSERT(condition) ((condition) ? void(0) : __builtin_trap())
#else
#define SATTN_ASSERT(condition) void(0)
#endif
