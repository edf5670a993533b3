// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <limits>

namespace test_support {

inline constexpr float infinity = std::numeric_limits<float>::infinity();
inline constexpr float quiet_nan = std::numeric_limits<float>::quiet_NaN();

}  // namespace test_support
