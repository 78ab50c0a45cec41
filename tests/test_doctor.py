"""The doctor: names every part, says why, and fails where pretraining would."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from cast_fast import cli, doctor


def by_name(**options) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine(compile=False, **options)}


def test_every_part_is_named_with_what_was_found() -> None:
    found = by_name(device="cpu")
    names = {"platform", "torch", "Triton", "DALI", "native crops", "apex", "compile cache", "open files", "a run here"}
    assert names <= set(found)
    assert "trains on cpu in" in found["a run here"].text
    assert found["torch"].state == doctor.OK


def test_the_choice_of_batch_norm_is_told_with_its_reason() -> None:
    here = by_name(device="cpu")["BatchNorm"]
    assert here.state == doctor.OK
    assert "--batch-norm torch, the default" in here.text and "without gain" in here.text
    assert "--batch-norm-groups" in here.text
    there = doctor._batch_norm(torch.device("cuda"))
    assert "--batch-norm torch, the default" in there.text and "no GPU has timed it" in there.text


def test_json_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    expected = 1 if doctor.dali_fault() else 0
    assert cli.main(["doctor", "--device", "cpu", "--no-compile", "--json"]) == expected
    findings = json.loads(capsys.readouterr().out)
    assert all(set(finding) == {"name", "state", "text"} for finding in findings)


def test_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor", "--device", "cpu", "--no-compile"])
    text = capsys.readouterr().out
    assert "a run here" in text and "torch" in text


def hide_dali(monkeypatch: pytest.MonkeyPatch, *installed: str) -> None:
    """Makes DALI unimportable; ``installed`` are the packages that metadata still shows."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr(
        doctor, "_version", lambda *names: next((f"{name} 1.0" for name in names if name in installed), None)
    )


def test_without_dali_pretraining_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_dali(monkeypatch)
    finding = by_name(device="cpu")["DALI"]
    assert finding.state == doctor.FAULT and "pip install 'cast_fast[cuda13]'" in finding.text
    assert cli.main(["doctor", "--device", "cpu", "--no-compile"]) == 1


def test_the_signpost_package_is_told_from_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_dali(monkeypatch, "nvidia-dali")
    assert "signpost" in by_name(device="cpu")["DALI"].text


def test_pretraining_without_dali_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    hide_dali(monkeypatch)
    run = tmp_path / "run"
    assert cli.main(["pretrain", "--images", "a", "--saliency", "b", "--out", str(run), "--arch", "resnet18"]) == 2
    error = capsys.readouterr().err
    assert "DALI is not installed" in error.splitlines()[-1] and not run.exists()


def test_a_missing_gpu_is_a_fault_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_driver", lambda: None)
    assert by_name(device="auto")["GPU"].state == doctor.NOTE
    assert by_name(device="cuda")["GPU"].state == doctor.FAULT


def test_a_missing_operator_is_a_note_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from cast_kernels import dali_plugin

    monkeypatch.setattr(dali_plugin, "unavailable_reason", lambda: "it was never built; build it with: make")
    finding = by_name(device="cpu")["native crops"]
    assert finding.state == doctor.NOTE and "never built" in finding.text and "NumPy" in finding.text


def test_an_unwritable_compile_cache_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    finding = by_name(device="cpu")["compile cache"]
    assert finding.state == doctor.FAULT and "TORCHINDUCTOR_CACHE_DIR" in finding.text


def test_compile_is_tried(device) -> None:
    assert doctor._compile(device).state == doctor.OK


def test_few_open_files_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (256, 4096))
    assert by_name(device="cpu")["open files"].state == doctor.NOTE
