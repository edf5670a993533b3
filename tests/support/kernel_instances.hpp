// SPDX-License-Identifier: Apache-2.0
//
// Included by exactly one file of each program that includes support/problem.hpp: compiling the
// kernels takes longer than compiling a test.
#pragma once

#include <sattn/kernel/kernel_table_impl.hpp>

#include "support/problem.hpp"

namespace sattn {

template const kernel_table& kernels<arch::sse2>();
#if defined(__AVX2__) && defined(__FMA__)
template const kernel_table& kernels<arch::avx2>();
#endif
#if defined(__AVX512F__) && defined(__AVX512CD__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
template const kernel_table& kernels<arch::avx512>();
#endif

}  // namespace sattn
