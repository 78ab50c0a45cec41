"""From an image file and its map to what a shard stores: decoded completely, converted where needed, map made small.

``python -m cast_fast.data.pack_sample`` is the process in which ``prepare`` does this, so that a decoder that crashes
on a file takes nothing else with it. A request is a JSON line, an answer a JSON line followed by the bytes of the image
and of the map.

**Images** keep their bytes. Converted are: CMYK, 16-bit, and those with an EXIF rotation (no decoder on the way to the
training step applies one), to JPEG of quality 95 without chroma subsampling; and with a ``short_side`` every image
whose shorter side exceeds it, to JPEG of the asked-for quality.

**Maps** are binarised, because training sees nothing else of them, and shrunk by area average, so that a value is the
salient share of a pixel's area and "above 127" again means at least half of it. A map whose salient region would vanish
is stored larger, until it does not. The map of a rotated image is rotated with it, unless it fits only the upright one.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cast_fast.data.children import Child, ChildCrash, serve
from cast_fast.data.decode_check import (
    Decoded,
    DecodeFault,
    decode_image,
    decode_map,
    map_fits,
    read_file,
    to_eight_bits,
)
from cast_fast.data.saliency_crop import THRESHOLD

MODULE = "cast_fast.data.pack_sample"
MAP_FORMATS = {"jpeg": "jpg", "npy": "npy", "png": "png"}
"""Suffix of each format: grey JPEG, raw bytes behind NumPy's header, grey PNG."""
MAP_QUALITY = 90

_CONVERTED_QUALITY = 95
_SURE = THRESHOLD + 32
"""A stored map must reach this somewhere, so that no decoder's rounding makes a small object vanish."""


@dataclass(frozen=True)
class PackRule:
    """How samples are stored.

    Attributes:
        map_side: longest side of a stored map in pixels; 0 keeps maps as large as they are.
        map_format: "jpeg", "npy" or "png".
        short_side: images with a longer shorter side are shrunk to it; 0 keeps all bytes.
        quality: of JPEGs that ``short_side`` makes.

    Raises:
        ValueError: for values outside these.
    """

    map_side: int = 160
    map_format: str = "jpeg"
    short_side: int = 0
    quality: int = 90

    def __post_init__(self) -> None:
        if self.map_side != 0 and self.map_side < 16:
            raise ValueError(f"map_side: got {self.map_side}, expected at least 16, or 0 for maps as they are")
        if self.map_format not in MAP_FORMATS:
            raise ValueError(f"map_format: got {self.map_format!r}, expected one of {', '.join(MAP_FORMATS)}")
        if self.short_side != 0 and self.short_side < 16:
            raise ValueError(f"short_side: got {self.short_side}, expected at least 16, or 0 for images as they are")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: got {self.quality}, expected 1 to 100")


class StoredMap(NamedTuple):
    """A map as a shard holds it."""

    content: bytes
    suffix: str
    height: int
    width: int
    empty: bool
    """No pixel is salient."""


class Packed(NamedTuple):
    """What a shard holds of a sample, and what was done to get there."""

    image: bytes
    suffix: str
    """By content: jpg or png."""
    width: int
    height: int
    saliency: StoredMap | None
    """None where images are packed without maps."""
    changes: tuple[str, ...]
    """Any of cmyk, 16-bit, rotated, resized (image); map-16-bit, map-rotated, map-upright, map-larger."""


class SampleFault(Exception):
    """Why a sample cannot be packed; ``part`` is "image" or "map", ``kind`` as in ``layout.Fault``."""

    def __init__(self, part: str, kind: str, message: str) -> None:
        super().__init__(message)
        self.part, self.kind = part, kind


def pack(image: bytes, saliency: bytes | None, rule: PackRule, notes: int) -> Packed:
    """What to store of a sample; see the module's text.

    Args:
        image, saliency: contents of the two files; None for an image without a map.
        rule: sizes and formats.
        notes: descriptor of a file that receives the process's stderr.

    Raises:
        SampleFault: the image or the map is faulty, or they do not belong together.
    """
    part = "image"
    try:
        decoded = decode_image(image, notes)
        part = "map"
        values = None if saliency is None else decode_map(saliency, depths=(8, 16))
    except DecodeFault as fault:
        raise SampleFault(part, fault.kind, str(fault)) from None
    if saliency is None or values is None:
        content, suffix, width, height, converted = _stored_image(image, decoded, rule)
        return Packed(content, suffix, width, height, None, tuple(converted))
    changes = ["map-16-bit"] if _png_depth(saliency) == 16 else []
    salient, turned = _matching(values > THRESHOLD, decoded)
    changes += turned
    content, suffix, width, height, converted = _stored_image(image, decoded, rule)
    stored, larger = store_map(salient, rule)
    return Packed(content, suffix, width, height, stored, (*converted, *changes, *["map-larger"] * larger))


