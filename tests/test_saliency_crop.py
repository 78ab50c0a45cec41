"""The crop rule: its guarantee for every map and every random number, and the distribution it promises."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cast_fast.data.saliency_crop import (
    AREA_MIN,
    ATTEMPTS,
    RATIO_MAX,
    WINDOW_SHAPE,
    CropRule,
    Windows,
    crop_windows,
    overlaps,
    unconstrained_windows,
    window_random,
)

ALMOST_ONE = float(np.nextafter(1.0, 0.0))


@dataclass
class Case:
    saliency: np.ndarray
    random: np.ndarray
    rule: CropRule


def blank(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width), np.uint8)


def box_map(height: int, width: int, y: int, x: int, h: int, w: int) -> np.ndarray:
    saliency = blank(height, width)
    saliency[y : y + h, x : x + w] = 255
    return saliency


@st.composite
def saliency_maps(draw: st.DrawFn, *, empty: bool = False) -> np.ndarray:
    """Tiny, long, bordering, scattered and full maps; grey levels on both sides of the threshold."""
    sides = st.integers(1, 12) | st.integers(1, 90)
    height, width = draw(sides), draw(sides)
    if draw(st.booleans()) and draw(st.booleans()):  # a panorama
        height, width = draw(st.permutations([draw(st.integers(1, 6)), draw(st.integers(60, 300))]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    saliency = rng.integers(0, 128, (height, width)).astype(np.uint8)
    if empty:
        return saliency
    kind = draw(st.sampled_from(["pixel", "boxes", "border", "noise", "full"]))
    if kind == "pixel":
        saliency[rng.integers(height), rng.integers(width)] = draw(st.sampled_from([128, 255]))
    elif kind == "boxes":
        for _ in range(draw(st.integers(1, 4))):
            y, x = rng.integers(height), rng.integers(width)
            saliency[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] = 128
    elif kind == "border":
        side = draw(st.sampled_from(["top", "bottom", "left", "right"]))
        index = {"top": np.s_[0, :], "bottom": np.s_[-1, :], "left": np.s_[:, 0], "right": np.s_[:, -1]}[side]
        saliency[index] = 200
    elif kind == "noise":
        saliency[rng.random((height, width)) < draw(st.floats(0.001, 0.9))] = 255
        saliency[rng.integers(height), rng.integers(width)] = 255
    else:
        saliency[:] = 255
    return saliency


@st.composite
def ready_random(draw: st.DrawFn) -> np.ndarray:
    """Ordinary tensors, and ones where the extreme numbers are frequent."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    uniform = rng.random(WINDOW_SHAPE)
    share = draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    extremes = np.array([0.0, ALMOST_ONE, 0.5, 2.0**-53])
    uniform = np.where(rng.random(WINDOW_SHAPE) < share, rng.choice(extremes, WINDOW_SHAPE), uniform)
    ready = window_random(uniform)
    if draw(st.booleans()) and draw(st.booleans()):
        ready[:, :ATTEMPTS, 3::2] = 0.0  # nearly every proposal of a centre is refused: the last one stands
    ready[:, : draw(st.sampled_from([0, 0, 0, ATTEMPTS - 1])), 0] = 9.0  # too large: all but the last attempt spent
    return ready


rules = st.builds(
    CropRule,
    phi=st.sampled_from([0.0, 0.05, 0.2, 0.21, 0.5, 0.9, 1.0]),
    pair_constraint=st.sampled_from(["overlap", "independent"]),
)
cases = st.builds(Case, saliency_maps(), ready_random(), rules)


def count(saliency: np.ndarray, *windows: np.ndarray) -> int:
    """Salient pixels inside all the windows, pixel by pixel: the oracle."""
    inside = 0
    for y, x in np.argwhere(saliency > 127).tolist():
        inside += all(w[0] <= y < w[0] + w[2] and w[1] <= x < w[1] + w[3] for w in windows)
    return inside


