"""The shuffle is one permutation, however it is spread over ranks and groups."""

from __future__ import annotations

import pytest
import torch

from cast_fast.data.sampling import shuffle_order
from cast_fast.shuffle import by_group, shuffle_plan, unshuffled

COUNT = 6


@pytest.mark.parametrize(("members", "groups"), [(1, 1), (2, 1), (3, 1), (8, 1), (1, 2), (1, 6), (2, 3), (4, 2)])
def test_plans_are_the_permutation(members: int, groups: int) -> None:
    """Sample i of group g of rank r is that of rank r + W·g of W·G: followed through, it lands where that one does."""
    size, total = COUNT // groups, members * groups
    seen = set()
    for step in range(6):
        plans = [shuffle_plan(7, step, COUNT, rank, members, groups) for rank in range(members)]
        # Each rank's samples by their positions in the global batch, of which it takes every W-th.
        sent = [torch.arange(COUNT * members)[rank::members][plan.order] for rank, plan in enumerate(plans)]
        parts = [list(rows.split(plan.send)) for rows, plan in zip(sent, plans)]
        for rank, plan in enumerate(plans):
            assert sorted(plan.order.tolist()) == list(range(COUNT))
            assert plan.receive == [other.send[rank] for other in plans]
            there = torch.cat([parts[sender][rank] for sender in range(members)])
            if plan.groups is None:
                assert groups == 1
                seen_by_encoder = there
            else:
                seen_by_encoder = there[plan.groups[0]]
                assert torch.equal(seen_by_encoder[plan.groups[1]], there)
            target = torch.from_numpy(shuffle_order(COUNT * members, 7, step)) // size
            for group, row in enumerate(seen_by_encoder.reshape(groups, size)):
                # Row v of the targets: samples v, v + W·G, … of the global batch.
                rows, columns = (target.reshape(total, size) == rank + members * group).nonzero(as_tuple=True)
                assert sorted(row.tolist()) == sorted((rows + total * columns).tolist())
        seen.add(tuple(tuple((plan.order if plan.groups is None else plan.groups[0]).tolist()) for plan in plans))
        again = shuffle_plan(7, step, COUNT, members + 1, members, groups)  # the same place in the next run of ranks
        assert again.send == plans[1 % members].send
    assert len(seen) > 1 or total == 1


def test_one_group_has_no_order() -> None:
    assert shuffle_plan(7, 0, COUNT, 0, 1).groups is None and unshuffled(COUNT, 1) is None


def test_samples_by_group() -> None:
    rows = torch.arange(12).reshape(6, 2)
    assert by_group(rows, 1) is rows
    order = by_group(rows, 3)
    assert order[:, 0].tolist() == [0, 6, 2, 8, 4, 10]
    there_and_back = unshuffled(6, 3)
    assert there_and_back is not None
    assert torch.equal(rows[there_and_back[0]], order) and torch.equal(order[there_and_back[1]], rows)
