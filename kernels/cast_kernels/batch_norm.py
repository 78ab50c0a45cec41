"""BatchNorm in training mode with what surrounds it in a ResNet, streamed: one sweep over the activations an operator.

With rows r = (n, h, w), R of them, and channels c::

    mean_c, variance_c = mean and biased variance of x over rows        (Ioffe & Szegedy, ICML 2015)
    inverse_c = 1 / sqrt(variance_c + eps),  scale_c = weight_c inverse_c
    z_rc = (x_rc - mean_c) scale_c + bias_c  [+ shortcut_rc, or the same of a second x]
    y_rc = max(z_rc, 0)                      [then max pooling 3x3, stride 2, padding 1]

    g_rc  = dy_rc 1[y_rc > 0]                [dy + dy_skip; through the pool]
    dbias_c   = sum_r g_rc
    dweight_c = sum_r g_rc (x_rc - mean_c) inverse_c
    dx_rc = scale_c (g_rc - dbias_c / R - (x_rc - mean_c) inverse_c dweight_c / R)

The operators take vectors as other operators leave them: between two sweeps nothing is to be computed, and nothing to
be launched. Running statistics, sums over ranks and the composition of the gradient are the caller's, in ordinary
operations. No operator has a derivative.

================================  ==============================================  ===========================
operator                          reads (activations)                             writes
================================  ==============================================  ===========================
batch_norm_statistics             x                                               mean, variance, inverse
batch_norm_apply                  x [, shortcut]                                  y
batch_norm_apply_mask             x, shortcut                                     y, mask (a sixteenth of y)
batch_norm_relu_reduce            dy, x                                           dbias, dweight
batch_norm_relu_input_gradient    dy, x                                           dx
batch_norm_add_reduce             dy [, dy_skip], mask, x [, shortcut]            g, dbias, one or two dweight
batch_norm_input_gradient         g, x                                            dx
batch_norm_input_gradients        g, x, shortcut                                  dx, dshortcut
batch_norm_relu_pool              x                                               y, choice (a quarter of x)
batch_norm_relu_pool_reduce       dy [, dy_skip], choice, x                       dbias, dweight
batch_norm_relu_pool_input_...    dy [, dy_skip], choice, x                       dx
================================  ==============================================  ===========================

Rounding. Arithmetic is in float32, and every result is rounded once, to the dtype of x; eager PyTorch also rounds the
normalised value before it adds the shortcut, and the sum of two gradients before it reduces. g of
``batch_norm_add_reduce`` is rounded where it is written, and the sums are those of the rounded g, so that they belong
to what every later reader sees.

Masks. Inside a block the mask is computed again from x, by the same operations in the same order and rounded as y was.
At its end that would take the shortcut too, so there the forward sweep writes a bit an element: (N, ceil(C / 8), H, W)
bytes, channel c being bit c mod 8. Either way an element passes exactly if it is not zero in y, so a z that is positive
but rounds to zero does not (in float16 below 3e-8). A NaN in y is not zero and lets the gradient pass, as in torch. In
the pool the values are rounded before they are compared, so that ties are those of the rounded activations: values and
choices are torch's to the bit.

Parts. The samples may be P equal runs with statistics of their own, as if each were a batch. Statistics and sums are
then (P, C), weight and bias stay (C,), R is the number of rows of a part, and the launches are as many as for one part.

Memory format: everything is channels-last. Other strides are copied once, by ordinary operations, before the operator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from cast_kernels import batch_norm_kernels as kernels
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
PACKED_REGISTERS = 96
"""The same where a mask is packed for parts: five programs. For a sixth or seventh some architecture would spill."""
MAX_POOLED_PIXELS = 2**30
"""Largest N·H·W in front of the pool."""
MAX_PARTS = 65_535
"""CUDA's limit of a grid's second dimension."""
MAX_STATISTICS = 2**29
"""Largest number of parts times channels."""
VANISHES = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float32: 0.0}
"""The largest number that is rounded to zero: half of the smallest subnormal, a tie that goes to even."""


_FORMATS = (torch.contiguous_format, torch.channels_last)
"""Of a vector, and of activations."""


def _activations(like: Tensor, height: int | None = None, width: int | None = None, dtype: Any = None) -> Tensor:
    """Empty (N, C, H, W) in channels-last memory."""
    samples, channels = like.shape[:2]
    shape = (samples, channels, like.shape[2] if height is None else height, like.shape[3] if width is None else width)
    dtype = like.dtype if dtype is None else dtype
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _mask(like: Tensor) -> Tensor:
    """Empty (N, ceil(C / 8), H, W) bytes in channels-last memory."""
    samples, channels, height, width = like.shape
    shape = (samples, _octets(channels), height, width)
    return torch.empty(shape, dtype=torch.uint8, device=like.device, memory_format=torch.channels_last)


def _octets(channels: int) -> int:
    return (channels + 7) // 8


def _moments(x: Tensor, parts: int) -> Tensor:
    """Empty (3, C), or (3, parts, C)."""
    shape = (3, x.shape[1]) if parts == 1 else (3, parts, x.shape[1])
    return torch.empty(shape, dtype=reference.wide_dtype(x), device=x.device)


def _sums(mean: Tensor, count: int) -> Tensor:
    """Empty, ``count`` vectors like ``mean``."""
    return torch.empty((count, *mean.shape), dtype=mean.dtype, device=mean.device)


def _parts(mean: Tensor) -> int:
    return 1 if mean.dim() == 1 else mean.shape[0]


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _pooled(x: Tensor) -> tuple[int, int]:
    return (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2


def _sweep(
    kernel: Any,
    x: Tensor,
    parts: int,
    arguments: tuple[Tensor | float, ...],
    elements: int,
    pooled: bool = False,
    registers: int | None = None,
    **constants: Any,
) -> Launch:
    """A launch with one program a tile of ``elements``: of rows of x, or of windows of the pool."""
    grid, sizes, constants = _sizes(x, parts, elements, pooled, constants)
    return Launch(kernel, grid, (*arguments, *sizes), constants, WARPS, max_registers=registers)


def _reduction(
    kernel: Any,
    x: Tensor,
    parts: int,
    arguments: tuple[Tensor | int, ...],
    sums: Tensor,
    finish: tuple[Tensor | float, ...],
    elements: int,
    pooled: bool = False,
    **constants: Any,
) -> list[Launch]:
    """A sweep by as many programs as keep the GPU busy, and the launch that combines what they leave in a buffer.

    ``finish`` is what the second needs beside it: eps, or the ``inverse`` of each dweight.
    """
    _, sizes, constants = _sizes(x, parts, elements, pooled, constants)
    rows, *_, tiles, blocks = sizes
    # Rounded down: one program more than fit would double the time.
    programs = max(1, min(tiles, RESIDENT * device_properties(x.device)[1] // (blocks * parts)))
    statistics = kernel is kernels._statistics_kernel
    count = 2 if statistics else len(sums)
    partial = torch.empty((programs, count, *sums.shape[1:]), dtype=torch.float32, device=x.device)
    given = (*arguments, partial, *sizes, programs)
    # That of the pool needs more where C is no multiple of 8.
    registers = None if pooled and x.shape[1] % 8 else REGISTERS
    sweep = Launch(kernel, (programs * blocks, parts), given, constants, WARPS, max_registers=registers)
    block = {"BLOCK_P": COMBINED, "BLOCK_C": 16}
    width = parts * x.shape[1]
    if statistics:
        block["BLOCK_R"] = constants["BLOCK_R"]
        grid = (triton.cdiv(width, 16),)
        given = (partial, sums, *finish, rows, width, tiles, programs)
        return [sweep, Launch(kernels._combine_statistics_kernel, grid, given, block, WARPS)]
    given = (partial, finish[0], finish[-1], sums, programs, width, sums.numel())
    return [sweep, Launch(kernels._combine_sums_kernel, (triton.cdiv(sums.numel(), 16),), given, block, WARPS)]


def _sizes(
    x: Tensor, parts: int, elements: int, pooled: bool, constants: dict[str, Any]
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, Any]]:
    """Grid, run-time sizes (of a part) and constants of a sweep."""
    channels = x.shape[1]
    rows = x.numel() // channels // parts
    sizes: tuple[int, ...] = ()
    if pooled:
        height, width = _pooled(x)
        sizes = (*x.shape[2:], height, width)
        constants = {**constants, "LONG": x.numel() >= 2**31}
        rows = x.shape[0] // parts * height * width
    # At least a byte of a mask.
    block_c = min(max(triton.next_power_of_2(channels), 8), WIDEST)
    block_r = elements // block_c
    tiles, blocks = triton.cdiv(rows, block_r), triton.cdiv(channels, block_c)
    constants = {**constants, "MANY": parts > 1, "BLOCK_R": block_r, "BLOCK_C": block_c}
    return (tiles * blocks, parts), (rows, channels, *sizes, tiles, blocks), constants


def _plan_statistics(x: Tensor, eps: float, parts: int, statistics: Tensor) -> list[Launch]:
    return _reduction(kernels._statistics_kernel, x, parts, (x,), statistics, (eps,), REDUCED, STAGES=5)


def _plan_apply(
    x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor | None
) -> list[Launch]:
    shortcut, *others, y, mask = rest
    kind = 0 if shortcut is None else 1 if others[0] is None else 2
    # What a kernel does not use is any pointer.
    given = (x if tensor is None else tensor for tensor in (shortcut, *others, y, mask))
    arguments = (x, mean, inverse, weight, bias, *given, _octets(x.shape[1]))
    constants = {"SHORTCUT": kind, "KEEPS": mask is not None}
    limited = mask is not None and kind == 1 and _parts(mean) > 1 and x.shape[1] % 8 == 0
    registers = PACKED_REGISTERS if limited else None
    return [_sweep(kernels._apply_kernel, x, _parts(mean), arguments, STREAMED, registers=registers, **constants)]


def _plan_relu_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, bias: Tensor, sums: Tensor
) -> list[Launch]:
    constants = {"VANISHES": VANISHES[x.dtype], "STAGES": 3}
    arguments = (dy, x, mean, inverse, weight, bias)
    kernel = kernels._relu_reduce_kernel
    return _reduction(kernel, x, _parts(mean), arguments, sums, (inverse,), REDUCED, **constants)


def _plan_relu_input_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    bias: Tensor,
    dbias: Tensor,
    dweight: Tensor,
    count: int,
    dx: Tensor,
) -> list[Launch]:
    constants = {"MASKED": False, "VANISHES": VANISHES[x.dtype]}
    arguments = (dy, x, mean, inverse, weight, bias, dbias, dweight, dx, 1 / count)
    return [_sweep(kernels._input_gradient_kernel, x, _parts(mean), arguments, STREAMED, **constants)]


def _plan_add_reduce(
    dy: Tensor,
    dy_skip: Tensor | None,
    mask: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    shortcut: Tensor | None,
    shortcut_mean: Tensor | None,
    shortcut_inverse: Tensor | None,
    g: Tensor,
    sums: Tensor,
) -> list[Launch]:
    given = (dy, dy if dy_skip is None else dy_skip, mask, _octets(x.shape[1]), x, mean)
    given += (x, mean) if shortcut is None or shortcut_mean is None else (shortcut, shortcut_mean)
    finish = (inverse,) if shortcut_inverse is None else (inverse, shortcut_inverse)
    constants = {"SKIP": dy_skip is not None, "SHORTCUT": shortcut is not None, "STAGES": 3}
    return _reduction(kernels._add_reduce_kernel, x, _parts(mean), (*given, g), sums, finish, REDUCED, **constants)


def _plan_input_gradient(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    dbias: Tensor,
    dweight: Tensor,
    count: int,
    dx: Tensor,
) -> list[Launch]:
    constants = {"MASKED": True, "VANISHES": 0.0}
    arguments = (g, x, mean, inverse, weight, weight, dbias, dweight, dx, 1 / count)
    return [_sweep(kernels._input_gradient_kernel, x, _parts(mean), arguments, STREAMED, **constants)]


def _plan_input_gradients(g: Tensor, x: Tensor, mean: Tensor, *rest: Any) -> list[Launch]:
    *vectors, count, dx, dshortcut = rest
    arguments = (g, x, mean, *vectors, dx, dshortcut, 1 / count)
    return [_sweep(kernels._input_gradients_kernel, x, _parts(mean), arguments, STREAMED)]


def _plan_relu_pool(x: Tensor, mean: Tensor, *rest: Tensor) -> list[Launch]:
    # With narrow loads it is the limit that makes the assembler spill.
    registers = None if x.shape[1] % 8 else REGISTERS
    return [_sweep(kernels._relu_pool_kernel, x, _parts(mean), (x, mean, *rest), POOLED, True, registers)]


def _plan_relu_pool_reduce(
    dy: Tensor,
    dy_skip: Tensor | None,
    choice: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    bias: Tensor,
    sums: Tensor,
) -> list[Launch]:
    constants = {"SKIP": dy_skip is not None, "VANISHES": VANISHES[x.dtype]}
    arguments = (dy, dy if dy_skip is None else dy_skip, choice, x, mean, inverse, weight, bias)
    kernel = kernels._relu_pool_reduce_kernel
    return _reduction(kernel, x, _parts(mean), arguments, sums, (inverse,), POOLED, True, **constants)


def _plan_relu_pool_input_gradient(
    dy: Tensor, dy_skip: Tensor | None, choice: Tensor, x: Tensor, mean: Tensor, *rest: Any
) -> list[Launch]:
    *vectors, count, dx = rest
    constants = {"SKIP": dy_skip is not None, "VANISHES": VANISHES[x.dtype]}
    arguments = (dy, dy if dy_skip is None else dy_skip, choice, x, mean, *vectors, dx, 1 / count)
    return [_sweep(kernels._relu_pool_input_gradient_kernel, x, _parts(mean), arguments, POOLED, True, **constants)]


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
        """The results, by the kernels.

        Raises:
            ValueError: activations that are not channels-last, or a vector with gaps, which the kernels would misread.
        """
        arguments = self._whole(arguments)
        for tensor in arguments:
            if isinstance(tensor, Tensor) and not tensor.is_contiguous(memory_format=_FORMATS[tensor.dim() == 4]):
                shape, strides = tuple(tensor.shape), tensor.stride()
                raise ValueError(f"{self.name}: got strides {strides} for shape {shape}, expected channels-last, dense")
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


_statistics = _Operator(reference.batch_norm_statistics, lambda x, eps, parts: (_moments(x, parts),), _plan_statistics)
_apply = _Operator(
    reference.batch_norm_apply, lambda x, *_: (_activations(x),), lambda *arguments: _plan_apply(*arguments, None)
)
_apply_mask = _Operator(reference.batch_norm_apply_mask, lambda x, *_: (_activations(x), _mask(x)), _plan_apply)
_relu_reduce = _Operator(reference.batch_norm_relu_reduce, lambda dy, x, mean, *_: (_sums(mean, 2),), _plan_relu_reduce)
_relu_input_gradient = _Operator(
    reference.batch_norm_relu_input_gradient, lambda dy, x, *_: (_activations(x),), _plan_relu_input_gradient
)
_add_reduce = _Operator(
    reference.batch_norm_add_reduce,
    lambda dy, dy_skip, mask, x, mean, inverse, shortcut, *_: (
        _activations(x),
        _sums(mean, 2 if shortcut is None else 3),
    ),
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
    reference.batch_norm_relu_pool_reduce,
    lambda dy, dy_skip, choice, x, mean, *_: (_sums(mean, 2),),
    _plan_relu_pool_reduce,
)
_relu_pool_input_gradient = _Operator(
    reference.batch_norm_relu_pool_input_gradient,
    lambda dy, dy_skip, choice, x, *_: (_activations(x),),
    _plan_relu_pool_input_gradient,
)


def _check(
    x: Tensor,
    maps: Mapping[str, Tensor | None],
    vectors: Mapping[str, Tensor | None],
    affine: Mapping[str, Tensor | None],
) -> None:
    """Raise ValueError unless x is what the operators take, and the others fit it.

    ``maps`` are like x, ``vectors`` (C,) or (P, C), and ``affine`` (C,).
    """
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, C, H, W), not empty")
    check_kernel_dtype("x", x)
    for name, tensor in maps.items():
        if tensor is not None:
            check_shape(name, tensor, tuple(x.shape), "(N, C, H, W)")
            _check_dtype(name, tensor, x.dtype)
    shape, meaning = (x.shape[1],), "(C,)"
    name, first = next(iter(vectors.items()), ("", None))
    if first is not None and first.dim() == 2:
        _check_parts(name, first.shape[0], x)
        shape, meaning = (first.shape[0], x.shape[1]), "(P, C)"
    for name, tensor in vectors.items():
        if tensor is not None:
            check_shape(name, tensor, shape, meaning)
            _check_dtype(name, tensor, reference.wide_dtype(x))
    for name, tensor in affine.items():
        if tensor is not None:
            check_shape(name, tensor, (x.shape[1],), "(C,)")
            _check_dtype(name, tensor, reference.wide_dtype(x))
    check_same_device("x", x, **maps, **vectors, **affine)


def _check_parts(name: str, parts: int, x: Tensor) -> None:
    if not 1 <= parts <= MAX_PARTS or x.shape[0] % parts:
        raise ValueError(
            f"{name}: got {parts} parts, expected a divisor of {x.shape[0]} (samples), at most {MAX_PARTS}"
        )
    # Offsets into three of them are 32 bits wide.
    if parts * x.shape[1] > MAX_STATISTICS:
        raise ValueError(
            f"{name}: got {parts} parts of {x.shape[1]} channels, expected at most {MAX_STATISTICS} in all"
        )


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count: got {count}, expected at least 1 value a channel")


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
    # An int: torch 2.11 traces no truth value as an index.
    return [None if t is None else t.contiguous(memory_format=_FORMATS[int(t.dim() == 4)]) for t in tensors]


def batch_norm_statistics(x: Tensor, eps: float, parts: int = 1) -> Tensor:
    """Mean and biased variance of every channel, and 1 / sqrt(variance + eps).

    Args:
        x: (N, C, H, W), not empty, bfloat16, float16 or float32; on the CPU also float64.
        eps: added to the variance; ``nn.BatchNorm2d`` has 1e-5.
        parts: P, how many equal runs of samples have statistics of their own; a divisor of N, at most 65,535.

    Returns:
        (3, C), or (3, P, C) for more than one part, float32 (float64 for float64): mean, variance and inverse over
        N / P, H, W. Accurate also where the mean is large against the deviation: sums are taken of differences from a
        value near the mean (Chan, Golub & LeVeque, 1983).

    Raises:
        ValueError: for a shape or type that does not fit, a negative eps, or a P that does not divide N.
    """
    _check(x, {}, {}, {})
    _check_parts("parts", parts, x)
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}, expected at least 0")
    return _statistics(*_dense(x), eps, parts)


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
    """ReLU of the normalised x, plus the shortcut or the normalised shortcut where there is one.

    Args:
        x: (N, C, H, W) as in ``batch_norm_statistics``.
        mean, inverse: (C,) float32 (float64 with float64), or (P, C) of P parts, from there.
        weight, bias: (C,) in the dtype of mean, whatever P.
        shortcut: like x.
        shortcut_mean, shortcut_inverse, shortcut_weight, shortcut_bias: like mean and so on, where the shortcut has a
            BatchNorm of its own.

    Returns:
        ``max((x - mean) inverse weight + bias + ..., 0)``, (N, C, H, W) in the dtype of x, channels-last, rounded once.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    others = (shortcut_mean, shortcut_inverse, shortcut_weight, shortcut_bias)
    _check_apply(x, mean, inverse, weight, bias, shortcut, *others)
    return _apply(*_dense(x, mean, inverse, weight, bias, shortcut, *others))


