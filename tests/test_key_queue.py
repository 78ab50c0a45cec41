"""The queue behaves like a bounded list of the latest keys, for every size and batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cast_fast.key_queue import KeyQueue
from cast_fast.objective import info_nce


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


@pytest.mark.parametrize("saved_on", [1, 2, 3, 4])
@pytest.mark.parametrize("resumed_on", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [7, 12])
def test_any_number_of_ranks_goes_on_from_any_other(size: int, saved_on: int, resumed_on: int) -> None:
    """The columns of the ranks are the whole queue, in order and to the bit; also in each rank's rows."""

    def shards(queue: KeyQueue, ranks: int, arrived: int) -> list[KeyQueue]:
        parts = []
        for rank in range(ranks):
            part = KeyQueue(size, 3)
            part.load_state_dict(queue.state_dict())
            part.shard(rank, ranks, arrived)
            assert part.place == (rank, ranks)
            parts.append(part)
        return parts

    def restored(parts: list[KeyQueue]) -> KeyQueue:
        queue = KeyQueue(size, 3, torch.Generator().manual_seed(9))
        queue.restore(torch.cat([part.column() for part in parts], dim=1), parts[-1].pointer)
        return queue

    one = KeyQueue(size, 3)
    parts = shards(one, saved_on, 0)
    keys = torch.randn(5, saved_on, 3, generator=torch.Generator().manual_seed(size))
    for arrived in keys:
        one.enqueue(arrived)
        for rank, part in enumerate(parts):
            part.enqueue(arrived[rank : rank + 1])
    again = restored(parts)
    assert torch.equal(again.keys, one.keys) and torch.equal(again.pointer, one.pointer)
    resumed = shards(again, resumed_on, 5 * saved_on)
    assert torch.equal(restored(resumed).keys, one.keys)
    if resumed_on == saved_on:
        for part, other in zip(parts, resumed):
            assert torch.equal(part.keys, other.keys)


def test_restoring_another_queue_is_refused() -> None:
    queue = KeyQueue(7, 3)
    for shape in ((7, 3), (7, 1, 4), (3, 2, 3), (7, 2, 3)):
        with pytest.raises(ValueError, match=r"queue: got \(.*expected"):
            queue.restore(torch.zeros(shape), torch.tensor(0))
    queue.shard(0, 2)
    with pytest.raises(ValueError, match="before shard"):
        queue.restore(torch.zeros(7, 1, 3), torch.tensor(0))


def test_bf16_keys_are_rounded_once(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(5)
    queue = KeyQueue(10, 16, generator, torch.bfloat16).to(device)
    assert queue.keys.dtype == torch.bfloat16
    keys = torch.nn.functional.normalize(torch.randn(7, 16, generator=generator), dim=1).to(device)
    before = queue.keys.clone()
    queue.enqueue(keys, torch.tensor(False, device=device))
    assert torch.equal(queue.keys, before)
    queue.enqueue(keys, torch.tensor(True, device=device))
    assert torch.equal(queue.keys[:7], keys.bfloat16()) and torch.equal(queue.keys[7:], before[7:])
    twin = KeyQueue(10, 16, dtype=torch.bfloat16).to(device)
    twin.restore(queue.column(), queue.pointer)
    assert torch.equal(twin.keys, queue.keys) and twin.pointer == queue.pointer


def test_a_queue_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype: got torch\.float16"):
        KeyQueue(4, 2, dtype=torch.float16)


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_what_rounding_the_queue_costs(temperature: float) -> None:
    """Each component of a key errs by at most 2^-9 of itself, so a logit by at most 2^-9 Σ|q_i k_i| / T <= 2^-9 / T;
    a loss errs by no more than the largest logit. On average errors cancel: a twentieth of that."""
    generator = torch.Generator().manual_seed(6)
    query, key, queue = (
        torch.nn.functional.normalize(torch.randn(count, 128, generator=generator), dim=1).double()
        for count in (32, 32, 2000)
    )
    key = torch.nn.functional.normalize(query + 0.5 * key, dim=1)
    exact, beaten = info_nce(query, key, queue, temperature)
    rounded, beaten_rounded = info_nce(query, key, queue.bfloat16(), temperature)
    error = (rounded - exact).abs()
    assert 0 < error.max() <= 2.0**-9 / temperature
    assert error.mean() <= 2.0**-9 / temperature / 20
    assert torch.equal(beaten, beaten_rounded)
