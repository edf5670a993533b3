// SPDX-License-Identifier: Apache-2.0
//
// Prefill of one sequence, causal: 4 query heads on 1 kv head and one thread unless the name says
// otherwise (g1: 1 query head). Without a filter, every case of docs/performance.md.

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
using bench::problem;
using bench::rival;
using bench::text;
using bench::token_t;
using bench::workload;
using sattn::dtype;

struct extents {
  index_t dim;
  index_t len;
  index_t group = 4;
  index_t v_dim = 0;  // 0 = dim
  dtype type = dtype::f32;
  bool smoke = false;
};

problem prefill(const extents& e) {
  const index_t v_dim = e.v_dim == 0 ? e.dim : e.v_dim;
  const std::string width = v_dim == e.dim ? text(e.dim) : text(e.dim, '_', v_dim);
  const std::string group = e.group == 4 ? "" : text("/g", e.group);
  return {text("prefill/", sattn::name_of(e.type), "/d", width, group, "/n", e.len, '/'),
          {e.len, e.len, e.group, 1, 0},
          e.dim,
          e.smoke,
          v_dim,
          e.type};
}

/// One list for each query head, or one for all.
workload blocks(token_t size, const std::string& density, bool shared) {
  return {text("block", size, "/density", density, shared ? "/shared" : ""),
          [=](const attention_shape& s) {
            return bench::random_blocks(s, size, size, std::stod(density), shared ? 1 : s.q_heads,
                                        0);
          }};
}

struct slash_kind {
  const char* name;
  index_t runs;
  token_t run_size;
  index_t columns;
};
constexpr slash_kind slash_kinds[] = {
    {"isolated", 64, 1, 64}, {"runs16", 16, 16, 256}, {"runs64", 8, 64, 512}};

workload slashes(const slash_kind& kind, bool shared, sattn::plan_options options = {},
                 const std::string& variant = "") {
  return {text("vertical_slash_", kind.name, shared ? "/shared" : "", variant),
          [=](const attention_shape& s) -> sattn::any_pattern {
            const auto of_head = [&](unsigned seed) {
              return bench::random_slashes(s.kv_len, kind.runs, kind.run_size,
                                           std::min(kind.columns, s.kv_len / 2), seed);
            };
            if (shared) return of_head(1);
            sattn::per_head heads;
            for (index_t h = 0; h < s.q_heads; ++h) {
              heads.patterns.emplace_back(of_head(static_cast<unsigned>(h + 1)));
            }
            return heads;
          },
          options};
}

workload lists(index_t count, bool shared) {
  return {text("token_lists/k", count, shared ? "/shared" : ""),
          [=](const attention_shape& s) {
            return bench::random_tokens(s, count, shared ? 1 : s.q_heads);
          }};
}

/// `kind`: overlap, where the rows have a core in common, or drift, where neighbours have.
workload alike_lists(index_t count, const std::string& kind, const std::string& share,
                     bool shared) {
  return {text("token_lists/k", count, '/', kind, share, shared ? "/shared" : ""),
          [=](const attention_shape& s) {
            return bench::alike_tokens(s, count, std::stod(share), kind == "overlap",
                                       shared ? 1 : s.q_heads);
          }};
}

void add_sparse(const problem& p) {
  for (const token_t window : {256, 512, 1024, 2048}) add_case(p, bench::window_workload(window));
  for (const token_t size : {16, 32, 64, 128}) {
    for (const char* density : {"0.5", "0.25", "0.125", "0.0625"}) {
      add_case(p, blocks(size, density, false));
      if (p.shape.q_heads > 1) add_case(p, blocks(size, density, true));
    }
  }
}

void add_slashes(const problem& p) {
  for (const slash_kind& kind : slash_kinds) {
    add_case(p, slashes(kind, false));
    add_case(p, slashes(kind, true));
    add_case(p, slashes(kind, false, {.tile_rows = 64, .rounding = sattn::rounding::cover},
                        "/cover64"));
  }
}

