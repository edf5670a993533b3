// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/error.hpp>
#include <sattn/core/types.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace sattn {

namespace detail {

/// share * all, rounded up; of a hair less than the product, so that 0.07 of 100 is 7 although the
/// double is a hair more.
inline double share_up(double share, double all) {
  return std::ceil(share * all * (1.0 - 4 * std::numeric_limits<double>::epsilon()));
}

}  // namespace detail

/// How many units (keys, blocks, distances) to keep. A plain value.
///
/// A budget that reaches the number of legal units keeps them all, which runs as dense attention.
class budget {
 public:
  enum class kind { fixed, power, coverage, threshold };

  /// A count. Throws: shape_error if negative.
  static budget fixed(index_t count) {
    require(count >= 0, "budget: fixed ", count, " is negative");
    return {kind::fixed, count, 0.0, 0.0};
  }
  /// A share of the legal units, rounded up. Throws: shape_error unless within [0, 1].
  static budget ratio(double share) {
    require(share >= 0.0 && share <= 1.0, "budget: ratio ", share, " is outside [0, 1]");
    return {kind::power, 0, share, 1.0};
  }
  /// factor * legal^exponent, rounded up: a budget that follows the length, with an exponent below
  /// 1 more slowly than a ratio does. Throws: shape_error unless factor and exponent are finite and
  /// not negative.
  static budget power(double factor, double exponent) {
    require(std::isfinite(factor) && factor >= 0.0 && std::isfinite(exponent) && exponent >= 0.0,
            "budget: power of ", factor, " and ", exponent, ", expected finite numbers >= 0");
    return {kind::power, 0, factor, exponent};
  }
  /// The fewest units whose scores reach a share of the sum of all scores (top-p). Scores must not
  /// be negative; an infinite one reaches any share. Throws: shape_error unless within (0, 1].
  static budget coverage(double mass) {
    require(mass > 0.0 && mass <= 1.0, "budget: coverage ", mass, " is outside (0, 1]");
    return {kind::coverage, 0, mass, 0.0};
  }
  /// The same where the scores must exceed the share, which takes one unit more at a tie, and one
  /// for a share of 0. Throws: shape_error unless within [0, 1].
  static budget coverage_above(double mass) {
    require(mass >= 0.0 && mass <= 1.0, "budget: coverage ", mass, " is outside [0, 1]");
    budget b{kind::coverage, 0, mass, 0.0};
    b.beyond_ = true;
    return b;
  }
  /// All units whose score exceeds a number. Throws: shape_error for NaN.
  static budget threshold(double score) {
    require(!std::isnan(score), "budget: threshold is NaN");
    return {kind::threshold, 0, score, 0.0};
  }

  /// Bounds of the count, whatever the kind. Throws: shape_error if negative or crossed.
  budget at_least(index_t count) const {
    budget b = *this;
    b.min_ = count;
    return b.checked();
  }
  budget at_most(index_t count) const {
    budget b = *this;
    b.max_ = count;
    return b.checked();
  }

  kind by() const { return kind_; }
  /// The share of a coverage budget, and whether it is to be exceeded.
  double share() const { return number_; }
  bool beyond() const { return beyond_; }
  /// The score of a threshold.
  double threshold() const { return number_; }
  index_t clamp(index_t count) const { return std::clamp(count, min_, max_); }

  /// The count for so many legal units; for budgets that do not depend on scores.
  index_t count(index_t legal) const {
    if (kind_ == kind::fixed) return std::min(clamp(count_), legal);
    const auto units = static_cast<double>(legal);
    const double all = exponent_ == 1.0 ? units : std::pow(units, exponent_);
    const double wanted =
        number_ == 0.0 ? 0.0 : std::min(detail::share_up(number_, all), units);
    return std::min(clamp(static_cast<index_t>(wanted)), legal);
  }

 private:
  budget(kind by, index_t count, double number, double exponent)
      : kind_(by), count_(count), number_(number), exponent_(exponent) {}
  const budget& checked() const {
    require(min_ >= 0 && min_ <= max_, "budget: at least ", min_, " and at most ", max_);
    return *this;
  }

  kind kind_;
  index_t count_;
  double number_;    // factor, share or threshold
  double exponent_;
  bool beyond_ = false;
  index_t min_ = 0;
  index_t max_ = std::numeric_limits<index_t>::max();
};

/// Units kept whatever their score: StreamingLLM's sinks, the recent past, a row's own place.
struct protection {
  // Whether protected units use up the budget, with their scores first, or come on top of it. With
  // `slots` the budget is what it would be without them, and they take its places.
  enum class counting { inside, on_top, slots };

  index_t first = 0;      // the first legal units
  index_t recent = 0;     // the last legal units
  bool diagonal = false;  // the units that hold the rows' own positions
  index_t before = 0;     // so many units before those
  counting counted = counting::inside;
};

/// What to keep of a row of scores.
struct selection {
  budget amount;
  protection keep = {};
};

/// Throws shape_error if protected counts are negative.
inline void check_selection(const selection& rule) {
  require(rule.keep.first >= 0 && rule.keep.recent >= 0 && rule.keep.before >= 0,
          "selection: protected first ", rule.keep.first, ", recent ", rule.keep.recent,
          " and before ", rule.keep.before, " must not be negative");
}

}  // namespace sattn
