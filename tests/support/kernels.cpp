// SPDX-License-Identifier: Apache-2.0

// The kernels, compiled once for all test programs, which include <sattn/api.hpp>.

#include <sattn/kernel/kernel_table_impl.hpp>

template const sattn::kernel_table& sattn::kernels<sattn::arch::sse2>();
#ifdef __AVX2__
template const sattn::kernel_table& sattn::kernels<sattn::arch::avx2>();
#endif
#ifdef __AVX512F__
template const sattn::kernel_table& sattn::kernels<sattn::arch::avx512>();
#endif
