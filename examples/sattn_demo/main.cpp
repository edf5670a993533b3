// SPDX-License-Identifier: Apache-2.0
//
// sattn-demo: every method on real attention tensors at several budgets, against dense attention:
// how much each computes, how long it takes and what it loses.

#include "layer.hpp"
#include "masks.hpp"
#include "measure.hpp"
#include "report.hpp"
#include "steps.hpp"

#include <sattn/sattn.hpp>
#include <sattn/simd/cpu.hpp>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;

// Before the initialisers of libraries, which the compiler may have written with instructions that
// this CPU lacks.
[[gnu::constructor(101)]] void check_cpu() {
  __builtin_cpu_init();
  if (sattn::simd::cpu_supports<sattn::arch::native>()) return;
  std::fprintf(stderr, "sattn-demo: this CPU does not have %s, which it was compiled for\n",
               sattn::arch::native::name);
  std::_Exit(1);
}

struct arguments {
  std::string folder;
  std::string q, k, v;
  std::string layer;
  std::vector<std::string> methods;
  std::string masks;
  int threads = 0;
  int repeats = 3;
  bool json = false;
  bool list = false;
};

void declare(CLI::App& app, arguments& a) {
  app.add_option("folder", a.folder, "Folder with NAME_q, NAME_k and NAME_v .safetensors")
      ->type_name("DIR");
  CLI::Option* const q = app.add_option("--q", a.q, "Queries [token, head, dim], F16, BF16 or F32");
  CLI::Option* const k = app.add_option("--k", a.k, "Keys [token, kv head, dim]");
  CLI::Option* const v = app.add_option("--v", a.v, "Values [token, kv head, dim]");
  for (CLI::Option* const option : {q, k, v}) option->type_name("FILE");
  q->needs(k)->needs(v);
  k->needs(q);
  v->needs(q);
  app.add_option("--layer", a.layer, "Name of the layer in the output")->type_name("NAME");
  app.add_option("--methods", a.methods, "Only these, separated by commas")
      ->delimiter(',')
      ->check(CLI::IsMember(demo::method_names(demo::all_methods())))
      ->type_name("LIST");
  app.add_flag("--list", a.list, "Name the methods and their budgets, and run none");
  app.add_option("--masks", a.masks, "Draw the masks, one panel for each head, into this PNG file")
      ->type_name("FILE");
  app.add_option("--threads", a.threads, "Threads, default all cores")
      ->check(CLI::Range(1, 4096))
      ->type_name("N");
  app.add_option("--repeat", a.repeats, "Runs of which the best counts, default 3")
      ->check(CLI::Range(1, 1000))
      ->type_name("N");
  app.add_flag("--json", a.json, "One JSON object for each line of the table, and nothing else");
}

std::vector<demo::layer_files> wanted_layers(const arguments& a) {
  std::vector<demo::layer_files> layers;
  if (!a.q.empty()) {
    layers.push_back({fs::path(a.q).stem().string(), a.q, a.k, a.v});
  } else if (!a.folder.empty()) {
    layers = demo::find_layers(a.folder);
  } else {
    throw std::runtime_error("give a folder, or --q, --k and --v");
  }
  if (!a.layer.empty()) {
    if (layers.size() > 1) {
      throw std::runtime_error("--layer names one layer, " + a.folder + " has " +
                               std::to_string(layers.size()));
    }
    layers.front().name = a.layer;
  }
  return layers;
}

// The named ones of all, and dense attention in their phases.
std::vector<demo::method> wanted_methods(const std::vector<std::string>& names) {
  std::vector<demo::method> methods = demo::all_methods();
  const auto named = [&](const demo::method& m) {
    return names.empty() || std::find(names.begin(), names.end(), m.name) != names.end();
  };
  const std::vector<demo::method> all = methods;
  std::erase_if(methods, [&](const demo::method& m) {
    const bool beside = m.name == "dense" && std::ranges::any_of(all, [&](const demo::method& o) {
      return o.when == m.when && o.name != "dense" && named(o);
    });
    return !named(m) && !beside;
  });
  return methods;
}

// One picture per layer: further layers get their name into the file's.
fs::path picture_file(const arguments& a, const std::string& layer, bool several) {
  const fs::path file = a.masks;
  if (!several) return file;
  return file.parent_path() / (file.stem().string() + "_" + layer + file.extension().string());
}

void run_layer(sattn::context& ctx, const arguments& a, const demo::layer_files& files,
               const std::vector<demo::method>& methods, const fs::path& picture) {
  const demo::layer layer = demo::load_layer(files);
  if (!a.json) demo::print_heading(layer, ctx, a.repeats);
  const auto run_phase = [&](auto& bench, demo::phase when) {
    std::vector<demo::measurement> all;
    if (!a.json) demo::print_phase(when, layer);
    for (const demo::method& m : methods) {
      if (m.when != when) continue;
      demo::print_step(m.name + " " + m.budget);
      all.push_back(bench.run(m));
      demo::print_step("");
      a.json ? demo::print_json(layer.name, all.back()) : demo::print_line(all.back());
    }
    if (!a.json) demo::print_conclusions(all);
  };
  const auto wanted = [&](demo::phase when) {
    return std::ranges::any_of(methods, [&](const demo::method& m) { return m.when == when; });
  };
  if (wanted(demo::phase::prefill)) {
    demo::print_step("dense attention, in float and in double");
    demo::layer_bench bench(ctx, layer, a.repeats);
    run_phase(bench, demo::phase::prefill);
  }
  const bool steps = wanted(demo::phase::decode) || wanted(demo::phase::cache);
  if (steps && demo::step_bench::steps_of(layer) > 0) {
    demo::print_step("the prompt, for what decoding and caches look at");
    demo::step_bench bench(ctx, layer, a.repeats);
    for (const demo::phase when : {demo::phase::decode, demo::phase::cache}) {
      if (wanted(when)) run_phase(bench, when);
    }
  }
  if (!picture.empty()) {
    demo::print_step("drawing the masks");
    demo::write_masks(picture, ctx, layer, methods);
    demo::print_step("");
    std::fprintf(stderr, "sattn-demo: the masks are in %s\n", picture.c_str());
  }
}

void run(const arguments& a) {
  std::vector<demo::method> methods = wanted_methods(a.methods);
  if (a.list) {
    for (const demo::method& m : methods) {
      std::printf("%-8s %-23s %s\n", demo::phase_names[static_cast<std::size_t>(m.when)],
                  m.name.c_str(), m.budget.c_str());
    }
    return;
  }
  const std::vector<demo::layer_files> layers = wanted_layers(a);
  sattn::context ctx(a.threads);
  for (const demo::layer_files& files : layers) {
    const fs::path picture =
        a.masks.empty() ? fs::path() : picture_file(a, files.name, layers.size() > 1);
    run_layer(ctx, a, files, methods, picture);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    CLI::App app{"Sparse attention on real tensors: density, time, error and recall by method"};
    arguments a;
    declare(app, a);
    CLI11_PARSE(app, argc, argv);
    run(a);
  } catch (const std::exception& e) {
    demo::print_step("");
    std::fprintf(stderr, "sattn-demo: %s\n", e.what());
    return 1;
  }
  return 0;
}
