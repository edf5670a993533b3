// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/types.hpp>

#include <span>
#include <vector>

namespace sattn::detail {

/// Adds lists, one after the other, to those that `values` and `indptr` hold; list i is
/// values[indptr[i] .. indptr[i + 1]).
inline void append_lists(std::span<const std::vector<token_t>> lists, std::vector<index_t>& indptr,
                         std::vector<token_t>& values) {
  if (indptr.empty()) indptr.push_back(0);
  indptr.reserve(indptr.size() + lists.size());
  for (const std::vector<token_t>& list : lists) {
    indptr.push_back(indptr.back() + std::ssize(list));
  }
  values.reserve(static_cast<std::size_t>(indptr.back()));
  for (const std::vector<token_t>& list : lists) {
    values.insert(values.end(), list.begin(), list.end());
  }
}

}  // namespace sattn::detail
