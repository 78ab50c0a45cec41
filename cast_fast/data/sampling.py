"""One global order of samples and everything random about them, as pure functions of the seed and a position.

A run visits positions 0, 1, 2, …: step s of a run whose global batch (all ranks together) is B takes the positions
s·B … s·B + B − 1, of which rank r of W takes every W-th, beginning with the r-th. A position fixes which image it
shows (by the epoch's permutation) and every random number spent on it. So a checkpoint needs the step number alone, and
neither the number of ranks nor of loader threads changes a sample's crops. Taken in turns like this, the ranks' own
queues of keys interleave to the queue of a single process, whatever its size (``key_queue``).

The numbers come from Philox 4×64-10 (J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
which is counter-based: the words of position p are found without drawing those before it. Only its raw words are
used, turned into numbers here, because NumPy freezes a bit generator's raw stream but not what ``Generator`` makes
of it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cast_fast.data.saliency_crop import WINDOW_SHAPE, window_random
from cast_fast.errors import UserError

AUGMENT_DRAWS = 10
"""Uniform numbers for the appearance of one view; ``dali_loader.Augmentation`` says which is which."""

_WINDOW_DRAWS = WINDOW_SHAPE[0] * WINDOW_SHAPE[1] * WINDOW_SHAPE[2]
# One Philox block yields four 64-bit words; whole blocks for each position let the counter address a position.
_BLOCKS = -(-(_WINDOW_DRAWS + 2 * AUGMENT_DRAWS) // 4)

# The second word of the Philox key keeps the streams of different purposes apart.
_ORDER_STREAM, _SAMPLE_STREAM, _REPLACEMENT_STREAM, _SHUFFLE_STREAM = 1, 2, 3, 4


class Draws(NamedTuple):
    """The random numbers of n positions."""

    windows: NDArray[np.float64]
    """(n, 2, 11, 26) float64: ready for ``saliency_crop.crop_windows``."""
    augment: NDArray[np.float64]
    """(n, 2, AUGMENT_DRAWS) float64 uniform in [0, 1), for the query and the key view."""


def _words(seed: int, stream: int, block: int, count: int) -> NDArray[np.uint64]:
    """``count`` raw words of the stream from the given block on."""
    key = np.array([seed, stream], dtype=np.uint64)
    return np.random.Philox(key=key, counter=block).random_raw(count)


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: got {seed}, expected 0 <= seed < 2**64")


def epoch_order(length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of ``range(length)`` in which one epoch visits the dataset: (length,) int64.

    It sorts random words, one a sample (stable, so that a tie, however unlikely, keeps the result defined).

    Raises:
        ValueError: a negative length or epoch, or a seed outside 64 bits.
    """
    _check_seed(seed)
    if length < 0 or epoch < 0:
        raise ValueError(f"got length={length}, epoch={epoch}, expected neither to be negative")
    # The epoch sits in the counter's upper half, far above any block that a permutation reaches.
    return np.argsort(_words(seed, _ORDER_STREAM, epoch << 128, length), kind="stable")


def shuffle_order(length: int, seed: int, step: int) -> NDArray[np.int64]:
    """The permutation of ``range(length)`` that shuffles the key crops of one step over ranks: (length,) int64."""
    return np.argsort(_words(seed, _SHUFFLE_STREAM, step << 128, length), kind="stable")


def replacement(length: int, seed: int, position: int, attempt: int) -> int:
    """Dataset index that stands in at ``position`` for a file that cannot be decoded, for attempts 0, 1, 2, …

    It depends on nothing else, so a run that meets the same broken files shows the same samples, resumed or not.
    """
    word = int(_words(seed, _REPLACEMENT_STREAM, (position << 64) + attempt, 1)[0])
    # The product's upper half: a range reduction whose bias, length / 2**64, is out of sight.
    return word * length >> 64


def draw(seed: int, positions: NDArray[np.int64]) -> Draws:
    """All random numbers of the samples at ``positions`` (n,), a pure function of the seed and each position.

    Raises:
        ValueError: positions are not one-dimensional or negative, or the seed is outside 64 bits.
    """
    _check_seed(seed)
    positions = np.asarray(positions, dtype=np.int64)
    if positions.ndim != 1 or (len(positions) and positions.min() < 0):
        raise ValueError(f"positions: got shape {positions.shape}, expected (n,) without negative entries")
    count = len(positions)
    words = np.empty((count, _BLOCKS * 4), dtype=np.uint64)
    # Neighbouring positions are neighbouring blocks: a run of them costs one call.
    starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    for begin, end in zip(starts, [*starts[1:], count]):
        block = int(positions[begin]) * _BLOCKS
        words[begin:end] = _words(seed, _SAMPLE_STREAM, block, (end - begin) * _BLOCKS * 4).reshape(end - begin, -1)
    uniform = (words >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)
    windows = window_random(uniform[:, :_WINDOW_DRAWS].reshape(count, *WINDOW_SHAPE))
    augment = uniform[:, _WINDOW_DRAWS : _WINDOW_DRAWS + 2 * AUGMENT_DRAWS].reshape(count, 2, AUGMENT_DRAWS)
    return Draws(windows, augment)


class GlobalOrder:
    """Which samples each step of each rank takes.

    Every epoch is a fresh permutation of the dataset, cut into ``steps_per_epoch`` global batches; the remainder,
    less than one global batch, is left out, another one in each epoch.

    Args:
        length: number of samples in the dataset.
        seed: of the order, 0 <= seed < 2**64.
        batch: samples of one rank in one step.
        rank: this process, 0 <= rank < world.
        world: number of ranks; the global batch is ``batch * world``.

    Raises:
        UserError: the dataset is smaller than one global batch.
        ValueError: batch, rank, world or seed out of range.
    """

    def __init__(self, length: int, seed: int, batch: int, rank: int = 0, world: int = 1) -> None:
        if batch < 1 or not 0 <= rank < world:
            raise ValueError(f"got batch={batch}, rank={rank}, world={world}, expected batch >= 1, 0 <= rank < world")
        _check_seed(seed)
        self.length, self.seed, self.batch, self.rank, self.world = length, seed, batch, rank, world
        self.steps_per_epoch = length // (batch * world)
        if self.steps_per_epoch == 0:
            ranks = "" if world == 1 else f" on {world} processes"
            raise UserError(
                f"--batch: got {batch}{ranks}, expected at most the {length} usable images of the dataset"
                f"{'' if world == 1 else ' for all processes together'}"
            )
        # Prefetching straddles an epoch's end, so that two permutations are in use around it.
        self._order = functools.lru_cache(maxsize=2)(functools.partial(epoch_order, length, seed))

    @property
    def global_batch(self) -> int:
        """Samples of one step on all ranks together."""
        return self.batch * self.world

    def at(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Dataset indices (batch,) and global positions (batch,) of this rank at ``step``, both int64."""
        if step < 0:
            raise ValueError(f"step: got {step}, expected step >= 0")
        epoch, within = divmod(step, self.steps_per_epoch)
        mine = np.arange(self.rank, self.global_batch, self.world, dtype=np.int64)
        return self._order(epoch)[within * self.global_batch + mine], step * self.global_batch + mine
