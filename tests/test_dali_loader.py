"""The DALI loader against small float references, on pictures that encode their own coordinates."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from cast_fast.config import PretrainConfig
from cast_fast.data import sampling
from cast_fast.data.batch import Batch
from cast_fast.data.layout import Dataset, Sample
from cast_fast.data.saliency_crop import CropRule, Windows, crop_windows, unconstrained_windows
from cast_fast.errors import UserError
from cast_kernels import dali_plugin

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
from cast_fast.data.dali_loader import Augmentation, DaliLoader, Recipe, Source, cast_pipeline, default_threads

SIZE = 64
GRID = (2, 2)
PLAIN = Augmentation(flip_p=0, grey_p=0, jitter_p=0)
# Sides (height, width): larger and smaller than the crop, landscape and portrait.
SHAPES = [(120, 160), (160, 120), (48, 40), (200, 200), (90, 200), (64, 64), (61, 83), (150, 110)]


def _picture(height: int, width: int) -> NDArray[np.uint8]:
    """Red grows from 0 to 255 along x, green along y, blue alternates in soft waves."""
    y, x = (np.mgrid[:height, :width] + 0.5) / np.array([height, width]).reshape(2, 1, 1)
    blue = 0.5 + 0.4 * np.sin(12 * x) * np.cos(9 * y)
    return np.round(255 * np.stack([x, y, blue], axis=-1)).astype(np.uint8)


def _map(height: int, width: int) -> NDArray[np.uint8]:
    """255 right of 0.3 of the width and below 0.4 of the height."""
    y, x = (np.mgrid[:height, :width] + 0.5) / np.array([height, width]).reshape(2, 1, 1)
    return np.where((x > 0.3) & (y > 0.4), 255, 0).astype(np.uint8)


def _write(
    folder: Path,
    shapes: list[tuple[int, int]],
    *,
    map_scale: float = 1,
    suffix: str = ".png",
    make_map: Callable[[int, int], NDArray[np.uint8]] = _map,
) -> Dataset:
    samples = []
    for number, (height, width) in enumerate(shapes):
        image, saliency = folder / f"{number}{suffix}", folder / f"{number}_map.png"
        Image.fromarray(_picture(height, width)).save(image)
        values = make_map(round(height * map_scale), round(width * map_scale))
        Image.fromarray(values).save(saliency)
        samples.append(Sample(str(number), image, saliency, width, height, not (values > 127).any(), None))
    return Dataset(samples=tuple(samples), faults=(), images=folder, saliency=folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return _write(tmp_path_factory.mktemp("pictures"), SHAPES)


def _loader(dataset: Dataset, **changes) -> DaliLoader:
    arguments = {
        "batch": 4,
        "size": SIZE,
        "cam_grid": GRID,
        "augmentation": PLAIN,
        "rule": CropRule(),
        "constrained": True,
        "attention": True,
        "seed": 5,
        "threads": 2,
        "native": False,
    }
    return DaliLoader(dataset, **(arguments | changes))


@pytest.fixture(params=["dali", "native", pytest.param("cuda", marks=pytest.mark.gpu)])
def path(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Arguments for each way in which batches are made: DALI's operators, ours, and CUDA."""
    if request.param == "cuda":
        request.getfixturevalue("cuda")
        return {"device": "cuda", "native": None}
    if request.param == "native" and (reason := dali_plugin.unavailable_reason()) is not None:
        pytest.skip(reason)
    return {"device": "cpu", "native": request.param == "native"}


def _file(source: object) -> Path:
    assert isinstance(source, Path)
    return source


def _images(view: torch.Tensor) -> NDArray[np.float64]:
    """(N, 3, S, S) -> (N, S, S, 3) float64."""
    return view.cpu().permute(0, 2, 3, 1).double().numpy()


def _tensors(batch: Batch) -> list[torch.Tensor]:
    values = [getattr(batch, name) for name in Batch.__dataclass_fields__]
    return [value for value in values if value is not None]


