"""The benchmark harness: percentiles, the order of repeats, records that survive, table and chart."""

import dataclasses
import json
import types
from collections.abc import Callable, Sequence

import harness
import numpy as np
import pytest
import torch

from cast_fast.errors import UserError

CPU = torch.device("cpu")
CONTRACT = ["name", "variant", "device", "dtype", "shape", "value", "unit", "p20", "p50", "p80", "repeats"]
CONTRACT += ["bytes", "flops", "fraction_of_bound", "versions", "commit", "date", "rounds"]


class Clock:
    """Time that passes only where a test lets it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def line(self, *durations: float) -> harness.Line:
        """A line whose calls take these seconds, one after the other, and the last of them for ever."""
        left = list(durations)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return lambda: run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(harness, "time", types.SimpleNamespace(perf_counter=clock, monotonic=clock))
    return clock


def seconds_of(outcome: harness.Outcome) -> tuple[float, ...]:
    return tuple(round(seconds, 9) for seconds in getattr(outcome, "seconds", ()))


@pytest.mark.parametrize("count", [1, 2, 5, 17])
@pytest.mark.parametrize("q", [0, 20, 50, 80, 100])
def test_percentile_agrees_with_numpy(count: int, q: float) -> None:
    values = np.random.default_rng(count).random(count)
    assert harness.percentile(values.tolist(), q) == pytest.approx(np.percentile(values, q), rel=1e-12)


def test_percentile_refuses_what_has_none() -> None:
    with pytest.raises(ValueError, match="at least one"):
        harness.percentile([], 50)
    with pytest.raises(ValueError, match="0 to 100"):
        harness.percentile([1.0], 101)


def test_percentiles_of_a_rate_ascend_although_the_times_descend() -> None:
    measurement = harness.Measurement((0.5, 0.25, 1.0))
    p20, p50, p80 = measurement.percentiles(lambda seconds: 8 / seconds)
    assert p20 < p50 < p80
    assert p50 == 16.0
    assert measurement.median == 0.5


def _recorder(log: list[str], name: str) -> harness.Line:
    def build() -> Callable[[], object]:
        log.append(f"build {name}")
        return lambda: log.append(name)

    return build


def test_first_turns_follow_the_warm_ups_and_rounds_are_interleaved() -> None:
    log: list[str] = []
    lines = {name: _recorder(log, name) for name in "ABC"}
    outcomes = harness.interleave(lines, device=CPU, repeats=2, warmup=1, calls=2, settle=1)
    first = [entry for name in "ABC" for entry in (f"build {name}", *[name] * 4)]
    turn = ["A"] * 3 + ["B"] * 3 + ["C"] * 3
    assert log == first + turn * 2
    for outcome in outcomes.values():
        assert isinstance(outcome, harness.Measurement)
        assert len(outcome.seconds) == len(outcome.rounds) == 4  # neither settling calls nor the first turn
        assert outcome.peak_bytes is None


def test_only_the_call_is_timed(clock: Clock) -> None:
    def slow() -> None:
        clock.now += 7

    (outcome,) = harness.interleave(
        {"quick": clock.line(9, 0.25)}, device=CPU, repeats=3, warmup=1, settle=1, prepare={"quick": slow}
    ).values()
    assert seconds_of(outcome) == (0.25,) * 3


def test_a_line_is_judged_by_its_rounds_alone(clock: Clock) -> None:
    """The first turn, cold, is told at once and gone as soon as there is a round."""
    told: list[tuple[str, tuple[float, ...], int]] = []
    samples: list[tuple[str, int, float]] = []

    def on_line(name: str, outcome: harness.Outcome) -> None:
        told.append((name, seconds_of(outcome), len(getattr(outcome, "rounds", ()))))

    def on_sample(name: str, repeat: int, seconds: Sequence[float]) -> None:
        samples.append((name, repeat, round(seconds[0], 9)))

    lines = {"A": clock.line(50, 9, 2, 1), "B": clock.line(50, 8, 4, 3)}
    outcomes = harness.interleave(lines, device=CPU, repeats=2, warmup=1, on_line=on_line, on_sample=on_sample)
    assert told == [("A", (9,), 0), ("B", (8,), 0), ("A", (2, 1), 2), ("B", (4, 3), 2)]
    assert samples == [("A", 0, 9), ("B", 0, 8), ("A", 1, 2), ("B", 1, 4), ("A", 2, 1), ("B", 2, 3)]
    assert {name: seconds_of(outcome) for name, outcome in outcomes.items()} == {"A": (2, 1), "B": (4, 3)}


@pytest.mark.parametrize(("seconds", "left"), [(0, (9,)), (25, (2,)), (30, (2, 1))])
def test_a_deadline_leaves_the_first_turn_or_whole_rounds(
    clock: Clock, seconds: float, left: tuple[float, ...]
) -> None:
    lines = {"A": clock.line(9, 2, 1), "B": clock.line(9, 8, 3)}
    outcomes = harness.interleave(lines, device=CPU, repeats=5, warmup=0, deadline=clock.now + seconds)
    assert seconds_of(outcomes["A"]) == left
    assert len(seconds_of(outcomes["B"])) == len(left)
    rounds = [getattr(outcome, "rounds", None) for outcome in outcomes.values()]
    assert rounds[0] == rounds[1] and len(rounds[0] or ()) == (0 if left == (9,) else len(left))


def test_ratios_are_of_turns_of_the_same_rounds(clock: Clock) -> None:
    """A neighbour makes the second round four times as slow for both; the medians alone would say something else."""
    lines = {"A": clock.line(60, 1, 4, 1.25, 1), "B": clock.line(70, 2, 8, 2, 8)}
    outcomes = harness.interleave(lines, device=CPU, repeats=4, warmup=0)
    a, b = outcomes["A"], outcomes["B"]
    assert isinstance(a, harness.Measurement) and isinstance(b, harness.Measurement)
    ratio = harness.speed_ratio(a, b)
    # of 2, 2, 1.6 and 8
    assert dataclasses.astuple(ratio) == (2.0, pytest.approx(1.84), pytest.approx(4.4), 4)
    assert b.median / a.median == pytest.approx(40 / 9)
    assert harness.speed_ratio(a, b, work=3).value == 6.0
    assert harness.speed_ratio(b, a).value == 0.5


def test_ratios_of_lines_without_a_common_round_say_so(clock: Clock) -> None:
    outcomes = [
        harness.interleave({"A": clock.line(9, seconds)}, device=CPU, repeats=1, warmup=0)["A"] for seconds in (2, 3)
    ]
    first, second = outcomes
    assert isinstance(first, harness.Measurement) and isinstance(second, harness.Measurement)
    assert harness.speed_ratio(first, second) == harness.Ratio(1.5, None, None, 0)
    half = dataclasses.replace(first, seconds=(2.0, 8.0), rounds=(*first.rounds, *second.rounds))
    assert harness.speed_ratio(half, second) == harness.Ratio(0.375, 0.375, 0.375, 1)
    counted = harness.Measurement((4.0,))
    assert harness.speed_ratio(first, counted) == harness.Ratio(2.0, None, None, 0)


def test_a_turn_of_several_calls_counts_once(clock: Clock) -> None:
    lines = {"A": clock.line(9, 9, 9, 1, 2, 60), "B": clock.line(9, 9, 9, 4, 4, 1)}
    outcomes = harness.interleave(lines, device=CPU, repeats=1, warmup=0, calls=3)
    a, b = outcomes["A"], outcomes["B"]
    assert isinstance(a, harness.Measurement) and isinstance(b, harness.Measurement)
    assert harness.speed_ratio(a, b) == harness.Ratio(2.0, 2.0, 2.0, 1)


def test_a_failing_line_leaves_the_others_alone() -> None:
    log: list[str] = []
    calls = iter(range(100))

    def unbuildable() -> Callable[[], object]:
        raise torch.OutOfMemoryError("no room\nat all")

    def breaks_later() -> Callable[[], object]:
        def run() -> None:
            if next(calls) == 3:
                raise RuntimeError("fourth call")

        return run

    seen: list[str] = []

    def on_line(name: str, outcome: harness.Outcome) -> None:
        seen.append(f"{name} failed" if isinstance(outcome, harness.Failure) else name)

    outcomes = harness.interleave(
        {"unbuildable": unbuildable, "A": _recorder(log, "A"), "breaks": breaks_later, "B": _recorder(log, "B")},
        device=CPU,
        repeats=3,
        warmup=1,
        on_line=on_line,
    )
    failure = outcomes["unbuildable"]
    assert isinstance(failure, harness.Failure)
    assert failure.reason == "OutOfMemoryError: no room"
    assert getattr(outcomes["breaks"], "reason", "") == "RuntimeError: fourth call"
    for name in "AB":
        outcome = outcomes[name]
        assert isinstance(outcome, harness.Measurement)
        assert len(outcome.seconds) == 3
    assert seen == ["unbuildable failed", "A", "breaks", "B", "breaks failed", "A", "B"]
    assert list(outcomes) == ["unbuildable", "A", "breaks", "B"]


def test_a_broken_device_ends_the_run_and_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every CUDA call raises, the ones that would measure the other lines too."""
    broken = []

    def clear_memory(device: torch.device) -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def astray() -> Callable[[], object]:
        broken.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(harness, "clear_memory", clear_memory)
    outcomes = harness.interleave(
        {"A": lambda: lambda: None, "astray": astray, "B": lambda: lambda: None}, device=CPU, repeats=3, release=True
    )
    assert {name: len(getattr(outcome, "seconds", ())) for name, outcome in outcomes.items()} == {
        "A": 1,
        "astray": 0,
        "B": 0,
    }
    assert getattr(outcomes["B"], "reason", "") == "not measured: astray left the device broken"


