"""An encoder small enough for float64 steps and for many compilations."""

from __future__ import annotations

import torch
from torch import nn

from cast_fast.encoder import Encoder, LinearHead, MLPHead

CHANNELS = 16
STRIDE = 8


def tiny_trunk() -> nn.Sequential:
    """Two convolutions with BatchNorm; a crop of 8·G pixels gives a grid of G×G cells."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4, padding=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, CHANNELS, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(),
    )


def tiny_encoder(dim: int = 8, head: str | nn.Module = "linear", seed: int = 0) -> Encoder:
    """``head`` is a name, or a module from ``CHANNELS`` features to ``dim``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = tiny_trunk()
        if isinstance(head, str):
            head = LinearHead(CHANNELS, dim) if head == "linear" else MLPHead(CHANNELS, dim)
    return Encoder(trunk, head)
