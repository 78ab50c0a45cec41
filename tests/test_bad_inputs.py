"""Every mistake of a user: one line on stderr that names the cause, exit code 2, nothing lost, nothing half made."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from full_disk import full_disk
from PIL import Image
from test_checkpoint import flip, mounted
from test_train import PLAIN, cache, command_line, python, scenes, settings, undisturbed

from cast_fast import checkpoint, cli
from cast_fast.config import add_config_arguments, config_from_args

# Fixtures of test_train, used by name.
__all__ = ["cache", "scenes", "undisturbed"]


@pytest.fixture
def data(scenes: Path, tmp_path: Path) -> Iterator[Path]:
    """A dataset to be damaged."""
    folder = tmp_path / "data"
    shutil.copytree(scenes, folder)
    yield folder
    shutil.rmtree(tmp_path, ignore_errors=True)


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, but for the lock."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def refused(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Runs the command line, which must refuse in one line; returns the line."""
    capfd.readouterr()
    try:
        code = cli.main(arguments)
    except SystemExit as error:  # argparse's own refusals
        code = error.code
    output = capfd.readouterr()
    assert code == 2, output.err
    assert output.out == ""
    lines = [line for line in output.err.splitlines() if line.startswith("cast-fast")]
    assert len(lines) == 1 and "error: " in lines[0], output.err
    assert "Traceback" not in output.err
    return lines[0]


def text_named_jpg(data: Path) -> str:
    (data / "images" / "scene_000003.jpg").write_text("this is no picture")
    return "scene_000003.jpg"


def truncated_jpeg(data: Path) -> str:
    path = data / "images" / "scene_000004.jpg"
    path.write_bytes(path.read_bytes()[:-500])
    return "scene_000004.jpg"


def map_of_another_size(data: Path) -> str:
    Image.new("L", (50, 90), 255).save(data / "saliency" / "scene_000005.png")
    return r"scene_000005\.png.*50x90"


def missing_map(data: Path) -> str:
    (data / "saliency" / "scene_000006.png").unlink()
    return r"scene_000006\.jpg.*no saliency map"


def empty_map(data: Path) -> str:
    path = data / "saliency" / "scene_000007.png"
    with Image.open(path) as image:
        size = image.size
    Image.new("L", size, 0).save(path)
    return "scene_000007.*--on-empty-saliency"


@pytest.mark.parametrize("damage", [text_named_jpg, truncated_jpeg, map_of_another_size, missing_map, empty_map])
def test_faulty_files(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[Path], str]
) -> None:
    expected = damage(data)
    before = contents(data)
    line = refused(capfd, command_line(settings(data, tmp_path / "run")))
    assert re.search(expected, line), line
    assert not (tmp_path / "run").exists()
    assert contents(data) == before


def test_faulty_files_are_skipped_on_request(data: Path, tmp_path: Path) -> None:
    """What was left out is written down, and the run is the one of the intact files."""
    run = tmp_path / "run"
    text_named_jpg(data)
    map_of_another_size(data)
    empty_map(data)
    config = settings(data, run, skip_invalid=True, on_empty_saliency="skip", steps=1)
    assert cli.main(command_line(config)) == 0
    skipped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert {Path(fault["path"]).name for fault in skipped} == {
        "scene_000003.jpg", "scene_000005.png", "scene_000007.png"
    }  # fmt: skip
    assert all(fault["kind"] and fault["message"] for fault in skipped)


def empty_folder(data: Path) -> dict[str, Any]:
    shutil.rmtree(data / "images")
    (data / "images").mkdir()
    return {}


def missing_folder(data: Path) -> dict[str, Any]:
    shutil.rmtree(data / "images")
    return {}