@pytest.mark.parametrize(("call", "left"), [(0, {"A": 1}), (1, {"A": 1, "B": 1}), (2, {"A": 2, "B": 1})])
def test_an_interrupt_reports_what_was_measured(call: int, left: dict[str, int]) -> None:
    """In B's first turn, in its first round and in its second: A and B are judged by what each has."""
    calls = iter(range(100))
    seen: dict[str, harness.Outcome] = {}

    def build() -> Callable[[], object]:
        def run() -> None:
            if next(calls) == call:
                raise KeyboardInterrupt

        return run

    with pytest.raises(KeyboardInterrupt):
        harness.interleave(
            {"A": lambda: lambda: None, "B": build}, device=CPU, repeats=9, warmup=0, on_line=seen.__setitem__
        )
    assert {name: len(getattr(outcome, "seconds", ())) for name, outcome in seen.items()} == left


def test_an_interrupt_while_a_later_line_is_built_keeps_the_earlier_ones() -> None:
    """A phase of ``gpu_check.sh`` that is cut off while the last line compiles."""
    seen: dict[str, harness.Outcome] = {}

    def endless() -> Callable[[], object]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.interleave(
            {"A": lambda: lambda: None, "B": endless}, device=CPU, repeats=5, calls=2, on_line=seen.__setitem__
        )
    assert {name: len(getattr(outcome, "seconds", ())) for name, outcome in seen.items()} == {"A": 2}


