"""The twelve background families of the made scenes, each with its own colours and structure, none like another.

A background is a function of (random generator, height, width) to a float32 picture (H, W, 3) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from cast_fast.data.synthetic_paint import Field, blur, fractal_noise, gradient, hsv, mix, ramp


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def _rgb(colour: Field) -> tuple[float, float, float]:
    return float(colour[0]), float(colour[1]), float(colour[2])


def _meadow(rng: np.random.Generator, h: int, w: int) -> Field:
    horizon = int(h * _uniform(rng, 0.12, 0.4))
    hue = _uniform(rng, 0.2, 0.32)
    sky = gradient(
        h, w, [hsv(0.58, _uniform(rng, 0.3, 0.6), 0.9), hsv(0.55, 0.12, 0.97)], [0.0, max(horizon / h, 0.01)]
    )
    streaks = fractal_noise(rng, h, w, 26, 5, stretch=(3.0, 0.35), gain=0.7)
    patches = fractal_noise(rng, h, w, 160, 3)
    shade = np.clip(0.25 + 0.75 * streaks * (0.6 + 0.6 * patches), 0, 1)
    grass = mix(hsv(hue + 0.04, 0.85, 0.2), hsv(hue - 0.03, 0.65, 0.75), shade)
    hills = horizon + (fractal_noise(rng, 1, w, w / 2, 3)[0] - 0.5) * h * 0.08
    rows = np.arange(h, dtype=np.float32)[:, None]
    picture = mix(sky, grass, np.clip(rows - hills[None, :], 0, 1))
    haze = ramp(rows, horizon + 0.25 * h, horizon) * (rows > horizon - 0.05 * h) * 0.35
    picture = mix(picture, hsv(hue, 0.15, 0.9), np.broadcast_to(haze, (h, w)))
    for _ in range(int(rng.integers(250, 400))):
        y = horizon + (h * 1.05 - horizon) * float(rng.random()) ** 0.6
        near = (y - horizon) / (h - horizon)
        x, lean = _uniform(rng, 0, w), _uniform(rng, -0.3, 0.3)
        tall = (0.03 + 0.12 * near) * h
        colour = hsv(hue + _uniform(rng, -0.04, 0.05), 0.75, _uniform(rng, 0.2, 0.75))
        cv2.line(
            picture,
            (int(x), int(y)),
            (int(x + lean * tall), int(y - tall)),
            _rgb(colour),
            1 + int(near * 1.6),
            cv2.LINE_AA,
        )
    petal = _uniform(rng, 0, 1)
    for _ in range(int(rng.integers(15, 70))):
        y = horizon + (h - horizon) * _uniform(rng, 0.08, 1)
        size = 1 + 3.5 * (y - horizon) / (h - horizon)
        colour = hsv(petal + _uniform(rng, -0.04, 0.04), _uniform(rng, 0.1, 0.7), 0.95)
        cv2.circle(picture, (int(_uniform(rng, 0, w)), int(y)), int(size), _rgb(colour), -1, cv2.LINE_AA)
    return picture


def _foliage(rng: np.random.Generator, h: int, w: int) -> Field:
    hue = _uniform(rng, 0.25, 0.4)
    picture = mix(hsv(hue, 0.8, 0.08), hsv(hue, 0.7, 0.3), fractal_noise(rng, h, w, 120, 3))
    for layer in range(3):
        near = (layer + 1) / 3
        for _ in range(70 - 15 * layer):
            x, y = int(_uniform(rng, -20, w + 20)), int(_uniform(rng, -20, h + 20))
            long = int((0.04 + 0.08 * near) * h * _uniform(rng, 0.7, 1.3))
            turn = _uniform(rng, 0, 360)
            colour = hsv(
                hue + _uniform(rng, -0.06, 0.05), _uniform(rng, 0.5, 0.9), (0.2 + 0.45 * near) * _uniform(rng, 0.6, 1.2)
            )
            axes = (long, max(2, int(long * 0.45)))
            cv2.ellipse(picture, (x, y), axes, turn, 0, 360, _rgb(colour), -1, cv2.LINE_AA)
            cv2.ellipse(picture, (x, y), axes, turn, 0, 180, _rgb(colour * 0.8), -1, cv2.LINE_AA)
            reach = np.array([np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))]) * long
            ends = [(int(x - reach[0]), int(y - reach[1])), (int(x + reach[0]), int(y + reach[1]))]
            cv2.line(picture, ends[0], ends[1], _rgb(np.clip(colour * 1.4, 0, 1)), 1, cv2.LINE_AA)
        if layer < 2:
            picture = blur(picture, 5.0 - 3.0 * layer)
    return picture


def _forest(rng: np.random.Generator, h: int, w: int) -> Field:
    hue = _uniform(rng, 0.16, 0.42)
    fog = hsv(hue, _uniform(rng, 0.15, 0.35), _uniform(rng, 0.7, 0.92))
    ground = int(h * _uniform(rng, 0.6, 0.8))
    picture = gradient(h, w, [hsv(hue + 0.05, 0.45, 0.4), fog, mix(fog, hsv(hue, 0.4, 0.4), 0.4)], [0, ground / h, 1])
    bark = fractal_noise(rng, h, w, 30, 4, stretch=(4.0, 0.4), gain=0.7)
    leaves = fractal_noise(rng, h, w, 60, 5, gain=0.75)
    litter = mix(
        hsv(0.08, 0.6, 0.18), hsv(hue - 0.05, 0.55, 0.6), fractal_noise(rng, h, w, 14, 4, stretch=(0.5, 1.4), gain=0.8)
    )
    rows = np.arange(h, dtype=np.float32)[:, None]
    for layer in range(4):
        near = (layer + 1) / 4
        base = ground + (h - ground) * (near - 0.25) * 0.8
        picture = mix(
            picture, mix(fog, litter, 0.3 + 0.7 * near), np.broadcast_to(ramp(rows, base - 3, base + 0.12 * h), (h, w))
        )
        mask = np.zeros((h, w), np.float32)
        for _ in range(int(rng.integers(3, 7)) + 6 - 2 * layer):
            x, wide, lean = (
                _uniform(rng, 0, w),
                w * (0.006 + 0.03 * near**1.5) * _uniform(rng, 0.7, 1.3),
                _uniform(rng, -0.04, 0.04),
            )
            foot = base + _uniform(rng, 0, 0.05) * h
            corners = [
                (x - wide / 2 + lean * h, 0),
                (x + wide / 2 + lean * h, 0),
                (x + wide * 0.75, foot),
                (x - wide * 0.75, foot),
            ]
            cv2.fillConvexPoly(mask, np.array(corners, np.float64).astype(np.int32), 1.0, cv2.LINE_AA)
        trunk = mix(hsv(0.07, 0.45, 0.12), hsv(0.08, 0.35, 0.45), bark)
        picture = mix(picture, mix(fog, trunk, 0.25 + 0.75 * near), mask)
        if layer < 3:
            crown = ramp(leaves, 0.5, 0.62) * ramp(rows, 0.55 * h, 0.05 * h)
            picture = mix(picture, mix(fog, hsv(hue, 0.7, 0.35), 0.2 + 0.6 * near), 0.6 * crown)
            leaves = np.roll(leaves, w // 3, axis=1)
    return picture


def _water(rng: np.random.Generator, h: int, w: int) -> Field:
    hue = _uniform(rng, 0.46, 0.6)
    picture = gradient(h, w, [hsv(hue - 0.03, 0.35, 0.95), hsv(hue, 0.75, 0.65), hsv(hue + 0.05, 0.9, 0.25)])
    ridges = 1 - np.abs(fractal_noise(rng, h, w, 60, 3, stretch=(0.7, 1.2)) * 2 - 1)
    ridges *= 1 - np.abs(fractal_noise(rng, h, w, 45, 3, stretch=(0.7, 1.2)) * 2 - 1)
    rows = np.linspace(0, 1, h, dtype=np.float32)[:, None]
    picture = mix(picture, hsv(hue, 0.08, 1.0), ramp(ridges, 0.6, 1.0) * (0.75 - 0.6 * rows))
    rays = fractal_noise(rng, 1, 2 * w, w / 7, 4)[0]
    slope = _uniform(rng, -0.5, 0.5)
    columns = (np.arange(w)[None, :] + slope * np.arange(h)[:, None] + w // 2).astype(np.int64) % (2 * w)
    picture = mix(picture, hsv(hue, 0.15, 1.0), ramp(rays[columns], 0.5, 0.95) * (0.45 * (1 - rows)))
    bubbles = picture.copy()
    for _ in range(int(rng.integers(15, 50))):
        centre = (int(_uniform(rng, 0, w)), int(_uniform(rng, 0, h)))
        cv2.circle(bubbles, centre, int(_uniform(rng, 2, 9)), _rgb(hsv(hue, 0.1, 1.0)), 1, cv2.LINE_AA)
    return mix(picture, bubbles, 0.5)


def _sky(rng: np.random.Generator, h: int, w: int) -> Field:
    if rng.random() < 0.3:
        low, high = hsv(_uniform(rng, 0.02, 0.1), 0.6, 0.98), hsv(_uniform(rng, 0.6, 0.72), 0.55, 0.6)
    else:
        hue = _uniform(rng, 0.54, 0.62)
        low, high = hsv(hue, 0.15, 0.98), hsv(hue + 0.02, _uniform(rng, 0.55, 0.85), _uniform(rng, 0.55, 0.85))
    picture = gradient(h, w, [high, low])
    down, right = max(4, h // 40), max(4, w // 60)
    broad = fractal_noise(rng, h + down, w + right, _uniform(rng, 150, 300), 7, stretch=(0.7, 1.3), gain=0.5)
    cloud = blur(broad[:h, :w], 1.2)
    level = _uniform(rng, 0.42, 0.55)
    cover = ramp(cloud, level, level + 0.3)
    lit = blur(broad, 3)
    lit = lit[:h, :w] - lit[down:, right:]
    body = mix(mix(high, hsv(0.6, 0.06, 0.7), 0.8), mix(low, hsv(0, 0, 1.0), 0.75), np.clip(0.6 + 5 * lit, 0, 1))
    return mix(picture, body, cover * 0.95)


def _beach(rng: np.random.Generator, h: int, w: int) -> Field:
    hue = _uniform(rng, 0.08, 0.13)
    sand_hue = hsv(hue, _uniform(rng, 0.25, 0.45), _uniform(rng, 0.82, 0.95))
    ripples = fractal_noise(rng, h, w, 40, 3, stretch=(0.3, 2.2))
    grit = rng.random((h, w), dtype=np.float32)
    sand = mix(mix(sand_hue, hsv(hue - 0.02, 0.5, 0.5), 0.5), sand_hue, np.clip(ripples * 0.9 + 0.25 * grit, 0, 1))
    line = h * _uniform(rng, 0.2, 0.5)
    wander = (fractal_noise(rng, 1, w, w / 3, 4)[0] - 0.5) * h * 0.16
    depth = (line + wander)[None, :] - np.arange(h, dtype=np.float32)[:, None]
    sea_hue = _uniform(rng, 0.47, 0.56)
    swell = fractal_noise(rng, h, w, 26, 4, stretch=(0.35, 2.5), gain=0.6)
    sea = mix(hsv(sea_hue + 0.04, 0.8, 0.4), hsv(sea_hue, 0.4, 0.9), swell)
    wet = mix(sand, sand * 0.62, ramp(depth, -0.16 * h, -0.03 * h))
    picture = mix(wet, mix(sea, sand, 0.45 * ramp(depth, 0.15 * h, 0.0)), ramp(depth, -2, 2))
    lace = fractal_noise(rng, h, w, 18, 3, stretch=(0.6, 1.4))
    foam = np.exp(-((depth / (0.018 * h)) ** 2)) + 0.8 * np.exp(-(((depth - 0.09 * h) / (0.022 * h)) ** 2))
    return mix(picture, hsv(0.5, 0.03, 1.0), np.clip(foam * (0.35 + 1.1 * lace), 0, 1).astype(np.float32))


def _desert(rng: np.random.Generator, h: int, w: int) -> Field:
    hue = _uniform(rng, 0.045, 0.1)
    horizon = _uniform(rng, 0.3, 0.5)
    sky = hsv(0.58, _uniform(rng, 0.2, 0.5), 0.92) if rng.random() < 0.6 else hsv(0.97, 0.35, 0.75)
    picture = gradient(h, w, [sky, hsv(hue + 0.03, 0.3, 0.98)], [0, horizon])
    rows = np.arange(h, dtype=np.float32)[:, None]
    ripples = fractal_noise(rng, h, w, 16, 3, stretch=(0.5, 3.0), gain=0.6)
    layers = int(rng.integers(3, 6))
    for layer in range(layers):
        near = (layer + 1) / layers
        crest = (horizon + (0.95 - horizon) * layer / layers) * h
        crest = crest + (fractal_noise(rng, 1, w, w * _uniform(rng, 0.4, 0.9), 2)[0] - 0.5) * h * (0.08 + 0.22 * near)
        slope = np.gradient(blur(crest[None, :].astype(np.float32), w / 25)[0])
        lit = np.clip(0.55 + 2.2 * slope, 0.1, 1.0)[None, :] * np.clip(
            1.0 - (rows - crest[None, :]) / (1.4 * h), 0.4, 1
        )
        sand = mix(
            hsv(hue - 0.02, 0.75, 0.3 + 0.1 * (1 - near)),
            hsv(hue + 0.015, 0.5, 0.97),
            np.clip(lit, 0, 1).astype(np.float32),
        )
        sand = sand * (0.88 + 0.24 * ripples * near)[..., None]
        picture = mix(picture, mix(sand, picture, 0.3 * (1 - near)), np.clip(rows - crest[None, :], 0, 1))
    return np.clip(picture, 0, 1)


def _cells(rng: np.random.Generator, h: int, w: int, pitch: float) -> tuple[np.ndarray, Field]:
    """Voronoi cells of jittered points: labels (H, W) from 1 and the distance in pixels to the cell's border."""
    rows, columns = int(h / pitch) + 2, int(w / pitch) + 2
    y = (np.arange(rows)[:, None] + rng.uniform(-0.4, 0.4, (rows, columns))) * pitch
    x = (
        np.arange(columns)[None, :] + 0.5 * (np.arange(rows)[:, None] % 2) + rng.uniform(-0.4, 0.4, (rows, columns))
    ) * pitch
    seeds = np.ones((h, w), np.uint8)
    seeds[np.clip(y, 0, h - 1).astype(int).ravel(), np.clip(x, 0, w - 1).astype(int).ravel()] = 0
    _, labels = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    border = np.ones((h, w), np.uint8)
    border[:, 1:][labels[:, 1:] != labels[:, :-1]] = 0
    border[1:][labels[1:] != labels[:-1]] = 0
    return labels, cv2.distanceTransform(border, cv2.DIST_L2, 3).astype(np.float32)


