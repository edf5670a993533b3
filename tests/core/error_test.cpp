// SPDX-License-Identifier: Apache-2.0
#include <sattn/core/error.hpp>

#include <gtest/gtest.h>

#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "support/errors.hpp"

namespace {

using test_support::error_of;

static_assert(std::is_base_of_v<std::runtime_error, sattn::error>);
static_assert(std::is_base_of_v<sattn::error, sattn::shape_error>);
static_assert(std::is_base_of_v<sattn::error, sattn::unsupported>);
static_assert(!std::is_base_of_v<sattn::shape_error, sattn::unsupported>);

TEST(require, is_silent_when_the_condition_holds) {
  EXPECT_NO_THROW(sattn::require(true, "never seen ", 1));
}

TEST(require, throws_a_shape_error_unless_told_otherwise) {
  EXPECT_THROW(sattn::require(false, "text"), sattn::shape_error);
  EXPECT_THROW(sattn::require<sattn::unsupported>(false, "text"), sattn::unsupported);
}

TEST(require, joins_texts_and_numbers_as_they_are) {
  const std::string text = "out";
  const std::string_view view = " rows, q has ";
  EXPECT_EQ(error_of([&] {
              sattn::require(false, text, " has ", std::ptrdiff_t{-1024}, view,
                             std::numeric_limits<std::size_t>::max());
            }),
            "out has -1024 rows, q has 18446744073709551615");
}

TEST(error, carries_either_kind_to_one_handler) {
  EXPECT_EQ(error_of<sattn::error>([] { throw sattn::unsupported("bf16"); }), "bf16");
  EXPECT_EQ(error_of<sattn::error>([] { throw sattn::shape_error("3 != 4"); }), "3 != 4");
}

}  // namespace
