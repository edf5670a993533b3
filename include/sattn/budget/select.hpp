// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/budget/budget.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <vector>

namespace sattn {

namespace detail {

inline void check_positions(index_t scores) {
  require(scores <= std::numeric_limits<token_t>::max(), "selection: ", scores,
          " scores, positions are 32 bit");
}

/// The nth largest, n from 1, of different numbers, whose order it changes. By radix: counts by the
/// leading bits say among which few the number is, and the rest of the bits decide there. Leading
/// bits are those in which the numbers differ, so that scores close to each other are told apart.
inline std::uint64_t nth_largest(std::span<std::uint64_t> numbers, index_t n) {
  constexpr int radix_bits = 10;
  constexpr index_t few = 128;
  std::array<std::uint32_t, 1 << radix_bits> counts;
  std::uint64_t low = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t high = 0;
  for (const std::uint64_t x : numbers) {
    low = std::min(low, x);
    high = std::max(high, x);
  }
  std::uint64_t range = high - low;
  while (std::ssize(numbers) > few) {
    const int shift = std::max(0, static_cast<int>(std::bit_width(range)) - radix_bits);
    counts.fill(0);
    for (const std::uint64_t x : numbers) ++counts[static_cast<std::size_t>((x - low) >> shift)];
    std::size_t digit = counts.size() - 1;
    for (; n > counts[digit]; --digit) n -= counts[digit];
    // Stored always and kept where the digit fits: which ones fit cannot be foreseen.
    std::size_t kept = 0;
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      const std::uint64_t x = numbers[i];
      numbers[kept] = x;
      kept += (x - low) >> shift == digit ? 1 : 0;
    }
    numbers = numbers.first(kept);
    low += static_cast<std::uint64_t>(digit) << shift;
    range = (std::uint64_t{1} << shift) - 1;
  }
  const auto nth = numbers.begin() + (n - 1);
  std::nth_element(numbers.begin(), nth, numbers.end(), std::greater<>());
  return *nth;
}

}  // namespace detail

/// Chooses units by score, deterministically: higher scores first, lower positions first among
/// equal ones. Keeps its scratch from call to call; one per thread.
class selector {
 public:
  /// Writes the chosen positions into `chosen`, ascending. Scores of -inf mark units that are not
  /// legal; NaN counts as the lowest legal score and has no mass. `diagonal` is the range of units
  /// that hold the rows' own positions.
  /// Throws: shape_error if protected counts are negative, if positions do not fit 32 bits, or if a
  /// coverage budget meets a negative score.
  void choose(std::span<const float> scores, const selection& rule, key_range diagonal,
              std::vector<token_t>& chosen);

 private:
  // Orders like (score descending, position ascending) when compared as an integer, descending.
  // Without branches: signs of scores cannot be foreseen.
  static std::uint64_t rank(float score, token_t position) {
    const auto bits = std::bit_cast<std::int32_t>(score + 0.0f);  // -0 becomes 0
    const auto flipped =
        static_cast<std::uint32_t>(bits ^ (bits >> 31 | std::numeric_limits<std::int32_t>::min()));
    const std::uint32_t key = score != score ? 0u : flipped;
    return std::uint64_t{key} << 32 | (std::numeric_limits<std::uint32_t>::max() -
                                       static_cast<std::uint32_t>(position));
  }
  static token_t position_of(std::uint64_t rank) {
    return static_cast<token_t>(std::numeric_limits<std::uint32_t>::max() -
                                static_cast<std::uint32_t>(rank));
  }
  static double mass_of(float score) {
    return score != score ? 0.0 : static_cast<double>(score);
  }
  static index_t covering(std::span<std::uint64_t> candidates, std::span<const float> scores,
                          double target, bool beyond);

  std::vector<std::uint64_t> ranks_;
};

