"""InfoNCE over a queue of keys that never writes its logits: loss and ∂loss/∂query from one read of the queue.

Shapes: q (N, D) queries, k (N, D) their positive keys, Q (K, D) queue, T temperature; rows have unit length.

Forward, with l_j = q·Q_j / T and l⁺ = q·k / T, per sample::

    S = sum_j exp(l_j - m)      U = sum_j exp(l_j - m) Q_j      beaten = #{j: l_j > l⁺}
    margin = m + log S - l⁺     loss = softplus(margin)         1 - p⁺ = sigmoid(margin)

Backward, with the upstream gradient of the sample's loss as a factor::

    dq = (1 - p⁺) (U / S - k) / T        dk = -(1 - p⁺) q / T        none to the queue

This is attention of q over Q with values Q: the pass that makes the loss makes dq too, and backward reads nothing of
size K. Unit rows give |l| <= 1 / T, so for T >= 0.03 the maximum m is the constant 1 / T, and the results of tiles,
of programs and of ranks that hold a shard of the queue each simply add. For smaller T, where exp(-2 / T) leaves
float32, and for float16, whose range is too small for the weights, each program keeps a running maximum and partials
are rescaled when they meet.

Each program takes a block of queries and one contiguous range of the queue (so that a few queries still fill the GPU)
and writes its (S, U, beaten, m); a second, small kernel adds these in a fixed order and finishes. No atomics: two
runs give the same bits. Memory beyond the results is that of the partials, at most about
(multiprocessors · 128) · (D + 3) floats whatever N and K are.

q and k are rounded to the queue's type, as a key is when it is enqueued; products are accumulated in float32. bfloat16
and float16 queues use the tensor cores directly. A float32 queue with D <= 128 uses them by three bfloat16 products of
the high and low halves of each element, so that a product errs by about 2^-16 of |q| |Q_j| (TF32: 2^-11); beyond that
it uses float32 multiply-adds, exact and slow. The weights exp(l - m) are rounded like the queue, for U only.

Bytes, N = 256, K = 65,536, D = 128: the queue once for each block of 128 queries, 16.8 MB in bfloat16 (the second
block finds it in L2), partials 8.6 MB written and read: 34 MB, against 1,209 MB for logits in float32 with
cross_entropy.
FLOPs: 4·N·K·D = 8.6 G.

The reference wins in float64 (CPU only), for D > 512, where a gradient to the queue or a second derivative is wanted,
and for queues of a few thousand keys, where the launches are the time.
"""

# Triton's language is typed for its own compiler, not for a type checker.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cast_kernels import reference
from cast_kernels.launch import Launch, check_kernel_dtype, check_same_device, check_shape, device_properties
from cast_kernels.reference import Partials, has_fixed_maximum

MAX_DIMENSION = 512
"""Largest D: a block of queries, one tile of keys and the accumulator of U must fit one multiprocessor."""
LOG2_E = 1.4426950408889634
"""Exponentials are taken to base 2, which is what the hardware has."""

