// SPDX-License-Identifier: Apache-2.0
//
// The baseline: what one writes with a good matrix library and no attention library. Blocks of
// query rows times all their keys by GEMM, a vectorised softmax per row, and a second GEMM.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>

#include "support/workload.hpp"

namespace bench {

using row_matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class Matrix>
using strided = Eigen::Map<Matrix, 0, Eigen::OuterStride<>>;

/// Row i of q sees the first `visible + i * step` of the keys.
inline void eigen_rows(const strided<const row_matrix>& q, const strided<const row_matrix>& k,
                       const strided<const row_matrix>& v, strided<row_matrix> out, index_t visible,
                       index_t step, row_matrix& scores) {
  const index_t keys = visible + (q.rows() - 1) * step;
  const row_matrix scaled = q * (1.0f / std::sqrt(static_cast<float>(q.cols())));
  auto s = scores.topLeftCorner(q.rows(), keys);
  s.noalias() = scaled * k.topRows(keys).transpose();
  Eigen::ArrayXf sums(q.rows());
  for (index_t i = 0; i < q.rows(); ++i) {
    auto seen = s.row(i).head(visible + i * step).array();
    seen = (seen - seen.maxCoeff()).exp();
    sums[i] = seen.sum();
    s.row(i).tail(keys - seen.size()).setZero();
  }
  out.noalias() = s * v.topRows(keys);
  out.array().colwise() /= sums;
}

/// Causal attention by blocks of query rows; keys that no row of a block sees are skipped. f32,
/// values as wide as keys.
inline void eigen_attention(tensors& t, index_t block_rows, row_matrix& scores) {
  const attention_shape& shape = t.shape;
  const index_t rows = shape.q_len;
  const Eigen::OuterStride<> stride(shape.q_heads * t.dim);
  const index_t token_stride = shape.kv_heads * t.dim;
  const Eigen::OuterStride<> kv_stride(token_stride);
  scores.resize(std::min(rows, block_rows), shape.kv_len);
  for (index_t head = 0; head < shape.q_heads; ++head) {
    const index_t kv_at = head / shape.group_size() * t.dim;
    for (index_t begin = 0; begin < rows; begin += block_rows) {
      const index_t count = std::min(block_rows, rows - begin);
      const index_t at = head * t.dim + begin * stride.outer();
      eigen_rows({t.q.data() + at, count, t.dim, stride},
                 {t.k.data() + kv_at, shape.kv_len, t.dim, kv_stride},
                 {t.v.data() + kv_at, shape.kv_len, t.dim, kv_stride},
                 {t.out.data() + at, count, t.dim, stride}, shape.position(begin) + 1, 1,
                 scores);
    }
  }
}

}  // namespace bench
