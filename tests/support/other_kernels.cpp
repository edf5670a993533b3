// SPDX-License-Identifier: Apache-2.0

// The kernels that this CPU's flags have beside the native ones (cmake/kernels.cpp).

#include <sattn/kernel/kernel_table_impl.hpp>

#ifdef __AVX2__
template const sattn::kernel_table& sattn::kernels<sattn::arch::sse2>();
#endif
#ifdef __AVX512F__
template const sattn::kernel_table& sattn::kernels<sattn::arch::avx2>();
#endif