def check(case: Case, windows: Windows) -> None:
    """The guarantee, by counting pixels one by one and without the module's arithmetic."""
    saliency, rule = case.saliency, case.rule
    height, width = saliency.shape
    total = count(saliency)
    share = min(rule.phi, AREA_MIN * (height * width) / total)
    for which, window in enumerate((windows.query, windows.key)):
        assert window.dtype == np.int32 and window.shape == (4,)
        y, x, h, w = window.tolist()
        assert h >= 1 and w >= 1 and y >= 0 and x >= 0 and y + h <= height and x + w <= width
        held = count(saliency, window)
        assert held >= 1
        assert windows.held[which] == held / total
        if windows.fallback[which]:
            assert 3 * w <= 4 * h and 3 * h <= 4 * w, "a fallback is never out of the ratio limits"
        else:
            assert held >= share * total
            # sides are rounded to whole pixels, each by at most half of one
            assert (w - 0.5) / (h + 0.5) <= RATIO_MAX and (h - 0.5) / (w + 0.5) <= RATIO_MAX
            assert (h + 0.5) * (w + 0.5) >= AREA_MIN * height * width * (1 - 1e-12)
    shared = count(saliency, windows.query, windows.key)
    assert overlaps(saliency, windows) == (shared > 0)
    if rule.pair_constraint == "overlap":
        assert shared >= 1
        if not windows.fallback[1]:
            assert shared >= share * count(saliency, windows.query)


def same(first: Windows, second: Windows) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second))


def oracle(case: Case) -> tuple[list[int], list[int], list[bool]]:
    """The rule once more, straight from the design's text: lists of pixels, rational thresholds, no shared code."""
    saliency, rule = case.saliency, case.rule
    height, width = saliency.shape
    pixels = np.argwhere(saliency > 127).tolist()  # raster order
    total = len(pixels)
    share = min(rule.phi, 0.2 * (height * width) / total)
    mu = [sum(p[axis] for p in pixels) / total + 0.5 for axis in (0, 1)]

    def inside(window: list[int], among: list[list[int]]) -> list[list[int]]:
        y0, x0, h, w = window
        return [p for p in among if y0 <= p[0] < y0 + h and x0 <= p[1] < x0 + w]

    def candidate(row: np.ndarray) -> list[int] | None:
        area = row[0] * (height * width)
        w, h = math.floor(math.sqrt(area * row[1]) + 0.5), math.floor(math.sqrt(area / row[1]) + 0.5)
        if w > width or h > height or w < 1 or h < 1:
            return None
        origin = []
        for side, extent, mean, offset in ((h, height, mu[0], 4), (w, width, mu[1], 2)):
            low, high = side / 2, extent - side / 2
            least = ((sorted((low, mean, high))[1] - mean) / extent) ** 2
            x = low
            for u, e in row[2:].reshape(6, 4)[:, offset - 2 : offset].tolist():
                x = low + u * (high - low)
                if ((x - mean) / extent) ** 2 <= least + 2 * e:
                    break
            origin.append(min(max(math.floor(x - side / 2 + 0.5), 0), extent - side))
        return [*origin, h, w]

    def fallback(among: list[list[int]], row: np.ndarray) -> list[int]:
        lo = [min(p[axis] for p in among) for axis in (0, 1)]
        hi = [max(p[axis] for p in among) + 1 for axis in (0, 1)]
        margins = [lo[0], height - hi[0], lo[1], width - hi[1]]
        push = [min(math.floor(u * margin), margin) for u, margin in zip(row[:4], margins)]
        lo, hi = [lo[0] - push[0], lo[1] - push[2]], [hi[0] + push[1], hi[1] + push[3]]
        side = [hi[0] - lo[0], hi[1] - lo[1]]
        long = int(side[1] > side[0])
        limit = 4 * side[1 - long] // 3
        if 3 * side[long] > 4 * side[1 - long]:
            anchor = among[min(math.floor(row[4] * len(among)), len(among) - 1)][long]
            starts = [s for s in range(lo[long], hi[long] - limit + 1) if s <= anchor < s + limit]
            lo[long] = starts[min(math.floor(row[5] * len(starts)), len(starts) - 1)]
            side[long] = limit
        return [*lo, *side]

    chosen: list[list[int]] = []
    flags = []
    for which in range(2):
        paired = which == 1 and rule.pair_constraint == "overlap"
        among = inside(chosen[0], pixels) if paired else pixels
        found = None
        for row in case.random[which, :ATTEMPTS]:
            window = candidate(row)
            if window is None:
                continue
            enough = len(inside(window, pixels)) >= max(share * total, 1)
            if enough and (not paired or len(inside(window, among)) >= max(share * len(among), 1)):
                found = window
                break
        flags.append(found is None)
        chosen.append(fallback(among, case.random[which, ATTEMPTS]) if found is None else found)
    return chosen[0], chosen[1], flags


