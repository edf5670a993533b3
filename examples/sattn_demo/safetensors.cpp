// SPDX-License-Identifier: Apache-2.0
#include "safetensors.hpp"

#include <sattn/core/math.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string_view>

namespace demo {

namespace {

using nlohmann::ordered_json;  // keeps the file's order, so that "the first tensor" has a meaning

static_assert(std::endian::native == std::endian::little, "safetensors are little-endian");

constexpr index_t length_bytes = 8;
constexpr index_t max_header_bytes = 100'000'000;  // the limit of the safetensors library

[[noreturn]] void fail(const std::string& reason) { throw std::runtime_error(reason); }

float widen_f16(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t exponent = (half >> 10) & 0x1fu;
  const std::uint32_t fraction = half & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: a multiple of 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t wide_exponent = exponent == 31 ? 255 : exponent + 127 - 15;
  return std::bit_cast<float>(sign | wide_exponent << 23 | fraction << 13);
}

float widen_bf16(std::uint16_t half) { return std::bit_cast<float>(std::uint32_t{half} << 16); }

float keep_f32(float value) { return value; }

template <class Stored>
std::vector<float> convert(std::string_view bytes, float (*widen)(Stored)) {
  std::vector<float> values(bytes.size() / sizeof(Stored));
  for (std::size_t i = 0; i < values.size(); ++i) {
    Stored stored;
    std::memcpy(&stored, bytes.data() + i * sizeof(Stored), sizeof(Stored));
    values[i] = widen(stored);
  }
  return values;
}

std::string read_file(const std::filesystem::path& path) {
  std::error_code error;
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error) fail("cannot read the file: " + error.message());
  std::ifstream file(path, std::ios::binary);
  std::string bytes(size, '\0');
  file.read(bytes.data(), static_cast<std::streamsize>(size));
  if (!file) fail("cannot read all " + std::to_string(size) + " bytes of the file");
  return bytes;
}

ordered_json parse_header(std::string_view file) {
  const auto size = static_cast<index_t>(file.size());
  if (size < length_bytes) {
    fail("the file has " + std::to_string(size) + " bytes, too few for a safetensors header");
  }
  std::uint64_t stated = 0;
  std::memcpy(&stated, file.data(), sizeof(stated));
  const index_t limit = std::min(size - length_bytes, max_header_bytes);
  if (stated > static_cast<std::uint64_t>(limit)) {
    fail("the header length is " + std::to_string(stated) + " bytes, at most " +
         std::to_string(limit) + " are possible: not a safetensors file, or a truncated one");
  }
  ordered_json header;
  try {
    header = ordered_json::parse(file.substr(length_bytes, stated));
  } catch (const ordered_json::exception& e) {
    fail(std::string("the header is not JSON: ") + e.what());
  }
  if (!header.is_object()) fail("the header is not a JSON object");
  return header;
}

const ordered_json& find_tensor(const ordered_json& header, std::string& name) {
  if (const auto exact = header.find(name); exact != header.end()) return *exact;
  for (const auto& [key, value] : header.items()) {
    if (key != "__metadata__") {
      name = key;
      return value;
    }
  }
  fail("the file holds no tensor");
}

// The values of `key`, which must be `count` integers >= 0.
std::vector<index_t> numbers(const ordered_json& entry, const char* key, std::size_t count) {
  const auto found = entry.find(key);
  if (found == entry.end() || !found->is_array()) fail(std::string(key) + " is missing or no list");
  if (found->size() != count) {
    fail(std::string(key) + " is " + found->dump() + ", expected " + std::to_string(count) +
         " numbers" + (count == 3 ? " [token, head, dim]" : ""));
  }
  std::vector<index_t> values;
  for (const ordered_json& value : *found) {
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() > INT64_MAX) {
      fail(std::string(key) + " is " + found->dump() + ", expected whole numbers >= 0");
    }
    values.push_back(value.get<index_t>());
  }
  return values;
}

void read_entry(const ordered_json& entry, std::string_view data, tensor& out) {
  if (!entry.is_object()) fail("its entry in the header is not a JSON object");
  const auto dtype_entry = entry.find("dtype");
  const std::string dtype = dtype_entry != entry.end() && dtype_entry->is_string()
                                ? dtype_entry->get<std::string>()
                                : std::string("missing");
  if (dtype != "F16" && dtype != "BF16" && dtype != "F32") {
    fail("dtype is " + dtype + ", expected F16, BF16 or F32");
  }
  const std::vector<index_t> shape = numbers(entry, "shape", 3);
  const std::vector<index_t> offsets = numbers(entry, "data_offsets", 2);
  out.tokens = shape[0];
  out.heads = shape[1];
  out.dim = shape[2];

  index_t bytes = dtype == "F32" ? 4 : 2;
  for (const index_t extent : shape) {
    if (extent == 0) fail("shape has an extent of 0");
    if (!sattn::multiply(bytes, extent, bytes)) fail("shape overflows the address space");
  }
  const std::string range = "[" + std::to_string(offsets[0]) + ", " + std::to_string(offsets[1]) +
                            ")";
  if (offsets[0] > offsets[1] || offsets[1] - offsets[0] != bytes) {
    fail("data_offsets " + range + " do not hold the " + std::to_string(bytes) +
         " bytes that shape and dtype need");
  }
  if (offsets[1] > static_cast<index_t>(data.size())) {
    fail("data_offsets " + range + " end after the data, " + std::to_string(data.size()) +
         " bytes: the file is truncated or the offsets are wrong");
  }
  const std::string_view own =
      data.substr(static_cast<std::size_t>(offsets[0]), static_cast<std::size_t>(bytes));
  out.values = dtype == "F32" ? convert<float>(own, keep_f32)
                              : convert<std::uint16_t>(own, dtype == "F16" ? widen_f16 : widen_bf16);
}

}  // namespace

index_t tensor::count_not_finite() const {
  return std::count_if(values.begin(), values.end(), [](float x) { return !std::isfinite(x); });
}

tensor read_safetensors(const std::filesystem::path& path, const std::string& name) {
  tensor out;
  std::string where = path.string();
  try {
    const std::string file = read_file(path);
    const ordered_json header = parse_header(file);
    out.name = name;
    const ordered_json& entry = find_tensor(header, out.name);
    where += ": tensor " + out.name;
    std::uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, file.data(), sizeof(header_bytes));
    read_entry(entry, std::string_view(file).substr(length_bytes + header_bytes), out);
  } catch (const std::runtime_error& e) {
    throw std::runtime_error(where + ": " + e.what());
  }
  return out;
}

}  // namespace demo
