"""Work on files in child processes: ``python -m MODULE`` answers one request after another through pipes.

Processes of their own for two reasons: libjpeg reports damaged data only as a line on stderr, which nobody else may
share; and a decoder that crashes on a malicious file then takes no training job with it. A child ends when its pipe
does, so that none outlives its parent, however that one ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import cv2
from PIL import Image

from cast_fast.data.progress import ordered_map
from cast_fast.errors import UserError

S = TypeVar("S")
T = TypeVar("T")

_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that no work of a process's own ends it with."""


def start_child(module: str) -> subprocess.Popen[bytes]:
    """Starts ``python -m MODULE``, which is to call `serve`, with pipes for its requests and answers."""
    # It must find this package where the parent found it, installed or not, and nothing in the current folder, which
    # -m would search first: a dataset may hold a cv2.py.
    root = str(Path(__file__).resolve().parents[2])
    program = (
        f"import sys; sys.path[0] = {root!r}; import runpy; "
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is for the parent alone, also before `serve` ignores it
    )


class ChildCrash(Exception):
    """A child process ended while it worked on a request, with this exit code; minus a signal's number."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class Child:
    """``python -m MODULE`` as a helper for one request at a time; started when first used, and again after a crash."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._answered = False

    def ask(self, request: Any, read: Callable[[bytes, Callable[[int], bytes]], T]) -> T:
        """Sends a JSON value and returns what ``read`` makes of the answer's first line and, by its length, the rest.

        Raises:
            ChildCrash: the process ended over this request; the next one gets a new process.
            UserError: it was ended from outside, as by a system that has run out of memory.
            RuntimeError: it ended before it answered at all, which no file explains.
        """
        if self._process is None:
            self._process = start_child(self._module)
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if line.endswith(b"\n"):
                self._answered = True
                return read(line, process.stdout.read)
        except (BrokenPipeError, EOFError):
            pass
        code = process.wait()
        self.close()
        if -code in _FROM_OUTSIDE:
            raise UserError(
                f"a worker process was ended by {signal.Signals(-code).name}, as happens when memory runs out: free "
                "some, or take fewer --workers, and run the same command again; what it has done so far is kept"
            )
        if not self._answered:
            raise RuntimeError(f"the process of {self._module} ended with code {code} before its first answer")
        raise ChildCrash(code)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # closing writes what a dead reader left over
                        pipe.close()
            self._process = None


def in_children(
    module: str, work: Callable[[Child, S], T], items: Sequence[S], workers: int | None
) -> Generator[T, None, None]:
    """``work(child, item)`` for each item, in their order, by child processes that each do one at a time.

    What ``work`` raises is raised where its result would be. Closing the generator ends the children, after what they
    are at.

    Args:
        module: what the children run, see `start_child`.
        work: asks a child; called in a thread.
        items: what is to be done.
        workers: children; None takes one for each CPU that this process may use.
    """
    count = max(1, min(workers or len(os.sched_getaffinity(0)), len(items)))
    children = [Child(module) for _ in range(count)]
    free: queue.SimpleQueue[Child] = queue.SimpleQueue()
    for child in children:
        free.put(child)

    def by_a_free_one(item: S) -> T:
        child = free.get()
        try:
            return work(child, item)
        finally:
            free.put(child)

    try:
        yield from ordered_map(by_a_free_one, items, count)
    finally:
        for child in children:
            child.close()


def serve(answer: Callable[[Any, int], bytes]) -> None:
    """Answers requests, one JSON value a line, until stdin ends.

    Args:
        answer: from a request and the descriptor of the file that receives the process's stderr to the bytes of the
            answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, by closing stdin
    cv2.setNumThreads(1)
    Image.MAX_IMAGE_PIXELS = None  # decode_check.MAX_PIXELS is checked instead, without a warning in between
    notes = os.memfd_create("decoder-notes")
    with os.fdopen(os.dup(1), "wb", buffering=0) as replies:
        os.dup2(notes, 2)
        os.dup2(notes, 1)
        for line in sys.stdin.buffer:
            unsent = memoryview(answer(json.loads(line), notes))
            while unsent:  # an unbuffered write may be partial
                unsent = unsent[replies.write(unsent) :]
