// SPDX-License-Identifier: Apache-2.0
//
// K and V in every layout and type, through the public functions.

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <sattn/attention/attend.hpp>
#include <sattn/attention/plan.hpp>
#include <sattn/kv/layouts.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "support/errors.hpp"
#include "support/patterns.hpp"
#include "support/problem.hpp"
#include "support/stored.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

attention_result run_stored(context& ctx, const attention_plan& plan, const attention_problem& p,
                            const kv_view& kv, std::size_t pack_bytes = std::size_t{1} << 40) {
  attention_result r;
  r.out.assign(at(p.shape.q_len * p.shape.q_heads * p.v_dim), quiet_nan);
  r.lse.assign(at(p.shape.q_len * p.shape.q_heads), quiet_nan);
  r.mass.assign(at(p.shape.kv_len * p.shape.q_heads), quiet_nan);
  attention_options options = p.options();
  options.pack_bytes = pack_bytes;
  attend(ctx, plan, p.q.view(), kv,
         {nhd(r.out.data(), p.shape.q_len, p.shape.q_heads, p.v_dim),
          nhd(r.lse.data(), p.shape.q_len, p.shape.q_heads, 1),
          nhd(r.mass.data(), p.shape.kv_len, p.shape.q_heads, 1)},
         options);
  return r;
}

// Every kind of plan over the problem, in every context: all layouts give the same bits, those of
// f32 where the types have no scale for a row; the others stay within the oracle's bound.
void expect_layouts_agree(attention_problem& p, dtype k_type, dtype v_type,
                          random_source& random) {
  const encoded_rows k_rows(p.k, k_type);
  const encoded_rows v_rows(p.v, v_type);
  const bool exact = !has_row_scale(k_type) && !has_row_scale(v_type);
  all_contexts contexts;
  std::vector<std::pair<std::string, attention_plan>> plans;
  for (auto& [name, plan] : every_kind_of_plan(contexts.any(), p.shape)) {
    plans.emplace_back(name, plan);
  }
  plans.emplace_back("decode", plan_decode(contexts.any(), p.shape, dense{}, {.split_keys = 50}));
  for (const auto& [name, plan] : plans) {
    SCOPED_TRACE(name);
    const reference::result want = expected(p, mask_of(plan));
    for (context& ctx : contexts) {
      SCOPED_TRACE(name_of(ctx));
      attention_result first = run(ctx, plan, p);
      bool known = exact;  // the bits
      for (const storage_layout layout : all_layouts) {
        const stored_tensor k(k_rows, layout, random);
        const stored_tensor v(v_rows, random.pick({layout, storage_layout::strided}), random);
        for (const std::size_t pack : {std::size_t{0}, std::size_t{1} << 40}) {
          const attention_result got = run_stored(ctx, plan, p, kv(k.view, v.view), pack);
          if (!known) {
            EXPECT_TRUE(within_bound(got.out, got.lse, want));
            EXPECT_TRUE(elements_within_bound("mass", got.mass, want.mass, want.mass_bound));
            first = got;
            known = true;
          }
          EXPECT_TRUE(bit_equal(got, first)) << "layout " << static_cast<int>(layout);
        }
      }
    }
  }
}

TEST(layouts, change_no_bit) {
  const seed_trace trace;
  random_source random;
  for (const dtype k_type : all_types) {
    for (const dtype v_type : all_types) {
      problem_extents e;
      e.kv_heads = random.integer(1, 4);
      e.q_heads = e.kv_heads * random.pick<index_t>({1, 2, 3, 4, 8});
      e.q_len = random.pick<index_t>({1, 1, 3, 20, 130});
      e.kv_len = e.q_len + random.integer(100, 200);
      e.head_dim = k_type == dtype::q8_0 ? 32 * random.integer(1, 4) : random.integer(1, 70);
      e.v_dim = v_type == dtype::q8_0 ? 32 * random.integer(1, 4) : random.integer(1, 70);
      SCOPED_TRACE(::testing::Message() << name_of(k_type) << " and " << name_of(v_type) << ": "
                                        << e);
      attention_problem p(random, e);
      expect_layouts_agree(p, k_type, v_type, random);
    }
  }
}

