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

/// Hands out pieces of a worker's part of the workspace, each on its own cache line.
class scratch_arena {
 public:
  explicit scratch_arena(std::span<std::byte> memory) : memory_(memory) {}

  template <class T>
  T* take(index_t count) {
    const std::size_t bytes = padded(static_cast<std::size_t>(count) * sizeof(T));
    SATTN_ASSERT(bytes <= memory_.size());
    T* const first = reinterpret_cast<T*>(memory_.data());
    memory_ = memory_.subspan(bytes);
    return first;
  }

 private:
  std::span<std::byte> memory_;
};

/// Where the rows of up to chunk_keys keys lie.
struct row_pointers {
  std::array<const void*, chunk_keys + prefetch_rows> k;
  std::array<const void*, chunk_keys + prefetch_rows> v;
  // Where a type has a scale for each row; behind the last one any finite number.
  std::array<float, chunk_keys + prefetch_rows> k_scales;
  std::array<float, chunk_keys + prefetch_rows> v_scales;
  index_t count = 0;

  /// key_count > 0.
  void locate(const token_t* keys, index_t key_count, const kv_rows& rows) {
    count = key_count;
    rows.k.locate(keys, count, k.data());
    if (rows.v_panel == 0) {
      rows.v.locate(keys, count, v.data());
    } else {
      for (index_t i = 0; i < count; ++i) v[static_cast<std::size_t>(i)] = rows.packed_v(keys[i]);
    }
    pad(k);
    pad(v);
    read_scales(rows.k, keys, k_scales);
    read_scales(rows.v, keys, v_scales);
  }

  /// As many rows as `other` has, one to be prefetched with each of them: those of `keys`, then
  /// those of `other` itself.
  void locate_beside(const row_pointers& other, const token_t* keys, index_t key_count,
                     const kv_rows& rows) {
    SATTN_ASSERT(rows.v_panel == 0);
    count = other.count;
    const index_t known = std::min(key_count, count);
    rows.k.locate(keys, known, k.data());
    rows.v.locate(keys, known, v.data());
    std::copy(other.k.begin() + known, other.k.begin() + count, k.begin() + known);
    std::copy(other.v.begin() + known, other.v.begin() + count, v.begin() + known);
  }

 protected:
  void read_scales(const row_source& source, const token_t* keys, auto& scales) const {
    if (!has_row_scale(source.type)) return;
    source.read_scales(keys, count, scales.data());
    std::fill(scales.begin() + count, scales.end(), 0.0f);
  }
  void pad(auto& rows) const {
    std::fill(rows.begin() + count, rows.end(), rows[static_cast<std::size_t>(count - 1)]);
  }
};

/// The same for the tile kernel, which reads f32: rows of other types are widened, chunk by chunk.
struct float_rows : row_pointers {
  float* widened;  // room for the rows of a chunk that must be widened, k before v

  /// Bytes of scratch for a sequence, with room for widened rows.
  static std::size_t bytes(const attention_sequence& s) {
    return padded(sizeof(float_rows)) +
           padded(static_cast<std::size_t>(widened_floats(s.kv)) * sizeof(float));
  }
  static float_rows& take(scratch_arena& arena, const attention_sequence& s) {
    float_rows& rows = *arena.take<float_rows>(1);
    rows.widened = arena.take<float>(widened_floats(s.kv));
    return rows;
  }

  void locate(const token_t* keys, index_t key_count, const kv_rows& rows, const kv_view& kv,
              const kernel_table& kernels) {
    row_pointers::locate(keys, key_count, rows);
    float* room = widened;
    if (rows.k.type != dtype::f32) {
      widen(rows.k.type, kv.k.dim, kernels, room, k.data(), k_scales.data());
      pad(k);
      room += chunk_keys * kv.k.dim;
    }
    if (rows.v.type != dtype::f32) {
      widen(rows.v.type, kv.v.dim, kernels, room, v.data(), v_scales.data());
    }
  }

 private:
  static index_t widened_floats(const kv_view& kv) {
    return chunk_keys * ((kv.k.type == dtype::f32 ? 0 : kv.k.dim) +
                         (kv.v.type == dtype::f32 ? 0 : kv.v.dim));
  }
  void widen(dtype type, index_t dim, const kernel_table& kernels, float* to, const void** rows,
             const float* scales) const {
    kernels.load_rows({rows, scales, type, count, dim, to});
    for (index_t i = 0; i < count; ++i) rows[i] = to + i * dim;
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
