"""The claim, in small: does CAST make MoCo look at objects, and is that worth anything?

    python benchmarks/claim.py --out DIR                  # CPU: MoCo and MoCo+CAST, three seeds
    python benchmarks/claim.py --out DIR --full           # one GPU: ResNet-50 at 224, the two ablations as well

On made scenes whose backgrounds agree with the class more often than chance, each method is pretrained from the same
weights, on the same scenes, for the same number of steps and with the same settings; only what the method is made of
differs (crops, attention loss). A CAST step costs more than a MoCo step: the seconds of both are reported. Then, on
scenes that no training saw:

- *grounding*: where the encoder looks when it matches two crops (``cast_fast.evaluate.grounding``);
- *probe*: a linear classifier and nearest neighbours on frozen features, fitted to the training scenes, tested on
  scenes with the same correlation of backgrounds and on scenes with none: the difference is what the background was
  worth;
- *backgrounds*: the same linear classifier in a Backgrounds Challenge made of those scenes.

Differences are paired by seed, with Student's t interval over the seeds; beside them stand an encoder that was not
trained and maps that look at nothing. ``--out`` keeps every finished run, so that a stopped call goes on where it was.
Files: ``results.json``, ``results.md``, ``chart.png``, ``grounding.png``, and ``work/``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn
from torchvision.models.resnet import BasicBlock

from cast_fast.config import PretrainConfig
from cast_fast.data import layout, synthetic
from cast_fast.data.saliency_crop import CropRule
from cast_fast.encoder import Encoder, MLPHead, build_encoder, cam_grid
from cast_fast.errors import UserError
from cast_fast.evaluate import backgrounds, backgrounds_make, grounding, knn, linear_probe
from cast_fast.evaluate.features import extract
from cast_fast.evaluate.pictures import FolderPictures
from cast_fast.evaluate.statistics import Interval, bootstrap_mean, student_interval
from cast_fast.evaluate.weights import Model
from cast_fast.export import save_safetensors
from cast_fast.moco import MoCo
from cast_fast.objective import Objective
from cast_fast.optim import build_optimizer, cosine_lr
from cast_fast.step import TrainStep

matplotlib.use("Agg")
from matplotlib import pyplot as plt

logger = logging.getLogger("cast_fast")

METHODS = ("moco", "cast", "crops-only", "attention-only")
UNTRAINED = "untrained"
TITLES = {
    "moco": "MoCo",
    "cast": "MoCo + CAST",
    "crops-only": "constrained crops only",
    "attention-only": "attention loss only",
    UNTRAINED: "untrained",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that the result depends on, but the seeds and the methods."""

    arch: str = "small"
    """``small``: the residual network of ``small_trunk``; else a ResNet of torchvision."""
    width: int = 24
    """Channels of the small network's first stage."""
    size: int = 96
    """Side of the crops in pixels."""
    scene: tuple[int, int] | None = (144, 108)
    """Width and height of the scenes; None for the usual 640×480 and kin."""
    training_scenes: int = 2400
    test_scenes: int = 480
    correlation: float = 0.8
    """Of background and class in the training scenes, and in the first of the two test sets."""
    steps: int = 1200
    batch: int = 64
    queue_size: int = 1024
    dim: int = 64
    lr: float = 0.06
    """At the batch size given, decayed by a cosine."""
    momentum: float = 0.99
    temperature: float = 0.2
    lam: float = 3.0
    loss_combination: str = "sum"
    """L_MoCo + λ L_CAST, so that the contrastive part has the same weight in every method."""
    weight_decay: float = 1e-4
    device: str = "cpu"
    compile: bool = False

    def fingerprint(self) -> str:
        """Changes whenever a finished run would no longer be the same."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]


CPU = Settings()
QUICK = Settings(
    width=8, size=64, scene=(96, 72), training_scenes=48, test_scenes=36, steps=3, batch=8, queue_size=32, dim=8
)
FULL = Settings(
    arch="resnet50",
    size=224,
    scene=None,
    training_scenes=20_000,
    test_scenes=2400,
    steps=6000,
    batch=256,
    queue_size=16_384,
    dim=128,
    lr=0.03,
    momentum=0.999,
    device="cuda",
    compile=True,
)


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of the report."""

    name: str
    title: str
    sign: int
    """+1 where more is better, −1 where less is."""
    group: str