def _same(first: Batch, second: Batch) -> bool:
    pairs = zip(_tensors(first), _tensors(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _draws(batch: int, step: int = 0) -> sampling.Draws:
    """The random numbers of a step of ``_loader``'s; a position's do not depend on the dataset."""
    return sampling.draw(5, np.arange(step * batch, (step + 1) * batch))


def _windows(dataset: Dataset, batch: Batch, draws: sampling.Draws) -> list[tuple[NDArray[np.uint8], Windows]]:
    """Map and windows of each sample, straight from the crop rule."""
    found = []
    for index, random in zip(batch.index.tolist(), draws.windows):
        values = np.array(Image.open(_file(dataset.samples[index].saliency)))
        found.append((values, crop_windows(values, random, CropRule())))
    return found


def _area_average(binary: NDArray[np.bool_], window: list[int], grid: tuple[int, int]) -> NDArray[np.float64]:
    """Exact share of salient area in each cell of a grid laid over a window of whole pixels."""
    y, x, height, width = window

    def overlaps(pixels: int, cells: int) -> NDArray[np.float64]:
        edges = np.linspace(0, pixels, cells + 1)
        low, high = edges[:-1, None], edges[1:, None]
        first = np.arange(pixels)
        return np.clip(np.minimum(high, first + 1) - np.maximum(low, first), 0, None) / (high - low)

    part = binary[y : y + height, x : x + width].astype(np.float64)
    return overlaps(height, grid[0]) @ part @ overlaps(width, grid[1]).T


def test_batch_keeps_the_contract(dataset: Dataset, path: dict[str, Any]) -> None:
    loader = _loader(dataset, **path)
    batch = next(loader)
    assert len(batch) == 4
    for view in (batch.query, batch.key):
        assert view.shape == (4, 3, SIZE, SIZE)
        assert view.dtype == torch.uint8
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert view.device.type == path["device"]
    assert batch.query_saliency is not None
    assert batch.query_saliency.shape == (4, *GRID)
    assert batch.query_saliency.dtype == torch.float32
    assert batch.query_saliency.device.type == path["device"]
    assert batch.query_saliency.min() >= 0
    assert batch.query_saliency.max() <= 1
    assert batch.key_mask is not None
    assert batch.key_mask.shape == (4, SIZE, SIZE)
    assert batch.key_mask.dtype == torch.uint8
    assert set(batch.key_mask.unique().tolist()) == {0, 1}
    assert batch.weight is not None
    assert batch.weight.tolist() == [1, 1, 1, 1]
    assert batch.weight.device.type == path["device"]
    assert batch.index.dtype == torch.int64
    assert batch.index.tolist() == sampling.GlobalOrder(8, 5, 4).at(0)[0].tolist()
    assert batch.fallback is not None
    assert batch.fallback.shape == (4, 2)
    assert batch.fallback.dtype == torch.bool
    assert batch.fallback.device.type == "cpu"
    assert loader.steps_per_epoch == 2


@pytest.mark.parametrize(("constrained", "attention"), [(False, False), (True, False), (False, True)])
def test_methods_get_what_they_need(dataset: Dataset, constrained: bool, attention: bool, path: dict[str, Any]) -> None:
    batch = next(_loader(dataset, constrained=constrained, attention=attention, **path))
    for value in (batch.query_saliency, batch.key_mask, batch.weight):
        assert (value is not None) == attention
    assert (batch.fallback is not None) == constrained


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": CropRule(0.7, "independent"), "size": 224},
        {"constrained": False},
        {"attention": False, "size": 33},
        {"cam_grid": (3, 5)},
    ],
    ids=str,
)
def test_native_operators_change_nothing_but_roundings(
    dataset: Dataset, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    if (reason := dali_plugin.unavailable_reason()) is not None:
        pytest.skip(reason)
    caplog.set_level(logging.INFO, "cast_fast")
    # Without colours and blur, which may enlarge a difference of 1.
    native, plain = (
        _loader(dataset, batch=8, native=wanted, augmentation=Augmentation(0.5, 0, 0), **changes)
        for wanted in (None, False)
    )
    assert (native.native, plain.native) == (True, False)
    for _ in range(4):
        ours, dalis = next(native), next(plain)
        for view, other in ((ours.query, dalis.query), (ours.key, dalis.key)):
            difference = (view.int() - other.int()).abs()
            assert difference.max() <= 1
            assert (difference > 0).float().mean() < 0.06  # small smooth pictures are full of ties
        assert torch.equal(ours.index, dalis.index)
        if dalis.fallback is not None:
            assert ours.fallback is not None
            assert torch.equal(ours.fallback, dalis.fallback)
        if dalis.weight is not None:
            assert ours.weight is not None and ours.query_saliency is not None and ours.key_mask is not None
            assert dalis.query_saliency is not None and dalis.key_mask is not None
            assert torch.equal(ours.weight, dalis.weight)
            assert (ours.query_saliency - dalis.query_saliency).abs().max() < 0.03
            assert (ours.key_mask != dalis.key_mask).float().mean() < 0.002
    said = [record.getMessage() for record in caplog.records if "crop windows" in record.getMessage()]
    assert said == [
        "crop windows by the native operator, views by native operators too",
        "crop windows by NumPy, views by DALI's own operators, as asked",
    ]


def test_native_colours_are_those_of_dali(dataset: Dataset) -> None:
    if (reason := dali_plugin.unavailable_reason()) is not None:
        pytest.skip(reason)
    augmentation = Augmentation(blur_p=0.5)
    native, plain = (_loader(dataset, batch=8, native=native, augmentation=augmentation) for native in (True, False))
    for _ in range(4):
        ours, dalis = next(native), next(plain)
        for view, other in ((ours.query, dalis.query), (ours.key, dalis.key)):
            difference = (view.int() - other.int()).abs()
            assert difference.max() <= 5
            assert (difference > 0).float().mean() < 0.06  # small smooth pictures are full of ties


def test_a_missing_operator_is_said_once(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dali_plugin, "unavailable_reason", lambda: "it is not built")
    loader = _loader(dataset, native=None)
    loader.seek(3)
    assert not loader.native
    assert len(next(loader)) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "crop windows by NumPy and views by DALI's own operators, which is slower: it is not built"
    ]
    with pytest.raises(UserError, match="it is not built"):
        _loader(dataset, native=True)


