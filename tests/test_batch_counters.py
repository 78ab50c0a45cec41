"""Counters that are counted apart: the same numbers, none in the graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
from streaming_ranks import small_resnet
from torch import nn
from torchvision.models import resnet

from cast_fast.batch_counters import BatchCounters
from cast_fast.split_batch_norm import split_batch_norm
from cast_fast.streaming_resnet import StreamingTrunk


def trunk_of(kind: str) -> Any:
    """In training mode but for one BatchNorm."""
    trunk = small_resnet(resnet.BasicBlock, 1).train()
    trunk.get_submodule("layer2.0.bn1").eval()
    if kind == "split":
        split_batch_norm(trunk, 2)
    return StreamingTrunk(trunk) if kind == "streaming" else trunk


@pytest.mark.parametrize("kind", ["torch", "split", "streaming"])
def test_what_is_counted_is_what_the_modules_count(kind: str) -> None:
    trunk = trunk_of(kind)
    twin = copy.deepcopy(trunk)
    x = torch.randn(2, 3, 33, 33)
    counters = BatchCounters(twin, passes=2)
    for _ in range(2):
        expected = [trunk(x), trunk(x)]
        with counters.apart():
            found = [twin(x), twin(x)]
        assert all(torch.equal(a, b) for a, b in zip(expected, found))
    state, twin_state = trunk.state_dict(), twin.state_dict()
    assert list(state) == list(twin_state)
    assert all(torch.equal(value, twin_state[name]) for name, value in state.items())
    assert state["bn1.num_batches_tracked"] == 4 and state["layer2.0.bn1.num_batches_tracked"] == 0
    twin(x)
    assert twin.state_dict()["bn1.num_batches_tracked"] == 5


def test_after_an_exception_nothing_is_counted_and_all_is_back() -> None:
    trunk = trunk_of("torch")
    counters = BatchCounters(trunk)
    with pytest.raises(RuntimeError, match="channels"), counters.apart():
        trunk(torch.zeros(2, 4, 33, 33))
    assert trunk.bn1.num_batches_tracked == 0
    assert "bn1.num_batches_tracked" in trunk.state_dict()


def test_an_average_that_needs_its_counter_keeps_it() -> None:
    norm, twin = (nn.BatchNorm2d(3, momentum=None) for _ in range(2))
    for seed in range(3):
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        norm(x)
        with BatchCounters(twin).apart():
            twin(x)
    assert norm.running_mean is not None and twin.running_mean is not None
    assert torch.equal(norm.running_mean, twin.running_mean)
    assert twin.num_batches_tracked == 3


def test_no_counter_is_in_the_graph() -> None:
    counts: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counts.append(sum(value.dtype == torch.int64 for value in inputs if isinstance(value, torch.Tensor)))
        return graph

    trunk = small_resnet(resnet.BasicBlock, 1).train()
    counters = BatchCounters(trunk)
    x = torch.randn(2, 3, 33, 33)
    compiled = torch.compile(trunk, fullgraph=True, dynamic=False, backend=backend)
    for _ in range(2):
        with counters.apart():
            compiled(x)
    assert counts == [0]
    torch._dynamo.reset()
    compiled(x)
    torch._dynamo.reset()
    assert counts == [0, 12]
    assert trunk.bn1.num_batches_tracked == 3
