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

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cast_kernels import reference
from cast_kernels.launch import check_kernel_dtype, check_same_device, check_shape


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


def _register(plain: Callable[..., Any], allocate: Callable[..., tuple[Tensor, ...]]) -> Any:
    """The operator of the reference's name and signature.

    Args:
        plain: the reference, which is the implementation on a CPU.
        allocate: from the operator's arguments to its empty results.
    """
    signature = inspect.signature(plain)
    single = signature.return_annotation in (Tensor, "Tensor")

    def results(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        # The dispatcher leaves out trailing arguments that have their default.
        bound = signature.bind(*arguments)
        bound.apply_defaults()
        return bound.args, allocate(*bound.args)

    def on_cpu(*arguments: Any) -> Any:
        arguments, made = results(arguments)
        # Autocast stays on inside an operator.
        with torch.autocast("cpu", enabled=False):
            for empty, value in zip(made, _as_tuple(plain(*arguments)), strict=True):
                empty.copy_(value)
        return made[0] if single else made

    def fake(*arguments: Any) -> Any:
        made = results(arguments)[1]
        return made[0] if single else made

    operator = torch.library.custom_op(
        f"cast_kernels::{plain.__name__}",
        on_cpu,
        mutates_args=(),
        device_types="cpu",
        schema=torch.library.infer_schema(plain, mutates_args=()),
    )
    operator.register_fake(fake)
    return operator


def _pooled(x: Tensor) -> tuple[int, int]:
    return (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2


_statistics = _register(reference.batch_norm_statistics, lambda x: (_vectors(x, 2),))
_apply = _register(reference.batch_norm_apply, lambda x, *_: (_activations(x),))
_relu_reduce = _register(reference.batch_norm_relu_reduce, lambda dy, x, *_: (_vectors(x, 2),))
_relu_input_gradient = _register(reference.batch_norm_relu_input_gradient, lambda dy, x, *_: (_activations(x),))
_add_reduce = _register(
    reference.batch_norm_add_reduce,
    lambda dy, dy_skip, y, x, mean, shortcut, _: (_activations(x), _vectors(x, 2 if shortcut is None else 3)),
)
_input_gradient = _register(reference.batch_norm_input_gradient, lambda g, x, *_: (_activations(x),))
_input_gradients = _register(
    reference.batch_norm_input_gradients, lambda g, x, *rest: (_activations(x), _activations(x))
)
_relu_pool = _register(
    reference.batch_norm_relu_pool,
    lambda x, *_: (_activations(x, *_pooled(x)), _activations(x, *_pooled(x), dtype=torch.uint8)),
)
_relu_pool_reduce = _register(
    reference.batch_norm_relu_pool_reduce, lambda dy, dy_skip, choice, x, *_: (_vectors(x, 2),)
)
_relu_pool_input_gradient = _register(
    reference.batch_norm_relu_pool_input_gradient, lambda dy, dy_skip, choice, x, *_: (_activations(x),)
)


def _check(x: Tensor, maps: dict[str, Tensor | None], vectors: dict[str, Tensor | None]) -> None:
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


def _check_pooled(x: Tensor, dy: Tensor, dy_skip: Tensor | None, choice: Tensor) -> None:
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


def _last(*tensors: Tensor | None) -> list[Any]:
    """The tensors in channels-last memory; those that are, as they are."""
    return [None if tensor is None else tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors]


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
    return _statistics(*_last(x))


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
    x, shortcut = _last(x, shortcut)
    return _apply(x, mean, scale, bias, shortcut, shortcut_mean, shortcut_scale, shortcut_bias)


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
    return _relu_reduce(*_last(dy, x), mean, scale, bias)


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
    return _relu_input_gradient(*_last(dy, x), mean, scale, bias, constant, slope)


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
    dy, dy_skip, y, x, shortcut = _last(dy, dy_skip, y, x, shortcut)
    return _add_reduce(dy, dy_skip, y, x, mean, shortcut, shortcut_mean)


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
    return _input_gradient(*_last(g, x), mean, scale, constant, slope)


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
    g, x, shortcut = _last(g, x, shortcut)
    return _input_gradients(g, x, *vectors.values(), shortcut, *others.values())


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
    return _relu_pool(*_last(x), mean, scale, bias)


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
    return _relu_pool_reduce(*_last(dy, dy_skip, choice, x), mean, scale, bias)


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
    return _relu_pool_input_gradient(*_last(dy, dy_skip, choice, x), mean, scale, bias, constant, slope)
