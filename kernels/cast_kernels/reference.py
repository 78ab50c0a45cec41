"""The truth of every operator in this package, in plain unfused PyTorch.

Each function has the name and the meaning of an operator of ``cast_kernels``. It runs on any device and in any
floating-point type: computation is in float32, or in float64 when an input is float64, so that tests compare kernels
with a float64 run of the same code. Ordinary autograd differentiates everything, unless a docstring says otherwise.

Grad-CAM is Selvaraju et al., ICCV 2017; the attention loss and the step around it are CAST (Selvaraju, Desai, Johnson,
Naik, CVPR 2021); InfoNCE with a queue of keys is MoCo (He et al., CVPR 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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
    q, k = query.to(queue.dtype).to(dtype), key.to(queue.dtype).to(dtype)
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
    # max(margin, 0) + log1p(exp(-|margin|)) rather than torch's softplus, which drops the tail beyond its threshold.
    loss = margin.clamp(min=0) + torch.log1p(torch.exp(-margin.abs()))
    return InfoNCETerms(loss, gradient, probability)


def info_nce_combine(
    query: Tensor, key: Tensor, partials: Sequence[Partials], temperature: float, queue_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``info_nce``'s results from the partials of all shards. Not differentiable here (the operator is)."""
    merged = merge_partials(partials)
    return info_nce_terms(query, key, merged, temperature, queue_dtype).loss, merged.beaten
