"""How fast the loader is, where its CPU time goes, and what torchvision and albumentations need for the same work.

    python benchmarks/loader.py [--device auto|cpu|cuda] [--images DIR --saliency DIR] [--batch N] [--size S]
                                [--threads N] [--repeats N] [--lines A,B] [--max-seconds S] [--out DIR] [--quick]
                                [--alone]

Lines, all over the same files in the same order with the same windows and, but for albumentations, which draws its own
from the same ranges, the same colour changes:

``native``, ``numpy``
    The product's loader with and without its native operators: windows by NumPy and, on a CPU, views by DALI's own
    operators. On CUDA further lines vary the threads and the share of JPEGs that the decoding engines take
    (``native-t8-hw0.9``).
``packed``, ``packed-256``
    The product's loader on the same dataset in shards (``cast-fast prepare``): images byte for byte and maps at the
    default size; and with images shrunk to a shorter side of 256, which is other work, on purpose.
``torchvision``, ``albumentations``
    A ``torch.utils.data.DataLoader`` with as many worker processes as the others have threads: files decoded, cropped,
    resized, flipped and coloured by torchvision's v2 functions on uint8 tensors, or by OpenCV and albumentations.
``training`` (CUDA only)
    What the loader takes from the GPU: the product's default step on one fixed batch, alone and with the product's
    loader making a batch a step beside it. Only the step lies between the events that time it: waiting for a slow
    loader does not count, sharing the device with it does.

``host`` (with ``native`` and ``packed``)
    What the product's loader costs outside of DALI's thread pool, which is what more threads or a faster decoder do not
    make faster: it loads pictures of 32 pixels in batches of 256.

``--alone`` measures the loaders one at a time instead, each in a fresh process in which no other has been: round by
round, one process a line (``native``, ``packed``, ``packed-256``, or what ``--lines`` names), one sample a process,
taken over ALONE_TURNS turns without a pause. Lines that take turns in one process find each other's pictures in the
caches of the processor and idle threads beside them; alone, a loader is as in training. Compare layouts by their CPU
time an image: it depends least on what else the machine does. Records: ``loader_alone`` (images/s),
``loader_alone_cpu`` (CPU seconds an image) and ``loader_alone_gain`` (a layout's images per CPU second over the
folder's, by the processes of the same round).

Records otherwise: ``loader`` (images/s), ``loader_cpu`` (CPU seconds an image, worker processes included),
``loader_stage`` (CPU seconds an image of each stage, on the product's loader; of shards too, as ``packed-decode``),
``loader_windows`` (CPU seconds an image) and ``loader_windows_time`` (seconds an image) of the windows alone by
``numpy``, ``native`` and, on CUDA, ``cuda``, of maps that are decoded already, ``training_step`` (seconds a step,
``alone`` and ``beside-loader``), ``loader_gpu_share`` (of the step's time beside the loader, round by round) and
``loader_host`` (CPU seconds an image, ``folder-python`` and so on) with ``loader_host_bound`` (images/s). Stages
are differences of pipelines that do more and more of the work, measured in the same rounds: draws (order and random
numbers), read, decode, map (its decoding), windows, resize (the two views), targets (the two maps of the attention
loss), colour, hand-over (DALI's buffers to torch). Without data of your own the loader reads made scenes, which are
kept for the next run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import ladder
import numpy as np
import torch
from PIL import Image

from cast_fast.cli import EXIT_USER_ERROR, OneLineParser
from cast_fast.data import layout, sampling
from cast_fast.data.saliency_crop import THRESHOLD, CropRule, crop_windows
from cast_fast.doctor import dali_fault
from cast_fast.errors import UserError

PRODUCT = ("native", "numpy", "packed")
PEERS = ("torchvision", "albumentations")
TRAINING = "training"
LINES = (*PRODUCT, *PEERS, TRAINING)
STAGES = ("draws", "read", "decode", "map", "windows", "resize", "targets", "colour", "hand-over")
GOALS = {"windows": 4.0, "packed": 1.5, "training": 1.2}
"""In CPU time: windows by the native operator against NumPy's, and packed data against folders; on CUDA the loader's
images a second over those of the compiled step."""

THREADS = ("python", "executor", "pool", "others")
HOST_BATCH, HOST_SIDE = 256, 32
"""Of the pictures that show what the host costs: as in training on a GPU, and next to nothing to decode."""

TURN = 4
"""Batches in one timed turn. Before it the lines that ran earlier are left to fill their queues, lest their CPU time be
counted here, and as many untimed batches bring the line's own queue to its steady state."""
ALONE = ("native", "packed", "packed-256")
ALONE_TURNS = 8
"""Turns of a process of ``--alone``, measured as one; one more, before, fills the queues."""
_SEED = 0
_PACKED = "packed-"
_SHARED = ("to draws", "windows numpy", "windows cuda")
"""Lines of the stages that are not measured on shards as well: they are about the same, or have no part in the sum."""


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    device: torch.device
    dataset: layout.Dataset
    batch: int
    size: int
    grid: tuple[int, int]
    threads: int
    repeats: int
    lines: tuple[str, ...]
    augmentation: Any
    shards: Path
    """Where packed copies of the dataset are kept."""
    step: ladder.Settings | None = None
    """Of the step that the loader runs beside; None on a CPU and where the line is not asked for."""
    rule: CropRule = dataclasses.field(default_factory=CropRule)
    deadline: float | None = None
    """``time.monotonic()`` after which no further round starts."""

    @property
    def shape(self) -> dict[str, int | str]:
        return {"batch": self.batch, "size": self.size, "threads": self.threads}


class PeerPairs(torch.utils.data.Dataset):
    """The work of the product's loader, one pair at a time, in a worker process of torch's ``DataLoader``.

    Items are addressed by (dataset index, global position), which fix the windows and the colour changes.
    """

    def __init__(self, plan: Plan) -> None:
        # Workers get a copy: only what they need, and no device.
        self.samples, self.size, self.grid = plan.dataset.samples, plan.size, plan.grid
        self.augmentation, self.rule = plan.augmentation, plan.rule

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        index, position = item
        return self.pair(self.samples[index], sampling.draw(_SEED, np.array([position])))

    def pair(self, sample: layout.Sample, draws: sampling.Draws) -> tuple[torch.Tensor, ...]:
        """Query and key (3, S, S) uint8, query saliency (G_h, G_w) float32 and key mask (S, S) uint8."""
        raise NotImplementedError


