// SPDX-License-Identifier: Apache-2.0
//
// What attend() refuses. Each refusal names the numbers and leaves the outputs alone.

#include <sattn/attention/attend.hpp>

#include <gtest/gtest.h>
#include <sattn/pattern/token_lists.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "support/errors.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

constexpr index_t huge = std::numeric_limits<index_t>::max();

float* floats(const stored_view& view) {
  return const_cast<float*>(static_cast<const float*>(view.data));
}

// A valid call that a test then spoils.
struct call {
  attention_plan plan;
  std::vector<float> memory;  // everything the views point to
  std::vector<attention_sequence> sequences;
  std::vector<float> sinks = std::vector<float>(4, 0.5f);
  attention_options options;
  attention_sequence& s;

  call() : memory(4096, 1.0f), sequences(2, make_sequence()), s(sequences[0]) {
    // The other sequence lies behind the first, 2048 floats later.
    attention_sequence& other = sequences[1];
    other.q.data += 2048;
    for (auto* view : {&other.kv.k, &other.kv.v}) view->data = floats(*view) + 2048;
    other.output.out.data += 2048;
    other.output.lse.data += 2048;
    other.output.mass.data += 2048;
    options.sink_logits = sinks;
  }
  call(const call&) = delete;
  call& operator=(const call&) = delete;

  attention_sequence make_sequence() {
    context ctx(1);
    plan = plan_prefill(ctx, {6, 10, 4, 2, 4}, dense{});
    float* const x = memory.data();
    return {&plan,
            nhd<const float>(x, 6, 4, 8),
            kv(nhd(x + 256, 10, 2, 8), nhd(x + 512, 10, 2, 6)),
            {nhd(x + 1024, 6, 4, 6), nhd(x + 1536, 6, 4, 1), nhd(x + 1664, 10, 2, 1)}};
  }
};

struct error_case {
  const char* name;
  std::function<void(call&)> spoil;
  std::vector<std::string> parts;  // of the message
};

const float* bytes_off(const float* x, std::uintptr_t bytes) {
  return reinterpret_cast<const float*>(reinterpret_cast<std::uintptr_t>(x) + bytes);
}

