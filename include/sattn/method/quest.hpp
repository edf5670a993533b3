// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/estimate/page_scores.hpp>
#include <sattn/estimate/pooled_blocks.hpp>
#include <sattn/method/method.hpp>

#include <algorithm>
#include <optional>
#include <span>
#include <vector>

namespace sattn {

/// Decoding by pages: those whose bounds allow the largest products with the query. Each row
/// chooses for itself; of several rows those before a page do not see it.
///
/// Needs the bounds (or means) of all kv heads' pages in the inputs.
/// Source: Quest (arXiv:2406.10774).
struct quest_method {
  selection pages;
  head_reduce reduce = head_reduce::sum;  // one product for a group; none: a list per query head
  index_t dense_layers = 0;  // the first ones run dense
  // Pages to choose from: one list of all rows for each query head, for each kv head or for all.
  std::optional<block_lists> within = std::nullopt;

  /// Throws: shape_error if summaries are missing, or know more or fewer keys than there are.
  any_pattern choose(context& ctx, const method_inputs& in) const {
    if (in.layer < dense_layers) return dense{};
    require(std::ssize(in.summaries) == in.shape.kv_heads, "quest: ", in.summaries.size(),
            " summaries of pages for ", in.shape.kv_heads, " kv heads");
    const token_t page_size = in.summaries.front().options().page_size;
    for (const page_summaries& s : in.summaries) {
      require(s.tokens() == in.shape.kv_len && s.options().page_size == page_size, "quest: ",
              s.tokens(), " keys in pages of ", s.options().page_size, ", kv_len is ",
              in.shape.kv_len, ", pages of the first head have ", page_size);
    }
    score_tensor scores = page_scores(ctx, in.q, in.summaries, reduce);
    for (index_t row = 0; row < in.shape.q_len; ++row) {
      const key_range legal = in.legal.legal(in.shape.position(row), in.shape.kv_len);
      const index_t end = ceil_div(legal.end, page_size);
      for (index_t set = 0; set < scores.sets; ++set) {
        const std::span<float> of_row = scores.row(set, row);
        std::fill_n(of_row.begin(), std::min<index_t>(legal.begin / page_size, end),
                    detail::not_legal);
        std::fill(of_row.begin() + end, of_row.end(), detail::not_legal);
      }
    }
    if (within) keep_within(scores, page_size);
    return select_blocks(in.shape, scores, pages, 1, page_size);
  }

 private:
  /// Pages outside are not legal, but for the last one, which is filling.
  void keep_within(score_tensor& scores, token_t page_size) const {
    const block_lists& lists = *within;
    require(lists.k_block == page_size && lists.sets > 0 && scores.sets % lists.sets == 0 &&
                std::ssize(lists.indptr) == lists.sets + 1,
            "quest: preselected ", lists.sets, " lists of pages of ", lists.k_block,
            "; scores have ", scores.sets, " sets of pages of ", page_size);
    std::vector<bool> inside(static_cast<std::size_t>(scores.cols));
    for (index_t set = 0; set < scores.sets; ++set) {
      std::fill(inside.begin(), inside.end(), false);
      if (!inside.empty()) inside.back() = true;
      const auto list = static_cast<std::size_t>(set * lists.sets / scores.sets);
      for (index_t at = lists.indptr[list]; at < lists.indptr[list + 1]; ++at) {
        const token_t page = lists.indices[static_cast<std::size_t>(at)];
        require(page >= 0 && page < scores.cols, "quest: preselected page ", page, " of ",
                scores.cols);
        inside[static_cast<std::size_t>(page)] = true;
      }
      for (index_t row = 0; row < scores.rows; ++row) {
        const std::span<float> of_row = scores.row(set, row);
        for (std::size_t page = 0; page < inside.size(); ++page) {
          if (!inside[page]) of_row[page] = detail::not_legal;
        }
      }
    }
  }
};

/// The preset of Quest's kernels: token_budget / page_size pages, the last one among them, a list
/// for each query head, two dense layers.
inline quest_method quest(index_t token_budget = 512, token_t page_size = 16) {
  return {{budget::fixed(token_budget / page_size), {.recent = 1}}, head_reduce::none, 2};
}

/// The preset of The Sparse Frontier (arXiv:2504.17768): so many pages and the last one besides, by
/// the sum over a group unless `shared` is false.
inline quest_method sf_quest(index_t token_budget = 1024, token_t page_size = 16,
                             bool shared = true) {
  return {{budget::fixed(token_budget / page_size),
           {.recent = 1, .counted = protection::counting::on_top}},
          shared ? head_reduce::sum : head_reduce::none};
}

}  // namespace sattn
