// SPDX-License-Identifier: Apache-2.0
//
// Tensors of random numbers, and random selections of the shapes that methods make.
#pragma once

#include <algorithm>
#include <random>
#include <sattn/sattn.hpp>
#include <vector>

namespace bench {

using sattn::attention_shape;
using sattn::index_t;
using sattn::token_t;
using generator = std::minstd_rand;

inline token_t below(generator& random, index_t limit) {
  return static_cast<token_t>(static_cast<index_t>(random()) % limit);
}

inline std::vector<float> random_floats(index_t count, unsigned seed) {
  generator random(seed);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& x : values) x = static_cast<float>(below(random, 65536)) / 32768.0f - 1.0f;
  return values;
}

/// Token-major tensors of one sequence. K and V may hold many caches of kv_len tokens.
struct tensors {
  attention_shape shape;
  index_t dim;
  index_t kv_tokens;
  std::vector<float> q, k, v, out;

  tensors(const attention_shape& s, index_t head_dim, index_t caches)
      : shape(s),
        dim(head_dim),
        kv_tokens(caches * s.kv_len),
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
  /// The cache that starts at token `begin`.
  sattn::kv_view kv(index_t begin) const {
    const auto cache = [&](const std::vector<float>& x) {
      return sattn::nhd(x.data(), kv_tokens, shape.kv_heads, dim)
          .slice(begin, begin + shape.kv_len);
    };
    return sattn::kv(cache(k), cache(v));
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
                                            index_t columns) {
  generator random(1);
  sattn::vertical_slash pattern;
  for (token_t d = 0; d < 64; ++d) pattern.distances.push_back(d);
  for (index_t i = 0; i < runs; ++i) {
    const token_t begin = below(random, kv_len - run_size);
    for (token_t d = 0; d < run_size; ++d) pattern.distances.push_back(begin + d);
  }
  for (index_t i = 0; i < columns; ++i) pattern.columns.push_back(below(random, kv_len));
  return pattern;
}

/// `count` random legal keys for every query row of every set, unsorted; all keys where there are
/// no more. Duplicates make some lists a little shorter.
inline sattn::token_lists random_tokens(const attention_shape& shape, index_t count, index_t sets) {
  generator random(1);
  sattn::token_lists lists{1, {0}, {}, sets};
  for (index_t i = 0; i < sets * shape.q_len; ++i) {
    const index_t legal = shape.position(i % shape.q_len) + 1;
    for (token_t n = 0; n < std::min(count, legal); ++n) {
      lists.tokens.push_back(legal <= count ? n : below(random, legal));
    }
    lists.indptr.push_back(std::ssize(lists.tokens));
  }
  return lists;
}

}  // namespace bench
