"""Pack a folder dataset into shards: ``cast-fast prepare IMAGES SALIENCY OUT``, or ``IMAGES OUT --images-only``.

Every image and map is decoded completely on the way, in processes of their own; what is faulty stays out and is named
in ``OUT/manifest.json`` with the reason. See ``pack_sample`` for what is stored of a sample and ``shards`` for the
files. The samples are dealt to shards in the order of a hash of their stems, so that a reader that streams shards sees
classes mixed; the same files and settings give the same bytes, whatever the number of workers.

A shard is complete or absent: the tar file, its index for DALI and our index are written under other names, flushed and
renamed, ours last. A second run of the same command keeps complete shards whose files have not changed and writes the
others. Names in the shards are made from paths below the roots that were found by listing them, never from the content
of a file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import os
import platform
import tarfile
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import PIL

from cast_fast import __version__
from cast_fast.data import pack_sample, shards
from cast_fast.data.children import Child, in_children
from cast_fast.data.index_shards import index_shards
from cast_fast.data.layout import Fault, Pair, find_pairs, read_labels
from cast_fast.data.pack_sample import MAP_FORMATS, MAP_QUALITY, Packed, PackRule, SampleFault, pack_by
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
from cast_fast.files import shown, whole_file, write_whole

HELP = "pack images and maps into WebDataset shards"

SHARD_SAMPLES = 2000
SOURCE_FILE = "saliency.json"
"""In a folder of maps: where they came from, written by ``cast-fast saliency``."""

_BLOCK = 512
_log = logging.getLogger("cast_fast")


def prepare(
    images: Path,
    saliency: Path | None,
    out: Path,
    *,
    rule: PackRule,
    labels: Path | None = None,
    shard_samples: int = SHARD_SAMPLES,
    workers: int | None = None,
    progress: bool = False,
) -> Summary:
    """Packs a folder dataset; goes on where an earlier run with the same settings stopped.

    Args:
        images, saliency: folders as in ``layout.scan``; without maps the shards serve only methods that need none.
        out: folder for the shards, made if absent.
        rule: what is stored of a sample.
        labels: CSV file ``stem,class``; becomes ``KEY.cls``, the number of the class in the manifest's ``classes``.
        shard_samples: candidates in a shard; rejected ones leave it smaller.
        workers: decoding processes; None takes one for each CPU that this process may use.
        progress: show a progress bar.

    Raises:
        UserError: a folder or the labels are faulty; ``out`` holds something else, other settings, or is in use; the
            disk is full; nothing could be packed.
    """
    if shard_samples < 1:
        raise UserError(f"--shard-samples: got {shard_samples}, expected at least 1")
    if workers is not None and workers < 1:
        raise UserError(f"--workers: got {workers}, expected at least 1")
    classes = None if labels is None else read_labels(labels)
    pairs, faults = find_pairs(images, saliency)
    if classes is not None and pairs and not any(pair.stem in classes for pair in pairs):
        raise UserError(f"{shown(labels or '')} names no image, for example not {shown(pairs[0].stem)!r}")
    settings: dict[str, Any] = {
        "maps": None if saliency is None else {"side": rule.map_side, "format": rule.map_format},
        "images": {"short_side": rule.short_side, "quality": rule.quality if rule.short_side else None},
        "shard_samples": shard_samples,
    }
    if saliency is not None and rule.map_format == "jpeg":
        settings["maps"]["quality"] = MAP_QUALITY
    manifest: dict[str, Any] = {
        "version": shards.VERSION,
        "complete": False,
        "settings": settings,
        "classes": sorted(set(classes.values())) if classes else None,
        "source": {
            "images": str(images),
            "saliency": None if saliency is None else str(saliency),
            "maps": None if saliency is None else _map_source(saliency),
        },
        "tools": {
            "cast_fast": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "opencv": cv2.__version__,
            "pillow": PIL.__version__,
        },
    }
    with writing(out, manifest):
        return _fill(out, manifest, pairs, faults, classes or {}, rule, workers, progress)


def _map_source(saliency: Path) -> dict[str, Any]:
    """What ``cast-fast saliency`` wrote beside the maps; ``method`` unknown where it did not."""
    path = saliency / SOURCE_FILE
    try:
        source = json.loads(path.read_bytes())
        if not isinstance(source, dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        return {"method": "unknown", "supervised": None}
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown(path)}: expected where the maps come from as JSON: {error}") from error
    return source


def _fill(
    out: Path,
    manifest: dict[str, Any],
    pairs: list[Pair],
    faults: list[Fault],
    classes: dict[str, str],
    rule: PackRule,
    workers: int | None,
    progress: bool,
) -> Summary:
    numbers: dict[str, int] = {label: number for number, label in enumerate(manifest["classes"] or ())}
    pairs = sorted(pairs, key=lambda pair: hashlib.sha256(os.fsencode(pair.stem)).digest())
    size = manifest["settings"]["shard_samples"]
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    plans = [_plan(group, rule, classes, manifest["classes"]) for group in groups]
    names = shard_names(len(groups))
    done = [_is_complete(out, name, plan) for name, plan in zip(names, plans)]
    remove_surplus(out, names)
    todo = [pair for group, kept in zip(groups, done) if not kept for pair in group]
    if any(done):
        _log.info("%d of %d shards are complete already", sum(done), len(names))
    with contextlib.closing(_packed(todo, rule, workers)) as results:
        stream = iter(show_progress(results, "Packing", len(todo), progress))
        for number, (name, plan, group, kept) in enumerate(zip(names, plans, groups, done)):
            if not kept:
                labelled = [classes.get(pair.stem) for pair in group]
                _write_shard(out, name, plan, group, labelled, numbers, itertools.islice(stream, len(group)))
                _log.info("shard %d of %d is complete", number + 1, len(names))
        for _ in stream:  # lets the bar reach its end
            raise AssertionError("more results than samples")
    return _finish(out, manifest, names, faults, sum(done))


def _plan(group: list[Pair], rule: PackRule, classes: dict[str, str], names: list[str] | None) -> str:
    """A hash of everything that a shard's content depends on, as far as it can be told without reading the files."""
    rows = []
    for stem, image, saliency in group:
        rows.append((stem, image[1:], None if saliency is None else saliency[1:], classes.get(stem)))
    content = json.dumps((shards.VERSION, __version__, asdict(rule), names, rows))
    return hashlib.sha256(content.encode()).hexdigest()


