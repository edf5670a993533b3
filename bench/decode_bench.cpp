// SPDX-License-Identifier: Apache-2.0
//
// One new token against caches that no processor cache holds, one kv head, on one thread unless the
// name says otherwise. Names: decode/<type>/g<query heads>/d<dim>/n<tokens>/<what>. Counters:
// bandwidth_fraction = bytes of the selected K and V, once, over a linear read in the same rounds;
// peak_fraction = flops over the FMA peak; vs_dense = time / (time of dense x density); vs_g1 =
// time / time of one query head; vs_one_row = time of several rows / time of one over all keys;
// share_of_decode = time of an update of a cache, of one head, / time of a step over it. Ratios are
// of interleaved runs.

#include <algorithm>
#include <functional>
#include <memory>
#include <sattn/sattn.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/caches.hpp"
#include "support/eigen_attention.hpp"
#include "support/measure.hpp"
#include "support/workload.hpp"

namespace {

using bench::attention_shape;
using bench::index_t;
using bench::stored_caches;
using bench::text;
using bench::token_t;
using sattn::dtype;

struct setting {
  dtype type = dtype::f16;
  index_t group = 1;
  index_t dim = 128;
  index_t tokens = 32768;
  index_t page_size = 0;  // 0 = K and V in two arrays
  index_t v_dim = 0;      // 0 = dim; otherwise V is a part of K
  index_t rows = 1;       // tokens of a step, causal among themselves
  bool smoke = false;

  std::string name() const {
    const std::string width = v_dim == 0 ? text(dim) : text(dim, '_', v_dim);
    return text("decode/", name_of(type), "/g", group, "/d", width, "/n", tokens, '/',
                rows == 1 ? "" : text("rows", rows, '/'));
  }
  attention_shape shape() const {
    return {rows, tokens, group, 1, static_cast<token_t>(tokens - rows)};
  }
  index_t values() const { return v_dim == 0 ? dim : v_dim; }
};

/// Everything that decodes tokens of one setting; each call takes another cache.
struct decoder {
  const stored_caches& caches;
  attention_shape shape;
  std::vector<float> q, out;
  index_t next = 0;

  decoder(const stored_caches& c, const setting& s)
      : caches(c), shape(s.shape()), q(bench::random_floats(s.rows * s.group * s.dim, 1)),
        out(static_cast<std::size_t>(s.rows * s.group * s.values())) {}

