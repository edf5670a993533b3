// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/simd/arch.hpp>

#include <type_traits>

#ifdef __F16C__
#include <cpuid.h>
#endif

namespace sattn::simd {

/// Whether this CPU, under this operating system, runs the instruction set.
/// The compiler's built-in is used because xsimd 8.1 reads the wrong CPUID leaves and never asks
/// whether the system saves the registers (xsimd issues 911 and 1025).
template <class Arch>
bool cpu_supports() {
  if constexpr (std::is_same_v<Arch, arch::avx512>) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  } else if constexpr (std::is_same_v<Arch, arch::avx2>) {
#ifdef __F16C__
    // Every CPU with AVX2 has it, but a virtual machine may hide it. Asked by CPUID because
    // __builtin_cpu_supports does not know it in clang 14.
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool half = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 29 & 1) != 0;
#else
    const bool half = true;
#endif
    return half && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  } else {
    return __builtin_cpu_supports("sse2");
  }
}

}  // namespace sattn::simd