// Enough query rows that K and V are copied, of types that are copied with their scales.
TEST(layouts, change_no_bit_of_copies) {
  const seed_trace trace;
  random_source random;
  for (const dtype type : all_types) {
    SCOPED_TRACE(name_of(type));
    attention_problem p(random, {260, 290, 4, 2, 64, 32});
    expect_layouts_agree(p, type, type, random);
  }
}

// Multi-head latent attention: one head, the values are the first columns of the keys.
TEST(layouts, values_may_be_columns_of_the_keys) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const dtype type : all_types) {
    SCOPED_TRACE(name_of(type));
    attention_problem p(random, {2, 150, 16, 1, 96, 64});
    const encoded_rows rows(p.k, type);
    p.v_is_k = true;
    const attention_plan plan = plan_decode(contexts.any(), p.shape, dense{}, {.split_keys = 64});
    const reference::result want = expected(p, mask_of(plan));
    for (context& ctx : contexts) {
      for (const storage_layout layout : all_layouts) {
        const stored_tensor k(rows, layout, random);
        const attention_result got =
            run_stored(ctx, plan, p, kv(k.view, k.view.columns(0, 64)));
        EXPECT_TRUE(within_bound(got.out, got.lse, want));
      }
    }
  }
}

// What a plan leaves out is not read: its rows and scales are NaN, and so is all that is no row.
TEST(layouts, keys_outside_the_plan_are_not_read) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const dtype type : all_types) {
    SCOPED_TRACE(name_of(type));
    attention_problem p(random, {1, 300, 4, 2, 64, 32});
    const auto pattern = sink{4} | sliding_window{70};
    const attention_plan plan = plan_decode(contexts.any(), p.shape, pattern, {.split_keys = 32});
    encoded_rows k_rows(p.k, type);
    encoded_rows v_rows(p.v, type);
    const reference::result want = expected(p, mask_of(plan));
    for (encoded_rows* rows : {&k_rows, &v_rows}) {
      for (index_t t = 4; t < 300 - 70; ++t) {
        for (index_t h = 0; h < 2; ++h) {
          const index_t at_row = (t * 2 + h) * rows->row_bytes();
          std::fill_n(rows->bytes.begin() + at_row, rows->row_bytes(), std::byte{0xff});
          if (!rows->scales.empty()) rows->scales[at(t * 2 + h)] = quiet_nan;
        }
      }
    }
    for (context& ctx : contexts) {
      for (const storage_layout layout : all_layouts) {
        const stored_tensor k(k_rows, layout, random);
        const stored_tensor v(v_rows, layout, random);
        const attention_result got = run_stored(ctx, plan, p, kv(k.view, v.view));
        EXPECT_TRUE(within_bound(got.out, got.lse, want));
      }
    }
  }
}

// Rows of one kv head alone are a sequence of one head: heads of different lengths make a batch.
TEST(layouts, heads_of_different_lengths_are_a_batch) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {1, 200, 6, 3, 24, 16});
  const encoded_rows k_rows(p.k, dtype::f16);
  const encoded_rows v_rows(p.v, dtype::bf16);
  const index_t lengths[] = {200, 17, 130};
  for (const storage_layout layout : all_layouts) {
    const stored_tensor k(k_rows, layout, random);
    const stored_tensor v(v_rows, layout, random);
    for (context& ctx : contexts) {
      std::vector<attention_plan> plans;
      std::vector<attention_sequence> batch;
      std::vector<float> out(6 * 16, quiet_nan);
      for (const index_t length : lengths) {
        plans.push_back(plan_decode(ctx, {1, length, 2, 1, static_cast<token_t>(length - 1)},
                                    dense{}, {.split_keys = 40}));
      }
      for (index_t h = 0; h < 3; ++h) {
        kv_view part = kv(k.view, v.view).head_slice(h, h + 1);
        part.k.tokens = part.v.tokens = lengths[h];
        batch.push_back({&plans[at(h)],
                         {p.q.row(0, 2 * h), 1, 2, 24, 48, p.q.view().head_stride},
                         part,
                         {nhd(out.data() + h * 32, 1, 2, 16)}});
      }
      attend(ctx, batch, {});
      const reference::result want = expected(p, [&](index_t q_head, index_t, index_t key) {
        return key < lengths[q_head / 2];
      });
      EXPECT_TRUE(within_bound(out, {}, want)) << name_of(ctx);
    }
  }
}

