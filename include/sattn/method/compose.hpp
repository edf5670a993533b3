// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/method/cache_method.hpp>
#include <sattn/method/method.hpp>
#include <sattn/method/quest.hpp>
#include <sattn/pattern/basic.hpp>

#include <map>
#include <utility>
#include <vector>

// Methods made of methods. Selecting and then pruning is in top_k.hpp: twilight().

namespace sattn {

/// The pages that hold keys of a list for each kv head, chosen from the first `keys` keys: what
/// quest_method may choose from.
/// Throws: shape_error unless the lists ascend and page_size is positive.
inline preselected_pages pages_of(const keep_lists& kept, token_t page_size, index_t keys) {
  require(page_size > 0 && keys >= 0, "pages_of: pages of ", page_size, ", ", keys, " keys");
  block_lists pages{1, page_size, {0}, {}, std::ssize(kept)};
  for (const std::vector<token_t>& list : kept) {
    token_t last = -1;
    token_t previous = -1;
    for (const token_t key : list) {
      require(key > previous, "pages_of: key ", key, " follows ", previous);
      previous = key;
      if (key / page_size == last) continue;
      last = key / page_size;
      pages.indices.push_back(last);
    }
    pages.indptr.push_back(std::ssize(pages.indices));
  }
  return {std::move(pages), keys};
}

/// One choice for several decode steps and layers: what is chosen anew every `steps` steps, by the
/// first of every `layers` layers, serves the others. Keys that came since then are attended to by
/// all. Layers that a method treats apart need groups of their own; a by_head goes within. A step
/// before that of a choice, as after drafts were taken back, chooses anew.
///
///   reused quest(sf_quest(1024), 4);
///   plan_decode(ctx, q, kv, quest.at(step), {.layer = layer, .summaries = cache.summaries()});
///
/// Stateful; one per sequence.
/// Source: KTransformers' token_step and layer_step.
template <attention_method M>
class reused {
 public:
  /// The method of one step, for the layer that its inputs name; inputs without one are of layer 0.
  /// Refers to what it is of.
  class of_step {
   public:
    /// Layers of a step come in order. Throws: shape_error as the method does, where the layer is
    /// negative, where a group of layers does not begin with its first one in a step that chooses,
    /// or where keys were dropped or the number of rows or heads changed since: call forget() then;
    /// std::bad_alloc.
    any_pattern choose(context& ctx, const method_inputs& in) const {
      return of_.choose(ctx, in, step_, in.layer == method_inputs::no_layer ? 0 : in.layer);
    }

   private:
    friend class reused;
    of_step(reused& of, index_t step) : of_(of), step_(step) {}
    reused& of_;
    index_t step_;
  };

  /// Throws: shape_error unless steps and layers are positive.
  explicit reused(M method, index_t steps = 1, index_t layers = 1)
      : method_(std::move(method)), steps_(steps), layers_(layers) {
    require(steps > 0 && layers > 0, "reused: every ", steps, " steps, every ", layers, " layers");
  }

  /// Throws: shape_error if the step is negative.
  of_step at(index_t step) & {
    require(step >= 0, "reused: step ", step);
    return of_step(*this, step);
  }

  /// The next step chooses anew in every layer.
  void forget() { groups_.clear(); }

 private:
  struct chosen {
    any_pattern pattern;
    index_t step;
    attention_shape shape;
  };

  any_pattern choose(context& ctx, const method_inputs& in, index_t step, index_t layer) {
    require(layer >= 0, "reused: layer ", layer);
    const index_t group = layer / layers_;
    const auto found = groups_.find(group);
    const bool serves = found != groups_.end() && step >= found->second.step &&
                        step - found->second.step < steps_;
    require(serves || layer % layers_ == 0, "reused: layer ", layer, " of step ", step,
            " came before layer ", group * layers_);
    if (!serves) {
      groups_.insert_or_assign(group, chosen{method_.choose(ctx, in), step, in.shape});
    }
    const chosen& last = groups_.at(group);
    require(in.shape.q_len == last.shape.q_len && in.shape.q_heads == last.shape.q_heads &&
                in.shape.kv_heads == last.shape.kv_heads,
            "reused: ", in.shape.q_len, " rows of ", in.shape.q_heads, " heads, ",
            last.shape.q_len, " of ", last.shape.q_heads, " when the choice was made");
    const index_t since = in.shape.kv_len - last.shape.kv_len;
    require(since >= 0, "reused: ", in.shape.kv_len, " keys, ", last.shape.kv_len,
            " when the choice was made");
    if (since == 0) return last.pattern;
    // The newest row sees all of them; earlier rows of the same call a few keys more.
    return last.pattern | sliding_window{static_cast<token_t>(since)};
  }

  M method_;
  index_t steps_;
  index_t layers_;
  std::map<index_t, chosen> groups_;  // by place of the group; few may be in use
};

/// A method for each layer, of_layer(layer): budgets by layer. A budget beyond the length runs
/// dense.
template <class F>
struct by_layer {
  F of_layer;

  /// Throws: shape_error where the inputs name no layer; what the method throws.
  attention_pattern auto choose(context& ctx, const method_inputs& in) const {
    require(in.layer != method_inputs::no_layer, "by_layer: the options name no layer");
    return of_layer(in.layer).choose(ctx, in);
  }
};
template <class F>
by_layer(F) -> by_layer<F>;

/// A method for each query head, of_head(query head): budgets by head, such as the shares that
/// XAttention searches for, or different methods as any_method. A method sees its head as the only
/// one of the attention, so that data which it refers to (scores, copies of keys, settings of
/// heads) are of one head.
///
/// Heads are looked at one after the other: methods that are parallel over blocks or pages stay so,
/// those that are parallel over heads (by the last queries, flexprefill) run on one thread.
template <class F>
struct by_head {
  F of_head;

  /// Throws: what the methods throw; std::bad_alloc.
  per_head choose(context& ctx, const method_inputs& in) const {
    per_head heads;
    for (index_t h = 0; h < in.shape.q_heads; ++h) {
      const index_t kv_head = h / in.shape.group_size();
      method_inputs own = in;
      own.shape.q_heads = own.shape.kv_heads = 1;
      own.q = in.q.head_slice(h, h + 1);
      own.k = in.k.head_slice(kv_head, kv_head + 1);
      if (!in.summaries.empty()) {
        require(kv_head < std::ssize(in.summaries), "by_head: ", in.summaries.size(),
                " summaries of pages for ", in.shape.kv_heads, " kv heads");
        own.summaries = in.summaries.subspan(static_cast<std::size_t>(kv_head), 1);
      }
      heads.patterns.emplace_back(of_head(h).choose(ctx, own));
    }
    return heads;
  }
};
template <class F>
by_head(F) -> by_head<F>;

}  // namespace sattn