Buffers = tuple[Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _partials_kernel(
    query,  # (N, D), any strides, any floating type
    key,  # (N, D), any strides, any floating type
    queue,  # (K, D), any strides
    total,  # out (SPLITS, N)
    weighted,  # out (SPLITS, N, D)
    beaten,  # out (SPLITS, N) int32
    maximum,  # out (SPLITS, N)
    samples,
    keys,
    dimension,
    keys_per_split,
    scale,  # 1 / T in base 2
    query_n,
    query_d,
    key_n,
    key_d,
    queue_k,
    queue_d,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RUNNING_MAXIMUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (b, r): queries of block b against the keys of range r."""
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = row < samples
    d = tl.arange(0, BLOCK_D)
    in_d = d < dimension
    in_block = in_rows[:, None] & in_d[None, :]
    narrow = queue.dtype.element_ty
    q = tl.load(query + row[:, None] * query_n + (d * query_d)[None, :], mask=in_block, other=0.0).to(narrow)
    k = tl.load(key + row[:, None] * key_n + (d * key_d)[None, :], mask=in_block, other=0.0).to(narrow)
    positive = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)

    sum_row = tl.zeros((BLOCK_N,), tl.float32)
    beaten_row = tl.zeros((BLOCK_N,), tl.int32)
    sum_keys = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if RUNNING_MAXIMUM:
        max_row = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    else:
        max_row = tl.zeros((BLOCK_N,), tl.float32) + scale
    first = split * keys_per_split
    last = tl.minimum(first + keys_per_split, keys)
    tile_row = tl.arange(0, BLOCK_K)
    tile_offset = tile_row.to(tl.int64)[:, None] * queue_k + (d * queue_d)[None, :]
    for start in range(first, last, BLOCK_K):
        in_tile = start + tile_row < last
        tile_base = queue + tl.cast(start, tl.int64) * queue_k
        tile = tl.load(tile_base + tile_offset, mask=in_tile[:, None] & in_d[None, :], other=0.0)
        product = tl.dot(q, tl.trans(tile), input_precision=PRECISION)
        beaten_row += tl.sum(tl.where(in_tile[None, :] & (product > positive[:, None]), 1, 0), 1)
        logit = product * scale
        if RUNNING_MAXIMUM:
            logit = tl.where(in_tile[None, :], logit, float("-inf"))
            # A tile has at least one key, so the maximum is finite from the first tile on.
            new_max = tl.maximum(max_row, tl.max(logit, 1))
            rescale = tl.exp2(max_row - new_max)
            weight = tl.exp2(logit - new_max[:, None])
            sum_row = sum_row * rescale
            sum_keys = sum_keys * rescale[:, None]
            max_row = new_max
        else:
            weight = tl.where(in_tile[None, :], tl.exp2(logit - scale), 0.0)
        sum_row += tl.sum(weight, 1)
        sum_keys = tl.dot(weight.to(narrow), tile, sum_keys, input_precision=PRECISION)

    place = split.to(tl.int64) * samples + row
    tl.store(total + place, sum_row, mask=in_rows)
    tl.store(beaten + place, beaten_row, mask=in_rows)
    tl.store(maximum + place, max_row, mask=in_rows)
    tl.store(weighted + place[:, None] * dimension + d[None, :], sum_keys, mask=in_block)


@triton.jit
def _combine_kernel(
    query,  # (N, D), any strides, any floating type
    key,  # (N, D), any strides, any floating type
    queue,  # only for its type
    total,  # (SPLITS, N)
    weighted,  # (SPLITS, N, D)
    beaten,  # (SPLITS, N) int32
    maximum,  # (SPLITS, N), base 2
    loss,  # out (N,) if FINISH, else the total
    query_gradient,  # out (N, D) if FINISH, else the weighted sum
    probability,  # out (N,) 1 - p⁺ if FINISH, else the maximum (base e)
    beaten_out,  # out (N,) int64
    samples,
    dimension,
    splits,
    scale,  # 1 / T in base 2
    query_n,
    query_d,
    key_n,
    key_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FINISH: tl.constexpr,
):
    """One program adds up the partials of BLOCK_N queries, always in the order of the splits."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = row < samples
    d = tl.arange(0, BLOCK_D)
    in_d = d < dimension
    in_block = in_rows[:, None] & in_d[None, :]
    sum_row = tl.zeros((BLOCK_N,), tl.float32)
    beaten_row = tl.zeros((BLOCK_N,), tl.int64)
    sum_keys = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    max_row = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for split in range(splits):
        place = tl.cast(split, tl.int64) * samples + row
        part_max = tl.load(maximum + place, mask=in_rows, other=0.0)
        new_max = tl.maximum(max_row, part_max)
        # Selected where equal: parts with one maximum must add exactly, and -inf - -inf (no keys at all) is NaN.
        keep = tl.where(max_row == new_max, 1.0, tl.exp2(max_row - new_max))
        gain = tl.where(part_max == new_max, 1.0, tl.exp2(part_max - new_max))
        sum_row = sum_row * keep + tl.load(total + place, mask=in_rows, other=0.0) * gain
        part = tl.load(weighted + place[:, None] * dimension + d[None, :], mask=in_block, other=0.0)
        sum_keys = sum_keys * keep[:, None] + part * gain[:, None]
        beaten_row += tl.load(beaten + place, mask=in_rows, other=0)
        max_row = new_max

    tl.store(beaten_out + row, beaten_row, mask=in_rows)
    if FINISH:
        narrow = queue.dtype.element_ty
        q = tl.load(query + row[:, None] * query_n + (d * query_d)[None, :], mask=in_block, other=0.0)
        k = tl.load(key + row[:, None] * key_n + (d * key_d)[None, :], mask=in_block, other=0.0)
        q = q.to(narrow).to(tl.float32)
        k = k.to(narrow).to(tl.float32)
        positive = tl.sum(q * k, 1) * scale
        # Without any weight (an empty queue) the loss and 1 - p⁺ are zero, and so is the gradient.
        sum_safe = tl.where(sum_row == 0, 1.0, sum_row)
        logarithm = tl.where(sum_row == 0, float("-inf"), max_row + tl.log2(sum_safe))
        margin = (logarithm - positive) * 0.6931471805599453
        tail = tl.exp(-tl.abs(margin))
        soft = tl.log(1.0 + tail)
        negative = tl.where(margin > 0, 1.0, tail) / (1.0 + tail)
        tl.store(loss + row, tl.where(margin < 0, soft, margin + soft), mask=in_rows)
        tl.store(probability + row, negative, mask=in_rows)
        inverse_temperature = scale * 0.6931471805599453
        change = (sum_keys / sum_safe[:, None] - k) * (negative * inverse_temperature)[:, None]
        tl.store(query_gradient + row[:, None] * dimension + d[None, :], change, mask=in_block)
    else:
        tl.store(loss + row, sum_row, mask=in_rows)
        tl.store(probability + row, max_row * 0.6931471805599453, mask=in_rows)
        tl.store(query_gradient + row[:, None] * dimension + d[None, :], sum_keys, mask=in_block)


class Tiles(NamedTuple):
    """Sizes of one program of the partials kernel and the number of ranges that the queue is cut into."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int
    precision: str
    splits: int
    keys_per_split: int


def choose_tiles(
    samples: int, keys: int, dimension: int, dtype: torch.dtype, capability: int, multiprocessors: int
) -> Tiles:
    """Tiles for a GPU of a compute capability (80, 90, ...) with so many multiprocessors.

    Larger blocks of queries read the queue less often; the limit is the registers that hold a block's queries and
    weighted sum. Each choice is the largest that spills nothing on its architectures (offline table). Those with
    warp-group products (sm_90) or tensor memory (sm_100) afford twice the keys a tile.
    """
    block_d = max(16, triton.next_power_of_2(dimension))
    roomy = capability // 10 in (9, 10)
    if dtype == torch.float32:
        # Split products need too many registers beyond D = 128: plain multiply-adds there.
        if block_d <= 128:
            most, block_k, stages, precision = (64 if roomy else 32), 32, 2, "bf16x3"
        else:
            most, block_k, stages, precision = (32 if block_d <= 256 else 16), (32 if block_d <= 256 else 16), 2, "ieee"
    elif block_d <= 128:
        most, block_k, stages, precision = 128, (64 if roomy else 32), 3, "ieee"
    else:
        most, block_k, stages, precision = (64 if block_d <= 256 else 32), 32, 2, "ieee"
    block_n = min(max(16, triton.next_power_of_2(samples)), most)
    # One program for every multiprocessor, each with at least one tile of keys.
    wanted = max(1, multiprocessors // max(1, triton.cdiv(samples, block_n)))
    keys = max(keys, 1)
    keys_per_split = triton.cdiv(triton.cdiv(keys, wanted), block_k) * block_k
    splits = triton.cdiv(keys, keys_per_split)
    return Tiles(block_n, block_k, block_d, 8, stages, precision, splits, keys_per_split)


def allocate(query: Tensor, splits: int) -> tuple[Buffers, Buffers]:
    """Empty partials (total, weighted, beaten, maximum, each with a leading dimension of splits) and final results."""
    samples, dimension = query.shape
    partials = (
        query.new_empty((splits, samples), dtype=torch.float32),
        query.new_empty((splits, samples, dimension), dtype=torch.float32),
        query.new_empty((splits, samples), dtype=torch.int32),
        query.new_empty((splits, samples), dtype=torch.float32),
    )
    outputs = (
        query.new_empty((samples,), dtype=torch.float32),
        query.new_empty((samples, dimension), dtype=torch.float32),
        query.new_empty((samples,), dtype=torch.float32),
        query.new_empty((samples,), dtype=torch.int64),
    )
    return partials, outputs


def plan(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    tiles: Tiles,
    partials: Buffers,
    outputs: Buffers,
    finish: bool,
) -> tuple[Launch, Launch]:
    """The two launches for these tensors."""
    samples, dimension = query.shape
    scale = LOG2_E / temperature
    strides = (*query.stride(), *key.stride())
    first = Launch(
        kernel=_partials_kernel,
        grid=(triton.cdiv(samples, tiles.block_n), tiles.splits),
        arguments=(
            query,
            key,
            queue,
            *partials,
            samples,
            len(queue),
            dimension,
            tiles.keys_per_split,
            scale,
            *strides,
            *queue.stride(),
        ),
        constants={
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
            "BLOCK_D": tiles.block_d,
            "RUNNING_MAXIMUM": not has_fixed_maximum(temperature, queue.dtype),
            "PRECISION": tiles.precision,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    rows = max(1, 1024 // tiles.block_d)
    second = Launch(
        kernel=_combine_kernel,
        grid=(triton.cdiv(samples, rows),),
        arguments=(query, key, queue, *partials, *outputs, samples, dimension, tiles.splits, scale, *strides),
        constants={"BLOCK_N": rows, "BLOCK_D": tiles.block_d, "FINISH": finish},
        num_warps=4,
    )
    return first, second


def _launch(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, finish: bool, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, ∂loss/∂query, 1 - p⁺ and beaten; or total, weighted, maximum and beaten unless ``finish``."""
    if tiles is None:
        device = device_properties(query.device)
        tiles = choose_tiles(len(query), len(queue), query.shape[1], queue.dtype, *device)
    if query.device.type != "cuda":
        # Triton's interpreter: it multiplies in float32 and takes no other precision.
        tiles = tiles._replace(precision="ieee")
    partials, outputs = allocate(query, tiles.splits)
    for launch in plan(query, key, queue, temperature, tiles, partials, outputs, finish):
        launch.run()
    return outputs


@torch.library.custom_op("cast_kernels::info_nce", mutates_args=(), device_types="cuda")
def _operator(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launch(query, key, queue, temperature, finish=True)


@_operator.register_kernel("cpu")
def _operator_cpu(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Autocast stays on inside an operator and would run the reference's products in bfloat16.
    with torch.autocast("cpu", enabled=False):
        partials = reference.info_nce_partials(query, key, queue, temperature)
        terms = reference.info_nce_terms(query, key, partials, temperature, queue.dtype)
    return terms.loss, terms.query_gradient, terms.negative_probability, partials.beaten


@_operator.register_fake
def _operator_fake(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = reference.wide_dtype(query, key, queue)
    return (
        query.new_empty(query.shape[:1], dtype=dtype),
        query.new_empty(query.shape, dtype=dtype),
        query.new_empty(query.shape[:1], dtype=dtype),
        query.new_empty(query.shape[:1], dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, queue, temperature = inputs
    _, query_gradient, probability, _ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, query_gradient, probability)
    ctx.temperature = temperature
    ctx.key_dtype = key.dtype
    ctx.queue_dtype = queue.dtype


def _backward(ctx: Any, loss_gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if loss_gradient is None:
        return None, None, None, None
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "info_nce has no second derivative (backward was called with create_graph=True); "
            "use cast_kernels.reference.info_nce"
        )
    query, query_gradient, probability = ctx.saved_tensors
    for_query = for_key = None
    if ctx.needs_input_grad[0]:
        for_query = (loss_gradient[:, None] * query_gradient).to(query.dtype)
    if ctx.needs_input_grad[1]:
        rounded = query.to(ctx.queue_dtype).to(query_gradient.dtype)
        for_key = (rounded * (loss_gradient * probability / -ctx.temperature)[:, None]).to(ctx.key_dtype)
    return for_query, for_key, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("cast_kernels::info_nce_partials", mutates_args=(), device_types="cuda")
def _partials_operator(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, weighted, maximum, beaten = _launch(query, key, queue, temperature, finish=False)
    return total, weighted, beaten, maximum


@_partials_operator.register_kernel("cpu")
def _partials_operator_cpu(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast("cpu", enabled=False):
        total, weighted, beaten, maximum = reference.info_nce_partials(query, key, queue, temperature)
    return total, weighted, beaten, maximum


@_partials_operator.register_fake
def _partials_operator_fake(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, weighted, maximum, beaten = _operator_fake(query, key, queue, temperature)
    return loss, weighted, beaten, maximum


def _check(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> None:
    if query.dim() != 2:
        raise ValueError(f"query: got {query.dim()} dimensions, expected 2: (N, D)")
    samples, dimension = query.shape
    if not 1 <= dimension <= MAX_DIMENSION:
        raise ValueError(f"query: got D = {dimension}, expected 1 to {MAX_DIMENSION}")
    check_shape("key", key, (samples, dimension), "(N, D)")
    if queue.dim() != 2 or queue.shape[1] != dimension:
        raise ValueError(f"queue: got shape {tuple(queue.shape)}, expected (K, D) with D = {dimension}")
    for name, tensor in (("query", query), ("key", key), ("queue", queue)):
        check_kernel_dtype(name, tensor)
    check_same_device("query", query, key=key, queue=queue)
    _check_temperature(temperature)


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: got {temperature}, expected a finite number above 0")


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE of MoCo (He et al., CVPR 2020) with one positive and a queue of negatives, in O(N·D) memory.

    Args:
        query, key: (N, D), D <= 512, rows of unit length; bfloat16, float16 or float32, on the CPU also float64. They
            are rounded to the queue's type.
        queue: (K, D), rows of unit length, any K; its type is that of the products. Any strides, no copy is made.
        temperature: T > 0.

    Returns:
        loss (N,) float32 (float64 if an input is), differentiable in query and key, not in the queue; and beaten (N,)
        int64: the number of negatives with a larger logit than the positive (equal ones may go either way, by
        rounding), so that contrastive top-k accuracy is the share of ``beaten < k``.
        Rows need not be exactly of unit length, but for T >= 0.03 the loss is inf once a logit exceeds 1 / T by 88.

    Raises:
        ValueError: for shapes, types, devices or a temperature that do not fit.
        NotImplementedError: from a backward with ``create_graph=True``.
    """
    _check(query, key, queue, temperature)
    loss, _, _, beaten = _operator(query, key, queue.detach(), temperature)
    return loss, beaten


def info_nce_partials(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Partials:
    """What one shard of a queue contributes to ``info_nce``; arguments as there, with the shard as ``queue``.

    Returns:
        ``Partials``: total (N,), weighted (N, D), beaten (N,), maximum (N,), without gradient. For T >= 0.03 and a
        queue that is not float16 all shards have the same maximum, and the partials of a union of shards are the
        plain sums.

    Raises:
        ValueError: as ``info_nce``.
    """
    _check(query, key, queue, temperature)
    return Partials(*_partials_operator(query.detach(), key.detach(), queue.detach(), temperature))


def info_nce_combine(
    query: Tensor, key: Tensor, partials: Sequence[Partials], temperature: float, queue_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``info_nce`` from the partials of all shards of a queue (or from their sum, as a sequence of one).

    Args:
        query, key, temperature: as for ``info_nce_partials``.
        partials: at least one; added in the order given.
        queue_dtype: type of the queue, to which query and key are rounded.

    Returns:
        loss (N,) and beaten (N,) as ``info_nce``, with the same gradients. Ordinary operations on (N, D) tensors,
        which Inductor fuses.

    Raises:
        ValueError: for no partials, or shapes or a temperature that do not fit.
    """
    if not partials:
        raise ValueError("partials: got none, expected those of at least one shard")
    check_shape("key", key, tuple(query.shape), "(N, D)")
    for part in partials:
        check_shape("partials.weighted", part.weighted, tuple(query.shape), "(N, D)")
    _check_temperature(temperature)
    return reference.info_nce_combine(query, key, partials, temperature, queue_dtype)
