"""The folder of a run: whether it may be begun or continued, with which settings, and its lock."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cast_fast import checkpoint
from cast_fast.config import PretrainConfig, differing_fields, flag
from cast_fast.data import layout
from cast_fast.errors import UserError
from cast_fast.files import exclusive, remove_parts

logger = logging.getLogger("cast_fast")

GROUP_SIZE = 32
"""Samples of a BatchNorm group where nothing else is asked for: what a GPU had in the published recipes, 8 × 32."""


def holds_run(run: Path) -> bool:
    """Whether a run took a step in this folder. One that failed before its first step may be started again."""
    if checkpoint.steps(run):
        return True
    try:
        with open(run / "metrics.csv", "rb") as handle:
            return len(handle.readlines(2**16)) > 1  # more than the header
    except OSError:
        return False


def check_run_folder(run: Path, config: PretrainConfig, processes: int) -> None:
    """Refuses a folder that is none, that holds a run which is not to be resumed, or a run of other settings.

    Raises:
        UserError: with the reason.
    """
    try:
        if run.exists() and not run.is_dir():
            raise UserError(f"--out: got the file {run}, expected a folder")
        begun_already = holds_run(run)
    except OSError as error:
        raise UserError(f"--out: cannot read {error.filename or run}: {error.strerror or error}") from error
    if not begun_already:
        if config.resume:
            logger.info("--resume: %s holds no run yet, starting a new one", run)
        return
    if not config.resume:
        newest = checkpoint.steps(run)
        at = f" (newest checkpoint: step {newest[0]})" if newest else ""
        raise UserError(f"--out: {run} holds a run already{at}; continue it with --resume or name another folder")
    path = run / "config.json"
    if path.exists():
        content = read_run_config(path)
        begun = content["starts"][0] if content["starts"] else {}
        require_same_config(content["config"], begun, config, processes, str(path))


def read_run_config(path: Path) -> dict[str, Any]:
    """The content of a run's ``config.json``: at least ``config`` and ``starts``.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content["config"], dict) and isinstance(content["starts"], list):
            counts = [start.get(name, 1) for start in content["starts"] for name in ("processes", "batch_norm_groups")]
            if all(type(count) is int and count > 0 for count in counts):
                return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error!r}; move it away to go by the checkpoints alone") from error
    raise UserError(f"cannot read {path}: not written by cast_fast; move it away to go by the checkpoints alone")


def batch_norm_groups(config: PretrainConfig, processes: int, begun: dict[str, Any] | None = None) -> int:
    """BatchNorm groups of each process's batch; what ``--batch-norm-groups 0`` comes to is logged.

    Args:
        config: its batch is that of one process.
        processes: W.
        begun: of a run that goes on: its ``processes`` and ``batch_norm_groups`` (none: an older run, without groups).

    Raises:
        UserError: a run that goes on has another number of groups in all.
    """
    if config.key_bn == config.query_bn == "sync":
        return 1
    groups = config.batch_norm_groups
    if begun is not None:
        total = begun.get("processes", 1) * begun.get("batch_norm_groups", 1)
        if groups and groups * processes != total:
            raise UserError(
                f"--resume: --batch-norm-groups: got {groups} on {processes} process{'es' if processes > 1 else ''}, "
                f"expected {total} groups in all, as the run has had, or 0"
            )
        groups, rest = divmod(total, processes)
        if rest or config.batch % groups:
            logger.warning("BatchNorm: %d groups, one a process, instead of %d so far", processes, total)
            return 1
        return groups
    if groups:
        return groups
    if processes > 1 or config.key_bn != "shuffle":
        return 1
    groups = config.batch // GROUP_SIZE
    if config.batch % GROUP_SIZE or groups == 1:
        logger.info(
            "BatchNorm: one group: query and key share batch statistics that the queue's negatives lack, by which the "
            "encoder can tell the key; --batch-norm-groups G, a divisor of --batch, prevents it"
        )
        return 1
    logger.info("BatchNorm: %d groups of %d samples, keys shuffled over them", groups, GROUP_SIZE)
    return groups


def require_same_config(
    settings: dict[str, Any], processes: dict[str, Any], now: PretrainConfig, now_processes: int, where: str
) -> None:
    """Refuses changed settings. ``--batch`` may change with the number of processes: their product may not.

    Args:
        settings: as the run was begun; ``--batch-norm-groups`` among them is for ``batch_norm_groups`` to compare.
        processes: a record of how many there were.
        now: as it is to go on.
        now_processes: how many there are.
        where: where ``settings`` are from, for the message.

    Raises:
        UserError: with the changes.
    """
    try:
        begun = PretrainConfig.from_json(settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"--resume: {where} holds no settings of cast_fast: {error}") from error
    saved = dataclasses.replace(begun, batch_norm_groups=now.batch_norm_groups)
    before, after = saved.batch * processes.get("processes", 1), now.batch * now_processes
    if before != after and (now_processes > 1 or processes.get("processes", 1) > 1):
        raise UserError(
            f"--resume: the global batch differs from {where}: {before} -> {after} "
            f"(--batch {now.batch} on {now_processes} processes); expected --batch times processes to be {before}"
        )
    if before == after:
        saved = dataclasses.replace(saved, batch=now.batch)
    if differing := differing_fields(saved, now):
        changes = ", ".join(f"{flag(name)} {before} -> {after}" for name, (before, after) in differing.items())
        raise UserError(f"--resume: the configuration differs from {where}: {changes}")


def require_same_dataset(saved: dict[str, Any], dataset: layout.Dataset) -> None:
    """Refuses another dataset than the checkpoint's record of its loader names.

    Raises:
        UserError: the files differ.
    """
    if saved["dataset"] != dataset.fingerprint():
        raise UserError(
            f"--resume: the dataset changed: {saved['length']} usable samples when the checkpoint was written, "
            f"{len(dataset.samples)} now, with other names or sizes; expected the same files"
        )


@contextlib.contextmanager
def locked_run(run: Path) -> Iterator[None]:
    """Creates the run folder if need be, holds its lock, and removes what a killed run left half-written.

    Raises:
        UserError: it cannot be written to, or another process holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(run / ".lock", f"--out {run}: another process is training in this folder"))
            remove_parts(run)
        except OSError as error:
            raise UserError(f"--out: cannot write into {run}: {error.strerror or error}") from error
        yield
