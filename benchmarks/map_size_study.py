"""How small may stored saliency maps be? What ``cast-fast prepare`` should do by default, measured.

    python benchmarks/map_size_study.py [--images DIR --saliency DIR] [--scenes N] [--out FILE]

For every map and every way of storing it (longest side, format) the crop rule runs with the same random numbers on the
full and on the stored map, and the attention targets of the same windows are computed from both. Reported per data set
and way of storing:

windows_iou            overlap (intersection over union, in shares of the image) of the windows chosen from the full and
                       from the stored map; mean, and the share of windows below 0.9 and below 0.5
fallback_changed       share of windows that are the fallback with one map and not with the other
constraint_held        share of accepted windows from the stored map that hold phi_eff of the FULL map's salient pixels
least_held_ratio       the worst of them: salient share held over the share demanded
pairs_share            share of pairs chosen from the stored map that share salient pixels of the FULL map
target_error           absolute difference of the 7x7 targets, mean over cells; p99 over samples of a sample's mean
target_cosine          cosine of the two targets: mean, and the lowest 1 %
mask_error             share of the key mask's 224x224 pixels that differ
bytes                  of a stored map, mean

Decode cost is CPU time of the whole process for DALI to turn stored bytes into a map, as the loader does it (raw maps
are handed over, nothing is decoded), in interleaved rounds with the others; the hand-over alone is a line of its own.
CPU time, because wall time depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn as dali_fn
from nvidia.dali import pipeline_def, types
from PIL import Image
from rich.progress import track

from cast_fast.data import layout, sampling
from cast_fast.data.pack_sample import decode_stored, encode_map, shrink_map
from cast_fast.data.saliency_crop import AREA_MIN, THRESHOLD, CropRule, Windows, crop_windows, overlaps
from cast_fast.data.synthetic import make_scene
from cast_fast.errors import UserError

fn: Any = dali_fn

SIDES = (80, 112, 160, 224, 320)
FORMATS = ("npy", "jpeg")
"""PNG is as exact as npy: only its bytes and its decode cost are measured."""
GRID = (7, 7)
MASK = 224
SEED = 4

_COLUMNS = {
    "windows_iou_below_0.9": "IoU < 0.9",
    "fallback_changed": "fallback",
    "constraint_held": "held",
    "least_held_ratio": "least",
    "pairs_share": "share",
    "target_error_mean": "target",
    "target_cosine_p1": "cosine",
    "mask_error_mean": "mask",
    "bytes_mean": "bytes",
}

Mask = NDArray[np.bool_]
Corners = NDArray[np.float64]


def integral(mask: Mask) -> NDArray[np.float64]:
    """Summed area (H + 1, W + 1)."""
    table = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    table[1:, 1:] = mask.cumsum(0, dtype=np.int64).cumsum(1)
    return table


def cell_shares(table: NDArray[np.float64], corners: Corners, grid: tuple[int, int] = GRID) -> NDArray[np.float64]:
    """Exact salient share of each cell of a grid laid over a window.

    Args:
        table: from `integral`.
        corners: (4,) y0, x0, y1, x1 as shares of the map's sides.
    """
    height, width = table.shape[0] - 1, table.shape[1] - 1
    y = np.linspace(corners[0] * height, corners[2] * height, grid[0] + 1)
    x = np.linspace(corners[1] * width, corners[3] * width, grid[1] + 1)
    y0, x0 = np.minimum(y.astype(int), height - 1), np.minimum(x.astype(int), width - 1)
    fy, fx = (y - y0)[:, None], (x - x0)[None, :]
    # the integral of a piecewise constant function is bilinear between the corners of a pixel
    rows = table[y0] * (1 - fy) + table[y0 + 1] * fy
    area = rows[:, x0] * (1 - fx) + rows[:, x0 + 1] * fx
    cells = area[1:, 1:] - area[:-1, 1:] - area[1:, :-1] + area[:-1, :-1]
    return cells / ((y[1] - y[0]) * (x[1] - x[0]))


def key_mask(mask: Mask, corners: Corners) -> Mask:
    """(224, 224): the window resized, salient where at least half of a pixel is (antialiased, as the loader does)."""
    height, width = mask.shape
    top, left, bottom, right = corners
    picture = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))
    box = (left * width, top * height, right * width, bottom * height)
    return np.asarray(picture.resize((MASK, MASK), Image.Resampling.BILINEAR, box=box)) > 127


def iou(first: Corners, second: Corners) -> float:
    """Intersection over union of two windows given by their corners."""
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    shared = float(np.prod(np.maximum(high - low, 0)))
    areas = float(np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]))
    return shared / (areas - shared)


def on_grid(corners: NDArray[np.float32], shape: tuple[int, int], like: Windows) -> Windows:
    """Windows in whole pixels of another grid."""
    scaled = np.rint(corners.astype(np.float64) * np.array([*shape, *shape])).astype(np.int32)
    scaled[:, 2:] -= scaled[:, :2]
    return like._replace(query=scaled[0], key=scaled[1])


class Tally:
    """What is gathered over the maps of a data set for one way of storing them."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def summary(self) -> dict[str, float]:
        array = {name: np.array(values) for name, values in self.values.items()}
        return {
            "windows": len(array["iou"]),
            "windows_iou_mean": float(array["iou"].mean()),
            "windows_iou_below_0.9": float((array["iou"] < 0.9).mean()),
            "windows_iou_below_0.5": float((array["iou"] < 0.5).mean()),
            "fallback_changed": float(array["fallback_changed"].mean()),
            "constraint_held": float((array["held_ratio"] >= 1).mean()),
            "least_held_ratio": float(array["held_ratio"].min()),
            "pairs_share": float(array["share"].mean()),
            "target_error_mean": float(array["target_error"].mean()),
            "target_error_p99": float(np.percentile(array["target_error"], 99)),
            "target_cosine_mean": float(array["cosine"].mean()),
            "target_cosine_p1": float(np.percentile(array["cosine"], 1)),
            "mask_error_mean": float(array["mask_error"].mean()),
            "mask_error_p99": float(np.percentile(array["mask_error"], 99)),
            "bytes_mean": float(array["bytes"].mean()),
            "vanished": int(array["vanished"].sum()),
        }


