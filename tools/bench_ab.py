#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compares two builds of a benchmark: runs in turn, ratios of pairs, intervals.

  tools/bench_ab.py --a build/release/bench/prefill_bench --b /tmp/other/prefill_bench \\
      --filter 'd128/n1024/dense$' --pairs 10
  tools/bench_ab.py --commits HEAD~1 HEAD --target prefill_bench --filter 'd128/n1024/dense$'
  tools/bench_ab.py --commits HEAD worktree --target decode_bench --filter n32768
  tools/bench_ab.py --self-test

Each pair runs each case alone in A and in B, in the order AB BA AB ..., so that the drift of a
machine helps neither. A pair gives the ratio B / A. The interval for the median ratio lies between
two of the ratios in order (sign test): it assumes nothing about the noise but that pairs are
independent, and holds the median with at least 95 %. The verdict is about B: `faster`, `slower`, or
`no difference seen` where the interval contains 1.

The interval covers noise, not causes: code that only moved can also be 1 % faster. Comparing a
program with itself (--a X --b X) shows what the machine can resolve.

--commits builds each commit in a git worktree in build/ab/<hash>, which the next call reuses; the
word `worktree` means the files as they are. To remove them: rm -r build/ab && git worktree prune
"""

import argparse
import contextlib
import io
import json
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIDENCE = 0.95
MIN_PAIRS = 6  # with fewer, not even the extremes hold the median with 95 %
CONTEXT = ["machine", "compiler", "flags", "kernels"]  # of describe_machine() in bench/support
NO_DIFFERENCE = "no difference seen"


class Failure(Exception):
    """What the user has to know."""


def say(text):
    print(f"bench_ab: {text}", file=sys.stderr, flush=True)


# Statistics.

def median(values):
    ordered = sorted(values)
    return (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2


def interval_rank(count):
    """Returns (rank, coverage): the rank-th smallest and the rank-th largest of count values hold
    the median between them with that probability, the smallest that is at least CONFIDENCE."""
    rank, tail = 0, 0.0
    while tail + math.comb(count, rank) / 2**count <= (1 - CONFIDENCE) / 2:
        tail += math.comb(count, rank) / 2**count
        rank += 1
    return rank, 1 - 2 * tail


def judge(times_a, times_b):
    """Returns what the pairs of one case say."""
    ratios = sorted(b / a for a, b in zip(times_a, times_b))
    rank, _ = interval_rank(len(ratios))
    low, high = ratios[rank - 1], ratios[-rank]
    verdict = "faster" if high < 1 else "slower" if low > 1 else NO_DIFFERENCE
    return {"a_ms": median(times_a), "b_ms": median(times_b), "ratio": median(ratios),
            "interval": [low, high], "verdict": verdict, "a_runs": times_a, "b_runs": times_b}


def order(pair):
    return "AB" if pair % 2 == 0 else "BA"


# Programs.

def tail_of(text):
    return "\n".join(text.strip().splitlines()[-20:])


class Program:
    """A Google Benchmark program, which must stay as it is while it is measured."""

    def __init__(self, letter, path):
        self.letter = letter
        self.path = pathlib.Path(path).resolve()
        self.context = {}
        if not (self.path.is_file() and os.access(self.path, os.X_OK)):
            raise Failure(f"{letter}: {path} is not a program")
        self.stamp = self.current_stamp()

    def current_stamp(self):
        status = self.path.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino

    def call(self, *arguments):
        done = subprocess.run([self.path, *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise Failure(f"{self.letter}: {self.path} {' '.join(arguments)}: exit status "
                          f"{done.returncode}\n{tail_of(done.stderr)}")
        return done.stdout

    def cases(self, pattern):
        listed = self.call(f"--benchmark_filter={pattern}", "--benchmark_list_tests")
        return list(dict.fromkeys(listed.split()))

    def milliseconds(self, case, counter):
        """Runs one case and returns its counter."""
        if self.current_stamp() != self.stamp:
            raise Failure(f"{self.letter}: {self.path} was rebuilt during the measurement")
        exactly = re.sub(r"([.^$*+?()\[\]{}|\\])", r"\\\1", case)
        with tempfile.TemporaryDirectory() as folder:
            report = pathlib.Path(folder) / "report.json"
            self.call(f"--benchmark_filter=^{exactly}$", f"--benchmark_out={report}",
                      "--benchmark_out_format=json")
            try:
                data = json.loads(report.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise Failure(f"{self.letter}: {case}: no JSON report: {error}") from error
        self.context = {key: data.get("context", {}).get(key, "") for key in CONTEXT}
        found = [run for run in data.get("benchmarks", []) if run.get("name") == case]
        if len(found) != 1:
            raise Failure(f"{self.letter}: {case}: {len(found)} results, not one")
        value = found[0].get(counter)
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise Failure(f"{self.letter}: {case}: counter {counter} is {value}, not a time")
        return float(value)


def common_cases(a, b, pattern):
    """Returns the cases that match pattern; both programs must have all of them."""
    cases_a, cases_b = a.cases(pattern), b.cases(pattern)
    if not cases_a and not cases_b:
        raise Failure(f"no case matches {pattern}")
    lonely = [f"  only in {one.letter}: {case}" for one, mine, others in
              ((a, cases_a, cases_b), (b, cases_b, cases_a)) for case in mine if case not in others]
    if lonely:
        raise Failure("\n".join(["cases that only one program has:", *lonely]))
    return cases_a


def compare(a, b, pattern, pairs, counter):
    """Returns {case: judgement}."""
    cases = common_cases(a, b, pattern)
    programs = {"A": a, "B": b}
    times = {case: {"A": [], "B": []} for case in cases}
    start = time.monotonic()
    for pair in range(pairs):
        for case in cases:
            for letter in order(pair):
                times[case][letter].append(programs[letter].milliseconds(case, counter))
        spent = time.monotonic() - start
        say(f"pair {pair + 1} of {pairs} ({order(pair)}): {spent:.0f} s, "
            f"{spent / (pair + 1) * (pairs - pair - 1):.0f} s to go")
    for key in CONTEXT:
        if a.context[key] != b.context[key]:
            say(f"note: {key} differs: A {a.context[key]!r}, B {b.context[key]!r}")
    return {case: judge(t["A"], t["B"]) for case, t in times.items()}


# Builds.

def git(*arguments, folder):
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(f"git {' '.join(arguments)}: {tail_of(done.stderr)}")
    return done.stdout.strip()


def check_out(commit, source, root):
    """Makes source a worktree of that commit, or finds that it is one."""
    if not source.exists():
        git("worktree", "add", "--force", "--detach", str(source), commit, folder=root)
    elif not (source / ".git").exists() or git("rev-parse", "HEAD", folder=source) != commit:
        raise Failure(f"{source} is not a worktree of {commit}: remove it")
    elif git("status", "--porcelain", folder=source):
        raise Failure(f"{source} has changes: remove it, or measure `worktree`")


def commit_of(name, root):
    """Returns the hash that a commit's name stands for; `worktree` stands for itself."""
    if name == "worktree":
        return name
    return git("rev-parse", "--verify", "--end-of-options", name + "^{commit}", folder=root)


