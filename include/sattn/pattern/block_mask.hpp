// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/math.hpp>
#include <sattn/pattern/append_lists.hpp>
#include <sattn/plan/plan_writer.hpp>

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace sattn {

namespace detail {

// Query rows that share a row of blocks: whole blocks up to the tallest tile.
inline tile_grid block_grid(token_t q_block) { return {std::min(q_block, max_tile_rows), q_block}; }

inline void check_block_sizes(const char* name, token_t q_block, token_t k_block) {
  require(q_block > 0 && k_block > 0, name, ": q_block ", q_block, " and k_block ", k_block,
          " must be positive");
}

// Tiles [begin, end) of query block i.
inline std::pair<index_t, index_t> tiles_of_block(const plan_scope& scope, token_t q_block,
                                                  index_t i) {
  require(scope.grid.period > 0 && q_block % scope.grid.period == 0,
          "block pattern: tiles start at ",
          "multiples of ", scope.grid.period, ", which does not divide q_block ", q_block,
          ": a pattern that wraps another must pass on its grid()");
  // Tiles of the caller's grid never straddle blocks, because the grid's period divides q_block.
  return {scope.grid.tiles(i * q_block),
          scope.grid.tiles(std::min((i + 1) * q_block, scope.shape.q_len))};
}

// The keys of key block j for some tiles.
inline void emit_block(const plan_scope& scope, plan_writer& writer,
                       std::pair<index_t, index_t> tiles, token_t k_block, index_t j) {
  const index_t begin = j * k_block;
  const index_t end = std::min(begin + k_block, scope.shape.kv_len);
  for (index_t tile = tiles.first; tile < tiles.second; ++tile) {
    writer.range(tile, static_cast<token_t>(begin), static_cast<token_t>(end));
  }
}

}  // namespace detail

/// Blocks of q_block rows x k_block keys, chosen by a dense mask of bytes.
///
/// Shapes: mask [sets, ceil(q_len / q_block), ceil(kv_len / k_block)], not 0 = selected, with
/// sets = 1, kv_heads or q_heads. Blocks are counted from row 0 of this call and key 0; the last
/// ones may be short. The mask is read while planning only.
/// Throws: shape_error, while planning, if the mask's size does not fit.
struct block_mask {
  token_t q_block = 64;
  token_t k_block = 64;
  std::span<const std::uint8_t> mask;
  index_t sets = 1;

  index_t heads() const { return sets; }
  tile_grid grid() const {
    detail::check_block_sizes("block_mask", q_block, k_block);
    return detail::block_grid(q_block);
  }
  void emit(const plan_scope& scope, plan_writer& writer) const {
    const index_t rows = ceil_div(scope.shape.q_len, q_block);
    const index_t cols = ceil_div(scope.shape.kv_len, k_block);
    require(static_cast<index_t>(mask.size()) == sets * rows * cols, "block_mask: mask has ",
            mask.size(), " entries, expected ", sets, " x ", rows, " x ", cols);
    const auto set = mask.subspan(static_cast<std::size_t>(scope.pick(sets) * rows * cols));
    for (index_t i = 0; i < rows; ++i) {
      const auto tiles = detail::tiles_of_block(scope, q_block, i);
      for (index_t j = 0; j < cols; ++j) {
        if (set[static_cast<std::size_t>(i * cols + j)] != 0) {
          detail::emit_block(scope, writer, tiles, k_block, j);
        }
      }
    }
  }
};

/// Blocks chosen by block-sparse row lists (BSR): row i of set s holds the key blocks
/// indices[indptr[r] .. indptr[r + 1]) with r = s * ceil(q_len / q_block) + i, ascending.
///
/// Throws: shape_error, while planning, if indptr has the wrong length or decreases, or if an index
/// is out of range or not greater than the one before.
struct block_lists {
  token_t q_block = 64;
  token_t k_block = 64;
  std::vector<index_t> indptr;
  std::vector<token_t> indices;
  index_t sets = 1;

  /// Adds one list after the other. Throws: std::bad_alloc.
  void append(std::span<const std::vector<token_t>> lists) {
    detail::append_lists(lists, indptr, indices);
  }

  index_t heads() const { return sets; }
  tile_grid grid() const {
    detail::check_block_sizes("block_lists", q_block, k_block);
    return detail::block_grid(q_block);
  }
  void emit(const plan_scope& scope, plan_writer& writer) const {
    const index_t rows = ceil_div(scope.shape.q_len, q_block);
    const index_t cols = ceil_div(scope.shape.kv_len, k_block);
    require(static_cast<index_t>(indptr.size()) == sets * rows + 1, "block_lists: indptr has ",
            indptr.size(), " entries, expected ", sets, " x ", rows, " + 1");
    require(indptr.front() == 0 && indptr.back() == static_cast<index_t>(indices.size()),
            "block_lists: indptr runs from ", indptr.front(), " to ", indptr.back(),
            ", expected 0 to ", indices.size());
    for (index_t i = 0; i < rows; ++i) {
      const auto r = static_cast<std::size_t>(scope.pick(sets) * rows + i);
      require(indptr[r] >= 0 && indptr[r] <= indptr[r + 1] && indptr[r + 1] <= indptr.back(),
              "block_lists: indptr decreases from ", indptr[r], " to ", indptr[r + 1], " at row ",
              r);
      const auto tiles = detail::tiles_of_block(scope, q_block, i);
      token_t previous = -1;
      for (index_t at = indptr[r]; at < indptr[r + 1]; ++at) {
        const token_t j = indices[static_cast<std::size_t>(at)];
        require(j >= 0 && j < cols, "block_lists: key block ", j, " of row ", r, ", there are ",
                cols);
        require(j > previous, "block_lists: key block ", j, " follows ", previous, " in row ", r,
                "; rows are sorted and hold each block once");
        previous = j;
        detail::emit_block(scope, writer, tiles, k_block, j);
      }
    }
  }
};

}  // namespace sattn
