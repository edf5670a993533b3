// SPDX-License-Identifier: Apache-2.0
//
// Every preset by its name, made for a budget of keys: the list that tests of what all methods have
// in common go through. A budget as long as the sequence selects everything.
#pragma once

#include <sattn/method/a_shape.hpp>
#include <sattn/method/block_sparse.hpp>
#include <sattn/method/compose.hpp>
#include <sattn/method/duo.hpp>
#include <sattn/method/eviction.hpp>
#include <sattn/method/flexprefill.hpp>
#include <sattn/method/quest.hpp>
#include <sattn/method/snapkv.hpp>
#include <sattn/method/top_k.hpp>
#include <sattn/method/vertical_slash.hpp>

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "method/cases.hpp"
#include "support/problem.hpp"
#include "support/random.hpp"
#include "support/stored.hpp"

namespace test_support {

/// All that a preset looks at: rows and keys, bounds of pages, a copy of the keys in int8 and
/// scores from elsewhere.
struct preset_inputs {
  static constexpr token_t page = 16;
  static constexpr token_t scored_block = 16;  // of rows and keys of a gate

  attention_problem p;
  sattn::domain legal = {};
  std::vector<sattn::page_summaries> summaries = summaries_of(p, page);
  attention_problem rounded = p;  // with the keys of the copy
  encoded_rows rows{rounded.k, sattn::dtype::i8};
  stored_tensor copy;
  sattn::score_tensor blocks;  // a gate's, for each kv head
  sattn::score_tensor tokens;  // an indexer's, for all heads

  preset_inputs(random_source& random, attention_problem problem)
      : p(std::move(problem)),
        copy(rows, storage_layout::paged, random),
        blocks(p.shape.kv_heads, sattn::ceil_div(p.shape.q_len, scored_block),
               sattn::ceil_div(p.shape.kv_len, scored_block), 0.0f),
        tokens(1, p.shape.q_len, p.shape.kv_len, 0.0f) {
    for (float& x : blocks.values) x = static_cast<float>(random.normal());
    // Sums of rectified products: many zeros, so that ties decide.
    for (float& x : tokens.values) x = std::max(0.0f, static_cast<float>(random.integer(-9, 10)));
  }

  index_t len() const { return p.shape.kv_len; }
  sattn::method_inputs of(const attention_problem& problem) const {
    sattn::method_inputs in = inputs(problem, summaries);
    in.legal = legal;
    return in;
  }
  /// Of all attention, for budgets that are a share of it.
  double share(index_t budget) const {
    return len() == 0 ? 1.0
                      : std::min(1.0, static_cast<double>(budget) / static_cast<double>(len()));
  }
  /// Keys that were there when some were kept.
  index_t known() const { return len() - len() / 4; }
  /// As many of them as a budget has or all, evenly spread, for each kv head.
  sattn::keep_lists spread(index_t budget) const {
    sattn::keep_lists kept(at(p.shape.kv_heads));
    for (index_t key = 0; key < known(); key += std::max<index_t>(1, known() / budget)) {
      for (std::vector<token_t>& list : kept) list.push_back(static_cast<token_t>(key));
    }
    return kept;
  }
  /// Up to three keys ago, where there were as many as rows.
  index_t keys_before() const { return std::min(len(), std::max(len() - 3, p.shape.q_len)); }
  attention_problem before() const {
    attention_problem earlier = part_of(p, 0, p.shape.q_len, keys_before());
    earlier.shape.q_offset = static_cast<token_t>(keys_before() - p.shape.q_len);
    return earlier;
  }
};

enum class preset_kind { prefill, decode, cache };

struct preset {
  std::string name;  // words of docs/methods.md, and what tells it from others
  preset_kind kind;
  std::function<sattn::attention_plan(sattn::context&, const preset_inputs&, index_t budget)> plan;
  bool nested = true;       // what a larger budget selects holds what a smaller one did
  bool looks_back = false;  // the last rows choose for all

  // Of caches, whose budgets are no smaller than what is protected.
  std::function<sattn::keep_lists(sattn::context&, const preset_inputs&, index_t budget)> keep = {};
  index_t first = 0, recent = 0;  // protected
  std::function<index_t(index_t len, index_t budget)> capacity =
      [](index_t len, index_t budget) { return std::min(len, budget); };

