// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/math.hpp>
#include <sattn/estimate/scores.hpp>
#include <sattn/kv/page_summaries.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

namespace sattn {

static_assert(page_summaries::tile_pages == tile_pages);

/// Whether each query row has scores of its own or all rows of the call share the sum of theirs.
enum class row_reduce { none, sum };

/// What the scores q . k of a page's keys can be at most or are on average, not scaled, from the
/// bounds or the means of each kv head.
///
/// Shapes: q [q_len, q_heads, head_dim], one summary for each kv head; result [sets, rows, pages]:
/// sets = q_heads or, where heads are reduced, kv_heads; rows = q_len or 1; pages of the longest
/// head, -inf behind the last page of a shorter one. `scores` keeps its memory from call to call.
/// A page whose summary is not finite scores +inf. A sum or mean of heads and rows takes one
/// product for all of them, a maximum one for each head.
/// Throws: shape_error if shapes do not fit, summaries are of both kinds or a borrowed workspace is
/// too small; nothing is written then.
/// Cost: bandwidth of the summaries; parallel over sets, rows and tiles of pages.
/// Accuracy: f32. For one query a bound holds to the last bit where q . k is summed with fused
/// products in the order of d and nothing underflows; for sums of queries it holds up to their
/// roundings. A mean score has the roundings of the mean and of its product.
///
/// Source: Quest (arXiv:2406.10774) for bounds, MoBA (arXiv:2502.13189) for means; the sum over
/// heads is that of The Sparse Frontier (arXiv:2504.17768).
inline void page_scores_into(context& ctx, score_tensor& scores,
                             const tensor_view<const float>& q,
                             std::span<const page_summaries> summaries,
                             head_reduce heads = head_reduce::sum,
                             row_reduce rows = row_reduce::none) {
  check_view("page_scores: q", q);
  const index_t kv_heads = std::ssize(summaries);
  require(kv_heads > 0 && q.heads > 0 && q.heads % kv_heads == 0, "page_scores: ", q.heads,
          " q heads for summaries of ", kv_heads, " kv heads");
  const summary_kind kind = summaries.front().options().kind;
  index_t tiles = 0;
  index_t pages = 0;
  for (const page_summaries& s : summaries) {
    require(s.options().head_dim == q.dim, "page_scores: q dim is ", q.dim, ", summaries have ",
            s.options().head_dim);
    require(s.options().kind == kind, "page_scores: bounds of some heads and means of others");
    tiles = std::max(tiles, s.tiles());
    pages = std::max(pages, s.pages());
  }
  const index_t group = q.heads / kv_heads;
  const index_t set_heads = heads == head_reduce::none ? 1 : group;
  const index_t list_rows = rows == row_reduce::none ? 1 : q.tokens;
  // A maximum needs a product for each of what the others sum before.
  const index_t products = heads == head_reduce::max ? set_heads : 1;
  const float share = heads == head_reduce::mean ? 1.0f / static_cast<float>(group) : 1.0f;
  constexpr index_t tiles_per_task = 8;  // worth the sums before them
  const index_t tasks = ceil_div(tiles, tiles_per_task);
  const index_t parts_of_q = summary_rows(kind);
  const index_t part_floats = round_up(parts_of_q * q.dim, 16);
  const index_t worker_floats = products * part_floats + tile_pages;
  float* const memory = reinterpret_cast<float*>(
      ctx.workspace(static_cast<std::size_t>(worker_floats * ctx.executor().concurrency()) *
                    sizeof(float))
          .data());
  const index_t sets = q.heads / set_heads;
  const index_t score_rows = list_rows == 0 ? 0 : q.tokens / list_rows;
  scores.values.resize(static_cast<std::size_t>(sets * score_rows * pages));
  scores.sets = sets;
  scores.rows = score_rows;
  scores.cols = pages;

  constexpr float unknown = std::numeric_limits<float>::infinity();
  ctx.executor().parallel_for(scores.sets * scores.rows * tasks, [&](index_t task, index_t worker) {
    const index_t set = task / (scores.rows * tasks);
    const index_t row = task / tasks % scores.rows;
    const index_t first_head = set * set_heads;
    const page_summaries& of_head = summaries[static_cast<std::size_t>(first_head / group)];
    // [products][negative, positive][head_dim] or [products][head_dim]
    float* const parts = memory + worker * worker_floats;
    float* const of_tile = parts + products * part_floats;
    std::fill_n(parts, products * part_floats, 0.0f);
    for (index_t h = 0; h < set_heads; ++h) {
      float* const below = parts + (products == 1 ? 0 : h * part_floats);
      float* const above = below + (parts_of_q - 1) * q.dim;
      for (index_t r = row * list_rows; r < (row + 1) * list_rows; ++r) {
        const float* const x = q.row(r, first_head + h);
        for (index_t d = 0; d < q.dim; ++d) {
          (x[d] < 0.0f ? below : above)[d] += share * x[d];
        }
      }
    }
    const std::span<float> out = scores.row(set, row);
    const index_t end = std::min((task % tasks + 1) * tiles_per_task, tiles);
    for (index_t t = task % tasks * tiles_per_task; t < end; ++t) {
      const index_t first = t * tile_pages;
      const index_t count = std::min(tile_pages, pages - first);
      const index_t known = std::clamp<index_t>(of_head.pages() - first, 0, count);
      float* const to = out.data() + first;
      for (index_t p = 0; p < products && known > 0; ++p) {
        const index_t next = p + 1 == products && t + 1 < of_head.tiles() ? t + 1 : t;
        ctx.kernel_table().score_pages({of_head.tile(t), of_head.tile(next), of_head.options().type,
                                        parts_of_q, q.dim, parts + p * part_floats, of_tile});
        for (index_t i = 0; i < known; ++i) {
          const float score = std::isfinite(of_tile[i]) ? of_tile[i] : unknown;
          to[i] = p == 0 ? score : std::max(to[i], score);
        }
      }
      std::fill(to + known, to + count, detail::not_legal);
    }
  });
}

/// The same as new scores.
inline score_tensor page_scores(context& ctx, const tensor_view<const float>& q,
                                std::span<const page_summaries> summaries,
                                head_reduce heads = head_reduce::sum,
                                row_reduce rows = row_reduce::none) {
  score_tensor scores;
  page_scores_into(ctx, scores, q, summaries, heads, rows);
  return scores;
}

}  // namespace sattn
