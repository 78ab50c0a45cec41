"""The key encoder is a copy that follows the query encoder in place, unless the gate is closed."""

from __future__ import annotations

import pytest
import torch
from tiny_encoder import tiny_encoder

from cast_fast.moco import MoCo


def moved_apart(device: torch.device | str = "cpu") -> MoCo:
    moco = MoCo.from_encoder(tiny_encoder(), 8, 16).double().to(device)
    with torch.no_grad():
        for number, parameter in enumerate(moco.query.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).to(parameter))
    return moco


def test_starts_as_a_frozen_copy() -> None:
    moco = MoCo("resnet18", dim=8, head="mlp", queue_size=16, seed=0)
    query, key = moco.query.state_dict(), moco.key.state_dict()
    assert query.keys() == key.keys()
    assert all(torch.equal(query[name], key[name]) for name in query)
    assert all(query[name].data_ptr() != key[name].data_ptr() for name in query)
    assert not any(parameter.requires_grad for parameter in moco.key.parameters())
    assert all(parameter.requires_grad for parameter in moco.query.parameters())
    assert moco.queue.keys.shape == (16, 8)


def test_seed_decides_everything_and_touches_nothing_else() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models = [MoCo("resnet18", 4, "linear", 6, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    first, second, third = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["queue.keys"], third["queue.keys"])
    assert not torch.equal(first["query.trunk.conv1.weight"], third["query.trunk.conv1.weight"])


@pytest.mark.parametrize("gated", [False, True])
def test_momentum_update(device: torch.device, gated: bool) -> None:
    moco = moved_apart(device)
    expected = [0.9 * key + 0.1 * query for key, query in zip(moco.key.parameters(), moco.query.parameters())]
    queries = [query.clone() for query in moco.query.parameters()]
    places = [key.data_ptr() for key in moco.key.parameters()]
    moco.momentum_update(0.9, gate=torch.tensor(True, device=device) if gated else None)
    for key, target in zip(moco.key.parameters(), expected):
        torch.testing.assert_close(key, target, rtol=1e-12, atol=1e-12)
    assert places == [key.data_ptr() for key in moco.key.parameters()]
    assert all(torch.equal(query, before) for query, before in zip(moco.query.parameters(), queries))


def test_closed_gate_keeps_every_bit_even_beside_nan(device: torch.device) -> None:
    moco = moved_apart(device)
    with torch.no_grad():
        for value, query in zip((torch.nan, torch.inf), moco.query.parameters()):
            query.fill_(value)
    before = [key.clone() for key in moco.key.parameters()]
    moco.momentum_update(0.9, gate=torch.tensor(False, device=device))
    assert all(torch.equal(key, old) for key, old in zip(moco.key.parameters(), before))
