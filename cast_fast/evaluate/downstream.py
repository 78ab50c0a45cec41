"""``cast-fast downstream A B``: where two classifiers look for the true class when one is right and the other is wrong.

A classifier is what ``cast-fast probe`` writes (linear or finetuned), or a supervised ResNet of torchvision in a local
file. Its Grad-CAM for class c has a closed form, since the score is linear in the averaged activations: the weights are
row c of the classifier, and M = ReLU(Σ_k w_ck A_k) (for such networks Grad-CAM and the class activation map of B. Zhou
et al., CVPR 2016, agree up to a factor). Both see the same central crops.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cast_fast.errors import UserError
from cast_fast.evaluate import figures
from cast_fast.evaluate.features import stack
from cast_fast.evaluate.figures import Caption, HeatBar, Picture, Sheet, Swatch
from cast_fast.evaluate.grounding import METRICS, score
from cast_fast.evaluate.pictures import (
    Pictures,
    add_dataset_arguments,
    batches,
    central_box,
    check_seed,
    cut,
    cut_map,
    open_output,
    open_pictures,
)
from cast_fast.evaluate.statistics import RESAMPLES, Interval, bootstrap_difference, bootstrap_mean, sign_test
from cast_fast.evaluate.weights import Model, load_classifier, unique_names, warn_of_sizes
from cast_fast.files import Results
from cast_fast.objective import gradcam_map

logger = logging.getLogger("cast_fast")

HELP = "compare where two classifiers look when one is right and the other wrong"


@dataclasses.dataclass(frozen=True)
class View:
    """The central crop of a picture, and of its map where there is one."""

    image: Picture
    mask: NDArray[np.bool_] | None


@dataclasses.dataclass(frozen=True)
class Decision:
    """One classifier on one picture."""

    right: bool
    answer: str
    """Name of the class that it named."""
    confidence: float
    """Softmax probability of that class."""
    truth: float
    """Softmax probability of the true class."""
    cam: NDArray[np.float32]
    """(h, w) Grad-CAM of the true class."""


def class_rows(
    model: Model, labels: Sequence[str], mapping: Mapping[str, Sequence[str | int]] | None = None
) -> dict[str, list[int]]:
    """Outputs of a classifier that stand for each label: by name, or by number where it has no names.

    A name that occurs more than once (ImageNet has two cranes) stands for all its outputs.

    Args:
        model: the classifier.
        labels: of the pictures.
        mapping: for labels that are none of its classes, the classes that count as right, by name or number:
            ``{"dog": ["golden retriever", 208]}``.

    Raises:
        UserError: a label is none of its classes and is not mapped to any.
    """
    assert model.classifier is not None
    names = model.classes or tuple(str(number) for number in range(model.classifier.out_features))
    lower = [name.lower() for name in names]
    rows = {}
    for label in sorted(set(labels)):
        own = [label] if label.lower() in lower else (mapping or {}).get(label, [])
        wanted = {entry if isinstance(entry, int) else entry.lower() for entry in own}
        rows[label] = [i for i, name in enumerate(lower) if name in wanted or i in wanted]
        if not rows[label]:
            shown = ", ".join(names[:5])
            raise UserError(
                f"{model.name}: no class is called {label!r}, and --mapping names none for it; its {len(names)} "
                f"classes begin with {shown}"
            )
    return rows


@torch.no_grad()
def decide(
    model: Model, images: Sequence[Picture], labels: Sequence[str], rows: dict[str, list[int]], device: torch.device
) -> list[Decision]:
    """Answers and Grad-CAM maps of the true class."""
    assert model.classifier is not None
    activations = model.trunk(model.normalise(stack(list(images)).to(device))).float()
    scores = model.classifier(activations.mean(dim=(2, 3)))
    shares = scores.softmax(dim=1).cpu()
    truth = [max(rows[label], key=lambda r, i=i: float(shares[i, r])) for i, label in enumerate(labels)]
    cams = gradcam_map(activations, model.classifier.weight[truth]).cpu().numpy()
    answer = shares.argmax(dim=1).tolist()
    names = model.classes or tuple(str(number) for number in range(scores.shape[1]))
    return [
        Decision(
            answer[i] in rows[label],
            names[answer[i]],
            float(shares[i, answer[i]]),
            float(shares[i, rows[label]].sum()),
            cams[i],
        )
        for i, label in enumerate(labels)
    ]


def read_view(pictures: Pictures, index: int, size: int) -> View:
    """The central crop, image and map alike."""
    image = pictures.image(index)
    box = central_box(*image.size)
    saliency = pictures.saliency(index)
    mask = None if saliency is None else cut_map(saliency, box, size)
    return View(cut(image, box, size), mask if mask is not None and mask.any() else None)


def sheet_of(
    title: str, models: Sequence[Model], views: Sequence[View], rows: Sequence[tuple[str, str, Sequence[Decision]]]
) -> Sheet:
    """Pictures with both classifiers' Grad-CAM of the true class; ``rows`` are (name, true class, decisions)."""
    side = len(views[0].image) if views else 224
    side = side if 128 <= side <= 224 else min(max(side, 128), 224)
    with_maps = any(view.mask is not None for view in views)
    columns = ["picture", *(["saliency map"] if with_maps else []), *(model.name for model in models)]
    note = "Grad-CAM of the true class. Below it the class that the model named, with its confidence"
    sheet = Sheet(
        columns,
        tile=(side, side),
        title=title,
        note=note + (", and the cosine of Grad-CAM with the saliency map." if with_maps else "."),
        legend=[
            HeatBar(),
            *([Swatch(figures.OUTLINE, "border of the salient region")] if with_maps else []),
            Swatch(figures.RIGHT, "right"),
            Swatch(figures.WRONG, "wrong"),
        ],
    )
    for view, (name, label, decisions) in zip(views, rows):
        mask = view.mask
        tiles: list[Picture | None] = [view.image if mask is None else figures.outline(view.image, mask)]
        captions: list[list[Caption]] = [[Caption(f"true class: {label}")]]
        if with_maps:
            tiles.append(None if mask is None else figures.mask_picture(mask))
            captions.append([])
        for decision in decisions:
            drawn = figures.overlay(view.image, decision.cam)
            tiles.append(drawn if mask is None else figures.outline(drawn, mask))
            colour = figures.RIGHT if decision.right else figures.WRONG
            lines = [Caption(f"{decision.answer} {decision.confidence:.0%}", colour)]
            if mask is not None:
                cosine = score(decision.cam, mask)["cosine"]
                lines.append(Caption(f"cosine {cosine:.2f}" if decision.cam.any() else "map of zeros"))
            captions.append(lines)
        sheet.add_row(tiles, label=name, captions=captions)
    return sheet


