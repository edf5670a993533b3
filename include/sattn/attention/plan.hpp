// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/exec/context.hpp>
#include <sattn/kv/stored_view.hpp>
#include <sattn/pattern/basic.hpp>
#include <sattn/plan/plan_check.hpp>
#include <sattn/plan/plan_writer.hpp>

#include <exception>
#include <memory>

namespace sattn {

struct plan_options {
  domain legal = {};            // which keys a row may see at all; causal by default
  token_t tile_rows = 0;        // rows that share a list, 1 to 128; 0 = what the pattern suggests
  sattn::rounding rounding = sattn::rounding::exact;
};

/// Decoding always rounds exactly: its tiles are the rows of one step.
struct decode_options {
  domain legal = {};
  token_t split_keys = 4096;    // keys that one task takes; results depend on it, not on threads
};

/// The shape of attention over q [q_len, q_heads, head_dim] and k, v [kv_len, kv_heads, dim]. The
/// last query stands at the last key; set q_offset of the result where that does not fit.
/// Throws: shape_error if q_heads is not a multiple of the kv heads.
inline attention_shape shape_of(const tensor_view<const float>& q, const kv_view& kv) {
  const attention_shape shape{q.tokens, kv.k.tokens, q.heads, kv.k.heads,
                              static_cast<token_t>(kv.k.tokens - q.tokens)};
  check_shape(shape, {});
  return shape;
}

/// Fills plans in place; the door through which planning reaches the data of a plan.
struct plan_access {
  static plan_data& data(attention_plan& plan) { return plan.data_; }
};

namespace detail {

/// Empties a plan that could not be made to its end: what is filled half is no plan.
class plan_reset {
 public:
  explicit plan_reset(attention_plan& plan) : plan_(&plan) {}
  plan_reset(const plan_reset&) = delete;
  plan_reset& operator=(const plan_reset&) = delete;
  ~plan_reset() {
    if (plan_ != nullptr) plan_access::data(*plan_).shape = {};
  }
  void dismiss() { plan_ = nullptr; }

