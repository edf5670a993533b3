// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/pack.hpp>
#include <sattn/core/config.hpp>
#include <sattn/kernel/kernel_table.hpp>
#include <sattn/plan/tile_cursor.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <new>
#include <span>

namespace sattn::detail {

static_assert(max_chunk_keys == chunk_keys, "plans and kernels agree on the size of a chunk");
static_assert(sub_tile_rows == tile_lanes);

/// Where the rows of up to chunk_keys keys lie.
struct row_pointers {
  std::array<const void*, chunk_keys + prefetch_rows> k;
  std::array<const void*, chunk_keys + prefetch_rows> v;
  std::array<float, chunk_keys> k_scales;  // where the type has one for each row
  std::array<float, chunk_keys> v_scales;
  index_t count = 0;

  /// key_count > 0.
  void locate_k(const token_t* keys, index_t key_count, const row_source& rows) {
    count = key_count;
    rows.locate(keys, count, k.data());
    pad(k);
    read_scales(rows, keys, k_scales);
  }
  /// As many as of K.
  void locate_v(const token_t* keys, const kv_rows& rows) {
    if (rows.v_panel == 0) {
      rows.v.locate(keys, count, v.data());
    } else {
      for (index_t i = 0; i < count; ++i) v[static_cast<std::size_t>(i)] = rows.packed_v(keys[i]);
    }
    pad(v);
    read_scales(rows.v, keys, v_scales);
  }

 protected:
  void read_scales(const row_source& source, const token_t* keys, auto& scales) const {
    if (has_row_scale(source.type)) source.read_scales(keys, count, scales.data());
  }
  void pad(auto& rows) const {
    std::fill(rows.begin() + count, rows.end(), rows[static_cast<std::size_t>(count - 1)]);
  }
};

/// Which kernel reads rows of K and V.
enum class row_reader { tiles, rows };

/// The tile kernel reads f32; the row kernel all types but those in blocks, for whose scales it has
/// no registers left.
constexpr bool reads(row_reader reader, dtype type) {
  return type == dtype::f32 || (reader == row_reader::rows && block_of(type) == 1);
}

/// The same in types that a kernel reads: rows of other types are widened to f32, chunk by chunk.
struct readable_rows : row_pointers {
  dtype k_type;
  dtype v_type;
  row_reader reader;
  float* widened;  // room for the rows of a chunk that must be widened, k before v

  /// Bytes of scratch for a sequence, with room for widened rows.
  static std::size_t bytes(const attention_sequence& s, row_reader by) {
    return padded(sizeof(readable_rows)) +
           padded(static_cast<std::size_t>(widened_floats(s.kv, by)) * sizeof(float));
  }
  static readable_rows& take(scratch_arena& arena, const attention_sequence& s, row_reader by) {
    readable_rows& rows = *arena.take<readable_rows>(1);
    rows.k_type = rows.v_type = dtype::f32;
    rows.reader = by;
    rows.widened = arena.take<float>(widened_floats(s.kv, by));
    return rows;
  }

  /// key_count > 0.
  void locate_k(const token_t* keys, index_t key_count, const row_source& rows, const kv_view& kv,
                const kernel_table& kernels) {
    row_pointers::locate_k(keys, key_count, rows);
    k_type = rows.type;
    if (!reads(reader, k_type)) {
      widen(k_type, kv.k.dim, kernels, widened, k.data(), k_scales.data());
      pad(k);
    }
  }
  /// key_count > 0.
  void locate(const token_t* keys, index_t key_count, const kv_rows& rows, const kv_view& kv,
              const kernel_table& kernels) {
    locate_k(keys, key_count, rows.k, kv, kernels);
    locate_v(keys, rows);
    v_type = rows.v.type;
    if (!reads(reader, v_type)) {
      float* const room = widened + (reads(reader, rows.k.type) ? 0 : chunk_keys * kv.k.dim);
      widen(v_type, kv.v.dim, kernels, room, v.data(), v_scales.data());
    }
  }

  /// As many rows as `other` has, one to be prefetched with each of them: those of `keys`, then
  /// those of `other` itself.
  void locate_beside(const readable_rows& other, const token_t* keys, index_t key_count,
                     const kv_rows& rows) {
    SATTN_ASSERT(rows.v_panel == 0);
    count = other.count;
    const index_t known = std::min(key_count, count);
    const auto beside = [&](const row_source& source, const auto& others, auto& out) {
      const index_t located = reads(reader, source.type) ? known : 0;
      source.locate(keys, located, out.data());
      std::copy(others.begin() + located, others.begin() + count, out.begin() + located);
    };
    beside(rows.k, other.k, k);
    beside(rows.v, other.v, v);
  }

 private:
  static index_t widened_floats(const kv_view& kv, row_reader by) {
    return chunk_keys * ((reads(by, kv.k.type) ? 0 : kv.k.dim) +
                         (reads(by, kv.v.type) ? 0 : kv.v.dim));
  }
  void widen(dtype& type, index_t dim, const kernel_table& kernels, float* to, const void** rows,
             const float* scales) const {
    kernels.load_rows({rows, scales, type, count, dim, to});
    for (index_t i = 0; i < count; ++i) rows[i] = to + i * dim;
    type = dtype::f32;
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