def _check_apply(
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor | None,
    shortcut_mean: Tensor | None,
    shortcut_inverse: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
) -> None:
    vectors = {"mean": mean, "inverse": inverse, "shortcut_mean": shortcut_mean, "shortcut_inverse": shortcut_inverse}
    affine = {"weight": weight, "bias": bias, "shortcut_weight": shortcut_weight, "shortcut_bias": shortcut_bias}
    _check(x, {"shortcut": shortcut}, vectors, affine)
    _together(
        ("shortcut_mean", shortcut_mean),
        shortcut_inverse=shortcut_inverse,
        shortcut_weight=shortcut_weight,
        shortcut_bias=shortcut_bias,
    )
    if shortcut is None and shortcut_mean is not None:
        raise ValueError("shortcut: got None, expected a tensor as shortcut_mean is given")


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
    """``batch_norm_apply`` with a shortcut, and where its result is not zero, for ``batch_norm_add_reduce``.

    Returns:
        y, and mask (N, ceil(C / 8), H, W) uint8, channels-last: bit c mod 8 of byte c // 8 says whether channel c of y
        is not zero (NaN is not); bits without a channel are 0.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    others = (shortcut_mean, shortcut_inverse, shortcut_weight, shortcut_bias)
    _check_apply(x, mean, inverse, weight, bias, shortcut, *others)
    return _apply_mask(*_dense(x, mean, inverse, weight, bias, shortcut, *others))


def batch_norm_relu_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Gradients of bias and weight of BatchNorm + ReLU, which the gradient of x needs too.

    Args:
        dy: like x, the gradient of ``batch_norm_apply(x, mean, inverse, weight, bias)``.
        x, mean, inverse, weight, bias: as there.

    Returns:
        (2, C), or (2, P, C), float32 (float64 for float64): dbias and dweight, the sums over N, H, W of g and of
        g (x - mean) inverse, where g is dy wherever the output is not zero, and zero elsewhere. Those of weight and
        bias, which all parts have in common, are the sums over parts.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    _check(x, {"dy": dy}, {"mean": mean, "inverse": inverse}, {"weight": weight, "bias": bias})
    return _relu_reduce(*_dense(dy, x, mean, inverse, weight, bias))


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
    """Gradient of x behind BatchNorm + ReLU.

    Args:
        dy, x, mean, inverse, weight, bias: as in ``batch_norm_relu_reduce``.
        dbias, dweight: like mean, from there; sums over ranks where the statistics are those of all ranks.
        count: R, of how many values of a channel and part mean and variance are, over as many ranks as dbias and
            dweight.

    Returns:
        ``weight inverse (g - dbias / R - (x - mean) inverse dweight / R)``, (N, C, H, W) in the dtype of x,
        channels-last.

    Raises:
        ValueError: for shapes, types or devices that do not fit, or a count below 1.
    """
    vectors = {"mean": mean, "inverse": inverse, "dbias": dbias, "dweight": dweight}
    _check(x, {"dy": dy}, vectors, {"weight": weight, "bias": bias})
    _check_count(count)
    return _relu_input_gradient(*_dense(dy, x, mean, inverse, weight, bias, dbias, dweight), count)


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
    """The gradient behind the last ReLU of a residual block, written once, and those of bias and weight.

    Args:
        dy, dy_skip: like x, the gradients of the block's output y from its readers (the next block's convolution and
            its shortcut); they are added in float32.
        mask: uint8 (N, ceil(C / 8), H, W), from ``batch_norm_apply_mask``.
        x, mean, inverse: input and statistics of the block's last BatchNorm.
        shortcut, shortcut_mean, shortcut_inverse: those of the BatchNorm in the shortcut, where there is one.

    Returns:
        g (N, C, H, W) in the dtype of x, channels-last: ``dy + dy_skip`` wherever y is not zero; it is the gradient of
        the shortcut as well. And dbias, dweight and, where a shortcut is given, its dweight, float32 (float64 for
        float64): the sums of g, of g (x - mean) inverse and of g (shortcut - shortcut_mean) shortcut_inverse; (2, C) or
        (3, C), or with P between. The dbias of both BatchNorms is the same.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    maps = {"dy": dy, "dy_skip": dy_skip, "shortcut": shortcut}
    others = {"shortcut_mean": shortcut_mean, "shortcut_inverse": shortcut_inverse}
    _check(x, maps, {"mean": mean, "inverse": inverse, **others}, {})
    _together(("shortcut", shortcut), **others)
    samples, channels, height, width = x.shape
    check_shape("mask", mask, (samples, _octets(channels), height, width), "(N, ceil(C / 8), H, W)")
    _check_dtype("mask", mask, torch.uint8)
    check_same_device("x", x, mask=mask)
    return _add_reduce(*_dense(dy, dy_skip, mask, x, mean, inverse, shortcut, shortcut_mean, shortcut_inverse))


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
    """``batch_norm_relu_input_gradient`` for a g that is masked already.

    Args:
        g: like x, from ``batch_norm_add_reduce``.
        x, mean, inverse, weight, dbias, dweight, count: as there.

    Returns:
        dx (N, C, H, W) in the dtype of x, channels-last.

    Raises:
        ValueError: for shapes, types or devices that do not fit, or a count below 1.
    """
    vectors = {"mean": mean, "inverse": inverse, "dbias": dbias, "dweight": dweight}
    _check(x, {"g": g}, vectors, {"weight": weight})
    _check_count(count)
    return _input_gradient(*_dense(g, x, mean, inverse, weight, dbias, dweight), count)


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
    """``batch_norm_input_gradient`` of both BatchNorms that a block adds up, from one read of g.

    Args:
        g, x, mean, inverse, weight, dbias, dweight, count: as there; dbias and count are those of both.
        shortcut, shortcut_...: the same of the BatchNorm in the shortcut.

    Returns:
        dx and dshortcut, (N, C, H, W) in the dtype of x, channels-last.

    Raises:
        ValueError: for shapes, types or devices that do not fit, or a count below 1.
    """
    first = {"mean": mean, "inverse": inverse, "dbias": dbias, "dweight": dweight}
    second = {"mean": shortcut_mean, "inverse": shortcut_inverse, "dweight": shortcut_dweight}
    vectors = {**first, **{f"shortcut_{name}": tensor for name, tensor in second.items()}}
    _check(x, {"g": g, "shortcut": shortcut}, vectors, {"weight": weight, "shortcut_weight": shortcut_weight})
    _check_count(count)
    one = (g, x, mean, inverse, weight, dbias, dweight)
    other = (shortcut, shortcut_mean, shortcut_inverse, shortcut_weight, shortcut_dweight)
    return _input_gradients(*_dense(*one, *other), count)


