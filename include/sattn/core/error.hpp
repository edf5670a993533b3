// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace sattn {

/// Base of everything the library throws (std::bad_alloc aside).
struct error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Extents, strides, positions or values that do not fit together; the message names both sides.
struct shape_error : error {
  using error::error;
};

/// A request that is well formed and that this version does not do.
struct unsupported : error {
  using error::error;
};

/// No room for what is asked; nothing has changed.
struct capacity_error : error {
  using error::error;
};

namespace detail {

template <class T>
std::string message_part(const T& part) {
  if constexpr (std::is_arithmetic_v<T>) {
    return std::to_string(part);
  } else {
    return std::string(std::string_view(part));
  }
}

}  // namespace detail

/// Throws Error with the parts joined, unless the condition holds. Numbers are printed as they are.
template <class Error = shape_error, class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]] {
    throw Error((detail::message_part(parts) + ...));
  }
}

}  // namespace sattn
