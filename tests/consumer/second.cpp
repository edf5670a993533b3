// SPDX-License-Identifier: Apache-2.0
// A second file with every header: a function that is not inline would be defined twice.
#include <sattn/sattn.hpp>
#include <sattn/version.hpp>

int version_seen_by_second_file();

int version_seen_by_second_file() {
  return 10000 * sattn::version_major + 100 * sattn::version_minor + sattn::version_patch;
}
