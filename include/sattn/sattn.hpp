// SPDX-License-Identifier: Apache-2.0
#pragma once

// Everything, with the kernels for the instruction set this is compiled for (-mavx2 -mfma).

#include <sattn/attention/attend.hpp>
#include <sattn/attention/merge.hpp>
#include <sattn/attention/plan.hpp>
#include <sattn/budget/select.hpp>
#include <sattn/estimate/last_queries.hpp>
#include <sattn/estimate/pooled_blocks.hpp>
#include <sattn/estimate/row_scores.hpp>
#include <sattn/kernel/kernel_table_impl.hpp>
#include <sattn/pattern/basic.hpp>
#include <sattn/pattern/block_mask.hpp>
#include <sattn/pattern/compose.hpp>
#include <sattn/pattern/token_lists.hpp>
#include <sattn/pattern/vertical_slash.hpp>
#include <sattn/plan/expand.hpp>
#include <sattn/version.hpp>
