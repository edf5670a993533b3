#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the plots of docs/performance.md from the JSON of prefill_bench, or prints its table.

  build/release/bench/prefill_bench --benchmark_filter=n8192/ --benchmark_out=prefill.json
  tools/plot_bench.py prefill.json                  writes docs/plots/*.svg
  tools/plot_bench.py --out /tmp/plots a.json b.json
  tools/plot_bench.py --table prefill.json          prints a Markdown table of all cases

density_<problem>_n<length>.svg: time over the time of dense attention against executed density, and
below it time over the ideal, which is dense time x density. One panel per head dimension, one
colour per family of patterns. dense_peak.svg: dense attention's fraction of the FMA peak against
length, one line per head dimension.

Several files are one set of cases, of one machine and build. Of repeated cases the median counts.
Plots need matplotlib: the Debian package python3-matplotlib.
"""

import argparse
import json
import math
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONTEXT = ["machine", "compiler", "flags", "kernels"]  # of describe_machine() in bench/support

# Families of patterns in the order of the legend: segment of the name, label, colours. A colour for
# each size of block or kind of slash, in order.
FAMILIES = [
    (r"block(\d+)", "block {}", ["#9ecae1", "#4292c6", "#2166ac", "#08306b"]),
    (r"window\d+", "sliding window", ["#d62728"]),
    (r"vertical_slash(?:_(\w+))?", "vertical-slash {}", ["#a6761d", "#1b9e77", "#66a61e"]),
    (r"token_lists", "token lists", ["#7b3294"]),
]
MARKERS = "s^DvPX*<>ph"  # of the variants: shared, cover64, ...
OVER_LIMIT = 1.7  # what is slower than this times the ideal shows in the upper panel alone
DENSE_MARKERS = "os^DvP"
DENSE_COLOURS = ["#4292c6", "#08306b", "#1b9e77", "#a6761d", "#7b3294", "#d62728"]


class Failure(Exception):
    """What the user has to know."""


def say(text):
    print(f"plot_bench: {text}", file=sys.stderr)


# Reports.

def median(values):
    ordered = sorted(values)
    return (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2


def read_report(file):
    """Returns (context, {name: counters}) of one JSON file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        runs = [run for run in data["benchmarks"] if run.get("run_type") != "aggregate"]
        context = {key: data["context"].get(key, "unknown") for key in CONTEXT}
        repeated = {}
        for run in runs:
            repeated.setdefault(run.get("run_name", run["name"]), []).append(run)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"{file} is not a report of Google Benchmark: {error!r}") from error
    cases = {}
    for name, same in repeated.items():
        numbers = [key for key, value in same[0].items() if isinstance(value, (int, float))]
        values = {key: [run[key] for run in same if key in run] for key in numbers}
        cases[name] = {key: median(v) for key, v in values.items() if all(map(math.isfinite, v))}
    return context, cases


def read_reports(files):
    """Returns (context, {name: counters}) of all files."""
    context, cases = None, {}
    for file in files:
        found, more = read_report(file)
        for key in CONTEXT:
            if context and context[key] != found[key]:
                raise Failure(f"{key} is {context[key]!r} in {files[0]} and {found[key]!r} in "
                              f"{file}")
        context = found
        twice = cases.keys() & more.keys()
        if twice:
            raise Failure(f"{file} has {min(twice)} once more")
        cases |= more
    if not cases:
        raise Failure("no cases")
    return context, cases


def parse_name(name):
    """Returns what a case's name says: problem (such as `prefill f32 g4`), dim, len, family (label,
    index in FAMILIES, kind) or None, variant (what follows the pattern), and words of the name that
    stand for themselves: dense, eigen, smoke, vs_rows, threads2. None if it is no case of attention."""
    case = {"problem": [], "variant": [], "dim": None, "len": None, "family": None, "words": set()}
    for segment in name.split("/"):
        families = [(label, index, match) for index, (regex, label, _) in enumerate(FAMILIES)
                    if (match := re.fullmatch(regex, segment))]
        if match := re.fullmatch(r"d(\d+)(?:_\d+)?", segment):
            case["dim"] = int(match[1])
        elif match := re.fullmatch(r"n(\d+)", segment):
            case["len"] = int(match[1])
        elif re.fullmatch(r"dense|eigen|smoke|vs_rows|threads\d+", segment):
            case["words"].add(segment)
        elif families and not case["family"]:
            label, index, match = families[0]
            kind = (match[1] if match.groups() else None) or ""
            case["family"] = label.format(kind).strip(), index, kind
        elif re.fullmatch(r"density[\d.]+|k\d+", segment):
            pass  # the place on the axis
        elif case["family"]:
            case["variant"].append(segment)
        else:
            case["problem"].append(segment)
    if case["dim"] is None or case["len"] is None:
        return None
    case["problem"] = " ".join(case["problem"])
    case["variant"] = " ".join(case["variant"])
    return case


def relative_time(counters):
    """Time over the time of dense attention, or None."""
    if counters.get("speedup", 0) > 0:
        return 1 / counters["speedup"]
    if counters.get("vs_dense", 0) > 0 and "density" in counters:
        return counters["vs_dense"] * counters["density"]
    return None


def points_of(cases):
    """Returns (sparse, dense): the cases to draw, with their coordinates."""
    sparse, dense, unknown = [], [], []
    for name, counters in cases.items():
        case = parse_name(name)
        if case and case["words"] - {"dense"}:
            continue  # Eigen, smoke, row by row, two threads
        if case is None:
            unknown.append(name)
        elif case["family"] and counters.get("density", 0) > 0 and relative_time(counters):
            x, y = counters["density"], relative_time(counters)
            sparse.append(case | {"x": x, "y": y, "over": y / x})
        elif "dense" in case["words"] and counters.get("peak_fraction", 0) > 0:
            dense.append(case | {"x": case["len"], "y": counters["peak_fraction"]})
        else:
            unknown.append(name)
    if unknown:
        say(f"ignored {len(unknown)} unknown cases: " + ", ".join(unknown[:8]) +
            (", ..." if len(unknown) > 8 else ""))
    if not sparse and not dense:
        raise Failure("nothing to draw: no measured case of dense attention, blocks, windows, "
                      "vertical-slash or token lists")
    return sparse, dense


# Table.

def table_row(name, counters):
    def cell(key, text):
        return text(counters[key]) if key in counters else ""

    def milliseconds(x):
        return f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"

    def ratio(x):
        return f"{x:.2f}"

    cells = [name, cell("median_ms", milliseconds), cell("peak_fraction", ratio),
             cell("speedup", ratio), cell("vs_dense", ratio),
             cell("plan_share", lambda x: f"{100 * x:.1f} %")]
    return "| " + " | ".join(cells) + " |"


def print_table(cases):
    print("| case | ms | peak | speed-up | time / ideal | plan |")
    print("|---|---|---|---|---|---|")
    for name, counters in cases.items():
        print(table_row(name, counters))
    print_break_even(cases)


def break_even(points):
    """The density at which a speed-up falls below 1 for the first time, between two measured ones on
    logarithmic axes; the first or last one measured if it never was above or never falls below.
    `points`: (density, speed-up)."""
    points = sorted(points)
    for (x, y), (next_x, next_y) in zip(points, points[1:]):
        if y >= 1 > next_y:
            share = math.log(y) / math.log(y / next_y)
            return "", x * (next_x / x) ** share
    return ("below ", points[0][0]) if points[0][1] < 1 else ("above ", points[-1][0])


def print_break_even(cases):
    """For each series of lists of k tokens: up to which density selected they beat dense attention,
    and the k that has that density."""
    series = {}
    for name, counters in cases.items():
        match = re.fullmatch(r"(.*/n(\d+)/token_lists)/k\d+(/shared)?", name)
        if match and "speedup" in counters:
            series.setdefault((match[1] + (match[3] or ""), int(match[2])), []).append(counters)
    if series:
        print()
        print("| lists of single rows | break-even, density | k | with planning, density | k |")
        print("|---|---|---|---|---|")
    for (name, length), counters in series.items():
        cells = [name]
        for key in ("speedup", "speedup_planned"):
            bound, density = break_even([(c["density_selected"], c[key]) for c in counters])
            # k keys of every causal row, all of those that have fewer, are 1 - (1 - k / n)^2.
            k = length * (1 - math.sqrt(1 - density))
            cells += [f"{bound}{density:.2f}", f"{bound}{k:,.0f}"]
        print("| " + " | ".join(cells) + " |")


