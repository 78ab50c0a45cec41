"""Make saliency maps: ``cast-fast saliency IMAGES OUT --method …``.

Writes ``OUT/NAME.png`` for every ``IMAGES/NAME.jpg``: 8-bit grey, the size of the stored image (no EXIF rotation
applied), 255 salient and 0 not, as ``layout`` expects it; and ``OUT/saliency.json``, which records how the maps were
made and whether that needed human labels, and which ``prepare`` copies into its manifest.

Methods:

``spectral-residual``  Hou and Zhang, "Saliency Detection: A Spectral Residual Approach", CVPR 2007, from OpenCV.
``fine-grained``       Montabone and Soto, "Human detection using a mobile platform and novel features derived from a
                       visual saliency mechanism", Image and Vision Computing 28(3), 2010, from OpenCV.
``coco``               the union of an image's annotated instances (COCO's JSON), large ones only.
``onnx``               a model file with one image as input and a map as output, such as U²-Net (Qin et al., Pattern
                       Recognition 106, 2020) or, for maps without human labels, DeepUSPS (Nguyen et al., NeurIPS 2019).

The first two need no download and no training, and are weak: they find outlines, not objects. Their values are smoothed
and cut by Otsu's threshold. A model's output is scaled to its own least and largest value and cut at one half.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cast_fast import __version__
from cast_fast.data.decode_check import MAX_PIXELS
from cast_fast.data.layout import Fault, FoundFile, find_pairs, shown
from cast_fast.data.prepare import SOURCE_FILE
from cast_fast.data.progress import ordered_map, show_progress
from cast_fast.data.rgb import to_rgb
from cast_fast.errors import UserError
from cast_fast.files import claimed, remove_parts, write_whole

HELP = "make saliency maps of images"

METHODS = ("spectral-residual", "fine-grained", "coco", "onnx")
INPUT_SIZE = 320
LEAST_SHARE = 0.25
SMOOTHING = 0.04
"""Standard deviation over the longer side, for the two methods of OpenCV."""

_SMOOTH_SIDE = 256

# ImageNet's statistics of RGB in [0, 1], with which U²-Net and its kin were trained
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)

_log = logging.getLogger("cast_fast")

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB
Mask = NDArray[np.bool_]  # (H, W)


class NoMap(Exception):
    """An image for which a method has no map, with the reason."""


def spectral_residual(image: Pixels) -> Mask:
    """What the log amplitude spectrum's residual points to; (H, W, 3) RGB to (H, W)."""
    return _cut(_opencv("StaticSaliencySpectralResidual", image))


def fine_grained(image: Pixels) -> Mask:
    """On-off centre-surround differences of intensity at several scales; (H, W, 3) RGB to (H, W)."""
    return _cut(_opencv("StaticSaliencyFineGrained", image))