GROUNDING = [
    Metric(f"{target}/{metric}", f"{metric}, query · {target.replace('_', ' ')}", 1, "where it looks")
    for target in grounding.TARGETS
    for metric in grounding.METRICS
]
METRICS = [
    *GROUNDING,
    Metric("linear_same", "linear, backgrounds as in training", 1, "probe accuracy"),
    Metric("linear_free", "linear, backgrounds at random", 1, "probe accuracy"),
    Metric("linear_drop", "linear, lost with the backgrounds", -1, "probe accuracy"),
    Metric("knn_same", "kNN, backgrounds as in training", 1, "probe accuracy"),
    Metric("knn_free", "kNN, backgrounds at random", 1, "probe accuracy"),
    Metric("original", "original", 1, "Backgrounds Challenge"),
    Metric("mixed_same", "mixed-same", 1, "Backgrounds Challenge"),
    Metric("mixed_rand", "mixed-rand", 1, "Backgrounds Challenge"),
    Metric("mixed_next", "mixed-next", 1, "Backgrounds Challenge"),
    Metric("only_fg", "only-fg", 1, "Backgrounds Challenge"),
    Metric("only_bg_t", "only-bg-t (background alone)", -1, "Backgrounds Challenge"),
    Metric("bg_gap", "BG-Gap", -1, "Backgrounds Challenge"),
    Metric("challenge", "challenge accuracy", 1, "Backgrounds Challenge"),
]
TRAINED_FOR = ("masked_key/cosine",)
"""What the attention loss optimises directly (on training scenes): an improvement there is no surprise."""


# The network


def small_trunk(width: int) -> nn.Sequential:
    """Four residual blocks of ResNet-18's kind, one a stage, with a total stride of 16: 6×6 cells at 96 pixels."""

    def block(inputs: int, outputs: int, stride: int) -> BasicBlock:
        if stride == 1 and inputs == outputs:
            return BasicBlock(inputs, outputs, stride)
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        return BasicBlock(inputs, outputs, stride, shortcut)

    trunk = nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        block(width, width, 1),
        block(width, 2 * width, 2),
        block(2 * width, 4 * width, 2),
        block(4 * width, 8 * width, 2),
    )
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return trunk


