"""Turns pytest-benchmark files into a Markdown table, a JSON file and a plot.

    python bench/report.py run-default.json run-recycled.json --readme README.md

writes bench/results/<machine>/{report.md, report.json, report.svg} and replaces the section of
README.md between the bench markers. Records of several runs are merged: the same operation, case,
threads and allocator in a later file replaces the earlier one.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

START = "<!-- bench:start -->"
END = "<!-- bench:end -->"
OURS = "batchops"
# Below this ratio a row is marked: slower than the peer by more than the noise of a median.
SLOWER = 0.97


def case_label(record: Record) -> str:
    return ", ".join(record["case"].values()) or "-"


def key(record: Record) -> tuple[Any, ...]:
    return (
        record["op"],
        tuple(record["case"].items()),
        record["device"],
        record["threads"],
        record["allocator"],
    )


def load(paths: Iterable[Path]) -> tuple[dict[str, Any], list[Record]]:
    """The machine and the merged records of the files, in order of first appearance."""
    machine: dict[str, Any] = {}
    records: dict[tuple[Any, ...], Record] = {}
    for path in paths:
        stored = json.loads(path.read_text())
        this = {k: v for k, v in stored["machine_info"].items() if k != "allocator"}
        if machine and this != machine:
            raise SystemExit(f"report: {path} comes from another machine or torch than the others")
        machine = this
        for bench in stored["benchmarks"]:
            record = {
                **bench["extra_info"],
                "name": bench["fullname"],
                "when": stored["datetime"],
            }
            if "ratio" in record or "errors" in record:
                record["case"] = {k: str(v) for k, v in record["case"].items()}
                records[key(record)] = record
    return machine, list(records.values())


def peer_names(records: Sequence[Record]) -> list[str]:
    names: dict[str, None] = {}
    for record in records:
        names |= dict.fromkeys([*record["ratio"], *record["skipped"]])
    return list(names)


def ratio_text(record: Record, peer: str) -> str:
    """`1.52 (1.50–1.55)`: median and quartiles of the rounds' ratios; marked where slower."""
    if peer not in record["ratio"]:
        return "skipped" if peer in record["skipped"] else ""
    ratio = record["ratio"][peer]
    low, high = record["ratio_quartiles"][peer]
    text = f"{ratio:.2f} ({low:.2f}–{high:.2f})"
    return f"**{text}** ▼" if ratio < SLOWER else text


def row(record: Record, peers: Sequence[str]) -> list[str]:
    gbps = record.get("gbps", {}).get(OURS)
    fraction = record.get("fraction_of_floor", {}).get(OURS)
    items = record.get("items_per_s", {}).get(OURS)
    memory = record.get("memory_bytes", {})
    return [
        case_label(record),
        str(record["threads"]),
        record["allocator"],
        f"{record['median_us'][OURS]:,.1f}",
        f"{100 * record['spread'][OURS]:.0f} %",
        *(ratio_text(record, peer) for peer in peers),
        "" if gbps is None else f"{gbps:.1f}",
        "" if fraction is None else f"{100 * fraction:.0f} %",
        "" if items is None else f"{items:,.0f}",
        memory_text(memory),
    ]


def memory_text(memory: dict[str, int]) -> str:
    """`812 MB (torch 1.31×)`: what a call of ours takes at its height, and each peer's over it."""
    if not memory:
        return ""
    ours = memory[OURS]
    others = [f"{name} {n / max(ours, 1):.2f}×" for name, n in memory.items() if name != OURS]
    return f"{ours / 1e6:,.0f} MB ({', '.join(others)})"


def by_op(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["op"], []).append(record)
    return groups


def table(records: Sequence[Record]) -> list[list[str]]:
    """Header and rows for one operation; columns that no row fills are left out."""
    peers = peer_names(records)
    header = [
        "case",
        "threads",
        "allocator",
        "batchops µs",
        "spread",
        *(f"× {peer}" for peer in peers),
        "GB/s",
        "of floor",
        "items/s",
        "memory at its height",
    ]
    rows = [row(record, peers) for record in records]
    used = [i for i in range(len(header)) if any(r[i] for r in rows)]
    return [[line[i] for i in used] for line in [header, *rows]]


