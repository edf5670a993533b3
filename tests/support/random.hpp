// SPDX-License-Identifier: Apache-2.0
//
// Seeded random data that is the same with every standard library: the standard fixes the engine's
// numbers, but not those of the distributions.
#pragma once

#include <stdexcept>
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <numbers>
#include <random>
#include <string>
#include <vector>

namespace test_support {

/// SATTN_TEST_SEED from the environment (decimal or 0x...), or a fixed default.
inline std::uint64_t test_seed() {
  constexpr std::uint64_t default_seed = 20240607;
  const char* text = std::getenv("SATTN_TEST_SEED");
  return text == nullptr ? default_seed : std::strtoull(text, nullptr, 0);
}

/// While it lives, every failure prints the seed: `const seed_trace trace;` at the start of a test.
class seed_trace {
 public:
  explicit seed_trace(std::uint64_t seed = test_seed(), const char* file = __builtin_FILE(),
                      int line = __builtin_LINE())
      : trace_(file, line, "SATTN_TEST_SEED=" + std::to_string(seed)) {}

 private:
  ::testing::ScopedTrace trace_;
};

class random_source {
 public:
  explicit random_source(std::uint64_t seed = test_seed()) : engine_(seed) {}

  /// In [begin, end), which is not empty. The bias of the remainder is below 2^-32 for ranges a
  /// test uses.
  std::ptrdiff_t integer(std::ptrdiff_t begin, std::ptrdiff_t end) {
    if (begin >= end) throw std::logic_error("random_source: an empty range");
    const auto width = static_cast<std::uint64_t>(end - begin);
    return begin + static_cast<std::ptrdiff_t>(engine_() % width);
  }

  /// In (0, 1).
  double uniform() { return (static_cast<double>(engine_() >> 11) + 0.5) * 0x1p-53; }

  /// Mean 0, standard deviation 1 (Box and Muller).
  double normal() {
    const double radius = std::sqrt(-2 * std::log(uniform()));
    return radius * std::cos(2 * std::numbers::pi * uniform());
  }

  std::vector<float> normal_tensor(std::ptrdiff_t size) {
    std::vector<float> x(static_cast<std::size_t>(size));
    for (float& value : x) value = static_cast<float>(normal());
    return x;
  }

  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[integer(0, static_cast<std::ptrdiff_t>(choices.size()))];
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace test_support
