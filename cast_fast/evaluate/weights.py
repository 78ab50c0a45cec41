"""Reads an encoder, whatever it is stored in and whatever its keys are called.

Accepted: a run folder of ``cast-fast pretrain`` (its newest whole checkpoint), one checkpoint folder of it
(``step-N``), a folder in timm's layout (``config.json`` beside ``model.safetensors``), and files: what ``cast-fast
export`` and ``cast-fast probe`` write, checkpoints of MoCo (``module.encoder_q.conv1.weight``, v1 and v2 heads), and
state dicts in torchvision's naming, which timm's ResNets share, with or without a prefix and a classifier. Everything
is read with ``weights_only=True`` or as safetensors, so that a file cannot run code; a pickle that would is refused.

The architecture follows from the shapes of the weights, so that no file has to name it. Mean and deviation of the
input are ImageNet's, unless the file says otherwise: timm's ``config.json`` and our own descriptions name them, and
checkpoints of the Backgrounds Challenge (and of MadryLab's robustness library) hold them as ``normalizer`` tensors.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import logging
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cast_fast import checkpoint
from cast_fast.encoder import Encoder, LinearHead, MLPHead, architectures, build_trunk
from cast_fast.errors import UserError
from cast_fast.step import IMAGE_MEAN, IMAGE_STD

logger = logging.getLogger("cast_fast")

_FIRST = "conv1.weight"
_SECOND = "layer1.0.conv1.weight"
_QUERY_PREFIXES = ("query.trunk.", "encoder_q.", "trunk.", "backbone.", "encoder.", "model.", "")
_KEY_PREFIXES = ("key.trunk.", "encoder_k.")
_NESTED = ("state_dict", "model", "model_state_dict", "net")


class IdentityHead(nn.Module):
    """Stands where a file has no projection head: the embedding is the normalised pooled feature itself."""

    def forward(self, pooled: Tensor) -> Tensor:
        """(N, C) → the same."""
        return pooled

    def pullback(self, pooled: Tensor, vector: Tensor) -> Tensor:
        """The Jacobian is the identity: returns ``vector`` (N, C)."""
        del pooled
        return vector


@dataclasses.dataclass
class Model:
    """An encoder read from disk, in evaluation mode, float32, on the CPU."""

    name: str
    """For tables and sheets: the name of the run's folder or of the file."""
    arch: str
    """Name in ``torchvision.models``."""
    query: Encoder
    """The (query) encoder; its head is an ``IdentityHead`` where the file holds none."""
    key: Encoder | None
    """The momentum encoder, where the file holds one."""
    classifier: nn.Linear | None
    """Maps pooled features to class scores, where the file holds one."""
    classes: tuple[str, ...] | None
    """Names of the classes in the order of the classifier's outputs, where the file names them."""
    size: int | None
    """Side of the crops in training, where the file says so."""
    provenance: dict[str, Any]
    """Where it came from: file, step, configuration, …"""
    mean: tuple[float, float, float] = IMAGE_MEAN
    """Of each colour over [0, 1], taken off the input."""
    std: tuple[float, float, float] = IMAGE_STD
    """Deviation of each colour, divided out of the input."""

    @property
    def trunk(self) -> nn.Module:
        """Maps normalised images (N, 3, S, S) to activations (N, C, h, w)."""
        return self.query.trunk

    @property
    def has_head(self) -> bool:
        """Whether a projection head came with the trunk."""
        return not isinstance(self.query.head, IdentityHead)

    def to(self, device: torch.device | str) -> Model:
        """Moves every part (in place) and returns the model."""
        for part in (self.query, self.key, self.classifier):
            if part is not None:
                part.to(device)
        return self

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 RGB (N, 3, H, W) → float32 as the trunk expects it."""
        return normalise(images, self.mean, self.std)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 RGB images (N, 3, S, S) on the model's device → pooled features (N, C) float32."""
        return self.trunk(self.normalise(images)).float().mean(dim=(2, 3))

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """uint8 RGB images (N, 3, S, S) → class scores (N, classes).

        Raises:
            ValueError: the model has no classifier.
        """
        if self.classifier is None:
            raise ValueError(f"{self.name}: got a model without classifier, expected one with")
        return self.classifier(self.features(images))


def normalise(images: Tensor, mean: Sequence[float] = IMAGE_MEAN, std: Sequence[float] = IMAGE_STD) -> Tensor:
    """uint8 RGB (N, 3, H, W) → float32 with a mean taken off and a deviation divided out, ImageNet's by default."""
    shape = (1, 3, 1, 1)
    centre = torch.tensor(mean, device=images.device).view(shape)
    scale = torch.tensor(std, device=images.device).view(shape)
    return (images.float() / 255 - centre) / scale


