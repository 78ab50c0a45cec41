"""The loader's benchmark: its records, and that the peers do the product's work."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import loader
import numpy as np
import pytest
import torch

from cast_fast.data import layout, sampling
from cast_fast.data.shards import scan_shards
from cast_fast.data.synthetic import write_dataset

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
from cast_fast.data.dali_loader import Augmentation


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("scenes"), 8, 0, size=(160, 120), workers=1)


@pytest.fixture(scope="module")
def plan(scenes: Path) -> loader.Plan:
    dataset = layout.scan(scenes / "images", scenes / "saliency", workers=1, manifest=scenes / "manifest.json")
    augmentation = Augmentation(blur_p=0.5, hue=0, contrast=0)
    return loader.Plan(torch.device("cpu"), dataset, 8, 64, (2, 2), 1, 1, loader.PRODUCT, augmentation, scenes)


def test_a_run_leaves_its_records(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--images", scenes / "images", "--saliency", scenes / "saliency", "--out", tmp_path, "--device", "cpu"]
    flags += ["--lines", "numpy", "--batch", 4, "--size", 64, "--threads", 1, "--repeats", 2]
    assert loader.main([str(flag) for flag in flags]) == 0
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    by_name = {(record["name"], record["variant"]): record for record in records}
    assert by_name["loader", "numpy"]["unit"] == "images/s"
    assert by_name["loader", "numpy"]["value"] > 0
    assert by_name["loader_cpu", "numpy"]["value"] > 0
    assert by_name["loader_windows", "numpy"]["value"] > 0
    assert [variant for name, variant in by_name if name == "loader_stage"] == list(loader.STAGES)
    for record in records:
        assert record["shape"] == {"batch": 4, "size": 64, "threads": 1}
        assert record["repeats"] == 2
    assert (tmp_path / "loader.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "CPU time by stage" in printed
    assert "hand-over" in printed


def test_an_interrupted_run_keeps_what_it_measured(
    plan: loader.Plan, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = loader.rate_lines

    def cut_off(plan: loader.Plan) -> dict[str, harness.Line]:
        def endless() -> Any:
            os.kill(os.getpid(), signal.SIGTERM)

        return {**lines(plan), "torchvision": endless}

    monkeypatch.setattr(loader, "rate_lines", cut_off)
    flags = ["--images", scenes / "images", "--saliency", scenes / "saliency", "--out", tmp_path, "--device", "cpu"]
    flags += ["--lines", "numpy,torchvision", "--batch", 4, "--size", 64, "--threads", 1, "--repeats", 3]
    before = signal.getsignal(signal.SIGTERM)
    assert loader.main([str(flag) for flag in flags]) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["name"], row["variant"], row["repeats"]) for row in records] == [
        ("loader", "numpy", 1),
        ("loader_cpu", "numpy", 1),
    ]


def test_no_round_starts_after_the_deadline(scenes: Path, tmp_path: Path) -> None:
    flags = ["--images", scenes / "images", "--saliency", scenes / "saliency", "--out", tmp_path, "--device", "cpu"]
    flags += ["--lines", "numpy", "--batch", 4, "--size", 64, "--threads", 1, "--repeats", 9, "--max-seconds", "0.001"]
    assert loader.main([str(flag) for flag in flags]) == 0
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert records and {row["repeats"] for row in records} == {1}


def test_stages_are_told_for_both_layouts(
    plan: loader.Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not loader.has_native():
        pytest.skip("the native operators are not built")
    results = harness.open_results(tmp_path, harness.environment(plan.device))
    plan = dataclasses.replace(plan, lines=("native", "packed"))
    outcomes = loader.measure(plan, results)
    loader.show(plan, results, outcomes)
    assert not [name for name, outcome in outcomes.items() if isinstance(outcome, harness.Failure)]
    stages = [record.variant for record in results.records if record.name == "loader_stage"]
    assert stages == [*loader.STAGES, *(f"packed-{name}" for name in loader.STAGES)]
    windows = {(record.name, record.variant): record.value for record in results.records if "windows" in record.name}
    assert set(windows) == {
        (name, variant) for name in ("loader_windows", "loader_windows_time") for variant in ("numpy", "native")
    }
    assert min(value or 0 for value in windows.values()) > 0
    printed = capsys.readouterr().out
    assert "CPU time by stage, of shards" in printed


@pytest.mark.gpu
def test_windows_by_cuda_are_measured(plan: loader.Plan, cuda: torch.device) -> None:
    if not loader.has_cuda_windows():
        pytest.skip("built without the CUDA backend")
    plan = dataclasses.replace(plan, device=cuda)
    on_cuda, on_cpu = loader._windows(plan, True, cuda=True).run(), loader._windows(plan, True).run()
    for first, second in zip(on_cuda, on_cpu, strict=True):
        assert all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(first, second, strict=True))
    assert "windows cuda" in loader.stage_lines(plan)


def test_packed_lines_show_the_same_pictures(plan: loader.Plan) -> None:
    product = next(loader.product_loader(plan, native=False))
    for short_side in (0, 64):
        dataset = loader.packed_dataset(plan, short_side)
        packed = next(loader.product_loader(dataclasses.replace(plan, dataset=dataset), native=False))
        assert torch.equal(packed.index, product.index)
        assert min(dataset.samples[0].width, dataset.samples[0].height) == (short_side or 120)


def test_what_packing_saves_is_told_against_folders() -> None:
    outcomes: dict[str, harness.Outcome] = {
        name: harness.Measurement((seconds,)) for name, seconds in (("cpu native", 3.0), ("cpu packed-256", 1.5))
    }
    assert loader.packed_notes(outcomes) == ["packed-256: 2.00× the folder's CPU rate (goal: 1.5×)"]
    rounds = (4, 5, 6)
    outcomes["cpu native"] = harness.Measurement((4.0, 2.0, 2.0), rounds=rounds)
    outcomes["cpu packed-256"] = harness.Measurement((2.0, 1.25, 0.5), rounds=rounds)
    (note,) = loader.packed_notes(outcomes)  # of 2, 1.6 and 4
    assert note == "packed-256: 2.00× the folder's CPU rate (1.76–3.20) (goal: 1.5×)"
    del outcomes["cpu native"]
    assert loader.packed_notes(outcomes) == []


def test_a_line_is_kept_without_its_first_turn() -> None:
    assert loader.of_rounds({0: 9.0}) == {0: 9.0}
    assert loader.of_rounds({0: 9.0, 1: 2.0, 2: 1.0}) == {1: 2.0, 2: 1.0}


def test_a_failed_stage_leaves_the_other_lines(
    plan: loader.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = loader.stage_lines

    def failing(plan: loader.Plan, prefix: str = "") -> dict[str, harness.Line]:
        def build() -> Any:
            calls = iter(range(100))

            def run() -> float:
                if next(calls) == 5:  # in its second round; a warm-up, then two calls a turn
                    raise RuntimeError("no pictures")
                return 0.0

            return run

        return {**lines(plan, prefix), "to resize": build}

    monkeypatch.setattr(loader, "stage_lines", failing)
    results = harness.open_results(tmp_path, harness.environment(plan.device))
    plan = dataclasses.replace(plan, lines=("numpy",), repeats=2)
    outcomes = loader.measure(plan, results)
    loader.show(plan, results, outcomes)
    kinds = {record.name: record.rounds for record in results.records}
    assert kinds.keys() == {"loader", "loader_cpu", "loader_windows", "loader_windows_time"}
    assert set(kinds.values()) == {2}
    assert "to resize: failed, so that stages are missing: RuntimeError: no pictures" in capsys.readouterr().err


def test_loaders_alone_are_compared_by_rounds(
    plan: loader.Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sample a process; a failing line ends alone."""
    spent = {"native": [4e-3, 2e-3, 3e-3], "packed": [2e-3, 1.25e-3, 1e-3], "packed-256": [1e-3]}
    asked: list[str] = []

    def one(name: str) -> dict[str, float]:
        asked.append(name)
        if not spent[name]:
            raise RuntimeError("its process ended with 1: no room")
        cpu = spent[name].pop(0)
        return {"elapsed": cpu / 2, "cpu": cpu}

    results = harness.open_results(tmp_path, harness.environment(plan.device))
    plan = dataclasses.replace(plan, lines=("native", "packed"), repeats=3)
    outcomes = loader.measure_alone(plan, results, one)
    assert asked == [*loader.ALONE, *loader.ALONE, "native", "packed"]
    rows = {(row["name"], row["variant"]): row for row in map(json.loads, results.path.read_text().splitlines())}
    assert rows["loader_alone_cpu", "native"]["value"] == 3e-3
    assert rows["loader_alone", "native"]["value"] == pytest.approx(2 / 3e-3)
    assert rows["loader_alone", "native"]["rounds"] == rows["loader_alone_cpu", "packed"]["rounds"] == 3
    gain = rows["loader_alone_gain", "packed"]  # of 2, 1.6 and 3
    assert (gain["value"], gain["p20"], gain["rounds"]) == (2.0, pytest.approx(1.76), 3)
    assert rows["loader_alone", "packed-256"]["value"] is None
    loader.show_alone(plan, results, outcomes)
    printed = capsys.readouterr()
    assert "no room" in printed.out and "no room" in printed.err
    assert "2.00 (1.76–2.60)" in printed.out