def error_table(records: Sequence[Record]) -> list[list[str]]:
    """Header and rows of errors: a column for each output and side."""
    columns = {
        (output, side): None
        for record in records
        for output in next(iter(record["errors"].values()))
        for side in record["errors"]
    }
    rows = [
        [case_label(record), *(f"{record['errors'][side][output]:.1e}" for output, side in columns)]
        for record in records
    ]
    return [["case", *(f"{output}, {side}" for output, side in columns)], *rows]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def error_text_table(records: Sequence[Record]) -> str:
    return "\n".join(["", *aligned(error_table(records))])


def text_table(records: Sequence[Record]) -> str:
    """The tables as aligned plain text, for the terminal."""
    out: list[str] = []
    for op, group in by_op(records).items():
        out += ["", op, *aligned(table(group))]
        reasons = {f"{n}: {why}" for r in group for n, why in r["skipped"].items()}
        out += [f"  skipped {reason}" for reason in sorted(reasons)]
    return "\n".join(out)


def markdown_table(lines: Sequence[Sequence[str]]) -> list[str]:
    header, *rows = lines
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(line) + " |" for line in [header, rule, *rows]]


def machine_name(machine: dict[str, Any]) -> str:
    """Folder name under results/: model, instruction set (virtual machines hide the model), cores
    and GPU, lower case with hyphens."""
    cpu, isa, cores = (machine[key] for key in ("cpu", "cpu_capability", "cores"))
    parts = [str(cpu), str(isa), f"{cores}-cores", machine.get("gpu") or ""]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def describe(machine: dict[str, Any]) -> str:
    gpu = f", {machine['gpu']}" if machine.get("gpu") else ""
    cache = machine["last_level_cache_bytes"] / 2**20
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_capability']}, "
        f"last-level cache {cache:.0f} MiB{gpu}; {machine['system']}, Python {machine['python']}, "
        f"torch {machine['torch']}"
    )


def floors(records: Iterable[Record]) -> str:
    """The measured copy bandwidths that the fractions refer to."""
    seen: dict[tuple[str, int], list[float]] = {}
    for record in records:
        if "floor_gbps" in record:
            at = (record["device"], record["threads"])
            seen.setdefault(at, []).append(record["floor_gbps"])
    return "; ".join(
        f"{device}, {threads} thread{'s' if threads > 1 else ''}: {min(v):.1f}"
        + (f"–{max(v):.1f}" if max(v) - min(v) >= 0.05 else "")
        + " GB/s"
        for (device, threads), v in sorted(seen.items())
    )


def markdown(
    machine: dict[str, Any],
    records: Sequence[Record],
    plot: str | None,
    errors: Sequence[Record] = (),
) -> str:
    lines = [
        "# Benchmarks",
        "",
        describe(machine) + ".",
        "",
        "`× peer` is the peer's time over ours, the median over interleaved rounds with its "
        "quartiles: above 1, batchops is faster; ▼ marks rows below "
        f"{SLOWER}. `spread` is the interquartile range of our time over its median. `GB/s` counts "
        "the bytes that must move, `of floor` compares with a large copy right before and after "
        f"({floors(records) or 'not measured'}); it passes 100 % where an output small enough for "
        "the cache is overwritten before it leaves it, or where a kernel writes past the cache, "
        "which torch's copy does not. Allocator `default` pays page faults for "
        "large outputs, `recycled` keeps its pages. All sides have the same number of threads.",
        "",
    ]
    if plot:
        lines += [f"![Ratios to the peers]({plot})", ""]
    for op, group in by_op(records).items():
        lines += [f"## {op}", "", *markdown_table(table(group)), ""]
        reasons = {f"{n}: {why}" for r in group for n, why in r["skipped"].items()}
        lines += [f"Skipped {reason}." for reason in sorted(reasons)]
        lines += [""] if reasons else []
    if errors:
        about = (
            "‖got − exact‖ / ‖exact‖ against float64 that starts from the same inputs; mean/σ of x."
        )
        lines += ["## accuracy", "", about, "", *markdown_table(error_table(errors)), ""]
    return "\n".join(lines)


