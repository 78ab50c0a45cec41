"""``cast-fast grounding``: does the encoder look at the object when it matches two crops of a picture?

For each picture two saliency-constrained crops are cut, the same for every encoder, without colour augmentation.
Grad-CAM (R. R. Selvaraju et al., ICCV 2017) says where in the query crop the similarity to the key crop comes from, and
to the *masked key*, the key crop with everything but its salient region blanked, which the attention loss of CAST
trains. As in training, the momentum encoder embeds the key crops where a file holds one; the encoders are in evaluation
mode. (The query encoder in its place is another question: it was never asked to embed masked crops.)

Measured against the query crop's own saliency map, per picture:

=========  ==============================================================================================
cosine     between the Grad-CAM map and the salient share of each of its cells; what the loss maximises
pointing   1 if the middle of the map's largest cell lies on a salient pixel or within the tolerance; cells that tie
           share the point (pointing game: J. Zhang et al., "Top-down Neural Attention by Excitation Backprop", 2018)
energy     share of the enlarged map's sum that lies inside the salient region
iou        of the region above a share of the peak with the salient region
=========  ==============================================================================================

The middle of the largest cell is the peak of the enlarged map, except in the outermost cells, beyond whose middle the
enlarged map is flat: its first largest pixel would be at the border of the crop for cells at the top and on the left.

A map of zeros scores 0 in all four. Two maps that look at nothing set the scale: ``uniform``, and ``centre``, a
Gaussian in the middle of the crop (photographers centre objects, and so does the crop rule).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import logging
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cast_fast.data import sampling
from cast_fast.data.saliency_crop import CropRule, crop_windows
from cast_fast.encoder import Encoder, cam_grid
from cast_fast.errors import UserError
from cast_fast.evaluate import figures
from cast_fast.evaluate.features import stack
from cast_fast.evaluate.figures import Caption, HeatBar, Picture, Sheet, Swatch
from cast_fast.evaluate.pictures import (
    Box,
    Pictures,
    Selection,
    add_dataset_arguments,
    batches,
    cell_average,
    check_seed,
    cut,
    cut_map,
    open_output,
    open_pictures,
)
from cast_fast.evaluate.statistics import RESAMPLES, Interval, bootstrap_difference, bootstrap_mean
from cast_fast.evaluate.weights import Model, load_encoder, normalise, unique_names, warn_of_sizes
from cast_fast.files import Results
from cast_fast.objective import gradcam_map, gradcam_weights
from cast_fast.step import IMAGE_MEAN

logger = logging.getLogger("cast_fast")

HELP = "show and measure where an encoder looks when it matches two crops"

TARGETS = ("key", "masked_key")
TARGET_TITLES = {"key": "Grad-CAM of query · key", "masked_key": "Grad-CAM of query · masked key"}
METRICS = ("cosine", "pointing", "energy", "iou")
TOLERANCE = 15 / 224
"""Of the pointing game, as a share of the crop's side: 15 pixels, as published, at 224."""
_CENTRE_SIGMA = 0.25
_TIE = 1e-6
"""Cells that differ by less than this share of the largest one tie."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two crops of one picture with their maps."""

    query: Picture
    """(S, S, 3)."""
    key: Picture
    """(S, S, 3)."""
    query_mask: NDArray[np.bool_]
    """(S, S), True on the salient region."""
    key_mask: NDArray[np.bool_]
    """(S, S)."""
    fallback: bool
    """Whether either window is the crop rule's fallback."""

    @property
    def masked_key(self) -> Picture:
        """The key crop as the encoder sees it masked: the mean colour outside the salient region."""
        mean = np.round(255 * np.array(IMAGE_MEAN)).astype(np.uint8)
        return np.where(self.key_mask[:, :, None], self.key, mean)


