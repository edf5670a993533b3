// SPDX-License-Identifier: Apache-2.0
#include <sattn/interop/minference_json.hpp>

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "support/errors.hpp"

namespace {

using namespace sattn;  // NOLINT(google-build-using-namespace)
using test_support::error_of;

std::vector<minference_heads> read(const std::string& text, index_t q_heads = 4) {
  return read_minference(nlohmann::json::parse(text), q_heads);
}

// As in config/Llama_3_8B_Instruct_262k_kv_out_v32_fit_o_best_pattern.json, but for four heads.
TEST(read_minference, gives_each_head_of_each_layer_its_setting) {
  const std::vector<minference_heads> layers =
      read(R"([{"0": ["vertical_and_slash", 1000, 6096, 336187.93],
                "3": ["vertical_and_slash", 30, 800, 1.0],
                "1": ["stream_llm", 128, 3968, 1.0]},
               {}])");
  ASSERT_EQ(layers.size(), 2U);
  using kind = minference_head::kind;
  const auto expect = [&](std::size_t layer, std::size_t head, kind type, token_t first,
                          token_t second) {
    const minference_head& h = layers[layer].heads[head];
    EXPECT_EQ(h.type, type) << layer << " " << head;
    EXPECT_EQ(h.first, first) << layer << " " << head;
    EXPECT_EQ(h.second, second) << layer << " " << head;
  };
  expect(0, 0, kind::vertical_slash, 1000, 6096);
  expect(0, 1, kind::streaming, 128, 3968);
  expect(0, 2, kind::vertical_slash, 1000, 6096);
  expect(0, 3, kind::vertical_slash, 30, 800);
  for (std::size_t head = 0; head < 4; ++head) expect(1, head, kind::vertical_slash, 1000, 6096);
  EXPECT_TRUE(read("[]").empty());
}

TEST(read_minference, refuses_what_is_something_else) {
  const auto error = [](const std::string& text) { return error_of([&] { read(text); }); };
  EXPECT_NE(error("{}"), "");
  EXPECT_NE(error("[1]"), "");
  EXPECT_NE(error(R"([{"4": ["vertical_and_slash", 1, 2, 3]}])").find("head 4"),
            std::string::npos);
  for (const char* head : {"", "-1", "1x", "99999999999999999999"}) {
    EXPECT_NE(error("[{\"" + std::string(head) + "\": [\"vertical_and_slash\", 1, 2, 3]}]"), "");
  }
  EXPECT_NE(error(R"([{"0": ["vertical_and_slash", 1]}])"), "");
  EXPECT_NE(error(R"([{"0": ["vertical_and_slash", 1.5, 2, 3]}])"), "");
  EXPECT_NE(error(R"([{"0": ["vertical_and_slash", -1, 2, 3]}])"), "");
  EXPECT_NE(error(R"([{"0": ["vertical_and_slash", 1, 3000000000, 3]}])"), "");
  EXPECT_NE(error(R"([{"0": [7, 1, 2, 3]}])"), "");
  EXPECT_NE(error_of<unsupported>([] { read(R"([{"0": ["block_sparse", 1, 2, 3]}])"); }), "");
}

}  // namespace
