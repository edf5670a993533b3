// SPDX-License-Identifier: Apache-2.0
#include <sattn/parallel/thread_pool.hpp>

#include <gtest/gtest.h>
#include <sattn/parallel/executor.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using sattn::executor_ref;
using sattn::index_t;
using sattn::parallel_executor;
using sattn::serial_executor;
using sattn::thread_pool;

constexpr std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

struct without_concurrency {
  void parallel_for(index_t, void (*)(index_t, index_t)) {}
};
struct without_workers {
  index_t concurrency() const { return 1; }
  void parallel_for(index_t, void (*)(index_t)) {}
};
static_assert(parallel_executor<thread_pool>);
static_assert(parallel_executor<serial_executor>);
static_assert(parallel_executor<executor_ref>);
static_assert(!parallel_executor<without_concurrency>);
static_assert(!parallel_executor<without_workers>);
static_assert(!parallel_executor<int>);

TEST(thread_pool, has_the_threads_asked_for_or_one_per_core) {
  EXPECT_EQ(thread_pool(1).concurrency(), 1);
  EXPECT_EQ(thread_pool(5).concurrency(), 5);
  const auto cores = std::max<index_t>(1, std::thread::hardware_concurrency());
  EXPECT_EQ(thread_pool(0).concurrency(), cores);
  EXPECT_EQ(thread_pool(-1).concurrency(), cores);
  EXPECT_EQ(thread_pool().concurrency(), cores);
}

TEST(thread_pool, runs_each_task_once) {
  for (const index_t threads : {1, 2, 3, 8}) {
    thread_pool pool(threads);
    for (const index_t n : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(at(n));
      pool.parallel_for(n, [&](index_t task, index_t) { ++runs[at(task)]; });
      for (const std::atomic<int>& count : runs) EXPECT_EQ(count, 1);
    }
  }
}

TEST(thread_pool, results_are_visible_to_the_caller) {
  thread_pool pool(4);
  for (int repeat = 0; repeat < 200; ++repeat) {
    std::vector<index_t> squares(50);  // plain memory: a missing barrier is a data race
    pool.parallel_for(50, [&](index_t task, index_t) { squares[at(task)] = task * task; });
    for (index_t i = 0; i < 50; ++i) ASSERT_EQ(squares[at(i)], i * i);
  }
}

TEST(thread_pool, workers_are_numbered_and_no_two_calls_share_one_at_a_time) {
  thread_pool pool(4);
  std::vector<std::atomic<int>> busy(4);
  std::atomic<bool> shared{false};
  pool.parallel_for(500, [&](index_t, index_t worker) {
    ASSERT_GE(worker, 0);
    ASSERT_LT(worker, 4);
    if (busy[at(worker)].fetch_add(1) != 0) shared = true;
    std::this_thread::yield();
    busy[at(worker)].fetch_sub(1);
  });
  EXPECT_FALSE(shared);
}

TEST(thread_pool, the_caller_is_worker_0_and_all_work_when_tasks_wait_for_each_other) {
  thread_pool pool(3);
  std::atomic<int> started{0};
  std::vector<std::thread::id> ids(3);
  // Each task holds its worker until all three have one.
  pool.parallel_for(3, [&](index_t, index_t worker) {
    ids[at(worker)] = std::this_thread::get_id();
    ++started;
    while (started < 3) std::this_thread::yield();
  });
  EXPECT_EQ(ids[0], std::this_thread::get_id());
  EXPECT_NE(ids[1], ids[2]);
  EXPECT_NE(ids[1], std::thread::id());
}

TEST(thread_pool, every_worker_takes_tasks_in_ascending_order) {
  thread_pool pool(3);
  std::vector<index_t> last(3, -1);
  pool.parallel_for(300, [&](index_t task, index_t worker) {
    EXPECT_GT(task, last[at(worker)]);
    last[at(worker)] = task;
  });
  EXPECT_EQ(*std::max_element(last.begin(), last.end()), 299);
}