  sattn::tensor_view<const float> q_view() const {
    return sattn::nhd<const float>(q.data(), shape.q_len, shape.q_heads, caches.dim());
  }
  sattn::tensor_view<float> out_view() {
    return sattn::nhd(out.data(), shape.q_len, shape.q_heads, caches.v_dim());
  }
  sattn::kv_view next_cache() {
    next = (next + 1) % caches.count();
    return caches.view(next);
  }
  void attend(sattn::context& ctx, const sattn::attention_plan& plan) {
    sattn::attend(ctx, plan, q_view(), next_cache(), out_view());
  }
};

stored_caches caches_of(const setting& s) {
  return {s.type, s.tokens, s.dim, s.values(), s.page_size, s.v_dim != 0};
}

void report(benchmark::State& state, const stored_caches& caches, const bench::timings& t,
            const sattn::plan_stats& stats, const setting& s) {
  const double seconds = bench::median(t.run);
  const double best = bench::best(t.run);
  const auto selected = static_cast<double>(stats.selected);
  const double flops = 2.0 * static_cast<double>(caches.dim() + caches.v_dim()) * selected;
  const double bytes = static_cast<double>(caches.token_bytes()) * selected /
                       static_cast<double>(s.rows * s.group);
  auto& counters = state.counters;
  counters["median_ms"] = seconds * 1e3;
  counters["best_ms"] = best * 1e3;
  counters["gflops"] = flops / seconds * 1e-9;
  counters["peak_fraction"] = t.fraction(flops, t.fma_rate);
  counters["peak_fraction_best"] = flops / best / bench::fastest(t.fma_rate);
  counters["read_gbps"] = bench::median(t.read_rate) * 1e-9;
  counters["bandwidth_fraction"] = t.fraction(bytes, t.read_rate);
  counters["bandwidth_fraction_best"] = bytes / best / bench::fastest(t.read_rate);
  counters["density"] = stats.density_selected();
}

/// A pattern for each round: one that repeats would flatter.
using pattern_maker = std::function<sattn::any_pattern(const attention_shape&, unsigned round)>;

sattn::any_pattern dense(const attention_shape&, unsigned) { return sattn::dense{}; }

/// One list of pages for so many rows.
pattern_maker pages(index_t page_size, double density, index_t rows = 1) {
  return [=](const attention_shape& s, unsigned round) {
    return bench::random_blocks(s, static_cast<token_t>(rows), static_cast<token_t>(page_size),
                                density, 1, round);
  };
}

enum class rival { none, dense, one_head, one_row, one_thread, eigen };

void run_attention(benchmark::State& state, const setting& s, const pattern_maker& make,
                   rival against) {
  const stored_caches caches = caches_of(s);
  decoder ours(caches, s);
  setting alone = s;
  if (against == rival::one_head) alone.group = 1;
  if (against == rival::one_row) alone.rows = 1;
  decoder other(caches, alone);
  sattn::serial_executor serial;
  sattn::context ctx(serial);
  const index_t threads = against == rival::one_thread ? 2 : 1;
  sattn::context pool(threads);
  sattn::attention_plan plan;
  sattn::attention_plan reference;
  unsigned round = 0;
  sattn::any_pattern pattern = make(s.shape(), round);
  plan_decode_into(ctx, plan, s.shape(), pattern);
  plan_decode_into(ctx, reference, alone.shape(), sattn::dense{});
  bench::row_matrix scores;

  bench::timed_case c{.from_memory = true, .threads = threads, .smoke = s.smoke};
  c.prepare = [&] { pattern = make(s.shape(), ++round); };
  c.plan = [&] { plan_decode_into(ctx, plan, s.shape(), pattern); };
  if (against != rival::none) c.reference = [&] { other.attend(ctx, reference); };
  c.run = [&] { ours.attend(threads > 1 ? pool : ctx, plan); };
  if (against == rival::eigen) {
    c.run = [&] {
      const sattn::kv_view kv = ours.next_cache();
      scores.resize(s.group, s.tokens);
      const Eigen::OuterStride<> stride(s.dim);
      bench::eigen_rows({ours.q.data(), s.group, s.dim, stride},
                        {static_cast<const float*>(kv.k.data), s.tokens, s.dim, stride},
                        {static_cast<const float*>(kv.v.data), s.tokens, s.dim, stride},
                        {ours.out.data(), s.group, s.dim, stride}, s.tokens, 0, scores);
    };
    ours.next = other.next;
    c.reference();
    c.run();
    for (std::size_t i = 0; i < ours.out.size(); ++i) {
      if (std::abs(ours.out[i] - other.out[i]) <= 1e-4f) continue;
      throw std::runtime_error("the Eigen baseline is wrong");
    }
  }
  const bench::timings t = measure(state, c);
  const double ratio = bench::median(t.ratio);
  report(state, caches, t, plan.stats(), s);
  if (against == rival::dense) {
    const double planned = bench::median(t.plan) / (bench::median(t.plan) + bench::median(t.run));
    state.counters["vs_dense"] = ratio / plan.stats().density_selected();
    state.counters["speedup"] = 1 / ratio;
    state.counters["plan_share"] = planned;
  }
  if (against == rival::one_head) state.counters["vs_g1"] = ratio;
  if (against == rival::one_row) state.counters["vs_one_row"] = ratio;
  if (against == rival::one_thread) state.counters["thread_speedup"] = 1 / ratio;
  if (against == rival::eigen) state.counters["vs_eigen"] = ratio;
}

/// The same step with the mass of every key beside the output.
void run_mass(benchmark::State& state, const setting& s) {
  const stored_caches caches = caches_of(s);
  decoder ours(caches, s);
  decoder other(caches, s);
  sattn::serial_executor serial;
  sattn::context ctx(serial);
  const sattn::attention_plan plan = plan_decode(ctx, s.shape(), sattn::dense{});
  std::vector<float> lse(static_cast<std::size_t>(s.group));
  std::vector<float> mass(static_cast<std::size_t>(s.tokens));
  bench::timed_case c{.from_memory = true, .smoke = s.smoke};
  c.reference = [&] { other.attend(ctx, plan); };
  c.run = [&] {
    sattn::attend(ctx, plan, ours.q_view(), ours.next_cache(),
                  {ours.out_view(), sattn::nhd(lse.data(), 1, s.group, 1),
                   sattn::nhd(mass.data(), s.tokens, 1, 1)});
  };
  const bench::timings t = measure(state, c);
  report(state, caches, t, plan.stats(), s);
  state.counters["vs_dense"] = bench::median(t.ratio);
}

/// Eight sequences of 1/8, 2/8, ... of the tokens in one call, on one thread and on two.
void run_batch(benchmark::State& state, const setting& s) {
  constexpr index_t sequences = 8;
  const stored_caches caches = caches_of(s);
  std::vector<std::unique_ptr<decoder>> decoders;
  std::vector<sattn::attention_plan> plans(sequences);
  sattn::serial_executor serial;
  sattn::context ctx(serial);
  sattn::context pool(2);
  for (index_t i = 0; i < sequences; ++i) {
    decoders.push_back(std::make_unique<decoder>(caches, s));
    attention_shape& shape = decoders.back()->shape;
    shape.kv_len = s.tokens * (i + 1) / sequences;
    shape.q_offset = static_cast<token_t>(shape.kv_len - 1);
    plan_decode_into(ctx, plans[static_cast<std::size_t>(i)], shape, sattn::dense{});
  }
  index_t next = 0;
  const auto attend = [&](sattn::context& with) {
    std::vector<sattn::attention_sequence> batch;
    for (std::size_t i = 0; i < sequences; ++i) {
      next = (next + 1) % caches.count();
      batch.push_back({&plans[i], decoders[i]->q_view(),
                       caches.view(next, decoders[i]->shape.kv_len), {decoders[i]->out_view()}});
    }
    sattn::attend(with, batch);
  };
  bench::timed_case c{.from_memory = true, .threads = 2, .smoke = s.smoke};
  c.reference = [&] { attend(ctx); };
  c.run = [&] { attend(pool); };
  const bench::timings t = measure(state, c);
  sattn::plan_stats all;
  for (const sattn::attention_plan& plan : plans) {
    all.selected += plan.stats().selected;
    all.legal += plan.stats().legal;
  }
  report(state, caches, t, all, s);
  state.counters["thread_speedup"] = 1 / bench::median(t.ratio);
}

/// Summaries of every cache, as many as exceed the processor's caches.
std::vector<std::vector<sattn::page_summaries>> summaries_of(const stored_caches& caches,
                                                             dtype type, index_t page_size) {
  std::vector<std::vector<sattn::page_summaries>> all;
  for (index_t i = 0; i < caches.count(); ++i) {
    all.emplace_back(
        1, sattn::page_summaries({caches.dim(), static_cast<token_t>(page_size), type}));
    all.back()[0].update(caches.view(i).k, 0);
  }
  return all;
}

/// Quest's steps: bounds of pages, the best of them, attention to their keys.
void run_quest(benchmark::State& state, const setting& s, dtype summary_type, index_t budget) {
  const stored_caches caches = caches_of(s);
  const auto summaries = summaries_of(caches, summary_type, s.page_size);
  decoder ours(caches, s);
  decoder whole(caches, s);
  sattn::serial_executor serial;
  sattn::context ctx(serial);
  sattn::attention_plan plan;
  sattn::attention_plan reference = plan_decode(ctx, s.shape(), sattn::dense{});
  sattn::score_tensor scores;
  sattn::selector choose;
  const sattn::selection rule{sattn::budget::fixed(budget / s.page_size), {.recent = 1}};
  sattn::block_lists lists{1, static_cast<token_t>(s.page_size), {0, 0}, {}, 1};
  std::vector<double> scoring, selecting, planning;
  bench::timed_case c{.from_memory = true, .smoke = s.smoke};
  c.reference = [&] { whole.attend(ctx, reference); };
  c.run = [&] {
    ours.next = (ours.next + 1) % caches.count();
    scoring.push_back(bench::seconds_of([&] {
      page_scores_into(ctx, scores, ours.q_view(), summaries[static_cast<std::size_t>(ours.next)]);
    }));
    selecting.push_back(bench::seconds_of([&] {
      choose.choose(scores.row(0, 0), rule, {}, lists.indices);
      lists.indptr[1] = std::ssize(lists.indices);
    }));
    planning.push_back(
        bench::seconds_of([&] { plan_decode_into(ctx, plan, s.shape(), lists); }));
    sattn::attend(ctx, plan, ours.q_view(), caches.view(ours.next), ours.out_view());
  };
  const bench::timings t = measure(state, c);
  report(state, caches, t, plan.stats(), s);
  const double bytes = static_cast<double>(summaries[0][0].bytes());
  state.counters["speedup"] = 1 / bench::median(t.ratio);
  state.counters["score_us"] = bench::median(scoring) * 1e6;
  state.counters["select_us"] = bench::median(selecting) * 1e6;
  state.counters["plan_us"] = bench::median(planning) * 1e6;
  state.counters["score_bandwidth_fraction"] =
      bytes / bench::median(scoring) / bench::median(t.read_rate);
}

/// What happens to a cache between two steps; `prepare` brings it to where that can happen.
struct cache_update {
  using cache = sattn::paged_kv_cache<sattn::f16>;
  using rows = sattn::tensor_view<const float>;
  const char* name;
  std::function<void(cache&, const rows& token)> prepare, run;
};

std::vector<cache_update> cache_updates(index_t tokens, index_t page_size, index_t kv_heads) {
  using cache = cache_update::cache;
  using rows = cache_update::rows;
  std::vector<token_t> half;  // every other page
  for (index_t i = 0; i < tokens; ++i) {
    if (i / page_size % 2 == 0) half.push_back(static_cast<token_t>(i));
  }
  const std::vector<std::vector<token_t>> kept(static_cast<std::size_t>(kv_heads), half);
  const auto append = [](cache& c, const rows& x) { c.append(x, x); };
  const auto truncate = [=](cache& c, const rows&) { c.truncate(tokens); };
  const auto nothing = [](cache&, const rows&) {};
  const auto fill = [=](cache& c, const rows& x) {
    c = c.new_sequence();
    for (index_t i = 0; i < tokens; ++i) c.append(x, x);
  };
  const auto fork = [](cache& c, const rows&) { benchmark::DoNotOptimize(c.fork().tokens()); };
  const auto fork_append = [](cache& c, const rows& x) { c.fork().append(x, x); };
  const auto evict = [=](cache& c, const rows&) { c.evict(kept); };
  return {{"append", truncate, append},
          {"truncate", append, truncate},
          {"fork", nothing, fork},
          {"fork_append", nothing, fork_append},
          {"evict_half", fill, evict}};
}

/// An update of a cache whose last page is half full and that keeps bounds, and of int8 means too,
/// against a step over one head.
void run_update(benchmark::State& state, const setting& s, const cache_update& update,
                dtype summaries, index_t kv_heads) {
  sattn::kv_cache_options options{.kv_heads = kv_heads,
                                  .head_dim = s.dim,
                                  .page_size = static_cast<token_t>(s.page_size),
                                  .capacity = 2 * s.tokens,
                                  .summaries = summaries};
  if (summaries == dtype::i8) options.means = dtype::i8;
  cache_update::cache cache(options);
  const std::vector<float> rows = bench::random_floats(1024 * kv_heads * s.dim, 3);
  const auto some = sattn::nhd<const float>(rows.data(), 1024, kv_heads, s.dim);
  for (index_t t = 0; t < s.tokens; t += 1024) cache.append(some, some);
  cache.append(some.slice(0, s.page_size / 2), some.slice(0, s.page_size / 2));
  const auto token = some.slice(7, 8);
  const stored_caches caches = caches_of(s);
  decoder whole(caches, s);
  sattn::serial_executor serial;
  sattn::context ctx(serial);
  const sattn::attention_plan reference = plan_decode(ctx, s.shape(), sattn::dense{});
  bench::timed_case c{.from_memory = true, .smoke = s.smoke};
  c.prepare = [&] { update.prepare(cache, token); };  // the probe then empties the caches
  c.reference = [&] { whole.attend(ctx, reference); };
  c.run = [&] { update.run(cache, token); };
  const bench::timings t = measure(state, c);
  state.counters["update_us"] = bench::median(t.run) * 1e6;
  state.counters["share_of_decode"] = bench::median(t.ratio) / static_cast<double>(kv_heads);
}

template <class F>
void add(const setting& s, const std::string& what, F run) {
  benchmark::RegisterBenchmark(text(s.name(), what, s.smoke ? "/smoke" : "").c_str(),
                               [=](benchmark::State& state) { run(state, s); })
      ->Unit(benchmark::kMillisecond);
}

void add_dense(const setting& s) {
  add(s, "dense", [](auto& state, const setting& of) {
    run_attention(state, of, dense, of.group == 1 ? rival::none : rival::one_head);
  });
}
void add_pages(const setting& s, const std::string& density) {
  add(s, text("pages", s.page_size, "/density", density),
      [=](auto& state, const setting& of) {
        run_attention(state, of, pages(of.page_size, std::stod(density)), rival::dense);
      });
}
/// Several tokens of a step, all keys; pages for all of them, or for each its own.
void add_rows(const setting& s) {
  const auto with = [&](const std::string& name, const pattern_maker& make) {
    add(s, name, [=](auto& state, const setting& of) {
      run_attention(state, of, make, rival::one_row);
    });
  };
  with("dense", dense);
  with("shared_pages/density0.125", pages(s.page_size, 0.125, s.rows));
  with("own_pages/density0.125", pages(s.page_size, 0.125));
}
void add_updates(const setting& s, dtype summaries, index_t kv_heads) {
  const index_t tokens = s.tokens + s.page_size / 2;
  for (const cache_update& update : cache_updates(tokens, s.page_size, kv_heads)) {
    const auto name = text(update.name, '/', name_of(summaries), "/h", kv_heads);
    add(s, name, [=](auto& state, const setting& of) {
      run_update(state, of, update, summaries, kv_heads);
    });
  }
}
void add_quest(const setting& s, dtype summary_type) {
  add(s, text("quest_", name_of(summary_type), "/budget1024"),
      [=](auto& state, const setting& of) { run_quest(state, of, summary_type, 1024); });
}

void add_cases(bool long_ones) {
  const setting smoke{.type = dtype::f16, .group = 4, .dim = 64, .tokens = 2048, .page_size = 16,
                      .smoke = true};
  add_dense(smoke);
  add_pages(smoke, "0.25");
  add_quest(smoke, dtype::i8);
  add(smoke, "mass", run_mass);
  add_updates(smoke, dtype::i8, 2);
  setting draft = smoke;
  draft.rows = 4;
  add_rows(draft);

  for (const dtype type :
       {dtype::f32, dtype::f16, dtype::bf16, dtype::i8, dtype::q8_0}) {
    for (const index_t group : {1, 2, 4, 8}) add_dense({.type = type, .group = group});
  }
  for (const index_t group : {3, 5, 6, 7, 16}) add_dense({.group = group});
  for (const index_t dim : {64, 96, 256}) {
    for (const index_t group : {1, 4}) add_dense({.group = group, .dim = dim});
  }
  add_dense({.group = 1, .dim = 576, .v_dim = 512});
  add_dense({.group = 16, .dim = 576, .v_dim = 512});
  add({.type = dtype::f32, .group = 4}, "eigen", [](auto& state, const setting& s) {
    run_attention(state, s, dense, rival::eigen);
  });
  for (const index_t group : {1, 4}) {
    for (const index_t page_size : {16, 32, 64}) {
      for (const char* density : {"0.25", "0.125", "0.0625"}) {
        add_pages({.group = group, .page_size = page_size}, density);
      }
    }
  }
  for (const index_t tokens : {32768, 131072}) {
    if (tokens > 32768 && !long_ones) continue;
    for (const dtype type : {dtype::f16, dtype::i8}) {
      add_quest({.group = 4, .tokens = tokens, .page_size = 16}, type);
    }
  }
  const setting paged{.group = 4, .page_size = 16};
  add_updates(paged, dtype::f16, 1);
  add_updates(paged, dtype::i8, 8);
  for (const index_t tokens : {2, 4, 8}) {
    draft = paged;
    draft.rows = tokens;
    add_rows(draft);
  }
  for (const index_t group : {1, 4}) add({.group = group}, "mass", run_mass);
  for (const dtype type : {dtype::f32, dtype::f16}) {
    for (const index_t group : {1, 4}) {
      const setting s{.type = type, .group = group};
      add(s, "dense/threads2", [](auto& state, const setting& of) {
        run_attention(state, of, dense, rival::one_thread);
      });
      add(s, "batch8/threads2", run_batch);
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return bench::bench_main(argc, argv, add_cases); }
