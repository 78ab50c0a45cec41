"""The Backgrounds Challenge: what a classifier's decisions owe to the background.

K. Xiao, L. Engstrom, A. Ilyas, A. Madry, "Noise or Signal: The Role of Image Backgrounds in Object Recognition", ICLR
2021. On disk, as its release is: ``ROOT/VARIANT/val/NN_class/*`` for eight variants, square images of one size, and
``ROOT/fg_mask/val/NN_class/STEM.npy``. ``cast-fast backgrounds-make`` makes such a set from any labelled images.

- Accuracy on each variant. BG-Gap = accuracy on mixed_same − accuracy on mixed_rand.
- Challenge: each foreground is pasted in place onto every image of only_bg_t; one wrong answer makes it vulnerable, and
  the challenge accuracy is the share of foregrounds that are not.
- Images go in as they are, scaled to [0, 1], with the model's mean and deviation.
- A 1000-way classifier's answer over all 1000 classes is mapped by ``in_to_in9.json``, a file of the official release;
  classes without a counterpart count as wrong. Other classifiers are matched by the names of their classes.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cast_fast.data.rgb import to_rgb
from cast_fast.errors import UserError
from cast_fast.evaluate import figures
from cast_fast.evaluate.figures import Caption, Picture, Sheet, Swatch
from cast_fast.evaluate.pictures import batches, check_seed, open_output, progress
from cast_fast.evaluate.statistics import RESAMPLES, Interval, bootstrap_difference, bootstrap_mean
from cast_fast.evaluate.weights import Model, load_encoder, unique_names, warn_of_sizes
from cast_fast.files import Results

logger = logging.getLogger("cast_fast")

HELP = "measure a classifier on changed backgrounds (the Backgrounds Challenge)"

VARIANTS = ("original", "mixed_same", "mixed_rand", "mixed_next", "only_fg", "no_fg", "only_bg_b", "only_bg_t")
MASKS = "fg_mask"
MAPPING = "in_to_in9.json"
NINE = ("dog", "bird", "vehicle", "reptile", "carnivore", "insect", "instrument", "primate", "fish")
"""The official set's classes, to whose order the mapping refers; a folder's name may say more (wheeled vehicle)."""
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif"})
TITLES = {
    "original": "original",
    "mixed_same": "mixed-same: background of its class",
    "mixed_rand": "mixed-rand: of a random class",
    "mixed_next": "mixed-next: of the next class",
    "only_fg": "only-fg",
    "no_fg": "no-fg",
    "only_bg_b": "only-bg-b: box blackened",
    "only_bg_t": "only-bg-t: box tiled over",
}
_KEY = re.compile(r"^fg_(?P<foreground>.+)_bg_.+$")


@dataclasses.dataclass(frozen=True)
class Variant:
    """The images of one variant, in the order of their paths."""

    name: str
    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    """(n,) index of each image's class folder in sorted order."""
    classes: tuple[str, ...]
    """Names of the class folders, ``NN_class``."""

    def foregrounds(self) -> list[tuple[str, str]]:
        """(class folder, stem of the foreground) of each image: what the variants of one image have in common."""
        return [(path.parent.name, foreground_stem(path.stem)) for path in self.paths]


def foreground_stem(stem: str) -> str:
    """``fg_A_bg_B`` → ``A``, as mixed images may be named; any other name is its own."""
    match = _KEY.match(stem)
    return match["foreground"] if match else stem


def class_name(folder: str) -> str:
    """``03_reptile`` → ``reptile``."""
    return re.sub(r"^\d+_", "", folder)