def load_encoder(path: Path | str) -> Model:
    """Reads an encoder from any of the forms that the module's text lists.

    Raises:
        UserError: nothing is there, the file is damaged or would have to run code, or it holds no ResNet of
            torchvision; the message names the file.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a run folder, a checkpoint or a file of weights")
    state, known = _read(path)
    return _assemble(path, state, known)


def load_classifier(path: Path | str) -> Model:
    """``load_encoder`` for files that must hold a classifier.

    Raises:
        UserError: the file holds an encoder alone, or see ``load_encoder``.
    """
    model = load_encoder(path)
    if model.classifier is None:
        raise UserError(
            f"{path}: holds an encoder without a classifier; cast-fast probe makes one (linear.safetensors)"
        )
    if model.classes is None and model.classifier.out_features == 1000:
        model.classes = tuple(torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"])
    return model


def split_state(state: Mapping[str, Any], source: str) -> dict[str, dict[str, Tensor]]:
    """Sorts the entries of a state dict of any known naming.

    Args:
        state: key → tensor.
        source: for messages.

    Returns:
        ``query`` and, where there is one, ``key``: trunk in torchvision's names; ``query_head`` and ``key_head``:
        ``fc.weight``, … and ``hidden.weight``, …; ``classifier``: ``weight`` and ``bias``. Absent parts are left out.

    Raises:
        UserError: no ResNet in it, or several under unknown names.
    """
    flat = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    parts: dict[str, dict[str, Tensor]] = {}
    for part, prefixes in (("query", _QUERY_PREFIXES), ("key", _KEY_PREFIXES)):
        prefix = next((p for p in prefixes if p + _FIRST in flat and p + _SECOND in flat), None)
        if prefix is None and part == "query":
            prefix = _only_prefix(flat, source)
        if prefix is None:
            continue
        inside = {name.removeprefix(prefix): v for name, v in flat.items() if name.startswith(prefix)}
        parts[part] = {n: v for n, v in inside.items() if re.match(r"(conv1|bn1|layer[1-4])\.", n)}
        head = _head(flat, prefix, inside)
        if head is not None and (
            prefix.endswith(".trunk.") or prefix.startswith("encoder_") or "hidden.weight" in head
        ):
            parts[f"{part}_head"] = head
        elif head is not None and part == "query":
            parts["classifier"] = {name.removeprefix("fc."): value for name, value in head.items()}
    if "query" not in parts:
        some = ", ".join(list(state)[:3]) or "none at all"
        raise UserError(
            f"{source}: found no ResNet in it; expected keys such as conv1.weight, module.encoder_q.conv1.weight "
            f"or query.trunk.conv1.weight, got {some}"
        )
    return parts


def _only_prefix(flat: Mapping[str, Tensor], source: str) -> str | None:
    """The prefix of the one network in a state dict of unknown naming, None where there is no network."""
    found = [name.removesuffix(_SECOND) for name in flat if name.endswith(_SECOND)]
    found = [prefix for prefix in found if prefix + _FIRST in flat]
    if len(found) > 1:
        raise UserError(
            f"{source}: holds {len(found)} networks ({', '.join(found[:4])}), expected one or MoCo's naming"
        )
    return found[0] if found else None


def _head(flat: Mapping[str, Tensor], prefix: str, inside: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The projection head or classifier that belongs to a trunk, in the names of ``LinearHead`` and ``MLPHead``."""
    if prefix.endswith(".trunk."):
        own = prefix.removesuffix("trunk.") + "head."
        found = {name.removeprefix(own): value for name, value in flat.items() if name.startswith(own)}
        return found or None
    found = {name: value for name, value in inside.items() if name.startswith("fc.")}
    if set(found) >= {"fc.0.weight", "fc.2.weight"}:  # MoCo v2: linear, ReLU, linear
        return {
            name.replace("fc.0.", "hidden.").replace("fc.2.", "fc."): value
            for name, value in found.items()
            if name.startswith(("fc.0.", "fc.2."))
        }
    return found if "fc.weight" in found else None


