// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/pack.hpp>
#include <sattn/core/config.hpp>
#include <sattn/exec/located_rows.hpp>
#include <sattn/kernel/kernel_table.hpp>
#include <sattn/plan/tile_cursor.hpp>

#include <algorithm>
#include <array>
#include <bit>

namespace sattn::detail {

static_assert(max_chunk_keys == chunk_keys, "plans and kernels agree on the size of a chunk");
static_assert(sub_tile_rows == tile_lanes);

/// Rows of K and V of a chunk of keys in types that a kernel reads.
struct readable_rows {
  located_rows k;
  located_rows v;
  row_reader reader;
  float* widened;  // room for the rows of a chunk that must be widened, k before v

  /// Bytes of scratch for a sequence, with room for widened rows.
  static std::size_t bytes(const attention_sequence& s, row_reader by) {
    return padded(sizeof(readable_rows)) +
           padded(static_cast<std::size_t>(widened_floats(s.kv, by)) * sizeof(float));
  }
  static readable_rows& take(scratch_arena& arena, const attention_sequence& s, row_reader by) {
    readable_rows& rows = *arena.take<readable_rows>(1);
    rows.k.type = rows.v.type = dtype::f32;
    rows.reader = by;
    rows.widened = arena.take<float>(widened_floats(s.kv, by));
    return rows;
  }

  /// key_count > 0.
  void locate_k(const token_t* keys, index_t key_count, const row_source& rows, const kv_view& kv,
                const kernel_table& kernels) {
    k.locate(keys, key_count, rows, reader, kv.k.dim, kernels, widened);
  }
  /// key_count > 0.
  void locate(const token_t* keys, index_t key_count, const kv_rows& rows, const kv_view& kv,
              const kernel_table& kernels) {
    locate_k(keys, key_count, rows.k, kv, kernels);
    if (rows.v_panel == 0) {
      float* const room = widened + located_rows::widened_floats(kv.k, reader);
      v.locate(keys, key_count, rows.v, reader, kv.v.dim, kernels, room);
      return;
    }
    v.count = key_count;
    for (index_t i = 0; i < key_count; ++i) {
      v.rows[static_cast<std::size_t>(i)] = rows.packed_v(keys[i]);
    }
    v.pad();
  }

  /// As many rows as `other` has, one to be prefetched with each of them: those of `keys`, then
  /// those of `other` itself.
  void locate_beside(const readable_rows& other, const token_t* keys, index_t key_count,
                     const kv_rows& rows) {
    SATTN_ASSERT(rows.v_panel == 0);
    const auto beside = [&](const row_source& source, const located_rows& others,
                            located_rows& out) {
      out.count = others.count;
      const index_t located = reads(reader, source.type) ? std::min(key_count, out.count) : 0;
      source.locate(keys, located, out.rows.data());
      std::copy(others.rows.begin() + located, others.rows.begin() + out.count,
                out.rows.begin() + located);
    };
    beside(rows.k, other.k, k);
    beside(rows.v, other.v, v);
  }

 private:
  static index_t widened_floats(const kv_view& kv, row_reader by) {
    return located_rows::widened_floats(kv.k, by) + located_rows::widened_floats(kv.v, by);
  }
};

/// Keys of which each row of a tile has its own, gathered until a row has a chunk of them.
struct row_lists {
  std::array<std::array<token_t, chunk_keys>, sub_tile_rows> keys;
  std::array<index_t, sub_tile_rows> counts;

  /// Gives a key to the rows of a mask; calls flush(row) for each list that is full then.
  template <class F>
  void add(token_t key, unsigned mask, F&& flush) {
    for (; mask != 0; mask &= mask - 1) {
      const auto row = static_cast<std::size_t>(std::countr_zero(mask));
      keys[row][static_cast<std::size_t>(counts[row]++)] = key;
      if (counts[row] == chunk_keys) flush(static_cast<index_t>(row));
    }
  }
  /// Calls flush(row) for the lists that hold a key.
  template <class F>
  void finish(F&& flush) {
    for (std::size_t row = 0; row < counts.size(); ++row) {
      if (counts[row] > 0) flush(static_cast<index_t>(row));
    }
  }
};

}  // namespace sattn::detail
