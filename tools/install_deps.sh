#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the Debian packages that are missing for one purpose; each includes the one before.
# usage: tools/install_deps.sh demo | test | ci
set -euo pipefail

demo=(g++ cmake ninja-build libxsimd-dev nlohmann-json3-dev libcli11-dev libstb-dev)
test=("${demo[@]}" python3 googletest libeigen3-dev libbenchmark-dev)
ci=("${test[@]}" clang-14 clang-19 python3-pip valgrind)

case "${1:-}" in
  demo) packages=("${demo[@]}") ;;
  test) packages=("${test[@]}") ;;
  ci) packages=("${ci[@]}") ;;
  *)
    echo "usage: $0 demo | test | ci" >&2
    exit 2
    ;;
esac

fail() {
  echo "install_deps: $1" >&2
  exit 1
}

command -v dpkg-query >/dev/null ||
  fail "this is not a Debian system; install the equivalents of: ${packages[*]}"

is_installed() {
  [[ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" == installed ]]
}

missing=()
for package in "${packages[@]}"; do
  is_installed "$package" || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
  echo "install_deps: all ${#packages[@]} packages for '$1' are installed"
  exit 0
fi
echo "install_deps: installing ${missing[*]}"

as_root=()
if ((EUID != 0)); then
  command -v sudo >/dev/null || fail "neither root nor sudo; ask an administrator for: ${missing[*]}"
  as_root=(sudo)
fi

apt() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 "$@"
}
apt update -q || echo "install_deps: apt-get update failed, trying with the known lists" >&2
apt install -q -y --no-install-recommends "${missing[@]}" ||
  fail "apt-get could not install: ${missing[*]}"
echo "install_deps: done"