def build(commit, options, root):
    """Builds the target of a commit and returns (program, description)."""
    if commit == "worktree":
        label, description, source = commit, "the working tree", root
    else:
        label = git("rev-parse", "--short", commit, folder=root)
        description = git("log", "-1", "--format=%h %s", commit, folder=root)
        source = root / "build" / "ab" / label / "source"
        check_out(commit, source, root)
    binaries = root / "build" / "ab" / label / options.preset
    binaries.mkdir(parents=True, exist_ok=True)
    log = binaries / "bench_ab.log"
    steps = [["cmake", "--preset", options.preset, "-B", binaries, "-DSATTN_BUILD_TESTS=OFF",
              "-DSATTN_BUILD_EXAMPLES=OFF", "-DSATTN_BUILD_BENCH=ON"],
             ["cmake", "--build", binaries, "--target", options.target, "--parallel",
              str(options.jobs)]]
    say(f"{label}: building {options.target} of {description}")
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        for step in steps:
            done = subprocess.run(step, cwd=source, stdout=output, stderr=subprocess.STDOUT)
            if done.returncode != 0:
                output.flush()
                raise Failure(f"{label}: {' '.join(map(str, step[:3]))} failed:\n"
                              f"{tail_of(log.read_text(encoding='utf-8'))}\nsee {log}")
    say(f"{label}: built in {time.monotonic() - start:.0f} s")
    return binaries / "bench" / options.target, description


# Output.

