"""One training step of CAST: from two uint8 crops a sample to updated encoders, optimizer and queue.

The order is fixed: normalise and mask the crops; embed keys and masked keys (two passes of the key encoder, each with
the BatchNorm statistics of its own batch, or of groups of it); one pass of the query encoder; losses; backward; clip;
SGD; momentum update; enqueue the keys. Everything up to the losses (``forward``) is one graph under ``torch.compile``;
the updates are a few multi-tensor kernels. Nothing waits for the device: whether loss and gradient are finite is
decided there, and if they are not the step leaves weights, BatchNorm statistics, optimizer state and queue bitwise as
they were.

With many ranks ``parallel`` computes the losses of each rank's part of the global batch; from the averaged gradients
and the one all-reduce of the metrics every rank takes the same decision and the same step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from cast_fast import distributed
from cast_fast.batch_counters import BatchCounters
from cast_fast.compilation import compiled
from cast_fast.forward import step_losses
from cast_fast.moco import MoCo
from cast_fast.objective import Objective
from cast_fast.optim import make_gateable
from cast_fast.parallel import ParallelLosses, RankSettings, set_batch_norms
from cast_fast.shuffle import shuffle_plan, unshuffled

if TYPE_CHECKING:
    from cast_fast.data.batch import Batch

log = logging.getLogger("cast_fast")

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""ImageNet's RGB statistics, for values in [0, 1]; every ResNet export of the project names the same."""

PRECISIONS = ("auto", "fp32", "bf16")
COMPILE_MODES = {
    "default": False,
    "max-autotune-no-cudagraphs": False,
    "reduce-overhead": True,
    "max-autotune": True,
}
"""Modes of ``torch.compile`` → whether they record CUDA graphs."""


class StepMetrics(NamedTuple):
    """What one step measured: 0-dimensional tensors on the device, to be read by the host a step or two later."""

    loss: Tensor
    """The total that is optimised."""
    loss_moco: Tensor
    """Mean InfoNCE loss."""
    loss_cast: Tensor
    """Weighted mean attention loss; 0 without one."""
    accuracy: Tensor
    """Share of the samples whose key beats every negative."""
    grad_norm: Tensor
    """Norm of the whole gradient before clipping."""
    finite: Tensor
    """bool: loss and gradient are finite, and so the step was taken."""
    cast_samples: Tensor
    """Sum of the attention weights: samples that had part in the attention loss."""
    zero_cam: Tensor
    """Samples in the attention loss whose Grad-CAM map is zero everywhere."""
    empty_key_mask: Tensor
    """Samples left out of the attention loss because their key mask has no salient pixel."""


class RankReport(NamedTuple):
    """What else the ranks told each other in a step, on the device like the metrics."""

    bad_ranks: Tensor
    """(W,) 1 for each rank whose own loss is not finite."""
    sums: Tensor
    """(R,) the sum over ranks of the ``report`` that was handed in."""


