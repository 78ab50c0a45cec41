"""``cast-fast`` with a trunk of two convolutions under the name of a ResNet, and faults to order.

Run as a script, for instance by torchrun: ``tiny_pretrain.py FAULTS pretrain …``. FAULTS are ``none`` or
``KIND:RANK:STEP[:ATTEMPT]``, joined by commas: this rank, on its way into this step (counted from 1 over all starts of
the run), in this start of torchrun's (the first by default), …

- ``kill``: dies of SIGKILL.
- ``hang``: never comes back from the loader.
- ``term``, ``usr1``, ``int``: gets this signal, twice.
- ``nan``: has a batch whose attention weight is infinite, from this step on.
- ``loader``: its loader gives up when asked for this step's batch, and from then on.
- ``compile``: torch.compile does not work there, in whatever step.
- ``killsave``, ``hangsave``: dies or never comes back while it writes its file of this step's checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from tiny_encoder import CHANNELS, tiny_trunk

import cast_fast.encoder
from cast_fast import checkpoint, cli, train
from cast_fast.data.batch import Batch
from cast_fast.data.dali_loader import DaliLoader
from cast_fast.distributed import RECORD
from cast_fast.errors import UserError
from cast_fast.step import StepMetrics, TrainStep

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "int": signal.SIGINT}


def make_tiny() -> None:
    """From now on every architecture is the tiny trunk."""
    cast_fast.encoder.build_trunk = lambda *_: (tiny_trunk(), CHANNELS)


def inject(faults: str) -> None:
    """Puts the faults in the way of the training step."""
    for fault in faults.split(","):
        if fault != "none":
            _inject(fault)


def _inject(fault: str) -> None:
    kind, rank, at, *attempt = fault.split(":")
    if rank != os.environ.get("RANK", "0") or (attempt or ["0"])[0] != os.environ.get(
        "TORCHELASTIC_RESTART_COUNT", "0"
    ):
        return
    if kind == "loader":
        _break_loader(int(at))
        return
    if kind == "compile":
        train.compile_fault = lambda device: f"no compiler for {device}"
        return
    if kind in ("killsave", "hangsave"):
        _break_save(kind, int(at))
        return
    original = TrainStep.__call__

    def step(self: TrainStep, batch: Batch, lr: float, report: Any = None) -> StepMetrics:
        number = RECORD.step
        if kind == "nan" and number >= int(at):
            assert batch.weight is not None
            batch.weight = torch.full_like(batch.weight, float("inf"))
        elif number == int(at):
            if kind == "hang":
                print("hanging", flush=True)
                threading.Event().wait()
            os.kill(os.getpid(), SIGNALS[kind])
            os.kill(os.getpid(), SIGNALS[kind])
        return original(self, batch, lr, report)

    TrainStep.__call__ = step


def _break_loader(at: int) -> None:
    original = DaliLoader.__next__

    def deliver(self: DaliLoader) -> Batch:
        if RECORD.step >= at:
            raise UserError("too many broken files")
        return original(self)

    DaliLoader.__next__ = deliver


def _break_save(kind: str, at: int) -> None:
    original = checkpoint._write

    def write(path: Path, content: Any) -> Any:
        if f"step-{at}-" in path.parent.name and path.suffix == ".safetensors":
            path.write_bytes(b"half a file")
            if kind == "hangsave":
                threading.Event().wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, content)

    checkpoint._write = write


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_tiny()
    inject(sys.argv[1])
    sys.exit(cli.main(sys.argv[2:]))