TEST(thread_pool, rethrows_one_exception_and_stays_usable) {
  for (const index_t threads : {1, 2, 4}) {
    thread_pool pool(threads);
    for (int repeat = 0; repeat < 50; ++repeat) {
      std::atomic<int> runs{0};
      int caught = 0;
      try {
        pool.parallel_for(100, [&](index_t task, index_t) {
          ++runs;
          if (task % 10 == 3) throw std::runtime_error("task " + std::to_string(task));
        });
      } catch (const std::runtime_error& e) {
        ++caught;
        EXPECT_EQ(std::string(e.what()).substr(0, 5), "task ");
      }
      EXPECT_EQ(caught, 1);
      EXPECT_LE(runs, 100);
      std::atomic<int> after{0};
      pool.parallel_for(20, [&](index_t, index_t) { ++after; });
      EXPECT_EQ(after, 20);
    }
  }
}

TEST(thread_pool, an_exception_leaves_no_task_running) {
  thread_pool pool(4);
  for (int repeat = 0; repeat < 50; ++repeat) {
    std::atomic<int> running{0};
    EXPECT_THROW(pool.parallel_for(40,
                                   [&](index_t task, index_t) {
                                     ++running;
                                     if (task == 5) {
                                       --running;
                                       throw std::logic_error("stop");
                                     }
                                     std::this_thread::yield();
                                     --running;
                                   }),
                 std::logic_error);
    EXPECT_EQ(running, 0);
  }
}

TEST(thread_pool, calls_from_several_threads_wait_for_each_other) {
  constexpr index_t callers = 4;
  thread_pool pool(3);
  std::vector<std::atomic<int>> active(at(callers));
  std::atomic<bool> mixed{false};
  std::vector<std::vector<int>> runs(at(callers), std::vector<int>(100));
  const auto call_often = [&](index_t me) {
    for (int repeat = 0; repeat < 20; ++repeat) {
      pool.parallel_for(100, [&](index_t task, index_t) {
        ++active[at(me)];
        for (index_t other = 0; other < callers; ++other) {
          if (other != me && active[at(other)] != 0) mixed = true;
        }
        ++runs[at(me)][at(task)];
        --active[at(me)];
      });
    }
  };
  std::vector<std::thread> threads;
  for (index_t me = 0; me < callers; ++me) threads.emplace_back(call_often, me);
  for (std::thread& thread : threads) thread.join();
  EXPECT_FALSE(mixed) << "two calls ran at once, whose workers would share scratch";
  for (const std::vector<int>& own : runs) EXPECT_EQ(own, std::vector<int>(100, 20));
}

TEST(thread_pool, many_pools_start_and_stop) {
  for (int repeat = 0; repeat < 100; ++repeat) {
    thread_pool unused(4);
    thread_pool pool(3);
    std::atomic<int> runs{0};
    pool.parallel_for(2, [&](index_t, index_t) { ++runs; });
    EXPECT_EQ(runs, 2);
  }
}

TEST(serial_executor, runs_tasks_in_order_on_worker_0) {
  serial_executor serial;
  std::vector<index_t> tasks;
  serial.parallel_for(4, [&](index_t task, index_t worker) {
    EXPECT_EQ(worker, 0);
    tasks.push_back(task);
  });
  EXPECT_EQ(tasks, (std::vector<index_t>{0, 1, 2, 3}));
  EXPECT_EQ(serial.concurrency(), 1);
}

// An executor whose state must be that of the original, not of a copy.
class counting_executor {
 public:
  int concurrency() const { return 7; }
  template <class F>
  void parallel_for(index_t n, F&& f) {
    ++calls;
    for (index_t task = n; task-- > 0;) f(task, task % 7);
  }
  int calls = 0;
};
static_assert(parallel_executor<counting_executor>);

TEST(executor_ref, forwards_to_the_callers_executor) {
  counting_executor executor;
  const executor_ref ref(executor);
  EXPECT_EQ(ref.concurrency(), 7);
  std::vector<index_t> tasks;
  ref.parallel_for(3, [&](index_t task, index_t worker) {
    EXPECT_EQ(worker, task);
    tasks.push_back(task);
  });
  const executor_ref copy = ref;
  copy.parallel_for(1, [&](index_t task, index_t) { tasks.push_back(task + 10); });
  EXPECT_EQ(tasks, (std::vector<index_t>{2, 1, 0, 10}));
  EXPECT_EQ(executor.calls, 2);
}

TEST(executor_ref, passes_exceptions_through) {
  thread_pool pool(2);
  const executor_ref ref(pool);
  EXPECT_THROW(ref.parallel_for(5, [](index_t, index_t) { throw std::logic_error("stop"); }),
               std::logic_error);
}

}  // namespace
