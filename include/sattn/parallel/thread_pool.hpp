// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/parallel/executor.hpp>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace sattn {

/// A fixed set of std::threads; the calling thread works as worker 0. Tasks are handed out one by
/// one, so that uneven tasks balance. Calls from several threads wait for each other; a task must
/// not call parallel_for of its own pool, which would wait for itself.
class thread_pool {
 public:
  /// threads < 1 means one per hardware thread.
  explicit thread_pool(index_t threads = 0) {
    if (threads < 1) threads = std::max<index_t>(1, std::thread::hardware_concurrency());
    workers_.reserve(static_cast<std::size_t>(threads - 1));
    try {
      for (index_t worker = 1; worker < threads; ++worker) {
        workers_.emplace_back([this, worker] { serve(worker); });
      }
    } catch (...) {  // the system has no thread left: give back the ones there are
      stop();
      throw;
    }
  }

  thread_pool(const thread_pool&) = delete;
  thread_pool& operator=(const thread_pool&) = delete;

  ~thread_pool() { stop(); }

  index_t concurrency() const { return static_cast<index_t>(workers_.size()) + 1; }

  /// Rethrows the first exception of a task, after all workers have stopped; tasks not yet started
  /// are then left out.
  template <class F>
  void parallel_for(index_t n, F&& f) {
    if (n <= 0) return;
    const std::lock_guard one_call(call_mutex_);
    const task_ref task(f);
    {
      const std::lock_guard lock(mutex_);
      task_ = &task;
      tasks_ = n;
      next_.store(0, std::memory_order_relaxed);
      failure_ = nullptr;
      busy_ = static_cast<index_t>(workers_.size());
      ++generation_;
    }
    start_.notify_all();
    work(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    if (failure_ != nullptr) std::rethrow_exception(failure_);
  }

 private:
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    start_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  void work(index_t worker) {
    try {
      for (;;) {
        const index_t task = next_.fetch_add(1, std::memory_order_relaxed);
        if (task >= tasks_) return;
        (*task_)(task, worker);
      }
    } catch (...) {
      next_.store(tasks_, std::memory_order_relaxed);
      const std::lock_guard lock(mutex_);
      if (failure_ == nullptr) failure_ = std::current_exception();
    }
  }

  void serve(index_t worker) {
    std::uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        start_.wait(lock, [&] { return stopping_ || generation_ != seen; });
        if (stopping_) return;
        seen = generation_;
      }
      work(worker);
      {
        const std::lock_guard lock(mutex_);
        --busy_;
      }
      done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex call_mutex_;
  std::mutex mutex_;
  std::condition_variable start_;
  std::condition_variable done_;
  const task_ref* task_ = nullptr;
  index_t tasks_ = 0;
  std::atomic<index_t> next_ = 0;
  index_t busy_ = 0;
  std::uint64_t generation_ = 0;
  std::exception_ptr failure_;
  bool stopping_ = false;
};

}  // namespace sattn
