// SPDX-License-Identifier: Apache-2.0

// The kernels for the flags of this build, compiled once for all programs of the project.

#include <sattn/kernel/kernel_table_impl.hpp>

template const sattn::kernel_table& sattn::kernels<sattn::arch::native>();