@pytest.mark.parametrize(("repeats", "calls"), [(0, 1), (1, 0)])
def test_no_repeats_is_an_error(repeats: int, calls: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        harness.interleave({}, device=CPU, repeats=repeats, calls=calls)


def test_record_has_the_fields_of_the_contract() -> None:
    assert [field.name for field in dataclasses.fields(harness.Record)] == CONTRACT


def test_records_are_on_disk_at_once(tmp_path, monkeypatch) -> None:
    env = harness.environment(CPU)
    results = harness.Results(tmp_path / "out", env)
    shape = {"batch": 4, "size": 32}
    good = harness.Measurement((0.5, 1.0, 2.0))
    results.add(
        results.record("step", "A", good, dtype="float32", shape=shape, unit="images/s", scale=lambda s: 4 / s, flops=7)
    )
    assert len(results.path.read_text().splitlines()) == 1
    results.add(results.record("step", "B", harness.Failure("why"), dtype="float32", shape=shape, unit="images/s"))
    results.sample("A", 0, [0.5, 1.0])
    first, second = (json.loads(line) for line in results.path.read_text().splitlines())
    assert list(first) == CONTRACT
    assert first["value"] == first["p50"] == 4.0
    assert first["p20"] < 4.0 < first["p80"]
    assert (first["repeats"], first["flops"], first["bytes"], first["shape"]) == (3, 7, None, shape)
    assert second["value"] is None and second["repeats"] == 0
    assert (first["rounds"], second["rounds"]) == (0, None)
    assert json.loads((tmp_path / "out" / "samples.jsonl").read_text())["seconds"] == [0.5, 1.0]
    saved = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert saved["versions"]["torch"] == torch.__version__
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "kept")
    assert results.keep() == harness.result_path(env)
    assert results.keep().read_text() == 2 * results.path.read_text()
    harness.Results(tmp_path / "out", env)
    assert results.path.read_text() == ""


