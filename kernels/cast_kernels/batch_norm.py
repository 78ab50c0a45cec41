"""BatchNorm in training mode with what surrounds it in a ResNet, streamed: one sweep over the activations an operator.

With rows r = (n, h, w), R of them, and channels c::

    mean_c, variance_c = mean and biased variance of x over rows        (Ioffe & Szegedy, ICML 2015)
    scale_c = weight_c / sqrt(variance_c + eps)
    z_rc = (x_rc - mean_c) scale_c + bias_c  [+ shortcut_rc, or the same of a second x]
    y_rc = max(z_rc, 0)                      [then max pooling 3x3, stride 2, padding 1]

    g_rc  = dy_rc 1[y_rc > 0]                [dy + dy_skip; through the pool]
    dbias_c = sum_r g_rc
    t_c     = sum_r g_rc (x_rc - mean_c),    dweight_c = t_c / sqrt(variance_c + eps)
    dx_rc = scale_c g_rc - constant_c - slope_c (x_rc - mean_c)
    constant_c = scale_c dbias_c / R,        slope_c = scale_c t_c / (R (variance_c + eps))

The operators do the sweeps over rows; the arithmetic on (C,) vectors between them, running statistics, sums over
ranks and the composition of the gradient are the caller's, in ordinary operations. No operator has a derivative.

================================  ==============================================  ===========================
operator                          reads (activations)                             writes
================================  ==============================================  ===========================
batch_norm_statistics             x                                               mean and variance
batch_norm_apply                  x [, shortcut]                                  y
batch_norm_relu_reduce            dy, x                                           two sums
batch_norm_relu_input_gradient    dy, x                                           dx
batch_norm_add_reduce             dy [, dy_skip], y, x [, shortcut]               g and two or three sums
batch_norm_input_gradient         g, x                                            dx
batch_norm_input_gradients        g, x, shortcut                                  dx, dshortcut
batch_norm_relu_pool              x                                               y, choice (a quarter of x)
batch_norm_relu_pool_reduce       dy [, dy_skip], choice, x                       two sums
batch_norm_relu_pool_input_...    dy [, dy_skip], choice, x                       dx
================================  ==============================================  ===========================

Rounding. Arithmetic is in float32, and every result is rounded once, to the dtype of x; eager PyTorch also rounds the
normalised value before it adds the shortcut, and the sum of two gradients before it reduces. g of
``batch_norm_add_reduce`` is rounded where it is written, and the sums are those of the rounded g, so that they belong
to what every later reader sees.

Masks. Where y is kept anyway (a block's output is the next convolution's input) the mask is read from y; elsewhere it
is computed again from x, by the same operations in the same order and rounded as y was: an element passes exactly if
it is not zero in y, so a z that is positive but rounds to zero does not (in float16 below 3e-8). A NaN in y is not zero
and lets the gradient pass, as in torch. In the pool the values are rounded before they are compared, so that ties are
those of the rounded activations: values and choices are torch's to the bit.

Memory format: everything is channels-last. Other strides are copied once, by ordinary operations, before the operator.
"""

# Triton's language is typed for its own compiler, not for a type checker.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cast_kernels import reference
from cast_kernels.launch import Launch, check_kernel_dtype, check_same_device, check_shape, device_properties

WIDEST = 64
"""Channels of a tile: 128 bytes of bfloat16, a line of the cache."""
WARPS = 4
STREAMED, REDUCED, POOLED = 4096, 2048, 1024
"""Elements of a tile: 32, 16 and 8 a thread, as many as their registers allow (offline table). A reduction has two to
four tiles of each input in flight through shared memory, 16 KB and more a program."""
COMBINED = 256
"""Partial results that one step of a combining program takes."""
RESIDENT = 4
"""Programs of a reduction on each multiprocessor; registers and shared memory admit 3 to 5."""
REGISTERS = 168
"""Of a thread at most: three programs on a multiprocessor. The limit keeps the assembler from spilling for a fourth."""
MAX_POOLED_PIXELS = 2**30
"""Largest N·H·W in front of the pool."""
VANISHES = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float32: 0.0}
"""The largest number that is rounded to zero: half of the smallest subnormal, a tie that goes to even."""