def compare(full: Mask, stored: bytes, suffix: str, randoms: NDArray[np.float64], tally: Tally, pairs: int) -> None:
    """Adds one map to a tally."""
    small = decode_stored(stored, suffix)
    tally.add(bytes=len(stored), vanished=float(not (small > THRESHOLD).any()))
    if not (small > THRESHOLD).any():  # prepare then stores a larger one
        return
    rule = CropRule()
    values = full.astype(np.uint8) * np.uint8(255)
    total = int(full.sum())
    demanded = min(rule.phi, AREA_MIN * full.size / total)
    table, small_table = integral(full), integral(small > THRESHOLD)
    for random in randoms[:pairs]:
        own, other = crop_windows(values, random, rule), crop_windows(small, random, rule)
        corners = own.relative(*full.shape).astype(np.float64)
        moved = other.relative(*small.shape).astype(np.float64)
        for which in (0, 1):
            tally.add(
                iou=iou(corners[which], moved[which]),
                fallback_changed=float(own.fallback[which] != other.fallback[which]),
            )
            if not other.fallback[which]:
                held = cell_shares(table, moved[which], (1, 1))[0, 0] * np.prod(moved[which][2:] - moved[which][:2])
                tally.add(held_ratio=float(held * full.size / total / demanded))
        tally.add(share=float(overlaps(values, on_grid(moved.astype(np.float32), full.shape, other))))
        target, stored_target = cell_shares(table, moved[0]), cell_shares(small_table, moved[0])
        norms = float(np.linalg.norm(target) * np.linalg.norm(stored_target))
        cosine = float((target * stored_target).sum()) / norms if norms > 0 else float(norms == 0)
        tally.add(target_error=float(np.abs(target - stored_target).mean()), cosine=cosine)
        mask_error = key_mask(full, moved[1]) != key_mask(small > THRESHOLD, moved[1])
        tally.add(mask_error=float(mask_error.mean()))


@pipeline_def(batch_size=64, num_threads=1, prefetch_queue_depth=1, seed=0)
def _pipeline(feed: Iterable[list[NDArray[np.uint8]]], decode: bool, ndim: int) -> Any:
    data = fn.external_source(feed, batch=True, dtype=types.UINT8, ndim=ndim)
    return fn.decoders.image(data, output_type=types.GRAY) if decode else fn.copy(data)