def summary(
    machine: dict[str, Any], records: Sequence[Record], folder: str, plot: str | None
) -> str:
    """README's section: for each operation and peer the worst, middle and best ratio."""
    header = ["operation", "against", "threads", "allocator", "cases", "worst", "median", "best"]
    groups: dict[tuple[str, str, int, str], list[float]] = {}
    for record in records:
        for peer, ratio in record["ratio"].items():
            at = (record["op"], peer, record["threads"], record["allocator"])
            groups.setdefault(at, []).append(ratio)
    rows = [
        [
            op,
            peer,
            str(threads),
            allocator,
            str(len(ratios)),
            *(f"{f(ratios):.2f}" for f in (min, statistics.median, max)),
        ]
        for (op, peer, threads, allocator), ratios in sorted(groups.items())
    ]
    return "\n".join(
        [
            f"Ratios (peer's time / ours) on {describe(machine)}. Every row of every case: "
            f"[{folder}/report.md]({folder}/report.md).",
            "",
            *markdown_table([header, *rows]),
            *([f"\n![Ratios, case by case]({folder}/{plot})"] if plot else []),
        ]
    )


def plot_ratios(records: Sequence[Record], path: Path) -> bool:
    """One panel an operation, a dot a case and peer on a logarithmic axis. False: no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The same run gives the same file: no date, no random identifiers.
    matplotlib.rcParams["svg.hashsalt"] = "batchops"
    groups = {op: [r for r in g if r["ratio"]] for op, g in by_op(records).items()}
    groups = {op: g for op, g in groups.items() if g}
    if not groups:
        return False
    columns = min(3, len(groups))
    panel_rows = math.ceil(len(groups) / columns)
    figure, axes = plt.subplots(
        panel_rows, columns, figsize=(4.6 * columns, 2.6 * panel_rows), squeeze=False
    )
    styles = sorted({(p, r["allocator"]) for g in groups.values() for r in g for p in r["ratio"]})
    colors = {style: f"C{i % 10}" for i, style in enumerate(styles)}
    for axis, (op, group) in zip(axes.flat, groups.items(), strict=False):
        for style in styles:
            peer, allocator = style
            values = sorted(
                r["ratio"][peer]
                for r in group
                if r["allocator"] == allocator and peer in r["ratio"]
            )
            if values:
                shares = [(i + 0.5) / len(values) for i in range(len(values))]
                axis.plot(values, shares, "o", ms=3.5, alpha=0.8, color=colors[style])
        axis.axvline(1.0, color="black", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axis.set_title(op, fontsize=9)
        axis.set_ylim(0, 1)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", lw=0.3)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for column in range(columns):
        axes[-1][column].set_xlabel("peer's time / ours", fontsize=8)
    for line in axes:
        line[0].set_ylabel("share of cases", fontsize=8)
    handles = [
        plt.Line2D([], [], marker="o", ls="", color=colors[s], label=f"{s[0]}, {s[1]}")
        for s in styles
    ]
    figure.legend(handles=handles, loc="lower center", ncols=min(4, len(handles)), fontsize=8)
    figure.tight_layout(rect=(0, 0.06 if panel_rows > 1 else 0.12, 1, 1))
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return True


def fill(readme: Path, section: str) -> None:
    """Replaces what stands between the markers of `readme`."""
    text = readme.read_text()
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise SystemExit(f"report: {readme} must hold {START} and then {END}, once each")
    head, rest = text.split(START)
    tail = rest.split(END)[1]
    readme.write_text(f"{head}{START}\n\n{section}\n\n{END}{tail}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="files of --benchmark-json")
    parser.add_argument(
        "--name", help="folder under the results; default: CPU, its instruction set, cores, GPU"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--readme", type=Path, help="file whose bench section is to be replaced")
    options = parser.parse_args(arguments)

    machine, records = load(options.runs)
    errors = [record for record in records if "errors" in record]
    records = [record for record in records if "ratio" in record]
    if not records:
        raise SystemExit("report: the files hold no record of the pair fixture")
    if options.name is None:
        options.name = machine_name(machine)
    folder = options.out / options.name
    folder.mkdir(parents=True, exist_ok=True)
    plot = "report.svg" if plot_ratios(records, folder / "report.svg") else None
    (folder / "report.md").write_text(markdown(machine, records, plot, errors))
    stored = {"machine": machine, "records": records, "errors": errors}
    (folder / "report.json").write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    if options.readme:
        relative = f"bench/results/{options.name}"
        fill(options.readme, summary(machine, records, relative, plot))
    print(text_table(records))
    print(f"\nwritten: {folder}/report.md, report.json" + (f", {plot}" if plot else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
