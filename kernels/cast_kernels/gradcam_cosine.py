"""Grad-CAM map and its cosine loss, with every derivative, from one read of the activations.

Shapes: A (N, C, H, W) activations, alpha (N, C), s (N, H, W) saliency, P = H·W positions.

Forward, per sample::

    cam_p  = ReLU(sum_c alpha_c A_cp)
    cos    = <cam, s> / (|cam| |s|)
    loss   = 1 - cos                                  (1 with zero gradients where cam or s is zero everywhere)

Backward, with the upstream gradient of the sample's loss as a factor::

    slope_p = 1[cam_p > 0] (cos cam_p / |cam| - s_p / |s|) / |cam|
    dA_cp   = slope_p alpha_c                         (rank one: ordinary operations, fused by Inductor)
    dalpha_c = sum_p slope_p A_cp
    ds_p    = (cos s_p / |s| - cam_p / |cam|) / |s|

dalpha needs A again, after cos and the norms are known; but it is linear in the two sums
``u_c = sum_p s_p 1[cam_p > 0] A_cp`` and ``v_c = sum_p cam_p A_cp``, and row p of A (all channels of one position) is
complete when cam_p is known. So one program takes one sample, reads A row by row, and keeps alpha, u and v in
registers: A is read once for the whole step, and backward does not read it at all.

The form ``gradcam_cosine_from_gradient`` takes ∂d/∂A instead of alpha (alpha is its spatial mean), for activations
that are not followed by pooling; the same program sweeps the gradient first.

Bytes, N = 256, C = 2048, 7×7, bfloat16: A 51.4 MB, alpha and dalpha 2.1 MB each in float32, maps 0.15 MB: 55.7 MB,
against 107 MB for separate forward and dalpha kernels. The form from the gradient reads 51.4 MB more.

Memory format: channels-last is the fast path (A rows are contiguous; 128-bit loads where C is a multiple of 8). Any
other strides are accepted as they are, without a copy. For contiguous NCHW each lane then loads single elements 2·P
bytes apart, so that up to 32 bytes are fetched for each 2 used: expect it to be several times slower, and convert
once upstream. The first such call logs a warning.

The reference wins in float64 (CPU only), where a gradient through ``cam`` itself or a second derivative is wanted,
and for so few samples that a GPU cannot be filled (one program a sample). Beyond ``MAX_ROW_CHANNELS`` channels a row
no longer fits in registers, and A is read twice.
"""

# Triton's language is typed for its own compiler, not for a type checker.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import logging
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cast_kernels import reference
from cast_kernels.launch import Launch, check_kernel_dtype, check_same_device, check_shape

MAX_POSITIONS = 1024
"""Largest H·W: the epilogue holds a sample's whole map in one block."""
MAX_ROW_CHANNELS = 8192
"""Largest C for which one row, alpha, u and v stay in the registers of 8 warps without spilling (offline table)."""
WIDE_BLOCK = 2048
"""Channels at a time beyond that."""
TILE_ELEMENTS = 8192
"""Elements of A in flight for each stage of a program: 16 KB in bfloat16, with two to three programs on a
multiprocessor enough to cover the latency of device memory at full bandwidth."""
ELEMENTS_PER_WARP = 1024
"""32 elements a thread: four 128-bit loads of bfloat16."""
ROW_STAGES = 3
"""Tiles of A in flight at once, through shared memory."""

_log = logging.getLogger("cast_kernels")


@triton.jit
def _cosine_terms(cam, saliency):
    """Loss and slope of one sample; cam (P,) and saliency (P,), zero beyond the map.

    Both are scaled by their largest entry before squaring, so that any float32 magnitude gives a right cosine. A NaN
    or an infinity in either gives a NaN loss.
    """
    zero = (tl.sum(cam, 0) == 0) | (tl.sum(tl.abs(saliency), 0) == 0)
    cam_scale = tl.where(zero, 1.0, tl.max(cam, 0))
    saliency_scale = tl.where(zero, 1.0, tl.max(tl.abs(saliency), 0))
    cam_scaled = cam / cam_scale
    saliency_scaled = saliency / saliency_scale
    cam_root = tl.where(zero, 1.0, tl.sqrt(tl.sum(cam_scaled * cam_scaled, 0)))
    saliency_root = tl.where(zero, 1.0, tl.sqrt(tl.sum(saliency_scaled * saliency_scaled, 0)))
    cosine = tl.where(zero, 0.0, tl.sum(cam_scaled * saliency_scaled, 0) / (cam_root * saliency_root))
    cam_norm = cam_scale * cam_root
    saliency_norm = saliency_scale * saliency_root
    slope = (cosine * (cam_scaled / cam_root) - saliency_scaled / saliency_root) / cam_norm
    # Two selections: the interpreter cannot combine a scalar truth value with a block of them.
    slope = tl.where(cam == 0, 0.0, tl.where(zero, 0.0, slope))
    return zero, cosine, cam_norm, saliency_norm, slope


