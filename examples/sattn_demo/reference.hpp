// SPDX-License-Identifier: Apache-2.0
//
// Dense attention in double, for errors.
#pragma once

#include "layer.hpp"
#include "measurement.hpp"

#include <sattn/exec/context.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

namespace demo {

/// Dense causal attention of some rows, computed in double by two plain loops.
struct reference {
  std::vector<index_t> rows;  // spread evenly, the first and the last included
  std::vector<double> out;    // [rows, q_heads, v_dim]
};

inline void attend_row(const layer& l, index_t row, index_t q_head, double* out) {
  const sattn::attention_shape shape = l.shape();
  const index_t kv_head = q_head / shape.group_size();
  const index_t keys = shape.position(row) + 1;
  const float* const q = l.q.view().row(row, q_head);
  const double scale = 1.0 / std::sqrt(static_cast<double>(l.q.dim));

  std::vector<double> weights(static_cast<std::size_t>(keys));
  for (index_t key = 0; key < keys; ++key) {
    const float* const k = l.k.view().row(key, kv_head);
    double dot = 0.0;
    for (index_t i = 0; i < l.q.dim; ++i) {
      dot += static_cast<double>(q[i]) * static_cast<double>(k[i]);
    }
    weights[static_cast<std::size_t>(key)] = dot * scale;
  }
  const double largest = *std::max_element(weights.begin(), weights.end());
  double sum = 0.0;
  for (double& w : weights) sum += w = std::exp(w - largest);
  std::fill(out, out + l.v.dim, 0.0);
  for (index_t key = 0; key < keys; ++key) {
    const double share = weights[static_cast<std::size_t>(key)] / sum;
    const float* const v = l.v.view().row(key, kv_head);
    for (index_t i = 0; i < l.v.dim; ++i) out[i] += share * static_cast<double>(v[i]);
  }
}

inline reference make_reference(sattn::context& ctx, const layer& l, index_t row_count) {
  reference result;
  const index_t count = std::min(row_count, l.q.tokens);
  for (index_t i = 0; i < count; ++i) {
    result.rows.push_back(count == 1 ? l.q.tokens - 1 : i * (l.q.tokens - 1) / (count - 1));
  }
  result.out.resize(static_cast<std::size_t>(count * l.q.heads * l.v.dim));
  ctx.executor().parallel_for(count * l.q.heads, [&](index_t task, index_t) {
    attend_row(l, result.rows[static_cast<std::size_t>(task / l.q.heads)], task % l.q.heads,
               result.out.data() + task * l.v.dim);
  });
  return result;
}

/// The relative error of out [q_len, q_heads, v_dim] over the reference's rows.
inline double error_of(const reference& expected, const sattn::tensor_view<const float>& out) {
  relative_error error;
  const double* e = expected.out.data();
  for (const index_t row : expected.rows) {
    for (index_t head = 0; head < out.heads; ++head) {
      for (index_t i = 0; i < out.dim; ++i) error.add(double{out.row(row, head)[i]}, *e++);
    }
  }
  return error.value();
}

}  // namespace demo