def batch_norm_relu_pool(
    x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """``batch_norm_apply`` and max pooling 3x3, stride 2, padding 1; the full-size activation is never written.

    Args:
        x, mean, inverse, weight, bias: as in ``batch_norm_apply``.

    Returns:
        y (N, C, (H + 1) // 2, (W + 1) // 2) in the dtype of x, and choice, uint8, of the same shape: 3 · row + column
        of the chosen pixel in its window, both from 0; the first largest in raster order, the last NaN if there is any.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    _check(x, {}, {"mean": mean, "inverse": inverse}, {"weight": weight, "bias": bias})
    _check_pixels(x)
    return _relu_pool(*_dense(x, mean, inverse, weight, bias))


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
    """``batch_norm_relu_reduce`` behind the pool.

    Args:
        dy, dy_skip: (N, C, (H + 1) // 2, (W + 1) // 2), the gradients of the pool's output from its readers; they are
            added in float32.
        choice: uint8, of the same shape, from ``batch_norm_relu_pool``.
        x, mean, inverse, weight, bias: as there.

    Returns:
        dbias and dweight as there; g of a pixel is the sum over the at most four windows that chose it, and zero where
        the ReLU is; not rounded.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    _check(x, {}, {"mean": mean, "inverse": inverse}, {"weight": weight, "bias": bias})
    _check_pooled(x, dy, dy_skip, choice)
    return _relu_pool_reduce(*_dense(dy, dy_skip, choice, x, mean, inverse, weight, bias))


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
    """``batch_norm_relu_input_gradient`` behind the pool, with g as in ``batch_norm_relu_pool_reduce``.

    Args:
        dy, dy_skip, choice: as in ``batch_norm_relu_pool_reduce``.
        x, mean, inverse, weight, bias, dbias, dweight, count: as in ``batch_norm_relu_input_gradient``.

    Returns:
        dx (N, C, H, W) in the dtype of x, channels-last.

    Raises:
        ValueError: for shapes, types or devices that do not fit, or a count below 1.
    """
    vectors = {"mean": mean, "inverse": inverse, "dbias": dbias, "dweight": dweight}
    _check(x, {}, vectors, {"weight": weight, "bias": bias})
    _check_pooled(x, dy, dy_skip, choice)
    _check_count(count)
    given = _dense(dy, dy_skip, choice, x, mean, inverse, weight, bias, dbias, dweight)
    return _relu_pool_input_gradient(*given, count)
