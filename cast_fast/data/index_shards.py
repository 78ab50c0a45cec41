"""An index of WebDataset shards that somebody else has made: ``cast-fast prepare SHARDS INDEX --index-only``.

Training reads single members in one global order (``shards``), which needs their places, sizes and emptiness ahead of
time. Every image and map is decoded completely to find these out, in processes of their own; what is faulty stays out
and is named in ``INDEX/manifest.json``. Nothing is copied, and nothing is written beside the shards, which may be
read-only: ``--data INDEX`` reads them where they lie. A stopped run goes on with the shards that are missing, and one
whose size or time of change differs is indexed again.

A sample is ``KEY.jpg`` (or ``.jpeg``, ``.png``) with ``KEY.saliency.png`` (8-bit grey), ``.jpg`` (grey) or ``.npy``
(uint8, H x W), of any size and the image's aspect, and perhaps ``KEY.cls``, whose text is the class. A key ends at the
first dot of a member's last part, as WebDataset has it, and is unique over all shards. Where no member of any shard is
a map, the dataset is one of images alone. Other members are passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cast_fast import __version__
from cast_fast.data import decode_check, shards
from cast_fast.data.children import Child, in_children
from cast_fast.data.decode_check import check, map_fits
from cast_fast.data.layout import SALIENT_ABOVE, Fault, Member
from cast_fast.data.progress import show_progress
from cast_fast.data.shard_folder import (
    Summary,
    complete,
    read_index,
    record_of,
    remove_surplus,
    shard_names,
    write_json,
    writing,
)
from cast_fast.errors import UserError
from cast_fast.files import folder_fault, shown

_IMAGES = {"jpg": "jpg", "jpeg": "jpg", "png": "png"}
_MAPS = {"saliency.png": "png", "saliency.jpg": "jpg", "saliency.jpeg": "jpg", "saliency.npy": "npy"}
_LONGEST_CLASS = 1000
_log = logging.getLogger("cast_fast")


@dataclass
class _Found:
    """The members of one key."""

    key: str
    images: list[tuple[str, Member]] = field(default_factory=list)
    """Suffix in an index, and the member."""
    maps: list[tuple[str, Member]] = field(default_factory=list)
    label: Member | None = None


def index_shards(source: Path, out: Path, *, workers: int | None = None, progress: bool = False) -> Summary:
    """Writes an index of the shards in a folder; goes on where an earlier run stopped.

    Args:
        source: folder of ``*.tar`` files, not compressed; hidden ones are ignored.
        out: folder for the index, made if absent; not the shards' own.
        workers: decoding processes; None takes one for each CPU that this process may use.
        progress: show a progress bar.

    Raises:
        UserError: a folder is faulty, a shard is no tar file, ``out`` is in use or holds something else, the disk is
            full, or no sample is usable.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers: got {workers}, expected at least 1")
    if (fault := folder_fault(source)) is not None:
        raise UserError(f"SHARDS: {shown(source)} {fault}")
    if out.exists() and out.resolve() == source.resolve():
        raise UserError(f"SHARDS and INDEX are the same folder, {shown(source)}")
    source = source.resolve()
    tars = sorted(path for path in source.glob("*.tar") if path.is_file() and not path.name.startswith("."))
    if not tars:
        raise UserError(f"SHARDS: {shown(source)} holds no .tar file")
    states = {tar: _state(tar) for tar in tars}  # before their content is read, so that a later change shows
    listed = {tar: list_samples(tar) for tar in tars}
    with_maps = any(found.maps for group in listed.values() for found in group)
    manifest: dict[str, Any] = {
        "version": shards.VERSION,
        "complete": False,
        "settings": {"index_of": str(source), "maps": {"as_found": True} if with_maps else None},
        "classes": None,
        "source": {"shards": str(source)},
        "tools": {"cast_fast": __version__},
    }
    with writing(out, manifest):
        return _fill(out, manifest, listed, states, workers, progress)


def _fill(
    out: Path,
    manifest: dict[str, Any],
    listed: dict[Path, list[_Found]],
    states: dict[Path, tuple[int, int]],
    workers: int | None,
    progress: bool,
) -> Summary:
    with_maps = manifest["settings"]["maps"] is not None
    tars = list(listed)
    places: dict[str, Path] = {}
    duplicates: dict[Path, list[_Found]] = {}
    for tar, group in list(listed.items()):
        duplicates[tar] = [found for found in group if places.setdefault(found.key, tar) != tar]
        listed[tar] = [found for found in group if places[found.key] == tar]
    names = dict(zip(tars, shard_names(len(tars))))
    plans = {tar: _plan(tar, states[tar], with_maps, duplicates[tar]) for tar in tars}
    todo = [tar for tar in tars if read_index(out, names[tar], plans[tar]) is None]
    remove_surplus(out, list(names.values()))
    kept = len(tars) - len(todo)
    if kept:
        _log.info("%d of %d shards are indexed already", kept, len(tars))
    jobs = [found for tar in todo for found in listed[tar]]
    rows_or_faults = in_children(decode_check.MODULE, lambda child, found: _row(child, found, with_maps), jobs, workers)
    with contextlib.closing(rows_or_faults) as results:
        stream = iter(show_progress(results, "Indexing", len(jobs), progress))
        for tar in todo:
            rows: list[Any] = []
            faults = [
                Fault(found.images[0][1], "duplicate-stem", f"shares its key with one in {shown(places[found.key])}")
                for found in duplicates[tar]
                if found.images
            ]
            for result in itertools.islice(stream, len(listed[tar])):
                if isinstance(result, Fault):
                    faults.append(result)
                else:
                    rows.append(result)
            _write_index(out / f"{names[tar]}.json", tar, states[tar], plans[tar], rows, faults)
        for _ in stream:  # lets the bar reach its end
            raise AssertionError("more results than samples")
    return _finish(out, manifest, list(names.values()), kept)


