// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/checks.hpp>
#include <sattn/attention/column_mass.hpp>
#include <sattn/attention/run_rows.hpp>
#include <sattn/attention/run_tiles.hpp>
#include <sattn/exec/context.hpp>

#include <algorithm>
#include <span>

namespace sattn {

namespace detail {

inline kv_packing packing_of(const attention_sequence& s, const kernel_table& kernels,
                             const attention_options& options) {
  if (s.plan->has_splits()) return {};
  const index_t lane_blocks = s.plan->layout().single_rows ? 0 : tile_work(s).blocks();
  return {s, lane_blocks, kernels, options.pack_bytes};
}

/// What one sequence brings to the common list of tasks.
struct sequence_work {
  bool by_rows;
  kv_packing packing;
  index_t merge_tasks = 0;
  index_t mass_tasks = 0;
  std::size_t shared_bytes = 0;   // for all workers
  std::size_t scratch_bytes = 0;  // for each worker

  sequence_work(const attention_sequence& s, const kernel_table& kernels,
                const attention_options& options)
      : by_rows(s.plan->layout().single_rows), packing(packing_of(s, kernels, options)) {
    if (by_rows) {
      const row_work work(s);
      merge_tasks = work.merge_tasks(*s.plan);
      shared_bytes = work.shared_bytes(*s.plan);
      scratch_bytes = row_scratch_bytes(s, work);
    } else {
      scratch_bytes = tile_work(s).scratch_bytes();
    }
    if (s.output.mass.data != nullptr) {
      const mass_work work(s);
      mass_tasks = work.tasks(s);
      scratch_bytes = std::max(scratch_bytes, work.scratch_bytes(s));
    }
  }
};

/// Some kv heads of one sequence: what runs together, and where its tasks and memory begin.
struct sequence_part {
  index_t sequence = 0;
  key_range kv_heads = {};
  kv_packing packing = {};
  std::size_t packed_byte = 0;
  index_t tasks = 0;
  index_t pairs_per_task = 0;
  index_t pack_task = 0;
  index_t task = 0;

  index_t pack_tasks() const { return kv_heads.size() * packing.blocks(); }
};

/// Numbers the tasks of all parts, those of the longest first: what is long must not begin when the
/// others end. Returns the part that would come next.
inline sequence_part number_tasks(std::span<sequence_part> parts) {
  std::sort(parts.begin(), parts.end(), [](const sequence_part& a, const sequence_part& b) {
    return a.pairs_per_task != b.pairs_per_task ? a.pairs_per_task > b.pairs_per_task
                                                : a.sequence < b.sequence;
  });
  sequence_part next;
  for (sequence_part& part : parts) {
    part.pack_task = next.pack_task;
    part.task = next.task;
    next.pack_task += part.pack_tasks();
    next.task += part.tasks;
  }
  return next;
}

/// Walks over the kv heads of all sequences in waves: parts whose packed keys and values fit into
/// the memory for them at the same time.
class wave_walk {
 public:
  wave_walk(std::span<const attention_sequence> sequences, const kernel_table& kernels,
            const attention_options& options)
      : sequences_(sequences), kernels_(kernels), options_(options) {}

  /// Calls f(part, work) for the parts of the next wave; false when none is left.
  template <class F>
  bool next(F&& f) {
    if (sequence_ == std::ssize(sequences_)) return false;
    std::size_t used = 0;
    for (; sequence_ < std::ssize(sequences_); ++sequence_, kv_head_ = 0) {
      const attention_sequence& s = sequences_[static_cast<std::size_t>(sequence_)];
      const sequence_work work(s, kernels_, options_);
      const index_t heads = s.plan->shape().kv_heads;
      const std::size_t each = work.packing.head_bytes();
      index_t fit = heads - kv_head_;
      if (each > 0) {
        fit = std::min(fit, static_cast<index_t>((options_.pack_bytes - used) / each));
      }
      if (fit > 0) {
        f(sequence_part{sequence_,
                        {static_cast<token_t>(kv_head_), static_cast<token_t>(kv_head_ + fit)},
                        work.packing, used},
          work);
      }
      used += each * static_cast<std::size_t>(fit);
      if (kv_head_ + fit < heads) {
        kv_head_ += fit;
        return true;
      }
    }
    return true;
  }

 private:
  std::span<const attention_sequence> sequences_;
  const kernel_table& kernels_;
  const attention_options& options_;
  index_t sequence_ = 0;
  index_t kv_head_ = 0;
};

/// Where the later tasks of a sequence and the results of its splits begin.
struct sequence_start {
  index_t merge_task;
  index_t mass_task;
  std::size_t shared_byte;
};

struct workspace_layout {
  std::size_t starts_bytes;
  std::size_t parts_bytes;
  std::size_t shared_bytes = 0;
  std::size_t packed_bytes = 0;
  std::size_t scratch_bytes = 0;  // of one worker
  index_t workers;

