#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks in the assembly of the AVX2 kernels that their hot loops spill no vector and call nothing.

A loop is hot if every trip runs at least MIN_FMAS fused multiply-adds and no loop inside it does;
in the kernels EXPECTED also if it has at least half as many FMAs per instruction as the function's
densest loop. Faults of a hot loop are

  spilled   vector registers stored to the stack;
  reloaded  whole vectors loaded from the stack, alone or as an operand;
  calls     of any function;
  stack     other accesses to the stack (a pointer, a scalar to broadcast), above MAX_STACK.

scratch counts arrays that the kernel itself keeps on the stack: they are told from spills by their
address, which the function takes or indexes. Not a fault.

Exits with 1 on a fault, 2 if it could not check: compiler missing or failing, kernel not found.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

COMPILERS = ["g++-12", "clang++-14", "clang++-19"]
FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-mavx2", "-mfma", "-mf16c"]
SOURCE = """\
#include <sattn/kernel/kernel_table_impl.hpp>
template const sattn::kernel_table& sattn::kernels<sattn::arch::avx2>();
"""

MIN_FMAS = 8    # per trip of a hot loop
DENSITY = 0.5   # of the densest loop's FMAs per instruction, for the kernels expected
MAX_STACK = 10  # scalar accesses to the stack per trip: 24 row pointers of the 6 x 16 tile

# Kernels that must be there, by the begin of their names. Every function whose name begins so must
# have a hot loop.
EXPECTED = [
    "qk_tile<avx2, 6",
    "qk_tile<avx2, 5",
    "pv_tile<avx2, 6",
    "pv_tile<avx2, 5",
    "softmax_chunk<avx2",
    "chunk_probabilities<avx2",
    "row_probabilities<avx2, 4",
    "row_probabilities<avx2, 1",
    "softmax_rows<avx2, 4",
    "softmax_rows<avx2, 1",
    "adjust_rows<avx2",
    "qk_rows<avx2, 3",
    "pv_rows<avx2, 3",
    "qk_rows<avx2, 4",
    "qk_rows<avx2, 2",
    "qk_rows<avx2, 1",
    "pv_rows<avx2, 4",
    "pv_rows<avx2, 2",
    "pv_rows<avx2, 1",
    "qk_stream<avx2",
    "pv_stream<avx2",
    "score_tile_of_pages<avx2",
    "adjust_scores<avx2, true",
]

# Kernels whose loops make few trips: listed, but never at fault.
COLD = ["finish_tile<avx2"]

# Reloads per trip that are put up with, by the begin of the kernel's name.
# All are constants of the loop for which there was no register: base[1], and those of tanh.
ALLOWED_RELOADS = {"softmax_chunk<avx2": 1, "softmax_rows<avx2": 2,
                   "adjust_rows<avx2": 9, "adjust_scores<avx2, true": 11}

VECTOR_BYTES = 32
KINDS = ["spilled", "reloaded", "scratch", "stack", "calls"]
LABEL = re.compile(r"([\w.$]+):")
FUNCTION = re.compile(r"\s*\.type\s+([\w.$]+),\s*@function")
TABLE_ENTRY = re.compile(r"\s*\.(?:long|quad)\s+(\.L[\w$]+)")
INSTRUCTION = re.compile(r"\s+([a-z]\w*)\s*(.*)")
FMA = re.compile(r"vfn?m(add|sub)\d*[ps][sd]$")
VECTOR_REGISTER = re.compile(r"%[xyz]mm\d")
STACK_OPERAND = re.compile(r"(-?\d*)\(%(rsp|rbp)(,%\w+(?:,\d)?)?\)")
# Of one element: a broadcast, a scalar operation, a move between register files.
SCALAR = re.compile(r"v(pbroadcast[bwdq]|pinsr[bwdq]|cvtsi2\w*|mov[dq]|\w*s[sd])$")


@dataclasses.dataclass
class Instruction:
    text: str
    name: str
    operands: str


@dataclasses.dataclass
class Block:
    instructions: list = dataclasses.field(default_factory=list)
    targets: list = dataclasses.field(default_factory=list)  # labels, then numbers of blocks
    falls_through: bool = True


