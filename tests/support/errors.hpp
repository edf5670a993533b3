// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/error.hpp>
#include <string>

namespace test_support {

/// What the error thrown by `call` says; empty if it throws none.
template <class Error = sattn::shape_error, class F>
std::string error_of(F&& call) {
  try {
    call();
  } catch (const Error& e) {
    return e.what();
  }
  return {};
}

}  // namespace test_support