def _pebbles(rng: np.random.Generator, h: int, w: int) -> Field:
    pitch = _uniform(rng, 34, 62)
    labels, rim = _cells(rng, h, w, pitch)
    hue = _uniform(rng, 0.0, 1.0) if rng.random() < 0.3 else _uniform(rng, 0.05, 0.12)
    count = int(labels.max()) + 1
    tone = rng.uniform(0.35, 0.9, count).astype(np.float32)
    tint = np.stack(
        [
            hsv(hue + a, s, 1.0)
            for a, s in zip(rng.uniform(-0.05, 0.05, count), rng.uniform(0.03, 0.28, count), strict=True)
        ]
    )
    stone = tint[labels] * tone[labels][..., None]
    stone *= (0.78 + 0.44 * fractal_noise(rng, h, w, 22, 4, gain=0.7))[..., None]
    dome = blur(np.sqrt(np.clip(rim / np.float32(pitch * 0.33), 0, 1)), 1.5)
    light = cv2.Sobel(dome, cv2.CV_32F, 1, 0) + cv2.Sobel(dome, cv2.CV_32F, 0, 1)
    stone = stone * np.clip(0.72 + 0.28 * dome + 0.3 * light, 0.3, 1.3)[..., None]
    return np.clip(mix(hsv(hue, 0.3, 0.1), stone, ramp(dome, 0.2, 0.5)), 0, 1)


