"""Finetuning of a whole network with labels: what the pretrained weights are worth as a starting point."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cast_fast.evaluate.features import central_image, stack
from cast_fast.evaluate.figures import Picture
from cast_fast.evaluate.linear_probe import HELD_OUT, Sweep, hold_out
from cast_fast.evaluate.pictures import Box, Pictures, batches, cut
from cast_fast.evaluate.weights import Model

logger = logging.getLogger("cast_fast")

RATES = (0.001, 0.003, 0.01, 0.03)
_AREA = (0.2, 1.0)
_RATIO = 4 / 3


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a network is finetuned: SGD with momentum 0.9, cosine schedule, random resized crops and flips."""

    epochs: int = 20
    batch: int = 64
    size: int = 224
    weight_decay: float = 1e-4
    seed: int = 0


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """A random resized crop: area 20 to 100 %, ratio 3/4 to 4/3; the central square where ten draws do not fit."""
    for _ in range(10):
        area = width * height * rng.uniform(*_AREA)
        ratio = math.exp(rng.uniform(-math.log(_RATIO), math.log(_RATIO)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w) / width, rng.uniform(0, height - h) / height
            return top, left, top + h / height, left + w / width
    side = min(width, height)
    top, left = (1 - side / height) / 2, (1 - side / width) / 2
    return top, left, 1 - top, 1 - left


def random_view(pictures: Pictures, index: int, size: int, seed: tuple[int, ...]) -> Picture:
    """A random resized crop, flipped half of the time; a function of picture and seed."""
    rng = np.random.default_rng([*seed, index])
    image = pictures.image(index)
    view = cut(image, random_box(*image.size, rng), size)
    return view[:, ::-1] if rng.random() < 0.5 else view


def finetune(
    model: Model,
    pictures: Pictures,
    indices: Sequence[int],
    labels: Tensor,
    classes: int,
    rate: float,
    schedule: Schedule,
    device: torch.device,
) -> Model:
    """Trains a copy of the trunk with a new classifier.

    Args:
        model: the pretrained encoder; left as it is.
        pictures: the dataset.
        indices: which pictures to train on.
        labels: int64 (len(pictures),) classes in [0, classes).
        classes: number of classes.
        rate: peak learning rate.
        schedule: everything else.
        device: where to compute.

    Returns:
        The trained classifier in evaluation mode. Its weights are not finite where training diverged.
    """
    trained = copy.deepcopy(model)
    width = model.features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=next(model.trunk.parameters()).device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schedule.seed)
        trained.classifier = nn.Linear(width.shape[1], classes)
    trained.key = None
    trained.to(device)
    trunk, classifier = trained.trunk.requires_grad_(True).train(), trained.classifier
    optimizer = torch.optim.SGD(
        [*trunk.parameters(), *classifier.parameters()], lr=rate, momentum=0.9, weight_decay=schedule.weight_decay
    )
    rng = np.random.default_rng(schedule.seed)
    per_epoch = -(-len(indices) // schedule.batch)
    total, step = schedule.epochs * per_epoch, 0
    for epoch in range(schedule.epochs):
        order = [indices[i] for i in rng.permutation(len(indices))]
        text = f"{model.name}: finetuning at {rate:g}, epoch {epoch + 1}/{schedule.epochs}"
        for chosen, views in batches(
            order,
            lambda i, epoch=epoch: random_view(pictures, i, schedule.size, (schedule.seed, epoch)),
            schedule.batch,
            text=text,
        ):
            if len(chosen) < 2:  # BatchNorm needs two
                continue
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / total))
            pooled = trunk(model.normalise(stack(views).to(device))).mean(dim=(2, 3))
            loss = F.cross_entropy(classifier(pooled), labels[chosen].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
    trunk.requires_grad_(False).eval()
    classifier.requires_grad_(False).eval()
    return trained


def predict(
    model: Model, pictures: Pictures, indices: Sequence[int], size: int, batch: int, device: torch.device
) -> Tensor:
    """Scores of the central crop of some pictures: (n, classes) on the CPU."""
    model.to(device)
    parts = [
        model.scores(stack(images).to(device)).cpu()
        for _, images in batches(indices, lambda i: central_image(pictures, i, size), batch, text=f"{model.name}: test")
    ]
    return torch.cat(parts)


def sweep_finetuning(
    model: Model,
    pictures: Pictures,
    indices: Sequence[int],
    labels: Tensor,
    classes: int,
    rates: Sequence[float],
    schedule: Schedule,
    device: torch.device,
) -> Sweep:
    """Finetunes at every learning rate on part of the training pictures and measures on the rest."""
    held = hold_out(labels[list(indices)], HELD_OUT, schedule.seed).tolist()
    fit = [i for i, out in zip(indices, held) if not out]
    rest = [i for i, out in zip(indices, held) if out]
    accuracy = []
    for rate in rates:
        trained = finetune(model, pictures, fit, labels, classes, rate, schedule, device)
        scores = predict(trained, pictures, rest, schedule.size, schedule.batch, device) if rest else torch.zeros(0, 1)
        right = (scores.argmax(dim=1) == labels[rest]) & scores.isfinite().all(dim=1)
        accuracy.append(float(right.float().mean()) if rest else 0.0)
        logger.info(
            "%s: finetuned at %g, %.1f %% right of %d held out", model.name, rate, 100 * accuracy[-1], len(rest)
        )
    found = Sweep(tuple(rates), tuple(accuracy))
    if len(rates) > 1 and found.at_edge:
        logger.info("finetuning: the best learning rate, %g, is at the edge of the sweep", found.best)
    return found