@given(cases)
@settings(max_examples=400)
def test_windows_meet_their_constraint_or_are_a_flagged_fallback(case: Case) -> None:
    check(case, crop_windows(case.saliency, case.random, case.rule))


@given(cases)
@settings(max_examples=300)
def test_windows_equal_an_independent_reading_of_the_rule(case: Case) -> None:
    windows = crop_windows(case.saliency, case.random, case.rule)
    query, key, flags = oracle(case)
    assert (windows.query.tolist(), windows.key.tolist(), windows.fallback.tolist()) == (query, key, flags)


@given(
    saliency_maps(),
    st.integers(0, 2**32 - 1),
    rules,
)
def test_no_random_number_breaks_the_guarantee(saliency: np.ndarray, seed: int, rule: CropRule) -> None:
    """NaN, infinities, negative and huge numbers: the windows stay inside, hold salient pixels and say fallback."""
    rng = np.random.default_rng(seed)
    nasty = np.array([np.nan, np.inf, -np.inf, -1.0, 0.0, 1.0, 1e308, 5e-324, -1e308, 2.0**31, 0.5])
    random = np.where(rng.random(WINDOW_SHAPE) < 0.5, rng.choice(nasty, WINDOW_SHAPE), rng.random(WINDOW_SHAPE))
    windows = crop_windows(saliency, random, rule)
    height, width = saliency.shape
    for window in (windows.query, windows.key):
        y, x, h, w = window.tolist()
        assert h >= 1 and w >= 1 and y >= 0 and x >= 0 and y + h <= height and x + w <= width
        assert count(saliency, window) >= 1
    if rule.pair_constraint == "overlap":
        assert overlaps(saliency, windows)
    plain = unconstrained_windows(height, width, random)
    for window in (plain.query, plain.key):
        y, x, h, w = window.tolist()
        assert h >= 1 and w >= 1 and y >= 0 and x >= 0 and y + h <= height and x + w <= width


@given(cases)
def test_windows_are_a_pure_function(case: Case) -> None:
    saliency, random = case.saliency.copy(), case.random.copy()
    first = crop_windows(saliency, random, case.rule)
    np.testing.assert_array_equal(saliency, case.saliency)
    np.testing.assert_array_equal(random, case.random)
    assert same(first, crop_windows(saliency, random, case.rule))
    # neither memory layout, nor a trailing channel, nor grey levels on one side of the threshold matter
    assert same(first, crop_windows(np.asfortranarray(saliency)[:, :, None], random, case.rule))
    binary = np.where(saliency > 127, np.uint8(128), np.uint8(0))
    assert same(first, crop_windows(binary, random, case.rule))


@given(ready_random(), rules)
@example(window_random(np.zeros(WINDOW_SHAPE)), CropRule())
@example(window_random(np.full(WINDOW_SHAPE, ALMOST_ONE)), CropRule())
def test_the_smallest_map_is_its_own_window(random: np.ndarray, rule: CropRule) -> None:
    windows = crop_windows(np.full((1, 1), 128, np.uint8), random, rule)
    assert windows.query.tolist() == windows.key.tolist() == [0, 0, 1, 1]
    assert windows.held.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("shape", [(1, 200), (200, 1), (3, 100), (50, 2000), (2000, 50)])
