"""From files to batches of crop pairs: one DALI pipeline for the CPU and for CUDA.

An image is decoded once, its map once; the crop rule turns the map and the sample's random numbers into two windows;
image and map are resized from the same windows, mirrored by the same swapped ends of the window, and the crops get
their colour changes. On CUDA the JPEGs are decoded on the device ("mixed") and everything after the windows runs there;
the map is decoded and the windows are chosen on the CPU, because a resize takes its region from CPU memory and PNG is
decoded there anyway.

On a CPU both resizes, the colours and the maps of the attention loss are made by native operators where those are built
(``crop_views.h``), which take a tenth of the time of DALI's own; without them, and on CUDA, by DALI's. A crop's byte
may differ by 1 between the two, about one in ten thousand does; windows, flips and colours are the same.

Files are read by DALI's threads, which are given names and places, so that Python touches no sample alone: its share of
the work is a few array operations a batch. DALI has no operator that reads a part of a file, so members of shards are
read by a native one; without it threads of ours read them, a step ahead, and hand over their contents.

DALI draws no random number. ``sampling`` does, as a function of the seed and the sample's position in the run, so a
loader can start at any step.

**Colour.** All in [0, 255] with one rounding and clamping at the end of the jitter, by DALI's ``color_twist``:
``y = b (c (M x - 128) + 128)`` with factors b (brightness) and c (contrast), and M scaling the chroma of x by the
saturation factor and turning it by the hue angle in YIQ. Grey is saturation 0 and takes the jitter's brightness and
contrast along. Ranges are those of torchvision's ``ColorJitter``; the differences from it: a fixed order where
torchvision shuffles the four, the contrast's pivot is 128 where torchvision takes the crop's mean luma, the hue turns
in YIQ where torchvision turns in HSV, and nothing is clamped in between. Grey crops may differ by 1 between channels
(rounding inside DALI). The blur follows, with a kernel cut at three standard deviations.

**Buffers.** Batches share DALI's memory (DLPack, no copy). DALI's default executor never writes to an output that is
still referenced, so a batch may be kept as long as one likes. On CUDA the stream that is current in torch when the
batch is asked for waits until it is there; make any other stream that reads it wait for that one. The memory remains
DALI's: torch's allocator knows nothing of it, and DALI knows nothing of the streams that read it. A batch may be
dropped as soon as its last reader is launched all the same, on whatever stream: the deleter of a CUDA tensor only
queues the memory (``EnqueueForDeletion`` in DALI's ``dltensor.h``), and a thread of DALI's lets go of it after a
synchronisation of the whole device (DALI 2.4.0). So dropped batches count as used until the device has done what was
launched before.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn as dali_fn
from nvidia.dali import pipeline_def, types
from nvidia.dali.pipeline import do_not_convert

from cast_fast.data import sampling
from cast_fast.data.batch import Batch
from cast_fast.data.layout import Dataset, Member, Sample, read_bytes, shown
from cast_fast.data.pack_sample import decode_stored
from cast_fast.data.saliency_crop import THRESHOLD, CropRule, crop_windows, unconstrained_windows
from cast_fast.data.shards import ShardReader, member_places, members_obstacle, missing_maps
from cast_fast.errors import UserError
from cast_kernels import dali_plugin

if TYPE_CHECKING:
    from cast_fast.config import PretrainConfig

logger = logging.getLogger("cast_fast")

# DALI's stubs give each operator a union of all it can return, which no graph can be written against.
fn: Any = dali_fn

# Cells of the CAM grid are averaged from this many samples a side: worst error 0.8 % of a cell's area on 64 real maps.
_SAMPLES_PER_CELL = 16

_REFERENCE_SIZE = 224
VIEWS = ("query", "key")
_COLOURS = ("brightness", "contrast", "saturation", "hue")
# As DALI's color_twist has them; its I and Q are rounded, so its inverse is this matrix's, not the standard's.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
_MAX_REPLACEMENTS = 100
GENERATED = "__autograph_generated_file"


class ViewParameters(NamedTuple):
    """What is done to the views of n samples, column 0 the query and 1 the key; every field (n, 2)."""

    mirrored: NDArray[np.bool_]
    """Whether the view is flipped left to right."""
    brightness: NDArray[np.float32]
    """Factor; 1 leaves the view alone, and so for contrast and saturation."""
    contrast: NDArray[np.float32]
    saturation: NDArray[np.float32]
    """0 makes the view grey."""
    hue: NDArray[np.float32]
    """Angle in degrees."""
    blur_sigma: NDArray[np.float32]
    """Standard deviation in pixels of the crop; 0 where the view is not blurred."""

    @property
    def changes_colour(self) -> NDArray[np.bool_]:
        """(n, 2): whether any of the four colour changes does something."""
        return (self.brightness != 1) | (self.contrast != 1) | (self.saturation != 1) | (self.hue != 0)

    def colour_matrices(self) -> NDArray[np.float32]:
        """(n, 2, 3, 4): the four colour changes as one, [R', G', B'] = M [R, G, B, 1] on 0 to 255."""
        turn = np.radians(self.hue.astype(np.float64))
        chroma = np.zeros((*self.hue.shape, 3, 3))
        chroma[..., 0, 0] = 1
        chroma[..., 1, 1] = chroma[..., 2, 2] = self.saturation * np.cos(turn)
        chroma[..., 1, 2] = self.saturation * np.sin(turn)
        chroma[..., 2, 1] = -chroma[..., 1, 2]
        matrices = np.empty((*self.hue.shape, 3, 4))
        matrices[..., :3] = (self.brightness * self.contrast)[..., None, None] * (_FROM_YIQ @ chroma @ _TO_YIQ)
        matrices[..., 3] = (self.brightness * (128 - 128 * self.contrast))[..., None]
        matrices[~self.changes_colour] = np.eye(3, 4)  # exactly: the native operator skips these
        return matrices.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How views are varied beyond their windows; the meaning of each number is that of ``PretrainConfig``'s field.

    Probabilities are in [0, 1]; brightness, contrast and saturation give factors uniform in [1 − v, 1 + v] (not below
    0); hue is the largest turn as a fraction of a full one, uniform both ways; the blur's standard deviation is uniform
    between its bounds, in pixels of a crop of side 224, and scales with the side.
    """

    flip_p: float = 0.5
    grey_p: float = 0.2
    jitter_p: float = 0.5
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.4
    blur_p: float = 0.0
    blur_sigma_min: float = 0.1
    blur_sigma_max: float = 2.0

    def __post_init__(self) -> None:
        for name in ("flip_p", "grey_p", "jitter_p", "blur_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a probability")
        if min(self.brightness, self.contrast, self.saturation) < 0 or not 0 <= self.hue <= 0.5:
            raise ValueError(f"got {self}, expected jitter ranges >= 0 and hue in [0, 0.5]")
        if not 0 < self.blur_sigma_min <= self.blur_sigma_max:
            raise ValueError(f"got {self}, expected 0 < blur_sigma_min <= blur_sigma_max")

    @classmethod
    def from_config(cls, config: PretrainConfig) -> Augmentation:
        """The fields of the same names."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    @property
    def changes_colour(self) -> bool:
        return self.grey_p > 0 or self.jitter_p > 0

    def parameters(self, uniform: NDArray[np.float64], size: int) -> ViewParameters:
        """What the uniform numbers (n, 2, ``sampling.AUGMENT_DRAWS``) mean for crops of side ``size``.

        Every number has its own use, so that changing one probability leaves all other decisions as they were:
        flip, jitter, brightness, contrast, saturation, hue, grey, blur, standard deviation (the last one is spare).
        """
        flip, jitter, brightness, contrast, saturation, hue, grey, blur, sigma = np.moveaxis(uniform, -1, 0)[:9]
        jittered = jitter < self.jitter_p

        def factor(number: NDArray[np.float64], spread: float) -> NDArray[np.float64]:
            low = max(0.0, 1 - spread)
            return np.where(jittered, low + (1 + spread - low) * number, 1.0)

        blur_sigma = self.blur_sigma_min + (self.blur_sigma_max - self.blur_sigma_min) * sigma
        return ViewParameters(
            flip < self.flip_p,
            factor(brightness, self.brightness).astype(np.float32),
            factor(contrast, self.contrast).astype(np.float32),
            np.where(grey < self.grey_p, 0.0, factor(saturation, self.saturation)).astype(np.float32),
            np.where(jittered, 360 * self.hue * (2 * hue - 1), 0.0).astype(np.float32),
            np.where(blur < self.blur_p, blur_sigma * size / _REFERENCE_SIZE, 0.0).astype(np.float32),
        )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the pipeline's graph depends on; the loader's arguments of the same names."""

    size: int
    cam_grid: tuple[int, int]
    rule: CropRule
    constrained: bool
    attention: bool
    colour: bool
    blur: bool
    cuda: bool
    native: bool
    hw_decoder_load: float | None = None
    packed: bool = False
    """Files are members of shards."""
    raw_maps: bool = False
    """Maps of a packed dataset are stored as pixels."""
    native_reading: bool = False
    """Members of shards are handed over as their places, which the native operator reads, instead of as contents."""

    @property
    def needs_maps(self) -> bool:
        return self.constrained or self.attention

    @property
    def parts(self) -> int:
        """Files of a sample that are read."""
        return 2 if self.needs_maps else 1

    @property
    def branches(self) -> bool:
        """Whether the graph has conditionals, in which only some samples pass an operator."""
        return self.blur or (self.colour and not self.native_views and not self.cuda)

    @property
    def native_views(self) -> bool:
        """Whether the native operators make the views, and the maps of the attention loss."""
        return self.native and not self.cuda

    def inputs(self) -> dict[str, tuple[Any, int]]:
        """What the pipeline is fed, in order: name -> DALI type and number of dimensions of a sample."""
        found: dict[str, tuple[Any, int]] = {}
        if self.native_reading:
            found |= {"places": (types.INT64, 2), "ahead": (types.INT64, 2)}
            if self.raw_maps and self.needs_maps:
                found["map_shape"] = (types.INT32, 1)
        else:
            found["image"] = (types.UINT8, 1)
            if self.needs_maps:
                found["saliency"] = (types.UINT8, 3 if self.raw_maps else 1)
        if not self.constrained:
            found["shape"] = (types.INT64, 1)
        found["random"] = (types.FLOAT64, 3)
        found["mirror"] = (types.FLOAT, 2)
        if self.colour and self.native_views:
            found["colour"] = (types.FLOAT, 3)
        for view in VIEWS:
            if self.colour and not self.native_views:
                found |= {f"{view}_{name}": (types.FLOAT, 0) for name in _COLOURS}
            if self.colour and not self.native_views and not self.cuda:
                found[f"{view}_changed"] = (types.BOOL, 0)
            if self.blur:
                found[f"{view}_blur_sigma"] = (types.FLOAT, 0)
        if self.attention:
            found["weight"] = (types.FLOAT, 0)
        return found


class Source:
    """Feeds the pipeline: called with 0, 1, 2, … since it was built, gives ``Recipe.inputs`` of that step's batch."""

    def __init__(
        self,
        dataset: Dataset,
        order: sampling.GlobalOrder,
        augmentation: Augmentation,
        recipe: Recipe,
        broken: Collection[int],
    ) -> None:
        self.dataset, self.order, self.augmentation = dataset, order, augmentation
        self.recipe, self.broken = recipe, broken
        self.first_step = 0
        samples = dataset.samples
        self._weights = np.array([not sample.empty for sample in samples], dtype=np.float32)
        if not recipe.constrained:
            self._shapes = np.array([(sample.height, sample.width, 3) for sample in samples], dtype=np.int64)
        self.shards: tuple[str, ...] = ()
        """Paths of what ``Recipe.native_reading`` reads."""
        if recipe.native_reading:
            self.shards, self._places = member_places(samples, maps=recipe.needs_maps, raw_maps=recipe.raw_maps)
            if recipe.raw_maps:
                shapes = [(*_size_of_map(sample), 1) for sample in samples]
                self._map_shapes = np.array(shapes, dtype=np.int32)
        self._reader: ShardReader | None = None
        self._ahead: dict[int, _Reading] = {}

    def restart(self, step: int) -> None:
        """The next call is for ``step``, with the samples that are known to be broken by then."""
        self.close()
        self.first_step = step

    def close(self) -> None:
        """Closes the shards of a packed dataset; a later call opens them again."""
        self._ahead.clear()
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def indices(self, step: int) -> NDArray[np.int64]:
        """Dataset indices (batch,) of a step, with a stand-in at each position whose file is known to be broken."""
        indices, positions = self.order.at(step)
        if not self.broken:
            return indices
        indices = indices.copy()
        for slot in np.flatnonzero(np.isin(indices, list(self.broken))):
            for attempt in range(_MAX_REPLACEMENTS):
                indices[slot] = sampling.replacement(self.order.length, self.order.seed, int(positions[slot]), attempt)
                if indices[slot] not in self.broken:
                    break
            else:
                raise UserError(f"got no intact stand-in for a broken file in {_MAX_REPLACEMENTS} draws of the dataset")
        return indices

    def __call__(self, iteration: int) -> list[Any]:
        step = self.first_step + iteration
        indices = self.indices(step)
        draws = sampling.draw(self.order.seed, self.order.at(step)[1])
        views = self.augmentation.parameters(draws.augment, self.recipe.size)
        values: dict[str, Any] = {
            **self._files(step, indices),
            "random": draws.windows,
            "mirror": _mirrors(views.mirrored),
            "weight": self._weights[indices],
        }
        if self.recipe.colour and self.recipe.native_views:
            values["colour"] = views.colour_matrices()
        if not self.recipe.constrained:
            values["shape"] = self._shapes[indices]
        kinds = self.recipe.inputs()
        for column, view in enumerate(VIEWS):
            columns = {f"{view}_{name}": getattr(views, name) for name in (*_COLOURS, "blur_sigma")}
            columns[f"{view}_changed"] = views.changes_colour
            values |= {name: np.ascontiguousarray(both[:, column]) for name, both in columns.items() if name in kinds}
        return [values[name] for name in kinds]

    def _files(self, step: int, indices: NDArray[np.int64]) -> dict[str, Any]:
        """What is handed over of the files: places in shards, contents or names."""
        if self.recipe.native_reading:
            places = {"places": self._places[indices], "ahead": self._places[self.indices(step + 1)]}
            return {**places, "map_shape": self._map_shapes[indices]} if self.recipe.raw_maps else places
        samples = [self.dataset.samples[index] for index in indices]
        if self.recipe.packed:
            return self._packed(step, samples)
        files = {"image": _names([sample.image for sample in samples])}
        if self.recipe.needs_maps:
            files["saliency"] = _names([sample.saliency for sample in samples])
        return files

    def _packed(self, step: int, samples: Sequence[Sample]) -> dict[str, list[NDArray[np.uint8]]]:
        """The files' contents, read while the step before was handed over; those of the next step begin to be read."""
        reading = self._ahead.pop(step, None) or self._begin(step)
        self._ahead = {step + 1: self._begin(step + 1)}
        images = [_content(future) for future in reading.images]
        if not self.recipe.needs_maps:
            return {"image": images}
        maps = [_content(future) for future in reading.maps]
        for slot, content in enumerate(maps):
            if not len(content):
                images[slot] = content  # raw maps pass no decoder that could refuse them
        if self.recipe.raw_maps:
            maps = [_raw_map(content, sample) for content, sample in zip(maps, samples)]
        return {"image": [_refused(content) for content in images], "saliency": [_refused(content) for content in maps]}

    def _begin(self, step: int) -> _Reading:
        if self._reader is None:
            self._reader = ShardReader()
        samples = [self.dataset.samples[index] for index in self.indices(step)]
        maps = [_member(sample.saliency) for sample in samples] if self.recipe.needs_maps else []
        return _Reading(self._reader.start([_member(sample.image) for sample in samples]), self._reader.start(maps))


class _Reading(NamedTuple):
    """Members of shards that are being read for one step."""

    images: list[Future[bytes]]
    maps: list[Future[bytes]]


def _names(files: Sequence[Path | Member | None]) -> NDArray[np.uint8]:
    """(n, longest) uint8: names of files, filled up with zeros, which end a name for ``fn.io.file.read``."""
    names = np.array([os.fsencode(file) for file in files if isinstance(file, Path)])
    assert len(names) == len(files)  # the loader's constructor has checked that samples have the maps it needs
    return names.view(np.uint8).reshape(len(files), -1)


def _member(file: Path | Member | None) -> Member:
    assert isinstance(file, Member)
    return file


def _content(future: Future[bytes]) -> NDArray[np.uint8]:
    """What was read; nothing where that failed, so that the batch fails when its turn comes and names the file."""
    try:
        return np.frombuffer(future.result(), dtype=np.uint8)
    except OSError:
        return np.empty(0, dtype=np.uint8)


def _refused(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The content, or where there is none something that no decoder takes for a picture."""
    return content if content.size else np.zeros(16, dtype=np.uint8)


def _raw_map(content: NDArray[np.uint8], sample: Sample) -> NDArray[np.uint8]:
    """(h, w, 1) uint8: the pixels behind NumPy's header, or a decoded picture where one was stored instead."""
    height, width = _size_of_map(sample)
    if not content.size:
        return np.zeros((height, width, 1), dtype=np.uint8)
    if _member(sample.saliency).name.endswith(".npy"):
        return content[-height * width :].reshape(height, width, 1)
    return decode_stored(content.tobytes(), "png")[:, :, None]


def _size_of_map(sample: Sample) -> tuple[int, int]:
    assert sample.map_shape is not None  # packed maps have one
    return sample.map_shape


def _mirrors(mirrored: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(n, 2 views) -> (n, 2 views, 2 axes): the share of the far end in a view's start; 1 swaps the ends of x."""
    weights = np.zeros((*mirrored.shape, 2), dtype=np.float32)
    weights[..., 1] = mirrored
    return weights


class _NumpyWindows:
    """The crop rule as DALI calls it from one of its threads, for a whole batch."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __call__(
        self, basis: Sequence[NDArray[Any]], randoms: Sequence[NDArray[np.float64]]
    ) -> tuple[list[NDArray[np.float32]], list[NDArray[np.uint8]]]:
        relative, fallback = [], []
        for values, random in zip(basis, randoms):
            height, width = values.shape[:2] if self.recipe.constrained else values[:2].tolist()
            # The rule refuses an empty map; whether one may occur was settled when the dataset was checked.
            if self.recipe.constrained and values.max() > THRESHOLD:
                windows = crop_windows(values[..., 0], random, self.recipe.rule)
            else:
                windows = unconstrained_windows(height, width, random)
            relative.append(windows.relative(height, width))
            fallback.append(windows.fallback.astype(np.uint8))
        return relative, fallback


@do_not_convert  # here and below: DALI would rewrite what is called, down to the standard library
def fed(source: Source, recipe: Recipe, only: Collection[str] | None = None) -> dict[str, Any]:
    """``Recipe.inputs`` as DALI nodes, by name; some of them if ``only`` is given."""
    names = list(recipe.inputs())
    kinds = {name: kind for name, kind in recipe.inputs().items() if only is None or name in only}

    def values(iteration: int) -> list[Any]:
        found = dict(zip(names, source(iteration)))
        return [found[name] for name in kinds]

    nodes = fn.external_source(
        source if only is None else values,
        num_outputs=len(kinds),
        batch=True,
        dtype=[kind for kind, _ in kinds.values()],
        ndim=[ndim for _, ndim in kinds.values()],
    )
    return dict(zip(kinds, nodes))


@do_not_convert
def contents(inputs: dict[str, Any], source: Source, recipe: Recipe) -> tuple[Any, Any]:
    """Contents of the image and of the map, or the map's pixels where those are stored; None without maps."""
    if recipe.native_reading:
        image, *maps = dali_plugin.read_members(
            inputs["places"], inputs["ahead"], files=source.shards, parts=recipe.parts
        )
        if not maps:
            return image, None
        return image, fn.reshape(maps[0], shape=inputs["map_shape"]) if recipe.raw_maps else maps[0]
    image, saliency = inputs["image"], inputs.get("saliency")
    if recipe.packed:
        return image, saliency
    return fn.io.file.read(image), None if saliency is None else fn.io.file.read(saliency)


@do_not_convert
def decoded_image(encoded: Any, recipe: Recipe) -> Any:
    """(H, W, 3) uint8 on the recipe's device, as stored: EXIF would turn the image and leave its map as it is."""
    arguments = {} if recipe.hw_decoder_load is None else {"hw_decoder_load": recipe.hw_decoder_load}
    device = "mixed" if recipe.cuda else "cpu"
    return fn.decoders.image(encoded, device=device, output_type=types.RGB, adjust_orientation=False, **arguments)


@do_not_convert
def decoded_map(encoded: Any) -> Any:
    """(H, W, 1) uint8 in CPU memory, as stored."""
    return fn.decoders.image(encoded, output_type=types.GRAY, adjust_orientation=False)


@do_not_convert
def crop_corners(basis: Any, random: Any, recipe: Recipe) -> tuple[Any, Any]:
    """The windows of both views as DALI nodes on the CPU: relative corners (2, 4) float32, fallback flags (2,) uint8.

    ``basis`` is what they are chosen on: the decoded map for constrained crops, else the shape of the image.
    """
    if recipe.native:
        _, corners, fallback, _ = dali_plugin.saliency_crop(
            basis,
            random,
            phi=recipe.rule.phi,
            pair_constraint=recipe.rule.pair_constraint,
            constrained=recipe.constrained,
        )
    else:
        corners, fallback = fn.python_function(
            basis, random, function=_NumpyWindows(recipe), batch_processing=True, num_outputs=2
        )
    return corners, fallback


@do_not_convert
def _region(start: Any, end: Any) -> dict[str, Any]:
    """Arguments of a resize of the window between two relative corners."""
    return {"roi_start": start, "roi_end": end, "roi_relative": True, "antialias": True}


def _twisted(view: Any, changed: Any, colour: dict[str, Any]) -> Any:
    # DALI's conditional: only the samples of a branch pass its operators.
    if changed:
        result = fn.color_twist(view, **colour)
    else:
        result = view
    return result


def _blurred(view: Any, sigma: Any) -> Any:
    if sigma > 0:
        result = fn.gaussian_blur(view, sigma=sigma)
    else:
        result = view
    return result


@do_not_convert
def _salient_share(salient: Any, start: Any, end: Any, grid: tuple[int, int]) -> Any:
    """Share of salient area in each cell of a grid laid over the window: (G_h, G_w) float32, as a DALI node."""
    rows, columns = grid
    fine = fn.resize(
        salient,
        size=(rows * _SAMPLES_PER_CELL, columns * _SAMPLES_PER_CELL),
        dtype=types.FLOAT,
        **_region(start, end),
    )
    cells = fn.reshape(fine, shape=(rows, _SAMPLES_PER_CELL, columns, _SAMPLES_PER_CELL), layout="")
    return fn.reductions.mean(fn.reductions.mean(cells, axes=3), axes=1)


@do_not_convert
def _native_outputs(
    image: Any, saliency: Any, corners: Any, inputs: dict[str, Any], recipe: Recipe
) -> tuple[list[Any], list[Any]]:
    """Both views before the blur, and with attention the query's salient share and the key mask, by our operators."""
    views = dali_plugin.crop_views(image, corners, inputs["mirror"], inputs.get("colour"), size=recipe.size)
    if not recipe.attention:
        return list(views), []
    maps = dali_plugin.saliency_targets(saliency, corners, inputs["mirror"], size=recipe.size, grid=recipe.cam_grid)
    return list(views), list(maps)


def _dali_outputs(
    image: Any, saliency: Any, corners: Any, inputs: dict[str, Any], recipe: Recipe
) -> tuple[list[Any], list[Any]]:
    """The same by DALI's operators."""
    near, far, mirror = corners[:, 0:2], corners[:, 2:4], inputs["mirror"]
    start, end = near * (1 - mirror) + far * mirror, far * (1 - mirror) + near * mirror
    views = []
    for which, name in enumerate(VIEWS):
        view = fn.resize(image, size=(recipe.size, recipe.size), **_region(start[which], end[which]))
        if recipe.colour:
            colour = {argument: inputs[f"{name}_{argument}"] for argument in _COLOURS}
            # On a CPU the operator costs as much as the resize, on a GPU less than parting a batch in two.
            view = fn.color_twist(view, **colour) if recipe.cuda else _twisted(view, inputs[f"{name}_changed"], colour)
        views.append(view)
    if not recipe.attention:
        return views, []
    salient = fn.reinterpret(saliency > THRESHOLD, dtype=types.UINT8)
    if recipe.cuda:
        salient = salient.gpu()
    share = fn.resize(
        salient,
        size=(recipe.size, recipe.size),
        dtype=types.FLOAT,
        **_region(start[1], end[1]),
    )
    mask = fn.reinterpret(share > 0.5, dtype=types.UINT8)
    return views, [_salient_share(salient, start[0], end[0], recipe.cam_grid), mask]


def cast_pipeline(source: Source, recipe: Recipe, **settings: Any) -> Any:
    """The whole data path as a DALI pipeline with the ``settings`` of ``nvidia.dali.Pipeline``.

    Outputs, all but the last of a constrained pipeline on the recipe's device: query and key (S, S, 3) uint8; with
    attention the query's salient share (G_h, G_w) float32, the key mask (S, S, 1) uint8 and the CAST weight () float32;
    with constrained crops the fallback flags (2,) uint8 in CPU memory.
    """
    known = set(sys.modules)
    definition: Any = pipeline_def
    pipeline = definition(_graph, enable_conditionals=recipe.branches)(source, recipe, **settings)
    # For conditionals DALI rewrites functions in modules of their own, whose files it deletes when the interpreter
    # ends; where that is cut short, as in worker processes, they would gather in the temporary folder.
    for name in set(sys.modules) - known:
        if name.startswith(GENERATED):
            Path(str(sys.modules[name].__file__)).unlink(missing_ok=True)
    return pipeline


def _graph(source: Source, recipe: Recipe) -> tuple[Any, ...]:
    inputs = fed(source, recipe)
    encoded, saliency = contents(inputs, source, recipe)
    image = decoded_image(encoded, recipe)
    if recipe.needs_maps and not recipe.raw_maps:
        saliency = decoded_map(saliency)
    basis = saliency if recipe.constrained else inputs["shape"]
    corners, fallback = crop_corners(basis, inputs["random"], recipe)

    if recipe.native_views:
        outputs, maps = _native_outputs(image, saliency, corners, inputs, recipe)
    else:
        outputs, maps = _dali_outputs(image, saliency, corners, inputs, recipe)
    if recipe.blur:
        for which, name in enumerate(VIEWS):
            outputs[which] = _blurred(outputs[which], inputs[f"{name}_blur_sigma"])
    outputs += maps
    if recipe.attention:
        outputs.append(inputs["weight"].gpu() if recipe.cuda else inputs["weight"])
    if recipe.constrained:
        outputs.append(fallback)
    return tuple(outputs)


def deliver(outputs: Sequence[Any], recipe: Recipe, indices: NDArray[np.int64]) -> Batch:
    """The outputs of ``cast_pipeline`` as a batch that shares their memory."""
    query, key, *rest = [torch.from_dlpack(output.as_tensor()) for output in outputs]
    saliency = mask = weight = fallback = None
    if recipe.attention:
        saliency, mask, weight, *rest = rest
        mask = mask.squeeze(-1)
    if recipe.constrained:
        fallback = rest[0].bool()
    return Batch(
        query.permute(0, 3, 1, 2),
        key.permute(0, 3, 1, 2),
        saliency,
        mask,
        weight,
        torch.from_numpy(np.array(indices)),
        fallback,
    )


@pipeline_def(batch_size=1, num_threads=1, prefetch_queue_depth=1)
def _probe_pipeline(grey: bool, device: str) -> Any:
    encoded = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, device=device, output_type=types.GRAY if grey else types.RGB)


def _undecodable(
    files: Sequence[Path | Member | None], *, grey: bool, device: str, device_id: int | None
) -> dict[int, str]:
    """Tries each file alone, because DALI's error does not always name it: {place in ``files``: the reason}."""
    refused: dict[int, str] = {}
    pipeline = None
    for place, file in enumerate(files):
        assert file is not None
        try:
            content = np.frombuffer(read_bytes(file), dtype=np.uint8)
        except OSError as error:
            refused[place] = f"cannot be read: {error.strerror or error}"
            continue
        if isinstance(file, Member) and file.name.endswith(".npy"):
            continue
        if pipeline is None:
            pipeline = _probe_pipeline(grey, device, device_id=device_id)
        try:
            pipeline.run(content=[content])
        except RuntimeError as error:
            refused[place] = _reason(error)
            pipeline = None  # one that has failed is not used again
    return refused


def _reason(error: BaseException) -> str:
    """The informative line of DALI's many-line message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "encountered:" in lines:
        lines = lines[lines.index("encountered:") + 1 :]
    return lines[0] if lines else type(error).__name__


class DaliLoader:
    """An endless iterator over the batches of a run; starts at any step and yields what a run from 0 would yield there.

    Args:
        dataset: checked samples (``layout.usable``); with ``constrained`` or ``attention`` each has a map.
        batch: N, pairs of this rank in a step.
        size: S, side of the crops in pixels.
        cam_grid: (G_h, G_w), the trunk's output grid, on which the query's saliency is averaged.
        augmentation: flips, colour and blur.
        rule: of the windows.
        constrained: windows by the crop rule; otherwise plain random resized crops, flagged by nothing.
        attention: make the maps of the attention loss.
        seed: of the order and of everything random, 0 <= seed < 2**64.
        device: ``"cpu"`` or ``"cuda"`` (the current CUDA device).
        threads: DALI's CPU threads; 0 for ``default_threads()``. They change no result.
        rank, world: this process among all; the global batch is ``batch * world``.
        start_step: the first step to deliver.
        native: windows and, on a CPU, views by the native operators (True), windows by NumPy and views by DALI's own
            operators (False), or as the first where they are built and as the second elsewhere (None).
        max_broken_share: a file that cannot be decoded is named in the log and replaced by another sample, the same one
            in every run; once more than this share of the dataset is broken the loader stops.
        hw_decoder_load: share of the JPEGs for the GPU's decoding engines, where it has some; None for DALI's own.

    Raises:
        UserError: the dataset is smaller than a global batch; shards lack the maps that are needed; more files than
            tolerated are broken (from ``next``).
        ValueError: another argument is out of range.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch: int,
        size: int,
        cam_grid: tuple[int, int],
        augmentation: Augmentation,
        rule: CropRule,
        constrained: bool,
        attention: bool,
        seed: int,
        device: str = "cpu",
        threads: int = 0,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        native: bool | None = None,
        max_broken_share: float = 0.01,
        hw_decoder_load: float | None = None,
    ) -> None:
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device: got {device!r}, expected 'cpu' or 'cuda'")
        if size < 1 or min(cam_grid) < 1 or threads < 0:
            raise ValueError(
                f"got size={size}, cam_grid={cam_grid}, threads={threads}, expected positive sizes and threads >= 0"
            )
        self._recipe = Recipe(
            size=size,
            cam_grid=cam_grid,
            rule=rule,
            constrained=constrained,
            attention=attention,
            colour=augmentation.changes_colour,
            blur=augmentation.blur_p > 0,
            cuda=device == "cuda",
            native=_choose_native(native, device == "cuda"),
            hw_decoder_load=hw_decoder_load,
        )
        self._recipe = dataclasses.replace(self._recipe, **choose_reading(dataset, self._recipe))
        if self._recipe.needs_maps:
            for sample in dataset.samples:
                if sample.saliency is None and self._recipe.packed:
                    raise UserError(missing_maps(dataset.images))
                if sample.saliency is None:
                    raise ValueError(f"{sample.image}: got no saliency map, expected one for constrained or attention")
        self._order = sampling.GlobalOrder(len(dataset.samples), seed, batch, rank, world)
        self._dataset = dataset
        self._fingerprint = dataset.fingerprint()
        self._threads = threads or default_threads()
        self._device_id = torch.cuda.current_device() if device == "cuda" else None
        self._max_broken_share = max_broken_share
        self.broken: dict[int, str] = {}
        """Dataset index and reason of every sample found to be broken."""
        self._source = Source(dataset, self._order, augmentation, self._recipe, self.broken)
        self._pipeline: Any = None
        self.step = start_step
        """The next step to be delivered."""
        self.seek(start_step)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which the dataset is seen once, less the remainder that fills no global batch."""
        return self._order.steps_per_epoch

    @property
    def native(self) -> bool:
        """Whether the native operator chooses the windows."""
        return self._recipe.native

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._pipeline is None:
            raise ValueError("the loader is closed; seek() opens it again")
        stream = torch.cuda.current_stream(self._device_id) if self._recipe.cuda else None
        while True:
            try:
                outputs = self._pipeline.run(stream)
                break
            except RuntimeError as error:
                self._find_broken(error)
                self.seek(self.step)
        batch = deliver(outputs, self._recipe, self._source.indices(self.step))
        self.step += 1
        return batch

    def seek(self, step: int) -> None:
        """Rebuilds the pipeline so that ``step`` is delivered next, with the very batches an uninterrupted run has.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step: got {step}, expected step >= 0")
        self.close()
        self._source.restart(step)
        self.step = step
        self._pipeline = cast_pipeline(
            self._source,
            self._recipe,
            batch_size=self._order.batch,
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=2,
            seed=0,
        )
        self._pipeline.build()

    def close(self) -> None:
        """Stops DALI's threads and frees its buffers, except those of batches still in use."""
        self._pipeline = None
        self._source.close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on from here: the step, and what must not change for it to mean the same."""
        return {
            "step": self.step,
            "length": self._order.length,
            "dataset": self._fingerprint,
            "global_batch": self._order.global_batch,
            "seed": self._order.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the step of a ``state_dict``.

        Raises:
            UserError: the dataset, the global batch or the seed differ, so that the step would mean another
                place in another order.
        """
        differing = [
            f"{name} {state[name]} then, {own} now"
            for name, own in self.state_dict().items()
            if name != "step" and state[name] != own
        ]
        if differing:
            raise UserError(f"the checkpoint's place in the data does not fit this run: {'; '.join(differing)}")
        self.seek(int(state["step"]))

    def _find_broken(self, error: RuntimeError) -> None:
        """Names the files of the failed batch that DALI refuses; raises if there are none or too many."""
        known, length = len(self.broken), self._order.length
        indices = self._source.indices(self.step)
        samples = [self._dataset.samples[index] for index in indices]
        for grey in (False, True) if self._recipe.needs_maps else (False,):
            paths = [sample.saliency if grey else sample.image for sample in samples]
            device = "mixed" if self._recipe.cuda and not grey else "cpu"
            for slot, reason in _undecodable(paths, grey=grey, device=device, device_id=self._device_id).items():
                path = paths[slot]
                assert path is not None
                if int(indices[slot]) not in self.broken:
                    self.broken[int(indices[slot])] = f"{shown(path)}: {reason}"
                    logger.warning(
                        "left out a file that DALI cannot decode (number %d, of %d samples): %s: %s",
                        len(self.broken),
                        length,
                        shown(path),
                        reason,
                    )
        if len(self.broken) == known:
            raise error
        if len(self.broken) > self._max_broken_share * length:
            raise UserError(
                f"{next(reversed(self.broken.values()))} (cannot be decoded; {len(self.broken)} of {length} samples "
                f"are broken, tolerated: {self._max_broken_share:.1%}; `cast-fast validate` lists all)"
            ) from error


def default_threads() -> int:
    """One thread a core that this process may use; its share of them where the ranks of a machine have all in common.

    A launcher that gives each rank cores of its own is taken at its word.
    """
    own = len(os.sched_getaffinity(0))
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")  # torchrun's
    if own < (os.cpu_count() or own) or not ranks.isdecimal():
        return own
    return max(1, own // max(1, int(ranks)))


def _choose_native(wanted: bool | None, cuda: bool) -> bool:
    """Settles once which code chooses the windows and, on a CPU, makes the views, and logs it with the reason."""
    if wanted is False:
        logger.info("crop windows by NumPy, views by DALI's own operators, as asked")
        return False
    reason = dali_plugin.unavailable_reason()
    if reason is None:
        logger.info("crop windows by the native operator%s", "" if cuda else ", views by native operators too")
        return True
    if wanted:
        raise UserError(f"the native crop operator was asked for: {reason}")
    slower = "crop windows by NumPy" if cuda else "crop windows by NumPy and views by DALI's own operators"
    logger.warning("%s, which is slower: %s", slower, reason)
    return False


def choose_reading(dataset: Dataset, recipe: Recipe) -> dict[str, bool]:
    """Settles once how files are read, as fields of the recipe, and logs it with the reason."""
    packed = any(isinstance(sample.image, Member) for sample in dataset.samples)
    if not packed:
        return {}
    raw = [isinstance(sample.saliency, Member) and sample.saliency.name.endswith(".npy") for sample in dataset.samples]
    obstacle = None if recipe.native else "the native operators are not used"
    if recipe.native and recipe.needs_maps and any(raw) and not all(raw):
        obstacle = "only some maps are stored as pixels"
    elif recipe.native:
        obstacle = members_obstacle(dataset.samples)
    logger.info("shards are read by %s", "the native operator" if obstacle is None else f"Python's threads: {obstacle}")
    return {"packed": True, "raw_maps": any(raw), "native_reading": obstacle is None}
