// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/kernel_args.hpp>
#include <sattn/kernel/list_rows.hpp>
#include <sattn/kernel/prefill_tile.hpp>
#include <sattn/simd/exp.hpp>

// A few query rows against chunks of keys, with the head dimension in the lanes: for decoding and
// for lists that belong to a single row, where 16 query lanes would stand mostly empty. Rows of K
// and V are streamed once for up to four query rows.

namespace sattn::kernel {

/// scores[n][key] = q[n] . k[key] for all keys, one row of K at a time: memory delivers an ascending
/// stream at its full rate, and several rows in lock step at half of it (docs/dead_ends.md).
template <class Arch, int Queries>
SATTN_NOINLINE void qk_rows(const float* const* k_rows, index_t count, const float* q,
                            index_t q_stride, index_t head_dim,
                            float* SATTN_RESTRICT scores) noexcept {
  using V = simd::vec<Arch>;
  constexpr index_t width = V::width;
  // The same for any number of queries: a row's bits do not depend on the rows beside it. Keys are
  // independent, so two chains a query are enough to cover the FMA latency.
  constexpr int chains = 2;
  SATTN_NO_UNROLL
  for (index_t key = 0; key < count; ++key) {
    const float* const k = k_rows[key];
    V acc[Queries][chains];
    simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
      simd::unroll<chains>([&](auto c) SATTN_INLINE_LAMBDA { acc[n][c] = V::zero(); });
    });
    index_t i = 0;
    SATTN_NO_UNROLL
    for (; i + chains * width <= head_dim; i += chains * width) {
      simd::unroll<chains>([&](auto c) SATTN_INLINE_LAMBDA {
        const V row = V::load(k + i + c * width);
        simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
          acc[n][c] = simd::fma(V::load_aligned(q + n * q_stride + i + c * width), row, acc[n][c]);
        });
      });
    }
    for (; i < head_dim; i += width) {
      const V row = i + width <= head_dim ? V::load(k + i) : V::load_partial(k + i, head_dim - i);
      simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
        acc[n][0] = simd::fma(V::load_aligned(q + n * q_stride + i), row, acc[n][0]);
      });
    }
    simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
      scores[n * chunk_keys + key] = simd::reduce_add(acc[n][0] + acc[n][1]);
    });
  }
}

/// out[n] += sum over Rows rows of V of p[n][row] * row. The output stays in the first-level cache.
template <class Arch, int Queries, int Rows>
SATTN_ALWAYS_INLINE void add_rows(const float* const* v_rows, index_t v_dim, const float* p,
                                  float* SATTN_RESTRICT out, index_t out_stride) {
  using V = simd::vec<Arch>;
  constexpr index_t width = V::width;
  const float* v[Rows];
  V weight[Queries][Rows];
  simd::unroll<Rows>([&](auto r) SATTN_INLINE_LAMBDA {
    v[r] = v_rows[r];
    simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
      weight[n][r] = V::broadcast(p[n * chunk_keys + r]);
    });
  });
  const auto add = [&](index_t col, const V (&row)[Rows]) SATTN_INLINE_LAMBDA {
    simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
      float* const at = out + n * out_stride + col;
      V sum = V::load_aligned(at);
      simd::unroll<Rows>(
          [&](auto r) SATTN_INLINE_LAMBDA { sum = simd::fma(weight[n][r], row[r], sum); });
      sum.store_aligned(at);
    });
  };
  V row[Rows];
  index_t col = 0;
  for (; col + width <= v_dim; col += width) {
    simd::unroll<Rows>([&](auto r) SATTN_INLINE_LAMBDA { row[r] = V::load(v[r] + col); });
    add(col, row);
  }
  if (col < v_dim) {
    simd::unroll<Rows>([&](auto r) SATTN_INLINE_LAMBDA {
      row[r] = V::load_partial(v[r] + col, v_dim - col);
    });
    add(col, row);
  }
}

/// out[n] = out[n] * rescale[n] + sum over keys of p[n][key] v[key], two rows of V at a time: one
/// would be bound by its stores, four would break the stream from memory.
template <class Arch, int Queries>
SATTN_NOINLINE void pv_rows(const float* const* v_rows, index_t count, index_t v_dim,
                            const float* p, const float* rescale, float* SATTN_RESTRICT out,
                            index_t out_stride) noexcept {
  using V = simd::vec<Arch>;
  for (int n = 0; n < Queries; ++n) {
    const V factor = V::broadcast(rescale[n]);
    for (index_t col = 0; col < v_dim; col += V::width) {
      float* const at = out + n * out_stride + col;
      (V::load_aligned(at) * factor).store_aligned(at);
    }
  }
  index_t key = 0;
  SATTN_NO_UNROLL
  for (; key + 2 <= count; key += 2) {
    add_rows<Arch, Queries, 2>(v_rows + key, v_dim, p + key, out, out_stride);
  }
  if (key < count) add_rows<Arch, Queries, 1>(v_rows + key, v_dim, p + key, out, out_stride);
}

