"""The query encoder's trunk in files that torchvision, timm, detectron2 and plain safetensors readers take.

=============  ============================================================  =========================================
``--format``   what is written                                               keys
=============  ============================================================  =========================================
torchvision    ``FILE.pth``, a state dict; ``FILE.json``, its description     torchvision's, without ``fc``
timm           a folder with ``config.json`` and ``model.safetensors`` for    timm's, which are torchvision's
               ``timm.create_model("local-dir:FOLDER")``
safetensors    ``FILE.safetensors`` with the description in its metadata      torchvision's, without ``fc``
detectron2     ``FILE.pkl``, a pickle of NumPy arrays (``--allow-pickle``)    ``stem.conv1.norm.weight``, ``res2.0.…``
=============  ============================================================  =========================================

Beside each stands a model card. Every export is read back before the command reports success: by torchvision's own
ResNet, by timm where it is installed, and for detectron2 by inverting its naming rule; the features must be those of
the run's encoder.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import io
import json
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cast_fast import __version__
from cast_fast.errors import UserError
from cast_fast.evaluate.pictures import run_folder
from cast_fast.evaluate.weights import Model, load_encoder
from cast_fast.files import Results, write_whole

logger = logging.getLogger("cast_fast")

HELP = "write the encoder for torchvision, timm, detectron2 or safetensors"
FORMATS = ("torchvision", "timm", "detectron2", "safetensors")
SUFFIXES = {"torchvision": ".pth", "timm": "", "detectron2": ".pkl", "safetensors": ".safetensors"}
TOLERANCE = 1e-5
"""Largest difference of a feature after loading back, relative to the largest feature (float32, eager)."""

_LOCAL = ("images", "saliency", "data", "labels", "out", "resume")  # paths of one machine are no provenance


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export wrote and what the check of it found."""

    path: Path
    card: Path
    sha256: str
    differences: dict[str, float]
    """Reader → largest difference of a feature, relative to the largest feature."""


def trunk_state(model: Model) -> dict[str, Tensor]:
    """The trunk's state dict in torchvision's names, contiguous (not channels-last) and on the CPU."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.trunk.state_dict().items()
    }


def detectron2_name(name: str) -> str:
    """The name that detectron2 gives to an entry of torchvision's ResNet (the rule of MoCo's conversion).

    ``conv1.weight`` → ``stem.conv1.weight``; ``bn1.bias`` → ``stem.conv1.norm.bias``; ``layer1.0.bn2.weight`` →
    ``res2.0.conv2.norm.weight``; ``layer2.0.downsample.0.weight`` → ``res3.0.shortcut.weight``; ``downsample.1`` →
    ``shortcut.norm``.
    """
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def torchvision_name(name: str) -> str:
    """The inverse of ``detectron2_name``."""
    name = name.removeprefix("stem.")
    name = re.sub(r"^res(\d)", lambda match: f"layer{int(match[1]) - 1}", name)
    name = re.sub(r"\bconv(\d)\.norm\b", r"bn\1", name)
    return name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")


def to_detectron2(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The content of a detectron2 weight file: NumPy arrays in its naming, without ``num_batches_tracked``.

    Raises:
        UserError: a network of basic blocks (ResNet-18, ResNet-34), for which the naming rule does not hold.
    """
    if "layer1.0.conv3.weight" not in state:
        raise UserError("--format detectron2: got a network of basic blocks, expected bottlenecks (ResNet-50 and up)")
    arrays = {
        detectron2_name(name): value.numpy()
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }
    return {"model": arrays, "__author__": "cast_fast", "matching_heuristics": True}