# Plots.

def load_matplotlib():
    try:
        import matplotlib
    except ImportError as error:
        raise Failure(f"{sys.executable} has no matplotlib: install the Debian package "
                      "python3-matplotlib, and use /usr/bin/python3") from error
    matplotlib.use("svg")
    matplotlib.rcParams.update({
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "sattn",
        "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#555555",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e4e4e4",
        "legend.frameon": False,
        "legend.fontsize": 9,
        "figure.facecolor": "white",
    })
    import matplotlib.pyplot
    return matplotlib.pyplot


def machine_line(context):
    machine = context["machine"].strip()
    if match := re.fullmatch(r"(\d+) +(\d+) +(.*)", machine):
        machine = f"{match[3]} (family {match[1]}, model {match[2]})"
    return f"{machine}, {context['kernels']} kernels, {context['compiler']} {context['flags']}"


def natural(text):
    """Sorts n1024 before n8192 and block16 before block128."""
    return [(int(number or 0), word) for number, word in re.findall(r"(\d+)|(\D+)", text)]


def colours_of(points):
    """Returns {label of a family: colour} in the order of the legend."""
    families = sorted({p["family"] for p in points}, key=lambda f: (f[1], natural(f[2])))
    colours, used = {}, [0] * len(FAMILIES)
    for label, index, _ in families:
        palette = FAMILIES[index][2]
        colours[label] = palette[used[index] % len(palette)]
        used[index] += 1
    return colours