def has_bf16_matrix_hardware(device: torch.device) -> bool:
    """Whether bfloat16 products run on matrix units: tensor cores on CUDA, AMX on a CPU.

    AVX512-BF16 does not count: the trunk was measured several times slower with it than in float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
        return bool(probe is not None and probe())
    return False


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The arithmetic of the trunk, ``torch.bfloat16`` (autocast) or ``torch.float32``; what ``auto`` chose is logged.

    Args:
        precision: ``"fp32"`` and ``"bf16"`` are obeyed; ``"auto"`` is bf16 where there is matrix hardware for it.
        device: where the step runs.

    Raises:
        ValueError: unknown ``precision``.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}")
    half = _is_half(precision, device)
    if precision == "auto":
        log.info(
            "precision %s: %s %s bf16 matrix hardware", "bf16" if half else "fp32", device, "has" if half else "lacks"
        )
    return torch.bfloat16 if half else torch.float32


def _is_half(precision: str, device: torch.device) -> bool:
    return precision == "bf16" or (precision == "auto" and has_bf16_matrix_hardware(device))


def resolve_queue_dtype(name: str, precision: str, device: torch.device, kernels: bool) -> torch.dtype:
    """The type of the queue's keys; what ``auto`` chose is logged.

    Args:
        name: ``"fp32"`` and ``"bf16"`` are obeyed; ``"auto"`` is bf16 where the trunk computes in bf16 and the losses
            are fused: they then take a third of the products, and round query and key too. The gradient of InfoNCE is
            off by 0.2 to 0.4 % with it.
        precision: of the trunk, as for ``resolve_precision``.
        device: where the step runs.
        kernels: whether the losses are fused.

    Raises:
        ValueError: unknown ``name``.
    """
    if name not in PRECISIONS:
        raise ValueError(f"queue_dtype: got {name!r}, expected one of {', '.join(PRECISIONS)}")
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    half = _is_half(precision, device)
    if half and kernels:
        log.info("queue of bf16 keys: the trunk is bf16 and the losses are fused")
        return torch.bfloat16
    log.info("queue of fp32 keys: %s", "the losses are not fused" if half else "the trunk is fp32")
    return torch.float32


class TrainStep:
    """The training step of a ``MoCo`` model; call it with a batch and a learning rate.

    Build it after the model is on its device. A checkpoint of ``model.state_dict()`` and ``optimizer.state_dict()``
    continues as if never stopped; where keys are shuffled, ``number`` is to be set as well.

    Args:
        model: put into train mode here.
        optimizer: a fused optimizer over the query encoder (``optim.build_optimizer``).
        objective: losses and their weights.
        momentum: m of the key encoder.
        precision: ``"auto"``, ``"fp32"`` or ``"bf16"``; see ``resolve_precision``. Head, map and losses are always in
            float32. A float64 model stays in float64. Whether float32 may use TF32 is left to torch's global settings.
        compile: compile forward pass and losses as one graph (the first step then takes a minute or more on a CPU).
        kernels: use the fused losses of ``cast_kernels``.
        clip_grad: largest norm of the gradient, 0 for no clipping.
        join_keys: embed keys and masked keys in one pass of the key encoder, each with its own BatchNorm statistics
            (``split_batch_norm``): the same numbers up to rounding, fewer and larger convolutions. On one rank;
            without attention loss there is nothing to join.
        compile_mode: torch.compile's ``mode``. With one that records CUDA graphs (``"reduce-overhead"``,
            ``"max-autotune"``) the metrics are copied out of the graphs' memory.
        ranks: ranks and groups of their batches (``parallel.RankSettings``); by default one of one.

    Raises:
        ValueError: an optimizer that is not fused, encoders in different memory formats, or a setting out of range.
    """

    def __init__(
        self,
        model: MoCo,
        optimizer: Optimizer,
        *,
        objective: Objective,
        momentum: float = 0.999,
        precision: str = "auto",
        compile: bool = True,
        kernels: bool = False,
        clip_grad: float = 0.0,
        join_keys: bool = False,
        compile_mode: str = "default",
        ranks: RankSettings = RankSettings(),  # noqa: B008 (frozen)
    ) -> None:
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: got {momentum}, expected a number in [0, 1]")
        if not clip_grad >= 0:
            raise ValueError(f"clip_grad: got {clip_grad}, expected at least 0")
        if compile_mode not in COMPILE_MODES:
            raise ValueError(f"compile_mode: got {compile_mode!r}, expected one of {', '.join(COMPILE_MODES)}")
        many = ranks.world.size > 1
        if many and (join_keys or compile_mode != "default"):
            raise ValueError("join_keys, compile_mode: got other than the default on many ranks, expected one rank")
        make_gateable(optimizer)
        if not all(map(_same_layout, model.key.parameters(), model.query.parameters())):
            raise ValueError("model: got key and query encoder in different memory formats, expected the same")
        weights = next(model.query.parameters())
        self.model = model.train()
        self.optimizer = optimizer
        self.objective = objective
        self.momentum = momentum
        self.clip_grad = clip_grad
        self.kernels = kernels
        self.dtype = resolve_precision(precision, weights.device) if weights.dtype == torch.float32 else weights.dtype
        """Arithmetic of the trunk."""
        self.number = 0
        """Number of the next step in the run, which decides how key crops are shuffled over ranks and groups."""
        self.rank_report: RankReport | None = None
        """Of the last step; ``None`` on one rank."""
        mean, std = (weights.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        self._scale, self._shift = 1 / (255 * std), -mean / std
        self.join_keys = join_keys and objective.attention
        self._settings = ranks
        set_batch_norms(model, ranks, key_passes=2 if self.join_keys else 1)
        self._query_counters = BatchCounters(model.query)
        self._key_counters = BatchCounters(model.key, passes=2 if objective.attention else 1)
        self._losses = step_losses
        if compile:
            mode = None if compile_mode == "default" else compile_mode
            self._losses = compiled(step_losses, mode)
        self._recorded = compile and weights.is_cuda and COMPILE_MODES[compile_mode]
        """Whether the compiled graph is recorded and replayed, each time in the same memory."""
        self._ranks: ParallelLosses | None = None
        if many:
            self._ranks = ParallelLosses(
                model,
                ranks,
                objective=objective,
                dtype=self.dtype,
                kernels=kernels,
                compile=compile,
                scale=self._scale,
                shift=self._shift,
            )
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._statistics = _Undo([*model.query.buffers(), *model.key.buffers()])
        self._layout_checked = False

    def __call__(self, batch: Batch, lr: float, report: Tensor | None = None) -> StepMetrics:
        """Takes one step.

        Args:
            batch: N pairs, on the model's device; N is a multiple of the number of groups, and N times the number of
                ranks at most the size of the queue.
            lr: learning rate of this step.
            report: (R,) on the model's device: numbers to be added up over ranks along with the metrics; the sums are
                in ``rank_report``. Ignored on one rank.

        Raises:
            ValueError: a batch without the maps that the attention loss needs, larger than the queue, or not to be
                divided into groups.
        """
        attention = self.objective.attention
        if attention and (batch.query_saliency is None or batch.key_mask is None):
            raise ValueError("batch: got no query_saliency or no key_mask, expected both for the attention loss")
        total = len(batch.query) * distributed.world_size()
        if total > len(self.model.queue):
            raise ValueError(f"batch: got {total} samples, expected at most {len(self.model.queue)} (queue)")
        if len(batch.query) % self._settings.groups:
            raise ValueError(
                f"batch: got {len(batch.query)} samples, expected a multiple of {self._settings.groups} (groups)"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self._statistics.save()
        if self._ranks is not None:
            return self._take(batch, lr, self._ranks, report)
        if self._recorded:
            torch.compiler.cudagraph_mark_step_begin()
        with self._query_counters.apart(), self._key_counters.apart():
            losses, keys, empty_key_mask = self._losses(
                self.model,
                batch.query,
                batch.key,
                batch.key_mask if attention else None,
                batch.query_saliency if attention else None,
                batch.weight if attention else None,
                self._scale,
                self._shift,
                self.objective,
                self.dtype,
                self.kernels,
                self.join_keys,
                self._settings.query_groups,
                self._order(batch.key),
            )
        self.number += 1
        losses.loss.backward()
        loss = losses.loss.detach()
        if self._recorded:
            # The host reads metrics a step or two later, when the next replay has long overwritten this memory.
            loss, empty_key_mask = loss.clone(), empty_key_mask.clone()
            parts = {name: value for name, value in losses._asdict().items() if value is not None}
            losses = losses._replace(**{name: value.detach().clone() for name, value in parts.items()})
        grad_norm, finite = self._update(loss, keys, lr)
        return StepMetrics(
            loss,
            losses.loss_moco,
            losses.loss_cast,
            losses.accuracy,
            grad_norm,
            finite,
            losses.cast_samples,
            losses.zero_cam,
            empty_key_mask,
        )

    def abstain(self) -> None:
        """From now on this process puts NaN in place of its crops: no rank changes anything, and none has to wait."""
        self._shift.fill_(torch.nan)

    def _order(self, key: Tensor) -> Tensor | None:
        """The order in which the key encoder of a single rank sees its crops."""
        settings, groups = self._settings, self._settings.key_groups
        if settings.key_bn == "shuffle" and groups > 1:
            order = shuffle_plan(settings.seed, self.number, len(key), 0, 1, groups).groups
        else:
            order = unshuffled(len(key), groups)
        return None if order is None else order.to(key.device, non_blocking=True)

    def _take(self, batch: Batch, lr: float, ranks: ParallelLosses, report: Tensor | None) -> StepMetrics:
        """The step on many ranks: the same, but that losses and counts are those of the global batch."""
        with self._query_counters.apart(), self._key_counters.apart():
            losses, keys, empty_key_mask = ranks(batch, self.number)
        self.number += 1
        losses.loss.backward()
        size = distributed.world_size()
        bad = torch.zeros(size, dtype=losses.loss.dtype, device=losses.loss.device)
        bad[distributed.rank()] = ~losses.loss.detach().isfinite()
        means = torch.stack([losses.loss.detach(), losses.loss_moco, losses.loss_cast, losses.accuracy]) / size
        counts = torch.stack([losses.cast_samples, losses.zero_cam, empty_key_mask]).to(means.dtype)
        report = bad[:0] if report is None else report.to(bad.dtype)
        sums = distributed.all_reduce(torch.cat([means, counts, bad, report]), "metrics")
        loss, moco, cast, accuracy, samples, zero_cam, empty = sums[:7].unbind()
        grad_norm, finite = self._update(loss, keys, lr)
        self.rank_report = RankReport(sums[7 : 7 + size], sums[7 + size :])
        return StepMetrics(loss, moco, cast, accuracy, grad_norm, finite, samples, zero_cam, empty)

    def _update(self, loss: Tensor, keys: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Everything after the backward pass; returns the gradient's norm and whether the step was taken."""
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        finite = loss.isfinite() & grad_norm.isfinite()
        self._optimize(lr, grad_norm, finite)
        self._statistics.undo_unless(finite)
        self.model.momentum_update(self.momentum, gate=finite)
        self.model.queue.enqueue(keys, gate=finite)
        return grad_norm, finite

    def _optimize(self, lr: float, grad_norm: Tensor, finite: Tensor) -> None:
        """One update by the optimizer: clipped, and suppressed on the device where ``finite`` is false.

        Fused optimizers divide the gradient by ``grad_scale`` and do nothing where ``found_inf`` is 1, by the protocol
        between them and torch's GradScaler; so clipping costs no pass over the gradients of its own.
        """
        if not self._layout_checked:
            # torch's fused CPU kernel walks over raw memory: other strides would pair the wrong elements in silence.
            assert all(p.grad is None or _same_layout(p, p.grad) for p in self._parameters)
            self._layout_checked = True
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        scale = (grad_norm / self.clip_grad).clamp(min=1).float() if self.clip_grad > 0 else None
        vars(self.optimizer).update(grad_scale=scale, found_inf=(~finite).float())
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.grad_scale, self.optimizer.found_inf


