"""The truth of every operator in this package, in plain unfused PyTorch.

Each function has the name and the meaning of an operator of ``cast_kernels``. It runs on any device and in any
floating-point type: computation is in float32, or in float64 when an input is float64, so that tests compare kernels
with a float64 run of the same code. Ordinary autograd differentiates everything, unless a docstring says otherwise.

Grad-CAM is Selvaraju et al., ICCV 2017; the attention loss and the step around it are CAST (Selvaraju, Desai, Johnson,
Naik, CVPR 2021); InfoNCE with a queue of keys is MoCo (He et al., CVPR 2020); BatchNorm is Ioffe & Szegedy, ICML 2015.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIXED_MAXIMUM_TEMPERATURE = 0.03
"""From this temperature on, exp((q·k - 1) / T) of unit vectors is at least exp(-2 / 0.03) = 1e-29: float32 and bfloat16
hold it, so 1 / T serves as the maximum of every softmax and partial results simply add."""


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The type a reference computes in: float64 if any input is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def cosine_loss(cam: Tensor, saliency: Tensor) -> Tensor:
    """Per-sample ``1 - cos(cam, saliency)`` over all positions.

    Args:
        cam, saliency: (N, H, W), one floating-point type.

    Returns:
        (N,). A sample whose ``cam`` or ``saliency`` is zero everywhere has loss 1 and zero gradient.
    """
    cam_unit, cam_zero = _unit_rows(cam.flatten(1))
    saliency_unit, saliency_zero = _unit_rows(saliency.flatten(1))
    cosine = (cam_unit * saliency_unit).sum(1)
    return 1 - torch.where(cam_zero | saliency_zero, torch.zeros_like(cosine), cosine)


def _unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their norm, and which rows are all zero (those stay as they are)."""
    # Squares of very small or very large entries leave float32; the unit vector does not depend on the scale.
    scale = rows.detach().abs().amax(1, keepdim=True)
    zero = scale == 0
    scaled = rows / torch.where(zero, torch.ones_like(scale), scale)
    square = (scaled * scaled).sum(1, keepdim=True)
    return scaled / torch.where(zero, torch.ones_like(square), square).sqrt(), zero.squeeze(1)