def _moss(rng: np.random.Generator, h: int, w: int) -> Field:
    tilt = _uniform(rng, -0.4, 0.4)
    yy, xx = np.mgrid[0:h, 0:w].astype(np.float32)
    warp = fractal_noise(rng, h, w, 150, 4)
    strata = np.sin((yy + tilt * xx + 130 * warp) * np.float32(_uniform(rng, 0.12, 0.2)))
    rough = fractal_noise(rng, h, w, 60, 6, gain=0.68)
    relief = cv2.Sobel(rough, cv2.CV_32F, 1, 1, ksize=3) + cv2.Sobel(blur(rough, 2), cv2.CV_32F, 0, 1, ksize=3)
    hue = _uniform(rng, 0.03, 0.14)
    rock = mix(hsv(hue, 0.3, 0.2), hsv(hue, 0.2, 0.68), np.clip(0.55 * rough + 0.2 * strata + 0.2, 0, 1))
    rock = np.clip(rock * (1 + 1.6 * relief)[..., None], 0, 1)
    green = _uniform(rng, 0.2, 0.3)
    fluff = fractal_noise(rng, h, w, 9, 3, gain=0.8)
    moss = mix(hsv(green + 0.03, 0.85, 0.14), hsv(green - 0.03, 0.75, 0.66), fluff)
    return mix(rock, moss, ramp(warp + 0.35 * (rough - 0.5), 0.48, 0.6))