def new_encoder(settings: Settings, seed: int) -> Encoder:
    """The encoder that every method starts from; equal for equal seeds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.arch == "small":
            return Encoder(small_trunk(settings.width), MLPHead(8 * settings.width, settings.dim))
        return build_encoder(settings.arch, settings.dim, "mlp")


def new_moco(settings: Settings, seed: int) -> MoCo:
    """Query encoder, its copy and the queue at step 0."""
    return MoCo.from_encoder(new_encoder(settings, seed), settings.dim, settings.queue_size, seed)


# Data


@dataclasses.dataclass(frozen=True)
class Data:
    """Folders of scenes."""

    training: Path
    same: Path
    """Test scenes whose backgrounds correlate with the class as in training."""
    free: Path
    """Test scenes whose backgrounds do not."""
    challenge: Path


def make_data(work: Path, settings: Settings, workers: int | None) -> Data:
    """Writes the scenes, or completes those of an earlier call."""
    data = Data(work / "training", work / "test-same", work / "test-free", work / "challenge")
    sets = (
        (data.training, settings.training_scenes, 1, settings.correlation),
        (data.same, settings.test_scenes, 2, settings.correlation),
        (data.free, settings.test_scenes, 3, 0.0),
    )
    for folder, count, seed, correlation in sets:
        synthetic.write_dataset(folder, count, seed, correlation, settings.scene, workers, sys.stderr.isatty())
        opened(folder)  # decodes every file once and keeps the list, before several processes want it
    if not (data.challenge / "made.json").is_file():
        if data.challenge.exists():
            raise UserError(f"{data.challenge} is incomplete: delete it")
        folders, count, left_out = backgrounds_make.make(
            opened(data.same), data.challenge, size=settings.size, train_share=0, seed=0
        )
        about = {"classes": folders, "images_per_variant": count, "left_out": left_out}
        (data.challenge / "made.json").write_text(json.dumps(about, indent=2) + "\n")
    return data


class DecodedPictures(FolderPictures):
    """Pictures that stay decoded, up to a GiB of them: every run of a process is measured on the same ones.

    Training does not use them. There the crops are drawn anew in every step, from the files.
    """

    def __init__(self, dataset: layout.Dataset) -> None:
        super().__init__(dataset)
        self._images: dict[int, Image.Image] = {}
        self._room = 1 << 30

    def image(self, index: int) -> Image.Image:
        """The picture in RGB."""
        if index in self._images:
            return self._images[index]
        image = super().image(index)
        self._room -= 3 * image.width * image.height
        if self._room >= 0:
            self._images[index] = image
        return image


@functools.cache
def opened(folder: Path) -> DecodedPictures:
    """A folder of made scenes with labels."""
    found = layout.scan(
        folder / "images", folder / "saliency", labels=folder / "labels.csv", manifest=folder / "manifest.json"
    )
    return DecodedPictures(layout.usable(found, skip_invalid=False, on_empty_saliency="error"))


# One run


def train(settings: Settings, method: str, seed: int, data: Data, threads: int) -> tuple[MoCo, dict[str, Any]]:
    """Pretrains one encoder; returns it with its momentum encoder, and what the training was like."""
    from cast_fast.data.dali_loader import Augmentation, DaliLoader

    flags = PretrainConfig(method=method)
    moco = new_moco(settings, seed).to(settings.device)
    grid = cam_grid(moco.query, settings.size)
    step = TrainStep(
        moco,
        build_optimizer(moco.query.parameters(), settings.lr, 0.9, settings.weight_decay),
        objective=Objective(settings.lam, settings.loss_combination, settings.temperature, flags.attention_loss),
        momentum=settings.momentum,
        precision="auto",
        compile=settings.compile,
        kernels=settings.device == "cuda",
    )
    loader = DaliLoader(
        opened(data.training).dataset,
        batch=settings.batch,
        size=settings.size,
        cam_grid=grid,
        augmentation=Augmentation.from_config(flags),
        rule=CropRule(),
        constrained=flags.constrained_crops,
        attention=flags.attention_loss,
        seed=seed,
        device=settings.device,
        threads=threads,
    )
    curve: list[dict[str, float]] = []
    every = max(1, settings.steps // 20)
    started, processor = time.perf_counter(), time.process_time()
    for number in range(settings.steps):
        batch = next(loader)
        metrics = step(batch, cosine_lr(settings.lr, 256, number, settings.steps))
        if (number + 1) % every == 0 or number + 1 == settings.steps:
            names = ("loss_moco", "loss_cast", "accuracy")
            curve.append({"step": number + 1, **{name: float(getattr(metrics, name)) for name in names}})
            if not bool(metrics.finite):
                raise RuntimeError(f"{method}, seed {seed}: the loss is not finite at step {number + 1}")
            elapsed = time.perf_counter() - started
            logger.info("%s, seed %d: %s, %.0f s", method, seed, curve[-1], elapsed)
    loader.close()
    return moco, {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - processor,
        "cam_grid": list(grid),
        "curve": curve,
    }


def run_one(
    settings: Settings, method: str, seed: int, data: Data, folder: Path, threads: int
) -> tuple[str, int, dict[str, Any]]:
    """Trains and evaluates one encoder, or reads what an earlier call found."""
    path = folder / "result.json"
    if path.is_file() and (found := json.loads(path.read_text()))["fingerprint"] == settings.fingerprint():
        return method, seed, found
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    weights, story = folder / _weights_name(settings), {}
    if method != UNTRAINED and not weights.is_file():
        moco, story = train(settings, method, seed, data, threads)
        (folder / "training.json").write_text(json.dumps(story, indent=2) + "\n")
        save_safetensors(moco.state_dict(), weights, {"method": method, "seed": seed})
    if method != UNTRAINED:
        story = json.loads((folder / "training.json").read_text())
    model = read_model(settings, method, seed, folder)
    started = time.perf_counter()
    result = {"fingerprint": settings.fingerprint(), "method": method, "seed": seed, "training": story}
    result |= evaluate(settings, model, data)
    result["evaluation_seconds"] = time.perf_counter() - started
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, path)
    return method, seed, result


def _weights_name(settings: Settings) -> str:
    return f"weights-{settings.fingerprint()}.safetensors"


def read_model(settings: Settings, method: str, seed: int, folder: Path) -> Model:
    """A trained pair of encoders, ready to be measured."""
    moco = new_moco(settings, seed)
    if method != UNTRAINED:
        moco.load_state_dict(load_file(folder / _weights_name(settings)))
    query, key = (encoder.eval().requires_grad_(False) for encoder in (moco.query, moco.key))
    return Model(TITLES[method], settings.arch, query, key, None, None, settings.size, {"seed": seed})


def evaluate(settings: Settings, model: Model, data: Data) -> dict[str, Any]:
    """All numbers of one encoder: means, and bootstrap intervals over the test pictures."""
    device = torch.device(settings.device)
    batch = 128
    intervals: dict[str, Interval] = {}
    free, same, training = opened(data.free), opened(data.same), opened(data.training)

    measured = grounding.measure([model], free, size=settings.size, batch=batch, device=device)
    for target in grounding.TARGETS:
        for metric in grounding.METRICS:
            intervals[f"{target}/{metric}"] = bootstrap_mean(measured.values(model.name, target, metric))
    zeros = sum(row.zero_map for row in measured.rows if row.target == "masked_key")
    nothing = {n: {m: float(np.mean(v)) for m, v in found.items()} for n, found in measured.baselines.items()}

    classes = sorted({str(label) for label in training.labels})
    features, labels = {}, {}
    for name, pictures in (("training", training), ("same", same), ("free", free)):
        features[name] = extract(model, pictures, size=settings.size, batch=batch, device=device)
        labels[name] = torch.tensor([classes.index(str(label)) for label in pictures.labels])
    x, y = features["training"], labels["training"]
    chosen = linear_probe.sweep(x, y, len(classes))
    layer = linear_probe.fit_linear(x, y, len(classes), chosen.best)
    right: dict[str, NDArray[np.bool_]] = {}
    for name in ("same", "free"):
        neighbours = knn.knn_scores(x, y, features[name], len(classes))
        for method, scores in (("linear", layer(features[name])), ("knn", neighbours)):
            right[f"{method}_{name}"] = (scores.argmax(dim=1) == labels[name]).numpy()
            intervals[f"{method}_{name}"] = bootstrap_mean(right[f"{method}_{name}"])
    gap = backgrounds.background_gap(right["linear_same"], right["linear_free"], resamples=2000, seed=0)
    intervals["linear_drop"] = gap

    model.classifier, model.classes = layer.to(device), tuple(classes)
    variants = {name: backgrounds.read_variant(data.challenge, name) for name in backgrounds.VARIANTS}
    images = {name: backgrounds.read_images(variant.paths) for name, variant in variants.items()}
    foregrounds = backgrounds.read_foregrounds(data.challenge, variants["original"])
    report = backgrounds.measure(model, variants, images, foregrounds, None, device, batch)
    found = backgrounds.summary(report, variants, resamples=2000, seed=0)
    for name, interval in found["accuracy"].items():
        intervals[name] = Interval(**interval)
    intervals["bg_gap"] = Interval(**found["bg_gap"])
    intervals["challenge"] = Interval(**found["challenge_accuracy"])
    return {
        "metrics": {metric.name: intervals[metric.name].to_json() for metric in METRICS},
        "zero_maps": zeros,
        "looks_at_nothing": nothing,
        "linear_lr": chosen.best,
    }


# All runs


def run_all(
    settings: Settings, methods: Sequence[str], seeds: Sequence[int], data: Data, work: Path, jobs: int
) -> dict[str, dict[int, dict[str, Any]]]:
    """Every (method, seed), ``jobs`` at a time; seeds outermost, so that a stopped call leaves whole comparisons."""
    wanted = [(method, seed) for seed in seeds for method in (*methods, UNTRAINED)]
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    results: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in (*methods, UNTRAINED)}
    tasks = [(settings, m, s, data, work / "runs" / f"{m}-{s}", threads) for m, s in wanted]
    if jobs == 1:
        for task in tasks:
            method, seed, result = run_one(*task)
            results[method][seed] = result
        return results
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
    ) as pool:
        for future in concurrent.futures.as_completed([pool.submit(run_one, *task) for task in tasks]):
            method, seed, result = future.result()
            results[method][seed] = result
    return results


def _end_with(parent: int) -> None:
    """Ends this worker soon after its parent: one that is killed leaves nobody who trains on unseen."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def verdict(difference: Interval, sign: int) -> str:
    """``better``, ``worse`` or ``no clear difference`` for a difference whose interval was computed over the seeds."""
    if difference.count < 2 or not np.isfinite([difference.low, difference.high]).all():
        return "one seed only"
    if difference.low <= 0 <= difference.high:
        return "no clear difference"
    return "better" if difference.mean * sign > 0 else "worse"


