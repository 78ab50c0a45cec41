"""BatchNorm's counters of batches (``num_batches_tracked``), counted outside of the compiled step.

With a momentum the counter has no part in the arithmetic, but it is state that a checkpoint keeps. Counted inside of a
compiled graph each is a kernel of its own that adds one to eight bytes: 53 launches for a ResNet-50, where all of them
together are one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class BatchCounters:
    """The counters of all BatchNorms below a module.

    Args:
        module: its BatchNorms are looked up now, so after ``synchronise_batch_norm`` or ``split_batch_norm``. Those
            without momentum, whose average needs the counter, go on counting by themselves.
        passes: how often the module runs inside of ``apart``, or passes that share one run (``SplitBatchNorm2d``).
    """

    def __init__(self, module: nn.Module, passes: int = 1) -> None:
        norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
        self._norms = [norm for norm in norms if norm.momentum is not None and norm.track_running_stats]
        self._passes = passes

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, BatchNorms have no counter, so that nothing counts; at the end all in training mode count at once.

        After an exception nothing has been counted.
        """
        norms = [norm for norm in self._norms if norm.training]
        counters: list[Any] = [norm.num_batches_tracked for norm in norms]
        for norm in norms:
            norm._buffers["num_batches_tracked"] = None
        try:
            yield
        finally:
            for norm, counter in zip(norms, counters):
                norm._buffers["num_batches_tracked"] = counter
        if counters:
            with torch.no_grad():
                torch._foreach_add_(counters, self._passes)