def describe(model: Model, *, size: int | None = None, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Preprocessing and provenance as JSON: what a reader of the weights has to know.

    Args:
        model: whose weights they are.
        size: side of the crops that they expect; the training crops' by default.
        extra: further entries, such as ``classes``.
    """
    provenance = {name: value for name, value in model.provenance.items() if name != "file"}
    if isinstance(provenance.get("config"), Mapping):
        provenance["config"] = {k: v for k, v in provenance["config"].items() if k not in _LOCAL}
    return {
        "name": model.name,
        "arch": model.arch,
        "preprocessing": {
            "size": size or model.size or 224,
            "mean": list(model.mean),
            "std": list(model.std),
            "channels": "RGB in [0, 1] before mean and std",
        },
        "provenance": provenance,
        "written_by": f"cast_fast {__version__}",
        **(extra or {}),
    }


def safetensors_file(state: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """A safetensors file: contiguous tensors, and ``about`` as JSON under the metadata key ``cast_fast``.

    As bytes, because safetensors reports a full disk by an exception of its own.
    """
    contiguous = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    return save(contiguous, metadata={"format": "pt", "cast_fast": json.dumps(about)})


def save_safetensors(state: Mapping[str, Tensor], path: Path, about: Mapping[str, Any]) -> None:
    """Writes ``safetensors_file``, whole or not at all; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, safetensors_file(state, about))


def export(model: Model, kind: str, out: Path, *, allow_pickle: bool = False) -> Exported:
    """Writes the trunk in one of ``FORMATS`` with its model card; nothing, unless read back it gives the same features.

    Args:
        model: what ``evaluate.weights.load_encoder`` returned.
        kind: the format.
        out: the file; for timm the folder, or a file ending in ``.safetensors`` for weights alone.
        allow_pickle: consent to a pickle, which detectron2 reads.

    Raises:
        UserError: the format does not take this architecture, needs ``--allow-pickle``, ``out`` has another suffix or
            cannot be written, or the file does not give back the same features.
        ValueError: unknown ``kind``.
    """
    if kind not in FORMATS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(FORMATS)}")
    allowed = (".safetensors", "") if kind == "timm" else (SUFFIXES[kind],)
    if out.suffix not in allowed:
        raise UserError(f"--out: got {out}, expected a name ending in {SUFFIXES[kind] or '.safetensors or a folder'}")
    if kind == "detectron2" and not allow_pickle:
        raise UserError("--format detectron2 writes a pickle, which runs code when read: add --allow-pickle to consent")
    state = trunk_state(model)
    about = describe(model)
    with Results(out.parent) as files:
        weights = _write(kind, model, state, about, files, out.name)
        staged = files.part / out.name
        differences = _read_back(kind, model, staged, weights)
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        card = f"{out.name}/README.md" if staged.is_dir() else str(Path(out.name).with_suffix(".md"))
        files.write(card, _card(kind, model, about, staged, weights, sha256, differences))
    return Exported(out, out.parent / card, sha256, differences)


