"""A picture that Pillow has opened, in the colours that the loader gives it."""

from __future__ import annotations

import numpy as np
from PIL import Image

from cast_fast.data.decode_check import to_eight_bits


def to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB of the stored pixels: no EXIF rotation, transparency dropped, 16-bit grey scaled to 8 bits.

    Pillow's own conversion cuts 16-bit grey off at 255, which makes nearly all of such a picture white.
    """
    return _shallow(picture).convert("RGB")


def to_grey(picture: Image.Image) -> Image.Image:
    """8-bit grey, in the same way."""
    return _shallow(picture).convert("L")


def _shallow(picture: Image.Image) -> Image.Image:
    return Image.fromarray(to_eight_bits(np.asarray(picture))) if picture.mode.startswith("I") else picture
