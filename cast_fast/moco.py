"""Momentum contrast: a query encoder, its slowly moving copy, and the queue (He et al., CVPR 2020)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cast_fast.encoder import Encoder, build_encoder
from cast_fast.key_queue import KeyQueue


class MoCo(nn.Module):
    """Query encoder, key encoder and key queue.

    The key encoder starts as a copy of the query encoder and takes no gradient. Both stay in train mode: each forward
    pass is normalised by the statistics of its own batch or of groups of it (``shuffle``), as in MoCo. The key
    encoder's running BatchNorm statistics therefore mix the plain and the masked keys; nothing here evaluates the key
    encoder, so nothing reads them.

    Args:
        arch: name of a torchvision ResNet.
        dim: D, length of the embedding.
        head: ``"linear"`` or ``"mlp"``.
        queue_size: K, number of negatives.
        seed: of the initial weights and of the initial queue; the global random state is left as it was.
        queue_dtype: of the queue's keys; see ``KeyQueue``.
        batch_norm: ``"torch"`` or ``"streaming"``; see ``encoder.build_trunk``.

    Raises:
        UserError: unknown ``arch``.
        ValueError: unknown ``head`` or ``batch_norm``, ``dim`` or ``queue_size`` below 1.
    """

    query: Encoder
    key: Encoder
    queue: KeyQueue

    def __init__(
        self,
        arch: str,
        dim: int = 128,
        head: str = "linear",
        queue_size: int = 65536,
        seed: int = 0,
        batch_norm: str = "torch",
        queue_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._assemble(build_encoder(arch, dim, head, batch_norm), KeyQueue(queue_size, dim, dtype=queue_dtype))

    @classmethod
    def from_encoder(
        cls, encoder: Encoder, dim: int, queue_size: int, seed: int = 0, queue_dtype: torch.dtype = torch.float32
    ) -> MoCo:
        """The same around an encoder of your own; ``seed`` is that of the queue."""
        moco = cls.__new__(cls)
        nn.Module.__init__(moco)
        generator = torch.Generator().manual_seed(seed)
        moco._assemble(encoder.to(memory_format=torch.channels_last), KeyQueue(queue_size, dim, generator, queue_dtype))
        return moco

    def _assemble(self, encoder: Encoder, queue: KeyQueue) -> None:
        self.query = encoder
        self.key = copy.deepcopy(encoder).requires_grad_(False)
        self.queue = queue

    @torch.no_grad()
    def momentum_update(self, momentum: float, gate: Tensor | None = None) -> None:
        """Moves every parameter of the key encoder in place: key ← momentum · key + (1 − momentum) · query.

        Buffers (BatchNorm statistics) are each encoder's own, as in MoCo.

        Args:
            momentum: m in [0, 1].
            gate: 0-dimensional bool on the device; where it is false, nothing is changed.
        """
        keys: list[Tensor] = list(self.key.parameters())
        queries: list[Tensor] = list(self.query.parameters())
        if gate is None:
            torch._foreach_lerp_(keys, queries, 1.0 - momentum)
            return
        # An SGD step with 'gradient' query, decay −1 and rate −(1 − m) is key − (−(1 − m)) · (query − key): the same
        # interpolation, in the one multi-tensor kernel that takes its skip flag from the device. A product with a
        # gate of zero would turn an infinite difference into NaN, and selecting per tensor would cost 160 launches.
        torch._fused_sgd_(
            [_in_memory_order(key) for key in keys],
            [_in_memory_order(query) for query in queries],
            [],
            weight_decay=-1.0,
            momentum=0.0,
            lr=-(1.0 - momentum),
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            grad_scale=None,
            found_inf=(~gate).float(),
        )


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A contiguous view of a channels-last tensor: torch's CPU kernel copies a 'gradient' that is not contiguous."""
    channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.permute(0, 2, 3, 1) if channels_last else tensor