def _brick(rng: np.random.Generator, h: int, w: int) -> Field:
    tall = _uniform(rng, 24, 42)
    long = tall * _uniform(rng, 2.2, 3.0)
    skew = _uniform(rng, -0.12, 0.12)
    yy, xx = np.mgrid[0:h, 0:w].astype(np.float32)
    yy = yy + skew * xx + 3 * fractal_noise(rng, h, w, 100, 2)
    row = np.floor(yy / tall)
    across = xx / long + 0.5 * (row % 2)
    column = np.floor(across)
    shades = rng.uniform(0.55, 1.1, 4096).astype(np.float32)
    shade = shades[(row * 61 + column * 17).astype(np.int64) % 4096]
    dx = np.minimum(across - column, 1 - (across - column)) * long
    dy = np.minimum(yy / tall - row, 1 - (yy / tall - row)) * tall
    rough = fractal_noise(rng, h, w, 18, 4, gain=0.75)
    joint = ramp(np.minimum(dx, dy) + 3 * (rough - 0.5), 1.2, 3.4)
    painted = rng.random() < 0.3
    base = (
        hsv(_uniform(rng, 0, 1), 0.15, 0.85)
        if painted
        else hsv(_uniform(rng, 0.0, 0.06), _uniform(rng, 0.5, 0.75), 0.68)
    )
    brick = base * (shade * (0.7 + 0.6 * rough))[..., None]
    mortar = hsv(0.1, 0.08, _uniform(rng, 0.5, 0.8)) * (0.8 + 0.4 * rough)[..., None]
    stains = 0.75 + 0.35 * fractal_noise(rng, h, w, 200, 3)
    return np.clip(mix(mortar, brick, joint) * stains[..., None], 0, 1)


