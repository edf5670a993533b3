// SPDX-License-Identifier: Apache-2.0
//
// The caller's threads: anything with concurrency() and parallel_for().

#include <atomic>
#include <cstdio>
#include <future>
#include <random>
#include <sattn/sattn.hpp>
#include <vector>

namespace sa = sattn;

/// Starts `workers` tasks of std::async for each loop; an engine would hand in its thread pool.
class async_executor {
 public:
  explicit async_executor(sa::index_t workers) : workers_(workers) {}

  sa::index_t concurrency() const { return workers_; }

  template <class F>
  void parallel_for(sa::index_t n, F&& f) {
    std::atomic<sa::index_t> next = 0;
    std::vector<std::future<void>> running;
    for (sa::index_t worker = 0; worker < workers_; ++worker) {
      running.push_back(std::async(std::launch::async, [&, worker] {
        for (sa::index_t task = next++; task < n; task = next++) f(task, worker);
      }));
    }
    for (std::future<void>& r : running) r.get();  // rethrows what a task threw
  }

 private:
  sa::index_t workers_;
};
static_assert(sa::parallel_executor<async_executor>);

int main() {
  constexpr sa::index_t tokens = 1000, heads = 4, dim = 64;
  std::minstd_rand random(1);
  std::normal_distribution<float> normal;
  std::vector<float> data(tokens * heads * dim);
  for (float& x : data) x = normal(random);
  const auto q = sa::nhd(data.data(), tokens, heads, dim);  // inputs may share memory
  const auto kv = sa::kv(q, q);

  const auto run = [&](auto executor) {
    sa::context ctx(executor);
    const auto shape = sa::shape_of(q, kv);
    const sa::selection rule{sa::budget::ratio(0.25), {.recent = 2}};
    const auto blocks = sa::select_pooled_blocks(ctx, shape, q, kv.k, rule);
    std::vector<float> out(data.size());
    sa::attend(ctx, sa::plan_prefill(ctx, shape, blocks), q, kv,
               {sa::nhd(out.data(), tokens, heads, dim)});
    return out;
  };
  const bool same = run(async_executor(3)) == run(sa::serial_executor());
  std::printf("3 threads and 1 give %s bits\n", same ? "the same" : "DIFFERENT");
  return same ? 0 : 1;
}
