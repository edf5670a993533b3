// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/budget/select.hpp>
#include <sattn/core/math.hpp>
#include <sattn/estimate/row_scores.hpp>
#include <sattn/method/cache_method.hpp>
#include <sattn/method/method.hpp>

#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace sattn {

/// The attention that each cached key has received so far, for each kv head; follows a cache that
/// evicts.
class attention_history {
 public:
  /// Throws: shape_error if kv_heads is negative; std::bad_alloc.
  explicit attention_history(index_t kv_heads) {
    require(kv_heads >= 0, "attention_history: ", kv_heads, " kv heads");
    mass_.resize(static_cast<std::size_t>(kv_heads));
  }

  /// Adds what one call gave to the keys of a head: [kv_len, 1, 1], the mass that attend() writes.
  /// Keys that are new begin at 0. Throws: shape_error unless the head exists and has no fewer keys
  /// than before; std::bad_alloc.
  void add(index_t kv_head, const tensor_view<const float>& mass) {
    require(kv_head >= 0 && kv_head < std::ssize(mass_), "attention_history: head ", kv_head,
            " of ", mass_.size());
    std::vector<float>& sum = mass_[static_cast<std::size_t>(kv_head)];
    require(mass.heads == 1 && mass.dim == 1 && mass.tokens >= std::ssize(sum),
            "attention_history: mass is [", mass.tokens, ", ", mass.heads, ", ", mass.dim,
            "], the head had ", sum.size(), " keys");
    sum.resize(static_cast<std::size_t>(mass.tokens), 0.0f);
    for (index_t i = 0; i < mass.tokens; ++i) sum[static_cast<std::size_t>(i)] += *mass.row(i, 0);
  }
  /// Forgets the keys that a cache evicts. Throws: shape_error unless there is a list for each
  /// head, ascending and of keys that exist; nothing is forgotten then.
  void evict(const keep_lists& keep) {
    require(keep.size() == mass_.size(), "attention_history: ", keep.size(), " lists for ",
            mass_.size(), " heads");
    for (std::size_t h = 0; h < keep.size(); ++h) {
      token_t previous = -1;
      for (const token_t key : keep[h]) {
        require(key > previous && key < std::ssize(mass_[h]), "attention_history: key ", key,
                " of head ", h, " follows ", previous, "; the head has ", mass_[h].size());
        previous = key;
      }
    }
    for (std::size_t h = 0; h < keep.size(); ++h) {
      for (std::size_t i = 0; i < keep[h].size(); ++i) {
        mass_[h][i] = mass_[h][static_cast<std::size_t>(keep[h][i])];
      }
      mass_[h].resize(keep[h].size());
    }
  }
  index_t kv_heads() const { return std::ssize(mass_); }
  std::span<const float> of_head(index_t kv_head) const {
    return mass_[static_cast<std::size_t>(kv_head)];
  }

 private:
  std::vector<std::vector<float>> mass_;
};

/// Keeps the keys that have received most attention so far, and the last ones. The query heads of a
/// group count together, as in the mass that attend() sums; the source has no groups. The defaults
/// are ours: its code has 4 heavy keys and 512 recent ones, the paper a tenth of the prompt each.
/// History sums are f32: what a key receives is lost where it is less than 2^-24 of its sum.
/// Source: H2O (arXiv:2306.14048).
struct h2o {
  index_t heavy;
  index_t recent;

  explicit constexpr h2o(index_t heaviest = 512, index_t last = 512)
      : heavy(heaviest), recent(last) {}

  /// Throws: shape_error if a number is negative; std::bad_alloc.
  keep_lists choose_kept(const attention_history& history) const {
    require(heavy >= 0 && recent >= 0, "h2o: ", heavy, " heavy and ", recent, " recent keys");
    index_t all = 0;
    if (!add(heavy, recent, all)) all = std::numeric_limits<index_t>::max();
    keep_lists kept(static_cast<std::size_t>(history.kv_heads()));
    selector choose;
    for (index_t h = 0; h < history.kv_heads(); ++h) {
      choose.choose(history.of_head(h), {budget::fixed(all), {.recent = recent}}, {},
                    kept[static_cast<std::size_t>(h)]);
    }
    return kept;
  }
};

/// As choose_kept_by() of other cache methods. Throws: shape_error as the method does.
inline cache_choice choose_kept_by(const attention_history& history, const h2o& method) {
  index_t keys = 0;
  for (index_t h = 0; h < history.kv_heads(); ++h) keys += std::ssize(history.of_head(h));
  detail::stopwatch watch;
  cache_choice result{method.choose_kept(history), keys};
  result.estimate_ms = watch.lap_ms();
  return result;
}

/// Keeps the keys that the last query attends to most, by the mean over all query heads: the same
/// for every kv head, none protected. The source has no default capacity.
/// Source: TOVA (arXiv:2401.06104).
struct tova {
  index_t capacity;

  explicit constexpr tova(index_t keys = 1024) : capacity(keys) {}

  /// Throws: shape_error if the capacity is negative or there is no query.
  keep_lists choose_kept(context& ctx, const method_inputs& in) const {
    const auto last = static_cast<token_t>(in.shape.q_len);
    require(last > 0, "tova: no query to look with");
    const score_tensor scores = row_scores(ctx, in.shape, in.q, in.k, {last - 1, last},
                                           in.rules(head_reduce::none));
    std::vector<float> mean(static_cast<std::size_t>(in.shape.kv_len));
    for (index_t h = 0; h < scores.sets; ++h) {
      detail::join_head(mean, scores.row(h, 0), h, scores.sets, head_reduce::mean);
    }
    std::vector<token_t> of_all;
    selector().choose(mean, {budget::fixed(capacity)}, {}, of_all);
    return keep_lists(static_cast<std::size_t>(in.shape.kv_heads), of_all);
  }
};

}  // namespace sattn
