"""The native operators that make views and targets, against their definition in float64."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cast_kernels import dali_plugin

pytest.importorskip("nvidia.dali")
if (_reason := dali_plugin.unavailable_reason()) is not None:
    pytest.skip(_reason, allow_module_level=True)

CSRC = Path(__file__).resolve().parents[1] / "kernels" / "csrc"
NO_DEVICE: Any = None  # DALI's stub asks for an int
IDENTITY = np.eye(3, 4, dtype=np.float32)
# Height, width and side: far smaller, about as large as and larger than the view, down to single pixels and lines.
SHAPES = [(480, 640, 224), (64, 48, 64), (31, 45, 100), (1, 1, 16), (1, 300, 20), (300, 1, 7), (700, 530, 1), (9, 7, 5)]


class Case:
    """A random picture with two windows of it, mirrored or not, and colour changes."""

    def __init__(self, height: int, width: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        blobs = rng.random((1 + height // 8, 1 + width // 8)).repeat(8, 0).repeat(8, 1)[:height, :width]
        self.map = np.where(blobs > 0.5, rng.integers(128, 256), rng.integers(0, 128)).astype(np.uint8)[..., None]
        corners = np.sort(rng.random((2, 2, 2)), axis=1)  # of each view: (y, x) near and far
        corners[0, 1] = np.maximum(corners[0, 1], corners[0, 0] + 1e-3)
        corners[0, 0] = np.minimum(corners[0, 0], corners[0, 1] - 1e-3)
        if seed % 3 == 0:
            corners[1] = [[0, 0], [1, 1]]  # the whole picture: taps beyond its edges
        self.windows = np.clip(corners.reshape(2, 4), 0, 1).astype(np.float32)
        self.mirrors = np.zeros((2, 2), np.float32)
        self.mirrors[:, 1] = rng.random(2) < 0.5
        self.colours = np.stack([IDENTITY, rng.normal(0, 0.5, (3, 4)) * [1, 1, 1, 100]]).astype(np.float32)

    def pixels(self, view: int, length: int, axis: int) -> tuple[float, float]:
        """Where the view's window begins and ends along an axis of ``length`` pixels."""
        return float(self.windows[view, axis]) * length, float(self.windows[view, 2 + axis]) * length


def triangle(low: float, high: float, length: int, size: int) -> NDArray[np.float64]:
    """(size, length): weights of the pixels of an axis, those beyond its ends counted for the last ones."""
    scale = (high - low) / size
    radius = max(scale, 1.0)
    centres = low + (np.arange(size) + 0.5) * scale
    reach = int(np.ceil(radius)) + 1
    positions = np.arange(-reach, length + reach)
    weights = np.clip(1 - np.abs(positions + 0.5 - centres[:, None]) / radius, 0, None)
    folded = np.zeros((size, length))
    np.add.at(folded.T, np.clip(positions, 0, length - 1), weights.T)
    return folded / folded.sum(1, keepdims=True)


def area(low: float, high: float, length: int, size: int) -> NDArray[np.float64]:
    """(size, length): share of each cell that lies in each pixel."""
    edges = np.linspace(low, high, size + 1)
    first = np.arange(length)
    covered = np.minimum(edges[1:, None], first + 1) - np.maximum(edges[:-1, None], first)
    return np.clip(covered, 0, None) / ((high - low) / size)