void add_lists(const problem& p) {
  for (const bool shared : {false, true}) {
    for (const index_t count : {64, 128, 256, 512, 1024, 1536, 2048, 4096}) {
      add_case(p, lists(count, shared));
    }
    for (const index_t count : {64, 256}) {
      add_case(p, lists(count, shared), rival::rows);
      for (const char* kind : {"overlap", "drift"}) {
        for (const char* share : {"0.75", "0.9"}) {
          add_case(p, alike_lists(count, kind, share, shared));
          add_case(p, alike_lists(count, kind, share, shared), rival::rows);
        }
      }
    }
  }
}

/// Of each pattern, one list per query head and one for all.
std::vector<workload> samples(token_t window = 1024, index_t tokens = 256) {
  std::vector<workload> all{bench::dense_workload(), bench::window_workload(window)};
  for (const bool shared : {false, true}) {
    all.push_back(blocks(64, "0.125", shared));
    for (const slash_kind& kind : slash_kinds) all.push_back(slashes(kind, shared));
    all.push_back(lists(tokens, shared));
  }
  return all;
}

void add_smoke() {
  const std::vector<workload> small = samples(64, 32);
  for (const dtype type : {dtype::f32, dtype::f16, dtype::bf16}) {
    const problem p = prefill({.dim = 64, .len = 256, .type = type, .smoke = true});
    for (const workload& w : small) {
      add_case(p, w, type == dtype::f32 ? rival::dense : rival::f32);
    }
  }
  const problem p = prefill({.dim = 64, .len = 256, .smoke = true});
  add_case(p, bench::dense_workload(), rival::ours);
  add_case(p, slashes(slash_kinds[2], false, {.tile_rows = 64, .rounding = sattn::rounding::cover},
                      "/cover64"));
  add_case(p, alike_lists(64, "overlap", "0.75", true), rival::rows);
  add_case(p, alike_lists(64, "drift", "0.75", false));
  for (const workload& w : small) add_case(p, w, rival::serial);
}

void add_cases(bool /*long_ones*/) {
  add_smoke();

  // Dense: every length, shape and group.
  for (const index_t dim : {128, 64}) {
    for (const index_t len : {16, 64, 256, 512, 1024, 4096, 8192, 32768}) {
      add_case(prefill({.dim = dim, .len = len}), bench::dense_workload(), rival::none);
    }
    for (const index_t len : {16, 32, 64, 128, 256, 512, 1024, 4096}) {
      add_case(prefill({.dim = dim, .len = len}), bench::dense_workload(), rival::ours);
    }
  }
  for (const auto& [dim, v_dim] : {std::pair<index_t, index_t>{80, 80}, {96, 96}, {192, 128},
                                   {256, 256}}) {
    add_case(prefill({.dim = dim, .len = 4096, .v_dim = v_dim}), bench::dense_workload(),
             rival::none);
  }
  for (const index_t group : {1, 3, 8}) {
    add_case(prefill({.dim = 128, .len = 4096, .group = group}), bench::dense_workload(),
             rival::none);
  }

  // Patterns.
  for (const index_t dim : {128, 64}) {
    const problem p = prefill({.dim = dim, .len = 8192});
    add_sparse(p);
    add_slashes(p);
    add_lists(p);
  }
  add_sparse(prefill({.dim = 128, .len = 8192, .group = 1}));
  for (const char* density : {"0.125", "0.0625"}) {
    add_case(prefill({.dim = 128, .len = 32768, .group = 1}), blocks(64, density, false));
  }

  // Storage types, threads, memory.
  for (const dtype type : {dtype::f16, dtype::bf16}) {
    for (const workload& w : samples()) {
      add_case(prefill({.dim = 128, .len = 8192, .type = type}), w, rival::f32);
    }
  }
  for (const index_t len : {4096, 8192}) {
    for (const workload& w : samples()) {
      add_case(prefill({.dim = 128, .len = len}), w, rival::serial);
    }
  }
  const problem longest = prefill({.dim = 128, .len = 131072, .group = 1});
  add_case(longest, bench::window_workload(1024), rival::none);
  add_case(longest, slashes(slash_kinds[0], true), rival::none);
}

}  // namespace

int main(int argc, char** argv) { return bench::bench_main(argc, argv, add_cases); }