def _same_layout(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in the same order; strides of dimensions of size 1 say nothing."""
    return all(size == 1 or a == b for size, a, b in zip(first.shape, first.stride(), second.stride()))


class _Undo:
    """Takes back what a step wrote to a set of small tensors, where a flag on the device says so.

    The tensors of one dtype are gathered in one flat copy, so that it takes a handful of kernels and not a few for each
    of the hundreds of BatchNorm statistics. The tensors themselves keep their memory: views of one flat buffer would be
    aliased inputs to the compiled graph.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        self._groups = [(live, *_flat_copy(live), *_flat_copy(live)) for live in by_dtype.values()]

    @torch.no_grad()
    def save(self) -> None:
        """Copies the present values."""
        for live, _, saved, _, _ in self._groups:
            torch._foreach_copy_(saved, live)

    @torch.no_grad()
    def undo_unless(self, keep: Tensor) -> None:
        """Where ``keep`` (0-dimensional bool) is false, writes the saved values back.

        With many ranks, what is kept is the ranks' mean: the statistics are then the same on each, whichever rank
        writes the checkpoint, and an interrupted run has them as an undisturbed one.
        """
        for live, flat_saved, _, flat_present, present in self._groups:
            torch._foreach_copy_(present, live)
            if distributed.world_size() > 1 and flat_present.is_floating_point():
                mean = distributed.all_reduce(flat_present, "running statistics") / distributed.world_size()
                flat_present.copy_(mean)
            torch.where(keep, flat_present, flat_saved, out=flat_present)
            torch._foreach_copy_(live, present)


def _flat_copy(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Uninitialised memory for all tensors in one row, and its views in their shapes."""
    flat = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=tensors[0].dtype, device=tensors[0].device)
    views = [part.view(tensor.shape) for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors)]
    return flat, views
