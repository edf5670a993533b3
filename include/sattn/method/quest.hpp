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

/// Pages that were chosen before, and of how many keys: what came later was not chosen from.
struct preselected_pages {
  block_lists pages;  // one list for all rows of each query head, of each kv head or of all
  index_t keys = 0;
};

/// Decoding by pages: those whose bounds allow the largest products with the query. Each row
/// chooses for itself; of several rows those before a page do not see it.
///
/// Needs the bounds (or means) of all kv heads' pages in the inputs.
/// Source: Quest (arXiv:2406.10774).
struct quest_method {
  selection pages;
  token_t page_size = 16;
  head_reduce reduce = head_reduce::sum;  // one product for a group; none: a list per query head
  index_t dense_layers = 0;  // the first ones run dense
  // Chooses among these, among pages that came later and the last one that a row may see. Bounds of
  // all pages are read all the same.
  std::optional<preselected_pages> within = std::nullopt;

  /// Throws: shape_error if summaries are missing, have pages of another size or know more or fewer
  /// keys than there are, or where preselected pages do not fit.
  any_pattern choose(context& ctx, const method_inputs& in) const {
    if (in.layer < dense_layers || in.shape.kv_heads == 0) return dense{};
    require(std::ssize(in.summaries) == in.shape.kv_heads, "quest: ", in.summaries.size(),
            " summaries of pages for ", in.shape.kv_heads, " kv heads");
    for (const page_summaries& s : in.summaries) {
      require(s.tokens() == in.shape.kv_len && s.options().page_size == page_size, "quest: ",
              s.tokens(), " keys in pages of ", s.options().page_size, ", expected ",
              in.shape.kv_len, " in pages of ", page_size);
    }
    if (within) check_within(detail::score_sets(in.shape, reduce));
    score_tensor scores = page_scores(ctx, in.q, in.summaries, reduce);
    for (index_t row = 0; within && row < in.shape.q_len; ++row) {
      const key_range legal = in.legal.legal(in.shape.position(row), in.shape.kv_len);
      const auto end = static_cast<std::size_t>(ceil_div(legal.end, page_size));
      for (index_t set = 0; set < scores.sets; ++set) {
        keep_within(scores.row(set, row).first(end), preselected(set, scores.sets));
      }
    }
    return select_blocks(ctx, in.shape, scores, pages, 1, page_size, in.legal);
  }

 private:
  /// Of the pages that a row may see, those outside are not legal.
  void keep_within(std::span<float> of_row, std::span<const token_t> list) const {
    const index_t later = within->keys / page_size;
    auto next = list.begin();
    for (index_t page = 0; page + 1 < std::min<index_t>(std::ssize(of_row), later + 1); ++page) {
      while (next != list.end() && *next < page) ++next;
      if (next == list.end() || *next != page) {
        of_row[static_cast<std::size_t>(page)] = detail::not_legal;
      }
    }
  }
  std::span<const token_t> preselected(index_t set, index_t sets) const {
    const block_lists& lists = within->pages;
    const auto list = static_cast<std::size_t>(set * lists.sets / sets);
    return std::span(lists.indices)
        .subspan(static_cast<std::size_t>(lists.indptr[list]),
                 static_cast<std::size_t>(lists.indptr[list + 1] - lists.indptr[list]));
  }
  void check_within(index_t sets) const {
    const block_lists& lists = within->pages;
    require(lists.k_block == page_size && lists.sets > 0 && sets % lists.sets == 0 &&
                std::ssize(lists.indptr) == lists.sets + 1 && lists.indptr.front() == 0 &&
                lists.indptr.back() == std::ssize(lists.indices) && within->keys >= 0,
            "quest: preselected ", lists.sets, " lists of pages of ", lists.k_block,
            "; scores have ", sets, " sets of pages of ", page_size);
    for (std::size_t i = 0; i + 1 < lists.indptr.size(); ++i) {
      const index_t begin = lists.indptr[i];
      const index_t end = lists.indptr[i + 1];
      require(begin <= end && end <= lists.indptr.back(), "quest: indptr of preselected pages ",
              "goes from ", begin, " to ", end);
      require(std::is_sorted(lists.indices.begin() + begin, lists.indices.begin() + end),
              "quest: preselected pages do not ascend");
    }
  }
};

namespace detail {

inline index_t pages_of_budget(index_t token_budget, token_t page_size) {
  require(token_budget >= 0 && page_size > 0, "quest: ", token_budget, " tokens in pages of ",
          page_size);
  return token_budget / page_size;
}

}  // namespace detail

/// The preset of Quest's kernels: token_budget / page_size pages, the last one among them, a list
/// for each query head, two dense layers.
/// Throws: shape_error unless token_budget is not negative and page_size positive.
inline quest_method quest(index_t token_budget = 512, token_t page_size = 16) {
  const index_t pages = detail::pages_of_budget(token_budget, page_size);
  return {{budget::fixed(pages), {.recent = 1}}, page_size, head_reduce::none, 2};
}

/// The preset of The Sparse Frontier (arXiv:2504.17768): so many pages and the last one besides, by
/// the sum over a group unless `shared` is false.
/// Throws: shape_error as quest() does.
inline quest_method sf_quest(index_t token_budget = 1024, token_t page_size = 16,
                             bool shared = true) {
  const index_t pages = detail::pages_of_budget(token_budget, page_size);
  return {{budget::fixed(pages), {.recent = 1, .counted = protection::counting::on_top}},
          page_size,
          shared ? head_reduce::sum : head_reduce::none};
}

}  // namespace sattn
