"""The lines of the throughput ladder: each builds a whole training step of CAST in its own way.

Every line does all of a step: normalisation and masking of the uint8 crops, both key forwards, query forward, losses,
backward, gradient clipping, SGD, momentum update, enqueueing. They differ in how:

``published``      the released formulation: two query forwards, Grad-CAM by double backward, float32, NCHW, eager
``published-amp``  the same in channels-last memory, in bf16 where the hardware has matrix units for it
``one-pass``       one query forward, Grad-CAM still by double backward
``closed-form``    Grad-CAM in closed form: the product's step, eager
``compiled``       the product's step, compiled, with plain torch losses
``kernels``        the same with the fused Triton losses
``groups``         the same with BatchNorm over groups of 32 samples and keys shuffled over them: the default of one
                   process where 32 divides the batch; plain torch losses on a CPU
``streaming``      ``kernels`` with streaming BatchNorm (``--batch-norm streaming``)

and beside them

``moco``           the product's step without CAST, compiled: what the attention loss is an overhead to
``trunk-bound``    compiled: one trunk forward and backward, two forwards; nothing else. No CAST step can be faster
                   without a faster trunk
``trunk-streaming``  the same with streaming BatchNorm: how much faster the trunk itself gets

and on request

``plain-compiled``  ``one-pass`` compiled: what torch alone makes of the step. A gradient inside the forward pass needs
                    a setting of torch 2.14 that is off by default (``torch._dynamo.config.trace_autograd_ops``)

What is comparable. ``cast-fast pretrain`` without further flags is one of these lines, named by ``default_line`` and
below the table: ``groups`` where 32 divides the batch into several groups, else ``kernels``, on a CPU ``compiled``. All
lines but ``groups`` take the statistics of the whole batch, so that from one line to the next only what its name says
changes. The released code takes those of 32 samples too, but as one group on each of eight GPUs, with keys shuffled
between them; in one process, as here, it has one group and no shuffle. So ``kernels`` (``compiled``) over ``published``
is the same computation on both sides. ``groups`` over ``published`` or ``trunk-bound`` charges ``groups`` alone with
what MoCo's authors left to eight GPUs: it is the smaller number, and the one to quote for what a user gets. ``moco``
has one group, so the overhead of the attention loss is that of ``kernels``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable

import harness
import torch
import torch._dynamo.config
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cast_fast.config import PretrainConfig
from cast_fast.data.batch import Batch, random_batch
from cast_fast.encoder import build_trunk, cam_grid
from cast_fast.errors import UserError
from cast_fast.moco import MoCo
from cast_fast.objective import Objective
from cast_fast.optim import build_optimizer
from cast_fast.parallel import RankSettings
from cast_fast.step import IMAGE_MEAN, IMAGE_STD, TrainStep, resolve_precision, resolve_queue_dtype
from cast_kernels import reference

LADDER = ("published", "published-amp", "one-pass", "closed-form", "compiled", "kernels", "groups", "streaming")
BESIDE = ("moco", "trunk-bound", "trunk-streaming")

ON_REQUEST = ("plain-compiled",)
"""Lines that a run measures only where ``--variants`` names them, for they take long to compile."""
GROUP = 32
"""Samples of a group of the line ``groups``: ``cast_fast.run_folder.GROUP_SIZE``, which is not imported because it
brings along the libraries that read pictures."""

COMPILED = ("compiled", "kernels", "groups", "streaming", "moco", "trunk-bound", "trunk-streaming", "plain-compiled")
"""Lines that ``torch.compile`` compiles when they first run."""

BUILDING = ("trunk-bound", "moco", "published-amp", "published", "kernels", "groups", "streaming", "compiled")
BUILDING += ("trunk-streaming", "closed-form", "one-pass", "plain-compiled")
"""The order in which lines are built and measured. The bound and MoCo come first, so that every other line finds them
measured when it ends; then what most is asked of a run, so that one whose time ends early has it; our own kernels after
the peers, which an illegal access would take along."""

STREAMING = ("streaming", "trunk-streaming")
"""Lines with streaming BatchNorm; ``groups`` has the product's default, and all others torch's modules."""

TRUNK_UNITS = {
    "published": 8,
    "published-amp": 8,
    "one-pass": 5,
    "closed-form": 5,
    "compiled": 5,
    "kernels": 5,
    "groups": 5,
    "streaming": 5,
    "moco": 4,
    "trunk-bound": 5,
    "trunk-streaming": 5,
    "plain-compiled": 5,
}
"""Work of a line in trunk forwards, a backward counted as two."""

DEFAULTS: dict[tuple[str, bool], dict[str, str | int]] = {
    ("cuda", False): {"arch": "resnet50", "batch": 256, "size": 224, "queue_size": 65_536},
    ("cuda", True): {"arch": "resnet18", "batch": 64, "size": 128, "queue_size": 4_096},
    ("cpu", False): {"arch": "resnet50", "batch": 16, "size": 112, "queue_size": 65_536},
    ("cpu", True): {"arch": "resnet18", "batch": 16, "size": 64, "queue_size": 4_096},
}
"""(device, --quick) -> what a flag that is not given means."""

RATE = 0.01
"""Learning rate of the measured steps: small, so that a few steps on noise stay finite. Time does not depend on it."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all lines of one run share."""

    device: torch.device
    config: PretrainConfig
    """Hyper-parameters (``cast-coco``), trunk, sizes and seed."""
    precision: str
    """``fp32`` or ``bf16``: what the product chooses on this device, used by every line but ``published``."""
    quick: bool = False
    """Whether ``--quick`` was given."""

    @property
    def arch(self) -> str:
        """Name of the trunk."""
        return self.config.arch

    @property
    def batch(self) -> int:
        """Image pairs a step."""
        return self.config.batch

    @property
    def size(self) -> int:
        """Side of the crops in pixels."""
        return self.config.size

    @property
    def shape(self) -> dict[str, int | str]:
        """Named sizes for the records."""
        return {"arch": self.arch, "size": self.size, "batch": self.batch, "queue": self.config.queue_size}

    def line_precision(self, name: str) -> str:
        """Precision of a line's trunk."""
        return "fp32" if name == "published" else self.precision


