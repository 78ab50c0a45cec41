"""Streaming BatchNorm + ReLU against torch's in float64: the operator, and on the CPU its kernels, interpreted."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

# The function of the same name would hide the module once the package exports it.
kernels = importlib.import_module("cast_kernels.batch_norm_relu")

SHAPES = [(2, 64, 7, 7), (3, 5, 9, 11), (1, 130, 6, 5), (4, 1, 40, 40), (7, 67, 2, 1)]
EPS = 1e-5
Way = Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, offset: float = 0.3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    maps = [t.to(device, dtype).contiguous(memory_format=torch.channels_last) for t in (x + offset, dy)]
    return [maps[0], weight.to(device), bias.to(device), maps[1]]


def truth(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    """y, mean, variance, dx, dweight, dbias of torch in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True, eps=EPS).relu()
    var, mean = torch.var_mean(leaves[0].detach(), (0, 2, 3), correction=0)
    return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, dy.double())]


def by_kernels(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    y, mean, var = kernels.launch_forward(x, weight, bias, EPS)
    return [y, mean, var, *kernels.launch_backward(dy, x, mean, var, weight, bias, EPS)]


def by_operator(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y, mean, var = kernels.batch_norm_relu(*leaves, EPS)
    return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("way", [by_kernels, by_operator])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_agrees_with_float64(shape: tuple[int, ...], way: Way, device: torch.device) -> None:
    arguments = inputs(shape, torch.float32, device)
    names = ("y", "mean", "var", "dx", "dweight", "dbias")
    for name, got, want in zip(names, way(*arguments), truth(*arguments)):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
        if got.dim() == 4:
            assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("way", [by_kernels, by_operator])
def test_bfloat16_errs_no_more_than_eager(way: Way, device: torch.device) -> None:
    arguments = inputs((4, 48, 9, 9), torch.bfloat16, device)
    x, weight, bias, dy = arguments
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True, eps=EPS).relu()
    eager = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    # The interpreter cuts bfloat16 off where hardware rounds: twice the error.
    slack = 2.1 if way is by_kernels and device.type == "cpu" else 1.05
    results, expected = way(*arguments), truth(*arguments)
    for place, (got, other) in enumerate(zip([results[0], *results[3:]], eager)):
        want = [expected[0], *expected[3:]][place]
        error, allowed = ((t.double() - want).norm() / want.norm() for t in (got, other))
        assert error <= slack * allowed + 1e-6, (place, float(error), float(allowed))


@pytest.mark.parametrize("way", [by_kernels, by_operator])
def test_statistics_survive_a_large_mean(way: Way, device: torch.device) -> None:
    """Mean a thousand times the deviation: the plain E[x²] - mean² is off by several per cent here."""
    arguments = inputs((4, 8, 16, 16), torch.float32, device, offset=1000.0)
    _, _, var, *_ = way(*arguments)
    torch.testing.assert_close(var.double(), truth(*arguments)[2], rtol=1e-5, atol=0)


def test_mask_is_that_of_the_output_to_the_bit(device: torch.device) -> None:
    x, weight, bias, _ = inputs((2, 32, 8, 8), torch.bfloat16, device)
    bias[::2] = 0
    y, mean, var = kernels.launch_forward(x, weight, bias, EPS)
    # With a gradient of ones that of the bias counts the mask, exactly.
    _, _, counted = kernels.launch_backward(torch.ones_like(x), x, mean, var, weight, bias, EPS)
    assert torch.equal(counted, (y > 0).sum((0, 2, 3)).float())


def test_operator_contract() -> None:
    x, weight, bias, _ = inputs((2, 6, 5, 4), torch.float32, torch.device("cpu"))
    arguments = tuple(t.requires_grad_() for t in (x, weight, bias))
    torch.library.opcheck(torch.ops.cast_kernels.batch_norm_relu.default, (*arguments, EPS))


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"weight: got shape \(2,\)"):
        kernels.batch_norm_relu(x, torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="x: got shape"):
        kernels.batch_norm_relu(x[0], torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="x: got dtype"):
        kernels.batch_norm_relu(x.int(), torch.ones(3), torch.ones(3))