@triton.jit
def _tile(start, rows, channels, first_channel, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of a tile from its first row, and which of them are there. 32 bits are enough from there on."""
    row = tl.arange(0, BLOCK_R)
    column = first_channel + tl.arange(0, BLOCK_C)
    left = tl.minimum(rows - start, BLOCK_R).to(tl.int32)
    offset = row[:, None] * channels + column[None, :]
    return offset, (row < left)[:, None] & (column < channels)[None, :]


@triton.jit
def _vector(pointer, first_channel, channels, BLOCK_C: tl.constexpr):
    column = first_channel + tl.arange(0, BLOCK_C)
    return tl.load(pointer + column, mask=column < channels, other=0.0)[None, :]


@triton.jit
def _wide(pointer, offset, there):
    return tl.load(pointer + offset, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _preactivation(x, mean, scale, bias):
    # Spelled out, so that forward and backward pass get the same bits whatever the compiler contracts.
    return tl.fma(x - mean, scale, bias)


@triton.jit
def _relu(z):
    # Not a maximum: NaN passes through, as in torch.
    return tl.where(z <= 0.0, 0.0, z)


@triton.jit
def _statistics_kernel(
    x,
    partial,  # out (programs, 2, C): mean, and sum of squares of the deviations from it
    rows,
    channels,
    tiles,
    blocks,
    programs,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every ``programs``-th tile of rows. Sums are of differences from the mean of the first of these tiles."""
    program, first_channel = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_C
    start = tl.cast(program, tl.int64) * BLOCK_R
    offset, there = _tile(start, rows, channels, first_channel, BLOCK_R, BLOCK_C)
    value = _wide(x + start * channels, offset, there)
    count = tl.minimum(rows - start, BLOCK_R).to(tl.float32)
    shift = (tl.sum(value, 0) / count)[None, :]
    first = tl.where(there, value - shift, 0.0)
    second = first * first
    for tile in tl.range(program + programs, tiles, programs, num_stages=STAGES):
        start = tl.cast(tile, tl.int64) * BLOCK_R
        offset, there = _tile(start, rows, channels, first_channel, BLOCK_R, BLOCK_C)
        value = _wide(x + start * channels, offset, there)
        difference = tl.where(there, value - shift, 0.0)
        first += difference
        second += difference * difference
        count += tl.minimum(rows - start, BLOCK_R).to(tl.float32)
    total = tl.sum(first, 0)
    mean = tl.sum(shift, 0) + total / count
    squares = tl.sum(second, 0) - total * (total / count)
    column = first_channel + tl.arange(0, BLOCK_C)
    out = partial + program * 2 * channels + column
    tl.store(out, mean, mask=column < channels)
    tl.store(out + channels, squares, mask=column < channels)


@triton.jit
def _combine_statistics_kernel(
    partial,
    moments,  # out (2, C)
    rows,
    channels,
    tiles,
    programs,
    BLOCK_R: tl.constexpr,  # of the sweep
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Chan, Golub & LeVeque (1983): the squares of a union are those of its parts and of the parts' means."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    anchor = tl.load(partial + column, mask=inside, other=0.0)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        there = (program < programs)[:, None] & inside[None, :]
        count = _rows_of(program, rows, tiles, programs, BLOCK_R)[:, None]
        mean = tl.load(partial + program[:, None] * 2 * channels + column[None, :], mask=there, other=0.0)
        total += tl.where(there, count * (mean - anchor), 0.0)
    centre = anchor + (tl.sum(total, 0) / rows)[None, :]
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        there = (program < programs)[:, None] & inside[None, :]
        count = _rows_of(program, rows, tiles, programs, BLOCK_R)[:, None]
        place = partial + program[:, None] * 2 * channels + column[None, :]
        distance = tl.load(place, mask=there, other=0.0) - centre
        within = tl.load(place + channels, mask=there, other=0.0)
        squares += tl.where(there, within + count * distance * distance, 0.0)
    variance = tl.sum(squares, 0) / rows
    tl.store(moments + column, tl.sum(centre, 0), mask=inside)
    # Rounding can leave a constant channel a little below zero.
    tl.store(moments + channels + column, tl.where(variance < 0.0, 0.0, variance), mask=inside)


@triton.jit
def _rows_of(program, rows, tiles, programs, BLOCK_R: tl.constexpr):
    """How many rows a program of the sweep took."""
    owned = (tiles - program + programs - 1) // programs
    missing = tl.cast(tiles, tl.int64) * BLOCK_R - rows
    last = (tiles - 1 - program) % programs == 0
    return (owned * BLOCK_R).to(tl.float32) - tl.where(last, missing.to(tl.float32), 0.0)


@triton.jit
def _combine_sums_kernel(partial, sums, programs, width, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(programs, width) → (width,), in a fixed order."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        there = (program < programs)[:, None] & (column < width)[None, :]
        total += tl.load(partial + program[:, None] * width + column[None, :], mask=there, other=0.0)
    tl.store(sums + column, tl.sum(total, 0), mask=column < width)


@triton.jit
def _apply_kernel(
    x,
    mean,
    scale,
    bias,
    shortcut,  # none, (N, C, H, W), or one with a BatchNorm of its own: SHORTCUT = 0, 1, 2
    shortcut_mean,
    shortcut_scale,
    shortcut_bias,
    y,  # out
    rows,
    channels,
    tiles,
    blocks,
    SHORTCUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # From the end, here and in the other sweeps that follow a reduction: what that read last may still be in the L2.
    start = (tiles - 1 - tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R
    first_channel = tl.program_id(0) % blocks * BLOCK_C
    offset, there = _tile(start, rows, channels, first_channel, BLOCK_R, BLOCK_C)
    base = start * channels
    z = _preactivation(
        _wide(x + base, offset, there),
        _vector(mean, first_channel, channels, BLOCK_C),
        _vector(scale, first_channel, channels, BLOCK_C),
        _vector(bias, first_channel, channels, BLOCK_C),
    )
    if SHORTCUT == 1:
        z += _wide(shortcut + base, offset, there)
    if SHORTCUT == 2:
        z += _preactivation(
            _wide(shortcut + base, offset, there),
            _vector(shortcut_mean, first_channel, channels, BLOCK_C),
            _vector(shortcut_scale, first_channel, channels, BLOCK_C),
            _vector(shortcut_bias, first_channel, channels, BLOCK_C),
        )
    tl.store(y + base + offset, _relu(z).to(y.dtype.element_ty), mask=there)


@triton.jit
def _relu_reduce_kernel(
    dy,
    x,
    mean,
    scale,
    bias,
    partial,  # out (programs, 2, C)
    rows,
    channels,
    tiles,
    blocks,
    programs,
    VANISHES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, first_channel = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_C
    centre = _vector(mean, first_channel, channels, BLOCK_C)
    factor = _vector(scale, first_channel, channels, BLOCK_C)
    level = _vector(bias, first_channel, channels, BLOCK_C)
    first = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        start = tl.cast(tile, tl.int64) * BLOCK_R
        offset, there = _tile(start, rows, channels, first_channel, BLOCK_R, BLOCK_C)
        value = _wide(x + start * channels, offset, there)
        upstream = _wide(dy + start * channels, offset, there)
        g = tl.where(_preactivation(value, centre, factor, level) <= VANISHES, 0.0, upstream)
        first += g
        second += g * (value - centre)
    column = first_channel + tl.arange(0, BLOCK_C)
    out = partial + program * 2 * channels + column
    tl.store(out, tl.sum(first, 0), mask=column < channels)
    tl.store(out + channels, tl.sum(second, 0), mask=column < channels)


@triton.jit
def _add_reduce_kernel(
    dy,
    dy_skip,
    y,
    x,
    mean,
    shortcut,
    shortcut_mean,
    g,  # out
    partial,  # out (programs, 2 or 3, C)
    rows,
    channels,
    tiles,
    blocks,
    programs,
    SKIP: tl.constexpr,
    SHORTCUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, first_channel = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_C
    centre = _vector(mean, first_channel, channels, BLOCK_C)
    if SHORTCUT:
        shortcut_centre = _vector(shortcut_mean, first_channel, channels, BLOCK_C)
    first = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    third = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        start = tl.cast(tile, tl.int64) * BLOCK_R
        offset, there = _tile(start, rows, channels, first_channel, BLOCK_R, BLOCK_C)
        base = start * channels
        upstream = _wide(dy + base, offset, there)
        if SKIP:
            upstream += _wide(dy_skip + base, offset, there)
        masked = tl.where(_wide(y + base, offset, there) <= 0.0, 0.0, upstream).to(g.dtype.element_ty)
        tl.store(g + base + offset, masked, mask=there)
        rounded = masked.to(tl.float32)
        first += rounded
        second += rounded * (_wide(x + base, offset, there) - centre)
        if SHORTCUT:
            third += rounded * (_wide(shortcut + base, offset, there) - shortcut_centre)
    column = first_channel + tl.arange(0, BLOCK_C)
    inside = column < channels
    out = partial + program * (3 if SHORTCUT else 2) * channels + column
    tl.store(out, tl.sum(first, 0), mask=inside)
    tl.store(out + channels, tl.sum(second, 0), mask=inside)
    if SHORTCUT:
        tl.store(out + 2 * channels, tl.sum(third, 0), mask=inside)


@triton.jit
def _input_gradient_kernel(
    dy,  # or g, masked already
    x,
    mean,
    scale,
    bias,
    constant,
    slope,
    dx,  # out
    rows,
    channels,
    tiles,
    blocks,
    MASKED: tl.constexpr,
    VANISHES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start = (tiles - 1 - tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R
    first_channel = tl.program_id(0) % blocks * BLOCK_C
    offset, there = _tile(start, rows, channels, first_channel, BLOCK_R, BLOCK_C)
    base = start * channels
    value = _wide(x + base, offset, there)
    g = _wide(dy + base, offset, there)
    centre = _vector(mean, first_channel, channels, BLOCK_C)
    factor = _vector(scale, first_channel, channels, BLOCK_C)
    if not MASKED:
        level = _vector(bias, first_channel, channels, BLOCK_C)
        g = tl.where(_preactivation(value, centre, factor, level) <= VANISHES, 0.0, g)
    flat = _vector(constant, first_channel, channels, BLOCK_C)
    tilt = _vector(slope, first_channel, channels, BLOCK_C)
    gradient = factor * g - flat - tilt * (value - centre)
    tl.store(dx + base + offset, gradient.to(dx.dtype.element_ty), mask=there)


@triton.jit
def _input_gradients_kernel(
    g,
    x,
    mean,
    scale,
    constant,
    slope,
    shortcut,
    shortcut_mean,
    shortcut_scale,
    shortcut_constant,
    shortcut_slope,
    dx,  # out
    dshortcut,  # out
    rows,
    channels,
    tiles,
    blocks,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start = (tiles - 1 - tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R
    first_channel = tl.program_id(0) % blocks * BLOCK_C
    offset, there = _tile(start, rows, channels, first_channel, BLOCK_R, BLOCK_C)
    base = start * channels
    upstream = _wide(g + base, offset, there)
    gradient = (
        _vector(scale, first_channel, channels, BLOCK_C) * upstream
        - _vector(constant, first_channel, channels, BLOCK_C)
        - _vector(slope, first_channel, channels, BLOCK_C)
        * (_wide(x + base, offset, there) - _vector(mean, first_channel, channels, BLOCK_C))
    )
    tl.store(dx + base + offset, gradient.to(dx.dtype.element_ty), mask=there)
    gradient = (
        _vector(shortcut_scale, first_channel, channels, BLOCK_C) * upstream
        - _vector(shortcut_constant, first_channel, channels, BLOCK_C)
        - _vector(shortcut_slope, first_channel, channels, BLOCK_C)
        * (_wide(shortcut + base, offset, there) - _vector(shortcut_mean, first_channel, channels, BLOCK_C))
    )
    tl.store(dshortcut + base + offset, gradient.to(dshortcut.dtype.element_ty), mask=there)


@triton.jit
def _row_offset(row, channels, LONG: tl.constexpr):
    """(R, 1), in 64 bits only where they are needed."""
    if LONG:
        row = row.to(tl.int64)
    return row[:, None] * channels


@triton.jit
def _place(window, pooled_height, pooled_width):
    """Sample, row and column of a window."""
    line = window // pooled_width
    sample = line // pooled_height
    return sample, line - sample * pooled_height, window - line * pooled_width


@triton.jit
def _relu_pool_kernel(
    x,
    mean,
    scale,
    bias,
    y,  # out
    choice,  # out
    windows,
    channels,
    height,
    width,
    pooled_height,
    pooled_width,
    tiles,
    blocks,
    LONG: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_channel = tl.program_id(0) % blocks * BLOCK_C
    centre = _vector(mean, first_channel, channels, BLOCK_C)
    factor = _vector(scale, first_channel, channels, BLOCK_C)
    level = _vector(bias, first_channel, channels, BLOCK_C)
    window = (tiles - 1 - tl.program_id(0) // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    sample, top, left = _place(window, pooled_height, pooled_width)
    top, left = top * 2 - 1, left * 2 - 1
    corner = (sample * height + top) * width + left
    column = first_channel + tl.arange(0, BLOCK_C)
    inside = (column < channels)[None, :]
    # Below every value of a ReLU: a pixel outside is never chosen.
    largest = tl.full((BLOCK_R, BLOCK_C), -1.0, tl.float32)
    chosen = tl.zeros((BLOCK_R, BLOCK_C), tl.int32)
    for tap in tl.static_range(9):
        row, side = top + tap // 3, left + tap % 3
        there = (window < windows) & (row >= 0) & (row < height) & (side >= 0) & (side < width)
        there = there[:, None] & inside
        pixel = corner + tap // 3 * width + tap % 3
        value = _wide(x, _row_offset(pixel, channels, LONG) + column[None, :], there)
        rounded = _relu(_preactivation(value, centre, factor, level)).to(y.dtype.element_ty).to(tl.float32)
        # torch's rule: the first largest, the last NaN.
        take = there & ((rounded > largest) | (rounded != rounded))
        largest = tl.where(take, rounded, largest)
        chosen = tl.where(take, tap, chosen)
    place = _row_offset(window, channels, LONG) + column[None, :]
    there = (window < windows)[:, None] & inside
    tl.store(y + place, largest.to(y.dtype.element_ty), mask=there)
    tl.store(choice + place, chosen.to(tl.uint8), mask=there)


@triton.jit
def _window(dy, dy_skip, choice, window, there, column, channels, SKIP: tl.constexpr, LONG: tl.constexpr):
    """Gradient and choice of one window for each row of a tile."""
    place = _row_offset(window, channels, LONG) + column[None, :]
    upstream = _wide(dy, place, there)
    if SKIP:
        upstream += _wide(dy_skip, place, there)
    return upstream, tl.load(choice + place, mask=there, other=255).to(tl.int32)


@triton.jit
def _gather(
    dy,
    dy_skip,
    choice,
    window,
    windows,
    row,
    side,
    channels,
    first_channel,
    pooled_height,
    pooled_width,
    BLOCK_C: tl.constexpr,
    SKIP: tl.constexpr,
    LONG: tl.constexpr,
):
    """Gradients of the 2x2 pixels around the centre of each window and right and below of it.

    The centre lies in that window alone, its neighbours in two each, and the last in four. Summed as torch does.
    """
    column = first_channel + tl.arange(0, BLOCK_C)
    inside = (column < channels)[None, :]
    here = window < windows
    right = here & (side + 1 < pooled_width)
    below = here & (row + 1 < pooled_height)
    upstream, tap = _window(dy, dy_skip, choice, window, here[:, None] & inside, column, channels, SKIP, LONG)
    g00 = tl.where(tap == 4, upstream, 0.0)
    g01 = tl.where(tap == 5, upstream, 0.0)
    g10 = tl.where(tap == 7, upstream, 0.0)
    g11 = tl.where(tap == 8, upstream, 0.0)
    upstream, tap = _window(dy, dy_skip, choice, window + 1, right[:, None] & inside, column, channels, SKIP, LONG)
    g01 += tl.where(tap == 3, upstream, 0.0)
    g11 += tl.where(tap == 6, upstream, 0.0)
    under = window + pooled_width
    upstream, tap = _window(dy, dy_skip, choice, under, below[:, None] & inside, column, channels, SKIP, LONG)
    g10 += tl.where(tap == 1, upstream, 0.0)
    g11 += tl.where(tap == 2, upstream, 0.0)
    both = (right & below)[:, None] & inside
    upstream, tap = _window(dy, dy_skip, choice, under + 1, both, column, channels, SKIP, LONG)
    g11 += tl.where(tap == 0, upstream, 0.0)
    return g00, g01, g10, g11


@triton.jit
def _relu_pool_reduce_kernel(
    dy,
    dy_skip,
    choice,
    x,
    mean,
    scale,
    bias,
    partial,  # out (programs, 2, C)
    windows,
    channels,
    height,
    width,
    pooled_height,
    pooled_width,
    tiles,
    blocks,
    programs,
    SKIP: tl.constexpr,
    LONG: tl.constexpr,
    VANISHES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program, first_channel = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_C
    column = first_channel + tl.arange(0, BLOCK_C)
    inside = column < channels
    centre = _vector(mean, first_channel, channels, BLOCK_C)
    factor = _vector(scale, first_channel, channels, BLOCK_C)
    level = _vector(bias, first_channel, channels, BLOCK_C)
    first = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in range(program, tiles, programs):
        window = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        sample, row, side = _place(window, pooled_height, pooled_width)
        gradients = _gather(
            dy,
            dy_skip,
            choice,
            window,
            windows,
            row,
            side,
            channels,
            first_channel,
            pooled_height,
            pooled_width,
            BLOCK_C,
            SKIP,
            LONG,
        )
        for place in tl.static_range(4):
            down, across = row * 2 + place // 2, side * 2 + place % 2
            there = ((window < windows) & (down < height) & (across < width))[:, None] & inside[None, :]
            pixel = (sample * height + down) * width + across
            difference = _wide(x, _row_offset(pixel, channels, LONG) + column[None, :], there) - centre
            g = tl.where(tl.fma(difference, factor, level) <= VANISHES, 0.0, gradients[place])
            first += g
            second += g * difference
    out = partial + program * 2 * channels + column
    tl.store(out, tl.sum(first, 0), mask=inside)
    tl.store(out + channels, tl.sum(second, 0), mask=inside)


@triton.jit
def _relu_pool_input_gradient_kernel(
    dy,
    dy_skip,
    choice,
    x,
    mean,
    scale,
    bias,
    constant,
    slope,
    dx,  # out
    windows,
    channels,
    height,
    width,
    pooled_height,
    pooled_width,
    tiles,
    blocks,
    SKIP: tl.constexpr,
    LONG: tl.constexpr,
    VANISHES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_channel = tl.program_id(0) % blocks * BLOCK_C
    column = first_channel + tl.arange(0, BLOCK_C)
    centre = _vector(mean, first_channel, channels, BLOCK_C)
    factor = _vector(scale, first_channel, channels, BLOCK_C)
    level = _vector(bias, first_channel, channels, BLOCK_C)
    flat = _vector(constant, first_channel, channels, BLOCK_C)
    tilt = _vector(slope, first_channel, channels, BLOCK_C)
    window = (tiles - 1 - tl.program_id(0) // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    sample, row, side = _place(window, pooled_height, pooled_width)
    gradients = _gather(
        dy,
        dy_skip,
        choice,
        window,
        windows,
        row,
        side,
        channels,
        first_channel,
        pooled_height,
        pooled_width,
        BLOCK_C,
        SKIP,
        LONG,
    )
    for place in tl.static_range(4):
        down, across = row * 2 + place // 2, side * 2 + place % 2
        there = ((window < windows) & (down < height) & (across < width))[:, None] & (column < channels)[None, :]
        pixel = (sample * height + down) * width + across
        offset = _row_offset(pixel, channels, LONG) + column[None, :]
        value = _wide(x, offset, there)
        g = tl.where(_preactivation(value, centre, factor, level) <= VANISHES, 0.0, gradients[place])
        gradient = factor * g - flat - tilt * (value - centre)
        tl.store(dx + offset, gradient.to(dx.dtype.element_ty), mask=there)


def _activations(like: Tensor, height: int | None = None, width: int | None = None, dtype: Any = None) -> Tensor:
    """Empty (N, C, H, W) in channels-last memory."""
    samples, channels = like.shape[:2]
    shape = (samples, channels, like.shape[2] if height is None else height, like.shape[3] if width is None else width)
    dtype = like.dtype if dtype is None else dtype
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _vectors(like: Tensor, count: int) -> Tensor:
    """Empty (count, C), float32 or wider."""
    return torch.empty((count, like.shape[1]), dtype=reference.wide_dtype(like), device=like.device)


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _pooled(x: Tensor) -> tuple[int, int]:
    return (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2


def _sweep(
    kernel: Any,
    x: Tensor,
    arguments: tuple[Tensor, ...],
    elements: int,
    pooled: bool = False,
    registers: int | None = None,
    **constants: Any,
) -> Launch:
    """A launch with one program a tile of ``elements``: of rows of x, or of windows of the pool."""
    grid, sizes, constants = _sizes(x, elements, pooled, constants)
    return Launch(kernel, grid, (*arguments, *sizes), constants, WARPS, max_registers=registers)


def _reduction(
    kernel: Any,
    x: Tensor,
    arguments: tuple[Tensor, ...],
    sums: Tensor,
    elements: int,
    pooled: bool = False,
    **constants: Any,
) -> list[Launch]:
    """A sweep by as many programs as keep the GPU busy, and the launch that combines what they leave in a buffer."""
    _, sizes, constants = _sizes(x, elements, pooled, constants)
    rows, channels, *_, tiles, blocks = sizes
    # Rounded down: one program more than fit would double the time.
    programs = max(1, min(tiles, RESIDENT * device_properties(x.device)[1] // blocks))
    partial = torch.empty((programs, *sums.shape), dtype=torch.float32, device=x.device)
    given = (*arguments, partial, *sizes, programs)
    # That of the pool needs more where C is no multiple of 8.
    registers = None if pooled else REGISTERS
    sweep = Launch(kernel, (programs * blocks,), given, constants, WARPS, max_registers=registers)
    block = {"BLOCK_P": COMBINED, "BLOCK_C": 16}
    if kernel is _statistics_kernel:
        block["BLOCK_R"] = constants["BLOCK_R"]
        grid = (triton.cdiv(channels, 16),)
        given = (partial, sums, rows, channels, tiles, programs)
        return [sweep, Launch(_combine_statistics_kernel, grid, given, block, WARPS)]
    given = (partial, sums, programs, sums.numel())
    return [sweep, Launch(_combine_sums_kernel, (triton.cdiv(sums.numel(), 16),), given, block, WARPS)]


def _sizes(
    x: Tensor, elements: int, pooled: bool, constants: dict[str, Any]
) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:
    """Grid, run-time sizes and constants of a sweep."""
    channels = x.shape[1]
    rows = x.numel() // channels
    sizes: tuple[int, ...] = ()
    if pooled:
        height, width = _pooled(x)
        sizes = (*x.shape[2:], height, width)
        constants = {**constants, "LONG": x.numel() >= 2**31}
        rows = x.shape[0] * height * width
    block_c = min(triton.next_power_of_2(channels), WIDEST)
    block_r = elements // block_c
    tiles, blocks = triton.cdiv(rows, block_r), triton.cdiv(channels, block_c)
    constants = {**constants, "BLOCK_R": block_r, "BLOCK_C": block_c}
    return (tiles * blocks,), (rows, channels, *sizes, tiles, blocks), constants


def _plan_statistics(x: Tensor, moments: Tensor) -> list[Launch]:
    return _reduction(_statistics_kernel, x, (x,), moments, REDUCED, STAGES=5)


def _plan_apply(
    x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, shortcut: Tensor | None, *rest: Tensor | None
) -> list[Launch]:
    *others, y = rest
    kind = 0 if shortcut is None else 1 if others[0] is None else 2
    # What a kernel does not read is any pointer.
    given = tuple(x if tensor is None else tensor for tensor in (shortcut, *others))
    return [_sweep(_apply_kernel, x, (x, mean, scale, bias, *given, y), STREAMED, SHORTCUT=kind)]


def _plan_relu_reduce(dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, sums: Tensor) -> list[Launch]:
    constants = {"VANISHES": VANISHES[x.dtype], "STAGES": 3}
    return _reduction(_relu_reduce_kernel, x, (dy, x, mean, scale, bias), sums, REDUCED, **constants)


def _plan_relu_input_gradient(dy: Tensor, x: Tensor, *rest: Tensor) -> list[Launch]:
    constants = {"MASKED": False, "VANISHES": VANISHES[x.dtype]}
    return [_sweep(_input_gradient_kernel, x, (dy, x, *rest), STREAMED, **constants)]


def _plan_add_reduce(
    dy: Tensor,
    dy_skip: Tensor | None,
    y: Tensor,
    x: Tensor,
    mean: Tensor,
    shortcut: Tensor | None,
    shortcut_mean: Tensor | None,
    g: Tensor,
    sums: Tensor,
) -> list[Launch]:
    given = (dy, dy if dy_skip is None else dy_skip, y, x, mean)
    given += (x, mean) if shortcut is None or shortcut_mean is None else (shortcut, shortcut_mean)
    constants = {"SKIP": dy_skip is not None, "SHORTCUT": shortcut is not None, "STAGES": 3}
    return _reduction(_add_reduce_kernel, x, (*given, g), sums, REDUCED, **constants)


def _plan_input_gradient(
    g: Tensor, x: Tensor, mean: Tensor, scale: Tensor, constant: Tensor, slope: Tensor, dx: Tensor
) -> list[Launch]:
    constants = {"MASKED": True, "VANISHES": 0.0}
    arguments = (g, x, mean, scale, scale, constant, slope, dx)
    return [_sweep(_input_gradient_kernel, x, arguments, STREAMED, **constants)]


def _plan_input_gradients(g: Tensor, x: Tensor, *rest: Tensor) -> list[Launch]:
    return [_sweep(_input_gradients_kernel, x, (g, x, *rest), STREAMED)]


def _plan_relu_pool(x: Tensor, *rest: Tensor) -> list[Launch]:
    # With narrow loads it is the limit that makes the assembler spill.
    registers = None if x.shape[1] % 8 else REGISTERS
    return [_sweep(_relu_pool_kernel, x, (x, *rest), POOLED, True, registers)]


def _plan_relu_pool_reduce(
    dy: Tensor, dy_skip: Tensor | None, choice: Tensor, x: Tensor, *rest: Tensor
) -> list[Launch]:
    *vectors, sums = rest
    constants = {"SKIP": dy_skip is not None, "VANISHES": VANISHES[x.dtype]}
    arguments = (dy, dy if dy_skip is None else dy_skip, choice, x, *vectors)
    return _reduction(_relu_pool_reduce_kernel, x, arguments, sums, POOLED, True, **constants)


def _plan_relu_pool_input_gradient(
    dy: Tensor, dy_skip: Tensor | None, choice: Tensor, x: Tensor, *rest: Tensor
) -> list[Launch]:
    constants = {"SKIP": dy_skip is not None, "VANISHES": VANISHES[x.dtype]}
    arguments = (dy, dy if dy_skip is None else dy_skip, choice, x, *rest)
    return [_sweep(_relu_pool_input_gradient_kernel, x, arguments, POOLED, True, **constants)]


class _Operator:
    """The ``torch.library`` operator of a reference's name and signature, and what its kernels need.

    Args:
        plain: the reference, which is the implementation on a CPU.
        allocate: from the operator's arguments to its empty results.
        plan: from arguments and results to the launches that fill the results.
    """

    def __init__(
        self,
        plain: Callable[..., Any],
        allocate: Callable[..., tuple[Tensor, ...]],
        plan: Callable[..., list[Launch]],
    ) -> None:
        signature = inspect.signature(plain)
        self.plain, self.allocate, self._plan = plain, allocate, plan
        self.name = plain.__name__
        self._single = signature.return_annotation in (Tensor, "Tensor")
        self._defaults = tuple(parameter.default for parameter in signature.parameters.values())
        schema = torch.library.infer_schema(plain, mutates_args=())
        name = f"cast_kernels::{self.name}"
        self._operator = torch.library.custom_op(name, self.launch, mutates_args=(), device_types="cuda", schema=schema)
        self._operator.register_kernel("cpu")(self._on_cpu)
        self._operator.register_fake(self._fake)

    def __call__(self, *arguments: Any) -> Any:
        return self._operator(*arguments)

    def plan(self, *arguments: Any) -> list[Launch]:
        """The launches for these arguments, which may be on ``meta``."""
        arguments = self._whole(arguments)
        return self._plan(*arguments, *self.allocate(*arguments))

    def launch(self, *arguments: Any) -> Any:
        """The results, by the kernels; all tensors channels-last."""
        arguments = self._whole(arguments)
        made = self.allocate(*arguments)
        for launch in self._plan(*arguments, *made):
            launch.run()
        return made[0] if self._single else made

    def _on_cpu(self, *arguments: Any) -> Any:
        made = self.allocate(*self._whole(arguments))
        # Autocast stays on inside an operator.
        with torch.autocast("cpu", enabled=False):
            for empty, value in zip(made, _as_tuple(self.plain(*arguments)), strict=True):
                empty.copy_(value)
        return made[0] if self._single else made

    def _fake(self, *arguments: Any) -> Any:
        made = self.allocate(*self._whole(arguments))
        return made[0] if self._single else made

    def _whole(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The dispatcher leaves out trailing arguments that have their default."""
        return (*arguments, *self._defaults[len(arguments) :])


_statistics = _Operator(reference.batch_norm_statistics, lambda x: (_vectors(x, 2),), _plan_statistics)
_apply = _Operator(reference.batch_norm_apply, lambda x, *_: (_activations(x),), _plan_apply)
_relu_reduce = _Operator(reference.batch_norm_relu_reduce, lambda dy, x, *_: (_vectors(x, 2),), _plan_relu_reduce)
_relu_input_gradient = _Operator(
    reference.batch_norm_relu_input_gradient, lambda dy, x, *_: (_activations(x),), _plan_relu_input_gradient
)
_add_reduce = _Operator(
    reference.batch_norm_add_reduce,
    lambda dy, dy_skip, y, x, mean, shortcut, _: (_activations(x), _vectors(x, 2 if shortcut is None else 3)),
    _plan_add_reduce,
)
_input_gradient = _Operator(
    reference.batch_norm_input_gradient, lambda g, x, *_: (_activations(x),), _plan_input_gradient
)
_input_gradients = _Operator(
    reference.batch_norm_input_gradients, lambda g, x, *_: (_activations(x), _activations(x)), _plan_input_gradients
)
_relu_pool = _Operator(
    reference.batch_norm_relu_pool,
    lambda x, *_: (_activations(x, *_pooled(x)), _activations(x, *_pooled(x), dtype=torch.uint8)),
    _plan_relu_pool,
)
_relu_pool_reduce = _Operator(
    reference.batch_norm_relu_pool_reduce, lambda dy, dy_skip, choice, x, *_: (_vectors(x, 2),), _plan_relu_pool_reduce
)
_relu_pool_input_gradient = _Operator(
    reference.batch_norm_relu_pool_input_gradient,
    lambda dy, dy_skip, choice, x, *_: (_activations(x),),
    _plan_relu_pool_input_gradient,
)


def _check(x: Tensor, maps: Mapping[str, Tensor | None], vectors: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError unless x is what the operators take, ``maps`` are like x and ``vectors`` are (C,)."""
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, C, H, W), not empty")
    check_kernel_dtype("x", x)
    for name, tensor in maps.items():
        if tensor is not None:
            check_shape(name, tensor, tuple(x.shape), "(N, C, H, W)")
            _check_dtype(name, tensor, x.dtype)
    for name, tensor in vectors.items():
        if tensor is not None:
            check_shape(name, tensor, (x.shape[1],), "(C,)")
            _check_dtype(name, tensor, reference.wide_dtype(x))
    check_same_device("x", x, **maps, **vectors)


def _check_dtype(name: str, tensor: Tensor, expected: torch.dtype) -> None:
    if tensor.dtype != expected:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, expected {expected}")


def _check_pixels(x: Tensor) -> None:
    # The kernels count pixels in 32 bits, for they must divide.
    pixels = x.numel() // x.shape[1]
    if pixels > MAX_POOLED_PIXELS:
        raise ValueError(f"x: got N·H·W = {pixels}, expected at most {MAX_POOLED_PIXELS}")


def _check_pooled(x: Tensor, dy: Tensor, dy_skip: Tensor | None, choice: Tensor) -> None:
    _check_pixels(x)
    expected = (*x.shape[:2], *_pooled(x))
    for name, tensor, dtype in (("dy", dy, x.dtype), ("dy_skip", dy_skip, x.dtype), ("choice", choice, torch.uint8)):
        if tensor is not None:
            check_shape(name, tensor, expected, "(N, C, (H + 1) // 2, (W + 1) // 2)")
            _check_dtype(name, tensor, dtype)
    check_same_device("x", x, dy=dy, dy_skip=dy_skip, choice=choice)


def _together(first: tuple[str, Tensor | None], **others: Tensor | None) -> None:
    """Raise ValueError unless all or none are given."""
    for name, tensor in others.items():
        if (tensor is None) != (first[1] is None):
            given, absent = (first[0], name) if tensor is None else (name, first[0])
            raise ValueError(f"{absent}: got None, expected a tensor as {given} is given")


def _dense(*tensors: Tensor | None) -> list[Any]:
    """Activations in channels-last memory and vectors without gaps; what is so already, as it is."""
    formats = {4: torch.channels_last, 1: torch.contiguous_format}
    return [None if t is None else t.contiguous(memory_format=formats[t.dim()]) for t in tensors]


def batch_norm_statistics(x: Tensor) -> Tensor:
    """Mean and biased variance of every channel.

    Args:
        x: (N, C, H, W), not empty, bfloat16, float16 or float32; on the CPU also float64.

    Returns:
        (2, C) float32 (float64 for float64): mean and variance over N, H, W. Accurate also where the mean is large
        against the deviation: sums are taken of differences from a value near the mean (Chan, Golub & LeVeque, 1983).

    Raises:
        ValueError: for a shape or type that does not fit.
    """
    _check(x, {}, {})
    return _statistics(*_dense(x))


def batch_norm_apply(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    shortcut: Tensor | None = None,
    shortcut_mean: Tensor | None = None,
    shortcut_scale: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
) -> Tensor:
    """ReLU of the normalised x, plus the shortcut or the normalised shortcut where there is one.

    Args:
        x: (N, C, H, W) as in ``batch_norm_statistics``.
        mean, scale, bias: (C,) float32 (float64 with float64); scale is weight / sqrt(variance + eps).
        shortcut: like x.
        shortcut_mean, shortcut_scale, shortcut_bias: (C,) each, where the shortcut has a BatchNorm of its own.

    Returns:
        ``max((x - mean) scale + bias + ..., 0)``, (N, C, H, W) in the dtype of x, channels-last, rounded once.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    vectors = {"shortcut_mean": shortcut_mean, "shortcut_scale": shortcut_scale, "shortcut_bias": shortcut_bias}
    _check(x, {"shortcut": shortcut}, {"mean": mean, "scale": scale, "bias": bias, **vectors})
    _together(("shortcut_mean", shortcut_mean), shortcut_scale=shortcut_scale, shortcut_bias=shortcut_bias)
    if shortcut is None and shortcut_mean is not None:
        raise ValueError("shortcut: got None, expected a tensor as shortcut_mean is given")
    return _apply(*_dense(x, mean, scale, bias, shortcut, shortcut_mean, shortcut_scale, shortcut_bias))


def batch_norm_relu_reduce(dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """What the gradient of BatchNorm + ReLU needs from all rows: dbias, and dweight but for a factor.

    Args:
        dy: like x, the gradient of ``batch_norm_apply(x, mean, scale, bias)``.
        x, mean, scale, bias: as there.

    Returns:
        (2, C) float32 (float64 for float64): the sums over N, H, W of g and of g (x - mean), where g is dy wherever
        the output is not zero, and zero elsewhere.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    _check(x, {"dy": dy}, {"mean": mean, "scale": scale, "bias": bias})
    return _relu_reduce(*_dense(dy, x, mean, scale, bias))


def batch_norm_relu_input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, constant: Tensor, slope: Tensor
) -> Tensor:
    """``scale g - constant - slope (x - mean)``, with g as in ``batch_norm_relu_reduce``.

    Args:
        dy, x, mean, scale, bias: as in ``batch_norm_relu_reduce``.
        constant, slope: (C,), as the module's docstring has them.

    Returns:
        dx (N, C, H, W) in the dtype of x, channels-last.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    vectors = {"mean": mean, "scale": scale, "bias": bias, "constant": constant, "slope": slope}
    _check(x, {"dy": dy}, vectors)
    return _relu_input_gradient(*_dense(dy, x, mean, scale, bias, constant, slope))


def batch_norm_add_reduce(
    dy: Tensor,
    dy_skip: Tensor | None,
    y: Tensor,
    x: Tensor,
    mean: Tensor,
    shortcut: Tensor | None = None,
    shortcut_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient behind the last ReLU of a residual block, written once, and what BatchNorm needs from all rows.

    Args:
        dy, dy_skip: like x, the gradients of y from its readers (the next block's convolution and its shortcut); they
            are added in float32.
        y: like x, the block's output.
        x, mean: input and mean of the block's last BatchNorm.
        shortcut, shortcut_mean: those of the BatchNorm in the shortcut, where there is one.

    Returns:
        g (N, C, H, W) in the dtype of x, channels-last: ``dy + dy_skip`` wherever y is not zero; it is the gradient of
        the shortcut as well. And its sums, float32 (float64 for float64): of g, of g (x - mean) and, where a shortcut
        is given, of g (shortcut - shortcut_mean); (2, C) or (3, C).

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    maps = {"dy": dy, "dy_skip": dy_skip, "y": y, "shortcut": shortcut}
    _check(x, maps, {"mean": mean, "shortcut_mean": shortcut_mean})
    _together(("shortcut", shortcut), shortcut_mean=shortcut_mean)
    return _add_reduce(*_dense(dy, dy_skip, y, x, mean, shortcut, shortcut_mean))


def batch_norm_input_gradient(
    g: Tensor, x: Tensor, mean: Tensor, scale: Tensor, constant: Tensor, slope: Tensor
) -> Tensor:
    """``scale g - constant - slope (x - mean)`` for a g that is masked already.

    Args:
        g: like x, from ``batch_norm_add_reduce``.
        x: (N, C, H, W).
        mean, scale, constant, slope: (C,).

    Returns:
        dx (N, C, H, W) in the dtype of x, channels-last.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    _check(x, {"g": g}, {"mean": mean, "scale": scale, "constant": constant, "slope": slope})
    return _input_gradient(*_dense(g, x, mean, scale, constant, slope))


def batch_norm_input_gradients(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    constant: Tensor,
    slope: Tensor,
    shortcut: Tensor,
    shortcut_mean: Tensor,
    shortcut_scale: Tensor,
    shortcut_constant: Tensor,
    shortcut_slope: Tensor,
) -> tuple[Tensor, Tensor]:
    """``batch_norm_input_gradient`` of both BatchNorms that a block adds up, from one read of g.

    Args:
        g, x, mean, scale, constant, slope: as there.
        shortcut, shortcut_...: the same of the BatchNorm in the shortcut.

    Returns:
        dx and dshortcut, (N, C, H, W) in the dtype of x, channels-last.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    vectors = {"mean": mean, "scale": scale, "constant": constant, "slope": slope}
    others = {"mean": shortcut_mean, "scale": shortcut_scale, "constant": shortcut_constant, "slope": shortcut_slope}
    others = {f"shortcut_{name}": tensor for name, tensor in others.items()}
    _check(x, {"g": g, "shortcut": shortcut}, {**vectors, **others})
    return _input_gradients(*_dense(g, x, *vectors.values(), shortcut, *others.values()))


def batch_norm_relu_pool(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``batch_norm_apply`` and max pooling 3x3, stride 2, padding 1; the full-size activation is never written.

    Args:
        x, mean, scale, bias: as in ``batch_norm_apply``.

    Returns:
        y (N, C, (H + 1) // 2, (W + 1) // 2) in the dtype of x, and choice, uint8, of the same shape: 3 · row + column
        of the chosen pixel in its window, both from 0; the first largest in raster order, the last NaN if there is any.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    _check(x, {}, {"mean": mean, "scale": scale, "bias": bias})
    _check_pixels(x)
    return _relu_pool(*_dense(x, mean, scale, bias))


def batch_norm_relu_pool_reduce(
    dy: Tensor, dy_skip: Tensor | None, choice: Tensor, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """``batch_norm_relu_reduce`` behind the pool.

    Args:
        dy, dy_skip: (N, C, (H + 1) // 2, (W + 1) // 2), the gradients of the pool's output from its readers; they are
            added in float32.
        choice: uint8, of the same shape, from ``batch_norm_relu_pool``.
        x, mean, scale, bias: as there.

    Returns:
        (2, C) float32 (float64 for float64): the sums of g and of g (x - mean), where g of a pixel is the sum over the
        at most four windows that chose it, and zero where the ReLU is; not rounded.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    _check(x, {}, {"mean": mean, "scale": scale, "bias": bias})
    _check_pooled(x, dy, dy_skip, choice)
    return _relu_pool_reduce(*_dense(dy, dy_skip, choice, x, mean, scale, bias))


def batch_norm_relu_pool_input_gradient(
    dy: Tensor,
    dy_skip: Tensor | None,
    choice: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    constant: Tensor,
    slope: Tensor,
) -> Tensor:
    """``scale g - constant - slope (x - mean)``, with g as in ``batch_norm_relu_pool_reduce``.

    Args:
        dy, dy_skip, choice, x, mean, scale, bias: as there.
        constant, slope: (C,), as the module's docstring has them.

    Returns:
        dx (N, C, H, W) in the dtype of x, channels-last.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    _check(x, {}, {"mean": mean, "scale": scale, "bias": bias, "constant": constant, "slope": slope})
    _check_pooled(x, dy, dy_skip, choice)
    return _relu_pool_input_gradient(*_dense(dy, dy_skip, choice, x, mean, scale, bias, constant, slope))