const std::vector<error_case>& shape_errors() {
  static const std::vector<error_case> cases = {
      {"no plan", [](call& c) { c.s.plan = nullptr; }, {"plan"}},
      {"q tokens", [](call& c) { c.s.q.tokens = 5; }, {"q tokens", "5", "6"}},
      {"q heads", [](call& c) { c.s.q.heads = 3; }, {"q heads", "3", "4"}},
      {"k tokens", [](call& c) { c.s.kv.k.tokens = 9; }, {"k tokens", "9", "10"}},
      {"k heads", [](call& c) { c.s.kv.k.heads = 1; }, {"k heads", "1", "2"}},
      {"v tokens", [](call& c) { c.s.kv.v.tokens = 11; }, {"v tokens", "11", "10"}},
      {"v heads", [](call& c) { c.s.kv.v.heads = 1; }, {"v heads", "1", "2"}},
      {"k dim", [](call& c) { c.s.kv.k.dim = 7; }, {"k dim", "7", "8"}},
      {"out tokens", [](call& c) { c.s.output.out.tokens = 5; }, {"out tokens", "5", "6"}},
      {"out heads", [](call& c) { c.s.output.out.heads = 2; }, {"out heads", "2", "4"}},
      {"out dim", [](call& c) { c.s.output.out.dim = 5; }, {"out dim", "5", "6"}},
      {"lse tokens", [](call& c) { c.s.output.lse.tokens = 5; }, {"lse tokens", "5", "6"}},
      {"lse heads", [](call& c) { c.s.output.lse.heads = 3; }, {"lse heads", "3", "4"}},
      {"lse dim",
       [](call& c) { c.s.output.lse = nhd(c.s.output.lse.data, 6, 4, 2); },
       {"lse dim", "2", "1"}},
      {"mass tokens", [](call& c) { c.s.output.mass.tokens = 9; }, {"mass tokens", "9", "10"}},
      {"mass heads", [](call& c) { c.s.output.mass.heads = 1; }, {"mass heads", "1", "2", "4"}},
      {"mass dim",
       [](call& c) { c.s.output.mass = nhd(c.s.output.mass.data, 10, 2, 2); },
       {"mass dim", "2", "1"}},
      {"null mass", [](call& c) { c.s.output.mass.data = nullptr; }, {"mass", "null", "10"}},
      {"mass without lse", [](call& c) { c.s.output.lse = {}; }, {"mass", "lse"}},
      {"rows of mass overlap each other",
       [](call& c) { c.s.output.mass.token_stride = 0; },
       {"mass", "0"}},
      {"head_dim 0", [](call& c) { c.s.q.dim = c.s.kv.k.dim = 0; }, {"head_dim 0", "positive"}},
      {"v_dim 0", [](call& c) { c.s.kv.v.dim = c.s.output.out.dim = 0; }, {"v_dim 0", "positive"}},
      {"negative extent", [](call& c) { c.s.q.tokens = -6; }, {"q", "-6"}},
      {"negative stride", [](call& c) { c.s.kv.k.token_stride = -16; }, {"k", "-16"}},
      {"null q", [](call& c) { c.s.q.data = nullptr; }, {"q", "null", "6"}},
      {"null k", [](call& c) { c.s.kv.k.data = nullptr; }, {"k", "null", "10"}},
      {"null v", [](call& c) { c.s.kv.v.data = nullptr; }, {"v", "null", "10"}},
      {"null out", [](call& c) { c.s.output.out.data = nullptr; }, {"out", "null"}},
      {"misaligned q", [](call& c) { c.s.q.data = bytes_off(c.s.q.data, 2); }, {"q", "2 bytes"}},
      {"misaligned k",
       [](call& c) { c.s.kv.k.data = bytes_off(floats(c.s.kv.k), 1); },
       {"k", "1 bytes"}},
      {"misaligned f16 k",
       [](call& c) {
         c.s.kv.k.type = dtype::f16;
         c.s.kv.k.data = bytes_off(floats(c.s.kv.k), 1);
       },
       {"k", "1 bytes"}},
      {"out over the last bf16 of k",
       [](call& c) {
         c.s.kv.k.type = dtype::bf16;
         c.s.output.out.data = floats(c.s.kv.k) + 79;  // 160 elements of 2 bytes
       },
       {"out", "overlaps", "k"}},
      {"misaligned out",
       [](call& c) { c.s.output.out.data = const_cast<float*>(bytes_off(c.s.output.out.data, 3)); },
       {"out", "3 bytes"}},
      {"strides past the address space",
       [](call& c) { c.s.q.token_stride = huge / 4; },
       {"q", std::to_string(huge / 4), "overflow"}},
      {"head strides past the address space",
       [](call& c) { c.s.kv.v.head_stride = huge - 1; },
       {"v", std::to_string(huge - 1), "overflow"}},
      {"bytes past the address space",
       [](call& c) { c.s.q.token_stride = huge / 5 / 2; },
       {"q", std::to_string(huge / 5 / 2), "overflow"}},
      {"strides of k past the address space",
       [](call& c) { c.s.kv.k.token_stride = huge / 9 + 1; },
       {"k", std::to_string(huge / 9 + 1), "overflow"}},
      {"strides of k off its alignment",
       [](call& c) { c.s.kv.k.token_stride += 2; },
       {"k", "66", "alignment"}},
      {"more tokens than positions",
       [](call& c) { c.s.kv.k.tokens = index_t{1} << 31; },
       {"k", "2147483648"}},
      {"rows of out overlap each other",
       [](call& c) { c.s.output.out.token_stride = 6; },
       {"out", "6"}},
      {"rows of lse overlap each other",
       [](call& c) { c.s.output.lse.head_stride = 0; },
       {"lse", "0"}},
      {"out over q",
       [](call& c) { c.s.output.out.data = const_cast<float*>(c.s.q.data); },
       {"out", "overlaps", "q"}},
      {"out over the last float of q",
       [](call& c) { c.s.output.out.data = const_cast<float*>(c.s.q.data) + 191; },
       {"out", "overlaps", "q"}},
      {"out over k",
       [](call& c) { c.s.output.out.data = floats(c.s.kv.k) + 4; },
       {"out", "overlaps", "k"}},
      {"out over v",
       [](call& c) { c.s.output.out.data = floats(c.s.kv.v) + 119; },
       {"out", "overlaps", "v"}},
      {"out over lse",
       [](call& c) { c.s.output.lse.data = c.s.output.out.data + 143; },
       {"out", "overlaps", "lse"}},
      {"lse over v",
       [](call& c) { c.s.output.lse.data = floats(c.s.kv.v); },
       {"lse", "overlaps", "v"}},
      {"mass over k",
       [](call& c) { c.s.output.mass.data = floats(c.s.kv.k); },
       {"mass", "overlaps", "k"}},
      {"mass over the last float of out",
       [](call& c) { c.s.output.mass.data = c.s.output.out.data + 143; },
       {"mass", "overlaps", "out"}},
      {"mass over lse",
       [](call& c) { c.s.output.mass.data = c.s.output.lse.data + 23; },
       {"mass", "overlaps", "lse"}},
      {"lse over another sequence's mass",
       [](call& c) { c.s.output.lse.data = c.sequences[1].output.mass.data; },
       {"lse", "overlaps", "another"}},
      {"out over another sequence's out",
       [](call& c) { c.s.output.out = c.sequences[1].output.out; },
       {"out", "overlaps", "another"}},
      {"out over another sequence's lse",
       [](call& c) { c.s.output.out.data = c.sequences[1].output.lse.data; },
       {"out", "overlaps", "another"}},
      {"out over another sequence's k",
       [](call& c) { c.sequences[1].kv.k.data = c.s.output.out.data; },
       {"out", "overlaps", "k"}},
      {"the second sequence", [](call& c) { c.sequences[1].q.heads = 3; }, {"q heads", "3", "4"}},
      {"scale nan", [](call& c) { c.options.scale = quiet_nan; }, {"scale", "nan"}},
      {"scale inf", [](call& c) { c.options.scale = infinity; }, {"scale", "inf"}},
      {"soft cap below 0", [](call& c) { c.options.soft_cap = -2; }, {"soft_cap", "-2"}},
      {"soft cap nan", [](call& c) { c.options.soft_cap = quiet_nan; }, {"soft_cap", "nan"}},
      {"soft cap inf", [](call& c) { c.options.soft_cap = infinity; }, {"soft_cap", "inf"}},
      {"sink nan", [](call& c) { c.sinks[3] = quiet_nan; }, {"sink", "NaN"}},
      {"too few sinks",
       [](call& c) { c.options.sink_logits = std::span(c.sinks).first(3); },
       {"3 sink", "4"}},
      {"too many sinks",
       [](call& c) {
         c.sinks.resize(5);
         c.options.sink_logits = c.sinks;
       },
       {"5 sink", "4"}},
  };
  return cases;
}

