"""A progress bar for the commands that work through many files."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def show_progress(steps: Iterable[T], what: str, total: int, wanted: bool = True) -> Iterable[T]:
    """Passes ``steps`` through and shows a bar on stderr, if that is wanted and stderr is a terminal."""
    if not (wanted and total and sys.stderr.isatty()):
        return steps
    return track(steps, what, total=total, console=Console(stderr=True))