def _wood(rng: np.random.Generator, h: int, w: int) -> Field:
    turned = rng.random() < 0.4
    rows, columns = (w, h) if turned else (h, w)
    plank = rows / float(rng.integers(3, 7))
    yy = np.broadcast_to(np.arange(rows, dtype=np.float32)[:, None], (rows, columns))
    index = np.floor(yy / plank).astype(np.int64)
    shift = rng.uniform(0, 400, 16).astype(np.float32)[index]
    warp = fractal_noise(rng, rows, columns, 120, 3, stretch=(0.5, 3.0))
    rings = np.sin((yy * 0.12 + 38 * warp + shift) * np.float32(_uniform(rng, 0.8, 1.3)))
    fibre = fractal_noise(rng, rows, columns, 20, 4, stretch=(0.16, 5.0), gain=0.8)
    hue, value = _uniform(rng, 0.05, 0.1), _uniform(rng, 0.5, 0.85)
    tone = np.clip(0.45 + 0.22 * rings + 0.5 * (fibre - 0.4), 0, 1)
    boards = mix(hsv(hue - 0.015, 0.7, value * 0.45), hsv(hue + 0.01, _uniform(rng, 0.35, 0.6), value), tone)
    boards *= rng.uniform(0.8, 1.12, 16).astype(np.float32)[index][..., None]
    seam = np.minimum(yy % plank, plank - yy % plank)
    boards *= (0.35 + 0.65 * ramp(seam, 0.5, 2.8))[..., None]
    return np.clip(np.ascontiguousarray(boards.transpose(1, 0, 2)) if turned else boards, 0, 1)


