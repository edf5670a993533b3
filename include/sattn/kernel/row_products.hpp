// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/kernel/kernel_args.hpp>
#include <sattn/kernel/stored_row.hpp>
#include <sattn/kernel/tile_parts.hpp>
#include <sattn/simd/transpose.hpp>

// The two products of the row kernel in register tiles: several rows of K in lock step, and of V a
// few columns at a time with the output in registers. Each element is read and widened once for up
// to four query rows. Meanwhile the rows of the next piece are prefetched, because no hardware
// follows rows in lock step.

namespace sattn::kernel {

/// What of the rows that come next is prefetched: of K the same places of as many rows; of V the
/// same, or line by line in their order, which memory answers faster and costs more instructions.
enum class look_ahead { none, beside, in_order };

/// Rows of K, and registers of a row of V, that a tile holds against Queries query rows: enough
/// accumulators to cover the latency of two FMA units (8; 6 for three queries of f32), at most 12
/// beside the operands. Of f32 two registers are a cache line; three would touch two lines of each
/// row in every pass. Widening int8 takes registers of its own: 4 x 3 of it would spill.
template <int Queries, class T>
inline constexpr int tile_keys = Queries == 1                                         ? 8
                                 : Queries == 2                                       ? 4
                                 : sizeof(T) == 4 || (sizeof(T) == 1 && Queries == 4) ? 2
                                                                                      : 3;

/// Scores of up to four queries lie key by key, score_stride of them for each: what is done to all
/// of them then needs no horizontal step.
template <int Queries>
inline constexpr int score_stride = Queries == 3 ? 4 : Queries;

/// Cache lines of a row that a tile's registers of it touch: as many of the next rows are
/// prefetched for each key, so that a pass over all columns meets all of them.
template <class Arch, int Queries, class T>
inline constexpr int lines_a_step =
    (tile_keys<Queries, T> * simd::vec<Arch>::width * static_cast<int>(sizeof(T)) + 63) / 64;

/// acc[n * Cols + c] += left(n) * right(c), in an order that fits 16 registers: the rows at once
/// and one query at a time, or for one query the other way round. InOrder ends each query before
/// the next is loaded: with two at once clang 19 has a register too few.
template <int Queries, int Cols, bool InOrder, class Left, class Right, class V>
SATTN_ALWAYS_INLINE void outer_product(Left&& left, Right&& right, V (&acc)[Queries * Cols]) {
  if constexpr (Queries == 1) {
    V query[Queries];
    simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA { query[n] = left(n); });
    simd::unroll<Cols>([&](auto c) SATTN_INLINE_LAMBDA {
      const V row = right(c);
      simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
        acc[n * Cols + c] = simd::fma(query[n], row, acc[n * Cols + c]);
      });
    });
  } else {
    V row[Cols];
    simd::unroll<Cols>([&](auto c) SATTN_INLINE_LAMBDA { row[c] = right(c); });
    simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
      const V query = left(n);
      simd::unroll<Cols>([&](auto c) SATTN_INLINE_LAMBDA {
        acc[n * Cols + c] = simd::fma(query, row[c], acc[n * Cols + c]);
      });
      if constexpr (InOrder) {
        simd::unroll<Cols>([&](auto c) SATTN_INLINE_LAMBDA {
          __asm__ volatile("" : "+v"(acc[n * Cols + c].reg)::"memory");
        });
      }
    });
  }
}

