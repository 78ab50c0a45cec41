"""The streaming BatchNorm operators: kernels against float64, the gradients they compose to against torch's, masks and
the pool to the bit; and the operators under opcheck and torch.compile."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import (
    CASE_DTYPES,
    CUT_OFF,
    INTERPRETED,
    KERNEL_DEVICE,
    STORED,
    assert_close,
    dtype_id,
    far_apart,
    kernel_marks,
    poisoned,  # noqa: F401  (a fixture)
    shape_id,
)
from torch import Tensor

import cast_kernels
from cast_kernels.launch import Launch

module = importlib.import_module("cast_kernels.batch_norm")

pytestmark = kernel_marks()

EPS = 1e-5
COUNT = 50
"""Values a channel, as the input gradients are told where no layer says how many there are."""
SHAPES = [
    (1, 3, 1, 1),
    (1, 1, 1, 1),
    (7, 67, 2, 1),
    (3, 5, 9, 11),
    (4, 1, 30, 40),
    (2, 64, 7, 7),
    (1, 65, 6, 5),
    (1, 200, 3, 2),
]
LARGE = [(64, 64, 112, 112), (64, 256, 56, 56), (33, 2048, 7, 7), (5, 130, 61, 67)]
"""For a compiled kernel only: the interpreter would take hours."""
if not INTERPRETED:
    SHAPES += LARGE
# The interpreter does not know types of 16 bits from each other where they are loaded: three shapes are enough there.
CASES = [(s, d) for s in SHAPES for d in CASE_DTYPES if not INTERPRETED or d == torch.float32 or s in SHAPES[3:6]]


@dataclasses.dataclass
class Inputs:
    """Arguments of every operator; names as there."""

    x: Tensor
    dy: Tensor
    dy_skip: Tensor
    mask: Tensor
    shortcut: Tensor
    pooled: Tensor
    pooled_skip: Tensor
    choice: Tensor
    mean: Tensor
    inverse: Tensor
    dbias: Tensor
    dweight: Tensor
    shortcut_mean: Tensor
    shortcut_inverse: Tensor
    shortcut_dweight: Tensor
    weight: Tensor
    bias: Tensor
    shortcut_weight: Tensor
    shortcut_bias: Tensor

    def wide(self) -> Inputs:
        """The same numbers in float64."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Inputs(**{name: t.double() if t.is_floating_point() else t for name, t in values.items()})


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, device: torch.device = KERNEL_DEVICE, parts: int = 0
) -> Inputs:
    """Random numbers such that no z is near zero, where float64 might mask otherwise than float32.

    Statistics and their gradients are (parts, C), or (C,) for 0.
    """
    generator = torch.Generator(device).manual_seed(seed)
    channels = shape[1]
    small = (*shape[:2], (shape[2] + 1) // 2, (shape[3] + 1) // 2)

    def maps(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    def vector(parts: int = parts) -> Tensor:
        return torch.randn((parts, channels) if parts else (channels,), generator=generator, device=device)

    mean, dbias, dweight, shortcut_mean, shortcut_dweight = (vector() for _ in range(5))
    inverse, shortcut_inverse = (0.5 + torch.rand(mean.shape, generator=generator, device=device) for _ in range(2))
    bias, shortcut_weight, shortcut_bias = (vector(0) for _ in range(3))
    weight = (0.5 + torch.rand(channels, generator=generator, device=device)) * torch.where(vector(0) < -1, -1, 1)
    # What is divided by them is as large as the rest.
    dbias, dweight, shortcut_dweight = (v * COUNT for v in (dbias, dweight, shortcut_dweight))
    x = maps(shape)
    centre, factor, level = (by_channel(v, len(x)) for v in (mean, inverse * weight, bias))
    z = (x.double() - centre.double()) * factor.double() + level.double()
    near = z.abs() < 1e-3
    x = torch.where(near, (centre + (1 - level) / factor).to(dtype), x)
    choice = torch.randint(0, 9, small, generator=generator, dtype=torch.uint8, device=device)
    values = [
        x,
        maps(shape),
        maps(shape),
        packed(maps(shape)),
        maps(shape),
        maps(small),
        maps(small),
        inside(choice, x),
    ]
    vectors = (mean, inverse, dbias, dweight, shortcut_mean, shortcut_inverse, shortcut_dweight)
    vectors += (weight, bias, shortcut_weight, shortcut_bias)
    values = [tensor.contiguous(memory_format=torch.channels_last) for tensor in values]
    return Inputs(**{field.name: tensor for field, tensor in zip(dataclasses.fields(Inputs), (*values, *vectors))})


def inside(choice: Tensor, x: Tensor) -> Tensor:
    """Choices that point out of the image replaced by the centre of their window."""
    row = 2 * torch.arange(choice.shape[2], device=choice.device)[:, None] - 1 + choice.int() // 3
    column = 2 * torch.arange(choice.shape[3], device=choice.device) - 1 + choice.int() % 3
    there = (row >= 0) & (row < x.shape[2]) & (column >= 0) & (column < x.shape[3])
    return torch.where(there, choice, torch.full_like(choice, 4))


def by_channel(vector: Tensor, samples: int = 1) -> Tensor:
    if vector.dim() == 2:
        return vector.repeat_interleave(samples // len(vector), 0)[:, :, None, None]
    return vector[:, None, None]


def statistics(i: Inputs) -> tuple[Tensor, Tensor]:
    return i.mean, i.inverse


def affine(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return i.mean, i.inverse, i.weight, i.bias


def second(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return i.shortcut, i.shortcut_mean, i.shortcut_inverse, i.shortcut_weight, i.shortcut_bias


def gradients(i: Inputs) -> tuple[Tensor, Tensor, int]:
    return i.dbias, i.dweight, COUNT


CALLS: dict[str, tuple[Any, Callable[[Inputs], tuple[Any, ...]]]] = {
    "statistics": (module._statistics, lambda i: (i.x, EPS)),
    "apply": (module._apply, lambda i: (i.x, *affine(i))),
    "apply-shortcut": (module._apply, lambda i: (i.x, *affine(i), i.shortcut)),
    "apply-two": (module._apply, lambda i: (i.x, *affine(i), *second(i))),
    "apply-mask": (module._apply_mask, lambda i: (i.x, *affine(i), i.shortcut)),
    "apply-mask-two": (module._apply_mask, lambda i: (i.x, *affine(i), *second(i))),
    "relu-reduce": (module._relu_reduce, lambda i: (i.dy, i.x, *affine(i))),
    "relu-input-gradient": (module._relu_input_gradient, lambda i: (i.dy, i.x, *affine(i), *gradients(i))),
    "add-reduce": (module._add_reduce, lambda i: (i.dy, None, i.mask, i.x, *statistics(i))),
    "add-reduce-skip": (module._add_reduce, lambda i: (i.dy, i.dy_skip, i.mask, i.x, *statistics(i))),
    "add-reduce-two": (module._add_reduce, lambda i: (i.dy, None, i.mask, i.x, *statistics(i), *second(i)[:3])),
    "add-reduce-skip-two": (
        module._add_reduce,
        lambda i: (i.dy, i.dy_skip, i.mask, i.x, *statistics(i), *second(i)[:3]),
    ),
    "input-gradient": (module._input_gradient, lambda i: (i.dy, i.x, *statistics(i), i.weight, *gradients(i))),
    "input-gradients": (
        module._input_gradients,
        lambda i: (
            *(i.dy, i.x, *statistics(i), i.weight, i.dbias, i.dweight),
            *(*second(i)[:4], i.shortcut_dweight, COUNT),
        ),
    ),
    "relu-pool": (module._relu_pool, lambda i: (i.x, *affine(i))),
    "relu-pool-reduce": (module._relu_pool_reduce, lambda i: (i.pooled, None, i.choice, i.x, *affine(i))),
    "relu-pool-reduce-skip": (
        module._relu_pool_reduce,
        lambda i: (i.pooled, i.pooled_skip, i.choice, i.x, *affine(i)),
    ),
    "relu-pool-input-gradient": (
        module._relu_pool_input_gradient,
        lambda i: (i.pooled, None, i.choice, i.x, *affine(i), *gradients(i)),
    ),
    "relu-pool-input-gradient-skip": (
        module._relu_pool_input_gradient,
        lambda i: (i.pooled, i.pooled_skip, i.choice, i.x, *affine(i), *gradients(i)),
    ),
}
"""Every operator with each combination of its optional arguments."""


def magnitudes(operator: Any, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The natural scale of each result: the reference with every term of its sums positive.

    All differences become sums if means are negative and everything else positive; only the mask is kept from before.
    """
    if operator is module._statistics:
        # Moments of the values themselves: rounding of the mean is relative to it, that of the variance to the square.
        # What the inverse is off by is, in relative terms, half of what variance + eps is off by.
        absolute = arguments[0].abs()
        square = absolute.square().mean((0, 2, 3))
        _, variance, inverse = operator.plain(arguments[0], EPS)
        return (torch.stack([absolute.amax((0, 2, 3)), square, inverse * (1 + square / (variance + EPS))]),)
    names = list(operator.plain.__annotations__)
    made = []
    for name, value in zip(names, arguments):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            made.append(value)
        elif name.endswith(("mean", "dbias", "dweight")):
            made.append(-value.abs())
        else:
            made.append(value.abs())
    return module._as_tuple(operator.plain(*made))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=lambda v: shape_id(v) if isinstance(v, tuple) else dtype_id(v))
@pytest.mark.parametrize("call", CALLS)
def test_kernel_matches_float64(call: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    operator, arguments = CALLS[call]
    given = inputs(shape, dtype)
    before = dataclasses.replace(given, **{f.name: getattr(given, f.name).clone() for f in dataclasses.fields(given)})
    results = module._as_tuple(operator.launch(*arguments(given)))
    truths = module._as_tuple(operator.plain(*arguments(given.wide())))
    for place, (got, truth, scale) in enumerate(zip(results, truths, magnitudes(operator, arguments(given.wide())))):
        if "mask" in call and place == 1:
            assert torch.equal(got, packed(results[0]))
            continue
        if got.dtype == torch.uint8:
            # After rounding another pixel may be the first largest: it must be as large, but for the rounding.
            got, truth, scale = chosen_values(got, arguments(given.wide())), truths[0], results[0].abs()
            assert_close("chosen", got, truth, scale * 2 * CUT_OFF.get(dtype, 1), STORED[dtype])
            continue
        if got.dim() == 4:
            assert got.dtype == dtype
            assert got.is_contiguous(memory_format=torch.channels_last)
        else:
            assert got.dtype == torch.float32
        # The sums of add_reduce are those of the rounded g, which has its own test.
        stored = dtype if got.dim() == 4 or "add-reduce" in call else torch.float32
        assert_close(f"{call} {place}", got, truth, scale * CUT_OFF.get(stored, 1), STORED[stored])
    for field in dataclasses.fields(given):
        assert torch.equal(getattr(given, field.name), getattr(before, field.name)), field.name


def packed(y: Tensor) -> Tensor:
    """Where y is not zero, NaN included: channel c in bit c mod 8 of byte c // 8."""
    bits = np.packbits(~(y <= 0).cpu().numpy(), axis=1, bitorder="little")
    return torch.from_numpy(bits).to(y.device)


def chosen_values(choice: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """The activations that ``choice`` points to, (N, C, h, w)."""
    full = module._apply.plain(*arguments)
    index = pixels(choice, full.shape[3])
    return full.flatten(2).gather(2, index.flatten(2)).view(choice.shape)


def pixels(choice: Tensor, width: int) -> Tensor:
    """torch's ``return_indices`` of a choice: row · W + column of the pixel."""
    row = 2 * torch.arange(choice.shape[2], device=choice.device)[:, None] - 1 + choice.long() // 3
    column = 2 * torch.arange(choice.shape[3], device=choice.device) - 1 + choice.long() % 3
    return row * width + column


SHARED_NAMES = ("weight", "bias", "shortcut_weight", "shortcut_bias")
"""What all parts have in common, (C,)."""


def part_of(i: Inputs, part: int, parts: int) -> Inputs:
    """The arguments of one part alone, with vectors (C,)."""
    takes: dict[str, Tensor] = {
        n: t if n in SHARED_NAMES else t.chunk(parts)[part] if t.dim() == 4 else t[part] for n, t in vars(i).items()
    }
    return Inputs(**takes)


def with_parts(arguments: tuple[Any, ...], parts: int) -> tuple[Any, ...]:
    """Statistics have no vector to take their number of parts from."""
    return (*arguments, parts) if len(arguments) == 2 else arguments


PARTED = [
    ((4, 5, 3, 7), 2, torch.float32),
    ((3, 65, 5, 3), 3, torch.float32),
    ((6, 8, 3, 3), 3, torch.bfloat16),
    ((2, 16, 1, 1), 2, torch.float32),
    ((2, 3, 4, 5), 1, torch.float32),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "parts", "dtype"), PARTED, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_parts_are_calls_apart(
    call: str, shape: tuple[int, ...], parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch for parts with vectors of their own, each part several tiles and a ragged one, is a call for each."""
    for name, elements in (("STREAMED", 128), ("REDUCED", 64), ("POOLED", 64)):
        monkeypatch.setattr(module, name, elements)
    operator, arguments = CALLS[call]
    given = inputs(shape, dtype, parts=parts)
    results = module._as_tuple(operator.launch(*with_parts(arguments(given), parts)))
    wide = module._as_tuple(operator.plain(*with_parts(arguments(given.wide()), parts)))
    apart = [arguments(part_of(given.wide(), part, parts)) for part in range(parts)]
    truths = [module._as_tuple(operator.plain(*each)) for each in apart]
    scales = [magnitudes(operator, each) for each in apart]
    for place, (got, reference) in enumerate(zip(results, wide, strict=True)):
        join = torch.cat if got.dim() == 4 else lambda tensors: torch.stack(tensors, 1)
        truth, scale = (join([each[place] for each in of]) for of in (truths, scales))
        if got.dim() == 2:  # statistics of one part: (3, C)
            truth, scale = truth[:, 0], scale[:, 0]
        assert_close(f"{call} {place}, reference", reference, truth, scale, 10 * STORED[torch.float64])
        if got.dtype == torch.uint8:
            if "mask" in call:
                assert torch.equal(got, packed(results[0]))
            elif dtype == torch.float32:
                assert torch.equal(got, truth)
            continue
        stored = dtype if got.dim() == 4 or "add-reduce" in call else torch.float32
        assert_close(f"{call} {place}", got, truth, scale * CUT_OFF.get(stored, 1), STORED[stored])


@pytest.mark.gpu
def test_the_kernels_are_compiled_where_a_gpu_is_promised() -> None:
    assert KERNEL_DEVICE.type == "cuda"


# Gradients of whole layers

Way = Callable[[Any], Callable[..., Any]]
WAYS: dict[str, Way] = {
    "reference": lambda operator: operator.plain,
    "operator": lambda operator: getattr(cast_kernels, operator.name),
    "kernels": lambda operator: operator.launch,
}


def layer(
    way: Way, form: str, i: Inputs, weight: Tensor, weight2: Tensor, parts: int = 1, eps: float = EPS
) -> dict[str, Tensor]:
    """Training-mode BatchNorm with its surroundings, forward and backward, by the operators."""
    results = streamed(way, form, i, weight, weight2, parts, eps)
    # Of weight and bias, which parts share.
    return {name: t.sum(0) if t.dim() == 2 else t for name, t in results.items()}


def streamed(
    way: Way, form: str, i: Inputs, weight: Tensor, weight2: Tensor, parts: int, eps: float
) -> dict[str, Tensor]:
    """``layer`` with the gradients of weight and bias of each part."""
    rows = i.x.numel() // i.x.shape[1] // parts
    weight, weight2, bias = weight.to(i.bias.dtype), weight2.to(i.bias.dtype), i.bias
    mean, _, inverse = way(module._statistics)(i.x, eps, parts).unbind()
    vectors = mean, inverse, weight, bias
    if form == "relu":
        y = way(module._apply)(i.x, *vectors, *[None] * 5)
        dbias, dweight = way(module._relu_reduce)(i.dy, i.x, *vectors).unbind()
        dx = way(module._relu_input_gradient)(i.dy, i.x, *vectors, dbias, dweight, rows)
        return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}
    if form == "pool":
        y, choice = way(module._relu_pool)(i.x, *vectors)
        upstream = i.pooled, i.pooled_skip, choice
        dbias, dweight = way(module._relu_pool_reduce)(*upstream, i.x, *vectors).unbind()
        dx = way(module._relu_pool_input_gradient)(*upstream, i.x, *vectors, dbias, dweight, rows)
        return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}
    if form == "add":
        y, mask = way(module._apply_mask)(i.x, *vectors, i.shortcut, *[None] * 4)
        g, sums = way(module._add_reduce)(i.dy, i.dy_skip, mask, i.x, mean, inverse, None, None, None)
        dbias, dweight = sums.unbind()
        dx = way(module._input_gradient)(g, i.x, mean, inverse, weight, dbias, dweight, rows)
        return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, "dshortcut": g}
    mean2, _, inverse2 = way(module._statistics)(i.shortcut, eps, parts).unbind()
    y, mask = way(module._apply_mask)(i.x, *vectors, i.shortcut, mean2, inverse2, weight2, i.shortcut_bias)
    g, sums = way(module._add_reduce)(i.dy, i.dy_skip, mask, i.x, mean, inverse, i.shortcut, mean2, inverse2)
    dbias, dweight, dweight2 = sums.unbind()
    dx, dshortcut = way(module._input_gradients)(
        *(g, i.x, mean, inverse, weight, dbias, dweight),
        *(i.shortcut, mean2, inverse2, weight2, dweight2, rows),
    )
    first = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}
    return {**first, "dshortcut": dshortcut, "dweight2": dweight2, "dbias2": dbias}


def torch_layer(
    form: str, i: Inputs, weight: Tensor, weight2: Tensor, parts: int = 1, eps: float = EPS
) -> dict[str, Tensor]:
    """The same by ``nn.BatchNorm2d``'s function and autograd."""
    names = {"x": i.x, "weight": weight, "bias": i.bias}
    if form in ("add", "two"):
        names["shortcut"] = i.shortcut
    if form == "two":
        names |= {"weight2": weight2, "bias2": i.shortcut_bias}
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in names.items()}

    def norm(x: str, weight: str, bias: str) -> Tensor:
        vectors = leaves[weight], leaves[bias]
        runs = leaves[x].chunk(parts)
        return torch.cat([F.batch_norm(run, None, None, *vectors, training=True, eps=eps) for run in runs])

    y = norm("x", "weight", "bias")
    if form == "add":
        y = y + leaves["shortcut"]
    if form == "two":
        y = y + norm("shortcut", "weight2", "bias2")
    y = y.relu()
    incoming = i.dy + i.dy_skip if form in ("add", "two") else i.dy
    if form == "pool":
        y, incoming = F.max_pool2d(y, 3, 2, 1), i.pooled + i.pooled_skip
    gradients = torch.autograd.grad(y, list(leaves.values()), incoming)
    return {"y": y.detach(), **{f"d{name}": gradient for name, gradient in zip(leaves, gradients)}}


def layer_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, mean: float = 0.3
) -> tuple[Inputs, Tensor, Tensor]:
    """No pre-activation near zero and no near tie in the pool, judged with the batch's own statistics."""
    i = inputs(shape, torch.float32, seed=sum(shape), device=torch.device("cpu"))
    weight, weight2 = i.weight, i.shortcut_weight.abs() + 0.5
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    values = {f.name: getattr(i, f.name) for f in dataclasses.fields(i)}
    values |= {"x": x + mean, "shortcut": i.shortcut + mean}
    maps = {name: t.to(dtype) if t.dim() == 4 and t.is_floating_point() else t for name, t in values.items()}
    moved = {name: t.to(device) for name, t in maps.items()}
    moved = {n: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for n, t in moved.items()}
    return Inputs(**moved), weight.to(device), weight2.to(device)


LAYER_SHAPES = [(2, 64, 7, 7), (3, 5, 9, 11), (1, 65, 6, 5), (4, 1, 12, 9), (7, 67, 2, 1)]
FORMS = ["relu", "add", "two", "pool"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", LAYER_SHAPES, ids=shape_id)
@pytest.mark.parametrize("way", ["reference", "operator"])
def test_float64_is_torchs_batch_norm(way: str, shape: tuple[int, ...], form: str) -> None:
    i, weight, weight2 = layer_inputs(shape, torch.float64, torch.device("cpu"))
    i, weight, weight2 = i.wide(), weight.double(), weight2.double()
    expected = torch_layer(form, i, weight, weight2)
    results = layer(WAYS[way], form, i, weight, weight2)
    assert results.keys() == expected.keys()
    for name, got in results.items():
        # A few rows alone have variances near zero, whose square root divides.
        assert_close(name, got, expected[name], 1 + expected[name].abs().max(), 100 * STORED[torch.float64])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mean", [0.3, 100.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", LAYER_SHAPES if INTERPRETED else [*LAYER_SHAPES, (32, 256, 28, 28)], ids=shape_id)
def test_float32_layers_agree_with_float64(shape: tuple[int, ...], form: str, mean: float) -> None:
    i, weight, weight2 = layer_inputs(shape, torch.float32, KERNEL_DEVICE, mean)
    expected = torch_layer(form, i.wide(), weight.double(), weight2.double())
    results = layer(WAYS["kernels"], form, i, weight, weight2)
    for name, got in results.items():
        # The mean is rounded to float32, and that error is a share of the mean, not of the deviation.
        scale = (1 + expected[name].abs().max()) * (4 + mean)
        assert_close(name, got, expected[name], scale, STORED[torch.float32])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("eps", [EPS, 0.5])
@pytest.mark.parametrize(("shape", "parts"), [((6, 5, 9, 7), 2), ((6, 17, 4, 5), 3), ((5, 65, 3, 3), 5)], ids=str)
def test_parts_share_weight_and_bias(shape: tuple[int, ...], parts: int, eps: float, form: str) -> None:
    """Layers of parts are torch's BatchNorm for each, with one weight and one bias: their gradients are the sums."""
    i, weight, weight2 = layer_inputs(shape, torch.float32, KERNEL_DEVICE)
    # Parts that differ: common statistics would be far off.
    factor = torch.arange(1.0, parts + 1, device=KERNEL_DEVICE).repeat_interleave(shape[0] // parts)[
        :, None, None, None
    ]
    moved = dataclasses.replace(i, x=(i.x * factor + factor).contiguous(memory_format=torch.channels_last))
    expected = torch_layer(form, moved.wide(), weight.double(), weight2.double(), parts, eps)
    results = layer(WAYS["kernels"], form, moved, weight, weight2, parts, eps)
    assert results.keys() == expected.keys()
    for name, got in results.items():
        # As for layers of one part; x is up to P times as large.
        scale = (1 + expected[name].abs().max()) * (4 + parts)
        assert_close(name, got, expected[name], scale, STORED[torch.float32])


@pytest.mark.parametrize("parts", [1, 2], ids=["one part", "two parts"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["operator", "kernels"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_sixteen_bits_err_no_more_than_eager(way: str, form: str, dtype: torch.dtype, parts: int) -> None:
    i, weight, weight2 = layer_inputs((4, 48, 12, 10), dtype, KERNEL_DEVICE)
    expected = torch_layer(form, i.wide(), weight.double(), weight2.double(), parts)
    eager = torch_layer(form, i, weight, weight2, parts)
    results = layer(WAYS[way], form, i, weight, weight2, parts)
    slack = 1.05 * (CUT_OFF.get(dtype, 1) if way == "kernels" else 1)
    for name, got in results.items():
        error, allowed = (
            float((t.double() - expected[name]).norm() / expected[name].norm()) for t in (got, eager[name])
        )
        # Sums over rows: eager's own error is a matter of luck.
        floor = 0 if got.dim() == 4 else STORED[dtype] / 8
        assert error <= slack * allowed + floor, (name, error, allowed)


# Statistics


@pytest.mark.parametrize("mean", [0.0, 100.0, 10_000.0])
def test_statistics_survive_a_large_mean(mean: float) -> None:
    """The plain E[x²] - mean² is off by 2e-4 at 100, and by more than the variance at 10,000."""
    shape = (4, 33, 16, 16) if INTERPRETED else (256, 256, 56, 56)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + mean
    x = x.to(KERNEL_DEVICE).contiguous(memory_format=torch.channels_last)
    moments = module._statistics.launch(x, EPS)
    variance, centre = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert_close("mean", moments[0], centre, mean + 1, STORED[torch.float32])
    # A program's mean is rounded to 2^-24 of itself, and its distance from the others', a sixteenth of a deviation for
    # 256 rows, is squared: 2/16 · 2^-24 · mean of the variance.
    assert_close("variance", moments[1], variance, variance * (1 + mean / 500), STORED[torch.float32])


def test_statistics_survive_an_outlier_in_the_first_row() -> None:
    """Differences from the first row, squared, are then a thousand times the variance, and lose three digits of it."""
    x = torch.randn((4, 33, 16, 16), generator=torch.Generator().manual_seed(1))
    x = x.to(KERNEL_DEVICE).contiguous(memory_format=torch.channels_last)
    x[0, :, 0, 0] = 1e4
    variance, centre = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    moments = module._statistics.launch(x, EPS)
    assert_close("variance", moments[1], variance, variance, STORED[torch.float32])
    assert_close("mean", moments[0], centre, variance.sqrt(), STORED[torch.float32])


def test_a_constant_channel_has_variance_zero() -> None:
    x = torch.full((3, 9, 7, 5), 0.1, device=KERNEL_DEVICE).contiguous(memory_format=torch.channels_last)
    moments = module._statistics.launch(x, EPS)
    assert_close("mean", moments[0], torch.full((9,), 0.1, dtype=torch.float32), 1.0, 1e-7)
    assert (moments[1] >= 0).all()
    assert (moments[1] < 1e-14).all()
    assert_close("inverse", moments[2], torch.full((9,), EPS**-0.5, dtype=torch.float64), EPS**-0.5, 2e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_value_breaks_its_own_channel_alone(bad: float) -> None:
    i = inputs((2, 9, 8, 8), torch.float32)
    good = module._statistics.launch(i.x, EPS)
    i.x[1, 4, 3, 3] = bad
    broken = module._statistics.launch(i.x, EPS)
    assert not broken[:, 4].isfinite().any()
    others = [c for c in range(9) if c != 4]
    assert torch.equal(broken[:, others], good[:, others])


# Masks


def small_numbers(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x around zero down to the smallest subnormal, and a BatchNorm that leaves it as it is."""
    exponents = torch.arange(-140.0, 3.0)
    values = torch.cat([torch.tensor([0.0]), 2.0**exponents, -(2.0**exponents), 3 * 2.0**exponents]).to(dtype)
    x = values.repeat(24)[: 4 * 8 * 9 * 10].view(4, 9, 10, 8).permute(0, 3, 1, 2).to(KERNEL_DEVICE)
    zeros = torch.zeros(8, device=KERNEL_DEVICE)
    return x, zeros, zeros + 1, zeros.clone()


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.25, 1e-3])
@pytest.mark.parametrize("dtype", CASE_DTYPES, ids=dtype_id)
def test_mask_is_that_of_the_output_to_the_bit(dtype: torch.dtype, scale: float) -> None:
    """Also where a positive z is rounded to zero, and where it is not a number."""
    x, mean, ones, bias = small_numbers(dtype)
    x[0, 0, 0, 0], x[1, 3, 2, 2] = torch.nan, torch.inf
    vectors = mean, ones, ones * scale, bias
    y, bits = module._apply_mask.launch(x, *vectors, torch.zeros_like(x))
    # In the interpreter bfloat16 is cut off, which makes zeros of numbers that round up to the smallest subnormal.
    rounds = not (INTERPRETED and dtype == torch.bfloat16)
    if rounds:
        assert torch.equal(bits, packed(y))
    assert torch.equal(y.nan_to_num(-1), module._apply.launch(x, *vectors).nan_to_num(-1))
    # With a gradient of ones that of the bias counts the mask, exactly; with dbias and dweight zero dx is the mask.
    dy = torch.ones_like(x)
    mask = ~(y <= 0)
    counted = module._relu_reduce.launch(dy, x, *vectors)[0]
    if rounds:
        assert torch.equal(counted, mask.sum((0, 2, 3)).float())
    zeros = torch.zeros_like(bias)
    gradient = module._relu_input_gradient.launch(dy, x, *vectors, zeros, zeros, 1)
    passed = gradient.isnan() | (gradient != 0)
    assert passed[0, 0, 0, 0] and mask[0, 0, 0, 0]
    # Infinity times a slope of zero is not a number, as in torch.
    passed[1, 3, 2, 2] = mask[1, 3, 2, 2] = True
    if rounds:
        assert torch.equal(passed, mask)
    if dtype == torch.float16 and scale < 1:
        assert ((x > 0) & (y == 0)).any(), "no number vanishes: the case tests nothing"


def test_a_nan_stays_one() -> None:
    i = inputs((2, 9, 5, 4), torch.float32)
    i.x[1, 2, 3, 3] = torch.nan
    y = module._apply.launch(i.x, *affine(i), i.shortcut)
    assert y.isnan().nonzero().tolist() == [[1, 2, 3, 3]]


@pytest.mark.parametrize("dtype", CASE_DTYPES, ids=dtype_id)
def test_residual_gradients_are_joined_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    i = inputs((2, 65, 5, 7), dtype)
    i.shortcut[0, 3, 2, 2] = torch.nan
    y, mask = module._apply_mask.launch(i.x, *affine(i), i.shortcut)
    assert y[0, 3, 2, 2].isnan()
    assert torch.equal(mask, packed(y))
    g, sums = module._add_reduce.launch(i.dy, i.dy_skip, mask, i.x, *statistics(i))
    joined = i.dy.float() + i.dy_skip.float()
    exact = torch.where(y <= 0, 0, joined)
    if not (INTERPRETED and dtype == torch.bfloat16):
        assert torch.equal(g, exact.to(dtype))
    # The sums are those of the numbers that were written.
    wide = g.double()
    assert_close("sum", sums[0], wide.sum((0, 2, 3)), wide.abs().sum((0, 2, 3)), STORED[torch.float32])
    centred = i.x.double() - by_channel(i.mean.double())
    terms = wide * centred * by_channel(i.inverse.double())
    assert_close("tilted", sums[1], terms.sum((0, 2, 3)), terms.abs().sum((0, 2, 3)), STORED[torch.float32])


# The pool


def tied(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A handful of values, many of them negative: nearly every window has ties."""
    x = torch.randint(-4, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.to(KERNEL_DEVICE).contiguous(memory_format=torch.channels_last)


POOLS = [(2, 3, 8, 8), (1, 5, 7, 9), (3, 1, 1, 1), (1, 65, 1, 6), (2, 8, 5, 1), (1, 64, 12, 11)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("broken", [False, True], ids=["finite", "nan"])
@pytest.mark.parametrize("dtype", CASE_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", POOLS, ids=shape_id)
def test_pool_is_torchs_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype, broken: bool) -> None:
    x = tied(shape, dtype, sum(shape))
    if broken:
        spots = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.15
        x[spots.to(KERNEL_DEVICE)] = torch.nan
    channels = shape[1]
    # Zeros among them; and numbers that 16 bits cannot tell from each other.
    for numbers in ((0.5, 1.0 / 3.0, 0.125), (0.0, 2.0**-12, 4.0)):
        vectors = [torch.full((channels,), value, device=KERNEL_DEVICE) for value in numbers]
        vectors = (vectors[0], torch.ones_like(vectors[0]), *vectors[1:])
        y, choice = module._relu_pool.launch(x, *vectors)
        full = module._apply.launch(x, *vectors).float().cpu()
        expected, index = F.max_pool2d(full, 3, 2, 1, return_indices=True)
        assert torch.equal(y.float().cpu().nan_to_num(-1.0), expected.nan_to_num(-1.0))
        assert torch.equal(pixels(choice, shape[3]).cpu(), index)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("skip", [False, True], ids=["one", "skip"])
@pytest.mark.parametrize("dtype", CASE_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", POOLS, ids=shape_id)
def test_pool_gradient_is_torchs_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype, skip: bool) -> None:
    """Whole numbers, so that no sum is rounded; scale 1, dbias and dweight 0, so that dx is the gradient of z."""
    x = tied(shape, dtype, sum(shape))
    zeros = torch.zeros(shape[1], device=KERNEL_DEVICE)
    ones = zeros + 1
    pooled = (*shape[:2], (shape[2] + 1) // 2, (shape[3] + 1) // 2)
    dy, dy_skip = tied(pooled, dtype, 1), tied(pooled, dtype, 2)
    _, choice = module._relu_pool.launch(x, zeros, ones, ones, zeros)
    upstream = dy, dy_skip if skip else None, choice
    dx = module._relu_pool_input_gradient.launch(*upstream, x, zeros, ones, ones, zeros, zeros, zeros, 1)
    leaf = x.double().cpu().requires_grad_()
    y = F.max_pool2d(leaf.relu(), 3, 2, 1)
    joined = (dy.double() + dy_skip.double() * skip).cpu()
    (expected,) = torch.autograd.grad(y, leaf, joined)
    assert torch.equal(dx.double().cpu(), expected)
    sums = module._relu_pool_reduce.launch(*upstream, x, zeros, ones, ones, zeros).cpu()
    assert torch.equal(sums[0].double(), expected.sum((0, 2, 3)))
    assert torch.equal(sums[1].double(), (expected * leaf.detach()).sum((0, 2, 3)))


# Launches


@pytest.mark.parametrize("call", ["statistics", "relu-reduce", "add-reduce-skip-two", "relu-pool-reduce-skip"])
def test_two_runs_give_the_same_bits(call: str) -> None:
    operator, arguments = CALLS[call]
    given = arguments(inputs((3, 65, 24, 20) if INTERPRETED else (64, 256, 56, 56), torch.bfloat16))
    first = module._as_tuple(operator.launch(*given))
    for _ in range(2):
        for one, two in zip(first, module._as_tuple(operator.launch(*given))):
            assert torch.equal(one, two)


@pytest.mark.parametrize("call", ["statistics", "relu-reduce", "add-reduce-skip-two", "relu-pool-reduce-skip"])
@pytest.mark.parametrize("programs", [1, 7, 50])
def test_any_number_of_programs_gives_the_same_sums(call: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program takes every tile, or a program one or two; 50 are more than are combined at once."""
    monkeypatch.setattr(module, "device_properties", lambda device: (90, programs))
    monkeypatch.setattr(module, "RESIDENT", 1)
    monkeypatch.setattr(module, "REDUCED", 32)
    monkeypatch.setattr(module, "POOLED", 32)
    monkeypatch.setattr(module, "COMBINED", 16)
    operator, arguments = CALLS[call]
    given = inputs((2, 5, 12, 10), torch.float32)
    results = module._as_tuple(operator.launch(*arguments(given)))
    truths = module._as_tuple(operator.plain(*arguments(given.wide())))
    for got, truth, scale in zip(results, truths, magnitudes(operator, arguments(given.wide()))):
        assert_close(call, got, truth, scale, STORED[torch.float32])


def first_and_last_tile(launch: Launch) -> Launch:
    """Of a sweep over rows, the one program that takes the last tile; of a reduction, first and last tile; of parts, in
    each."""
    *arguments, final = launch.arguments
    names = launch.kernel.arg_names
    if "programs" in names:
        tiles = launch.arguments[names.index("tiles")]
        assert isinstance(tiles, int)
        final = tiles - 1
    return dataclasses.replace(launch, grid=(1, *launch.grid[1:]), arguments=(*arguments, final))


@pytest.mark.parametrize("parts", [1, 2], ids=["one part", "two parts"])
@pytest.mark.parametrize(
    "call", ["statistics", "apply-mask-two", "relu-reduce", "add-reduce-skip-two", "input-gradients"]
)
def test_offsets_beyond_31_bits(call: str, parts: int) -> None:
    """The last tile of 2^31 and some elements; the interpreter runs that program alone, and touches no other page."""
    channels, rows = 64, 2**25 + 40 * parts
    operator, arguments = CALLS[call]
    near = inputs((1, channels, 40, 1), torch.float16)
    tensors = {f.name: getattr(near, f.name) for f in dataclasses.fields(near)}
    with contextlib.ExitStack() as stack:

        def far(values: Tensor) -> Tensor:
            """A tensor of ``rows`` rows, zero but for the last ones; (parts, C, rows / parts, 1)."""
            width = values.shape[1]
            memory = stack.enter_context(far_apart(rows * width, values.dtype, KERNEL_DEVICE))
            tall = memory.view(parts, rows // parts, 1, width).permute(0, 3, 1, 2)
            tall[-1:, :, -values.shape[2] :] = values
            return tall

        def like_no_other(vector: Tensor) -> Tensor:
            """Of the first part other numbers."""
            return vector if parts == 1 else torch.stack([vector + 1, vector])

        same = (*POOLED_NAMES, *SHARED_NAMES)
        wide = Inputs(
            **{n: t if n in same else far(t) if t.dim() == 4 else like_no_other(t) for n, t in tensors.items()}
        )
        given = with_parts(arguments(wide), parts)
        given = operator._whole(given)
        many = dataclasses.replace(near, mean=wide.mean)
        made = tuple(
            far(torch.zeros_like(near.mask if t.dtype == torch.uint8 else near.x)) if t.dim() == 4 else t
            for t in operator.allocate(*operator._whole(with_parts(arguments(many), parts)))
        )
        sweep, *_ = operator._plan(*given, *made)
        sweep = first_and_last_tile(sweep)
        count = (rows // parts - 1) % sweep.constants["BLOCK_R"] + 1
        sweep.run()
        ends = Inputs(**{n: t[:, :, -count:] if n in LARGE_NAMES else t for n, t in vars(near).items()})
        truths = module._as_tuple(operator.plain(*arguments(ends.wide())))
        for got, truth in zip(made, truths):
            if got.dtype == torch.uint8:
                assert torch.equal(got[-1:, :, -count:], packed(made[0][-1:, :, -count:]))
                assert not got[-1:, :, -count - 40 : -count].any()
            elif got.dim() == 4:
                assert_close(call, got[-1:, :, -count:], truth, 1 + truth.abs().max(), STORED[torch.float16])
                assert not got[-1:, :, -count - 40 : -count].any()
        if "programs" in sweep.kernel.arg_names:
            partial = sweep.arguments[sweep.kernel.arg_names.index("partial")]
            assert isinstance(partial, Tensor)
            partial = partial[0] if parts == 1 else partial[0, :, 1]
            check_far_sums(call, partial, ends, sweep.constants["BLOCK_R"])


POOLED_NAMES = ("pooled", "pooled_skip", "choice")
LARGE_NAMES = ("x", "dy", "dy_skip", "mask", "shortcut")


def sweep_factors(i: Inputs) -> Tensor:
    """What the launch that combines the sums of a sweep multiplies dbias and each dweight by, (3, C)."""
    return torch.stack([torch.ones_like(i.inverse), i.inverse, i.shortcut_inverse])


def check_far_sums(call: str, partial: Tensor, ends: Inputs, zeros: int) -> None:
    """What one program summed over a tile of zeros and the last rows."""
    wide = ends.wide()
    if call == "statistics":
        x = torch.cat([torch.zeros(zeros, 64, dtype=torch.float64, device=KERNEL_DEVICE), wide.x[0, :, :, 0].T])
        expected = torch.stack([x.mean(0), (x - x.mean(0)).square().sum(0)])
    else:
        # Of the zeros g is zero.
        expected = module._as_tuple(CALLS[call][0].plain(*CALLS[call][1](wide)))[-1]
        expected = expected / sweep_factors(wide)[: len(expected)]
    assert_close(call, partial, expected, 1 + expected.abs().max(), 2 * STORED[torch.float16])


@pytest.mark.parametrize("call", ["relu-pool", "relu-pool-reduce-skip", "relu-pool-input-gradient-skip"])
def test_pool_offsets_beyond_31_bits(call: str) -> None:
    channels, samples = 64, 2**31 // (64 * 32 * 32) + 1
    operator, arguments = CALLS[call]
    near = inputs((1, channels, 32, 32), torch.float16)
    with contextlib.ExitStack() as stack:

        def far(values: Tensor) -> Tensor:
            """``samples`` samples, zero but for the last."""
            count = samples * values.numel()
            memory = stack.enter_context(far_apart(count, values.dtype, KERNEL_DEVICE))
            many = memory.view(samples, *values.shape[2:], values.shape[1]).permute(0, 3, 1, 2)
            many[-1:] = values
            return many

        wide = Inputs(**{n: far(t) if t.dim() == 4 else t for n, t in vars(near).items()})
        given = operator._whole(arguments(wide))
        made = tuple(
            far(torch.zeros_like(t)) if t.dim() == 4 else t
            for t in operator.allocate(*operator._whole(arguments(near)))
        )
        sweep, *_ = operator._plan(*given, *made)
        assert sweep.constants["LONG"]
        sweep = first_and_last_tile(sweep)
        windows = sweep.constants["BLOCK_R"]
        sweep.run()
        truths = module._as_tuple(operator.plain(*arguments(near.wide())))
        # 16 windows of a row of 16, the last: pixel rows 30 and 31 of the last sample, or one row of windows.
        assert windows == 16
        if "programs" in sweep.kernel.arg_names:
            partial = sweep.arguments[sweep.kernel.arg_names.index("partial")]
            assert isinstance(partial, Tensor)
            i = near.wide()
            upstream = i.pooled, i.pooled_skip, i.choice
            zeros = torch.zeros_like(i.mean)
            dx = module._relu_pool_input_gradient.plain(*upstream, i.x, *affine(i), zeros, zeros, 1)
            g = dx[:, :, 30:] / by_channel(i.inverse * i.weight)
            tilted = g * (i.x[:, :, 30:] - by_channel(i.mean))
            expected = torch.stack([g.sum((0, 2, 3)), tilted.sum((0, 2, 3))])
            assert_close(call, partial[0], expected, 1 + expected.abs().max(), 2 * STORED[torch.float16])
            return
        rows = 1 if call == "relu-pool" else 2
        for got, truth in zip(made, truths):
            end, want = got[-1:, :, -rows:], truth[:, :, -rows:]
            if got.dtype == torch.uint8:
                # After rounding another pixel may be the first largest: it must be as large, but for the rounding.
                chosen = chosen_values(torch.cat([truth[:, :, :-rows], end], 2), arguments(near.wide()))[:, :, -rows:]
                value = truths[0][:, :, -rows:]
                assert_close("chosen", chosen, value, 1 + value.abs().max(), 2 * STORED[torch.float16])
            else:
                assert_close(call, end, want, 1 + want.abs().max(), STORED[torch.float16])
            assert not got[-1:, :, :-rows].any()


# The operators


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call: str, device: torch.device) -> None:
    operator, arguments = CALLS[call]
    for parts in (0, 2):
        given = arguments(inputs((2, 6, 5, 4), torch.float32, device=device, parts=parts))
        given = with_parts(given, parts) if parts else given
        torch.library.opcheck(getattr(torch.ops.cast_kernels, operator.name).default, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", [(3, 1, 2, 2), (2, 8, 1, 1), (1, 3, 5, 4)], ids=shape_id)
def test_fakes_have_the_strides_of_the_results(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Also where a dimension of size one has any stride."""
    for operator, arguments in CALLS.values():
        given = arguments(inputs(shape, dtype, device=device))
        packet = getattr(torch.ops.cast_kernels, operator.name).default
        torch.library.opcheck(packet, given, test_utils="test_faketensor")


@pytest.mark.parametrize("call", CALLS)
def test_operator_is_its_reference_whatever_the_strides(call: str, device: torch.device) -> None:
    operator, arguments = CALLS[call]
    given = inputs((3, 6, 5, 4), torch.float32, device=device)
    public = getattr(cast_kernels, operator.name)
    expected = module._as_tuple(operator.plain(*arguments(given.wide())))
    for name, tensor in vars(given).items():
        setattr(given, name, tensor.contiguous() if tensor.dim() == 4 else tensor.repeat_interleave(2)[::2])
    for got, truth in zip(module._as_tuple(public(*arguments(given))), expected):
        assert got.device.type == device.type
        if got.dim() == 4:
            assert got.is_contiguous(memory_format=torch.channels_last)
        assert_close(call, got, truth, 1 + truth.abs().max(), 4 * STORED[torch.float32])


def test_autocast_does_not_lower_the_precision(device: torch.device) -> None:
    for operator, arguments in CALLS.values():
        given = arguments(inputs((2, 16, 5, 4), torch.float32, device=device))
        public = getattr(cast_kernels, operator.name)
        plain = module._as_tuple(public(*given))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            cast = module._as_tuple(public(*given))
        for one, two in zip(plain, cast):
            assert one.dtype == two.dtype
            assert torch.equal(one, two)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic: bool, device: torch.device) -> None:
    def step(i: Inputs, weight: Tensor, weight2: Tensor) -> list[Tensor]:
        results = []
        for form in FORMS:
            i = dataclasses.replace(i, x=i.x * 1.5)
            results += layer(WAYS["operator"], form, i, weight, weight2).values()
        return results

    # Layouts are a matter of the compiler's back end, dynamic shapes are not.
    backend = "aot_eager" if dynamic else "inductor"
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for samples in (2, 3) if dynamic else (2,):
        i, weight, weight2 = layer_inputs((samples, 8, 6, 5), torch.float32, device)
        for one, two in zip(step(i, weight, weight2), compiled(i, weight, weight2), strict=True):
            assert_close("result", two, one, 1 + one.abs().max().cpu(), 4 * STORED[torch.float32])


# Mistakes


@pytest.mark.parametrize("call", CALLS)
def test_a_kernel_is_not_launched_on_memory_that_it_would_misread(call: str) -> None:
    operator, arguments = CALLS[call]
    given = inputs((2, 12, 5, 4), torch.float32)
    for name, tensor in vars(given).items():
        one = dataclasses.replace(given)
        setattr(one, name, tensor.contiguous() if tensor.dim() == 4 else tensor.repeat_interleave(2)[::2])
        called = {id(argument) for argument in arguments(one)}
        if id(getattr(one, name)) in called:
            with pytest.raises(ValueError, match=f"{operator.name}: got strides .* expected channels-last, dense"):
                operator.launch(*arguments(one))


X = torch.zeros(2, 3, 4, 4)
V = torch.zeros(3)
H = torch.zeros(2, 3, 2, 2)
M = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: k.batch_norm_statistics(X[0], EPS), r"x: got shape \(3, 4, 4\), expected \(N, C, H, W\), not empty"),
        (
            lambda k: k.batch_norm_statistics(X[:0], EPS),
            r"x: got shape \(0, 3, 4, 4\), expected \(N, C, H, W\), not empty",
        ),
        (lambda k: k.batch_norm_statistics(X[..., :0], EPS), "not empty"),
        (lambda k: k.batch_norm_statistics(X.int(), EPS), "x: got dtype torch.int32 on cpu"),
        (lambda k: k.batch_norm_apply(X[:0], V, V, V, V), "not empty"),
        (lambda k: k.batch_norm_statistics(X, EPS, 3), r"parts: got 3 parts, expected a divisor of 2 \(samples\)"),
        (lambda k: k.batch_norm_statistics(X, EPS, 0), "parts: got 0 parts"),
        (lambda k: k.batch_norm_statistics(X, -EPS), "eps: got -1e-05, expected at least 0"),
        (lambda k: k.batch_norm_statistics(X, float("nan")), "eps: got nan"),
        (lambda k: k.batch_norm_statistics(X[:1].expand(70000, 3, 4, 4), EPS, 70000), "at most 65535"),
        (
            lambda k: k.batch_norm_statistics(X[:1, :1, :1, :1].expand(32768, 32768, 1, 1), EPS, 32768),
            "parts: got 32768 parts of 32768 channels, expected at most 536870912 in all",
        ),
        (lambda k: k.batch_norm_apply(X, V.expand(3, 3), V, V, V), "mean: got 3 parts, expected a divisor of 2"),
        (
            lambda k: k.batch_norm_apply(X, V.expand(2, 3), V, V, V),
            r"inverse: got shape \(3,\), expected \(P, C\) = \(2, 3\)",
        ),
        (
            lambda k: k.batch_norm_apply(X, V, V.expand(2, 3), V, V),
            r"inverse: got shape \(2, 3\), expected \(C,\) = \(3,\)",
        ),
        (
            lambda k: k.batch_norm_apply(X, V.expand(2, 3), V.expand(2, 3), V.expand(2, 3), V),
            r"weight: got shape \(2, 3\), expected \(C,\) = \(3,\)",
        ),
        (lambda k: k.batch_norm_apply(X, V[:2], V, V, V), r"mean: got shape \(2,\), expected \(C,\) = \(3,\)"),
        (
            lambda k: k.batch_norm_apply(X, V, V, V.double(), V),
            "weight: got dtype torch.float64, expected torch.float32",
        ),
        (lambda k: k.batch_norm_apply(X.double(), V, V, V, V), "mean: got dtype torch.float32, expected torch.float64"),
        (lambda k: k.batch_norm_apply(X, V, V, V, V, X[:1]), r"shortcut: got shape \(1, 3, 4, 4\)"),
        (
            lambda k: k.batch_norm_apply(X, V, V, V, V, X.half()),
            "shortcut: got dtype torch.float16, expected torch.flo",
        ),
        (
            lambda k: k.batch_norm_apply(X, V, V, V, V, X, V),
            "shortcut_inverse: got None, expected a tensor as shortcut_",
        ),
        (lambda k: k.batch_norm_apply(X, V, V, V, V, X, None, V, V, V), "shortcut_mean: got None"),
        (
            lambda k: k.batch_norm_apply(X, V, V, V, V, None, V, V, V, V),
            "shortcut: got None, expected a tensor as shortcut",
        ),
        (lambda k: k.batch_norm_apply(X, V, V, V, V.to("meta")), "bias: got device meta, expected cpu"),
        (lambda k: k.batch_norm_relu_reduce(X[:, :2], X, V, V, V, V), r"dy: got shape \(2, 2, 4, 4\)"),
        (lambda k: k.batch_norm_relu_input_gradient(X, X, V, V, V, V, V, V[:1], 32), r"dweight: got shape"),
        (lambda k: k.batch_norm_apply_mask(X, V, V, V, V, X[:1]), r"shortcut: got shape \(1, 3, 4, 4\)"),
        (
            lambda k: k.batch_norm_apply_mask(X, V, V, V, V, X, V),
            "shortcut_inverse: got None, expected a tensor as shortcut",
        ),
        (lambda k: k.batch_norm_add_reduce(X, X.half(), M, X, V, V), "dy_skip: got dtype torch.float16"),
        (
            lambda k: k.batch_norm_add_reduce(X, None, X, X, V, V),
            r"mask: got shape .* expected \(N, ceil\(C / 8\), H, W",
        ),
        (
            lambda k: k.batch_norm_add_reduce(X, None, M.int(), X, V, V),
            "mask: got dtype torch.int32, expected torch.uint8",
        ),
        (lambda k: k.batch_norm_add_reduce(X, None, M, X, V, V, X), "shortcut_mean: got None"),
        (lambda k: k.batch_norm_add_reduce(X, None, M, X, V, V, None, V, V), "shortcut: got None"),
        (lambda k: k.batch_norm_input_gradient(X[:1], X, V, V, V, V, V, 32), r"g: got shape \(1, 3, 4, 4\)"),
        (lambda k: k.batch_norm_input_gradients(X, X, *[V] * 5, X, *[V] * 3, V[:1], 32), "shortcut_dweight: got shape"),
        (lambda k: k.batch_norm_relu_pool(X, V, V, V, V[:1]), r"bias: got shape \(1,\)"),
        (
            lambda k: k.batch_norm_relu_pool_reduce(X, None, H.byte(), X, V, V, V, V),
            r"dy: got shape \(2, 3, 4, 4\), exp",
        ),
        (
            lambda k: k.batch_norm_relu_pool_reduce(H, None, H, X, V, V, V, V),
            "choice: got dtype torch.float32, expected",
        ),
        (
            lambda k: k.batch_norm_relu_pool_reduce(H, H[:1], H.byte(), X, V, V, V, V),
            r"dy_skip: got shape \(1, 3, 2, 2",
        ),
        (lambda k: k.batch_norm_relu_pool_input_gradient(H, H, H.byte(), X, *[V] * 5, V[:2], 32), "dweight: got shape"),
        (lambda k: k.batch_norm_relu_input_gradient(X, X, *[V] * 6, 0), "count: got 0, expected at least 1 value"),
        (lambda k: k.batch_norm_input_gradient(X, X, *[V] * 5, -1), "count: got -1"),
        (lambda k: k.batch_norm_input_gradients(X, X, *[V] * 5, X, *[V] * 4, 0), "count: got 0"),
        (lambda k: k.batch_norm_relu_pool_input_gradient(H, H, H.byte(), X, *[V] * 6, 0), "count: got 0"),
    ],
)
def test_a_callers_mistake_is_a_value_error(call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(cast_kernels)


def test_too_many_pixels_for_the_pool_are_refused() -> None:
    tall = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16).expand(2, 1, 2**15, 2**15)
    vector = torch.zeros(1)
    with pytest.raises(ValueError, match=r"x: got N·H·W = 2147483648, expected at most 1073741824"):
        cast_kernels.batch_norm_relu_pool(tall, vector, vector, vector, vector)


@pytest.mark.gpu
def test_float64_is_refused_on_a_gpu(cuda: torch.device) -> None:
    with pytest.raises(ValueError, match=r"x: got dtype torch\.float64 on cuda"):
        cast_kernels.batch_norm_statistics(X.double().to(cuda), EPS)
