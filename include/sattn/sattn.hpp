// SPDX-License-Identifier: Apache-2.0
#pragma once

// Everything, with the kernels for the instruction set this is compiled for (-mavx2 -mfma). They
// take long to compile: with SATTN_SEPARATE_KERNELS defined they are left out, and one other source
// file of the program must have them (api.hpp).

#include <sattn/api.hpp>
#ifndef SATTN_SEPARATE_KERNELS
#include <sattn/kernel/kernel_table_impl.hpp>
#endif
