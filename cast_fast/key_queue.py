"""The ring of past keys that serve as negatives, whole or shared out over ranks.

Keys arrive in the order of the samples' positions in the global batch, of which rank r of W has r, W + r, 2W + r, …
(``data.sampling``). So if each rank keeps the latest of its own keys, ⌈K/W⌉ or ⌊K/W⌋ of them, the ranks together hold
exactly the K latest keys of all, for any K, and nobody sends a key anywhere. The ranks' oldest-first lists interleave
to that of the whole queue: as columns side by side, read row by row, they are it. That is how a checkpoint holds it,
each rank writing its own column, and why any number of ranks can go on from it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cast_fast import distributed


class KeyQueue(nn.Module):
    """K normalised keys of length D; new keys replace the oldest.

    It starts as random unit vectors (MoCo, He et al. 2020). K need not be a multiple of the batch: rows wrap around.
    ``keys`` (K, D) and ``pointer`` (0-dimensional int64: the row that is written next) are buffers, so a checkpoint of
    the module holds the whole queue. After ``shard`` the rows are those of this rank, which it saves as ``column``.

    Args:
        size: K, number of keys.
        dim: D, length of a key.
        generator: source of the random start; the global one by default.
        dtype: of ``keys``. In bfloat16 a key is off by 0.17 % of its length (root mean square), and the queue takes
            half the memory and, in the fused losses, a third of the products.

    Raises:
        ValueError: ``size`` or ``dim`` below 1, or another ``dtype`` than bfloat16, float32 or float64.
    """

    keys: Tensor
    pointer: Tensor
    _own_pointer: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if dtype not in (torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"dtype: got {dtype}, expected torch.bfloat16, torch.float32 or torch.float64")
        if size < 1 or dim < 1:
            raise ValueError(f"key queue: got size {size} and dim {dim}, expected both at least 1")
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=generator), dim=1).to(dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self._size, self._rank, self._ranks = size, 0, 1
        self._gathered: tuple[Tensor, Tensor | None] | None = None

    def __len__(self) -> int:
        """K, over all ranks."""
        return self._size

    @property
    def sharded(self) -> bool:
        """Whether this rank holds a part only."""
        return self._ranks > 1

    @property
    def place(self) -> tuple[int, int]:
        """This rank, and how many ranks share the queue."""
        return self._rank, self._ranks

    def shard(self, rank: int, ranks: int, arrived: int = 0) -> None:
        """Keeps only the rows of one rank; the identity for one rank. To be called once, on the same queue everywhere.

        Args:
            rank: this one.
            ranks: how many there are.
            arrived: keys that all ranks have enqueued so far. It decides in which row the oldest one lies; a resumed
                run needs it to add up its negatives in the same order, and so to the same bits, as an undisturbed one.

        Raises:
            ValueError: the queue is shared out already, or has fewer rows than there are ranks.
        """
        if ranks == 1:
            return
        if self.sharded or not 0 <= rank < ranks <= self._size:
            raise ValueError(f"shard: got rank {rank} of {ranks}, expected 0 <= rank < ranks <= {self._size}, once")
        oldest_first = self.keys.roll(-int(self.pointer), 0)
        # The newest row belongs to the last rank, the one before to the rank before, …; missing are the very oldest.
        missing = -self._size % ranks
        padded = torch.cat([oldest_first[:missing], oldest_first]).view(-1, ranks, self.keys.shape[1])
        own = padded[1 if rank < missing else 0 :, rank]
        pointer = arrived // ranks % len(own)
        self.keys = own.roll(pointer, 0)
        self.register_buffer("_own_pointer", torch.full_like(self.pointer, pointer), persistent=False)
        self._rank, self._ranks = rank, ranks

    def begin_gather(self) -> distributed.Gathering:
        """Starts to collect the rows of all ranks in the background; see ``finish_gather``."""
        rows = -(-self._size // self._ranks)
        if self._gathered is None:
            missing = -self._size % self._ranks
            used = torch.ones(self._ranks, rows, dtype=torch.bool, device=self.keys.device)
            used[:missing, -1] = False
            self._gathered = (
                self.keys.new_empty(self._ranks * rows, self.keys.shape[1]),
                used.flatten().nonzero()[:, 0] if missing else None,
            )
        return distributed.Gathering(self._gathered[0], self._padded(self.keys, rows), "queue")

    def finish_gather(self, gathering: distributed.Gathering) -> Tensor:
        """(K, D): all rows, in an order that is the same on each rank; valid until the next ``begin_gather``."""
        rows = gathering.wait()
        assert self._gathered is not None
        used = self._gathered[1]
        return rows if used is None else rows[used]

    @staticmethod
    def _padded(keys: Tensor, rows: int) -> Tensor:
        return keys if len(keys) == rows else torch.cat([keys, keys[:1]])

    @torch.no_grad()
    def column(self) -> Tensor:
        """(⌈K/W⌉, 1, D): this rank's keys, oldest first; a rank with one key fewer gives its oldest twice."""
        rows = -(-self._size // self._ranks)
        pointer = self.pointer if self._ranks == 1 else self._own_pointer
        oldest_first = self.keys.roll(-int(pointer), 0)
        return (oldest_first if len(oldest_first) == rows else torch.cat([oldest_first[:1], oldest_first]))[:, None]

    @torch.no_grad()
    def restore(self, columns: Tensor, pointer: Tensor) -> None:
        """Takes over the whole queue that any number of ranks saved; ``shard`` may follow.

        Args:
            columns: (⌈K/W⌉, W, D): ``column`` of W ranks side by side.
            pointer: 0-dimensional, the ``pointer`` of any of them.

        Raises:
            ValueError: the shapes are those of another queue, or this one is shared out already.
        """
        rows, ranks, dim = columns.shape if columns.dim() == 3 else (0, 1, 0)
        fits = dim == self.keys.shape[1] and rows == -(-self._size // ranks) and pointer.dim() == 0
        if self.sharded or not fits:
            raise ValueError(
                f"queue: got {tuple(columns.shape)} for {self._size} keys of length {self.keys.shape[1]} on "
                f"{self._ranks} ranks, expected (⌈keys/ranks⌉, ranks, length), before shard"
            )
        # Where ranks have one key fewer, what they gave twice comes first.
        oldest_first = columns.flatten(0, 1)[-self._size :]
        self.keys.copy_(oldest_first.roll(int(pointer), 0))
        self.pointer.copy_(pointer)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, gate: Tensor | None = None) -> None:
        """Overwrites the N oldest rows with ``keys`` and moves the pointer, without synchronising with the host.

        Args:
            keys: (N, D) normalised keys of this rank, N at most K over the number of ranks; as many on every rank.
            gate: 0-dimensional bool on the same device; where it is false, rows and pointer stay as they are.

        Raises:
            ValueError: more keys than rows, or keys of another length.
        """
        count, rows = keys.shape[0], self.keys.shape[0]
        if count > rows or keys.shape[1:] != self.keys.shape[1:]:
            raise ValueError(f"keys: got shape {tuple(keys.shape)}, expected at most {tuple(self.keys.shape)}")
        pointer = self.pointer if self._ranks == 1 else self._own_pointer
        oldest = (pointer + torch.arange(count, device=self.keys.device)) % rows
        keys = keys.to(self.keys.dtype)
        if gate is not None:
            keys = torch.where(gate, keys, self.keys[oldest])
        self.keys.index_copy_(0, oldest, keys)
        moved = count if gate is None else gate * count
        pointer.add_(moved).remainder_(rows)
        if self._ranks > 1:
            self.pointer.add_(moved * self._ranks).remainder_(self._size)