def compare(results: Mapping[str, Mapping[int, Mapping[str, Any]]], first: str, second: str) -> dict[str, Any]:
    """Second − first for every metric, paired by seed."""
    seeds = sorted(results[first].keys() & results[second].keys())
    found = {}
    for metric in METRICS:
        values = [
            results[second][s]["metrics"][metric.name]["mean"] - results[first][s]["metrics"][metric.name]["mean"]
            for s in seeds
        ]
        interval = student_interval(values)
        found[metric.name] = {"by_seed": values, **interval.to_json(), "verdict": verdict(interval, metric.sign)}
    return found


def conclusion(difference: Mapping[str, Mapping[str, Any]]) -> str:
    """One plain paragraph on whether CAST helped: what it was not trained for directly decides."""
    judged = [m for m in METRICS if m.name not in TRAINED_FOR]
    by = {v: [m for m in judged if difference[m.name]["verdict"] == v] for v in ("better", "worse")}
    groups = list(dict.fromkeys(m.group for m in judged))
    parts = []
    for group in groups:
        total = sum(m.group == group for m in judged)
        better, worse = (sum(m.group == group for m in by[v]) for v in ("better", "worse"))
        parts.append(f"{group}: {better} of {total} clearly better, {worse} clearly worse")
    if by["better"] and not by["worse"]:
        opening = "CAST helped"
    elif by["worse"] and not by["better"]:
        opening = "CAST hurt"
    elif by["better"]:
        opening = "CAST helped in some respects and hurt in others"
    else:
        opening = "No clear effect of CAST"
    return f"{opening} ({'; '.join(parts)})."


