// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/plan/plan_writer.hpp>

#include <memory>
#include <utility>
#include <vector>

namespace sattn {

/// The union of two patterns; written `a | b`.
template <attention_pattern A, attention_pattern B>
struct any_of {
  A first;
  B second;

  index_t heads() const { return std::max(pattern_heads(first), pattern_heads(second)); }
  tile_grid grid(index_t sharing_heads) const {
    return pattern_grid(first, sharing_heads) & pattern_grid(second, sharing_heads);
  }
  void emit(const plan_scope& scope, plan_writer& writer) const {
    first.emit(scope, writer);
    second.emit(scope, writer);
  }
};

template <attention_pattern A, attention_pattern B>
any_of<A, B> operator|(A first, B second) {
  return {std::move(first), std::move(second)};
}

/// Any pattern as a value of one type.
class any_pattern {
 public:
  template <attention_pattern P>
    requires(!std::same_as<P, any_pattern>)
  any_pattern(P pattern)  // NOLINT(google-explicit-constructor): a list of patterns converts
      : heads_(pattern_heads(pattern)),
        pattern_(std::make_shared<model<P>>(std::move(pattern))) {}

  index_t heads() const { return heads_; }
  tile_grid grid(index_t sharing_heads) const { return pattern_->grid(sharing_heads); }
  void emit(const plan_scope& scope, plan_writer& writer) const { pattern_->emit(scope, writer); }

 private:
  struct interface {
    virtual ~interface() = default;
    virtual tile_grid grid(index_t sharing_heads) const = 0;
    virtual void emit(const plan_scope& scope, plan_writer& writer) const = 0;
  };
  template <class P>
  struct model final : interface {
    P pattern;
    explicit model(P p) : pattern(std::move(p)) {}
    tile_grid grid(index_t sharing_heads) const override {
      return pattern_grid(pattern, sharing_heads);
    }
    void emit(const plan_scope& scope, plan_writer& writer) const override {
      pattern.emit(scope, writer);
    }
  };

  index_t heads_;
  std::shared_ptr<const interface> pattern_;  // copies share it: patterns do not change
};

/// A different pattern for each head: kv_heads or q_heads of them.
/// Each is asked about its own head alone, so patterns with data of their own hold one set.
struct per_head {
  std::vector<any_pattern> patterns;

  index_t heads() const { return static_cast<index_t>(patterns.size()); }
  tile_grid grid(index_t sharing_heads) const {
    tile_grid grid{max_tile_rows, 0};
    for (const any_pattern& p : patterns) grid = grid & p.grid(sharing_heads);
    return grid;
  }
  void emit(const plan_scope& scope, plan_writer& writer) const {
    patterns[static_cast<std::size_t>(scope.pick(heads()))].emit(scope, writer);
  }
};

}  // namespace sattn