def test_moco_opens_no_map(tmp_path: Path) -> None:
    samples = [
        Sample(s.stem, s.image, None, s.width, s.height, False, None) for s in _write(tmp_path, SHAPES[:4]).samples
    ]
    without = Dataset(samples=tuple(samples), faults=(), images=tmp_path, saliency=None)
    assert len(next(_loader(without, constrained=False, attention=False))) == 4
    with pytest.raises(ValueError, match="no saliency map"):
        _loader(without)


def test_order_and_crops_do_not_depend_on_threads(dataset: Dataset) -> None:
    augmentation = Augmentation(blur_p=0.5)
    one, three = (_loader(dataset, augmentation=augmentation, threads=threads) for threads in (1, 3))
    for _ in range(5):
        assert _same(next(one), next(three))


def test_ranks_share_out_the_same_crops(dataset: Dataset) -> None:
    """One process of batch 8, two of 4 and four of 2 deliver the same samples, bit for bit."""
    augmentation = Augmentation(blur_p=0.5)
    whole = _loader(dataset, batch=8, augmentation=augmentation)
    parts = {
        world: [
            _loader(dataset, batch=8 // world, rank=rank, world=world, threads=1, augmentation=augmentation)
            for rank in range(world)
        ]
        for world in (2, 4)
    }
    for _ in range(2):
        expected = next(whole)
        for loaders in parts.values():
            batches = [next(loader) for loader in loaders]
            # A global batch shows no image twice, so that its indices say which sample is which.
            places = torch.argsort(torch.cat([batch.index for batch in batches]))
            wanted = torch.argsort(expected.index)
            for *got, want in zip(*map(_tensors, batches), _tensors(expected)):
                assert torch.equal(torch.cat(got)[places], want[wanted])


def test_any_step_can_be_reached_at_once(dataset: Dataset, path: dict[str, Any]) -> None:
    """Seeking and starting late deliver, bit for bit, what running up to that step delivers; over epochs as well."""
    through = _loader(dataset, augmentation=Augmentation(blur_p=0.5), **path)
    batches = []
    for step in range(7):
        assert through.step == step
        batches.append(next(through))
    assert through.steps_per_epoch == 2
    through.seek(1)
    assert through.step == 1
    for step in (1, 2, 3):
        assert _same(next(through), batches[step])
    late = _loader(dataset, augmentation=Augmentation(blur_p=0.5), **path, start_step=5)
    assert late.step == 5
    assert _same(next(late), batches[5])
    assert late.step == 6
    resumed = _loader(dataset, augmentation=Augmentation(blur_p=0.5), **path)
    resumed.load_state_dict(late.state_dict())
    assert _same(next(resumed), batches[6])
    assert not _same(batches[0], batches[2])


def test_another_run_is_refused(dataset: Dataset) -> None:
    state = _loader(dataset, batch=2).state_dict()
    assert state["step"] == 0
    with pytest.raises(UserError, match="global_batch 2 then, 4 now"):
        _loader(dataset).load_state_dict(state)
    assert {*state} == {"step", "length", "dataset", "global_batch", "seed"}
    loader = _loader(dataset, batch=2)
    for name in ("length", "dataset", "global_batch", "seed"):
        with pytest.raises(UserError, match=f"run: {name} other then"):
            loader.load_state_dict({**state, name: "other"})


def test_a_batch_in_use_is_not_overwritten(dataset: Dataset, path: dict[str, Any]) -> None:
    loader = _loader(dataset, augmentation=Augmentation(blur_p=0.5), **path)
    held = [next(loader) for _ in range(6)]
    copies = [[tensor.clone() for tensor in _tensors(batch)] for batch in held]
    for _ in range(12):
        next(loader)
    loader.close()
    for batch, copy in zip(held, copies):
        assert all(torch.equal(tensor, kept) for tensor, kept in zip(_tensors(batch), copy))


@pytest.mark.gpu
def test_a_batch_may_be_dropped_while_a_kernel_reads_it(dataset: Dataset, cuda: torch.device) -> None:
    """DALI lets go of its memory only after the kernels that were launched before."""
    loader = _loader(dataset, device="cuda")
    want = [tensor.cpu() for tensor in _tensors(next(loader))]
    for _ in range(6):  # the pool grows to what the second pass needs, so that no allocation waits for the device
        next(loader)
    torch.cuda.synchronize(cuda)
    loader.seek(0)
    batch = next(loader)
    torch.cuda._sleep(4_000_000_000)  # cycles: about two seconds, in which six batches are made and dropped
    read = [tensor.clone() for tensor in _tensors(batch)]  # each clone waits for the sleeping kernel
    del batch
    for _ in range(6):
        next(loader)
    torch.cuda.synchronize(cuda)
    assert all(torch.equal(tensor.cpu(), kept) for tensor, kept in zip(read, want, strict=True))


@pytest.mark.gpu
def test_a_batch_is_ready_on_the_stream_that_asks_for_it(dataset: Dataset, cuda: torch.device) -> None:
    """Read at once, by a compiled function as by torch, on a stream that is not the default one, without waiting."""
    loader = _loader(dataset, batch=8, size=224, augmentation=Augmentation(blur_p=0.5), device="cuda")
    want = [[tensor.cpu() for tensor in _tensors(next(loader))] for _ in range(6)]
    loader.seek(0)
    total = torch.compile(lambda view: view.long().sum(), fullgraph=True)
    stream = torch.cuda.Stream(cuda)
    read, sums = [], []
    with torch.cuda.stream(stream):
        for _ in range(6):
            batch = next(loader)
            read.append([tensor.clone() for tensor in _tensors(batch)])
            sums.append(total(batch.query))
    stream.synchronize()
    for copies, kept in zip(read, want, strict=True):
        assert all(torch.equal(copy.cpu(), tensor) for copy, tensor in zip(copies, kept, strict=True))
    assert [int(value) for value in sums] == [int(kept[0].long().sum()) for kept in want]


def test_a_closed_loader_says_so(dataset: Dataset) -> None:
    loader = _loader(dataset)
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)
    loader.seek(1)
    assert loader.step == 1
    assert next(loader).index.tolist() == sampling.GlobalOrder(8, 5, 4).at(1)[0].tolist()