def ranked(right: Sequence[Decision], wrong: Sequence[Decision]) -> list[int]:
    """Pictures that the first gets right and the second wrong, those first where both are surest."""
    found = [i for i, (a, b) in enumerate(zip(right, wrong)) if a.right and not b.right]
    return sorted(found, key=lambda i: -right[i].truth * wrong[i].confidence)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``cast-fast downstream``."""
    parser.add_argument("first", type=Path, metavar="A", help="file of a classifier")
    parser.add_argument("second", type=Path, metavar="B", help="file of another one")
    add_dataset_arguments(parser, labels=True)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where sheets and numbers go; else downstream/ in the first run"
    )
    parser.add_argument(
        "--only", type=Path, metavar="CSV", help="file with a column stem: look at these pictures alone"
    )
    parser.add_argument(
        "--mapping",
        type=Path,
        metavar="JSON",
        help="label → classes that count as right, by name or number, for classifiers that lack the label",
    )
    parser.add_argument("--rows", type=int, default=8, help="pictures on a sheet")
    parser.add_argument("--size", type=int, default=0, help="side of the crops in pixels; 0 for that of A's training")
    parser.add_argument("--batch", type=int, default=64, help="pictures a forward pass")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap")


def main(args: argparse.Namespace) -> int:
    """Compares two classifiers and draws a sheet for either direction."""
    from cast_fast.train import resolve_device

    if min(args.rows, args.batch, args.resamples) < 1 or (args.size and args.size < 32):
        raise UserError("--rows, --batch, --resamples: expected at least 1; --size: at least 32")
    check_seed(args.seed)
    if args.labels is None and args.data is None:
        raise UserError("--labels is missing: expected a CSV file with columns stem,class")
    device = resolve_device(args.device)
    models = unique_names([load_classifier(path).to(device) for path in (args.first, args.second)])
    size = args.size or next((model.size for model in models if model.size), 224)
    warn_of_sizes(models, size)
    pictures = open_pictures(args.images, args.saliency, args.data, labels=args.labels, need_labels=True)
    chosen = _chosen(pictures, args.only)
    labels = [str(pictures.labels[i]) for i in chosen]
    mapping = None if args.mapping is None else _read_mapping(args.mapping)
    rows = [class_rows(model, labels, mapping) for model in models]

    args.out = open_output(args.out, args.first, "downstream")
    decisions: list[list[Decision]] = [[], []]
    scores: list[list[dict[str, float]]] = [[], []]
    for indices, views in batches(chosen, lambda i: read_view(pictures, i, size), args.batch, text="classifying"):
        names = [str(pictures.labels[i]) for i in indices]
        for number, model in enumerate(models):
            said = decide(model, [view.image for view in views], names, rows[number], device)
            decisions[number] += said
            scores[number] += [score(d.cam, v.mask) if v.mask is not None else {} for d, v in zip(said, views)]
    results = _results(models, decisions, scores, args)
    with Results(args.out) as files:
        files.write("downstream.json", json.dumps(results, indent=2) + "\n")
        files.write("downstream.csv", _table(pictures, chosen, models, decisions, scores))
        for a, b in ((0, 1), (1, 0)):
            best = ranked(decisions[a], decisions[b])[: args.rows]
            views = [read_view(pictures, chosen[i], size) for i in best]
            entries = [(str(pictures.names[chosen[i]]), labels[i], [d[i] for d in decisions]) for i in best]
            title = f"{models[a].name} is right, {models[b].name} is wrong"
            sheet = sheet_of(title, models, views, entries)
            if not best:
                sheet.note = "There is no such picture."
            files.write(f"downstream-{'AB'[a]}-right.png", sheet.png())
    _print(results, models)
    print("\n".join(map(str, files.written)))
    return 0


def _read_mapping(path: Path) -> dict[str, list[str | int]]:
    try:
        mapping = json.loads(path.read_text())
        if not all(isinstance(own, list) and all(type(e) in (int, str) for e in own) for own in mapping.values()):
            raise ValueError("a label is not mapped to a list of names or numbers")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--mapping: {path} is no JSON object of lists ({error})") from None
    return mapping


def _chosen(pictures: Pictures, only: Path | None) -> list[int]:
    if only is None:
        return list(range(len(pictures)))
    try:
        with only.open(newline="", encoding="utf-8-sig") as file:
            stems = {row["stem"] for row in csv.DictReader(file)}
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise UserError(f"--only: {only} cannot be read as CSV with a column stem ({error})") from None
    chosen = [i for i, name in enumerate(pictures.names) if name in stems]
    if not chosen:
        raise UserError(f"--only: {only} names none of the {len(pictures)} labelled pictures")
    return chosen


def _results(
    models: Sequence[Model],
    decisions: Sequence[Sequence[Decision]],
    scores: Sequence[Sequence[dict[str, float]]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    keep = {"resamples": args.resamples, "seed": args.seed}
    right = [np.array([decision.right for decision in said]) for said in decisions]
    wins = [int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())]
    results: dict[str, Any] = {
        "pictures": len(right[0]),
        "models": [{"name": m.name, "weights": m.provenance.get("file"), "arch": m.arch} for m in models],
        "accuracy": [bootstrap_mean(r, **keep).to_json() for r in right],
        "accuracy_difference": bootstrap_difference(right[0], right[1], **keep).to_json(),
        "both_right": int((right[0] & right[1]).sum()),
        "only_first_right": wins[0],
        "only_second_right": wins[1],
        "neither_right": int((~right[0] & ~right[1]).sum()),
        "mcnemar_p": sign_test(*wins),
    }
    mapped = [i for i, found in enumerate(scores[0]) if found]
    if mapped:
        values = {m: [np.array([own[i][m] for i in mapped]) for own in scores] for m in METRICS}
        results["pictures_with_map"] = len(mapped)
        results["grounding"] = [{m: bootstrap_mean(values[m][n], **keep).to_json() for m in METRICS} for n in (0, 1)]
        results["grounding_difference"] = {m: bootstrap_difference(*values[m], **keep).to_json() for m in METRICS}
    return results


def _table(
    pictures: Pictures,
    chosen: Sequence[int],
    models: Sequence[Model],
    decisions: Sequence[Sequence[Decision]],
    scores: Sequence[Sequence[dict[str, float]]],
) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    columns = [f"{m.name}: {c}" for m in models for c in ("answer", "confidence", "p_true", *METRICS)]
    writer.writerow(["stem", "class", *columns])
    for row, index in enumerate(chosen):
        cells = []
        for said, found in zip(decisions, scores):
            own = said[row]
            cells += [own.answer, f"{own.confidence:.6f}", f"{own.truth:.6f}"]
            cells += [f"{found[row][m]:.6f}" if found[row] else "" for m in METRICS]
        writer.writerow([pictures.names[index], pictures.labels[index], *cells])
    return text.getvalue()


def _print(results: dict[str, Any], models: Sequence[Model]) -> None:
    table = Table(title=f"{results['pictures']} pictures; 95 % bootstrap intervals")
    for name in ("", *(model.name for model in models), f"{models[1].name} - {models[0].name}"):
        table.add_column(name, justify="right" if name else "left")
    cells = [Interval(**found).text(100, 1) for found in results["accuracy"]]
    table.add_row("accuracy, %", *cells, Interval(**results["accuracy_difference"]).text(100, 1))
    for metric in METRICS if "grounding" in results else ():
        cells = [Interval(**found[metric]).text() for found in results["grounding"]]
        difference = Interval(**results["grounding_difference"][metric]).text()
        table.add_row(f"{metric} of Grad-CAM, true class", *cells, difference)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(
        f"both right {results['both_right']}, only {models[0].name} {results['only_first_right']}, "
        f"only {models[1].name} {results['only_second_right']}, neither {results['neither_right']}; "
        f"McNemar p = {results['mcnemar_p']:.3g}"
    )