def run_folder_below_a_file(data: Path) -> dict[str, Any]:
    return {"out": data / "labels.csv" / "run"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (empty_folder, r"--images: .*images holds no \.jpg, \.jpeg or \.png"),
        (missing_folder, r"--images: .*images is missing"),
        ({"queue_size": 3}, r"--queue-size: got 3, expected at least the global batch of 4"),
        ({"lr": 0}, r"--lr: got 0.*expected more than 0"),
        ({"arch": "resnet19"}, r"--arch: got 'resnet19'.*resnet18"),
        ({"batch": 11, "queue_size": 11}, r"--batch: got 11, expected at most the 10 usable images"),
        ({"size": 31}, r"--size: got 31, expected at least 32"),
        ({"method": "simclr"}, r"--method.*simclr.*cast"),
        ({"temperature": "warm"}, r"--temperature: invalid float value: 'warm'"),
        ({"no_such_flag": 1}, r"unrecognized arguments: --no-such-flag 1"),
        (run_folder_below_a_file, r"--out: cannot write into .*labels\.csv/run: Not a directory"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_faulty_settings(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Any, expected: str
) -> None:
    changes = change(data) if callable(change) else change
    arguments = command_line(settings(data, tmp_path / "run"))
    for name, value in changes.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    before = contents(data)
    line = refused(capfd, arguments)
    assert re.search(expected, line), line
    assert not (tmp_path / "run").exists()
    assert contents(data) == before


# Runs that exist already


@pytest.fixture
def run(undisturbed: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of a run of six steps with three checkpoints."""
    shutil.copytree(undisturbed, tmp_path / "run")
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run")


def test_existing_run_is_not_overwritten(scenes: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    line = refused(capfd, command_line(settings(scenes, run)))
    assert f"--out: {run} holds a run already (newest checkpoint: step 6); continue it with --resume" in line
    assert contents(run) == before


@pytest.mark.parametrize("config_file", [True, False], ids=["config.json", "checkpoint-alone"])
def test_resume_with_another_configuration(
    scenes: Path, run: Path, capfd: pytest.CaptureFixture[str], config_file: bool
) -> None:
    """The differing fields are named; settings that cannot change the result may differ."""
    if not config_file:
        (run / "config.json").unlink()
    before = contents(run)
    changes = {"lr": 0.25, "arch": "resnet34", "checkpoint_every": 7, "loader_threads": 2}
    line = refused(capfd, command_line(settings(scenes, run, **changes), "--resume"))
    assert "configuration differs" in line and "--lr 0.5 -> 0.25" in line and "--arch resnet18 -> resnet34" in line
    assert "--checkpoint-every" not in line and "--loader-threads" not in line
    assert contents(run) == before


def test_resume_on_another_dataset(data: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for folder, suffix in (("images", "jpg"), ("saliency", "png")):
        (data / folder / f"scene_000009.{suffix}").unlink()
    before = contents(run)
    line = refused(capfd, command_line(settings(data, run), "--resume"))
    assert "the dataset changed: 10 usable samples when the checkpoint was written, 9 now" in line
    assert contents(run) == before


def test_every_checkpoint_corrupt(scenes: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for step in checkpoint.steps(run):
        flip(run / "checkpoints" / f"step-{step}" / "rank-0.safetensors")
    before = contents(run)
    line = refused(capfd, command_line(settings(scenes, run), "--resume"))
    assert "no whole checkpoint in" in line
    assert all(f"step-{step}/rank-0.safetensors: altered" in line for step in (2, 4, 6))
    assert contents(run) == before


def test_unreadable_config_file(scenes: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "config.json").write_text("{")
    before = contents(run)
    assert "config.json" in refused(capfd, command_line(settings(scenes, run), "--resume"))
    assert contents(run) == before


def test_run_folder_is_a_file(scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("something of value")
    assert "--out: got the file" in refused(capfd, command_line(settings(scenes, tmp_path / "run")))
    assert (tmp_path / "run").read_text() == "something of value"


# No disk space


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of a ResNet-18 (131 MB), not for two."""
    disk = tmp_path / "disk"
    if not mounted(disk, "size=200m"):
        pytest.skip("cannot mount a small tmpfs here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_too_small_a_disk_is_seen_before_the_first_step(
    scenes: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refused(capfd, command_line(settings(scenes, small_disk / "run", checkpoint_every=2)))
    assert "no disk space for 3 checkpoints" in line and "MB needed" in line and "MB free" in line
    assert not (small_disk / "run").exists()


def test_disk_that_fills_up_during_a_run(
    undisturbed: Path, scenes: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Somebody else takes the space: the save fails, the checkpoint before it is whole, and the run can go on."""
    run = small_disk / "run"
    config = settings(scenes, run, checkpoint_every=4, keep_checkpoints=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cast_fast.train._Trainer.require_space", lambda _: None)
        line = refused(capfd, command_line(config))
        assert "no disk space for the checkpoint of step 6" in line and str(run) in line
        saved = checkpoint.load_last(run)
        assert saved is not None and saved.step == 4
        assert (run / "metrics.csv").read_bytes() == (undisturbed / "metrics.csv").read_bytes()
        subprocess.run(["mount", "-o", "remount,size=600m", str(small_disk)], check=True)
        assert cli.main(command_line(config, "--resume")) == 0
    finished = checkpoint.load_last(run)
    assert finished is not None and finished.step == 6
    assert (run / "metrics.csv").read_bytes() == (undisturbed / "metrics.csv").read_bytes()


def test_write_that_fails_half_way(scenes: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files fails the write itself, after the check of free space."""
    shutil.rmtree(run / "checkpoints" / "step-6")
    before = contents(run / "checkpoints")
    with full_disk(1_000_000):
        line = refused(capfd, command_line(settings(scenes, run), "--resume"))
    assert "cannot save the checkpoint of step 6" in line and "File too large" in line
    assert contents(run / "checkpoints") == before


# The real command


def test_real_process(scenes: Path, tmp_path: Path) -> None:
    """The same through a real process: exit code 2 and nothing but the line."""
    arguments = command_line(dataclasses.replace(settings(scenes, tmp_path / "run"), arch="resnet1"))
    process = python(PLAIN, *arguments)
    output, errors = process.communicate()
    assert process.returncode == 2
    assert output == ""
    assert errors.startswith("cast-fast: error: --arch: got 'resnet1'") and errors.count("\n") == 1


def test_flags_round_trip(scenes: Path, tmp_path: Path) -> None:
    """The command lines of these tests mean the settings that they are made from."""
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    config = settings(scenes, tmp_path / "run")
    assert config_from_args(parser.parse_args(command_line(config)[1:])) == config


def test_a_batch_too_small_for_batch_norm(scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    line = refused(capfd, command_line(settings(scenes, run, batch=1, size=32)))
    assert "--batch: got 1 at --size 32" in line and not run.exists()


def test_a_start_that_failed_before_its_first_step_can_be_repeated(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a crash between config.json and the first step leaves behind is no run."""
    run = tmp_path / "run"

    def fail(*args: object) -> None:
        raise RuntimeError("the first step fails")

    config = settings(scenes, run, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr("cast_fast.step.TrainStep.__call__", fail)
        with pytest.raises(RuntimeError, match="the first step fails"):
            cli.main(command_line(config))
    assert (run / "config.json").exists()
    assert cli.main(command_line(dataclasses.replace(config, lr=0.25))) == 0
    assert json.loads((run / "config.json").read_text())["config"]["lr"] == 0.25
    assert cli.main(command_line(config)) == 2  # now it holds one