def _city(rng: np.random.Generator, h: int, w: int) -> Field:
    hue = _uniform(rng, 0.58, 0.78)
    street = int(h * _uniform(rng, 0.6, 0.78))
    picture = gradient(h, w, [hsv(hue, 0.75, 0.12), hsv(hue + 0.08, 0.6, 0.42), hsv(hue, 0.4, 0.1)], [0, street / h, 1])
    for layer in range(2):
        x = -20.0
        while x < w:
            wide, top = _uniform(rng, 0.07, 0.2) * w, street - h * _uniform(rng, 0.15, 0.6 - 0.15 * layer)
            wall = hsv(hue, 0.5, 0.24 - 0.1 * layer)
            cv2.rectangle(picture, (int(x), int(top)), (int(x + wide), street), _rgb(wall), -1)
            pitch = int(_uniform(rng, 9, 16))
            lit_hue, share = _uniform(rng, 0.08, 0.16), _uniform(rng, 0.2, 0.6)
            for wy in range(int(top) + 6, street - 8, pitch + 4):
                for wx in range(int(x) + 5, int(x + wide) - 6, pitch):
                    if rng.random() < share:
                        lamp = hsv(lit_hue, 0.5, _uniform(rng, 0.5, 1.0))
                        cv2.rectangle(picture, (wx, wy), (wx + pitch // 2, wy + pitch // 2 + 2), _rgb(lamp), -1)
            x += wide * _uniform(rng, 0.8, 1.2)
        picture = blur(picture, 3.5 - 2 * layer)
    reflection = picture[street - 1 :: -1][: h - street]
    reflection = blur(np.ascontiguousarray(cv2.resize(reflection, (w, h - street))), 5) * 0.55
    shimmer = fractal_noise(rng, h - street, w, 22, 3, stretch=(0.3, 2.5))
    picture[street:] = picture[street:] * 0.4 + reflection * (0.5 + shimmer)[..., None]
    glow = np.zeros_like(picture)
    for _ in range(int(rng.integers(12, 30))):
        centre = (int(_uniform(rng, 0, w)), int(street - h * _uniform(rng, -0.1, 0.3)))
        radius = int(_uniform(rng, 5, 20))
        lamp = hsv(
            float(rng.choice([0.0, 0.08, 0.13, 0.35, 0.55, 0.9])), _uniform(rng, 0.3, 0.8), _uniform(rng, 0.3, 0.7)
        )
        cv2.circle(glow, centre, radius, _rgb(lamp), -1, cv2.LINE_AA)
    glow = blur(glow, 1.2)
    return np.clip(1 - (1 - picture) * (1 - 0.75 * glow), 0, 1)


_DRAW: dict[str, Callable[[np.random.Generator, int, int], Field]] = {
    "beach": _beach,
    "brick": _brick,
    "city": _city,
    "desert": _desert,
    "foliage": _foliage,
    "forest": _forest,
    "meadow": _meadow,
    "moss": _moss,
    "pebbles": _pebbles,
    "sky": _sky,
    "water": _water,
    "wood": _wood,
}
BACKGROUNDS: tuple[str, ...] = tuple(_DRAW)
"""Names of the background families, sorted."""


def draw_background(name: str, rng: np.random.Generator, height: int, width: int) -> Field:
    """Draw a background of family ``name`` (one of :data:`BACKGROUNDS`), float32 (height, width, 3) in [0, 1]."""
    return np.clip(_DRAW[name](rng, height, width), 0, 1).astype(np.float32, copy=False)
