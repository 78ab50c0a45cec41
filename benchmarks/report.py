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
STATIC = Path(__file__).resolve().parent / "results" / "static"
"""Counts made without a GPU, by ``step_bytes.py``."""
NOTE = (
    "Medians, at batch 256 unless it says so. Ratios are medians over the rounds that both lines took; ~ marks those "
    "of medians. `groups` is what `cast-fast pretrain` runs by default at these batches; other lines have one group."
)
LOG_LINES = 40
"""How much of the log of a phase that has not ended well is shown."""
FLOAT32_SETTINGS = ("cudnn_allow_tf32", "matmul_allow_tf32", "float32_matmul_precision", "cudnn_benchmark")
"""Keys of an environment's details that say what float32 meant."""


GPU_STATE = ("memory", "utilisation", "SM clock", "temperature", "power")
"""Columns of ``gpu.csv`` after the time."""
FREE_MIB = 1000
"""Memory in use on a GPU that nobody uses is less."""


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


def ratio_of(records: list[Row], top: str, bottom: str) -> Row | None:
    """The record of the rate of one line over that of another, by their rounds in common, else by their medians."""
    rates = {}
    for row in records:
        if row["name"] == "ratio" and row["variant"] == f"{top}/{bottom}" and row["value"] is not None:
            return row
        if row["unit"] == "images/s" and row["value"]:
            rates[row["variant"]] = row["value"]
    if top not in rates or bottom not in rates:
        return None
    return {"value": rates[top] / rates[bottom], "p20": None, "p80": None, "rounds": 0}


def ladder_rows(records: list[Row]) -> list[list[str]]:
    """Table rows of a throughput ladder; ``~`` marks ratios of medians, of lines without a round in common."""
    peaks = {row["variant"]: row["value"] for row in records if row["name"] == "peak_memory"}

    def ratio(top: str, bottom: str) -> str:
        found = ratio_of(records, top, bottom)
        return "–" if found is None else f"{'' if found['rounds'] else '~'}{number(found['value'], 3)}"

    rows = []
    for row in records:
        if row["unit"] != "images/s":
            continue
        rate, name, rounds = row["value"], row["variant"], row.get("rounds")
        peak = peaks.get(name)
        rows.append(
            [
                name,
                number(rate),
                f"{number(row['p20'])}–{number(row['p80'])}",
                ratio(name, "published"),
                ratio(name, "published-amp"),
                ratio("moco", name),
                number(row["fraction_of_bound"], 3),
                "–" if peak is None else f"{peak / 2**30:.2f}",
                "first turn" if rounds == 0 else "–" if rounds is None else str(rounds),
            ]
        )
    return rows


def streaming_lines(records: list[Row]) -> list[str]:
    """What a ladder says about streaming BatchNorm as the default: its gain, and whether four rounds in five show it.

    A gain whose p20 over the rounds is above 1 is one.
    """
    found = []
    for name, base in (("streaming", "kernels"), ("trunk-streaming", "trunk-bound")):
        ratio = ratio_of(records, name, base)
        if ratio is not None:
            apart = "within the spread"
            if not ratio["rounds"]:
                apart = "no round in common, so no verdict"
            elif ratio["p20"] > 1 or ratio["p80"] < 1:
                apart = "gain" if ratio["p20"] > 1 else "loss"
            found.append(f"{name} ÷ {base}: {number(ratio['value'], 4)} ({apart}; {STREAMING_MODEL})")
    return ["; ".join(found) + ".", ""] if found else []


