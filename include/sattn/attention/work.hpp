// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/pack.hpp>
#include <sattn/core/config.hpp>
#include <sattn/kernel/kernel_table.hpp>
#include <sattn/plan/tile_cursor.hpp>

#include <array>
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

/// A chunk of keys and where its rows lie.
struct key_scratch {
  key_chunk chunk;
  std::array<const float*, chunk_keys + prefetch_rows> k_rows;
  std::array<const float*, chunk_keys> v_rows;
  float* widened;  // room for the rows of a chunk that must be widened, k before v

  /// Bytes of the scratch for a sequence, with room for widened rows.
  static std::size_t bytes(const attention_sequence& s) {
    return padded(sizeof(key_scratch)) +
           padded(static_cast<std::size_t>(widened_floats(s.kv)) * sizeof(float));
  }
  static key_scratch& take(scratch_arena& arena, const attention_sequence& s) {
    key_scratch& keys = *arena.take<key_scratch>(1);
    keys.widened = arena.take<float>(widened_floats(s.kv));
    return keys;
  }

  void locate_rows(const kv_rows& rows, const kernel_table& kernels) {
    float* room = widened;
    if (rows.k_data != nullptr) {
      for (std::size_t i = 0; i < count(); ++i) k_rows[i] = rows.k_row(chunk.keys[i]);
    } else {
      widen(rows.k, rows.kv_head, kernels, room, k_rows.data());
      room += chunk_keys * rows.k.dim;
    }
    for (std::size_t i = count(); i < count() + prefetch_rows; ++i) k_rows[i] = k_rows[count() - 1];
    if (rows.v_data != nullptr) {
      for (std::size_t i = 0; i < count(); ++i) v_rows[i] = rows.v_row(chunk.keys[i]);
    } else {
      widen(rows.v, rows.kv_head, kernels, room, v_rows.data());
    }
  }

 private:
  std::size_t count() const { return static_cast<std::size_t>(chunk.count); }
  static index_t widened_floats(const kv_view& kv) {
    return chunk_keys * ((kv.k.type == dtype::f32 ? 0 : kv.k.dim) +
                         (kv.v.type == dtype::f32 ? 0 : kv.v.dim));
  }
  void widen(const stored_view& view, index_t kv_head, const kernel_table& kernels, float* to,
             const float** rows) const {
    const void* from[chunk_keys];
    for (std::size_t i = 0; i < count(); ++i) {
      from[i] = view.row(chunk.keys[i], kv_head);
      rows[i] = to + static_cast<index_t>(i) * view.dim;
    }
    kernels.load_rows({from, view.type, chunk.count, view.dim, to});
  }
};

}  // namespace sattn::detail
