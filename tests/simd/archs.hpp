// SPDX-License-Identifier: Apache-2.0
//
// The instruction sets that this program was compiled for, as types of a typed test.
#pragma once

#include <gtest/gtest.h>

#include <sattn/simd/arch.hpp>
#include <sattn/simd/cpu.hpp>
#include <string>

namespace test_support {

#if defined(__AVX512F__) && defined(__AVX512CD__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
using compiled_archs = ::testing::Types<sattn::arch::sse2, sattn::arch::avx2, sattn::arch::avx512>;
#else
using compiled_archs = ::testing::Types<sattn::arch::sse2, sattn::arch::avx2>;
#endif

struct arch_names {
  template <class Arch>
  static std::string GetName(int) {
    return Arch::name;
  }
};

/// Base of the fixtures: skips what this CPU cannot run.
template <class Arch>
class arch_test : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!sattn::simd::cpu_supports<Arch>()) GTEST_SKIP() << "this CPU lacks " << Arch::name;
  }
};

}  // namespace test_support
