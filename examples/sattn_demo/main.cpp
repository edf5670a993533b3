// SPDX-License-Identifier: Apache-2.0
//
// sattn-demo: every method on real attention tensors at several budgets, against dense attention:
// how much each computes, how long it takes and what it loses.

#include "layer.hpp"
#include "masks.hpp"
#include "methods.hpp"
#include "prompt_bench.hpp"
#include "report.hpp"
#include "step_bench.hpp"

#include <sattn/sattn.hpp>
#include <sattn/simd/cpu.hpp>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <functional>
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
  std::string name;
  demo::setting_sources settings;
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
  app.add_option("--name", a.name, "Name of the layer in the output")->type_name("NAME");
  app.add_option("--layer", a.settings.layer,
                 "Its number in the model, from 0; default \"layer\" of the queries' metadata, "
                 "or else the middle one")
      ->check(CLI::NonNegativeNumber)
      ->type_name("N");
  app.add_option("--layers", a.settings.layers,
                 "Layers of the model; default \"layers\" of the metadata, or else " +
                     std::to_string(demo::usual_layers) + " and no fewer than there must be")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  app.add_option("--minference", a.settings.minference,
                 "JSON of MInference, for minference_heads; default made up")
      ->type_name("FILE");
  app.add_option("--duo", a.settings.duo,
                 "full_attention_heads.tsv of DuoAttention, for duo; half of all heads stream; "
                 "default made up")
      ->type_name("FILE");
  app.add_option("--methods", a.methods, "Only these, separated by commas")
      ->delimiter(',')
      ->check(CLI::IsMember(demo::method_names(demo::all_methods({}))))
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
  if (layers.size() > 1 && (!a.name.empty() || a.settings.layer)) {
    throw std::runtime_error("--name and --layer are of one layer, " + a.folder + " has " +
                             std::to_string(layers.size()));
  }
  if (!a.name.empty()) layers.front().name = a.name;
  return layers;
}

// The named ones of all, and dense attention in their phases.
std::vector<demo::method> wanted_methods(const arguments& a) {
  const std::vector<demo::method> all = demo::all_methods(a.settings);
  const auto named = [&](const demo::method& m) {
    return a.methods.empty() || std::ranges::find(a.methods, m.name) != a.methods.end();
  };
  std::vector<demo::method> methods = all;
  std::erase_if(methods, [&](const demo::method& m) {
    const bool beside = m.name == "dense" && std::ranges::any_of(all, [&](const demo::method& o) {
      return o.when == m.when && o.name != "dense" && named(o);
    });
    return !named(m) && !beside;
  });
  return methods;
}

void check_pictured(const std::vector<demo::method>& methods) {
  const auto pictured = [](const demo::method& m) { return m.pictured; };
  if (std::ranges::any_of(methods, pictured)) return;
  std::vector<demo::method> all = demo::all_methods({});
  std::erase_if(all, std::not_fn(pictured));
  std::string names;
  for (const std::string& name : demo::method_names(all)) names += " " + name;
  throw std::runtime_error("--masks: none of --methods is drawn, only" + names);
}

// One picture per layer: further layers get their name into the file's.
fs::path picture_file(const arguments& a, const std::string& layer, bool several) {
  const fs::path file = a.masks;
  if (!several) return file;
  return file.parent_path() / (file.stem().string() + "_" + layer + file.extension().string());
}

/// One layer: what is to run on it, and how many lines of measurements that gave.
class layer_run {
 public:
  layer_run(sattn::context& ctx, const arguments& a, const demo::layer_files& files,
            const std::vector<demo::method>& methods)
      : ctx_(ctx), a_(a), methods_(methods), layer_(demo::load_layer(files)),
        settings_(demo::make_settings(a.settings, layer_)) {}

  int measure() {
    if (!a_.json) demo::print_heading(layer_, settings_, ctx_, a_.repeats);
    if (wanted(demo::phase::prefill)) {
      demo::print_step("dense attention, in float and in double");
      demo::prompt_bench bench(ctx_, layer_, settings_, a_.repeats);
      run_phase(bench, demo::phase::prefill, [](const demo::method&) { return std::string(); });
    }
    if (wanted(demo::phase::decode) || wanted(demo::phase::cache)) measure_steps();
    return lines_;
  }

  void draw(const fs::path& picture) const {
    demo::print_step("drawing the masks");
    demo::write_masks(picture, ctx_, layer_, settings_, methods_);
    demo::print_step("");
    std::fprintf(stderr, "sattn-demo: the masks are in %s\n", picture.c_str());
  }

 private:
  bool wanted(demo::phase when) const {
    return std::ranges::any_of(methods_, [&](const demo::method& m) { return m.when == when; });
  }
  void measure_steps() {
    if (demo::step_bench::steps_of(layer_) == 0) {
      demo::print_left_out("decode and caches", "a single key has no prompt before it");
      return;
    }
    demo::print_step("the prompt, for what decoding and caches look at");
    demo::step_bench bench(ctx_, layer_, settings_, a_.repeats);
    for (const demo::phase when : {demo::phase::decode, demo::phase::cache}) {
      run_phase(bench, when, [&](const demo::method& m) { return bench.obstacle(m); });
    }
  }
  /// obstacle(method): why it cannot run, or nothing.
  template <class Bench, class F>
  void run_phase(Bench& bench, demo::phase when, F obstacle) {
    std::vector<demo::measurement> all;
    const std::string phase = demo::phase_names[static_cast<std::size_t>(when)];
    for (const demo::method& m : methods_) {
      if (m.when != when) continue;
      if (const std::string why = obstacle(m); !why.empty()) {
        demo::print_left_out(phase + ", " + m.name + " " + m.budget, why);
        continue;
      }
      if (!a_.json && all.empty()) demo::print_phase(when, layer_);
      demo::print_step(m.name + " " + m.budget);
      all.push_back(bench.run(m));
      demo::print_step("");
      a_.json ? demo::print_json(layer_.name, all.back()) : demo::print_line(all.back());
    }
    if (!a_.json && !all.empty()) demo::print_conclusions(all);
    lines_ += static_cast<int>(all.size());
  }

  sattn::context& ctx_;
  const arguments& a_;
  const std::vector<demo::method>& methods_;
  demo::layer layer_;
  demo::settings settings_;
  int lines_ = 0;
};

void list(const std::vector<demo::method>& methods) {
  for (const demo::method& m : methods) {
    std::printf("%-8s %-17s %s\n", demo::phase_names[static_cast<std::size_t>(m.when)],
                m.name.c_str(), m.budget.c_str());
  }
}

void run(const arguments& a) {
  const std::vector<demo::method> methods = wanted_methods(a);
  if (a.list) return list(methods);
  if (!a.masks.empty()) check_pictured(methods);
  const std::vector<demo::layer_files> layers = wanted_layers(a);
  sattn::context ctx(a.threads);
  int lines = 0;
  for (const demo::layer_files& files : layers) {
    layer_run run(ctx, a, files, methods);
    lines += run.measure();
    if (!a.masks.empty()) run.draw(picture_file(a, files.name, layers.size() > 1));
  }
  if (lines == 0) throw std::runtime_error("nothing could run");
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
