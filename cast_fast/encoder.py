"""Encoders: a convolutional trunk, global average pooling and a projection head that can pull gradients back.

The closed-form Grad-CAM of ``objective`` needs, beside an ordinary forward pass, the product of the head's transposed
Jacobian with a vector. For the usual heads this *pull-back* is a handful of forward operations, so that the attention
loss needs no gradient inside the forward pass and the step compiles as one graph.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from cast_fast.errors import UserError
from cast_fast.max_pool import MaxPool2d

HEADS = ("linear", "mlp")
BATCH_NORMS = ("torch", "streaming")


class EncoderOutput(NamedTuple):
    """What one forward pass leaves behind for the objective."""

    activations: Tensor
    """(N, C, H, W): the trunk's output, in the dtype of the trunk's arithmetic."""
    pooled: Tensor
    """(N, C) float32 or wider: mean of the activations over space."""
    projection: Tensor
    """(N, D) float32 or wider: the head's output z."""
    embedding: Tensor
    """(N, D) float32 or wider: z / ‖z‖."""


class LinearHead(nn.Module):
    """One linear layer, as in MoCo v1 and in the published CAST settings."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(features, dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """(N, C) pooled features → (N, D) projections."""
        return self.fc(pooled)

    def pullback(self, pooled: Tensor, vector: Tensor) -> Tensor:
        """Transposed Jacobian at ``pooled`` (N, C) times ``vector`` (N, D) → (N, C), differentiable."""
        del pooled
        return vector @ self.fc.weight


class MLPHead(nn.Module):
    """Linear, ReLU, linear with a hidden layer as wide as the trunk, as in MoCo v2."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, features)
        self.fc = nn.Linear(features, dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """(N, C) pooled features → (N, D) projections."""
        return self.fc(F.relu(self.hidden(pooled)))

    def pullback(self, pooled: Tensor, vector: Tensor) -> Tensor:
        """Transposed Jacobian at ``pooled`` (N, C) times ``vector`` (N, D) → (N, C), differentiable.

        The hidden layer is evaluated again: under ``torch.compile`` it is the same expression as in ``forward`` and
        computed once, and in eager mode it costs a thousandth of a trunk.
        """
        active = self.hidden(pooled) > 0
        return torch.where(active, vector @ self.fc.weight, 0) @ self.hidden.weight


class Encoder(nn.Module):
    """Trunk, global average pooling, projection head and normalisation.

    Args:
        trunk: maps images (N, 3, S, S) to activations (N, C, H, W).
        head: maps pooled activations (N, C) to projections (N, D). With a method ``pullback(pooled, vector)`` the
            attention loss uses it; without one it differentiates the head with ``torch.func.vjp``
            (``objective.pull_back``).
    """

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, images: Tensor) -> EncoderOutput:
        """(N, 3, S, S) normalised images → ``EncoderOutput``.

        Under autocast the trunk runs in the lower precision; pooling, head and normalisation never do, because a
        bfloat16 head costs 4 % in the Grad-CAM weights.
        """
        activations = self.trunk(images)
        with torch.autocast(activations.device.type, enabled=False):
            wide = torch.promote_types(activations.dtype, torch.float32)
            pooled = activations.mean(dim=(2, 3), dtype=wide)
            projection = self.head(pooled)
            embedding = F.normalize(projection, dim=1)
        return EncoderOutput(activations, pooled, projection, embedding)


def architectures() -> list[str]:
    """Names of the trunks that ``build_encoder`` knows: every ResNet of torchvision."""
    models = torchvision.models
    return [
        name
        for name in models.list_models()
        if models.get_model_builder(name).__module__ == "torchvision.models.resnet"
    ]


def build_trunk(arch: str, batch_norm: str = "torch") -> tuple[nn.Sequential, int]:
    """A torchvision ResNet without its pooling and classifier, randomly initialised, and its number of channels.

    The keys of its ``state_dict`` are torchvision's (318 for ``resnet50``), whatever ``batch_norm`` is.

    Args:
        arch: its name.
        batch_norm: how BatchNorm and what surrounds it are computed in training mode: ``"torch"`` by torch's modules,
            ``"streaming"`` by the operators of ``cast_kernels`` (``streaming_resnet``).

    Raises:
        UserError: ``arch`` is no ResNet of torchvision.
        ValueError: unknown ``batch_norm``.
    """
    if batch_norm not in BATCH_NORMS:
        raise ValueError(f"batch_norm: got {batch_norm!r}, expected one of {', '.join(BATCH_NORMS)}")
    known = architectures()
    if arch not in known:
        close = difflib.get_close_matches(arch, known, n=3) or known
        raise UserError(f"--arch: got {arch!r}, expected a ResNet of torchvision such as {', '.join(close)}")
    network = torchvision.models.get_model(arch, weights=None)
    assert isinstance(network, torchvision.models.ResNet)
    trunk = nn.Sequential()
    for name, module in network.named_children():
        if name not in ("avgpool", "fc"):
            trunk.add_module(name, MaxPool2d.like(module) if isinstance(module, nn.MaxPool2d) else module)
    if batch_norm == "streaming":
        from cast_fast.streaming_resnet import StreamingTrunk

        trunk = StreamingTrunk(trunk)
    return trunk, int(network.fc.in_features)


def build_encoder(arch: str, dim: int, head: str, batch_norm: str = "torch") -> Encoder:
    """A randomly initialised encoder in channels-last memory.

    Args:
        arch: name of a torchvision ResNet.
        dim: D, length of the embedding.
        head: ``"linear"`` or ``"mlp"``.
        batch_norm: as for ``build_trunk``.

    Raises:
        UserError: unknown ``arch``.
        ValueError: unknown ``head`` or ``batch_norm``, or ``dim`` below 1.
    """
    if dim < 1:
        raise ValueError(f"dim: got {dim}, expected at least 1")
    if head not in HEADS:
        raise ValueError(f"head: got {head!r}, expected one of {', '.join(HEADS)}")
    trunk, features = build_trunk(arch, batch_norm)
    projection = LinearHead(features, dim) if head == "linear" else MLPHead(features, dim)
    return Encoder(trunk, projection).to(memory_format=torch.channels_last)


def cam_grid(encoder: str | Encoder, size: int) -> tuple[int, int]:
    """(rows, columns) of the trunk's output, and so of the Grad-CAM map, for crops of ``size`` pixels.

    Nothing is computed: the trunk runs on the meta device.

    Args:
        encoder: an encoder, or the name of an architecture.
        size: side of the square crops in pixels.

    Raises:
        UserError: unknown architecture, or crops too small for the trunk.
    """
    if isinstance(encoder, str):
        with torch.device("meta"):
            trunk: nn.Module = build_trunk(encoder)[0]
    else:
        trunk = encoder.trunk
    tensors = {**dict(trunk.named_parameters()), **dict(trunk.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    dtype = next((tensor.dtype for tensor in shapes.values() if tensor.is_floating_point()), torch.float32)
    try:
        with torch.no_grad():
            output = torch.func.functional_call(
                trunk, shapes, (torch.empty(2, 3, size, size, device="meta", dtype=dtype),)
            )
    except RuntimeError as error:
        raise UserError(f"--size: got {size}, expected crops that the trunk can process ({error})") from None
    return int(output.shape[2]), int(output.shape[3])