@dataclasses.dataclass
class HotLoop:
    kernel: str
    instructions: int
    fmas: int
    found: dict  # {kind: [text]}, of the KINDS

    def faults(self):
        """The instructions that a hot loop may not have."""
        if begins_with(self.kernel, COLD):
            return []
        allowed = {"spilled": 0, "reloaded": 0, "calls": 0, "stack": MAX_STACK}
        if prefix := begins_with(self.kernel, ALLOWED_RELOADS):
            allowed["reloaded"] = ALLOWED_RELOADS[prefix]
        return [f"{kind}: {text}" for kind, limit in allowed.items()
                for text in self.found[kind] if len(self.found[kind]) > limit]

    def verdict(self):
        return "FAULT" if self.faults() else "cold" if begins_with(self.kernel, COLD) else "ok"


def begins_with(kernel, prefixes):
    """The prefix that a kernel's name begins with; the name ends there or has more arguments."""
    return next((p for p in prefixes if kernel.startswith((p + ",", p + ">"))), None)


def read_functions(assembly):
    """Returns {symbol: [line]} of the functions, and the labels in jump tables."""
    symbols = set(FUNCTION.findall(assembly))
    functions, current = {}, None
    for line in assembly.splitlines():
        line = line.split("#")[0].rstrip()
        label = LABEL.match(line)
        if label and label.group(1) in symbols:
            current = functions.setdefault(label.group(1), [])
        elif re.match(r"\s*\.size\s", line):
            current = None
        elif current is not None:
            current.append(line)
    return functions, TABLE_ENTRY.findall(assembly)


def demangle(symbols):
    """Returns {symbol: name} with parameters, return types and the library's namespaces cut off."""
    tool = shutil.which("c++filt")
    if tool is None:
        raise RuntimeError("c++filt is not installed (package binutils)")
    done = subprocess.run([tool], input="\n".join(symbols), text=True, capture_output=True,
                          check=True)
    return dict(zip(symbols, map(short_name, done.stdout.splitlines())))


def short_name(name):
    """`void sattn::kernel::f<sattn::arch::avx2, 6>(long) [clone .isra.0]` is f<avx2, 6>."""
    name = re.sub(r" \[clone [^]]*\]", "", name)
    depth, begin = 0, 0
    for i, c in enumerate(name):
        if c in "<([{":
            if c == "(" and depth == 0:
                name = name[:i]
                break
            depth += 1
        elif c in ">)]}":
            depth -= 1
        elif c == " " and depth == 0:
            begin = i + 1
    name = name[begin:].removeprefix("sattn::kernel::")
    return name.replace("sattn::arch::", "").replace("sattn::", "")


def blocks_of(lines, table_labels):
    """Basic blocks of a function; their targets are numbers of blocks."""
    blocks, at = [Block()], {}
    for line in lines:
        label = LABEL.match(line)
        match = INSTRUCTION.match(line)
        if label:
            if blocks[-1].instructions:
                blocks.append(Block())
            at[label.group(1)] = len(blocks) - 1
        elif match:
            name, operands = match.groups()
            blocks[-1].instructions.append(Instruction(f"{name} {operands}", name, operands))
            if name.startswith("j"):
                blocks[-1].targets = table_labels if operands.startswith("*") else [operands]
            if name.startswith(("j", "ret", "ud2")):
                blocks[-1].falls_through = name[0] == "j" and not name.startswith("jmp")
                blocks.append(Block())
    for i, block in enumerate(blocks):
        block.targets = [at[label] for label in block.targets if label in at]
        if block.falls_through and i + 1 < len(blocks):
            block.targets.append(i + 1)
    return blocks


def reachable(blocks, start, inside):
    """Blocks of the set `inside` that one or more steps lead to."""
    seen, todo = set(), [start]
    while todo:
        for target in blocks[todo.pop()].targets:
            if target in inside and target not in seen:
                seen.add(target)
                todo.append(target)
    return seen


def loops_in(blocks, inside):
    """Yields (header, body) of all loops within a set of blocks, outer ones first: strongly
    connected components, then those that are left when the header is taken away."""
    reach = {b: reachable(blocks, b, inside) for b in inside}
    rest = set(inside)
    while rest:
        block = min(rest)
        body = {b for b in reach[block] if block in reach[b]}
        rest -= body | {block}
        if not body:
            continue
        entered = {t for b, source in enumerate(blocks) if b not in body for t in source.targets}
        header = min(body & entered, default=min(body))
        yield header, body
        yield from loops_in(blocks, body - {header})


def fmas_every_trip(blocks, header, body):
    """FMAs in blocks that no trip goes around."""
    def always(block):
        return block == header or header not in reachable(blocks, header, body - {block})
    return sum(1 for b in body for instruction in blocks[b].instructions
               if FMA.match(instruction.name) and always(b))