def _is_complete(out: Path, name: str, plan: str) -> bool:
    index = read_index(out, name, plan)
    try:
        if index is None or not all(type(count) is int for count in index["changes"].values()):
            return False
        if not all(reject["part"] in ("image", "map") for reject in index["rejects"]):
            return False
        if not index["samples"]:
            return True
        return (out / f"{name}.idx").is_file() and (out / f"{name}.tar").stat().st_size == index["bytes"]
    except (OSError, AttributeError, KeyError, TypeError):
        return False


def _packed(pairs: Sequence[Pair], rule: PackRule, workers: int | None) -> Generator[Packed | SampleFault, None, None]:
    """Results in the order of the pairs, made by ``workers`` processes."""

    def work(child: Child, pair: Pair) -> Packed | SampleFault:
        return pack_by(child, str(pair.image.path), None if pair.saliency is None else str(pair.saliency.path), rule)

    return in_children(pack_sample.MODULE, work, pairs, workers)


class _TarWriter:
    """Writes members with fixed times and owners, so that equal content gives equal bytes, and hashes on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.bytes = 0

    def add(self, name: str, content: bytes) -> int:
        """Appends a member; returns where its content begins."""
        member = tarfile.TarInfo(name)
        member.size = len(content)
        # PAX: an extra header for a name that is too long for a plain one, and nothing otherwise
        self._append(member.tobuf(tarfile.PAX_FORMAT))
        offset = self.bytes
        self._append(content)
        self._append(bytes(-len(content) % _BLOCK))
        return offset

    def finish(self) -> str:
        """Ends the archive and returns its SHA-256."""
        self._append(bytes(2 * _BLOCK))
        return self._digest.hexdigest()

    def _append(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.bytes += len(content)


def _write_shard(
    out: Path,
    name: str,
    plan: str,
    group: list[Pair],
    labels: list[str | None],
    numbers: dict[str, int],
    results: Iterable[Packed | SampleFault],
) -> None:
    """Writes the three files of a shard, our index last; a shard without samples has only that."""
    rows: list[Any] = []
    lines: list[str] = []
    rejects: list[dict[str, str]] = []
    changes: Counter[str] = Counter()
    tar = out / f"{name}.tar"
    with whole_file(tar, durable=True) as file:
        writer = _TarWriter(file)
        for pair, label, result in zip(group, labels, results, strict=True):
            if isinstance(result, SampleFault):
                rejects.append(_reject(pair, result))
                continue
            row, line = _add_sample(writer, pair.stem, label, numbers, result)
            rows.append(row)
            lines.append(line)
            changes.update(result.changes)
        digest = writer.finish()
        (out / f"{name}.json").unlink(missing_ok=True)  # from here on the shard counts as incomplete
    if rows:
        write_whole(out / f"{name}.idx", f"v1.2 {len(lines)}\n" + "".join(lines), durable=True)
    else:
        tar.unlink()
        (out / f"{name}.idx").unlink(missing_ok=True)
    index = {
        "version": shards.VERSION,
        "plan": plan,
        "bytes": writer.bytes if rows else 0,
        "sha256": digest if rows else None,
        "columns": [
            "stem",
            ["suffix", "offset", "size", "width", "height"],
            "the same of the map, if any",
            "empty",
            "class",
        ],
        "samples": rows,
        "changes": dict(sorted(changes.items())),
        "rejects": rejects,
    }
    write_json(out / f"{name}.json", index)


def _add_sample(
    writer: _TarWriter, stem: str, label: str | None, numbers: dict[str, int], packed: Packed
) -> tuple[list[Any], str]:
    """Appends a sample; returns its row of our index and its line of DALI's."""
    key, stored = shards.key_of(stem), packed.saliency
    members = [(packed.suffix, packed.image)]
    if stored is not None:
        members.append((f"saliency.{stored.suffix}", stored.content))
    if label is not None:
        members.append(("cls", str(numbers[label]).encode()))
    places = [(suffix, writer.add(f"{key}.{suffix}", content), len(content)) for suffix, content in members]
    line = " ".join(f"{suffix} {offset} {size} {key}.{suffix}" for suffix, offset, size in places)
    image = shards.Entry(*places[0], packed.width, packed.height)
    if stored is None:
        return [stem, image, None, False, label], line + "\n"
    saliency = shards.Entry(*places[1], stored.width, stored.height)
    return [stem, image, saliency, stored.empty, label], line + "\n"


