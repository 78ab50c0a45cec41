"""Signals that end a run after its step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: a run that a signal stopped and that ``--resume`` continues."""


class Stopped(BaseException):
    """A signal that came before the first step, when there is nothing to save; the message is the signal's name."""

    code = EXIT_STOPPED


class Signals:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a request; the second and later ones change nothing."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal."""
        self._deferred = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        # Python allows handlers in the main thread only; a caller in another thread keeps its own.
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on a signal waits for the end of the step, instead of ending the preparations at once."""
        self._deferred = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        first = self.received is None
        if first:
            self.received = signal.Signals(number).name
        if not self._deferred:
            if first:
                raise Stopped(self.received)
            return
        # Not through logging: the handler may interrupt code that holds a logging lock.
        text = "finishing the step, then saving" if first else "already stopping"
        os.write(2, f"{signal.Signals(number).name}: {text}\n".encode())
