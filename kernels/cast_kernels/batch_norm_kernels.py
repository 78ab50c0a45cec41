"""The Triton kernels behind ``batch_norm``, which says what they compute and launches them.

With ``MANY`` the second dimension of the grid are parts, equal runs of rows of which each has vectors of its own:
vectors are then (parts, C), else (C,); weight and bias are (C,) always. ``rows``, ``windows``, ``tiles`` and
``programs`` count within a part.
"""

# Triton's language is typed for its own compiler, not for a type checker.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(start, rows, channels, first_channel, MANY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile from row ``start`` of this part on: where it begins, offsets from there, and which of them are there.

    32 bits are enough for the offsets.
    """
    row = tl.arange(0, BLOCK_R)
    column = first_channel + tl.arange(0, BLOCK_C)
    left = tl.minimum(rows - start, BLOCK_R).to(tl.int32)
    offset = row[:, None] * channels + column[None, :]
    first = start
    if MANY:
        first += tl.program_id(1).to(tl.int64) * rows
    return first * channels, offset, (row < left)[:, None] & (column < channels)[None, :]


@triton.jit
def _vector(pointer, first_channel, channels, MANY: tl.constexpr, BLOCK_C: tl.constexpr):
    """(1, BLOCK_C) of this part's vector."""
    if MANY:
        pointer += tl.program_id(1) * channels
    column = first_channel + tl.arange(0, BLOCK_C)
    return tl.load(pointer + column, mask=column < channels, other=0.0)[None, :]


@triton.jit
def _scale(inverse, weight, first_channel, channels, MANY: tl.constexpr, BLOCK_C: tl.constexpr):
    """(1, BLOCK_C): weight / sqrt(variance + eps), the same bits in every kernel."""
    own = _vector(inverse, first_channel, channels, MANY, BLOCK_C)
    return own * _vector(weight, first_channel, channels, False, BLOCK_C)


