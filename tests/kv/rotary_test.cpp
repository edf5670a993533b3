// SPDX-License-Identifier: Apache-2.0

#include <sattn/kv/rotary.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <sattn/kv/paged_cache.hpp>
#include <vector>

#include "support/errors.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

// Element d of a row at a position: pair i turns by position * base^(-2 i / n).
double embedded(const float* row, index_t dim, const rotary_embedding& e, index_t position,
                index_t d) {
  const index_t n = e.dims == 0 ? dim - e.first : e.dims;
  if (d < e.first || d >= e.first + n) return double{row[d]};
  const index_t at_place = d - e.first;
  const bool halves = e.pairs == rotary_pairs::halves;
  const index_t pair = halves ? at_place % (n / 2) : at_place / 2;
  const bool second = halves ? at_place >= n / 2 : at_place % 2 == 1;
  const index_t x = e.first + (halves ? pair : 2 * pair);
  const index_t y = halves ? x + n / 2 : x + 1;
  const double frequency =
      e.frequencies.empty()
          ? std::pow(e.base, -2 * static_cast<double>(pair) / static_cast<double>(n))
          : e.frequencies[at(pair)];
  const double angle = static_cast<double>(position) * frequency;
  return second ? std::sin(angle) * double{row[x]} + std::cos(angle) * double{row[y]}
                : std::cos(angle) * double{row[x]} - std::sin(angle) * double{row[y]};
}

double largest(const float* row, index_t dim) {
  double top = 0;
  for (index_t d = 0; d < dim; ++d) top = std::max(top, std::abs(double{row[d]}));
  return top;
}

std::vector<rotary_embedding> embeddings() {
  return {{},
          {.base = 500000, .pairs = rotary_pairs::neighbours},
          {.first = 16, .dims = 6},
          {.first = 20, .pairs = rotary_pairs::neighbours, .frequencies = {1.0, 0.5}}};
}

// A row turned from one position to another is the row embedded there. Each of two turns rounds
// an element once, to 2^-24 of a length of at most sqrt(2) of the largest element, and the second
// turns the first's error; angles of up to 1e6 are off by 1e-10.
TEST(rotary, turned_rows_are_those_embedded_at_the_other_position) {
  const seed_trace trace;
  random_source random;
  constexpr index_t dim = 24;
  for (const rotary_embedding& e : embeddings()) {
    rotary rotation(e, dim);
    for (int round = 0; round < 200; ++round) {
      owned_tensor row(1, 1, dim), turned(1, 1, dim);
      row.fill_normal(random);
      const index_t from = random.integer(0, 1'000'000);
      const index_t to = random.integer(0, 3) == 0 ? from : random.integer(0, 1'000'000);
      std::copy_n(row.row(0, 0), dim, turned.row(0, 0));
      rotation.turn(turned.row(0, 0), from);
      const double bound = largest(row.row(0, 0), dim) * 1.5 * (2 * 0x1p-24 * 1.5 + 1e-9);
      for (index_t d = 0; d < dim; ++d) {
        ASSERT_NEAR(double{turned.row(0, 0)[d]}, embedded(row.row(0, 0), dim, e, from, d), bound);
      }
      rotation.turn(turned.row(0, 0), to - from);
      for (index_t d = 0; d < dim; ++d) {
        ASSERT_NEAR(double{turned.row(0, 0)[d]}, embedded(row.row(0, 0), dim, e, to, d), bound);
      }
      rotation.turn(turned.row(0, 0), -to);
      for (index_t d = 0; d < dim; ++d) {
        ASSERT_NEAR(double{turned.row(0, 0)[d]}, double{row.row(0, 0)[d]}, 2 * bound);
        if (d < e.first) {
          ASSERT_EQ(turned.row(0, 0)[d], row.row(0, 0)[d]);
        }
      }
    }
  }
}

TEST(rotary, says_what_does_not_fit) {
  const auto of = [](const rotary_embedding& e, index_t dim) {
    return error_of([&] { rotary rotation(e, dim); });
  };
  EXPECT_EQ(of({}, 8), "");
  EXPECT_NE(of({}, 7), "");
  EXPECT_NE(of({.first = 1}, 8), "");
  EXPECT_NE(of({.first = 9}, 8), "");
  EXPECT_NE(of({.first = -2}, 8), "");
  EXPECT_NE(of({.first = 4, .dims = 6}, 8), "");
  EXPECT_NE(of({.dims = 3}, 8), "");
  EXPECT_NE(of({.dims = -2}, 8), "");
  EXPECT_NE(of({.frequencies = {1.0}}, 8), "");
  EXPECT_NE(of({.base = 0}, 8), "");
  EXPECT_NE(of({.base = std::numeric_limits<double>::infinity()}, 8), "");
  EXPECT_NE(of({.dims = 2, .frequencies = {std::nan("")}}, 8), "");
  EXPECT_EQ(of({.dims = 2, .frequencies = {1.0}}, 8), "");
}

