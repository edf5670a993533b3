#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds sattn-demo in build/demo and runs it on examples/data.
# usage: tools/demo.sh [argument of sattn-demo...]
# What the scripts and the build say goes to stderr; stdout holds what the program prints.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build="${root}/build/demo"

{
  "${root}/tools/install_deps.sh" demo
  cmake -S "${root}" -B "${build}" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DSATTN_BUILD_TESTS=OFF -DSATTN_BUILD_BENCH=OFF -DSATTN_BUILD_EXAMPLES=ON
  cmake --build "${build}" --target sattn-demo --parallel "${SATTN_JOBS:-$(nproc)}"
} >&2

exec "${build}/examples/sattn-demo" "${root}/examples/data" "$@"
