// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/checks.hpp>
#include <sattn/attention/run_rows.hpp>
#include <sattn/attention/run_tiles.hpp>
#include <sattn/exec/context.hpp>

#include <algorithm>
#include <span>

namespace sattn {

namespace detail {

/// What one sequence brings to the common list of tasks.
struct sequence_work {
  bool by_rows;
  index_t tasks;
  index_t merge_tasks = 0;
  std::size_t shared_bytes = 0;   // for all workers
  std::size_t scratch_bytes = 0;  // for each worker

  explicit sequence_work(const attention_sequence& s) : by_rows(s.plan->layout().single_rows) {
    if (by_rows) {
      const row_work work(s);
      tasks = work.tasks(*s.plan);
      merge_tasks = work.merge_tasks(*s.plan);
      shared_bytes = work.shared_bytes(*s.plan);
      scratch_bytes = work.scratch_bytes();
    } else {
      const tile_work work(s);
      tasks = work.tasks();
      scratch_bytes = work.scratch_bytes();
    }
  }
};

/// Where each sequence's tasks and shared states begin; lies at the front of the workspace.
struct sequence_start {
  index_t task;
  index_t merge_task;
  std::size_t shared_byte;
};

struct workspace_layout {
  std::size_t starts_bytes;
  std::size_t shared_bytes = 0;
  std::size_t scratch_bytes = 0;  // of one worker
  index_t workers;

  workspace_layout(std::span<const attention_sequence> sequences, index_t concurrency)
      : starts_bytes(padded((sequences.size() + 1) * sizeof(sequence_start))),
        workers(concurrency) {
    for (const attention_sequence& s : sequences) {
      const sequence_work work(s);
      shared_bytes += work.shared_bytes;
      scratch_bytes = std::max(scratch_bytes, work.scratch_bytes);
    }
  }
  std::size_t total() const {
    return starts_bytes + shared_bytes + scratch_bytes * static_cast<std::size_t>(workers);
  }
};

}  // namespace detail

/// Bytes of workspace that attend() needs for these sequences, exactly.
/// Throws: shape_error as attend() does.
inline std::size_t workspace_bytes(const context& ctx,
                                   std::span<const attention_sequence> sequences,
                                   const attention_options& options = {}) {
  detail::check_options(options);
  for (const attention_sequence& s : sequences) detail::check_sequence(s, options);
  return detail::workspace_layout(sequences, ctx.executor().concurrency()).total();
}

/// The same for one sequence.
inline std::size_t workspace_bytes(const context& ctx, const attention_plan& plan,
                                   const tensor_view<const float>& q, const kv_view<float>& kv,
                                   const attention_output& output,
                                   const attention_options& options = {}) {
  const attention_sequence sequence{&plan, q, kv, output};
  return workspace_bytes(ctx, std::span(&sequence, 1), options);
}

/// Attention of every query row to the keys that its plan names, for several sequences at once.
///
/// Shapes, per sequence: q [q_len, q_heads, head_dim]; k [kv_len, kv_heads, head_dim];
/// v [kv_len, kv_heads, v_dim]; out [q_len, q_heads, v_dim]; lse [q_len, q_heads, 1] or none. All
/// f32, any strides, head_dim and v_dim from 1 to 1024. Sequences differ as they like.
/// Order: scale, soft cap, mask; then the sink logit joins the sum of the softmax.
/// Requires: no output overlaps another tensor.
/// Throws: shape_error where extents, plan, memory or options do not fit; unsupported above the
/// largest head_dim. Nothing is written when it throws.
/// Cost: 2 (head_dim + v_dim) flops per executed pair (plan.stats()), parallel over (sequence,
/// head, tile or split). Allocates only to grow the context's workspace.
/// Accuracy: f32, online softmax. A row without keys gives 0 and lse = -inf; lse is the natural
/// log, without the sink. Keys that no row of a tile attends to are not read; a NaN or infinity in
/// a key that is read reaches the rows of the tiles that execute it. The bits do not depend on the
/// number of threads.
/// Source: FlashAttention-2 (arXiv:2307.08691) per tile, flash decoding for splits.
/// See: examples/01_prefill.cpp, 02_decode.cpp; tests/attention/attend_test.cpp.
inline void attend(context& ctx, std::span<const attention_sequence> sequences,
                   const attention_options& options = {}) {
  detail::check_options(options);
  for (const attention_sequence& s : sequences) detail::check_sequence(s, options);
  detail::check_aliasing(sequences);

  const detail::workspace_layout layout(sequences, ctx.executor().concurrency());
  const std::span<std::byte> memory = ctx.workspace(layout.total());
  auto* const starts = reinterpret_cast<detail::sequence_start*>(memory.data());
  std::byte* const shared = memory.data() + layout.starts_bytes;
  std::byte* const scratch = shared + layout.shared_bytes;
  starts[0] = {0, 0, 0};
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const detail::sequence_work work(sequences[i]);
    starts[i + 1] = {starts[i].task + work.tasks, starts[i].merge_task + work.merge_tasks,
                     starts[i].shared_byte + work.shared_bytes};
  }
  const detail::sequence_start& end = starts[sequences.size()];
  const auto sequence_of = [&](index_t task, index_t detail::sequence_start::* member) {
    const detail::sequence_start* const after = std::upper_bound(
        starts, starts + sequences.size(), task,
        [&](index_t t, const detail::sequence_start& start) { return t < start.*member; });
    return static_cast<std::size_t>(after - starts - 1);
  };
  const kernel_table& kernels = ctx.kernel_table();

  ctx.executor().parallel_for(end.task, [&](index_t task, index_t worker) {
    const std::size_t i = sequence_of(task, &detail::sequence_start::task);
    const attention_sequence& s = sequences[i];
    const detail::logit_options logits(options, s.q.dim);
    const detail::scratch_arena arena(
        {scratch + static_cast<std::size_t>(worker) * layout.scratch_bytes, layout.scratch_bytes});
    if (s.plan->layout().single_rows) {
      detail::run_rows(s, detail::row_work(s), logits, kernels, task - starts[i].task,
                       reinterpret_cast<float*>(shared + starts[i].shared_byte), arena);
    } else {
      detail::run_tile(s, detail::tile_work(s), logits, kernels, task - starts[i].task, arena);
    }
  });
  if (end.merge_task == 0) return;
  ctx.executor().parallel_for(end.merge_task, [&](index_t task, index_t) {
    const std::size_t i = sequence_of(task, &detail::sequence_start::merge_task);
    const attention_sequence& s = sequences[i];
    detail::merge_rows(s, detail::row_work(s), detail::logit_options(options, s.q.dim), kernels,
                       task - starts[i].merge_task,
                       reinterpret_cast<const float*>(shared + starts[i].shared_byte));
  });
}

/// The same for one sequence.
inline void attend(context& ctx, const attention_plan& plan, const tensor_view<const float>& q,
                   const kv_view<float>& kv, const attention_output& output,
                   const attention_options& options = {}) {
  const attention_sequence sequence{&plan, q, kv, output};
  attend(ctx, std::span(&sequence, 1), options);
}

}  // namespace sattn