def test_windows_are_those_of_the_crop_rule(dataset: Dataset) -> None:
    """Red and green at the crop's centre tell where in the picture it was taken."""
    loader = _loader(dataset)
    for step in range(4):
        batch = next(loader)
        draws = _draws(4, step)
        for place, (saliency, windows) in enumerate(_windows(dataset, batch, draws)):
            height, width = saliency.shape
            assert batch.fallback is not None
            assert batch.fallback[place].tolist() == windows.fallback.tolist()
            for view, (y, x, h, w) in zip((batch.query, batch.key), (windows.query.tolist(), windows.key.tolist())):
                centre = _images(view)[place, SIZE // 2 - 1 : SIZE // 2 + 1, SIZE // 2 - 1 : SIZE // 2 + 1].mean((0, 1))
                assert centre[0] == pytest.approx(255 * (x + w / 2) / width, abs=1.5)
                assert centre[1] == pytest.approx(255 * (y + h / 2) / height, abs=1.5)


def test_unconstrained_windows_lie_on_the_image(dataset: Dataset) -> None:
    batch = next(_loader(dataset, constrained=False))
    draws = _draws(4)
    for place, index in enumerate(batch.index.tolist()):
        sample = dataset.samples[index]
        windows = unconstrained_windows(sample.height, sample.width, draws.windows[place])
        y, x, h, w = windows.query.tolist()
        middle = _images(batch.query)[place, SIZE // 2 - 1 : SIZE // 2 + 1, SIZE // 2 - 1 : SIZE // 2 + 1].mean((0, 1))
        assert middle[0] == pytest.approx(255 * (x + w / 2) / sample.width, abs=1.5)
        assert middle[1] == pytest.approx(255 * (y + h / 2) / sample.height, abs=1.5)


@pytest.mark.parametrize("flip_p", [0, 1])
@pytest.mark.parametrize("map_scale", [1, 0.5])
def test_image_and_map_stay_together(tmp_path: Path, flip_p: float, map_scale: float, path: dict[str, Any]) -> None:
    """What the map says of a pixel follows from the pixel's own colour, in both views, mirrored or not."""
    dataset = _write(tmp_path, SHAPES, map_scale=map_scale)
    batch = next(_loader(dataset, batch=8, augmentation=Augmentation(flip_p, 0, 0), **path))
    query, key = _images(batch.query) / 255, _images(batch.key) / 255
    # Without a flip red grows to the right.
    assert ((query[:, :, -1, 0] > query[:, :, 0, 0]) == (flip_p == 0)).all()
    assert batch.key_mask is not None
    assert batch.query_saliency is not None
    # A pixel of the smallest map is 1/20 of its width; nearer than half of one to the edge the two may disagree.
    unsure = (np.abs(key[..., 0] - 0.3) < 0.03) | (np.abs(key[..., 1] - 0.4) < 0.03)
    expected = (key[..., 0] > 0.3) & (key[..., 1] > 0.4)
    assert (batch.key_mask.cpu().numpy() == expected)[~unsure].all()
    salient = (query[..., 0] > 0.3) & (query[..., 1] > 0.4)
    cell = SIZE // GRID[0]
    from_colours = salient.reshape(8, GRID[0], cell, GRID[1], cell).mean((2, 4))
    assert np.abs(batch.query_saliency.cpu().numpy() - from_colours).max() < 0.06


@pytest.mark.parametrize("grid", [(2, 2), (7, 7), (3, 5)], ids=str)
def test_query_saliency_is_the_area_average(tmp_path: Path, grid: tuple[int, int], path: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)

    def blobs(height: int, width: int) -> NDArray[np.uint8]:
        centres, radii = rng.random((6, 2)), rng.uniform(0.05, 0.3, 6)
        y, x = np.mgrid[:height, :width]
        inside = [
            np.hypot(y / height - cy, x / width - cx) < radius for (cy, cx), radius in zip(centres, radii, strict=True)
        ]
        return np.where(np.any(inside, axis=0), rng.integers(128, 256), rng.integers(0, 128)).astype(np.uint8)

    dataset = _write(tmp_path, [(480, 640), (375, 500), (640, 427), (200, 300)] * 2, make_map=blobs)
    loader = _loader(dataset, batch=8, cam_grid=grid, **path)
    batch = next(loader)
    assert batch.query_saliency is not None
    for place, (saliency, windows) in enumerate(_windows(dataset, batch, _draws(8))):
        exact = _area_average(saliency > 127, windows.query.tolist(), grid)
        error = np.abs(batch.query_saliency[place].cpu().numpy() - exact)
        if path["native"] and path["device"] == "cpu":
            assert error.max() < 1e-5  # no sampling
        assert error.max() < 0.02
        assert error.mean() < 0.003


def test_resize_is_antialiased(dataset: Dataset, path: dict[str, Any]) -> None:
    """Against torch's antialiased resize of the cut-out; DALI sees beyond the window's edge, torch does not."""
    batch = next(_loader(dataset, batch=8, size=32, **path))
    assert batch.key_mask is not None
    for place, (saliency, windows) in enumerate(_windows(dataset, batch, _draws(8))):
        image = np.array(Image.open(_file(dataset.samples[int(batch.index[place])].image)))
        for view, window in zip((batch.query, batch.key), (windows.query, windows.key)):
            error = (view[place].cpu().float() - _resized(image, window, 32)).abs()
            assert error[:, 2:-2, 2:-2].max() <= 1.0
        share = _resized((saliency > 127)[..., None].astype(np.uint8), windows.key, 32)[0]
        wrong = batch.key_mask[place].cpu() != (share > 0.5)
        assert not (wrong & ((share - 0.5).abs() > 0.02))[2:-2, 2:-2].any()


def _resized(image: NDArray[np.uint8], window: NDArray[np.int32], size: int) -> torch.Tensor:
    """(H, W, C) uint8 -> (C, size, size) float32 of the window."""
    y, x, h, w = window.tolist()
    part = torch.from_numpy(image[y : y + h, x : x + w]).permute(2, 0, 1)[None].float()
    return torch.nn.functional.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]


def test_a_downscaled_chessboard_turns_grey(tmp_path: Path, path: dict[str, Any]) -> None:
    board = np.indices((256, 256)).sum(0) % 2 * 255
    Image.fromarray(np.repeat(board[..., None], 3, -1).astype(np.uint8)).save(tmp_path / "board.png")
    sample = Sample("board", tmp_path / "board.png", None, 256, 256, False, None)
    loader = _loader(
        Dataset(samples=(sample,), faults=(), images=tmp_path, saliency=None),
        batch=1, size=16, constrained=False, attention=False, **path,
    )  # fmt: skip
    assert (_images(next(loader).query) - 127.5).__abs__().max() < 16


def _twisted(view: NDArray[np.float64], brightness: float, contrast: float, saturation: float, hue: float) -> NDArray:
    """The colour change of the module's text in float64, clamped but not rounded."""
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    angle = math.radians(hue)
    turn = saturation * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    chroma = np.eye(3)
    chroma[1:, 1:] = turn
    pixels = view @ (np.linalg.inv(to_yiq) @ chroma @ to_yiq).T
    return np.clip(brightness * (contrast * (pixels - 128) + 128), 0, 255)


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(flip_p=0, jitter_p=0.5, grey_p=0.3),
        Augmentation(flip_p=0, jitter_p=1, grey_p=0, contrast=0, saturation=0, hue=0),
        Augmentation(flip_p=0, jitter_p=1, grey_p=0, brightness=0, saturation=0, hue=0),
        Augmentation(flip_p=0, jitter_p=1, grey_p=0, brightness=0, contrast=0, hue=0),
        Augmentation(flip_p=0, jitter_p=1, grey_p=0, brightness=0, contrast=0, saturation=0, hue=0.5),
        Augmentation(flip_p=0, jitter_p=0, grey_p=1),
    ],
    ids=["mixed", "brightness", "contrast", "saturation", "hue", "grey"],
)
def test_colours_follow_the_reference(dataset: Dataset, augmentation: Augmentation, path: dict[str, Any]) -> None:
    plain = next(_loader(dataset, batch=8, **path))
    batch = next(_loader(dataset, batch=8, augmentation=augmentation, **path))
    parameters = augmentation.parameters(_draws(8).augment, SIZE)
    changed = 0
    for column, (before, after) in enumerate(((plain.query, batch.query), (plain.key, batch.key))):
        for place in range(8):
            values = [float(field[place, column]) for field in parameters[1:5]]
            source, result = _images(before)[place], _images(after)[place]
            if values == [1, 1, 1, 0]:
                assert np.array_equal(result, source)
                continue
            changed += 1
            # Half a grey level for the one rounding at the end, and the last bits of single precision.
            assert np.abs(result - _twisted(source, *values)).max() < 0.51
            if values[2] == 0:
                assert (result.max(-1) - result.min(-1)).max() <= 1
    assert changed > 0