class TorchvisionPairs(PeerPairs):
    """By ``torchvision.io`` and the functions of ``torchvision.transforms.v2`` on uint8 tensors."""

    def pair(self, sample: layout.Sample, draws: sampling.Draws) -> tuple[torch.Tensor, ...]:
        from torchvision import io
        from torchvision.transforms.v2 import functional as F

        assert sample.saliency is not None
        image = io.decode_image(io.read_file(str(sample.image)), io.ImageReadMode.RGB)
        saliency = io.decode_image(io.read_file(str(sample.saliency)), io.ImageReadMode.GRAY)
        windows = crop_windows(saliency[0].numpy(), draws.windows[0], self.rule)
        salient = (saliency > THRESHOLD).float()
        parameters = self.augmentation.parameters(draws.augment, self.size)
        fine = [16 * cells for cells in self.grid]
        views, shares = [], []
        for column, (window, side) in enumerate(((windows.query, fine), (windows.key, [self.size] * 2))):
            box = _scaled(window, saliency.shape[1:], image.shape[1:])
            view = _resized_crop(image, box, [self.size] * 2)
            share = _resized_crop(salient, window.tolist(), side)
            mirrored, *factors, hue, sigma = [float(field[0, column]) for field in parameters]
            if mirrored:
                view, share = F.horizontal_flip(view), F.horizontal_flip(share)
            views.append(self._coloured(view, factors, hue, sigma))
            shares.append(share)
        query_saliency = torch.nn.functional.adaptive_avg_pool2d(shares[0], self.grid)[0]
        return views[0], views[1], query_saliency, (shares[1][0] > 0.5).to(torch.uint8)

    @staticmethod
    def _coloured(view: torch.Tensor, factors: list[float], hue: float, sigma: float) -> torch.Tensor:
        from torchvision.transforms.v2 import functional as F

        brightness, contrast, saturation = factors
        if brightness != 1:
            view = F.adjust_brightness(view, brightness)
        if contrast != 1:
            view = F.adjust_contrast(view, contrast)
        if saturation not in (0, 1):
            view = F.adjust_saturation(view, saturation)
        if hue != 0:
            view = F.adjust_hue(view, hue / 360)
        if saturation == 0:
            view = F.rgb_to_grayscale(view, num_output_channels=3)
        if sigma > 0:
            view = F.gaussian_blur(view, [2 * int(np.ceil(3 * sigma)) + 1] * 2, [sigma] * 2)
        return view


class AlbumentationsPairs(PeerPairs):
    """By OpenCV and albumentations."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        import cv2

        albumentations = importlib.import_module("albumentations")  # optional

        a = plan.augmentation

        def around(spread: float) -> tuple[float, float]:
            return max(0.0, 1 - spread), 1 + spread

        steps: list[Any] = [
            albumentations.Resize(
                plan.size, plan.size, interpolation=cv2.INTER_AREA, mask_interpolation=cv2.INTER_AREA
            ),
            albumentations.HorizontalFlip(p=a.flip_p),
            albumentations.ColorJitter(
                around(a.brightness), around(a.contrast), around(a.saturation), (-a.hue, a.hue), p=a.jitter_p
            ),
            albumentations.ToGray(p=a.grey_p),
        ]
        if a.blur_p > 0:
            limits = (a.blur_sigma_min * plan.size / 224, a.blur_sigma_max * plan.size / 224)
            steps.append(albumentations.GaussianBlur(blur_limit=0, sigma_limit=limits, p=a.blur_p))
        self.transform = albumentations.Compose(steps)

    def pair(self, sample: layout.Sample, draws: sampling.Draws) -> tuple[torch.Tensor, ...]:
        import cv2

        image = cv2.cvtColor(np.asarray(cv2.imread(str(sample.image), cv2.IMREAD_COLOR)), cv2.COLOR_BGR2RGB)
        saliency = np.asarray(cv2.imread(str(sample.saliency), cv2.IMREAD_GRAYSCALE))
        windows = crop_windows(saliency, draws.windows[0], self.rule)
        salient = np.where(saliency > THRESHOLD, 255, 0).astype(np.uint8)
        views, shares = [], []
        for window in (windows.query, windows.key):
            y, x, h, w = _scaled(window, saliency.shape, image.shape[:2])
            my, mx, mh, mw = window.tolist()
            part = salient[my : my + mh, mx : mx + mw]
            # albumentations wants a mask of the image's size
            part = part if (mh, mw) == (h, w) else cv2.resize(part, (w, h), interpolation=cv2.INTER_AREA)
            made = self.transform(image=image[y : y + h, x : x + w], mask=part)
            views.append(torch.from_numpy(np.ascontiguousarray(made["image"])).permute(2, 0, 1))
            shares.append(np.ascontiguousarray(made["mask"]))
        cells = cv2.resize(shares[0], self.grid[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        mask = (shares[1] > THRESHOLD).astype(np.uint8)
        return views[0], views[1], torch.from_numpy(cells), torch.from_numpy(mask)


def _resized_crop(image: torch.Tensor, box: list[int], size: list[int]) -> torch.Tensor:
    from torchvision.transforms.v2 import functional as F

    top, left, height, width = box
    return F.resized_crop(image, top, left, height, width, size, antialias=True)


def _scaled(window: Any, map_sides: Any, image_sides: Any) -> list[int]:
    """A window on the map's grid in whole pixels of the image: [y, x, h, w]."""
    y, x, h, w = window.tolist()
    (map_height, map_width), (height, width) = map_sides, image_sides
    top, left = y * height // map_height, x * width // map_width
    return [top, left, max(1, h * height // map_height), max(1, w * width // map_width)]


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)
    if "cv2" in sys.modules:
        import cv2

        cv2.setNumThreads(0)


def _items(plan: Plan) -> Iterator[list[tuple[int, int]]]:
    order = sampling.GlobalOrder(len(plan.dataset), _SEED, plan.batch)
    step = 0
    while True:
        indices, positions = order.at(step)
        yield list(zip(indices.tolist(), positions.tolist()))
        step += 1


def peer_batches(name: str, plan: Plan) -> Iterator[list[torch.Tensor]]:
    """Endless batches of a ``DataLoader`` on the plan's device."""
    pairs = {"torchvision": TorchvisionPairs, "albumentations": AlbumentationsPairs}[name](plan)
    cuda = plan.device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        pairs,
        batch_sampler=_Endless(plan),
        num_workers=plan.threads,
        worker_init_fn=_quiet_worker,
        multiprocessing_context="spawn",  # DALI's threads do not survive a fork
        pin_memory=cuda,
    )
    for batch in loader:
        yield [tensor.to(plan.device, non_blocking=True) for tensor in batch] if cuda else batch