  workspace_layout(std::span<const attention_sequence> sequences, const context& ctx,
                   const attention_options& options)
      : starts_bytes(padded((sequences.size() + 1) * sizeof(sequence_start))),
        parts_bytes(padded((sequences.size() + 1) * sizeof(sequence_part))),
        workers(ctx.executor().concurrency()) {
    wave_walk waves(sequences, ctx.kernel_table(), options);
    const auto add = [&](const sequence_part& part, const sequence_work& work) {
      const auto heads = static_cast<std::size_t>(part.kv_heads.size());
      packed_bytes = std::max(packed_bytes, part.packed_byte + work.packing.head_bytes() * heads);
      scratch_bytes = std::max(scratch_bytes, work.scratch_bytes);
      if (part.kv_heads.begin == 0) shared_bytes += work.shared_bytes;
    };
    while (waves.next(add)) {
    }
  }
  std::size_t total() const {
    return starts_bytes + parts_bytes + shared_bytes + packed_bytes +
           scratch_bytes * static_cast<std::size_t>(workers);
  }
};

/// The element of a list sorted by `begin` that holds a task.
template <class T>
const T& holder_of(index_t task, std::span<const T> list, index_t T::*begin) {
  return *(std::upper_bound(list.begin(), list.end(), task,
                            [&](index_t t, const T& item) { return t < item.*begin; }) -
           1);
}

}  // namespace detail

/// Bytes of workspace that attend() needs for these sequences, exactly.
/// Throws: shape_error as attend() does.
inline std::size_t workspace_bytes(const context& ctx,
                                   std::span<const attention_sequence> sequences,
                                   const attention_options& options = {}) {
  detail::check_options(options);
  for (const attention_sequence& s : sequences) detail::check_sequence(s, options);
  return detail::workspace_layout(sequences, ctx, options).total();
}

/// The same for one sequence.
inline std::size_t workspace_bytes(const context& ctx, const attention_plan& plan,
                                   const tensor_view<const float>& q, const kv_view& kv,
                                   const attention_output& output,
                                   const attention_options& options = {}) {
  const attention_sequence sequence{&plan, q, kv, output};
  return workspace_bytes(ctx, std::span(&sequence, 1), options);
}

/// Attention of every query row to the keys that its plan names, for several sequences at once.
///
/// Shapes, per sequence: q [q_len, q_heads, head_dim]; k [kv_len, kv_heads, head_dim];
/// v [kv_len, kv_heads, v_dim]; out [q_len, q_heads, v_dim]; lse [q_len, q_heads, 1] or none; mass
/// [kv_len, q_heads or kv_heads, 1] or none, which takes an lse. f32, k and v of any dtype, each
/// its own; any strides, head_dim and v_dim from 1 to 1024. Sequences differ as they like.
/// Order: scale, soft cap, mask; then the sink logit joins the sum of the softmax.
/// Requires: no output overlaps another tensor.
/// Throws: shape_error where extents, plan, memory or options do not fit; unsupported above the
/// largest head_dim. Nothing is written when it throws.
/// Cost: 2 (head_dim + v_dim) flops per executed pair (plan.stats()), parallel over (sequence,
/// head, tile or split), and copies of K and V where they pay (options.pack_bytes). Mass takes the
/// scores a second time, in parallel over kv heads and runs of 512 keys or more. Allocates only to
/// grow the context's workspace.
/// Accuracy: f32, online softmax. A row without keys gives 0 and lse = -inf; lse is the natural
/// log, without the sink. Keys that no row of a tile attends to take no part in it: they are read,
/// if at all, to be copied (options.pack_bytes). A NaN or infinity in a key reaches the rows of the
/// tiles that execute it; rows with lists of their own run in tiles of 16. Mass sums exp(score -
/// lse), with the sink in lse: without sinks the keys' sums add up to the rows that have keys, up
/// to 2^-24 |lse| a row, and a row whose lse is NaN makes the mass of its keys NaN. The bits do not
/// depend on the number of threads or on pack_bytes.
/// Source: FlashAttention-2 (arXiv:2307.08691) per tile, flash decoding for splits.
/// See: examples/01_prefill.cpp, 02_decode.cpp; tests/attention/attend_test.cpp.
inline void attend(context& ctx, std::span<const attention_sequence> sequences,
                   const attention_options& options = {}) {
  detail::check_options(options);
  for (const attention_sequence& s : sequences) detail::check_sequence(s, options);
  detail::check_aliasing(sequences);

  const detail::workspace_layout layout(sequences, ctx, options);
  std::byte* const memory = ctx.workspace(layout.total()).data();
  auto* const starts = reinterpret_cast<detail::sequence_start*>(memory);
  auto* const parts = reinterpret_cast<detail::sequence_part*>(memory + layout.starts_bytes);
  std::byte* const shared = memory + layout.starts_bytes + layout.parts_bytes;
  std::byte* const packed = shared + layout.shared_bytes;
  std::byte* const scratch = packed + layout.packed_bytes;
  const kernel_table& kernels = ctx.kernel_table();

  starts[0] = {0, 0, 0};
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const detail::sequence_work work(sequences[i], kernels, options);
    starts[i + 1] = {starts[i].merge_task + work.merge_tasks,
                     starts[i].mass_task + work.mass_tasks,
                     starts[i].shared_byte + work.shared_bytes};
  }

