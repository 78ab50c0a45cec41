"""Every way to compile the step computes the step; what differs is refused a time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import compile_choices
import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from test_step import LR, batch_of, snapshot, tiny_step

TINY = ["--device", "cpu", "--arch", "resnet18", "--size", "32", "--batch", "2", "--repeats", "1"]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def test_three_regions_are_the_step() -> None:
    steps = [tiny_step(dtype=torch.float64) for _ in range(2)]
    steps[1]._losses = compile_choices.three_regions(lambda function: function)
    for seed in range(2):
        results = [step(batch_of(seed), LR) for step in steps]
        assert all(torch.equal(*pair) for pair in zip(*results))
    first, second = (snapshot(step) for step in steps)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_padded_stem_is_the_stem() -> None:
    plain, padded = (tiny_step(dtype=torch.float64) for _ in range(2))
    for encoder in (padded.model.query, padded.model.key):
        compile_choices.pad_stem(encoder, 4)
    results = [step(batch_of(0), LR) for step in (plain, padded)]
    torch.testing.assert_close(torch.stack(results[1][:3]), torch.stack(results[0][:3]), rtol=1e-12, atol=1e-12)
    wanted = plain.model.query.trunk.get_parameter("0.weight")
    torch.testing.assert_close(padded.model.query.trunk.get_parameter("0.conv.weight"), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("choice", compile_choices.CHOICES.values(), ids=lambda choice: choice.name)
def test_settings_are_known_to_torch_and_taken_back(choice: compile_choices.Choice) -> None:
    modules: list[tuple[Any, dict[str, Any]]] = [
        (torch._inductor.config, choice.inductor),
        (torch._functorch.config, choice.functorch),
    ]
    # torch 2.11 does not know how many kernels may share a launch.
    missing = {"combo_kernel_max_num_nodes"} - set(dir(torch._inductor.config))
    names = [(module, name) for module, settings in modules for name in settings if name not in missing]
    before = [getattr(module, name) for module, name in names]
    with compile_choices.patched(choice):
        inside = [getattr(module, name) for module, name in names]
        assert inside == [value for _, settings in modules for name, value in settings.items() if name not in missing]
        assert all(now != then for now, then in zip(inside, before)), "a choice that is the default"
    assert [getattr(module, name) for module, name in names] == before
    assert choice.expected


@pytest.mark.usefixtures("uncompiled")
def test_times_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--out", str(tmp_path), "--only", "default", "--only", "join-keys", "--only", "stem-4"]
    assert compile_choices.main([*TINY, *flags]) == 0
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {record["variant"] for record in records} == {"default", "join-keys", "stem-4"}
    assert all(record["value"] > 0 and record["unit"] == "ms" for record in records)
    assert "fewer launches" in capsys.readouterr().out


@pytest.mark.usefixtures("uncompiled")
def test_a_choice_that_computes_something_else_gets_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = compile_choices.build_step

    def wrong(choice: compile_choices.Choice, settings: Any) -> Any:
        step = build(choice, settings)
        if choice.name == "join-keys":
            step.objective = dataclasses.replace(step.objective, temperature=0.2)
        return step

    monkeypatch.setattr(compile_choices, "build_step", wrong)
    assert compile_choices.main([*TINY, "--out", str(tmp_path), "--only", "join-keys"]) == 1
    assert "its first loss is" in capsys.readouterr().err


def test_nothing_is_started_after_the_deadline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_choices.main([*TINY, "--out", str(tmp_path), "--max-seconds", "-1", "--only", "default"]) == 0
    assert "not measured, out of time" in capsys.readouterr().out


def test_unknown_choice_is_refused() -> None:
    with pytest.raises(SystemExit):
        compile_choices.main(["--only", "faster"])
