// SPDX-License-Identifier: Apache-2.0
//
// The error bound. u = 2^-24 is the unit roundoff of float; gamma(m) = m u / (1 - m u) bounds m
// roundings in a row (Higham, Accuracy and Stability of Numerical Algorithms, chapter 3). It holds
// for fused and unfused operations, any order of summation, softmax in base e or 2, in three passes
// or streaming over chunks of `rescale_keys` keys or more. It does not hold where float overflows.
//
// Logit j, for A_j = |scale| sum_i |q_i k_ji|:
//   delta_j = gamma(head_dim + 4) A_j
//                 the products and sums; 4 more: rounding scale to float, folding log2(e) into it
//                 (its own rounding and the product's), and applying it
//           + (head_dim + 2) max(1, |scale|) FLT_MIN
//                 products that underflow
//   The soft cap multiplies delta_j by its largest slope within delta_j of the logit (1 at most)
//   and adds 8 u cap: tanh by way of exp has an absolute error, not a relative one, near 0.
//
// Weight w_j = exp(t_j), t_j = s_j - max <= 0, its error taken in the exponent:
//   e_j = delta_j
//       + 3 u |t_j|
//                 the argument of exp: the subtraction, log2(e) and the product with it. Small, as
//                 sum_j p_j |t_j| = entropy(p) - log Z <= log(keys)
//       + (exp_error + (exp_error + 1) R) u
//                 exp itself, and R = ceil(keys / rescale_keys) rescales of what was summed before.
//                 The arguments of the rescales add up to t_j at most: 3 u |t_j| covers them too
//   h_j = exp(t_j + e_j) - exp(t_j)
//                 the most the weight can move, either way
//
// Output, for Z = sum_j w_j, H = sum_j h_j and N(m) = m + R + 6 roundings of a sum of m terms (the
// additions, the rescales; 6: the division or reciprocal, the merge of splits, the sink's factor):
//   P_i = sum_j h_j |v_ji - out_i| / (Z - H)
//                 the moved weights; as sum_j w_j (v_ji - out_i) = 0, only their change is left,
//                 which is sharper than 2 max_j(e_j) sum_j p_j |v_ji|. At most max_j |v_ji -
//                 out_i|, all that is known once logits are so large that their error exceeds 1
//   out_bound_i = P_i
//       + gamma(N(terms_i)) sum_j (w_j + h_j) |v_ji| / (Z - H)
//                 rounding the numerator; terms_i counts v_ji != 0, as adding 0 is exact
//       + gamma(N(keys)) (|out_i| + P_i)
//                 rounding the denominator
//       + 4 FLT_MIN (sum_j |v_ji| + keys + 1)
//                 weights and products that are flushed to 0 (Z >= 1)
// The sink is a key with v = 0. Its logit is exact, but may meet the keys by way of a rounded lse.
//
// lse_bound = min(-log(1 - H / Z), max_j e_j)
//                 the moved weights
//           + gamma(N(keys)) + u (4 + 4 |log Z| + 2 |max| + |lse|)
//                 their sum; log, the way back from base 2, and the last addition
//
// Mass, a sum of p_j = w_j / Z over rows, whether divided or taken as exp(s_j - log Z):
//   E_j = e_j + lse_bound + u (4 |log p_j| + 2 |log Z + max| + 8)
//                 the logit; the sum; the difference of the two, log2(e) and the product with it;
//                 the way of the sink into log Z and of log Z into float
//   mass_bound = sum_rows max(min(1, p_j exp(E_j)) - p_j, p_j (1 - exp(-E_j)))
//                 a probability that exceeds 1 by its rounding counts as 1
//       + gamma(rows + 6) sum_rows min(1, p_j exp(E_j)) + 4 rows FLT_MIN
//
// Double suffices for the oracle: its own error is 2^-29 of the bound, at any length.

