"""Makes a set in the form of the Backgrounds Challenge from any labelled images with saliency maps.

The variants follow Xiao et al. (ICLR 2021): the object is what the map marks, its box the bounding box of that.

===========  ==========================================================================================
original     a square that shows as much of the object as it can, centred on it, resized
only_fg      everything but the object black
no_fg        the object black
only_bg_b    the object's box black
only_bg_t    the box tiled over with the largest strip beside it: above, below, left or right
mixed_same   the object pasted in place onto only_bg_t of another image of its class
mixed_rand   … of another image of a class drawn uniformly, its own included
mixed_next   … of another image of the next class, the last one's next being the first
fg_mask      the object as a NumPy array (S, S), 1 on the object
===========  ==========================================================================================

Images are JPEG of high quality under ``VARIANT/val/NN_class/STEM.JPEG``, names that the official evaluation expects.
Part of the images, with no mixing, is left in ``original/train`` for those who fit a classifier.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cast_fast.errors import UserError
from cast_fast.evaluate import figures
from cast_fast.evaluate.backgrounds import MASKS, TITLES, VARIANTS
from cast_fast.evaluate.figures import Picture, Sheet, Swatch
from cast_fast.evaluate.linear_probe import hold_out
from cast_fast.evaluate.pictures import (
    Box,
    Pictures,
    add_dataset_arguments,
    batches,
    check_seed,
    cut,
    cut_map,
    open_pictures,
    progress,
)
from cast_fast.files import Results

logger = logging.getLogger("cast_fast")

HELP = "make a Backgrounds Challenge of your own from labelled images with maps"

SHARE = (0.01, 0.9)
"""An object that covers less or more of the square leaves nothing to see, or no background."""
STRIP = 0.05
"""Least breadth of the strip beside the box, as a share of the side."""
QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Cutout:
    """A square picture and its object."""

    image: Picture
    """(S, S, 3)."""
    mask: NDArray[np.bool_]
    """(S, S)."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Bounding box of the object: (top, left, bottom, right), the last two exclusive."""
        rows, columns = np.flatnonzero(self.mask.any(axis=1)), np.flatnonzero(self.mask.any(axis=0))
        return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def square_around(saliency: NDArray[np.uint8], width: int, height: int) -> Box:
    """The largest square of an image, moved along its longer side to be centred on the object's box.

    Args:
        saliency: map with at least one salient pixel, perhaps smaller than the image.
        width, height: of the image.
    """
    rows, columns = np.nonzero(saliency > 127)
    middle_y = (rows.min() + rows.max() + 1) / 2 / saliency.shape[0] * height
    middle_x = (columns.min() + columns.max() + 1) / 2 / saliency.shape[1] * width
    side = min(width, height)
    top = min(max(middle_y - side / 2, 0.0), height - side)
    left = min(max(middle_x - side / 2, 0.0), width - side)
    return top / height, left / width, (top + side) / height, (left + side) / width


def strip_beside(box: tuple[int, int, int, int], side: int) -> tuple[int, int, int, int] | None:
    """The largest of the strips above, below, left and right of a box, as broad as the box along it.

    Returns:
        (top, left, bottom, right), or None where every strip is narrower than ``STRIP`` of the side.
    """
    top, left, bottom, right = box
    strips = [
        ((0, left, top, right), top),
        ((bottom, left, side, right), side - bottom),
        ((top, 0, bottom, left), left),
        ((top, right, bottom, side), side - right),
    ]
    wide = [strip for strip, breadth in strips if breadth >= max(1, STRIP * side)]
    return max(wide, key=lambda s: (s[2] - s[0]) * (s[3] - s[1]), default=None)