def applied(rows: NDArray[np.float64], pixels: NDArray, columns: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.einsum("yh,hwc,xw->yxc", rows, pixels.astype(np.float64), columns, optimize=True)


def resized(case: Case, pixels: NDArray, view: int, size: int) -> NDArray[np.float64]:
    height, width = pixels.shape[:2]
    down = triangle(*case.pixels(view, height, 0), height, size)
    across = triangle(*case.pixels(view, width, 1), width, size)
    made = applied(down, pixels, across)
    return made[:, ::-1] if case.mirrors[view, 1] else made


def run(operator: Any, *inputs: Sequence[NDArray], threads: int = 2, **arguments: Any) -> list[list[NDArray]]:
    """Outputs of an operator on a batch: a list of samples each."""
    from nvidia.dali import fn, pipeline_def

    def fed(values: Sequence[NDArray]) -> Any:
        return fn.external_source(lambda: list(values), batch=True)

    @pipeline_def(batch_size=len(inputs[0]), num_threads=threads, device_id=NO_DEVICE, prefetch_queue_depth=1)
    def pipeline() -> Any:
        feeds = [fed(values) for values in inputs]
        return operator(*feeds, **arguments)

    built = pipeline()
    built.build()
    return [[np.array(sample) for sample in output] for output in built.run()]


@pytest.mark.parametrize(("height", "width", "size"), SHAPES)
def test_views_follow_their_definition(height: int, width: int, size: int) -> None:
    cases = [Case(height, width, seed) for seed in range(12)]
    feeds = [[getattr(case, name) for case in cases] for name in ("image", "windows", "mirrors")]
    plain = run(dali_plugin.crop_views, *feeds, size=size)
    coloured = run(dali_plugin.crop_views, *feeds, [case.colours for case in cases], size=size)
    for place, case in enumerate(cases):
        for view in (0, 1):
            made = plain[view][place]
            assert made.shape == (size, size, 3)
            # Half a level for the rounding, and the last bits of single precision.
            assert np.abs(made - resized(case, case.image, view, size)).max() < 0.501
            matrix = case.colours[view].astype(np.float64)
            wanted = np.clip(made @ matrix[:, :3].T + matrix[:, 3], 0, 255)
            assert np.abs(coloured[view][place] - wanted).max() < 0.501
        assert np.array_equal(coloured[0][place], plain[0][place])  # whose colours are left alone


@pytest.mark.parametrize("grid", [(7, 7), (1, 1), (3, 20)], ids=str)
@pytest.mark.parametrize(("height", "width", "size"), SHAPES)
def test_targets_follow_their_definition(height: int, width: int, size: int, grid: tuple[int, int]) -> None:
    cases = [Case(height, width, seed) for seed in range(12)]
    feeds = [[getattr(case, name) for case in cases] for name in ("map", "windows", "mirrors")]
    shares, masks = run(dali_plugin.saliency_targets, *feeds, size=size, grid=grid)
    sure = 0
    for share, mask, case in zip(shares, masks, cases, strict=True):
        salient = case.map > 127
        rows = area(*case.pixels(0, height, 0), height, grid[0])
        columns = area(*case.pixels(0, width, 1), width, grid[1])
        wanted = applied(rows, salient, columns)[..., 0]
        if case.mirrors[0, 1]:
            wanted = wanted[:, ::-1]
        assert share.dtype == np.float32
        assert share.shape == grid
        assert np.abs(share - wanted).max() < 1e-4
        assert 0 <= share.min() <= share.max() <= 1
        exact = resized(case, salient, 1, size)
        assert mask.shape == (size, size, 1)
        clear = np.abs(exact - 0.5) > 1e-5
        assert np.array_equal(mask[clear], exact[clear] > 0.5)
        sure += clear.sum()
    assert sure > 0.9 * len(cases) * size * size


def test_threads_change_nothing() -> None:
    cases = [Case(*shape[:2], seed) for seed, shape in enumerate(SHAPES)]
    images = [[getattr(case, name) for case in cases] for name in ("image", "windows", "mirrors", "colours")]
    maps = [[getattr(case, name) for case in cases] for name in ("map", "windows", "mirrors")]
    for operator, feeds, arguments in (
        (dali_plugin.crop_views, images, {"size": 50}),
        (dali_plugin.saliency_targets, maps, {"size": 50, "grid": (7, 7)}),
    ):
        one, three = (run(operator, *feeds, threads=threads, **arguments) for threads in (1, 3))
        for first, second in zip(one, three, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


_LANES = r"""
#include "crop_views.h"
#include <cstdio>
#include <random>

using namespace cast_fast;

int main() {
  std::mt19937 random(7);
  auto uniform = [&](int low, int high) { return low + static_cast<int>(random() % (high - low + 1)); };
  for (int round = 0; round < 400; round++) {
    const int height = uniform(1, round % 2 ? 9 : 70), width = uniform(1, round % 3 ? 90 : 7), size = uniform(1, 41);
    // exactly as large as the picture, so that a sanitizer sees what is read or written beside it
    std::vector<uint8_t> image(3 * height * width), map(height * width);
    for (auto &value : image) value = static_cast<uint8_t>(random());
    for (auto &value : map) value = static_cast<uint8_t>(random());
    float corners[4] = {uniform(0, 90) / 100.f, uniform(0, 90) / 100.f};
    corners[2] = corners[0] + uniform(1, 100 - static_cast<int>(100 * corners[0])) / 100.f;
    corners[3] = corners[1] + uniform(1, 100 - static_cast<int>(100 * corners[1])) / 100.f;
    const Span window = Scaled(corners, height, width);
    float colour[kColourNumbers];
    for (auto &value : colour) value = uniform(-150, 150) / 100.f;
    const Taps down = TriangleTaps(window.y0, window.y1, height, size);
    const Taps across = TriangleTaps(window.x0, window.x1, width, size);
    const int rows = uniform(1, 11), columns = uniform(1, 11);
    const Taps cells_down = AreaTaps(window.y0, window.y1, height, rows);
    const Taps cells_across = AreaTaps(window.x0, window.x1, width, columns);
    std::vector<uint8_t> view[2], mask[2];
    std::vector<float> share[2];
    for (int wide = 0; wide < 2; wide++) {
      view[wide].resize(3 * size * size);
      mask[wide].resize(size * size);
      share[wide].resize(rows * columns);
      const float *colours = round % 5 ? colour : nullptr;
      auto *view_rows = wide ? detail::ViewRowsHere : detail::ViewRows<4>;
      auto *mask_rows = wide ? detail::MaskRowsHere : detail::MaskRows<4>;
      auto *share_rows = wide ? detail::ShareRowsHere : detail::ShareRows<4>;
      view_rows(image.data(), width, down, across, size, round % 4 == 0, colours, view[wide].data());
      mask_rows(map.data(), width, down, across, size, round % 4 == 1, mask[wide].data());
      share_rows(map.data(), width, cells_down, cells_across, rows, columns, round % 4 == 2, share[wide].data());
    }
    if (view[0] != view[1] || mask[0] != mask[1] || share[0] != share[1]) return std::printf("round %d\\n", round), 1;
  }
  return 0;
}
"""


@pytest.mark.parametrize(
    "flags", [[], ["-fsanitize=address,undefined", "-fno-sanitize-recover"]], ids=["", "sanitized"]
)
def test_every_processor_makes_the_same_bytes(flags: list[str], tmp_path: Path) -> None:
    """Four rows at a time, as processors without AVX2 do it, against what this one does."""
    try:
        compiler = dali_plugin.find_toolchain().compiler
    except dali_plugin.PluginError as error:
        pytest.skip(str(error))
    source, program = tmp_path / "lanes.cc", tmp_path / "lanes"
    source.write_text(_LANES)
    command = [compiler, "-std=c++20", "-O2", "-ffp-contract=off", *flags, f"-I{CSRC}", source, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0 and flags:
        pytest.skip(f"the compiler has no sanitizers: {built.stderr[-200:]}")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


GOOD = Case(20, 30, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": GOOD.map}, "shape"),
        ({"image": GOOD.image.astype(np.float32)}, "uint8"),
        ({"windows": GOOD.windows[:1]}, r"windows: expected the shape \(2, 4\)"),
        ({"windows": GOOD.windows.astype(np.float64)}, "windows: expected float32"),
        ({"windows": GOOD.windows[:, ::-1].copy()}, "y0 < y1"),
        ({"windows": GOOD.windows * np.float32(np.nan)}, "y0 < y1"),
        ({"windows": GOOD.windows + np.float32(1)}, "y0 < y1"),
        ({"mirrors": GOOD.mirrors[0]}, r"mirrors: expected the shape \(2, 2\)"),
        ({"colours": GOOD.colours[0]}, r"colours: expected the shape \(2, 3, 4\)"),
        ({"colours": GOOD.colours.astype(np.float64)}, "colours: expected float32"),
        ({"size": 0}, "size"),
    ],
)
def test_views_refuse_wrong_inputs(changes: dict[str, Any], message: str) -> None:
    names = ("image", "windows", "mirrors", "colours")
    inputs: dict[str, Any] = {name: getattr(GOOD, name) for name in names} | {"size": 8} | changes
    with pytest.raises(RuntimeError, match=message):
        run(dali_plugin.crop_views, *([inputs[name]] for name in names), size=inputs["size"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"map": GOOD.image}, "shape"), ({"grid": (0, 7)}, "grid"), ({"grid": (7,)}, "grid"), ({"size": -1}, "size")],
)
def test_targets_refuse_wrong_inputs(changes: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = {"map": GOOD.map, "grid": (7, 7), "size": 8} | changes
    feeds = [[inputs["map"]], [GOOD.windows], [GOOD.mirrors]]
    with pytest.raises(RuntimeError, match=message):
        run(dali_plugin.saliency_targets, *feeds, size=inputs["size"], grid=inputs["grid"])