def _opencv(name: str, image: Pixels) -> NDArray[np.float32]:
    if image.min() == image.max():  # OpenCV would amplify the noise of its arithmetic
        return np.zeros(image.shape[:2], np.float32)
    detector = getattr(cv2.saliency, f"{name}_create")()
    done, values = detector.computeSaliency(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not done:
        raise NoMap("OpenCV's detector gives no result")
    return np.asarray(values, np.float32)


def _cut(values: NDArray[np.float32]) -> Mask:
    """Otsu's threshold of smoothed values; nothing of a map without contrast."""
    height, width = values.shape
    scale = min(1.0, _SMOOTH_SIDE / max(height, width))
    small = cv2.resize(
        values, (max(1, round(scale * width)), max(1, round(scale * height))), interpolation=cv2.INTER_AREA
    )
    small = cv2.GaussianBlur(small, (0, 0), SMOOTHING * max(small.shape))
    values = np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return np.zeros(values.shape, bool)
    levels = np.rint((values - low) * (255 / (high - low))).astype(np.uint8)
    _, cut = cv2.threshold(levels, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return np.asarray(cut) > 0


class OnnxModel:
    """A saliency network in an ONNX file, run by OpenCV on the CPU; call it from several threads as you like.

    The image is resized to a square, divided by its largest value and normalised by ImageNet's statistics (U²-Net's
    convention); of several outputs the first counts, which in U²-Net is the fused one.

    Args:
        path: the model.
        size: side of its input.

    Raises:
        UserError: the file cannot be read, or is no model that OpenCV can run on one image.
    """

    def __init__(self, path: Path, size: int = INPUT_SIZE) -> None:
        try:
            self._content = path.read_bytes()
        except OSError as error:
            raise UserError(f"--model: cannot read {shown(path)}: {error.strerror}") from error
        self.path, self.size = path, size
        self.sha256 = hashlib.sha256(self._content).hexdigest()
        self._local = threading.local()
        try:
            self(np.zeros((size, size, 3), np.uint8))
        except (cv2.error, NoMap) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--model: {shown(path)} is no saliency network that OpenCV can run: {reason}") from error

    def __call__(self, image: Pixels) -> Mask:
        """(H, W, 3) RGB to (H, W)."""
        height, width = image.shape[:2]
        small = cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA).astype(np.float32)
        normalised = (small / max(float(small.max()), 1e-6) - _MEAN) / _STD
        network, first = self._network()
        network.setInput(np.ascontiguousarray(normalised.transpose(2, 0, 1)[None]))
        output = np.squeeze(np.asarray(network.forward(first), np.float32))
        if output.ndim != 2 or output.size < 4:
            raise NoMap(f"its output has shape {output.shape}, expected one map")
        if not np.isfinite(output).all():
            raise NoMap("its output is not finite")
        low, high = float(output.min()), float(output.max())
        if not high > low:
            return np.zeros((height, width), bool)
        scaled = cv2.resize((output - low) / (high - low), (width, height), interpolation=cv2.INTER_LINEAR)
        return np.asarray(scaled) > 0.5

    def _network(self) -> tuple[Any, str]:
        """This thread's own network, because one must not run twice at a time, and the name of its first output."""
        if not hasattr(self._local, "network"):
            network = cv2.dnn.readNetFromONNX(np.frombuffer(self._content, np.uint8))
            self._local.network = network, network.getUnconnectedOutLayersNames()[0]
        return self._local.network


class CocoInstances:
    """Maps from instance annotations in COCO's format: polygons, and run lengths in both encodings.

    An image's salient region is the union of its instances that cover at least ``least_share`` as much as the largest
    one; crowds (``iscrowd``) are left out. An image without any has an empty map.

    Args:
        path: JSON file with ``images`` and ``annotations``.
        least_share: 0 takes every instance.

    Raises:
        UserError: the file cannot be read or is not of this format.
    """

    def __init__(self, path: Path, least_share: float = LEAST_SHARE) -> None:
        self.least_share = least_share
        try:
            content = path.read_bytes()
            record = json.loads(content)
            self._sizes: dict[str, tuple[int, int]] = {}
            names: dict[int, str] = {}
            for image in record["images"]:
                name = str(image["file_name"])
                names[image["id"]] = name
                self._sizes[name] = int(image["height"]), int(image["width"])
            self._instances: dict[str, list[Any]] = {}
            for annotation in record["annotations"]:
                if not annotation.get("iscrowd"):
                    self._instances.setdefault(names[annotation["image_id"]], []).append(annotation["segmentation"])
        except OSError as error:
            raise UserError(f"--annotations: cannot read {shown(path)}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"--annotations: {shown(path)} is not in COCO's instance format: {error!r}") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._by_base: dict[str, list[str]] = {}
        for name in self._sizes:
            self._by_base.setdefault(os.path.basename(name), []).append(name)

    def __call__(self, name: str, height: int, width: int) -> Mask:
        """The map of the image whose path below the root is ``name``, or else has its last part.

        Raises:
            NoMap: the annotations do not name the image, or give it another size, or are faulty.
        """
        if name not in self._sizes:
            same = self._by_base.get(os.path.basename(name), [])
            if len(same) != 1:
                raise NoMap("the annotations do not name it" if not same else "the annotations name it more than once")
            name = same[0]
        if self._sizes[name] != (height, width):
            expected = "x".join(map(str, self._sizes[name][::-1]))
            raise NoMap(f"is {width}x{height}, the annotations say {expected}")
        try:
            masks = [rasterise(instance, height, width) for instance in self._instances.get(name, [])]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise NoMap(f"its annotation is faulty: {error}") from error
        largest = max((int(mask.sum()) for mask in masks), default=0)
        union = np.zeros((height, width), bool)
        for mask in masks:
            if mask.sum() >= self.least_share * largest:
                union |= mask
        return union


def rasterise(segmentation: Any, height: int, width: int) -> Mask:
    """Pixels of one instance: a list of polygons [x0, y0, x1, y1, …], or run lengths {"size", "counts"}.

    Raises:
        ValueError: the run lengths do not fill the image, or a polygon has too few or odd numbers of coordinates.
    """
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        lengths = _runs(counts) if isinstance(counts, str) else [int(count) for count in counts]
        if list(segmentation["size"]) != [height, width] or sum(lengths) != height * width or min(lengths) < 0:
            raise ValueError(f"run lengths for {segmentation['size']}, expected {[height, width]}")
        values = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
        return values.reshape(width, height).T  # runs go down the columns
    mask = np.zeros((height, width), np.uint8)
    for polygon in segmentation:
        corners = np.asarray(polygon, np.float64)
        if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2 or not np.isfinite(corners).all():
            raise ValueError(f"a polygon of {corners.size} numbers")
        # pixel i of OpenCV is the point i, of COCO the interval from i to i + 1; 4 bits of a fraction
        points = np.rint((corners.reshape(-1, 2) - 0.5) * 16).astype(np.int32)
        cv2.fillPoly(mask, [points], 1, shift=4)
    return mask > 0


def _runs(text: str) -> list[int]:
    """COCO's compressed run lengths: 5 bits a character from 48 on, bit 5 for more, differences from the third on."""
    lengths: list[int] = []
    at = 0
    while at < len(text):
        value = shift = 0
        while True:
            code = ord(text[at]) - 48
            at += 1
            value |= (code & 31) << shift
            shift += 5
            if not code & 32:
                break
        if code & 16:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
    return lengths


@dataclass(frozen=True)
class Method:
    """How to make maps, and what to record of it."""

    map_of: Callable[[FoundFile, Pixels], Mask]
    record: dict[str, Any]
    """``method``, ``supervised`` and the method's settings."""


def choose_method(
    name: str,
    *,
    annotations: Path | None = None,
    least_share: float = LEAST_SHARE,
    model: Path | None = None,
    input_size: int = INPUT_SIZE,
    unsupervised: bool = False,
) -> Method:
    """The method of a name.

    Raises:
        UserError: its file is missing or faulty, a setting is out of range, or the installed OpenCV lacks it.
    """
    if (name == "coco") != (annotations is not None):
        raise UserError("--annotations FILE goes with --method coco, and only with it")
    if (name == "onnx") != (model is not None):
        raise UserError("--model FILE goes with --method onnx, and only with it")
    if annotations is not None:
        if not 0 <= least_share <= 1:
            raise UserError(f"--least-share: got {least_share}, expected 0 to 1")
        instances = CocoInstances(annotations, least_share)
        source = {"name": annotations.name, "sha256": instances.sha256}
        record = {"method": name, "supervised": True, "annotations": source, "least_share": least_share}
        return Method(lambda file, image: instances(file.name, *image.shape[:2]), record)
    if model is not None:
        if not 16 <= input_size <= 4096:
            raise UserError(f"--input-size: got {input_size}, expected 16 to 4096")
        network = OnnxModel(model, input_size)
        source = {"name": model.name, "sha256": network.sha256}
        record = {"method": name, "supervised": not unsupervised, "model": source, "input_size": input_size}
        return Method(lambda file, image: network(image), record)
    if not hasattr(cv2, "saliency"):
        raise UserError(
            f"--method {name}: the installed OpenCV {cv2.__version__} lacks its contrib modules; "
            "pip install opencv-contrib-python-headless in its place"
        )
    detect = {"spectral-residual": spectral_residual, "fine-grained": fine_grained}[name]
    return Method(lambda file, image: detect(image), {"method": name, "supervised": False, "smoothing": SMOOTHING})


@dataclass(frozen=True)
class Summary:
    """What a run of `make_maps` left in the folder."""

    written: int
    kept: int
    """Maps that an earlier run had made."""
    empty: int
    """Of those written, maps without a salient pixel."""
    faults: tuple[Fault, ...]
    """Images without a map, and why."""


def make_maps(
    images: Path, out: Path, method: Method, *, workers: int | None = None, progress: bool = False
) -> Summary:
    """Makes the maps of a folder of images; goes on where an earlier run of the same method stopped.

    Args:
        images: folder of images as in ``layout.scan``.
        out: folder for the maps, made if absent; may lie inside ``images``.
        method: from `choose_method`.
        workers: threads; None takes one for each CPU that this process may use.
        progress: show a progress bar.

    Raises:
        UserError: a folder is faulty, ``out`` holds something else or maps of another method, another process makes
            maps there, or the disk is full.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers: got {workers}, expected at least 1")
    if images.resolve() == out.resolve():
        raise UserError(f"IMAGES and OUT are the same folder, {shown(images)}")
    pairs, faults = find_pairs(images, None, leave_out=out)
    record = {**method.record, "tools": {"cast_fast": __version__, "opencv": cv2.__version__}}
    files = [pair.image for pair in pairs]
    written = empty = 0
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(claimed(out, SOURCE_FILE, "saliency"))
            _record(out / SOURCE_FILE, record)
            todo = [file for file in files if not _is_made(file, _target(out, file))]
            for folder in {_target(out, file).parent for file in todo}:
                remove_parts(folder)
            results = ordered_map(lambda file: _make(file, out, method), todo, workers or len(os.sched_getaffinity(0)))
            stack.enter_context(contextlib.closing(results))
            for result in show_progress(results, "Making maps", len(todo), progress):
                if isinstance(result, Fault):
                    faults.append(result)
                else:
                    written += 1
                    empty += result
    except OSError as error:
        raise UserError(f"cannot write {shown(error.filename or out)}: {error.strerror or error}") from error
    faults.sort(key=lambda fault: str(fault.path))
    return Summary(written, len(files) - len(todo), empty, tuple(faults))


def _target(out: Path, file: FoundFile) -> Path:
    return out / (os.path.splitext(file.name)[0] + ".png")


def _is_made(file: FoundFile, target: Path) -> bool:
    """Whether a map is there that is no older than its image."""
    try:
        return target.stat().st_mtime_ns >= file.mtime_ns
    except OSError:
        return False


def _record(path: Path, record: dict[str, Any]) -> None:
    """Writes how the maps are made, or finds the same there."""
    if path.exists():
        try:
            earlier = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{shown(path)} is damaged: {error}") from error
        if _method_of(earlier) != _method_of(record):
            raise UserError(
                f"{shown(path.parent)} holds maps of another method: {json.dumps(_method_of(earlier))} then, "
                f"{json.dumps(_method_of(record))} now; choose another folder"
            )
    write_whole(path, json.dumps(record, indent=1) + "\n")


def _method_of(record: Any) -> Any:
    return {key: value for key, value in record.items() if key != "tools"} if isinstance(record, dict) else record


def _make(file: FoundFile, out: Path, method: Method) -> bool | Fault:
    """Writes a file's map; whether the map is empty, or why there is none."""
    try:
        image = _read_rgb(file.path)
        mask = method.map_of(file, image)
    except NoMap as error:
        return Fault(file.path, "no-map", str(error))
    except cv2.error as error:
        return Fault(file.path, "no-map", f"OpenCV: {' '.join(str(error).split())}")
    target = _target(out, file)
    target.parent.mkdir(parents=True, exist_ok=True)
    done, content = cv2.imencode(".png", mask.astype(np.uint8) * np.uint8(255))
    assert done
    write_whole(target, content.tobytes())
    return not mask.any()


def _read_rgb(path: Path) -> Pixels:
    """Stored pixels (H, W, 3), no EXIF rotation applied."""
    try:
        with Image.open(path, formats=["JPEG", "PNG"]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise NoMap(f"has {picture.width}x{picture.height} pixels, at most {MAX_PIXELS} are decoded")
            return np.asarray(to_rgb(picture))
    except NoMap:
        raise
    except Exception as error:  # decoders raise anything from struct.error to SyntaxError on foreign bytes
        raise NoMap(f"cannot be decoded: {error}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``cast-fast saliency``."""
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of images")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the maps; run again to go on")
    parser.add_argument("--method", choices=METHODS, required=True, help="where the maps come from")
    parser.add_argument("--annotations", type=Path, metavar="JSON", help="COCO instance annotations (coco)")
    parser.add_argument(
        "--least-share", type=float, default=LEAST_SHARE, help="of the largest instance, to count as salient (coco)"
    )
    parser.add_argument("--model", type=Path, metavar="FILE", help="ONNX file of a U²-Net-style network (onnx)")
    parser.add_argument("--input-size", type=int, default=INPUT_SIZE, help="side of the model's input in pixels (onnx)")
    parser.add_argument(
        "--unsupervised", action="store_true", help="record that the model was trained without human labels (onnx)"
    )
    parser.add_argument("--workers", type=int, help="threads; one for each CPU when absent")


def main(args: argparse.Namespace) -> int:
    """Runs ``cast-fast saliency``; returns 0 when every image has a map, 1 when some have none."""
    method = choose_method(
        args.method,
        annotations=args.annotations,
        least_share=args.least_share,
        model=args.model,
        input_size=args.input_size,
        unsupervised=args.unsupervised,
    )
    summary = make_maps(args.images, args.out, method, workers=args.workers, progress=True)
    kept = f", {summary.kept} were there" if summary.kept else ""
    learned = "with" if method.record["supervised"] else "without"
    print(f"{summary.written} maps written{kept}: {shown(args.out)} ({args.method}, {learned} human labels)")
    if summary.empty:
        print(f"empty maps: {summary.empty}")
    for kind, count in sorted(Counter(fault.kind for fault in summary.faults).items()):
        first = next(fault for fault in summary.faults if fault.kind == kind)
        print(f"without a map, {kind}: {count}, for example {first}")
    return 1 if summary.faults else 0