// Address space of which the machine holds only what is touched.
class sparse_memory {
 public:
  explicit sparse_memory(index_t gibibytes)
      : bytes_(at(gibibytes) << 30),
        memory_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  sparse_memory(const sparse_memory&) = delete;
  sparse_memory& operator=(const sparse_memory&) = delete;
  ~sparse_memory() {
    if (*this) munmap(memory_, bytes_);
  }
  explicit operator bool() const { return memory_ != MAP_FAILED; }
  std::byte* data() const { return static_cast<std::byte*>(memory_); }

 private:
  std::size_t bytes_;
  void* memory_;
};

struct far_view {
  std::string name;
  stored_view view;
};

// Rows in every layout whose places lie beyond 2^31 and 2^32 elements, and their scales beyond 2^31
// and 2^32 floats: 41 GiB of each at most.
std::vector<far_view> far_views(const encoded_rows& rows, std::byte* bytes, float* scales,
                                std::span<const std::int32_t> few,
                                std::span<const std::int32_t> many) {
  constexpr index_t page = 4;  // tokens
  const index_t row = rows.row_bytes();
  // 2^n elements in bytes, where there are blocks of them.
  const auto elements = [&](int n) { return row_bytes(rows.type, index_t{1} << n); };
  const auto slots = [&](index_t tokens, index_t token_stride, index_t head_stride,
                         index_t scale_token, index_t scale_head) {
    stored_view view;
    view.data = bytes;
    view.type = rows.type;
    view.tokens = tokens;
    view.heads = rows.heads;
    view.dim = rows.dim;
    view.token_stride = token_stride;
    view.head_stride = head_stride;
    if (has_row_scale(rows.type)) view.scales = {scales, scale_token, scale_head, 0};
    return view;
  };
  const stored_view tokens_apart = slots(rows.tokens, elements(27), row, index_t{1} << 27, 1);
  const stored_view heads_apart =
      slots(rows.tokens, row, elements(32) + row, 1, (index_t{1} << 32) + 40);
  const stored_view near = slots(page, rows.heads * row, row, rows.heads, 1);
  // Pages far apart, and so many pages that their numbers reach 2^31; these overlap, which is
  // nobody's business.
  const page_pool few_pages{near, 36, elements(28), index_t{1} << 28};
  const page_pool many_pages{near, (index_t{1} << 31) - 1, 20, 4};
  return {{"tokens", tokens_apart},
          {"ring", ring(tokens_apart, 7, rows.tokens)},
          {"heads", heads_apart},
          {"few pages", paged(few_pages, few, rows.tokens)},
          {"many pages", paged(many_pages, many, rows.tokens)}};
}

// Puts the rows where a view has them.
void put(const encoded_rows& rows, const stored_view& view) {
  for (index_t t = 0; t < rows.tokens; ++t) {
    for (index_t h = 0; h < rows.heads; ++h) {
      const index_t slots = view.pages.size;
      const index_t page = slots == 0 ? 0 : view.pages.table[at(t / slots)];
      const index_t slot = slots != 0             ? t % slots
                           : view.ring.slots == 0 ? t
                                                  : (view.ring.first + t) % view.ring.slots;
      auto* const bytes = static_cast<std::byte*>(const_cast<void*>(view.data));
      std::copy_n(rows.row(t, h), rows.row_bytes(),
                  bytes + page * view.pages.stride + slot * view.token_stride +
                      h * view.head_stride);
      if (rows.scales.empty()) continue;
      const_cast<float*>(view.scales.data)[page * view.scales.page_stride +
                                           slot * view.scales.token_stride +
                                           h * view.scales.head_stride] =
          rows.scales[at(t * rows.heads + h)];
    }
  }
}