def hot_loops(blocks, expected):
    """Bodies of the innermost loops with enough FMAs."""
    fmas, density = {}, {}
    for header, loop in loops_in(blocks, set(range(len(blocks)))):
        body = frozenset(loop)
        fmas[body] = fmas_every_trip(blocks, header, body)
        density[body] = fmas[body] / sum(len(blocks[b].instructions) for b in body)
    dense = DENSITY * max(density.values(), default=0) if expected else 1
    hot = [body for body in fmas
           if fmas[body] >= MIN_FMAS or (fmas[body] > 0 and density[body] >= dense)]
    return [body for body in hot if not any(other < body for other in hot)]


class Stack:
    """Which operands of a function lie on its stack, and which of them in arrays of its own."""

    def __init__(self, blocks):
        instructions = [i for block in blocks for i in block.instructions]
        # Without this %rbp is a register like any other.
        self.bases = {"rsp"}
        if any(i.name.startswith("mov") and i.operands == "%rsp, %rbp" for i in instructions):
            self.bases.add("rbp")
        # What is computed before the stack is aligned is the caller's.
        aligned = [n for n, i in enumerate(instructions)
                   if i.name.startswith("and") and i.operands.endswith(", %rsp")]
        self.arrays = set()
        for instruction in instructions[aligned[0] if aligned else 0:]:
            place = self.place(instruction)
            if place is None or instruction.operands.endswith(", %rsp"):
                continue
            if instruction.name.startswith("lea") or place[2]:
                self.arrays.add(place[:2])

    def place(self, instruction):
        """(base, offset, index) of the operand on the stack, or None."""
        match = STACK_OPERAND.search(instruction.operands)
        if match is None or match.group(2) not in self.bases:
            return None
        return match.group(2), int(match.group(1) or 0), match.group(3)

    def is_array(self, place):
        return any(base == place[0] and 0 <= place[1] - offset < VECTOR_BYTES
                   for base, offset in self.arrays)

    def kind(self, instruction):
        """What an instruction is to a hot loop: one of KINDS or None."""
        if instruction.name.startswith("call"):
            return "calls"
        if instruction.name.startswith(("push", "pop")):
            return "stack"
        place = self.place(instruction)
        if place is None or instruction.name.startswith("lea"):
            return None
        if not VECTOR_REGISTER.search(instruction.operands):
            return "stack"
        if self.is_array(place):
            return "scratch"
        if instruction.operands.endswith(")"):
            return "spilled"
        return "stack" if SCALAR.match(instruction.name) else "reloaded"


def check_assembly(assembly, expected):
    """Returns the hot loops of the kernels, and what is wrong with the list of kernels."""
    functions, table_labels = read_functions(assembly)
    kernels = [s for s in functions if s.startswith("_ZN5sattn6kernel")]
    names = demangle(kernels)
    loops, cold, seen = [], [], set()
    for symbol in sorted(kernels, key=lambda s: names[s]):
        if ".cold" in symbol:  # what the compiler took out of a function because it rarely runs
            continue
        name = names[symbol]
        prefix = begins_with(name, expected)
        seen.add(prefix)
        blocks = blocks_of(functions[symbol], table_labels)
        stack = Stack(blocks)
        bodies = hot_loops(blocks, prefix is not None)
        if prefix and not bodies:
            cold.append(f"{name} has no hot loop")
        for body in sorted(bodies, key=min):
            instructions = [i for b in sorted(body) for i in blocks[b].instructions]
            found = {kind: [i.text for i in instructions if stack.kind(i) == kind]
                     for kind in KINDS}
            fmas = sum(1 for i in instructions if FMA.match(i.name))
            loops.append(HotLoop(name, len(instructions), fmas, found))
    missing = [f"no function {prefix}...>" for prefix in expected if prefix not in seen]
    return loops, missing + cold


def compile_kernels(compiler, include, folder):
    """Returns the assembly. Raises RuntimeError with the compiler's words if it fails."""
    source = folder / f"{pathlib.Path(compiler).name}.cpp"
    source.write_text(SOURCE, encoding="utf-8")
    output = folder / f"{pathlib.Path(compiler).name}.s"
    command = [compiler, *FLAGS, f"-I{include}", "-S", "-o", str(output), str(source)]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return output.read_text(encoding="utf-8")


