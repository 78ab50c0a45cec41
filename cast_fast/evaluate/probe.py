"""``cast-fast probe``: what the features of one or several encoders are worth for classification.

Labelled pictures are divided into training and test pictures (column ``split`` of the labels, or a stratified draw).
The features of the central crops are computed once and kept. Then k nearest neighbours, linear classification and, on
request, finetuning; learning rates are chosen on a fifth of the training pictures, never on the test pictures. Every
accuracy comes with a bootstrap interval over the test pictures, and with several encoders so does every difference.
"""

from __future__ import annotations

import argparse
import csv
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
from torch import Tensor, nn

from cast_fast.errors import UserError
from cast_fast.evaluate import finetune, knn, linear_probe
from cast_fast.evaluate.features import default_cache, extract
from cast_fast.evaluate.linear_probe import Sweep, hold_out
from cast_fast.evaluate.pictures import (
    Pictures,
    add_dataset_arguments,
    check_seed,
    open_output,
    open_pictures,
    read_split,
)
from cast_fast.evaluate.statistics import RESAMPLES, Interval, bootstrap_difference, bootstrap_mean
from cast_fast.evaluate.weights import Model, load_encoder, unique_names
from cast_fast.export import describe, safetensors_file, trunk_state
from cast_fast.files import Results

logger = logging.getLogger("cast_fast")

HELP = "classify with frozen features (k nearest neighbours, linear) or by finetuning"


def divide(labels: Tensor, split: Sequence[str | None], test_share: float, seed: int) -> tuple[list[int], list[int]]:
    """Training and test indices: as the split says, or a stratified draw where it says nothing.

    Raises:
        UserError: only some pictures have a split, or one part is empty.
    """
    named = [value is not None for value in split]
    if any(named) and not all(named):
        raise UserError(
            f"--labels: column split is filled for {sum(named)} of {len(named)} pictures, expected all or none"
        )
    if all(named):
        test = [value == "test" for value in split]
    else:
        test = hold_out(labels, test_share, seed).tolist()
    parts = [i for i, t in enumerate(test) if not t], [i for i, t in enumerate(test) if t]
    if not parts[0] or not parts[1]:
        raise UserError(f"got {len(parts[0])} training and {len(parts[1])} test pictures, expected some of both")
    return parts


def untrained(labels: Tensor, training: Sequence[int], test: Sequence[int]) -> list[int]:
    """Classes that occur among the test pictures alone, which a column split may lead to."""
    return sorted(set(labels[list(test)].tolist()) - set(labels[list(training)].tolist()))


def class_numbers(pictures: Pictures) -> tuple[list[str], Tensor]:
    """Names of the classes in sorted order, and the number of each picture's class (n,) int64."""
    names = sorted({str(label) for label in pictures.labels})
    return names, torch.tensor([names.index(str(label)) for label in pictures.labels])


def accuracy(scores: Tensor, labels: Tensor, *, resamples: int, seed: int) -> dict[str, Any]:
    """Top-1 (and top-5 with more than five classes) with intervals, the mean over classes, and each class's own."""
    order = scores.argsort(dim=1, descending=True, stable=True)  # of equal scores the first, as argmax has it
    hits = order == labels[:, None]
    right = hits[:, 0].numpy()
    result: dict[str, Any] = {"top1": bootstrap_mean(right, resamples=resamples, seed=seed).to_json()}
    if scores.shape[1] > 5:
        result["top5"] = bootstrap_mean(hits[:, :5].any(dim=1).numpy(), resamples=resamples, seed=seed).to_json()
    by_class = {int(c): float(right[(labels == c).numpy()].mean()) for c in labels.unique()}
    result["class_mean"] = float(np.mean(list(by_class.values())))
    result["by_class"] = by_class
    return result


