"""What the crop rule does to a dataset: ``cast-fast crops --images DIR --saliency DIR --out FILE.png``.

Draws pairs of saliency-constrained crops beside pairs of plain random resized crops (compare Figure S1 of Selvaraju et
al., CVPR 2021), and measures over the dataset how many pairs of each kind share salient pixels. Half of the rows show
pictures chosen at random, the other half those whose unconstrained pairs share least: there the constraint matters.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from cast_fast.config import PretrainConfig
from cast_fast.data import sampling
from cast_fast.data.layout import SALIENT_ABOVE
from cast_fast.data.saliency_crop import (
    PAIR_CONSTRAINTS,
    CropRule,
    Windows,
    crop_windows,
    overlaps,
    unconstrained_windows,
)
from cast_fast.errors import UserError
from cast_fast.evaluate import figures
from cast_fast.evaluate.figures import Caption, Picture, Sheet, Swatch
from cast_fast.evaluate.pictures import Pictures, add_dataset_arguments, batches, cut, open_pictures

HELP = "draw constrained beside unconstrained crops, and measure what pairs share"

QUERY, KEY = figures.WINDOW, (255, 60, 200)
TILE = (150, 200)

_READ = 32


@dataclass
class Tally:
    """What pairs of one kind share, gathered picture by picture."""

    sharing: list[bool] = field(default_factory=list)
    """For each pair, whether a salient pixel lies in both windows."""
    shared: list[float] = field(default_factory=list)
    """For each pair, the share of the picture's salient pixels that both windows hold."""
    fallbacks: int = 0
    """Windows that are the rule's fallback."""

    def add(self, saliency: NDArray[np.uint8], windows: Windows) -> None:
        """Counts a pair."""
        self.sharing.append(overlaps(saliency, windows))
        self.shared.append(shared_salient(saliency, windows))
        self.fallbacks += int(windows.fallback.sum())


def shared_salient(saliency: NDArray[np.uint8], windows: Windows) -> float:
    """Share of a map's salient pixels that lie in both windows; the map has some."""
    salient = saliency > SALIENT_ABOVE
    inside = np.zeros((2, *salient.shape), bool)
    for mask, (y, x, h, w) in zip(inside, (windows.query.tolist(), windows.key.tolist())):
        mask[y : y + h, x : x + w] = True
    return float((salient & inside[0] & inside[1]).sum() / salient.sum())


def window_pairs(
    saliency: NDArray[np.uint8], index: int, rule: CropRule, *, pairs: int, seed: int
) -> list[tuple[Windows, Windows]]:
    """Pairs of a constrained and an unconstrained pair of windows of a picture, from independent random numbers."""
    height, width = saliency.shape
    first = 2 * pairs * index
    randoms = sampling.draw(seed, np.arange(first, first + 2 * pairs)).windows
    return [
        (crop_windows(saliency, own, rule), unconstrained_windows(height, width, other))
        for own, other in zip(randoms[::2], randoms[1::2])
    ]


def measure(
    pictures: Pictures, indices: Sequence[int], rule: CropRule, *, pairs: int, seed: int
) -> tuple[Tally, Tally]:
    """Constrained and unconstrained pairs over some pictures, each with a salient pixel, in their order.

    Args:
        pictures: the dataset.
        indices: of the pictures to measure.
        rule: of the constrained windows.
        pairs: of each kind, a picture.
        seed: of the random numbers.
    """
    tallies = Tally(), Tally()
    for chunk, maps in batches(indices, pictures.saliency, _READ, text="Measuring"):
        for index, saliency in zip(chunk, maps):
            assert saliency is not None
            for found in window_pairs(saliency, index, rule, pairs=pairs, seed=seed):
                for tally, windows in zip(tallies, found):
                    tally.add(saliency, windows)
    return tallies


@dataclass(frozen=True)
class Example:
    """A row of the sheet: a picture, which of its pairs, and why it is shown."""

    index: int
    pair: int
    reason: str