def gradcam_cosine(
    activations: Tensor, alpha: Tensor, saliency: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Grad-CAM map and its cosine distance from a saliency map.

    ``cam = ReLU(sum_c alpha_c A_c)``, ``loss = weight * (1 - cos(cam, saliency))``.

    Args:
        activations: A, (N, C, H, W), any memory format.
        alpha: (N, C), the channel weights.
        saliency: (N, H, W).
        weight: (N,) or None for ones.

    Returns:
        loss (N,) and cam (N, H, W), float32 (float64 if an input is).
    """
    dtype = wide_dtype(activations, alpha, saliency)
    cam = torch.einsum("nchw,nc->nhw", activations.to(dtype), alpha.to(dtype)).relu()
    loss = cosine_loss(cam, saliency.to(dtype))
    return (loss if weight is None else loss * weight), cam


def gradcam_cosine_from_gradient(
    activations: Tensor, gradient: Tensor, saliency: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``gradcam_cosine`` with ``alpha`` the spatial mean of ``gradient``, ∂d/∂A (N, C, H, W); differentiable in it."""
    dtype = wide_dtype(activations, gradient, saliency)
    return gradcam_cosine(activations, gradient.to(dtype).mean((2, 3)), saliency, weight)


class GradcamTerms(NamedTuple):
    """Loss, map and the derivatives that one sweep over the activations can yield."""

    loss: Tensor
    """(N,) 1 - cos(cam, saliency)."""
    cam: Tensor
    """(N, H, W) ReLU(sum_c alpha_c A_c)."""
    slope: Tensor
    """(N, H, W) derivative of the loss with respect to sum_c alpha_c A_c (before the ReLU)."""
    alpha_gradient: Tensor
    """(N, C) derivative of the loss with respect to alpha."""


def gradcam_terms(activations: Tensor, alpha: Tensor, saliency: Tensor) -> GradcamTerms:
    """The loss and its derivatives by formula, without autograd: what the kernel computes, step by step.

    With m = cam / |cam| and t = saliency / |saliency|: slope = 1[cam > 0] (cos · m - t) / |cam|, and
    alpha_gradient_c = sum_hw slope A_c. Shapes as in ``gradcam_cosine``; all-zero rows give loss 1 and zeros.
    """
    dtype = wide_dtype(activations, alpha, saliency)
    wide = activations.to(dtype)
    cam = torch.einsum("nchw,nc->nhw", wide, alpha.to(dtype)).relu()
    rows, target = cam.flatten(1), saliency.to(dtype).flatten(1)
    cam_unit, cam_zero = _unit_rows(rows)
    target_unit, target_zero = _unit_rows(target)
    zero = cam_zero | target_zero
    cosine = torch.where(zero, torch.zeros_like(rows[:, 0]), (cam_unit * target_unit).sum(1))
    slope = (cosine[:, None] * cam_unit - target_unit) / _row_norms(rows)[:, None]
    slope = torch.where(zero[:, None] | (rows <= 0), torch.zeros_like(slope), slope).view_as(cam)
    return GradcamTerms(1 - cosine, cam, slope, torch.einsum("nchw,nhw->nc", wide, slope))


def saliency_gradient(cam: Tensor, saliency: Tensor) -> Tensor:
    """Derivative of ``cosine_loss(cam, saliency)`` with respect to ``saliency``, (N, H, W), by formula."""
    rows, target = cam.flatten(1), saliency.to(cam.dtype).flatten(1)
    cam_unit, cam_zero = _unit_rows(rows)
    target_unit, target_zero = _unit_rows(target)
    cosine = (cam_unit * target_unit).sum(1, keepdim=True)
    gradient = (cosine * target_unit - cam_unit) / _row_norms(target)[:, None]
    return torch.where((cam_zero | target_zero)[:, None], torch.zeros_like(gradient), gradient).view_as(cam)


def _row_norms(rows: Tensor) -> Tensor:
    """Euclidean norm of each row without overflow or underflow of the squares; 1 for a row of zeros."""
    scale = rows.abs().amax(1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    norm = scale * (rows / scale[:, None]).square().sum(1).sqrt()
    return torch.where(norm == 0, torch.ones_like(norm), norm)


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE with one positive and a queue of negatives.

    ``loss = -log(exp(q·k / T) / (exp(q·k / T) + sum_j exp(q·queue_j / T)))``; ``query`` and ``key`` are first rounded
    to the queue's type, as a key is when it is enqueued.

    Args:
        query, key: (N, D), rows of unit length.
        queue: (K, D), rows of unit length; no gradient.
        temperature: T > 0.

    Returns:
        loss (N,), float32 (float64 if an input is), and beaten (N,) int64: the negatives with a larger logit than the
        positive, so that contrastive top-k accuracy is the share of ``beaten < k``.
    """
    dtype = wide_dtype(query, key, queue)
    q, k = _rounded(query, queue.dtype, dtype), _rounded(key, queue.dtype, dtype)
    positive = (q * k).sum(1, keepdim=True)
    negatives = q @ queue.detach().to(dtype).T
    logits = torch.cat([positive, negatives], 1) / temperature
    return logits.logsumexp(1) - logits[:, 0], (negatives > positive).sum(1)


class Partials(NamedTuple):
    """What one shard of the queue contributes to InfoNCE. Partials with the same ``maximum`` simply add."""

    total: Tensor
    """(N,) sum_j exp(q·queue_j / T - maximum)."""
    weighted: Tensor
    """(N, D) sum_j exp(q·queue_j / T - maximum) queue_j."""
    beaten: Tensor
    """(N,) int64, negatives with a larger logit than the positive."""
    maximum: Tensor
    """(N,) what was subtracted in the exponent: 1 / T, or the largest logit (-inf for an empty shard)."""


def has_fixed_maximum(temperature: float, queue_dtype: torch.dtype) -> bool:
    """Whether 1 / T serves as the maximum: T large enough, and not float16, whose weights would underflow."""
    return temperature >= FIXED_MAXIMUM_TEMPERATURE and queue_dtype != torch.float16


def info_nce_partials(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Partials:
    """The contribution of ``queue``, one shard of a larger queue; arguments as in ``info_nce``. Not differentiable."""
    dtype = wide_dtype(query, key, queue)
    with torch.no_grad():
        q, k = query.to(queue.dtype).to(dtype), key.to(queue.dtype).to(dtype)
        positive = (q * k).sum(1, keepdim=True)
        negatives = q @ queue.to(dtype).T
        logits = negatives / temperature
        if has_fixed_maximum(temperature, queue.dtype):
            maximum = logits.new_full((len(q),), 1 / temperature)
        elif len(queue):
            maximum = logits.amax(1)
        else:
            maximum = logits.new_full((len(q),), -math.inf)
        weights = (logits - maximum[:, None]).exp()
        return Partials(weights.sum(1), weights @ queue.to(dtype), (negatives > positive).sum(1), maximum)


def merge_partials(partials: Sequence[Partials]) -> Partials:
    """Partials of the union of shards; added in the order given, so the result is reproducible."""
    maximum = torch.stack([part.maximum for part in partials]).amax(0)
    total = torch.zeros_like(partials[0].total)
    weighted = torch.zeros_like(partials[0].weighted)
    beaten = torch.zeros_like(partials[0].beaten)
    for part in partials:
        # Two empty shards: -inf - -inf is NaN where the factor of a sum of nothing is 1.
        factor = torch.where(part.maximum == maximum, torch.ones_like(maximum), (part.maximum - maximum).exp())
        total = total + part.total * factor
        weighted = weighted + part.weighted * factor[:, None]
        beaten = beaten + part.beaten
    return Partials(total, weighted, beaten, maximum)


class InfoNCETerms(NamedTuple):
    """Loss and the derivatives that one pass over the queue can yield."""

    loss: Tensor
    """(N,)"""
    query_gradient: Tensor
    """(N, D) derivative of the loss with respect to the query."""
    negative_probability: Tensor
    """(N,) 1 - p⁺, the probability of all negatives together."""


def info_nce_terms(
    query: Tensor, key: Tensor, partials: Partials, temperature: float, queue_dtype: torch.dtype
) -> InfoNCETerms:
    """Loss and ∂loss/∂query from the partials of the whole queue, by formula.

    With S = sum_j exp(l_j - m) and U = sum_j exp(l_j - m) queue_j: loss = softplus(m + log S - l⁺), 1 - p⁺ is its
    derivative (the logistic function), and ∂loss/∂q = (1 - p⁺) (U / S - k) / T.
    """
    dtype = wide_dtype(query, key, partials.total)
    q, k = query.to(queue_dtype).to(dtype), key.to(queue_dtype).to(dtype)
    positive = (q * k).sum(1) / temperature
    margin = partials.maximum + partials.total.log() - positive
    probability = torch.sigmoid(margin)
    empty = partials.total == 0
    mean = partials.weighted / torch.where(empty, torch.ones_like(partials.total), partials.total)[:, None]
    gradient = probability[:, None] * (mean - k) / temperature
    # Not torch's softplus, which drops the tail beyond its threshold.
    loss = torch.logaddexp(margin, torch.zeros_like(margin))
    return InfoNCETerms(loss, gradient, probability)


def info_nce_combine(
    query: Tensor, key: Tensor, partials: Sequence[Partials], temperature: float, queue_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``info_nce`` from the partials of all shards, with its gradients in query and key.

    The sums are constants to autograd. Around the query S has the value given and the derivative U / T, so a term that
    is zero with that derivative makes everything else an ordinary expression.
    """
    merged = merge_partials(partials)
    dtype = wide_dtype(query, key, merged.total)
    q, k = _rounded(query, queue_dtype, dtype), _rounded(key, queue_dtype, dtype)
    empty = merged.total == 0
    total = torch.where(empty, torch.ones_like(merged.total), merged.total)
    total = total + ((q - q.detach()) * merged.weighted).sum(1) / temperature
    # Only an empty queue has no weight at all; its maximum may be -inf.
    maximum = torch.where(empty, torch.zeros_like(merged.maximum), merged.maximum)
    margin = maximum + total.log() - (q * k).sum(1) / temperature
    loss = torch.logaddexp(margin, torch.zeros_like(margin))
    return torch.where(empty, torch.zeros_like(loss), loss), merged.beaten


def _rounded(tensor: Tensor, narrow: torch.dtype, wide: torch.dtype) -> Tensor:
    """The tensor rounded to ``narrow``, in ``wide``; to autograd the rounding is the identity."""
    exact = tensor.to(wide)
    return exact + (exact.detach().to(narrow).to(wide) - exact.detach())


def batch_norm_statistics(x: Tensor, eps: float, parts: int = 1) -> Tensor:
    """Mean and biased variance of every channel, and 1 / sqrt(variance + eps), the inverse.

    x is (N, C, H, W). Of ``parts`` equal runs of samples each has its own: (3, C), or (3, parts, C) for more than one.
    In all functions below statistics, dbias and dweight are (C,) or (parts, C) likewise; weight and bias are (C,).
    """
    wide = x.to(wide_dtype(x))
    if parts > 1:
        variance, mean = torch.var_mean(wide.unflatten(0, (parts, -1)), (1, 3, 4), correction=0)
    else:
        variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return torch.stack([mean, variance, torch.rsqrt(variance + eps)])


def batch_norm_apply(
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor | None = None,
    shortcut_mean: Tensor | None = None,
    shortcut_inverse: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
) -> Tensor:
    """Normalise, add the shortcut, ReLU; rounded once, at the end.

    ``z = (x - mean) inverse weight + bias``, to which ``shortcut`` is added, or the same of it and its own vectors;
    ``y = max(z, 0)``, and NaN stays NaN.

    Args:
        x, shortcut: (N, C, H, W), one dtype.
        mean, inverse, weight, bias: in the dtype that is computed in.
        shortcut_mean, shortcut_inverse, shortcut_weight, shortcut_bias: likewise, all or none.

    Returns:
        y (N, C, H, W) in the dtype of x.
    """
    z = _normalised(x, mean, inverse) * _by_channel(weight, x) + _by_channel(bias, x)
    if shortcut is not None and shortcut_mean is not None:
        assert shortcut_inverse is not None and shortcut_weight is not None and shortcut_bias is not None
        normalised = _normalised(shortcut, shortcut_mean, shortcut_inverse) * _by_channel(shortcut_weight, x)
        z = z + (normalised + _by_channel(shortcut_bias, x))
    elif shortcut is not None:
        z = z + shortcut.to(z.dtype)
    return torch.where(z <= 0, 0, z).to(x.dtype)


def batch_norm_apply_mask(
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor,
    shortcut_mean: Tensor | None = None,
    shortcut_inverse: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``batch_norm_apply``, and where y is not zero (NaN is not) in bits.

    Returns:
        y, and (N, ceil(C / 8), H, W) uint8: channel c is bit c mod 8 of byte c // 8, bits without a channel are 0.
    """
    others = (shortcut_mean, shortcut_inverse, shortcut_weight, shortcut_bias)
    y = batch_norm_apply(x, mean, inverse, weight, bias, shortcut, *others)
    passes = F.pad((~(y <= 0)).int(), (0, 0, 0, 0, 0, -y.shape[1] % 8)).unflatten(1, (-1, 8))
    return y, (passes << _bits(y)).sum(2).to(torch.uint8)


def _bits(like: Tensor) -> Tensor:
    """0 to 7, (8, 1, 1)."""
    return torch.arange(8, device=like.device, dtype=torch.int32)[:, None, None]


def batch_norm_relu_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """dbias and dweight, (2, C): sums over N, H, W of g and of g (x - mean) inverse.

    g is dy wherever ``batch_norm_apply`` is not zero.
    """
    g = _masked(dy.to(mean.dtype), batch_norm_apply(x, mean, inverse, weight, bias))
    return _sums(mean, g, _normalised(x, mean, inverse))


def batch_norm_relu_input_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    bias: Tensor,
    dbias: Tensor,
    dweight: Tensor,
    count: int,
) -> Tensor:
    """The gradient of BatchNorm and ReLU with respect to x, in the dtype of x.

    ``weight inverse (g - dbias / count - (x - mean) inverse dweight / count)`` with g as in ``batch_norm_relu_reduce``,
    and dbias and dweight from there; count is the number of values that each of them is a sum of.
    """
    g = _masked(dy.to(mean.dtype), batch_norm_apply(x, mean, inverse, weight, bias))
    return _input_gradient(g, x, mean, inverse, weight, dbias, dweight, count)


def batch_norm_add_reduce(
    dy: Tensor,
    dy_skip: Tensor | None,
    mask: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    shortcut: Tensor | None = None,
    shortcut_mean: Tensor | None = None,
    shortcut_inverse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient behind the last ReLU of a residual block, dbias and dweight.

    Args:
        dy, dy_skip: (N, C, H, W), the gradients of the block's output y from its one or two readers.
        mask: where y is not zero, from ``batch_norm_apply_mask``.
        x, mean, inverse: of the last BatchNorm.
        shortcut, shortcut_mean, shortcut_inverse: of the BatchNorm in the shortcut, where there is one.

    Returns:
        g (N, C, H, W), ``dy + dy_skip`` where y is not zero, rounded once to the dtype of x, and the sums of what was
        rounded: of g, of g (x - mean) inverse and, with a shortcut, of g (shortcut - shortcut_mean) shortcut_inverse;
        (2, C) or (3, C).
    """
    passes = ((mask[:, :, None] >> _bits(x)) & 1).flatten(1, 2)[:, : x.shape[1]]
    g = torch.where(passes == 0, 0, _joined(dy, dy_skip, mean.dtype)).to(x.dtype)
    factors = [_normalised(x, mean, inverse)]
    if shortcut is not None and shortcut_mean is not None:
        assert shortcut_inverse is not None
        factors.append(_normalised(shortcut, shortcut_mean, shortcut_inverse))
    return g, _sums(mean, g.to(mean.dtype), *factors)


def batch_norm_input_gradient(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    dbias: Tensor,
    dweight: Tensor,
    count: int,
) -> Tensor:
    """``batch_norm_relu_input_gradient`` for a g that is masked already."""
    return _input_gradient(g.to(mean.dtype), x, mean, inverse, weight, dbias, dweight, count)


def batch_norm_input_gradients(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    dbias: Tensor,
    dweight: Tensor,
    shortcut: Tensor,
    shortcut_mean: Tensor,
    shortcut_inverse: Tensor,
    shortcut_weight: Tensor,
    shortcut_dweight: Tensor,
    count: int,
) -> tuple[Tensor, Tensor]:
    """``batch_norm_input_gradient`` of both BatchNorms that a residual block adds up; dbias is that of both."""
    other = (shortcut, shortcut_mean, shortcut_inverse, shortcut_weight, dbias, shortcut_dweight)
    return (
        batch_norm_input_gradient(g, x, mean, inverse, weight, dbias, dweight, count),
        batch_norm_input_gradient(g, *other, count),
    )


def batch_norm_relu_pool(
    x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """``batch_norm_apply``, then max pooling 3x3 with stride 2 and padding 1.

    Returns:
        y (N, C, (H + 1) // 2, (W + 1) // 2) in the dtype of x, and choice, uint8, of the same shape: 3 · row + column
        of the chosen pixel in its window. torch's rule: the first largest in raster order, the last NaN if there is
        any.
    """
    full = batch_norm_apply(x, mean, inverse, weight, bias)
    y, index = F.max_pool2d(full.to(mean.dtype), 3, 2, 1, return_indices=True)
    width = x.shape[3]
    top = 2 * torch.arange(y.shape[2], device=x.device)[:, None] - 1
    left = 2 * torch.arange(y.shape[3], device=x.device) - 1
    row, column = torch.div(index, width, rounding_mode="floor"), index % width
    return y.to(x.dtype), (3 * (row - top) + column - left).to(torch.uint8)


def batch_norm_relu_pool_reduce(
    dy: Tensor,
    dy_skip: Tensor | None,
    choice: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """dbias and dweight, (2, C): g is the gradient through the pool and ReLU, from ``dy + dy_skip``.

    dy, dy_skip and choice have the shape of the pool's output. Nothing is rounded in between.
    """
    g = _unpooled(dy, dy_skip, choice, x, mean, inverse, weight, bias)
    return _sums(mean, g, _normalised(x, mean, inverse))


def batch_norm_relu_pool_input_gradient(
    dy: Tensor,
    dy_skip: Tensor | None,
    choice: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    bias: Tensor,
    dbias: Tensor,
    dweight: Tensor,
    count: int,
) -> Tensor:
    """``batch_norm_relu_input_gradient`` with g as in ``batch_norm_relu_pool_reduce``."""
    g = _unpooled(dy, dy_skip, choice, x, mean, inverse, weight, bias)
    return _input_gradient(g, x, mean, inverse, weight, dbias, dweight, count)


def _by_channel(vector: Tensor, x: Tensor) -> Tensor:
    """(C,) or (P, C) in a shape that broadcasts over x, (N, C, H, W)."""
    if vector.dim() == 1:
        return vector[:, None, None]
    return vector.repeat_interleave(x.shape[0] // vector.shape[0], 0)[:, :, None, None]


def _normalised(x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    return (x.to(mean.dtype) - _by_channel(mean, x)) * _by_channel(inverse, x)


def _joined(dy: Tensor, dy_skip: Tensor | None, dtype: torch.dtype) -> Tensor:
    return dy.to(dtype) if dy_skip is None else dy.to(dtype) + dy_skip.to(dtype)


def _masked(g: Tensor, y: Tensor) -> Tensor:
    """g where the output y of a ReLU is not zero; a NaN in y lets g pass, as in torch."""
    return torch.where(y <= 0, 0, g)


def _sums(mean: Tensor, g: Tensor, *factors: Tensor) -> Tensor:
    """Sums of g and of its products, stacked, each like ``mean``."""
    terms = [g, *(g * factor for factor in factors)]
    if mean.dim() == 1:
        return torch.stack([term.sum((0, 2, 3)) for term in terms])
    return torch.stack([term.unflatten(0, (mean.shape[0], -1)).sum((1, 3, 4)) for term in terms])


def _input_gradient(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    dbias: Tensor,
    dweight: Tensor,
    count: int,
) -> Tensor:
    rest = _by_channel(dbias, x) + _normalised(x, mean, inverse) * _by_channel(dweight, x)
    return ((g - rest / count) * _by_channel(inverse, x) * _by_channel(weight, x)).to(x.dtype)


def _unpooled(
    dy: Tensor,
    dy_skip: Tensor | None,
    choice: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """The gradient before pool and ReLU, scattered: (N, C, H, W) in the dtype of mean."""
    height, width = x.shape[2:]
    tap = choice.to(torch.int64)
    row = 2 * torch.arange(choice.shape[2], device=x.device)[:, None] - 1 + torch.div(tap, 3, rounding_mode="floor")
    column = 2 * torch.arange(choice.shape[3], device=x.device) - 1 + tap % 3
    flat = torch.zeros((*x.shape[:2], height * width), dtype=mean.dtype, device=x.device)
    flat.scatter_add_(2, (row * width + column).flatten(2), _joined(dy, dy_skip, mean.dtype).flatten(2))
    return _masked(flat.view(x.shape), batch_norm_apply(x, mean, inverse, weight, bias))


class TrunkAndHead(Protocol):
    """An encoder whose activations can be reached: images → ``trunk`` → spatial mean → ``head`` → normalisation."""

    @property
    def trunk(self) -> nn.Module:
        """Images (N, 3, S, S) → activations (N, C, H, W)."""
        ...

    @property
    def head(self) -> nn.Module:
        """(N, C) → (N, D)."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, in the same order for query and key encoder."""
        ...


class StepLosses(NamedTuple):
    """What a formulation of the whole objective returns; ``loss`` carries the graph of every parameter's gradient."""

    loss: Tensor
    """0-dimensional: the total."""
    contrastive: Tensor
    """0-dimensional: mean InfoNCE loss."""
    attention: Tensor
    """0-dimensional: mean attention loss."""
    cam: Tensor
    """(N, H, W): the Grad-CAM map."""
    keys: Tensor
    """(N, D): the keys to enqueue."""


def plain_cast_objective(
    trunk: nn.Module,
    head: nn.Module,
    images: Tensor,
    key: Tensor,
    masked_key: Tensor,
    queue: Tensor,
    saliency: Tensor,
    *,
    temperature: float,
    lam: float,
    average: bool = True,
    weight: Tensor | None = None,
) -> StepLosses:
    """The objective of CAST as its paper writes it: Grad-CAM by autograd, differentiated a second time.

    One forward pass; ∂d/∂A by ``autograd.grad(create_graph=True)``, with nothing detached; per-sample cosine.

    Args:
        trunk: images → (N, C, H, W) activations.
        head: spatial mean of the activations (N, C) → (N, D).
        images: (N, 3, S, S), normalised.
        key: (N, D) normalised keys.
        masked_key: (N, D) normalised masked keys.
        queue: (K, D) normalised negatives.
        saliency: (N, H, W) in [0, 1].
        temperature: of InfoNCE.
        lam: weight of the attention loss.
        average: divide the sum of the losses by 1 + ``lam``.
        weight: (N,) weights of the samples in the attention loss; 1 by default.
    """
    activations = trunk(images)
    embedding = F.normalize(head(activations.mean((2, 3))), dim=1)
    similarity = (embedding * masked_key).sum(1)
    if weight is not None:
        similarity = similarity[weight > 0]
    (gradient,) = torch.autograd.grad(similarity.sum(), activations, create_graph=True)
    cam = (activations * gradient.mean((2, 3), keepdim=True)).sum(1).relu()
    loss = 1 - F.cosine_similarity(cam.flatten(1), saliency.flatten(1), dim=1)
    attention = loss.mean() if weight is None else (loss * weight).sum() / weight.sum()
    contrastive = _cross_entropy(embedding, key, queue, temperature)
    total = (contrastive + lam * attention) / (1 + lam if average else 1)
    return StepLosses(total, contrastive, attention, cam, key)


def _cross_entropy(embedding: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy over materialised logits, the positive in column 0."""
    logits = torch.cat([(embedding * key).sum(1, keepdim=True), embedding @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def one_pass_step_losses(
    query: TrunkAndHead,
    key: TrunkAndHead,
    queue: Tensor,
    query_images: Tensor,
    key_images: Tensor,
    masked_key_images: Tensor,
    saliency: Tensor,
    *,
    temperature: float,
    lam: float,
) -> StepLosses:
    """Losses of a step with one forward pass of the query encoder and Grad-CAM by double backward.

    Args:
        query, key: the encoders, in train mode.
        queue: (K, D) normalised negatives.
        query_images, key_images, masked_key_images: (N, 3, S, S), normalised.
        saliency: (N, H, W) in [0, 1].
        temperature: of InfoNCE.
        lam: weight of the attention loss.
    """
    with torch.no_grad():
        keys = _embed(key, key_images)
        masked_keys = _embed(key, masked_key_images)
    return plain_cast_objective(
        query.trunk, query.head, query_images, keys, masked_keys, queue, saliency, temperature=temperature, lam=lam
    )


def published_step_losses(
    query: TrunkAndHead,
    key: TrunkAndHead,
    queue: Tensor,
    query_images: Tensor,
    key_images: Tensor,
    masked_key_images: Tensor,
    saliency: Tensor,
    *,
    temperature: float,
    lam: float,
    momentum: float,
) -> StepLosses:
    """Losses of a step as the authors released it, for comparison only; arguments as in ``one_pass_step_losses``.

    Its known quirks are kept: both encoders, the momentum update and the logits over the queue are run twice, once for
    the keys and once for the masked keys (so the momentum is in effect ``momentum``²), and the update allocates new
    weights; Grad-CAM differentiates the logit of the second pass; the map is scaled to [0, 1] before its ReLU, so that
    evidence against the match survives, and again after it; the cosine is taken over the whole batch at once.
    """
    logits, _, keys = _published_pass(query, key, queue, query_images, key_images, temperature, momentum)
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    contrastive = F.cross_entropy(logits, labels)
    masked_logits, activations, _ = _published_pass(
        query, key, queue, query_images, masked_key_images, temperature, momentum
    )
    positive = torch.zeros_like(masked_logits)
    positive[:, 0] = 1
    (gradient,) = torch.autograd.grad(masked_logits, activations, grad_outputs=positive, create_graph=True)
    cam = (activations * F.adaptive_avg_pool2d(gradient, 1)).sum(1)
    for _ in range(2):
        low = cam.flatten(1).amin(1)[:, None, None]
        cam = cam - low
        cam = (cam / (cam.flatten(1).amax(1)[:, None, None] + 1e-7)).relu()
    attention = 1 - F.cosine_similarity(cam.reshape(1, -1), saliency.to(cam.dtype).reshape(1, -1), dim=1).squeeze(0)
    return StepLosses((contrastive + lam * attention) / (1 + lam), contrastive, attention, cam, keys)


def _published_pass(
    query: TrunkAndHead,
    key: TrunkAndHead,
    queue: Tensor,
    query_images: Tensor,
    key_images: Tensor,
    temperature: float,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One call of the released model: logits (N, 1 + K), activations of the query encoder, keys (N, D)."""
    activations = query.trunk(query_images)
    embedding = F.normalize(query.head(activations.mean((2, 3))), dim=1)
    with torch.no_grad():
        for key_parameter, query_parameter in zip(key.parameters(), query.parameters()):
            key_parameter.data = key_parameter.data * momentum + query_parameter.data * (1 - momentum)
        keys = _embed(key, key_images)
    negatives = torch.einsum("nd,kd->nk", embedding, queue.clone().detach().to(embedding.dtype))
    logits = torch.cat([(embedding * keys).sum(1, keepdim=True), negatives], 1) / temperature
    return logits, activations, keys


def _embed(encoder: TrunkAndHead, images: Tensor) -> Tensor:
    """(N, D) normalised embeddings."""
    return F.normalize(encoder.head(encoder.trunk(images).mean((2, 3))), dim=1)