  const auto scratch_of = [&](index_t worker) {
    return detail::scratch_arena({scratch + static_cast<std::size_t>(worker) * layout.scratch_bytes,
                                  layout.scratch_bytes});
  };

  detail::wave_walk waves(sequences, kernels, options);
  for (;;) {
    std::size_t count = 0;
    const bool more = waves.next([&](detail::sequence_part part,
                                     const detail::sequence_work& work) {
      const attention_sequence& s = sequences[static_cast<std::size_t>(part.sequence)];
      part.tasks = work.by_rows ? detail::row_work(s).tasks(*s.plan, part.kv_heads)
                                : detail::tile_work(s).tasks(part.kv_heads);
      part.pairs_per_task = detail::pairs_of_a_kv_head(*s.plan) * part.kv_heads.size() /
                            std::max<index_t>(part.tasks, 1);
      parts[count++] = part;
    });
    if (!more) break;
    const detail::sequence_part end = detail::number_tasks({parts, count});
    const std::span<const detail::sequence_part> wave(parts, count);
    const auto head_memory = [&](const detail::sequence_part& part, index_t kv_head) {
      return packed + part.packed_byte +
             static_cast<std::size_t>(kv_head - part.kv_heads.begin) * part.packing.head_bytes();
    };

    ctx.executor().parallel_for(end.pack_task, [&](index_t task, index_t) {
      const auto& part = detail::holder_of(task, wave, &detail::sequence_part::pack_task);
      const attention_sequence& s = sequences[static_cast<std::size_t>(part.sequence)];
      const index_t blocks = part.packing.blocks();
      const index_t kv_head = part.kv_heads.begin + (task - part.pack_task) / blocks;
      part.packing.pack_block(s.kv, kv_head, (task - part.pack_task) % blocks, kernels,
                              head_memory(part, kv_head));
    });

    ctx.executor().parallel_for(end.task, [&](index_t task, index_t worker) {
      const auto& part = detail::holder_of(task, wave, &detail::sequence_part::task);
      const auto i = static_cast<std::size_t>(part.sequence);
      const attention_sequence& s = sequences[i];
      const detail::logit_options logits(options, s.q.dim);
      const detail::scratch_arena arena = scratch_of(worker);
      const auto rows_of = [&](index_t kv_head) {
        return part.packing.rows(s.kv, kv_head, head_memory(part, kv_head));
      };
      if (s.plan->layout().single_rows) {
        detail::run_rows(s, detail::row_work(s), part.kv_heads, rows_of, logits, kernels,
                         task - part.task, reinterpret_cast<float*>(shared + starts[i].shared_byte),
                         arena);
      } else {
        detail::run_tile(s, detail::tile_work(s), part.kv_heads, rows_of, logits, kernels,
                         task - part.task, arena);
      }
    });
  }

  const std::span<const detail::sequence_start> all(starts, sequences.size() + 1);
  ctx.executor().parallel_for(starts[sequences.size()].merge_task, [&](index_t task, index_t) {
    const auto& start = detail::holder_of(task, all, &detail::sequence_start::merge_task);
    const attention_sequence& s = sequences[static_cast<std::size_t>(&start - starts)];
    detail::merge_rows(s, detail::row_work(s), detail::logit_options(options, s.q.dim), kernels,
                       task - start.merge_task,
                       reinterpret_cast<const float*>(shared + start.shared_byte));
  });

  ctx.executor().parallel_for(starts[sequences.size()].mass_task, [&](index_t task,
                                                                      index_t worker) {
    const auto& start = detail::holder_of(task, all, &detail::sequence_start::mass_task);
    const attention_sequence& s = sequences[static_cast<std::size_t>(&start - starts)];
    detail::run_column_mass(s, detail::mass_work(s), detail::logit_options(options, s.q.dim),
                            kernels, task - start.mass_task, scratch_of(worker));
  });
}

/// The same for one sequence.
inline void attend(context& ctx, const attention_plan& plan, const tensor_view<const float>& q,
                   const kv_view& kv, const attention_output& output,
                   const attention_options& options = {}) {
  const attention_sequence sequence{&plan, q, kv, output};
  attend(ctx, std::span(&sequence, 1), options);
}

}  // namespace sattn