def choose(measured: Sequence[int], unconstrained: Tally, count: int, pairs: int) -> list[Example]:
    """The first pictures with their first pairs, then those whose unconstrained pair shares least, with that pair."""
    by_chance = [Example(index, 0, "at random") for index in measured[: (count + 1) // 2]]
    shared = np.array(unconstrained.shared).reshape(len(measured), pairs)
    order = np.argsort(shared.min(axis=1), kind="stable")
    taken = {example.index for example in by_chance}
    hard = [number for number in order.tolist() if measured[number] not in taken][: count - len(by_chance)]
    return by_chance + [Example(measured[n], int(shared[n].argmin()), "least shared") for n in hard]


def draw(pictures: Pictures, examples: Sequence[Example], rule: CropRule, *, pairs: int, seed: int, note: str) -> Sheet:
    """A sheet with a row for each example: the constrained pair, then the unconstrained one."""
    columns = ["image", "saliency map", "query crop", "key crop"]
    sheet = Sheet(
        [*columns, *columns],
        tile=TILE,
        title="What two crops of a picture show",
        note=note,
        groups=[("constrained by saliency", 4), ("unconstrained", 4)],
        legend=[
            Swatch(QUERY, "query window"),
            Swatch(KEY, "key window"),
            Swatch(figures.OUTLINE, "border of the salient region; shared: in both windows, of all salient pixels"),
        ],
    )
    for example in examples:
        index = example.index
        saliency = pictures.saliency(index)
        assert saliency is not None
        image = pictures.image(index)
        scale = min(TILE[0] / image.height, TILE[1] / image.width)
        size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
        small = np.asarray(image.resize(size))
        mask = np.asarray(cv2.resize(saliency, size, interpolation=cv2.INTER_AREA)) > SALIENT_ABOVE
        tiles: list[Picture | None] = []
        captions: list[Caption | None] = []
        for windows in window_pairs(saliency, index, rule, pairs=pairs, seed=seed)[example.pair]:
            corners = windows.relative(*saliency.shape)
            tiles += [_framed(figures.outline(small, mask), corners), _framed(figures.mask_picture(mask), corners)]
            tiles += [cut(image, (float(top), float(left), float(bottom), float(right)), TILE[0])
                      for top, left, bottom, right in corners]  # fmt: skip
            captions += [_caption(saliency, windows), None, None, None]
        sheet.add_row(tiles, label=example.reason, captions=captions)
    return sheet


def _framed(picture: Picture, corners: NDArray[np.float32]) -> Picture:
    """The picture with the query and the key window drawn into it."""
    height, width = picture.shape[:2]
    for (top, left, bottom, right), colour in zip(corners.tolist(), (QUERY, KEY)):
        y, x = round(top * height), round(left * width)
        box = y, x, max(1, round(bottom * height) - y), max(1, round(right * width) - x)
        picture = figures.rectangle(picture, box, colour, width=2)
    return picture


def _caption(saliency: NDArray[np.uint8], windows: Windows) -> Caption:
    if overlaps(saliency, windows):
        return Caption(f"shared: {shared_salient(saliency, windows):.0%}", figures.RIGHT)
    return Caption("nothing salient shared", figures.WRONG)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``cast-fast crops``."""
    defaults = PretrainConfig
    add_dataset_arguments(parser, labels=False)
    parser.add_argument("--out", type=Path, metavar="FILE.png", required=True, help="the picture")
    parser.add_argument("--count", type=int, default=6, help="rows of the picture")
    parser.add_argument("--pairs", type=int, default=4, help="pairs a picture that are measured")
    parser.add_argument("--measure", type=int, default=2000, metavar="N", help="most pictures that are measured")
    parser.add_argument("--phi", type=float, default=defaults.phi, help="share of salient pixels that a window holds")
    parser.add_argument("--pair-constraint", choices=PAIR_CONSTRAINTS, default=defaults.pair_constraint, help="of keys")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the choice and of the windows")


def main(args: argparse.Namespace) -> int:
    """Runs ``cast-fast crops``; returns 0."""
    if min(args.count, args.pairs, args.measure) < 1:
        raise UserError("--count, --pairs and --measure: expected at least 1")
    if not 0 <= args.seed < 2**64:
        raise UserError(f"--seed: got {args.seed}, expected 0 <= seed < 2**64")
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out: got {args.out}, expected a file name that ends in .png")
    try:
        rule = CropRule(args.phi, args.pair_constraint)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    pictures = open_pictures(args.images, args.saliency, args.data, need_maps=True)
    order = sampling.epoch_order(len(pictures), args.seed, 0)
    measured = [int(index) for index in order[: args.measure]]
    constrained, unconstrained = measure(pictures, measured, rule, pairs=args.pairs, seed=args.seed)
    fallbacks = constrained.fallbacks / (2 * len(constrained.shared))
    first = f"constrained ({args.pair_constraint}, phi {args.phi:g}): {_sentence(constrained)}"
    lines = [f"{first}; {fallbacks:.1%} of windows are the fallback", f"unconstrained: {_sentence(unconstrained)}"]
    sheet = draw(
        pictures,
        choose(measured, unconstrained, args.count, args.pairs),
        rule,
        pairs=args.pairs,
        seed=args.seed,
        note=f"Measured over {len(measured)} pictures, {args.pairs} pairs of each kind. "
        + " ".join(f"{line[0].upper()}{line[1:]}." for line in lines)
        + " Rows: pictures chosen at random, then those with the unconstrained pairs that share least.",
    )
    try:
        sheet.save(args.out)
    except OSError as error:
        raise UserError(f"--out: cannot write {args.out}: {error.strerror or error}") from error
    for line in lines:
        print(line)
    print(f"picture: {args.out}")
    return 0


def _sentence(tally: Tally) -> str:
    share, mean = float(np.mean(tally.sharing)), float(np.mean(tally.shared))
    return f"{share:.1%} of {len(tally.shared)} pairs share salient pixels, on average {mean:.0%} of all in the picture"