def test_a_record_takes_the_place_of_an_earlier_one_of_the_same(tmp_path) -> None:
    results = harness.Results(tmp_path, harness.environment(CPU))
    small, large = {"batch": 4}, {"batch": 8}
    for name, seconds, shape in (("A", 9.0, small), ("B", 5.0, small), ("A", 7.0, large)):
        results.add(results.record("step", name, harness.Measurement((seconds,)), dtype="float32", shape=shape))
    final = harness.Measurement((1.0, 2.0, 6.0, 8.0), rounds=(3, 3, 4, 4))
    results.add(results.record("step", "A", final, dtype="float32", shape=small))
    rows = [json.loads(line) for line in results.path.read_text().splitlines()]
    found = [(row["variant"], row["value"], row["shape"], row["repeats"], row["rounds"]) for row in rows]
    assert found == [("A", 4.0, small, 4, 2), ("B", 5.0, small, 1, 0), ("A", 7.0, large, 1, 0)]
    assert rows == [dataclasses.asdict(record) for record in results.records]
    assert {path.name for path in tmp_path.iterdir()} == {"environment.json", "results.jsonl", "samples.jsonl"}


def test_the_record_of_a_ratio_says_how_many_rounds_it_is_of(tmp_path) -> None:
    results = harness.Results(tmp_path, harness.environment(CPU))
    record = results.ratio("A/B", harness.Ratio(2.0, 1.5, 2.5, 7), dtype="fp32", shape={"batch": 4})
    assert (record.name, record.variant, record.unit, record.value) == ("ratio", "A/B", "ratio", 2.0)
    assert (record.p20, record.p50, record.p80, record.repeats, record.rounds) == (1.5, 2.0, 2.5, 7, 7)


def test_a_busy_machine_is_named() -> None:
    env = harness.environment(CPU)
    assert isinstance(env.details["load_average"], float)
    env.details.update(load_average=1.9, cpus=8)
    assert harness.load_note(env) == []
    env.details.update(load_average=2.0)
    (note,) = harness.load_note(env)
    assert "load 2.0 on 8 cores" in note


def test_a_missing_device_or_folder_is_the_users_error(tmp_path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device: got cuda"):
            harness.choose_device("cuda")
    assert harness.choose_device("cpu") == CPU
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out"):
        harness.open_results(tmp_path / "file", harness.environment(CPU))


def test_environment_names_device_and_commit(monkeypatch) -> None:
    env = harness.environment(CPU)
    assert harness.cpu_name() in env.device
    assert env.versions["torch"] == torch.__version__
    assert "dali" in env.versions
    monkeypatch.setenv("CAST_FAST_COMMIT", "0123abc")
    env = harness.environment(CPU)
    assert env.commit == "0123abc"
    assert harness.result_path(env).parts[-2:] == ("cpu", f"{env.date[:10]}_0123abc.jsonl")


def test_environment_says_what_float32_means(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    env = harness.environment(CPU)
    assert env.details["cudnn_allow_tf32"] is env.details["cudnn_benchmark"] is True
    assert env.details["matmul_allow_tf32"] is False
    assert env.details["float32_matmul_precision"] == "highest"
    assert harness.float32_note(env) == (
        "float32: convolutions in TF32 where cuDNN chooses so, matrix products in full; cuDNN searches for algorithms"
    )
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert "convolutions in full" in harness.float32_note(harness.environment(CPU))


def test_tensor_bytes_counts_each_storage_once() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert harness.tensor_bytes(layer, [layer.weight, layer.weight.detach()[:2]]) == 128  # weight and gradient
    optimizer.zero_grad(set_to_none=True)
    assert harness.tensor_bytes(layer, layer.weight) == 64
    assert harness.tensor_bytes(layer, optimizer) == 128  # weight and momentum buffer


def test_table_and_chart(tmp_path, capsys) -> None:
    harness.print_table("Ladder", ["line", "images/s"], [["published", "1.00"], ["compiled", "[x]"]], ["a note [kept]"])
    text = capsys.readouterr().out
    assert "published" in text and "a note [kept]" in text
    path = tmp_path / "charts" / "ladder.png"
    bars = [harness.Bar("a", 2.0, 1.5, 2.5, "note"), harness.Bar("b", None, note="absent", group=1)]
    harness.bar_chart(path, bars, title="t", xlabel="x", subtitle="s", groups=("ours", "others"))
    assert path.read_bytes().startswith(b"\x89PNG")
    harness.bar_chart(path, [], title="empty", xlabel="x")


@pytest.mark.gpu
def test_cuda_lines_have_peak_memory(cuda) -> None:
    def build() -> Callable[[], object]:
        return lambda: torch.ones(1 << 20, device=cuda).sum()

    (outcome,) = harness.interleave({"A": build}, device=cuda, repeats=2, calls=2, release=True, settle=1).values()
    assert isinstance(outcome, harness.Measurement)
    assert len(outcome.seconds) == 4 and min(outcome.seconds) > 0
    assert outcome.peak_bytes is not None and outcome.peak_bytes >= 4 << 20