def decode_costs(maps: Sequence[Mask], rounds: int) -> dict[str, dict[str, float]]:
    """CPU microseconds a map, by what is stored."""
    ways: dict[str, tuple[list[NDArray[np.uint8]], bool]] = {}

    def add(name: str, contents: list[bytes], decode: bool) -> None:
        ways[name] = [np.frombuffer(content, np.uint8) for content in contents], decode

    for side in (0, 160, 224):
        small = [shrink_map(mask, side or max(mask.shape)) for mask in maps]
        name = f"{side}" if side else "full size"
        for kind in ("png", "jpeg"):
            add(f"{kind} {name}", [encode_map(values, kind).content for values in small], True)
        ways[f"raw {name}"] = [np.ascontiguousarray(values[:, :, None]) for values in small], False
    jpegs = ways["jpeg 160"][0]
    ways["hand-over of jpeg 160, not decoded"] = jpegs, False

    pipelines: dict[str, Any] = {}
    for name, (contents, decode) in ways.items():
        batch = [contents[i % len(contents)] for i in range(64)]
        pipelines[name] = _pipeline(itertools.repeat(batch), decode, contents[0].ndim, device_id=None)
        pipelines[name].build()
        pipelines[name].run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, pipeline in pipelines.items():
            start = time.process_time()
            for _ in range(4):
                pipeline.run()
            seconds[name].append((time.process_time() - start) / (4 * 64))
    costs = {}
    for name, values in seconds.items():
        p20, p50, p80 = (1e6 * harness.percentile(values, q) for q in (20, 50, 80))
        mean_bytes = float(np.mean([content.nbytes for content in ways[name][0]]))
        costs[name] = {"cpu_us_p20": p20, "cpu_us": p50, "cpu_us_p80": p80, "bytes": mean_bytes}
    return costs


def real_maps(images: Path, saliency: Path, limit: int) -> list[Mask]:
    """Binarised maps of a folder dataset, evenly spread over it."""
    dataset = layout.scan(images, saliency)
    samples = [sample for sample in dataset.samples if not sample.empty]
    step = max(1, len(samples) // limit)
    contents = [layout.read_bytes(sample.saliency) for sample in samples[::step][:limit] if sample.saliency]
    return [np.asarray(Image.open(io.BytesIO(content))) > THRESHOLD for content in contents]


def study(maps: Sequence[Mask], pairs: int, text: str) -> dict[str, dict[str, float]]:
    """The drift of every way of storing over a data set."""
    tallies = {f"{kind} {side}": Tally() for side in SIDES for kind in FORMATS}
    for number, mask in enumerate(track(maps, text, disable=not sys.stderr.isatty())):
        randoms = sampling.draw(SEED, np.arange(number * pairs, (number + 1) * pairs)).windows
        for side in SIDES:
            values = shrink_map(mask, min(side, max(mask.shape)))
            for kind in FORMATS:
                stored = encode_map(values, kind)
                compare(mask, stored.content, stored.suffix, randoms, tallies[f"{kind} {side}"], pairs)
    return {name: tally.summary() for name, tally in tallies.items()}


def main() -> int:
    """Runs the study, prints its tables and writes the JSON file."""
    parser = argparse.ArgumentParser(description="how small stored saliency maps may be")
    parser.add_argument("--images", type=Path, help="folder of photographs")
    parser.add_argument("--saliency", type=Path, help="folder of their maps")
    parser.add_argument("--scenes", type=int, default=150, help="made scenes")
    parser.add_argument("--maps", type=int, default=10**9, help="most maps of the folder")
    parser.add_argument("--pairs", type=int, default=4, help="crop pairs a map")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the decode measurement")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    if (args.images is None) != (args.saliency is None):
        raise UserError("expected --images and --saliency together")
    data: dict[str, list[Mask]] = {}
    if args.images is not None:
        data["photographs"] = real_maps(args.images, args.saliency, args.maps)
    data["made scenes"] = [make_scene(SEED, i, 0.5).saliency > THRESHOLD for i in range(args.scenes)]
    result: dict[str, Any] = {
        "environment": vars(harness.environment(torch.device("cpu"))),
        "settings": {"pairs_a_map": args.pairs, "seed": SEED, "maps": {name: len(maps) for name, maps in data.items()}},
        "drift": {name: study(maps, args.pairs, name) for name, maps in data.items()},
        "decode": decode_costs(next(iter(data.values()))[:64], args.rounds),
    }
    for name, drift in result["drift"].items():
        rows = [[way, *(f"{values[column]:.4g}" for column in _COLUMNS)] for way, values in drift.items()]
        harness.print_table(f"{name}: {len(data[name])} maps", ["stored as", *_COLUMNS.values()], rows)
    rows = [[way, f"{v['cpu_us']:.0f}", f"{v['cpu_us_p20']:.0f}–{v['cpu_us_p80']:.0f}", f"{v['bytes']:.0f}"]
            for way, v in result["decode"].items()]  # fmt: skip
    harness.print_table("decoding by DALI, one thread", ["stored as", "CPU µs a map", "p20–p80", "bytes"], rows)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(_rounded(result), indent=1) + "\n")
    return 0


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
