"""torchvision's ResNets around the streaming BatchNorm operators of ``cast_kernels``; same weights, same results.

In training mode BatchNorm, ReLU, the addition of the shortcut and the stem's pooling take most of a ResNet's memory
traffic, and what a compiler makes of their gradients reads much of it twice or three times. Here each of them is one
sweep over the activations. What the composition adds to the operators:

* the gradient in closed form, written out in ``torch.autograd.Function``; an operator takes the vectors that another
  leaves, so that nothing is launched between two sweeps but for statistics of several ranks;
* a block's output has two readers, the next block's first convolution and its shortcut. A block therefore returns it
  twice (``Branches``, two names of one memory), so that autograd hands both gradients over and the sweep that masks and
  sums them is the one that adds them: no addition of its own, and the joined gradient is written once;
* a ReLU inside a block is not saved: its mask is computed again from the convolution's output, which BatchNorm needs in
  any case; of the one at its end a bit an element is saved, for the gradient to read instead of the block's output; the
  stem saves one byte a pooled pixel instead of its full-size activation.

Only training mode streams. In eval mode a block is torch's own modules, one after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from cast_fast import distributed
from cast_fast.split_batch_norm import SplitBatchNorm2d
from cast_fast.sync_batch_norm import SyncBatchNorm2d, join_statistics
from cast_kernels import (
    batch_norm_add_reduce,
    batch_norm_apply,
    batch_norm_apply_mask,
    batch_norm_input_gradient,
    batch_norm_input_gradients,
    batch_norm_relu_input_gradient,
    batch_norm_relu_pool,
    batch_norm_relu_pool_input_gradient,
    batch_norm_relu_pool_reduce,
    batch_norm_relu_reduce,
    batch_norm_statistics,
)


class Batch(NamedTuple):
    """What one BatchNorm has seen of a batch, to be entered into its running statistics."""

    norm: nn.BatchNorm2d
    statistics: Tensor
    """(3, C): mean, biased variance and 1 / sqrt(variance + eps); of P parts (3, P, C)."""
    count: int
    """Values a channel, of one part."""


class Branches(NamedTuple):
    """A block's output, once for each of its readers; both are the same memory, and neither may be written to."""

    main: Tensor
    """For the first convolution of the next block."""
    skip: Tensor
    """For its shortcut."""
    batches: list[Batch] | None = None
    """Where the next block leaves its statistics, for whoever enters them; ``None``: it enters them itself."""


