// SPDX-License-Identifier: Apache-2.0
//
// An engine's own pages and its own threads: two sequences in one call, read where they lie.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <random>
#include <sattn/sattn.hpp>
#include <thread>
#include <vector>

namespace sa = sattn;

constexpr sa::index_t blocks = 80, block = 16, q_heads = 8, kv_heads = 2, dim = 64;
constexpr sa::index_t block_size = kv_heads * block * 2 * dim;  // [kv_head, token, key | value]

/// Three threads for each loop; an engine would wake those that it has.
struct engine_threads {
  sa::index_t concurrency() const { return 3; }
  template <class F>
  void parallel_for(sa::index_t n, F&& f) {
    std::atomic<sa::index_t> next = 0;
    std::vector<std::jthread> team;  // joined at the end
    for (sa::index_t worker = 0; worker < concurrency(); ++worker) {
      team.emplace_back([&, worker] {
        for (sa::index_t task = next++; task < n; task = next++) f(task, worker);
      });
    }
  }
};
static_assert(sa::parallel_executor<engine_threads>);

struct request {
  sa::index_t tokens;
  std::vector<std::int32_t> table;      // its blocks of the engine's pool
  std::vector<sa::f16> k = {}, v = {};  // the same tokens in one piece, to compare with
};

int main() {
  std::minstd_rand random(1);
  std::normal_distribution<float> normal;
  std::vector<sa::f16> pool(blocks * block_size);
  for (sa::f16& x : pool) x = sa::to_f16(normal(random));
  std::vector<std::int32_t> ids(blocks);
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), random);
  std::vector<request> requests = {{1000, {ids.begin(), ids.begin() + 63}},
                                   {250, {ids.begin() + 63, ids.begin() + 79}}};
  for (request& r : requests) {
    for (sa::index_t i = 0; i < r.tokens * kv_heads; ++i) {
      const sa::index_t token = i / kv_heads, head = i % kv_heads;
      const sa::f16* row =
          pool.data() + r.table[static_cast<std::size_t>(token / block)] * block_size;
      row += (head * block + token % block) * 2 * dim;
      r.k.insert(r.k.end(), row, row + dim);
      r.v.insert(r.v.end(), row + dim, row + 2 * dim);
    }
  }
  std::vector<float> q_data(2 * q_heads * dim);  // the newest token of each
  for (float& x : q_data) x = normal(random);

  const auto run = [&](auto executor, const auto& kv_of) {
    sa::context ctx(executor);
    std::vector<float> out(q_data.size());
    std::vector<sa::attention_plan> plans(2);
    std::vector<sa::attention_sequence> batch;
    for (std::size_t i = 0; i < 2; ++i) {
      const auto q = sa::nhd<const float>(&q_data[i * q_heads * dim], 1, q_heads, dim);
      const sa::kv_view kv = kv_of(requests[i]);
      plans[i] = sa::plan_decode(ctx, sa::shape_of(q, kv), sa::sink{4} | sa::sliding_window{500});
      batch.push_back({&plans[i], q, kv, sa::nhd(&out[i * q_heads * dim], 1, q_heads, dim)});
    }
    sa::attend(ctx, batch);
    return out;
  };
  // Pages are described by the first one, their number and distance; a table says whose they are.
  const sa::page_pool pages{sa::hnd(pool.data(), block, kv_heads, 2 * dim), blocks,
                            block_size * sa::index_t{sizeof(sa::f16)}};
  const auto in_pages = run(engine_threads{}, [&](const request& r) {
    const sa::stored_view rows = sa::paged(pages, r.table, r.tokens);
    return sa::kv(rows.columns(0, dim), rows.columns(dim, 2 * dim));
  });
  const auto in_one_piece = run(sa::serial_executor{}, [](const request& r) {
    return sa::kv(sa::nhd(r.k.data(), r.tokens, kv_heads, dim),
                  sa::nhd(r.v.data(), r.tokens, kv_heads, dim));
  });
  const bool same = in_pages == in_one_piece;
  for (const request& r : requests) {
    std::printf("%td tokens in pages %d, %d, %d, ...\n", r.tokens, r.table[0], r.table[1],
                r.table[2]);
  }
  std::printf("attention gives %s bits as from one piece\n", same ? "the same" : "DIFFERENT");
  return same ? 0 : 1;
}
