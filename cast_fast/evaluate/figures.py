"""Picture sheets that every command shares: tiles in a grid, with headings, captions, legends and legible text.

A sheet is composed pixel by pixel from arrays, so that a tile in the file *is* the array that was measured (tests check
it), and a heat map lies on its picture to the pixel. Colours: saliency outlines are cyan on black, windows orange, heat
maps matplotlib's "inferno" over the dimmed grey picture; each sheet's legend says so.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cast_fast.files import write_whole

Picture = NDArray[np.uint8]  # (H, W, 3) RGB

INK = (24, 24, 27)
FAINT = (110, 110, 118)
RIGHT = (0, 120, 60)
WRONG = (190, 20, 30)
OUTLINE = (0, 229, 255)
WINDOW = (255, 140, 0)
BLANK = (235, 235, 238)
HEAT_MAP = "inferno"
HEAT_SHARE = 0.6  # of a blended pixel that is heat; the rest is the grey picture

_GAP = 6
_MARGIN = 16
_TEXT = 14
_HEADING = 15
_TITLE = 19


@functools.cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has Greek letters and arrows."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)


@functools.cache
def _palette() -> Picture:
    colours = matplotlib.colormaps[HEAT_MAP](np.linspace(0, 1, 256))[:, :3]
    return np.round(255 * colours).astype(np.uint8)


def heat(values: NDArray[np.floating]) -> Picture:
    """Colours of values in [0, 1] (H, W); values outside are clipped."""
    return _palette()[np.clip(np.round(255 * values), 0, 255).astype(np.uint8)]


def relative_to_peak(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """A map divided by its largest value; a map of zeros stays zero."""
    peak = float(values.max(initial=0.0))
    return (values / peak if peak > 0 else np.zeros_like(values)).astype(np.float32)


def enlarge(values: NDArray[np.floating], height: int, width: int) -> NDArray[np.float32]:
    """Bilinear interpolation between the centres of the cells, edges held: (h, w) → (height, width).

    The value of a cell stands at the middle of its pixels, so that map and picture stay aligned.
    """
    return np.asarray(cv2.resize(values.astype(np.float32), (width, height)), np.float32)  # linear is its default


def grey(picture: Picture) -> Picture:
    """The luminance of a picture, in three equal channels."""
    return np.asarray(cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), np.uint8)


def overlay(picture: Picture, values: NDArray[np.floating]) -> Picture:
    """A heat map (any grid, relative to its peak) over the grey picture (H, W, 3)."""
    height, width = picture.shape[:2]
    colours = heat(enlarge(relative_to_peak(values), height, width))
    mixed = HEAT_SHARE * colours.astype(np.float32) + (1 - HEAT_SHARE) * grey(picture).astype(np.float32)
    return np.round(mixed).astype(np.uint8)


def outline(picture: Picture, mask: NDArray, colour: tuple[int, int, int] = OUTLINE) -> Picture:
    """A copy with the border of a mask (H, W) drawn: two pixels of colour inside a pixel of black.

    Raises:
        ValueError: mask and picture differ in height or width.
    """
    if mask.shape != picture.shape[:2]:
        raise ValueError(f"mask: got {mask.shape}, expected the picture's {picture.shape[:2]}")
    inside = (np.asarray(mask) > 0).astype(np.uint8)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    # beyond the picture counts as outside for the erosion, so that regions cut by the border are closed there
    thin = cv2.erode(inside, cross, iterations=2, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    thick = cv2.dilate(inside, cross)
    drawn = picture.copy()
    drawn[(thick == 1) & (inside == 0)] = 0
    drawn[(inside == 1) & (thin == 0)] = colour
    return drawn


def rectangle(
    picture: Picture, box: tuple[int, int, int, int], colour: tuple[int, int, int] = WINDOW, width: int = 3
) -> Picture:
    """A copy with the border of a window ``[y0, x0, h, w]`` drawn inside it."""
    y, x, h, w = box
    drawn = picture.copy()
    region = drawn[y : y + h, x : x + w]
    for edge in (region[:width], region[-width:], region[:, :width], region[:, -width:]):
        edge[:] = colour
    return drawn


def mask_picture(mask: NDArray) -> Picture:
    """A saliency map (H, W) as a grey picture; booleans and shares in [0, 1] become 0 … 255."""
    values = np.asarray(mask)
    if values.dtype != np.uint8:
        values = np.round(255 * np.clip(values.astype(np.float32), 0, 1)).astype(np.uint8)
    return np.repeat(values[:, :, None], 3, axis=2)


def fit(picture: Picture, height: int, width: int) -> Picture:
    """The picture resized to lie within a tile, centred on a blank ground; its shape where it already fits exactly."""
    scale = min(height / picture.shape[0], width / picture.shape[1])
    h, w = max(1, round(scale * picture.shape[0])), max(1, round(scale * picture.shape[1]))
    if (h, w) != picture.shape[:2]:
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        picture = np.asarray(cv2.resize(picture, (w, h), interpolation=method), np.uint8)
    tile = np.full((height, width, 3), BLANK, np.uint8)
    y, x = (height - h) // 2, (width - w) // 2
    tile[y : y + h, x : x + w] = picture
    return tile


@dataclasses.dataclass(frozen=True)
class Caption:
    """A line of text below a tile."""

    text: str
    colour: tuple[int, int, int] = INK


@dataclasses.dataclass(frozen=True)
class Swatch:
    """A legend entry: a coloured line and what it stands for."""

    colour: tuple[int, int, int]
    text: str


@dataclasses.dataclass(frozen=True)
class HeatBar:
    """A legend entry: the colours of the heat maps as they look over a middle grey, from ``low`` to ``high``."""

    low: str = "0"
    high: str = "peak"
    text: str = "Grad-CAM, relative to its own peak"


@dataclasses.dataclass
class _Row:
    tiles: list[Picture | None]
    label: str
    captions: list[list[Caption]]


class Sheet:
    """A grid of tiles with headings, row labels, captions and a legend.

    Args:
        columns: heading of each column; long ones are broken into lines.
        tile: (height, width) of a tile in pixels.
        title: first line of the sheet.
        note: small text below the title, broken into lines.
        groups: ``(name, number of columns)`` from left to right, a bracket over the headings; an empty name for none.
        legend: entries below the grid.
    """

    def __init__(
        self,
        columns: Sequence[str],
        *,
        tile: tuple[int, int],
        title: str = "",
        note: str = "",
        groups: Sequence[tuple[str, int]] = (),
        legend: Sequence[Swatch | HeatBar] = (),
    ) -> None:
        if groups and sum(count for _, count in groups) != len(columns):
            raise ValueError(f"groups: got {groups}, expected {len(columns)} columns in all")
        self.columns, self.tile, self.title, self.note = list(columns), tile, title, note
        self.groups, self.legend = list(groups), list(legend)
        self.rows: list[_Row] = []

    def add_row(
        self,
        tiles: Sequence[Picture | None],
        *,
        label: str = "",
        captions: Sequence[Caption | Sequence[Caption] | None] = (),
    ) -> None:
        """Adds one picture a column (None leaves the place empty), with captions below them.

        A picture of another size than the tile is shrunk or enlarged into it.

        Raises:
            ValueError: the number of pictures differs from the number of columns.
        """
        if len(tiles) != len(self.columns):
            raise ValueError(f"tiles: got {len(tiles)}, expected one for each of {len(self.columns)} columns")
        lines: list[list[Caption]] = []
        for caption in captions:
            lines.append([] if caption is None else [caption] if isinstance(caption, Caption) else list(caption))
        lines += [[]] * (len(tiles) - len(lines))
        self.rows.append(_Row([None if t is None else fit(t, *self.tile) for t in tiles], label, lines))

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Where a tile lies in the image: (left, top, right, bottom) in pixels."""
        height, width = self.tile
        left = _MARGIN + self._label_width() + sum(self._advance(c) for c in range(column))
        top = self._grid_top() + sum(self._row_height(r) for r in range(row))
        return left, top, left + width, top + height

    def image(self) -> Image.Image:
        """The sheet as a picture."""
        width = self._width()
        body = self._grid_top() + sum(self._row_height(r) for r in range(len(self.rows)))
        legend = self._legend_lines(width - 2 * _MARGIN)
        canvas = Image.new("RGB", (width, body + _GAP + _MARGIN + len(legend) * (_TEXT + 14)), (255, 255, 255))
        draw = ImageDraw.Draw(canvas)
        y = _MARGIN
        if self.title:
            for line in self._title_lines():
                draw.text((_MARGIN, y), line, INK, font(_TITLE, bold=True))
                y += _TITLE + 8
        for line in self._note_lines():
            draw.text((_MARGIN, y), line, FAINT, font(_TEXT))
            y += _TEXT + 6
        self._draw_headings(draw)
        for index, row in enumerate(self.rows):
            self._draw_row(canvas, draw, index, row)
        for number, entries in enumerate(legend):
            x, top = _MARGIN, body + _GAP + number * (_TEXT + 14)
            for entry in entries:
                x = self._draw_entry(canvas, draw, entry, x, top)
        return canvas

    def png(self) -> bytes:
        """The sheet as the content of a PNG file."""
        buffer = io.BytesIO()
        self.image().save(buffer, "PNG")
        return buffer.getvalue()

    def save(self, path: Path) -> Path:
        """Writes a PNG, whole or not at all, and returns its path; raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.png())
        return path

    def _draw_headings(self, draw: ImageDraw.ImageDraw) -> None:
        bottom = self._grid_top() - 4 - (_GAP if self.groups else 0)
        for column, heading in enumerate(self.columns):
            left, _, right, _ = self.box(0, column)
            lines = wrap(heading, right - left, font(_HEADING, bold=True))
            for number, line in enumerate(reversed(lines)):
                y = bottom - (number + 1) * (_HEADING + 4)
                draw.text(((left + right) / 2, y), line, INK, font(_HEADING, bold=True), anchor="ma")
        if not self.groups:
            return
        first, top = 0, bottom - self._heading_height()
        for name, count in self.groups:
            if name:
                left, right = self.box(0, first)[0], self.box(0, first + count - 1)[2]
                lines = wrap(name, right - left, font(_HEADING, bold=True))
                for number, line in enumerate(lines):
                    y = top - (len(lines) - number) * (_HEADING + 4) - 6
                    draw.text(((left + right) / 2, y), line, INK, font(_HEADING, bold=True), anchor="ma")
                draw.line((left, top - 3, right, top - 3), FAINT, 2)
            first += count

    def _draw_row(self, canvas: Image.Image, draw: ImageDraw.ImageDraw, index: int, row: _Row) -> None:
        _, top, _, bottom = self.box(index, 0)
        if row.label:
            lines = wrap(row.label, self._label_width() - _GAP, font(_TEXT))
            y = (top + bottom - len(lines) * (_TEXT + 4)) / 2
            for line in lines:
                draw.text((_MARGIN, y), line, INK, font(_TEXT))
                y += _TEXT + 4
        for column, (tile, captions) in enumerate(zip(row.tiles, row.captions)):
            left, top, right, bottom = self.box(index, column)
            if tile is not None:
                canvas.paste(Image.fromarray(tile), (left, top))
            y = bottom + 4
            for caption in captions:
                for line in wrap(caption.text, right - left, font(_TEXT)):
                    draw.text(((left + right) / 2, y), line, caption.colour, font(_TEXT), anchor="ma")
                    y += _TEXT + 4

    def _draw_entry(
        self, canvas: Image.Image, draw: ImageDraw.ImageDraw, entry: Swatch | HeatBar, x: int, y: int
    ) -> int:
        if isinstance(entry, Swatch):
            draw.rectangle((x, y + 4, x + 28, y + _TEXT), fill=entry.colour, outline=INK)
            draw.text((x + 36, y), entry.text, INK, font(_TEXT))
            return x + self._entry_width(entry)
        middle = np.full((_TEXT, 120, 3), 128, np.uint8)
        bar = overlay(middle, np.linspace(0, 1, 120)[None, :].repeat(_TEXT, 0))
        low, high = _text_width(entry.low, font(_TEXT)), _text_width(entry.high, font(_TEXT))
        draw.text((x, y), entry.low, INK, font(_TEXT))
        canvas.paste(Image.fromarray(bar), (x + low + 6, y + 2))
        draw.text((x + low + 132, y), entry.high, INK, font(_TEXT))
        draw.text((x + low + high + 144, y), entry.text, INK, font(_TEXT))
        return x + self._entry_width(entry)

    def _entry_width(self, entry: Swatch | HeatBar) -> int:
        text = _text_width(entry.text, font(_TEXT))
        if isinstance(entry, Swatch):
            return 36 + text + 28
        ends = _text_width(entry.low, font(_TEXT)) + _text_width(entry.high, font(_TEXT))
        return ends + 144 + text + 28

    def _legend_lines(self, width: int) -> list[list[Swatch | HeatBar]]:
        lines: list[list[Swatch | HeatBar]] = []
        used = width + 1
        for entry in self.legend:
            needed = self._entry_width(entry)
            if used + needed > width:
                lines.append([])
                used = 0
            lines[-1].append(entry)
            used += needed
        return lines

    def _advance(self, column: int) -> int:
        """From the left edge of a column to that of the next; groups stand a little apart."""
        ends, total = set(), 0
        for _, count in self.groups:
            total += count
            ends.add(total - 1)
        return self.tile[1] + _GAP + (2 * _GAP if column in ends else 0)

    def _width(self) -> int:
        """Of the whole sheet: the grid, or what the longest legend entry asks for."""
        last = len(self.columns) - 1
        grid = _MARGIN + self._label_width() + sum(self._advance(c) for c in range(last)) + self.tile[1] + _MARGIN
        return max([grid, *(2 * _MARGIN + self._entry_width(entry) for entry in self.legend), 480])

    def _label_width(self) -> int:
        if not any(row.label for row in self.rows):
            return 0
        longest = max(_text_width(word, font(_TEXT)) for row in self.rows for word in row.label.split() or [""])
        return min(220, max(90, longest)) + 2 * _GAP

    def _title_lines(self) -> list[str]:
        return wrap(self.title, self._width() - 2 * _MARGIN, font(_TITLE, bold=True)) if self.title else []

    def _note_lines(self) -> list[str]:
        return wrap(self.note, self._width() - 2 * _MARGIN, font(_TEXT)) if self.note else []

    def _heading_height(self) -> int:
        lines = max((len(wrap(h, self.tile[1], font(_HEADING, bold=True))) for h in self.columns), default=0)
        return lines * (_HEADING + 4)

    def _grid_top(self) -> int:
        top = _MARGIN + len(self._title_lines()) * (_TITLE + 8) + len(self._note_lines()) * (_TEXT + 6)
        if self.groups:
            widths = [count * (self.tile[1] + _GAP) - _GAP for _, count in self.groups]
            lines = [len(wrap(n, w, font(_HEADING, bold=True))) for (n, _), w in zip(self.groups, widths) if n]
            top += max(lines, default=0) * (_HEADING + 4) + 6 + _GAP
        return top + self._heading_height() + 8

    def _row_height(self, row: int) -> int:
        lines = 0
        for captions in self.rows[row].captions:
            lines = max(lines, sum(len(wrap(c.text, self.tile[1], font(_TEXT))) for c in captions))
        return self.tile[0] + _GAP + (lines * (_TEXT + 4) + 6 if lines else 0)


def wrap(text: str, width: int, face: ImageFont.FreeTypeFont) -> list[str]:
    """Breaks text into lines no wider than ``width`` pixels, longer words where it must: after ``-_/.`` if it can."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and _text_width(f"{line} {word}", face) > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
            while _text_width(line, face) > width and len(line) > 1:
                cut = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or _text_width(line[:n], face) <= width)
                cut = next((n for n in range(cut, cut // 3, -1) if line[n - 1] in "-_/."), cut)
                lines.append(line[:cut])
                line = line[cut:]
        lines.append(line)
    return lines


@functools.lru_cache(maxsize=4096)
def _text_width(text: str, face: ImageFont.FreeTypeFont) -> int:
    return int(np.ceil(face.getlength(text)))