class _Endless(torch.utils.data.Sampler):
    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return _items(self.plan)


def product_loader(plan: Plan, **changes: Any) -> Any:
    """The product's loader with the plan's settings."""
    from cast_fast.data.dali_loader import DaliLoader

    arguments: dict[str, Any] = {
        "batch": plan.batch,
        "size": plan.size,
        "cam_grid": plan.grid,
        "augmentation": plan.augmentation,
        "rule": plan.rule,
        "constrained": True,
        "attention": True,
        "seed": _SEED,
        "device": plan.device.type,
        "threads": plan.threads,
    }
    return DaliLoader(plan.dataset, **(arguments | changes))


def _opening(plan: Plan, upto: str) -> Any:
    """A DALI pipeline that reads the plan's files, decodes the images from "decode" on, and the maps at "map".

    Raw maps of shards need no decoding: there the two stages are the same.
    """
    from cast_fast.data import dali_loader as dl

    source, recipe = _source(plan)

    @dl.pipeline_def
    def opening() -> tuple[Any, Any]:
        files = ("image", "saliency", "places", "ahead", "map_shape")
        image, saliency = dl.contents(dl.fed(source, recipe, only=files), source, recipe)
        if upto != "read":
            image = dl.decoded_image(image, recipe)
        if upto == "map" and not recipe.raw_maps:
            saliency = dl.decoded_map(saliency)
        return image, saliency

    return _built(opening, plan)


def _windows(plan: Plan, native: bool, *, cuda: bool = False) -> Any:
    """A DALI pipeline of the windows alone, for one batch of decoded maps in memory.

    On CUDA the maps and numbers go to the device and the corners come back, because a resize takes them from the CPU.
    """
    from cast_fast.data import dali_loader as dl

    source, recipe = _source(plan)
    recipe = dataclasses.replace(recipe, native=native)
    maps = [np.array(values) for values in _opening(plan, "map").run()[1]]
    randoms = sampling.draw(_SEED, source.order.at(0)[1]).windows

    @dl.pipeline_def
    def windows() -> tuple[Any, Any]:
        saliency = dl.fn.external_source(
            lambda: maps, batch=True, no_copy=True, dtype=dl.types.UINT8, ndim=3, layout="HWC"
        )
        random = dl.fn.external_source(lambda: randoms, batch=True, no_copy=True, dtype=dl.types.FLOAT64, ndim=3)
        if cuda:
            corners, fallback = dl.crop_corners(saliency.gpu(), random.gpu(), recipe)
            return corners.cpu(), fallback.cpu()
        return dl.crop_corners(saliency, random, recipe)

    return _built(windows, plan)


def _built(definition: Any, plan: Plan) -> Any:
    device_id = torch.cuda.current_device() if plan.device.type == "cuda" else None
    pipeline = definition(
        batch_size=plan.batch, num_threads=plan.threads, device_id=device_id, prefetch_queue_depth=2, seed=0
    )
    pipeline.build()
    return pipeline


def _source(plan: Plan) -> tuple[Any, Any]:
    from cast_fast.data import dali_loader as dl

    recipe = dl.Recipe(
        size=plan.size,
        cam_grid=plan.grid,
        rule=plan.rule,
        constrained=True,
        attention=True,
        colour=plan.augmentation.changes_colour,
        blur=plan.augmentation.blur_p > 0,
        cuda=plan.device.type == "cuda",
        native=has_native(),
    )
    recipe = dataclasses.replace(recipe, **dl.choose_reading(plan.dataset, recipe))
    order = sampling.GlobalOrder(len(plan.dataset), _SEED, plan.batch)
    return dl.Source(plan.dataset, order, plan.augmentation, recipe, ()), recipe


def has_cuda_windows() -> bool:
    """Whether the native operator is built with its CUDA backend."""
    from cast_kernels import dali_plugin

    return has_native() and dali_plugin.status().cuda


def has_native() -> bool:
    """Whether the native operator is built for this DALI."""
    from cast_kernels import dali_plugin

    return dali_plugin.unavailable_reason() is None


def stage_lines(plan: Plan, prefix: str = "") -> dict[str, harness.Line]:
    """Factories of the pipelines whose differences are the stages, their names after ``prefix``.

    With the prefix ``packed-`` they read the dataset in shards; its lines are built when their turn comes.
    """
    from cast_fast.data import dali_loader as dl

    if prefix:

        def later(name: str) -> harness.Line:
            def build() -> Callable[[], object]:
                return stage_lines(dataclasses.replace(plan, dataset=packed_dataset(plan, 0)))[name]()

            return build

        return {prefix + name: later(name) for name in stage_lines(plan) if name not in _SHARED}

    plain = dataclasses.replace(plan.augmentation, jitter_p=0, grey_p=0, blur_p=0)

    def draws() -> Callable[[], object]:
        source, _ = _source(plan)
        counter = iter(range(sys.maxsize))
        return _turn(lambda: source(next(counter)), plan)

    def opening(upto: str) -> harness.Line:
        def build() -> Callable[[], object]:
            pipeline = _opening(plan, upto)
            return _turn(pipeline.run, plan)

        return build

    def windows(native: bool, *, cuda: bool = False) -> harness.Line:
        def build() -> Callable[[], object]:
            pipeline = _windows(plan, native, cuda=cuda)
            return _turn(pipeline.run, plan)

        return build

    def loading(**changes: Any) -> harness.Line:
        def build() -> Callable[[], object]:
            loader = product_loader(plan, **changes)
            return _turn(lambda: next(loader), plan)

        return build

    def handing() -> Callable[[], object]:
        source, recipe = _source(plan)
        pipeline = _built(functools.partial(dl.cast_pipeline, source, recipe), plan)
        outputs = pipeline.run()
        indices = source.indices(0)
        return _turn(lambda: dl.deliver(outputs, recipe, indices), plan)

    lines = {
        "to draws": draws,
        "to read": opening("read"),
        "to decode": opening("decode"),
        "to map": opening("map"),
        "windows numpy": windows(False),
        "to resize": loading(augmentation=plain, attention=False),
        "to targets": loading(augmentation=plain),
        "to colour": loading(),
        "hand-over": handing,
    }
    if has_native():
        lines["windows native"] = windows(True)
    if plan.device.type == "cuda" and has_cuda_windows():
        lines["windows cuda"] = windows(True, cuda=True)
    return lines