def _state(tar: Path) -> tuple[int, int]:
    """Size and time of change."""
    status = tar.stat()
    return status.st_size, status.st_mtime_ns


def list_samples(tar: Path) -> list[_Found]:
    """The keys of a shard that have an image or a map, in the order of their first members, from the headers alone.

    Raises:
        UserError: it cannot be read as a tar file.
    """
    found: dict[str, _Found] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if not member.isreg() or member.issparse():
                    continue
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                place = Member(tar, member.name, member.offset_data, member.size)
                entry = found.setdefault(key, _Found(key))
                if (kind := _IMAGES.get(suffix.lower())) is not None:
                    entry.images.append((kind, place))
                elif (kind := _MAPS.get(suffix.lower())) is not None:
                    entry.maps.append((kind, place))
                elif suffix == "cls":
                    entry.label = place
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{shown(tar)} cannot be read as a tar file: {error}") from error
    return [entry for entry in found.values() if entry.images or entry.maps]


def _row(child: Child, found: _Found, with_maps: bool) -> list[Any] | Fault:
    """A sample's row of the index, or why it cannot be used."""
    if not found.images:
        return Fault(found.maps[0][1], "missing-image", "is a map without an image")
    suffix, image = found.images[0]
    if not shards.is_below_root(found.key):
        return Fault(image, "unreadable", "its name is no path below a root")
    for several in (found.images, found.maps):
        if len(several) > 1:
            return Fault(several[0][1], "duplicate-stem", f"shares its key with {shown(several[1][1].name)}")
    if with_maps and not found.maps:
        return Fault(image, "missing-map", "has no saliency map")
    reply = check(child, "image", image.shard, image.offset, image.size)
    if reply["kind"]:
        return Fault(image, reply["kind"], reply["message"])
    label = None
    if found.label is not None and found.label.size <= _LONGEST_CLASS:
        try:
            label = found.label.read().decode("utf-8", "replace").strip() or None
        except OSError as error:
            return Fault(found.label, "unreadable", f"cannot be read: {error.strerror or error}")
    width, height = reply["width"], reply["height"]
    entry = shards.Entry(suffix, image.offset, image.size, width, height)
    if not found.maps:
        return [found.key, entry, None, False, label]
    kind, saliency = found.maps[0]
    seen = check(child, f"map-{kind}", saliency.shard, saliency.offset, saliency.size)
    if seen["kind"]:
        return Fault(saliency, seen["kind"], seen["message"])
    if not map_fits(width, height, seen["width"], seen["height"]):
        message = f"map is {seen['width']}x{seen['height']}, its image {width}x{height}"
        if reply["orientation"] >= 5 and map_fits(height, width, seen["width"], seen["height"]):
            message += "; the image has an EXIF rotation, which is not applied: the map must fit the stored pixels"
        return Fault(saliency, "size-mismatch", message)
    stored = shards.Entry(f"saliency.{kind}", saliency.offset, saliency.size, seen["width"], seen["height"])
    return [found.key, entry, stored, seen["peak"] <= SALIENT_ABOVE, label]


def _plan(tar: Path, state: tuple[int, int], with_maps: bool, duplicates: list[_Found]) -> str:
    """A hash of what a shard's index depends on, as far as it can be told from the headers."""
    known = (shards.VERSION, tar.name, *state, with_maps, [found.key for found in duplicates])
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _write_index(
    path: Path, tar: Path, state: tuple[int, int], plan: str, rows: list[Any], faults: list[Fault]
) -> None:
    with tar.open("rb") as file:
        digest = shards.sha256_of(file)
    if _state(tar) != state:
        raise UserError(f"{shown(tar)} changed while it was indexed: run the same command again when it is whole")
    index = {
        "version": shards.VERSION,
        "plan": plan,
        "file": tar.name,
        "bytes": state[0],
        "sha256": digest,
        "samples": rows,
        "rejects": [{"path": str(f.path), "kind": f.kind, "message": f.message} for f in faults],
    }
    write_json(path, index)


def _finish(out: Path, manifest: dict[str, Any], names: list[str], kept: int) -> Summary:
    """Gathers the indices into the manifest."""
    records: list[dict[str, Any]] = []
    rejects: list[dict[str, str]] = []
    rows: list[Any] = []
    for name in names:
        index, record = record_of(name, (out / f"{name}.json").read_bytes())
        records.append(record | {"file": index["file"]})
        rejects += index["rejects"]
        rows += index["samples"]
    faults = tuple(Fault(Path(reject["path"]), reject["kind"], reject["message"]) for reject in rejects)
    if not rows:
        example = f": for example {faults[0]}" if faults else ""
        raise UserError(f"no sample is usable, {len(faults)} were rejected{example}")
    labels = {row[4] for row in rows} - {None}
    manifest["classes"] = sorted(labels) or None
    manifest["counts"] = {
        "candidates": len(rows) + len(faults),
        "packed": len(rows),
        "rejected": dict(sorted(Counter(fault.kind for fault in faults).items())),
        "empty_maps": sum(row[3] for row in rows),
    }
    manifest["rejects"], manifest["shards"] = rejects, records
    complete(out, manifest)
    return Summary(
        out=out,
        samples=len(rows),
        shards=sum(record["samples"] > 0 for record in records),
        bytes=sum(record["bytes"] for record in records),
        kept=kept,
        empty=manifest["counts"]["empty_maps"],
        changes={},
        rejects=faults,
    )