def test_blur_follows_the_reference(dataset: Dataset, path: dict[str, Any]) -> None:
    augmentation = Augmentation(0, 0, 0, blur_p=0.6, blur_sigma_min=1, blur_sigma_max=6)
    plain = next(_loader(dataset, batch=8, **path))
    batch = next(_loader(dataset, batch=8, augmentation=augmentation, **path))
    sigmas = augmentation.parameters(_draws(8).augment, SIZE).blur_sigma
    assert (sigmas == 0).any()
    assert (sigmas > 1).any()
    for column, (before, after) in enumerate(((plain.query, batch.query), (plain.key, batch.key))):
        for place in range(8):
            sigma = float(sigmas[place, column])
            expected = before[place].cpu().float()
            if sigma:
                radius = math.ceil(3 * sigma)
                kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma).square())
                kernel = kernel / kernel.sum()
                padded = torch.nn.functional.pad(expected[None], (radius,) * 4, mode="reflect")[0]
                rows = torch.nn.functional.conv2d(padded[:, None], kernel[None, None, :, None])
                expected = torch.nn.functional.conv2d(rows, kernel[None, None, None, :])[:, 0]
            assert (after[place].cpu().float() - expected).abs().max() <= (1 if sigma else 0)


def test_flips_follow_their_probability(dataset: Dataset) -> None:
    batch = next(_loader(dataset, batch=8, augmentation=Augmentation(0.5, 0, 0)))
    mirrored = Augmentation(0.5, 0, 0).parameters(_draws(8).augment, SIZE).mirrored
    plain = next(_loader(dataset, batch=8))
    assert 0 < mirrored.sum() < 16
    for column, (view, other) in enumerate(((batch.query, plain.query), (batch.key, plain.key))):
        for place in range(8):
            expected = other[place].flip(-1) if mirrored[place, column] else other[place]
            assert (view[place].int() - expected.int()).abs().max() <= 1


