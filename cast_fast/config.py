"""Every setting of a pretraining run: one flat dataclass, one flag a field, every check before anything is computed.

A field's docstring says what it means; ``option`` holds its default, its one line of help and its permitted values.
The command line, ``config.json`` and the check on ``--resume`` are all derived from the fields.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import types
import typing
from pathlib import Path
from typing import Any

from cast_fast.errors import UserError


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None, resumable: bool = False) -> Any:
    """A dataclass field that is also a flag.

    Args:
        default: its value where neither the preset nor the user names one.
        help: one line for ``--help``.
        choices: the permitted values.
        resumable: whether the value may change when a run is resumed, because it cannot change the result.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "resumable": resumable})


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """The settings of one pretraining run; frozen and valid once constructed.

    Raises:
        UserError: a value is out of its range, or two contradict each other; the message names the flag.
    """

    preset: str = option("cast-coco", "named hyper-parameters; explicit flags win", choices=("cast-coco", "cast-v2"))
    """``cast-coco`` has the published hyper-parameters, ``cast-v2`` those of MoCo v2 with the attention loss added."""

    images: Path | None = option(None, "folder of images", resumable=True)
    """Root of the JPEG and PNG images (layout (a): folder pair)."""
    saliency: Path | None = option(None, "folder of saliency maps, mirroring --images", resumable=True)
    """Root of the 8-bit grey PNG maps; not needed by ``--method moco``."""
    data: Path | None = option(None, "folder of WebDataset shards, instead of --images and --saliency", resumable=True)
    """Folder that ``cast-fast prepare`` wrote (layout (b))."""
    out: Path | None = option(None, "run folder", resumable=True)
    """Where config.json, metrics.csv and the checkpoints go."""
    skip_invalid: bool = option(False, "leave out faulty files (and record them) instead of refusing to start")
    """Faults are listed in the run folder; without the flag they stop the run before it starts."""
    on_empty_saliency: str = option(
        "error", "what to do with an image whose map is empty", choices=("error", "skip", "unconstrained")
    )
    """``skip`` leaves the image out; ``unconstrained`` crops it freely and gives it CAST weight 0."""

    method: str = option("cast", "which parts of CAST are on", choices=("cast", "moco", "crops-only", "attention-only"))
    """``moco`` is plain MoCo; ``crops-only`` and ``attention-only`` are the ablations."""
    phi: float = option(0.2, "least share of the salient pixels in a crop")
    """φ of the crop rule, in (0, 1]."""
    pair_constraint: str = option(
        "overlap", "whether the two crops must share salient pixels", choices=("overlap", "independent")
    )
    """``independent`` is the released behaviour: each crop holds salient pixels, perhaps different ones."""

    arch: str = option("resnet50", "torchvision ResNet")
    """Name of a ResNet in ``torchvision.models``."""
    dim: int = option(128, "dimension of the embedding")
    """D, length of queries and keys."""
    head: str = option("linear", "projection head", choices=("linear", "mlp"))
    """``mlp`` is MoCo v2's: linear, ReLU, linear, with a hidden layer as wide as the trunk's output."""
    queue_size: int = option(65_536, "number of queued negatives over all ranks")
    """K; at least the global batch."""
    momentum: float = option(0.999, "momentum of the key encoder")
    """m in f_k ← m f_k + (1 − m) f_q, in [0, 1)."""
    temperature: float = option(0.07, "temperature of InfoNCE")
    """T > 0."""
    lam: float = option(3.0, "weight λ of the CAST loss")
    """λ ≥ 0."""
    loss_combination: str = option(
        "average", "(L_MoCo + λ L_CAST)/(1 + λ) or L_MoCo + λ L_CAST", choices=("average", "sum")
    )
    """How the two losses become the total that is optimised."""
    key_bn: str = option("shuffle", "BatchNorm of the key encoder over ranks", choices=("shuffle", "sync", "local"))
    """Shuffled, synchronised or local batch statistics; all the same where there is one group."""
    query_bn: str = option("local", "BatchNorm of the query encoder over ranks", choices=("local", "sync"))
    """``sync`` takes the statistics over the global batch; the same as ``local`` where there is one group."""
    batch_norm_groups: int = option(
        0, "groups of a process's batch with BatchNorm statistics apart; 0: of 32 samples in one process, 1 in many"
    )
    """G groups are to BatchNorm what G times the processes are: one process then shuffles its keys over them. With 0 a
    resumed run keeps the number that all processes together had; one process takes one group where 32 does not divide
    ``--batch``, and where keys are not shuffled."""

    size: int = option(224, "side of the square crops in pixels")
    """At least 32, one cell of a ResNet's output grid."""
    batch: int = option(256, "image pairs per process")
    """Per process; the global batch is this times the number of processes."""
    epochs: int | None = option(None, "length of the run in passes over the data")
    """Either this or ``--steps``; the preset's 200 where neither is given."""
    steps: int | None = option(None, "length of the run in steps, instead of --epochs")
    """Optimizer steps."""
    lr: float = option(0.5, "learning rate per 256 pairs of the global batch")
    """Scaled by global batch / 256, then decayed by a cosine to zero over the run."""
    weight_decay: float = option(1e-4, "weight decay of SGD")
    """Added to every gradient, BatchNorm parameters included, as MoCo does."""
    sgd_momentum: float = option(0.9, "momentum of SGD")
    """In [0, 1)."""
    clip_grad: float = option(2.0, "largest norm of the gradient; 0 for none")
    """Global L2 norm over all parameters."""
    seed: int = option(0, "seed of weights, order, crops and augmentations")
    """In [0, 2^63)."""

    flip_p: float = option(0.5, "probability of a horizontal flip")
    """In [0, 1]."""
    grey_p: float = option(0.2, "probability of grey")
    """In [0, 1]."""
    jitter_p: float = option(0.5, "probability of colour jitter")
    """In [0, 1]."""
    brightness: float = option(0.4, "jitter of the brightness: factor in 1 ± this")
    """In [0, 1]."""
    contrast: float = option(0.4, "jitter of the contrast: factor in 1 ± this")
    """In [0, 1]."""
    saturation: float = option(0.4, "jitter of the saturation: factor in 1 ± this")
    """In [0, 1]."""
    hue: float = option(0.4, "jitter of the hue: a shift of at most this part of a full turn")
    """In [0, 0.5]."""
    blur_p: float = option(0.0, "probability of a Gaussian blur")
    """In [0, 1]."""
    blur_sigma_min: float = option(0.1, "least standard deviation of the blur, in pixels of a crop of side 224")
    """Scaled with the side of the crop."""
    blur_sigma_max: float = option(2.0, "largest standard deviation of the blur, in pixels of a crop of side 224")
    """Scaled with the side of the crop."""

    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"), resumable=True)
    """``auto`` takes CUDA where torch finds it."""
    precision: str = option("auto", "arithmetic of the trunk", choices=("auto", "fp32", "bf16"))
    """``auto`` is bf16 on CUDA and on CPUs with bf16 matrix hardware, else fp32; head and CAM are always fp32."""
    queue_dtype: str = option("auto", "type of the queued keys", choices=("auto", "fp32", "bf16"))
    """``auto`` is bf16 where the trunk is and the fused losses run, else fp32."""
    queue_exchange: str = option(
        "auto", "how ranks share the queue", choices=("auto", "gather", "reduce"), resumable=True
    )
    """``gather`` collects the queue, ``reduce`` queries and partial sums; ``auto`` takes what sends fewer bytes."""
    grad_compression: str = option("none", "how gradients travel between ranks", choices=("none", "bf16"))
    """``bf16`` halves their bytes."""
    collective_timeout: float = option(
        600.0, "seconds that ranks wait for each other before they give up", resumable=True
    )
    """Then every rank that waits ends with an error; the first steps, which compile, must fit in, and a
    rank's file of a checkpoint."""
    compile: bool = option(True, "compile the step with torch.compile")
    """The eager step is slower and computes the same."""
    batch_norm: str = option(
        "torch", "BatchNorm with ReLU, shortcut and pooling in training", choices=("torch", "streaming")
    )
    """``streaming`` is one sweep of ``cast_kernels`` each: the same within rounding, with a seventh less traffic."""
    kernels: str = option("auto", "fused loss kernels or plain torch", choices=("auto", "triton", "torch"))
    """``auto`` takes Triton on CUDA."""
    apex: str = option("off", "NVIDIA apex's fused SGD, after a parity probe", choices=("auto", "on", "off"))
    """``off`` is torch's fused SGD; ``auto`` takes apex's where it is installed and passes, ``on`` insists on it."""
    loader_threads: int = option(
        0, "CPU threads of the loader; 0 for this process's share of the cores", resumable=True
    )
    """DALI's threads; crops and order do not depend on it."""
    max_nonfinite: int = option(10, "non-finite steps in a row before the run stops", resumable=True)
    """Such a step changes nothing; at least 1."""
    checkpoint_every: int = option(1000, "steps between checkpoints", resumable=True)
    """At least 1; the end of the run and a stopping signal write one as well."""
    keep_checkpoints: int = option(3, "how many of the newest checkpoints to keep", resumable=True)
    """At least 1."""
    async_save: bool = option(False, "write checkpoints in the background while training goes on", resumable=True)
    """The checkpoint is the same; a kill while it is being written costs the steps since the one before."""
    resume: bool = option(False, "continue the run in --out", resumable=True)
    """A changed configuration is refused; an empty folder starts a new run."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            value = getattr(self, field.name)
            if choices is not None and value not in choices:
                raise UserError(f"{flag(field.name)}: got {value!r}, expected one of {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{flag(field.name)}: got {value}, expected a finite number")
        for name, low in (
            ("dim", 1),
            ("queue_size", 1),
            ("size", 32),
            ("batch", 1),
            ("batch_norm_groups", 0),
            ("loader_threads", 0),
            ("max_nonfinite", 1),
            ("checkpoint_every", 1),
            ("keep_checkpoints", 1),
        ):
            self._require(name, getattr(self, name) >= low, f"at least {low}")
        for name in ("flip_p", "grey_p", "jitter_p", "blur_p", "brightness", "contrast", "saturation"):
            self._require(name, 0 <= getattr(self, name) <= 1, "a number in [0, 1]")
        self._require("hue", 0 <= self.hue <= 0.5, "a number in [0, 0.5]")
        self._require("blur_sigma_min", self.blur_sigma_min > 0, "more than 0")
        self._require("blur_sigma_max", self.blur_sigma_max >= self.blur_sigma_min, "at least --blur-sigma-min")
        self._require("phi", 0 < self.phi <= 1, "a number in (0, 1]")
        self._require("collective_timeout", self.collective_timeout > 0, "more than 0")
        self._require("momentum", 0 <= self.momentum < 1, "a number in [0, 1)")
        self._require("sgd_momentum", 0 <= self.sgd_momentum < 1, "a number in [0, 1)")
        self._require("temperature", self.temperature > 0, "more than 0")
        self._require("lr", self.lr > 0, "more than 0")
        self._require("lam", self.lam >= 0, "at least 0")
        self._require("weight_decay", self.weight_decay >= 0, "at least 0")
        self._require("clip_grad", self.clip_grad >= 0, "at least 0 (0 switches clipping off)")
        self._require("seed", 0 <= self.seed < 2**63, "an integer in [0, 2^63)")
        if self.epochs is not None and self.steps is not None:
            raise UserError(f"--epochs {self.epochs} and --steps {self.steps}: expected one of them, not both")
        for name in ("epochs", "steps"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        if self.data is not None and (self.images is not None or self.saliency is not None):
            raise UserError("--data and --images/--saliency: expected one dataset, got both layouts")
        if self.images is not None and self.saliency is None and self.needs_saliency:
            raise UserError(
                f"--saliency is missing: --method {self.method} needs maps; cast-fast saliency makes some, and "
                "--method moco needs none"
            )
        if self.saliency is not None and self.images is None:
            raise UserError("--images is missing: got --saliency alone")
        self._require_groups()
        self.require_queue(1)

    def _require_groups(self) -> None:
        groups = self.batch_norm_groups
        if groups < 2:
            return
        if self.batch % groups:
            raise UserError(f"--batch-norm-groups: got {groups}, expected a divisor of --batch {self.batch}")
        if self.key_bn == self.query_bn == "sync":
            raise UserError(f"--batch-norm-groups: got {groups} with --key-bn sync --query-bn sync, expected 1 or 0")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"{flag(name)}: got {getattr(self, name)}, expected {expected}")

    def require_queue(self, world_size: int) -> None:
        """Checks that the queue can take a whole global batch.

        Raises:
            UserError: ``--queue-size`` is smaller than ``--batch`` times ``world_size``.
        """
        global_batch = self.batch * world_size
        if self.queue_size < global_batch:
            raise UserError(
                f"--queue-size: got {self.queue_size}, expected at least the global batch of {global_batch} "
                f"(--batch {self.batch} × {world_size} process{'es' if world_size > 1 else ''})"
            )

    def require_dataset(self) -> None:
        """Checks that a dataset and a run folder are named.

        Raises:
            UserError: neither ``--images`` nor ``--data``, or no ``--out``.
        """
        if self.images is None and self.data is None:
            raise UserError("no dataset: expected --images DIR --saliency DIR, or --data SHARDS")
        if self.out is None:
            raise UserError("--out is missing: expected the run folder")

    @property
    def constrained_crops(self) -> bool:
        """Whether crops must hold salient pixels."""
        return self.method in ("cast", "crops-only")

    @property
    def attention_loss(self) -> bool:
        """Whether the CAST loss is part of the total."""
        return self.method in ("cast", "attention-only")

    @property
    def needs_saliency(self) -> bool:
        """Whether the method reads saliency maps at all."""
        return self.method != "moco"

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON takes it; paths as strings."""
        return {
            field.name: str(value) if isinstance(value := getattr(self, field.name), Path) else value
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PretrainConfig:
        """The inverse of ``to_json``.

        Raises:
            UserError: a key is unknown, or a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"configuration: unknown fields {', '.join(unknown)}")
        paths = {name for name, kind in _kinds().items() if kind is Path}
        as_path = {name: Path(value) for name, value in values.items() if name in paths and value is not None}
        return cls(**{**values, **as_path})

    def fingerprint(self) -> str:
        """A hash of every field that a resumed run may not change (32 hexadecimal digits)."""
        fixed = {name: value for name, value in self.to_json().items() if name not in _resumable()}
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:32]


PRESETS: dict[str, dict[str, Any]] = {
    "cast-coco": {},
    "cast-v2": {
        "head": "mlp",
        "temperature": 0.2,
        "lr": 0.03,
        "clip_grad": 0.0,
        "loss_combination": "sum",
        "jitter_p": 0.8,
        "hue": 0.1,
        "blur_p": 0.5,
    },
}
"""Values that a preset sets where they differ from the defaults, which are those of ``cast-coco``.

``cast-coco``: Selvaraju et al., CVPR 2021, COCO pretraining. ``cast-v2``: X. Chen et al., "Improved Baselines with
Momentum Contrastive Learning", 2020, with the CAST loss added.
"""
PRESET_EPOCHS = 200


def flag(name: str) -> str:
    """The flag of a field: ``queue_size`` → ``--queue-size``."""
    return "--" + name.replace("_", "-")


def _kinds() -> dict[str, type]:
    """Field → its type without ``None``."""
    kinds = {}
    for name, hint in typing.get_type_hints(PretrainConfig).items():
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
        kinds[name] = hint
    return kinds


def _resumable() -> set[str]:
    return {field.name for field in dataclasses.fields(PretrainConfig) if field.metadata["resumable"]}


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one flag a field; flags that are not given stay out of the namespace, so that presets can fill them."""
    kinds = _kinds()
    for field in dataclasses.fields(PretrainConfig):
        help_text = field.metadata["help"]
        arguments: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        if kinds[field.name] is bool:
            help_text = f"{help_text} (default: {field.default})"
            parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, help=help_text, **arguments)
            continue
        if field.default is not None:
            help_text = f"{help_text} (default: {field.default})"
        if field.metadata["choices"] is None:
            arguments["metavar"] = {Path: "PATH", str: "NAME", int: "N", float: "X"}[kinds[field.name]]
        parser.add_argument(
            flag(field.name), type=kinds[field.name], choices=field.metadata["choices"], help=help_text, **arguments
        )


def config_from_args(args: argparse.Namespace) -> PretrainConfig:
    """Defaults, then the preset, then the flags that were given.

    Raises:
        UserError: see ``PretrainConfig``.
    """
    names = {field.name for field in dataclasses.fields(PretrainConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    values = {**PRESETS[given.get("preset", "cast-coco")], **given}
    if values.get("epochs") is None and values.get("steps") is None:
        values["epochs"] = PRESET_EPOCHS
    return PretrainConfig(**values)


def differing_fields(saved: PretrainConfig, now: PretrainConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that differ and that a resumed run may not change: name → (saved, now)."""
    before, after = saved.to_json(), now.to_json()
    fixed = before.keys() - _resumable()
    return {name: (before[name], after[name]) for name in sorted(fixed) if before[name] != after[name]}
