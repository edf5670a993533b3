// SPDX-License-Identifier: Apache-2.0
//
// Tensors of random numbers, and random selections of the shapes that methods make.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <sattn/sattn.hpp>
#include <sstream>
#include <string>
#include <vector>

namespace bench {

using sattn::attention_shape;
using sattn::index_t;
using sattn::token_t;
using generator = std::minstd_rand;

/// The parts, one behind the other.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

inline token_t below(generator& random, index_t limit) {
  return static_cast<token_t>(static_cast<index_t>(random()) % limit);
}

inline std::vector<float> random_floats(index_t count, unsigned seed) {
  generator random(seed);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& x : values) x = static_cast<float>(below(random, 65536)) / 32768.0f - 1.0f;
  return values;
}

/// Token-major tensors of one sequence.
struct tensors {
  attention_shape shape;
  index_t dim;
  index_t v_dim;
  std::vector<float> q, k, v, out;
  sattn::dtype kv_type = sattn::dtype::f32;
  std::vector<std::uint16_t> k_half, v_half;  // the same in kv_type

  tensors(const attention_shape& s, index_t head_dim, index_t value_dim, sattn::dtype type)
      : shape(s),
        dim(head_dim),
        v_dim(value_dim),
        q(random_floats(s.q_len * s.q_heads * dim, 1)),
        k(random_floats(s.kv_len * s.kv_heads * dim, 2)),
        v(random_floats(s.kv_len * s.kv_heads * v_dim, 3)),
        out(static_cast<std::size_t>(s.q_len * s.q_heads * v_dim)),
        kv_type(type) {
    if (type == sattn::dtype::f32) return;
    const auto rounded = [&](const std::vector<float>& x) {
      std::vector<std::uint16_t> half;
      for (const float value : x) {
        half.push_back(type == sattn::dtype::f16 ? sattn::to_f16(value).bits
                                                 : sattn::to_bf16(value).bits);
      }
      return half;
    };
    k_half = rounded(k);
    v_half = rounded(v);
  }

  sattn::tensor_view<const float> q_view() const {
    return sattn::nhd(q.data(), shape.q_len, shape.q_heads, dim);
  }
  sattn::tensor_view<float> out_view() {
    return sattn::nhd(out.data(), shape.q_len, shape.q_heads, v_dim);
  }
  /// K and V stored as `type`.
  sattn::kv_view kv(sattn::dtype type) const {
    const auto cache = [&](const auto* x, index_t width) {
      return sattn::nhd(x, shape.kv_len, shape.kv_heads, width);
    };
    const auto pair = [&](const auto* keys, const auto* values) {
      return sattn::kv(cache(keys, dim), cache(values, v_dim));
    };
    using sattn::bf16;
    using sattn::f16;
    if (type == sattn::dtype::f32) return pair(k.data(), v.data());
    if (type == sattn::dtype::f16) {
      return pair(reinterpret_cast<const f16*>(k_half.data()),
                  reinterpret_cast<const f16*>(v_half.data()));
    }
    return pair(reinterpret_cast<const bf16*>(k_half.data()),
                reinterpret_cast<const bf16*>(v_half.data()));
  }
};

/// For each set and query block its own key blocks: the last legal one and random others.
inline sattn::block_lists random_blocks(const attention_shape& shape, token_t q_block,
                                        token_t k_block, double density, index_t sets,
                                        unsigned seed) {
  generator random(seed + 1);
  sattn::block_lists lists{q_block, k_block, {0}, {}, sets};
  const index_t rows = sattn::ceil_div(shape.q_len, q_block);
  for (index_t i = 0; i < sets * rows; ++i) {
    const index_t last_row = std::min((i % rows + 1) * q_block, shape.q_len) - 1;
    std::vector<token_t> blocks;
    for (token_t j = shape.position(last_row) / k_block; j >= 0; --j) blocks.push_back(j);
    std::shuffle(blocks.begin() + 1, blocks.end(), random);
    const double count = std::max(1.0, density * static_cast<double>(blocks.size()) + 0.5);
    blocks.resize(static_cast<std::size_t>(count));
    std::sort(blocks.begin(), blocks.end());
    lists.indices.insert(lists.indices.end(), blocks.begin(), blocks.end());
    lists.indptr.push_back(std::ssize(lists.indices));
  }
  return lists;
}

