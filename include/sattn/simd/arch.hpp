// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace sattn {

// Instruction sets that kernels are instantiated for. The tag is part of the name of everything a
// kernel calls, so that objects built with different -m flags can be linked into one program.
namespace arch {
struct sse2 {
  static constexpr const char* name = "sse2";
};
struct avx2 {  // with FMA
  static constexpr const char* name = "avx2";
};
struct avx512 {  // F, CD, DQ, BW; correct, not tuned
  static constexpr const char* name = "avx512";
};

// The best one that the flags of this translation unit allow.
#if defined(__AVX512F__) && defined(__AVX512CD__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
using native = avx512;
#elif defined(__AVX2__) && defined(__FMA__)
using native = avx2;
#elif defined(__SSE2__)
using native = sse2;
#else
#error "sattn: no supported instruction set; x86-64 is required so far"
#endif
}  // namespace arch

}  // namespace sattn