def _png_depth(data: bytes) -> int:
    return data[24]


def _matching(salient: NDArray[np.bool_], image: Decoded) -> tuple[NDArray[np.bool_], list[str]]:
    """The map for the upright image, and what was done to it."""
    height, width = salient.shape
    if map_fits(image.width, image.height, width, height):
        if image.orientation == 1:
            return salient, []
        return upright(salient, image.orientation), ["map-rotated"]
    if image.orientation >= 5 and map_fits(image.height, image.width, width, height):
        return salient, ["map-upright"]
    message = f"map is {width}x{height}, its image {image.width}x{image.height}"
    raise SampleFault("map", "size-mismatch", message)


def upright(pixels: NDArray, orientation: int) -> NDArray:
    """Pixels (H, W, …) as a viewer shows them that honours an EXIF orientation, 1 to 8 (Exif 2.32, tag 0x0112)."""
    if orientation in (5, 7):
        pixels = pixels.swapaxes(0, 1)
    turns = {3: 2, 6: 3, 7: 2, 8: 1}.get(orientation, 0)  # quarter turns against the clock
    pixels = np.rot90(pixels, turns)
    if orientation == 2:
        pixels = pixels[:, ::-1]
    elif orientation == 4:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _stored_image(data: bytes, image: Decoded, rule: PackRule) -> tuple[bytes, str, int, int, list[str]]:
    """Content, suffix, width and height of the stored image, and what was done to it."""
    is_jpeg = image.picture.format == "JPEG"
    changes = []
    if image.picture.mode == "CMYK":
        changes.append("cmyk")
    if not is_jpeg and _png_depth(data) == 16:
        changes.append("16-bit")
    if image.orientation != 1:
        changes.append("rotated")
    scale = rule.short_side / min(image.width, image.height) if rule.short_side else 1.0
    if scale >= 1 and not changes:
        return data, "jpg" if is_jpeg else "png", image.width, image.height, changes
    pixels = upright(_rgb(data, image, changes), image.orientation)
    quality = _CONVERTED_QUALITY
    if scale < 1:
        height, width = pixels.shape[:2]
        size = max(rule.short_side, round(scale * width)), max(rule.short_side, round(scale * height))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
        changes.append("resized")
        quality = rule.quality
    buffer = io.BytesIO()
    subsampling = 0 if quality == _CONVERTED_QUALITY else -1
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue(), "jpg", pixels.shape[1], pixels.shape[0], changes


def _rgb(data: bytes, image: Decoded, changes: list[str]) -> NDArray[np.uint8]:
    """Pixels (height, width, 3) as stored, before any rotation."""
    if "16-bit" in changes:
        deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if deep is None:
            raise SampleFault("image", "undecodable", "cannot be decoded: OpenCV refuses it")
        values = to_eight_bits(np.atleast_3d(np.asarray(deep)))
        # grey, grey with alpha, BGR or BGR with alpha: transparency is dropped, as the loader drops it
        return np.repeat(values[:, :, :1], 3, axis=2) if values.shape[2] < 3 else values[:, :, 2::-1]
    if image.bgr is None or "cmyk" in changes:
        return np.asarray(image.picture.convert("RGB"))
    return image.bgr[:, :, ::-1]


def store_map(salient: NDArray[np.bool_], rule: PackRule) -> tuple[StoredMap, bool]:
    """A map as a shard holds it, and whether it had to be stored larger than asked for its object to survive."""
    height, width = salient.shape
    longest = max(height, width)
    side = min(rule.map_side or longest, longest)
    empty = not salient.any()
    larger = False
    while True:
        stored = encode_map(shrink_map(salient, side), rule.map_format)
        if empty or int(decode_stored(stored.content, stored.suffix).max()) > _SURE:
            return stored._replace(empty=empty), larger
        larger = True
        if side == longest:  # a lone pixel that JPEG smooths away
            return encode_map(shrink_map(salient, side), "png"), larger
        side = min(2 * side, longest)


