"""BatchNorm with the statistics of all ranks' samples, on GPUs and CPUs, inside one compiled graph.

torch's own ``nn.SyncBatchNorm`` refuses CPU tensors, where the tests run.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from cast_fast import distributed

_Kind = TypeVar("_Kind", bound=nn.BatchNorm2d)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the global batch; in eval mode, and on one rank, it is that very module.

    Ranks exchange mean and variance (one all-gather forward, one reduce-scatter backward) and join them as Chan et al.
    (1979) do for equal counts, which does not cancel where the mean is large against the spread.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(n, C, H, W), n the same on every rank → the same shape and dtype; statistics in float32 or wider."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        with torch.autocast(input.device.type, enabled=False):
            values = input.to(torch.promote_types(input.dtype, torch.float32))
            variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
            mean, variance = join_statistics(torch.stack([mean, variance])).unbind()
            if self.running_mean is not None and self.running_var is not None:
                count = input.numel() // input.shape[1] * distributed.world_size()
                update_running_statistics(self, mean.detach(), variance.detach(), count)
            return normalise(self, values, mean, variance).to(input.dtype)


def join_statistics(moments: Tensor) -> Tensor:
    """Mean and biased variance over all ranks, (2, C), from this rank's (2, C); every rank has as many values.

    Differentiable. By the sums of squared differences of Chan et al. (1979).
    """
    means, variances = distributed.all_gather(moments[None], "BatchNorm statistics").unbind(1)
    mean = means.mean(0)
    return torch.stack([mean, variances.mean(0) + (means - mean).square().mean(0)])


def normalise(norm: nn.BatchNorm2d, values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(…, n, C, H, W) by the statistics (…, C), and by the weight and bias of ``norm`` where it has them."""
    factor = torch.rsqrt(variance + norm.eps)
    if norm.affine:
        factor = factor * norm.weight
    result = (values - mean[..., None, :, None, None]) * factor[..., None, :, None, None]
    return result + norm.bias[:, None, None] if norm.affine else result


def update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Moves the running statistics as ``nn.BatchNorm2d`` does in a forward pass: unbiased variance, ``norm.momentum``.

    Args:
        norm: with running statistics and a momentum.
        mean, variance: (C,) of the batch, the variance biased.
        count: values a channel, at least 2.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.momentum is not None
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