def cut_pair(pictures: Pictures, index: int, size: int, seed: int, rule: CropRule) -> Pair:
    """The crops of one picture: a pure function of the picture, its name, the size, the seed and the rule."""
    saliency = pictures.saliency(index)
    assert saliency is not None  # pictures without a map were left out
    # by name, so that a picture has the same crops whichever others are chosen with it
    position = zlib.crc32(str(pictures.names[index]).encode())
    windows = crop_windows(saliency, sampling.draw(seed, np.array([position])).windows[0], rule)
    image = pictures.image(index)
    boxes: list[Box] = [(a, b, c, d) for a, b, c, d in windows.relative(*saliency.shape).tolist()]
    crops = [cut(image, box, size) for box in boxes]
    masks = [cut_map(saliency, box, size) for box in boxes]
    return Pair(crops[0], crops[1], masks[0], masks[1], bool(windows.fallback.any()))


@dataclasses.dataclass(frozen=True)
class Attention:
    """Grad-CAM maps of N queries for one target."""

    cam: NDArray[np.float32]
    """(N, h, w), at least 0."""
    similarity: NDArray[np.float32]
    """(N,) cosine of query and target embedding."""


@torch.no_grad()
def attend(
    query_encoder: Encoder,
    key_encoder: Encoder,
    pairs: Sequence[Pair],
    device: torch.device,
    normalise: Callable[[Tensor], Tensor] = normalise,
) -> dict[str, Attention]:
    """Grad-CAM of query · key and of query · masked key, by the closed form of ``objective``.

    Args:
        query_encoder: embeds the query crops.
        key_encoder: embeds the key crops; may be the same.
        pairs: the crops.
        device: where the encoders are.
        normalise: uint8 (N, 3, S, S) → what the encoders expect, zero being the mean colour.
    """
    query = query_encoder(normalise(stack([pair.query for pair in pairs]).to(device)))
    keys = normalise(stack([pair.key for pair in pairs]).to(device))
    mask = torch.from_numpy(np.stack([pair.key_mask for pair in pairs])).to(device)
    found = {}
    for target, images in (("key", keys), ("masked_key", keys * mask[:, None])):
        embedding = key_encoder(images).embedding
        alpha = gradcam_weights(query_encoder.head, query.pooled, query.projection, query.embedding, embedding)
        cam = gradcam_map(query.activations.float(), alpha)
        similarity = (query.embedding * embedding).sum(dim=1)
        found[target] = Attention(cam.cpu().numpy(), similarity.cpu().numpy())
    return found


def score(
    cam: NDArray[np.float32], mask: NDArray[np.bool_], *, iou_share: float = 0.5, tolerance: float = TOLERANCE
) -> dict[str, float]:
    """The four numbers of one map.

    Args:
        cam: (h, w) at least 0.
        mask: (S, S) salient region of the crop; at least one pixel.
        iou_share: of the peak, above which the map counts as a region.
        tolerance: of the pointing game, a share of the crop's side.

    Raises:
        ValueError: an empty mask, or a negative or non-finite map.
    """
    if not mask.any():
        raise ValueError("mask: got an empty one, expected at least one salient pixel")
    if not (np.isfinite(cam).all() and cam.min() >= 0):
        raise ValueError("cam: got negative or non-finite values, expected a map at least 0")
    if cam.max() <= 0:
        return dict.fromkeys(METRICS, 0.0)
    small = figures.relative_to_peak(cam)
    target = cell_average(mask, (cam.shape[0], cam.shape[1]))
    norm = float(np.linalg.norm(small) * np.linalg.norm(target))
    large = figures.enlarge(small, *mask.shape)
    region = large >= iou_share * large.max()
    return {
        "cosine": float((small * target).sum()) / norm,
        "pointing": _pointing(small, _distance(mask) <= tolerance * mask.shape[0]),
        "energy": float(large[mask].sum() / large.sum()),
        "iou": float((region & mask).sum() / (region | mask).sum()),
    }


