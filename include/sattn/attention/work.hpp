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
  std::array<const float*, chunk_keys + prefetch_rows> k;
  std::array<const float*, chunk_keys> v;
  float* widened;  // room for the rows of a chunk that must be widened, k before v

  /// Bytes of scratch for a sequence, with room for widened rows.
  static std::size_t bytes(const attention_sequence& s) {
    return padded(sizeof(row_pointers)) +
           padded(static_cast<std::size_t>(widened_floats(s.kv)) * sizeof(float));
  }
  static row_pointers& take(scratch_arena& arena, const attention_sequence& s) {
    row_pointers& rows = *arena.take<row_pointers>(1);
    rows.widened = arena.take<float>(widened_floats(s.kv));
    return rows;
  }

  void locate(const token_t* keys, index_t count, const kv_rows& rows,
              const kernel_table& kernels) {
    float* room = widened;
    if (rows.k_data != nullptr) {
      in_place(rows.k_data, rows.k_stride, keys, count, k.data());
    } else {
      widen(rows.k, rows.kv_head, keys, count, kernels, room, k.data());
      room += chunk_keys * rows.k.dim;
    }
    for (index_t i = count; i < count + prefetch_rows; ++i) k[at(i)] = k[at(count - 1)];
    if (rows.v_data != nullptr && rows.v_panel == 0) {
      in_place(rows.v_data, rows.v_stride, keys, count, v.data());
    } else if (rows.v_data != nullptr) {
      for (index_t i = 0; i < count; ++i) v[at(i)] = rows.packed_v(keys[i]);
    } else {
      widen(rows.v, rows.kv_head, keys, count, kernels, room, v.data());
    }
  }

  static void in_place(const float* data, index_t stride, const token_t* keys, index_t count,
                       const float** rows) {
    for (index_t i = 0; i < count; ++i) rows[i] = data + keys[i] * stride;
  }

 private:
  static std::size_t at(index_t i) { return static_cast<std::size_t>(i); }
  static index_t widened_floats(const kv_view& kv) {
    return chunk_keys * ((kv.k.type == dtype::f32 ? 0 : kv.k.dim) +
                         (kv.v.type == dtype::f32 ? 0 : kv.v.dim));
  }
  static void widen(const stored_view& view, index_t kv_head, const token_t* keys, index_t count,
                    const kernel_table& kernels, float* to, const float** rows) {
    const void* from[chunk_keys];
    for (index_t i = 0; i < count; ++i) {
      from[i] = view.row(keys[i], kv_head);
      rows[i] = to + i * view.dim;
    }
    kernels.load_rows({from, view.type, count, view.dim, to});
  }
};

/// Rows that are likely to be wanted soon, as many as a list that is being multiplied: one prefetch
/// goes with each of its rows.
struct next_rows {
  std::array<const float*, chunk_keys> k;
  std::array<const float*, chunk_keys> v;

  /// The rows of `keys`; where there are fewer than `count`, or the rows are widened list by list,
  /// the list's own instead.
  void expect(const token_t* keys, index_t have, const kv_rows& rows, const row_pointers& own,
              index_t count) {
    const index_t known =
        rows.k_data == nullptr || rows.v_data == nullptr ? 0 : std::min(have, count);
    row_pointers::in_place(rows.k_data, rows.k_stride, keys, known, k.data());
    row_pointers::in_place(rows.v_data, rows.v_stride, keys, known, v.data());
    std::copy(own.k.begin() + known, own.k.begin() + count, k.begin() + known);
    std::copy(own.v.begin() + known, own.v.begin() + count, v.begin() + known);
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