// K and V, each in memory of its own.
TEST(layouts, reach_as_far_as_addresses_do) {
  const seed_trace trace;
  const sparse_memory k_rows(42), v_rows(42), k_scales(42), v_scales(42);
  if (!k_rows || !v_rows || !k_scales || !v_scales) {
    GTEST_SKIP() << "no address space for sparse mappings";
  }
  random_source random;
  all_contexts contexts;
  std::vector<std::int32_t> few, many;
  for (std::int32_t i = 0; i < 10; ++i) {
    few.push_back(35 - 3 * i);
    many.push_back(std::numeric_limits<std::int32_t>::max() - 1 - i * 100);
  }
  for (const dtype type : all_types) {
    attention_problem p(random, {20, 40, 4, 2, 32, 32});
    const encoded_rows k(p.k, type), v(p.v, type);
    const stored_tensor near_k(k, storage_layout::strided, random);
    const stored_tensor near_v(v, storage_layout::strided, random);
    const auto far_k = far_views(k, k_rows.data(), reinterpret_cast<float*>(k_scales.data()), few,
                                 many);
    const auto far_v = far_views(v, v_rows.data(), reinterpret_cast<float*>(v_scales.data()), few,
                                 many);
    for (std::size_t i = 0; i < far_k.size(); ++i) {
      SCOPED_TRACE(std::string(name_of(type)) + ", " + far_k[i].name);
      put(k, far_k[i].view);
      put(v, far_v[i].view);
      for (const attention_plan& plan :
           {plan_decode(contexts.any(), p.shape, dense{}, {.split_keys = 16}),
            plan_prefill(contexts.any(), p.shape, dense{})}) {
        for (const std::size_t pack : {std::size_t{0}, std::size_t{1} << 40}) {
          const auto got = [&](const stored_view& keys, const stored_view& values) {
            return run_stored(contexts.any(), plan, p, kv(keys, values), pack);
          };
          const attention_result want = got(near_k.view, near_v.view);
          EXPECT_TRUE(bit_equal(got(far_k[i].view, near_v.view), want)) << "keys";
          EXPECT_TRUE(bit_equal(got(near_k.view, far_v[i].view), want)) << "values";
        }
      }
    }
  }
}

void expect_error(const char* name, const std::function<void()>& call,
                  const std::vector<std::string>& parts) {
  const std::string message = error_of(call);
  EXPECT_FALSE(message.empty()) << name;
  for (const std::string& part : parts) {
    EXPECT_NE(message.find(part), std::string::npos) << name << ": " << message;
  }
}

struct bad_view {
  const char* name;
  std::function<void(stored_view&)> spoil;
  std::vector<std::string> parts;
};

