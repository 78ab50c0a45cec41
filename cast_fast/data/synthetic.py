"""Made scenes with exact saliency maps: the dataset that needs no download, for trying, testing and benchmarks.

A scene shows one main object (sometimes two of its class), smaller objects of other classes that may cover it in
part, and a background. Its saliency map holds exactly the visible pixels of the main objects. The background is of the
class's own family with probability ``correlation`` and of a family drawn uniformly otherwise, so that one can measure
how far a model relies on the background. Everything that is not the background stays the same when only
``correlation`` changes.

A scene is a pure function of its arguments: it depends neither on how many scenes are written nor on how many
processes write them. The bytes repeat on one machine with one set of library versions; across processors or
versions of NumPy, OpenCV and Pillow single pixels may differ by one level.

On disk (contract (a) of folder pairs): ``OUT/images/NAME.jpg``, ``OUT/saliency/NAME.png`` (8-bit grey, 0 or 255),
``OUT/labels.csv`` (``stem,class,background``), ``OUT/demo.json`` (the settings), ``OUT/preview.jpg``.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cast_fast.data.children import Child, ChildCrash, in_children, serve
from cast_fast.data.progress import show_progress
from cast_fast.data.synthetic_backgrounds import BACKGROUNDS, draw_background
from cast_fast.data.synthetic_objects import CLASSES, Pose, Sprite, draw_object
from cast_fast.data.synthetic_paint import Field, blur
from cast_fast.errors import UserError
from cast_fast.files import claimed, remove_parts, shown, write_whole

HELP = "write a dataset of made scenes with saliency maps and labels"

DEFAULT_CORRELATION = 0.8
SIZES = ((640, 480), (480, 640), (640, 427), (427, 640), (640, 360), (500, 375), (612, 612), (640, 512))
"""(width, height) of the scenes when no size is given; the first is as frequent as all the others together."""

OWN_BACKGROUND: dict[str, str] = {
    "ball": "brick",
    "balloon": "sky",
    "butterfly": "meadow",
    "cactus": "desert",
    "car": "city",
    "fish": "water",
    "flower": "foliage",
    "leaf": "pebbles",
    "mug": "wood",
    "mushroom": "forest",
    "snail": "moss",
    "starfish": "beach",
}
"""The background family that goes with each class."""

_MODULE = "cast_fast.data.synthetic"
_RECORD = "demo.json"
_FORMAT = 1
_JPEG_QUALITY = 92
_MIN_SIDE, _MAX_SIDE = 64, 4096
_MIN_VISIBLE = 0.6
_SHADOW = 0.5
_FEW = 24  # below this many scenes, starting processes costs more than it saves

# Names of the independent random streams of a scene.
_CLASS, _BACKGROUND, _SIZE, _OBJECTS, _SCENERY, _FINISH = range(6)


class Scene(NamedTuple):
    """One made scene."""

    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    saliency: NDArray[np.uint8]
    """(H, W), 255 on the visible pixels of the main objects, else 0."""
    label: str
    """Class of the main objects, one of :data:`CLASSES`."""
    background: str
    """Background family, one of :data:`BACKGROUNDS`."""


class _Placed(NamedTuple):
    name: str
    pose: Pose
    main: bool


class _Layer(NamedTuple):
    sprite: Sprite
    main: bool


def _stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(index, purpose))))


def identity(seed: int, index: int, correlation: float) -> tuple[str, str]:
    """Class and background family of a scene, without drawing it.

    Every run of ``len(CLASSES)`` scenes that starts at a multiple of that number holds each class once.
    """
    block, place = divmod(index, len(CLASSES))
    label = CLASSES[_stream(seed, block, _CLASS).permutation(len(CLASSES))[place]]
    rng = _stream(seed, index, _BACKGROUND)
    own, any_family = rng.random() < correlation, BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    return label, OWN_BACKGROUND[label] if own else any_family


def make_scene(seed: int, index: int, correlation: float, size: tuple[int, int] | None = None) -> Scene:
    """Draws scene number ``index``.

    Args:
        seed: at least 0; scenes of different seeds are independent.
        index: at least 0.
        correlation: probability in [0, 1] that the background is of the class's own family; it is drawn uniformly
            from all families otherwise.
        size: (width, height) in pixels, each from 64 to 4096; None draws one of :data:`SIZES`.

    Raises:
        ValueError: an argument is out of range.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"got seed {seed} and index {index}, expected both to be at least 0")
    if not 0 <= correlation <= 1:
        raise ValueError(f"got correlation {correlation}, expected a number in [0, 1]")
    if size is None:
        rng = _stream(seed, index, _SIZE)
        width, height = SIZES[0] if rng.random() < 0.5 else SIZES[1 + rng.integers(len(SIZES) - 1)]
    else:
        width, height = size
        if not (_MIN_SIDE <= width <= _MAX_SIDE and _MIN_SIDE <= height <= _MAX_SIDE):
            raise ValueError(f"got size {width}x{height}, expected sides from {_MIN_SIDE} to {_MAX_SIDE}")

    label, background = identity(seed, index, correlation)
    finish = _stream(seed, index, _FINISH)
    scenery = draw_background(background, _stream(seed, index, _SCENERY), height, width)
    scenery = blur(scenery, float(finish.uniform(0, 1.8)) * min(width, height) / 480)
    layers, light = _draw_layers(_stream(seed, index, _OBJECTS), label, width, height)
    picture = _compose(scenery, layers, light)
    saliency = np.where(_main_coverage(layers, height, width) >= 0.5, 255, 0).astype(np.uint8)
    return Scene(_develop(picture, finish), saliency, label, background)


