"""For commands that work through many files: a progress bar, and work in threads whose results come in order."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import track

S = TypeVar("S")
T = TypeVar("T")

_AHEAD = 4
"""Items begun for each thread before the first result is taken, so that a slow one does not stop the others."""


def show_progress(steps: Iterable[T], what: str, total: int, wanted: bool = True) -> Iterable[T]:
    """Passes ``steps`` through and shows a bar on stderr, if that is wanted and stderr is a terminal."""
    if not (wanted and total and sys.stderr.isatty()):
        return steps
    return track(steps, what, total=total, console=Console(stderr=True))


def ordered_map(work: Callable[[S], T], items: Iterable[S], workers: int) -> Generator[T, None, None]:
    """``work(item)`` for each item, in their order, by ``workers`` threads that run a bounded stretch ahead.

    What ``work`` raises is raised where its result would be. Closing the generator waits for the work under way and
    begins no more.
    """
    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[T]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
