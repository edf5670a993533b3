#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Counts the instructions that attend() executes, and compares them with the recorded ones.

Each case of tools/kernel_workload.cpp runs under callgrind, which counts from the entry of attend()
to its return. `total` is what the functions of namespace sattn execute themselves: the C library,
which picks its memcpy by the machine, stays out. Below it stand the kernels of 1 % or more, each
without what it calls. Counts that differ from tools/instruction_counts.json by more than 1 % fail,
whether more or less: --record writes what was counted, to be committed with the change that caused
it.

The counts are those of one compiler, its flags and one xsimd. With other ones there is nothing to
compare with, and the tool fails, unless told to compare all the same.

Exits with 1 if a count differs, 2 if it could not count or compare.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True  # no cache of the next module among the sources
from check_asm import demangle, find_compiler

TOOLS = pathlib.Path(__file__).resolve().parent
WORKLOAD = TOOLS / "kernel_workload.cpp"
COUNTED_FUNCTION = "counted_attend"  # of the workload

COMPILER = "g++-12"
FLAGS = ["-std=c++20", "-O2", "-DNDEBUG", "-mavx2", "-mfma", "-mf16c"]

TOLERANCE = 0.01   # of a count
RECORDED = 0.01    # of a case's total: kernels below are not recorded
NOTICED = 0.02     # of a case's total: kernels above must be recorded
TOTAL = "total"

OURS = re.compile(r"_Z+NK?5sattn")
KERNEL = re.compile(r"_Z+N5sattn6kernel")
FUNCTION = re.compile(r"(c?fn)=\((\d+)\)(?: (.*))?")


class Failure(Exception):
    """What keeps the tool from counting or comparing."""