def _draw_layers(rng: np.random.Generator, label: str, width: int, height: int) -> tuple[list[_Layer], Field]:
    """The drawn objects back to front, and the light that they are lit by."""
    light = _light(rng)
    placed = _arrange(rng, label, width, height)
    layers = [_Layer(draw_object(p.name, p.pose, light, rng), p.main) for p in placed]
    return _uncover_main(layers, height, width), light


def _light(rng: np.random.Generator) -> Field:
    """Unit vector towards the light: from above, from the left or right, towards the viewer."""
    light = np.array([rng.uniform(-0.6, 0.6), rng.uniform(-0.7, -0.25), rng.uniform(0.6, 0.9)])
    return (light / np.linalg.norm(light)).astype(np.float32)


def _arrange(rng: np.random.Generator, label: str, width: int, height: int) -> list[_Placed]:
    """Places objects back to front: some distractors, the main objects, the other distractors."""
    short = min(width, height)

    def pose(radius: float, margin: float) -> Pose:
        x = rng.uniform(min(margin, width / 2), max(width - margin, width / 2))
        y = rng.uniform(min(margin, height / 2), max(height - margin, height / 2))
        return Pose(float(x), float(y), radius, float(rng.normal(0, 0.35)), bool(rng.random() < 0.5))

    twins = rng.random() < 0.15
    largest = 0.28 if twins else 0.44
    mains: list[Pose] = []
    for _ in range(2 if twins else 1):
        radius = float(np.exp(rng.uniform(np.log(0.19), np.log(largest)))) * short
        for _ in range(20):
            candidate = pose(radius, 0.8 * radius)
            if all(_distance(candidate, other) > 0.9 * (radius + other.radius) for other in mains):
                break
        mains.append(candidate)

    small = min(main.radius for main in mains)
    others = [name for name in CLASSES if name != label]
    behind: list[_Placed] = []
    before: list[_Placed] = []
    for _ in range(int(rng.integers(2, 6))):
        name = others[rng.integers(len(others))]
        radius = max(8.0, small * float(rng.uniform(0.28, 0.55)))
        taken = [placed.pose for placed in behind + before]
        for _ in range(20):
            candidate = pose(radius, 0.4 * radius)
            clear = all(_distance(candidate, main) > 0.75 * main.radius for main in mains)
            if clear and all(_distance(candidate, other) > 0.8 * (radius + other.radius) for other in taken):
                break
        (before if rng.random() < 0.5 else behind).append(_Placed(name, candidate, False))
    return behind + [_Placed(label, main, True) for main in mains] + before