class StreamingTrunk(nn.Sequential):
    """The trunk of a torchvision ResNet: convolution, BatchNorm, ReLU, pool, four layers of blocks.

    Args:
        trunk: the ordinary trunk (``encoder.build_trunk``); its modules are taken over, under their names and in their
            order, its blocks as ``StreamingBlock``.

    Raises:
        ValueError: another stem, another kind of block or another BatchNorm than torchvision's ResNets have.
    """

    conv1: nn.Module
    bn1: nn.BatchNorm2d
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, trunk: nn.Sequential) -> None:
        super().__init__()
        for name, module in trunk.named_children():
            if isinstance(module, nn.Sequential):
                last = name == "layer4"
                blocks = [StreamingBlock(block, splits=not last or block is not module[-1]) for block in module]
                module = nn.Sequential(*blocks)
            self.add_module(name, module)
        names = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
        if (found := [name for name, _ in self.named_children()]) != names:
            raise ValueError(f"trunk: got modules {', '.join(found)}, expected {', '.join(names)}")
        _check_norm(self.bn1)
        pool = self.maxpool
        if not isinstance(pool, nn.MaxPool2d) or not _is_stem_pool(pool):
            raise ValueError(f"maxpool: got {pool}, expected kernel 3, stride 2, padding 1")

    def forward(self, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(N, 3, S, S) → (N, C, H, W), channels-last."""
        norm = self.bn1
        if not norm.training:
            return super().forward(images)
        x = self.conv1(images)
        batches: list[Batch] = []
        main, skip = _NormReluPool.apply(x, batch_statistics(norm, x, batches), *_settings(norm))
        activations = self.layer4(self.layer3(self.layer2(self.layer1(Branches(main, skip, batches)))))
        # All at once: these are three small vectors a BatchNorm, each otherwise a launch of its own.
        enter_statistics(batches)
        return activations


class StreamingBlock(nn.Module):
    """A residual block of torchvision, ``BasicBlock`` or ``Bottleneck``, with its modules and their names.

    Args:
        block: its modules are taken over.
        splits: whether two modules read the output, so that it is returned as ``Branches`` in training mode.

    Raises:
        ValueError: another kind of block or of BatchNorm.
    """

    def __init__(self, block: nn.Module, *, splits: bool = True) -> None:
        super().__init__()
        if type(block) not in (resnet.BasicBlock, resnet.Bottleneck):
            raise ValueError(f"block: got {type(block).__name__}, expected BasicBlock or Bottleneck of torchvision")
        for name, module in block.named_children():
            self.add_module(name, module)
        self.splits = splits
        self.depth = 2 if isinstance(block, resnet.BasicBlock) else 3
        self.projects = getattr(block, "downsample", None) is not None
        """Whether the shortcut has a convolution and a BatchNorm of its own."""
        for norm in self._norms():
            _check_norm(norm)

    def forward(self, inputs: Tensor | Branches) -> Tensor | Branches:
        """(N, C, H, W), once or for each branch → (N, C', H', W'), likewise."""
        main, skip, handed = inputs if isinstance(inputs, Branches) else Branches(inputs, inputs)
        if not all(norm.training for norm in self._norms()):
            result = self._plain(main)
            return Branches(result, result, handed) if self.splits and handed is not None else result
        batches: list[Batch] = [] if handed is None else handed
        for number in range(1, self.depth):
            conv, norm = self._layer(number)
            x = conv(main)
            main = _NormRelu.apply(x, batch_statistics(norm, x, batches), *_settings(norm))
        conv, norm = self._layer(self.depth)
        x = conv(main)
        arguments = [self.splits, torch.is_grad_enabled(), x, batch_statistics(norm, x, batches), *_settings(norm)]
        if self.projects:
            conv, other = self._shortcut()
            if _synced(other) != _synced(norm):
                raise ValueError(f"BatchNorm: got {norm} and {other} in a block, expected both of one kind")
            shortcut = conv(skip)
            statistics = batch_statistics(other, shortcut, batches)
            result = _NormAddNormRelu.apply(*arguments, shortcut, statistics, *_settings(other)[:2])
        else:
            # The same dtype but where autocast has narrowed the convolutions and not the input.
            result = _NormAddRelu.apply(*arguments, skip.to(x.dtype))
        if handed is None:
            enter_statistics(batches)
        return Branches(result[0], result[1], handed) if self.splits else result

    def _plain(self, inputs: Tensor) -> Tensor:
        """The block as torchvision writes it."""
        main = inputs
        for number in range(1, self.depth + 1):
            conv, norm = self._layer(number)
            main = norm(conv(main))
            if number < self.depth:
                main = F.relu(main)
        if self.projects:
            conv, norm = self._shortcut()
            inputs = norm(conv(inputs))
        return F.relu(main + inputs)

    # Looked up at every call: ``synchronise_batch_norm`` puts other modules in their place.
    def _layer(self, number: int) -> tuple[Any, Any]:
        return getattr(self, f"conv{number}"), getattr(self, f"bn{number}")

    def _shortcut(self) -> tuple[Any, Any]:
        pair: Any = self.downsample
        return pair[0], pair[1]

    def _norms(self) -> list[Any]:
        norms = [self._layer(number)[1] for number in range(1, self.depth + 1)]
        return [*norms, self._shortcut()[1]] if self.projects else norms


def batch_statistics(norm: nn.BatchNorm2d, x: Tensor, batches: list[Batch]) -> Tensor:
    """Mean, biased variance and 1 / sqrt(variance + eps) of the batch, over all ranks for a ``SyncBatchNorm2d``.

    (3, C), or (3, P, C) of the P parts of a ``SplitBatchNorm2d``.

    Args:
        norm: in training mode.
        x: (n, C, H, W), what it normalises.
        batches: gets an entry for ``enter_statistics``.

    Raises:
        ValueError: a single value a channel, which has no variance; samples that the parts do not divide.
    """
    parts = norm.parts if isinstance(norm, SplitBatchNorm2d) else 1
    with torch.no_grad():
        statistics = batch_norm_statistics(x.detach(), norm.eps, parts)
        count = x.numel() // x.shape[1] // parts
        if _synced(norm):
            moments = join_statistics(statistics[:2])
            statistics = torch.cat([moments, torch.rsqrt(moments[1:] + norm.eps)])
            count *= distributed.world_size()
    if count < 2:
        raise ValueError(f"BatchNorm: got one value a channel (shape {tuple(x.shape)}), expected more in training")
    batches.append(Batch(norm, statistics, count))
    return statistics


def enter_statistics(batches: list[Batch]) -> None:
    """Moves running statistics and counts as the BatchNorms do in a forward pass, for many of them at once.

    Those of a ``SplitBatchNorm2d`` take one step a pass, by the mean over its groups.

    Raises:
        ValueError: a BatchNorm without momentum.
    """
    alike: dict[tuple[float, int, int, int], list[Batch]] = {}
    for batch in batches:
        norm = batch.norm
        if norm.momentum is None:
            raise ValueError(f"BatchNorm: got {norm}, expected one with a momentum")
        passes, groups = (norm.passes, norm.groups) if isinstance(norm, SplitBatchNorm2d) else (1, 1)
        alike.setdefault((norm.momentum, batch.count, passes, groups), []).append(batch)
    with torch.no_grad():
        for (momentum, count, passes, groups), some in alike.items():
            norms: list[Any] = [batch.norm for batch in some]
            moments = [batch.statistics[:2].to(norm.running_mean.dtype) for batch, norm in zip(some, norms)]
            for first in range(0, passes * groups, groups):
                pairs = moments if passes * groups == 1 else [each[:, first] for each in moments]
                for part in range(first + 1, first + groups):
                    pairs = torch._foreach_add(pairs, [each[:, part] for each in moments])
                if groups > 1:
                    pairs = torch._foreach_div(pairs, groups)
                # None: whoever took the counter away counts (``batch_counters``).
                counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
                if counters:
                    torch._foreach_add_(counters, 1)
                torch._foreach_lerp_([norm.running_mean for norm in norms], [pair[0] for pair in pairs], momentum)
                unbiased = torch._foreach_mul([pair[1] for pair in pairs], count / (count - 1))
                torch._foreach_lerp_([norm.running_var for norm in norms], unbiased, momentum)


def _synced(norm: nn.Module) -> bool:
    return isinstance(norm, SyncBatchNorm2d) and distributed.world_size() > 1


def _settings(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, bool]:
    """weight, bias, and whether statistics are those of all ranks: what a function takes beside the statistics."""
    return norm.weight, norm.bias, _synced(norm)


def _check_norm(norm: Any) -> None:
    known = type(norm) in (nn.BatchNorm2d, SyncBatchNorm2d, SplitBatchNorm2d)
    if not known or not norm.affine or not norm.track_running_stats or norm.momentum is None:
        raise ValueError(f"BatchNorm: got {norm}, expected nn.BatchNorm2d, affine, with running statistics")


def _is_stem_pool(pool: nn.MaxPool2d) -> bool:
    settings = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    numbers = tuple(value if isinstance(value, int) else value[0] for value in settings)
    square = all(isinstance(value, int) or value[0] == value[1] for value in settings)
    return square and numbers == (3, 2, 1, 1) and not pool.ceil_mode and not pool.return_indices


def _vectors(statistics: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the sweeps need of one BatchNorm: mean and inverse, (C,) or (P, C), weight and bias, (C,), in one dtype."""
    return statistics[0], statistics[2], weight.to(statistics.dtype), bias.to(statistics.dtype)


def _of_parameters(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """(2 or 3, C) in the dtype of weight and bias: dbias and dweight as sums over parts, which share them."""
    return (sums if sums.dim() == 2 else sums.sum(1)).to(dtype)


def _over_ranks(sums: Tensor, x: Tensor, synced: bool) -> tuple[Tensor, int]:
    """dbias and dweight as the input gradient needs them, and of how many values a channel they are sums.

    The statistics are functions of every rank's x, so with common statistics the sums are those of all ranks.

    Args:
        sums: this rank's, (2 or 3, C) or (2 or 3, P, C).
        x: (N, C, H, W), what is normalised.
        synced: whether statistics are common.
    """
    count = x.numel() // sums[0].numel()
    if not synced:
        return sums, count
    return distributed.all_reduce(sums, "BatchNorm statistics, gradient"), count * distributed.world_size()


class _NormRelu(torch.autograd.Function):
    """ReLU(BatchNorm(x)) from the statistics of x; their part in the gradient is in the closed form."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, synced: bool
    ) -> Tensor:
        ctx.save_for_backward(x, statistics, weight, bias)
        ctx.synced = synced
        return batch_norm_apply(x, *_vectors(statistics, weight, bias))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, statistics, weight, bias = ctx.saved_tensors
        vectors = _vectors(statistics, weight, bias)
        sums = batch_norm_relu_reduce(dy, x, *vectors)
        (dbias, dweight), count = _over_ranks(sums, x, ctx.synced)
        dx = batch_norm_relu_input_gradient(dy, x, *vectors, dbias, dweight, count)
        dbias, dweight = _of_parameters(sums, weight.dtype)
        return dx, None, dweight, dbias, None


class _NormAddRelu(torch.autograd.Function):
    """ReLU(BatchNorm(x) + shortcut), given out twice where ``splits`` says so; differentiable with ``keeps``."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        splits: bool,
        keeps: bool,
        x: Tensor,
        statistics: Tensor,
        weight: Tensor,
        bias: Tensor,
        synced: bool,
        shortcut: Tensor,
    ) -> Any:
        arguments = (x, *_vectors(statistics, weight, bias), shortcut)
        if keeps:
            y, mask = batch_norm_apply_mask(*arguments)
            ctx.save_for_backward(mask, x, statistics, weight, bias)
        else:
            y = batch_norm_apply(*arguments)
        ctx.synced = synced
        return (y, y.view_as(y)) if splits else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dy_skip: Tensor | None = None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        mask, x, statistics, weight, bias = ctx.saved_tensors
        mean, inverse, scale, _ = _vectors(statistics, weight, bias)
        g, sums = batch_norm_add_reduce(dy, dy_skip, mask, x, mean, inverse)
        (dbias, dweight), count = _over_ranks(sums, x, ctx.synced)
        dx = batch_norm_input_gradient(g, x, mean, inverse, scale, dbias, dweight, count)
        dbias, dweight = _of_parameters(sums, weight.dtype)
        return None, None, dx, None, dweight, dbias, None, g


class _NormAddNormRelu(torch.autograd.Function):
    """``_NormAddRelu`` with a BatchNorm of the shortcut."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        splits: bool,
        keeps: bool,
        x: Tensor,
        statistics: Tensor,
        weight: Tensor,
        bias: Tensor,
        synced: bool,
        shortcut: Tensor,
        shortcut_statistics: Tensor,
        shortcut_weight: Tensor,
        shortcut_bias: Tensor,
    ) -> Any:
        one = (statistics, weight, bias)
        other = (shortcut_statistics, shortcut_weight, shortcut_bias)
        arguments = (x, *_vectors(*one), shortcut, *_vectors(*other))
        if keeps:
            y, mask = batch_norm_apply_mask(*arguments)
            ctx.save_for_backward(mask, x, *one, shortcut, *other)
        else:
            y = batch_norm_apply(*arguments)
        ctx.synced = synced
        return (y, y.view_as(y)) if splits else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dy_skip: Tensor | None = None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        mask, x, statistics, weight, bias, shortcut, statistics_s, weight_s, bias_s = ctx.saved_tensors
        mean, inverse, scale, _ = _vectors(statistics, weight, bias)
        mean_s, inverse_s, scale_s, _ = _vectors(statistics_s, weight_s, bias_s)
        g, sums = batch_norm_add_reduce(dy, dy_skip, mask, x, mean, inverse, shortcut, mean_s, inverse_s)
        (dbias, dweight, dweight_s), count = _over_ranks(sums, x, ctx.synced)
        dx, dshortcut = batch_norm_input_gradients(
            *(g, x, mean, inverse, scale, dbias, dweight),
            *(shortcut, mean_s, inverse_s, scale_s, dweight_s, count),
        )
        dbias, dweight, dweight_s = _of_parameters(sums, weight.dtype)
        # A memory each for the gradients of both, which may be written to.
        return None, None, dx, None, dweight, dbias, None, dshortcut, None, dweight_s, dbias.clone()


class _NormReluPool(torch.autograd.Function):
    """Max pooling of ReLU(BatchNorm(x)), given out twice."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, synced: bool
    ) -> tuple[Tensor, Tensor]:
        y, choice = batch_norm_relu_pool(x, *_vectors(statistics, weight, bias))
        ctx.save_for_backward(x, choice, statistics, weight, bias)
        ctx.synced = synced
        return y, y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dy_skip: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, choice, statistics, weight, bias = ctx.saved_tensors
        vectors = _vectors(statistics, weight, bias)
        sums = batch_norm_relu_pool_reduce(dy, dy_skip, choice, x, *vectors)
        (dbias, dweight), count = _over_ranks(sums, x, ctx.synced)
        dx = batch_norm_relu_pool_input_gradient(dy, dy_skip, choice, x, *vectors, dbias, dweight, count)
        dbias, dweight = _of_parameters(sums, weight.dtype)
        return dx, None, dweight, dbias, None