def find_compiler(name):
    """The path of a compiler, or None. g++ stands in for the g++ of its own version."""
    path = shutil.which(name)
    if path is None and re.fullmatch(r"g\+\+-\d+", name) and shutil.which("g++"):
        done = subprocess.run(["g++", "-dumpversion"], text=True, capture_output=True, check=True)
        if done.stdout.split(".")[0].strip() == name.removeprefix("g++-"):
            path = shutil.which("g++")
    return path


def print_table(rows):
    head = ["compiler", "kernel", "instructions", "FMAs", *KINDS, "verdict"]
    rows = [head, *rows]
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = [str(cell).rjust(w) if 2 <= i < len(head) - 1 else str(cell).ljust(w)
                 for i, (cell, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


def check_compilers(compilers, include, folder):
    """Prints the table and the faults; returns the exit status."""
    rows, details, errors, faulty = [], [], [], 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        assembly = {name: pool.submit(compile_kernels, path, include, folder)
                    for name, path in compilers.items()}
    for name, compiled in assembly.items():
        try:
            loops, problems = check_assembly(compiled.result(), EXPECTED)
        except RuntimeError as error:
            errors.append(f"{name}: {error}")
            continue
        errors += [f"{name}: {problem}" for problem in problems]
        for loop in loops:
            rows.append([name, loop.kernel, loop.instructions, loop.fmas,
                         *(len(loop.found[kind]) for kind in KINDS), loop.verdict()])
            faulty += bool(loop.faults())
            details += [f"{name}: {loop.kernel}: {text}" for text in loop.faults()]
    print_table(rows)
    for line in details + errors:
        print(line)
    print(f"check_asm: {len(compilers)} compilers, {len(rows)} hot loops, {faulty} with faults, "
          f"{len(errors)} errors")
    return 2 if errors else 1 if faulty else 0


def planted(prefix, lines):
    """A function with a hot loop, as gcc writes it; lines go into the loop."""
    symbol = "_ZN5sattn6kernel7pv_tileINS_4arch4avx2ELi6EEEvPKPKfllS5_S5_Pf"
    fmas = [f"\tvfmadd231ps\t%ymm12, %ymm13, %ymm{i}" for i in range(MIN_FMAS)]
    return "\n".join([f"\t.type\t{symbol}, @function", f"{symbol}:", ".LFB1:", *prefix,
                      "\tvmovaps\t%ymm9, 64(%rsp)", "\txorl\t%eax, %eax", ".L3:", *fmas, *lines,
                      "\taddq\t$4, %rax  # comment", "\tcmpq\t%rdx, %rax", "\tjl\t.L3",
                      "\tvmovaps\t64(%rsp), %ymm9", "\tcall\tmemcpy@PLT", "\tret",
                      f"\t.size\t{symbol}, .-{symbol}", ""])


FRAME = ["\tpushq\t%rbp", "\tmovq\t%rsp, %rbp", "\tandq\t$-32, %rsp"]
OUTER_LOOP = ["\txorl\t%ecx, %ecx", ".L2:", "\tvmovaps\t64(%rsp), %ymm9"]

# What the self-test plants: name, lines before the loop, lines in it, and what the one hot loop has
# of (spilled, reloaded, scratch, stack, calls).
PLANTED = [
    ("clean", [], ["\tvbroadcastss\t(%rdi,%rax,4), %ymm13"], (0, 0, 0, 0, 0)),
    ("a store", [], ["\tvmovaps\t%ymm1, 32(%rsp)"], (1, 0, 0, 0, 0)),
    ("an unaligned store", [], ["\tvmovups\t%ymm1, -32(%rsp)"], (1, 0, 0, 0, 0)),
    ("a scalar of a vector register", [], ["\tvmovss\t%xmm1, 32(%rsp)"], (1, 0, 0, 0, 0)),
    ("half a vector", [], ["\tvextractf128\t$1, %ymm1, (%rsp)"], (1, 0, 0, 0, 0)),
    ("a load", [], ["\tvmovaps\t64(%rsp), %ymm1"], (0, 1, 0, 0, 0)),
    ("an operand", [], ["\tvfmadd132ps\t64(%rsp), %ymm2, %ymm1  # 32-byte Folded Reload"],
     (0, 1, 0, 0, 0)),
    ("from the frame", FRAME, ["\tvmulps\t-64(%rbp), %ymm2, %ymm1"], (0, 1, 0, 0, 0)),
    ("%rbp is no frame", [], ["\tvmovups\t-64(%rbp), %ymm1"], (0, 0, 0, 0, 0)),
    ("a broadcast", [], ["\tvbroadcastss\t12(%rsp), %ymm1"], (0, 0, 0, 1, 0)),
    ("a pointer", [], ["\tmovq\t8(%rsp), %rcx", "\tprefetcht0\t(%rcx)"], (0, 0, 0, 1, 0)),
    ("pointers", [], ["\tmovq\t8(%rsp), %rcx"] * (MAX_STACK + 1), (0, 0, 0, MAX_STACK + 1, 0)),
    ("an array", FRAME + ["\tleaq\t128(%rsp), %rsi"], ["\tvmovaps\t128(%rsp), %ymm1"],
     (0, 0, 1, 0, 0)),
    ("an indexed array", [], ["\tvmovss\t%xmm1, 128(%rsp,%rax,4)", "\tvmovaps\t128(%rsp), %ymm1"],
     (0, 0, 2, 0, 0)),
    ("the caller's stack", ["\tleaq\t32(%rsp), %r10"] + FRAME, ["\tvmovaps\t%ymm1, 32(%rsp)"],
     (1, 0, 0, 0, 0)),
    ("a call", [], ["\tvzeroupper", "\tcall\tmemcpy@PLT"], (0, 0, 0, 0, 1)),
    ("a call as clang writes it", [], ["\tcallq\tmemcpy@PLT"], (0, 0, 0, 0, 1)),
    ("a rare call", [], ["\ttestq\t%rcx, %rcx", "\tje\t.L4", "\tcall\tf@PLT", ".L4:"],
     (0, 0, 0, 0, 1)),
    ("an inner loop", [], [".L5:", "\tmovb\t(%rsi), %cl", "\tjne\t.L5", "\tcall\tf"],
     (0, 0, 0, 0, 1)),
    ("a reload in the outer loop", OUTER_LOOP, ["\tcmpq\t%rcx, %rax", "\tjl\t.L3", "\tjmp\t.L2"],
     (0, 0, 0, 0, 0)),
]


def self_test():
    expected = ["pv_tile<avx2, 6"]  # the planted kernel
    failures = []
    for name, before, inside, want in PLANTED:
        loops, problems = check_assembly(planted(before, inside), expected)
        found = [tuple(len(loop.found[kind]) for kind in KINDS) for loop in loops]
        spilled, reloaded, _, stack, calls = want
        verdict = "FAULT" if spilled or reloaded or calls or stack > MAX_STACK else "ok"
        if found != [want] or loops[0].verdict() != verdict or problems:
            failures.append(f"{name}: expected {want}, found {found}, {problems}")
    around = planted([], [".L9:"]).replace(".L3:\n", ".L3:\n\tje\t.L9\n")
    for assembly, want in [(around, "pv_tile<avx2, 6> has no hot loop"),
                           ("", "no function pv_tile<avx2, 6...>")]:
        if check_assembly(assembly, expected) != ([], [want]):
            failures.append(f"expected {want}")
    for failure in failures:
        print(f"self-test: {failure}")
    print(f"check_asm: self-test, {len(PLANTED) + 2} cases, {len(failures)} failures")
    return 1 if failures else 0


def main():
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=details,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--require", nargs="+", metavar="COMPILER",
                        help="check these, and fail if one is missing; "
                             f"default: those of {', '.join(COMPILERS)} that are installed")
    parser.add_argument("--root", type=pathlib.Path, metavar="FOLDER",
                        default=pathlib.Path(__file__).resolve().parents[1],
                        help="source tree with include/sattn; default: the one of this script")
    parser.add_argument("--keep", type=pathlib.Path, metavar="FOLDER",
                        help="leave the assembly there")
    parser.add_argument("--self-test", action="store_true",
                        help="check assembly with known faults instead")
    options = parser.parse_args()
    if options.self_test:
        return self_test()
    include = options.root / "include"
    if not (include / "sattn").is_dir():
        parser.error(f"no folder include/sattn in {options.root}")
    compilers = {name: find_compiler(name) for name in options.require or COMPILERS}
    missing = [name for name, path in compilers.items() if path is None]
    for name in missing:
        print(f"check_asm: {name} is not installed", file=sys.stderr)
    if len(missing) == len(compilers) or (options.require and missing):
        return 2
    found = {name: path for name, path in compilers.items() if path is not None}
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        return check_compilers(found, include, options.keep)
    with tempfile.TemporaryDirectory() as folder:
        return check_compilers(found, include, pathlib.Path(folder))


if __name__ == "__main__":
    sys.exit(main())