def classifier_file(model: Model, classifier: nn.Linear, classes: Sequence[str], size: int, how: str) -> bytes:
    """Trunk and classifier as one safetensors file in torchvision's names, with the classes in its description."""
    state = trunk_state(model)
    state |= {f"fc.{name}": value.detach().cpu() for name, value in classifier.state_dict().items()}
    extra = {"classes": list(classes), "classifier": how, "name": f"{model.name}-{how}"}
    return safetensors_file(state, {**describe(model, size=size), **extra})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``cast-fast probe``."""
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help="run folders, checkpoints or files of weights")
    add_dataset_arguments(parser, labels=True)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where results and classifiers go; else probe/ in the first run"
    )
    parser.add_argument("--test-share", type=float, default=0.3, help="share of test pictures, without a column split")
    parser.add_argument("--k", type=int, default=knn.NEIGHBOURS, help="nearest neighbours")
    parser.add_argument("--knn-temperature", type=float, default=knn.TEMPERATURE, help="of the neighbours' votes")
    parser.add_argument("--lrs", nargs="+", type=float, default=list(linear_probe.RATES), help="linear: learning rates")
    parser.add_argument("--epochs", type=int, default=linear_probe.EPOCHS, help="linear: passes over the training set")
    parser.add_argument("--finetune", action="store_true", help="train the whole network as well")
    parser.add_argument(
        "--finetune-lrs", nargs="+", type=float, default=list(finetune.RATES), help="its learning rates"
    )
    parser.add_argument("--finetune-epochs", type=int, default=20, help="its passes over the training set")
    parser.add_argument("--finetune-batch", type=int, default=64, help="its batch size")
    parser.add_argument("--size", type=int, default=0, help="side of the crops in pixels; 0 for that of the training")
    parser.add_argument("--batch", type=int, default=128, help="images a forward pass")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder in which features are kept")
    parser.add_argument("--no-cache", dest="cache", action="store_const", const=None, help="keep no features")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--seed", type=int, default=0, help="of the division, the training and the intervals")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap")


def main(args: argparse.Namespace) -> int:
    """Probes one or several encoders on the same pictures."""
    from cast_fast.train import resolve_device

    _check(args)
    device = resolve_device(args.device)
    models = unique_names([load_encoder(path) for path in args.run])
    pictures = open_pictures(
        args.images,
        args.saliency,
        args.data,
        labels=args.labels,
        need_labels=True,
        known=models[0].provenance.get("config"),
    )
    classes, labels = class_numbers(pictures)
    if len(classes) < 2:
        raise UserError(f"--labels: got one class, {classes[0]}, expected at least two")
    split = read_split(args.labels, pictures.names)
    training, test = divide(labels, split, args.test_share, args.seed)
    logger.info("%d classes, %d training and %d test pictures", len(classes), len(training), len(test))
    if unknown := untrained(labels, training, test):
        names = ", ".join(classes[number] for number in unknown)
        logger.warning("no training picture of %s: its test pictures can only count as wrong", names)

    results: dict[str, Any] = {
        "classes": classes,
        "training_pictures": len(training),
        "test_pictures": len(test),
        "seed": args.seed,
        "models": {},
        "differences": {},
    }
    predicted: dict[str, dict[str, NDArray[np.int64]]] = {}
    args.out = open_output(args.out, args.run[0], "probe")
    with Results(args.out) as files:
        for model in models:
            folder = "" if len(models) == 1 else f"{model.name}/"
            found, said = probe(model, pictures, labels, classes, training, test, args, device, files, folder)
            results["models"][model.name] = {"weights": model.provenance.get("file"), "arch": model.arch, **found}
            predicted[model.name] = said
        results["differences"] = _differences(predicted, labels[test].numpy(), args)
        files.write("probe.json", json.dumps(results, indent=2) + "\n")
        files.write("probe.csv", _table(pictures, test, classes, labels, predicted))
    _print(results)
    print(f"{args.out / 'probe.json'}\n{args.out / 'probe.csv'}")
    return 0


def _differences(
    predicted: Mapping[str, Mapping[str, NDArray[np.int64]]], truth: NDArray[np.int64], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Of every later model's accuracy to the first one's, by method, over the same pictures."""
    (first, known), *others = predicted.items()
    return {
        f"{name} - {first}": {
            method: bootstrap_difference(
                known[method] == truth, answers == truth, resamples=args.resamples, seed=args.seed
            ).to_json()
            for method, answers in said.items()
        }
        for name, said in others
    }


