// SPDX-License-Identifier: Apache-2.0
//
// What this machine can do at most, measured here and now: the denominators of every fraction.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <fstream>
#include <sattn/kernel/kernel_table.hpp>
#include <sattn/parallel/thread_pool.hpp>
#include <sattn/simd/vec.hpp>
#include <string>
#include <vector>

namespace bench {

using vec = sattn::simd::vec<sattn::arch::native>;

/// Wall clock: time lost to other programs shows, as it does for a user.
template <class F>
double seconds_of(F&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Flops per second of independent chains of fused multiply-adds: the best of a few bursts.
inline double fma_rate() {
  constexpr int chains = 12;  // latency 4 on 2 units needs 8; 12 and two constants fit 16 registers
  constexpr int trips = 100000;
  const auto burst = [] {
    const vec half = vec::broadcast(0.5f);
    const vec one = vec::broadcast(1.0f);
    vec acc[chains];
    for (vec& a : acc) a = one;
    for (int i = 0; i < trips; ++i) {
      sattn::simd::unroll<chains>(
          [&](auto c) SATTN_INLINE_LAMBDA { acc[c] = sattn::simd::fma(acc[c], half, one); });
    }
    for (vec& a : acc) benchmark::DoNotOptimize(a.reg);
  };
  const double seconds = std::min({seconds_of(burst), seconds_of(burst), seconds_of(burst)});
  return 2.0 * vec::width * chains * trips / seconds;
}

/// Bytes that no cache of this machine holds.
inline std::ptrdiff_t uncached_bytes() {
  int largest = 0;
  for (const auto& cache : benchmark::CPUInfo::Get().caches) {
    largest = std::max(largest, cache.size);
  }
  return std::max(std::ptrdiff_t{128} << 20, 4 * std::ptrdiff_t{largest});
}

/// Bytes per second of a linear read, by so many threads each its part, with prefetches as far
/// ahead as reads are fastest. Leaves nothing of what the caches held before.
inline double read_rate(std::ptrdiff_t threads = 1) {
  static const std::vector<float> memory(static_cast<std::size_t>(uncached_bytes() / 4), 1.0f);
  constexpr int sums = 8;
  constexpr int line = 16;
  constexpr std::size_t ahead = 1024;
  const auto read = [](const float* first, std::size_t count) {
    vec acc[sums];
    for (vec& a : acc) a = vec::zero();
    for (std::size_t at = 0; at + sums * vec::width <= count; at += sums * vec::width) {
      const float* const later = first + at + ahead;
      sattn::simd::unroll<sums * vec::width / line>(
          [&](auto i) SATTN_INLINE_LAMBDA { sattn::simd::prefetch(later + i * line); });
      sattn::simd::unroll<sums>([&](auto i) SATTN_INLINE_LAMBDA {
        acc[i] = acc[i] + vec::load(first + at + i * vec::width);
      });
    }
    for (vec& a : acc) benchmark::DoNotOptimize(a.reg);
  };
  double seconds = 0;
  if (threads == 1) {
    seconds = seconds_of([&] { read(memory.data(), memory.size()); });
  } else {
    static sattn::thread_pool pool(threads);
    const std::size_t part = memory.size() / static_cast<std::size_t>(threads);
    seconds = seconds_of([&] {
      pool.parallel_for(threads, [&](std::ptrdiff_t i, std::ptrdiff_t) {
        read(memory.data() + static_cast<std::size_t>(i) * part, part);
      });
    });
  }
  return static_cast<double>(memory.size() * sizeof(float)) / seconds;
}

/// Puts what the numbers depend on into the report.
inline void describe_machine() {
  std::string machine;  // family, model, name
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line) && line.find("stepping") != 0;) {
    if (line.find("cpu family") == 0 || line.find("model") == 0) {
      machine += line.substr(std::min(line.size(), line.find(':') + 1));
    }
  }
  benchmark::AddCustomContext("machine", machine);
  benchmark::AddCustomContext("compiler", SATTN_BENCH_COMPILER);
  benchmark::AddCustomContext("flags", SATTN_BENCH_FLAGS);
  benchmark::AddCustomContext("kernels", sattn::kernels<sattn::arch::native>().name);
}

}  // namespace bench