def shrink_map(salient: NDArray[np.bool_], side: int) -> NDArray[np.uint8]:
    """Share of salient area, 0 to 255, of each pixel of a map whose longest side is ``side``."""
    height, width = salient.shape
    scale = side / max(height, width)
    size = max(1, round(scale * width)), max(1, round(scale * height))
    values = salient.astype(np.uint8) * np.uint8(255)
    return np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_AREA), np.uint8)


def encode_map(values: NDArray[np.uint8], map_format: str) -> StoredMap:
    """A map (h, w) uint8 in one of `MAP_FORMATS`."""
    buffer = io.BytesIO()
    if map_format == "npy":
        np.save(buffer, np.ascontiguousarray(values), allow_pickle=False)
    elif map_format == "jpeg":
        Image.fromarray(values).save(buffer, "JPEG", quality=MAP_QUALITY)
    else:
        Image.fromarray(values).save(buffer, "PNG", compress_level=6)
    height, width = values.shape
    return StoredMap(buffer.getvalue(), MAP_FORMATS[map_format], height, width, not (values > THRESHOLD).any())


def decode_stored(content: bytes, suffix: str) -> NDArray[np.uint8]:
    """The values (h, w) uint8 of a stored map."""
    if suffix == "npy":
        return np.load(io.BytesIO(content), allow_pickle=False)
    with Image.open(io.BytesIO(content), formats=["JPEG", "PNG"]) as picture:
        return np.asarray(picture.convert("L"))


def pack_by(child: Child, image: str, saliency: str | None, rule: PackRule) -> Packed | SampleFault:
    """What a child that runs this module makes of a sample, by the paths of its files."""
    try:
        return child.ask((image, saliency, asdict(rule)), _read_answer)
    except ChildCrash as crash:
        return SampleFault("image", "decoder-crash", f"a decoder crashed on it or on its map ({crash})")


def _answer(asked: Any, notes: int) -> bytes:
    image, saliency, rule = asked
    part = "image"
    try:
        content = read_file(image)
        part = "map"
        packed = pack(content, None if saliency is None else read_file(saliency), PackRule(**rule), notes)
    except SampleFault as fault:
        return _refusal(fault.part, fault.kind, str(fault))
    except OSError as error:
        return _refusal(part, "unreadable", f"cannot be read: {error.strerror or error}")
    except DecodeFault as fault:
        return _refusal(part, fault.kind, str(fault))
    except MemoryError:
        return _refusal("image", "too-large", "needs more memory than there is")
    stored = packed.saliency
    maps = b"" if stored is None else stored.content
    header = {
        "lengths": (len(packed.image), len(maps)),
        "suffix": packed.suffix,
        "width": packed.width,
        "height": packed.height,
        "map": None if stored is None else stored[1:],
        "changes": packed.changes,
    }
    return json.dumps(header).encode() + b"\n" + packed.image + maps


def _refusal(part: str, kind: str, message: str) -> bytes:
    return json.dumps({"part": part, "kind": kind, "message": message}).encode() + b"\n"


def _read_answer(line: bytes, read: Callable[[int], bytes]) -> Packed | SampleFault:
    """An answer of the process from its line and what follows; ``read(n)`` gives the next n bytes.

    Raises:
        EOFError: the process ended inside its answer.
    """
    answer = json.loads(line)
    if "kind" in answer:
        return SampleFault(answer["part"], answer["kind"], answer["message"])
    image, saliency = (_exactly(length, read) for length in answer["lengths"])
    stored = None
    if answer["map"] is not None:
        suffix, height, width, empty = answer["map"]
        stored = StoredMap(saliency, suffix, height, width, empty)
    return Packed(image, answer["suffix"], answer["width"], answer["height"], stored, tuple(answer["changes"]))


def _exactly(length: int, read: Callable[[int], bytes]) -> bytes:
    content = read(length)
    if len(content) != length:
        raise EOFError(f"got {len(content)} of {length} bytes")
    return content


if __name__ == "__main__":
    serve(_answer)
