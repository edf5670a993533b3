#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds and runs the tests: release, then under the sanitizers.
# usage: tools/test.sh [--quick]     --quick: release only
# SATTN_JOBS sets the number of parallel compilations.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

presets=(release dev tsan)
case "${1:-}" in
  "") ;;
  --quick) presets=(release) ;;
  *)
    echo "usage: $0 [--quick]" >&2
    exit 2
    ;;
esac
jobs=${SATTN_JOBS:-$(nproc)}

current=""
finish() {
  local status=$?
  if ((status == 0)); then
    echo "test.sh: passed (${presets[*]}) in ${SECONDS} s"
  else
    echo "test.sh: FAILED at: ${current}" >&2
  fi
}
trap finish EXIT

step() {
  current=$1
  shift
  local start=$SECONDS
  echo "=== ${current}"
  "$@"
  echo "=== ${current}: $((SECONDS - start)) s"
}

# ThreadSanitizer wants the address layout that some kernels' randomisation takes away.
run_tests() {
  if [[ $1 == tsan ]] && setarch "$(uname -m)" -R true 2>/dev/null; then
    setarch "$(uname -m)" -R ctest --preset "$1"
  else
    ctest --preset "$1"
  fi
}

step "install dependencies" tools/install_deps.sh test
for preset in "${presets[@]}"; do
  step "${preset}: configure" cmake --preset "${preset}"
  step "${preset}: build" cmake --build --preset "${preset}" --parallel "${jobs}"
  step "${preset}: test" run_tests "${preset}"
done