  index_t least() const { return std::max<index_t>(first + recent, 16); }
};

namespace detail {

/// method_for(inputs, budget).
template <class F>
preset prefill_preset(std::string name, F method_for, bool looks_back = false) {
  return {std::move(name), preset_kind::prefill,
          [=](sattn::context& ctx, const preset_inputs& in, index_t budget) {
            return plan_prefill(ctx, in.p.q.view(), in.p.kv(), method_for(in, budget),
                                {.plan = {.legal = in.legal}})
                .plan;
          },
          true, looks_back};
}

/// In the midst of a model, where presets have no dense layers any more.
template <class F>
preset decode_preset(std::string name, F method_for, bool nested = true) {
  return {std::move(name), preset_kind::decode,
          [=](sattn::context& ctx, const preset_inputs& in, index_t budget) {
            return plan_decode(
                       ctx, in.p.q.view(), in.p.kv(), method_for(in, budget),
                       {.plan = {.legal = in.legal}, .layer = 20, .summaries = in.summaries})
                .plan;
          },
          nested};
}

/// keep(context, inputs, budget of a head); of what it protects, the first and the last keys.
template <class F>
preset cache_preset(std::string name, index_t first, index_t recent, F keep) {
  return {std::move(name), preset_kind::cache, {}, true, true, keep, first, recent};
}
/// The same by method_for(budget of a head).
template <class F>
preset evicting_preset(std::string name, index_t first, index_t recent, F method_for) {
  return cache_preset(std::move(name), first, recent,
                      [=](sattn::context& ctx, const preset_inputs& in, index_t budget) {
                        return method_for(budget).choose_kept(ctx, in.of(in.p));
                      });
}

inline sattn::attention_plan reused_plan(sattn::context& ctx, const preset_inputs& in,
                                         index_t budget) {
  sattn::reused method(sattn::top_k(budget), 2);
  const attention_problem before = in.before();
  method.at(0).choose(ctx, in.of(before));
  return plan_decode(ctx, in.p.q.view(), in.p.kv(), method.at(1), {.plan = {.legal = in.legal}})
      .plan;
}

inline sattn::quest_method within_spread(const preset_inputs& in, index_t budget) {
  sattn::quest_method method = sattn::sf_quest(budget, preset_inputs::page);
  method.within = sattn::pages_of(in.spread(budget), preset_inputs::page, in.known());
  return method;
}

/// The second of two kv heads streams, in layers as MInference's search describes them.
inline sattn::minference_heads two_kinds(const preset_inputs& in, token_t budget) {
  using kind = sattn::minference_head::kind;
  sattn::minference_heads method;
  for (index_t h = 0; h < in.p.shape.q_heads; ++h) {
    method.heads.push_back(h < in.p.shape.q_heads / 2
                               ? sattn::minference_head{kind::vertical_slash, 30 + budget,
                                                        100 + budget}
                               : sattn::minference_head{kind::streaming, 4, budget});
  }
  return method;
}

/// The attention of all rows so far.
inline sattn::attention_history history_of(sattn::context& ctx, const preset_inputs& in) {
  const index_t keys = in.len(), heads = in.p.shape.q_heads;
  const std::vector<float> mass =
      run(ctx, plan_prefill(ctx, in.p.shape, sattn::dense{}), in.p).mass;  // [kv_len, q_heads]
  sattn::attention_history history(in.p.shape.kv_heads);
  for (index_t h = 0; h < heads; ++h) {
    std::vector<float> of_head;
    for (index_t t = 0; t < keys; ++t) of_head.push_back(mass[at(t * heads + h)]);
    history.add(h / in.p.shape.group_size(), sattn::nhd<const float>(of_head.data(), keys, 1, 1));
  }
  return history;
}

/// The Sparse Frontier's, of short sequences: fewer keys are protected.
inline sattn::snapkv_method with_few_protected(sattn::snapkv_method m) {
  m.keep.first = 2;
  m.keep.recent = 6;
  if (m.adaptive) m.adaptive->floor = std::max<index_t>(m.capacity / 5, 8);
  return m;
}

}  // namespace detail

/// Attention of two kv heads.
inline std::vector<preset> all_presets() {
  using sattn::budget;
  using in_t = preset_inputs;
  std::vector<preset> list;
  const auto prefill = [&](std::string name, auto method_for, bool looks_back = false) {
    list.push_back(detail::prefill_preset(std::move(name), method_for, looks_back));
  };
  const auto decode = [&](std::string name, auto method_for, bool nested = true) {
    list.push_back(detail::decode_preset(std::move(name), method_for, nested));
  };
  const auto cache = [&](std::string name, index_t first, index_t recent, auto method_for) {
    list.push_back(detail::evicting_preset(std::move(name), first, recent, method_for));
  };

  prefill("a_shape", [](const in_t&, index_t b) { return sattn::a_shape(4, token_t(b)); });
  prefill("tri_shape", [](const in_t&, index_t b) { return sattn::tri_shape(4, token_t(b), 30); },
          true);
  prefill("minference", [](const in_t&, index_t b) {
    return sattn::minference(30 + token_t(b), 100 + token_t(b));
  }, true);
  prefill("minference_heads",
          [](const in_t& in, index_t b) { return detail::two_kinds(in, token_t(b)); }, true);
  prefill("sf_vertical_slash", [](const in_t&, index_t b) {
    return sattn::sf_vertical_slash(4 + token_t(b), 64 + token_t(b), 64);
  }, true);
  prefill("sf_flexprefill",
          [](const in_t& in, index_t b) { return sattn::sf_flexprefill(in.share(b), 64, 10); },
          true);
  prefill("flexprefill", [](const in_t& in, index_t b) {
    return sattn::flexprefill(in.share(b), 0.1, 32, 100'000, 32);
  }, true);
  prefill("sf_block_sparse",
          [](const in_t&, index_t b) { return sattn::sf_block_sparse(16, 3 + b / 16); });
  prefill("minference_block",
          [](const in_t&, index_t b) { return sattn::minference_block(1 + b / 64); });
  prefill("xattention", [](const in_t& in, index_t b) {
    return sattn::xattention(8, in.share(b), 64);
  });
  prefill("xattention by_head", [](const in_t& in, index_t b) {
    return sattn::by_head{[share = in.share(b)](index_t head) {
      return sattn::xattention(8, head % 2 == 0 ? share : std::min(1.0, 2 * share), 64);
    }};
  });
  prefill("scored_blocks", [](const in_t& in, index_t b) {
    return sattn::scored_blocks{in.blocks, {budget::fixed(b / 16), {.diagonal = true}},
                                in_t::scored_block, in_t::scored_block};
  });
  prefill("scored_tokens", [](const in_t& in, index_t b) {
    return sattn::scored_tokens{in.tokens, {budget::fixed(b)}};
  });
  prefill("duo, rows of a prompt",
          [](const in_t&, index_t b) { return sattn::duo{{true, false}, 4, token_t(b)}; });
  prefill("top_k, rows of a prompt", [](const in_t&, index_t b) { return sattn::top_k(b); });
  prefill("twilight, rows of a prompt",
          [](const in_t& in, index_t b) { return sattn::twilight(in.share(b)); });

  decode("streaming", [](const in_t&, index_t b) { return sattn::streaming(4, token_t(b)); });
  decode("duo", [](const in_t&, index_t b) { return sattn::duo{{true, false}, 4, token_t(b)}; });
  decode("quest", [](const in_t&, index_t b) { return sattn::quest(b); });
  decode("sf_quest", [](const in_t&, index_t b) { return sattn::sf_quest(b); });
  decode("sf_quest, each head",
         [](const in_t&, index_t b) { return sattn::sf_quest(b, in_t::page, false); });
  decode("sf_quest within pages_of", detail::within_spread, false);
  decode("top_k", [](const in_t&, index_t b) { return sattn::top_k(b); });
  decode("top_k by_layer", [](const in_t&, index_t b) {
    return sattn::by_layer{[b](index_t layer) { return sattn::top_k(layer == 20 ? b : 1); }};
  });
  decode("sf_quest by_head", [](const in_t&, index_t b) {
    return sattn::by_head{[b](index_t) { return sattn::sf_quest(b, in_t::page, false); }};
  });
  decode("shadow_top_k",
         [](const in_t& in, index_t b) { return sattn::shadow_top_k(b, in.copy.view); });
  decode("twilight", [](const in_t& in, index_t b) { return sattn::twilight(in.share(b)); });
  decode("twilight of sf_quest by a copy", [](const in_t& in, index_t b) {
    return sattn::twilight(sattn::sf_quest(b), in.share(b), in.copy.view);
  }, false);
  list.push_back({"top_k, reused", preset_kind::decode, detail::reused_plan});

  cache("snapkv", 0, 32, [](index_t b) { return sattn::snapkv(b); });
  cache("snapkv, a window of 8", 0, 8, [](index_t b) { return sattn::snapkv(b, 8); });
  cache("sf_snapkv", 4, 128, [](index_t b) { return sattn::sf_snapkv(b); });
  cache("sf_snapkv, few protected", 2, 6,
        [](index_t b) { return detail::with_few_protected(sattn::sf_snapkv(b, 32)); });
  cache("ada_snapkv", 0, 32, [](index_t b) { return sattn::ada_snapkv(b); });
  cache("ada_snapkv, a window of 8", 0, 8, [](index_t b) { return sattn::ada_snapkv(b, 8); });
  cache("sf_ada_snapkv", 4, 128, [](index_t b) { return sattn::sf_ada_snapkv(b); });
  cache("sf_ada_snapkv, few protected", 2, 6,
        [](index_t b) { return detail::with_few_protected(sattn::sf_ada_snapkv(b, 32)); });
  cache("tova", 0, 0, [](index_t b) { return sattn::tova(b); });
  // The third of four layers.
  list.push_back(
      detail::cache_preset("pyramid", 0, 8, [](sattn::context& ctx, const in_t& in, index_t b) {
        return sattn::pyramid(2, 4, in.len(), b, 8).choose_kept(ctx, in.of(in.p));
      }));
  list.back().capacity = [](index_t len, index_t b) {
    return sattn::pyramid_capacity(2, 4, len, b, 8);
  };
  list.push_back(
      detail::cache_preset("h2o", 0, 8, [](sattn::context& ctx, const in_t& in, index_t b) {
        return sattn::h2o(b - b / 2, b / 2).choose_kept(detail::history_of(ctx, in));
      }));
  return list;
}

}  // namespace test_support