const std::vector<error_case>& unsupported_errors() {
  static const std::vector<error_case> cases = {
      {"head_dim above 1024",
       [](call& c) {
         c.s.q = nhd<const float>(c.s.q.data, 6, 4, 1025);
         c.s.kv.k = nhd(floats(c.s.kv.k), 10, 2, 1025);
       },
       {"1025", "1024"}},
      {"v_dim above 1024",
       [](call& c) {
         c.s.kv.v = nhd(floats(c.s.kv.v), 10, 2, 2000);
         c.s.output.out = nhd(c.s.output.out.data, 6, 4, 2000);
       },
       {"2000", "1024"}},
  };
  return cases;
}

template <class Error>
void expect_refusal(const error_case& e) {
  SCOPED_TRACE(e.name);
  call c;
  e.spoil(c);
  const std::vector<float> before = c.memory;
  context ctx(1);
  const std::string message = error_of<Error>([&] { attend(ctx, c.sequences, c.options); });
  EXPECT_FALSE(message.empty()) << "no error of this type";
  for (const std::string& part : e.parts) {
    EXPECT_NE(message.find(part), std::string::npos) << "'" << message << "' lacks " << part;
  }
  EXPECT_TRUE(test_support::bit_equal(c.memory, before)) << "something was written";
}