@pytest.mark.parametrize("pair_constraint", ["overlap", "independent"])
def test_extreme_panoramas_always_fall_back(shape: tuple[int, int], pair_constraint: str) -> None:
    rng = np.random.default_rng(0)
    saliency = np.where(rng.random(shape) < 0.05, np.uint8(255), np.uint8(0))
    saliency[shape[0] // 2, shape[1] // 2] = 255
    rule = CropRule(pair_constraint=pair_constraint)
    for uniform in rng.random((20, *WINDOW_SHAPE)):
        case = Case(saliency, window_random(uniform), rule)
        windows = crop_windows(saliency, case.random, rule)
        assert windows.fallback.all()
        check(case, windows)


def test_huge_map() -> None:
    saliency = box_map(3000, 4000, 2990, 3900, 10, 100)
    rng = np.random.default_rng(1)
    for uniform in rng.random((5, *WINDOW_SHAPE)):
        windows = crop_windows(saliency, window_random(uniform))
        assert overlaps(saliency, windows) and (windows.held > 0).all()
        assert (windows.held[~windows.fallback] >= 0.2).all()


def test_overlap_repairs_what_independent_pairs_miss() -> None:
    """Two far objects: independent windows often show one each; overlapping pairs never do."""
    saliency = box_map(100, 100, 0, 0, 10, 10)
    saliency[90:, 90:] = 255
    rng = np.random.default_rng(2)
    random = [window_random(u) for u in rng.random((300, *WINDOW_SHAPE))]
    shared = {
        rule: sum(overlaps(saliency, crop_windows(saliency, r, CropRule(pair_constraint=rule))) for r in random)
        for rule in ("overlap", "independent")
    }
    assert shared["overlap"] == 300
    assert shared["independent"] < 300


def test_distribution() -> None:
    """Area, ratio and place of accepted windows, against the rule's own law (no rejection by content: a full map)."""
    rng = np.random.default_rng(3)
    saliency = np.full((120, 120), 255, np.uint8)
    random = window_random(rng.random((3000, *WINDOW_SHAPE)))
    windows = np.array([crop_windows(saliency, r, CropRule(phi=0.0)).query for r in random], np.float64)
    y, x, h, w = windows.T
    # sizes: (a, r) from the law, accepted where they fit, by brute force over the same law
    a, r = rng.uniform(0.2, 1.0, 200_000), np.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3), 200_000))
    fits = (np.sqrt(a * r) <= 1) & (np.sqrt(a / r) <= 1)
    assert abs((h * w).mean() / 120**2 - a[fits].mean()) < 0.01
    assert abs(np.log(w / h).mean()) < 0.01
    assert abs(np.log(w / h).std() - np.log(r[fits]).std()) < 0.01
    # places: symmetric about the centroid
    for start, free in ((y, 120 - h), (x, 120 - w)):
        assert abs((start[free > 0] / free[free > 0]).mean() - 0.5) < 0.02


def test_centres_follow_the_truncated_normal() -> None:
    """For one fixed size, the share of windows per starting column against exp(-((centre - mu) / W)**2 / 2)."""
    height, width, side = 20, 400, 20
    saliency = box_map(height, width, 0, 0, height, 40)
    saliency[10, ::10] = 255  # every window holds a salient pixel, so that none is refused for its content
    mean = np.argwhere(saliency)[:, 1].mean() + 0.5
    random = window_random(np.random.default_rng(4).random((10_000, *WINDOW_SHAPE)))
    random[:, :, 0, 0] = side * side / (height * width)
    random[:, :, 0, 1] = 1.0
    found = [crop_windows(saliency, r, CropRule(phi=0.0, pair_constraint="independent")) for r in random]
    windows = np.array([w for pair in found for w in (pair.query, pair.key)])
    assert (windows[:, 2:] == side).all() and not np.array([pair.fallback for pair in found]).any()
    starts = np.arange(width - side + 1)
    density = np.exp(-(((starts + side / 2 - mean) / width) ** 2) / 2)
    observed = np.histogram(windows[:, 1], bins=8, range=(0, width - side + 1))[0]
    expected = np.histogram(starts, bins=8, range=(0, width - side + 1), weights=density)[0]
    # 2,500 windows a bin: one standard deviation is 2 %; the density itself falls by 30 %
    np.testing.assert_allclose(observed / observed.sum(), expected / expected.sum(), rtol=0.08)


@given(st.integers(1, 200), st.integers(1, 200), ready_random())
@settings(max_examples=200)
def test_unconstrained_windows(height: int, width: int, random: np.ndarray) -> None:
    windows = unconstrained_windows(height, width, random)
    assert same(windows, unconstrained_windows(height, width, random))
    assert windows.held.tolist() == [0.0, 0.0]
    for which, window in enumerate((windows.query, windows.key)):
        y, x, h, w = window.tolist()
        assert h >= 1 and w >= 1 and y >= 0 and x >= 0 and y + h <= height and x + w <= width
        assert (w - 0.5) / (h + 0.5) <= RATIO_MAX and (h - 0.5) / (w + 0.5) <= RATIO_MAX
        if windows.fallback[which]:
            assert abs(2 * y + h - height) <= 1 and abs(2 * x + w - width) <= 1, "the fallback is central"
            assert h == height or (w == width and abs(h - w * RATIO_MAX) <= 0.5), "and as large as the limits allow"
            assert w == width or (h == height and abs(w - h * RATIO_MAX) <= 0.5)
        else:
            assert (h + 0.5) * (w + 0.5) >= AREA_MIN * height * width * (1 - 1e-12)