/// 64 local distances, and at random `runs` runs of `run_size` distances and `columns` keys.
inline sattn::vertical_slash random_slashes(index_t kv_len, index_t runs, token_t run_size,
                                            index_t columns, unsigned seed = 1) {
  generator random(seed);
  sattn::vertical_slash pattern;
  for (token_t d = 0; d < 64; ++d) pattern.distances.push_back(d);
  for (index_t i = 0; i < runs; ++i) {
    const token_t begin = below(random, kv_len - run_size);
    for (token_t d = 0; d < run_size; ++d) pattern.distances.push_back(begin + d);
  }
  for (index_t i = 0; i < columns; ++i) pattern.columns.push_back(below(random, kv_len));
  return pattern;
}

/// Draws different numbers.
class distinct_numbers {
 public:
  explicit distinct_numbers(index_t limit) : taken_(static_cast<std::size_t>(limit)) {}

  /// Adds `count` numbers of [0, limit) to `out` that are not there from `first` on.
  void draw(generator& random, index_t count, index_t limit, std::size_t first,
            std::vector<token_t>& out) {
    for (std::size_t i = first; i < out.size(); ++i) taken_[at(out[i])] = 1;
    for (index_t n = 0; n < count; ++n) {
      token_t number = below(random, limit);
      while (taken_[at(number)] != 0) number = below(random, limit);
      taken_[at(number)] = 1;
      out.push_back(number);
    }
    for (std::size_t i = first; i < out.size(); ++i) taken_[at(out[i])] = 0;
  }

 private:
  static std::size_t at(token_t number) { return static_cast<std::size_t>(number); }
  std::vector<std::uint8_t> taken_;
};

/// `count` different random legal keys for every query row of every set, unsorted; all keys where
/// there are no more.
inline sattn::token_lists random_tokens(const attention_shape& shape, index_t count, index_t sets) {
  generator random(1);
  distinct_numbers numbers(shape.kv_len);
  sattn::token_lists lists{1, {0}, {}, sets};
  for (index_t i = 0; i < sets * shape.q_len; ++i) {
    const index_t legal = shape.position(i % shape.q_len) + 1;
    const std::size_t first = lists.tokens.size();
    if (legal > count) {
      numbers.draw(random, count, legal, first, lists.tokens);
    } else {
      for (token_t key = 0; key < legal; ++key) lists.tokens.push_back(key);
    }
    lists.indptr.push_back(std::ssize(lists.tokens));
  }
  return lists;
}

/// The same, but each row keeps a share `overlap` of the keys of the row before it. `core`: always
/// the same ones, of which each stays for 64 rows (1.6 % less in common for each row further
/// apart); otherwise any, so that rows two apart have overlap^2 in common, and so on.
inline sattn::token_lists alike_tokens(const attention_shape& shape, index_t count, double overlap,
                                       bool core, index_t sets) {
  generator random(1);
  distinct_numbers numbers(shape.kv_len);
  sattn::token_lists lists{1, {0}, {}, sets};
  const auto kept = static_cast<index_t>(overlap * static_cast<double>(count) + 0.5);
  std::vector<token_t> common;
  for (index_t i = 0; i < sets * shape.q_len; ++i) {
    const index_t row = i % shape.q_len;
    const index_t legal = shape.position(row) + 1;
    if (row == 0) common.clear();
    const std::size_t first = lists.tokens.size();
    if (legal <= count) {
      for (token_t key = 0; key < legal; ++key) lists.tokens.push_back(key);
      common.assign(lists.tokens.end() - std::min(kept, legal), lists.tokens.end());
    } else {
      if (core) {
        // Every 64 rows each place of the core gets a new key once.
        const index_t out = kept * (row + 1) / 64 - kept * row / 64;
        common.erase(common.begin(), common.begin() + std::min(out, std::ssize(common)));
        numbers.draw(random, kept - std::ssize(common), legal, 0, common);
      }
      lists.tokens.insert(lists.tokens.end(), common.begin(), common.end());
      numbers.draw(random, count - std::ssize(common), legal, first, lists.tokens);
      if (!core) {
        common.assign(lists.tokens.begin() + static_cast<std::ptrdiff_t>(first),
                      lists.tokens.end());
        std::shuffle(common.begin(), common.end(), random);
        common.resize(static_cast<std::size_t>(kept));
      }
    }
    lists.indptr.push_back(std::ssize(lists.tokens));
  }
  return lists;
}

}  // namespace bench
