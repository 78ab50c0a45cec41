"""The twelve object classes of the made scenes: outlines, surface patterns, and shading as if lit from one side.

Every class has its own outline and its own pattern; colour, proportions, pattern scale, pose and light vary within
the class. Shapes are described in the object's own frame: x to the right, y down, about as large as the unit disc.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from cast_fast.data.synthetic_paint import (
    Field,
    Points,
    blur,
    ellipse,
    fractal_noise,
    hsv,
    mix,
    polar,
    ramp,
    spline,
)

Pattern = Callable[[Field, Field], Field]

_REACH = 1.2  # no outline goes farther from the centre, in radii


class Pose(NamedTuple):
    """Where an object stands: centre (x, y) and radius in pixels, turn in radians, mirrored or not."""

    x: float
    y: float
    radius: float
    turn: float
    mirror: bool


class Sprite(NamedTuple):
    """A drawn object: colour (h, w, 3) and coverage (h, w) in [0, 1], with its top-left corner in the picture."""

    colour: Field
    alpha: Field
    top: int
    left: int


class _Canvas:
    """Paints parts back to front, each an outline with a colour pattern and a rounded relief."""

    def __init__(self, pose: Pose, light: Field, rng: np.random.Generator) -> None:
        self.side = 2 * int(np.ceil(pose.radius * _REACH)) + 4
        self.left = round(pose.x - self.side / 2)
        self.top = round(pose.y - self.side / 2)
        self.radius = pose.radius
        self.light = light
        self.rng = rng
        c, s = np.cos(pose.turn), np.sin(pose.turn)
        flip = -1.0 if pose.mirror else 1.0
        self._matrix = np.array([[c * flip, -s], [s * flip, c]]) * pose.radius
        self._inverse = np.linalg.inv(self._matrix).astype(np.float32)
        self._centre = (self.side - 1) / 2
        self.colour = np.zeros((self.side, self.side, 3), np.float32)
        self.alpha = np.zeros((self.side, self.side), np.float32)
        self._grain = fractal_noise(rng, self.side, self.side, max(4.0, pose.radius / 5), 3)

    def part(
        self,
        *outlines: Points,
        base: Field,
        second: Field | None = None,
        pattern: Pattern | None = None,
        bevel: float = 0.35,
        gloss: float = 0.2,
    ) -> None:
        """Paint one part over what is there.

        Args:
            outlines: polygons in the object's frame, filled by the even-odd rule (a second one makes a hole).
            base, second: colours; ``pattern(x, y)`` says how much of the second is seen at each point.
            bevel: width of the rounded rim, in radii; 0 paints flat.
            gloss: strength of the highlight.
        """
        pixels = [outline @ self._matrix.T + self._centre for outline in outlines]
        stacked = np.concatenate(pixels)
        x0, y0 = np.maximum(np.floor(stacked.min(0)).astype(int) - 2, 0)
        x1, y1 = np.minimum(np.ceil(stacked.max(0)).astype(int) + 3, self.side)
        if x1 - x0 < 2 or y1 - y0 < 2:
            return
        fixed = [np.round((p - (x0, y0)) * 16).astype(np.int32) for p in pixels]
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        cv2.fillPoly(mask, fixed, 255, lineType=cv2.LINE_AA, shift=4)
        coverage = mask.astype(np.float32) * np.float32(1 / 255)

        if pattern is None or second is None:
            colour = np.broadcast_to(base, (*mask.shape, 3))
        else:
            dx = np.arange(x0, x1, dtype=np.float32)[None, :] - np.float32(self._centre)
            dy = np.arange(y0, y1, dtype=np.float32)[:, None] - np.float32(self._centre)
            m = self._inverse
            colour = mix(base, second, pattern(m[0, 0] * dx + m[0, 1] * dy, m[1, 0] * dx + m[1, 1] * dy))
        colour = colour * (0.86 + 0.28 * self._grain[y0:y1, x0:x1])[..., None]
        if bevel > 0:
            diffuse, highlight = self._relief(mask, bevel * self.radius)
            colour = colour * diffuse[..., None] + np.float32(gloss) * highlight[..., None]

        cover = coverage[..., None]
        window = self.colour[y0:y1, x0:x1]
        window *= 1 - cover
        window += colour * cover
        alpha = self.alpha[y0:y1, x0:x1]
        alpha += (1 - alpha) * coverage

    def _relief(self, mask: np.ndarray, width: float) -> tuple[Field, Field]:
        """Diffuse factor and highlight of a shape inflated over ``width`` pixels from its rim."""
        inside = cv2.copyMakeBorder((mask > 127).astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        distance = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1]
        width = min(width, max(float(distance.max()), 1.0))
        inward = 1 - np.minimum(distance / np.float32(width), 1)
        height = np.sqrt(np.maximum(1 - inward * inward, 0)) * np.float32(width)
        height = blur(height.astype(np.float32), max(0.8, 0.12 * width))
        slope_x = cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
        slope_y = cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)
        length = np.sqrt(slope_x * slope_x + slope_y * slope_y + 1)
        lx, ly, lz = self.light
        cosine = (lz - lx * slope_x - ly * slope_y) / length
        half = np.array([lx, ly, lz + 1], np.float32)
        hx, hy, hz = half / np.linalg.norm(half)
        mirror = np.maximum((hz - hx * slope_x - hy * slope_y) / length, 0)
        diffuse = 0.38 + 0.72 * np.maximum(cosine, 0)
        return diffuse.astype(np.float32), (mirror**28).astype(np.float32)

    def sprite(self) -> Sprite:
        covered = np.maximum(self.alpha, 1e-3)[..., None]
        return Sprite(np.clip(self.colour / covered, 0, 1), self.alpha, self.top, self.left)


class _Palette(NamedTuple):
    main: Field
    second: Field
    dark: Field
    pale: Field
    hue: float


def _palette(rng: np.random.Generator, low: float = 0.0, high: float = 1.0) -> _Palette:
    """Two contrasting colours from hues in [low, high] turns, and a dark and a pale relative of the first."""
    hue = float(rng.uniform(low, high))
    saturation, value = float(rng.uniform(0.5, 0.9)), float(rng.uniform(0.62, 0.95))
    main = hsv(hue, saturation, value)
    other = hue + float(rng.choice([-1, 1])) * float(rng.uniform(0.08, 0.5)) * max(high - low, 0.3)
    if rng.random() < 0.4:
        second = hsv(other, 0.12, 0.97)
    else:
        second = hsv(other, float(rng.uniform(0.5, 0.95)), 0.95 if value < 0.8 else 0.45)
    return _Palette(main, second, hsv(hue, saturation, value * 0.38), hsv(hue, saturation * 0.3, 0.97), hue)


def _wave(values: Field, duty: float = 0.5, soft: float = 0.12) -> Field:
    """Stripes of period 1 in ``values``: 1 on a share ``duty`` of each period, soft at the edges."""
    triangle = np.abs(values - np.floor(values) - 0.5) * 2
    return ramp(triangle.astype(np.float32), duty + soft, duty - soft)


def _scales(x: Field, y: Field, size: float) -> Field:
    """Rows of overlapping arcs, as on a fish."""
    row = np.floor(x / size)
    v = y / size + 0.5 * (row % 2)
    across = (v - np.floor(v) - 0.5) * 1.25
    along = x / size - row
    return ramp(np.sqrt(across * across + along * along).astype(np.float32), 0.55, 0.95)


def _lattice_dots(x: Field, y: Field, size: float, radius: float) -> Field:
    """Round dots on a staggered lattice of pitch ``size``; radius in pitches."""
    row = np.floor(y / size)
    u = x / size + 0.5 * (row % 2)
    du, dv = u - np.floor(u) - 0.5, y / size - row - 0.5
    return ramp(np.sqrt(du * du + dv * dv).astype(np.float32), radius + 0.08, radius - 0.08)


def _spots(centres: np.ndarray, radii: np.ndarray) -> Pattern:
    """Round spots at given places."""

    def pattern(x: Field, y: Field) -> Field:
        total = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
        for (cx, cy), radius in zip(centres, radii, strict=True):
            distance = np.sqrt((x - np.float32(cx)) ** 2 + (y - np.float32(cy)) ** 2)
            np.maximum(total, ramp(distance, radius * 1.12, radius * 0.88), out=total)
        return total

    return pattern


def _eye(canvas: _Canvas, x: float, y: float, size: float) -> None:
    canvas.part(ellipse(x, y, size, size), base=hsv(0.1, 0.05, 0.97), bevel=0.05)
    canvas.part(ellipse(x + size * 0.2, y, size * 0.55, size * 0.55), base=hsv(0, 0, 0.06), bevel=0.05, gloss=0.8)


def _fish(c: _Canvas, rng: np.random.Generator) -> None:
    p = _palette(rng)
    fat = float(rng.uniform(0.34, 0.5))
    fork = float(rng.uniform(0.3, 0.45))
    size = float(rng.uniform(0.09, 0.15))
    tail = spline([(-0.45, -0.06), (-0.95, -fork), (-0.8, 0.0), (-0.95, fork), (-0.45, 0.06)])
    fin = spline([(0.25, -fat * 0.7), (-0.05, -fat - 0.26), (-0.4, -fat - 0.12), (-0.3, -fat * 0.55)])
    belly = spline([(0.1, fat * 0.7), (-0.05, fat + 0.2), (-0.3, fat + 0.12), (-0.2, fat * 0.6)])
    for outline in (tail, fin, belly):
        c.part(outline, base=p.second, second=p.dark, pattern=lambda x, y: 0.6 * _wave(y * 9 + x * 4, 0.3), bevel=0.12)
    body = spline([(0.92, 0.02), (0.6, -fat * 0.75), (0.1, -fat), (-0.4, -fat * 0.5), (-0.62, -0.07),
                   (-0.62, 0.07), (-0.4, fat * 0.5), (0.1, fat), (0.6, fat * 0.75)])  # fmt: skip
    c.part(body, base=p.main, second=p.second, pattern=lambda x, y: _scales(x, y, size) * ramp(x, 0.5, 0.42), gloss=0.4)
    c.part(ellipse(0.12, 0.1, 0.17, 0.1, 0.5), base=p.second, bevel=0.1)
    _eye(c, 0.63, -fat * 0.22, 0.1)


def _butterfly(c: _Canvas, rng: np.random.Generator) -> None:
    p = _palette(rng)
    spread, drop = float(rng.uniform(0.8, 0.92)), float(rng.uniform(0.5, 0.7))
    spots = _spots(rng.uniform((0.25, -0.55), (0.8, 0.6), (9, 2)), rng.uniform(0.05, 0.11, 9))
    border = hsv(p.hue, 0.6, 0.12)
    for side in (-1.0, 1.0):
        lower = [(0.03, 0.0), (0.4, 0.02), (0.66, 0.3), (drop, 0.62), (0.32, 0.72), (0.1, 0.42)]
        upper = [(0.03, -0.1), (0.3, -0.6), (0.66, -0.72), (spread, -0.42), (0.74, -0.02), (0.4, 0.12), (0.05, 0.08)]
        for points, colour in ((lower, p.second), (upper, p.main)):
            outline = spline([(side * x, y) for x, y in points])
            c.part(outline, base=border, bevel=0.05, gloss=0.05)
            centre = outline.mean(0)
            inner = centre + (outline - centre) * 0.84

            def veined(x: Field, y: Field) -> Field:
                veins = _wave(np.arctan2(y + 0.05, np.abs(x) + 0.02) * np.float32(2.6), 0.1, 0.05)
                return np.maximum(veins, spots(np.abs(x), y))

            c.part(inner, base=colour, second=border, pattern=veined, bevel=0.08, gloss=0.12)
    c.part(ellipse(0, 0.05, 0.065, 0.5), base=hsv(p.hue, 0.4, 0.2), second=hsv(p.hue, 0.4, 0.42),
           pattern=lambda x, y: _wave(y * 9), bevel=0.06)  # fmt: skip
    for side in (-1.0, 1.0):
        feeler = np.array([(0.0, -0.42), (side * 0.2, -0.86), (side * 0.24, -0.84), (0.03 * side, -0.4)])
        c.part(feeler, base=border, bevel=0)
        c.part(ellipse(side * 0.22, -0.85, 0.035, 0.035), base=border, bevel=0)


def _flower(c: _Canvas, rng: np.random.Generator) -> None:
    p = _palette(rng)
    petals = int(rng.integers(5, 10))
    long, wide = float(rng.uniform(0.85, 0.97)), float(rng.uniform(0.9, 1.15)) * 1.9 / petals
    for ring in range(2):
        for k in range(petals):
            turn = 2 * np.pi * (k + 0.5 * ring) / petals
            reach = long if ring == 0 else long * 0.74
            rotate = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
            shape = spline([(0.1, 0.0), (0.45 * reach, -wide * 0.45), (0.85 * reach, -wide * 0.42), (reach, 0.0),
                            (0.85 * reach, wide * 0.42), (0.45 * reach, wide * 0.45)]) @ rotate.T  # fmt: skip

            def streaks(x: Field, y: Field) -> Field:
                r = np.sqrt(x * x + y * y)
                rays = _wave(np.arctan2(y, x) * np.float32(petals * 3 / np.pi), 0.3, 0.2)
                return np.clip(ramp(r, 0.62, 0.2) + 0.35 * rays, 0, 1)

            c.part(shape, base=p.main if ring else mix(p.main, p.dark, 0.25), second=p.second, pattern=streaks,
                   bevel=0.13, gloss=0.08)  # fmt: skip
    heart = hsv(float(rng.uniform(0.08, 0.16)), 0.85, float(rng.uniform(0.45, 0.95)))
    c.part(ellipse(0, 0, 0.25, 0.25), base=heart, second=hsv(0.08, 0.9, 0.25),
           pattern=lambda x, y: _lattice_dots(x, y, 0.07, 0.3), bevel=0.2)  # fmt: skip


def _mushroom(c: _Canvas, rng: np.random.Generator) -> None:
    p = _palette(rng)
    wide, tall, stem = float(rng.uniform(0.72, 0.93)), float(rng.uniform(0.55, 0.8)), float(rng.uniform(0.16, 0.27))
    pale = hsv(0.11, float(rng.uniform(0.08, 0.3)), 0.93)
    stalk = spline([(-stem * 0.8, -0.1), (stem * 0.8, -0.1), (stem * 0.85, 0.5), (stem * 1.35, 0.88), (0, 0.96),
                    (-stem * 1.35, 0.88), (-stem * 0.85, 0.5)])  # fmt: skip
    c.part(stalk, base=pale, second=hsv(0.09, 0.35, 0.6), pattern=lambda x, y: 0.5 * _wave(x * 11 + y, 0.4, 0.3))
    gills = ellipse(0, 0.08, wide * 0.9, 0.17)
    c.part(gills, base=hsv(0.09, 0.25, 0.8), second=hsv(0.08, 0.45, 0.4),
           pattern=lambda x, y: _wave(np.arctan2(y + 0.35, x) * 14, 0.45), bevel=0.1)  # fmt: skip
    cap = spline([(-wide, 0.04), (-wide * 0.86, -tall * 0.6), (-wide * 0.4, -tall * 1.12), (wide * 0.4, -tall * 1.12),
                  (wide * 0.86, -tall * 0.6), (wide, 0.04), (wide * 0.5, 0.0), (0, -0.02),
                  (-wide * 0.5, 0.0)])  # fmt: skip
    count = int(rng.integers(9, 16))
    spots = _spots(rng.uniform((-wide, -tall * 1.05), (wide, 0.0), (count, 2)), rng.uniform(0.05, 0.14, count))
    c.part(cap, base=p.main, second=p.pale, pattern=spots, bevel=0.5, gloss=0.4)


def _ball(c: _Canvas, rng: np.random.Generator) -> None:
    p = _palette(rng)
    panels = int(rng.integers(3, 5))
    x0, y0 = (float(v) for v in rng.uniform(-0.45, 0.45, 2))
    twist = float(rng.uniform(0, 1))

    def sectors(x: Field, y: Field) -> Field:
        angle = np.arctan2(y - y0, x - x0) * np.float32(panels / (2 * np.pi)) + twist
        return np.maximum(_wave(angle, 0.5, 0.04), ramp(np.hypot(x - x0, y - y0), 0.17, 0.13))

    c.part(ellipse(0, 0, 0.96, 0.96, steps=96), base=p.main, second=p.second, pattern=sectors, bevel=0.96, gloss=0.7)


def _balloon(c: _Canvas, rng: np.random.Generator) -> None:
    p = _palette(rng)
    gores, band = int(rng.integers(3, 6)), float(rng.uniform(-0.5, -0.1))
    for x in (-0.14, 0.14):
        line = np.array([(x * 1.6, 0.3), (x * 1.6 + 0.02, 0.3), (x + 0.015, 0.74), (x - 0.015, 0.74)])
        c.part(line, base=hsv(0.08, 0.4, 0.2), bevel=0)
    basket = np.array([(-0.19, 0.7), (0.19, 0.7), (0.15, 0.95), (-0.15, 0.95)])
    c.part(basket, base=hsv(0.09, 0.6, 0.62), second=hsv(0.07, 0.7, 0.3), bevel=0.06,
           pattern=lambda x, y: np.abs(_wave(x * 13) - _wave(y * 13)))  # fmt: skip
    envelope = spline([(0, -0.95), (0.5, -0.84), (0.72, -0.4), (0.6, 0.0), (0.24, 0.46), (0, 0.52), (-0.24, 0.46),
                       (-0.6, 0.0), (-0.72, -0.4), (-0.5, -0.84)])  # fmt: skip

    def stripes(x: Field, y: Field) -> Field:
        half_width = 0.75 * np.sqrt(np.maximum(1 - ((y + 0.25) / 0.84) ** 2, 0.02))
        longitude = np.arcsin(np.clip(x / half_width, -1, 1)) * np.float32(gores / np.pi)
        stripe = _wave(longitude + 0.25, 0.5, 0.06)
        return np.where(np.abs(y - band) < 0.09, 1 - stripe, stripe).astype(np.float32)

    c.part(envelope, base=p.main, second=p.second, pattern=stripes, bevel=0.7, gloss=0.35)


def _leaf(c: _Canvas, rng: np.random.Generator) -> None:
    p = _palette(rng, 0.0, 0.42)
    wide, veins, teeth = float(rng.uniform(0.42, 0.62)), float(rng.uniform(4.5, 7)), int(rng.integers(9, 15))
    stem = np.array([(-0.03, 0.5), (0.03, 0.5), (0.05, 0.97), (0.0, 0.98)])
    c.part(stem, base=p.dark, bevel=0.04)
    t = np.linspace(0, 1, 120)
    half = wide * np.sin(np.pi * t**0.8) ** 0.75 * (1 + 0.09 * np.abs(np.sin(np.pi * teeth * t)))
    edge = np.stack([half, -0.95 + 1.6 * t], axis=-1)
    outline = np.concatenate([edge, edge[::-1] * (-1, 1)])

    def veined(x: Field, y: Field) -> Field:
        side = _wave((y + 0.75 * np.abs(x)) * np.float32(veins), 0.09, 0.06)
        return np.maximum(side, ramp(np.abs(x), 0.045, 0.015))

    c.part(outline, base=p.main, second=p.pale, pattern=veined, bevel=0.22, gloss=0.15)


def _starfish(c: _Canvas, rng: np.random.Generator) -> None:
    p = _palette(rng)
    inner = float(rng.uniform(0.26, 0.4))
    angle = np.arange(200) / 200 * 2 * np.pi
    lobes = np.abs(np.cos(angle * 2.5)) ** float(rng.uniform(1.1, 1.8))
    arms = inner + (0.96 - inner) * lobes
    pitch = float(rng.uniform(0.1, 0.15))

    def knobs(x: Field, y: Field) -> Field:
        radius, turn = np.hypot(x, y), np.arctan2(y, x)
        arm = (turn * np.float32(2.5 / np.pi) + 0.5) % 1.0 - 0.5
        ridge = ramp(np.abs(arm) * radius, 0.06, 0.02) * _wave(radius / np.float32(pitch), 0.6)
        return np.maximum(ridge, 0.8 * _lattice_dots(x, y, pitch * 0.8, 0.26))

    c.part(polar(arms), base=p.main, second=p.pale, pattern=knobs, bevel=0.28, gloss=0.1)


def _snail(c: _Canvas, rng: np.random.Generator) -> None:
    p = _palette(rng)
    skin = hsv(float(rng.uniform(0.05, 0.15)), float(rng.uniform(0.2, 0.45)), float(rng.uniform(0.55, 0.8)))
    body = spline([(-0.95, 0.72), (-0.5, 0.5), (0.2, 0.46), (0.52, 0.2), (0.66, -0.12), (0.88, -0.1), (0.9, 0.2),
                   (0.72, 0.6), (0.5, 0.76), (-0.4, 0.78)])  # fmt: skip
    for x in (0.68, 0.84):
        c.part(np.array([(x, -0.08), (x + 0.05, -0.08), (x + 0.08, -0.42), (x + 0.05, -0.42)]), base=skin, bevel=0.03)
        c.part(ellipse(x + 0.065, -0.44, 0.045, 0.045), base=hsv(0, 0, 0.1), bevel=0.04, gloss=0.6)
    c.part(body, base=skin, second=mix(skin, hsv(0, 0, 0.1), 0.5), bevel=0.25,
           pattern=lambda x, y: 0.6 * _lattice_dots(x, y, 0.07, 0.22))  # fmt: skip
    turns = float(rng.uniform(1.7, 2.6))

    def spiral(x: Field, y: Field) -> Field:
        dx, dy = x + 0.15, y + 0.08
        radius = np.hypot(dx, dy) / np.float32(0.64)
        phase = turns * np.sqrt(radius + 1e-4) * 1.6 - np.arctan2(dy, dx) * np.float32(1 / (2 * np.pi))
        return _wave(phase.astype(np.float32), 0.42, 0.12)

    shell = polar(0.64 * (1 + 0.12 * np.linspace(-0.5, 0.5, 80)), turn=0.6) - (0.15, 0.08)
    c.part(shell, base=p.main, second=p.second, pattern=spiral, bevel=0.5, gloss=0.5)


def _mug(c: _Canvas, rng: np.random.Generator) -> None:
    p = _palette(rng)
    wide, tall = float(rng.uniform(0.46, 0.6)), float(rng.uniform(0.58, 0.76))
    zigzags, rows = float(rng.uniform(2.5, 4.5)), float(rng.uniform(1.5, 2.6))
    handle = ellipse(wide, 0.05, 0.34, 0.42)
    c.part(handle, ellipse(wide, 0.05, 0.19, 0.26), base=p.main, bevel=0.08, gloss=0.4)
    x = wide * np.cos(np.linspace(np.pi, 0, 30))
    bottom = np.stack([x[::-1] * 0.88, tall + 0.12 * np.sin(np.linspace(0, np.pi, 30))], axis=-1)
    side = np.concatenate([[(-wide, -tall)], [(wide, -tall)], bottom])

    def zigzag(u: Field, v: Field) -> Field:
        longitude = np.arcsin(np.clip(u / np.float32(wide * 1.02), -1, 1)) * np.float32(zigzags / 2)
        teeth = np.abs(longitude - np.floor(longitude) - 0.5)
        return _wave((v * rows + teeth).astype(np.float32), 0.45, 0.06) * ramp(np.abs(v), tall * 0.85, tall * 0.8)

    c.part(side, base=p.main, second=p.second, pattern=zigzag, bevel=0.45, gloss=0.5)
    c.part(ellipse(0, -tall, wide, 0.14), base=p.pale, bevel=0.04)
    c.part(ellipse(0, -tall + 0.01, wide * 0.88, 0.1), base=hsv(0.07, 0.75, float(rng.uniform(0.15, 0.4))), bevel=0)


def _cactus(c: _Canvas, rng: np.random.Generator) -> None:
    p = _palette(rng, 0.2, 0.5)
    thick, ribs = float(rng.uniform(0.2, 0.28)), float(rng.uniform(9, 13))
    arms = [(-1.0, float(rng.uniform(-0.1, 0.25)), float(rng.uniform(0.35, 0.6)))]
    if rng.random() < 0.8:
        arms.append((1.0, float(rng.uniform(-0.2, 0.2)), float(rng.uniform(0.3, 0.55))))

    def ribbed(x: Field, y: Field) -> Field:
        spines = _wave(x * np.float32(ribs), 0.1, 0.08) * _wave(y * np.float32(ribs * 0.8), 0.4)
        return np.maximum(spines, 0.45 * _wave(x * np.float32(ribs) + 0.5, 0.25, 0.2))

    pot = hsv(float(rng.uniform(0, 1)), 0.55, 0.7)
    for side, y, rise in arms:
        w, out = thick * 0.6, 0.62
        elbow = spline([(0.05, y - w), (out - w, y - w), (out - w, y - rise), (out, y - rise - w), (out + w, y - rise),
                        (out + w, y), (out, y + w), (0.05, y + w)]) * (side, 1.0)  # fmt: skip
        c.part(elbow, base=p.main, second=p.pale, pattern=ribbed, bevel=0.2, gloss=0.1)
    trunk = spline([(-thick, 0.7), (-thick * 1.05, 0.0), (-thick * 0.9, -0.7), (0, -0.96), (thick * 0.9, -0.7),
                    (thick * 1.05, 0.0), (thick, 0.7)])  # fmt: skip
    c.part(trunk, base=p.main, second=p.pale, pattern=ribbed, bevel=0.25, gloss=0.1)
    c.part(np.array([(-0.4, 0.52), (0.4, 0.52), (0.3, 0.95), (-0.3, 0.95)]), base=pot, bevel=0.3, gloss=0.2)
    c.part(np.array([(-0.45, 0.46), (0.45, 0.46), (0.44, 0.6), (-0.44, 0.6)]), base=pot, bevel=0.08, gloss=0.2)


def _car(c: _Canvas, rng: np.random.Generator) -> None:
    p = _palette(rng)
    roof, bonnet = float(rng.uniform(-0.55, -0.42)), float(rng.uniform(-0.1, 0.0))
    body = spline([(-0.95, 0.28), (-0.95, 0.0), (-0.66, bonnet - 0.04), (-0.42, roof), (0.1, roof - 0.02),
                   (0.42, bonnet - 0.06), (0.86, bonnet + 0.06), (0.96, 0.2), (0.93, 0.34), (-0.9, 0.36)])  # fmt: skip
    stripe = float(rng.uniform(0.1, 0.2))
    c.part(
        body,
        base=p.main,
        second=p.second,
        pattern=lambda x, y: ramp(np.abs(y - stripe), 0.06, 0.045),
        bevel=0.3,
        gloss=0.7,
    )
    glass = hsv(0.56, 0.35, float(rng.uniform(0.25, 0.75)))
    sill = bonnet - 0.04
    rear = np.array([(-0.55, sill), (-0.37, roof + 0.1), (-0.14, roof + 0.08), (-0.14, sill)])
    front = np.array([(-0.07, sill), (-0.07, roof + 0.08), (0.1, roof + 0.09), (0.3, sill)])
    for window in (rear, front):
        c.part(window, base=glass, second=hsv(0.56, 0.1, 0.97), bevel=0.03, gloss=0.5,
               pattern=lambda x, y: 0.7 * _wave(x * 2 + y * 3, 0.2))  # fmt: skip
    c.part(ellipse(0.87, 0.12, 0.06, 0.07), base=hsv(0.14, 0.4, 1.0), bevel=0.05, gloss=0.6)
    for x in (-0.54, 0.52):
        c.part(ellipse(x, 0.36, 0.245, 0.245), base=hsv(0, 0, 0.12), bevel=0.06, gloss=0.1)

        def spokes(u: Field, v: Field, x: float = x) -> Field:
            return _wave(np.arctan2(v - 0.36, u - x) * np.float32(5 / (2 * np.pi)), 0.3)

        hub = ellipse(x, 0.36, 0.14, 0.14)
        c.part(hub, base=hsv(0.6, 0.05, 0.8), second=hsv(0, 0, 0.25), pattern=spokes, bevel=0.05, gloss=0.5)


_DRAW: dict[str, Callable[[_Canvas, np.random.Generator], None]] = {
    "ball": _ball,
    "balloon": _balloon,
    "butterfly": _butterfly,
    "cactus": _cactus,
    "car": _car,
    "fish": _fish,
    "flower": _flower,
    "leaf": _leaf,
    "mug": _mug,
    "mushroom": _mushroom,
    "snail": _snail,
    "starfish": _starfish,
}
CLASSES: tuple[str, ...] = tuple(_DRAW)
"""Names of the object classes, sorted."""


def draw_object(name: str, pose: Pose, light: Field, rng: np.random.Generator) -> Sprite:
    """Draw one object of class ``name`` (one of :data:`CLASSES`), lit from the unit vector ``light`` (x, y, z)."""
    canvas = _Canvas(pose, light, rng)
    _DRAW[name](canvas, rng)
    return canvas.sprite()