def report_markdown(summary: Mapping[str, Any]) -> str:
    """The result as a page."""
    methods = summary["methods"]
    settings = summary["settings"]
    budget = f"{settings['steps']} steps of {settings['batch']} pairs on {settings['training_scenes']} scenes"
    lines = [
        "# Does CAST help? Made scenes, equal budgets",
        "",
        f"Command: `{summary['command']}`. {summary['machine']}. {summary['date']}, commit {summary['commit']}.",
        "",
        f"Seeds: {', '.join(map(str, summary['seeds']))}. For every method {budget}.",
        "",
        f"**{summary['conclusion']}**" if summary["conclusion"] else "",
        "",
        "Mean over seeds; in brackets the seeds. The difference has Student's 95 % interval over the seeds, paired.",
        "",
        f"| | {' | '.join(TITLES[m] for m in methods)} | CAST − MoCo | |",
        f"|---|{'---|' * len(methods)}---|---|",
    ]
    group = ""
    for metric in METRICS:
        if metric.group != group:
            group = metric.group
            lines.append(f"| **{group}** |{' |' * len(methods)} | |")
        cells = []
        for method in methods:
            values = [found["metrics"][metric.name]["mean"] for found in summary["runs"][method].values()]
            cells.append(f"{np.mean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})" if values else "–")
        difference, said = "–", ""
        if summary["differences"]:
            found = summary["differences"]["cast - moco"][metric.name]
            low, high = found["low"], found["high"]
            ends = f" [{low:+.3f}, {high:+.3f}]" if low is not None else ""
            difference, said = f"{found['mean']:+.3f}{ends}", found["verdict"]
            if metric.name in TRAINED_FOR:
                said += " (what the loss optimises)"
        lines.append(f"| {metric.title} | {' | '.join(cells)} | {difference} | {said} |")
    nothing = next(iter(summary["runs"][UNTRAINED].values()))["looks_at_nothing"]
    lines += ["", "Maps that look at nothing: " + "; ".join(
        f"{name}: " + ", ".join(f"{m} {v:.3f}" for m, v in found.items()) for name, found in nothing.items()
    ) + ".", "", "Training, seconds of processor time a run: " + ", ".join(
        f"{TITLES[m]} {np.mean([r['training']['processor_seconds'] for r in summary['runs'][m].values()]):.0f}"
        for m in methods if m != UNTRAINED and summary["runs"][m]
    ) + ".", "", "![chart](chart.png)", "", "![grounding](grounding.png)", ""]  # fmt: skip
    return "\n".join(lines)