/// scores[r][n] = q[n] . k[r] for Keys rows: one chain for each product, so that the bits of a
/// query depend neither on the rows beside it nor on the tile.
template <class Arch, int Queries, int Keys, class T, look_ahead Ahead>
SATTN_ALWAYS_INLINE void qk_row_tile(const void* const* k_rows, const void* const* next_k,
                                     const float* q, index_t q_stride, index_t head_dim,
                                     float* SATTN_RESTRICT scores) {
  using V = simd::vec<Arch>;
  using row_type = stored_row<Arch, T>;
  constexpr index_t width = V::width;
  row_type k[Keys];
  row_type next[Keys];
  simd::unroll<Keys>([&](auto r) SATTN_INLINE_LAMBDA {
    k[r] = row_type(k_rows[r]);
    if constexpr (Ahead != look_ahead::none) next[r] = row_type(next_k[r]);
  });
  V acc[Keys * Queries];
  simd::unroll<Keys * Queries>([&](auto i) SATTN_INLINE_LAMBDA { acc[i] = V::zero(); });
  const auto add = [&](index_t i, auto&& row_at) SATTN_INLINE_LAMBDA {
    outer_product<Queries, Keys, false>(
        [&](auto n) SATTN_INLINE_LAMBDA { return V::load_aligned(q + n * q_stride + i); }, row_at,
        acc);
  };
  const auto add_whole = [&](index_t i) SATTN_INLINE_LAMBDA {
    add(i, [&](auto r) SATTN_INLINE_LAMBDA { return k[r].load(i); });
  };
  index_t i = 0;
  SATTN_NO_UNROLL
  for (; i + row_type::line <= head_dim; i += row_type::line) {
    if constexpr (Ahead != look_ahead::none) {
      simd::unroll<Keys>([&](auto r) SATTN_INLINE_LAMBDA { next[r].prefetch(i); });
    }
    if constexpr (Keys * Queries < 12) {
      simd::unroll<row_type::line / width>(
          [&](auto u) SATTN_INLINE_LAMBDA { add_whole(i + u * width); });
    } else {  // no register is left for what compilers do ahead
      SATTN_NO_UNROLL
      for (index_t u = 0; u < row_type::line; u += width) add_whole(i + u);
    }
  }
  SATTN_NO_UNROLL
  for (; i + width <= head_dim; i += width) add_whole(i);
  if (i < head_dim) {
    add(i, [&](auto r) SATTN_INLINE_LAMBDA { return k[r].load_partial(i, head_dim - i); });
  }
  constexpr int stride = score_stride<Queries>;
  V by_key[Keys * stride];
  simd::unroll<Keys * stride>([&](auto at) SATTN_INLINE_LAMBDA {
    constexpr int n = at % stride < Queries ? at % stride : Queries - 1;
    by_key[at] = acc[n * Keys + at / stride];
  });
  simd::reduce_each(by_key, scores);
}

/// scores[key][n] = q[n] . k[key] for the keys of a piece.
template <class Arch, int Queries, class T, look_ahead Ahead>
SATTN_NOINLINE void qk_rows(const void* const* k_rows, const void* const* next_k, index_t count,
                            const float* q, index_t q_stride, index_t head_dim,
                            float* SATTN_RESTRICT scores) noexcept {
  const auto tile = [&](auto keys, index_t key) SATTN_INLINE_LAMBDA {
    qk_row_tile<Arch, Queries, keys, T, Ahead>(k_rows + key, next_k + key, q, q_stride, head_dim,
                                               scores + key * score_stride<Queries>);
  };
  constexpr int keys = tile_keys<Queries, T>;
  if constexpr (stream_piece % keys == 0) {
    index_t key = 0;
    SATTN_NO_UNROLL
    for (; key + keys <= count; key += keys) tile(std::integral_constant<int, keys>{}, key);
    SATTN_NO_UNROLL
    for (; key < count; ++key) tile(std::integral_constant<int, 1>{}, key);
  } else {
    for_each_tile<keys>(count, tile);
  }
}

/// The rows that come next; walks over their cache lines in order, again and again.
template <class Arch, class T>
class next_lines {
 public:
  /// `a_step` lines at a time. The last step of a row may ask for lines behind it.
  next_lines(const void* const* rows, index_t count, index_t width, int a_step)
      : first_(rows), end_(rows + count), row_(rows), at_(static_cast<const char*>(*rows)),
        steps_((width * static_cast<index_t>(sizeof(T)) + a_step * line - 1) / (a_step * line)),
        left_(steps_) {}

