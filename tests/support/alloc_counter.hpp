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

/// While it lives, one allocation of this thread fails: the one after `successes` others.
class failing_allocation {
 public:
  explicit failing_allocation(std::size_t successes);
  ~failing_allocation();
  failing_allocation(const failing_allocation&) = delete;
  failing_allocation& operator=(const failing_allocation&) = delete;
};

}  // namespace test_support
