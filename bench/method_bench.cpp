// SPDX-License-Identifier: Apache-2.0
//
// Methods end to end: estimate, plan, attention, against our own dense attention on the same data.
//
//   method/prefill/<method>/d128/n<tokens>/density<wanted>         one head, causal, one thread
//   method/prefill/<method>/d128/n<tokens>/published               with the defaults of its source
//   method/decode/<method>/f16/g4/d128/n<tokens>/budget1024        one token, 4 query heads, 1 kv
//   method/decode/<method>/f16/g4/d128/n<tokens>/coverage0.85      head (duo: 2, of which one
//   method/decode/<method>/f16/g4/d128/n<tokens>/gates0.50         retrieves)
//   method/decode/<method>/f16/g4/d128/n<tokens>/published
//   method/cache/<method>/f16/g4/d128/n<tokens>/budget1024         one layer of 2 kv heads
//
// Counters: density = executed / legal pairs, density_selected = selected / legal; recall =
// attention mass of the selected keys, mean over rows (of a cache: what 64 later tokens give to the
// prompt). Prefill and decode: speedup = dense / (estimate + plan + attention); estimate_share of
// the latter. Where a published budget holds all keys the plan is dense, and the method loses by
// its estimate. Caches: choose_ms and evict_ms behind the prompt; share_of_dense_prefill = both
// over dense attention of that layer's prompt, which is run once; density = kept / all keys. h2o
// chooses by what the prompt's attention summed up meanwhile: dense_with_mass_ms, of one run too.
//
// Prefill budgets are searched for until the executed density is the one wanted, before anything is
// timed. Prompts have what methods look for: neighbours alike, a sink, and noise; keys that
// decoding reads are random.

#include "support/measure.hpp"
#include "support/method_cache.hpp"
#include "support/method_decode.hpp"
#include "support/method_prefill.hpp"

int main(int argc, char** argv) {
  return bench::bench_main(argc, argv, [](bool /*long_ones*/) {
    bench::add_prefill_cases();
    bench::add_decode_cases();
    bench::add_cache_cases();
  });
}
