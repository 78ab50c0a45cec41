"""Does a file decode, and to what? Asked of a child process, ``python -m cast_fast.data.decode_check``.

It reads requests from stdin and writes replies to stdout, one JSON object a line; ``children`` says why.

What is caught: files that are no pictures, truncation, wrong checksums in PNG, and every damage to a JPEG that makes
libjpeg lose its place ("Corrupt JPEG data"). What cannot be caught: damage after which a JPEG is still a valid stream.
Of 113 photographs, each damaged once at a random place in its last two thirds, it found 112 with 512 random bytes, 109
with 512 zeros, 86 with 64 random bytes, 22 with one flipped bit, and nothing wrong with the undamaged ones.
"""

from __future__ import annotations

import io
import json
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cast_fast.data.children import Child, ChildCrash, serve

MODULE = "cast_fast.data.decode_check"
MAX_PIXELS = 100_000_000
"""Larger pictures are refused by their header, before anything is decoded."""

_MAX_BYTES = 2**29

_EXIF_ORIENTATION = 0x0112
_JPEG_DAMAGE = re.compile(r"(Corrupt JPEG data: .*|Premature end of JPEG.*)")
_SIGNATURES = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n"}
_PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}


class Reply(TypedDict):
    """Answer about one file; the numbers are 0 where ``kind`` names a fault that prevented finding them out."""

    width: int
    height: int
    orientation: int
    """EXIF orientation of an image, 1 if it has none."""
    peak: int
    """Largest value of a map."""
    kind: str
    """Kind of fault, empty if there is none."""
    message: str


class DecodeFault(Exception):
    """A file is not what it should be; ``kind`` is for programs, the message for people."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _open(data: bytes, formats: list[str]) -> Image.Image:
    if not data:
        raise DecodeFault("empty-file", "the file has no bytes")
    try:
        picture = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        if any(data.startswith(_SIGNATURES[name]) for name in formats):
            raise DecodeFault("undecodable", "its header is damaged") from None
        start = data[:12].decode("latin-1")
        raise DecodeFault("not-an-image", f"is no {' or '.join(formats)} file (it starts with {start!a})") from None
    except Exception as error:  # decoders raise anything from struct.error to SyntaxError on foreign bytes
        raise DecodeFault("undecodable", f"its header cannot be read: {error}") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise DecodeFault("too-large", f"has {picture.width}x{picture.height} pixels, at most {MAX_PIXELS} are decoded")
    return picture


def _load(picture: Image.Image) -> None:
    try:
        picture.load()
    except Exception as error:
        raise DecodeFault("undecodable", f"cannot be decoded: {error}") from None


def _check_png_chunks(data: bytes) -> None:
    """Verifies length and checksum of the chunks that hold the picture; decoders do not always."""
    at = len(_SIGNATURES["PNG"])
    while True:
        length, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if len(name) < 4 or end > len(data):
            raise DecodeFault("undecodable", f"is truncated: it ends at byte {len(data)} inside a chunk")
        critical = name[:1].isupper()
        if critical and zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise DecodeFault("damaged", f"wrong checksum in chunk {name.decode('latin-1')!a} at byte {at}")
        if name == b"IEND":
            return
        at = end


class Decoded(NamedTuple):
    """An intact image, decoded or ready to be."""

    width: int
    """Stored width; an EXIF rotation is reported, not applied."""
    height: int
    orientation: int
    """EXIF orientation, 1 if there is none."""
    picture: Image.Image
    bgr: NDArray[np.uint8] | None
    """(height, width, 3) of a JPEG; a PNG's pixels are in ``picture``."""