TEST(errors, the_call_that_the_cases_spoil_is_valid) {
  call c;
  const std::vector<float> before = c.memory;
  context ctx(1);
  attend(ctx, c.sequences, c.options);
  EXPECT_FALSE(test_support::bit_equal(c.memory, before));
}

TEST(errors, what_does_not_fit_is_a_shape_error_that_names_it) {
  for (const error_case& e : shape_errors()) expect_refusal<shape_error>(e);
}

TEST(errors, what_is_too_large_is_unsupported) {
  for (const error_case& e : unsupported_errors()) expect_refusal<unsupported>(e);
}

TEST(errors, workspace_bytes_refuses_what_attend_refuses) {
  for (const error_case& e : shape_errors()) {
    if (e.parts.size() > 1 && e.parts[1] == "overlaps") continue;  // not a matter of size
    call c;
    e.spoil(c);
    context ctx(1);
    EXPECT_THROW(workspace_bytes(ctx, c.sequences, c.options), shape_error) << e.name;
  }
}

TEST(errors, a_plan_for_other_shapes_is_refused) {
  context ctx(1);
  call c;
  const std::vector<float> before = c.memory;
  for (const attention_shape& other :
       {attention_shape{7, 10, 4, 2, 3}, attention_shape{6, 11, 4, 2, 5},
        attention_shape{6, 10, 2, 2, 4}, attention_shape{6, 10, 4, 4, 4},
        attention_shape{6, 10, 4, 1, 4}, attention_shape{}}) {
    for (const attention_plan& plan :
         {plan_prefill(ctx, other, dense{}), plan_decode(ctx, other, dense{})}) {
      c.s.plan = &plan;
      EXPECT_THROW(attend(ctx, c.sequences, c.options), shape_error);
    }
  }
  EXPECT_TRUE(test_support::bit_equal(c.memory, before));
}

// Planning failed half-way: what is left is no plan of the old shape.
TEST(errors, a_plan_that_failed_to_be_made_is_refused) {
  context ctx(1);
  call c;
  const token_lists bad{1, {0, 1, 2, 3, 4, 5, 6}, {0, 1, 2, 3, 4, 99}};
  EXPECT_THROW(plan_prefill_into(ctx, c.plan, c.plan.shape(), bad), shape_error);
  EXPECT_THROW(attend(ctx, c.sequences, c.options), shape_error);
}

TEST(errors, heads_that_are_no_multiple_are_refused_with_both_numbers) {
  context ctx(1);
  const std::vector<float> x(4096);
  const auto q = nhd(x.data(), 4, 5, 8);
  const auto k = nhd(x.data(), 4, 2, 8);
  for (const std::string& message : {error_of([&] { shape_of(q, kv(k, k)); }), error_of([&] {
                                       plan_prefill(ctx, {4, 4, 5, 2, 0}, dense{});
                                     }),
                                     error_of([&] {
                                       plan_decode(ctx, {4, 4, 5, 2, 0}, dense{});
                                     })}) {
    EXPECT_NE(message.find('5'), std::string::npos) << message;
    EXPECT_NE(message.find('2'), std::string::npos) << message;
  }
  EXPECT_THROW(plan_prefill(ctx, {4, 4, 5, 0, 0}, dense{}), shape_error);
}

