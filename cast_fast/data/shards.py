"""Layout (b): a dataset packed into WebDataset shards by ``prepare``, read in random access.

A folder holds, for each shard, ``shard-000000.tar`` with the members ``KEY.jpg`` (or ``.png``), ``KEY.saliency.jpg``
(or ``.npy``, ``.png``; none in a dataset of images alone) and perhaps ``KEY.cls`` of one sample after another;
``shard-000000.idx``, where the members lie, as DALI's ``readers.webdataset`` wants it; and ``shard-000000.json``, our
index, which also knows sizes, labels and which maps are empty. ``manifest.json`` describes the whole.

Training does not stream shards. `scan_shards` gives the same kind of `Dataset` as a folder pair, in the same order, and
the loader reads members by their place in the file: one global order per seed and epoch then holds for both layouts,
for any number of ranks and threads, and a run goes on in mid-epoch from the step number alone. The price is random
access: shards should lie on a local disk, or fit in the page cache. Shards made elsewhere have no such index;
``index_shards`` writes one into another folder, whose manifest then says where they lie.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from cast_fast.data.layout import Dataset, Fault, Member, Sample, read_labels
from cast_fast.errors import UserError
from cast_fast.files import folder_fault, shown

MANIFEST = "manifest.json"
VERSION = 1
"""Of manifest and index; raised when their meaning changes."""
MOST = 10**6
"""Shards in a folder, by their names."""
SHARD_NAME = re.compile(r"shard-\d{6}")
IMAGE_SUFFIXES = ("jpg", "png")
MAP_SUFFIXES = ("saliency.jpg", "saliency.npy", "saliency.png")

_READ_THREADS = 8


class Entry(NamedTuple):
    """One member in an index: its suffix behind the key, its place in the tar file, and the picture's size."""

    suffix: str
    offset: int
    size: int
    width: int
    height: int


def key_of(stem: str) -> str:
    """The WebDataset key of a stem: percent-encoded, because a key ends at the first dot and an index at spaces.

    Letters, digits, ``-``, ``_``, ``~`` and ``/`` stand for themselves, so that most keys are the stem.

    Raises:
        ValueError: the stem is no path below a root: absolute, or with an empty part, ``.`` or ``..``.
    """
    if not is_below_root(stem):
        raise ValueError(f"stem: got {stem!a}, expected a path below the root")
    return quote(os.fsencode(stem), safe="/").replace(".", "%2E")


