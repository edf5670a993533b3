// SPDX-License-Identifier: Apache-2.0
//
// One new token against f32 keys and values in memory, one kv head, on one thread.

#include <sattn/sattn.hpp>
#include <string>
#include <vector>

#include "support/cases.hpp"
#include "support/measure.hpp"
#include "support/workload.hpp"

namespace {

using bench::attention_shape;
using bench::index_t;
using bench::token_t;
using bench::workload;

void add_cases(bool long_ones) {
  std::vector<workload> sparse{bench::window_workload()};
  for (const std::string density : {"0.5", "0.25", "0.125"}) {
    sparse.push_back({"pages16/density" + density, [=](const attention_shape& s, unsigned seed) {
                        return bench::random_blocks(s, 1, 16, std::stod(density), 1, seed);
                      }});
  }
  const auto add = [&](index_t group, index_t dim, index_t len, bool smoke) {
    const bench::problem p{"decode/f32/g" + std::to_string(group) + "/d" + std::to_string(dim) +
                               "/n" + std::to_string(len) + "/",
                           {1, len, group, 1, static_cast<token_t>(len - 1)},
                           dim,
                           smoke,
                           dim};
    add_case(p, bench::dense_workload());
    add_case(p, bench::dense_workload(), bench::rival::serial);
    add_case(p, bench::dense_workload(), bench::rival::ours);
    for (const workload& w : sparse) add_case(p, w);
  };
  add(4, 64, 2048, true);
  for (const index_t group : {1, 4, 8}) {
    for (const index_t dim : {64, 128}) {
      add(group, dim, 32768, false);
      if (long_ones) add(group, dim, 131072, false);
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return bench::bench_main(argc, argv, add_cases); }