def _write(kind: str, model: Model, state: dict[str, Tensor], about: dict[str, Any], files: Results, name: str) -> Path:
    """Writes weights and description; returns the file that holds the weights."""
    if kind == "torchvision":
        content = io.BytesIO()  # torch.save reports a full disk by a RuntimeError
        torch.save(state, content)
        files.write(str(Path(name).with_suffix(".json")), json.dumps(about, indent=2) + "\n")
        return files.write(name, content.getvalue())
    if kind == "detectron2":
        return files.write(name, pickle.dumps(to_detectron2(state), protocol=4))
    if kind == "timm" and Path(name).suffix == "":
        size = about["preprocessing"]["size"]
        config = {
            "architecture": model.arch,
            "num_classes": 0,
            "num_features": _features(model),
            "global_pool": "avg",
            "pretrained_cfg": {
                "tag": "cast_fast",
                "input_size": [3, size, size],
                "interpolation": "bilinear",
                "crop_pct": 0.875,
                "crop_mode": "center",
                "mean": list(model.mean),
                "std": list(model.std),
                "num_classes": 0,
                "pool_size": [(size + 31) // 32] * 2,
                "first_conv": "conv1",
                "classifier": "fc",
            },
        }
        files.write(f"{name}/config.json", json.dumps(config, indent=2) + "\n")
        return files.write(f"{name}/model.safetensors", safetensors_file(state, about))
    return files.write(name, safetensors_file(state, about))


def _features(model: Model) -> int:
    network: Any = torchvision.models.get_model(model.arch)
    return network.fc.in_features


def _read_back(kind: str, model: Model, out: Path, weights: Path) -> dict[str, float]:
    """Loads the file as its readers do and returns the relative differences of the features.

    Raises:
        UserError: a key is missing or unexpected, or the features differ by more than ``TOLERANCE``.
    """
    if kind == "detectron2":
        content = pickle.loads(weights.read_bytes())  # bytes that this function's caller has just written
        arrays = content["model"]
        state = {torchvision_name(name): torch.from_numpy(np.array(value)) for name, value in arrays.items()}
        reader = "detectron2's rule, inverted"
    else:
        state = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, weights_only=True)
        reader = "torchvision"
    size = model.size or 224
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    expected = model.to("cpu").features(images)
    readers: dict[str, nn.Module] = {reader: _torchvision_reader(model.arch, state, weights)}
    if kind == "timm":
        found = _timm_reader(model.arch, out)
        if found is None:
            logger.warning("timm is not installed: checked with torchvision only, whose keys timm shares")
        else:
            readers["timm"] = found
    differences = {}
    with torch.no_grad():
        for name, network in readers.items():
            features = network.eval()(model.normalise(images))
            scale = max(float(expected.abs().max()), 1e-30)
            differences[name] = float((features - expected).abs().max()) / scale
            if not differences[name] <= TOLERANCE:
                raise UserError(
                    f"{weights.name}: read back by {name}, its features differ by {differences[name]:.1e} of the "
                    f"largest one (at most {TOLERANCE:.0e} expected); the weights may hold numbers that are not finite"
                )
    return differences


def _torchvision_reader(arch: str, state: Mapping[str, Tensor], weights: Path) -> nn.Module:
    network = torchvision.models.get_model(arch, weights=None)
    result = network.load_state_dict(state, strict=False)
    missing = {n for n in result.missing_keys if not n.startswith("fc.") and not n.endswith("num_batches_tracked")}
    if missing or result.unexpected_keys:
        raise UserError(
            f"{weights.name}: torchvision's {arch} misses {sorted(missing)}, {result.unexpected_keys} unexpected"
        )
    network.fc = nn.Identity()
    return network


def _timm_reader(arch: str, out: Path) -> nn.Module | None:
    if importlib.util.find_spec("timm") is None:
        return None
    import timm

    if out.is_dir():
        return timm.create_model(f"local-dir:{out.resolve()}", pretrained=True)
    return timm.create_model(arch, pretrained=False, num_classes=0, checkpoint_path=str(out))


def _card(
    kind: str,
    model: Model,
    about: dict[str, Any],
    out: Path,
    weights: Path,
    sha256: str,
    differences: Mapping[str, float],
) -> str:
    provenance = about["provenance"]
    config: dict[str, Any] = provenance.get("config", {})
    size = about["preprocessing"]["size"]
    mean, std = (", ".join(map(str, values)) for values in (model.mean, model.std))
    names = ("method", "preset", "dim", "head", "queue_size", "momentum", "temperature", "lam", "phi")
    of = f" of {provenance['total_steps']}" if "total_steps" in provenance else ""
    rows: list[tuple[str, Any]] = [("steps done", f"{provenance.get('step', '–')}{of}")]
    rows += [(name, config[name]) for name in names if config.get(name) is not None]
    if "batch" in config:
        rows.append(("global batch, pairs", config["batch"] * provenance.get("processes", 1)))
    if "lr" in config:
        rows.append(("lr, per 256 pairs of it", config["lr"]))
    if "seed" in config:
        rows.append(("seed", config["seed"]))
    training = "\n".join(f"| {name} | {value} |" for name, value in rows)
    checks = "\n".join(
        f"- {name}: largest difference {value:.1e} of the largest feature" for name, value in differences.items()
    )
    if "method" in config:
        method = {"cast": "CAST", "moco": "MoCo"}.get(config["method"], config["method"])
        origin = f"The query encoder's trunk of a run of cast_fast, trained without labels by {method}."
    else:
        origin = "The trunk of an encoder that was imported; its file does not say how it was trained."
    return f"""# {model.name}: {model.arch}, weights for {kind}

{origin} No projection head, no classifier.

## Load it
```python
{_snippet(kind, model, out)}
```

## Input
RGB, {size}×{size}, scaled to [0, 1], then mean {mean} taken off and divided by {std}.

## Training
| setting | value |
|---|---|
{training}

Versions: {", ".join(f"{n} {v}" for n, v in provenance.get("versions", {}).items()) or "not recorded"}.

## Checked when written
{checks}
- SHA-256 of `{weights.name}`: `{sha256}`

## Limits
The features are those of the images and saliency maps of the run, with their biases; where maps marked something as
the object, that is what the encoder learned to look at. Whether the weights may be passed on depends on the licences of
those images. This card records no licence and no results: add them before publishing.
"""