def _pointing(cam: NDArray[np.float32], near: NDArray[np.bool_]) -> float:
    """Share of the map's largest cells (h, w), mostly one, whose middle is near the region (S, S)."""
    cells = np.nonzero(cam >= (1 - _TIE) * cam.max())
    at = [(index + 0.5) * side / count - 0.5 for index, side, count in zip(cells, near.shape, cam.shape)]
    # a middle between two pixels is near if one of them is, so that turning map and region changes nothing
    around = [np.clip([np.floor(a), np.ceil(a)], 0, side - 1).astype(int) for a, side in zip(at, near.shape)]
    return float(near[around[0][:, None], around[1][None]].any(axis=(0, 1)).mean())


def _distance(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Distance of each pixel to the nearest salient one; 0 on the region."""
    return np.asarray(cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE), np.float32)


def baseline_maps(grid: tuple[int, int]) -> dict[str, NDArray[np.float32]]:
    """Maps that look at nothing in the picture: ``uniform`` and ``centre``."""
    y, x = ((np.arange(n) + 0.5) / n - 0.5 for n in grid)
    gaussian = np.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * _CENTRE_SIGMA**2))
    return {"uniform": np.ones(grid, np.float32), "centre": gaussian.astype(np.float32)}


@dataclasses.dataclass
class Row:
    """One picture, one model, one target."""

    stem: str
    model: str
    target: str
    similarity: float
    zero_map: bool
    salient_share: float
    fallback: bool
    scores: dict[str, float]


@dataclasses.dataclass
class Measured:
    """Everything that one run of the command measured."""

    rows: list[Row]
    baselines: dict[str, dict[str, list[float]]]
    skipped: list[tuple[str, str]]
    """(stem, reason) of pictures whose crops cannot be scored."""

    def values(self, model: str, target: str, metric: str) -> list[float]:
        """One number a picture, in the order of the pictures."""
        return [row.scores[metric] for row in self.rows if (row.model, row.target) == (model, target)]


def measure(
    models: Sequence[Model],
    pictures: Pictures,
    *,
    size: int,
    batch: int,
    device: torch.device,
    seed: int = 0,
    rule: CropRule | None = None,
    keys: str = "auto",
    iou_share: float = 0.5,
    tolerance: float = TOLERANCE,
) -> Measured:
    """Scores of every picture for every model and target, all on the same crops.

    Args:
        models: encoders; moved to ``device``.
        pictures: with maps that have at least one salient pixel.
        size: side of the crops in pixels.
        batch: pictures a forward pass.
        device: where to compute.
        seed: of the crops.
        rule: of the crops; None for the published one.
        keys: which encoder embeds the key crops, see ``key_encoder``.
        iou_share, tolerance: see ``score``.
    """
    rule = rule or CropRule()
    grid = cam_grid(models[0].query, size)
    fixed = baseline_maps(grid)
    measured = Measured([], {name: {m: [] for m in METRICS} for name in fixed}, [])
    encoders = [(model.to(device), key_encoder(model, keys)) for model in models]
    for indices, pairs in batches(
        range(len(pictures)), lambda i: cut_pair(pictures, i, size, seed, rule), batch, text="grounding"
    ):
        kept = []
        for index, pair in zip(indices, pairs):
            empty = [n for n, mask in (("query", pair.query_mask), ("key", pair.key_mask)) if not mask.any()]
            if empty:
                measured.skipped.append((pictures.names[index], f"no salient pixel is left in the {empty[0]} crop"))
            else:
                kept.append((index, pair))
        if not kept:
            continue
        chosen = [pair for _, pair in kept]
        for pair in chosen:
            for name, cam in fixed.items():
                scores = score(cam, pair.query_mask, iou_share=iou_share, tolerance=tolerance)
                for metric, value in scores.items():
                    measured.baselines[name][metric].append(value)
        for model, keyer in encoders:
            for target, attention in attend(model.query, keyer, chosen, device, model.normalise).items():
                for (index, pair), cam, similarity in zip(kept, attention.cam, attention.similarity):
                    if not np.isfinite(cam).all():
                        raise UserError(f"{model.name}: its Grad-CAM of {pictures.names[index]} is not finite")
                    measured.rows.append(
                        Row(
                            str(pictures.names[index]),
                            model.name,
                            target,
                            float(similarity),
                            not cam.any(),
                            float(pair.query_mask.mean()),
                            pair.fallback,
                            score(cam, pair.query_mask, iou_share=iou_share, tolerance=tolerance),
                        )
                    )
    if not measured.rows:
        raise UserError(f"no picture can be scored: {len(measured.skipped)} have no salient pixel in a crop of {size}")
    return measured


def key_encoder(model: Model, keys: str) -> Encoder:
    """Which encoder embeds the key crops: ``"key"`` the momentum encoder, ``"query"`` the query encoder.

    ``"auto"`` is the momentum encoder where the file holds one, else the query encoder.

    Raises:
        UserError: the momentum encoder is asked for and the file holds none.
    """
    if keys == "key" and model.key is None:
        raise UserError(f"--keys key: {model.name} holds no momentum encoder; expected --keys auto or query")
    return model.query if keys == "query" or model.key is None else model.key


def summarise(measured: Measured, models: Sequence[Model], *, resamples: int, seed: int) -> dict[str, Any]:
    """Means with intervals per model, target and metric; baselines; paired differences to the first model."""
    keep = {"resamples": resamples, "seed": seed}
    result: dict[str, Any] = {"models": {}, "baselines": {}, "differences": {}}
    for model in models:
        own = [row for row in measured.rows if row.model == model.name]
        result["models"][model.name] = {
            "weights": model.provenance.get("file"),
            "method": model.provenance.get("config", {}).get("method"),
            "step": model.provenance.get("step"),
            "projection_head": model.has_head,
            "momentum_encoder": model.key is not None,
            **{
                target: {
                    **{m: bootstrap_mean(measured.values(model.name, target, m), **keep).to_json() for m in METRICS},
                    "similarity": float(np.mean([r.similarity for r in own if r.target == target])),
                    "zero_maps": sum(r.zero_map for r in own if r.target == target),
                }
                for target in TARGETS
            },
        }
    for name, values in measured.baselines.items():
        result["baselines"][name] = {m: bootstrap_mean(values[m], **keep).to_json() for m in METRICS}
    for model in models[1:]:
        result["differences"][f"{model.name} - {models[0].name}"] = {
            target: {
                m: bootstrap_difference(
                    measured.values(models[0].name, target, m), measured.values(model.name, target, m), **keep
                ).to_json()
                for m in METRICS
            }
            for target in TARGETS
        }
    return result


def title(model: Model) -> str:
    """Name, method and step, for a heading."""
    method = model.provenance.get("config", {}).get("method")
    step = model.provenance.get("step")
    about = ", ".join([str(method)] * (method is not None) + [f"step {step}"] * (step is not None))
    return f"{model.name} ({about})" if about else model.name


def draw_sheet(
    models: Sequence[Model],
    pictures: Pictures,
    indices: Sequence[int],
    *,
    size: int,
    device: torch.device,
    seed: int = 0,
    rule: CropRule | None = None,
    keys: str = "auto",
    tolerance: float = TOLERANCE,
    iou_share: float = 0.5,
) -> Sheet:
    """Figure S2: a row a picture, with crops, map, and each model's Grad-CAM of both targets."""
    side = size if 128 <= size <= 224 else min(max(size, 128), 224)
    sheet = Sheet(
        ["query crop", "key crop", "masked key", "saliency of query", *(list(TARGET_TITLES.values()) * len(models))],
        tile=(side, side),
        title="Where the encoder looks when it matches two crops",
        note="Grad-CAM lies over the query crop, in which cyan encloses the salient region. Below it: cosine with the "
        "map, and the share of Grad-CAM inside the region.",
        groups=[("", 4), *((title(model), 2) for model in models)],
        legend=[HeatBar(), Swatch(figures.OUTLINE, "border of the salient region")],
    )
    pairs = [cut_pair(pictures, i, size, seed, rule or CropRule()) for i in indices]
    shown = [(i, pair) for i, pair in zip(indices, pairs) if pair.query_mask.any() and pair.key_mask.any()]
    if not shown:
        return sheet
    chosen = [pair for _, pair in shown]
    found = [
        attend(model.to(device).query, key_encoder(model, keys), chosen, device, model.normalise) for model in models
    ]
    for row, (index, pair) in enumerate(shown):
        tiles = [
            figures.outline(pair.query, pair.query_mask),
            figures.outline(pair.key, pair.key_mask),
            pair.masked_key,
            figures.mask_picture(pair.query_mask),
        ]
        captions: list[Caption | None] = [None] * 4
        for attention in found:
            for target in TARGETS:
                cam = attention[target].cam[row]
                tiles.append(figures.outline(figures.overlay(pair.query, cam), pair.query_mask))
                scores = score(cam, pair.query_mask, tolerance=tolerance, iou_share=iou_share)
                text = f"cosine {scores['cosine']:.2f}, inside {scores['energy']:.0%}"
                captions.append(Caption(text if cam.any() else "map of zeros"))
        sheet.add_row(tiles, label=pictures.names[index], captions=captions)
    return sheet


def spread(count: int, wanted: int) -> list[int]:
    """Up to ``wanted`` numbers below ``count``, evenly spaced."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, wanted)).round()}) if count else []


def rows_table(measured: Measured) -> str:
    """CSV: one row a picture, model and target."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    names = ("stem", "model", "target", "similarity", "zero_map", "salient_share", "fallback")
    writer.writerow([*names, *METRICS])
    for row in measured.rows:
        fixed = (row.stem, row.model, row.target, f"{row.similarity:.6f}", int(row.zero_map))
        rest = (f"{row.salient_share:.6f}", int(row.fallback), *(f"{row.scores[m]:.6f}" for m in METRICS))
        writer.writerow([*fixed, *rest])
    return text.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``cast-fast grounding``."""
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help="run folders, checkpoints or files of weights")
    add_dataset_arguments(parser, labels=False)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where sheets and numbers go; else grounding/ in the first run"
    )
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="pictures to measure, evenly spaced; 0: all")
    parser.add_argument("--rows", type=int, default=8, help="pictures on a sheet")
    parser.add_argument("--sheets", type=int, default=2, help="number of sheets, pictures evenly spaced")
    parser.add_argument("--only", nargs="+", metavar="STEM", help="show and measure these pictures alone")
    parser.add_argument("--size", type=int, default=0, help="side of the crops in pixels; 0 for that of the training")
    parser.add_argument("--phi", type=float, default=0.2, help="least share of the salient pixels in a crop")
    parser.add_argument(
        "--keys",
        choices=("auto", "query", "key"),
        default="auto",
        help="encoder of the key crops: the momentum encoder (key), the query encoder, or the first that the file has",
    )
    parser.add_argument("--iou-share", type=float, default=0.5, help="share of the peak that bounds the region of iou")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="of pointing, as a share of the crop's side (default: 15/224 = %(default).3f)",
    )
    parser.add_argument("--batch", type=int, default=64, help="pictures a forward pass")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--seed", type=int, default=0, help="of the crops and the intervals")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap")


def main(args: argparse.Namespace) -> int:
    """Measures encoders on a dataset and draws sheets."""
    from cast_fast.train import resolve_device

    _check(args)
    device = resolve_device(args.device)
    models = unique_names([load_encoder(path) for path in args.run])
    size = args.size or next((model.size for model in models if model.size), 224)
    warn_of_sizes(models, size)
    for model in models:
        key_encoder(model, args.keys)
        if not model.has_head:
            logger.info("%s holds no projection head: its pooled features are compared themselves", model.name)
        if args.keys == "auto" and model.key is None:
            logger.warning("%s holds no momentum encoder: its query encoder embeds the key crops", model.name)
    pictures = open_pictures(
        args.images, args.saliency, args.data, need_maps=True, known=models[0].provenance.get("config")
    )
    pictures = _choose(pictures, args)
    rule = CropRule(phi=args.phi)
    shared: dict[str, Any] = {
        "size": size,
        "device": device,
        "seed": args.seed,
        "rule": rule,
        "keys": args.keys,
        "iou_share": args.iou_share,
        "tolerance": args.tolerance,
    }
    args.out = open_output(args.out, args.run[0], "grounding")
    measured = measure(models, pictures, batch=args.batch, **shared)
    about = {**shared, "device": str(device), "rule": dataclasses.asdict(rule), "resamples": args.resamples}
    results = {
        "pictures": len(pictures) - len(measured.skipped),
        "skipped": [{"stem": stem, "reason": reason} for stem, reason in measured.skipped],
        "settings": about,
        **summarise(measured, models, resamples=args.resamples, seed=args.seed),
    }
    shown = spread(len(pictures), args.rows * args.sheets)
    with Results(args.out) as files:
        files.write("grounding.json", json.dumps(results, indent=2) + "\n")
        files.write("grounding.csv", rows_table(measured))
        for number in range(args.sheets):
            chosen = shown[number * args.rows : (number + 1) * args.rows]
            if chosen:
                sheet = draw_sheet(models, pictures, chosen, **shared)
                files.write(f"grounding-{number + 1:02d}.png", sheet.png())
    _print(results)
    print("\n".join(map(str, files.written)))
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("batch", "rows", "resamples"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: got {getattr(args, name)}, expected at least 1")
    for name in ("limit", "sheets"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name}: got {getattr(args, name)}, expected at least 0")
    if args.size and args.size < 32:
        raise UserError(f"--size: got {args.size}, expected at least 32")
    if not 0 < args.phi <= 1:
        raise UserError(f"--phi: got {args.phi}, expected a number in (0, 1]")
    if not 0 < args.iou_share <= 1:
        raise UserError(f"--iou-share: got {args.iou_share}, expected a number in (0, 1]")
    if not 0 <= args.tolerance < 1:
        raise UserError(f"--tolerance: got {args.tolerance}, expected a number in [0, 1)")
    check_seed(args.seed)


def _choose(pictures: Pictures, args: argparse.Namespace) -> Pictures:
    if args.only:
        names = list(pictures.names)
        if missing := [stem for stem in args.only if stem not in names]:
            raise UserError(f"--only: no picture with a map is called {missing[0]}; one is {names[0]}")
        return Selection(pictures, [names.index(stem) for stem in args.only])
    if args.limit and args.limit < len(pictures):
        return Selection(pictures, spread(len(pictures), args.limit))
    return pictures


def _print(results: Mapping[str, Any]) -> None:
    table = Table(title=f"Grounding on {results['pictures']} pictures: mean [95 % bootstrap interval]")
    table.add_column("encoder")
    table.add_column("Grad-CAM of")
    for metric in METRICS:
        table.add_column(metric, justify="right")
    for name, found in results["models"].items():
        for target in TARGETS:
            cells = [Interval(**found[target][m]).text() for m in METRICS]
            table.add_row(name, f"query · {target.replace('_', ' ')}", *cells)
    table.add_section()
    for name, found in results["baselines"].items():
        table.add_row(name, "(looks at nothing)", *(Interval(**found[m]).text() for m in METRICS))
    for name, targets in results["differences"].items():
        table.add_section()
        for target in TARGETS:
            cells = [Interval(**targets[target][m]).text() for m in METRICS]
            table.add_row(name, f"query · {target.replace('_', ' ')}", *cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