def is_below_root(name: str) -> bool:
    """Whether a name with forward slashes stays below the folder that it is joined to."""
    return "\0" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Raises:
        UserError: there is none, or it is damaged or of another version, or ``prepare`` has not finished.
    """
    if (fault := folder_fault(folder)) is not None:
        raise UserError(f"--data: {shown(folder)} {fault}")
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version, complete = manifest["version"], manifest["complete"]
    except FileNotFoundError:
        hint = "expected a folder made by cast-fast prepare"
        if any(folder.glob("*.tar")):
            hint = "shards made elsewhere need an index: cast-fast prepare SHARDS INDEX --index-only, then --data INDEX"
        raise UserError(f"--data: {shown(folder)} has no {MANIFEST}: {hint}") from None
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{shown(path)} is damaged: {error}") from error
    if version != VERSION:
        raise UserError(f"{shown(path)}: got version {version!a}, expected {VERSION}; prepare the dataset again")
    if complete is not True:
        raise UserError(
            f"{shown(folder)} is unfinished: run the same cast-fast prepare again, it goes on where it stopped"
        )
    if not isinstance(manifest.get("settings"), dict):
        raise UserError(f"{shown(path)} is damaged: its settings are no JSON object")
    return manifest


def missing_maps(folder: Path) -> str:
    """What to say of shards without maps where maps are needed."""
    return (
        f"--data: {shown(folder)} is without saliency maps (images alone were packed or indexed), which serves "
        "pretrain --method moco, probe and downstream; pack again with maps"
    )


def scan_shards(folder: Path, *, labels: Path | None = None, need_maps: bool = False) -> Dataset:
    """The samples of a folder that ``prepare`` has written, in the order of their stems.

    Nothing is decoded: that was done when the dataset was packed. Each shard must have the recorded size; `verify`
    also compares the content.

    Args:
        folder: holds the shards.
        labels: CSV file ``stem,class`` instead of the labels that were packed.
        need_maps: refuse a dataset that was packed without maps.

    Raises:
        UserError: no finished dataset lies there, a shard is missing or damaged, the labels are faulty, or there are no
            maps where they are needed.
    """
    manifest = read_manifest(folder)
    classes = None if labels is None else read_labels(labels)
    samples: list[Sample] = []
    for record in _shard_records(folder, manifest):
        samples += _samples(folder, record, _tar(folder, manifest, record))
    samples.sort(key=lambda sample: sample.stem)
    if not samples:
        raise UserError(f"--data: {shown(folder)} holds no sample")
    if classes is not None:
        if not any(sample.stem in classes for sample in samples):
            raise UserError(
                f"{shown(labels or '')} names no image: it has {shown(next(iter(classes), ''))!r}, "
                f"the shards have {shown(samples[0].stem)!r}"
            )
        samples = [_labelled(sample, classes.get(sample.stem)) for sample in samples]
    maps = manifest["settings"].get("maps")
    if need_maps and any(sample.saliency is None for sample in samples):
        raise UserError(missing_maps(folder))
    return Dataset(tuple(samples), (), folder, folder if maps else None, packing=json.dumps(maps, sort_keys=True))


def _labelled(sample: Sample, label: str | None) -> Sample:
    return Sample(
        sample.stem, sample.image, sample.saliency, sample.width, sample.height, sample.empty, label, sample.map_shape
    )


def _shard_records(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The manifest's entries of shards that hold samples.

    Raises:
        UserError: an entry is damaged, or a shard is missing or of another size.
    """
    try:
        records = [record for record in manifest["shards"] if record["samples"]]
        for record in records:
            if SHARD_NAME.fullmatch(record["name"]) is None:
                raise ValueError(f"{record['name']!a} is no name of a shard")
            path = _tar(folder, manifest, record)
            size = path.stat().st_size
            if "file" in record and size != record["bytes"]:
                raise UserError(
                    f"{shown(path)} is not what was indexed: it has {size} bytes, expected {record['bytes']}; run the "
                    "same cast-fast prepare --index-only again"
                )
            if size != record["bytes"]:
                raise UserError(
                    f"{shown(path)} is damaged: it has {size} bytes, expected {record['bytes']}; delete it and run "
                    "the same cast-fast prepare again"
                )
    except OSError as error:
        raise UserError(f"cannot read {shown(error.filename)}: {error.strerror}") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown(folder / MANIFEST)} is damaged: {error}") from error
    return records


def _tar(folder: Path, manifest: dict[str, Any], record: dict[str, Any]) -> Path:
    """Where a shard lies: beside its index, or, made elsewhere and only indexed here, in the folder of its source."""
    if "file" not in record:
        return folder / f"{record['name']}.tar"
    name = record["file"]
    if not is_below_root(name) or "/" in name:
        raise ValueError(f"{name!a} is no name of a file")
    return Path(manifest["source"]["shards"]) / name


def _samples(folder: Path, record: dict[str, Any], shard: Path) -> list[Sample]:
    """The samples of one shard from its index, whose hash the manifest knows."""
    path = folder / f"{record['name']}.json"
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != record["index_sha256"]:
            raise ValueError("its content is not what the manifest says")
        index = json.loads(content)
        if index["bytes"] != record["bytes"]:
            raise ValueError("it speaks of a shard of another size")
        return samples_of(index, shard)
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{shown(path)} is damaged: {error}; delete it and run the same cast-fast prepare again"
        ) from error


def samples_of(index: dict[str, Any], shard: Path) -> list[Sample]:
    """The samples of a shard by its index.

    Raises:
        ValueError, KeyError, TypeError: it is not made by ``prepare`` or ``index_shards``.
    """
    return [_sample(shard, index["bytes"], row) for row in index["samples"]]


def _sample(shard: Path, shard_size: int, row: list[Any]) -> Sample:
    stem, image, saliency, empty, label = row
    key, image, saliency = key_of(stem), Entry(*image), None if saliency is None else Entry(*saliency)
    for entry, suffixes in ((image, IMAGE_SUFFIXES), (saliency, MAP_SUFFIXES)):
        if entry is None:
            continue
        if not all(type(number) is int for number in entry[1:]):
            raise ValueError(f"the entry of {key} is not of whole numbers")
        if entry.suffix not in suffixes or not 0 <= entry.offset <= entry.offset + entry.size <= shard_size:
            raise ValueError(f"the entry of {key} is out of range")
        if min(entry.width, entry.height) < 1:
            raise ValueError(f"the entry of {key} has no size")
    if type(empty) is not bool or not isinstance(label, (str, type(None))):
        raise ValueError(f"the entry of {key} has {empty!a} and {label!a} where empty and class stand")
    map_member = None
    if saliency is not None:
        map_member = Member(shard, f"{key}.{saliency.suffix}", saliency.offset, saliency.size)
    return Sample(
        stem=stem,
        image=Member(shard, f"{key}.{image.suffix}", image.offset, image.size),
        saliency=map_member,
        width=image.width,
        height=image.height,
        empty=empty,
        label=label,
        map_shape=None if saliency is None else (saliency.height, saliency.width),
    )


