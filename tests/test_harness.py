"""The benchmark harness: percentiles, the order of repeats, records that survive, table and chart."""

import dataclasses
import json
import time
from collections.abc import Callable

import harness
import numpy as np
import pytest
import torch

from cast_fast.errors import UserError

CPU = torch.device("cpu")
CONTRACT = ["name", "variant", "device", "dtype", "shape", "value", "unit", "p20", "p50", "p80", "repeats"]
CONTRACT += ["bytes", "flops", "fraction_of_bound", "versions", "commit", "date"]


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
    outcomes = harness.interleave(lines, device=CPU, repeats=3, warmup=1, calls=2, settle=1)
    first = [entry for name in "ABC" for entry in (f"build {name}", *[name] * 4)]
    turn = ["A"] * 3 + ["B"] * 3 + ["C"] * 3
    assert log == first + turn * 2
    for outcome in outcomes.values():
        assert isinstance(outcome, harness.Measurement)
        assert len(outcome.seconds) == 6  # the settling calls are not among them
        assert outcome.peak_bytes is None


def test_only_the_call_is_timed() -> None:
    lines = {"quick": lambda: lambda: None}
    slow = {"quick": lambda: time.sleep(0.05)}
    (outcome,) = harness.interleave(lines, device=CPU, repeats=3, warmup=0, prepare=slow).values()
    assert isinstance(outcome, harness.Measurement)
    assert outcome.median < 0.05


def test_a_failing_line_leaves_the_others_alone() -> None:
    log: list[str] = []
    calls = iter(range(100))

    def unbuildable() -> Callable[[], object]:
        raise torch.OutOfMemoryError("no room\nat all")

    def breaks_later() -> Callable[[], object]:
        def run() -> None:
            if next(calls) == 2:
                raise RuntimeError("third call")

        return run

    seen: list[str] = []
    outcomes = harness.interleave(
        {"unbuildable": unbuildable, "A": _recorder(log, "A"), "breaks": breaks_later, "B": _recorder(log, "B")},
        device=CPU,
        repeats=3,
        warmup=1,
        on_line=lambda name, outcome: seen.append(name),
    )
    failure = outcomes["unbuildable"]
    assert isinstance(failure, harness.Failure)
    assert failure.reason == "OutOfMemoryError: no room"
    assert getattr(outcomes["breaks"], "reason", "") == "RuntimeError: third call"
    for name in "AB":
        outcome = outcomes[name]
        assert isinstance(outcome, harness.Measurement)
        assert len(outcome.seconds) == 3
    assert seen == ["unbuildable", "breaks", "A", "B"]
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


def test_an_interrupt_reports_what_was_measured() -> None:
    calls = iter(range(100))
    seen: dict[str, harness.Outcome] = {}

    def build() -> Callable[[], object]:
        def run() -> None:
            if next(calls) == 2:
                raise KeyboardInterrupt

        return run

    with pytest.raises(KeyboardInterrupt):
        harness.interleave(
            {"A": lambda: lambda: None, "B": build}, device=CPU, repeats=9, warmup=0, on_line=seen.__setitem__
        )
    assert {name: len(getattr(outcome, "seconds", ())) for name, outcome in seen.items()} == {"A": 3, "B": 2}


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


def test_a_past_deadline_still_makes_one_round() -> None:
    lines = {"A": lambda: lambda: None}
    (outcome,) = harness.interleave(lines, device=CPU, repeats=5, warmup=0, deadline=time.monotonic() - 1).values()
    assert isinstance(outcome, harness.Measurement)
    assert len(outcome.seconds) == 1


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
    assert json.loads((tmp_path / "out" / "samples.jsonl").read_text())["seconds"] == [0.5, 1.0]
    saved = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert saved["versions"]["torch"] == torch.__version__
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "kept")
    assert results.keep() == harness.result_path(env)
    assert results.keep().read_text() == 2 * results.path.read_text()
    harness.Results(tmp_path / "out", env, append=True)
    assert len(results.path.read_text().splitlines()) == 2
    harness.Results(tmp_path / "out", env)
    assert results.path.read_text() == ""


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
