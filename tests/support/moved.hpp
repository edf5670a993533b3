// SPDX-License-Identifier: Apache-2.0
//
// What attention makes of keys and values that are not quite those of the oracle.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "support/problem.hpp"

namespace test_support {

/// Widens the bounds of `want`, the result for keys and values near those of `p`: a logit is off by
/// logit_error(q_head, row, key) at most, a value by value_error(kv_head, key), element by element.
///
/// Let e be the largest error of a row's logits. Keys of probability P in all then have at most
/// P x / (P x + (1 - P) / x), x = exp(e), which is more by tanh(e / 2) at most, where P = 1 / (1 +
/// x). So much mass goes from some values to others, which moves an output by no more than that
/// share of their range. The lse moves by e.
template <class LogitError, class ValueError>
void widen(reference::result& want, const attention_problem& p, const mask_function& selected,
           LogitError&& logit_error, ValueError&& value_error) {
  const index_t dim = p.v_dim;
  for (index_t pair = 0; pair < std::ssize(want.lse); ++pair) {
    const index_t row = pair / p.shape.q_heads, head = pair % p.shape.q_heads;
    const index_t kv_head = head / p.shape.group_size();
    double logit = 0, value = 0;
    std::vector<double> low(at(dim), infinity), high(at(dim), -infinity);
    for (index_t key = 0; key < p.shape.kv_len; ++key) {
      if (!selected(head, row, key)) continue;
      logit = std::max(logit, logit_error(head, row, key));
      value = std::max(value, value_error(kv_head, key));
      for (index_t i = 0; i < dim; ++i) {
        low[at(i)] = std::min(low[at(i)], double{p.v.row(key, kv_head)[i]});
        high[at(i)] = std::max(high[at(i)], double{p.v.row(key, kv_head)[i]});
      }
    }
    want.lse_bound[at(pair)] += logit;
    for (index_t i = 0; i < dim && low[0] <= high[0]; ++i) {
      want.out_bound[at(pair * dim + i)] +=
          std::tanh(logit / 2) * (high[at(i)] - low[at(i)]) + value;
    }
  }
}

/// |scale| sum_d |q_d| error_of(d), of a query and a key.
template <class ErrorOf>
double logit_error(const attention_problem& p, index_t q_head, index_t row, ErrorOf&& error_of) {
  const index_t dim = p.q.view().dim;
  double sum = 0;
  for (index_t d = 0; d < dim; ++d) sum += std::abs(double{p.q.row(row, q_head)[d]}) * error_of(d);
  return sum * std::abs(p.scale ? double{*p.scale} : 1 / std::sqrt(static_cast<double>(dim)));
}

}  // namespace test_support
