"""Two and four real processes compute what one computes on all their samples together."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_checks
import torch
from rank_checks import CASES, GLOBAL_BATCH, STEPS, Case
from torch import Tensor

from cast_fast import distributed, parallel
from cast_fast.distributed import RECORD, Heartbeat, World, heartbeats
from cast_fast.errors import UserError
from cast_fast.parallel import RankSettings
from cast_fast.step import StepMetrics

SIZES = (2, 4)
TOLERANCE = 1e-10
"""Relative, in float64, after five steps: sums over ranks are added in another order."""


@pytest.fixture(scope="module", params=SIZES, ids=["2-ranks", "4-ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the processes found."""
    size: int = request.param
    return rank_checks.run_ranks(rank_checks.everything, size, tmp_path_factory.mktemp(f"ranks{size}"))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if value.is_floating_point():
            scale = expected[name].abs().amax().clamp_min(1e-3)
            difference = float(((value - expected[name]).abs().amax() / scale).nan_to_num(nan=float("inf")))
            assert difference < tolerance, f"{name}: {difference}"
        else:
            assert torch.equal(value, expected[name]), name


# Collectives


def test_collectives(ranks: list[dict[str, Any]]) -> None:
    size = len(ranks)
    every = torch.tensor([[r, i] for r in range(size) for i in (0.0, 1.0)], dtype=torch.float64)
    for rank, results in enumerate(ranks):
        found = results["collectives"]
        assert torch.equal(found["gathered"], every)
        # Rank r weighs row i with (i + 1)(r + 1).
        total = sum(range(1, size + 1))
        own = torch.arange(1.0, 2 * size + 1, dtype=torch.float64)[2 * rank : 2 * rank + 2, None] * total
        assert torch.equal(found["gathered_gradient"], own.expand(2, 2))
        assert torch.equal(
            found["scattered"], total * torch.arange(2.0 * size, dtype=torch.float64)[2 * rank :][:2, None]
        )
        weights = torch.arange(size, dtype=torch.float64).repeat_interleave(2)[:, None] + 1
        assert torch.equal(found["scattered_gradient"], weights * torch.arange(2.0 * size)[:, None])
        assert found["sum"] == total
        assert found["maximum"].tolist() == [size - 1, 0]
        assert found["moved"].tolist() == [[r, rank] for r in range(size) for _ in range(r + rank)]
        assert found["from_main"] == {"rank": 0, "ä": [1, None]}


