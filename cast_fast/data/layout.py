"""What a dataset on disk is: folder pairs of images and saliency maps, validated by decoding every file once.

This is layout (a); ``shards`` reads layout (b), the same dataset packed by ``prepare``, into the same :class:`Dataset`.

``IMAGES/**/NAME.{jpg,jpeg,png}`` (any case) is paired with ``SALIENCY/**/NAME.png`` by its path below the root without
suffix, the *stem*. Hidden files and folders are ignored, links are followed. An image is any JPEG or PNG, told by its
content, not by its suffix (grey, palette, CMYK and transparent ones become RGB in the loader). A map is an 8-bit grey
PNG in which values above 127 are salient; it has the image's size, or is smaller with the same aspect within a pixel.
Sizes are those of the stored pixels: an EXIF rotation is applied neither to the image nor to the map.

Decoding is cached in a manifest: a file whose size and time of change are as recorded is not decoded again.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import json
import logging
import os
import stat
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from cast_fast.data import decode_check
from cast_fast.data.children import in_children
from cast_fast.data.decode_check import Reply, check, map_fits
from cast_fast.data.progress import show_progress
from cast_fast.errors import UserError
from cast_fast.files import folder_fault, remove_parts, shown, write_whole

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
MAP_SUFFIXES = frozenset({".png"})
_PICTURES = IMAGE_SUFFIXES | {
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".tif", ".tiff", ".webp")
}
"""What somebody may have expected to be read."""
SALIENT_ABOVE = 127
"""Map values above this are salient."""

EMPTY_MAP = "empty-map"

_FORMAT = 1
_SHOWN = 3
_log = logging.getLogger("cast_fast")


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a shard: ``size`` bytes of a tar file from ``offset`` on."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def read(self) -> bytes:
        """Its content.

        Raises:
            OSError: the shard cannot be read, or ends before the member does.
        """
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise OSError(errno.EIO, "the shard is shorter than its index says", str(self))
        return content


def read_bytes(source: Path | Member) -> bytes:
    """Content of a file of either layout; raises OSError."""
    return source.read() if isinstance(source, Member) else source.read_bytes()


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its map: intact files of matching sizes."""

    stem: str
    """Path below the root without suffix, with forward slashes; unique in a dataset."""
    image: Path | Member
    saliency: Path | Member | None
    width: int
    """Stored width of the image in pixels; the map may be smaller."""
    height: int
    empty: bool
    """No pixel of the map is salient."""
    label: str | None
    map_shape: tuple[int, int] | None = None
    """(height, width) of a packed map; None in folders, where nobody needs it before the map is decoded."""


@dataclass(frozen=True)
class Fault:
    """Why a file cannot be used."""

    path: Path | Member
    kind: str
    """One of: missing-map, duplicate-stem, size-mismatch, map-format, empty-map, empty-file, not-an-image,
    undecodable, damaged, too-large, unreadable, decoder-crash."""
    message: str

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.message}"


@dataclass(frozen=True)
class Dataset:
    """Samples in the order of their stems, and what is not among them."""

    samples: tuple[Sample, ...]
    faults: tuple[Fault, ...]
    """From :func:`scan`: everything that is wrong. From :func:`usable`: what was left out, empty maps included."""
    images: Path
    saliency: Path | None
    decoded: int = field(default=0, compare=False)
    """Files decoded by the scan; the others were known from the manifest."""
    packing: str = ""
    """How packed maps were stored, which moves crops a little; empty in folders."""

    def __len__(self) -> int:
        return len(self.samples)

    def fingerprint(self) -> str:
        """SHA-256 over stems, sizes and the packing of maps, in order; the same wherever the files lie."""
        digest = hashlib.sha256(self.packing.encode())
        for sample in self.samples:
            row = json.dumps((sample.stem, sample.width, sample.height), separators=(",", ":"))
            digest.update(row.encode() + b"\n")
        return digest.hexdigest()

    def empty_maps(self) -> tuple[Fault, ...]:
        """The samples whose map holds no salient pixel, as faults."""
        message = f"no pixel of the map is above {SALIENT_ABOVE} (maps hold 0 to 255, salient is 255)"
        return tuple(Fault(s.saliency or s.image, EMPTY_MAP, message) for s in self.samples if s.empty)


