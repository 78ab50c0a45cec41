"""One pass with statistics apart is as many passes, to the last bits of float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from test_step import batch_of, differing, snapshot, tiny_step
from torch import nn

from cast_fast.data.batch import random_batch
from cast_fast.moco import MoCo
from cast_fast.objective import Objective
from cast_fast.optim import build_optimizer
from cast_fast.parallel import RankSettings
from cast_fast.split_batch_norm import SplitBatchNorm2d, split_batch_norm
from cast_fast.step import TrainStep
from cast_fast.sync_batch_norm import SyncBatchNorm2d


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_are_passes_one_after_the_other(parts: int) -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(5, momentum=0.3).double()
    with torch.no_grad():
        plain.weight.uniform_(-1, 1)
        plain.bias.uniform_(-1, 1)
    network = nn.Sequential(copy.deepcopy(plain))
    split_batch_norm(network, passes=parts)
    assert network.state_dict().keys() == nn.Sequential(plain).state_dict().keys()
    # Parts that differ: common statistics would be far off.
    batches = [torch.randn(4, 5, 6, 7, dtype=torch.float64) * (1 + part) + part for part in range(parts)]
    joined = torch.cat(batches).contiguous(memory_format=torch.channels_last)
    expected = torch.cat([plain(batch) for batch in batches])
    torch.testing.assert_close(network(joined), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(nn.BatchNorm2d(5).double()(joined), expected, atol=0.1)
    for (name, want), got in zip(plain.state_dict().items(), network.state_dict().values()):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=name)
    assert network.state_dict()["0.num_batches_tracked"] == parts


def test_gradients_are_those_of_apart_passes() -> None:
    torch.manual_seed(1)
    plain = nn.BatchNorm2d(3).double()
    with torch.no_grad():
        plain.weight.uniform_(-1, 1)
    network = nn.Sequential(copy.deepcopy(plain))
    split_batch_norm(network, passes=2)
    norm = network[0]
    assert isinstance(norm, nn.BatchNorm2d)
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    factor = torch.randn_like(x)
    apart = (torch.cat([plain(half) for half in x.chunk(2)]) * factor).sum()
    expected = torch.autograd.grad(apart, [x, plain.weight, plain.bias])
    found = torch.autograd.grad((network(x) * factor).sum(), [x, norm.weight, norm.bias])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_bfloat16_is_as_exact_as_torchs() -> None:
    """Under autocast; errors against float64, of the output and of the input's gradient."""
    torch.manual_seed(2)
    plain = nn.BatchNorm2d(3)
    network = nn.Sequential(copy.deepcopy(plain))
    split_batch_norm(network, groups=2)
    values = (torch.randn(8, 3, 9, 9) + 5).bfloat16()
    factor = torch.randn_like(values)

    def run(norm: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        x = values.to(dtype).requires_grad_()
        halves = [x] if norm is network else list(x.chunk(2))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = torch.cat([norm(half) for half in halves])
        assert y.dtype == dtype
        return [y.detach(), *torch.autograd.grad(y, x, factor.to(dtype))]

    exact = run(copy.deepcopy(plain).double(), torch.float64)
    for found, own, target in zip(run(network, torch.bfloat16), run(plain, torch.bfloat16), exact):
        assert (found - target).norm() <= 1.05 * (own - target).norm()


def test_numbers_that_make_no_parts_are_refused() -> None:
    for numbers in ((0, 1), (1, 0), (-2, 1)):
        with pytest.raises(ValueError, match=r"groups, passes: got .* expected at least 1 each"):
            split_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), *numbers)
    network = nn.Sequential(nn.BatchNorm2d(3))
    split_batch_norm(network, groups=2)
    norm = network[0]
    assert isinstance(norm, SplitBatchNorm2d)
    norm.momentum = None
    with pytest.raises(ValueError, match=r"BatchNorm: got .* expected one with a momentum"):
        network(torch.randn(4, 3, 5, 5))


def test_a_second_derivative_is_an_error() -> None:
    """Not a number that lacks the statistics' part, also where the loss has other terms."""
    norm = nn.Sequential(nn.BatchNorm2d(3)).double()
    split_batch_norm(norm, groups=2)
    x = torch.randn(4, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    for leaf in (x, *norm.parameters()):
        loss = (norm(x) * x.sin()).square().sum() + leaf.cos().sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()
    # The first one may be asked for in that way.
    (gradient,) = torch.autograd.grad((norm(x) ** 2).sum(), x, create_graph=True)
    assert gradient.isfinite().all()


def test_copies_keep_their_parts() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3))
    split_batch_norm(network, groups=2, passes=3)
    twin: Any = pickle.loads(pickle.dumps(copy.deepcopy(network)))
    assert (twin[0].groups, twin[0].passes, twin[0].parts) == (2, 3, 6)
    assert "groups=2, passes=3" in repr(twin)
    x = torch.randn(12, 3, 4, 4)
    assert torch.equal(network(x), twin(x))
    for (name, value), got in zip(network.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, got), name


