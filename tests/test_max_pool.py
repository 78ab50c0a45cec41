"""The pool's gathered gradient is torch's own to the bit, stays channels-last, and compiles as one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.lowering  # Inductor's decompositions refer to it without importing it
import torch.nn.functional as F
from torch import Tensor, nn

from cast_fast.encoder import build_trunk
from cast_fast.max_pool import MaxPool2d, gathered_max_pool

GEOMETRIES = [(3, 2, 1), (2, 2, 0), (3, 1, 1), ((3, 2), (2, 1), (1, 0)), (5, 2, 2), (2, 3, 0)]


def pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def images(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Few distinct values, as after a ReLU: most windows have ties."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(-2, 3, shape, generator=generator).relu().to(device, dtype)
    return made.contiguous(memory_format=torch.channels_last).requires_grad_()


def upstream(like: Tensor, seed: int = 1) -> Tensor:
    made = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)
    return made.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("side", [(12, 12), (13, 18), (7, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_is_that_of_torch_with_ties(
    geometry: Any, side: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x = images((3, 5, *side), dtype, device)
    expected = F.max_pool2d(x, *geometry)
    got = gathered_max_pool(x, *map(pair, geometry))
    assert torch.equal(got, expected)
    gradient = upstream(expected)
    (want,) = torch.autograd.grad(expected, x, gradient)
    (have,) = torch.autograd.grad(got, x, gradient)
    if device.type == "cpu":
        assert torch.equal(have, want)
    else:  # the order in which torch's CUDA kernel adds is its own
        torch.testing.assert_close(have, want)
    assert have.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_summed_in_float32_and_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    x = images((2, 8, 15, 16), dtype, device)
    got = gathered_max_pool(x, (3, 3), (2, 2), (1, 1))
    gradient = upstream(got)
    (have,) = torch.autograd.grad(got, x, gradient)
    wide = x.detach().float().requires_grad_()
    (want,) = torch.autograd.grad(F.max_pool2d(wide, 3, 2, 1), wide, gradient.float())
    if device.type == "cpu":
        assert torch.equal(have, want.to(dtype))
    else:  # added in another order, a sum may round to the next number
        torch.testing.assert_close(have, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_infinities_and_nan_are_passed_on_as_torch_does() -> None:
    x = images((1, 2, 9, 9), torch.float32, torch.device("cpu")).detach()
    x[0, 0, 3, 4], x[0, 1, 5, 5], x[0, 0, 0] = float("nan"), float("inf"), float("-inf")
    x.requires_grad_()
    expected, got = F.max_pool2d(x, 3, 2, 1), gathered_max_pool(x, (3, 3), (2, 2), (1, 1))
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=0, atol=0)
    (want,) = torch.autograd.grad(expected, x, upstream(expected))
    (have,) = torch.autograd.grad(got, x, upstream(expected))
    assert torch.equal(have, want)


def traced_backward(pool: nn.Module) -> tuple[list[str], Tensor]:
    """Operations of the backward graph of a small stem as the compiler is given it, and the gradient of the images."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    operations: list[str] = []

    def record(module: torch.fx.GraphModule, inputs: Any) -> Any:
        del inputs
        operations.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return make_boxed_func(module.forward)

    backend = aot_autograd(
        fw_compiler=lambda module, inputs: make_boxed_func(module.forward),
        bw_compiler=record,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    x = images((2, 8, 16, 17), torch.float32, torch.device("cpu"))
    output = torch.compile(lambda x: pool(x.relu()), backend=backend, fullgraph=True)(x)
    output.backward(upstream(output))
    assert x.grad is not None
    return operations, x.grad


def test_one_graph_without_a_scatter_and_the_switch() -> None:
    gathered, have = traced_backward(MaxPool2d(3, 2, 1, gathered=True))
    scattered, want = traced_backward(MaxPool2d(3, 2, 1, gathered=False))
    ordinary, _ = traced_backward(nn.MaxPool2d(3, 2, 1))
    default, _ = traced_backward(MaxPool2d(3, 2, 1))
    assert not any("scatter" in name or "max_pool" in name for name in gathered)
    assert any("index" in name for name in gathered)
    assert scattered == ordinary == default  # by default the CPU scatters
    assert torch.equal(have, want)


def test_compiled_by_inductor_for_the_cpu() -> None:
    x = images((2, 8, 13, 14), torch.float32, torch.device("cpu"))
    expected = F.max_pool2d(x, 3, 2, 1)
    gradient = upstream(expected)
    (want,) = torch.autograd.grad(expected, x, gradient)
    torch._dynamo.reset()
    got = torch.compile(MaxPool2d(3, 2, 1, gathered=True), fullgraph=True, dynamic=False)(x)
    (have,) = torch.autograd.grad(got, x, gradient)
    assert torch.equal(got, expected) and torch.equal(have, want)
    assert have.is_contiguous(memory_format=torch.channels_last)


def test_eager_mode_is_torchs_own() -> None:
    x = images((2, 4, 9, 9), torch.float32, torch.device("cpu"))
    assert "MaxPool2DWithIndices" in type(MaxPool2d(3, 2, 1, gathered=True)(x).grad_fn).__name__


@pytest.mark.parametrize("options", [{"dilation": 2}, {"ceil_mode": True}, {"return_indices": True}], ids=str)
def test_what_it_does_not_do_is_left_to_torch(options: dict[str, Any]) -> None:
    x = images((1, 2, 12, 12), torch.float32, torch.device("cpu"))
    torch._dynamo.reset()
    got = torch.compile(MaxPool2d(3, 2, 1, gathered=True, **options), backend="eager", fullgraph=True)(x)
    expected = nn.MaxPool2d(3, 2, 1, **options)(x)
    for a, b in zip(got if isinstance(got, tuple) else [got], expected if isinstance(expected, tuple) else [expected]):
        assert torch.equal(a, b)
        assert "GatheredMaxPool" not in type(a.grad_fn).__name__


def test_trunk_has_it_with_torchvisions_settings_and_keys() -> None:
    with torch.device("meta"):
        trunk, _ = build_trunk("resnet18")
    pool = trunk.get_submodule("maxpool")
    assert isinstance(pool, MaxPool2d) and pool.gathered is None
    assert (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode) == (3, 2, 1, 1, False)
    assert not any(key.startswith("maxpool") for key in trunk.state_dict())
