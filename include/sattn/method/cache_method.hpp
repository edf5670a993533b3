// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/method/method.hpp>
#include <sattn/pattern/vertical_slash.hpp>

#include <concepts>
#include <vector>

namespace sattn {

/// Which keys each kv head keeps, ascending: what paged_kv_cache::evict takes.
using keep_lists = std::vector<std::vector<token_t>>;

/// A recipe that chooses which keys of a cache stay. Plain data, as an attention_method is.
///
///   keep_lists choose_kept(context& ctx, const method_inputs& in) const;
template <class M>
concept cache_method = requires(const M& method, context& ctx, const method_inputs& in) {
  { method.choose_kept(ctx, in) } -> std::same_as<keep_lists>;
};

/// What a cache method did.
struct cache_report {
  std::vector<index_t> keys_of_head;  // [kv_heads]: keys that stay
  double density;                     // of all keys of all kv heads; 1 where there are none
  double estimate_ms;                 // to look and choose
};

/// The keys that a cache method chose.
struct cache_choice {
  keep_lists kept;   // [kv_heads]
  index_t keys = 0;  // that there were, of all kv heads together
  double estimate_ms = 0.0;

  cache_report report() const {
    cache_report result{{}, 1.0, estimate_ms};
    index_t all = 0;
    for (const std::vector<token_t>& list : kept) {
      result.keys_of_head.push_back(std::ssize(list));
      all += std::ssize(list);
    }
    if (keys > 0) result.density = static_cast<double>(all) / static_cast<double>(keys);
    return result;
  }
};

/// Chooses by a method and says what that took: the kept lists go to paged_kv_cache::evict.
/// Throws: shape_error as the method does; std::bad_alloc.
/// See: docs/methods.md.
template <cache_method M>
cache_choice choose_kept_by(context& ctx, const method_inputs& in, const M& method) {
  detail::stopwatch watch;
  cache_choice result{method.choose_kept(ctx, in), in.shape.kv_heads * in.shape.kv_len};
  result.estimate_ms = watch.lap_ms();
  return result;
}

/// What rows see of the keys that were there when a choice was made: a plan of it says by
/// measure_recall what a cache would lose, before anything is evicted. Rows that come later see
/// their own keys besides: columns_of(kept) | sliding_window{...}.
inline per_head columns_of(const keep_lists& kept) {
  per_head heads;
  for (const std::vector<token_t>& list : kept) {
    heads.patterns.emplace_back(vertical_slash{list, {}});
  }
  return heads;
}

}  // namespace sattn