def test_no_process_is_started_after_the_deadline(plan: loader.Plan, tmp_path: Path) -> None:
    results = harness.open_results(tmp_path, harness.environment(plan.device))
    plan = dataclasses.replace(plan, lines=("native",), repeats=9, deadline=0.0)
    asked: list[str] = []
    loader.measure_alone(plan, results, lambda name: asked.append(name) or {"elapsed": 1.0, "cpu": 1.0})
    assert asked == ["native"]


def test_a_process_of_its_own_measures_a_line(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--images", scenes / "images", "--saliency", scenes / "saliency", "--out", tmp_path, "--device", "cpu"]
    flags += ["--lines", "numpy", "--batch", 4, "--size", 64, "--threads", 1, "--repeats", 1, "--alone"]
    assert loader.main([str(flag) for flag in flags]) == 0
    rows = {row["name"]: row for row in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert rows.keys() == {"loader_alone", "loader_alone_cpu"}
    assert all(row["value"] > 0 and row["rounds"] == 1 for row in rows.values())
    assert "processes" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"its process ended with 2: loader\.py: error: --batch: got 0"):
        loader.one_process([*(str(flag) for flag in flags), "--batch", "0"], "numpy")


def test_the_share_of_each_kind_of_thread(
    plan: loader.Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = harness.open_results(tmp_path, harness.environment(plan.device))
    plan = dataclasses.replace(plan, repeats=3, shards=tmp_path)
    packed = loader.packed_dataset(plan, 0)
    outcomes = loader.measure_host(plan, results)
    assert scan_shards(tmp_path / "packed-0").fingerprint() == packed.fingerprint()
    kept = {(record.name, record.variant): record.value or 0 for record in results.records}
    for layout_name in ("folder", "packed"):
        spent = [kept["loader_host", f"{layout_name}-{kind}"] for kind in loader.THREADS]
        assert min(spent[:3]) > 0
        # Rounds differ in which kind is busier, so the bound is no exact function of the medians.
        assert 0 < kept["loader_host_bound", layout_name] * max(spent[:2]) <= 1
    loader.show_host(outcomes)
    printed = capsys.readouterr().out
    assert "images/s if the pool were free" in " ".join(printed.split())
    bound = outcomes["host packed bound"]
    assert isinstance(bound, harness.Measurement)
    assert f"{1 / bound.median:,.0f}" in printed


def test_a_system_that_does_not_tell_of_threads(
    plan: loader.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "thread_cpu", lambda: dict.fromkeys(loader.THREADS, 0.0))
    results = harness.open_results(tmp_path, harness.environment(plan.device))
    assert loader.measure_host(plan, results) == {}
    assert not results.records
    assert "not measured, as this system" in capsys.readouterr().err
    loader.show_host({})
    assert capsys.readouterr().out == ""


def test_threads_are_told_apart() -> None:
    begin = loader.thread_cpu()
    sum(range(2_000_000))
    spent = {kind: seconds - begin[kind] for kind, seconds in loader.thread_cpu().items()}
    assert set(spent) == set(loader.THREADS)
    assert spent["python"] > 0


def test_stages_add_up() -> None:
    lines = {"draws": 1, "read": 3, "decode": 8, "map": 12, "resize": 30, "targets": 41, "colour": 50}
    cpu = {f"to {name}": [float(value), 2.0 * value] for name, value in lines.items()}
    cpu |= {"windows numpy": [9.0, 9.0], "windows native": [2.0, 4.0], "hand-over": [0.5, 1.0]}
    found = loader.stages(cpu)
    assert list(found) == list(loader.STAGES)
    assert found["decode"] == [5.0, 10.0]
    assert found["windows"] == [2.0, 4.0]
    own = {f"packed-{name}": [value / 2 for value in values] for name, values in cpu.items() if name != "to draws"}
    packed = loader.stages(cpu | own, "packed-")
    assert packed["decode"] == [2.5, 5.0]
    assert packed["read"] == [0.5, 1.0]  # less the draws of all lines
    assert np.allclose(np.sum(list(found.values()), axis=0), cpu["to colour"])
    del cpu["windows native"]
    assert loader.stages(cpu)["windows"] == [9.0, 9.0]


def test_a_step_is_timed_alone_and_beside_the_loader(plan: loader.Plan, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan, repeats=2)
    results = harness.open_results(tmp_path, harness.environment(plan.device))
    events: list[str] = []

    def batches() -> Iterator[None]:
        while True:
            events.append("take")
            yield

    outcomes = loader.measure_training(plan, results, lambda: events.append("step"), batches())
    alone = ["step"] * (loader.TURN + 2 * loader.TURN)
    beside = [*["step"] * loader.TURN, *["take", "step"] * (2 * loader.TURN)]
    assert events == [*["step"] * 6, *(alone + beside) * 3]  # a first turn and two rounds
    for name in ("alone", "beside-loader"):
        outcome = outcomes[f"training {name}"]
        assert isinstance(outcome, harness.Measurement) and len(outcome.seconds) == 4 * loader.TURN
    share = loader.gpu_share(outcomes)
    assert share is not None
    kept = {(record.name, record.variant): record for record in results.records}
    assert kept["loader_gpu_share", "product"].value == share
    assert {("training_step", "alone"), ("training_step", "beside-loader")} < set(kept)


def test_the_step_beside_the_loader_is_what_pretrain_runs(
    plan: loader.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def build(name: str, settings: Any) -> Any:
        built.append(name)
        raise RuntimeError("enough")

    monkeypatch.setattr(loader.ladder, "build", build)
    results = harness.open_results(tmp_path, harness.environment(plan.device))
    plan = dataclasses.replace(plan, step=loader.step_settings(torch.device("cpu"), 64, 64, quick=True))
    outcomes = loader.training(plan, results)
    assert built == ["groups"]
    assert {getattr(outcome, "reason", "") for outcome in outcomes.values()} == {"RuntimeError: enough"}


def test_what_the_loader_takes_from_the_gpu_is_told(plan: loader.Plan) -> None:
    outcomes: dict[str, harness.Outcome] = {
        "training alone": harness.Measurement((0.09,)),
        "training beside-loader": harness.Measurement((0.1,)),
        "native": harness.Measurement((0.18,)),
    }
    assert loader.gpu_share(outcomes) == pytest.approx(0.1)
    plan = dataclasses.replace(plan, lines=(loader.TRAINING,))
    assert loader.training_notes(plan, {}) == ["GPU time taken from training: not measured, it needs a CUDA device"]
    step = loader.step_settings(torch.device("cpu"), 8, 64, quick=True)
    plan = dataclasses.replace(plan, step=step)
    assert loader.training_notes(plan, outcomes) == [
        "GPU time taken from training: 10.0% (step of resnet18, alone 90.0 ms)",
        "native: 2.00× the images that the step alone takes (goal: 1.2×)",
    ]
    outcomes["training beside-loader"] = harness.Failure("OutOfMemoryError: no memory")
    assert loader.gpu_share(outcomes) is None
    assert loader.training_notes(plan, outcomes) == [
        "GPU time taken from training: failed: OutOfMemoryError: no memory"
    ]


def test_on_a_cpu_the_share_of_the_gpu_is_absent(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--images", scenes / "images", "--saliency", scenes / "saliency", "--out", tmp_path, "--device", "cpu"]
    assert loader.main([str(flag) for flag in [*flags, "--lines", "training", "--batch", 4]]) == 0
    assert "taken from training: not measured" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "results.jsonl").read_text() == ""


@pytest.mark.gpu
def test_share_of_the_gpu(scenes: Path, tmp_path: Path, cuda: torch.device) -> None:
    del cuda
    flags = ["--images", scenes / "images", "--saliency", scenes / "saliency", "--out", tmp_path, "--device", "cuda"]
    flags += ["--lines", "training", "--batch", 4, "--size", 64, "--repeats", 1, "--quick"]
    assert loader.main([str(flag) for flag in flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    values = {(row["name"], row["variant"]): row["value"] for row in rows}
    alone, beside = values["training_step", "alone"], values["training_step", "beside-loader"]
    assert values["loader_gpu_share", "product"] == pytest.approx(1 - alone / beside)


def test_torchvision_does_the_same_work(plan: loader.Plan) -> None:
    """With brightness, saturation, grey, flips and blur alike; contrast and hue differ by definition and are off."""
    product = next(loader.product_loader(plan, native=False))
    pairs = loader.TorchvisionPairs(plan)
    items = next(loader._items(plan))
    assert [index for index, _ in items] == product.index.tolist()
    query, key, saliency, mask = (torch.stack(column) for column in zip(*(pairs[item] for item in items)))
    for got, want in ((query, product.query), (key, product.key)):
        # The decoders differ by a few levels at sharp edges of JPEGs, the resizes at the windows' borders.
        assert (got.float() - want.float()).abs().mean() < 2
    assert (saliency - product.query_saliency).abs().max() < 0.03
    assert (mask != product.key_mask).float().mean() < 0.01


def test_albumentations_does_the_same_kind_of_work(plan: loader.Plan) -> None:
    pytest.importorskip("albumentations")
    pairs = loader.AlbumentationsPairs(plan)
    query, key, saliency, mask = pairs.pair(plan.dataset.samples[0], sampling.draw(0, np.array([0])))
    assert query.shape == key.shape == (3, 64, 64)
    assert query.dtype == key.dtype == mask.dtype == torch.uint8
    assert saliency.shape == (2, 2)
    assert mask.shape == (64, 64)
    assert 0 < mask.float().mean() < 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lines", "natiev"], "--lines: got 'natiev'"),
        (["--batch", "0"], "--batch: got 0"),
        (["--alone", "--lines", "numpy,training"], "--lines: got training with --alone"),
        (["--blur", "2"], "--blur: got 2"),
        (["--images", "somewhere"], "--images and --saliency"),
        (["--images", "/nowhere", "--saliency", "/nowhere"], "/nowhere"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loader.main([*flags, "--device", "cpu", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "results.jsonl").exists()
