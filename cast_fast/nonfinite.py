"""Steps that changed nothing because their loss or gradient was not finite: counted, and their samples written down."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cast_fast.data import layout
from cast_fast.data.sampling import GlobalOrder
from cast_fast.metrics import CsvLog, Reading

logger = logging.getLogger("cast_fast")

_NAMED_SAMPLES = 8


def samples_of(order: GlobalOrder, step: int, bad: Sequence[float]) -> Tensor:
    """Positions in the dataset of a step's suspects, (n,) int64, one rank after the other.

    Args:
        order: of all ranks together, as one process with their global batch would take them. An order a rank would be
            as many permutations of the dataset: half a minute for 64 ranks and ImageNet.
        step: steps done, the suspicious one included.
        bad: (W,) for each rank, whether its own loss was not finite; if none was, the gradient was it, and the samples
            of all ranks are meant.
    """
    index = order.at(step - 1)[0]
    suspects = [rank for rank, flag in enumerate(bad) if flag] or range(len(bad))
    return torch.from_numpy(np.concatenate([index[rank :: len(bad)] for rank in suspects]))


class NonFinite:
    """Counts steps whose loss or gradient was not finite, and writes down their samples."""

    COLUMNS = ("step", "loss", "grad_norm", "samples")

    def __init__(self, limit: int, *, in_a_row: int, total: int) -> None:
        self.limit, self.in_a_row, self.total = limit, in_a_row, total
        self._log: CsvLog | None = None
        self.too_many = False
        self._run: Path | None = None
        self._step = 0
        self._dataset: layout.Dataset | None = None
        self._last: tuple[int, list[str]] = (0, [])

    def open(self, run: Path | None, step: int, dataset: layout.Dataset) -> None:
        """Cuts an existing list back to ``step``; a new one is begun only when there is something to write.

        Without a run folder steps are counted and nothing is written or said: that is rank 0's part.
        """
        self._run, self._step, self._dataset = run, step, dataset
        if run is not None and (run / "nonfinite.csv").exists():
            self._log = CsvLog(run / "nonfinite.csv", self.COLUMNS, step=step)

    def close(self) -> None:
        """Closes the list."""
        if self._log is not None:
            self._log.close()

    def note(self, reading: Reading) -> None:
        """Takes one step into account."""
        if reading.finite:
            self.in_a_row = 0
            return
        assert self._dataset is not None
        self.in_a_row += 1
        self.total += 1
        samples = [self._dataset.samples[index].stem for index in reading.index.tolist()]
        self._last = (reading.step, samples)
        self.too_many = self.too_many or self.in_a_row >= self.limit
        if self._run is None:
            return
        values = reading.values
        logger.warning(
            "step %d: loss %g, gradient norm %g: nothing was changed (%d such steps in a row, %d in all); samples %s",
            reading.step, values["loss"], values["grad_norm"], self.in_a_row, self.total, _some(samples),
        )  # fmt: skip
        if self._log is None:
            self._log = CsvLog(self._run / "nonfinite.csv", self.COLUMNS, step=self._step)
        self._log.write([reading.step, values["loss"], values["grad_norm"], json.dumps(samples)])

    def message(self, run: Path) -> str:
        """Why the run stopped."""
        step, samples = self._last
        return (
            f"{self.in_a_row} steps in a row had a non-finite loss or gradient (--max-nonfinite {self.limit}), the "
            f"last one step {step} with the samples {_some(samples)}; they changed nothing, and the last good state is "
            f"saved in {run}; nonfinite.csv lists all samples; a lower --lr or --clip-grad may help"
        )


def _some(samples: list[str]) -> str:
    shown = ", ".join(samples[:_NAMED_SAMPLES])
    return shown if len(samples) <= _NAMED_SAMPLES else f"{shown} and {len(samples) - _NAMED_SAMPLES} more"
