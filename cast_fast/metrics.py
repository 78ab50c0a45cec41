"""What a run leaves to read: a row a step in ``metrics.csv``, TensorBoard events, and no waiting for the device.

``metrics.csv`` holds only what the configuration determines, so that an interrupted and resumed run leaves the same
bytes as an undisturbed one; everything that depends on the clock goes to ``timing.csv``. A step's scalars stay on the
device: they are copied behind the step and read a step or two later, when they have long arrived.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cast_fast.errors import UserError

logger = logging.getLogger("cast_fast")

STEP_SCALARS = (
    "loss",
    "loss_moco",
    "loss_cast",
    "accuracy",
    "grad_norm",
    "finite",
    "cast_samples",
    "zero_cam",
    "empty_key_mask",
)
"""Columns that come from the step, in its order: see ``cast_fast.step.StepMetrics``."""
HOST_SCALARS = ("lr", "fallback_query", "fallback_key")
"""Columns known on the host: learning rate; windows that are the crop rule's fallback (empty for free crops)."""
COLUMNS = ("step", *STEP_SCALARS, *HOST_SCALARS)
TIMING_COLUMNS = ("step", "seconds", "images_per_second", "loader_share", "memory_bytes")
"""A row covers the steps since the row before: wall time, rate, share spent waiting for the loader, peak memory."""
DELAY = 2
"""Steps between a step's launch and the reading of its scalars."""


class CsvLog:
    """A CSV file whose first column is the step; it grows by whole rows and can be cut back to a step.

    Args:
        path: the file; created with a header where it is not there.
        columns: names, the first one the step.
        step: rows of later steps are removed, as are half-written ones (the file is replaced atomically).

    Raises:
        UserError: the file has other columns, or cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str], *, step: int) -> None:
        self.path = Path(path)
        self.columns = tuple(columns)
        header = ",".join(self.columns) + "\n"
        kept = [header]
        try:
            if self.path.exists():
                lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                if lines and lines[0].endswith("\n") and lines[0] != header:
                    raise UserError(f"{self.path}: got the columns {lines[0].strip()!r}, expected {header.strip()!r}")
                kept += [line for line in lines[1:] if line.endswith("\n") and _step_of(line) <= step]
            temporary = self.path.with_name(f".tmp-{self.path.name}")
            with open(temporary, "w", encoding="utf-8", newline="") as handle:
                handle.writelines(kept)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, self.path)
            self._handle = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115 (closed by close())
        except OSError as error:
            raise self._failure(error) from error
        self.last_step = _step_of(kept[-1]) if len(kept) > 1 else 0

    def write(self, row: Sequence[object]) -> None:
        """Appends one row and hands it to the operating system, so that it outlives this process.

        Raises:
            UserError: the disk is full or the file is not writable.
        """
        assert len(row) == len(self.columns)
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([_format(value) for value in row])
        try:
            self._handle.write(line.getvalue())
            self._handle.flush()
        except OSError as error:
            raise self._failure(error) from error

    def sync(self) -> None:
        """Flushes to the disk: before a checkpoint, so that it never knows of steps that the file does not.

        Raises:
            UserError: as for ``write``.
        """
        try:
            self._handle.flush()
            os.fsync(self._handle.fileno())
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Closes the file; further calls do nothing."""
        try:
            self._handle.close()
        except OSError as error:
            logger.warning("%s: %s", self.path, error.strerror)

    def _failure(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.path}: {error.strerror or error}; saved checkpoints are untouched")


class _NoLog:
    """Stands for a ``CsvLog`` on the ranks that write nothing."""

    last_step = math.inf

    def write(self, row: Sequence[object]) -> None:
        """Drops the row."""

    def sync(self) -> None:
        """Nothing to flush."""

    def close(self) -> None:
        """Nothing to close."""


def _step_of(line: str) -> float:
    """The step of a row; infinite for a line that is no row, so that it is cut off."""
    text = line.split(",", 1)[0]
    return int(text) if text.isdecimal() else math.inf


def _format(value: object) -> str:
    """Floats so that float32 survives the round trip, whole numbers without a point, ``None`` as nothing."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.9g}"
    return str(value)


@dataclasses.dataclass(frozen=True)
class Reading:
    """The scalars of one step, on the host."""

    step: int
    values: dict[str, float]
    """Name → value, for ``STEP_SCALARS``."""
    index: Tensor
    """(N,) int64: the batch's positions in the dataset."""
    extra: list[float] = dataclasses.field(default_factory=list)
    """What else ``Metrics.record`` was given."""

    @property
    def finite(self) -> bool:
        """Whether the step changed the model; a non-finite loss or gradient leaves it as it was."""
        return bool(self.values["finite"])