def _distance(first: Pose, second: Pose) -> float:
    return float(np.hypot(first.x - second.x, first.y - second.y))


def _window(sprite: Sprite, height: int, width: int) -> tuple[slice, slice, slice, slice]:
    """Rows and columns of the sprite's visible part in the picture, then in the sprite."""
    side_y, side_x = sprite.alpha.shape
    y0, y1 = max(sprite.top, 0), min(sprite.top + side_y, height)
    x0, x1 = max(sprite.left, 0), min(sprite.left + side_x, width)
    y1, x1 = max(y0, y1), max(x0, x1)
    inner = slice(y0 - sprite.top, y1 - sprite.top), slice(x0 - sprite.left, x1 - sprite.left)
    return slice(y0, y1), slice(x0, x1), *inner


def _main_coverage(layers: list[_Layer], height: int, width: int) -> Field:
    """Share of each pixel, (H, W), on which a main object is the topmost thing: exact for these layers."""
    cover = np.zeros((height, width), np.float32)
    for sprite, main in layers:
        rows, columns, own_rows, own_columns = _window(sprite, height, width)
        alpha = sprite.alpha[own_rows, own_columns]
        cover[rows, columns] *= 1 - alpha
        if main:
            cover[rows, columns] += alpha
    return cover


def _uncover_main(layers: list[_Layer], height: int, width: int) -> list[_Layer]:
    """Moves every occluder behind the main objects when too little of them would be seen."""
    mains = [layer for layer in layers if layer.main]
    seen = _main_coverage(layers, height, width).sum()
    if seen >= _MIN_VISIBLE * _main_coverage(mains, height, width).sum():
        return layers
    return [layer for layer in layers if not layer.main] + mains


def _compose(scenery: Field, layers: list[_Layer], light: Field) -> Field:
    """Paints the layers back to front over the scenery, each with a soft shadow."""
    picture = scenery.copy()
    height, width = picture.shape[:2]
    ambience = (0.72 + 0.45 * scenery.mean((0, 1))).astype(np.float32)
    for sprite, _ in layers:
        side = sprite.alpha.shape[0]
        pad = side // 5
        shadow = blur(cv2.copyMakeBorder(sprite.alpha, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=0), 0.05 * side)
        drop = round(-float(light[1]) * 0.12 * side), round(-float(light[0]) * 0.12 * side)
        cast = Sprite(sprite.colour, shadow, sprite.top - pad + drop[0], sprite.left - pad + drop[1])
        rows, columns, own_rows, own_columns = _window(cast, height, width)
        picture[rows, columns] *= (1 - _SHADOW * shadow[own_rows, own_columns])[..., None]
        rows, columns, own_rows, own_columns = _window(sprite, height, width)
        alpha = sprite.alpha[own_rows, own_columns, None]
        window = picture[rows, columns]
        window *= 1 - alpha
        window += sprite.colour[own_rows, own_columns] * ambience * alpha
    return picture