  template <int Lines>
  SATTN_ALWAYS_INLINE void step() {
    simd::unroll<Lines>([&](auto i) SATTN_INLINE_LAMBDA { simd::prefetch_near(at_ + i * line); });
    at_ += Lines * line;
    if (--left_ == 0) {
      left_ = steps_;
      if (++row_ == end_) row_ = first_;
      at_ = static_cast<const char*>(*row_);
    }
  }

  SATTN_ALWAYS_INLINE void prefetch(index_t key, index_t i) const {
    stored_row<Arch, T>(first_[key]).prefetch(i);
  }

 private:
  static constexpr index_t line = 64;
  const void* const* first_;
  const void* const* end_;
  const void* const* row_;
  const char* at_;
  index_t steps_;  // of a row
  index_t left_;   // of this row
};

/// out[n] = out[n] * rescale[n] + sum over keys of p[key][n] v[key] for the columns of Cols
/// registers that begin at `col`.
template <class Arch, int Queries, int Cols, bool Partial, class T, look_ahead Ahead>
SATTN_ALWAYS_INLINE void pv_row_cols(const void* const* v_rows, next_lines<Arch, T>& next,
                                     index_t count, index_t v_dim, index_t col, const float* p,
                                     const float* rescale, float* SATTN_RESTRICT out,
                                     index_t out_stride) {
  using V = simd::vec<Arch>;
  constexpr int width = V::width;
  constexpr index_t stride = score_stride<Queries>;
  V acc[Queries * Cols];
  simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
    const V factor = V::broadcast(rescale[n]);
    simd::unroll<Cols>([&](auto c) SATTN_INLINE_LAMBDA {
      acc[n * Cols + c] = V::load_aligned(out + n * out_stride + col + c * width) * factor;
    });
  });
  SATTN_NO_UNROLL
  for (index_t key = 0; key < count; ++key) {
    const stored_row<Arch, T> v(v_rows[key]);
    if constexpr (Ahead == look_ahead::in_order) {
      next.template step<lines_a_step<Arch, Queries, T>>();
    }
    if constexpr (Ahead == look_ahead::beside) next.prefetch(key, col);
    outer_product<Queries, Cols, true>(
        [&](auto n) SATTN_INLINE_LAMBDA { return V::broadcast(p[key * stride + n]); },
        [&](auto c) SATTN_INLINE_LAMBDA {
          return Partial ? v.load_partial(col, v_dim - col) : v.load(col + c * width);
        },
        acc);
  }
  simd::unroll<Queries>([&](auto n) SATTN_INLINE_LAMBDA {
    simd::unroll<Cols>([&](auto c) SATTN_INLINE_LAMBDA {
      acc[n * Cols + c].store_aligned(out + n * out_stride + col + c * width);
    });
  });
}

/// The same for all columns.
template <class Arch, int Queries, class T, look_ahead Ahead>
SATTN_NOINLINE void pv_rows(const void* const* v_rows, const void* const* next_v, index_t count,
                            index_t v_dim, const float* p, const float* rescale,
                            float* SATTN_RESTRICT out, index_t out_stride) noexcept {
  constexpr index_t width = simd::vec<Arch>::width;
  constexpr int cols = tile_keys<Queries, T>;
  const index_t whole = v_dim / width;
  next_lines<Arch, T> next(next_v, count, v_dim, lines_a_step<Arch, Queries, T>);
  for_each_tile<cols>(whole, [&](auto width_cols, index_t first) SATTN_INLINE_LAMBDA {
    pv_row_cols<Arch, Queries, width_cols, false, T, Ahead>(
        v_rows, next, count, v_dim, first * width, p, rescale, out, out_stride);
  });
  if (whole * width < v_dim) {
    pv_row_cols<Arch, Queries, 1, true, T, Ahead>(
        v_rows, next, count, v_dim, whole * width, p, rescale, out, out_stride);
  }
}

}  // namespace sattn::kernel
