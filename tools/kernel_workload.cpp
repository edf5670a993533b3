// SPDX-License-Identifier: Apache-2.0
//
// What tools/count_instructions.py counts: `kernel_workload CASE` makes one call of attend() on one
// thread, with the AVX2 kernels whatever the machine has. Without an argument it prints the cases.

#include <algorithm>
#include <cstdio>
#include <exception>
#include <random>
#include <sattn/sattn.hpp>
#include <string_view>
#include <vector>

namespace {

using sattn::attention_shape;
using sattn::index_t;
using sattn::token_t;
using generator = std::minstd_rand;

token_t below(generator& random, index_t limit) {
  return static_cast<token_t>(static_cast<index_t>(random()) % limit);
}

std::vector<float> random_floats(index_t count, unsigned seed) {
  generator random(seed);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& x : values) x = static_cast<float>(below(random, 65536)) / 32768.0f - 1.0f;
  return values;
}

/// The diagonal block of 64 x 64 and every third one before it.
sattn::any_pattern third_blocks(index_t n) {
  sattn::block_lists lists{64, 64, {0}, {}};
  for (token_t i = 0; i < sattn::ceil_div(n, 64); ++i) {
    for (token_t j = i % 3; j <= i; j += 3) lists.indices.push_back(j);
    lists.indptr.push_back(std::ssize(lists.indices));
  }
  return lists;
}

/// 64 local distances, and at random 16 isolated ones and 48 keys.
sattn::any_pattern slashes(index_t n) {
  generator random(1);
  sattn::vertical_slash pattern;
  for (token_t d = 0; d < 64; ++d) pattern.distances.push_back(d);
  for (int i = 0; i < 16; ++i) pattern.distances.push_back(below(random, n));
  for (int i = 0; i < 48; ++i) pattern.columns.push_back(below(random, n));
  return pattern;
}

/// Random legal keys for every row, the same key more than once among them.
sattn::any_pattern random_tokens(index_t n, index_t count_of_row) {
  generator random(1);
  sattn::token_lists lists{1, {0}, {}};
  for (index_t row = 0; row < n; ++row) {
    for (index_t i = 0; i < count_of_row; ++i) lists.tokens.push_back(below(random, row + 1));
    lists.indptr.push_back(std::ssize(lists.tokens));
  }
  return lists;
}

struct test_case {
  std::string_view name;
  attention_shape shape;
  index_t dim;
  sattn::any_pattern pattern;
  sattn::dtype kv_type = sattn::dtype::f32;
  bool mass = false;
};

// Lengths that are multiples of nothing, so that the kernels' remainders are counted too.
std::vector<test_case> all_cases() {
  constexpr token_t n = 300;
  constexpr token_t cache = 3000;
  const attention_shape prefill{n, n, 4, 1, 0};
  const attention_shape decode_g1{1, cache, 1, 1, cache - 1};
  const attention_shape decode_g4{1, cache, 4, 1, cache - 1};
  constexpr auto f16 = sattn::dtype::f16;
  return {
      {"dense_d128", prefill, 128, sattn::dense{}},
      {"dense_d64", prefill, 64, sattn::dense{}},
      {"block64_d128", prefill, 128, third_blocks(n)},
      {"vertical_slash_d128", prefill, 128, slashes(n)},
      {"token_lists_d128", prefill, 128, random_tokens(n, 64)},
      {"dense_lists_g1_d128", {n, n, 1, 1, 0}, 128, random_tokens(n, n)},  // runs whole tiles
      {"decode_g1_d128", decode_g1, 128, sattn::dense{}},
      {"decode_g4_d128", decode_g4, 128, sattn::dense{}},
      {"block64_f16_d128", prefill, 128, third_blocks(n), f16},
      {"decode_g4_f16_d128", decode_g4, 128, sattn::dense{}, f16},
      {"mass_d128", prefill, 128, slashes(n), sattn::dtype::f32, true},
  };
}

struct call {
  sattn::context& ctx;
  const sattn::attention_plan& plan;
  sattn::tensor_view<const float> q;
  sattn::kv_view kv;
  sattn::attention_output output;
};

}  // namespace

/// The function between whose entry and return callgrind counts.
extern "C" [[gnu::noipa]] void counted_attend(const void* argument) {
  const call& c = *static_cast<const call*>(argument);
  sattn::attend(c.ctx, c.plan, c.q, c.kv, c.output);
}

namespace {

/// Keys or values of one sequence, as f32 and as f16.
struct cache {
  std::vector<float> full;
  std::vector<sattn::f16> half;

  cache(index_t count, unsigned seed) : full(random_floats(count, seed)), half(full.size()) {
    std::transform(full.begin(), full.end(), half.begin(), sattn::to_f16);
  }
  sattn::stored_view view(const test_case& test) const {
    const attention_shape& s = test.shape;
    if (test.kv_type == sattn::dtype::f16) {
      return sattn::nhd(half.data(), s.kv_len, s.kv_heads, test.dim);
    }
    return sattn::nhd(full.data(), s.kv_len, s.kv_heads, test.dim);
  }
};

void run(const test_case& test) {
  const attention_shape& s = test.shape;
  const std::vector<float> q = random_floats(s.q_len * s.q_heads * test.dim, 1);
  const cache k(s.kv_len * s.kv_heads * test.dim, 2);
  const cache v(s.kv_len * s.kv_heads * test.dim, 3);
  std::vector<float> out(q.size());
  std::vector<float> lse(static_cast<std::size_t>(s.q_len * s.q_heads));
  std::vector<float> mass(static_cast<std::size_t>(s.kv_len * s.kv_heads));
  sattn::attention_output output(sattn::nhd(out.data(), s.q_len, s.q_heads, test.dim));
  if (test.mass) {
    output.lse = sattn::nhd(lse.data(), s.q_len, s.q_heads, 1);
    output.mass = sattn::nhd(mass.data(), s.kv_len, s.kv_heads, 1);
  }
  sattn::serial_executor executor;
  sattn::context ctx(executor, sattn::kernels<sattn::arch::avx2>());
  const sattn::attention_plan plan =
      s.q_len == 1 ? plan_decode(ctx, s, test.pattern) : plan_prefill(ctx, s, test.pattern);
  const call c{ctx, plan, sattn::nhd(q.data(), s.q_len, s.q_heads, test.dim),
               sattn::kv(k.view(test), v.view(test)), output};
  counted_attend(&c);
}

}  // namespace

int main(int argc, char** argv) try {
  const std::vector<test_case> cases = all_cases();
  if (argc == 1) {
    for (const test_case& test : cases) std::puts(test.name.data());
    return 0;
  }
  for (const test_case& test : cases) {
    if (test.name != argv[1]) continue;
    run(test);
    return 0;
  }
  std::fprintf(stderr, "kernel_workload: no case %s\n", argv[1]);
  return 2;
} catch (const std::exception& error) {
  std::fprintf(stderr, "kernel_workload: %s\n", error.what());
  return 1;
}