def tile_over(cutout: Cutout) -> Picture:
    """only_bg_t: the box filled with copies of the largest strip beside it, starting at the box's top left corner.

    Raises:
        ValueError: there is no strip.
    """
    top, left, bottom, right = cutout.box
    strip = strip_beside(cutout.box, len(cutout.image))
    if strip is None:
        raise ValueError(f"box {cutout.box}: got an object that leaves no strip of background")
    piece = cutout.image[strip[0] : strip[2], strip[1] : strip[3]]
    height, width = bottom - top, right - left
    copies = (-(-height // piece.shape[0]), -(-width // piece.shape[1]), 1)
    result = cutout.image.copy()
    result[top:bottom, left:right] = np.tile(piece, copies)[:height, :width]
    return result


def paste(cutout: Cutout, scenery: Picture) -> Picture:
    """The object in place on another picture of the same size."""
    return np.where(cutout.mask[:, :, None], cutout.image, scenery)


def plain_variants(cutout: Cutout) -> dict[str, Picture]:
    """The variants that need no second image."""
    black = np.zeros_like(cutout.image)
    top, left, bottom, right = cutout.box
    blackened = cutout.image.copy()
    blackened[top:bottom, left:right] = 0
    return {
        "original": cutout.image,
        "only_fg": paste(cutout, black),
        "no_fg": np.where(cutout.mask[:, :, None], black, cutout.image),
        "only_bg_b": blackened,
        "only_bg_t": tile_over(cutout),
    }


def draw_backgrounds(labels: NDArray[np.int64], classes: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """For mixed_same, mixed_rand and mixed_next the number of the image that lends each image its background.

    Never an image its own, unless it is the only one of the class that is asked for.

    Args:
        labels: (n,) in [0, classes); every class occurs.
        classes: how many.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == label) for label in range(classes)]
    drawn: dict[str, NDArray[np.int64]] = {}
    for name in ("mixed_same", "mixed_rand", "mixed_next"):
        lenders = np.empty(len(labels), np.int64)
        for index, label in enumerate(labels):
            wanted = {"mixed_same": label, "mixed_next": (label + 1) % classes}.get(name, int(rng.integers(classes)))
            others = members[wanted][members[wanted] != index]
            lenders[index] = rng.choice(others if len(others) else members[wanted])
        drawn[name] = lenders
    return drawn


def read_cutout(pictures: Pictures, index: int, size: int) -> Cutout | str:
    """One picture as a cutout, or why it cannot be one."""
    saliency = pictures.saliency(index)
    assert saliency is not None  # pictures without a map were left out
    image = pictures.image(index)
    box = square_around(saliency, *image.size)
    cutout = Cutout(cut(image, box, size), cut_map(saliency, box, size))
    share = float(cutout.mask.mean())
    if not SHARE[0] <= share <= SHARE[1]:
        return f"the object covers {share:.1%} of the square, expected {SHARE[0]:.0%} to {SHARE[1]:.0%}"
    if strip_beside(cutout.box, size) is None:
        return "the object's box leaves no strip of background"
    return cutout


def make(
    pictures: Pictures, out: Path, *, size: int = 224, train_share: float = 0.5, seed: int = 0, rows: int = 0
) -> tuple[list[str], int, list[tuple[str, str]]]:
    """Writes the whole set, or nothing.

    Args:
        pictures: labelled, with maps.
        out: an empty or new folder.
        size: side of the square images.
        train_share: share of each class that goes to ``original/train`` and into no variant.
        seed: of the division and of the mixing.
        rows: of the sheet of examples; 0 for none.

    Returns:
        Class folders, number of images in each variant, and (name, reason) of the pictures left out.

    Raises:
        UserError: the folder is not empty or cannot be written to, fewer than two classes remain, or a class has no
            image to test.
    """
    _require_new(out)
    cutouts: dict[int, Cutout] = {}
    left_out: list[tuple[str, str]] = []
    for indices, found in batches(range(len(pictures)), lambda i: read_cutout(pictures, i, size), 64, text="cutting"):
        for index, cutout in zip(indices, found):
            if isinstance(cutout, str):
                left_out.append((pictures.names[index], cutout))
            else:
                cutouts[index] = cutout
    names = sorted({str(pictures.labels[index]) for index in cutouts})
    if len(names) < 2:
        raise UserError(f"got {len(names)} classes with usable images ({len(left_out)} left out), expected at least 2")
    folders = [f"{number:02d}_{_safe(name)}" for number, name in enumerate(names)]
    kept = list(cutouts)
    labels = np.array([names.index(str(pictures.labels[index])) for index in kept], np.int64)
    training = _division(labels, train_share, seed)
    stems = _stems([pictures.names[index] for index in kept])
    tested = np.flatnonzero(~training)
    if missing := [names[c] for c in range(len(names)) if not (labels[tested] == c).any()]:
        raise UserError(f"class {', '.join(missing[:3])}: has no image left to test with --train-share {train_share}")
    about: dict[str, Any] = {
        "classes": folders,
        "images_per_variant": len(tested),
        "size": size,
        "train_share": train_share,
        "seed": seed,
        "left_out": [{"name": name, "reason": reason} for name, reason in left_out],
    }
    with Results(out) as files:
        for place in np.flatnonzero(training):
            path = f"original/train/{folders[labels[place]]}/{stems[place]}.JPEG"
            files.write(path, _jpeg(cutouts[kept[place]].image))
        own = [cutouts[kept[p]] for p in tested]
        _write_variants(files, own, [stems[p] for p in tested], labels[tested], folders, seed)
        files.write("made.json", json.dumps(about, indent=2) + "\n")
        if rows:
            files.write("examples.png", example_sheet(files.part, folders, rows).png())
    return folders, len(tested), left_out


def _require_new(out: Path) -> None:
    try:
        occupied = out.exists() and any(out.iterdir())
    except OSError as error:
        raise UserError(f"--out: {out} cannot be a new folder ({error.strerror or error})") from None
    if occupied:
        raise UserError(f"--out: {out} is not empty")


def _division(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """True for training; at least one image of each class is left for testing."""
    import torch

    if share == 0:
        return np.zeros(len(labels), bool)
    return hold_out(torch.from_numpy(labels), share, seed).numpy()


def _write_variants(
    files: Results,
    cutouts: Sequence[Cutout],
    stems: Sequence[str],
    labels: NDArray[np.int64],
    folders: list[str],
    seed: int,
) -> None:
    lenders = draw_backgrounds(labels, len(folders), seed)
    rows = []
    for place in progress(range(len(cutouts)), "writing"):
        cutout, folder, stem = cutouts[place], folders[labels[place]], stems[place]
        pictures = plain_variants(cutout)
        for name, lender in lenders.items():
            pictures[name] = paste(cutout, tile_over(cutouts[lender[place]]))
        for name in VARIANTS:
            files.write(f"{name}/val/{folder}/{stem}.JPEG", _jpeg(pictures[name]))
        mask = io.BytesIO()
        np.save(mask, cutout.mask.astype(np.uint8))
        files.write(f"{MASKS}/val/{folder}/{stem}.npy", mask.getvalue())
        borrowed = [stems[lenders[n][place]] for n in lenders]
        rows.append([f"{folder}/{stem}", *borrowed, *(folders[labels[lenders[n][place]]] for n in lenders)])
    used = io.StringIO(newline="")
    writer = csv.writer(used)
    writer.writerow(["image", *lenders, *(f"class_of_{name}" for name in lenders)])
    writer.writerows(rows)
    files.write("backgrounds_used.csv", used.getvalue())


def _jpeg(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def _safe(name: str) -> str:
    """A class name as part of a file name."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name)


def _stems(names: Sequence[str]) -> list[str]:
    """Names as file names, distinct."""
    safe = [_safe(name) for name in names]
    return safe if len(set(safe)) == len(safe) else [f"{i:06d}_{name}" for i, name in enumerate(safe)]


def example_sheet(root: Path, folders: Sequence[str], rows: int) -> Sheet:
    """A few images of the set in every variant, read back from the files."""
    columns = [*(TITLES[name] for name in VARIANTS), "fg_mask"]
    sheet = Sheet(
        columns,
        tile=(130, 130),
        title="The same images in every variant",
        note="Read back from the written files; the outline on the original is the object that the map marks.",
        legend=[Swatch(figures.OUTLINE, "border of the object (fg_mask)")],
    )
    shown = 0
    while shown < rows:
        added = False
        for folder in folders:
            paths = sorted((root / "original" / "val" / folder).iterdir())
            number = shown // len(folders)
            if shown >= rows or number >= len(paths):
                continue
            stem = paths[number].stem
            mask = np.load(root / MASKS / "val" / folder / f"{stem}.npy")
            tiles: list[Picture | None] = []
            for name in VARIANTS:
                with Image.open(root / name / "val" / folder / f"{stem}.JPEG") as opened:
                    tiles.append(np.asarray(opened.convert("RGB")))
            assert tiles[0] is not None
            tiles[0] = figures.outline(tiles[0], mask)
            sheet.add_row([*tiles, figures.mask_picture(mask > 0)], label=f"{folder} {stem}")
            shown, added = shown + 1, True
        if not added:
            break
    return sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``cast-fast backgrounds-make``."""
    add_dataset_arguments(parser, labels=True)
    parser.add_argument("--out", type=Path, required=True, metavar="ROOT", help="new folder of the set")
    parser.add_argument("--size", type=int, default=224, help="side of the square images in pixels")
    parser.add_argument("--train-share", type=float, default=0.5, help="share that goes to original/train")
    parser.add_argument("--seed", type=int, default=0, help="of the division and the mixing")
    parser.add_argument("--rows", type=int, default=6, help="rows of the example sheet")


def main(args: argparse.Namespace) -> int:
    """Makes the set and a sheet of examples."""
    if args.size < 32 or not 0 <= args.train_share < 1 or args.rows < 0:
        raise UserError("--size: expected at least 32; --train-share: in [0, 1); --rows: at least 0")
    check_seed(args.seed)
    if args.labels is None and args.data is None:
        raise UserError("--labels is missing: expected a CSV file with columns stem,class")
    pictures = open_pictures(
        args.images, args.saliency, args.data, labels=args.labels, need_maps=True, need_labels=True
    )
    folders, count, left_out = make(
        pictures, args.out, size=args.size, train_share=args.train_share, seed=args.seed, rows=args.rows
    )
    if left_out:
        logger.warning("%d images left out, see made.json; the first: %s, %s", len(left_out), *left_out[0])
    print(f"{len(folders)} classes, {count} images in each of {len(VARIANTS)} variants: {args.out}")
    if args.rows:
        print(args.out / "examples.png")
    return 0