def test_without_weight_and_bias() -> None:
    plain = nn.BatchNorm2d(3, affine=False).double()
    network = nn.Sequential(copy.deepcopy(plain))
    split_batch_norm(network, groups=2)
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    factor = torch.randn_like(x)
    expected = torch.autograd.grad((torch.cat([plain(half) for half in x.chunk(2)]) * factor).sum(), x)
    found = torch.autograd.grad((network(x) * factor).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("passes", [1, 2])
def test_groups_are_modules_side_by_side(passes: int) -> None:
    """Each group by a torch module of its own; the running statistics are the mean of theirs, a step a pass."""
    torch.manual_seed(2)
    groups = 3
    plain = nn.BatchNorm2d(4, momentum=0.2).double()
    network = nn.Sequential(copy.deepcopy(plain))
    split_batch_norm(network, groups, passes)
    modules = [copy.deepcopy(plain) for _ in range(groups)]
    parts = [torch.randn(2, 4, 3, 3, dtype=torch.float64) * (1 + part) + part for part in range(passes * groups)]
    expected = [modules[number % groups](part) for number, part in enumerate(parts)]
    torch.testing.assert_close(network(torch.cat(parts)), torch.cat(expected), rtol=1e-12, atol=1e-12)
    state = network[0].state_dict()
    for name in ("running_mean", "running_var"):
        want = torch.stack([module.state_dict()[name] for module in modules]).mean(0)
        torch.testing.assert_close(state[name], want, rtol=1e-12, atol=1e-12)
    assert state["num_batches_tracked"] == passes


def test_eval_mode_and_one_part_are_torch_to_the_bit() -> None:
    x = torch.randn(4, 3, 5, 5)
    plain = nn.BatchNorm2d(3)
    network = nn.Sequential(copy.deepcopy(plain))
    split_batch_norm(network, 1)
    assert torch.equal(network(x), plain(x))
    split_batch_norm(network, passes=2)
    assert torch.equal(network.eval()(x), plain.eval()(x))


def test_what_cannot_be_split_is_refused() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3))
    split_batch_norm(network, passes=2)
    with pytest.raises(ValueError, match="got 5 samples, expected a multiple of 2"):
        network(torch.randn(5, 3, 4, 4))
    with pytest.raises(ValueError, match="got 1 value a channel in each of 2 parts"):
        network(torch.randn(2, 3, 1, 1))
    assert isinstance(network[0], SplitBatchNorm2d)
    for norm in (SyncBatchNorm2d(3), nn.BatchNorm1d(3), nn.BatchNorm2d(3, momentum=None)):
        with pytest.raises(ValueError, match=r"expected nn\.BatchNorm2d with a momentum"):
            split_batch_norm(nn.Sequential(norm), 2)


def test_streaming_step_with_joined_keys_has_the_same_groups() -> None:
    """Every tensor of a checkpoint after two steps in float64, against torch's trunk and two passes for the keys."""

    def build(batch_norm: str, join: bool) -> TrainStep:
        model = MoCo("resnet18", dim=8, head="linear", queue_size=8, batch_norm=batch_norm).double()
        return TrainStep(
            model, build_optimizer(model.query.parameters(), 0.01), objective=Objective(), compile=False,
            precision="fp32", join_keys=join, ranks=RankSettings(groups=2),
        )  # fmt: skip

    plain, streaming = build("torch", join=False), build("streaming", join=True)
    for seed in range(2):
        batch = random_batch(4, 64, (2, 2), "cpu", seed=seed)
        for step in (plain, streaming):
            step(batch, 0.01)
    expected, found = snapshot(plain), snapshot(streaming)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("groups", [1, 3])
def test_step_with_joined_keys_is_the_step(groups: int) -> None:
    """Every tensor of a checkpoint after three steps in float64: keys, queue, both encoders, running statistics."""
    ranks = RankSettings(groups=groups)
    steps = [tiny_step(dtype=torch.float64, join_keys=join, ranks=ranks) for join in (False, True)]
    metrics = [[step(batch_of(seed), 0.05) for seed in range(3)] for step in steps]
    first, second = (snapshot(step) for step in steps)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-9, atol=1e-11, msg=name)
    for one, other in zip(*metrics):
        torch.testing.assert_close(torch.stack(list(other[:3])), torch.stack(list(one[:3])), rtol=1e-10, atol=1e-12)
    assert differing(snapshot(tiny_step(dtype=torch.float64)), first)  # the steps did something


def test_step_without_masked_keys_joins_nothing() -> None:
    steps = [tiny_step(dtype=torch.float64, attention=False, join_keys=join) for join in (False, True)]
    for step in steps:
        step(batch_of(0, attention=False), 0.05)
    assert not differing(*(snapshot(step) for step in steps))


def test_wrong_mode_is_named() -> None:
    with pytest.raises(ValueError, match="compile_mode: got 'fast'"):
        tiny_step(compile_mode="fast")


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("settings", [{"compile_mode": "reduce-overhead"}, {"join_keys": True}], ids=str)
def test_compiled_variants_on_a_gpu(cuda: torch.device, settings: dict[str, Any], groups: int) -> None:
    """Also that metrics of an earlier step survive the replay of a later one."""
    ranks = RankSettings(groups=groups)
    steps = [tiny_step(cuda, compile=True, ranks=ranks), tiny_step(cuda, compile=True, ranks=ranks, **settings)]
    metrics = [[step(batch_of(seed, cuda), 0.05) for seed in range(5)] for step in steps]
    for one, other in zip(*metrics):
        torch.testing.assert_close(torch.stack(list(other[:3])), torch.stack(list(one[:3])), rtol=1e-4, atol=1e-5)
    first, second = (snapshot(step) for step in steps)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-4, msg=name)