def stages(cpu: dict[str, list[float]], prefix: str = "") -> dict[str, list[float]]:
    """CPU seconds an image of each stage and round, from those of the lines of ``stage_lines``."""
    windows = "windows native" if f"{prefix}windows native" in cpu else "windows numpy"
    rounds = {name: np.array(values) for name, values in cpu.items()}
    rounds |= {name.removeprefix(prefix): values for name, values in rounds.items() if name.startswith(prefix)}
    found = {
        "draws": rounds["to draws"],
        "read": rounds["to read"] - rounds["to draws"],
        "decode": rounds["to decode"] - rounds["to read"],
        "map": rounds["to map"] - rounds["to decode"],
        "windows": rounds[windows],
        "resize": rounds["to resize"] - rounds["to map"] - rounds[windows] - rounds["hand-over"],
        "targets": rounds["to targets"] - rounds["to resize"],
        "colour": rounds["to colour"] - rounds["to targets"],
        "hand-over": rounds["hand-over"],
    }
    return {name: found[name].tolist() for name in STAGES}


def rate_lines(plan: Plan) -> dict[str, harness.Line]:
    """Factories of the lines that load whole batches."""

    def product(**changes: Any) -> harness.Line:
        def build() -> Callable[[], object]:
            loader = product_loader(plan, **changes)
            return _turn(lambda: next(loader), plan)

        return build

    def packed(short_side: int) -> harness.Line:
        def build() -> Callable[[], object]:
            loader = product_loader(dataclasses.replace(plan, dataset=packed_dataset(plan, short_side)))
            return _turn(lambda: next(loader), plan)

        return build

    def peer(name: str) -> harness.Line:
        def build() -> Callable[[], object]:
            if importlib.util.find_spec(name) is None:
                raise UserError(f"{name} is not installed")
            batches = peer_batches(name, plan)
            return _turn(lambda: next(batches), plan)

        return build

    lines: dict[str, harness.Line] = {
        "native": product(native=True),
        "numpy": product(native=False),
        "packed": packed(0),
        "packed-256": packed(256),
        "torchvision": peer("torchvision"),
        "albumentations": peer("albumentations"),
    }
    if plan.device.type == "cuda":
        for threads in sorted({max(1, plan.threads // 4), max(1, plan.threads // 2), plan.threads}):
            for load in (0.5, 0.65, 0.9):
                lines[f"native-t{threads}-hw{load}"] = product(threads=threads, hw_decoder_load=load)
    return {name: line for name, line in lines.items() if name in plan.lines or name.split("-")[0] in plan.lines}


def packed_dataset(plan: Plan, short_side: int) -> layout.Dataset:
    """The plan's dataset in shards, packed now or by an earlier run."""
    from cast_fast.data.pack_sample import PackRule
    from cast_fast.data.prepare import prepare
    from cast_fast.data.shards import scan_shards

    assert plan.dataset.saliency is not None
    folder = plan.shards / f"packed-{short_side}"
    prepare(plan.dataset.images, plan.dataset.saliency, folder, rule=PackRule(short_side=short_side))
    return scan_shards(folder)


def _turn(take: Callable[[], object], plan: Plan) -> Callable[[], object]:
    """A function that takes TURN batches and returns the CPU seconds that this process tree spent meanwhile."""

    def run() -> float:
        begin = tree_cpu()
        for _ in range(TURN):
            take()
        if plan.device.type == "cuda":
            torch.cuda.synchronize()
        return tree_cpu() - begin

    return run


def tree_cpu() -> float:
    """CPU seconds of this process and of its living children so far."""
    total = time.process_time()
    tick = os.sysconf("SC_CLK_TCK")
    for child in multiprocessing.active_children():
        try:
            text = Path(f"/proc/{child.pid}/stat").read_text()
        except OSError:
            continue
        user, system = text.rpartition(")")[2].split()[11:13]
        total += (int(user) + int(system)) / tick
    return total


def wait_until_idle(limit: float = 30) -> None:
    """Returns once this process tree spends less than a tenth of a core, or after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        before = tree_cpu()
        time.sleep(0.2)
        if tree_cpu() - before < 0.02:
            return


def _logged(
    lines: dict[str, harness.Line],
    running: dict[str, Callable[[], object]],
    log: dict[str, list[float]],
    images: int,
) -> dict[str, harness.Line]:
    """The same lines, which leave what they built in ``running`` and append the CPU seconds an image to ``log``."""

    def wrap(name: str, line: harness.Line) -> harness.Line:
        def build() -> Callable[[], object]:
            run = running[name] = line()
            log[name] = []

            def turn() -> None:
                spent = run()
                assert isinstance(spent, float)
                log[name].append(spent / images)

            return turn

        return build

    return {name: wrap(name, line) for name, line in lines.items()}


def measure(plan: Plan, results: harness.Results) -> dict[str, harness.Outcome]:
    """Measures all lines in one run, adds the records, and returns the outcomes; CPU times are under "cpu NAME"."""
    images = TURN * plan.batch
    running: dict[str, Callable[[], object]] = {}
    turns: dict[str, list[float]] = {}
    cpu: dict[str, dict[int, float]] = {}
    timed: dict[str, dict[int, float]] = {}
    lines = rate_lines(plan)
    rates = set(lines)
    parts: dict[str, dict[str, harness.Line]] = {}
    if "native" in plan.lines or "numpy" in plan.lines:
        parts[""] = stage_lines(plan)
        if "packed" in plan.lines and has_native():
            parts[_PACKED] = stage_lines(plan, _PACKED)
    for part in parts.values():
        lines |= part
    outcomes: dict[str, harness.Outcome] = {}

    def prepare(name: str) -> Callable[[], object]:
        def ready() -> None:
            wait_until_idle()
            running[name]()

        return ready

    def on_sample(name: str, repeat: int, seconds: Any) -> None:
        results.sample(name, repeat, seconds)
        cpu.setdefault(name, {})[repeat] = turns[name][-1]
        timed.setdefault(name, {})[repeat] = sum(seconds) / len(seconds)

    def on_line(name: str, outcome: harness.Outcome) -> None:
        if name not in rates:
            return
        outcomes[name] = outcome
        results.add(
            results.record(
                "loader", name, outcome, dtype="uint8", shape=plan.shape, unit="images/s", scale=lambda s: images / s
            )
        )
        if isinstance(outcome, harness.Measurement):
            outcomes[f"cpu {name}"] = add("loader_cpu", name, [*of_rounds(cpu[name]).values()], outcome.rounds)

    def add(kind: str, name: str, seconds: list[float], rounds: tuple[int, ...]) -> harness.Outcome:
        measurement = harness.Measurement(tuple(seconds), rounds=rounds)
        results.add(results.record(kind, name, measurement, dtype="uint8", shape=plan.shape))
        return measurement

    ended = harness.interleave(
        _logged(lines, running, turns, images),
        # The host's clock: a turn ends with a synchronisation, and CUDA events would miss the host's share.
        device=torch.device("cpu"),
        repeats=plan.repeats,
        warmup=1,
        deadline=plan.deadline,
        prepare={name: prepare(name) for name in lines},
        on_built=lambda name, seconds: say(f"{name}: ready after {seconds:.1f} s"),
        on_sample=on_sample,
        on_line=on_line,
    )
    kept = {
        name: (outcome.rounds, of_rounds(cpu[name]))
        for name, outcome in ended.items()
        if isinstance(outcome, harness.Measurement)
    }
    for name, outcome in ended.items():
        if name not in rates and isinstance(outcome, harness.Failure):
            say(f"{name}: failed, so that stages are missing: {outcome.reason}")
    for prefix in parts:
        needed = [*parts[prefix], *parts[""]]
        if any(name not in kept for name in needed):
            continue
        for name, seconds in stages({name: [*kept[name][1].values()] for name in needed}, prefix).items():
            outcomes[f"stage {prefix}{name}"] = add("loader_stage", prefix + name, seconds, kept["to draws"][0])
    for name in ("windows numpy", "windows native", "windows cuda"):
        if name in kept:
            rounds, seconds = kept[name]
            outcomes[name] = add("loader_windows", name.split()[1], [*seconds.values()], rounds)
            elapsed = [seconds / images for seconds in of_rounds(timed[name]).values()]
            add("loader_windows_time", name.split()[1], elapsed, rounds)
    return outcomes


def of_rounds(turns: dict[int, float]) -> dict[int, float]:
    """A line's values without that of its first turn, as ``harness.interleave`` has it, unless there is no other."""
    return {number: value for number, value in turns.items() if number or len(turns) == 1}


def measure_host(plan: Plan, results: harness.Results) -> dict[str, harness.Outcome]:
    """Loads tiny pictures, adds the records, and returns CPU seconds an image as "host LAYOUT KIND".

    Kinds are those of ``thread_cpu``. The bound is what one process could load if the thread pool took no time: the
    images a second of the busier of the other two kinds, each of which is one thread at a time.
    """
    if thread_cpu()["python"] == 0:
        say("CPU time by thread: not measured, as this system does not tell it (/proc/self/task/*/schedstat)")
        return {}
    # shards of their own: in the plan's folder they would take the place of the dataset's
    plan = dataclasses.replace(plan, batch=HOST_BATCH, size=HOST_SIDE, shards=plan.shards / f"tiny-{HOST_SIDE}")
    tiny = tiny_dataset(plan.shards)
    plan = dataclasses.replace(plan, dataset=tiny, augmentation=dataclasses.replace(plan.augmentation, blur_p=0))
    layouts = {"folder": lambda: tiny, "packed": lambda: packed_dataset(plan, 0)}
    outcomes: dict[str, harness.Outcome] = {}
    for name, dataset in layouts.items():
        loader = product_loader(dataclasses.replace(plan, dataset=dataset()), cam_grid=(1, 1))
        spent: dict[str, list[float]] = {kind: [] for kind in THREADS}
        run = _turn(loader.__next__, plan)
        run()
        for _ in range(plan.repeats):
            before = thread_cpu()
            run()
            after = thread_cpu()
            for kind in THREADS:
                spent[kind].append((after[kind] - before[kind]) / (TURN * plan.batch))
        loader.close()
        for kind, seconds in spent.items():
            outcome = outcomes[f"host {name} {kind}"] = harness.Measurement(tuple(seconds))
            results.add(results.record("loader_host", f"{name}-{kind}", outcome, dtype="uint8", shape=plan.shape))
        bound = harness.Measurement(tuple(map(max, spent["python"], spent["executor"])))
        results.add(
            results.record(
                "loader_host_bound",
                name,
                bound,
                dtype="uint8",
                shape=plan.shape,
                unit="images/s",
                scale=lambda seconds: 1 / seconds,
            )
        )
        outcomes[f"host {name} bound"] = bound
    return outcomes


def tiny_dataset(folder: Path) -> layout.Dataset:
    """As many noise pictures as a batch of the host's lines, with maps that have one salient box."""
    images, saliency = folder / "images", folder / "saliency"
    images.mkdir(parents=True, exist_ok=True)
    saliency.mkdir(exist_ok=True)
    noise = np.random.default_rng(_SEED)
    box = np.zeros((HOST_SIDE, HOST_SIDE), dtype=np.uint8)
    box[8:20, 8:20] = 255
    for number in range(HOST_BATCH):
        pixels = noise.integers(0, 256, (HOST_SIDE, HOST_SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number:03}.jpg")
        Image.fromarray(box).save(saliency / f"{number:03}.png")
    return layout.scan(images, saliency, manifest=folder / "manifest.json", workers=1)


def thread_cpu() -> dict[str, float]:
    """CPU seconds so far of this process's threads by kind.

    ``python`` is the calling thread, where the loader's Python runs, ``executor`` the threads that lead DALI from one
    operator to the next, one at a time, ``pool`` DALI's thread pool, and ``others`` the rest.
    """
    total: dict[str, float] = dict.fromkeys(THREADS, 0.0)
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text()
            seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
        except FileNotFoundError:  # a thread that has just ended
            continue
        kind = "executor" if name.startswith("[DALI] Exec") else "pool" if name.startswith("[DALI][TP") else "others"
        total["python" if int(task.name) == threading.get_native_id() else kind] += seconds
    return total


def measure_training(
    plan: Plan, results: harness.Results, step: Callable[[], object], batches: Iterator[Any]
) -> dict[str, harness.Outcome]:
    """Times ``step`` alone and with a batch taken from ``batches`` before each call, and adds the records.

    On CUDA the batches are asked for on a stream of their own, so that the step waits for none of them.
    """
    cuda = plan.device.type == "cuda"
    stream = torch.cuda.Stream(plan.device) if cuda else None

    def take() -> None:
        with torch.cuda.stream(stream):
            next(batches)

    shape = {**plan.shape, **(plan.step.shape if plan.step else {})}
    dtype = plan.step.precision if plan.step else "fp32"
    outcomes: dict[str, harness.Outcome] = {}

    def on_line(name: str, outcome: harness.Outcome) -> None:
        outcomes[f"{TRAINING} {name}"] = outcome
        results.add(results.record("training_step", name, outcome, dtype=dtype, shape=shape))

    def on_sample(name: str, repeat: int, seconds: Any) -> None:
        results.sample(f"{TRAINING} {name}", repeat, seconds)

    harness.interleave(
        {"alone": lambda: step, "beside-loader": lambda: step},
        device=plan.device,
        repeats=plan.repeats,
        warmup=3,
        calls=2 * TURN,
        settle=TURN,  # meanwhile the loader fills its queue and stops, or starts again
        prepare={"beside-loader": take},
        on_sample=on_sample,
        on_line=on_line,
    )
    share = gpu_share(outcomes)
    if share is not None:
        held = harness.Measurement((share,))
        results.add(results.record("loader_gpu_share", "product", held, dtype=dtype, shape=shape, unit="fraction"))
    return outcomes


def gpu_share(outcomes: dict[str, harness.Outcome]) -> float | None:
    """Share of the step's time that the loader running beside it costs, round by round; None where one is missing."""
    alone, beside = (outcomes.get(f"{TRAINING} {name}") for name in ("alone", "beside-loader"))
    if not isinstance(alone, harness.Measurement) or not isinstance(beside, harness.Measurement):
        return None
    return 1 - harness.speed_ratio(beside, alone).value


def training(plan: Plan, results: harness.Results) -> dict[str, harness.Outcome]:
    """``measure_training`` of the product's step and loader; a failure is the outcome of both lines."""
    assert plan.step is not None
    loader = None
    try:
        loader = product_loader(plan)
        line = ladder.build(ladder.default_line(plan.step), plan.step)
        return measure_training(plan, results, line.run, loader)
    except Exception as error:  # what was measured before is reported all the same
        return dict.fromkeys((f"{TRAINING} alone", f"{TRAINING} beside-loader"), harness.describe(error))
    finally:
        if loader is not None:
            loader.close()


def training_notes(plan: Plan, outcomes: dict[str, harness.Outcome]) -> list[str]:
    """What the loader takes from the GPU, or why nobody knows."""
    if TRAINING not in plan.lines:
        return []
    title = "GPU time taken from training"
    if plan.step is None:
        return [f"{title}: not measured, it needs a CUDA device"]
    for name in ("alone", "beside-loader"):
        outcome = outcomes.get(f"{TRAINING} {name}")
        if isinstance(outcome, harness.Failure):
            return [f"{title}: failed: {outcome.reason}"]
    alone, share = outcomes[f"{TRAINING} alone"], gpu_share(outcomes)
    assert isinstance(alone, harness.Measurement) and share is not None
    notes = [f"{title}: {share:.1%} (step of {plan.step.arch}, alone {alone.median * 1e3:.1f} ms)"]
    rates = [(name, outcomes[name]) for name in PRODUCT if name in outcomes]
    for name, outcome in rates:
        if isinstance(outcome, harness.Measurement):
            ratio = TURN * alone.median / outcome.median
            notes.append(f"{name}: {ratio:.2f}× the images that the step alone takes (goal: {GOALS['training']:g}×)")
    return notes


def show(plan: Plan, results: harness.Results, outcomes: dict[str, harness.Outcome]) -> None:
    """Prints the tables and draws the chart."""
    images = TURN * plan.batch
    rows, bars = [], []
    for name in [record.variant for record in results.records if record.name == "loader"]:
        outcome, cpu = outcomes[name], outcomes.get(f"cpu {name}")
        if isinstance(outcome, harness.Failure):
            rows.append([name, "–", outcome.reason, ""])
            bars.append(harness.Bar(name, None, note=outcome.reason, group=2))
            continue
        low, rate, high = outcome.percentiles(lambda seconds: images / seconds)
        assert isinstance(cpu, harness.Measurement)
        rows.append([name, f"{rate:.4g}", f"{low:.4g}–{high:.4g}", f"{cpu.median * 1e3:.2f}"])
        note = f"{rate:.4g} images/s, {cpu.median * 1e3:.2f} ms CPU an image"
        bars.append(harness.Bar(name, rate, low, high, note=note, group=int(name in PEERS)))
    where = results.environment.device
    title = f"Loader on {where}: {plan.size} pixels, batch {plan.batch}, {plan.threads} threads"
    notes = harness.load_note(results.environment) + packed_notes(outcomes) + training_notes(plan, outcomes)
    harness.print_table(title, ["line", "images/s", "p20–p80", "CPU ms an image"], rows, notes)
    show_host(outcomes)
    for prefix, whose in (("", ""), (_PACKED, ", of shards")):
        spent = {
            name: outcome
            for name in STAGES
            if isinstance(outcome := outcomes.get(f"stage {prefix}{name}"), harness.Measurement)
        }
        if not spent:
            continue
        total = sum(outcome.median for outcome in spent.values())
        harness.print_table(
            f"CPU time by stage{whose}",
            ["stage", "ms an image", "p20–p80", "share"],
            [
                [
                    name,
                    f"{outcome.median * 1e3:.3f}",
                    "–".join(f"{value:.3f}" for value in outcome.percentiles(lambda s: s * 1e3)[::2]),
                    f"{outcome.median / total:.1%}",
                ]
                for name, outcome in spent.items()
            ],
            [] if prefix else window_notes(outcomes),
        )
    if bars:
        harness.bar_chart(
            results.out / "loader.png",
            bars,
            title="Crop pairs loaded a second",
            xlabel="images/s",
            subtitle=title,
            groups=("cast_fast", "compared with"),
        )


def show_host(outcomes: dict[str, harness.Outcome]) -> None:
    """Prints what the loader costs outside of the thread pool."""
    rows = []
    for name in ("folder", "packed"):
        spent = [outcomes.get(f"host {name} {kind}") for kind in ("python", "executor", "pool", "bound")]
        if all(isinstance(outcome, harness.Measurement) for outcome in spent):
            *spent, bound = [outcome.median for outcome in spent if isinstance(outcome, harness.Measurement)]
            rows.append([name, *(f"{seconds * 1e3:.4f}" for seconds in spent), f"{1 / bound:,.0f}"])
    if rows:
        harness.print_table(
            f"CPU time by thread, pictures of {HOST_SIDE} pixels, batch {HOST_BATCH}",
            ["line", "Python ms an image", "executor", "thread pool", "images/s if the pool were free"],
            rows,
            ["Python's thread is the training loop's, and DALI's executor is one thread at a time"],
        )


def window_notes(outcomes: dict[str, harness.Outcome]) -> list[str]:
    """What the native operator saves."""
    numpy, native = outcomes.get("windows numpy"), outcomes.get("windows native")
    if not isinstance(numpy, harness.Measurement):
        return []
    text = f"windows by NumPy: {numpy.median * 1e3:.3f} ms an image"
    if not isinstance(native, harness.Measurement):
        return [f"{text}; the native operator is not built"]
    gain = numpy.median / native.median
    return [f"{text}, by the native operator: {native.median * 1e3:.3f} ms, {gain:.1f}× (goal: {GOALS['windows']:g}×)"]


def packed_notes(outcomes: dict[str, harness.Outcome]) -> list[str]:
    """What packing saves."""
    folder = outcomes.get("cpu native", outcomes.get("cpu numpy"))
    notes = []
    for name in ("packed", "packed-256"):
        outcome = outcomes.get(f"cpu {name}")
        if isinstance(folder, harness.Measurement) and isinstance(outcome, harness.Measurement):
            ratio = harness.speed_ratio(outcome, folder)
            spread = "" if ratio.p20 is None else f" ({ratio.p20:.2f}–{ratio.p80:.2f})"
            notes.append(f"{name}: {ratio.value:.2f}× the folder's CPU rate{spread}")
    return [f"{'; '.join(notes)} (goal: {GOALS['packed']:g}×)"] if notes else []


def measure_one(plan: Plan, name: str) -> dict[str, float]:
    """Seconds an image of a line that has this process for itself: ``elapsed`` and ``cpu``."""
    run = rate_lines(plan)[name]()
    run()
    images = ALONE_TURNS * TURN * plan.batch
    begin, cpu = time.perf_counter(), tree_cpu()
    for _ in range(ALONE_TURNS):
        run()
    return {"elapsed": (time.perf_counter() - begin) / images, "cpu": (tree_cpu() - cpu) / images}


def one_process(argv: list[str], name: str) -> dict[str, float]:
    """``measure_one`` in a fresh process, which gets the flags of this one.

    Raises:
        RuntimeError: the process failed; the text is the last line that it wrote.
    """
    # stdout belongs to the libraries; a pipe of its own is for the answer. An interrupt ends that process as well.
    receiving, sending = os.pipe()
    with os.fdopen(receiving) as answer:
        try:
            command = [sys.executable, __file__, *argv, "--one", name, "--answer", str(sending)]
            done = subprocess.run(command, pass_fds=[sending], stderr=subprocess.PIPE, text=True, errors="replace")
        finally:
            os.close(sending)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no word"]
            raise RuntimeError(f"its process ended with {done.returncode}: {said[-1]}")
        return json.loads(answer.read())


def measure_alone(
    plan: Plan, results: harness.Results, one: Callable[[str], dict[str, float]]
) -> dict[str, harness.Outcome]:
    """Measures lines one at a time, each sample by a call of ``one``, and adds the records as rounds end.

    Returns:
        The outcomes, and under "cpu NAME" their CPU time.
    """
    names = [name for name in rate_lines(plan) if name in (*ALONE, *LINES)]
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    outcomes: dict[str, harness.Outcome] = {}

    def keep(name: str) -> None:
        rounds = tuple(found[name])
        outcome, cpu = (
            harness.Measurement(tuple(sample[kind] for sample in found[name].values()), rounds=rounds)
            for kind in ("elapsed", "cpu")
        )
        outcomes[name], outcomes[f"cpu {name}"] = outcome, cpu
        record = functools.partial(results.record, dtype="uint8", shape=plan.shape)
        results.add(record("loader_alone", name, outcome, unit="images/s", scale=lambda seconds: 1 / seconds))
        results.add(record("loader_alone_cpu", name, cpu))
        folder = outcomes.get("cpu native")
        if name != "native" and isinstance(folder, harness.Measurement):
            gain = harness.speed_ratio(cpu, folder)
            if gain.rounds:
                ratio = results.ratio(name, gain, dtype="uint8", shape=plan.shape)
                results.add(dataclasses.replace(ratio, name="loader_alone_gain"))

    for number in range(1, plan.repeats + 1):
        if number > 1 and plan.deadline is not None and time.monotonic() >= plan.deadline:
            break
        for name in names:
            if isinstance(outcomes.get(name), harness.Failure):
                continue
            try:
                found[name][number] = one(name)
            except Exception as error:  # any error belongs to its line; the others go on
                failure = harness.describe(error)
                say(f"{name}: failed: {failure.reason}")
                outcomes[name] = failure
                outcomes.pop(f"cpu {name}", None)
                results.add(
                    results.record("loader_alone", name, failure, dtype="uint8", shape=plan.shape, unit="images/s")
                )
                continue
            keep(name)
            say(f"round {number}, {name}: {found[name][number]['cpu'] * 1e3:.2f} ms CPU an image")
    return outcomes


def show_alone(plan: Plan, results: harness.Results, outcomes: dict[str, harness.Outcome]) -> None:
    """Prints the table of ``--alone``."""
    gains = {record.variant: record for record in results.records if record.name == "loader_alone_gain"}
    rows = []
    for name, outcome in outcomes.items():
        if name.startswith("cpu "):
            continue
        if isinstance(outcome, harness.Failure):
            rows.append([name, "–", outcome.reason, "", "", "", ""])
            continue
        cpu = outcomes[f"cpu {name}"]
        assert isinstance(cpu, harness.Measurement)
        low, middle, high = cpu.percentiles(lambda seconds: seconds * 1e3)
        slow, rate, fast = outcome.percentiles(lambda seconds: 1 / seconds)
        gain = gains.get(name)
        rows.append(
            [
                name,
                f"{middle:.2f}",
                f"{low:.2f}–{high:.2f}",
                "–" if gain is None else f"{gain.value:.2f} ({gain.p20:.2f}–{gain.p80:.2f})",
                f"{rate:.4g}",
                f"{slow:.4g}–{fast:.4g}",
                str(len(outcome.seconds)),
            ]
        )
    columns = ["line", "CPU ms an image", "p20–p80", "× folder per CPU time", "images/s", "p20–p80", "processes"]
    title = f"Each loader alone on {results.environment.device}: {plan.size} pixels, batch {plan.batch}"
    notes = [f"{plan.threads} threads; native is the folder; × folder: medians over rounds"]
    harness.print_table(title, columns, rows, notes + harness.load_note(results.environment))


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> tuple[Plan, argparse.Namespace]:
    """The plan that the flags mean, and the flags.

    Raises:
        UserError: a value out of range, an unknown line, or a dataset with faults.
    """
    from cast_fast.data.dali_loader import Augmentation
    from cast_fast.data.synthetic import write_dataset

    parser = OneLineParser(prog="loader.py", description="measure the loader against its peers", allow_abbrev=False)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--images", type=Path, metavar="DIR", help="your images (default: made scenes)")
    parser.add_argument("--saliency", type=Path, metavar="DIR", help="their saliency maps")
    parser.add_argument("--scenes", type=int, metavar="N", help="made scenes to draw (default: 1024 on CUDA, 128)")
    parser.add_argument("--batch", type=int, metavar="N", help="pairs in a batch (default: 256 on CUDA, 32)")
    parser.add_argument("--size", type=int, default=224, metavar="S", help="side of the crops")
    parser.add_argument("--blur", type=float, default=0.0, metavar="P", help="probability of a blur (default: 0)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads or workers (0: all cores)")
    parser.add_argument("--repeats", type=int, metavar="N", help="interleaved rounds (default: 5; --quick 2)")
    parser.add_argument("--lines", metavar="A,B", help=f"only these, of {','.join(LINES)}")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="start no further round after this")
    parser.add_argument("--quick", action="store_true", help="few scenes, small batches, two rounds")
    parser.add_argument("--alone", action="store_true", help="each line in fresh processes, one at a time")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("bench_out/loader"), metavar="DIR")
    begin = time.monotonic()
    args = parser.parse_args(argv)
    device = harness.choose_device(args.device)
    cuda = device.type == "cuda"

    def default(value: int | None, on_cuda: int, on_cpu: int, quick: int) -> int:
        return value if value is not None else quick if args.quick else on_cuda if cuda else on_cpu

    batch, scenes = default(args.batch, 256, 32, 8), default(args.scenes, 1024, 128, 16)
    repeats = default(args.repeats, 5, 5, 2)
    for flag, value, low in (
        ("--batch", batch, 1),
        ("--scenes", scenes, 1),
        ("--size", args.size, 32),
        ("--threads", args.threads, 0),
        ("--repeats", repeats, 1),
    ):
        if value < low:
            raise UserError(f"{flag}: got {value}, expected at least {low}")
    if not 0 <= args.blur <= 1:
        raise UserError(f"--blur: got {args.blur}, expected a probability")
    lines = ("native", "packed") if args.alone else LINES
    if args.lines is not None:
        lines = tuple(name.strip() for name in args.lines.split(",") if name.strip())
        for name in lines or ("",):
            if name not in LINES:
                raise UserError(f"--lines: got {name!r}, expected some of {', '.join(LINES)}")
    if args.alone and TRAINING in lines:
        raise UserError(f"--lines: got {TRAINING} with --alone, expected loaders only")
    if (args.images is None) != (args.saliency is None):
        raise UserError("--images and --saliency: got one without the other, expected both or neither")
    images, saliency = args.images, args.saliency
    if images is None:
        folder = args.out / f"scenes-{max(scenes, batch)}-{_SEED}"
        say(f"made scenes: {max(scenes, batch)} in {folder}")
        write_dataset(folder, max(scenes, batch), _SEED)
        images, saliency = folder / "images", folder / "saliency"
    dataset = layout.usable(layout.scan(images, saliency), skip_invalid=False, on_empty_saliency="error")
    if len(dataset) < batch:
        raise UserError(f"--batch: got {batch}, but {images} holds {len(dataset)} images")
    side = -(-args.size // 32)
    plan = Plan(
        device,
        dataset,
        batch,
        args.size,
        (side, side),
        args.threads or len(os.sched_getaffinity(0)),
        repeats,
        lines,
        Augmentation(blur_p=args.blur),
        args.out,
        step_settings(device, batch, args.size, quick=args.quick) if cuda and TRAINING in lines else None,
        deadline=None if args.max_seconds is None else begin + args.max_seconds,
    )
    return plan, args


def step_settings(device: torch.device, batch: int, size: int, *, quick: bool) -> ladder.Settings:
    """The settings of the ladder's step at a loader's sizes."""
    parser = OneLineParser(prog="loader.py", allow_abbrev=False)
    ladder.add_arguments(parser)
    flags = ["--device", device.type, "--batch", str(batch), "--size", str(size), *(["--quick"] if quick else [])]
    return ladder.settings_from(parser.parse_args(flags))


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; returns the exit code."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        return run(argv)
    except KeyboardInterrupt:  # what was measured until then is written
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def run(argv: list[str] | None) -> int:
    """``main``, but for interrupts."""
    if (fault := dali_fault()) is not None:
        print(f"loader.py: error: {fault}", file=sys.stderr)
        return EXIT_USER_ERROR
    try:
        plan, args = parse(argv)
        if args.one is not None:
            os.write(args.answer, json.dumps(measure_one(plan, args.one)).encode())
            return 0
        results = harness.open_results(args.out, harness.environment(plan.device))
    except UserError as error:
        print(f"loader.py: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    if args.alone:
        if "packed" in plan.lines:  # here, so that no measured process does it
            for short_side in (0, 256):
                packed_dataset(plan, short_side)
        flags = sys.argv[1:] if argv is None else argv
        outcomes = measure_alone(plan, results, functools.partial(one_process, flags))
        show_alone(plan, results, outcomes)
        say(f"results: {args.out}")
        return 1 if any(isinstance(outcome, harness.Failure) for outcome in outcomes.values()) else 0
    # Before what takes long, and may be cut off.
    outcomes = training(plan, results) if plan.step is not None else {}
    outcomes |= measure(plan, results)
    if "native" in plan.lines and "packed" in plan.lines:
        outcomes |= measure_host(plan, results)
    show(plan, results, outcomes)
    say(f"results: {args.out}")
    # A library that is not there is reported and is no failure of the benchmark.
    failed = [name for name in PRODUCT if isinstance(outcomes.get(name), harness.Failure)]
    untrained = plan.step is not None and gpu_share(outcomes) is None
    return 1 if untrained or "numpy" in failed or (failed and has_native()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