 private:
  attention_plan* plan_;
};

inline head_map map_for(const attention_shape& shape, index_t sets) {
  if (sets == 1) return head_map::shared;
  if (sets == shape.kv_heads) return head_map::per_kv_head;
  require(sets == shape.q_heads, "plan: the pattern holds ", sets, " sets of data for ",
          shape.q_heads, " q heads and ", shape.kv_heads, " kv heads");
  return head_map::per_q_head;
}

/// Asks the pattern for every plan head, in parallel.
template <attention_pattern P>
void emit_heads(context& ctx, plan_data& data, const P& pattern) {
  const index_t heads = plan_head_count(data.shape, data.map);
  if (std::ssize(data.heads) < heads) data.heads.resize(static_cast<std::size_t>(heads));
  const std::span<plan_scratch> scratch = ctx.planning_scratch();
  for (plan_scratch& s : scratch) s.failure = nullptr;
  ctx.executor().parallel_for(heads, [&](index_t head, index_t worker) {
    plan_scratch& own = scratch[static_cast<std::size_t>(worker)];
    // Kept here because the caller's executor need not carry exceptions.
    try {
      const plan_scope scope{data.shape, data.legal, data.grid, data.map, head};
      plan_writer writer(scope, own);
      pattern.emit(scope, writer);
      writer.finish(data.heads[static_cast<std::size_t>(head)]);
    } catch (...) {
      if (own.failure == nullptr || head < own.failed_head) {
        own.failure = std::current_exception();
        own.failed_head = head;
      }
    }
  });
  const plan_scratch* first = nullptr;
  for (const plan_scratch& s : scratch) {
    if (s.failure != nullptr && (first == nullptr || s.failed_head < first->failed_head)) {
      first = &s;
    }
  }
  if (first != nullptr) {
    std::rethrow_exception(first->failure);
  }
}

/// When no head leaves out a legal pair, the plan becomes the one that `dense` makes: a budget that
/// covers everything gives the bits of dense attention.
inline void merge_dense_heads(plan_data& data, const tile_grid& grid) {
  const index_t heads = plan_head_count(data.shape, data.map);
  for (index_t i = 0; i < heads; ++i) {
    const plan_head& h = data.heads[static_cast<std::size_t>(i)];
    const bool whole = h.columns.size() == 1 && h.columns[0].size() == data.shape.kv_len;
    if (!whole || !h.distances.empty() || !h.ranges.empty() || !h.tokens.empty()) {
      return;
    }
  }
  data.map = head_map::shared;
  data.grid = grid;
}

/// Cuts the keys of every tile into runs of split_keys selected keys.
inline void cut_splits(attention_plan& plan, plan_data& data, token_t split_keys) {
  const key_range all{0, static_cast<token_t>(data.shape.kv_len)};
  for (index_t i = 0; i < plan.heads(); ++i) {
    plan_head& head = data.heads[static_cast<std::size_t>(i)];
    head.split_ptr.assign(1, 0);
    head.splits.clear();
    for (index_t tile = 0; tile < plan.tiles(); ++tile) {
      head.splits.push_back(0);
      tile_cursor cursor(plan, i, tile, sub_tile_rows, all);
      index_t room = split_keys;
      key_range keys;
      while (cursor.next_range(keys)) {
        while (keys.size() > room || (room == 0 && !keys.empty())) {
          head.splits.push_back(static_cast<token_t>(keys.begin + room));
          keys.begin = static_cast<token_t>(keys.begin + room);
          room = split_keys;
        }
        room -= keys.size();
      }
      head.split_ptr.push_back(std::ssize(head.splits));
    }
  }
}

}  // namespace detail

/// Plans attention of many rows: which keys each row attends to, by tiles of rows.
///
/// Throws: shape_error if the shape, the options or what the pattern holds do not fit together.
/// Cost: the pattern's output, sorted; parallel over plan heads.
template <attention_pattern P>
void plan_prefill_into(context& ctx, attention_plan& plan, const attention_shape& shape,
                       const P& pattern, const plan_options& options = {}) {
  check_shape(shape, options.legal);
  detail::plan_reset reset(plan);
  require(options.tile_rows >= 0 && options.tile_rows <= max_tile_rows, "plan_prefill: tile_rows ",
          options.tile_rows, ", expected 1 to ", max_tile_rows, ", or 0 for the pattern's choice");
  plan_data& data = plan_access::data(plan);
  const head_map map = detail::map_for(shape, pattern_heads(pattern));
  tile_grid grid = pattern_grid(pattern, sharing_heads(shape, map));
  require(grid.rows >= 1 && grid.rows <= max_tile_rows && grid.period >= 0,
          "plan_prefill: the pattern asks for tiles of ", grid.rows, " rows and period ",
          grid.period);
  if (options.tile_rows > 0) grid.rows = options.tile_rows;
  grid = grid.fitted();
  data.shape = shape;
  data.legal = options.legal;
  data.grid = grid;
  data.rounding = options.rounding;
  data.map = map;
  detail::emit_heads(ctx, data, pattern);
  detail::merge_dense_heads(data,
                            {options.tile_rows > 0 ? options.tile_rows : dense{}.grid().rows, 0});
  reset.dismiss();
}

/// The same as a new plan.
template <attention_pattern P>
attention_plan plan_prefill(context& ctx, const attention_shape& shape, const P& pattern,
                            const plan_options& options = {}) {
  attention_plan plan;
  plan_prefill_into(ctx, plan, shape, pattern, options);
  return plan;
}

/// Plans attention of one or a few rows per sequence, whose keys are cut into splits so that
/// threads can share one row. Rows share their list as the pattern says: all of them for `dense`
/// or blocks, each its own for token_lists of one row.
///
/// Throws: shape_error as plan_prefill does.
template <attention_pattern P>
void plan_decode_into(context& ctx, attention_plan& plan, const attention_shape& shape,
                      const P& pattern, const decode_options& options = {}) {
  require(options.split_keys > 0, "plan_decode: split_keys ", options.split_keys,
          " must be positive");
  check_shape(shape, options.legal);
  detail::plan_reset reset(plan);
  const tile_grid short_tiles{static_cast<token_t>(sub_tile_rows), 0};
  plan_data& data = plan_access::data(plan);
  const head_map map = detail::map_for(shape, pattern_heads(pattern));
  data.grid = pattern_grid(pattern, sharing_heads(shape, map)) & short_tiles;
  require(data.grid.rows >= 1, "plan_decode: the pattern asks for tiles of ", data.grid.rows,
          " rows");
  data.shape = shape;
  data.legal = options.legal;
  data.rounding = rounding::exact;
  data.map = map;
  detail::emit_heads(ctx, data, pattern);
  detail::merge_dense_heads(data, short_tiles);
  detail::cut_splits(plan, data, options.split_keys);
  reset.dismiss();
}

/// The same as a new plan.
template <attention_pattern P>
attention_plan plan_decode(context& ctx, const attention_shape& shape, const P& pattern,
                           const decode_options& options = {}) {
  attention_plan plan;
  plan_decode_into(ctx, plan, shape, pattern, options);
  return plan;
}

}  // namespace sattn