def print_results(results, pairs, descriptions):
    width = max(len("case"), *map(len, results))
    for letter, description in descriptions.items():
        print(f"{letter}: {description}")
    print(f"{'case':{width}}  {'A ms':>9}  {'B ms':>9}  {'B / A':>6}  {'95 % interval':>16}  "
          "verdict")
    for case, r in results.items():
        low, high = r["interval"]
        print(f"{case:{width}}  {r['a_ms']:9.3f}  {r['b_ms']:9.3f}  {r['ratio']:6.4f}  "
              f"[{low:6.4f}, {high:6.4f}]  {r['verdict']}")
    rank, coverage = interval_rank(pairs)
    print(f"interval: ratios {rank} and {pairs + 1 - rank} of {pairs} in order (sign test), which "
          f"hold the median with {100 * coverage:.1f} %;\nof 100 cases without a difference about "
          f"{100 * (1 - coverage):.0f} get a verdict")


def write_json(file, results, programs, descriptions, options):
    rank, coverage = interval_rank(options.pairs)
    data = {"counter": options.counter, "pairs": options.pairs,
            "interval": {"method": "order statistics (sign test)", "rank": rank,
                         "coverage": coverage},
            **{letter.lower(): {"description": descriptions[letter], "program": str(program.path),
                                "context": program.context}
               for letter, program in programs.items()},
            "cases": [{"case": case, **result} for case, result in results.items()]}
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


# Self-test.

FAKE = """#!{python}
import json, pathlib, random, re, sys
arguments = dict((a + "=").split("=", 1) for a in sys.argv[1:])
cases = {{c: t for c, t in {cases}.items()
          if re.search(arguments["--benchmark_filter"][:-1], c)}}
if "--benchmark_list_tests" in arguments:
    print("\\n".join(cases))
    sys.exit()
if {fails}:
    sys.exit("out of luck")
log = pathlib.Path(__file__).parent / "log"
runs = log.read_text() if log.exists() else ""
log.write_text(runs + "{letter}")
noise = (1 + 0.01 * len(runs)) * random.Random(len(runs)).lognormvariate(0, 0.01)
results = [{{"name": c, "median_ms": t * noise}} for c, t in cases.items()]
report = pathlib.Path(arguments["--benchmark_out"][:-1])
report.write_text(json.dumps({{"context": {{}}, "benchmarks": results}}))
"""


def fake_run(cases_a, cases_b, pattern=".", counter="median_ms", fails=False):
    """Compares two programs that measure nothing; returns (results, the order of the runs)."""
    with tempfile.TemporaryDirectory() as folder:
        programs = []
        for letter, cases in (("A", cases_a), ("B", cases_b)):
            path = pathlib.Path(folder) / letter
            path.write_text(FAKE.format(python=sys.executable, cases=cases, letter=letter,
                                        fails=fails), encoding="utf-8")
            path.chmod(0o755)
            programs.append(Program(letter, path))
        with contextlib.redirect_stderr(io.StringIO()):
            results = compare(*programs, pattern, MIN_PAIRS, counter)
        return results, (pathlib.Path(folder) / "log").read_text(encoding="utf-8")


def synthetic(generator, ratio, pairs):
    """Judges times with noise, spikes of other programs, and a drift of 0.5 % a run."""
    times = {"A": [], "B": []}
    for pair in range(pairs):
        for step, letter in enumerate(order(pair)):
            now = 10 * (1 + 0.005 * (2 * pair + step)) * generator.lognormvariate(0, 0.01)
            spike = 1.3 if generator.random() < 0.1 else 1
            times[letter].append(now * spike * (ratio if letter == "B" else 1))
    return judge(times["A"], times["B"])


def failure_of(*arguments, **options):
    try:
        fake_run(*arguments, **options)
    except Failure as failure:
        return str(failure)
    return "no failure"