def test_failure_on_rank_0_ends_the_others(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["failure"] == "rank 0 alone"
    assert all(results["failure"] == "leaves with 1" for results in ranks[1:])


def test_synchronised_batch_norm(ranks: list[dict[str, Any]]) -> None:
    """A mean of 400 against a spread of 1: nothing cancels; and it is torch's own layer on all samples."""
    whole = rank_checks.batch_norm(World())
    size = len(ranks)
    for rank, results in enumerate(ranks):
        expected = {
            name: value[rank::size] if name in ("output", "input_gradient", "evaluated") else value
            for name, value in whole.items()
        }
        assert_close(results["batch norm"], expected, 1e-11)


# The step


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_steps_equal_those_of_one_process(ranks: list[dict[str, Any]], case: Case) -> None:
    """Losses, gradients, parameters, optimizer, statistics and queue; BatchNorm grouped where it is by definition."""
    size = len(ranks)
    if case.name not in ranks[0]:
        pytest.skip(f"groups of {case.members} are all {size} ranks")
    plain = dataclasses.replace(case, kernels=False, groups=1)
    expected = rank_checks.trajectory(plain, World(), reference_ranks=size * case.groups)
    for results in ranks:
        found = results[case.name]
        names = StepMetrics._fields
        assert_close(
            {name: found["metrics"][:, column].nan_to_num(-1) for column, name in enumerate(names)},
            {name: expected["metrics"][:, column].nan_to_num(-1) for column, name in enumerate(names)},
        )
        assert_close(found["gradients"], expected["gradients"])
        assert_close(found["state"], expected["state"])
        if case.attention and not case.poisoned:
            counted = found["metrics"][:, [names.index("cast_samples"), names.index("empty_key_mask")]]
            assert (counted == torch.tensor([GLOBAL_BATCH - 2, 1])).all()


@pytest.mark.parametrize("name", ["shuffle", "shuffle moco", "local", "not finite", "groups"])
def test_groups_in_one_process_are_ranks(ranks: list[dict[str, Any]], name: str) -> None:
    """One process with as many groups as there are ranks (and groups on them): the same run, no reference between."""
    case = next(case for case in CASES if case.name == name)
    alone = dataclasses.replace(case, groups=len(ranks) * case.groups, exchange="gather")
    expected = rank_checks.trajectory(alone, World())
    found = ranks[0][name]
    for part in ("gradients", "state"):
        assert_close(found[part], expected[part])
    assert_close({"metrics": found["metrics"].nan_to_num(-1)}, {"metrics": expected["metrics"].nan_to_num(-1)})
    # It matters: with one group, or dealt out otherwise, it is another run.
    others: list[dict[str, Any]] = [{"groups": 1}]
    if alone.groups < GLOBAL_BATCH:  # groups of one sample are the same however they are dealt out
        others.append({"key_bn": "local" if case.key_bn == "shuffle" else "shuffle"})
    for other in others:
        differs = rank_checks.trajectory(dataclasses.replace(alone, **other), World())["state"]
        assert not torch.allclose(differs["queue.keys"], expected["state"]["queue.keys"], rtol=0, atol=1e-3)


def test_ranks_agree_to_the_bit(ranks: list[dict[str, Any]]) -> None:
    first, *others = ranks
    names = [name for name, value in first.items() if isinstance(value, dict) and "state" in value]
    assert len(names) >= len(CASES)
    for name in names:
        for other in others:
            for key, value in first[name]["state"].items():
                assert torch.equal(value, other[name]["state"][key]), (name, key)
            assert torch.equal(first[name]["metrics"].nan_to_num(-1), other[name]["metrics"].nan_to_num(-1))


def test_a_bad_rank_changes_nothing_anywhere(ranks: list[dict[str, Any]]) -> None:
    case = next(case for case in CASES if case.poisoned)
    finite = StepMetrics._fields.index("finite")
    for results in ranks:
        found = results[case.name]
        assert found["changed_by_poison"] == [[] for _ in case.poisoned]
        assert found["metrics"][:, finite].tolist() == [float(step not in case.poisoned) for step in range(STEPS)]
        for step, bad in enumerate(found["bad"]):
            # Position 1 is rank 1's first sample; an infinite weight makes every rank's share 0 and its own NaN.
            assert (bad[1] == 1) == (step in case.poisoned)
            assert not bad[0]


def test_reports_are_added_up(ranks: list[dict[str, Any]]) -> None:
    size = len(ranks)
    for results in ranks:
        assert all(sums.tolist() == [size, sum(range(size))] for sums in results["gather"]["sums"])


def test_bfloat16_gradients_are_close(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert not torch.equal(
            results["bf16"]["state"]["query.trunk.0.weight"], results["exact"]["state"]["query.trunk.0.weight"]
        )
        for name, gradient in results["exact"]["gradients"].items():
            # Each rank's part is rounded to 8 bits, then their sum.
            assert (results["bf16"]["gradients"][name] - gradient).norm() < 0.01 * gradient.norm(), name


def test_refusals(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        messages = results["refusals"]
        assert messages["small queue"] == "batch: got 12 samples, expected at most 11 (queue)"
        assert "once" in messages["two queues"]
        assert f"expected the {len(ranks)} of the group" in messages["wrong world"]


def test_traffic_is_what_the_exchanges_promise(ranks: list[dict[str, Any]]) -> None:
    size = len(ranks)
    count = GLOBAL_BATCH // size
    promised = distributed.exchange_bytes(count, 31, rank_checks.DIM, size)
    pixels = (rank_checks.GRID * rank_checks.STRIDE) ** 2
    for results in ranks:
        sent = results["traffic"]
        assert sent["exchange"] == {torch.float32: "reduce", torch.bfloat16: "gather"}
        assert sent["gather"]["queue"] == promised["gather"]
        assert "queue" not in sent["reduce"] and "queries" not in sent["gather"]
        assert sent["reduce"]["queries"] + sent["reduce"]["partial sums"] == promised["reduce"]
        rows = sent["shuffle"]["rows"]
        assert sent["reduce"]["key shuffle"] == rows * 4 * pixels
        # What came from others goes back to them: as many rows as were sent.
        assert sent["reduce"]["key return"] == rows * 2 * rank_checks.DIM * 4


@pytest.mark.parametrize(
    "function",
    [rank_checks.compiled, pytest.param(rank_checks.compiled_by_inductor, marks=pytest.mark.soak)],
    ids=["captured", "inductor"],
)
def test_compiled_step_on_two_ranks(tmp_path: Path, function: Callable[[World], Any]) -> None:
    """Captured whole, with collectives inside; then cut at bucket boundaries, so that gradients leave early."""
    for results in rank_checks.run_ranks(function, 2, tmp_path):
        assert results["graphs"] > 2  # the key encoder's, and more than one for the losses
        # The compiler may order what is independent by its size, which is not the same on every rank.
        assert {"queries", "partial sums"} <= {name for name, _ in results["pairs"]}
        assert {order for _, order in results["pairs"]} == {"fixed"}
        assert_close(results["compiled"]["state"], results["eager"]["state"])
        assert_close(results["compiled"]["gradients"], results["eager"]["gradients"])


# One rank, and what needs none


def test_identity_on_one_rank() -> None:
    rows = torch.ones(2, 3)
    assert distributed.world_size() == 1 and distributed.rank() == 0
    for collective in (
        distributed.all_gather, distributed.reduce_scatter, distributed.all_reduce, distributed.all_reduce_max,
    ):  # fmt: skip
        assert collective(rows, "nothing") is rows
    assert distributed.all_to_all(rows, [2], [2], "nothing") is rows
    assert distributed.on_main(lambda: "result", "nothing") == "result"
    distributed.barrier("nothing")
    with distributed.process_group(World(), torch.device("cpu"), 1):
        assert not torch.distributed.is_initialized()


def test_ranks_of_one_are_the_plain_step() -> None:
    case = Case("plain", key_bn="shuffle", query_bn="local")
    plain, ranked = (
        rank_checks.trajectory(dataclasses.replace(case, exchange=exchange), World())
        for exchange in ("gather", "reduce")
    )
    assert all(torch.equal(value, ranked["state"][name]) for name, value in plain["state"].items())
    assert plain["sums"] == []


def test_exchange_by_counted_bytes() -> None:
    assert distributed.exchange_bytes(256, 65536, 128, 1) == {"gather": 0, "reduce": 0}
    counted = distributed.exchange_bytes(256, 65536, 128, 8)
    assert counted == {"gather": 7 * 8192 * 128 * 4, "reduce": 7 * 256 * (3 * 128 + 2) * 4}
    assert distributed.choose_exchange("auto", 256, 65536, 128, 8) == "reduce"
    assert distributed.choose_exchange("auto", 256, 4096, 128, 8) == "gather"
    assert distributed.choose_exchange("gather", 256, 65536, 128, 8) == "gather"
    # Half as wide keys make half the traffic of the queue, and none of the float32 queries' and sums'.
    assert distributed.exchange_bytes(256, 65536, 128, 8, 2) == {**counted, "gather": counted["gather"] // 2}
    assert [distributed.choose_exchange("auto", 256, 65536, 128, 64, element) for element in (4, 2)] == [
        "reduce",
        "gather",
    ]
    with pytest.raises(ValueError, match="exchange: got 'all'"):
        distributed.choose_exchange("all", 1, 1, 1, 1)


def test_subgroups() -> None:
    assert [distributed.subgroup_size(world) for world in (1, 8, 32, 64, 1024, 37)] == [1, 8, 32, 32, 32, 1]
    assert distributed.subgroup_size(12, 5) == 4


@pytest.mark.parametrize("name", ["key_bn", "query_bn", "exchange", "compression"])
def test_unknown_settings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 'x', expected one of"):
        RankSettings(**{name: "x"})  # pyright: ignore[reportArgumentType]


def test_groups_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="groups: got 0, expected at least 1"):
        RankSettings(groups=0)


def test_settings_of_the_command_line_are_known() -> None:
    assert set(parallel.COMPRESSIONS) == {"none", "bf16"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"RANK": "x"}, "RANK: got 'x'"), ({"RANK": "2", "WORLD_SIZE": "2"}, "0 <= RANK < WORLD_SIZE")],
)
def test_environment_is_checked(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.world_from_environment()


def test_heartbeats(tmp_path: Path) -> None:
    """The files are written again and again, and their summary names rank, step and collective."""
    RECORD.reset()
    with Heartbeat(tmp_path, World(1, 1, 2), every=0.01):
        RECORD.step = 7
        RECORD.begin("gradients", 10)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            beat = json.loads((tmp_path / "rank-1.json").read_text())
            if beat["step"] == 7 and beat["inside"]:
                break
    assert (beat["rank"], beat["collective"]) == (1, "gradients")
    assert "rank 1 (process " in heartbeats(tmp_path) and "step 7, in 'gradients' for" in heartbeats(tmp_path)
    RECORD.end()
    with Heartbeat(tmp_path, World(0, 0, 2)):
        pass
    first, second = heartbeats(tmp_path).splitlines()
    assert "rank 0" in first and "after 'gradients'" in first and "rank 1" in second
    with Heartbeat(tmp_path / "none", World()):
        assert not (tmp_path / "none").exists()
    RECORD.reset()