def log_ticks(axis):
    from matplotlib import ticker
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def titles(figure, title, context):
    """Puts the title at the left, at the same distance from the top for any height."""
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.17 / height, title, fontsize=12, fontweight="bold", va="top")
    figure.text(0.02, 1 - 0.46 / height, machine_line(context), fontsize=8, color="#555555",
                va="top")


def limits(values):
    return 0.8 * min(values), 1.25 * max(values)


def marker_style(variant, colour, markers):
    """Filled without a suffix, hollow with one: `cover` often is where the plain pattern is."""
    return {"marker": markers[variant] if variant else "o", "markersize": 6,
            "markerfacecolor": "none" if variant else colour, "markeredgecolor": colour,
            "markeredgewidth": 1.4 if variant else 0.5}


def draw_series(panel, points, y, colours, markers):
    """Draws p[y] over density; a line joins the points of a family and variant."""
    series = {}
    for p in points:
        series.setdefault((p["family"][0], p["variant"]), []).append((p["x"], p[y]))
    long_ones_first = sorted(series.items(), key=lambda item: -len(item[1]))
    for (family, variant), places in long_ones_first:
        colour = colours[family]
        panel.plot(*zip(*sorted(places)), color=colour, linewidth=1.2,
                   linestyle="-" if len(places) > 1 else "",
                   **marker_style(variant, colour, markers))


def density_legend(panel, points, colours, markers):
    from matplotlib.lines import Line2D
    families = {p["family"][0] for p in points}
    variants = {p["variant"] for p in points}
    handles = [Line2D([], [], color="#555555", linestyle="--", label="linear (ideal)"),
               Line2D([], [], color="#999999", label="dense attention")]
    handles += [Line2D([], [], color=colour, linewidth=4, label=family)
                for family, colour in colours.items() if family in families]
    if len(variants) > 1:
        handles += [Line2D([], [], linestyle="", label=variant or "no suffix",
                           **marker_style(variant, "#555555", markers))
                    for variant in sorted(variants, key=natural)]
    panel.legend(handles=handles, loc="upper left", borderaxespad=0, handlelength=1.8)
    panel.axis("off")