def read_variant(root: Path, name: str, part: str = "val") -> Variant:
    """Lists one variant.

    Raises:
        UserError: the folder is missing or holds no class folder or no image.
    """
    folder = root / name / part
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: expected ROOT/VARIANT/{part}/NN_class/ as in the Backgrounds Challenge")
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    paths = [
        path
        for label in classes
        for path in sorted((folder / label).rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if not paths:
        raise UserError(f"{folder}: holds no image in class folders (NN_class/)")
    place = {label: index for index, label in enumerate(classes)}
    labels = np.array([place[path.relative_to(folder).parts[0]] for path in paths], np.int64)
    return Variant(name, tuple(paths), labels, classes)


def read_images(paths: Sequence[Path], *, text: str = "") -> Tensor:
    """Decodes images of one size: uint8 (n, 3, H, W).

    Raises:
        UserError: a file cannot be decoded or differs in size from the first; the message names it.
    """
    first = read_image(paths[0])
    images = torch.empty(len(paths), 3, *first.shape[:2], dtype=torch.uint8)
    for indices, items in batches(range(len(paths)), lambda i: read_image(paths[i]), 64, text=text):
        for index, image in zip(indices, items):
            if image.shape != first.shape:
                raise UserError(f"{paths[index]}: is {_size(image)}, expected {_size(first)} as {paths[0].name}")
            images[index] = torch.from_numpy(image.transpose(2, 0, 1))
    return images


def read_image(path: Path) -> Picture:
    """One RGB image as it is (H, W, 3).

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        with Image.open(path) as opened:
            return np.array(to_rgb(opened))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be decoded ({error})") from None


def _size(image: Picture) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def find_mapping(root: Path, mapping: Path | None, classes: Sequence[str]) -> dict[int, int] | None:
    """ImageNet class → class of the set, −1 for none: from ``--mapping``, or ``in_to_in9.json`` in or beside the root.

    The latter is left aside, and the log says so, where the set's classes are not the official nine.

    Raises:
        UserError: the named file is missing or is no such mapping.
    """
    candidates = [root / MAPPING, root.parent / MAPPING] if mapping is None else [mapping]
    path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        if mapping is not None:
            raise UserError(f"--mapping: {mapping} is missing")
        return None
    fits = len(classes) == len(NINE) and all(n in class_name(c).lower() for n, c in zip(NINE, classes))
    if mapping is None and not fits:
        logger.info("%s is left aside: it maps to %s; this set has other classes", path, ", ".join(NINE))
        return None
    try:
        return {int(source): int(target) for source, target in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: is no JSON object of class numbers ({error})") from None


def answer_table(model: Model, classes: Sequence[str], mapping: Mapping[int, int] | None) -> NDArray[np.int64]:
    """Which class of the set each output of a classifier stands for: (outputs,), −1 where none.

    A classifier of 1000 ImageNet classes goes through the mapping. Any other is matched by the names of its classes
    (``dog`` fits ``00_dog``), or, where it has none, must have as many outputs as the set has classes.

    Raises:
        UserError: the classifier cannot be matched; the message says what is missing.
    """
    assert model.classifier is not None
    outputs = model.classifier.out_features
    if outputs == 1000 and len(classes) != 1000:
        if mapping is None:
            raise UserError(
                f"{model.name}: 1000 ImageNet classes need a mapping to those of the set: {MAPPING} of the official "
                "Backgrounds Challenge beside the official data, or --mapping FILE for another set"
            )
        table = np.array([mapping.get(index, -1) for index in range(outputs)], np.int64)
        if table.max() >= len(classes):
            raise UserError(f"{MAPPING}: maps to class {table.max()}, but the set has {len(classes)} classes")
        return table
    names = [class_name(folder).lower() for folder in classes]
    if model.classes is not None:
        own = [class_name(name).lower() for name in model.classes]
        if missing := sorted(set(names) - set(own)):
            raise UserError(f"{model.name}: knows no class {', '.join(missing[:3])}; its classes: {', '.join(own[:9])}")
        return np.array([names.index(name) if name in names else -1 for name in own], np.int64)
    if outputs != len(classes):
        raise UserError(
            f"{model.name}: has {outputs} outputs without names, expected {len(classes)} as the set has classes"
        )
    return np.arange(outputs)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model said about n images."""

    predicted: NDArray[np.int64]
    """(n,) class of the set, −1 for a class that the set does not have."""
    output: NDArray[np.int64]
    """(n,) the classifier's own class."""
    confidence: NDArray[np.float32]
    """(n,) softmax probability of that output."""


class Judge:
    """A classifier on a device, with its answers translated into the set's classes."""

    def __init__(self, model: Model, table: NDArray[np.int64], device: torch.device, batch: int) -> None:
        self.model, self.device, self.batch = model.to(device), device, batch
        self.table = torch.from_numpy(table).to(device)

    @torch.no_grad()
    def answer(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 images (n, 3, H, W) on the device → predicted (n,), output (n,), confidence (n,)."""
        best = self.model.scores(images).softmax(dim=1).max(dim=1)
        return self.table[best.indices], best.indices, best.values

    def answers(self, images: Tensor, *, text: str = "") -> Answers:
        """The same for any number of images, in batches."""
        parts = [
            [part.cpu() for part in self.answer(images[start : start + self.batch].to(self.device))]
            for start in progress(range(0, len(images), self.batch), text)
        ]
        predicted, output, confidence = (torch.cat(column).numpy() for column in zip(*parts))
        return Answers(predicted, output, confidence)


@dataclasses.dataclass(frozen=True)
class Challenge:
    """The adversarial challenge over F foregrounds and B backgrounds."""

    vulnerable: NDArray[np.bool_]
    """(F,) whether some background made the model wrong."""
    breaker: NDArray[np.int64]
    """(F,) index of the first background found to do so, −1 where there is none."""
    answer: NDArray[np.int64]
    """(F,) the wrong answer given there (−1: a class outside the set); −2 where there is none."""
    judged: int
    """Number of composites that were classified: F·B without early exit."""


def challenge(
    judge: Judge,
    foregrounds: Tensor,
    masks: Tensor,
    labels: NDArray[np.int64],
    backgrounds: Tensor,
    order: NDArray[np.int64],
    *,
    text: str = "",
) -> Challenge:
    """Pastes every foreground onto every background until one makes the model wrong.

    All foregrounds that still stand meet the same next backgrounds, as many as fill a batch, so that batches stay full
    while the field thins out. The result does not depend on ``order`` or on the batch, only the work does.

    Args:
        judge: the model.
        foregrounds: uint8 (F, 3, H, W).
        masks: bool (F, H, W), True on the foreground.
        labels: (F,) class of each foreground.
        backgrounds: uint8 (B, 3, H, W).
        order: permutation of the backgrounds; those most likely to mislead should come first.
        text: of the progress bar.
    """
    count, device = len(foregrounds), judge.device
    # once, not for every batch: bytes, 1.4 GB for the official set
    foregrounds, masks, backgrounds = (held.to(device) for held in (foregrounds, masks, backgrounds))
    vulnerable = np.zeros(count, bool)
    breaker, answer = np.full(count, -1), np.full(count, -2)
    standing = np.arange(count)
    done = judged = 0
    steps = iter(progress(range(len(order)), text))
    while done < len(order) and len(standing):
        width = min(max(1, judge.batch // len(standing)), len(order) - done)
        chosen = order[done : done + width]
        scenery = backgrounds[torch.from_numpy(chosen).to(device)]
        group = max(1, judge.batch // width)
        for start in range(0, len(standing), group):
            rows = standing[start : start + group]
            index = torch.from_numpy(rows).to(device)
            pasted = torch.where(masks[index][:, None, None], foregrounds[index][:, None], scenery[None])
            predicted = judge.answer(pasted.flatten(0, 1))[0].view(len(rows), width)
            wrong = (predicted != torch.from_numpy(labels[rows]).to(device)[:, None]).cpu().numpy()
            said = predicted.cpu().numpy()
            judged += wrong.size
            hit = wrong.any(axis=1)
            first = wrong.argmax(axis=1)
            vulnerable[rows[hit]] = True
            breaker[rows[hit]] = chosen[first[hit]]
            answer[rows[hit]] = said[np.arange(len(rows)), first][hit]
        standing = standing[~vulnerable[standing]]
        done += width
        for _ in range(width):
            next(steps, None)
    for _ in steps:  # finishes the bar after an early exit
        pass
    return Challenge(vulnerable, breaker, answer, judged)


@dataclasses.dataclass(frozen=True)
class Foregrounds:
    """What the challenge pastes."""

    names: list[tuple[str, str]]
    images: Tensor
    masks: Tensor
    labels: NDArray[np.int64]


def read_foregrounds(root: Path, original: Variant, *, text: str = "") -> Foregrounds:
    """Originals with their masks.

    Raises:
        UserError: there are no masks, one has no original, or a shape differs.
    """
    folder = root / MASKS / "val"
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: expected masks STEM.npy in class folders")
    by_name = dict(zip(original.foregrounds(), original.paths))
    paths = sorted(folder.glob("*/*.npy"))
    if not paths:
        raise UserError(f"{folder}: holds no NN_class/STEM.npy")
    names = [(path.parent.name, path.stem) for path in paths]
    for name, path in zip(names, paths):
        if name not in by_name:
            raise UserError(f"{path}: has no original of that name in {original.paths[0].parent.parent}")
    images = read_images([by_name[name] for name in names], text=text)
    masks = []
    for path in paths:
        try:
            mask = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: cannot be read as a mask ({error})") from None
        if mask.ndim == 3:
            mask = mask[:, :, 0]
        if mask.shape != tuple(images.shape[2:]):
            raise UserError(f"{path}: has shape {mask.shape}, expected {tuple(images.shape[2:])}")
        masks.append(mask.astype(np.uint8) > 0)
    labels = np.array([original.classes.index(label) for label, _ in names], np.int64)
    return Foregrounds(names, images, torch.from_numpy(np.stack(masks)), labels)


@dataclasses.dataclass
class Report:
    """Everything measured on one model."""

    judge: Judge
    variants: dict[str, Answers]
    challenge: Challenge | None

    @property
    def model(self) -> Model:
        """The model that was measured."""
        return self.judge.model


def measure(
    model: Model,
    variants: Mapping[str, Variant],
    images: Mapping[str, Tensor],
    foregrounds: Foregrounds | None,
    mapping: Mapping[int, int] | None,
    device: torch.device,
    batch: int,
) -> Report:
    """Answers on every variant and, with foregrounds and only_bg_t, the challenge."""
    return measure_all([model], variants, images.__getitem__, foregrounds, mapping, device, batch)[0]


def measure_all(
    models: Sequence[Model],
    variants: Mapping[str, Variant],
    read: Callable[[str], Tensor],
    foregrounds: Foregrounds | None,
    mapping: Mapping[int, int] | None,
    device: torch.device,
    batch: int,
) -> list[Report]:
    """``measure`` for several models, with the images of one variant at a time in memory.

    Args:
        models: classifiers.
        variants: what to measure.
        read: name of a variant → its images, uint8 (n, 3, H, W).
        foregrounds: what the challenge pastes; None for no challenge.
        mapping: see ``answer_table``.
        device: where to compute.
        batch: images a forward pass.
    """
    classes = variants["original"].classes
    judges = [Judge(model, answer_table(model, classes, mapping), device, batch) for model in models]
    reports = [Report(judge, {}, None) for judge in judges]
    for name in variants:
        images = read(name)
        for report in reports:
            report.variants[name] = report.judge.answers(images, text=f"{report.model.name}: {name}")
            if foregrounds is not None and name == "only_bg_t":
                # a background that the model is sure about by itself is the likeliest to outvote a foreground
                order = np.argsort(-report.variants[name].confidence, kind="stable")
                text = f"{report.model.name}: challenge"
                held = foregrounds.images, foregrounds.masks, foregrounds.labels
                report.challenge = challenge(report.judge, *held, images, order, text=text)
    return reports


def correct(report: Report, variant: Variant) -> NDArray[np.bool_]:
    """(n,) whether each image of a variant was classified rightly."""
    return report.variants[variant.name].predicted == variant.labels


def background_gap(same: NDArray, rand: NDArray, *, resamples: int, seed: int) -> Interval:
    """Accuracy on mixed_same minus accuracy on mixed_rand; the two are resampled apart, since they need not pair up."""
    rng = np.random.default_rng(seed)
    means = [
        np.array([v[rng.integers(len(v), size=len(v))].mean() for _ in range(resamples)])
        for v in (np.asarray(same, np.float64), np.asarray(rand, np.float64))
    ]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    return Interval(float(np.mean(same) - np.mean(rand)), float(low), float(high), len(same) + len(rand))


def summary(report: Report, variants: Mapping[str, Variant], *, resamples: int, seed: int) -> dict[str, Any]:
    """Accuracies with intervals, overall and by class, BG-Gap and the challenge, as JSON."""
    result: dict[str, Any] = {"accuracy": {}, "by_class": {}}
    for name, variant in variants.items():
        right = correct(report, variant)
        result["accuracy"][name] = bootstrap_mean(right, resamples=resamples, seed=seed).to_json()
        result["by_class"][name] = {
            class_name(label): float(right[variant.labels == index].mean())
            for index, label in enumerate(variant.classes)
            if (variant.labels == index).any()
        }
    if {"mixed_same", "mixed_rand"} <= variants.keys():
        same, rand = (correct(report, variants[name]) for name in ("mixed_same", "mixed_rand"))
        result["bg_gap"] = background_gap(same, rand, resamples=resamples, seed=seed).to_json()
    if report.challenge is not None:
        found = report.challenge
        result["challenge_accuracy"] = bootstrap_mean(~found.vulnerable, resamples=resamples, seed=seed).to_json()
        result["challenge_composites_judged"] = found.judged
    return result


def compare(first: Report, second: Report, variants: Mapping[str, Variant], *, resamples: int, seed: int) -> dict:
    """Paired differences of two models, second − first, on the same images."""
    result = {
        name: bootstrap_difference(correct(first, v), correct(second, v), resamples=resamples, seed=seed).to_json()
        for name, v in variants.items()
    }
    if first.challenge is not None and second.challenge is not None:
        result["challenge"] = bootstrap_difference(
            ~first.challenge.vulnerable, ~second.challenge.vulnerable, resamples=resamples, seed=seed
        ).to_json()
    return result


def changed_decisions(
    reports: Sequence[Report], variants: Mapping[str, Variant], shown: Sequence[str]
) -> list[tuple[tuple[str, str], list[int]]]:
    """Images that some model recognises in the original and that some model misses in a variant that shows the object.

    Those come first where the models disagree most, then those with the most misses.

    Returns:
        (class folder, stem), and the index of the image in each shown variant.
    """
    places = [{key: i for i, key in enumerate(variants[name].foregrounds())} for name in shown]
    ranked = []
    for key, index in places[0].items():
        if not all(key in place for place in places):
            continue
        rows = [place[key] for place in places]
        right = np.array([[correct(r, variants[n])[i] for n, i in zip(shown, rows)] for r in reports])
        if not right[:, 0].any() or right.all():
            continue
        with_object = [number for number, name in enumerate(shown) if name not in ("no_fg", "only_bg_b", "only_bg_t")]
        seen = right[:, with_object]
        if seen.all():
            continue
        disagreement = int((seen != seen[:1]).sum())
        ranked.append((-disagreement, -int((~seen).sum()), index, key, rows))
    return [(key, rows) for *_, key, rows in sorted(ranked)]


def decision_sheet(
    reports: Sequence[Report],
    variants: Mapping[str, Variant],
    image: Callable[[str, int], Tensor],
    foregrounds: Foregrounds | None,
    rows: int,
) -> Sheet:
    """Figure S4: the same object on changed backgrounds, with each model's decision below, and its adversary last.

    ``image`` gives an image by variant and number, uint8 (3, H, W).
    """
    shown = [name for name in VARIANTS if name in variants]
    columns = [TITLES[name] for name in shown]
    if foregrounds is not None:
        columns.append("adversarial background")
    title = "Decisions that change with the background"
    note = "Below each picture the decision and its confidence"
    if len(reports) > 1:
        note += ", from top to bottom: " + ", ".join(report.model.name for report in reports)
    note += "."
    if foregrounds is not None:
        note += " Last: a background that misleads the first model that one was found for."
        if len(reports) > 1:
            note += " A model that is right there may still be wrong on others, and then its caption says so."
    classes = variants["original"].classes
    sheet = Sheet(
        columns,
        tile=(150, 150),
        title=title,
        note=note,
        legend=[Swatch(figures.RIGHT, "right"), Swatch(figures.WRONG, "wrong: the class that was named")],
    )
    found = changed_decisions(reports, variants, shown)
    for (label, stem), places in found[:rows]:
        truth = classes.index(label)
        tiles: list[Picture | None] = [picture(image(name, i)) for name, i in zip(shown, places)]
        captions: list[list[Caption]] = [
            [_decision(report, classes, truth, name, i) for report in reports] for name, i in zip(shown, places)
        ]
        if foregrounds is not None:
            tile, lines = _adversary(reports, foregrounds, image, classes, (label, stem))
            tiles.append(tile)
            captions.append(lines)
        sheet.add_row(tiles, label=f"{class_name(label)} {stem}", captions=captions)
    if not found:
        sheet.note = "No decision on an image that was recognised changed with its background."
    return sheet


def picture(image: Tensor) -> Picture:
    """(3, H, W) → (H, W, 3)."""
    return image.permute(1, 2, 0).contiguous().numpy()


def _decision(report: Report, classes: Sequence[str], truth: int, name: str, index: int) -> Caption:
    return _caption(report.model, report.variants[name], index, classes, truth)


def _caption(model: Model, answers: Answers, index: int, classes: Sequence[str], truth: int, more: str = "") -> Caption:
    predicted = int(answers.predicted[index])
    name = _answer_name(model, classes, predicted, int(answers.output[index]))
    text = f"{name} {answers.confidence[index]:.0%}{more}"
    return Caption(text, figures.RIGHT if predicted == truth else figures.WRONG)


def _answer_name(model: Model, classes: Sequence[str], predicted: int, output: int) -> str:
    if predicted >= 0:
        return class_name(classes[predicted])
    return "another class" if model.classes is None else model.classes[output]


def _adversary(
    reports: Sequence[Report],
    foregrounds: Foregrounds,
    image: Callable[[str, int], Tensor],
    classes: Sequence[str],
    key: tuple[str, str],
) -> tuple[Picture | None, list[Caption]]:
    """The composite that misled the first model that was misled, and what every model says to that very composite."""
    if key not in foregrounds.names:
        return None, []
    row = foregrounds.names.index(key)
    truth = int(foregrounds.labels[row])
    found = [report.challenge for report in reports]
    breaker = next((int(c.breaker[row]) for c in found if c is not None and c.vulnerable[row]), None)
    if breaker is None:
        return None, [Caption("right on every background", figures.RIGHT) for _ in reports]
    pasted = torch.where(foregrounds.masks[row][None], foregrounds.images[row], image("only_bg_t", breaker))
    captions = []
    for report, own in zip(reports, found):
        said = report.judge.answers(pasted[None])
        elsewhere = own is not None and bool(own.vulnerable[row]) and said.predicted[0] == truth
        captions.append(_caption(report.model, said, 0, classes, truth, "; wrong on others" if elsewhere else ""))
    return picture(pasted), captions


def answers_table(reports: Sequence[Report], variants: Mapping[str, Variant]) -> str:
    """CSV: variant, file, class, then each model's answer."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["variant", "file", "class", *(report.model.name for report in reports)])
    for name, variant in variants.items():
        for index, image in enumerate(variant.paths):
            said = [
                _answer_name(
                    r.model,
                    variant.classes,
                    int(r.variants[name].predicted[index]),
                    int(r.variants[name].output[index]),
                )
                for r in reports
            ]
            label = class_name(variant.classes[variant.labels[index]])
            writer.writerow([name, f"{image.parent.name}/{image.name}", label, *said])
    return text.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``cast-fast backgrounds``."""
    parser.add_argument("model", nargs="+", type=Path, metavar="MODEL", help="classifiers; or runs, see --probe-on")
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder of the variants")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where results and pictures go; else backgrounds/ in the first run"
    )
    parser.add_argument("--mapping", type=Path, metavar="FILE", help=f"{MAPPING}, if not in or beside ROOT")
    parser.add_argument(
        "--probe-on",
        default="original",
        metavar="VARIANT",
        help="a MODEL without classifier gets a linear one, fitted to ROOT/VARIANT/train",
    )
    parser.add_argument("--challenge", action=argparse.BooleanOptionalAction, default=True, help="the adversarial part")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which to measure")
    parser.add_argument("--rows", type=int, default=8, help="rows of the picture sheet")
    parser.add_argument("--batch", type=int, default=256, help="images a batch")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals and of a fitted classifier")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap")


def main(args: argparse.Namespace) -> int:
    """Measures classifiers on every variant and, unless told otherwise, in the challenge."""
    from cast_fast.train import resolve_device

    if args.batch < 1 or args.resamples < 1 or args.rows < 0:
        raise UserError("--batch and --resamples: expected at least 1; --rows: at least 0")
    check_seed(args.seed)
    device = resolve_device(args.device)
    if not args.root.is_dir():
        raise UserError(f"{args.root}: no such folder; expected ROOT/VARIANT/val/NN_class/")
    names = [name for name in VARIANTS if name in {"original", *args.variants}]
    variants = {name: read_variant(args.root, name) for name in names}
    for name, variant in variants.items():
        if variant.classes != variants["original"].classes:
            raise UserError(f"{args.root / name / 'val'}: its class folders differ from those of original/val")
    models = unique_names([load_encoder(path) for path in args.model])
    warn_of_sizes(models, min(read_image(variants["original"].paths[0]).shape[:2]))
    mapping = find_mapping(args.root, args.mapping, variants["original"].classes)
    for model in models:
        if model.classifier is None:
            fit_classifier(model, args.root, args.probe_on, device, args.batch, args.seed)
        else:
            answer_table(model, variants["original"].classes, mapping)  # before an hour is spent
    args.out = open_output(args.out, args.model[0], "backgrounds")
    foregrounds = None
    if args.challenge and "only_bg_t" in variants:
        foregrounds = read_foregrounds(args.root, variants["original"], text="reading foregrounds")
    reports = measure_all(
        models,
        variants,
        lambda name: read_images(variants[name].paths, text=f"reading {name}"),
        foregrounds,
        mapping,
        device,
        args.batch,
    )

    results: dict[str, Any] = {"root": str(args.root), "models": {}, "differences": {}}
    for report in reports:
        results["models"][report.model.name] = {
            "weights": report.model.provenance.get("file"),
            **summary(report, variants, resamples=args.resamples, seed=args.seed),
        }
    for report in reports[1:]:
        name = f"{report.model.name} - {reports[0].model.name}"
        results["differences"][name] = compare(reports[0], report, variants, resamples=args.resamples, seed=args.seed)
    sheet = decision_sheet(
        reports, variants, lambda name, i: read_images([variants[name].paths[i]])[0], foregrounds, args.rows
    )
    with Results(args.out) as files:
        files.write("backgrounds.json", json.dumps(results, indent=2) + "\n")
        files.write("backgrounds.csv", answers_table(reports, variants))
        files.write("decisions.png", sheet.png())
    _print(results, names)
    print("\n".join(map(str, files.written)))
    return 0


def fit_classifier(model: Model, root: Path, variant: str, device: torch.device, batch: int, seed: int) -> None:
    """Gives an encoder a linear classifier, fitted to ``ROOT/VARIANT/train`` on frozen features.

    Raises:
        UserError: there is no training part.
    """
    from cast_fast.evaluate.linear_probe import fit_linear, sweep

    if not (root / variant / "train").is_dir():
        raise UserError(
            f"{model.name} holds no classifier and {root / variant / 'train'} is missing: name a classifier (cast-fast "
            "probe writes linear.safetensors), or add training images"
        )
    training = read_variant(root, variant, "train")
    images = read_images(training.paths, text="reading training images")
    model.to(device)
    features = torch.cat(
        [
            model.features(images[start : start + batch].to(device)).cpu()
            for start in progress(range(0, len(images), batch), f"{model.name}: features")
        ]
    )
    labels = torch.from_numpy(training.labels)
    chosen = sweep(features, labels, len(training.classes), seed=seed)
    model.classifier = fit_linear(features, labels, len(training.classes), chosen.best, seed=seed).to(device)
    model.classes = tuple(class_name(label) for label in training.classes)
    logger.info(
        "%s: linear classifier fitted to %d images of %s/train, learning rate %g",
        model.name,
        len(images),
        variant,
        chosen.best,
    )


def _print(results: Mapping[str, Any], variants: Sequence[str]) -> None:
    models = results["models"]
    table = Table(title="Accuracy in %, with 95 % bootstrap intervals")
    table.add_column("variant")
    for name in models:
        table.add_column(name, justify="right")
    rows = [(name, lambda found, name=name: found["accuracy"].get(name)) for name in variants]
    rows += [("BG-Gap", lambda found: found.get("bg_gap")), ("challenge", lambda f: f.get("challenge_accuracy"))]
    for name, pick in rows:
        cells = [Interval(**found).text(100, 1) if (found := pick(model)) else "–" for model in models.values()]
        table.add_row(name, *cells)
    for name, differences in results["differences"].items():
        table.add_section()
        for variant, difference in differences.items():
            table.add_row(f"{variant}: {name}", *[""] * (len(models) - 1), Interval(**difference).text(100, 1))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
