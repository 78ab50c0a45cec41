"""Fused SGD equals torch's plain SGD, can be suppressed on the device, and survives any layout of loaded state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_encoder import tiny_encoder
from torch import nn

from cast_fast.optim import build_optimizer, cosine_lr, make_gateable


def fill_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))


def channels_last_encoder(device: torch.device | str = "cpu") -> nn.Module:
    return tiny_encoder().to(device).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_equals_plain_sgd(device: torch.device, momentum: float) -> None:
    module = channels_last_encoder(device).double()
    twin = copy.deepcopy(module)
    optimizer = build_optimizer(module.parameters(), 0.1, momentum, 1e-2)
    plain = torch.optim.SGD(twin.parameters(), 0.1, momentum=momentum, weight_decay=1e-2, foreach=False)
    for step in range(3):
        for one, other in ((module, optimizer), (twin, plain)):
            fill_gradients(one, step)
            other.param_groups[0]["lr"] = 0.1 / (step + 1)
            other.step()
    for parameter, expected in zip(module.parameters(), twin.parameters()):
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-12)


def test_a_suppressed_first_step_leaves_zeros(device: torch.device) -> None:
    module = channels_last_encoder(device)
    before = [parameter.clone() for parameter in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, fused=True)
    make_gateable(optimizer)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    vars(optimizer).update(grad_scale=None, found_inf=torch.ones((), device=device))
    optimizer.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(module.parameters(), before))
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())
    assert len(optimizer.state) == len(before)


def test_state_in_another_memory_format_is_brought_back() -> None:
    module, twin = channels_last_encoder(), channels_last_encoder()
    optimizer, other = (build_optimizer(one.parameters(), 0.1) for one in (module, twin))
    fill_gradients(module, 0)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["momentum_buffer"] = entry["momentum_buffer"].contiguous()
    twin.load_state_dict(module.state_dict())
    other.load_state_dict(state)
    for one, its in ((module, optimizer), (twin, other)):
        fill_gradients(one, 1)
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters()))


def test_only_trained_parameters_are_taken() -> None:
    module = channels_last_encoder()
    next(module.parameters()).requires_grad_(False)
    optimizer = build_optimizer(module.parameters(), 0.1)
    assert len(optimizer.param_groups[0]["params"]) == len(list(module.parameters())) - 1


def test_unsuitable_optimizers_are_refused() -> None:
    parameters = list(channels_last_encoder().parameters())
    with pytest.raises(ValueError, match="got SGD without fused=True"):
        make_gateable(torch.optim.SGD(parameters, 0.1))
    with pytest.raises(ValueError, match="dampening"):
        make_gateable(torch.optim.SGD(parameters, 0.1, momentum=0.9, dampening=0.1, fused=True))
    make_gateable(torch.optim.AdamW(parameters, 1e-3, fused=True))


def test_cosine_schedule() -> None:
    assert cosine_lr(0.5, 256, 0, 100) == 0.5
    assert cosine_lr(0.5, 64, 0, 100) == 0.125
    assert cosine_lr(0.5, 256, 50, 100) == pytest.approx(0.25)
    assert cosine_lr(0.5, 256, 25, 100) == pytest.approx(0.25 * (1 + math.sqrt(0.5)))
    assert cosine_lr(0.5, 256, 100, 100) == pytest.approx(0)
    assert cosine_lr(0.5, 256, 130, 100) == pytest.approx(0)