#include "reference/reference.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace reference {
namespace {

constexpr double unit_roundoff = 0x1p-24;
constexpr double exp_error = 4;      // relative error of a float exp, in u; 1.5 ulp is 3 u at most
constexpr double rescale_keys = 16;  // a streaming softmax rescales at most once for this many keys
constexpr double float_min = 0x1p-126;
constexpr double infinity = std::numeric_limits<double>::infinity();

double gamma(double roundings) {
  return roundings * unit_roundoff / (1 - roundings * unit_roundoff);
}

std::size_t at(std::ptrdiff_t index) { return static_cast<std::size_t>(index); }

const float* row_of(const strided& x, std::ptrdiff_t token, std::ptrdiff_t head) {
  return x.data + token * x.token_stride + head * x.head_stride;
}

std::ptrdiff_t kv_head_of(const problem& p, std::ptrdiff_t q_head) {
  if (p.kv_heads <= 0 || p.q_heads % p.kv_heads != 0) {
    throw std::invalid_argument("reference: kv_heads does not divide q_heads");
  }
  return q_head / (p.q_heads / p.kv_heads);
}

struct logit {
  std::ptrdiff_t key;
  double value;
  double error;  // delta_j
};

void apply_soft_cap(logit& s, double cap) {
  const double flattest = std::max(std::abs(s.value) - s.error, 0.0) / cap;
  const double slope = 1 / std::cosh(flattest);
  s.value = cap * std::tanh(s.value / cap);
  s.error = s.error * slope * slope + 8 * unit_roundoff * cap;
}

logit logit_of(const problem& p, const float* q, const float* k, std::ptrdiff_t key) {
  double dot = 0;
  double magnitude = 0;
  for (std::ptrdiff_t i = 0; i < p.head_dim; ++i) {
    const double product = double{q[i]} * double{k[i]};
    dot += product;
    magnitude += std::abs(product);
  }
  const double dim = static_cast<double>(p.head_dim);
  logit s{.key = key,
          .value = p.scale * dot,
          .error = gamma(dim + 4) * std::abs(p.scale) * magnitude +
                   (dim + 2) * std::max(1.0, std::abs(p.scale)) * float_min};
  if (p.soft_cap > 0) apply_soft_cap(s, p.soft_cap);
  return s;
}

// Pass 1. Keys of weight 0 stay in: their values must still be read, as 0 * NaN is NaN.
std::vector<logit> selected_logits(const problem& p, std::ptrdiff_t q_head, std::ptrdiff_t row) {
  std::vector<logit> logits;
  const std::ptrdiff_t kv_head = kv_head_of(p, q_head);
  const float* q = row_of(p.q, row, q_head);
  for (std::ptrdiff_t key = 0; key < p.kv_len; ++key) {
    if (p.selected && !p.selected(q_head, row, key)) continue;
    logits.push_back(logit_of(p, q, row_of(p.k, key, kv_head), key));
  }
  return logits;
}

double max_of(std::span<const logit> logits) {
  double max = -infinity;
  for (const logit& s : logits) {
    if (std::isnan(s.value)) return s.value;
    max = std::max(max, s.value);
  }
  return max;
}

struct weight {
  double value = 0;  // w_j
  double shift = 0;  // h_j
  double error = 0;  // e_j
};

weight weight_of(const logit& s, double max, double rescales) {
  if (s.value == -infinity) return {};
  const double t = s.value - max;
  const double error = s.error + 3 * unit_roundoff * std::abs(t) +
                       (exp_error + (exp_error + 1) * rescales) * unit_roundoff;
  // The clamp keeps an arbitrarily large shift finite, so that 0 * shift is 0 and not NaN.
  return {std::exp(t), std::exp(std::min(t + error, 80.0)) - std::exp(t), error};
}

struct softmax {
  double max = -infinity;
  double sum = 0;        // Z
  double sum_shift = 0;  // H
  double max_error = 0;
  std::vector<weight> weights = {};

  void add(const weight& w) {
    sum += w.value;
    sum_shift += w.shift;
    max_error = std::max(max_error, w.error);
  }
  bool empty() const { return max == -infinity; }
};

double rescales_of(std::size_t keys) { return std::ceil(static_cast<double>(keys) / rescale_keys); }

double rounding_of_sum(std::size_t terms, std::size_t keys) {
  return gamma(static_cast<double>(terms) + rescales_of(keys) + 6);
}

// Pass 2.
softmax softmax_of(std::span<const logit> logits, double max) {
  softmax s{.max = max};
  if (s.empty()) return s;
  for (const logit& l : logits) {
    s.weights.push_back(weight_of(l, max, rescales_of(logits.size())));
    s.add(s.weights.back());
  }
  return s;
}

struct bounded {
  double value;
  double bound;
};

bounded lse_of(const softmax& s) {
  if (s.empty()) return {-infinity, 0};
  const double log_sum = std::log(s.sum);
  const double lse = s.max + log_sum;
  const double share = s.sum_shift / s.sum;
  const double moved = share < 1 ? std::min(-std::log1p(-share), s.max_error) : s.max_error;
  return {lse,
          moved + rounding_of_sum(s.weights.size(), s.weights.size()) +
              unit_roundoff * (4 + 4 * std::abs(log_sum) + 2 * std::abs(s.max) + std::abs(lse))};
}

// The softmax that weighs V: the sink takes part in the maximum and in the sums, but has no row of
// V.
softmax with_sink(const problem& p, std::ptrdiff_t q_head, std::span<const logit> logits,
                  const softmax& keys, weight& sink) {
  sink = {};
  if (p.sink_logits == nullptr || keys.empty()) return keys;
  const double value = double{p.sink_logits[q_head]};
  // Rounded again when log2(e) is folded in, and compared with an lse that carries its own
  // rounding.
  const double error =
      unit_roundoff * (2 * std::abs(value) + 3 * (1 + std::abs(lse_of(keys).value)));
  softmax s = softmax_of(logits, value > keys.max ? value : keys.max);
  sink = weight_of({.key = -1, .value = value, .error = error}, s.max, 0);
  s.add(sink);
  return s;
}

// Pass 3, one element of the output; v[j] is its value in the j-th selected key.
bounded mean_of(const softmax& s, const weight& sink, std::span<const double> v) {
  double out = 0;
  for (std::size_t j = 0; j < v.size(); ++j) out += s.weights[j].value * v[j];
  out /= s.sum;

  double spread = sink.shift * std::abs(out);
  double range = sink.value + sink.shift > 0 ? std::abs(out) : 0;
  double magnitude = 0;
  double peak = 0;
  double total = 0;
  std::size_t terms = 0;
  for (std::size_t j = 0; j < v.size(); ++j) {
    const double distance = std::abs(v[j] - out);
    const double heaviest = s.weights[j].value + s.weights[j].shift;
    spread += s.weights[j].shift * distance;
    if (heaviest > 0) range = std::max(range, distance);
    magnitude += heaviest * std::abs(v[j]);
    peak = std::max(peak, std::abs(v[j]));
    total += std::abs(v[j]);
    if (v[j] != 0) ++terms;
  }
  const double least_sum = s.sum - s.sum_shift;
  const double moved = least_sum > 0 ? std::min(spread / least_sum, range) : range;
  const double summed = least_sum > 0 ? std::min(magnitude / least_sum, peak) : peak;
  return {out, moved + rounding_of_sum(terms, v.size()) * summed +
                   rounding_of_sum(v.size(), v.size()) * (std::abs(out) + moved) +
                   4 * float_min * (total + static_cast<double>(v.size()) + 1)};
}

void add_mass(const problem& p, std::ptrdiff_t q_head, std::span<const logit> logits,
              const softmax& all, double lse_bound, result& r) {
  const double log_sum = std::log(all.sum);
  for (std::size_t j = 0; j < logits.size(); ++j) {
    const double probability = all.weights[j].value / all.sum;
    const double log_probability = logits[j].value - all.max - log_sum;
    double most = probability;
    double least = probability;
    if (logits[j].value > -infinity) {
      const double error =
          all.weights[j].error + lse_bound +
          unit_roundoff * (4 * std::abs(log_probability) + 2 * std::abs(all.max + log_sum) + 8);
      most = std::exp(std::min(0.0, log_probability + error));
      least = probability * std::exp(-error);
    }
    const std::size_t at_key = at(logits[j].key * p.q_heads + q_head);
    r.mass[at_key] += probability;
    r.mass_bound[at_key] += std::max(most - probability, probability - least) +
                            gamma(static_cast<double>(p.q_len) + 6) * most + 4 * float_min;
  }
}

}  // namespace

