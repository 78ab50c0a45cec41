"""BatchNorm in training mode followed by ReLU, in channels-last memory, streamed in two passes each way.

With rows r = (n, h, w) and channels c, R rows in all::

    mean_c, var_c = mean and biased variance over rows          (Ioffe & Szegedy, 2015)
    z_rc = (x_rc - mean_c) scale_c + bias_c,  scale_c = weight_c / sqrt(var_c + eps)
    y_rc = max(z_rc, 0)

    g_rc   = dy_rc 1[z_rc > 0],  xhat_rc = (x_rc - mean_c) / sqrt(var_c + eps)
    dbias_c = sum_r g_rc,  dweight_c = sum_r g_rc xhat_rc
    dx_rc  = scale_c (g_rc - dbias_c / R - xhat_rc dweight_c / R)

The mask is computed again from x, which backward reads anyway, so y is not kept for it. Statistics are sums of
differences from the first row: near the mean, so that nothing cancels where the mean is large against the deviation.

Bytes: forward reads x twice and writes y, backward reads x and dy twice and writes dx; ``torch.compile`` reads y in
backward as well, for the mask. On the CPU plain torch operations stand in. Nothing here has been measured on a GPU, and
no encoder uses it yet: statistics are those of one rank, and BatchNorm + add + ReLU is not covered.
"""

# Triton's language is typed for its own compiler, not for a type checker.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cast_kernels.launch import Launch, check_kernel_dtype, check_same_device, check_shape, device_properties

ELEMENTS = 4096
"""Elements of a tile."""
WIDEST = 64
"""Channels of a tile: 128 bytes of bfloat16, a line of the cache."""


@triton.jit
def _preactivation(x, mean, scale, bias):
    return (x - mean) * scale + bias


