"""BatchNorm with the statistics of all ranks' samples, on GPUs and CPUs, inside one compiled graph.

torch's own ``nn.SyncBatchNorm`` refuses CPU tensors, where the tests run.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cast_fast import distributed

_Kind = TypeVar("_Kind", bound=nn.BatchNorm2d)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the global batch; in eval mode, and on one rank, it is that very module.

    Ranks exchange mean and variance (one all-gather forward) and join them as Chan et al. (1979) do for equal counts,
    which does not cancel where the mean is large against the spread; backward two sums a channel (one all-reduce).
    """

    def forward(self, input: Tensor) -> Tensor:
        """(n, C, H, W), n the same on every rank → the same shape and dtype; statistics in float32 or wider."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        mean, variance = join_statistics(torch.cat(batch_statistics(input, 1))).unbind()
        if self.running_mean is not None:
            count = input.numel() // input.shape[1] * distributed.world_size()
            update_running_statistics(self, mean, variance, count)
        return normalise(self, input, mean[None], variance[None], across_ranks=True)


def batch_statistics(input: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (parts, C) each, float32 or wider, of equal runs of samples; not differentiable.

    Args:
        input: (parts · n, C, H, W).
        parts: P.
    """
    with torch.no_grad():
        values = input.to(torch.promote_types(input.dtype, torch.float32)).unflatten(0, (parts, -1))
        variance, mean = torch.var_mean(values, dim=(1, 3, 4), correction=0)
        return mean, variance


def join_statistics(moments: Tensor) -> Tensor:
    """Mean and biased variance over all ranks, (2, C), from this rank's (2, C); every rank has as many values.

    By the sums of squared differences of Chan et al. (1979).
    """
    means, variances = distributed.all_gather(moments[None], "BatchNorm statistics").unbind(1)
    mean = means.mean(0)
    return torch.stack([mean, variances.mean(0) + (means - mean).square().mean(0)])


def normalise(
    norm: nn.BatchNorm2d, input: Tensor, mean: Tensor, variance: Tensor, *, across_ranks: bool = False
) -> Tensor:
    """Equal runs of samples by the statistics of each, then by the weight and bias of ``norm`` where it has them.

    Args:
        norm: weight, bias and eps.
        input: (P · n, C, H, W).
        mean, variance: (P, C), from ``batch_statistics`` of this very ``input``: the gradient is theirs too.
        across_ranks: they are those of all ranks.

    Returns:
        (P · n, C, H, W) in the dtype of ``input``.
    """
    parts = input.unflatten(0, (len(mean), -1))
    with torch.autocast(input.device.type, enabled=False):
        result: Any = _Normalise.apply(parts, mean, variance, norm.weight, norm.bias, norm.eps, across_ranks)
    # Out here, because the ReLU that follows may write in place, which no view from inside of a function allows, and
    # because torch 2.11 compiles a function that ends in a cast without effect to one whose gradient is zero.
    return result.flatten(0, 1).to(input.dtype)


class _Normalise(torch.autograd.Function):
    """(P, n, C, H, W) → the same in the dtype of the statistics.

    The gradient is in closed form: autograd of the formula reduces more often. It has no gradient of its own, for it
    takes the statistics as constants: a second derivative raises an error.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        across_ranks: bool,
    ) -> Tensor:
        inverse = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, mean, inverse, weight)
        ctx.across_ranks = across_ranks
        scale = inverse if weight is None else inverse * weight
        y = (x.to(mean.dtype) - _spread(mean)) * _spread(scale)
        return y if bias is None else y + bias[:, None, None]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean, inverse, weight = ctx.saved_tensors
        centred = x.to(mean.dtype) - _spread(mean)
        total, product = dy.sum((1, 3, 4)), (dy * centred).sum((1, 3, 4))
        dweight = None if weight is None else (product * inverse).sum(0).to(weight.dtype)
        dbias = None if weight is None else total.sum(0).to(weight.dtype)
        count = x.numel() // mean.numel()
        if ctx.across_ranks:
            # The statistics are functions of every rank's values, and so are their sums.
            total, product = distributed.all_reduce(torch.stack([total, product]), "BatchNorm statistics, gradient")
            count *= distributed.world_size()
        scale = inverse if weight is None else inverse * weight
        slope = inverse.square() * product / count
        dx = (dy - _spread(total / count) - centred * _spread(slope)) * _spread(scale)
        gradients = (dx.to(x.dtype), None, None, dweight, dbias, None, None)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Under ``create_graph``. ``once_differentiable`` lets a sum with other terms pass in silence.
            for gradient in gradients:
                if gradient is not None and gradient.requires_grad:
                    gradient.register_hook(_refuse_second_derivative)
        return gradients


def _refuse_second_derivative(_: Tensor) -> None:
    raise RuntimeError("BatchNorm with statistics of groups or of all ranks has no second derivative")


def _spread(statistics: Tensor) -> Tensor:
    """(P, C) → (P, 1, C, 1, 1)."""
    return statistics[:, None, :, None, None]


def update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Moves the running statistics as ``nn.BatchNorm2d`` does in a forward pass: unbiased variance, ``norm.momentum``.

    Args:
        norm: with running statistics and a momentum.
        mean, variance: (C,) of the batch, the variance biased.
        count: values a channel, at least 2.

    Raises:
        ValueError: without a momentum, which torch takes for a cumulative average.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    if norm.momentum is None:
        raise ValueError(f"BatchNorm: got {norm}, expected one with a momentum")
    with torch.no_grad():
        if norm.num_batches_tracked is not None:  # else whoever took it away counts (``batch_counters``)
            norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        unbiased = variance * (count / (count - 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)


def twin(norm: nn.BatchNorm2d, kind: type[_Kind]) -> _Kind:
    """A BatchNorm of another kind with the settings, the mode and the very tensors of ``norm``."""
    other = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta")
    other._parameters, other._buffers = norm._parameters, norm._buffers
    return other.train(norm.training)


def synchronise_batch_norm(module: nn.Module) -> None:
    """Turns every ``nn.BatchNorm2d`` below ``module`` into a ``SyncBatchNorm2d`` with the same tensors.

    Raises:
        ValueError: another kind of BatchNorm, for instance one in a head, or one without momentum.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SyncBatchNorm2d) or not isinstance(child, nn.modules.batchnorm._BatchNorm):
                continue
            if not isinstance(child, nn.BatchNorm2d) or child.momentum is None:
                raise ValueError(f"{name}: got {child}, expected nn.BatchNorm2d with a momentum")
            setattr(parent, name, twin(child, SyncBatchNorm2d))