def probe(
    model: Model,
    pictures: Pictures,
    labels: Tensor,
    classes: Sequence[str],
    training: list[int],
    test: list[int],
    args: argparse.Namespace,
    device: torch.device,
    files: Results,
    folder: str,
) -> tuple[dict[str, Any], dict[str, NDArray[np.int64]]]:
    """All methods on one encoder; classifiers go into ``folder`` (empty, or ending in a slash) of the results.

    Returns:
        Results as JSON, and the predicted class of each test picture by method.
    """
    size = args.size or model.size or 224
    features = extract(model, pictures, size=size, batch=args.batch, device=device, cache=args.cache)
    if not features.isfinite().all():
        raise UserError(f"{model.name}: its features are not finite")
    x, y, z = features[training].to(device), labels[training].to(device), features[test].to(device)
    number = len(classes)
    truth = labels[test]
    intervals = {"resamples": args.resamples, "seed": args.seed}

    scores = {"knn": knn.knn_scores(x, y, z, number, k=args.k, temperature=args.knn_temperature).cpu()}
    found: dict[str, Any] = {"size": size, "knn": {"k": min(args.k, len(training))}}

    tried = linear_probe.sweep(x, y, number, rates=args.lrs, epochs=args.epochs, seed=args.seed)
    layer = linear_probe.fit_linear(x, y, number, tried.best, epochs=args.epochs, seed=args.seed)
    scores["linear"] = layer.to(device)(z).cpu()
    found["linear"] = _about_sweep(tried)
    files.write(f"{folder}linear.safetensors", classifier_file(model, layer, classes, size, "linear"))

    if args.finetune:
        schedule = finetune.Schedule(epochs=args.finetune_epochs, batch=args.finetune_batch, size=size, seed=args.seed)
        tried = finetune.sweep_finetuning(
            model, pictures, training, labels, number, args.finetune_lrs, schedule, device
        )
        trained = finetune.finetune(model, pictures, training, labels, number, tried.best, schedule, device)
        scores["finetune"] = finetune.predict(trained, pictures, test, size, args.batch, device)
        found["finetune"] = _about_sweep(tried)
        assert trained.classifier is not None
        content = classifier_file(trained, trained.classifier, classes, size, "finetune")
        files.write(f"{folder}finetune.safetensors", content)

    for method, values in scores.items():
        measured = accuracy(values, truth, **intervals)
        measured["by_class"] = {classes[c]: value for c, value in measured["by_class"].items()}
        found[method] |= measured
    return found, {method: values.argmax(dim=1).numpy() for method, values in scores.items()}


def _about_sweep(tried: Sweep) -> dict[str, Any]:
    return {
        "lr": tried.best,
        "lr_at_edge_of_sweep": tried.at_edge,
        "held_out_accuracy": {f"{rate:g}": value for rate, value in zip(tried.rates, tried.accuracy)},
    }


def _check(args: argparse.Namespace) -> None:
    if args.labels is None and args.data is None:
        raise UserError("--labels is missing: expected a CSV file with columns stem,class")
    check_seed(args.seed)
    if not 0 < args.test_share < 1:
        raise UserError(f"--test-share: got {args.test_share}, expected a number in (0, 1)")
    for name in ("k", "epochs", "finetune_epochs", "batch", "resamples"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least 1")
    if args.finetune_batch < 2:
        raise UserError(f"--finetune-batch: got {args.finetune_batch}, expected at least 2")
    if args.size and args.size < 32:
        raise UserError(f"--size: got {args.size}, expected at least 32")
    for name in ("lrs", "finetune_lrs"):
        if min(getattr(args, name)) <= 0:
            raise UserError(f"--{name.replace('_', '-')}: got {min(getattr(args, name))}, expected more than 0")
    if args.knn_temperature <= 0:
        raise UserError(f"--knn-temperature: got {args.knn_temperature}, expected more than 0")


def _table(
    pictures: Pictures,
    test: Sequence[int],
    classes: Sequence[str],
    labels: Tensor,
    predicted: Mapping[str, Mapping[str, NDArray[np.int64]]],
) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    columns = [(model, method) for model, methods in predicted.items() for method in methods]
    writer.writerow(["stem", "class", *(f"{model}: {method}" for model, method in columns)])
    for row, index in enumerate(test):
        said = [classes[predicted[model][method][row]] for model, method in columns]
        writer.writerow([pictures.names[index], classes[int(labels[index])], *said])
    return text.getvalue()


def _print(results: Mapping[str, Any]) -> None:
    table = Table(title=f"Test accuracy in %, {results['test_pictures']} pictures, 95 % bootstrap intervals")
    for name in ("encoder", "method", "top-1", "class mean", "learning rate"):
        table.add_column(name, justify="left" if name in ("encoder", "method") else "right")
    for name, found in results["models"].items():
        for method in ("knn", "linear", "finetune"):
            if method in found:
                measured = found[method]
                top = Interval(**measured["top1"]).text(100, 1)
                edge = " (edge)" if measured.get("lr_at_edge_of_sweep") else ""
                rate = f"{measured['lr']:g}{edge}" if "lr" in measured else f"k = {measured['k']}"
                table.add_row(name, method, top, f"{100 * measured['class_mean']:.1f}", rate)
    for name, methods in results["differences"].items():
        table.add_section()
        for method, difference in methods.items():
            table.add_row(name, method, Interval(**difference).text(100, 1), "", "difference")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