def test_unconstrained_windows_are_placed_uniformly() -> None:
    rng = np.random.default_rng(5)
    windows = np.array([unconstrained_windows(200, 200, window_random(u)).key for u in rng.random((3000, 2, 11, 26))])
    y, x, h, w = windows.T
    for start, side in ((y, h), (x, w)):
        place = (start + 0.5) / (200 - side + 1)
        assert abs(place.mean() - 0.5) < 0.02
        assert abs(place.var() - 1 / 12) < 0.006
    assert abs(np.corrcoef(y / (201 - h), x / (201 - w))[0, 1]) < 0.06, "axes are independent"


def test_relative_corners() -> None:
    windows = Windows(
        np.array([1, 2, 3, 4], np.int32), np.array([0, 0, 10, 7], np.int32), np.zeros(2, bool), np.ones(2)
    )
    relative = windows.relative(10, 7)
    assert relative.dtype == np.float32
    expected = np.array([[1 / 10, 2 / 7, 4 / 10, 6 / 7], [0, 0, 1, 1]])
    np.testing.assert_array_equal(relative, expected.astype(np.float32))


def test_window_random() -> None:
    uniform = np.random.default_rng(6).random((50, *WINDOW_SHAPE))
    before = uniform.copy()
    ready = window_random(uniform)
    np.testing.assert_array_equal(uniform, before)
    np.testing.assert_array_equal(ready[:, :, ATTEMPTS], uniform[:, :, ATTEMPTS])
    attempts = ready[:, :, :ATTEMPTS]
    assert attempts[..., 0].min() >= 0.2 and attempts[..., 0].max() < 1.0
    assert attempts[..., 1].min() >= 0.75 and attempts[..., 1].max() <= 4 / 3
    np.testing.assert_array_equal(attempts[..., 2::2], uniform[:, :, :ATTEMPTS, 2::2])
    np.testing.assert_allclose(attempts[..., 3::2], -np.log(1 - uniform[:, :, :ATTEMPTS, 3::2]), rtol=1e-9, atol=1e-15)
    edge = window_random(np.full(WINDOW_SHAPE, ALMOST_ONE))
    assert np.isfinite(edge).all() and edge[0, 0, 1] <= 4 / 3
    one = window_random(uniform[7])
    np.testing.assert_array_equal(one, ready[7])


@given(saliency_maps(empty=True), ready_random(), rules)
@settings(max_examples=20)
def test_empty_map_is_refused(saliency: np.ndarray, random: np.ndarray, rule: CropRule) -> None:
    with pytest.raises(ValueError, match="without a salient pixel"):
        crop_windows(saliency, random, rule)


@pytest.mark.parametrize(
    ("saliency", "random", "message"),
    [
        (np.ones((4, 4), np.float32), np.zeros(WINDOW_SHAPE), "expected uint8"),
        (np.ones((4, 4, 3), np.uint8), np.zeros(WINDOW_SHAPE), r"got uint8 of shape \(4, 4, 3\)"),
        (np.ones((0, 4), np.uint8), np.zeros(WINDOW_SHAPE), "expected uint8"),
        (np.full((4, 4), 255, np.uint8), np.zeros((2, 10, 26)), r"expected float64 of shape \(2, 11, 26\)"),
        (np.full((4, 4), 255, np.uint8), np.zeros(WINDOW_SHAPE, np.float32), "got float32"),
    ],
)
def test_wrong_arrays_are_refused(saliency: np.ndarray, random: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crop_windows(saliency, random)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="phi"):
        CropRule(phi=1.5)
    with pytest.raises(ValueError, match="phi"):
        CropRule(phi=math.nan)
    with pytest.raises(ValueError, match="pair_constraint"):
        CropRule(pair_constraint="both")
    with pytest.raises(ValueError, match="grid of 0 x 5"):
        unconstrained_windows(0, 5, np.zeros(WINDOW_SHAPE))
    with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
        window_random(np.ones(WINDOW_SHAPE))
    with pytest.raises(ValueError, match="float64 of shape"):
        window_random(np.zeros(WINDOW_SHAPE, np.float32))  # pyright: ignore[reportArgumentType]