/// One row of scores: soft cap, mask, softmax against the running maximum. Returns the factor of
/// what was accumulated before.
template <class Arch>
SATTN_NOINLINE float softmax_row(const rows_args& args, index_t query, float* SATTN_RESTRICT s,
                                 float* SATTN_RESTRICT max_and_sum) noexcept {
  using V = simd::vec<Arch>;
  constexpr index_t width = V::width;
  const float minus_inf = -__builtin_inff();
  const index_t padded = (args.count + width - 1) / width * width;
  if (args.soft_cap != 0.0f) {
    const V cap = V::broadcast(args.soft_cap);
    for (index_t i = args.count; i < padded; ++i) s[i] = 0.0f;
    for (index_t i = 0; i < padded; i += width) {
      (cap * simd::tanh(V::load_aligned(s + i))).store_aligned(s + i);
    }
  }
  if (args.masks != nullptr) {
    const int bit = args.mask_bit[query];
    for (index_t i = 0; i < args.count; ++i) {
      if ((args.masks[i] >> bit & 1) == 0) s[i] = minus_inf;
    }
  }
  for (index_t i = args.count; i < padded; ++i) s[i] = minus_inf;
  V top = V::load_aligned(s);
  for (index_t i = width; i < padded; i += width) top = simd::max(top, V::load_aligned(s + i));
  const float chunk_max = simd::reduce_max(top);
  const float before = max_and_sum[0];
  const float after = chunk_max > before ? chunk_max : before;
  const float base = after == minus_inf ? 0.0f : after;
  V sum = V::zero();
  const V vec_base = V::broadcast(base);
  for (index_t i = 0; i < padded; i += width) {
    const V p = simd::exp_nonpositive(V::load_aligned(s + i) - vec_base);
    p.store_aligned(s + i);
    sum = sum + p;
  }
  alignas(64) float factor[width];
  simd::exp_nonpositive(V::broadcast(before - base)).store_aligned(factor);
  max_and_sum[0] = after;
  max_and_sum[1] = max_and_sum[1] * factor[0] + simd::reduce_add(sum);
  return factor[0];
}

template <class Arch, int Queries>
SATTN_ALWAYS_INLINE void attend_row_group(const rows_args& args, index_t first) {
  const index_t q_stride = row_out_floats(args.head_dim);
  const index_t state_stride = row_state_floats(args.v_dim);
  float* const states = args.states + first * state_stride;
  const float* const q = args.q + first * q_stride;
  if (args.scattered) {
    qk_lists<Arch, Queries>(args.k_rows, args.next_k, args.count, q, q_stride, args.head_dim,
                            args.scores);
  } else {
    qk_rows<Arch, Queries>(args.k_rows, args.count, q, q_stride, args.head_dim, args.scores);
  }
  float rescale[Queries];
  for (int n = 0; n < Queries; ++n) {
    rescale[n] = softmax_row<Arch>(args, first + n, args.scores + n * chunk_keys,
                                   states + n * state_stride + row_out_floats(args.v_dim));
  }
  if (args.scattered) {
    pv_lists<Arch, Queries>(args.v_rows, args.next_v, args.count, args.v_dim, args.scores, rescale,
                            states, state_stride);
  } else {
    pv_rows<Arch, Queries>(args.v_rows, args.count, args.v_dim, args.scores, rescale, states,
                           state_stride);
  }
}

/// One chunk of keys for every query row, four (then two, then one) at a time.
template <class Arch>
SATTN_NOINLINE void attend_rows(const rows_args& args) noexcept {
  SATTN_ASSERT(args.count > 0 && args.count <= chunk_keys);
  index_t first = 0;
  for (; first + 4 <= args.queries; first += 4) attend_row_group<Arch, 4>(args, first);
  for (; first + 2 <= args.queries; first += 2) attend_row_group<Arch, 2>(args, first);
  for (; first < args.queries; ++first) attend_row_group<Arch, 1>(args, first);
}

/// Combines the partial states of one query row in the order given and writes the row.
template <class Arch>
SATTN_NOINLINE void merge_rows(const merge_args& args) noexcept {
  using V = simd::vec<Arch>;
  constexpr index_t width = V::width;
  const index_t at_max = row_out_floats(args.v_dim);
  const float minus_inf = -__builtin_inff();
  const auto state = [&](index_t i) SATTN_INLINE_LAMBDA {
    return args.states + i * args.state_stride;
  };
  float top = minus_inf;
  for (index_t i = 0; i < args.count; ++i) {
    const float m = state(i)[at_max];
    top = top > m ? top : m;
  }
  const float base = top == minus_inf ? 0.0f : top;
  const auto weight = [&](index_t i) SATTN_INLINE_LAMBDA {
    return simd::exp_nonpositive(V::broadcast(state(i)[at_max] - base));
  };
  V sum = V::zero();
  for (index_t i = 0; i < args.count; ++i) {
    sum = simd::fma(V::broadcast(state(i)[at_max + 1]), weight(i), sum);
  }
  const V factor =
      output_factor(V::broadcast(top), sum, V::broadcast(args.sink_logit));
  constexpr int vecs = 8;  // columns that share an evaluation of the weights
  for (index_t first = 0; first < args.v_dim; first += vecs * width) {
    V out[vecs];
    simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA { out[c] = V::zero(); });
    for (index_t i = 0; i < args.count; ++i) {
      const V share = weight(i);
      simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
        const index_t col = first + c * width;
        if (col < args.v_dim) out[c] = simd::fma(V::load_aligned(state(i) + col), share, out[c]);
      });
    }
    simd::unroll<vecs>([&](auto c) SATTN_INLINE_LAMBDA {
      const index_t col = first + c * width;
      const V row = out[c] * factor;
      if (col + width <= args.v_dim) {
        row.store(args.out + col);
      } else if (col < args.v_dim) {
        row.store_partial(args.out + col, args.v_dim - col);
      }
    });
  }
  if (args.lse != nullptr) {
    alignas(64) float lane[width];
    sum.store_aligned(lane);
    *args.lse = top + __builtin_logf(lane[0]);
  }
}

}  // namespace sattn::kernel