def verify(folder: Path) -> list[Fault]:
    """Reads every shard and compares its SHA-256 with the manifest's.

    Raises:
        UserError: as `scan_shards`.
    """
    faults = []
    manifest = read_manifest(folder)
    for record in _shard_records(folder, manifest):
        path = _tar(folder, manifest, record)
        try:
            with path.open("rb") as file:
                digest = sha256_of(file)
        except OSError as error:
            faults.append(Fault(path, "unreadable", f"cannot be read: {error.strerror or error}"))
            continue
        if digest != record["sha256"]:
            faults.append(Fault(path, "damaged", "its SHA-256 is not the one in the manifest"))
    return faults


def sha256_of(file: Any) -> str:
    """Of what is left to read of a binary file, in hexadecimal."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def members_obstacle(samples: Sequence[Sample]) -> str | None:
    """Why the native operator, which keeps every shard open, cannot read these members; None where it can."""
    shards = {file.shard for sample in samples for file in (sample.image, sample.saliency) if isinstance(file, Member)}
    if len(shards) > _most_open_files():
        return f"{len(shards)} shards are more than half of the files that may be open (ulimit -n)"
    for shard in shards:
        if not str(shard).isprintable():
            return f"the path {shown(shard)} is not plain text"
    return None


def member_places(
    samples: Sequence[Sample], *, maps: bool, raw_maps: bool
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Where the members of packed samples lie.

    Args:
        samples: of a packed dataset.
        maps: of the maps too.
        raw_maps: the maps are ``.npy`` files; then it is where their pixels lie, which end such a file.

    Returns:
        The shards' paths, and for each sample and each of its members, image and map, int64 (n, 1 or 2, 3):
        ``[shard, offset, size]``.
    """
    shards: dict[Path, int] = {}
    places = np.empty((len(samples), 1 + maps, 3), dtype=np.int64)
    for row, sample in zip(places, samples):
        for place, file in zip(row, (sample.image, sample.saliency)):
            assert isinstance(file, Member)
            place[:] = shards.setdefault(file.shard, len(shards)), file.offset, file.size
        if maps and raw_maps:
            assert sample.map_shape is not None
            pixels = sample.map_shape[0] * sample.map_shape[1]
            row[1, 1:] = row[1, 1] + row[1, 2] - pixels, pixels
    return tuple(map(str, shards)), places


def _most_open_files() -> int:
    """Half of what this process may open."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class ShardReader:
    """Reads members of shards with several threads, so that a slow disk has several requests at a time.

    Args:
        threads: requests at a time.
    """

    def __init__(self, threads: int = _READ_THREADS) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shard-reader")
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._most_files = _most_open_files()  # beyond it a shard is opened for each read

    def start(self, members: Sequence[Member]) -> list[Future[bytes]]:
        """Begins to read; each future gives a member's content, or raises OSError."""
        return [self._pool.submit(self._read, member) for member in members]

    def read(self, members: Sequence[Member]) -> list[bytes]:
        """Contents of the members, in order.

        Raises:
            OSError: a shard cannot be read, or ends before a member does.
        """
        return [future.result() for future in self.start(members)]

    def _read(self, member: Member) -> bytes:
        descriptor = self._descriptor(member.shard)
        if descriptor is None:
            return member.read()
        content = os.pread(descriptor, member.size, member.offset)
        return content if len(content) == member.size else member.read()  # short only at the file's end: it says so

    def _descriptor(self, shard: Path) -> int | None:
        with self._lock:
            if shard not in self._files and len(self._files) < self._most_files:
                self._files[shard] = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
            return self._files.get(shard)

    def close(self) -> None:
        """Waits for reads under way and closes the shards."""
        self._pool.shutdown(cancel_futures=True)
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()
