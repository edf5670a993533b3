#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks who includes whom in include/sattn, and the other rules that a compiler does not check.

usage: check_layers.py [ROOT]       prints file:line: message for each fault, exits 1 if any
       check_layers.py --self-test  plants faults in a temporary folder and expects each to be found
"""

import pathlib
import re
import sys
import tempfile

KERNEL_INTERFACE = ["kernel/kernel_table.hpp", "kernel/kernel_args.hpp"]  # seam 3

# What a layer (a folder of include/sattn) may include besides itself: layers, or single headers.
LAYERS = {
    "core": [],
    "simd": ["core"],
    "parallel": ["core"],
    "kv": ["core"],
    "plan": ["core"],
    "budget": ["core"],
    "pattern": ["core", "plan"],
    "kernel": ["core", "simd"],
    "exec": ["core", "parallel", "kv", "plan", *KERNEL_INTERFACE],
    "estimate": ["core", "kv", "plan", "budget", "pattern", "exec", *KERNEL_INTERFACE],
    "attention": ["core", "parallel", "kv", "plan", "pattern", "exec", *KERNEL_INTERFACE],
    "method": ["core", "kv", "plan", "budget", "pattern", "exec", "estimate", "attention"],
    "interop": ["core", "method"],
}

# Headers outside the layers: umbrellas include anything, the version nothing.
UMBRELLAS = ["sattn.hpp", "api.hpp"]
TOP_LEVEL = [*UMBRELLAS, "version.hpp"]

# Headers that belong to one layer.
RESERVED = [
    ("simd", r"xsimd/.*|[a-z0-9]*intrin\.h|arm_(neon|sve|sme)\.h|cpuid\.h"),
    ("interop", r"nlohmann/.*"),
    ("parallel", r"thread|mutex|shared_mutex|condition_variable|atomic|future|semaphore|latch"
                 r"|barrier|stop_token"),
]

# Headers that no layer includes.
FORBIDDEN = r"iostream|ranges|regex|(unsupported/)?Eigen/.*"

# Kernels get plain pointers, never allocate and never throw.
KERNEL_FORBIDDEN = (r"vector|string|string_view|algorithm|functional|memory|cmath|numeric|map|set"
                    r"|unordered_map|unordered_set|deque|list|forward_list|queue|stack"
                    r"|exception|stdexcept")

SPDX = "// SPDX-License-Identifier: Apache-2.0"
MACRO_HOME = "core/config.hpp"
MAX_LINES = 400
MAX_COLUMNS = 100
PROGRAM_FOLDERS = ["tests", "bench", "examples"]

TOKENS = re.compile(
    r'//[^\n]*|/\*.*?\*/|R"(?P<tag>[^(\s]*)\(.*?\)(?P=tag)"|"(?:\\.|[^"\\\n])*"'
    r"|(?<![0-9A-Za-z_])'(?:\\.|[^'\\\n])+'",
    re.DOTALL)
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
DEFINE = re.compile(r"^\s*#\s*(?:define|undef)\s+(\w+)")


def blank(text, keep_strings):
    """Returns text with comments (and strings) replaced by blanks; lines keep their numbers."""
    def replace(match):
        token = match.group()
        if keep_strings and not token.startswith("/"):
            return token
        return re.sub(r"[^\n]", " ", token)
    return TOKENS.sub(replace, text)


def check_own_include(layer, target):
    """Returns the fault of `#include <sattn/target>` in layer, or None."""
    if layer in UMBRELLAS:
        return None
    if layer not in LAYERS:
        return f"{layer} includes no header of sattn"
    folder = target.split("/")[0]
    if folder == layer or folder in LAYERS[layer] or target in LAYERS[layer]:
        return None
    return f"layer {layer} may not include <sattn/{target}>"


def check_include(layer, quote, name):
    if quote == '"':
        return f'"{name}": include own headers as <sattn/...>'
    if name.startswith("sattn/"):
        return check_own_include(layer, name.removeprefix("sattn/"))
    for home, pattern in RESERVED:
        if layer != home and re.fullmatch(pattern, name):
            return f"only layer {home} may include <{name}>"
    if re.fullmatch(FORBIDDEN, name):
        return f"<{name}> is not used in headers"
    if layer == "kernel" and re.fullmatch(KERNEL_FORBIDDEN, name):
        return f"kernels may not include <{name}>"
    return None


def check_code(layer, line):
    """Yields the faults of one line without comments and strings."""
    if layer != "simd" and re.search(r"\bxsimd\s*::", line):
        yield "only layer simd may name xsimd"
    if re.search(r"\bEigen\s*::", line):
        yield "Eigen is not used in headers"
    if re.search(r"\busing\s+namespace\b", line):
        yield "`using namespace` in a header"
    if layer == "kernel" and re.search(r"\bthrow\b", line):
        yield "kernels do not throw"


def check_macro(path, line):
    match = DEFINE.match(line)
    if match and not match.group(1).startswith("SATTN_"):
        return f"macro {match.group(1)} is not named SATTN_*"
    if match and path != MACRO_HOME:
        return f"macros belong in {MACRO_HOME}"
    return None


def check_lines(lines):
    """Yields (line, message) for what every file of C++ must keep."""
    if not lines or lines[0] != SPDX:
        yield 1, f"the first line is not `{SPDX}`"
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_COLUMNS:
            yield number, f"{len(line)} columns, {MAX_COLUMNS} are allowed"


def check_header(path, text):
    """Yields (line, message) for the header include/sattn/<path>."""
    layer = path.split("/")[0]
    if layer not in LAYERS and path not in TOP_LEVEL:
        yield 1, f"{layer} is neither a layer nor a known header"
    lines = text.splitlines()
    yield from check_lines(lines)
    if len(lines) > MAX_LINES:
        yield len(lines), f"{len(lines)} lines, {MAX_LINES} are allowed"
    code = blank(text, keep_strings=False).splitlines()
    if not any(re.match(r"\s*#\s*pragma\s+once\b", line) for line in code):
        yield 1, "no #pragma once"
    for number, line in enumerate(blank(text, keep_strings=True).splitlines(), 1):
        match = INCLUDE.match(line)
        fault = check_include(layer, *match.groups()) if match else check_macro(path, line)
        if fault:
            yield number, fault
    for number, line in enumerate(code, 1):
        for fault in check_code(layer, line):
            yield number, fault


def check_program(text):
    """Yields (line, message) for a source file of the tests, benches or examples."""
    yield from check_lines(text.splitlines())
    for number, line in enumerate(blank(text, keep_strings=True).splitlines(), 1):
        match = INCLUDE.match(line)
        if match and match.group(1) == '"' and re.search(r"(^|/)(sattn|include)/", match.group(2)):
            yield number, f'"{match.group(2)}": include the library as <sattn/...>'


def check_tree(root):
    """Returns [(file, line, message)] for a source tree."""
    faults = []
    headers = root / "include" / "sattn"
    for file in sorted(path for path in headers.rglob("*") if path.is_file()):
        name = file.relative_to(headers).as_posix()
        found = (check_header(name, file.read_text(encoding="utf-8")) if file.suffix == ".hpp"
                 else [(1, "not a .hpp file")])
        faults += [(file.relative_to(root).as_posix(), *fault) for fault in found]
    for folder in PROGRAM_FOLDERS:
        files = [path for path in (root / folder).rglob("*") if path.suffix in (".hpp", ".cpp")]
        for file in sorted(files):
            found = check_program(file.read_text(encoding="utf-8"))
            faults += [(file.relative_to(root).as_posix(), *fault) for fault in found]
    return faults


HEADER = SPDX + "\n#pragma once\n"

# Files without a fault, some of them close to one.
CLEAN = {
    "include/sattn/sattn.hpp": HEADER + "#include <sattn/attention/prefill.hpp>\n",
    "include/sattn/version.hpp": HEADER + "constexpr int version_major = 0;\n",
    "include/sattn/core/config.hpp": HEADER + "#define SATTN_UNROLL _Pragma(\"GCC unroll 16\")\n",
    "include/sattn/core/text.hpp": HEADER + "// throw; using namespace std; xsimd::batch\n"
        "constexpr int n = 1'000'000; /* #include <regex>\n#include <thread> */\n"
        "const char* s = \"using namespace xsimd::\"; const char c = '\"';\n"
        "const char* r = R\"(\nusing namespace Eigen::\n)\";\n",
    "include/sattn/simd/vec.hpp": HEADER + "#include <xsimd/xsimd.hpp>\nusing v = xsimd::batch<float>;\n",
    "include/sattn/parallel/pool.hpp": HEADER + "#include <atomic>\n#include <vector>\n",
    "include/sattn/kernel/kernel_table.hpp": HEADER + "#include <sattn/simd/vec.hpp>\n",
    "include/sattn/exec/context.hpp": HEADER + "#include <sattn/kernel/kernel_table.hpp>\n",
    "include/sattn/attention/prefill.hpp": HEADER + "#include <sattn/exec/context.hpp>\n",
    "tests/core/text_test.cpp": SPDX + "\n#include <sattn/core/text.hpp>\n#include \"support/a.hpp\"\n",
}


def planted(path, *lines):
    """A header with the given lines from line 3 on."""
    return "include/sattn/" + path, HEADER + "\n".join(lines) + "\n"


# ((file, text), line, part of the message)
FAULTS = [
    (planted("core/a.hpp", "#include <sattn/plan/tile.hpp>"), 3, "layer core may not include"),
    (planted("plan/a.hpp", "", "# include <sattn/budget/top_k.hpp>"), 4, "layer plan may not"),
    (planted("budget/a.hpp", "#include <sattn/plan/tile.hpp>"), 3, "layer budget may not"),
    (planted("pattern/a.hpp", "#include <sattn/exec/context.hpp>"), 3, "layer pattern may not"),
    (planted("exec/a.hpp", "#include <sattn/kernel/decode_split.hpp>"), 3, "layer exec may not"),
    (planted("estimate/a.hpp", "#include <sattn/attention/prefill.hpp>"), 3, "layer estimate may"),
    (planted("estimate/a.hpp", "#include <sattn/parallel/pool.hpp>"), 3, "layer estimate may"),
    (planted("attention/a.hpp", "#include <sattn/kernel/prefill_tile.hpp>"), 3, "layer attention"),
    (planted("attention/a.hpp", "#include <sattn/sattn.hpp>"), 3, "layer attention may not"),
    (planted("kernel/a.hpp", "#include <sattn/plan/tile.hpp>"), 3, "layer kernel may not include"),
    (planted("version.hpp", "#include <sattn/core/config.hpp>"), 3, "includes no header"),
    (planted("kernel/a.hpp", "#include <xsimd/xsimd.hpp>"), 3, "only layer simd may include"),
    (planted("kernel/a.hpp", "#include <immintrin.h>"), 3, "only layer simd may include"),
    (planted("kernel/a.hpp", "using v = xsimd::batch<float>;"), 3, "only layer simd may name"),
    *[(planted("exec/a.hpp", f"#include <{name}>"), 3, "only layer parallel may include")
      for name in ("thread", "mutex", "condition_variable", "atomic")],
    *[(planted("kernel/a.hpp", f"#include <{name}>"), 3, "kernels may not include")
      for name in ("vector", "string", "algorithm", "functional", "memory", "cmath")],
    (planted("kernel/a.hpp", "inline void f() { throw 1; }"), 3, "kernels do not throw"),
    *[(planted("core/a.hpp", f"#include <{name}>"), 3, "is not used in headers")
      for name in ("iostream", "ranges", "regex", "Eigen/Dense")],
    (planted("core/a.hpp", "/* a", "b */ Eigen::MatrixXf m;"), 4, "Eigen is not used"),
    (planted("core/a.hpp", "using namespace std;"), 3, "`using namespace`"),
    (planted("core/a.hpp", "#include \"sattn/core/config.hpp\""), 3, "include own headers as"),
    (planted("core/a.hpp", "#include \"config.hpp\""), 3, "include own headers as"),
    (planted("core/a.hpp", "#define SATTN_X 1"), 3, "macros belong in"),
    (planted("core/config.hpp", "#define RESTRICT __restrict"), 3, "is not named SATTN_*"),
    (planted("core/a.hpp", "#define X 1  // comment"), 3, "is not named SATTN_*"),
    (planted("core/a.hpp", *["//"] * 399), 401, "401 lines, 400 are allowed"),
    (planted("core/a.hpp", "//" + "x" * 99), 3, "101 columns, 100 are allowed"),
    (planted("methods/a.hpp"), 1, "neither a layer nor a known header"),
    (planted("extra.hpp"), 1, "neither a layer nor a known header"),
    (("include/sattn/core/a.hpp", "#pragma once\n"), 1, "the first line is not"),
    (("include/sattn/core/a.hpp", SPDX + "\n// #pragma once\n"), 1, "no #pragma once"),
    (("include/sattn/core/a.h", HEADER), 1, "not a .hpp file"),
    (("tests/core/a_test.cpp", "#include <sattn/core/a.hpp>\n"), 1, "the first line is not"),
    (("bench/a.cpp", SPDX + "\n#include \"../include/sattn/sattn.hpp\"\n"), 2, "as <sattn/...>"),
    (("examples/a.cpp", SPDX + "\n#include \"sattn/sattn.hpp\"\n"), 2, "as <sattn/...>"),
]


def check_planted(files):
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")
        return check_tree(root)


def self_test():
    failures = [f"clean tree: {fault}" for fault in check_planted(CLEAN)]
    for (name, text), line, message in FAULTS:
        found = check_planted({**CLEAN, name: text})
        if len(found) != 1 or found[0][:2] != (name, line) or message not in found[0][2]:
            failures.append(f"expected {name}:{line}: ...{message}..., found {found}")
    for failure in failures:
        print(f"self-test: {failure}")
    print(f"check_layers: self-test, {len(FAULTS)} planted faults, {len(failures)} failures")
    return 1 if failures else 0


def main(arguments):
    if arguments == ["--self-test"]:
        return self_test()
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    root = pathlib.Path(arguments[0]) if arguments else pathlib.Path(__file__).resolve().parents[1]
    if not (root / "include" / "sattn").is_dir():
        print(f"check_layers: no folder include/sattn in {root}", file=sys.stderr)
        return 2
    faults = check_tree(root)
    for file, line, message in faults:
        print(f"{file}:{line}: {message}")
    print(f"check_layers: {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
