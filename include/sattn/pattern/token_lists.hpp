// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/math.hpp>
#include <sattn/pattern/append_lists.hpp>
#include <sattn/plan/plan_writer.hpp>

#include <span>
#include <vector>

namespace sattn {

/// A list of keys for every `rows_per_list` query rows: top-k attention, learned indexers.
///
/// Row i of set s reads tokens[indptr[r] .. indptr[r + 1]) with
/// r = s * ceil(q_len / rows_per_list) + i / rows_per_list; any order, duplicates count once.
/// sets = 1, kv_heads or q_heads.
/// Throws: shape_error, while planning, if indptr has the wrong length or decreases, or if a key is
/// outside [0, kv_len).
struct token_lists {
  token_t rows_per_list = 1;
  std::vector<index_t> indptr;
  std::vector<token_t> tokens;
  index_t sets = 1;

  /// Adds one list after the other. Throws: std::bad_alloc.
  void append(std::span<const std::vector<token_t>> lists) {
    detail::append_lists(lists, indptr, tokens);
  }

  index_t heads() const { return sets; }
  tile_grid grid() const {
    require(rows_per_list > 0, "token_lists: rows_per_list ", rows_per_list,
            " must be positive");
    // Single rows share a tile all the same: a plan keeps apart which of 16 rows has which key.
    if (rows_per_list == 1) return {16, 16};
    return {std::min(rows_per_list, max_tile_rows), rows_per_list};
  }
  void emit(const plan_scope& scope, plan_writer& writer) const {
    const index_t lists = ceil_div(scope.shape.q_len, rows_per_list);
    require(static_cast<index_t>(indptr.size()) == sets * lists + 1, "token_lists: indptr has ",
            indptr.size(), " entries, expected ", sets, " x ", lists, " + 1");
    require(indptr.front() == 0 && indptr.back() == static_cast<index_t>(tokens.size()),
            "token_lists: indptr runs from ", indptr.front(), " to ", indptr.back(),
            ", expected 0 to ", tokens.size());
    for (index_t i = 0; i < lists; ++i) {
      const auto r = static_cast<std::size_t>(scope.pick(sets) * lists + i);
      require(indptr[r] >= 0 && indptr[r] <= indptr[r + 1] && indptr[r + 1] <= indptr.back(),
              "token_lists: indptr decreases from ", indptr[r], " to ", indptr[r + 1],
              " at list ", r);
      const std::span<const token_t> list(tokens.data() + indptr[r],
                                          static_cast<std::size_t>(indptr[r + 1] - indptr[r]));
      writer.row_keys(static_cast<token_t>(i * rows_per_list),
                      static_cast<token_t>(std::min((i + 1) * rows_per_list, scope.shape.q_len)),
                      list);
    }
  }
};

}  // namespace sattn