class Metrics:
    """Writes ``metrics.csv`` and TensorBoard events (folder ``tensorboard``) of a run.

    Args:
        run: the run folder; ``None`` for a rank that only reads and writes nothing.
        step: steps done: 0 for a new run, the checkpoint's for a resumed one; later rows are removed.
        delay: how many steps a step's scalars may stay on the device before they are read.
        tensorboard_every: steps between TensorBoard events; 0 for none.

    Raises:
        UserError: a file cannot be written, or has other columns.
    """

    def __init__(self, run: Path | None, *, step: int, delay: int = DELAY, tensorboard_every: int = 10) -> None:
        self._delay = delay
        self._waiting: collections.deque[_Pending] = collections.deque()
        self._every = tensorboard_every
        self._writer = None
        if run is None:
            self._csv, self._timing, self._every = _NoLog(), _NoLog(), 0
            return
        self._csv = CsvLog(Path(run) / "metrics.csv", COLUMNS, step=step)
        if self._csv.last_step < step:
            logger.warning("%s ends at step %d, the checkpoint at %d", self._csv.path, self._csv.last_step, step)
        self._timing = CsvLog(Path(run) / "timing.csv", TIMING_COLUMNS, step=step)
        if tensorboard_every:
            from torch.utils.tensorboard.writer import SummaryWriter

            try:
                self._writer = SummaryWriter(str(Path(run) / "tensorboard"), purge_step=step + 1 if step else None)
            except OSError as error:
                raise UserError(f"cannot write {Path(run) / 'tensorboard'}: {error.strerror or error}") from error

    def record(
        self,
        step: int,
        scalars: Sequence[Tensor],
        host: Sequence[float | Tensor | None],
        index: Tensor,
        extra: Tensor | None = None,
    ) -> None:
        """Notes a step without waiting for it.

        Args:
            step: steps done, this one included.
            scalars: 0-dim tensors in the order of ``STEP_SCALARS``, on the step's device.
            host: values in the order of ``HOST_SCALARS``; those that come from all ranks are 0-dim tensors like
                ``scalars``.
            index: (N,) int64 on the CPU, the batch's positions in the dataset.
            extra: (E,) further numbers to be read along, on the step's device.
        """
        assert len(scalars) == len(STEP_SCALARS) and len(host) == len(HOST_SCALARS)
        late = [value for value in host if isinstance(value, Tensor)]
        values = torch.stack([scalar.detach().to(torch.float32) for scalar in (*scalars, *late)])
        if extra is not None:
            values = torch.cat([values, extra.detach().to(torch.float32)])
        event = None
        if values.device.type == "cuda":
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = pinned.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append(_Pending(step, values, event, tuple(host), index))

    def read(self, *, everything: bool = False) -> list[Reading]:
        """Writes the rows that have waited long enough, or all of them, and returns them in order.

        Raises:
            UserError: the disk is full or a file is not writable.
        """
        readings = []
        while len(self._waiting) > (0 if everything else self._delay):
            pending = self._waiting.popleft()
            if pending.event is not None:
                pending.event.synchronize()
            read = iter(pending.values.tolist())
            values: dict[str, float] = {name: next(read) for name in STEP_SCALARS}
            host = [next(read) if isinstance(value, Tensor) else value for value in pending.host]
            self._csv.write([pending.step, *values.values(), *host])
            if self._every and pending.step % self._every == 0:
                known = {name: value for name, value in zip(HOST_SCALARS, host) if value is not None}
                self._event({**values, **known}, pending.step)
            readings.append(Reading(pending.step, values, pending.index, list(read)))
        return readings

    def record_timing(
        self, step: int, seconds: float, images_per_second: float, loader_share: float, memory_bytes: int
    ) -> None:
        """Notes what depends on the clock: see ``TIMING_COLUMNS``.

        Raises:
            UserError: as for ``read``.
        """
        row = (seconds, images_per_second, loader_share, memory_bytes)
        self._timing.write([step, *row])
        self._event(dict(zip(TIMING_COLUMNS[1:], row)), step)

    def _event(self, values: dict[str, float], step: int) -> None:
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        except OSError as error:
            logger.warning("no more TensorBoard events: %s", error)
            self._writer = None

    def sync(self) -> None:
        """Flushes everything read so far to the disk; called before a checkpoint.

        Raises:
            UserError: as for ``read``.
        """
        self._csv.sync()
        self._timing.sync()
        if self._writer is not None:
            try:
                self._writer.flush()
            except OSError as error:
                logger.warning("no more TensorBoard events: %s", error)
                self._writer = None

    def close(self) -> None:
        """Closes the files; rows that were not read are dropped, as the next run computes them again."""
        self._csv.close()
        self._timing.close()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                logger.warning("TensorBoard events: %s", error)
            self._writer = None


@dataclasses.dataclass(frozen=True)
class _Pending:
    step: int
    values: Tensor
    event: torch.cuda.Event | None
    host: tuple[float | Tensor | None, ...]
    index: Tensor
