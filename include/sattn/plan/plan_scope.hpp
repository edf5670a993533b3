// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/error.hpp>
#include <sattn/plan/domain.hpp>
#include <sattn/plan/tile_grid.hpp>

namespace sattn {

/// What a pattern is asked for: the keys of one plan head.
struct plan_scope {
  attention_shape shape = {};
  domain legal = {};
  tile_grid grid = {};
  head_map map = head_map::shared;
  index_t head = 0;  // plan head

  index_t kv_head() const {
    if (map == head_map::per_q_head) return head / shape.group_size();
    return map == head_map::per_kv_head ? head : 0;
  }

  /// Which of `count` sets of data belongs to this plan head: the only one, the one of the kv head,
  /// or the one of the query head. Throws: shape_error if there is not one for each.
  index_t pick(index_t count) const {
    if (count == 1) return 0;
    if (map == head_map::per_q_head && count == shape.q_heads) return head;
    require(map != head_map::shared && count == shape.kv_heads,
            "plan: a part of the pattern holds ", count, " sets of data for ", shape.q_heads,
            " q heads and ", shape.kv_heads, " kv heads");
    return kv_head();
  }

  index_t tiles() const { return grid.tiles(shape.q_len); }
  /// Query rows [begin, end) of a tile.
  key_range rows(index_t tile) const { return grid.row_range(tile, shape.q_len); }
  /// Keys that at least one row of the tile may see.
  key_range visible(index_t tile) const {
    const key_range r = rows(tile);
    return {legal.legal(shape.position(r.begin), shape.kv_len).begin,
            legal.legal(shape.position(r.end - 1), shape.kv_len).end};
  }
};

}  // namespace sattn
