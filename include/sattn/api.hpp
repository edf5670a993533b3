// SPDX-License-Identifier: Apache-2.0
#pragma once

// Everything but the kernels' code: quick to compile. One source file of the program must include
// sattn.hpp, or instantiate kernels<Arch>() from kernel/kernel_table_impl.hpp.

#include <sattn/attention/attend.hpp>
#include <sattn/attention/merge.hpp>
#include <sattn/attention/plan.hpp>
#include <sattn/budget/adaptive.hpp>
#include <sattn/budget/select.hpp>
#include <sattn/estimate/antidiagonal.hpp>
#include <sattn/estimate/last_queries.hpp>
#include <sattn/estimate/page_scores.hpp>
#include <sattn/estimate/pooled_blocks.hpp>
#include <sattn/estimate/row_scores.hpp>
#include <sattn/kv/layouts.hpp>
#include <sattn/kv/paged_cache.hpp>
#include <sattn/kv/rotary.hpp>
#include <sattn/method/a_shape.hpp>
#include <sattn/method/block_sparse.hpp>
#include <sattn/method/cache_method.hpp>
#include <sattn/method/compose.hpp>
#include <sattn/method/duo.hpp>
#include <sattn/method/eviction.hpp>
#include <sattn/method/flexprefill.hpp>
#include <sattn/method/quest.hpp>
#include <sattn/method/recall.hpp>
#include <sattn/method/snapkv.hpp>
#include <sattn/method/top_k.hpp>
#include <sattn/method/vertical_slash.hpp>
#include <sattn/pattern/basic.hpp>
#include <sattn/pattern/block_mask.hpp>
#include <sattn/pattern/compose.hpp>
#include <sattn/pattern/token_lists.hpp>
#include <sattn/pattern/vertical_slash.hpp>
#include <sattn/plan/expand.hpp>
#include <sattn/version.hpp>
