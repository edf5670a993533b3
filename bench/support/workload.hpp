// SPDX-License-Identifier: Apache-2.0
//
// Tensors of random numbers and the selections that the benches attend to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <sattn/sattn.hpp>
#include <utility>
#include <vector>

namespace bench {

using sattn::index_t;
using sattn::token_t;
using generator = std::minstd_rand;

inline token_t below(generator& random, index_t limit) {
  return static_cast<token_t>(random() % static_cast<std::uint64_t>(limit));
}

inline std::vector<float> random_floats(index_t count, unsigned seed) {
  generator random(seed);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& x : values) x = static_cast<float>(random() % 65536) / 32768.0f - 1.0f;
  return values;
}

/// Token-major tensors of one sequence. K and V may hold more tokens than the sequence: kv(begin)
/// is a cache of kv_len tokens somewhere in them.
struct tensors {
  sattn::attention_shape shape;
  index_t dim;
  index_t kv_tokens;
  std::vector<float> q, k, v, out;

  tensors(const sattn::attention_shape& s, index_t head_dim, index_t all_kv_tokens)
      : shape(s),
        dim(head_dim),
        kv_tokens(all_kv_tokens),
        q(random_floats(s.q_len * s.q_heads * dim, 1)),
        k(random_floats(kv_tokens * s.kv_heads * dim, 2)),
        v(random_floats(kv_tokens * s.kv_heads * dim, 3)),
        out(q.size()) {}

  sattn::tensor_view<const float> q_view() const {
    return sattn::nhd(q.data(), shape.q_len, shape.q_heads, dim);
  }
  sattn::tensor_view<float> out_view() {
    return sattn::nhd(out.data(), shape.q_len, shape.q_heads, dim);
  }
  sattn::kv_view<float> kv(index_t begin = 0) const {
    const auto all = [&](const std::vector<float>& x) {
      return sattn::nhd(x.data(), kv_tokens, shape.kv_heads, dim);
    };
    return sattn::kv(all(k).slice(begin, begin + shape.kv_len),
                     all(v).slice(begin, begin + shape.kv_len));
  }
};

/// For each query head and query block its own blocks: the last legal one and random others.
inline sattn::block_lists random_blocks(const sattn::attention_shape& shape, token_t q_block,
                                        token_t k_block, double density, index_t sets,
                                        unsigned seed) {
  generator random(seed);
  sattn::block_lists lists{q_block, k_block, {0}, {}, sets};
  std::vector<token_t> order;
  for (index_t i = 0; i < sets * sattn::ceil_div(shape.q_len, q_block); ++i) {
    const index_t first_row = i % sattn::ceil_div(shape.q_len, q_block) * q_block;
    const index_t last_row = std::min(first_row + q_block, shape.q_len) - 1;
    const index_t blocks = shape.position(last_row) / k_block + 1;
    order.clear();
    for (index_t j = 0; j < blocks; ++j) order.push_back(static_cast<token_t>(j));
    std::shuffle(order.begin(), order.end() - 1, random);
    std::swap(order.front(), order.back());
    const auto count =
        std::max<index_t>(1, static_cast<index_t>(density * static_cast<double>(blocks) + 0.5));
    std::sort(order.begin(), order.begin() + count);
    lists.indices.insert(lists.indices.end(), order.begin(), order.begin() + count);
    lists.indptr.push_back(std::ssize(lists.indices));
  }
  return lists;
}

/// 64 local distances, `runs` runs of `run_size` distances and `columns` single keys, at random.
inline sattn::vertical_slash random_slashes(index_t kv_len, index_t runs, index_t run_size,
                                            index_t columns) {
  generator random(5);
  sattn::vertical_slash pattern;
  for (index_t d = 0; d < 64; ++d) pattern.distances.push_back(static_cast<token_t>(d));
  for (index_t i = 0; i < runs; ++i) {
    const token_t begin = below(random, kv_len - run_size);
    for (index_t d = 0; d < run_size; ++d) {
      pattern.distances.push_back(static_cast<token_t>(begin + d));
    }
  }
  for (index_t i = 0; i < columns; ++i) pattern.columns.push_back(below(random, kv_len));
  return pattern;
}

/// `count` random legal keys for every query row of every set, as an indexer would pick them.
inline sattn::token_lists random_tokens(const sattn::attention_shape& shape, index_t count,
                                        index_t sets) {
  generator random(7);
  sattn::token_lists lists{1, {0}, {}, sets};
  for (index_t i = 0; i < sets * shape.q_len; ++i) {
    const index_t legal = shape.position(i % shape.q_len) + 1;
    for (index_t n = 0; n < std::min(count, legal); ++n) {
      lists.tokens.push_back(legal <= count ? static_cast<token_t>(n) : below(random, legal));
    }
    lists.indptr.push_back(std::ssize(lists.tokens));
  }
  return lists;
}

}  // namespace bench
