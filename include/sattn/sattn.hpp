// SPDX-License-Identifier: Apache-2.0
#pragma once

// Everything, with the kernels for the instruction set this is compiled for (-mavx2 -mfma).

#include <sattn/api.hpp>
#include <sattn/kernel/kernel_table_impl.hpp>