@functools.cache
def _shapes(arch: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        trunk, _ = build_trunk(arch)
    return {name: tuple(value.shape) for name, value in trunk.state_dict().items() if value.dim() > 0}


def find_arch(trunk: Mapping[str, Tensor], source: str) -> str:
    """The torchvision ResNet whose weights have exactly these names and shapes.

    Raises:
        UserError: none has; the message says how the nearest one differs.
    """
    found = {name: tuple(value.shape) for name, value in trunk.items() if not name.endswith("num_batches_tracked")}
    distance = {}
    for arch in architectures():
        expected = _shapes(arch)
        wrong = [n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)]
        if not wrong:
            return arch
        distance[arch] = sorted(wrong)
    near = min(distance, key=lambda arch: len(distance[arch]))
    name = distance[near][0]
    raise UserError(
        f"{source}: no ResNet of torchvision has these weights; nearest is {near}, {len(distance[near])} entries "
        f"differ, such as {name}: got {found.get(name, 'nothing')}, expected {_shapes(near).get(name, 'nothing')}"
    )


def _assemble(path: Path, state: Mapping[str, Any], known: dict[str, Any]) -> Model:
    parts = split_state(state, str(path))
    known |= _normaliser(state)
    arch = find_arch(parts["query"], str(path))
    if known.get("arch") not in (None, arch):
        raise UserError(f"{path}: says that it is a {known['arch']}, but its weights are those of a {arch}")
    query = _encoder(path, arch, parts["query"], parts.get("query_head"))
    key = None
    if "key" in parts:
        key = _encoder(path, arch, parts["key"], parts.get("key_head"))
    classifier = None
    if "classifier" in parts:
        weight = parts["classifier"]["weight"]
        if weight.dim() != 2 or not isinstance(parts["classifier"].get("bias", weight), Tensor):
            raise UserError(f"{path}: fc.weight has shape {tuple(weight.shape)}, expected (classes, features)")
        classifier = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in parts["classifier"])
        _load(path, classifier, parts["classifier"])
        classifier.eval().requires_grad_(False)
    classes = known.get("classes")
    if classes is not None and classifier is not None and len(classes) != classifier.out_features:
        raise UserError(f"{path}: names {len(classes)} classes, but its classifier has {classifier.out_features}")
    return Model(
        name=known.get("name") or path.name.removesuffix(".tar").rsplit(".", 1)[0],
        arch=arch,
        query=query,
        key=key,
        classifier=classifier,
        classes=None if classes is None else tuple(classes),
        size=known.get("size"),
        provenance={"file": str(path), **(known.get("provenance") or {})},
        mean=known.get("mean", IMAGE_MEAN),
        std=known.get("std", IMAGE_STD),
    )


