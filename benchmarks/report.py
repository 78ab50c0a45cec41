"""Sum up what ``gpu_check.sh`` has left in a folder.

    python benchmarks/report.py OUTDIR                    writes OUTDIR/report.md
    python benchmarks/report.py OUTDIR --largest-batch    prints the batch expected to fill the device's memory

Reads JSON lines and text only, no torch, so that it costs nothing between two phases.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HEADROOM = 0.94
"""Share of the memory that a step may fill: the rest is the context, cuDNN's workspaces and fragments."""
BATCH_STEP = 32
STREAMING_MODEL = "the model says 1.04 to 1.07"
"""For a CAST step of ResNet-50 on an A100, H100 or H200; ``traffic_model.py``."""
FLOAT32_SETTINGS = ("cudnn_allow_tf32", "matmul_allow_tf32", "float32_matmul_precision", "cudnn_benchmark")
"""Keys of an environment's details that say what float32 meant."""


def read_records(path: Path) -> list[Row]:
    """The records of a JSON-lines file; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def phases(out: Path) -> Iterator[tuple[str, str, Path]]:
    """Name, status and folder of each phase that has begun, in the order in which they ended."""
    begun = [folder for folder in out.iterdir() if (folder / "log.txt").is_file()]
    for folder in sorted(begun, key=lambda folder: (folder / "log.txt").stat().st_mtime):
        status = folder / "status"
        text = status.read_text().replace("\n", ", ").strip(", ") if status.is_file() else "cut off, not ended"
        yield folder.name, text, folder


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, first column left, others right."""
    align = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in [columns, align, *rows]] + [""]


def number(value: float | None, digits: int = 4) -> str:
    """A number to so many significant digits, ``–`` for none."""
    return "–" if value is None else f"{value:,.{digits}g}" if abs(value) < 10_000 else f"{value:,.0f}"


def ladder_rows(records: list[Row]) -> list[list[str]]:
    """Table rows of a throughput ladder; ratios are those of the medians."""
    rates = {row["variant"]: row["value"] for row in records if row["name"] == "step"}
    peaks = {row["variant"]: row["value"] for row in records if row["name"] == "peak_memory"}

    def ratio(top: float | None, bottom: float | None) -> str:
        return number(top / bottom, 3) if top and bottom else "–"

    rows = []
    for row in records:
        if row["unit"] != "images/s":
            continue
        rate, name = row["value"], row["variant"]
        peak = peaks.get(name)
        rows.append(
            [
                name,
                number(rate),
                f"{number(row['p20'])}–{number(row['p80'])}",
                ratio(rate, rates.get("published")),
                ratio(rate, rates.get("published-amp")),
                ratio(rates.get("moco"), rate),
                number(row["fraction_of_bound"], 3),
                "–" if peak is None else f"{peak / 2**30:.2f}",
                str(row["repeats"]),
            ]
        )
    return rows


def streaming_lines(records: list[Row]) -> list[str]:
    """What a ladder says about streaming BatchNorm as the default: its gain, and whether it is more than the spread."""
    steps = {row["variant"]: row for row in records if row["unit"] == "images/s"}
    found = []
    for name, base in (("streaming", "kernels"), ("trunk-streaming", "trunk-bound")):
        if name in steps and base in steps and steps[base]["value"]:
            new, old = steps[name], steps[base]
            apart = "gain" if new["p20"] > old["p80"] else "loss" if new["p80"] < old["p20"] else "within the spread"
            found.append(f"{name} ÷ {base}: {number(new['value'] / old['value'], 4)} ({apart}; {STREAMING_MODEL})")
    return ["; ".join(found) + ".", ""] if found else []


def plain_rows(records: list[Row]) -> list[list[str]]:
    """Table rows of any other records."""
    return [
        [
            f"{row['name']} {row['variant']}",
            row["dtype"],
            " ".join(f"{key}={value}" for key, value in row["shape"].items()),
            f"{number(row['value'])} {row['unit']}",
            f"{number(row['p20'])}–{number(row['p80'])}",
            number(row["fraction_of_bound"], 3),
        ]
        for row in records
    ]


def float32_line(folder: Path) -> list[str]:
    """What float32 meant in a phase, by the settings in its environment."""
    try:
        details = json.loads((folder / "environment.json").read_text())["details"]
        modes = [f"{key} {details[key]}" for key in FLOAT32_SETTINGS]
    except (OSError, KeyError, json.JSONDecodeError):
        return []
    return [f"float32: {', '.join(modes)}.", ""]


def report(out: Path) -> str:
    """The report as Markdown."""
    lines = ["# GPU check", ""]
    described = False
    for name, status, folder in phases(out):
        records = [row for path in sorted(folder.rglob("results.jsonl")) for row in read_records(path)]
        if records and not described:
            described = True
            first = records[0]
            versions = ", ".join(f"{key} {value}" for key, value in first["versions"].items() if value)
            lines += [f"{first['device']}, commit {first['commit']}, {first['date']}; {versions}.", ""]
        lines += [f"## {name}", "", f"{status}", ""]
        if any(row["name"] == "step" for row in records):
            lines += float32_line(folder)
            columns = ["line", "images/s", "p20–p80", "× published", "× published-amp", "moco ÷ line", "of bound"]
            lines += table([*columns, "peak GiB", "samples"], ladder_rows(records))
            lines += streaming_lines(records)
            records = [row for row in records if row["unit"] != "images/s" and row["name"] != "peak_memory"]
        if records:
            lines += table(["what", "dtype", "shape", "value", "p20–p80", "of bound"], plain_rows(records))
        for extra in sorted(folder.glob("*.md")):
            lines += [extra.read_text().strip(), ""]
        if not records and not status.startswith("ok"):
            tail = (folder / "log.txt").read_text(errors="replace").splitlines()[-15:]
            lines += ["```", *tail, "```", ""]
    return "\n".join(lines)


def largest_batch(out: Path) -> int:
    """The batch whose step is expected to fill the memory: a straight line through the peaks of two measured batches.

    Raises:
        ValueError: peaks of fewer than two batches, or no memory size, in the folder.
    """
    peaks: dict[int, float] = {}
    for path in out.glob("ladder-*/results.jsonl"):
        for row in read_records(path):
            if (row["name"], row["variant"]) == ("peak_memory", "kernels") and row["value"]:
                peaks[row["shape"]["batch"]] = row["value"]
    if len(peaks) < 2:
        raise ValueError(f"peak memory of the line kernels: got {len(peaks)} batch sizes, expected two or more")
    try:
        memory = json.loads((out / "environment" / "environment.json").read_text())["details"]["gpu_memory_bytes"]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError("the environment phase left no size of the device's memory") from error
    low, high = min(peaks), max(peaks)
    per_image = (peaks[high] - peaks[low]) / (high - low)
    if per_image <= 0:
        raise ValueError(f"peak memory does not grow with the batch: {peaks}")
    batch = low + (HEADROOM * memory - peaks[low]) / per_image
    return max(int(batch) // BATCH_STEP * BATCH_STEP, BATCH_STEP)


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; returns the exit code."""
    parser = argparse.ArgumentParser(prog="report.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--largest-batch", action="store_true")
    args = parser.parse_args(argv)
    if not args.out.is_dir():
        print(f"report.py: error: {args.out} is not a folder", file=sys.stderr)
        return 2
    if args.largest_batch:
        try:
            print(largest_batch(args.out))
        except ValueError as error:
            print(error)
            return 1
        return 0
    (args.out / "report.md").write_text(report(args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
