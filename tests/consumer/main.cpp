// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <sattn/sattn.hpp>
#include <sattn/version.hpp>

int version_seen_by_second_file();

int main() {
  const int version =
      10000 * sattn::version_major + 100 * sattn::version_minor + sattn::version_patch;
  std::printf("%d.%d.%d\n", sattn::version_major, sattn::version_minor, sattn::version_patch);
  return version == version_seen_by_second_file() ? 0 : 1;
}