def _snippet(kind: str, model: Model, out: Path) -> str:
    arch, features = model.arch, _features(model)
    if kind == "torchvision":
        return f"""import torch, torchvision
model = torchvision.models.{arch}()
state = torch.load("{out.name}", weights_only=True)
model.load_state_dict(state, strict=False)  # fc is missing: add a classifier, or model.fc = torch.nn.Identity()"""
    if kind == "safetensors":
        return f"""import torchvision
from safetensors.torch import load_file
model = torchvision.models.{arch}()
model.load_state_dict(load_file("{out.name}"), strict=False)  # fc is missing"""
    if kind == "timm":
        if out.is_dir():
            return f"""import timm
model = timm.create_model("local-dir:{out.name}", pretrained=True)  # features (N, {features})
model = timm.create_model("local-dir:{out.name}", pretrained=True, num_classes=10)  # a new classifier"""
        return f"""import timm
model = timm.create_model("{arch}", num_classes=0, checkpoint_path="{out.name}")  # features (N, {features})"""
    network = torchvision.models.get_model(arch)
    depth = re.findall(r"\d+", arch)[0]
    mean, std = ([round(255 * value, 3) for value in values] for values in (model.mean, model.std))
    return f"""# detectron2: in the configuration
MODEL.WEIGHTS: "{out.name}"
MODEL.PIXEL_MEAN: {mean}
MODEL.PIXEL_STD: {std}
MODEL.RESNETS.DEPTH: {depth}
MODEL.RESNETS.NUM_GROUPS: {network.groups}
MODEL.RESNETS.WIDTH_PER_GROUP: {network.base_width}
MODEL.RESNETS.STRIDE_IN_1X1: False
MODEL.RESNETS.NORM: "SyncBN"  # as MoCo's detection settings: BatchNorm is trained; the default keeps it frozen
INPUT.FORMAT: "RGB\""""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``cast-fast export``."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, checkpoint folder or file of weights")
    parser.add_argument("--format", choices=FORMATS, default="torchvision", help="who shall read it")
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help="file (timm: folder); default RUN/exported/ARCH-FORMAT"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="consent to detectron2's pickle")


def main(args: argparse.Namespace) -> int:
    """Exports one encoder."""
    model = load_encoder(args.run)
    out = args.out
    if out is None:
        if not args.run.is_dir():
            raise UserError(f"--out is missing: {args.run} is no run folder")
        out = run_folder(args.run) / "exported" / f"{model.arch}-{args.format}{SUFFIXES[args.format]}"
    done = export(model, args.format, out, allow_pickle=args.allow_pickle)
    for name, difference in done.differences.items():
        print(f"read back by {name}: features equal to {difference:.1e} of the largest")
    print(f"{done.path}\n{done.card}")
    return 0
