#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compiles and tests the library with a newer xsimd than Debian's: the hot loops hold no spill, and
# the tests of simd/ and of attention pass.
# usage: tools/newer_xsimd.sh [FOLDER]     FOLDER holds xsimd/xsimd.hpp; default: xsimd 14.1, as the
#                                          Python package pythran 0.19.0 carries it
# SATTN_JOBS sets the number of parallel compilations.
set -euo pipefail
headers=${1:+$(realpath "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=$PWD/build/newer_xsimd
wheel_sha256=42ab2039b4eaec01084e92a2721a474e893047ba5ec87b14d45ee077ac883d08

if [[ -z ${headers} ]]; then
  headers=${build}/pythran
  if [[ ! -e ${headers}/xsimd/xsimd.hpp ]]; then
    echo "newer_xsimd: fetching xsimd 14.1"
    pip=(python3 -m pip)
    "${pip[@]}" --version >/dev/null 2>&1 || pip=(/usr/bin/python3 -m pip)
    mkdir -p "${build}"
    "${pip[@]}" download --quiet --no-deps --only-binary :all: --dest "${build}" pythran==0.19.0
    wheel=pythran-0.19.0-py3-none-any.whl
    (cd "${build}" && echo "${wheel_sha256}  ${wheel}" | sha256sum --check --quiet)
    python3 -m zipfile -e "${build}/${wheel}" "${build}"
  fi
fi
if [[ ! -e ${headers}/xsimd/xsimd.hpp ]]; then
  echo "newer_xsimd: no xsimd/xsimd.hpp in ${headers}" >&2
  exit 1
fi

export CPATH=${headers}
grep VERSION "${headers}/xsimd/config/xsimd_config.hpp" | grep define
used=$(echo '#include <xsimd/config/xsimd_config.hpp>' | g++ -E -x c++ - | grep -c "${headers}") || true
if ((used == 0)); then
  echo "newer_xsimd: the compiler finds another xsimd" >&2
  exit 1
fi
echo "newer_xsimd: assembly of the hot loops"
python3 tools/check_asm.py --require g++-12 clang++-19
echo "newer_xsimd: tests"
cmake -S . -B "${build}/tests" -G Ninja -DCMAKE_BUILD_TYPE=Release -DSATTN_WERROR=ON \
  "-DXsimdHeaders_INCLUDE_DIR=${headers}" -DSATTN_BUILD_BENCH=OFF -DSATTN_BUILD_EXAMPLES=OFF
cmake --build "${build}/tests" --target simd_test attention_test --parallel "${SATTN_JOBS:-$(nproc)}"
ctest --test-dir "${build}/tests" --output-on-failure --no-tests=error -R '^(simd|attention)_test$'
echo "newer_xsimd: passed"