TEST(errors, tensors_of_another_rank_are_refused_with_the_rank) {
  float x = 0;
  const std::array<index_t, 4> extents = {1, 2, 3, 4};
  const std::array<index_t, 4> strides = {24, 12, 4, 1};
  for (const std::size_t rank : {0u, 1u, 2u, 4u}) {
    const std::string message = error_of(
        [&] { view_of(&x, std::span(extents).first(rank), std::span(strides).first(rank)); });
    EXPECT_NE(message.find(std::to_string(rank)), std::string::npos) << message;
    EXPECT_NE(message.find('3'), std::string::npos) << message;
  }
}

TEST(errors, a_borrowed_workspace_that_is_too_small_or_misaligned_is_refused) {
  context ctx(1);
  call c;
  const std::vector<float> before = c.memory;
  const std::size_t needed = workspace_bytes(ctx, c.sequences, c.options);
  aligned_buffer buffer;
  buffer.reserve(needed + cache_line);
  ctx.use_workspace(buffer.bytes().first(needed - 1));
  const std::string message = error_of([&] { attend(ctx, c.sequences, c.options); });
  EXPECT_NE(message.find(std::to_string(needed)), std::string::npos) << message;
  EXPECT_NE(message.find(std::to_string(needed - 1)), std::string::npos) << message;
  for (const std::size_t off : {1u, 4u, 32u}) {
    const std::string refusal =
        error_of([&] { ctx.use_workspace(buffer.bytes().subspan(off, needed)); });
    EXPECT_NE(refusal.find(std::to_string(off)), std::string::npos) << refusal;
    EXPECT_NE(refusal.find("64"), std::string::npos) << refusal;
  }
  EXPECT_TRUE(test_support::bit_equal(c.memory, before));
  ctx.use_workspace(buffer.bytes().first(needed));
  attend(ctx, c.sequences, c.options);
  ctx.use_workspace({});
  attend(ctx, c.sequences, c.options);
}

TEST(errors, kernels_that_the_cpu_lacks_are_refused) {
  kernel_table table = *kernel_tables().front();
  table.name = "sse99";
  table.cpu_supports = [] { return false; };
  serial_executor serial;
  EXPECT_NE(error_of<unsupported>([&] { const context ctx(1, table); }).find("sse99"),
            std::string::npos);
  EXPECT_NE(error_of<unsupported>([&] { const context ctx(serial, table); }).find("sse99"),
            std::string::npos);
}

// Interleaved memory is no overlap.
TEST(errors, outputs_between_the_rows_of_inputs_are_accepted) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(
      random, {.q_len = 9, .kv_len = 9, .q_heads = 2, .kv_heads = 1, .head_dim = 8, .v_dim = 8});
  // One row of memory per token: q [2][8] | out [2][8] | lse [2].
  std::vector<float> fused(at(9 * 34), 0.0f);
  const tensor_view<float> q{fused.data(), 9, 2, 8, 34, 8};
  const tensor_view<float> out{fused.data() + 16, 9, 2, 8, 34, 8};
  const tensor_view<float> lse{fused.data() + 32, 9, 2, 1, 34, 1};
  for (index_t t = 0; t < 9; ++t) {
    for (index_t h = 0; h < 2; ++h) std::copy_n(p.q.row(t, h), 8, q.row(t, h));
  }
  for (context& ctx : contexts) {
    const attention_plan plan = plan_prefill(ctx, p.shape, dense{});
    attend(ctx, plan, q, p.kv(), {out, lse});
    const attention_result want = run(ctx, plan, p);
    for (index_t t = 0; t < 9; ++t) {
      for (index_t h = 0; h < 2; ++h) {
        EXPECT_EQ(*lse.row(t, h), want.lse[at(t * 2 + h)]);
        for (index_t i = 0; i < 8; ++i) {
          EXPECT_EQ(out.row(t, h)[i], want.out[at((t * 2 + h) * 8 + i)]);
        }
      }
    }
  }
}

