// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/aligned_buffer.hpp>
#include <sattn/core/error.hpp>
#include <sattn/kernel/kernel_table.hpp>
#include <sattn/parallel/executor.hpp>
#include <sattn/parallel/thread_pool.hpp>
#include <sattn/plan/plan_writer.hpp>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace sattn {

/// What every call runs with: threads, kernels and scratch memory. One call at a time.
///
/// Scratch grows when a call needs more and is kept; reserve() does that ahead, and
/// use_workspace() hands in the caller's memory instead, which never grows.
class context {
 public:
  /// Threads of its own, one per core unless told otherwise, and the kernels for the flags of the
  /// calling source file. Throws: unsupported if the CPU lacks them.
  explicit context(index_t threads = 0, const kernel_table& table = kernels<arch::native>())
      : kernels_(&checked(table)),
        own_pool_(std::make_unique<thread_pool>(threads)),
        executor_(*own_pool_) {}

  /// Borrows the caller's threads; they must outlive the context.
  /// Throws: unsupported as above; shape_error if the executor has no worker.
  template <parallel_executor E>
  explicit context(E& executor, const kernel_table& table = kernels<arch::native>())
      : kernels_(&checked(table)), executor_(executor) {
    require(executor_.concurrency() >= 1, "context: the executor has ", executor_.concurrency(),
            " workers, expected 1 or more");
  }

  const executor_ref& executor() const { return executor_; }
  const sattn::kernel_table& kernel_table() const { return *kernels_; }

  /// Makes calls that need at most `bytes` free of allocation.
  void reserve(std::size_t bytes) { own_.reserve(bytes); }

  /// Uses the caller's memory from now on; it must outlive the calls. An empty span goes back to
  /// memory of the context's own. Throws: shape_error unless it starts at a multiple of 64 bytes.
  void use_workspace(std::span<std::byte> memory) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    require(address % cache_line == 0, "context: workspace starts ", address % cache_line,
            " bytes past a multiple of ", cache_line);
    borrowed_ = memory;
  }

  /// Scratch of at least `bytes`. Throws: shape_error if the caller's memory is smaller.
  std::span<std::byte> workspace(std::size_t bytes) {
    if (borrowed_.empty()) {
      own_.reserve(bytes);
      return own_.bytes();
    }
    require(borrowed_.size() >= bytes, "context: workspace has ", borrowed_.size(),
            " bytes, the call needs ", bytes);
    return borrowed_;
  }

  /// Lists for planning, one per worker.
  std::span<plan_scratch> planning_scratch() {
    const auto workers = static_cast<std::size_t>(executor_.concurrency());
    if (scratch_.size() < workers) scratch_.resize(workers);
    return scratch_;
  }

 private:
  static const sattn::kernel_table& checked(const sattn::kernel_table& table) {
    require<unsupported>(table.cpu_supports(), "context: this CPU does not have ", table.name,
                         ", which the kernels were compiled for");
    return table;
  }

  const sattn::kernel_table* kernels_;
  std::unique_ptr<thread_pool> own_pool_;
  executor_ref executor_;
  aligned_buffer own_;
  std::span<std::byte> borrowed_;
  std::vector<plan_scratch> scratch_;
};

}  // namespace sattn
