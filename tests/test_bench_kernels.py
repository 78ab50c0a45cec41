"""benchmarks/kernels.py: its records on a CPU, and that a wrong kernel gets no time."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import harness
import pytest
import torch
from torch import Tensor

import kernels

CPU = torch.device("cpu")


def test_a_quick_run_leaves_its_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--device", "cpu", "--quick", "--repeats", "1", "--out", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {(record["name"], record["variant"]) for record in records} == {
        ("ceiling", "copy"),
        ("ceiling", "matmul"),
        *((name, line) for name in kernels.NAMES for line in ("eager", "operator")),
    }
    for record in records:
        assert record["value"] > 0
        if record["name"] != "ceiling":
            assert record["unit"] == "µs"
            assert record["fraction_of_bound"] > 0
            assert record["p20"] <= record["p50"] <= record["p80"]
    (found,) = (r for r in records if (r["name"], r["variant"]) == ("gradcam_cosine", "operator"))
    assert found["shape"] == {"N": 4, "C": 64, "H": 7, "W": 7}
    # A, alpha and its gradient, saliency, cam and slope, and the loss, in float32.
    assert found["bytes"] == 4 * (4 * 64 * 49 + 2 * 4 * 64 + 3 * 4 * 49 + 4)
    sizes = {r["name"]: r["bytes"] for r in records if r["variant"] == "operator" and r["shape"].get("form") != "pool"}
    full = 4 * 2 * 64 * 8 * 8
    assert sizes["batch_norm_apply"] == 3 * full
    assert sizes["batch_norm_apply_mask"] == 3 * full + full // 32
    # dy, its skip, x, the shortcut and a bit an element; g.
    assert sizes["batch_norm_add_reduce"] == 5 * full + full // 32
    # x, and a quarter of it four bytes and one wide.
    assert sizes["batch_norm_relu_pool"] == full + full // 4 + full // 16
    assert sizes["batch_norm_layers"] == 10 * full + full // 16
    assert (tmp_path / "kernels.png").stat().st_size > 0
    assert "of floor" in capsys.readouterr().out


def test_a_line_with_wrong_results_has_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work,) = (work for work in kernels.works(CPU, True) if work.name == "info_nce")

    def wrong(*arguments: Tensor) -> list[Tensor]:
        loss, gradient = work.lines["operator"](*arguments)
        return [loss, gradient * 1.1]

    work.lines["operator"] = work.lines["eager"]
    work.lines["wrong"] = wrong
    results = harness.Results(tmp_path, harness.environment(CPU))
    records = kernels.measure(work, CPU, {"copy": 1e9, "matmul": 1e9}, 1, True, results)
    by_line = {record.variant: record for record in records}
    assert by_line["wrong"].value is None
    assert by_line["eager"].value is not None
    assert "gradient differs from the reference" in capsys.readouterr().err


def test_nothing_is_started_after_the_deadline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--quick", "--repeats", "1", "--max-seconds", "-1", "--out", str(tmp_path)]
    assert kernels.main(flags) == 0
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {record["name"] for record in records} == {"ceiling"}
    assert capsys.readouterr().err.count("not measured, out of time") == len(kernels.works(CPU, True))


def test_a_gpu_measures_what_a_step_runs_first() -> None:
    works = [(work.name, work.shape, work.dtype) for work in kernels.works(torch.device("cuda"), False)]
    assert {name for name, _, _ in works} == set(kernels.NAMES)
    assert len({str(work) for work in works}) == len(works)
    first = [name for name, shape, _ in works if shape["N"] == 256][: 2 + len(kernels.BATCH_NORM)]
    assert first == ["gradcam_cosine", "info_nce", *kernels.BATCH_NORM]
    assert [shape["N"] for _, shape, _ in works[: len(first)]] == [256] * len(first)


class ChannelsInnermost(torch.nn.BatchNorm2d):
    """What apex's module computes, by torch."""

    def __init__(self, channels: int, fuse_relu: bool) -> None:
        super().__init__(channels)
        assert fuse_relu

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = super().forward(x.permute(0, 3, 1, 2).float())
        y = y if z is None else y + z.permute(0, 3, 1, 2)
        return y.relu().permute(0, 2, 3, 1).to(x.dtype)


def test_apex_is_a_line_where_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex.contrib.groupbn", None)
    assert kernels.groupbn() is None
    fake = types.SimpleNamespace(BatchNorm2d_NHWC=ChannelsInnermost)
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.contrib", types.ModuleType("apex.contrib"))
    monkeypatch.setitem(sys.modules, "apex.contrib.groupbn", fake)
    results = harness.Results(tmp_path, harness.environment(CPU))
    for work in kernels.groupbn_works(kernels.groupbn(), 2, [(16, 6)], CPU):
        records = kernels.measure(work, CPU, {"copy": 1e9, "matmul": 1e9}, 1, True, results)
        by_line = {record.variant: record for record in records}
        assert by_line["groupbn"].value is not None and by_line["groupbn"].dtype == "float16"
    names = [(work.name, work.dtype) for work in kernels.works(torch.device("cuda"), True)]
    assert ("batch_norm_layers", torch.float16) in names


def test_inputs_rotate_through_more_than_the_cache() -> None:
    for work in kernels.works(CPU, True):
        sets = kernels.rotation(work, CPU)
        assert len(sets) >= 2
        assert not torch.equal(sets[0][0], sets[1][0])  # pyright: ignore[reportArgumentType]


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--repeats", "0", "--out", str(tmp_path)]
    assert kernels.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--repeats: got 0" in error
