// SPDX-License-Identifier: Apache-2.0
#include <sattn/core/tensor_view.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "support/errors.hpp"
#include "support/random.hpp"

namespace {

using sattn::check_view;
using sattn::check_writable;
using sattn::hnd;
using sattn::index_t;
using sattn::may_overlap;
using sattn::nhd;
using sattn::shape_error;
using sattn::tensor_view;
using test_support::error_of;
using test_support::random_source;
using test_support::seed_trace;

constexpr index_t huge = std::numeric_limits<index_t>::max();

// ---- layouts

TEST(tensor_view, nhd_walks_heads_inside_tokens_and_hnd_tokens_inside_heads) {
  std::array<float, 2 * 3 * 4> memory{};
  const tensor_view<float> by_token = nhd(memory.data(), 2, 3, 4);
  const tensor_view<float> by_head = hnd(memory.data(), 2, 3, 4);
  for (index_t token = 0; token < 2; ++token) {
    for (index_t head = 0; head < 3; ++head) {
      EXPECT_EQ(by_token.row(token, head) - memory.data(), (token * 3 + head) * 4);
      EXPECT_EQ(by_head.row(token, head) - memory.data(), (head * 2 + token) * 4);
    }
  }
}

TEST(tensor_view, slice_keeps_the_strides_and_starts_at_its_first_token) {
  std::array<float, 5 * 2 * 3> memory{};
  for (const tensor_view<float> whole :
       {nhd(memory.data(), 5, 2, 3), hnd(memory.data(), 5, 2, 3)}) {
    const tensor_view<float> part = whole.slice(2, 4);
    EXPECT_EQ(part.tokens, 2);
    EXPECT_EQ(part.row(0, 1), whole.row(2, 1));
    EXPECT_EQ(part.row(1, 0), whole.row(3, 0));
    EXPECT_TRUE(whole.slice(3, 3).empty());
  }
}

TEST(tensor_view, converts_to_a_view_of_const_and_is_empty_without_elements) {
  std::array<float, 6> memory{};
  const tensor_view<const float> view = nhd(memory.data(), 1, 2, 3);
  EXPECT_EQ(view.data, memory.data());
  EXPECT_EQ(view.head_stride, 3);
  EXPECT_FALSE(view.empty());
  EXPECT_TRUE(tensor_view<float>{}.empty());
  EXPECT_TRUE(nhd(memory.data(), 0, 2, 3).empty());
  EXPECT_TRUE(nhd(memory.data(), 1, 0, 3).empty());
  EXPECT_TRUE(nhd(memory.data(), 1, 2, 0).empty());
}

TEST(view_of, takes_three_axes_in_any_strides) {
  std::array<float, 24> memory{};
  const std::vector<index_t> extents = {2, 3, 4};
  const std::vector<index_t> strides = {4, 8, 1};
  const tensor_view<float> view =
      sattn::view_of(memory.data(), std::span<const index_t>(extents), strides);
  EXPECT_EQ(view.tokens, 2);
  EXPECT_EQ(view.heads, 3);
  EXPECT_EQ(view.dim, 4);
  EXPECT_EQ(view.row(1, 2), memory.data() + 20);
}

TEST(view_of, refuses_other_ranks_and_a_scattered_dim) {
  std::array<float, 24> memory{};
  const auto message = [&](const std::vector<index_t>& extents,
                           const std::vector<index_t>& strides) {
    return error_of([&] {
      sattn::view_of(memory.data(), std::span<const index_t>(extents),
                     std::span<const index_t>(strides));
    });
  };
  EXPECT_NE(message({2, 12}, {12, 1}).find("rank 2 and 2 strides"), std::string::npos);
  EXPECT_NE(message({1, 2, 3, 4}, {24, 12, 4, 1}).find("rank 4"), std::string::npos);
  EXPECT_NE(message({2, 3, 4}, {12, 4}).find("rank 3 and 2 strides"), std::string::npos);
  EXPECT_NE(message({}, {}).find("rank 0"), std::string::npos);
  EXPECT_NE(message({2, 3, 4}, {12, 4, 2}).find("dim is 2"), std::string::npos);
  EXPECT_EQ(message({2, 3, 1}, {12, 4, 2}), "");  // a dim of one element has no stride
}

// ---- check_view

TEST(check_view, accepts_empty_views_without_data_and_broadcast_strides) {
  std::array<float, 4> memory{};
  EXPECT_NO_THROW(check_view("q", tensor_view<float>{}));
  EXPECT_NO_THROW(check_view("q", nhd<float>(nullptr, 0, 8, 64)));
  EXPECT_NO_THROW(check_view("k", tensor_view<float>{memory.data(), 100, 8, 4, 0, 0}));
}

TEST(check_view, names_the_view_and_the_fault) {
  std::array<float, 8> memory{};
  float* const p = memory.data();
  auto* const odd = reinterpret_cast<float*>(reinterpret_cast<std::byte*>(p) + 2);
  struct fault {
    tensor_view<float> view;
    const char* message;
  };
  const std::vector<fault> faults = {
      {{nullptr, 1, 2, 3, 6, 3}, "q: null data for extents [1, 2, 3]"},
      {{odd, 1, 1, 1, 1, 1}, "q: address is 2 bytes off the alignment of its type, 4"},
      {{p, -1, 2, 3, 6, 3}, "q: negative extent [-1, 2, 3]"},
      {{p, 1, -2, 3, 6, 3}, "q: negative extent [1, -2, 3]"},
      {{p, 1, 2, -3, 6, 3}, "q: negative extent [1, 2, -3]"},
      {{p, 1, 2, 3, -6, 3}, "q: negative stride [-6, 3, 1]"},
      {{p, 1, 2, 3, 6, -3}, "q: negative stride [6, -3, 1]"},
      {{p, index_t{1} << 31, 1, 1, 0, 0}, "q has 2147483648 tokens"},
      {{p, 3, 1, 1, huge / 2 + 1, 0}, "overflow the address space"},
      {{p, 1, 3, 1, 0, huge / 2 + 1}, "overflow the address space"},
      {{p, 2, 2, 1, huge / 2 + 1, huge / 2 + 1}, "overflow the address space"},
      {{p, 2, 1, 2, huge - 1, 0}, "overflow the address space"},
      {{p, 2, 1, 1, huge / 4 + 1, 0}, "overflow the address space"},  // in bytes only
  };
  for (const fault& f : faults) {
    const std::string message = error_of([&] { check_view("q", f.view); });
    EXPECT_NE(message.find(f.message), std::string::npos) << "got '" << message << "'";
    EXPECT_EQ(message.substr(0, 1), "q");
  }
}

TEST(check_view, allows_the_longest_sequence) {
  std::array<float, 1> memory{};
  const index_t longest = std::numeric_limits<sattn::token_t>::max();
  EXPECT_NO_THROW(check_view("k", tensor_view<float>{memory.data(), longest, 1, 1, 0, 0}));
}

// ---- check_writable and may_overlap against brute force

template <class T>
std::vector<std::uintptr_t> elements_of(const tensor_view<T>& view) {
  std::vector<std::uintptr_t> addresses;
  for (index_t token = 0; token < view.tokens; ++token) {
    for (index_t head = 0; head < view.heads; ++head) {
      for (index_t i = 0; i < view.dim; ++i) {
        addresses.push_back(reinterpret_cast<std::uintptr_t>(view.row(token, head) + i));
      }
    }
  }
  return addresses;
}

template <class T>
bool overlaps_itself(const tensor_view<T>& view) {
  const std::vector<std::uintptr_t> all = elements_of(view);
  return std::set<std::uintptr_t>(all.begin(), all.end()).size() != all.size();
}

template <class T, class U>
bool share_a_byte(const tensor_view<T>& a, const tensor_view<U>& b) {
  std::set<std::uintptr_t> bytes;
  for (const std::uintptr_t at : elements_of(a)) {
    for (std::size_t i = 0; i < sizeof(T); ++i) bytes.insert(at + i);
  }
  for (const std::uintptr_t at : elements_of(b)) {
    for (std::size_t i = 0; i < sizeof(U); ++i) {
      if (bytes.contains(at + i)) return true;
    }
  }
  return false;
}

tensor_view<float> random_view(random_source& random, float* memory) {
  return {memory + random.integer(0, 30), random.integer(0, 4),  random.integer(0, 4),
          random.integer(0, 4),           random.integer(0, 14), random.integer(0, 14)};
}

TEST(check_writable, accepts_both_nestings_with_padding_and_a_single_row) {
  std::array<float, 100> memory{};
  float* const p = memory.data();
  EXPECT_NO_THROW(check_writable("out", nhd(p, 3, 4, 5)));
  EXPECT_NO_THROW(check_writable("out", hnd(p, 3, 4, 5)));
  EXPECT_NO_THROW(check_writable("out", tensor_view<float>{p, 3, 4, 5, 25, 6}));
  EXPECT_NO_THROW(check_writable("out", tensor_view<float>{p, 3, 4, 5, 6, 25}));
  EXPECT_NO_THROW(check_writable("out", tensor_view<float>{p, 1, 1, 5, 0, 0}));
  EXPECT_NO_THROW(check_writable("out", tensor_view<float>{nullptr, 0, 4, 5, 0, 0}));
  EXPECT_THROW(check_writable("out", tensor_view<float>{nullptr, 1, 1, 1, 1, 1}), shape_error);
}

TEST(check_writable, refuses_every_view_whose_rows_meet_and_names_the_strides) {
  const seed_trace trace;
  random_source random;
  std::array<float, 200> memory{};
  int refused = 0;
  for (int n = 0; n < 20'000; ++n) {
    const tensor_view<float> view = random_view(random, memory.data());
    const std::string message = error_of([&] { check_writable("out", view); });
    if (overlaps_itself(view)) {
      ++refused;
      ASSERT_EQ(message, "out: rows of " + std::to_string(view.dim) +
                             " elements overlap each other with strides [" +
                             std::to_string(view.token_stride) + ", " +
                             std::to_string(view.head_stride) + ", 1]");
    }
  }
  EXPECT_GT(refused, 1000);
}

TEST(may_overlap, never_overlooks_a_shared_byte) {
  const seed_trace trace;
  random_source random;
  std::array<float, 200> memory{};
  int shared = 0;
  for (int n = 0; n < 50'000; ++n) {
    const tensor_view<float> a = random_view(random, memory.data());
    tensor_view<float> b = random_view(random, memory.data());
    if (random.integer(0, 2) == 0) b.token_stride = a.token_stride;
    if (random.integer(0, 2) == 0) b.head_stride = a.head_stride;
    if (!share_a_byte(a, b)) continue;
    ++shared;
    ASSERT_TRUE(may_overlap(a, b) && may_overlap(b, a))
        << "strides " << a.token_stride << ", " << a.head_stride << " and " << b.token_stride
        << ", " << b.head_stride << ", seed case " << n;
  }
  EXPECT_GT(shared, 1000);
}

TEST(may_overlap, compares_bytes_when_the_types_differ) {
  const seed_trace trace;
  random_source random;
  alignas(double) std::array<std::byte, 800> memory{};
  for (int n = 0; n < 10'000; ++n) {
    auto* const floats = reinterpret_cast<float*>(memory.data());
    auto* const doubles = reinterpret_cast<double*>(memory.data());
    const tensor_view<float> a = random_view(random, floats);
    const tensor_view<double> b = {doubles + random.integer(0, 10),
                                   random.integer(0, 4),
                                   random.integer(0, 4),
                                   random.integer(0, 3),
                                   random.integer(0, 8),
                                   random.integer(0, 8)};
    if (share_a_byte(a, b)) {
      ASSERT_TRUE(may_overlap(a, b) && may_overlap(b, a));
    }
  }
  // One double covers two floats, in an interleaved row of both.
  auto* const floats = reinterpret_cast<float*>(memory.data());
  const tensor_view<float> a = {floats, 4, 1, 2, 6, 2};
  const tensor_view<double> b = {reinterpret_cast<double*>(floats + 2), 4, 1, 2, 3, 2};
  EXPECT_FALSE(may_overlap(a, b));
  EXPECT_TRUE(may_overlap(tensor_view<float>{floats, 4, 1, 3, 6, 3}, b));
}

TEST(may_overlap, is_exact_for_parts_of_a_fused_row) {
  const seed_trace trace;
  random_source random;
  std::array<float, 400> memory{};
  int apart = 0;
  for (int n = 0; n < 10'000; ++n) {
    // [token, q | k | v | out ...]: two parts of rows of `width`.
    const index_t width = random.integer(4, 20);
    const auto part = [&] {
      const index_t heads = random.integer(1, 4);
      const index_t dim = random.integer(1, width / heads + 1);
      const index_t from = random.integer(0, width - heads * dim + 1);
      const index_t token = random.integer(0, 5);
      return tensor_view<float>{
          memory.data() + token * width + from, random.integer(2, 6), heads, dim, width, dim};
    };
    const tensor_view<float> a = part();
    const tensor_view<float> b = part();
    apart += !share_a_byte(a, b) ? 1 : 0;
    // Of tokens that do not even meet, only the range of addresses is compared.
    ASSERT_EQ(may_overlap(a, b), share_a_byte(a, b)) << "seed case " << n;
  }
  EXPECT_GT(apart, 1000);
}

TEST(may_overlap, is_exact_for_sequences_packed_by_head) {
  const seed_trace trace;
  random_source random;
  std::array<float, 600> memory{};
  int apart = 0;
  for (int n = 0; n < 10'000; ++n) {
    // [head, token, dim] of all sequences; a sequence is a run of its tokens.
    const index_t tokens = random.integer(2, 20);
    const index_t dim = random.integer(1, 5);
    const tensor_view<float> packed = hnd(memory.data(), tokens, 4, dim);
    const auto sequence = [&] {
      const index_t begin = random.integer(0, tokens);
      return packed.slice(begin, random.integer(begin + 1, tokens + 1));
    };
    const tensor_view<float> a = sequence();
    const tensor_view<float> b = sequence();
    apart += !share_a_byte(a, b) ? 1 : 0;
    ASSERT_EQ(may_overlap(a, b), share_a_byte(a, b)) << "seed case " << n;
  }
  EXPECT_GT(apart, 1000);
}

TEST(may_overlap, is_false_for_neighbours_and_for_empty_views) {
  std::array<float, 20> memory{};
  const tensor_view<float> a = nhd(memory.data(), 2, 1, 5);
  EXPECT_FALSE(may_overlap(a, nhd(memory.data() + 10, 2, 1, 5)));
  EXPECT_TRUE(may_overlap(a, nhd(memory.data() + 9, 2, 1, 5)));
  EXPECT_FALSE(may_overlap(a, nhd(memory.data(), 0, 1, 5)));
  EXPECT_TRUE(may_overlap(a, a));
}

}  // namespace