def self_test():
    checks = []

    def check(name, good, found):
        checks.append(good)
        if not good:
            print(f"self-test: {name}: {found}")

    for count, rank, coverage in ((6, 1, 0.96875), (10, 2, 0.978516), (20, 6, 0.958611)):
        found = interval_rank(count)
        check(f"rank for {count}", found[0] == rank and abs(found[1] - coverage) < 1e-6, found)

    # A spike on the slower side hides the difference in its pair. The interval bears `rank` - 1 of
    # them: with spikes in 10 % of the runs, 53, 74 and 99 % of the comparisons.
    trials = 400
    for pairs, power in ((6, 0.5), (10, 0.7), (20, 0.95)):
        for ratio, verdict in ((0.9, "faster"), (1.1, "slower"), (1.0, NO_DIFFERENCE)):
            judged = [synthetic(random.Random(i), ratio, pairs) for i in range(trials)]
            covered = sum(j["interval"][0] <= ratio <= j["interval"][1] for j in judged) / trials
            check(f"interval for {ratio}, {pairs} pairs", covered >= CONFIDENCE, covered)
            agreed = sum(j["verdict"] == verdict for j in judged) / trials
            check(f"verdict for {ratio}, {pairs} pairs",
                  agreed >= (CONFIDENCE if ratio == 1 else power), agreed)
            wrong = [j for j in judged if j["verdict"] not in (verdict, NO_DIFFERENCE)]
            check(f"wrong verdict for {ratio}", ratio == 1 or not wrong, wrong)

    two = {"d64/dense": 10.0, "d64/block64/density0.5": 5.0}
    results, log = fake_run(two, {"d64/dense": 8.0, "d64/block64/density0.5": 5.0})
    check("verdicts of programs", [r["verdict"] for r in results.values()] ==
          ["faster", NO_DIFFERENCE], results)
    low, high = results["d64/dense"]["interval"]
    check("interval of programs", low <= 0.8 <= high, results)
    check("order of runs", log == "ABABBABA" * (MIN_PAIRS // 2), log)
    check("filter", list(fake_run(two, two, "dense$")[0]) == ["d64/dense"], "other cases")
    one = {"d64/block64/density0.5": 5.0}
    for name, message, found in [
            ("missing in B", "only in A: d64/dense", failure_of(two, one)),
            ("missing in A", "only in B: d64/dense", failure_of(one, two)),
            ("no case", "no case matches none", failure_of(two, two, "none")),
            ("no counter", "counter best_ms is None", failure_of(two, two, counter="best_ms")),
            ("exit status", "out of luck", failure_of(two, two, fails=True))]:
        check(name, message in found, found)
    print(f"bench_ab: self-test, {len(checks)} checks, {checks.count(False)} failures")
    return 0 if all(checks) else 1


# Command line.

def even_pairs(text):
    count = int(text)
    if count < MIN_PAIRS or count % 2 != 0:
        raise argparse.ArgumentTypeError(f"an even number from {MIN_PAIRS} on, not {text}")
    return count


def parse(arguments):
    parser = argparse.ArgumentParser(prog="bench_ab.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--a", metavar="PROGRAM", help="the program to compare with")
    parser.add_argument("--b", metavar="PROGRAM", help="the program to judge")
    parser.add_argument("--commits", nargs=2, metavar=("A", "B"),
                        help="build the programs of two commits; `worktree` is the working tree")
    parser.add_argument("--target", help="what --commits builds, such as prefill_bench")
    parser.add_argument("--preset", default="release",
                        help="CMake preset of --commits (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(),
                        help="parallel compilations of --commits (default: %(default)s)")
    parser.add_argument("--filter", metavar="REGEX", help="the cases, as for --benchmark_filter")
    parser.add_argument("--pairs", type=even_pairs, default=10,
                        help=f"even, {MIN_PAIRS} or more (default: %(default)s)")
    parser.add_argument("--counter", choices=["median_ms", "best_ms"], default="median_ms",
                        help="what to compare (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path,
                        help="write the results and every single time to FILE")
    parser.add_argument("--self-test", action="store_true", help="test this tool and exit")
    options = parser.parse_args(arguments)
    if options.self_test:
        return options
    if options.commits:
        if options.a or options.b or not options.target:
            parser.error("--commits goes with --target and without --a and --b")
    elif not (options.a and options.b):
        parser.error("give --a and --b, or --commits and --target")
    elif options.target:
        parser.error("--target goes with --commits")
    if not options.filter:
        parser.error("give --filter: all cases would take hours")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"no folder for {options.json}")
    return options


def run(options):
    if options.commits:
        commits = [commit_of(name, ROOT) for name in options.commits]
        built = [build(commit, options, ROOT) for commit in commits]
    else:
        built = [(options.a, options.a), (options.b, options.b)]
    programs = {letter: Program(letter, path) for letter, (path, _) in zip("AB", built)}
    descriptions = {letter: description for letter, (_, description) in zip("AB", built)}
    results = compare(programs["A"], programs["B"], options.filter, options.pairs, options.counter)
    if options.json:
        write_json(options.json, results, programs, descriptions, options)
    print_results(results, options.pairs, descriptions)
    return 0


def main(arguments):
    options = parse(arguments)
    try:
        return self_test() if options.self_test else run(options)
    except (Failure, OSError) as failure:
        say(failure)
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