def output_of(command, **options):
    done = subprocess.run(command, text=True, capture_output=True, check=False, **options)
    if done.returncode != 0:
        raise Failure(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def toolchain_of(compiler, include):
    """What the counts depend on besides our code."""
    macros = output_of([compiler, f"-I{include}", "-x", "c++", "-std=c++20", "-E", "-dM",
                        "-include", "xsimd/config/xsimd_config.hpp", os.devnull])
    xsimd = [re.search(rf"#define XSIMD_VERSION_{part} (\d+)", macros).group(1)
             for part in ("MAJOR", "MINOR", "PATCH")]
    version = output_of([compiler, "-dumpfullversion"]).strip()
    return {"compiler": f"g++ {version}", "flags": " ".join(FLAGS), "xsimd": ".".join(xsimd)}


def build(compiler, include, folder):
    program = folder / "kernel_workload"
    output_of([compiler, *FLAGS, f"-I{include}", str(WORKLOAD), "-o", str(program)])
    return program


def self_costs(profile):
    """{symbol: instructions of its own} of a file in callgrind's format."""
    names, costs = {}, {}
    current, callee_cost_follows = None, False
    for line in profile.splitlines():
        function = FUNCTION.match(line)
        if function:
            kind, number, name = function.groups()
            if name:
                names[number] = name  # later ones give the number alone
            if kind == "fn":
                current = names[number]
        elif line.startswith("calls="):
            callee_cost_follows = True
        elif line[:1] in "0123456789+-*" and line:
            if not callee_cost_follows:
                costs[current] = costs.get(current, 0) + int(line.split()[1])
            callee_cost_follows = False
    if f"totals: {sum(costs.values())}" not in profile.splitlines():
        raise Failure("callgrind's file does not add up to its totals")
    return costs


def count(program, case, folder):
    """{kernel or TOTAL: instructions} of one case."""
    profile = folder / f"callgrind.{case}"
    output_of(["valgrind", "--tool=callgrind", "--collect-atstart=no", "--demangle=no",
               f"--toggle-collect={COUNTED_FUNCTION}", f"--callgrind-out-file={profile}",
               str(program), case])
    costs = self_costs(profile.read_text(encoding="utf-8"))
    if not costs.get(COUNTED_FUNCTION):
        raise Failure(f"{case}: callgrind has not seen {COUNTED_FUNCTION}")
    total = sum(cost for symbol, cost in costs.items()
                if OURS.match(symbol) or symbol == COUNTED_FUNCTION)
    kernels = [symbol for symbol in costs if KERNEL.match(symbol)]
    counts = {TOTAL: total}
    for symbol, name in demangle(kernels).items():
        counts[name] = counts.get(name, 0) + costs[symbol]
    return counts


def worth_recording(counts):
    """The total, then the kernels of some weight, the heaviest first."""
    kept = [name for name in counts if counts[name] >= RECORDED * counts[TOTAL]]
    return {name: counts[name] for name in sorted(kept, key=lambda name: -counts[name])}


def compare(recorded, counted):
    """Yields (name, recorded, counted, fault) for one case; either count may be None."""
    for name, before in recorded.items():
        now = counted.get(name)
        if now is None:
            yield name, before, None, "is gone"
        else:
            differs = abs(now - before) > TOLERANCE * before
            yield name, before, now, "more" if differs and now > before else differs and "less"
    for name, now in counted.items():
        if name not in recorded and now >= NOTICED * counted[TOTAL]:
            yield name, None, now, "is new"


def compare_all(recorded, counted):
    """Prints a table; returns the number of faults."""
    faults = 0
    print(f"{'case':20} {'function':26} {'recorded':>12} {'counted':>12} {'change':>9}")
    for case in {**recorded, **counted}:
        for name, before, now, fault in compare(recorded.get(case, {}), counted.get(case, {})):
            change = f"{100 * (now / before - 1):+8.2f}%" if before and now else ""
            print(f"{case:20} {name:26} {before or '-':>12} {now or '-':>12} {change:>9}"
                  f"  {fault or ''}".rstrip())
            faults += bool(fault)
    return faults


def read_recorded(path, toolchain, allow_other):
    """The recorded cases. Raises Failure where they are not comparable."""
    if not path.is_file():
        raise Failure(f"no file {path}; --record makes it")
    recorded = json.loads(path.read_text(encoding="utf-8"))
    for key, now in toolchain.items():
        if recorded[key] != now:
            message = f"{key}: recorded with {recorded[key]}, this is {now}"
            if not allow_other:
                raise Failure(message)
            print(f"count_instructions: {message}")
    return recorded["cases"]


def run(options, folder):
    compiler = options.compiler or find_compiler(COMPILER) or shutil.which("g++")
    if compiler is None or shutil.which("valgrind") is None:
        raise Failure(f"{COMPILER} and valgrind must be installed")
    include = options.root / "include"
    toolchain = toolchain_of(compiler, include)
    recorded = {}
    if not options.record:
        recorded = read_recorded(options.counts, toolchain, options.allow_other_compiler)
    program = build(compiler, include, folder)
    known = output_of([program]).split()
    if unknown := set(options.cases) - set(known):
        raise Failure(f"no case {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    cases = options.cases or known
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        counted = dict(zip(cases, pool.map(lambda case: count(program, case, folder), cases)))
    if options.record:
        content = {**toolchain, "cases": {c: worth_recording(counted[c]) for c in cases}}
        options.counts.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"count_instructions: {len(cases)} cases recorded in {options.counts}")
        return 0
    wanted = {c: kernels for c, kernels in recorded.items() if c in cases or not options.cases}
    faults = compare_all(wanted, counted)
    print(f"count_instructions: {len(cases)} cases, {faults} differences"
          + ("; if they are meant: --record" if faults else ""))
    return 1 if faults else 0


def main():
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=details,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--record", action="store_true", help="write the counts instead")
    parser.add_argument("--counts", type=pathlib.Path, metavar="FILE",
                        default=TOOLS / "instruction_counts.json",
                        help="the recorded counts; default: instruction_counts.json in tools")
    parser.add_argument("--root", type=pathlib.Path, metavar="FOLDER", default=TOOLS.parent,
                        help="source tree with include/sattn; default: the one of this script")
    parser.add_argument("--build-dir", type=pathlib.Path, metavar="FOLDER",
                        help="leave the program and callgrind's files there")
    parser.add_argument("--compiler", help=f"default: {COMPILER}, or g++")
    parser.add_argument("--allow-other-compiler", action="store_true",
                        help="compare even if compiler, flags or xsimd are not the recorded ones")
    options = parser.parse_args()
    if options.record and options.cases:
        parser.error("--record records all cases")
    if not (options.root / "include" / "sattn").is_dir():
        parser.error(f"no folder include/sattn in {options.root}")
    try:
        if options.build_dir:
            options.build_dir.mkdir(parents=True, exist_ok=True)
            return run(options, options.build_dir.resolve())
        with tempfile.TemporaryDirectory() as folder:
            return run(options, pathlib.Path(folder))
    except Failure as failure:
        print(f"count_instructions: {failure}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