@given(
    brightness=st.floats(0, 2), hue=st.floats(0, 0.5), jitter_p=st.floats(0, 1), grey_p=st.floats(0, 1),
    blur_p=st.floats(0, 1), size=st.integers(16, 448),
)  # fmt: skip
def test_parameters_stay_in_their_ranges(
    brightness: float, hue: float, jitter_p: float, grey_p: float, blur_p: float, size: int
) -> None:
    augmentation = Augmentation(
        0.5, grey_p, jitter_p, brightness=brightness, hue=hue, blur_p=blur_p, blur_sigma_min=0.5, blur_sigma_max=2
    )
    uniform = sampling.draw(0, np.arange(200)).augment
    views = augmentation.parameters(uniform, size)
    assert views.brightness.min() >= np.float32(max(0, 1 - brightness))
    assert views.brightness.max() <= np.float32(1 + brightness)
    assert np.abs(views.hue).max() <= np.float32(360 * hue)
    untouched = (views.brightness == 1) & (views.contrast == 1) & (views.hue == 0)
    assert untouched[uniform[..., 1] >= jitter_p].all()
    assert np.array_equal(views.changes_colour, ~(untouched & (views.saturation == 1)))
    assert (views.saturation[uniform[..., 6] < grey_p] == 0).all()
    blurred = views.blur_sigma > 0
    assert np.array_equal(blurred, uniform[..., 7] < blur_p)
    scale = size / 224
    if blurred.any():
        assert views.blur_sigma[blurred].min() >= np.float32(0.5 * scale)
        assert views.blur_sigma.max() <= np.float32(2 * scale)


