// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/simd/arch.hpp>

#include <type_traits>

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
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  } else {
    return __builtin_cpu_supports("sse2");
  }
}

}  // namespace sattn::simd