@triton.jit
def _statistics_kernel(x, partial, rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums over some rows of x - x_0 and of its square → partial (programs, 2, C)."""
    program, column = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    shift = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    first = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(program * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        there = (row < rows)[:, None] & inside[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * channels + column[None, :], mask=there, other=0.0)
        difference = tl.where(there, value.to(tl.float32) - shift[None, :], 0.0)
        first += difference
        second += difference * difference
    out = partial + program * 2 * channels + column
    tl.store(out, tl.sum(first, axis=0), mask=inside)
    tl.store(out + channels, tl.sum(second, axis=0), mask=inside)


@triton.jit
def _normalise_kernel(x, mean, scale, bias, y, rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    there = (row < rows)[:, None] & inside[None, :]
    place = row[:, None] * channels + column[None, :]
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    centre = tl.load(mean + column, mask=inside, other=0.0)[None, :]
    factor = tl.load(scale + column, mask=inside, other=0.0)[None, :]
    offset = tl.load(bias + column, mask=inside, other=0.0)[None, :]
    z = _preactivation(value, centre, factor, offset)
    # Not a maximum: NaN passes through, as in torch.
    tl.store(y + place, tl.where(z <= 0.0, 0.0, z).to(y.dtype.element_ty), mask=there)


@triton.jit
def _reduce_kernel(dy, x, mean, scale, bias, partial, rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums over some rows of g and of g (x - mean) → partial (programs, 2, C)."""
    program, column = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    centre = tl.load(mean + column, mask=inside, other=0.0)[None, :]
    factor = tl.load(scale + column, mask=inside, other=0.0)[None, :]
    offset = tl.load(bias + column, mask=inside, other=0.0)[None, :]
    first = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(program * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        there = (row < rows)[:, None] & inside[None, :]
        place = row.to(tl.int64)[:, None] * channels + column[None, :]
        value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        upstream = tl.load(dy + place, mask=there, other=0.0).to(tl.float32)
        masked = tl.where(_preactivation(value, centre, factor, offset) <= 0.0, 0.0, upstream)
        first += masked
        second += masked * (value - centre)
    out = partial + program * 2 * channels + column
    tl.store(out, tl.sum(first, axis=0), mask=inside)
    tl.store(out + channels, tl.sum(second, axis=0), mask=inside)


@triton.jit
def _apply_kernel(
    dy, x, mean, scale, bias, constant, slope, dx, rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dx = scale g - constant - slope (x - mean)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    there = (row < rows)[:, None] & inside[None, :]
    place = row[:, None] * channels + column[None, :]
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    upstream = tl.load(dy + place, mask=there, other=0.0).to(tl.float32)
    centre = tl.load(mean + column, mask=inside, other=0.0)[None, :]
    factor = tl.load(scale + column, mask=inside, other=0.0)[None, :]
    offset = tl.load(bias + column, mask=inside, other=0.0)[None, :]
    level = tl.load(constant + column, mask=inside, other=0.0)[None, :]
    tilt = tl.load(slope + column, mask=inside, other=0.0)[None, :]
    masked = tl.where(_preactivation(value, centre, factor, offset) <= 0.0, 0.0, upstream)
    gradient = factor * masked - level - tilt * (value - centre)
    tl.store(dx + place, gradient.to(dx.dtype.element_ty), mask=there)


def _plan(kernel: Any, tensors: tuple[Tensor, ...], like: Tensor, programs: int | None) -> Launch:
    """A launch over the rows and channels of ``like``; ``programs`` bounds the row programs of a reduction."""
    channels = like.shape[1]
    rows = like.numel() // channels
    block_c = min(triton.next_power_of_2(channels), WIDEST)
    block_r = ELEMENTS // block_c
    row_programs = triton.cdiv(rows, block_r) if programs is None else programs
    constants = {"BLOCK_R": block_r, "BLOCK_C": block_c}
    return Launch(kernel, (row_programs, triton.cdiv(channels, block_c)), (*tensors, rows, channels), constants, 8)


def _partial_programs(like: Tensor) -> int:
    """Row programs of a reduction: the GPU filled four times over, and no more than there are tiles."""
    channels = like.shape[1]
    block_c = min(triton.next_power_of_2(channels), WIDEST)
    tiles = triton.cdiv(like.numel() // channels, ELEMENTS // block_c)
    wanted = triton.cdiv(4 * device_properties(like.device)[1], triton.cdiv(channels, block_c))
    return max(1, min(tiles, wanted))


def launch_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and biased variance, by the kernels; x is channels-last."""
    count, programs = x.numel() // x.shape[1], _partial_programs(x)
    partial = x.new_empty((programs, 2, x.shape[1]), dtype=torch.float32)
    _plan(_statistics_kernel, (x, partial), x, programs).run()
    first, second = (partial.sum(0) / count).unbind()
    mean, var = x[0, :, 0, 0].float() + first, (second - first * first).clamp(min=0)
    scale = weight.float() * (var + eps).rsqrt()
    y = torch.empty_like(x)
    _plan(_normalise_kernel, (x, mean, scale, bias.float(), y), x, None).run()
    return y, mean, var


def launch_backward(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias, by the kernels; x and dy are channels-last."""
    count, programs = x.numel() // x.shape[1], _partial_programs(x)
    rstd = (var + eps).rsqrt()
    scale, offset = weight.float() * rstd, bias.float()
    partial = x.new_empty((programs, 2, x.shape[1]), dtype=torch.float32)
    _plan(_reduce_kernel, (dy, x, mean, scale, offset, partial), x, programs).run()
    dbias, tilted = partial.sum(0).unbind()
    dx = torch.empty_like(x)
    constant, slope = scale * dbias / count, scale * rstd * rstd * tilted / count
    _plan(_apply_kernel, (dy, x, mean, scale, offset, constant, slope, dx), x, None).run()
    return dx, (tilted * rstd).to(weight.dtype), dbias.to(bias.dtype)


@torch.library.custom_op("cast_kernels::batch_norm_relu", mutates_args=(), device_types="cuda")
def _operator(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(x, weight, bias, eps)


@_operator.register_kernel("cpu")
def _operator_cpu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(_wide(x))
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    scale = weight.to(wide.dtype) * (var + eps).rsqrt()
    z = (wide - mean[:, None, None]) * scale[:, None, None] + bias.to(wide.dtype)[:, None, None]
    return z.relu().to(x.dtype), mean, var


@_operator.register_fake
def _operator_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    del weight, bias, eps
    statistics = x.new_empty((2, x.shape[1]), dtype=_wide(x))
    return torch.empty_like(x), statistics[0].clone(), statistics[1].clone()


@torch.library.custom_op("cast_kernels::batch_norm_relu_backward", mutates_args=(), device_types="cuda")
def _operator_backward(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(dy, x, mean, var, weight, bias, eps)


@_operator_backward.register_kernel("cpu")
def _operator_backward_cpu(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    count = x.numel() // x.shape[1]
    rstd = (var + eps).rsqrt()
    scale = weight.to(mean.dtype) * rstd
    centred = x.to(mean.dtype) - mean[:, None, None]
    z = centred * scale[:, None, None] + bias.to(mean.dtype)[:, None, None]
    masked = torch.where(z <= 0, 0, dy.to(mean.dtype))
    dbias, tilted = masked.sum((0, 2, 3)), (masked * centred).sum((0, 2, 3))
    level, tilt = scale * dbias / count, scale * rstd * rstd * tilted / count
    dx = scale[:, None, None] * masked - level[:, None, None] - tilt[:, None, None] * centred
    return dx.to(x.dtype), (tilted * rstd).to(weight.dtype), dbias.to(bias.dtype)


@_operator_backward.register_fake
def _operator_backward_fake(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    del dy, mean, var, eps
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, output[1], output[2], weight, bias)


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, mean, var, weight, bias = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)
    return *_operator_backward(dy, x, mean, var, weight, bias, ctx.eps), None


_operator.register_autograd(_backward, setup_context=_setup_context)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm over the batch's own statistics, then ReLU.

    Args:
        x: (N, C, H, W), bfloat16, float16 or float32 (on the CPU also float64), not empty; copied once where it is not
            channels-last.
        weight, bias: (C,).
        eps: added to the variance.

    Returns:
        y (N, C, H, W) in the dtype of x, channels-last; mean (C,) and biased variance (C,) in float32 (float64 for
        float64), without gradient, for the caller's running statistics. Differentiable once in x, weight and bias.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, C, H, W), not empty")
    check_kernel_dtype("x", x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_shape(name, tensor, (x.shape[1],), "(C,)")
    check_same_device("x", x, weight=weight, bias=bias)
    return _operator(x.contiguous(memory_format=torch.channels_last), weight, bias, eps)
