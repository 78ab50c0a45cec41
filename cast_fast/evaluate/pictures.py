"""Labelled images with saliency maps for the evaluation commands, from either layout on disk, in random access.

Training streams through DALI; evaluation reads each picture once, wants names and labels with it, and must not depend
on DALI. Geometry is shared by an image and its map, and an EXIF rotation is applied to neither, as in training.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from cast_fast import checkpoint
from cast_fast.data import layout, shards
from cast_fast.data.pack_sample import decode_stored
from cast_fast.data.rgb import to_grey, to_rgb
from cast_fast.errors import UserError
from cast_fast.evaluate.figures import Picture
from cast_fast.files import write_fault

logger = logging.getLogger("cast_fast")

CENTRAL_SHARE = 7 / 8
"""Side of the central crop over the shorter side of the resized image: 224 of 256."""
_AHEAD = 2  # batches decoded in advance
_LOG_EVERY = 30.0  # seconds

Box = tuple[float, float, float, float]
"""(top, left, bottom, right) as shares of the image's sides, in [0, 1]."""
_T = TypeVar("_T")


class Pictures(Protocol):
    """A dataset in random access."""

    @property
    def names(self) -> Sequence[str]:
        """Stem or key of each picture, unique."""
        ...

    @property
    def labels(self) -> Sequence[str | None]:
        """Class of each picture, None where it has none."""
        ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """The picture in RGB."""
        ...

    def saliency(self, index: int) -> NDArray[np.uint8] | None:
        """Its map (h, w), salient above 127, perhaps smaller than the image; None where there is none."""
        ...

    def fingerprint(self) -> str:
        """A hash of names and sizes or bytes that changes when the pictures do."""
        ...


class FolderPictures:
    """Layout (a), validated by ``data.layout``, or shards with an index, which ``prepare`` has written."""

    def __init__(self, dataset: layout.Dataset) -> None:
        self.dataset = dataset
        self.names = [sample.stem for sample in dataset.samples]
        self.labels = [sample.label for sample in dataset.samples]

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """The picture in RGB."""
        with Image.open(io.BytesIO(layout.read_bytes(self.dataset.samples[index].image))) as opened:
            return to_rgb(opened)

    def saliency(self, index: int) -> NDArray[np.uint8] | None:
        """Its map, or None."""
        path = self.dataset.samples[index].saliency
        if path is None:
            return None
        return decode_stored(layout.read_bytes(path), str(path).rpartition(".")[2])

    def fingerprint(self) -> str:
        """Hash over stems, sizes and the files' times of change."""
        digest = hashlib.sha256(self.dataset.fingerprint().encode())
        for sample in self.dataset.samples:
            file = sample.image.shard if isinstance(sample.image, layout.Member) else sample.image
            status = file.stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