@triton.jit
def _row_kernel(
    activations,  # (N, C, H, W), any strides
    source,  # alpha (N, C), or the gradient (N, C, H, W) if FROM_GRADIENT; any strides
    saliency,  # (N, H, W), any strides
    loss,  # out (N,)
    cam,  # out (N, P)
    slope,  # out (N, P) if WITH_GRADIENT
    alpha_gradient,  # out (N, C) if WITH_GRADIENT
    alpha_out,  # out (N, C) if FROM_GRADIENT
    channels,
    positions,
    width,
    activations_n,
    activations_c,
    activations_h,
    activations_w,
    source_n,
    source_c,
    source_h,
    source_w,
    saliency_n,
    saliency_h,
    saliency_w,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FROM_GRADIENT: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program takes one sample; all channels of ROWS positions are in registers at a time."""
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    in_channels = channel < channels
    offset_c = channel.to(tl.int64) if WIDE_OFFSETS else channel
    row = tl.arange(0, ROWS)

    if FROM_GRADIENT:
        gradient_base = source + sample * source_n
        alpha = tl.zeros((BLOCK_C,), tl.float32)
        for start in tl.range(0, positions, ROWS, num_stages=STAGES):
            position = start + row
            in_rows = position < positions
            offset_p = position.to(tl.int64) if WIDE_OFFSETS else position
            offset_p = (offset_p // width) * source_h + (offset_p % width) * source_w
            tile = tl.load(
                gradient_base + offset_p[:, None] + (offset_c * source_c)[None, :],
                mask=in_rows[:, None] & in_channels[None, :],
                other=0.0,
            )
            alpha += tl.sum(tile.to(tl.float32), 0)
        alpha = alpha / positions
        tl.store(alpha_out + sample * channels + channel, alpha, mask=in_channels)
    else:
        alpha = tl.load(source + sample * source_n + offset_c * source_c, mask=in_channels, other=0.0).to(tl.float32)

    activations_base = activations + sample * activations_n
    saliency_base = saliency + sample * saliency_n
    salient_sum = tl.zeros((BLOCK_C,), tl.float32)
    cam_sum = tl.zeros((BLOCK_C,), tl.float32)
    for start in tl.range(0, positions, ROWS, num_stages=STAGES):
        position = start + row
        in_rows = position < positions
        offset_p = position.to(tl.int64) if WIDE_OFFSETS else position
        offset_a = (offset_p // width) * activations_h + (offset_p % width) * activations_w
        tile = tl.load(
            activations_base + offset_a[:, None] + (offset_c * activations_c)[None, :],
            mask=in_rows[:, None] & in_channels[None, :],
            other=0.0,
        ).to(tl.float32)
        raw = tl.sum(tile * alpha[None, :], 1)
        # Not a maximum with zero: that would turn NaN into 0 and hide a broken step.
        cam_row = tl.where(raw <= 0, 0.0, raw)
        tl.store(cam + sample * positions + position, cam_row, mask=in_rows)
        if WITH_GRADIENT:
            offset_s = (offset_p // width) * saliency_h + (offset_p % width) * saliency_w
            salient = tl.load(saliency_base + offset_s, mask=in_rows, other=0.0).to(tl.float32)
            salient = tl.where(cam_row == 0, 0.0, salient)
            salient_sum += tl.sum(tile * salient[:, None], 0)
            cam_sum += tl.sum(tile * cam_row[:, None], 0)

    # The map was stored by other threads of this program.
    tl.debug_barrier()
    place = tl.arange(0, BLOCK_P)
    in_map = place < positions
    place_wide = place.to(tl.int64) if WIDE_OFFSETS else place
    offset_map = (place_wide // width) * saliency_h + (place_wide % width) * saliency_w
    cam_map = tl.load(cam + sample * positions + place, mask=in_map, other=0.0)
    saliency_map = tl.load(saliency_base + offset_map, mask=in_map, other=0.0).to(tl.float32)
    zero, cosine, cam_norm, saliency_norm, slope_map = _cosine_terms(cam_map, saliency_map)
    tl.store(loss + sample, 1 - cosine)
    if WITH_GRADIENT:
        tl.store(slope + sample * positions + place, slope_map, mask=in_map)
        change = (cam_sum * (cosine / cam_norm) - salient_sum / saliency_norm) / cam_norm
        tl.store(alpha_gradient + sample * channels + channel, tl.where(zero, 0.0, change), mask=in_channels)


@triton.jit
def _wide_kernel(
    activations,  # as in _row_kernel
    source,
    saliency,
    loss,
    cam,
    slope,
    alpha_gradient,
    alpha_out,
    channels,
    positions,
    width,
    activations_n,
    activations_c,
    activations_h,
    activations_w,
    source_n,
    source_c,
    source_h,
    source_w,
    saliency_n,
    saliency_h,
    saliency_w,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FROM_GRADIENT: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program takes one sample of any number of channels, BLOCK_C at a time; it sweeps A twice."""
    sample = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)

    if FROM_GRADIENT:
        gradient_base = source + sample * source_n
        for first in range(0, channels, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            in_channels = channel < channels
            offset_c = channel.to(tl.int64) if WIDE_OFFSETS else channel
            total = tl.zeros((BLOCK_C,), tl.float32)
            for start in tl.range(0, positions, ROWS, num_stages=STAGES):
                position = start + row
                in_rows = position < positions
                offset_p = position.to(tl.int64) if WIDE_OFFSETS else position
                offset_p = (offset_p // width) * source_h + (offset_p % width) * source_w
                tile = tl.load(
                    gradient_base + offset_p[:, None] + (offset_c * source_c)[None, :],
                    mask=in_rows[:, None] & in_channels[None, :],
                    other=0.0,
                )
                total += tl.sum(tile.to(tl.float32), 0)
            tl.store(alpha_out + sample * channels + channel, total / positions, mask=in_channels)
        tl.debug_barrier()

    activations_base = activations + sample * activations_n
    for start in range(0, positions, ROWS):
        position = start + row
        in_rows = position < positions
        offset_p = position.to(tl.int64) if WIDE_OFFSETS else position
        offset_a = (offset_p // width) * activations_h + (offset_p % width) * activations_w
        raw = tl.zeros((ROWS,), tl.float32)
        for first in tl.range(0, channels, BLOCK_C, num_stages=STAGES):
            channel = first + tl.arange(0, BLOCK_C)
            in_channels = channel < channels
            offset_c = channel.to(tl.int64) if WIDE_OFFSETS else channel
            if FROM_GRADIENT:
                alpha = tl.load(alpha_out + sample * channels + channel, mask=in_channels, other=0.0)
            else:
                alpha = tl.load(source + sample * source_n + offset_c * source_c, mask=in_channels, other=0.0)
            tile = tl.load(
                activations_base + offset_a[:, None] + (offset_c * activations_c)[None, :],
                mask=in_rows[:, None] & in_channels[None, :],
                other=0.0,
            )
            raw += tl.sum(tile.to(tl.float32) * alpha.to(tl.float32)[None, :], 1)
        tl.store(cam + sample * positions + position, tl.where(raw <= 0, 0.0, raw), mask=in_rows)

    tl.debug_barrier()
    place = tl.arange(0, BLOCK_P)
    in_map = place < positions
    place_wide = place.to(tl.int64) if WIDE_OFFSETS else place
    offset_map = (place_wide // width) * saliency_h + (place_wide % width) * saliency_w
    cam_map = tl.load(cam + sample * positions + place, mask=in_map, other=0.0)
    saliency_map = tl.load(saliency + sample * saliency_n + offset_map, mask=in_map, other=0.0).to(tl.float32)
    _, cosine, _, _, slope_map = _cosine_terms(cam_map, saliency_map)
    tl.store(loss + sample, 1 - cosine)

    if WITH_GRADIENT:
        tl.store(slope + sample * positions + place, slope_map, mask=in_map)
        tl.debug_barrier()
        for first in range(0, channels, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            in_channels = channel < channels
            offset_c = channel.to(tl.int64) if WIDE_OFFSETS else channel
            total = tl.zeros((BLOCK_C,), tl.float32)
            for start in tl.range(0, positions, ROWS, num_stages=STAGES):
                position = start + row
                in_rows = position < positions
                offset_p = position.to(tl.int64) if WIDE_OFFSETS else position
                offset_a = (offset_p // width) * activations_h + (offset_p % width) * activations_w
                row_slope = tl.load(slope + sample * positions + position, mask=in_rows, other=0.0)
                tile = tl.load(
                    activations_base + offset_a[:, None] + (offset_c * activations_c)[None, :],
                    mask=in_rows[:, None] & in_channels[None, :],
                    other=0.0,
                )
                total += tl.sum(tile.to(tl.float32) * row_slope[:, None], 0)
            tl.store(alpha_gradient + sample * channels + channel, total, mask=in_channels)


def allocate(activations: Tensor, with_gradient: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty loss (N,), cam (N, H, W), slope (N, H, W), alpha_gradient (N, C); the last two of size 0 if not wanted."""
    samples, channels, height, width = activations.shape
    loss = activations.new_empty((samples,), dtype=dtype)
    cam = activations.new_empty((samples, height, width), dtype=dtype)
    if not with_gradient:
        return loss, cam, activations.new_empty((0,), dtype=dtype), activations.new_empty((0,), dtype=dtype)
    slope = activations.new_empty((samples, height, width), dtype=dtype)
    return loss, cam, slope, activations.new_empty((samples, channels), dtype=dtype)


def plan(
    activations: Tensor,
    source: Tensor,
    saliency: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    alpha_out: Tensor | None,
) -> Launch:
    """The launch for these tensors; ``source`` is the gradient where ``alpha_out`` is given, else alpha."""
    samples, channels, height, width = activations.shape
    positions = height * width
    loss, cam, slope, alpha_gradient = outputs
    with_gradient = slope.numel() > 0 or samples == 0
    by_row = channels <= MAX_ROW_CHANNELS
    block_c = max(16, triton.next_power_of_2(channels)) if by_row else WIDE_BLOCK
    block_p = max(16, triton.next_power_of_2(positions))
    rows = min(max(TILE_ELEMENTS // block_c, 1), block_p)
    source_strides = source.stride() if alpha_out is not None else (*source.stride(), 0, 0)
    spans = [
        sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
        for tensor in (activations, source, saliency)
    ]
    return Launch(
        kernel=_row_kernel if by_row else _wide_kernel,
        grid=(samples,),
        arguments=(
            activations,
            source,
            saliency,
            loss,
            cam,
            slope,
            alpha_gradient,
            loss if alpha_out is None else alpha_out,
            channels,
            positions,
            width,
            *activations.stride(),
            *source_strides,
            *saliency.stride(),
        ),
        constants={
            "BLOCK_C": block_c,
            "ROWS": rows,
            "BLOCK_P": block_p,
            "FROM_GRADIENT": alpha_out is not None,
            "WITH_GRADIENT": with_gradient,
            # Offsets between samples are always 64 bits wide; within a sample only where they must be.
            "WIDE_OFFSETS": max(spans) >= 2**31,
            "STAGES": ROW_STAGES,
        },
        num_warps=min(max(rows * block_c // ELEMENTS_PER_WARP, 1), 16),
    )


def _launch(
    activations: Tensor, alpha: Tensor, saliency: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _warn_of_slow_strides(activations)
    outputs = allocate(activations, with_gradient, torch.float32)
    plan(activations, alpha, saliency, outputs, None).run()
    return outputs


def _launch_from_gradient(
    activations: Tensor, gradient: Tensor, saliency: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _warn_of_slow_strides(activations)
    _warn_of_slow_strides(gradient)
    outputs = allocate(activations, with_gradient, torch.float32)
    alpha = activations.new_empty(activations.shape[:2], dtype=torch.float32)
    plan(activations, gradient, saliency, outputs, alpha).run()
    return *outputs, alpha


_warned_of_slow_strides = False


def _warn_of_slow_strides(tensor: Tensor) -> None:
    global _warned_of_slow_strides
    if not _warned_of_slow_strides and tensor.shape[1] > 1 and tensor.stride(1) != 1:
        _warned_of_slow_strides = True
        _log.warning(
            "gradcam_cosine reads a tensor of shape %s whose channels are not contiguous (strides %s): right, but "
            "several times slower than channels-last memory; convert once with .to(memory_format=torch.channels_last)",
            tuple(tensor.shape),
            tensor.stride(),
        )


@torch.library.custom_op("cast_kernels::gradcam_cosine", mutates_args=(), device_types="cuda")
def _operator(
    activations: Tensor, alpha: Tensor, saliency: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launch(activations, alpha, saliency, with_gradient)


@_operator.register_kernel("cpu")
def _operator_cpu(
    activations: Tensor, alpha: Tensor, saliency: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Autocast stays on inside an operator and would run the reference's products in bfloat16.
    with torch.autocast("cpu", enabled=False):
        loss, cam, slope, alpha_gradient = reference.gradcam_terms(activations, alpha, saliency)
    if not with_gradient:
        slope, alpha_gradient = loss.new_empty((0,)), loss.new_empty((0,))
    return loss, cam, slope, alpha_gradient


@_operator.register_fake
def _operator_fake(
    activations: Tensor, alpha: Tensor, saliency: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return allocate(activations, with_gradient, reference.wide_dtype(activations, alpha, saliency))


@torch.library.custom_op("cast_kernels::gradcam_cosine_from_gradient", mutates_args=(), device_types="cuda")
def _operator_from_gradient(
    activations: Tensor, gradient: Tensor, saliency: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _launch_from_gradient(activations, gradient, saliency, with_gradient)


@_operator_from_gradient.register_kernel("cpu")
def _operator_from_gradient_cpu(
    activations: Tensor, gradient: Tensor, saliency: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = reference.wide_dtype(activations, gradient, saliency)
    alpha = gradient.to(dtype).mean((2, 3))
    return *_operator_cpu(activations, alpha, saliency, with_gradient), alpha


@_operator_from_gradient.register_fake
def _operator_from_gradient_fake(
    activations: Tensor, gradient: Tensor, saliency: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = reference.wide_dtype(activations, gradient, saliency)
    alpha = activations.new_empty(activations.shape[:2], dtype=dtype)
    return *allocate(activations, with_gradient, dtype), alpha


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    activations, source, saliency, with_gradient = inputs
    _, cam, slope, alpha_gradient, *rest = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    # Not the activations: backward reads them no more.
    ctx.save_for_backward(rest[0] if rest else source, saliency, cam, slope, alpha_gradient)
    ctx.with_gradient = with_gradient
    ctx.dtypes = activations.dtype, source.dtype
    ctx.size = activations.shape[2:]


def _gradients(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the activations, of alpha (in the wide type) and of the saliency."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "gradcam_cosine has no second derivative (backward was called with create_graph=True); "
            "use cast_kernels.reference.gradcam_cosine"
        )
    if not ctx.with_gradient:
        raise RuntimeError("gradcam_cosine: backward after a forward with with_gradient=False")
    alpha, saliency, cam, slope, alpha_gradient = ctx.saved_tensors
    for_activations = for_alpha = for_saliency = None
    if ctx.needs_input_grad[0]:
        scaled = loss_gradient[:, None, None] * slope
        # Channels innermost, as the activations have them; pointwise, so that it fuses into whatever reads it.
        rank_one = scaled[..., None] * alpha.to(scaled.dtype)[:, None, None, :]
        for_activations = rank_one.to(ctx.dtypes[0]).permute(0, 3, 1, 2)
    if ctx.needs_input_grad[1]:
        for_alpha = loss_gradient[:, None] * alpha_gradient
    if ctx.needs_input_grad[2]:
        unit = reference.saliency_gradient(cam, saliency)
        for_saliency = (loss_gradient[:, None, None] * unit).to(saliency.dtype)
    return for_activations, for_alpha, for_saliency


def _backward(ctx: Any, loss_gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if loss_gradient is None:
        return None, None, None, None
    for_activations, for_alpha, for_saliency = _gradients(ctx, loss_gradient)
    return for_activations, None if for_alpha is None else for_alpha.to(ctx.dtypes[1]), for_saliency, None


def _backward_from_gradient(ctx: Any, loss_gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if loss_gradient is None:
        return None, None, None, None
    for_activations, for_alpha, for_saliency = _gradients(ctx, loss_gradient)
    for_gradient = None
    if for_alpha is not None:
        height, width = ctx.size
        spread = (for_alpha / (height * width)).to(ctx.dtypes[1])
        for_gradient = spread[:, :, None, None].expand(*spread.shape, height, width)
    return for_activations, for_gradient, for_saliency, None


_operator.register_autograd(_backward, setup_context=_setup_context)
_operator_from_gradient.register_autograd(_backward_from_gradient, setup_context=_setup_context)


def _check(activations: Tensor, saliency: Tensor, weight: Tensor | None) -> None:
    if activations.dim() != 4:
        raise ValueError(f"activations: got {activations.dim()} dimensions, expected 4: (N, C, H, W)")
    samples, channels, height, width = activations.shape
    if channels < 1:
        raise ValueError(f"activations: got {channels} channels, expected at least 1")
    if not 1 <= height * width <= MAX_POSITIONS:
        raise ValueError(f"activations: got H·W = {height}·{width}, expected 1 to {MAX_POSITIONS} positions")
    check_kernel_dtype("activations", activations)
    check_shape("saliency", saliency, (samples, height, width), "(N, H, W)")
    check_kernel_dtype("saliency", saliency)
    if weight is not None:
        check_shape("weight", weight, (samples,), "(N,)")
        check_kernel_dtype("weight", weight)


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def gradcam_cosine(
    activations: Tensor, alpha: Tensor, saliency: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Grad-CAM map (Selvaraju et al., ICCV 2017) and CAST's attention loss, from one read of the activations.

    Args:
        activations: (N, C, H, W) with 1 <= H·W <= 1024; channels-last memory is fast, other strides are accepted at a
            cost (module docstring). bfloat16, float16 or float32; on the CPU also float64.
        alpha: (N, C), channel weights; any positive factor per sample cancels.
        saliency: (N, H, W).
        weight: (N,) or None for ones; multiplies the loss.

    Returns:
        loss (N,): ``weight * (1 - cos(cam, saliency))``, and cam (N, H, W): ``ReLU(sum_c alpha_c A_c)``, both float32
        (float64 if an input is). Differentiable in activations, alpha, saliency and weight through the loss; ``cam``
        is detached. A sample whose cam or saliency is zero everywhere has loss ``weight`` and zero gradients.

    Raises:
        ValueError: for shapes, types or devices that do not fit; the message says what was got and expected.
        NotImplementedError: from a backward with ``create_graph=True``.
    """
    _check(activations, saliency, weight)
    check_shape("alpha", alpha, tuple(activations.shape[:2]), "(N, C)")
    check_kernel_dtype("alpha", alpha)
    check_same_device("activations", activations, alpha=alpha, saliency=saliency, weight=weight)
    wants_gradient = _wants_gradient(activations, alpha, saliency)
    loss, cam, _, _ = _operator(activations, alpha, saliency, wants_gradient)
    return (loss if weight is None else loss * weight), cam


def gradcam_cosine_from_gradient(
    activations: Tensor, gradient: Tensor, saliency: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``gradcam_cosine`` for a trunk without pooling behind it: alpha is the spatial mean of the gradient ∂d/∂A.

    Args:
        gradient: (N, C, H, W), in memory like the activations; differentiable.
        activations, saliency, weight: as in ``gradcam_cosine``.

    Returns and raises as ``gradcam_cosine``.
    """
    _check(activations, saliency, weight)
    check_shape("gradient", gradient, tuple(activations.shape), "(N, C, H, W)")
    check_kernel_dtype("gradient", gradient)
    check_same_device("activations", activations, gradient=gradient, saliency=saliency, weight=weight)
    wants_gradient = _wants_gradient(activations, gradient, saliency)
    loss, cam, _, _, _ = _operator_from_gradient(activations, gradient, saliency, wants_gradient)
    return (loss if weight is None else loss * weight), cam
