"""Primitives shared by the made scenes: colour, fractal noise, soft patterns, smooth outlines. NumPy and OpenCV only.

Pictures are float32 arrays (H, W, 3), RGB in [0, 1]; masks and patterns are float32 arrays (H, W) in [0, 1].
"""

from __future__ import annotations

import colorsys
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[Any]  # float32 by convention; Any, because OpenCV's and NumPy's signatures promise less
Points = NDArray[np.float64]


def hsv(hue: float, saturation: float, value: float) -> Field:
    """One RGB colour, float32 (3,); hue in turns (taken modulo 1), the others clipped to [0, 1]."""
    saturation, value = min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0)
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32)


def fractal_noise(
    rng: np.random.Generator,
    height: int,
    width: int,
    cell: float,
    octaves: int = 4,
    stretch: tuple[float, float] = (1.0, 1.0),
    gain: float = 0.5,
) -> Field:
    """Value noise summed over octaves, float32 (H, W), scaled to span [0, 1] exactly.

    Args:
        cell: side in pixels of the coarsest cell; each octave halves it and multiplies the amplitude by ``gain``.
        stretch: factors (vertical, horizontal) on the cell, for grass, wood grain or ripples.
    """
    total = np.zeros((height, width), np.float32)
    amplitude = 1.0
    for _ in range(octaves):
        rows = max(2, min(height, round(height / (cell * stretch[0])) + 1))
        columns = max(2, min(width, round(width / (cell * stretch[1])) + 1))
        grid = rng.random((rows, columns), dtype=np.float32)
        total += np.float32(amplitude) * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        cell *= 0.5
        amplitude *= gain
    total -= total.min()
    top = total.max()
    return total / top if top > 0 else total


def ramp(values: Field, low: float, high: float) -> Field:
    """Smoothstep from 0 at ``low`` to 1 at ``high`` (``low > high`` reverses it)."""
    t = np.clip((values - np.float32(low)) * np.float32(1.0 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def mix(first: Field, second: Field, share: Field | float) -> Field:
    """``first`` where share is 0, ``second`` where it is 1; colours (3,) or pictures, share (H, W) or a number."""
    weight = np.asarray(share, np.float32)
    if weight.ndim == 2:
        weight = weight[..., None]
    return (first + (second - first) * weight).astype(np.float32, copy=False)


def gradient(height: int, width: int, colours: list[Field], positions: list[float] | None = None) -> Field:
    """Vertical colour ramp (H, W, 3) through ``colours`` at ``positions`` (fractions of the height, increasing)."""
    at = np.linspace(0.0, 1.0, len(colours)) if positions is None else np.asarray(positions)
    rows = (np.arange(height) + 0.5) / height
    stack = np.asarray(colours, np.float32)
    column = np.stack([np.interp(rows, at, stack[:, channel]) for channel in range(3)], axis=-1).astype(np.float32)
    return np.repeat(column[:, None], width, axis=1)


def blur(picture: Field, sigma: float) -> Field:
    """Gaussian blur; ``sigma`` in pixels, 0 leaves the picture as it is."""
    if sigma <= 0:
        return picture
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101), np.float32)


def spline(points: list[tuple[float, float]], steps: int = 8) -> Points:
    """Closed Catmull-Rom curve through the points, float64 (len(points) * steps, 2)."""
    p1 = np.asarray(points, np.float64)
    p0, p2, p3 = np.roll(p1, 1, 0), np.roll(p1, -1, 0), np.roll(p1, -2, 0)
    t = (np.arange(steps) / steps)[None, :, None]
    p0, p1, p2, p3 = p0[:, None], p1[:, None], p2[:, None], p3[:, None]
    linear, square, cube = p2 - p0, 2 * p0 - 5 * p1 + 4 * p2 - p3, 3 * p1 - p0 - 3 * p2 + p3
    curve = 0.5 * (2 * p1 + linear * t + square * t**2 + cube * t**3)
    return curve.reshape(-1, 2)


def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0, steps: int = 48) -> Points:
    """Outline of an ellipse around (x, y), turned by ``turn`` radians."""
    angle = np.arange(steps) * (2 * np.pi / steps)
    a, b = rx * np.cos(angle), ry * np.sin(angle)
    c, s = np.cos(turn), np.sin(turn)
    return np.stack([x + a * c - b * s, y + a * s + b * c], axis=-1)


def polar(radius: NDArray[np.float64], turn: float = 0.0) -> Points:
    """Outline r(angle) around the origin from radii at equally spaced angles."""
    angle = turn + np.arange(len(radius)) * (2 * np.pi / len(radius))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