inline void selector::choose(std::span<const float> scores, const selection& rule,
                             key_range diagonal, std::vector<token_t>& chosen) {
  check_selection(rule);
  detail::check_positions(std::ssize(scores));
  const protection& keep = rule.keep;
  constexpr float illegal = -std::numeric_limits<float>::infinity();
  const auto n = static_cast<token_t>(scores.size());
  const auto is_legal = [&](token_t i) { return scores[static_cast<std::size_t>(i)] != illegal; };
  index_t legal = 0;
  for (const float s : scores) legal += s != illegal ? 1 : 0;

  // Where the first legal units end, the last ones begin, and the rows' own are.
  token_t first_end = 0;
  token_t recent_begin = n;
  for (index_t left = keep.first; left > 0 && first_end < n; ++first_end) {
    if (is_legal(first_end)) --left;
  }
  for (index_t left = keep.recent; left > 0 && recent_begin > 0;) {
    if (is_legal(--recent_begin)) --left;
  }
  key_range own{};
  if (keep.diagonal) {
    own = {static_cast<token_t>(std::max<index_t>(diagonal.begin - keep.before, 0)), diagonal.end};
  }
  const auto is_kept = [&](token_t i) {
    return i < first_end || i >= recent_begin || (i >= own.begin && i < own.end);
  };
  ranks_.resize(scores.size());
  // Stored always and kept where it is a candidate, so that nothing is to be foreseen.
  const auto gather = [&](const auto& is_candidate) {
    std::size_t count = 0;
    for (token_t i = 0; i < n; ++i) {
      ranks_[count] = rank(scores[static_cast<std::size_t>(i)], i);
      count += is_candidate(i) ? 1u : 0u;
    }
    return std::span(ranks_).first(count);
  };
  const budget& amount = rule.amount;
  const bool slots = keep.counted == protection::counting::slots;
  // A unit of infinite mass exceeds any share, alone.
  const auto share_of = [&](double mass) {
    return std::isinf(mass) ? std::numeric_limits<double>::max() : amount.share() * mass;
  };
  index_t covered = 0;  // units that cover the share when none is protected
  if (slots && amount.by() == budget::kind::coverage) {
    double mass = 0.0;
    for (const float score : scores) mass += score == illegal ? 0.0 : mass_of(score);
    covered = amount.share() == 1.0
                  ? legal
                  : covering(gather(is_legal), scores, share_of(mass), amount.beyond());
  }
  const std::span<std::uint64_t> candidates =
      gather([&](token_t i) { return is_legal(i) && !is_kept(i); });
  const bool inside = keep.counted != protection::counting::on_top;
  const auto free = std::ssize(candidates);
  const index_t kept = legal - free;
  index_t wanted = 0;
  if (amount.by() == budget::kind::threshold) {
    index_t above = 0;       // the threshold
    index_t above_kept = 0;  // of them protected
    for (token_t i = 0; i < n; ++i) {
      if (!is_legal(i) || !(double{scores[static_cast<std::size_t>(i)]} > amount.threshold())) {
        continue;
      }
      ++above;
      above_kept += is_kept(i) ? 1 : 0;
    }
    wanted = slots    ? amount.clamp(above) - kept
             : inside ? amount.clamp(above - above_kept + kept) - kept
                      : amount.clamp(above - above_kept);
  } else if (amount.by() == budget::kind::coverage) {
    double protected_mass = 0.0;
    double free_mass = 0.0;
    for (token_t i = 0; i < n; ++i) {
      const float score = scores[static_cast<std::size_t>(i)];
      if (score == illegal) continue;
      require(!(score < 0.0f), "selection: coverage needs scores >= 0, unit ", i, " has ", score);
      (is_kept(i) ? protected_mass : free_mass) += mass_of(score);
    }
    const double all = inside ? protected_mass + free_mass : free_mass;
    if (slots) {
      wanted = amount.clamp(covered) - kept;
    } else {
      const double target = share_of(all) - (inside ? protected_mass : 0.0);
      wanted = amount.share() == 1.0 ? free
                                     : covering(candidates, scores, target, amount.beyond());
      wanted = inside ? amount.clamp(wanted + kept) - kept : amount.clamp(wanted);
    }
  } else {
    wanted = inside ? amount.count(legal) - kept : amount.count(legal);
  }
  wanted = std::clamp<index_t>(wanted, 0, free);
  std::uint64_t last = 0;  // rank of the last chosen candidate
  float least = illegal;   // its score
  if (wanted > 0 && wanted < free) {
    last = detail::nth_largest(candidates, wanted);
    least = scores[static_cast<std::size_t>(position_of(last))];
  }
  // One ordered pass instead of a sort of what was chosen.
  chosen.clear();
  chosen.reserve(static_cast<std::size_t>(kept + wanted));
  for (token_t i = 0; i < n; ++i) {
    const float score = scores[static_cast<std::size_t>(i)];
    const bool among_best = wanted > 0 && !(score < least) && rank(score, i) >= last;
    if ((among_best || is_kept(i)) && score != illegal) chosen.push_back(i);
  }
}

/// How many of the best candidates reach the target mass, or exceed it. Sorts 64 of them or
/// at most a few times as many as that.
inline index_t selector::covering(std::span<std::uint64_t> candidates,
                                  std::span<const float> scores, double target, bool beyond) {
  const auto first = candidates.begin();
  double mass = 0.0;
  index_t count = 0;
  const auto short_of_target = [&] { return beyond ? mass <= target : mass < target; };
  for (index_t sorted = 0, some = 64; sorted < std::ssize(candidates) && short_of_target();
       some *= 4) {
    const index_t end = std::min(some, std::ssize(candidates));
    if (end < std::ssize(candidates)) {
      std::nth_element(first + sorted, first + end, candidates.end(), std::greater<>());
    }
    std::sort(first + sorted, first + end, std::greater<>());
    for (sorted = end; count < end && short_of_target(); ++count) {
      const token_t position = position_of(candidates[static_cast<std::size_t>(count)]);
      mass += mass_of(scores[static_cast<std::size_t>(position)]);
    }
  }
  return count;
}

}  // namespace sattn