class FoundFile(NamedTuple):
    """A file of a folder dataset."""

    path: Path
    name: str
    """Path below the root, with forward slashes."""
    size: int
    mtime_ns: int


class Pair(NamedTuple):
    """An image and its map, not yet decoded."""

    stem: str
    image: FoundFile
    saliency: FoundFile | None


def _walk(root: Path, suffixes: frozenset[str], leave_out: Path | None) -> dict[str, list[str]]:
    """Names below ``root`` with one of the suffixes, by stem; raises UserError where a folder cannot be listed.

    Pictures of other kinds are passed over and counted in the log.
    """
    found: dict[str, list[str]] = {}
    others: Counter[str] = Counter()
    excluded = None if leave_out is None else _folder_id(leave_out)

    def descend(folder: Path, below: str, above: frozenset[tuple[int, int]]) -> None:
        identity = _folder_id(folder)
        if identity in above or identity == excluded:  # a link to a parent, or the maps inside the images' folder
            return
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                descend(folder / entry.name, f"{below}{entry.name}/", above | {identity})
                continue
            base, suffix = os.path.splitext(entry.name)
            if suffix.lower() in suffixes:
                found.setdefault(below + base, []).append(below + entry.name)
            elif suffix.lower() in _PICTURES:
                others[suffix.lower()] += 1

    try:
        descend(root, "", frozenset())
    except OSError as error:
        raise UserError(f"cannot list {shown(error.filename)}: {error.strerror}") from error
    if others:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in others.most_common())
        wanted = ", ".join(sorted(suffixes))
        _log.warning("%s: %d pictures are not %s and not read (%s)", shown(root), others.total(), wanted, kinds)
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False  # a link that leads back to itself: `_stat` names it, if it has a picture's name