def goal_rows(out: Path) -> list[list[str]]:
    """What the project asks of a GPU, and what the folder answers."""

    def values(phase: str, name: str, **shape: Any) -> dict[str, float]:
        rows = read_records(out / phase / "results.jsonl")
        wanted = (row for row in rows if row["name"] == name and shape.items() <= row["shape"].items())
        return {row["variant"]: row["value"] for row in wanted if row["value"] is not None}

    def ratio(top: float | None, bottom: float | None) -> float | None:
        return top / bottom if top is not None and bottom else None

    ladder = read_records(out / "ladder-256" / "results.jsonl")
    h200 = any("H200" in row["device"] for row in ladder)

    def rates(top: str, bottom: str, records: list[Row] = ladder) -> float | None:
        row = ratio_of(records, top, bottom)
        return None if row is None else row["value"]

    found: list[list[str]] = []

    def goal(
        what: str, value: float | None, *, least: float | None = None, most: float | None = None, here: bool = True
    ) -> None:
        bound = f"at least {least:,g}" if least is not None else "–" if most is None else f"at most {most:,g}"
        verdict = "not measured" if value is None else "–"
        if value is not None and (least is not None or most is not None):
            met = value >= least if least is not None else most is not None and value <= most
            by = abs(value / (least if least is not None else most or 1) - 1)
            verdict = "met" if met else f"missed by {by:.1%}"
        if value is not None and not here:
            verdict = "another GPU, no verdict"
        found.append([what, bound, number(value), verdict])

    step, peak = values("ladder-256", "step"), values("ladder-256", "peak_memory")
    goal("images a second that pretrain trains at by default (groups)", step.get("groups"))
    goal("its rate over published (one group)", rates("groups", "published"))
    goal("rate with BatchNorm over groups over that with one group", rates("groups", "kernels"))
    goal("time of a CAST step over a MoCo step (theory: 1.25)", rates("moco", "kernels"), most=1.27)
    goal("share of the trunk bound", rates("kernels", "trunk-bound"), least=0.95)
    goal("share of the bound of a streaming trunk", rates("streaming", "trunk-streaming"), least=0.95)
    for base, least in (("published", 4.0), ("published-amp", 1.8)):
        goal(f"rate over {base}", rates("kernels", base), least=least)
    goal("images a second, torch.compile (stated for an H200)", step.get("kernels"), least=4080, here=h200)
    goal("gain by streaming BatchNorm", rates("streaming", "kernels"), least=1.09)
    goal("images a second, streaming (stated for an H200)", step.get("streaming"), least=4770, here=h200)
    goal("trunk's traffic, MB an image, streaming (counted)", counted_traffic(), most=340)
    fed = read_records(out / "end-to-end" / "results.jsonl")
    goal("end to end with DALI over the step alone", rates("end-to-end", "groups", fed), least=0.95)
    for line in ("kernels", "streaming"):
        goal(f"peak memory of {line} over published-amp", ratio(peak.get(line), peak.get("published-amp")), most=1.0)
    largest = [row["shape"]["batch"] for row in read_records(out / "memory" / "results.jsonl") if fits(row)]
    goal("largest batch that fits", float(max(largest)) if largest else None)
    loads = values("loader", "loader")
    ours = {name: rate for name, rate in loads.items() if name not in ("torchvision", "albumentations")}
    rate = step.get("groups") or values("end-to-end", "step").get("groups")
    goal("loader's best rate from files over the step's", ratio(_files(ours), rate), least=1.2)
    goal("loader, defaults, over the step's rate", ratio(loads.get("native"), rate), least=1.2)
    goal("share of the GPU's time that the loader takes", values("loader", "loader_gpu_share").get("product"))
    windows = values("loader", "loader_windows")
    goal(
        "windows: NumPy's CPU time over the native operator's",
        ratio(windows.get("numpy"), windows.get("native")),
        least=4,
    )
    elapsed = values("loader", "loader_windows_time")
    goal("windows: the CPU backend's time over the CUDA backend's", ratio(elapsed.get("native"), elapsed.get("cuda")))
    floor = {
        (row["name"], row["shape"].get("N"), row["shape"].get("K")): row["fraction_of_bound"]
        for row in read_records(out / "kernels" / "results.jsonl")
        if row["variant"] == "operator" and row["dtype"] == "bfloat16" and row["fraction_of_bound"]
    }
    for samples, least in ((512, 0.9), (256, 0.75)):
        goal(f"gradcam_cosine, N = {samples}, of its floor", floor.get(("gradcam_cosine", samples, None)), least=least)
    losses = values("kernels", "info_nce", N=256, K=65536)
    goal("info_nce, N = 256, K = 65,536, over eager", ratio(losses.get("eager"), losses.get("operator")), least=3)
    goal("the same, of its floor", floor.get(("info_nce", 256, 65536)), least=round(1 / 1.5, 3))
    return found


