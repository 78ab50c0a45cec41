"""The native operator that reads parts of files into DALI's buffers."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cast_kernels import dali_plugin

pytest.importorskip("nvidia.dali")
if (_reason := dali_plugin.unavailable_reason()) is not None:
    pytest.skip(_reason, allow_module_level=True)

NO_DEVICE: Any = None  # DALI's stub asks for an int
SIZES = (5000, 1, 100_000)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"file {number}" for number in range(len(SIZES))]
    for path, size in zip(paths, SIZES):
        path.write_bytes(rng.bytes(size))
    return paths


def read(files: list[Path], places: Any, ahead: Any = None, threads: int = 2) -> list[list[bytes]]:
    """Contents by part and sample; ``places`` (samples, parts, 3)."""
    from nvidia.dali import fn as dali_fn
    from nvidia.dali import pipeline_def

    fn: Any = dali_fn
    places = np.asarray(places, np.int64) if isinstance(places, list) else places
    ahead = places if ahead is None else np.ascontiguousarray(ahead, np.int64)

    @pipeline_def
    def reading() -> Any:
        now, later = fn.external_source(lambda: places, batch=True), fn.external_source(lambda: ahead, batch=True)
        return dali_plugin.read_members(now, later, files=[str(path) for path in files], parts=places.shape[1])

    pipeline = reading(batch_size=len(places), num_threads=threads, device_id=NO_DEVICE, prefetch_queue_depth=1)
    pipeline.build()
    return [[np.array(sample).tobytes() for sample in output] for output in pipeline.run()]


def made_places(count: int, parts: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(count)
    which = rng.integers(0, len(SIZES), (count, parts))
    limits = np.array(SIZES)[which]
    offsets = rng.integers(0, limits)
    return np.stack([which, offsets, 1 + rng.integers(0, limits - offsets)], axis=-1)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_parts_are_what_the_files_hold(files: list[Path], parts: int, threads: int) -> None:
    contents = [path.read_bytes() for path in files]
    places = made_places(40, parts)
    found = read(files, places, made_places(40, parts)[::-1], threads=threads)
    assert len(found) == parts
    for part, column in enumerate(found):
        assert column == [contents[w][at : at + size] for w, at, size in places[:, part].tolist()]


def in_memory(path: Path, offset: int, size: int) -> float:
    """Share of a part's pages that the system holds in its page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        values = np.frombuffer(pages, np.uint8)
        found = np.zeros(-(-len(values) // mmap.PAGESIZE), np.uint8)
        arguments = (values.ctypes.data, len(values), found.ctypes.data)
        assert ctypes.CDLL(None).mincore(*map(ctypes.c_void_p, arguments)) == 0
        del values
    return float((found[offset // mmap.PAGESIZE : -(-(offset + size) // mmap.PAGESIZE)] & 1).mean())


def test_what_will_be_wanted_next_is_read_ahead(tmp_path: Path) -> None:
    path, size = tmp_path / "large", 300_000
    later = [[[0, (10 + i) << 20, size]] for i in range(4)]
    with path.open("wb") as file:
        file.write(np.random.default_rng(0).bytes(16 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(path, 0, 16 << 20) > 0.01:
        pytest.skip("this file system keeps files in memory")
    read([path], [[[0, i << 20, size]] for i in range(4)], later)
    deadline = time.monotonic() + 20
    while min(in_memory(path, place[1], size) for [place] in later) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_will_be_wanted_next_may_fail_later(files: list[Path]) -> None:
    """A part that is read ahead is not missed before its turn."""
    missing = [*files, files[0].with_name("missing")]
    assert read(missing, [[[0, 0, 4]]], [[[3, 0, 4]]]) == [[files[0].read_bytes()[:4]]]
    assert read(files, [[[0, 0, 4]]], [[[0, 10**9, 4]]]) == [[files[0].read_bytes()[:4]]]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([[[0, 0, 5001]]], "file 0 cannot be read: it ends before"),
        ([[[2, 10**6, 1]]], "file 2 cannot be read: it ends before"),
        ([[[3, 0, 1]]], "missing cannot be read: No such file"),
        ([[[4, 0, 1]]], "folder cannot be read: Is a directory"),
        ([[[5, 0, 1]]], "no such file"),
        ([[[-1, 0, 1]]], "no such file"),
        ([[[0, -1, 1]]], "offsets of at least 0"),
        ([[[0, 0, 0]]], "sizes of 1 to"),
        ([[[0, 0, 2**31]]], "sizes of 1 to"),
        ([[[0, 0]]], r"the shape \(parts, 3\)"),
        (np.zeros((1, 1, 3), np.int32), "expected int64"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused(files: list[Path], places: Any, message: str) -> None:
    folder = files[0].with_name("folder")
    folder.mkdir()
    with pytest.raises(RuntimeError, match=message):
        read([*files, files[0].with_name("missing"), folder], places)
