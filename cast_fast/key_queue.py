"""The ring of past keys that serve as negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyQueue(nn.Module):
    """K normalised keys of length D; new keys replace the oldest.

    It starts as random unit vectors (MoCo, He et al. 2020). K need not be a multiple of the batch: rows wrap around.
    ``keys`` (K, D) and ``pointer`` (0-dimensional int64: the row that is written next) are buffers, so a checkpoint of
    the module holds the whole queue.

    Args:
        size: K, number of keys.
        dim: D, length of a key.
        generator: source of the random start; the global one by default.

    Raises:
        ValueError: ``size`` or ``dim`` below 1.
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"key queue: got size {size} and dim {dim}, expected both at least 1")
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=generator), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return self.keys.shape[0]

    @torch.no_grad()
    def enqueue(self, keys: Tensor, gate: Tensor | None = None) -> None:
        """Overwrites the N oldest rows with ``keys`` and moves the pointer, without synchronising with the host.

        Args:
            keys: (N, D) normalised keys, N at most K.
            gate: 0-dimensional bool on the same device; where it is false, rows and pointer stay as they are.

        Raises:
            ValueError: more keys than rows, or keys of another length.
        """
        count, size = keys.shape[0], len(self)
        if count > size or keys.shape[1:] != self.keys.shape[1:]:
            raise ValueError(f"keys: got shape {tuple(keys.shape)}, expected at most {tuple(self.keys.shape)}")
        rows = (self.pointer + torch.arange(count, device=self.keys.device)) % size
        keys = keys.to(self.keys.dtype)
        if gate is None:
            self.keys.index_copy_(0, rows, keys)
            self.pointer.add_(count).remainder_(size)
        else:
            self.keys.index_copy_(0, rows, torch.where(gate, keys, self.keys[rows]))
            self.pointer.add_(gate * count).remainder_(size)