@triton.jit
def _constant_and_slope(
    factor,
    inverse,
    dbias,
    dweight,
    share,
    first_channel,
    channels,
    MANY: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(1, BLOCK_C) each: what dx loses for the mean's and for the variance's part in the gradient."""
    shared = factor * share
    constant = shared * _vector(dbias, first_channel, channels, MANY, BLOCK_C)
    own = _vector(inverse, first_channel, channels, MANY, BLOCK_C)
    return constant, shared * own * _vector(dweight, first_channel, channels, MANY, BLOCK_C)


@triton.jit
def _leave(
    partial,
    program,
    place: tl.constexpr,
    count: tl.constexpr,
    value,
    first_channel,
    channels,
    MANY: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Stores (BLOCK_C,) as one of ``count`` partial results of a program, in (programs, count, parts, C)."""
    row = program * count + place
    if MANY:
        row = row * tl.num_programs(1) + tl.program_id(1)
    column = first_channel + tl.arange(0, BLOCK_C)
    tl.store(partial + row * channels + column, value, mask=column < channels)


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
def _packed(passes, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_R, BLOCK_C) truth values → (BLOCK_R, BLOCK_C / 8) bytes. A thread has the eight of a byte, or half."""
    eight = tl.reshape(passes.to(tl.int32), (BLOCK_R, BLOCK_C // 8, 8))
    return tl.sum(eight << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def _unpacked(bytes, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The inverse of ``_packed``."""
    eight = (bytes.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(eight, (BLOCK_R, BLOCK_C)) != 0


@triton.jit
def _statistics_kernel(
    x,
    partial,  # out (programs, 2, parts, C): mean, and sum of squares of the deviations from it
    rows,
    channels,
    tiles,
    blocks,
    programs,
    MANY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every ``programs``-th tile of rows. Sums are of differences from the mean of the first of these tiles."""
    program, first_channel = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_C
    start = tl.cast(program, tl.int64) * BLOCK_R
    base, offset, there = _tile(start, rows, channels, first_channel, MANY, BLOCK_R, BLOCK_C)
    value = _wide(x + base, offset, there)
    count = tl.minimum(rows - start, BLOCK_R).to(tl.float32)
    shift = (tl.sum(value, 0) / count)[None, :]
    first = tl.where(there, value - shift, 0.0)
    second = first * first
    for tile in tl.range(program + programs, tiles, programs, num_stages=STAGES):
        start = tl.cast(tile, tl.int64) * BLOCK_R
        base, offset, there = _tile(start, rows, channels, first_channel, MANY, BLOCK_R, BLOCK_C)
        value = _wide(x + base, offset, there)
        difference = tl.where(there, value - shift, 0.0)
        first += difference
        second += difference * difference
        count += tl.minimum(rows - start, BLOCK_R).to(tl.float32)
    total = tl.sum(first, 0)
    mean = tl.sum(shift, 0) + total / count
    squares = tl.sum(second, 0) - total * (total / count)
    _leave(partial, program, 0, 2, mean, first_channel, channels, MANY, BLOCK_C)
    _leave(partial, program, 1, 2, squares, first_channel, channels, MANY, BLOCK_C)


@triton.jit
def _combine_statistics_kernel(
    partial,
    statistics,  # out (3, parts, C): mean, variance and 1 / sqrt(variance + eps)
    eps,
    rows,
    width,  # parts · C
    tiles,
    programs,
    BLOCK_R: tl.constexpr,  # of the sweep
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Chan, Golub & LeVeque (1983): the squares of a union are those of its parts and of the parts' means."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < width
    anchor = tl.load(partial + column, mask=inside, other=0.0)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        there = (program < programs)[:, None] & inside[None, :]
        count = _rows_of(program, rows, tiles, programs, BLOCK_R)[:, None]
        mean = tl.load(partial + program[:, None] * 2 * width + column[None, :], mask=there, other=0.0)
        total += tl.where(there, count * (mean - anchor), 0.0)
    centre = anchor + (tl.sum(total, 0) / rows)[None, :]
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        there = (program < programs)[:, None] & inside[None, :]
        count = _rows_of(program, rows, tiles, programs, BLOCK_R)[:, None]
        place = partial + program[:, None] * 2 * width + column[None, :]
        distance = tl.load(place, mask=there, other=0.0) - centre
        within = tl.load(place + width, mask=there, other=0.0)
        squares += tl.where(there, within + count * distance * distance, 0.0)
    variance = tl.sum(squares, 0) / rows
    # Rounding can leave a constant channel a little below zero.
    variance = tl.where(variance < 0.0, 0.0, variance)
    tl.store(statistics + column, tl.sum(centre, 0), mask=inside)
    tl.store(statistics + width + column, variance, mask=inside)
    tl.store(statistics + 2 * width + column, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), mask=inside)


@triton.jit
def _rows_of(program, rows, tiles, programs, BLOCK_R: tl.constexpr):
    """How many rows a program of the sweep took."""
    owned = (tiles - program + programs - 1) // programs
    missing = tl.cast(tiles, tl.int64) * BLOCK_R - rows
    last = (tiles - 1 - program) % programs == 0
    return (owned * BLOCK_R).to(tl.float32) - tl.where(last, missing.to(tl.float32), 0.0)


@triton.jit
def _combine_sums_kernel(
    partial,
    inverse,
    shortcut_inverse,
    sums,  # out (2 or 3, parts, C): dbias, dweight, and dweight of the shortcut
    programs,
    each,  # parts · C
    width,  # 2 or 3 times that
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(programs, width) → (width,), in a fixed order; then the factor that makes dweight of the sum of g (x - mean)."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        there = (program < programs)[:, None] & (column < width)[None, :]
        total += tl.load(partial + program[:, None] * width + column[None, :], mask=there, other=0.0)
    place, vector = column // each, column % each
    factor = tl.load(inverse + vector, mask=place == 1, other=1.0)
    factor *= tl.load(shortcut_inverse + vector, mask=place == 2, other=1.0)
    tl.store(sums + column, tl.sum(total, 0) * factor, mask=column < width)


@triton.jit
def _apply_kernel(
    x,
    mean,
    inverse,
    weight,
    bias,
    shortcut,  # none, (N, C, H, W), or one with a BatchNorm of its own: SHORTCUT = 0, 1, 2
    shortcut_mean,
    shortcut_inverse,
    shortcut_weight,
    shortcut_bias,
    y,  # out
    mask,  # out (N, H, W, octets) bytes with KEEPS
    octets,
    rows,
    channels,
    tiles,
    blocks,
    SHORTCUT: tl.constexpr,
    KEEPS: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # From the end, here and in the other sweeps that follow a reduction: what that read last may still be in the L2.
    start = (tiles - 1 - tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R
    first_channel = tl.program_id(0) % blocks * BLOCK_C
    base, offset, there = _tile(start, rows, channels, first_channel, MANY, BLOCK_R, BLOCK_C)
    z = _preactivation(
        _wide(x + base, offset, there),
        _vector(mean, first_channel, channels, MANY, BLOCK_C),
        _scale(inverse, weight, first_channel, channels, MANY, BLOCK_C),
        _vector(bias, first_channel, channels, False, BLOCK_C),
    )
    if SHORTCUT == 1:
        z += _wide(shortcut + base, offset, there)
    if SHORTCUT == 2:
        z += _preactivation(
            _wide(shortcut + base, offset, there),
            _vector(shortcut_mean, first_channel, channels, MANY, BLOCK_C),
            _scale(shortcut_inverse, shortcut_weight, first_channel, channels, MANY, BLOCK_C),
            _vector(shortcut_bias, first_channel, channels, False, BLOCK_C),
        )
    rounded = _relu(z).to(y.dtype.element_ty)
    tl.store(y + base + offset, rounded, mask=there)
    if KEEPS:
        passes = there & ~(rounded.to(tl.float32) <= 0.0)
        base, offset, there = _tile(start, rows, octets, first_channel // 8, MANY, BLOCK_R, BLOCK_C // 8)
        tl.store(mask + base + offset, _packed(passes, BLOCK_R, BLOCK_C), mask=there)


@triton.jit
def _relu_reduce_kernel(
    dy,
    x,
    mean,
    inverse,
    weight,
    bias,
    partial,  # out (programs, 2, parts, C)
    rows,
    channels,
    tiles,
    blocks,
    programs,
    VANISHES: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, first_channel = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_C
    centre = _vector(mean, first_channel, channels, MANY, BLOCK_C)
    factor = _scale(inverse, weight, first_channel, channels, MANY, BLOCK_C)
    level = _vector(bias, first_channel, channels, False, BLOCK_C)
    first = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        start = tl.cast(tile, tl.int64) * BLOCK_R
        base, offset, there = _tile(start, rows, channels, first_channel, MANY, BLOCK_R, BLOCK_C)
        value = _wide(x + base, offset, there)
        upstream = _wide(dy + base, offset, there)
        g = tl.where(_preactivation(value, centre, factor, level) <= VANISHES, 0.0, upstream)
        first += g
        second += g * (value - centre)
    _leave(partial, program, 0, 2, tl.sum(first, 0), first_channel, channels, MANY, BLOCK_C)
    _leave(partial, program, 1, 2, tl.sum(second, 0), first_channel, channels, MANY, BLOCK_C)


@triton.jit
def _add_reduce_kernel(
    dy,
    dy_skip,
    mask,
    octets,
    x,
    mean,
    shortcut,
    shortcut_mean,
    g,  # out
    partial,  # out (programs, 2 or 3, parts, C)
    rows,
    channels,
    tiles,
    blocks,
    programs,
    SKIP: tl.constexpr,
    SHORTCUT: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, first_channel = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_C
    centre = _vector(mean, first_channel, channels, MANY, BLOCK_C)
    if SHORTCUT:
        shortcut_centre = _vector(shortcut_mean, first_channel, channels, MANY, BLOCK_C)
    first = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    third = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        start = tl.cast(tile, tl.int64) * BLOCK_R
        base, offset, there = _tile(start, rows, octets, first_channel // 8, MANY, BLOCK_R, BLOCK_C // 8)
        passes = _unpacked(tl.load(mask + base + offset, mask=there, other=0), BLOCK_R, BLOCK_C)
        base, offset, there = _tile(start, rows, channels, first_channel, MANY, BLOCK_R, BLOCK_C)
        upstream = _wide(dy + base, offset, there)
        if SKIP:
            upstream += _wide(dy_skip + base, offset, there)
        masked = tl.where(passes, upstream, 0.0).to(g.dtype.element_ty)
        tl.store(g + base + offset, masked, mask=there)
        rounded = masked.to(tl.float32)
        first += rounded
        second += rounded * (_wide(x + base, offset, there) - centre)
        if SHORTCUT:
            third += rounded * (_wide(shortcut + base, offset, there) - shortcut_centre)
    _leave(partial, program, 0, 2 + SHORTCUT, tl.sum(first, 0), first_channel, channels, MANY, BLOCK_C)
    _leave(partial, program, 1, 2 + SHORTCUT, tl.sum(second, 0), first_channel, channels, MANY, BLOCK_C)
    if SHORTCUT:
        _leave(partial, program, 2, 3, tl.sum(third, 0), first_channel, channels, MANY, BLOCK_C)


@triton.jit
def _input_gradient_kernel(
    dy,  # or g, masked already
    x,
    mean,
    inverse,
    weight,
    bias,
    dbias,
    dweight,
    dx,  # out
    share,  # 1 / values a channel
    rows,
    channels,
    tiles,
    blocks,
    MASKED: tl.constexpr,
    VANISHES: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start = (tiles - 1 - tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R
    first_channel = tl.program_id(0) % blocks * BLOCK_C
    base, offset, there = _tile(start, rows, channels, first_channel, MANY, BLOCK_R, BLOCK_C)
    value = _wide(x + base, offset, there)
    g = _wide(dy + base, offset, there)
    centre = _vector(mean, first_channel, channels, MANY, BLOCK_C)
    factor = _scale(inverse, weight, first_channel, channels, MANY, BLOCK_C)
    if not MASKED:
        level = _vector(bias, first_channel, channels, False, BLOCK_C)
        g = tl.where(_preactivation(value, centre, factor, level) <= VANISHES, 0.0, g)
    flat, tilt = _constant_and_slope(factor, inverse, dbias, dweight, share, first_channel, channels, MANY, BLOCK_C)
    gradient = factor * g - flat - tilt * (value - centre)
    tl.store(dx + base + offset, gradient.to(dx.dtype.element_ty), mask=there)


@triton.jit
def _input_gradients_kernel(
    g,
    x,
    mean,
    inverse,
    weight,
    dbias,
    dweight,
    shortcut,
    shortcut_mean,
    shortcut_inverse,
    shortcut_weight,
    shortcut_dweight,
    dx,  # out
    dshortcut,  # out
    share,  # 1 / values a channel
    rows,
    channels,
    tiles,
    blocks,
    MANY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start = (tiles - 1 - tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R
    first_channel = tl.program_id(0) % blocks * BLOCK_C
    base, offset, there = _tile(start, rows, channels, first_channel, MANY, BLOCK_R, BLOCK_C)
    upstream = _wide(g + base, offset, there)
    factor = _scale(inverse, weight, first_channel, channels, MANY, BLOCK_C)
    flat, tilt = _constant_and_slope(factor, inverse, dbias, dweight, share, first_channel, channels, MANY, BLOCK_C)
    centred = _wide(x + base, offset, there) - _vector(mean, first_channel, channels, MANY, BLOCK_C)
    gradient = factor * upstream - flat - tilt * centred
    tl.store(dx + base + offset, gradient.to(dx.dtype.element_ty), mask=there)
    factor = _scale(shortcut_inverse, shortcut_weight, first_channel, channels, MANY, BLOCK_C)
    flat, tilt = _constant_and_slope(
        factor, shortcut_inverse, dbias, shortcut_dweight, share, first_channel, channels, MANY, BLOCK_C
    )
    centred = _wide(shortcut + base, offset, there) - _vector(shortcut_mean, first_channel, channels, MANY, BLOCK_C)
    gradient = factor * upstream - flat - tilt * centred
    tl.store(dshortcut + base + offset, gradient.to(dshortcut.dtype.element_ty), mask=there)


@triton.jit
def _row_offset(row, channels, LONG: tl.constexpr):
    """(R, 1), in 64 bits only where they are needed."""
    if LONG:
        row = row.to(tl.int64)
    return row[:, None] * channels


@triton.jit
def _windows(tile, windows, pooled_height, pooled_width, MANY: tl.constexpr, BLOCK_R: tl.constexpr):
    """A tile of windows, counted over all parts, which of them are of this part, and their sample, row and column."""
    window = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    here = window < windows
    if MANY:
        window += tl.program_id(1) * windows
    line = window // pooled_width
    sample = line // pooled_height
    return window, here, sample, line - sample * pooled_height, window - line * pooled_width


@triton.jit
def _relu_pool_kernel(
    x,
    mean,
    inverse,
    weight,
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
    MANY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_channel = tl.program_id(0) % blocks * BLOCK_C
    centre = _vector(mean, first_channel, channels, MANY, BLOCK_C)
    factor = _scale(inverse, weight, first_channel, channels, MANY, BLOCK_C)
    level = _vector(bias, first_channel, channels, False, BLOCK_C)
    tile = tiles - 1 - tl.program_id(0) // blocks
    window, here, sample, top, left = _windows(tile, windows, pooled_height, pooled_width, MANY, BLOCK_R)
    top, left = top * 2 - 1, left * 2 - 1
    corner = (sample * height + top) * width + left
    column = first_channel + tl.arange(0, BLOCK_C)
    inside = (column < channels)[None, :]
    # Below every value of a ReLU: a pixel outside is never chosen.
    largest = tl.full((BLOCK_R, BLOCK_C), -1.0, tl.float32)
    chosen = tl.zeros((BLOCK_R, BLOCK_C), tl.int32)
    for tap in tl.static_range(9):
        row, side = top + tap // 3, left + tap % 3
        there = here & (row >= 0) & (row < height) & (side >= 0) & (side < width)
        there = there[:, None] & inside
        pixel = corner + tap // 3 * width + tap % 3
        value = _wide(x, _row_offset(pixel, channels, LONG) + column[None, :], there)
        rounded = _relu(_preactivation(value, centre, factor, level)).to(y.dtype.element_ty).to(tl.float32)
        # torch's rule: the first largest, the last NaN.
        take = there & ((rounded > largest) | (rounded != rounded))
        largest = tl.where(take, rounded, largest)
        chosen = tl.where(take, tap, chosen)
    place = _row_offset(window, channels, LONG) + column[None, :]
    there = here[:, None] & inside
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
    here,
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
    inverse,
    weight,
    bias,
    partial,  # out (programs, 2, parts, C)
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
    MANY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program, first_channel = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_C
    column = first_channel + tl.arange(0, BLOCK_C)
    inside = column < channels
    centre = _vector(mean, first_channel, channels, MANY, BLOCK_C)
    factor = _scale(inverse, weight, first_channel, channels, MANY, BLOCK_C)
    level = _vector(bias, first_channel, channels, False, BLOCK_C)
    first = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in range(program, tiles, programs):
        window, here, sample, row, side = _windows(tile, windows, pooled_height, pooled_width, MANY, BLOCK_R)
        gradients = _gather(
            dy,
            dy_skip,
            choice,
            window,
            here,
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
            there = (here & (down < height) & (across < width))[:, None] & inside[None, :]
            pixel = (sample * height + down) * width + across
            difference = _wide(x, _row_offset(pixel, channels, LONG) + column[None, :], there) - centre
            g = tl.where(tl.fma(difference, factor, level) <= VANISHES, 0.0, gradients[place])
            first += g
            second += g * difference
    _leave(partial, program, 0, 2, tl.sum(first, 0), first_channel, channels, MANY, BLOCK_C)
    _leave(partial, program, 1, 2, tl.sum(second, 0), first_channel, channels, MANY, BLOCK_C)


@triton.jit
def _relu_pool_input_gradient_kernel(
    dy,
    dy_skip,
    choice,
    x,
    mean,
    inverse,
    weight,
    bias,
    dbias,
    dweight,
    dx,  # out
    share,  # 1 / values a channel
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
    MANY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_channel = tl.program_id(0) % blocks * BLOCK_C
    column = first_channel + tl.arange(0, BLOCK_C)
    centre = _vector(mean, first_channel, channels, MANY, BLOCK_C)
    factor = _scale(inverse, weight, first_channel, channels, MANY, BLOCK_C)
    level = _vector(bias, first_channel, channels, False, BLOCK_C)
    flat, tilt = _constant_and_slope(factor, inverse, dbias, dweight, share, first_channel, channels, MANY, BLOCK_C)
    tile = tiles - 1 - tl.program_id(0) // blocks
    window, here, sample, row, side = _windows(tile, windows, pooled_height, pooled_width, MANY, BLOCK_R)
    gradients = _gather(
        dy,
        dy_skip,
        choice,
        window,
        here,
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
        there = (here & (down < height) & (across < width))[:, None] & (column < channels)[None, :]
        pixel = (sample * height + down) * width + across
        offset = _row_offset(pixel, channels, LONG) + column[None, :]
        value = _wide(x, offset, there)
        g = tl.where(_preactivation(value, centre, factor, level) <= VANISHES, 0.0, gradients[place])
        gradient = factor * g - flat - tilt * (value - centre)
        tl.store(dx + offset, gradient.to(dx.dtype.element_ty), mask=there)
