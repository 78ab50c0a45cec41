"""Saliency-constrained crops: the rule that chooses the two crop windows of an image, in NumPy.

CAST (Selvaraju, Desai, Johnson, Naik, "CASTing Your Model: Learning to Localize Improves Self-Supervised
Representations", CVPR 2021) trains on pairs of random crops that both show the salient region. This module is the
*definition* of how ours are chosen: a pure function of a saliency map and a tensor of random numbers. The native DALI
operator (``kernels/csrc/saliency_crop.h``) must return the same integers for the same input, so everything here is
written in operations that IEEE 754 rounds correctly and that mean the same in Python, C++ and CUDA: ``+ - * /``,
square root and floor on float64, in the order written, without fused multiply-add, and exact integers.

**Grid.** All arithmetic is on the map's own grid of ``H`` rows and ``W`` columns. A window is ``[y0, x0, h, w]``
there, in whole pixels; pixel ``x`` covers ``[x, x + 1]``. A pixel is salient when its value exceeds 127.

**Random numbers.** One sample takes float64 numbers of shape ``WINDOW_SHAPE = (2, 11, 26)``: for the query window and
the key window, ten rows for the attempts and one for the fallback. An attempt's row holds the area fraction *a*, the
aspect ratio *r* (width / height) and six tries of ``(ux, Ex, uy, Ey)``: a uniform number and an exponential deviate
per axis. The fallback's row holds uniform numbers: outward pushes of the top, bottom, left and right sides, the
number of the anchor, the place along the shortened side (the other 20 are unused). `window_random` makes such a
tensor from uniforms.

**Attempts.** At most ten a window, the first accepted one counts:

- size: ``w = floor(sqrt(a*HW*r) + 1/2)``, ``h = floor(sqrt(a*HW/r) + 1/2)``; a side below 1 or beyond the map spends
  the attempt;
- centre, per axis: a normal around the salient centroid with sigma = the map's side, truncated to the centres that
  keep the window inside the map, drawn by rejection from a uniform proposal ``x``: accepted when ``((x-mu)/sigma)**2
  <= m + 2E``, with ``m`` the least value of the left side over the interval. After six refusals the last proposal
  stands;
- test: the window holds at least ``phi_eff`` of all salient pixels, ``phi_eff = min(phi, 0.2*HW/salient)``. With
  ``pair_constraint="overlap"`` the key window must also hold ``phi_eff`` of the salient pixels inside the query
  window. Every threshold is rounded up to a whole pixel and is at least one.

**Fallback**, when no attempt was accepted, reported by a flag: take the salient pixels (for the key under "overlap":
those inside the query window), their bounding box, and push each side outward by ``floor(u * margin)``, in the order
top, bottom, left, right. If the aspect ratio then exceeds 4/3 either way, the long side shrinks to ``floor(4 * short
/ 3)`` and is placed uniformly among the positions inside the box that hold the anchor, salient pixel number ``floor(u
* count)`` in raster order. The fallback may therefore leave the area limits, and so does every crop of an extreme
panorama.

So every window lies inside the map, is at least 1x1, and either meets its constraint or is flagged; and every window
holds a salient pixel, under "overlap" the key window one that the query window holds too. These hold for *any* random
numbers: NaN, infinities and numbers out of range at worst spend attempts or land on a border, here and in the native
operators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ATTEMPTS = 10
TRIES = 6  # proposals of the centre per attempt
AREA_MIN = 0.2  # least area fraction that an attempt draws
RATIO_MAX = 4.0 / 3.0  # attempts draw ratios in [1 / RATIO_MAX, RATIO_MAX]
THRESHOLD = 127  # salient: value > THRESHOLD
WINDOW_SHAPE = (2, ATTEMPTS + 1, 2 + 4 * TRIES)
PAIR_CONSTRAINTS = ("overlap", "independent")

_MAX_PIXELS = 2**30  # the native operators add coordinates in 32 bits

_Window = tuple[int, int, int, int]


@dataclass(frozen=True)
class CropRule:
    """What a window has to satisfy.

    Attributes:
        phi: share of the salient pixels that a window must hold, in [0, 1]. Zero still asks for one pixel.
        pair_constraint: ``"overlap"``: the key window must also hold ``phi`` of the salient pixels that the query
            window holds, so that the pair always shares some. ``"independent"``: each window on its own, as in the
            authors' released code.

    Raises:
        ValueError: for values outside these.
    """

    phi: float = 0.2
    pair_constraint: str = "overlap"

    def __post_init__(self) -> None:
        if not 0.0 <= self.phi <= 1.0:
            raise ValueError(f"phi: got {self.phi!r}, expected a number in [0, 1]")
        if self.pair_constraint not in PAIR_CONSTRAINTS:
            raise ValueError(f"pair_constraint: got {self.pair_constraint!r}, expected one of {PAIR_CONSTRAINTS}")


class Windows(NamedTuple):
    """The two crop windows of a sample, on the grid of its saliency map.

    Attributes:
        query, key: int32 (4,), ``[y0, x0, h, w]`` in map pixels.
        fallback: bool (2,), whether the query and key window are the fallback.
        held: float64 (2,), share of all salient pixels inside the query and key window; 0 for unconstrained windows,
            which look at no map.
    """

    query: NDArray[np.int32]
    key: NDArray[np.int32]
    fallback: NDArray[np.bool_]
    held: NDArray[np.float64]

    def relative(self, height: int, width: int) -> NDArray[np.float32]:
        """Corners as shares of the map's sides: float32 (2, 4), ``[y0/H, x0/W, y1/H, x1/W]`` for query and key.

        Columns 0-1 are the ``roi_start`` and 2-3 the ``roi_end`` of a DALI resize with ``roi_relative=True``. Each
        share is one float64 division, then rounded to float32.
        """
        windows = np.stack([self.query, self.key]).astype(np.int64)
        corners = np.concatenate([windows[:, :2], windows[:, :2] + windows[:, 2:]], axis=1)
        return (corners / np.array([height, width, height, width], np.float64)).astype(np.float32)


def window_random(uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """Random numbers as `crop_windows` takes them, from plain uniform ones.

    Args:
        uniform: float64 (..., 2, 11, 26) in [0, 1).

    Returns:
        A new array of that shape. In the rows of attempts, column 0 is the area fraction in [0.2, 1), column 1 the
        ratio, log-uniform in [3/4, 4/3], and the E columns are exponential deviates with mean 1; the row of the
        fallback is unchanged. This is the only place with logarithms, whose last bit may differ between machines: the
        windows are a function of the result.

    Raises:
        ValueError: if the shape or dtype differs, or a number is outside [0, 1).
    """
    uniform = np.asarray(uniform)
    if uniform.dtype != np.float64 or uniform.shape[-3:] != WINDOW_SHAPE:
        raise ValueError(
            f"uniform: got {uniform.dtype} of shape {uniform.shape}, expected float64 of shape (..., {WINDOW_SHAPE})"
        )
    if not (uniform.size == 0 or (uniform.min() >= 0.0 and uniform.max() < 1.0)):
        raise ValueError("uniform: got a number outside [0, 1)")
    ready = uniform.copy()
    attempts, source = ready[..., :ATTEMPTS, :], uniform[..., :ATTEMPTS, :]
    log_ratio = math.log(RATIO_MAX)
    attempts[..., 0] = AREA_MIN + (1.0 - AREA_MIN) * source[..., 0]
    # exp may round past the limits by one unit in the last place
    attempts[..., 1] = np.clip(np.exp(log_ratio * (2.0 * source[..., 1] - 1.0)), 1.0 / RATIO_MAX, RATIO_MAX)
    attempts[..., 3::2] = -np.log1p(-source[..., 3::2])
    return ready


def crop_windows(saliency: NDArray[np.uint8], random: NDArray[np.float64], rule: CropRule | None = None) -> Windows:
    """Choose the query and key window for one saliency map (see the module's text for the rule).

    Args:
        saliency: uint8 (H, W) or (H, W, 1), salient where > 127.
        random: float64 (2, 11, 26) as made by `window_random`.
        rule: the constraint; None stands for ``CropRule()``.

    Raises:
        ValueError: if no pixel is salient, or for a wrong dtype or shape.
    """
    rule = CropRule() if rule is None else rule
    salient = _salient(saliency)
    _check_random(random)
    height, width = salient.shape
    # A summed-area table would make every count four look-ups, but building it costs 1.1 ms at 640x480, and most
    # windows are accepted at once: counting the pixels of a window directly costs microseconds (CPU, one thread).
    marks = salient.view(np.uint8)
    rows = marks.sum(axis=1, dtype=np.int32)
    columns = marks.sum(axis=0, dtype=np.int32)
    total = int(rows.sum(dtype=np.int64))
    if total == 0:
        raise ValueError("saliency: got a map without a salient pixel (value > 127), expected at least one")
    # pixel centres lie half a pixel from their index
    centre_y = float(rows @ np.arange(height, dtype=np.int64)) / float(total) + 0.5
    centre_x = float(columns @ np.arange(width, dtype=np.int64)) / float(total) + 0.5
    share = min(rule.phi, AREA_MIN * float(height * width) / float(total))
    needed = _whole_pixels(share, total)

    query = key = (0, 0, height, width)
    fallback = [True, True]
    for row in random[0, :ATTEMPTS].tolist():
        window = _candidate(row, height, width, centre_y, centre_x)
        if window is not None and _count(salient, window) >= needed:
            query, fallback[0] = window, False
            break
    if fallback[0]:
        query = _fallback(salient, (0, 0, height, width), random[0, ATTEMPTS].tolist())
    held_query = _count(salient, query)

    overlap = rule.pair_constraint == "overlap"
    needed_shared = _whole_pixels(share, held_query)
    for row in random[1, :ATTEMPTS].tolist():
        window = _candidate(row, height, width, centre_y, centre_x)
        if window is None or _count(salient, window) < needed:
            continue
        if not overlap or _count_shared(salient, query, window) >= needed_shared:
            key, fallback[1] = window, False
            break
    if fallback[1]:
        region = query if overlap else (0, 0, height, width)
        key = _fallback(salient, region, random[1, ATTEMPTS].tolist())
    held_key = _count(salient, key)
    return _result(query, key, fallback, (held_query / total, held_key / total))


def unconstrained_windows(height: int, width: int, random: NDArray[np.float64]) -> Windows:
    """Two plain random resized crops from the same random numbers: for unconstrained methods and empty maps.

    Sizes are drawn as by `crop_windows`, the first attempt that fits counts, and its first pair ``(ux, uy)`` places it
    uniformly: ``x0 = floor(ux * (W - w + 1))``. When none of ten fits, the window is the largest central one within the
    ratio limits, as in torchvision's ``RandomResizedCrop``, and flagged as the fallback. ``held`` is zero.

    Args:
        height, width: the grid's sides.
        random: float64 (2, 11, 26) as made by `window_random`.

    Raises:
        ValueError: if a side is below 1 or the random numbers have a wrong dtype or shape.
    """
    if height < 1 or width < 1 or height * width > _MAX_PIXELS:
        raise ValueError(f"got a grid of {height} x {width}, expected sides of at least 1 and at most 2**30 pixels")
    _check_random(random)
    chosen: list[tuple[int, int, int, int]] = []
    fallback = [True, True]
    for which in range(2):
        window = _central(height, width)
        for row in random[which, :ATTEMPTS].tolist():
            size = _size(row, height, width)
            if size is not None:
                h, w = size
                y = _floor_within(row[4] * float(height - h + 1), height - h)
                x = _floor_within(row[2] * float(width - w + 1), width - w)
                window, fallback[which] = (y, x, h, w), False
                break
        chosen.append(window)
    return _result(chosen[0], chosen[1], fallback, (0.0, 0.0))


def overlaps(saliency: NDArray[np.uint8], windows: Windows) -> bool:
    """Whether the query and key window share a salient pixel of this map (uint8 (H, W) or (H, W, 1))."""
    return _count_shared(_salient(saliency), _as_window(windows.query), _as_window(windows.key)) > 0


def _as_window(values: NDArray[np.int32]) -> _Window:
    y, x, h, w = values.tolist()
    return y, x, h, w


def _salient(saliency: NDArray[np.uint8]) -> NDArray[np.bool_]:
    grid = saliency[:, :, 0] if saliency.ndim == 3 and saliency.shape[2] == 1 else saliency
    if grid.ndim != 2 or grid.dtype != np.uint8 or not 0 < grid.size <= _MAX_PIXELS:
        raise ValueError(
            f"saliency: got {saliency.dtype} of shape {saliency.shape}, expected uint8 of shape (H, W) or (H, W, 1)"
        )
    return grid > THRESHOLD


def _check_random(random: NDArray[np.float64]) -> None:
    if random.dtype != np.float64 or random.shape != WINDOW_SHAPE:
        raise ValueError(
            f"random: got {random.dtype} of shape {random.shape}, expected float64 of shape {WINDOW_SHAPE}"
        )


def _result(query: _Window, key: _Window, fallback: list[bool], held: tuple[float, float]) -> Windows:
    return Windows(np.array(query, np.int32), np.array(key, np.int32), np.array(fallback), np.array(held, np.float64))


def _whole_pixels(share: float, count: int) -> int:
    """Least number of pixels that is at least this share of ``count``, and at least one."""
    return max(1, math.ceil(share * float(count)))


def _floor_within(value: float, top: int) -> int:
    """floor(value) clamped to [0, top]; NaN gives 0."""
    if not value >= 0.0:
        return 0
    return top if value >= top else math.floor(value)


def _size(row: list[float], height: int, width: int) -> tuple[int, int] | None:
    """(h, w) of an attempt, or None where it does not fit. NaN and infinities fail the comparisons."""
    fraction, ratio = row[0], row[1]
    if not (fraction > 0.0 and ratio > 0.0):
        return None
    area = fraction * float(height * width)
    w = math.sqrt(area * ratio) + 0.5
    h = math.sqrt(area / ratio) + 0.5
    if not (1.0 <= w < width + 1.0 and 1.0 <= h < height + 1.0):
        return None
    return math.floor(h), math.floor(w)


def _origin(row: list[float], first: int, side: int, extent: int, mean: float) -> int:
    """First pixel of a window along one axis; ``first`` is the column of the axis' first (u, E) pair."""
    sigma = float(extent)
    low = side * 0.5
    high = extent - low
    nearest = min(max(mean, low), high)
    least = (nearest - mean) / sigma
    least = least * least
    centre = low
    for column in range(first, first + 4 * TRIES, 4):
        centre = low + row[column] * (high - low)
        distance = (centre - mean) / sigma
        if distance * distance <= least + 2.0 * row[column + 1]:
            break
    return _floor_within((centre - low) + 0.5, extent - side)


def _candidate(row: list[float], height: int, width: int, centre_y: float, centre_x: float) -> _Window | None:
    size = _size(row, height, width)
    if size is None:
        return None
    h, w = size
    x = _origin(row, 2, w, width, centre_x)
    y = _origin(row, 4, h, height, centre_y)
    return y, x, h, w


def _count(salient: NDArray[np.bool_], window: _Window) -> int:
    y, x, h, w = window
    return int(np.count_nonzero(salient[y : y + h, x : x + w]))


def _count_shared(salient: NDArray[np.bool_], first: _Window, second: _Window) -> int:
    y0, x0 = max(first[0], second[0]), max(first[1], second[1])
    y1 = min(first[0] + first[2], second[0] + second[2])
    x1 = min(first[1] + first[3], second[1] + second[3])
    return _count(salient, (y0, x0, y1 - y0, x1 - x0)) if y1 > y0 and x1 > x0 else 0


def _fallback(salient: NDArray[np.bool_], region: _Window, row: list[float]) -> _Window:
    """The fallback window for the salient pixels inside a region, which holds at least one."""
    height, width = salient.shape
    top, left, h, w = region
    part = salient[top : top + h, left : left + w]
    in_rows, in_columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    y0, y1 = top + int(in_rows[0]), top + int(in_rows[-1]) + 1
    x0, x1 = left + int(in_columns[0]), left + int(in_columns[-1]) + 1
    y0 -= _floor_within(row[0] * float(y0), y0)
    y1 += _floor_within(row[1] * float(height - y1), height - y1)
    x0 -= _floor_within(row[2] * float(x0), x0)
    x1 += _floor_within(row[3] * float(width - x1), width - x1)
    h, w = y1 - y0, x1 - x0
    if 3 * w <= 4 * h and 3 * h <= 4 * w:
        return y0, x0, h, w
    pixels = np.flatnonzero(part)
    anchor = int(pixels[_floor_within(row[4] * float(pixels.size), pixels.size - 1)])
    if 3 * w > 4 * h:
        x0, w = _place(row[5], x0, x1, 4 * h // 3, left + anchor % part.shape[1])
    else:
        y0, h = _place(row[5], y0, y1, 4 * w // 3, top + anchor // part.shape[1])
    return y0, x0, h, w


def _place(u: float, start: int, stop: int, side: int, anchor: int) -> tuple[int, int]:
    """Shorten [start, stop) to ``side`` pixels that hold the anchor; returns the new start and the side."""
    least = max(start, anchor - side + 1)
    most = min(anchor, stop - side)
    return least + _floor_within(u * float(most - least + 1), most - least), side


def _central(height: int, width: int) -> _Window:
    """Largest central window whose ratio is within the limits."""
    h = min(height, (8 * width + 3) // 6)  # round(4 * width / 3)
    w = min(width, (8 * height + 3) // 6)
    return (height - h) // 2, (width - w) // 2, h, w