result attention(const problem& p) {
  result r;
  r.lse.resize(at(p.q_len * p.q_heads));
  r.lse_bound.resize(r.lse.size());
  r.out.resize(r.lse.size() * at(p.v_dim));
  r.out_bound.resize(r.out.size());
  r.mass.resize(at(p.kv_len * p.q_heads));
  r.mass_bound.resize(r.mass.size());
  for (std::ptrdiff_t row = 0; row < p.q_len; ++row) {
    for (std::ptrdiff_t head = 0; head < p.q_heads; ++head) {
      const std::vector<logit> logits = selected_logits(p, head, row);
      const softmax keys = softmax_of(logits, max_of(logits));
      const std::ptrdiff_t pair = row * p.q_heads + head;
      const bounded lse = lse_of(keys);
      r.lse[at(pair)] = lse.value;
      r.lse_bound[at(pair)] = lse.bound;
      if (keys.empty()) continue;

      weight sink;
      const softmax all = with_sink(p, head, logits, keys, sink);
      add_mass(p, head, logits, all, lse.bound, r);
      const std::ptrdiff_t kv_head = kv_head_of(p, head);
      std::vector<double> column(logits.size());
      for (std::ptrdiff_t i = 0; i < p.v_dim; ++i) {
        for (std::size_t j = 0; j < logits.size(); ++j) {
          column[j] = double{row_of(p.v, logits[j].key, kv_head)[i]};
        }
        const bounded out = mean_of(all, sink, column);
        r.out[at(pair * p.v_dim + i)] = out.value;
        r.out_bound[at(pair * p.v_dim + i)] = out.bound;
      }
    }
  }
  return r;
}

std::vector<double> probabilities(const problem& p, std::ptrdiff_t q_head, std::ptrdiff_t row) {
  const std::vector<logit> logits = selected_logits(p, q_head, row);
  weight sink;
  const softmax s = with_sink(p, q_head, logits, softmax_of(logits, max_of(logits)), sink);
  std::vector<double> probability(at(p.kv_len), 0.0);
  for (std::size_t j = 0; j < s.weights.size(); ++j) {
    probability[at(logits[j].key)] = s.weights[j].value / s.sum;
  }
  return probability;
}

std::vector<std::ptrdiff_t> top_k(std::span<const double> scores, std::ptrdiff_t k) {
  std::vector<std::ptrdiff_t> positions(scores.size());
  std::iota(positions.begin(), positions.end(), std::ptrdiff_t{0});
  std::sort(positions.begin(), positions.end(), [&](std::ptrdiff_t a, std::ptrdiff_t b) {
    return scores[at(a)] != scores[at(b)] ? scores[at(a)] > scores[at(b)] : a < b;
  });
  positions.resize(std::min(positions.size(), at(k)));
  std::sort(positions.begin(), positions.end());
  return positions;
}

}  // namespace reference
