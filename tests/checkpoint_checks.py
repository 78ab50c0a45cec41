"""What the processes of the checkpoint tests do; see ``rank_checks`` for how they are started."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from full_disk import full_disk

from cast_fast import checkpoint, checkpoint_storage, distributed
from cast_fast.checkpoint import Part
from cast_fast.distributed import World
from cast_fast.errors import UserError

SIZE = (5, 4, 3)


def whole_state(step: int) -> dict[str, Any]:
    """What a checkpoint of ``state_of`` should hold."""
    generator = torch.Generator().manual_seed(step)
    model = {f"layer{number}": torch.randn(64, 64, generator=generator) for number in range(12)}
    keys = torch.randn(SIZE, generator=generator)
    return {"model": model, "keys": keys, "random": {"state": torch.tensor(0), "rank": 0}, "plain": (step, [None])}


def state_of(step: int, world: World, ranks: int = 4) -> dict[str, Any]:
    """This rank's share: replicated tensors, its column of ``keys``, and on rank 0 the rest."""
    whole = whole_state(step)
    column = whole["keys"][:, world.rank : world.rank + 1]
    share = {"model": whole["model"], "keys": Part(column, (0, world.rank, 0), (SIZE[0], ranks, SIZE[2]))}
    if world.rank:
        return share
    return {**share, "random": {"state": torch.tensor(world.rank), "rank": world.rank}, "plain": whole["plain"]}


def outcome(work: Callable[[], Any]) -> str:
    """How it ended, in words."""
    try:
        work()
    except UserError as error:
        return f"user error: {error}"
    except SystemExit as leave:
        return f"leaves with {leave.code}"
    except (RuntimeError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def everything(world: World, folder: str) -> dict[str, Any]:
    """All that the tests look at, on four ranks."""
    run = Path(folder)
    group = distributed.checkpoint_group()
    assert dist.get_backend(group) == "gloo" and group is not dist.group.WORLD
    settings: dict[str, Any] = {"config": {"a": 1}, "fingerprint": "f", "keep": 2, "group": group}
    found: dict[str, Any] = {}

    def save(step: int, **changes: Any) -> str:
        return outcome(lambda: checkpoint.save(run, step, state_of(step, world), **{**settings, **changes}))

    def names() -> set[str]:
        distributed.barrier("before looking")
        seen = {path.name for path in (run / "checkpoints").iterdir()}
        distributed.barrier("after looking")
        return seen

    found["save"] = save(1)
    found["again"] = save(1)

    # One rank's disk is full in the middle of its file.
    with full_disk(10_000) if world.rank == 2 else contextlib.nullcontext():
        found["full"] = save(2)
    found["after full"] = names()

    # One rank sees another folder.
    elsewhere = run if world.rank != 1 else run / "elsewhere"
    found["unshared"] = outcome(lambda: checkpoint.save(elsewhere, 2, state_of(2, world), **settings))

    # One rank sees another folder that happens to have the temporary one: its file never arrives at rank 0.
    original = checkpoint._write
    if world.rank == 3:
        checkpoint._write = lambda path, content: original(Path(f"{path}.other"), content)
    found["lost file"] = save(2)
    checkpoint._write = original

    # A mistake in one rank's code.
    if world.rank == 1:
        checkpoint._write = lambda *_: {"size": 1 // 0}
    found["mistake"] = save(2)
    checkpoint._write = original

    # Rank 0 alone fails before and after the others write.
    space = checkpoint.require_space

    def full(*_: Any) -> None:
        raise UserError("no disk space")

    checkpoint.require_space = full
    found["no space"] = save(2)
    checkpoint.require_space = space
    sync = checkpoint.sync_folder

    def broken(_: Path) -> None:
        raise OSError(5, "Input/output error")

    checkpoint.sync_folder = broken
    found["broken end"] = save(2)
    checkpoint.sync_folder = sync
    found["after failures"] = names()

    found["next"] = save(2)

    # In the background, while the ranks talk about something else and the originals change.
    saver = checkpoint.BackgroundSaver()
    state = state_of(3, world)
    saver.save(run, 3, state, **settings)
    for tensor in (*state["model"].values(), state["keys"].tensor):
        tensor.zero_()
    total = torch.zeros(1000)
    for _ in range(50):
        total = distributed.all_reduce(total + 1, "traffic") / world.size
    saver.wait()
    found["traffic"] = float(total[0])
    if world.rank == 1:
        checkpoint._write = lambda *_: full()
    saver.save(run, 4, state_of(4, world), **settings)
    found["background failure"] = outcome(saver.wait)
    found["told once"] = outcome(saver.wait)
    checkpoint._write = original
    found["names"] = names()

    # Reading together.
    described = checkpoint.find_last(run)
    assert described is not None
    found["read"] = checkpoint.read(described, group).state
    opener = checkpoint_storage.safe_open
    if world.rank == 3:

        def unreadable(*_: Any, **__: Any) -> Any:
            raise OSError(5, "Input/output error")

        checkpoint_storage.safe_open = unreadable
    found["unreadable"] = outcome(lambda: checkpoint.read(described, group))
    checkpoint_storage.safe_open = opener

    def one_fails() -> int:
        if world.rank == 2:
            raise UserError("here alone")
        return world.rank

    found["together"] = distributed.together(lambda: world.rank, "work")
    found["not together"] = outcome(lambda: distributed.together(one_fails, "work"))
    return found
