// SPDX-License-Identifier: Apache-2.0
//
// Reads tensors of rank 3 from files in the safetensors format.
#pragma once

#include <sattn/core/dtype.hpp>
#include <sattn/core/error.hpp>
#include <sattn/core/math.hpp>
#include <sattn/core/tensor_view.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace demo {

using sattn::index_t;

/// A [token, head, dim] tensor in memory, converted to float.
struct tensor {
  std::string name;
  std::vector<float> values;
  index_t tokens = 0;
  index_t heads = 0;
  index_t dim = 0;
  std::map<std::string, std::string> metadata;  // of the file

  sattn::tensor_view<const float> view() const {
    return sattn::nhd(values.data(), tokens, heads, dim);
  }
  index_t count_not_finite() const {
    return std::count_if(values.begin(), values.end(), [](float x) { return !std::isfinite(x); });
  }
};

namespace detail {

using nlohmann::ordered_json;  // keeps the file's order, so that "the first tensor" has a meaning

static_assert(std::endian::native == std::endian::little, "safetensors are little-endian");

inline constexpr index_t length_bytes = 8;
inline constexpr index_t max_header_bytes = 100'000'000;  // the limit of the safetensors library

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  sattn::require<std::runtime_error>(condition, parts...);
}

template <class Stored>
std::vector<float> widen(std::string_view bytes) {
  std::vector<float> values(bytes.size() / sizeof(Stored));
  for (std::size_t i = 0; i < values.size(); ++i) {
    Stored stored;
    std::memcpy(&stored, bytes.data() + i * sizeof(Stored), sizeof(Stored));
    values[i] = sattn::to_float(stored);
  }
  return values;
}

inline std::string read_file(const std::filesystem::path& path) {
  std::error_code error;
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  check(!error, "cannot read the file: ", error.message());
  std::ifstream file(path, std::ios::binary);
  std::string bytes(size, '\0');
  file.read(bytes.data(), static_cast<std::streamsize>(size));
  check(file.good(), "cannot read all ", size, " bytes of the file");
  return bytes;
}

/// The header of a file, and the bytes behind it.
struct parts {
  ordered_json header;
  std::string_view data;

  explicit parts(std::string_view file) {
    const auto size = static_cast<index_t>(file.size());
    check(size >= length_bytes, "the file has ", size, " bytes, too few for a safetensors header");
    std::uint64_t stated = 0;
    std::memcpy(&stated, file.data(), sizeof(stated));
    const index_t limit = std::min(size - length_bytes, max_header_bytes);
    check(stated <= static_cast<std::uint64_t>(limit), "the header length is ", stated,
          " bytes, at most ", limit, " fit: not a safetensors file, or a truncated one");
    try {
      header = ordered_json::parse(file.substr(length_bytes, stated));
    } catch (const ordered_json::parse_error& e) {
      check(false, "the header is not JSON, see its byte ", e.byte);
    }
    check(header.is_object(), "the header is not a JSON object");
    data = file.substr(length_bytes + stated);
  }
};

// The name of the tensor to read: the wanted one, or else the first.
inline std::string choose_tensor(const ordered_json& header, const std::string& wanted) {
  if (header.contains(wanted)) return wanted;
  for (const auto& [key, value] : header.items()) {
    if (key != "__metadata__") return key;
  }
  throw std::runtime_error("the file holds no tensor");
}

// What the file says about itself; entries that are no strings are left out.
inline std::map<std::string, std::string> read_metadata(const ordered_json& header) {
  std::map<std::string, std::string> metadata;
  const ordered_json entries = header.value("__metadata__", ordered_json::object());
  if (!entries.is_object()) return metadata;
  for (const auto& [key, value] : entries.items()) {
    if (value.is_string()) metadata[key] = value.get<std::string>();
  }
  return metadata;
}

// The list `key` of whole numbers.
inline std::vector<index_t> numbers(const ordered_json& entry, const char* key) {
  std::vector<index_t> values;
  const ordered_json list = entry.value(key, ordered_json());
  check(list.is_array(), key, " is ", list.dump(), ", expected a list");
  for (const ordered_json& value : list) {
    check(value.is_number_unsigned() && value.get<std::uint64_t>() <= INT64_MAX, key, " is ",
          list.dump(), ", expected whole numbers >= 0");
    values.push_back(value.get<index_t>());
  }
  return values;
}

inline void read_entry(const ordered_json& entry, std::string_view data, tensor& out) {
  check(entry.is_object(), "its entry in the header is not a JSON object");
  const std::string dtype = entry.value("dtype", ordered_json()).dump();
  const bool wide = dtype == "\"F32\"";
  check(wide || dtype == "\"F16\"" || dtype == "\"BF16\"", "dtype is ", dtype,
        ", expected F16, BF16 or F32");
  const std::vector<index_t> shape = numbers(entry, "shape");
  check(shape.size() == 3, "rank is ", shape.size(), ", expected 3 [token, head, dim]");
  index_t bytes = wide ? 4 : 2;
  for (const index_t extent : shape) {
    check(extent > 0, "shape has an extent of 0");
    check(sattn::multiply(bytes, extent, bytes), "shape overflows the address space");
  }
  const std::vector<index_t> at = numbers(entry, "data_offsets");
  check(at.size() == 2, "data_offsets has ", at.size(), " entries, expected 2");
  check(at[0] <= at[1] && at[1] - at[0] == bytes, "data_offsets ", at[0], " to ", at[1],
        " do not hold the ", bytes, " bytes that shape and dtype need");
  check(at[1] <= std::ssize(data), "data_offsets ", at[0], " to ", at[1],
        " end behind the data, which has ", data.size(),
        " bytes: the file is truncated or the offsets are wrong");

  out.tokens = shape[0];
  out.heads = shape[1];
  out.dim = shape[2];
  const std::string_view own =
      data.substr(static_cast<std::size_t>(at[0]), static_cast<std::size_t>(bytes));
  out.values = wide                    ? widen<float>(own)
               : dtype == "\"F16\"" ? widen<sattn::f16>(own)
                                     : widen<sattn::bf16>(own);
}

}  // namespace detail

/// Reads the tensor `name` of a safetensors file, or the first one if none has that name.
/// F16, BF16 and F32 of rank 3 are read. Throws: std::runtime_error, with the file's path, if the
/// file cannot be read, is truncated or breaks the format.
inline tensor read_safetensors(const std::filesystem::path& path, const std::string& name) {
  tensor out;
  std::string where = path.string();
  try {
    const std::string file = detail::read_file(path);
    const detail::parts p(file);
    out.name = detail::choose_tensor(p.header, name);
    where += ": tensor " + out.name;
    detail::read_entry(p.header[out.name], p.data, out);
    out.metadata = detail::read_metadata(p.header);
  } catch (const std::exception& e) {
    throw std::runtime_error(where + ": " + e.what());
  }
  return out;
}

}  // namespace demo
