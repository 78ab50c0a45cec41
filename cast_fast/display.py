"""How fast a run goes: measured over stretches of steps, and shown on stderr."""

from __future__ import annotations

import logging
import resource
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cast_fast.metrics import Reading

logger = logging.getLogger("cast_fast")

TIMING_EVERY = 10
"""Steps that a row of timing.csv covers; the only row of a shorter run covers them all."""
LOG_SECONDS = 30.0
"""Time between lines of progress where the output is no terminal."""


class Clock:
    """Times stretches of steps on the host's clock."""

    def __init__(self, images_per_step: int, device: torch.device) -> None:
        self._images, self._device = images_per_step, device
        self._measured = False
        self._reset()

    def _reset(self) -> None:
        self._begin = time.perf_counter()
        self._steps, self._waited = 0, 0.0

    def start_waiting(self) -> None:
        """The loader is asked for a batch."""
        self._asked = time.perf_counter()

    def stop_waiting(self) -> None:
        """The loader delivered."""
        self._waited += time.perf_counter() - self._asked

    def tick(self, last: bool) -> bool:
        """Counts a step, perhaps the last; whether there is a stretch to measure."""
        self._steps += 1
        return self._steps == TIMING_EVERY or (last and not self._measured)

    def measure(self) -> tuple[float, float, float, int]:
        """Seconds, images per second, share of the time waiting for the loader, peak memory; begins a new stretch."""
        seconds = time.perf_counter() - self._begin
        result = (seconds, self._images * self._steps / seconds, self._waited / seconds, _peak_memory(self._device))
        self._measured = True
        self._reset()
        return result


def _peak_memory(device: torch.device) -> int:
    """Bytes: most that torch reserved on the GPU, or the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Display:
    """A progress bar on a terminal, a log line now and then elsewhere; both on stderr."""

    FIELDS = "loss {loss}  CAST {cast}  accuracy {accuracy}  {rate} images/s  loader {share}  {memory}"

    def __init__(self, step: int, total_steps: int, shown: bool = True) -> None:
        self._shown = shown
        self._step, self._total = step, total_steps
        self._fields: dict[str, str] = dict.fromkeys(("loss", "cast", "accuracy", "rate", "share", "memory"), "–")
        self._progress: Progress | None = None
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._logged = time.monotonic()

    def __enter__(self) -> Display:
        console = Console(stderr=True)
        if self._shown and console.is_terminal:
            self._progress = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20), TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"), console=console, refresh_per_second=2,
            )  # fmt: skip
            self._task = self._progress.add_task("", completed=self._step, total=self._total, text=self._text())
            self._progress.start()
            # The bar captures sys.stderr; log handlers opened the real one before and would tear the bar.
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler):
                    self._streams.append((handler, handler.setStream(sys.stderr)))
        return self

    def __exit__(self, *_: object) -> None:
        for handler, stream in self._streams:
            handler.setStream(stream)
        if self._progress is not None:
            self._progress.stop()

    def _text(self) -> str:
        return self.FIELDS.format(**self._fields)

    def reading(self, reading: Reading) -> None:
        """Takes over a step's losses."""
        values = reading.values
        self._fields.update(
            loss=f"{values['loss']:.3f}", cast=f"{values['loss_cast']:.3f}", accuracy=f"{values['accuracy']:.0%}"
        )

    def timing(self, timing: tuple[float, float, float, int]) -> None:
        """Takes over a stretch's rates."""
        _, rate, share, memory = timing
        self._fields.update(rate=f"{rate:,.1f}", share=f"{share:.0%}", memory=f"{memory / 2**30:.1f} GiB")

    def step(self, step: int) -> None:
        """Shows that a step was launched."""
        self._step = step
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=self._text())
        elif time.monotonic() - self._logged >= LOG_SECONDS or step == self._total:
            self._logged = time.monotonic()
            logger.info("step %d/%d  %s", step, self._total, self._text())