@dataclasses.dataclass(frozen=True)
class Built:
    """A line, ready to be timed."""

    run: Callable[[], object]
    """One step on the line's fixed batch."""
    state: tuple[object, ...]
    """What the line holds between steps, for ``harness.tensor_bytes``."""
    step: Callable[[Batch], object] | None = None
    """The same step on a batch of the loader; None where the line takes none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is measured, by the product's names."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA if it is there"
    )
    parser.add_argument("--arch", metavar="NAME", help="torchvision ResNet (default: resnet50; resnet18 with --quick)")
    parser.add_argument(
        "--batch", type=int, metavar="N", help="image pairs a step (default: 256 on CUDA, few on a CPU)"
    )
    parser.add_argument("--size", type=int, metavar="N", help="side of the crops in pixels (default: 224 on CUDA)")
    parser.add_argument(
        "--queue-size", type=int, metavar="N", help="queued negatives (default: 65536, 4096 with --quick)"
    )
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the product's step")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, batches and scenes")
    parser.add_argument("--quick", action="store_true", help="a small trunk, small pictures, few repeats")


def settings_from(args: argparse.Namespace) -> Settings:
    """The settings that the flags of ``add_arguments`` mean.

    Raises:
        UserError: a value out of range, an unknown trunk, no CUDA device.
    """
    device = harness.choose_device(args.device)
    values = dict(DEFAULTS[device.type, args.quick])
    values |= {name: getattr(args, name) for name in values if getattr(args, name) is not None}
    config = PretrainConfig(
        arch=str(values["arch"]),
        batch=int(values["batch"]),
        size=int(values["size"]),
        queue_size=int(values["queue_size"]),
        seed=args.seed,
        steps=1,
        device=device.type,
        precision=args.precision,
        images=getattr(args, "images", None),
        saliency=getattr(args, "saliency", None),
        data=getattr(args, "data", None),
    )
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as cast_fast.train does; every line gets the search for algorithms
    rows, columns = cam_grid(config.arch, config.size)
    if config.batch * rows * columns < 2:
        raise UserError(
            f"--batch: got {config.batch} at --size {config.size}, expected at least 2: BatchNorm needs two values"
        )
    dtype = resolve_precision(config.precision, device)
    return Settings(device, config, "bf16" if dtype == torch.bfloat16 else "fp32", args.quick)


def absent(name: str, settings: Settings) -> str | None:
    """Why a line cannot be there, or None."""
    if name == "groups" and groups(settings) == 1:
        other = default_line(settings)
        return f"pretrain's default at --batch {settings.batch} is one group: the line {other}"
    if name == "plain-compiled" and not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        return f"torch {torch.__version__} cannot compile a gradient inside the step"
    if settings.device.type == "cuda":
        return None
    if name == "kernels":
        return "the fused losses are Triton kernels and need a CUDA device"
    if name in STREAMING:
        return "its Triton kernels need a CUDA device; on a CPU it is plain torch"
    return None


def groups(settings: Settings) -> int:
    """BatchNorm groups that ``cast-fast pretrain`` takes by default in one process at this batch."""
    count, rest = divmod(settings.batch, GROUP)
    return count if count and not rest else 1


def default_line(settings: Settings) -> str:
    """The line that is ``cast-fast pretrain`` without further flags, in one process at this batch on this device."""
    if groups(settings) > 1:
        return "groups"
    if settings.device.type != "cuda":
        return "compiled"
    return "streaming" if settings.config.batch_norm == "streaming" else "kernels"


def build(name: str, settings: Settings) -> Built:
    """Builds one line: its own model and optimizer on the device, and one fixed batch of noise."""
    if name in ("trunk-bound", "trunk-streaming"):
        return _trunk_bound(name, settings)
    if name in ("published", "published-amp", "one-pass", "plain-compiled"):
        return _formulation(name, settings)
    return _product(name, settings)


def trunk_flops(settings: Settings) -> int:
    """Operations (2 a multiply-add) of one trunk forward over the batch, counted on the meta device."""
    return _image_flops(settings.arch, settings.size) * settings.batch


@functools.cache
def _image_flops(arch: str, size: int) -> int:
    with torch.device("meta"):
        trunk, _ = build_trunk(arch)
        images = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trunk.eval()(images)
    return counter.get_total_flops()


def _batch_norm(name: str, settings: Settings) -> str:
    if name == "groups":
        return settings.config.batch_norm
    return "streaming" if name in STREAMING else "torch"


def _fused(name: str, settings: Settings) -> bool:
    return name in ("kernels", "streaming") or (name == "groups" and settings.device.type == "cuda")


def _model(name: str, settings: Settings) -> MoCo:
    config = settings.config
    precision, fused = settings.line_precision(name), _fused(name, settings)
    queue_dtype = resolve_queue_dtype(config.queue_dtype, precision, settings.device, fused)
    return MoCo(
        config.arch, config.dim, config.head, config.queue_size, config.seed, _batch_norm(name, settings), queue_dtype
    ).to(settings.device)


def _batch(settings: Settings, *, attention: bool = True) -> Batch:
    grid = cam_grid(settings.arch, settings.size)
    return random_batch(
        settings.batch, settings.size, grid, settings.device, seed=settings.config.seed, attention=attention
    )


def _objective(settings: Settings, *, attention: bool) -> Objective:
    config = settings.config
    return Objective(config.lam, config.loss_combination, config.temperature, attention)


def _product(name: str, settings: Settings) -> Built:
    """A line that is ``cast_fast.step.TrainStep`` itself."""
    config = settings.config
    attention = name != "moco"
    model = _model(name, settings)
    optimizer = build_optimizer(model.query.parameters(), RATE, config.sgd_momentum, config.weight_decay)
    step = TrainStep(
        model,
        optimizer,
        objective=_objective(settings, attention=attention),
        momentum=config.momentum,
        precision=settings.precision,
        compile=name != "closed-form",
        kernels=_fused(name, settings),
        clip_grad=config.clip_grad,
        ranks=RankSettings(groups=groups(settings) if name == "groups" else 1),
    )
    batch = _batch(settings, attention=attention)
    return Built(lambda: step(batch, RATE), (model, optimizer, *vars(batch).values()), lambda other: step(other, RATE))


def _formulation(name: str, settings: Settings) -> Built:
    """A line around a formulation of ``cast_kernels.reference``; eager but for ``plain-compiled``."""
    config = settings.config
    published = name not in ("one-pass", "plain-compiled")
    layout = torch.contiguous_format if name == "published" else torch.channels_last
    half = settings.line_precision(name) == "bf16"
    model = _model(name, settings).to(memory_format=layout).train()
    parameters = list(model.query.parameters())
    if published:
        optimizer = torch.optim.SGD(parameters, RATE, config.sgd_momentum, weight_decay=config.weight_decay)
    else:
        optimizer = build_optimizer(parameters, RATE, config.sgd_momentum, config.weight_decay)
    noise = _batch(settings)
    # What the loader would hand over: the released code's loader gives NCHW.
    query, key = (images.contiguous(memory_format=layout) for images in (noise.query, noise.key))
    mask, saliency = noise.key_mask, noise.query_saliency
    assert mask is not None and saliency is not None
    mean, std = (torch.tensor(v, device=settings.device).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    scale, shift = 1 / (255 * std), -mean / std
    weights = {"temperature": config.temperature, "lam": config.lam}

    def normalise(images: Tensor) -> Tensor:
        return images.float() * scale + shift

    def losses_of(query: Tensor, key: Tensor, mask: Tensor, saliency: Tensor) -> reference.StepLosses:
        key_images = normalise(key)
        masked = torch.where(mask[:, None] > 0, key_images, 0)
        with torch.autocast(settings.device.type, dtype=torch.bfloat16, enabled=half):
            inputs = (model.query, model.key, model.queue.keys, normalise(query), key_images, masked, saliency)
            if published:
                return reference.published_step_losses(*inputs, **weights, momentum=config.momentum)
            return reference.one_pass_step_losses(*inputs, **weights)

    compiled = name == "plain-compiled"
    evaluate = torch.compile(losses_of, fullgraph=True, dynamic=False) if compiled else losses_of

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch._dynamo.config.patch(trace_autograd_ops=True) if compiled else contextlib.nullcontext():
            losses = evaluate(query, key, mask, saliency)
        losses.loss.backward()
        if config.clip_grad > 0:
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad)
        optimizer.step()
        if not published:  # the released code updates the key encoder inside its forward passes
            model.momentum_update(config.momentum)
        model.queue.enqueue(losses.keys)
        return losses.loss.detach()

    return Built(step, (model, optimizer, query, key, mask, saliency))


def _trunk_bound(name: str, settings: Settings) -> Built:
    """One trunk forward and backward and two forwards, compiled, on normalised images."""
    torch.manual_seed(settings.config.seed)
    half = settings.precision == "bf16"
    trunk, frozen = (build_trunk(settings.arch, _batch_norm(name, settings))[0] for _ in range(2))
    for module in (trunk, frozen):
        module.to(settings.device).to(memory_format=torch.channels_last).train()
    frozen.requires_grad_(False)
    shape = (settings.batch, 3, settings.size, settings.size)
    images = [
        torch.randn(shape, device=settings.device).contiguous(memory_format=torch.channels_last) for _ in range(3)
    ]

    def passes(query: Tensor, key: Tensor, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(settings.device.type, dtype=torch.bfloat16, enabled=half):
            with torch.no_grad():
                key, masked = frozen(key), frozen(masked)
            return trunk(query), key, masked

    compiled = torch.compile(passes, fullgraph=True, dynamic=False)
    upstream: list[Tensor] = []

    def step() -> None:
        for parameter in trunk.parameters():
            parameter.grad = None
        activations, _, _ = compiled(*images)
        if not upstream:
            upstream.append(torch.randn_like(activations))
        activations.backward(upstream[0])

    return Built(step, (trunk, frozen, images, upstream))