def fits(row: Row) -> bool:
    """Whether a record is a step that ran."""
    return row["name"] == "step" and row["variant"] == "groups" and row["value"] is not None


def _files(rates: dict[str, float]) -> float | None:
    """The best rate that reads the images as they are, not shrunk."""
    return max((rate for name, rate in rates.items() if name != "packed-256"), default=None)


def counted_traffic() -> float | None:
    """MB an image of the streaming trunk of ResNet-50, second readings included, by the newest table."""
    for path in sorted(STATIC.glob("torch-*.json"), reverse=True):
        row = json.loads(path.read_text())["rows"].get("resnet50 trunk streaming")
        if row is not None:
            total = row["forward"]["bytes"] + row["backward"]["bytes"] + row["backward"]["second_reading_bytes"]
            return total / row["batch"] / 1e6
    return None


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


def gpu_lines(folder: Path) -> list[str]:
    """What the GPU was like before and after a phase, and a warning where it was not free before."""
    path = folder / "gpu.csv"
    states = path.read_text().split("\n") if path.is_file() else []
    states = [state for state in states if state.count(",") == len(GPU_STATE)]
    if not states:
        return []
    values = [dict(zip(GPU_STATE, map(str.strip, state.split(",")[1:]))) for state in (states[0], states[-1])]
    before, after = (", ".join(f"{key} {value}" for key, value in state.items()) for state in values)
    lines = [f"GPU before: {before}; after: {after}.", ""]
    used = values[0]["memory"].split()[0]
    if used.isdigit() and int(used) > FREE_MIB:
        lines = [f"**The GPU was not free: {values[0]['memory']} were in use before this phase.**", "", *lines]
    return lines


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
    device: list[str] = []
    first: Row = {"device": None, "commit": None}
    lines: list[str] = []
    for name, status, folder in phases(out):
        records = [row for path in sorted(folder.rglob("results.jsonl")) for row in read_records(path)]
        if records and not device:
            first = records[0]
            versions = ", ".join(f"{key} {value}" for key, value in first["versions"].items() if value)
            device = [f"{first['device']}, commit {first['commit']}, {first['date']}; {versions}.", ""]
        lines += [f"## {name}", "", f"{status}", "", *gpu_lines(folder)]
        others = {(row["device"], row["commit"]) for row in records} - {(first["device"], first["commit"])}
        lines += [f"**Not as above: {each}, commit {commit}.**\n" for each, commit in sorted(others)]
        if any(row["name"] == "step" for row in records):
            lines += float32_line(folder)
            columns = ["line", "images/s", "p20–p80", "× published", "× published-amp", "moco ÷ line", "of bound"]
            lines += table([*columns, "peak GiB", "rounds"], ladder_rows(records))
            lines += streaming_lines(records)
            shown = ("peak_memory", "ratio")
            records = [row for row in records if row["unit"] != "images/s" and row["name"] not in shown]
        if records:
            lines += table(["what", "dtype", "shape", "value", "p20–p80", "of bound"], plain_rows(records))
        for extra in sorted(folder.glob("*.md")):
            lines += [extra.read_text().strip(), ""]
        log = (folder / "log.txt").read_text(errors="replace").splitlines()
        tail = log[-LOG_LINES:] if not status.startswith("ok") else [] if records else log[-1:]
        lines += ["```", *tail, "```", ""] if tail else []
    goals = table(["goal", "asked", "measured", "verdict"], goal_rows(out))
    return "\n".join(["# GPU check", "", *device, *goals, NOTE, "", *lines])


def largest_batch(out: Path) -> int:
    """The batch whose step is expected to fill the memory: a straight line through the peaks of two measured batches.

    Raises:
        ValueError: peaks of fewer than two batches, or no memory size, in the folder.
    """
    peaks: dict[int, float] = {}
    for path in out.glob("ladder-*/results.jsonl"):
        for row in read_records(path):
            if (row["name"], row["variant"]) == ("peak_memory", "groups") and row["value"]:
                peaks[row["shape"]["batch"]] = row["value"]
    if len(peaks) < 2:
        raise ValueError(f"peak memory of the line groups: got {len(peaks)} batch sizes, expected two or more")
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