def _normaliser(state: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Mean and deviation that a state dict holds as ``normalizer.new_mean`` and ``new_std``, (3, 1, 1) each."""
    flat = {name.removeprefix("module."): value for name, value in state.items()}
    held = [flat.get(f"normalizer.new_{name}") for name in ("mean", "std")]
    if not all(isinstance(value, Tensor) and value.numel() == 3 for value in held):
        return {}
    return dict(
        zip(
            ("mean", "std"),
            (tuple(round(v, 6) for v in value.flatten().tolist()) for value in held if value is not None),
        )
    )


def _encoder(path: Path, arch: str, weights: Mapping[str, Tensor], head: Mapping[str, Tensor] | None) -> Encoder:
    trunk, features = build_trunk(arch)
    complete = dict(weights)
    for name, value in trunk.state_dict().items():
        if name.endswith("num_batches_tracked"):  # a counter that evaluation does not read; old files lack it
            complete.setdefault(name, value)
    _load(path, trunk, complete)
    projection: nn.Module = IdentityHead()
    if head is not None:
        dim = head["fc.weight"].shape[0]
        projection = MLPHead(features, dim) if "hidden.weight" in head else LinearHead(features, dim)
        _load(path, projection, head)
    return Encoder(trunk, projection).eval().requires_grad_(False)


def _load(path: Path, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    values = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    try:
        module.load_state_dict(values)
    except RuntimeError as error:
        raise UserError(f"{path}: {error}") from None


def _read(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The state dict of a file or folder, and what is known about it: name, arch, classes, size, provenance."""
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = _load_torch(path)
    known: dict[str, Any] = {}
    while isinstance(content, Mapping) and (inner := next((k for k in _NESTED if k in content), None)) is not None:
        step = content.get("epoch")
        if isinstance(step, int):
            known["provenance"] = {"epoch": step}
        if not isinstance(content[inner], Mapping):
            break
        content = content[inner]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    sidecar = path.with_suffix(".json")
    if sidecar.is_file():
        known |= _described(sidecar, sidecar.read_text())
    return content, known


def _load_torch(path: Path) -> Any:
    """What ``torch.save`` wrote: tensors, containers and plain values, and ``argparse.Namespace``, which holds no more.

    Raises:
        UserError: it is no such file, damaged, or needs code to be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if start[:2] not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):  # a zip archive, or a pickle
        kind = "an empty file" if not start else "some other kind of file"
        raise UserError(f"{path}: is {kind}, expected weights written by torch.save, or .safetensors")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what follows is refused in one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message goes on to recommend reading the file unsafely, which is not what its reader should do
        named = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL) ([\w.]+)", str(error))
        if named is None:
            raise UserError(f"{path}: is damaged, or a pickle that is no file of weights") from None
        raise UserError(
            f"{path}: refused, because reading it would have to run code ({named[1]}); expected tensors and plain "
            "values, such as a state_dict saved by itself"
        ) from None
    except Exception as error:  # the unpickler raises whatever a damaged stream leads it into
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as a torch file ({type(error).__name__}: {first})") from None


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    try:
        with safe_open(str(path), framework="pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it cannot be iterated)
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None
    return state, _described(path, metadata["cast_fast"]) if "cast_fast" in metadata else {}


def _described(path: Path, text: str) -> dict[str, Any]:
    """What ``export.describe`` wrote."""
    try:
        about = json.loads(text)
        if not isinstance(about, dict):
            return {}
        return {
            "name": about.get("name"),
            "arch": about.get("arch"),
            "classes": about.get("classes"),
            "size": about.get("preprocessing", {}).get("size"),
            **_colours(about.get("preprocessing", {})),
            "provenance": about.get("provenance", {}),
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its description is no JSON object of cast-fast export ({error})") from None


def _colours(about: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """``mean`` and ``std`` where a description has both; a ValueError where they are not three numbers each."""
    if "mean" not in about or "std" not in about:
        return {}
    found = {name: tuple(float(value) for value in about[name]) for name in ("mean", "std")}
    if any(len(values) != 3 for values in found.values()) or min(found["std"]) <= 0:
        raise ValueError(f"mean {about['mean']} and std {about['std']}: expected three numbers each, std above 0")
    return found


def _read_folder(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    if (path / checkpoint.MANIFEST).is_file():
        try:
            saved = checkpoint.load(path)
        except checkpoint.DamagedCheckpoint as error:
            raise UserError(str(error)) from None
        run = path.parent.parent
    elif (path / checkpoint.FOLDER).is_dir():
        newest = checkpoint.load_last(path)
        if newest is None:
            raise UserError(f"{path}: a run folder without a whole checkpoint in {checkpoint.FOLDER}/")
        saved, run = newest, path
    elif (path / "model.safetensors").is_file():
        state, known = _read_safetensors(path / "model.safetensors")
        return state, {"name": path.resolve().name, **_timm_config(path / "config.json"), **known}
    else:
        raise UserError(
            f"{path}: neither a run folder ({checkpoint.FOLDER}/), a checkpoint ({checkpoint.MANIFEST}) nor a timm "
            "folder (model.safetensors)"
        )
    state = next(
        (v for v in saved.state.values() if isinstance(v, Mapping) and f"query.trunk.{_FIRST}" in v),
        None,
    )
    if state is None:
        raise UserError(f"{saved.path}: a checkpoint without query encoder, got {', '.join(saved.state)}")
    config = saved.config
    progress: Mapping[str, Any] = saved.state.get("progress", {})
    return state, {
        "name": run.resolve().name,
        "arch": config.get("arch"),
        "size": config.get("size"),
        "provenance": {
            "run": run.resolve().name,
            "step": saved.step,
            **{name: progress[name] for name in ("total_steps", "processes", "batch_norm_groups") if name in progress},
            "fingerprint": saved.fingerprint,
            "config": config,
            "versions": saved.versions,
        },
    }


def _timm_config(path: Path) -> dict[str, Any]:
    """Mean, deviation and size from timm's ``config.json``; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text()).get("pretrained_cfg") or {}
        size = about.get("input_size")
        return {**_colours(about), **({"size": int(size[-1])} if size else {})}
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise UserError(f"{path}: is no config.json of timm ({error})") from None


def warn_of_sizes(models: Sequence[Model], size: int) -> None:
    """Names in the log each model that was trained on crops of another side than the pictures that it is shown."""
    for model in models:
        if model.size and model.size != size:
            logger.warning("%s was trained on crops of %d pixels and is measured on %d", model.name, model.size, size)


def unique_names(models: list[Model]) -> list[Model]:
    """Copies of the list's entries whose names differ: a second ``run`` becomes ``run (2)``."""
    seen: dict[str, int] = {}
    result = []
    for model in models:
        seen[model.name] = seen.get(model.name, 0) + 1
        copied = copy.copy(model)
        if seen[model.name] > 1:
            copied.name = f"{model.name} ({seen[model.name]})"
        result.append(copied)
    return result