def draw_density(plt, points, colours, markers, title, context):
    """For each head dimension a panel of times, and below it one of times over the ideal."""
    dims = sorted({p["dim"] for p in points})
    width = 3.9 * len(dims) + 2.9
    figure, axes = plt.subplots(
        2, len(dims) + 1, figsize=(width, 7.4), squeeze=False,
        gridspec_kw={"width_ratios": [1] * len(dims) + [0.55], "height_ratios": [1.25, 1],
                     "left": 0.8 / width, "right": 1 - 0.2 / width, "bottom": 0.08, "top": 0.87,
                     "wspace": 0.1, "hspace": 0.12})
    x_limits = limits([p["x"] for p in points] + [1.0])
    y_limits = limits([p["y"] for p in points] + [1.0, min(p["x"] for p in points)])
    near = [p["over"] for p in points if p["over"] <= OVER_LIMIT] + [1.0]
    for column, dim in enumerate(dims):
        upper, lower = axes[0][column], axes[1][column]
        here = [p for p in points if p["dim"] == dim]
        upper.set(xscale="log", yscale="log", xlim=x_limits, ylim=y_limits, title=f"d = {dim}")
        lower.set(xscale="log", xlim=x_limits, ylim=(min(near) - 0.05, max(near) + 0.1),
                  xlabel="executed density (computed / legal pairs)")
        for axis in (upper.xaxis, upper.yaxis, lower.xaxis):
            log_ticks(axis)
        upper.plot(x_limits, x_limits, "--", color="#555555", linewidth=1.2)
        upper.axhline(1, color="#999999", linewidth=1)
        lower.axhline(1, linestyle="--", color="#555555", linewidth=1.2)
        draw_series(upper, here, "y", colours, markers)
        draw_series(lower, [p for p in here if p["over"] <= OVER_LIMIT], "over", colours, markers)
        beyond = sum(p["over"] > OVER_LIMIT for p in here)
        if beyond:
            lower.text(0.02, 0.98, f"not shown: {beyond} beyond {OVER_LIMIT}", fontsize=8,
                       color="#555555", va="top", transform=lower.transAxes)
        upper.tick_params(labelbottom=False, labelleft=column == 0)
        lower.tick_params(labelleft=column == 0)
    axes[0][0].set_ylabel("time / time of dense attention")
    axes[1][0].set_ylabel("time / ideal time")
    axes[1][-1].axis("off")
    density_legend(axes[0][-1], points, colours, markers)
    titles(figure, f"{title}: time against density", context)
    return figure


def draw_peak(plt, points, context):
    figure, axes = plt.subplots(figsize=(6.6, 4.4))
    figure.subplots_adjust(left=0.1, right=0.96, bottom=0.13, top=0.83)
    lengths = sorted({p["len"] for p in points})
    series = {}
    for p in points:
        series.setdefault((p["problem"], p["dim"]), []).append((p["x"], p["y"]))
    problems = sorted({problem for problem, _ in series})
    for i, ((problem, dim), places) in enumerate(sorted(series.items())):
        label = f"d = {dim}" if len(problems) == 1 else f"{problem}, d = {dim}"
        axes.plot(*zip(*sorted(places)), label=label, markersize=6, linewidth=1.6,
                  color=DENSE_COLOURS[i % len(DENSE_COLOURS)],
                  marker=DENSE_MARKERS[i % len(DENSE_MARKERS)])
    axes.axhline(1, color="#555555", linestyle="--", linewidth=1.2, label="FMA peak (ideal)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set(ylim=(0, 1.05), xlim=(lengths[0] / 1.2, lengths[-1] * 1.2),
             xlabel="length n (tokens)", ylabel="fraction of FMA peak")
    axes.legend(loc="lower right")
    only = f"{problems[0].capitalize()}, dense" if len(problems) == 1 else "Dense"
    titles(figure, f"{only} attention: fraction of peak against length", context)
    return figure


def write(plt, figure, file):
    figure.savefig(file, metadata={"Date": None, "Creator": "tools/plot_bench.py"})
    plt.close(figure)
    print(f"wrote {file} ({file.stat().st_size / 1000:.0f} kB)")


def write_plots(context, cases, folder):
    sparse, dense = points_of(cases)
    plt = load_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    colours = colours_of(sparse)
    variants = sorted({p["variant"] for p in sparse} - {""}, key=natural)
    markers = {variant: MARKERS[i % len(MARKERS)] for i, variant in enumerate(variants)}
    for problem, length in sorted({(p["problem"], p["len"]) for p in sparse}):
        points = [p for p in sparse if (p["problem"], p["len"]) == (problem, length)]
        name = re.sub(r"\W+", "_", f"density_{problem}_n{length}")
        title = f"{problem.capitalize()}, n = {length:,}"
        write(plt, draw_density(plt, points, colours, markers, title, context),
              folder / f"{name}.svg")
    if dense:
        write(plt, draw_peak(plt, dense, context), folder / "dense_peak.svg")


def main(arguments):
    parser = argparse.ArgumentParser(prog="plot_bench.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", metavar="JSON", type=pathlib.Path,
                        help="what --benchmark_out of prefill_bench wrote")
    parser.add_argument("--out", metavar="FOLDER", type=pathlib.Path,
                        default=ROOT / "docs" / "plots", help="where to (default: docs/plots)")
    parser.add_argument("--table", action="store_true", help="print a table instead of plots")
    options = parser.parse_args(arguments)
    try:
        context, cases = read_reports(options.reports)
        if options.table:
            print_table(cases)
        else:
            write_plots(context, cases, options.out)
    except (Failure, OSError) as failure:
        say(failure)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
