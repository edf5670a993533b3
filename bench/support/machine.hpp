// SPDX-License-Identifier: Apache-2.0
//
// What this machine can do at most, measured here and now: the denominators of every fraction.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <fstream>
#include <sattn/kernel/kernel_table_impl.hpp>
#include <sattn/simd/vec.hpp>
#include <string>
#include <vector>

namespace bench {

/// Wall clock: a core shared with others shows as time, as it does for a user.
template <class F>
double seconds_of(F&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Flops per second of independent chains of fused multiply-adds: the best of a few bursts.
inline double fma_rate() {
  using vec = sattn::simd::vec<sattn::arch::native>;
  constexpr int chains = 12;  // latency 4 x 2 units on Zen and recent Intel need 8; 12 fit 16 registers
  constexpr int trips = 100000;
  double best = 0;
  for (int burst = 0; burst < 3; ++burst) {
    const double seconds = seconds_of([] {
      const vec half = vec::broadcast(0.5f);
      const vec one = vec::broadcast(1.0f);
      vec acc[chains];
      for (vec& a : acc) a = vec::zero();
      for (int i = 0; i < trips; ++i) {
        sattn::simd::unroll<chains>([&](auto c) SATTN_INLINE_LAMBDA {
          acc[c] = sattn::simd::fma(acc[c], half, one);
        });
      }
      for (vec& a : acc) benchmark::DoNotOptimize(a.reg);
    });
    best = std::max(best, 2.0 * vec::width * chains * trips / seconds);
  }
  return best;
}

/// Bytes that no cache of this machine holds.
inline std::size_t uncached_bytes() {
  int largest = 0;
  for (const auto& cache : benchmark::CPUInfo::Get().caches) largest = std::max(largest, cache.size);
  return std::max<std::size_t>(128u << 20, 4 * static_cast<std::size_t>(largest));
}

/// Linear reads from memory. Each call also empties the caches of what was there before.
class read_probe {
 public:
  read_probe() : memory_(uncached_bytes() / sizeof(float), 1.0f) {}

  /// Bytes per second.
  double rate() const {
    using vec = sattn::simd::vec<sattn::arch::native>;
    constexpr std::size_t step = 8;
    const double seconds = seconds_of([&] {
      vec acc[step];
      for (vec& a : acc) a = vec::zero();
      const float* p = memory_.data();
      const float* const end = p + memory_.size() / (step * vec::width) * (step * vec::width);
      for (; p != end; p += step * vec::width) {
        sattn::simd::unroll<static_cast<int>(step)>([&](auto i) SATTN_INLINE_LAMBDA {
          acc[i] = acc[i] + vec::load(p + i * vec::width);
        });
      }
      for (vec& a : acc) benchmark::DoNotOptimize(a.reg);
    });
    return static_cast<double>(memory_.size() * sizeof(float)) / seconds;
  }

 private:
  std::vector<float> memory_;
};

/// Puts what the numbers depend on into the report.
inline void describe_machine() {
  std::ifstream info("/proc/cpuinfo");
  std::string model = "unknown";
  std::string stepping;
  for (std::string line; std::getline(info, line) && line.rfind("flags", 0) != 0;) {
    const std::size_t colon = line.find(": ");
    if (colon == std::string::npos) continue;
    if (line.rfind("model name", 0) == 0) model = line.substr(colon + 2);
    if (line.rfind("cpu family", 0) == 0) stepping = " family " + line.substr(colon + 2);
    if (line.rfind("model\t", 0) == 0) stepping += " model " + line.substr(colon + 2);
  }
  benchmark::AddCustomContext("machine", model + stepping);
  benchmark::AddCustomContext("compiler", SATTN_BENCH_COMPILER);
  benchmark::AddCustomContext("flags", SATTN_BENCH_FLAGS);
  benchmark::AddCustomContext("kernels", sattn::kernels<sattn::arch::native>().name);
}

}  // namespace bench