// Against every float's list of who has it, wherever the views of a batch lie.
TEST(errors, overlaps_of_a_batch_are_refused_and_nothing_else_is) {
  const seed_trace trace;
  random_source random;
  context ctx(1);
  const attention_plan plan = plan_prefill(ctx, {1, 2, 1, 1, 1}, dense{});
  int refused = 0;
  constexpr int rounds = 4000;
  for (int round = 0; round < rounds; ++round) {
    const index_t n = random.integer(1, 7);
    std::vector<float> memory(at(random.pick<index_t>({10, 40, 200}) * n), 1.0f);
    std::vector<int> inputs(memory.size(), 0);
    std::vector<int> outputs(memory.size(), 0);
    // Some batches lie in order, kind by kind or sequence by sequence, but for one view.
    const index_t order = random.integer(0, 3);
    const index_t stray = random.integer(0, 12 * n);
    index_t placed = 0;
    std::vector<attention_sequence> sequences;
    for (index_t i = 0; i < n; ++i) {
      const auto place = [&](index_t kind, index_t floats, std::vector<int>& users) {
        index_t first = random.integer(0, std::ssize(memory) - floats + 1);
        const bool strays = placed++ == stray;
        if (!strays && order == 1) first = kind * n + i * floats;
        if (!strays && order == 2) first = i * 9 + kind;
        first = std::min<index_t>(first, std::ssize(memory) - floats);
        for (index_t f = first; f < first + floats; ++f) ++users[at(f)];
        return memory.data() + first;
      };
      const tensor_view<float> out{place(0, 1, outputs), 1, 1, 1, 1, 1};
      const tensor_view<float> lse{place(1, 1, outputs), 1, 1, 1, 1, 1};
      const tensor_view<float> mass{place(2, 2, outputs), 2, 1, 1, 1, 1};
      const tensor_view<const float> q{place(4, 1, inputs), 1, 1, 1, 1, 1};
      const tensor_view<const float> k{place(5, 2, inputs), 2, 1, 1, 1, 1};
      const tensor_view<const float> v{place(7, 2, inputs), 2, 1, 1, 1, 1};
      sequences.push_back({&plan, q, kv(k, v), {out, lse, mass}});
    }
    bool overlap = false;
    for (std::size_t f = 0; f < memory.size(); ++f) {
      overlap = overlap || outputs[f] > 1 || (outputs[f] == 1 && inputs[f] > 0);
    }
    refused += overlap;
    const std::vector<float> before = memory;
    if (overlap) {
      EXPECT_THROW(attend(ctx, sequences), shape_error) << round;
      EXPECT_TRUE(bit_equal(memory, before)) << round;
    } else {
      EXPECT_NO_THROW(attend(ctx, sequences)) << round;
    }
  }
  EXPECT_GT(refused, rounds / 10);
  EXPECT_LT(refused, rounds * 9 / 10);
}

struct idle_executor {
  index_t workers = 0;
  index_t concurrency() const { return workers; }
  void parallel_for(index_t, auto&&) { throw std::runtime_error("no threads today"); }
};

TEST(errors, an_executor_without_workers_is_refused) {
  idle_executor none;
  EXPECT_THROW(sattn::context{none}, shape_error);
}

TEST(errors, a_plan_whose_making_was_cut_short_is_empty) {
  sattn::serial_executor serial;
  sattn::context ctx(serial);
  const sattn::attention_shape shape{
      .q_len = 20, .kv_len = 20, .q_heads = 1, .kv_heads = 1, .q_offset = 0};
  attention_plan plan = sattn::plan_prefill(ctx, shape, sattn::dense{});
  idle_executor failing{1};
  sattn::context broken(failing);
  EXPECT_THROW(sattn::plan_prefill_into(broken, plan, shape, sattn::sink{2}), std::runtime_error);
  EXPECT_EQ(plan.shape(), sattn::attention_shape{});
  plan = sattn::plan_decode(ctx, shape, sattn::dense{});
  EXPECT_THROW(sattn::plan_decode_into(broken, plan, shape, sattn::sink{2}), std::runtime_error);
  EXPECT_EQ(plan.shape(), sattn::attention_shape{});
}

}  // namespace
