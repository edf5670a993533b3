// SPDX-License-Identifier: Apache-2.0
//
// The oracle of the tests: masked attention in double, written for reading, with an error bound for
// every number it returns. It includes nothing from the library, so that a mistake in a shared
// header cannot hide on both sides.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <vector>

namespace reference {

/// A [tokens, heads, dim] tensor in elements, unit stride in dim.
struct strided {
  const float* data = nullptr;
  std::ptrdiff_t token_stride = 0;
  std::ptrdiff_t head_stride = 0;
};

/// One attention call. Storage types narrower than float are rounded (or dequantised) by the
/// caller.
struct problem {
  std::ptrdiff_t q_len = 0;
  std::ptrdiff_t kv_len = 0;
  std::ptrdiff_t q_heads = 1;
  // Divides q_heads; query head h reads kv head h / (q_heads / kv_heads).
  std::ptrdiff_t kv_heads = 1;
  std::ptrdiff_t head_dim = 0;
  std::ptrdiff_t v_dim = 0;
  strided q = {};
  strided k = {};
  strided v = {};
  double scale = 1;
  // 0 is off; otherwise logit = soft_cap * tanh(scale * q.k / soft_cap).
  double soft_cap = 0;
  // [q_heads] or null: joins the denominator only, after the mask; -inf is no sink.
  const float* sink_logits = nullptr;
  // The whole mask, causality included: (q_head, row, key) -> is the key seen. Empty: every key is.
  // K and V of a key that is not selected are never read.
  std::function<bool(std::ptrdiff_t, std::ptrdiff_t, std::ptrdiff_t)> selected = {};
};

/// Outputs and how far a correct f32 implementation may be from them; see the derivation in
/// reference.cpp.
struct result {
  std::vector<double> out;  // [q_len, q_heads, v_dim]; 0 for a row without keys
  std::vector<double> lse;  // [q_len, q_heads], natural log, without the sink; -inf without keys
  std::vector<double> out_bound;  // like out
  std::vector<double> lse_bound;  // like lse
  std::vector<double> mass;       // [kv_len, q_heads]: each key's probability, summed over rows
  std::vector<double> mass_bound;  // like mass
};

/// A selected key with a logit of -inf has weight 0; a row of only such keys counts as a row
/// without keys. A NaN or +inf logit makes its row and head NaN. Throws std::invalid_argument if
/// kv_heads does not divide q_heads.
result attention(const problem& p);

/// The probability of each of the kv_len keys, 0 where not selected. With a sink they sum to less
/// than 1.
std::vector<double> probabilities(const problem& p, std::ptrdiff_t q_head, std::ptrdiff_t row);

/// Positions of the k largest scores (all of them if there are fewer), ascending. Of equal scores
/// the lower position wins. The scores hold no NaN.
std::vector<std::ptrdiff_t> top_k(std::span<const double> scores, std::ptrdiff_t k);

}  // namespace reference