def draw_chart(path: Path, summary: Mapping[str, Any]) -> None:
    """A panel a metric, a dot a seed, a bar the mean."""
    shown = [m for m in METRICS if m.name not in ("key/cosine", "key/iou", "masked_key/iou", "mixed_next", "original")]
    columns = 4
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.3 * rows), constrained_layout=True)
    colours = dict(zip((*METHODS, UNTRAINED), ("#888888", "#d1495b", "#edae49", "#00798c", "#cccccc")))
    flat: list[Any] = list(np.asarray(axes).flat)
    for axis, metric in zip(flat, shown):
        for place, method in enumerate(summary["methods"]):
            values = [found["metrics"][metric.name]["mean"] for found in summary["runs"][method].values()]
            axis.bar(place, np.mean(values), color=colours[method], width=0.7)
            axis.plot([place] * len(values), values, "o", color="black", markersize=3)
        arrow = "higher is better" if metric.sign > 0 else "lower is better"
        axis.set_title(f"{metric.title}\n({arrow})", fontsize=9)
        axis.set_xticks(range(len(summary["methods"])), [TITLES[m].replace(" ", "\n", 1) for m in summary["methods"]])
        axis.tick_params(labelsize=7)
    for axis in flat[len(shown) :]:
        axis.axis("off")
    figure.suptitle("Made scenes, equal budgets: mean (bar) and seeds (dots)", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_grounding(path: Path, settings: Settings, data: Data, work: Path, methods: Sequence[str], seed: int) -> None:
    """Figure S2 on test scenes: every trained method of one seed side by side."""
    trained = [method for method in methods if method != UNTRAINED]
    models = [read_model(settings, m, seed, work / "runs" / f"{m}-{seed}") for m in trained]
    pictures = opened(data.free)
    chosen = grounding.spread(len(pictures), 8)
    sheet = grounding.draw_sheet(models, pictures, chosen, size=settings.size, device=torch.device("cpu"))
    sheet.note += f" Seed {seed}; scenes {', '.join(pictures.names[i] for i in chosen)}, evenly spaced, not selected."
    sheet.save(path)


def print_table(summary: Mapping[str, Any]) -> None:
    """The result on the terminal."""
    table = Table(title="Mean over seeds; difference with Student's 95 % interval, paired by seed")
    table.add_column("")
    for method in summary["methods"]:
        table.add_column(TITLES[method], justify="right")
    table.add_column("CAST - MoCo", justify="right")
    table.add_column("verdict")
    for metric in METRICS:
        cells = [
            f"{np.mean([found['metrics'][metric.name]['mean'] for found in summary['runs'][m].values()]):.3f}"
            for m in summary["methods"]
        ]
        found = summary["differences"].get("cast - moco", {}).get(metric.name)
        if found is None:
            table.add_row(metric.title, *cells, "–", "")
            continue
        ends = "" if found["low"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
        table.add_row(metric.title, *cells, f"{found['mean']:+.3f}{ends}", found["verdict"])
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    if summary["conclusion"]:
        print(summary["conclusion"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results, and the runs behind them")
    parser.add_argument("--full", action="store_true", help="ResNet-50 at 224 on a GPU, with both ablations")
    parser.add_argument("--quick", action="store_true", help="a few tiny steps, to see that everything works")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of weights, order and crops")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: moco cast; with --full all four")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time; default: one a core on a CPU, 1 on a GPU")
    for name in ("steps", "batch", "training_scenes", "test_scenes", "lr", "lam"):
        kind = type(getattr(CPU, name))
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=None, help=f"default: {getattr(CPU, name)}"
        )
    parser.add_argument("--arch", default=None, help="'small' or a ResNet of torchvision")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the flags ask for."""
    if args.full and args.quick:
        raise UserError("--full and --quick: expected one of them")
    base = FULL if args.full else QUICK if args.quick else CPU
    names = ("steps", "batch", "training_scenes", "test_scenes", "lr", "lam", "arch")
    return dataclasses.replace(base, **{n: getattr(args, n) for n in names if getattr(args, n) is not None})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the whole comparison."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings = settings_of(args)
        device = harness.choose_device(settings.device)
        methods = args.methods or (list(METHODS) if args.full else ["moco", "cast"])
        cores = len(os.sched_getaffinity(0))
        jobs = args.jobs or (1 if device.type == "cuda" else min(cores, len(methods)))
        started = time.perf_counter()
        work = args.out / "work" / settings.fingerprint()
        data = make_data(work, settings, None)
        results = run_all(settings, methods, args.seeds, data, work, jobs)
    except UserError as error:
        print(f"claim.py: error: {error}", file=sys.stderr)
        return 2
    environment = harness.environment(device)
    methods = [*methods, UNTRAINED]
    pairs = [(a, b) for a, b in (("moco", "cast"), ("moco", "crops-only"), ("moco", "attention-only")) if b in methods]
    differences = {f"{b} - {a}": compare(results, a, b) for a, b in pairs if a in methods}
    summary: dict[str, Any] = {
        "command": "python benchmarks/claim.py " + " ".join(_shown_flags(argv)),
        "machine": f"{environment.device}, torch {torch.__version__}",
        "date": environment.date,
        "commit": environment.commit,
        "settings": dataclasses.asdict(settings),
        "methods": methods,
        "seeds": args.seeds,
        "seconds": time.perf_counter() - started,
        "conclusion": conclusion(differences["cast - moco"]) if "cast - moco" in differences else "",
        "differences": differences,
        "runs": {m: {str(s): results[m][s] for s in args.seeds} for m in methods},
    }
    (args.out / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw_chart(args.out / "chart.png", summary)
    draw_grounding(args.out / "grounding.png", settings, data, work, methods, args.seeds[0])
    (args.out / "results.md").write_text(report_markdown(summary))
    print_table(summary)
    print(f"{args.out / 'results.md'}, after {summary['seconds']:.0f} s")
    return 0


def _shown_flags(argv: Sequence[str] | None) -> list[str]:
    """The flags without the name of the output folder, which is nobody else's."""
    flags = list(sys.argv[1:] if argv is None else argv)
    return [("DIR" if place and flags[place - 1] == "--out" else flag) for place, flag in enumerate(flags)]


if __name__ == "__main__":
    sys.exit(main())
