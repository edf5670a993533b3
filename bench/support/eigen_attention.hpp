// SPDX-License-Identifier: Apache-2.0
//
// The baseline: what one writes with a good matrix library and no attention library. Blocks of query
// rows times all their keys by GEMM, a vectorised softmax per row, and a second GEMM.
#pragma once

#include <Eigen/Core>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/workload.hpp"

namespace bench {

using row_matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using const_rows = Eigen::Map<const row_matrix, 0, Eigen::OuterStride<>>;
using mutable_rows = Eigen::Map<row_matrix, 0, Eigen::OuterStride<>>;

inline const_rows rows_of(const float* data, index_t rows, index_t cols, index_t stride) {
  return {data, rows, cols, Eigen::OuterStride<>(stride)};
}

/// Row i of q sees the first `visible + i * step` of the keys.
inline void eigen_rows(const const_rows& q, const const_rows& k, const const_rows& v,
                       mutable_rows out, index_t visible, index_t step, row_matrix& scores) {
  const index_t keys = visible + (q.rows() - 1) * step;
  const row_matrix scaled = q * (1.0f / std::sqrt(static_cast<float>(q.cols())));
  auto s = scores.topLeftCorner(q.rows(), keys);
  s.noalias() = scaled * k.topRows(keys).transpose();
  Eigen::VectorXf sums(q.rows());
  for (index_t i = 0; i < q.rows(); ++i) {
    auto seen = s.row(i).head(visible + i * step);
    seen = (seen.array() - seen.maxCoeff()).exp();
    sums[i] = seen.sum();
    s.row(i).tail(keys - seen.cols()).setZero();
  }
  out.noalias() = s * v.topRows(keys);
  out.array().colwise() /= sums.array();
}

/// Causal attention of all rows, `block_rows` at a time; keys behind the last of them are skipped.
inline void eigen_prefill(tensors& t, index_t block_rows, row_matrix& scores) {
  const auto q = t.q_view();
  const auto kv = t.kv();
  const auto out = t.out_view();
  scores.resize(block_rows, t.shape.kv_len);
  for (index_t head = 0; head < t.shape.q_heads; ++head) {
    const index_t kv_head = head / t.shape.group_size();
    const auto k = rows_of(kv.k.row(0, kv_head), kv.k.tokens, t.dim, kv.k.token_stride);
    const auto v = rows_of(kv.v.row(0, kv_head), kv.v.tokens, t.dim, kv.v.token_stride);
    for (index_t begin = 0; begin < t.shape.q_len; begin += block_rows) {
      const index_t rows = std::min(block_rows, t.shape.q_len - begin);
      eigen_rows(rows_of(q.row(begin, head), rows, t.dim, q.token_stride), k, v,
                 {out.row(begin, head), rows, t.dim, Eigen::OuterStride<>(out.token_stride)},
                 t.shape.position(begin) + 1, 1, scores);
    }
  }
}

/// One query row: the heads of a group are the rows of one GEMM, so that K and V are read once.
inline void eigen_decode(tensors& t, index_t cache_begin, row_matrix& scores) {
  const auto kv = t.kv(cache_begin);
  const index_t group = t.shape.group_size();
  scores.resize(group, t.shape.kv_len);
  for (index_t head = 0; head < t.shape.kv_heads; ++head) {
    eigen_rows(rows_of(t.q_view().row(0, head * group), group, t.dim, t.dim),
               rows_of(kv.k.row(0, head), kv.k.tokens, t.dim, kv.k.token_stride),
               rows_of(kv.v.row(0, head), kv.v.tokens, t.dim, kv.v.token_stride),
               {t.out_view().row(0, head * group), group, t.dim, Eigen::OuterStride<>(t.dim)},
               t.shape.kv_len, 0, scores);
  }
}

/// Throws unless both give the same rows: a baseline that is wrong is no baseline.
template <class A, class B>
void require_same_output(tensors& t, A&& ours, B&& baseline) {
  ours();
  const std::vector<float> want = t.out;
  baseline();
  float worst = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    worst = std::max(worst, std::abs(t.out[i] - want[i]));
  }
  if (!(worst <= 1e-4f)) {
    throw std::runtime_error("the Eigen baseline is off by " + std::to_string(worst));
  }
}

}  // namespace bench