@pytest.mark.parametrize(
    "changes", [{"flip_p": -0.1}, {"blur_p": 1.5}, {"hue": 0.6}, {"contrast": -1}, {"blur_sigma_min": 3.0}], ids=str
)
def test_augmentation_refuses_nonsense(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Augmentation(**changes)


def test_augmentation_comes_from_the_configuration(tmp_path: Path) -> None:
    config = PretrainConfig(images=tmp_path, saliency=tmp_path, out=tmp_path, steps=1, blur_p=0.25, hue=0.125)
    augmentation = Augmentation.from_config(config)
    assert (augmentation.blur_p, augmentation.hue) == (0.25, 0.125)
    assert augmentation.flip_p == config.flip_p


def test_empty_maps_have_no_weight(tmp_path: Path, path: dict[str, Any]) -> None:
    _write(tmp_path, SHAPES[:4])
    empty = _write(tmp_path, SHAPES[:2], make_map=lambda height, width: np.zeros((height, width), np.uint8))
    full = _write(tmp_path, SHAPES[:4]).samples[2:]
    for sample in empty.samples:
        Image.fromarray(np.full((sample.height, sample.width), 127, np.uint8)).save(_file(sample.saliency))
    dataset = Dataset(samples=(*empty.samples, *full), faults=(), images=tmp_path, saliency=tmp_path)
    loader = _loader(dataset, **path)
    batch = next(loader)
    draws = _draws(4)
    assert batch.weight is not None
    assert batch.key_mask is not None
    for place, index in enumerate(batch.index.tolist()):
        assert float(batch.weight[place]) == (index >= 2)
        assert bool(batch.key_mask[place].any()) == (index >= 2)
        if index < 2:
            sample = dataset.samples[index]
            y, x, h, w = unconstrained_windows(sample.height, sample.width, draws.windows[place]).key.tolist()
            middle = _images(batch.key)[place, SIZE // 2 - 1 : SIZE // 2 + 1, SIZE // 2 - 1 : SIZE // 2 + 1]
            assert middle[..., 0].mean() == pytest.approx(255 * (x + w / 2) / sample.width, abs=1.5)
            assert middle[..., 1].mean() == pytest.approx(255 * (y + h / 2) / sample.height, abs=1.5)


def test_exif_turns_nothing(tmp_path: Path) -> None:
    """Maps carry no EXIF, so an image whose EXIF asks for a quarter turn is read as it is stored."""
    dataset = _write(tmp_path, [(120, 160)], suffix=".jpg")
    path = _file(dataset.samples[0].image)
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6
    before = next(_loader(dataset, batch=1))
    image.save(path, exif=exif, quality=95)
    after = next(_loader(dataset, batch=1))
    assert (before.query.int() - after.query.int()).abs().float().mean() < 4


def _break(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"text": b"no picture at all\n" * 20, "truncated": whole[: len(whole) // 2], "empty": b""}[how]
        )


@pytest.fixture
def copied(dataset: Dataset, tmp_path: Path) -> Dataset:
    shutil.copytree(dataset.images, tmp_path / "copy")
    samples = [
        dataclasses.replace(
            sample,
            image=tmp_path / "copy" / _file(sample.image).name,
            saliency=tmp_path / "copy" / f"{sample.stem}_map.png",
        )
        for sample in dataset.samples
    ]
    return Dataset(samples=tuple(samples), faults=(), images=tmp_path / "copy", saliency=tmp_path / "copy")


@pytest.mark.parametrize("how", ["text", "truncated", "empty", "missing"])
@pytest.mark.parametrize("which", ["image", "saliency"])
def test_a_broken_file_is_named(copied: Dataset, how: str, which: str, path: dict[str, Any]) -> None:
    broken = _file(getattr(copied.samples[3], which))
    _break(broken, how)
    loader = _loader(copied, **path)
    with pytest.raises(UserError, match=f"{broken.name}.*1 of 8 samples") as caught:
        [next(loader) for _ in range(2)]
    assert "\n" not in str(caught.value)


def test_broken_files_are_replaced(copied: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    """Each is named once; the run goes on with stand-ins that are the same in every run, resumed or not."""
    caplog.set_level(logging.WARNING, "cast_fast")
    plain = [batch.index.tolist() for batch, _ in zip(_loader(copied), range(6))]
    for number in (1, 6):
        _break(_file(copied.samples[number].image), "text")
    loader = _loader(copied, max_broken_share=0.25)
    batches = [next(loader) for _ in range(6)]
    assert set(loader.broken) == {1, 6}
    assert loader.step == 6
    messages = [record.getMessage() for record in caplog.records]
    for number in (1, 6):
        assert sum(_file(copied.samples[number].image).name in message for message in messages) == 1
    for before, batch in zip(plain, batches):
        for was, now in zip(before, batch.index.tolist()):
            assert now not in (1, 6)
            assert was in (1, 6) or was == now
    late = _loader(copied, max_broken_share=0.25, start_step=3)
    for batch in batches[3:]:
        assert _same(next(late), batch)


def test_stand_ins_do_not_depend_on_the_number_of_ranks(copied: Dataset) -> None:
    """A stand-in belongs to a position of the run: two processes show, in turns, what one shows."""
    for number in (1, 6):
        _break(_file(copied.samples[number].image), "text")
    whole = _loader(copied, batch=8, max_broken_share=0.25)
    parts = [_loader(copied, batch=4, rank=rank, world=2, max_broken_share=0.25) for rank in range(2)]
    for _ in range(3):
        expected = next(whole)
        batches = [next(loader) for loader in parts]
        for *got, want in zip(*map(_tensors, batches), _tensors(expected)):
            assert torch.equal(torch.stack(got, dim=1).flatten(0, 1), want)


def test_a_dataset_of_broken_files_ends(copied: Dataset) -> None:
    for sample in copied.samples:
        _break(_file(sample.image), "text")
    with pytest.raises(UserError, match="no intact stand-in"):
        next(_loader(copied, max_broken_share=1))


def test_a_failure_without_a_culprit_stays_an_error(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no single file explains (memory, a bug) is not a user's error and not retried."""

    def fail(*_: object) -> None:
        raise RuntimeError("the crop rule broke")

    monkeypatch.setattr("cast_fast.data.dali_loader.crop_windows", fail)
    with pytest.raises(RuntimeError, match="the crop rule broke"):
        next(_loader(dataset))


@pytest.mark.parametrize(
    "changes", [{"device": "tpu"}, {"size": 0}, {"cam_grid": (0, 7)}, {"threads": -1}, {"start_step": -1}], ids=str
)
def test_loader_refuses_nonsense(dataset: Dataset, changes: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        _loader(dataset, **changes)


@pytest.mark.parametrize(
    ("ranks", "own", "threads"),
    [(None, 64, 64), ("1", 64, 64), ("8", 64, 8), ("8", 16, 16), ("100", 64, 1), ("0", 64, 64), ("many", 64, 64)],
)
def test_ranks_of_a_machine_share_its_cores(
    dataset: Dataset, ranks: str | None, own: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 16 of 64 cores a rank has been given its own."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(own)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert default_threads() == threads
    assert _loader(dataset, threads=0)._threads == threads
    assert _loader(dataset, threads=3)._threads == 3


def test_a_batch_beyond_the_dataset_is_refused(dataset: Dataset) -> None:
    with pytest.raises(UserError, match="--batch: got 9"):
        _loader(dataset, batch=9)


_SCRIPT = """
import resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import test_dali_loader as t
folder = Path(sys.argv[1])
if SHARDS:
    from cast_fast.data import prepare, shards, synthetic
    synthetic.write_dataset(folder, 8, 0, size=(160, 120), workers=1)
    prepare.prepare(folder / "images", folder / "saliency", folder / "shards", rule=prepare.PackRule(), workers=1)
    dataset = shards.scan_shards(folder / "shards")
else:
    dataset = t._write(folder, t.SHAPES)
loader = t._loader(dataset, batch=8, size=96, augmentation=t.Augmentation(blur_p=0.5), native=NATIVE)
peaks = []
for epochs in (10, 50):
    for _ in range(epochs * loader.steps_per_epoch):
        next(loader)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print("growth", peaks[1] - peaks[0])
"""


@pytest.fixture(scope="module", params=[(False, False), (True, False), (True, True)], ids=["dali", "native", "shards"])
def process(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> subprocess.CompletedProcess[str]:
    """A Python of its own that loads 60 epochs and ends with the loader open."""
    native, packed = request.param
    if native and (reason := dali_plugin.unavailable_reason()) is not None:
        pytest.skip(reason)
    root = Path(__file__).parent
    arguments = [tmp_path_factory.mktemp("process"), root, root.parent, root.parent / "kernels"]
    script = _SCRIPT.replace("NATIVE", str(native)).replace("SHARDS", str(packed))
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_memory_stays_flat(process: subprocess.CompletedProcess[str]) -> None:
    """Peak memory in KiB after epoch 60 against epoch 10; a leak of one batch's outputs would add 25 MiB."""
    assert process.stdout.startswith("growth "), process.stderr
    assert int(process.stdout.split()[1]) < 5 * 1024


def test_python_ends_with_steps_in_flight(process: subprocess.CompletedProcess[str]) -> None:
    """Prefetched steps call the crop rule from DALI's threads while the interpreter stops."""
    assert process.returncode == 0, process.stderr


_LEFTOVERS = """
import os, sys, tempfile
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import test_dali_loader as t
from cast_fast.data.dali_loader import GENERATED
dataset = t._write(Path(sys.argv[1]), t.SHAPES)
t._loader(dataset, augmentation=t.Augmentation(), native=None)
print(sum(name.startswith(GENERATED) for name in sys.modules))
loader = t._loader(dataset, augmentation=t.Augmentation(blur_p=0.5), native=False)
next(loader)
print(sum(name.startswith(GENERATED) for name in sys.modules), os.listdir(tempfile.gettempdir()), flush=True)
os._exit(0)
"""


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path) -> None:
    """DALI writes files for conditionals, which it deletes at a regular end alone; worker processes have none."""
    root = Path(__file__).parent
    folder = tmp_path / "tmp"
    folder.mkdir()
    command = [sys.executable, "-c", _LEFTOVERS, tmp_path, root, root.parent, root.parent / "kernels"]
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    without, used = done.stdout.splitlines()
    if dali_plugin.unavailable_reason() is None:
        assert without == "0"
    assert used.split()[0] != "0"  # else DALI has changed its ways, and what deletes the files can go
    assert used.split(maxsplit=1)[1] == "[]"


@pytest.mark.parametrize(("constrained", "attention"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("native", [False, True])
def test_the_graph_for_cuda_can_be_built_without_a_device(
    dataset: Dataset, native: bool, constrained: bool, attention: bool
) -> None:
    """Nothing runs; but a graph that mixes up devices, inputs or operators does not get this far."""
    if native and (reason := dali_plugin.unavailable_reason()) is not None:
        pytest.skip(reason)
    recipe = Recipe(SIZE, GRID, CropRule(), constrained, attention, colour=True, blur=True, cuda=True, native=native)
    assert not recipe.native_views
    source = Source(dataset, sampling.GlobalOrder(8, 5, 4), Augmentation(blur_p=0.5), recipe, ())
    assert len(source(0)) == len(recipe.inputs())
    pipeline = cast_pipeline(source, recipe, batch_size=4, num_threads=1, device_id=0)
    pipeline._build_graph()
    assert pipeline._graph_outputs is not None
    devices = [node.device for node in pipeline._graph_outputs]
    assert devices == ["gpu"] * (5 if attention else 2) + ["cpu"] * constrained


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(dataset: Dataset, cuda: torch.device) -> None:
    """The same windows and colours; decoders and resizers of the two devices round differently."""
    del cuda
    augmentation = Augmentation(blur_p=0.5)
    on_cpu = next(_loader(dataset, batch=8, augmentation=augmentation))
    on_cuda = next(_loader(dataset, batch=8, augmentation=augmentation, device="cuda"))
    assert on_cpu.index.tolist() == on_cuda.index.tolist()
    for first, second in ((on_cpu.query, on_cuda.query), (on_cpu.key, on_cuda.key)):
        difference = (first.int() - second.cpu().int()).abs().float()
        assert difference.mean() < 1
    assert on_cpu.query_saliency is not None
    assert on_cuda.query_saliency is not None
    assert (on_cpu.query_saliency - on_cuda.query_saliency.cpu()).abs().max() < 0.01
    assert on_cpu.key_mask is not None
    assert on_cuda.key_mask is not None
    assert (on_cpu.key_mask != on_cuda.key_mask.cpu()).float().mean() < 0.01
