"""A folder of shards, or of an index of shards, while it is written: for ``prepare`` and ``index_shards``.

Its manifest is written first, as unfinished, and last, as complete. What belongs to a shard is written in between, its
index last. So a stopped run leaves complete shards, which the next one keeps, and a manifest that says that it is to
be run again.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cast_fast.data import shards
from cast_fast.data.layout import Fault
from cast_fast.errors import UserError
from cast_fast.files import claimed, shown, write_whole


@dataclass(frozen=True)
class Summary:
    """What a run left in the folder."""

    out: Path
    samples: int
    shards: int
    bytes: int
    kept: int
    """Shards that an earlier run had completed."""
    empty: int
    """Samples whose map holds no salient pixel."""
    changes: dict[str, int]
    """Samples by what was converted, see ``pack_sample.Packed``."""
    rejects: tuple[Fault, ...]


@contextlib.contextmanager
def writing(out: Path, manifest: dict[str, Any]) -> Iterator[None]:
    """Holds the folder for this process and writes its manifest, unfinished; removes what a killed run left.

    Args:
        out: absent, empty, or begun with the same ``settings``.
        manifest: JSON-able, with ``settings``, and ``complete`` false.

    Raises:
        UserError: it is none of these or in use; from the block too: it cannot be written to, as on a full disk.
    """
    try:
        with claimed(out, shards.MANIFEST, "prepare"):
            _require_same_settings(out / shards.MANIFEST, manifest["settings"])
            write_json(out / shards.MANIFEST, manifest)
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "no space left; the shards that are complete stay, run the same command again to go on"
            raise UserError(f"cannot write to {shown(out)}: {reason}") from error
        raise UserError(f"cannot write {shown(error.filename or out)}: {error.strerror or error}") from error


def _require_same_settings(path: Path, settings: dict[str, Any]) -> None:
    try:
        earlier = json.loads(path.read_bytes())["settings"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{shown(path)} is damaged: delete the folder, or choose another one") from None
    if earlier != settings:
        raise UserError(
            f"{shown(path.parent)} holds shards with other settings: {json.dumps(earlier)} then, "
            f"{json.dumps(settings)} now; choose another folder, or delete it"
        )


def shard_names(count: int) -> list[str]:
    """Names of so many shards.

    Raises:
        UserError: there are more than names.
    """
    if count > shards.MOST:
        raise UserError(f"got {count} shards, expected at most {shards.MOST}: put more samples into each")
    return [f"shard-{number:06d}" for number in range(count)]


def read_index(out: Path, name: str, plan: str) -> dict[str, Any] | None:
    """The index of a shard that an earlier run has completed by the same plan; None where it has to be written again.

    The files that it speaks of are not looked at.
    """
    try:
        index = json.loads((out / f"{name}.json").read_bytes())
        if index["version"] != shards.VERSION or index["plan"] != plan:
            return None
        shards.samples_of(index, out / f"{name}.tar")
        rejects = [(reject["path"], reject["kind"], reject["message"]) for reject in index["rejects"]]
        return index if all(isinstance(text, str) for reject in rejects for text in reject) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def remove_surplus(out: Path, names: list[str]) -> None:
    """Removes shards beyond the last one, left from a time when there were more."""
    kept = set(names)
    for path in out.iterdir():
        ours = shards.SHARD_NAME.fullmatch(path.stem) and path.suffix in (".tar", ".idx", ".json")
        if ours and path.stem not in kept:
            path.unlink()


def record_of(name: str, content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """An index from its bytes, and what the manifest says of its shard."""
    index = json.loads(content)
    record = {
        "name": name,
        "samples": len(index["samples"]),
        "bytes": index["bytes"],
        "sha256": index["sha256"],
        "index_sha256": hashlib.sha256(content).hexdigest(),
    }
    return index, record


def complete(out: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest as that of a finished folder."""
    manifest["complete"] = True
    manifest["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write_json(out / shards.MANIFEST, manifest)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a manifest, for people to read, or an index, to the disk."""
    text = json.dumps(content, indent=1) if "settings" in content else json.dumps(content)
    write_whole(path, text, durable=True)