def _develop(picture: Field, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Camera: exposure, white balance, light fall-off, vignette, contrast, softness and noise."""
    height, width = picture.shape[:2]
    balance = rng.uniform(0.94, 1.06, 3) * rng.uniform(0.82, 1.15)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    tilt = rng.uniform(-0.12, 0.12, 2).astype(np.float32)
    lit = (1 + tilt[0] * x + tilt[1] * y) * (1 - np.float32(rng.uniform(0, 0.16)) * (x * x + y * y))
    picture = picture * balance.astype(np.float32) * lit[..., None]
    contrast = np.float32(rng.uniform(0.85, 1.15))
    picture = (picture - 0.45) * contrast + 0.45
    picture = blur(picture, float(rng.uniform(0.35, 0.7)))
    noise = rng.standard_normal((height, width), dtype=np.float32) * np.float32(rng.uniform(0.004, 0.022))
    picture += noise[..., None]
    return np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)


def _encoded(picture: NDArray[np.uint8], kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return buffer.getvalue()


def _stem(index: int) -> str:
    return f"scene_{index:06d}"


def _scene_paths(out: Path, index: int) -> tuple[Path, Path]:
    return out / "images" / f"{_stem(index)}.jpg", out / "saliency" / f"{_stem(index)}.png"


def _is_drawn(path: Path) -> bool:
    """Whether a file is there; an empty one is what a power failure may leave of it."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


class _Job(NamedTuple):
    """A scene to draw; JSON-able."""

    out: str
    seed: int
    index: int
    correlation: float
    size: tuple[int, int] | None


def _write_scene(job: _Job) -> None:
    """Draws and writes one scene; the image comes last, so that an image on disk always has its map."""
    scene = make_scene(job.seed, job.index, job.correlation, job.size)
    image, saliency = _scene_paths(Path(job.out), job.index)
    write_whole(saliency, _encoded(scene.saliency, "PNG", compress_level=6))
    write_whole(image, _encoded(scene.image, "JPEG", quality=_JPEG_QUALITY))


def _answer(request: Any, notes: int) -> bytes:
    """For `serve`: writes a scene; the answer says what the system refused, null where nothing was."""
    del notes
    try:
        _write_scene(_Job(*request))
        refused = None
    except OSError as error:
        refused = error.errno, error.strerror or str(error), error.filename
    return json.dumps(refused).encode() + b"\n"


def _write_by(child: Child, job: _Job) -> None:
    try:
        refused = child.ask(job, lambda line, _: json.loads(line))
    except ChildCrash as crash:
        raise RuntimeError(
            f"the process that drew scene {job.index} crashed ({crash}); --workers 1 says why"
        ) from crash
    if refused is not None:
        raise OSError(*refused)


def _run(jobs: list[_Job], workers: int | None) -> Generator[None, None, None]:
    if workers == 1 or len(jobs) < _FEW:
        yield from map(_write_scene, jobs)
    else:
        yield from in_children(_MODULE, _write_by, jobs, workers)


def write_dataset(
    out: Path,
    count: int,
    seed: int,
    correlation: float = DEFAULT_CORRELATION,
    size: tuple[int, int] | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> Path:
    """Writes ``count`` made scenes, or completes a folder that an earlier call with the same settings began.

    Args:
        out: a folder that is absent, empty, or holds scenes of the same seed, correlation and size (of which there
            may be fewer than ``count``: the rest is added).
        count: number of scenes, at least 1.
        seed, correlation, size: as in :func:`make_scene`.
        workers: processes; None takes one for each CPU that this process may use.
        progress: show a progress bar.

    Returns:
        ``out``.

    Raises:
        UserError: an argument is out of range, or ``out`` holds something else, is in use or cannot be written.
    """
    if count < 1:
        raise UserError(f"--count: got {count}, expected at least 1")
    if seed < 0:
        raise UserError(f"--seed: got {seed}, expected at least 0")
    if not 0 <= correlation <= 1:
        raise UserError(f"--correlation: got {correlation}, expected a number in [0, 1]")
    if size is not None and not all(_MIN_SIDE <= side <= _MAX_SIDE for side in size):
        raise UserError(f"--size: got {size[0]}x{size[1]}, expected sides from {_MIN_SIDE} to {_MAX_SIDE}")
    if workers is not None and workers < 1:
        raise UserError(f"--workers: got {workers}, expected at least 1")

    out = Path(out)
    settings = {
        "format": _FORMAT,
        "seed": seed,
        "correlation": correlation,
        "size": None if size is None else list(size),
    }
    try:
        with claimed(out, _RECORD, "demo-data"):
            _begin(out, settings, count)
            pending = [i for i in range(count) if not all(map(_is_drawn, _scene_paths(out, i)))]
            jobs = [_Job(str(out), seed, index, correlation, size) for index in pending]
            with contextlib.closing(_run(jobs, workers)) as steps:
                for _ in show_progress(steps, "Drawing scenes", len(jobs), progress):
                    pass
            write_whole(out / "labels.csv", _labels(count, seed, correlation))
            write_whole(out / "preview.jpg", _encoded(_preview(out, count), "JPEG", quality=85))
    except OSError as error:
        raise UserError(f"cannot write {shown(error.filename or out)}: {error.strerror or error}") from error
    return out


def _begin(out: Path, settings: dict[str, object], count: int) -> None:
    """Writes the record and the folders, or raises UserError where ``out`` holds scenes of other settings or more."""
    record = out / _RECORD
    if record.exists():
        try:
            found = json.loads(record.read_bytes())
            if not isinstance(found, dict) or type(found["count"]) is not int:
                raise ValueError("it names no count")
        except (ValueError, KeyError, RecursionError) as error:
            raise UserError(f"{shown(record)} is damaged ({error}); write to another folder") from error
        for key, wanted in settings.items():
            if found.get(key) != wanted:
                raise UserError(
                    f"{shown(out)} holds made scenes with {key} {found.get(key)}, expected {wanted}; write to another "
                    "folder"
                )
        if found["count"] > count:
            raise UserError(
                f"{shown(out)} already holds {found['count']} scenes, got --count {count}; write to another folder"
            )
    names = {"classes": CLASSES, "backgrounds": BACKGROUNDS}
    write_whole(record, json.dumps({**settings, "count": count, **names}, indent=2) + "\n", durable=True)
    for folder in (out / "images", out / "saliency"):
        folder.mkdir(exist_ok=True)
        remove_parts(folder)


def _labels(count: int, seed: int, correlation: float) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("stem", "class", "background"))
    for index in range(count):
        table.writerow((_stem(index), *identity(seed, index, correlation)))
    return text.getvalue()


def _preview(out: Path, count: int) -> NDArray[np.uint8]:
    """Contact sheet of the first scenes, each with the outline of its saliency map."""
    frame_width, frame_height, columns = 240, 180, 4
    tiles: list[NDArray[np.uint8]] = []
    for index in range(min(count, 12)):
        image_path, saliency_path = _scene_paths(out, index)
        with Image.open(image_path) as image, Image.open(saliency_path) as saliency:
            picture, mask = np.array(image), np.array(saliency)
        height, width = mask.shape
        scale = min(frame_width / width, frame_height / height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_AREA)
        outlines, _ = cv2.findContours((mask > 127).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outlines, -1, (255, 255, 255), 2, cv2.LINE_AA)
        tile = np.full((frame_height + 4, frame_width + 4, 3), 255, np.uint8)
        top, left = (tile.shape[0] - size[1]) // 2, (tile.shape[1] - size[0]) // 2
        tile[top : top + size[1], left : left + size[0]] = picture
        tiles.append(tile)
    while len(tiles) % columns:
        tiles.append(np.full_like(tiles[0], 255))
    rows = [np.concatenate(tiles[start : start + columns], axis=1) for start in range(0, len(tiles), columns)]
    return np.concatenate(rows)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected WIDTHxHEIGHT such as 640x480")
    return int(width), int(height)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``cast-fast demo-data``."""
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; an earlier one is completed")
    parser.add_argument("--count", type=int, required=True, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    parser.add_argument(
        "--correlation",
        type=float,
        default=DEFAULT_CORRELATION,
        help="probability that the background is of the class's own family (else any)",
    )
    parser.add_argument("--size", type=_size, metavar="WxH", help="size of every scene; varied when absent")
    parser.add_argument("--workers", type=int, help="processes; one for each CPU when absent")


def main(args: argparse.Namespace) -> int:
    """Runs ``cast-fast demo-data``; returns the exit code."""
    out = write_dataset(args.out, args.count, args.seed, args.correlation, args.size, args.workers, progress=True)
    images, saliency, preview = (shown(out / name) for name in ("images", "saliency", "preview.jpg"))
    print(f"{args.count} scenes: --images {images} --saliency {saliency}; see {preview}")
    return 0


if __name__ == "__main__":
    serve(_answer)
