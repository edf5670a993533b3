// SPDX-License-Identifier: Apache-2.0
//
// Prefill of one sequence, 4 query heads on one kv head, on one thread.

#include <algorithm>
#include <sattn/sattn.hpp>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "support/cases.hpp"
#include "support/measure.hpp"
#include "support/workload.hpp"

namespace {

using bench::attention_shape;
using bench::index_t;
using bench::token_t;
using bench::workload;

std::vector<workload> slash_workloads(const std::string& name, index_t runs, token_t run_size,
                                      index_t columns) {
  const auto pattern = [=](const attention_shape& s, unsigned) {
    return bench::random_slashes(s.kv_len, runs, run_size, std::min(columns, s.kv_len / 2));
  };
  // Shorter tiles, whose lanes the four heads fill, and whole hulls.
  return {{name, pattern},
          {name + "/shared8", pattern, {.tile_rows = 8}},
          {name + "/shared4", pattern, {.tile_rows = 4}},
          {name + "/cover", pattern, {.rounding = sattn::rounding::cover}}};
}

std::vector<workload> sparse_workloads() {
  std::vector<workload> all{bench::window_workload()};
  for (const std::string density : {"0.5", "0.25", "0.125"}) {
    all.push_back({"block64/density" + density, [=](const attention_shape& s, unsigned seed) {
                     return bench::random_blocks(s, 64, 64, std::stod(density), s.q_heads, seed);
                   }});
  }
  for (auto [name, runs, run_size, columns] :
       {std::tuple{"isolated", 64, 1, 64}, {"runs16", 16, 16, 256}, {"runs64", 8, 64, 512}}) {
    for (workload& w :
         slash_workloads(std::string("vertical_slash_") + name, runs, run_size, columns)) {
      all.push_back(std::move(w));
    }
  }
  for (const index_t count : {64, 128, 256, 512}) {
    const std::string name = "token_lists/k" + std::to_string(count);
    all.push_back({name, [=](const attention_shape& s, unsigned) {
                     return bench::random_tokens(s, count, s.q_heads);
                   }});
    all.push_back({name + "/shared", [=](const attention_shape& s, unsigned) {
                     return bench::random_tokens(s, count, 1);
                   }});
  }
  return all;
}

void add_cases(bool long_ones) {
  const auto add = [sparse = sparse_workloads()](index_t dim, index_t len, bool smoke) {
    const bench::problem p{"prefill/f32/d" + std::to_string(dim) + "/n" + std::to_string(len) + "/",
                           {len, len, 4, 1, 0},
                           dim,
                           smoke};
    add_case(p, bench::dense_workload());
    add_case(p, bench::dense_workload(), bench::rival::serial);
    add_case(p, bench::dense_workload(), bench::rival::ours);
    for (const workload& w : sparse) add_case(p, w);
    add_case(p, sparse[2], bench::rival::serial);
  };
  add(64, 256, true);
  for (const index_t dim : {64, 128}) {
    for (const index_t len : {1024, 4096, 8192}) add(dim, len, false);
    for (const index_t len : {16384, 32768}) {
      if (long_ones) add(dim, len, false);
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return bench::bench_main(argc, argv, add_cases); }