def decode_image(data: bytes, notes: int) -> Decoded:
    """Decodes an image completely.

    Args:
        data: content of the file.
        notes: descriptor of a file that receives the process's stderr.

    Raises:
        DecodeFault: the content is no intact JPEG or PNG.
    """
    picture = _open(data, ["JPEG", "PNG"])
    bgr = None
    if picture.format == "PNG":
        _check_png_chunks(data)
        _load(picture)
    else:
        bgr = _decode_jpeg(data, picture, notes)
    try:
        orientation = int(picture.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a broken EXIF block does not concern the pixels
        orientation = 1
    return Decoded(picture.width, picture.height, orientation if 1 <= orientation <= 8 else 1, picture, bgr)


def _decode_jpeg(data: bytes, picture: Image.Image, notes: int) -> NDArray[np.uint8]:
    os.ftruncate(notes, 0)
    os.lseek(notes, 0, os.SEEK_SET)
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    warning = _JPEG_DAMAGE.search(os.pread(notes, 8192, 0).decode("utf-8", "replace"))
    if decoded is None:
        _load(picture)  # for its message; it may also be more patient than OpenCV
        reason = warning.group() if warning else "OpenCV refuses it"
        raise DecodeFault("undecodable", f"cannot be decoded: {reason}")
    if warning:
        raise DecodeFault("damaged", f"is damaged: {warning.group()}")
    return np.asarray(decoded, np.uint8)


def check_image(data: bytes, notes: int) -> Reply:
    """Stored size and EXIF orientation of an image that `decode_image` has decoded completely.

    Raises:
        DecodeFault: the content is no intact JPEG or PNG.
    """
    width, height, orientation, _, _ = decode_image(data, notes)
    return Reply(width=width, height=height, orientation=orientation, peak=0, kind="", message="")


def decode_map(data: bytes, depths: tuple[int, ...] = (8,)) -> NDArray[np.uint8]:
    """Decodes a saliency map completely: a grey PNG of one of these depths in bits, to (height, width) uint8.

    Raises:
        DecodeFault: the content is no intact PNG, or a PNG of another pixel format.
    """
    with _open(data, ["PNG"]) as picture:
        depth, colour = data[24], data[25]
        if depth not in depths or colour != 0:
            found = f"{depth}-bit {_PNG_COLOURS.get(colour, f'colour type {colour}')}"
            expected = " or ".join(f"{one}-bit" for one in depths)
            raise DecodeFault("map-format", f"has {found} pixels, expected a PNG of {expected} grey")
        _check_png_chunks(data)
        _load(picture)
        return to_eight_bits(np.asarray(picture))


def to_eight_bits(values: NDArray) -> NDArray[np.uint8]:
    """16-bit values rounded to 8 bits; others as they are."""
    if values.dtype == np.uint8:
        return values
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def check_map(data: bytes) -> Reply:
    """Size and peak of a saliency map, an 8-bit grey PNG, that has been decoded completely.

    Raises:
        DecodeFault: the content is no intact PNG, or a PNG of another pixel format.
    """
    values = decode_map(data)
    height, width = values.shape
    return Reply(width=width, height=height, orientation=1, peak=int(values.max()), kind="", message="")


def map_fits(width: int, height: int, map_width: int, map_height: int) -> bool:
    """Whether a map can be an image's: no larger, and, scaled to one of its sides, at most a pixel off on the other."""
    aspect = abs(map_width * height - map_height * width) <= max(width, height)
    return map_width <= width and map_height <= height and aspect


def check_stored_map(data: bytes, suffix: str, notes: int) -> Reply:
    """Size and peak of a map in a shard: an 8-bit grey PNG, a grey JPEG, or an uint8 array (H, W) or (H, W, 1).

    Raises:
        DecodeFault: it is none of these, or damaged.
    """
    if suffix == "png":
        return check_map(data)
    if suffix == "jpg":
        decoded = decode_image(data, notes)
        if decoded.picture.format != "JPEG" or decoded.picture.mode != "L":
            raise DecodeFault(
                "map-format", f"is a {decoded.picture.mode} {decoded.picture.format}, expected a grey JPEG"
            )
        values = np.asarray(decoded.picture)
    else:
        try:
            values = np.load(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # of many kinds, for foreign bytes
            raise DecodeFault("undecodable", f"is no array of NumPy's: {error}") from None
        shape = values.shape[:2] if values.ndim == 3 and values.shape[2] == 1 else values.shape
        if values.dtype != np.uint8 or len(shape) != 2 or not values.size or not values.flags.c_contiguous:
            raise DecodeFault("map-format", f"is an array {values.dtype} {values.shape}, expected uint8 (H, W)")
        if values.size > MAX_PIXELS:
            raise DecodeFault("too-large", f"has {values.size} pixels, at most {MAX_PIXELS} are read")
    height, width = values.shape[:2]
    return Reply(width=width, height=height, orientation=1, peak=int(values.max()), kind="", message="")


def read_file(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """Content of a file, or ``size`` bytes of it from ``offset`` on.

    Raises:
        DecodeFault: it is larger than any picture, or ends early.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(_MAX_BYTES + 1 if size is None else min(size, _MAX_BYTES + 1))
    if len(content) > _MAX_BYTES:
        raise DecodeFault("too-large", f"has more than {_MAX_BYTES} bytes")
    if size is not None and len(content) != size:
        raise DecodeFault("undecodable", "is cut off: the shard ends inside it")
    return content


def _answer(request: Sequence[Any], notes: int) -> Reply:
    kind, path, *place = request
    try:
        data = read_file(path, *place)
        if kind == "image":
            return check_image(data, notes)
        return check_map(data) if kind == "map" else check_stored_map(data, kind.removeprefix("map-"), notes)
    except DecodeFault as fault:
        found = fault.kind, str(fault)
    except OSError as error:
        found = "unreadable", f"cannot be read: {error.strerror or error}"
    except MemoryError:
        found = "too-large", "needs more memory than there is"
    return Reply(width=0, height=0, orientation=1, peak=0, kind=found[0], message=found[1])


def check(child: Child, kind: str, path: Path, *place: int) -> Reply:
    """What a child that runs this module says of a file, or of a part of it; see `main`."""
    try:
        return child.ask((kind, str(path), *place), lambda line, _: json.loads(line))
    except ChildCrash as crash:
        message = f"a decoder crashed on it ({crash})"
        return Reply(width=0, height=0, orientation=1, peak=0, kind="decoder-crash", message=message)


def main() -> None:
    """Answers requests with a `Reply` each.

    A request is ``[kind, path]`` or, for a part of a file, ``[kind, path, offset, size]``. Kinds are "image", "map" (a
    PNG) and, of maps in shards, "map-png", "map-jpg" and "map-npy".
    """
    serve(lambda request, notes: json.dumps(_answer(request, notes)).encode() + b"\n")


if __name__ == "__main__":
    main()