def _folder_id(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _stat(root: Path, name: str) -> FoundFile | Fault:
    path = root / name
    try:
        status = path.stat()
    except OSError as error:
        dangling = isinstance(error, FileNotFoundError) and path.is_symlink()
        reason = "is a link to nothing" if dangling else f"cannot be read: {error.strerror}"
        return Fault(path, "unreadable", reason)
    if not stat.S_ISREG(status.st_mode):
        return Fault(path, "unreadable", "is not a regular file")
    return FoundFile(path, name, status.st_size, status.st_mtime_ns)


def _decode(jobs: list[tuple[str, FoundFile]], workers: int | None) -> Generator[Reply, None, None]:
    """What the decoder says of files, in their order."""
    return in_children(decode_check.MODULE, lambda child, job: check(child, job[0], job[1].path), jobs, workers)


def default_manifest(images: Path, saliency: Path | None) -> Path:
    """Where the manifest of a pair of folders lies: in the user's cache, so that datasets may be read-only."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(json.dumps(_roots(images, saliency)).encode()).hexdigest()[:24]
    return Path(cache) / "cast_fast" / f"manifest-{name}.json"


def _roots(images: Path, saliency: Path | None) -> list[str | None]:
    return [str(images.resolve()), None if saliency is None else str(saliency.resolve())]


_Known = dict[str, dict[str, tuple[int, int, Reply]]]


def _read_manifest(path: Path, roots: list[str | None]) -> _Known:
    """Replies of earlier scans by kind and path below the root; empty, with a line in the log, if it is unusable."""
    known: _Known = {"image": {}, "map": {}}
    try:
        record: Any = json.loads(path.read_bytes())
        if record["format"] != _FORMAT or record["roots"] != roots:
            raise ValueError("it belongs to other folders or another version")
        for kind, entries in known.items():
            for name, (size, mtime_ns, width, height, orientation, peak, fault, message) in record[kind].items():
                numbers = (size, mtime_ns, width, height, orientation, peak)
                if not all(type(number) is int for number in numbers) or not isinstance(fault, str):
                    raise ValueError(f"entry {name!a} is damaged")
                reply = Reply(
                    width=width, height=height, orientation=orientation, peak=peak, kind=fault, message=str(message)
                )
                entries[name] = (size, mtime_ns, reply)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _log.warning("manifest %s is rebuilt: %s", shown(path), error)
        return {"image": {}, "map": {}}
    return known


def _write_manifest(path: Path, roots: list[str | None], known: _Known) -> None:
    """Writes the manifest whole or not at all; a failure costs only time, so it is logged."""
    record: dict[str, Any] = {"format": _FORMAT, "roots": roots}
    for kind, entries in known.items():
        rows = sorted(entries.items())
        record[kind] = {name: [size, mtime_ns, *reply.values()] for name, (size, mtime_ns, reply) in rows}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_parts(path.parent)
        write_whole(path, json.dumps(record, separators=(",", ":")))
    except OSError as error:
        _log.warning("manifest %s cannot be written, the next scan decodes again: %s", shown(path), error)


def read_labels(path: Path) -> dict[str, str]:
    """Class by stem from a CSV file with a header that names at least ``stem`` and ``class``.

    Raises:
        UserError: the file cannot be read, lacks a column, or gives one stem two classes.
    """
    labels: dict[str, str] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            missing = {"stem", "class"} - set(table.fieldnames or ())
            if missing:
                raise UserError(f"{shown(path)}: no column {', '.join(sorted(missing))}, expected stem,class")
            for row in table:
                stem, label = row["stem"], row["class"]
                if not stem or not label:
                    raise UserError(f"{shown(path)}, line {table.line_num}: stem or class is empty")
                if labels.setdefault(stem, label) != label:
                    raise UserError(f"{shown(path)}, line {table.line_num}: {stem!a} has two classes")
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{shown(path)} is not a CSV file in UTF-8: {error}") from error
    return labels


def find_pairs(images: Path, saliency: Path | None, *, leave_out: Path | None = None) -> tuple[list[Pair], list[Fault]]:
    """The pairs below two folders, in the order of their stems, and the images that have no partner or two.

    Args:
        images: folder of images.
        saliency: folder of maps, which may lie inside ``images``; None for images alone.
        leave_out: another folder inside ``images`` that holds no images.

    Raises:
        UserError: a folder is missing, cannot be listed or holds no image.
    """
    for flag, folder in (("--images", images), ("--saliency", saliency)):
        if folder is not None and (fault := folder_fault(folder)) is not None:
            raise UserError(f"{flag}: {shown(folder)} {fault}")
    if saliency is not None and images.resolve() == saliency.resolve():
        raise UserError(f"--images and --saliency are the same folder, {shown(images)}")
    excluded = saliency if leave_out is None or not leave_out.is_dir() else leave_out
    image_names = _walk(images, IMAGE_SUFFIXES, excluded)
    if not image_names:
        raise UserError(f"--images: {shown(images)} holds no .jpg, .jpeg or .png file")
    map_names = {} if saliency is None else _walk(saliency, MAP_SUFFIXES, images)
    if saliency is not None and not map_names.keys() & image_names.keys():
        wanted = shown(min(image_names))
        raise UserError(f"--saliency: {shown(saliency)} holds no map of any image, expected for example {wanted}.png")
    orphans = map_names.keys() - image_names.keys()
    if orphans:
        _log.info("%d maps have no image, for example %s.png", len(orphans), shown(min(orphans)))
    pairs: list[Pair] = []
    faults: list[Fault] = []
    for stem in sorted(image_names):
        pair = _pair(images, image_names[stem], saliency, map_names.get(stem, []))
        if isinstance(pair, Fault):
            faults.append(pair)
        else:
            pairs.append(Pair(stem, *pair))
    return pairs, faults


def scan(
    images: Path,
    saliency: Path | None,
    *,
    labels: Path | None = None,
    workers: int | None = None,
    manifest: Path | None = None,
    progress: bool = False,
) -> Dataset:
    """Finds the pairs below two folders and decodes every file that the manifest does not know.

    Args:
        images: folder of images.
        saliency: folder of maps, which may lie inside ``images``; None for images alone.
        labels: optional CSV file ``stem,class``; images that it does not name have no label.
        workers: decoding processes; None takes one for each CPU that this process may use.
        manifest: cache file; None takes :func:`default_manifest`.
        progress: show a progress bar.

    Returns:
        The intact samples (those with an empty map included) and the faults. Each fault names one file; an image with
        a fault, or with a faulty map, is not among the samples.

    Raises:
        UserError: a folder is missing, cannot be listed or holds no image; the labels are faulty or name no image.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers: got {workers}, expected at least 1")
    classes = None if labels is None else read_labels(labels)
    pairs, faults = find_pairs(images, saliency)
    if classes is not None and pairs and not any(pair.stem in classes for pair in pairs):
        raise UserError(
            f"{shown(labels or '')} names no image: it has {shown(next(iter(classes), ''))!r}, "
            f"the images have {shown(pairs[0].stem)!r}"
        )

    roots = _roots(images, saliency)
    manifest = default_manifest(images, saliency) if manifest is None else manifest
    known = _read_manifest(manifest, roots)
    current: _Known = {"image": {}, "map": {}}
    jobs: list[tuple[str, FoundFile]] = []
    for _, image, map_file in pairs:
        for kind, file in (("image", image), ("map", map_file)):
            if file is None:
                continue
            entry = known[kind].get(file.name)
            if entry is not None and entry[:2] == (file.size, file.mtime_ns):
                current[kind][file.name] = entry
            else:
                jobs.append((kind, file))
    if jobs:
        total = len(jobs) + sum(map(len, current.values()))
        _log.info("decoding %d files of %d", len(jobs), total)
        try:
            with contextlib.closing(_decode(jobs, workers)) as replies:
                for (kind, file), reply in zip(jobs, show_progress(replies, "Checking files", len(jobs), progress)):
                    current[kind][file.name] = (file.size, file.mtime_ns, reply)
        finally:  # an interrupted scan goes on where it stopped
            whole = sum(map(len, current.values())) == total
            _write_manifest(manifest, roots, current if whole else _merged(known, current))
    elif current != known:
        _write_manifest(manifest, roots, current)

    samples: list[Sample] = []
    for stem, image, map_file in pairs:
        reply = current["image"][image.name][2]
        map_reply = None if map_file is None else current["map"][map_file.name][2]
        fault = _judge(image, reply, map_file, map_reply)
        if fault is not None:
            faults.append(fault)
            continue
        samples.append(
            Sample(
                stem=stem,
                image=image.path,
                saliency=None if map_file is None else map_file.path,
                width=reply["width"],
                height=reply["height"],
                empty=map_reply is not None and map_reply["peak"] <= SALIENT_ABOVE,
                label=None if classes is None else classes.get(stem),
            )
        )
    faults.sort(key=lambda fault: str(fault.path))
    return Dataset(tuple(samples), tuple(faults), images, saliency, decoded=len(jobs))


def _merged(known: _Known, current: _Known) -> _Known:
    return {kind: {**known[kind], **current[kind]} for kind in known}


def _pair(
    images: Path, image_names: list[str], saliency: Path | None, map_names: list[str]
) -> tuple[FoundFile, FoundFile | None] | Fault:
    """One image and one map from the candidates of a stem."""
    for root, names in ((images, image_names), (saliency, map_names)):
        if root is not None and len(names) > 1:
            return Fault(root / names[0], "duplicate-stem", f"shares its name with {', '.join(map(shown, names[1:]))}")
    image = _stat(images, image_names[0])
    if isinstance(image, Fault):
        return image
    if saliency is None:
        return image, None
    if not map_names:
        return Fault(image.path, "missing-map", "has no saliency map")
    map_file = _stat(saliency, map_names[0])
    return map_file if isinstance(map_file, Fault) else (image, map_file)


def _judge(image: FoundFile, reply: Reply, map_file: FoundFile | None, map_reply: Reply | None) -> Fault | None:
    """The fault of a decoded pair, if it has one."""
    if reply["kind"]:
        return Fault(image.path, reply["kind"], reply["message"])
    if map_file is None or map_reply is None:
        return None
    if map_reply["kind"]:
        return Fault(map_file.path, map_reply["kind"], map_reply["message"])
    width, height, map_width, map_height = reply["width"], reply["height"], map_reply["width"], map_reply["height"]
    if map_fits(width, height, map_width, map_height):
        return None
    message = f"map is {map_width}x{map_height}, its image {width}x{height}"
    if reply["orientation"] >= 5 and map_fits(height, width, map_width, map_height):
        message += "; the image has an EXIF rotation, which is not applied: the map must fit the stored pixels"
    return Fault(map_file.path, "size-mismatch", message)


def usable(dataset: Dataset, *, skip_invalid: bool, on_empty_saliency: str) -> Dataset:
    """The part of a scanned dataset that training may use.

    Args:
        dataset: from :func:`scan`.
        skip_invalid: leave faulty files out instead of failing.
        on_empty_saliency: "error", "skip" (leave those samples out) or "unconstrained" (keep them).

    Returns:
        A dataset whose ``faults`` record everything that was left out.

    Raises:
        UserError: there are faults or empty maps that may not be left out, or nothing remains.
    """
    if on_empty_saliency not in ("error", "skip", "unconstrained"):
        raise ValueError(f"got on_empty_saliency {on_empty_saliency!r}, expected error, skip or unconstrained")
    if dataset.faults and not skip_invalid:
        raise UserError(
            f"{_list(dataset.faults, 'faulty file', 'faulty files')}; cast-fast validate lists all, "
            "--skip-invalid trains without them"
        )
    empty = dataset.empty_maps()
    if empty and on_empty_saliency == "error":
        raise UserError(
            f"{_list(empty, 'empty saliency map', 'empty saliency maps')}; "
            "--on-empty-saliency skip or unconstrained trains all the same"
        )
    samples, left_out = dataset.samples, dataset.faults
    if on_empty_saliency == "skip":
        samples = tuple(sample for sample in samples if not sample.empty)
        left_out += empty
    if not samples:
        raise UserError(f"no usable image is left in {shown(dataset.images)}: {len(left_out)} left out")
    if left_out:
        _log.warning("%s left out, %d samples remain", _list(left_out, "file", "files"), len(samples))
    return replace(dataset, samples=samples, faults=left_out)


def _list(faults: tuple[Fault, ...], singular: str, plural: str) -> str:
    """Count and the first few of the faults, for one line."""
    first = "; ".join(map(str, faults[:_SHOWN]))
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return f"{len(faults)} {singular if len(faults) == 1 else plural} ({first}{more})"


def write_faults(path: Path, faults: tuple[Fault, ...]) -> None:
    """Writes faults as JSON lines: ``path``, ``kind``, ``message``.

    Raises:
        UserError: the file cannot be written.
    """
    lines = [json.dumps({"path": str(f.path), "kind": f.kind, "message": f.message}) + "\n" for f in faults]
    try:
        write_whole(path, "".join(lines))
    except OSError as error:
        raise UserError(f"cannot write {shown(path)}: {error.strerror}") from error
