"""Linear classification of frozen features, all learning rates of a sweep trained side by side.

The protocol of MoCo (He et al., CVPR 2020) and its kin: softmax regression on pooled features by SGD with momentum,
here with a cosine schedule. Features are standardised with the training set's mean and deviation first, which makes one
range of learning rates fit every network; the standardisation is folded into the returned layer, which takes raw
features.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger("cast_fast")

RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
EPOCHS = 100
BATCH = 256
HELD_OUT = 0.2


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Accuracy of each learning rate on a held-out part of the training set."""

    rates: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def best(self) -> float:
        """The rate of the highest accuracy, the smallest of equals."""
        return self.rates[max(range(len(self.rates)), key=lambda i: (self.accuracy[i], -i))]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the largest or smallest that was tried."""
        return self.best in (self.rates[0], self.rates[-1])


def hold_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """A stratified choice: bool (n,), True for about ``share`` of each class, at least one where a class has two."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        count = min(len(members) - 1, max(1, round(share * len(members))))
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return chosen


def train_linear(
    features: Tensor,
    labels: Tensor,
    classes: int,
    rates: Sequence[float],
    *,
    epochs: int = EPOCHS,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> list[nn.Linear]:
    """One linear layer for each learning rate, trained on the same batches.

    Args:
        features: (n, F).
        labels: (n,) int64 in [0, classes).
        classes: number of classes.
        rates: learning rates.
        epochs: passes over the data.
        weight_decay: of SGD, on the weights of the standardised features.
        seed: of the order.

    Returns:
        Layers on the CPU that map raw features (N, F) to scores (N, classes).

    Raises:
        ValueError: no features, or a label out of range.
    """
    if len(features) == 0 or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"got {len(features)} features and classes up to {labels.max()}, expected some, below {classes}"
        )
    x = features.float()
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0).clamp_min(1e-6)
    x = (x - mean) / deviation
    labels = labels.to(x.device)
    scale = torch.tensor(rates, device=x.device)[:, None, None]
    weight = torch.zeros(len(rates), classes, x.shape[1] + 1, device=x.device)  # the last column is the bias
    velocity = torch.zeros_like(weight)
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    target = F.one_hot(labels, classes).float()
    generator = torch.Generator().manual_seed(seed)
    per_epoch = -(-len(x) // BATCH)
    total, step = epochs * per_epoch, 0
    decay = torch.full_like(weight[:1], weight_decay)
    decay[:, :, -1] = 0
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for chosen in order.split(BATCH):
            inputs = x[chosen]
            residual = (inputs @ weight.transpose(1, 2)).softmax(dim=2) - target[chosen]  # (rates, N, classes)
            gradient = residual.transpose(1, 2) @ inputs / len(chosen) + decay * weight
            velocity.mul_(0.9).add_(gradient)
            factor = 0.5 * (1 + math.cos(math.pi * step / total))
            weight -= factor * scale * velocity
            step += 1
    layers = []
    for index in range(len(rates)):
        layer = nn.Linear(features.shape[1], classes)
        with torch.no_grad():
            layer.weight.copy_(weight[index, :, :-1] / deviation)
            layer.bias.copy_(weight[index, :, -1] - layer.weight.to(x.device) @ mean)
        layers.append(layer.eval().requires_grad_(False))
    return layers


def sweep(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    rates: Sequence[float] = RATES,
    epochs: int = EPOCHS,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Sweep:
    """Tries every learning rate on part of the training set and measures it on the rest; the test set stays unseen."""
    held = hold_out(labels, HELD_OUT, seed)
    layers = train_linear(
        features[~held], labels[~held], classes, rates, epochs=epochs, weight_decay=weight_decay, seed=seed
    )
    accuracy = []
    for layer in layers:
        predicted = layer.to(features.device)(features[held].float()).argmax(dim=1)
        accuracy.append(float((predicted.cpu() == labels[held].cpu()).float().mean()) if held.any() else 0.0)
    found = Sweep(tuple(rates), tuple(accuracy))
    if len(rates) > 1 and found.at_edge:
        logger.info("linear probe: the best learning rate, %g, is at the edge of the sweep", found.best)
    return found


def fit_linear(
    features: Tensor,
    labels: Tensor,
    classes: int,
    rate: float,
    *,
    epochs: int = EPOCHS,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> nn.Linear:
    """A linear layer trained on all of the training set at one learning rate."""
    return train_linear(features, labels, classes, [rate], epochs=epochs, weight_decay=weight_decay, seed=seed)[0]