class ShardPictures:
    """Layout (b) without our index: ``KEY.jpg``, ``KEY.saliency.{png,jpg,npy}``, ``KEY.cls`` in WebDataset ``*.tar``.

    Args:
        folder: holds the shards.
        labels: class by key, instead of the shards' own ``.cls``.

    Raises:
        UserError: no shard, a damaged one, or no image in them.
    """

    def __init__(self, folder: Path, labels: Mapping[str, str] | None = None) -> None:
        shards = sorted(folder.glob("*.tar"))
        if not shards:
            raise UserError(f"--data: {folder} holds no .tar file")
        self._members: list[dict[str, tuple[Path, int, int]]] = []
        self._local = threading.local()
        self.names: list[str] = []
        for shard in shards:
            self._index(shard)
        if not self.names:
            raise UserError(f"--data: {folder} holds no image (KEY.jpg) in its {len(shards)} shards")
        own = [self._text(i, "cls") for i in range(len(self.names))]
        self.labels = own if labels is None else [labels.get(name) for name in self.names]

    def _index(self, shard: Path) -> None:
        samples: dict[str, dict[str, tuple[Path, int, int]]] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if member.isfile():
                        folder, base = os.path.split(member.name)
                        key, _, suffix = base.partition(".")
                        place = (shard, member.offset_data, member.size)
                        samples.setdefault(os.path.join(folder, key), {})[suffix.lower()] = place
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"--data: {shard} cannot be read as a tar file ({error})") from None
        for key, parts in samples.items():
            if any(suffix in parts for suffix in ("jpg", "jpeg", "png")):
                self.names.append(key)
                self._members.append(parts)

    def _bytes(self, index: int, *suffixes: str) -> bytes | None:
        place = next((self._members[index][s] for s in suffixes if s in self._members[index]), None)
        if place is None:
            return None
        shard, offset, size = place
        opened = self._local.__dict__.setdefault("files", {})
        if shard not in opened:
            opened[shard] = open(shard, "rb")  # noqa: SIM115 (kept open, one a thread, for many reads)
        opened[shard].seek(offset)
        return opened[shard].read(size)

    def _text(self, index: int, suffix: str) -> str | None:
        content = self._bytes(index, suffix)
        return None if content is None else content.decode().strip()

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """The picture in RGB."""
        content = self._bytes(index, "jpg", "jpeg", "png")
        assert content is not None
        with self._decoding(index, "image"), Image.open(io.BytesIO(content)) as opened:
            return to_rgb(opened)

    def saliency(self, index: int) -> NDArray[np.uint8] | None:
        """Its map, or None. Arrays may be bytes, booleans, or shares in [0, 1]; (h, w), or with a last axis of one."""
        content = self._bytes(index, "saliency.npy")
        if content is not None:
            with self._decoding(index, "map"):
                return _as_map(np.load(io.BytesIO(content), allow_pickle=False))
        content = self._bytes(index, "saliency.png", "saliency.jpg", "saliency.jpeg")
        if content is None:
            return None
        with self._decoding(index, "map"), Image.open(io.BytesIO(content)) as opened:
            return np.asarray(to_grey(opened))

    @contextlib.contextmanager
    def _decoding(self, index: int, part: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
            shard = next(iter(self._members[index].values()))[0]
            raise UserError(f"{shard}: the {part} of {self.names[index]} cannot be decoded ({error})") from None

    def fingerprint(self) -> str:
        """Hash over keys, places and the shards' times of change."""
        rows = [(name, sorted((s, str(p[0].name), *p[1:]) for s, p in parts.items()))
                for name, parts in zip(self.names, self._members)]  # fmt: skip
        times = sorted({p[0].stat().st_mtime_ns for parts in self._members for p in parts.values()})
        return hashlib.sha256(json.dumps([rows, times]).encode()).hexdigest()


def _as_map(values: NDArray[Any]) -> NDArray[np.uint8]:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim != 2:
        raise ValueError(f"got shape {values.shape}, expected (h, w)")
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_ or (values.dtype.kind == "f" and np.all((values >= 0) & (values <= 1))):
        return np.round(255 * values.astype(np.float32)).astype(np.uint8)
    raise ValueError(f"got {values.dtype}, expected uint8, bool, or floating point in [0, 1]")


class Selection:
    """Some pictures of another dataset, in a given order."""

    def __init__(self, pictures: Pictures, indices: Sequence[int]) -> None:
        self.pictures, self.indices = pictures, list(indices)
        self.names = [pictures.names[i] for i in self.indices]
        self.labels = [pictures.labels[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        """The picture in RGB."""
        return self.pictures.image(self.indices[index])

    def saliency(self, index: int) -> NDArray[np.uint8] | None:
        """Its map, or None."""
        return self.pictures.saliency(self.indices[index])

    def fingerprint(self) -> str:
        """Hash over the whole dataset's and the indices."""
        return hashlib.sha256(json.dumps([self.pictures.fingerprint(), self.indices]).encode()).hexdigest()


def add_dataset_arguments(parser: argparse.ArgumentParser, *, labels: bool) -> None:
    """``--images``, ``--saliency``, ``--data`` and, if asked for, ``--labels``."""
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of images")
    parser.add_argument("--saliency", type=Path, metavar="DIR", help="folder of saliency maps, mirroring --images")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of WebDataset shards, instead of the two")
    if labels:
        parser.add_argument("--labels", type=Path, metavar="CSV", help="file with columns stem,class")


def check_seed(seed: int) -> None:
    """Raises UserError for a ``--seed`` that NumPy's generators refuse."""
    if seed < 0:
        raise UserError(f"--seed: got {seed}, expected at least 0")


def run_folder(path: Path) -> Path:
    """The run that a checkpoint folder (``RUN/checkpoints/step-N``) belongs to, whose files are not to be added to."""
    return path.resolve().parent.parent if (path / checkpoint.MANIFEST).is_file() else path


def output_folder(out: Path | None, first: Path, name: str) -> Path:
    """``--out``, or a folder of that name in the first run folder, or beside the first file."""
    if out is not None:
        return out
    return (run_folder(first) if first.is_dir() else first.parent) / name


def open_output(out: Path | None, first: Path, name: str) -> Path:
    """``output_folder``, made and written to before an hour is spent on results that would have no place.

    Raises:
        UserError: it cannot be made or written to.
    """
    folder = output_folder(out, first, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--out: {write_fault(error, folder)}") from None
    return folder


def open_pictures(
    images: Path | None,
    saliency: Path | None,
    data: Path | None,
    *,
    labels: Path | None = None,
    need_maps: bool = False,
    need_labels: bool = False,
    known: Mapping[str, Any] | None = None,
) -> Pictures:
    """Opens either layout; faulty files are left out with a warning that counts them.

    Args:
        images, saliency: layout (a).
        data: layout (b).
        labels: CSV file ``stem,class``.
        need_maps: leave out pictures without a salient pixel or map.
        need_labels: leave out pictures without a class.
        known: a run's configuration, whose dataset is taken when no folder is named.

    Raises:
        UserError: no dataset is named, both layouts are, a folder or file is faulty, or nothing is left.
    """
    if data is not None and (images is not None or saliency is not None):
        raise UserError("--data and --images/--saliency: expected one dataset, got both layouts")
    if data is None and images is None:
        if known is None or not (known.get("images") or known.get("data")):
            raise UserError(
                "no dataset: expected --images DIR (with --saliency DIR where maps are needed), or --data DIR"
            )
        images, saliency, data = (Path(v) if (v := known.get(n)) else None for n in ("images", "saliency", "data"))
        logger.info("dataset of the run: %s", images or data)
    pictures: Pictures
    on_empty = "skip" if need_maps else "unconstrained"
    if data is not None and (data / shards.MANIFEST).exists():
        packed = shards.scan_shards(data, labels=labels, need_maps=need_maps)
        pictures = FolderPictures(layout.usable(packed, skip_invalid=True, on_empty_saliency=on_empty))
        keep = range(len(pictures))
    elif data is not None:
        pictures = ShardPictures(data, None if labels is None else layout.read_labels(labels))
        keep = range(len(pictures))
        if need_maps:
            keep = [
                i for i in keep if (found := pictures.saliency(i)) is not None and (found > layout.SALIENT_ABOVE).any()
            ]
    else:
        assert images is not None
        if need_maps and saliency is None:
            raise UserError("--saliency is missing: this command measures against saliency maps")
        dataset = layout.scan(images, saliency, labels=labels, progress=sys.stderr.isatty())
        usable = layout.usable(dataset, skip_invalid=True, on_empty_saliency=on_empty)
        pictures = FolderPictures(usable)
        keep = range(len(pictures))
    if need_labels:
        keep = [i for i in keep if pictures.labels[i] is not None]
    if len(keep) == 0:
        wanted = " and ".join(["a class"] * need_labels + ["a map"] * need_maps)
        raise UserError(f"no picture has {wanted}: {len(pictures)} were found")
    if len(keep) < len(pictures):
        logger.warning(
            "%d of %d pictures have no class or no map and are left out", len(pictures) - len(keep), len(pictures)
        )
        return Selection(pictures, keep)
    return pictures


def read_split(labels: Path | None, names: Sequence[str]) -> list[str | None]:
    """Column ``split`` of the labels file for each picture; all None where the file has no such column.

    Raises:
        UserError: a value is neither ``train`` nor ``test`` (or ``val``, which means the same).
    """
    if labels is None:
        return [None] * len(names)
    with labels.open(newline="", encoding="utf-8-sig") as file:
        rows = {row["stem"]: (row.get("split") or "").strip().lower() for row in csv.DictReader(file)}
    split: list[str | None] = []
    for name in names:
        value = rows.get(name, "")
        if value not in ("", "train", "test", "val"):
            raise UserError(f"{labels}: column split holds {value!r} for {name}, expected train, test or val")
        split.append({"": None, "val": "test"}.get(value, value))
    return split


def central_box(width: int, height: int, share: float = CENTRAL_SHARE) -> Box:
    """The central square whose side is ``share`` of the shorter side."""
    side = share * min(width, height)
    top, left = (height - side) / 2 / height, (width - side) / 2 / width
    return top, left, 1 - top, 1 - left


def cut(image: Image.Image, box: Box, size: int) -> Picture:
    """A window of an image, resized to (size, size, 3) with antialiased bilinear filtering."""
    top, left, bottom, right = box
    region = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=region))


def cut_map(saliency: NDArray[np.uint8], box: Box, size: int) -> NDArray[np.bool_]:
    """The same window of a map, binarised first (above 127): True where at least half of a pixel is salient."""
    height, width = saliency.shape
    top, left, bottom, right = box
    binary = Image.fromarray(np.where(saliency > layout.SALIENT_ABOVE, 255, 0).astype(np.uint8))
    region = (left * width, top * height, right * width, bottom * height)
    return np.asarray(binary.resize((size, size), Image.Resampling.BILINEAR, box=region)) > 127


def cell_average(mask: NDArray, grid: tuple[int, int]) -> NDArray[np.float32]:
    """The share of each cell of a grid (rows, columns) that a mask (H, W) covers: an exact area average."""
    height, width = mask.shape
    rows, columns = grid
    area = np.zeros((height + 1, width + 1), np.float64)
    area[1:, 1:] = np.asarray(mask, np.float64).cumsum(0).cumsum(1)
    y, x = np.linspace(0, height, rows + 1), np.linspace(0, width, columns + 1)
    y0, x0 = np.minimum(y.astype(int), height - 1), np.minimum(x.astype(int), width - 1)
    fy, fx = y - y0, x - x0
    along = area[y0] * (1 - fy)[:, None] + area[y0 + 1] * fy[:, None]
    corner = along[:, x0] * (1 - fx) + along[:, x0 + 1] * fx
    cells = corner[1:, 1:] - corner[:-1, 1:] - corner[1:, :-1] + corner[:-1, :-1]
    return (cells / ((height / rows) * (width / columns))).astype(np.float32)


def batches(
    indices: Sequence[int], read: Callable[[int], _T], size: int, *, text: str = "", threads: int = 0
) -> Iterator[tuple[list[int], list[_T]]]:
    """Reads items in threads, a few batches ahead, in order; with a progress bar where a person is watching.

    Args:
        indices: what to read.
        read: turns an index into an item (decoding releases Python's lock).
        size: items a batch; the last may be smaller.
        text: beside the progress bar; no bar without it.
        threads: 0 for the CPUs that this process may use.

    Yields:
        (indices, items) of each batch.
    """
    chunks = [list(indices[i : i + size]) for i in range(0, len(indices), size)]
    workers = threads or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        pending = [[pool.submit(read, i) for i in chunk] for chunk in chunks[:_AHEAD]]
        for number, chunk in enumerate(progress(chunks, text)):
            if number + _AHEAD < len(chunks):
                pending.append([pool.submit(read, i) for i in chunks[number + _AHEAD]])
            yield chunk, [future.result() for future in pending.pop(0)]


def progress(items: Sequence[_T], text: str) -> Iterator[_T]:
    """The items, with a progress bar on stderr, or two lines a minute in the log where stderr is no terminal.

    Args:
        items: what to go through.
        text: what is being done; nothing is shown without it.
    """
    console = Console(stderr=True)
    if text and not console.is_terminal:
        return _logged(items, text)
    return iter(track(items, text, console=console, transient=True, disable=not text))


def _logged(items: Sequence[_T], text: str) -> Iterator[_T]:
    said = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - said >= _LOG_EVERY:
            said = time.monotonic()
            logger.info("%s: %d of %d (%.0f %%)", text, number, len(items), 100 * number / len(items))
        yield item
