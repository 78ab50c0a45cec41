"""The queue behaves like a bounded list of the latest keys, for every size and batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cast_fast.key_queue import KeyQueue


def test_starts_as_unit_vectors() -> None:
    queue = KeyQueue(50, 7, torch.Generator().manual_seed(3))
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(50))
    assert not torch.allclose(queue.keys[0], queue.keys[1])
    assert queue.pointer.item() == 0
    assert len(queue) == 50


@given(size=st.integers(1, 12), batches=st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=12))
def test_holds_the_latest_keys(size: int, batches: list[tuple[int, bool]]) -> None:
    queue = KeyQueue(size, 1)
    latest = queue.keys[:, 0].tolist()  # oldest first
    number = 100.0
    for wanted, gate in batches:
        count = min(wanted, size)
        keys = torch.arange(number, number + count)[:, None]
        queue.enqueue(keys, torch.tensor(gate))
        if gate:
            latest = (latest + keys[:, 0].tolist())[-size:]
        number += count
    pointer = int(queue.pointer)
    ring = queue.keys[:, 0].tolist()
    assert ring[pointer:] + ring[:pointer] == latest


def test_gate_and_no_gate_agree(device: torch.device) -> None:
    queues = [KeyQueue(10, 4, torch.Generator().manual_seed(0)).to(device) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        keys = torch.randn(7, 4, generator=generator).to(device)
        queues[0].enqueue(keys)
        queues[1].enqueue(keys, torch.tensor(True, device=device))
    assert torch.equal(queues[0].keys, queues[1].keys)
    assert queues[0].pointer.item() == queues[1].pointer.item() == 28 % 10


def test_a_closed_gate_keeps_every_bit(device: torch.device) -> None:
    queue = KeyQueue(10, 4).to(device)
    queue.enqueue(torch.randn(3, 4, device=device))
    keys, pointer = queue.keys.clone(), queue.pointer.clone()
    queue.enqueue(torch.full((9, 4), torch.nan, device=device), torch.tensor(False, device=device))
    assert torch.equal(queue.keys, keys)
    assert torch.equal(queue.pointer, pointer)


def test_state_is_saved() -> None:
    queue = KeyQueue(10, 4)
    queue.enqueue(torch.randn(7, 4))
    other = KeyQueue(10, 4)
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.keys, queue.keys)
    assert other.pointer.item() == 7


def test_callers_mistakes() -> None:
    queue = KeyQueue(4, 3)
    with pytest.raises(ValueError, match=r"got shape \(5, 3\), expected at most \(4, 3\)"):
        queue.enqueue(torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"got shape \(2, 4\)"):
        queue.enqueue(torch.randn(2, 4))
    with pytest.raises(ValueError, match="size 0"):
        KeyQueue(0, 3)
