"""Which samples share BatchNorm statistics: groups of a batch, and Shuffling BatchNorm (He et al., CVPR 2020).

A key that is normalised together with the keys of the very samples that its query is normalised with carries the trace
of that batch, which the queue's negatives do not: the encoder can tell the key by it. So the keys are dealt out anew in
every step, to ranks and, on each rank, to groups with statistics apart.

A rank's batch is G groups of every G-th sample, as rank r of W takes every W-th sample of the global batch. Group g of
rank r therefore is what rank r + W·g of W·G ranks would have: one process with G groups computes what G ranks with one
group each compute, with the same permutation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cast_fast.data.sampling import shuffle_order


class ShufflePlan(NamedTuple):
    """Where a rank's samples go in one step; tensors are on the CPU, pinned where there is CUDA."""

    order: Tensor
    """(N,) int64: this rank's samples, sorted by the rank they go to."""
    send: list[int]
    """Samples for each rank."""
    receive: list[int]
    """Samples from each rank; they too add up to N."""
    groups: Tensor | None
    """(2, N) int64, an order for ``forward.embed_keys``: what arrived, group after group; ``None`` for one group."""


def shuffle_plan(seed: int, step: int, count: int, rank: int, members: int, groups: int = 1) -> ShufflePlan:
    """The shuffle of one step: a pure function of seed and step, so ranks agree without a word and a resumed run too.

    Args:
        seed: of the run.
        step: number of the step.
        count: N, samples a rank; a multiple of ``groups``.
        rank: this rank among all; runs of ``members`` ranks shuffle among themselves.
        members: ranks that shuffle among themselves.
        groups: G, groups a rank.
    """
    size = count // groups
    target = shuffle_order(count * members, seed, step) // size
    # (g, p, i) → row p, column g + G·i: to which of all groups each sample of the p-th member goes.
    target = target.reshape(groups, members, size).transpose(1, 2, 0).reshape(members, count)
    to_rank, to_group = target % members, target // members
    place = rank % members
    send = [int((to_rank[place] == other).sum()) for other in range(members)]
    arrived = [to_group[other][to_rank[other] == place] for other in range(members)]
    return ShufflePlan(
        _pinned(to_rank[place].argsort(kind="stable")),
        send,
        [len(part) for part in arrived],
        None if groups == 1 else _there_and_back(np.concatenate(arrived).argsort(kind="stable")),
    )


def unshuffled(count: int, groups: int) -> Tensor | None:
    """As ``ShufflePlan.groups``, for keys that stay in the groups of their queries."""
    return None if groups == 1 else _there_and_back(np.arange(count).reshape(-1, groups).T.ravel())


def by_group(rows: Tensor, groups: int) -> Tensor:
    """(N, …) → (N, …), group after group: sample g + G·i goes to place g·N/G + i."""
    return rows if groups == 1 else rows.unflatten(0, (-1, groups)).transpose(0, 1).flatten(0, 1)


def _there_and_back(order: NDArray[np.int64]) -> Tensor:
    return _pinned(np.stack([order, order.argsort()]))


def _pinned(values: NDArray[np.int64]) -> Tensor:
    """In memory from which a GPU copies while the host goes on."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