TEST(layouts, what_does_not_fit_is_refused) {
  std::vector<float> memory(1000);
  std::vector<std::int8_t> bytes(1000);
  std::vector<std::int32_t> table = {2, 0, 1};
  const stored_view page = nhd(memory.data(), 4, 2, 8);
  const stored_view pages = paged({page, 3, 256}, table, 10);
  const stored_view slots = ring(nhd(memory.data(), 12, 2, 8), 5, 10);
  const stored_view ints = scaled(nhd<const std::int8_t>(bytes.data(), 10, 2, 8),
                                  nhd<const float>(memory.data(), 10, 2, 1));
  for (const stored_view& view : {pages, slots, ints}) EXPECT_NO_THROW(check_view("k", view));

  const auto expect_refused = [](const stored_view& good, const std::vector<bad_view>& cases) {
    for (const bad_view& c : cases) {
      stored_view view = good;
      c.spoil(view);
      expect_error(c.name, [&] { check_view("k", view); }, c.parts);
    }
  };
  std::vector<std::int32_t> wrong = {2, 3, 1};
  std::vector<std::int32_t> negative = {2, -1, 1};
  expect_refused(
      pages,
      {{"id", [&](stored_view& v) { v.pages.table = wrong; }, {"k", "page 3", "3"}},
       {"negative id", [&](stored_view& v) { v.pages.table = negative; }, {"k", "-1"}},
       {"short table", [](stored_view& v) { v.tokens = 13; }, {"k", "3 entries", "13"}},
       {"tables of heads", [](stored_view& v) { v.pages.head_stride = 1; }, {"k", "3 entries"}},
       {"page size", [](stored_view& v) { v.pages.size = -1; }, {"k", "page size -1"}},
       {"pool", [](stored_view& v) { v.pages.pool = -1; }, {"k", "-1 pages"}},
       {"stride", [](stored_view& v) { v.pages.stride = -8; }, {"k", "-8"}},
       {"alignment", [](stored_view& v) { v.pages.stride = 258; }, {"k", "258", "alignment"}},
       {"far pages",
        [](stored_view& v) { v.pages.stride = std::numeric_limits<index_t>::max() / 2 - 3; },
        {"k", "overflow"}},
       {"ring of pages", [](stored_view& v) { v.ring = {0, 12}; }, {"k", "ring"}},
       {"null", [](stored_view& v) { v.data = nullptr; }, {"k", "null"}}});
  expect_refused(slots,
                 {{"tokens", [](stored_view& v) { v.tokens = 13; }, {"k", "13", "12"}},
                  {"first", [](stored_view& v) { v.ring.first = 12; }, {"k", "slot 12"}},
                  {"negative", [](stored_view& v) { v.ring.first = -1; }, {"k", "slot -1"}}});
  expect_refused(
      ints, {{"no scales", [](stored_view& v) { v.scales.data = nullptr; }, {"k", "without"}},
             {"scales of f32", [](stored_view& v) { v.type = dtype::f32; }, {"k"}},
             {"stride of scales", [](stored_view& v) { v.scales.token_stride = -1; }, {"k", "-1"}},
             {"blocks", [](stored_view& v) { v.type = dtype::q8_0; }, {"k", "blocks of 32"}}});

  expect_error("", [&] { paged({pages, 3, 256}, table, 10); }, {"strided"});
  expect_error("", [&] { ring(pages, 0, 1); }, {"strided"});
  expect_error("", [&] { paged_by_head({page, 3, 256}, table, 0, 2, 10); }, {"2"});
  expect_error(
      "scales", [&] {
        scaled(nhd<const std::int8_t>(bytes.data(), 10, 2, 8),
               nhd<const float>(memory.data(), 9, 2, 1));
      },
      {"9", "10"});
  expect_error("", [&] { stored_view(page).columns(4, 9); }, {"9", "8"});
  expect_error(
      "blocks", [&] {
        std::vector<q8_0> blocks(4);
        quantised(nhd<const q8_0>(blocks.data(), 1, 1, 4)).columns(16, 48);
      },
      {"16"});
}

// Outputs must lie outside whatever a view can reach.
TEST(layouts, outputs_may_not_overlap_what_is_read) {
  std::vector<float> memory(4096, 1.0f);
  std::vector<std::int32_t> table = {2, 0, 1};
  std::vector<std::int8_t> bytes(1000);
  float* const x = memory.data();
  context ctx(1);
  const attention_plan plan = plan_decode(ctx, {1, 10, 2, 2, 9}, dense{});
  const auto q = nhd<const float>(x, 1, 2, 8);
  const auto out = [&](index_t offset) { return nhd(x + offset, 1, 2, 8); };
  const stored_view pages = paged({nhd(x + 1024, 4, 2, 8), 3, 1024}, table, 10);
  const stored_view slots = ring(nhd(x + 1024, 12, 2, 8), 5, 10);
  const stored_view ints = scaled(nhd<const std::int8_t>(bytes.data(), 10, 2, 8),
                                  nhd<const float>(x + 1024, 10, 2, 1));
  const auto overlaps = [&](const stored_view& k, index_t offset) {
    const stored_view v = nhd(x + 3000, 10, 2, 8);
    try {
      attend(ctx, plan, q, kv(k, v), {out(offset)});
    } catch (const shape_error&) {
      return true;
    }
    return false;
  };
  EXPECT_FALSE(overlaps(pages, 1024 - 16));
  EXPECT_TRUE(overlaps(pages, 1024 - 15));
  EXPECT_TRUE(overlaps(pages, 1024 + 512 + 63));
  EXPECT_FALSE(overlaps(pages, 1024 + 512 + 64));
  EXPECT_TRUE(overlaps(slots, 1024 + 12 * 16 - 1));
  EXPECT_FALSE(overlaps(slots, 1024 + 12 * 16));
  EXPECT_TRUE(overlaps(ints, 1024 + 19));
  EXPECT_FALSE(overlaps(ints, 1024 + 20));
}

}  // namespace
