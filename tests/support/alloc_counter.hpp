// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace test_support {

/// Counts calls of operator new, in all threads. Linking alloc_counter.cpp into a program replaces
/// the global operators there. malloc and mmap called directly are not counted.
struct allocation_count {
  /// Since the program started; compare two values.
  static std::size_t current();
};

}  // namespace test_support