def _reject(pair: Pair, fault: SampleFault) -> dict[str, str]:
    file = pair.image if fault.part == "image" else pair.saliency
    assert file is not None
    return {"part": fault.part, "path": file.name, "kind": fault.kind, "message": str(fault)}


def _finish(out: Path, manifest: dict[str, Any], names: list[str], faults: list[Fault], kept: int) -> Summary:
    """Gathers the shards' indices into the manifest."""
    records: list[dict[str, Any]] = []
    changes: Counter[str] = Counter()
    images, maps = Path(manifest["source"]["images"]), manifest["source"]["saliency"]
    rejects = list(faults)
    empty = 0
    for name in names:
        index, record = record_of(name, (out / f"{name}.json").read_bytes())
        records.append(record)
        changes.update(index["changes"])
        empty += sum(row[3] for row in index["samples"])
        for reject in index["rejects"]:
            root = images if reject["part"] == "image" else Path(maps)
            rejects.append(Fault(root / reject["path"], reject["kind"], reject["message"]))
    rejects.sort(key=lambda fault: str(fault.path))
    samples = sum(record["samples"] for record in records)
    summary = Summary(
        out=out,
        samples=samples,
        shards=sum(record["samples"] > 0 for record in records),
        bytes=sum(record["bytes"] for record in records),
        kept=kept,
        empty=empty,
        changes=dict(sorted(changes.items())),
        rejects=tuple(rejects),
    )
    manifest["counts"] = {
        "candidates": samples + len(rejects),
        "packed": samples,
        "rejected": dict(sorted(Counter(fault.kind for fault in rejects).items())),
        "empty_maps": empty,
        "changed": summary.changes,
    }
    manifest["rejects"] = [{"path": str(f.path), "kind": f.kind, "message": f.message} for f in rejects]
    manifest["shards"] = records
    if not samples:
        raise UserError(f"no sample could be packed, {len(rejects)} were rejected: for example {rejects[0]}")
    complete(out, manifest)
    return summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``cast-fast prepare``."""
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of images")
    parser.add_argument("saliency", type=Path, nargs="?", metavar="SALIENCY", help="folder of saliency maps")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the shards; run again to go on")
    parser.add_argument(
        "--images-only", action="store_true", help="pack no maps, for pretrain --method moco; SALIENCY is left out"
    )
    parser.add_argument(
        "--index-only",
        action="store_true",
        help="IMAGES holds WebDataset shards made elsewhere, OUT gets an index of them for pretrain --data OUT",
    )
    parser.add_argument("--labels", type=Path, metavar="CSV", help="file with columns stem,class")
    parser.add_argument(
        "--short-side", type=int, default=0, help="shrink larger images to this side; 0 keeps all bytes"
    )
    parser.add_argument("--quality", type=int, default=PackRule.quality, help="of the JPEGs that --short-side makes")
    parser.add_argument("--map-side", type=int, default=PackRule.map_side, help="longest side of a map; 0 keeps it")
    parser.add_argument("--map-format", choices=tuple(MAP_FORMATS), default=PackRule.map_format, help="of stored maps")
    parser.add_argument("--shard-samples", type=int, default=SHARD_SAMPLES, help="samples a shard")
    parser.add_argument("--workers", type=int, help="decoding processes; one for each CPU when absent")


def _index_only(args: argparse.Namespace) -> Summary:
    if args.saliency is not None or args.images_only or args.labels is not None or args.short_side:
        raise UserError("--index-only packs nothing: expected SHARDS INDEX --index-only, and perhaps --workers")
    return index_shards(args.images, args.out, workers=args.workers, progress=True)


def _packed_as_told(args: argparse.Namespace) -> Summary:
    try:
        rule = PackRule(args.map_side, args.map_format, args.short_side, args.quality)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from None
    if args.images_only and args.saliency is not None:
        raise UserError("--images-only: got SALIENCY as well, expected IMAGES OUT")
    if args.saliency is None and not args.images_only:
        raise UserError("got two folders, expected IMAGES SALIENCY OUT, or IMAGES OUT --images-only")
    return prepare(
        args.images,
        args.saliency,
        args.out,
        rule=rule,
        labels=args.labels,
        shard_samples=args.shard_samples,
        workers=args.workers,
        progress=True,
    )


def main(args: argparse.Namespace) -> int:
    """Runs ``cast-fast prepare``; returns 0 also where files were rejected, which it counts and names."""
    summary = _index_only(args) if args.index_only else _packed_as_told(args)
    kept = f", {summary.kept} of them from an earlier run" if summary.kept else ""
    size = summary.bytes / 1e6
    where = "index in " if args.index_only else ""
    shards_made = f"{summary.shards} shard{'s' if summary.shards != 1 else ''}"
    print(f"{summary.samples} samples in {shards_made} ({size:.1f} MB){kept}: {where}{shown(summary.out)}")
    for change, count in summary.changes.items():
        print(f"{change}: {count}")
    if summary.empty:
        print(f"empty maps: {summary.empty}")
    for kind, count in sorted(Counter(fault.kind for fault in summary.rejects).items()):
        first = next(fault for fault in summary.rejects if fault.kind == kind)
        print(f"rejected, {kind}: {count}, for example {first}")
    return 0