// Keys embedded at their positions, evicted, and there as if embedded where they are; a fork keeps
// what it had, and the summaries are those of the keys as they are.
template <class K>
void expect_turned_keys() {
  const seed_trace trace;
  random_source random;
  constexpr index_t dim = 32, tokens = 60;
  owned_tensor plain(tokens, 2, dim), k(tokens, 2, dim), v(tokens, 2, dim);
  plain.fill_normal(random);
  v.fill_normal(random);
  const rotary_embedding embedding{.base = 100};
  rotary rotation(embedding, dim);
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t h = 0; h < 2; ++h) {
      std::copy_n(plain.row(t, h), dim, k.row(t, h));
      rotation.turn(k.row(t, h), t);
    }
  }
  paged_kv_cache<K> cache({.kv_heads = 2, .head_dim = dim, .page_size = 8, .capacity = 200,
                           .summaries = dtype::f32});
  cache.append(k.view(), v.view());
  const paged_kv_cache<K> parent = cache.fork();
  std::vector<std::vector<token_t>> keep(2);
  for (token_t t = 0; t < tokens; ++t) {
    if (t < 10 || t % 3 == 0) keep[0].push_back(t);
    if (t >= 40) keep[1].push_back(t);
  }
  cache.evict(keep, embedding);
  const auto row_of = [](const stored_view& view, index_t token) {
    const auto key = static_cast<token_t>(token);
    const row_source rows = view.rows(0);
    const void* row = nullptr;
    float scale = 1;
    rows.locate(&key, 1, &row);
    if (has_row_scale(rows.type)) rows.read_scales(&key, 1, &scale);
    std::vector<float> values(at(dim));
    load_row(rows.type, row, scale, dim, values.data());
    return values;
  };
  // A type rounds a row as it comes, and again where it is turned; a turn can lengthen the error.
  const double step = dtype_of<K> == dtype::f32 ? 0x1p-22 : dtype_of<K> == dtype::f16 ? 0x1p-11
                                                                                      : 0.5 / 127;
  for (index_t h = 0; h < 2; ++h) {
    ASSERT_EQ(cache.tokens(h), std::ssize(keep[at(h)]));
    for (index_t i = 0; i < cache.tokens(h); ++i) {
      const index_t from = keep[at(h)][at(i)];
      const std::vector<float> before = row_of(parent.view(h).k, from);
      const std::vector<float> after = row_of(cache.view(h).k, i);
      const double top = 1.5 * largest(plain.row(from, h), dim);
      for (index_t d = 0; d < dim; ++d) {
        ASSERT_NEAR(double{after[at(d)]}, embedded(plain.row(from, h), dim, embedding, i, d),
                    3 * top * step)
            << "head " << h << ", key " << i << ", element " << d;
        ASSERT_NEAR(double{before[at(d)]}, double{k.row(from, h)[d]}, top * step);
      }
      if (i == from) {
        ASSERT_TRUE(bit_equal(before, after));
      }
      ASSERT_TRUE(bit_equal(row_of(cache.view(h).v, i), row_of(parent.view(h).v, from)));
    }
    page_summaries anew({dim, 8, dtype::f32});
    anew.update(cache.view(h).k, 0);
    for (index_t tile = 0; tile < anew.tiles(); ++tile) {
      const std::span want(static_cast<const float*>(anew.tile(tile)), at(2 * dim * 64));
      const std::span got(static_cast<const float*>(cache.summaries()[at(h)].tile(tile)),
                          at(2 * dim * 64));
      EXPECT_TRUE(bit_equal(got, want));
    }
  }
}

TEST(paged_cache, evicted_keys_turn_to_where_they_are) {
  expect_turned_keys<float>();
  expect_turned_keys<f16>();
  expect_turned_keys<std::int8_t>();
  expect_turned_keys<q8_0>();
}

template <class K>
void expect_unchanged_where_keys_cannot_turn(float size) {
  owned_tensor k(4, 1, 32), v(4, 1, 32);
  k.fill(size);
  v.fill(1);
  paged_kv_cache<K> cache({.head_dim = 32, .page_size = 2, .capacity = 8});
  cache.append(k.view(), v.view());
  const kv_view before = cache.view();
  const auto* const bytes = static_cast<const std::byte*>(before.k.data);
  const std::vector<std::byte> memory(bytes, bytes + before.k.pages.pool * before.k.pages.stride);
  const std::vector<std::vector<token_t>> keep{{0, 2}};
  // 45 degrees a position: one element becomes 1.41 times as large.
  const rotary_embedding eighth{.dims = 2, .frequencies = {std::acos(-1.0) / 4}};
  EXPECT_NE(error_of([&] { cache.evict(keep, eighth); }).find("key 2"), std::string::npos);
  EXPECT_NE(error_of([&] { cache.evict(keep, {.dims = 1}); }), "");
  EXPECT_EQ(cache.tokens(0), 4);
  EXPECT_EQ(cache.free_pages(), 2);
  EXPECT_TRUE(std::equal(memory.begin(), memory.end(), bytes));
  cache.evict(keep);
  EXPECT_EQ(cache.tokens(0), 2);
}

TEST(paged_cache, keys_that_cannot_be_stored_where_they_turn_stay_as_they_were) {
  expect_unchanged_where_keys_cannot_turn<std::int8_t>(3.3e38f);
  expect_unchanged_where_keys_cannot_turn<q8_0>(8e6f);
  expect_unchanged_where_keys_cannot_turn<f16>(60000.0f);
  expect_unchanged_where_keys_cannot_turn<bf16>(3.3e38f);
  expect_unchanged_where_keys_cannot_turn<float>(3.3e38f);
}

}  // namespace
