"""pretrain: whatever interrupts a run, it ends with the same bits as an undisturbed one."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import logging
import os
import pty
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_checkpoint import assert_equal_states

from cast_fast import checkpoint, train
from cast_fast.config import PretrainConfig
from cast_fast.data import sampling
from cast_fast.data.batch import Batch
from cast_fast.data.sampling import GlobalOrder, epoch_order
from cast_fast.data.synthetic import write_dataset
from cast_fast.errors import UserError
from cast_fast.nonfinite import samples_of
from cast_fast.run_folder import batch_norm_groups
from cast_fast.step import StepMetrics, TrainStep

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
from cast_fast.data.dali_loader import DaliLoader

TOTAL = 6


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small made scenes: two steps of four an epoch, so that runs of six steps see three epochs."""
    folder = tmp_path_factory.mktemp("scenes") / "made"
    write_dataset(folder, 10, seed=1, size=(96, 80), workers=1)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the tests' manifests out of the user's cache, and lets runs of one session share them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def settings(scenes: Path, out: Path, **changes: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "images": scenes / "images",
        "saliency": scenes / "saliency",
        "out": out,
        "arch": "resnet18",
        "size": 48,  # a grid of 2 × 2; on a single cell the attention loss is 0 or 1
        "batch": 4,
        "queue_size": 18,  # no multiple of the batch
        "steps": TOTAL,
        "dim": 16,
        "device": "cpu",
        "precision": "fp32",
        "compile": False,
        "loader_threads": 1,
        "seed": 5,
        "checkpoint_every": 100,
    }
    return PretrainConfig(**{**values, **changes})


def command_line(config: PretrainConfig, *extra: str) -> list[str]:
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = field.name.replace("_", "-")
        if value is None:
            continue
        flags += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return ["pretrain", *flags, *extra]


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A real process with this one's import path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of six steps that nothing interrupts."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        assert train.pretrain(settings(scenes, run, checkpoint_every=2)).finished
    yield run
    shutil.rmtree(run)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """Where a run folder may be made; emptied afterwards, because a checkpoint has 130 MB."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


def assert_same_run(run: Path, reference: Path) -> None:
    """The same bits in every tensor of the last checkpoint, and the same bytes in metrics.csv."""
    left, right = checkpoint.load_last(run), checkpoint.load_last(reference)
    assert left is not None and right is not None
    assert left.step == right.step
    assert left.state.keys() == right.state.keys()
    assert_equal_states(left.state, right.state)
    assert (run / "metrics.csv").read_bytes() == (reference / "metrics.csv").read_bytes()


def patch_step(monkeypatch: pytest.MonkeyPatch, before: Callable[[int, Batch], None]) -> list[int]:
    """Calls ``before(number of the call, batch)`` ahead of every step; returns a list that grows by the call."""
    calls: list[int] = []
    original = TrainStep.__call__

    def step(self: TrainStep, batch: Batch, lr: float) -> StepMetrics:
        calls.append(len(calls) + 1)
        before(len(calls), batch)
        return original(self, batch, lr)

    monkeypatch.setattr(TrainStep, "__call__", step)
    return calls


# A whole run


def test_run_folder(undisturbed: Path, scenes: Path) -> None:
    content = json.loads((undisturbed / "config.json").read_text())
    assert PretrainConfig.from_json(content["config"]) == settings(scenes, undisturbed, checkpoint_every=2)
    assert content["dataset"]["samples"] == 10 and content["dataset"]["skipped"] == 0
    (start,) = content["starts"]
    assert start["versions"]["torch"] == torch.__version__
    resolved = [start[name] for name in ("device", "precision", "compiled", "kernels")]
    assert resolved == ["cpu", "float32", False, "torch"]
    with open(undisturbed / "metrics.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [int(row["step"]) for row in rows] == list(range(1, TOTAL + 1))
    assert list(rows[0])[:4] == ["step", "loss", "loss_moco", "loss_cast"]
    for row in rows:
        combined = (float(row["loss_moco"]) + 3 * float(row["loss_cast"])) / 4
        assert float(row["loss"]) == pytest.approx(combined, rel=1e-5)
        assert 0 < float(row["loss_cast"]) <= 1 and row["finite"] == "1"
        assert float(row["cast_samples"]) + float(row["empty_key_mask"]) == 4
    assert float(rows[0]["lr"]) == pytest.approx(0.5 * 4 / 256)
    assert float(rows[-1]["lr"]) < 0.1 * float(rows[0]["lr"])
    with open(undisturbed / "timing.csv", newline="") as handle:
        (timing,) = csv.DictReader(handle)  # fewer steps than a stretch has
    assert int(timing["step"]) == TOTAL and float(timing["images_per_second"]) > 0
    assert checkpoint.steps(undisturbed) == [6, 4, 2]
    assert list((undisturbed / "tensorboard").iterdir())
    assert not (undisturbed / "nonfinite.csv").exists() and not (undisturbed / "skipped.jsonl").exists()


def test_checkpoint_holds_everything(undisturbed: Path) -> None:
    saved = checkpoint.load_last(undisturbed)
    assert saved is not None
    assert set(saved.state) == {"model", "optimizer", "queue", "loader", "random", "progress"}
    names = set(saved.state["model"])
    assert {"query.trunk.conv1.weight", "key.trunk.conv1.weight"} <= names
    assert int(saved.state["queue"]["pointer"]) == TOTAL * 4 % 18
    assert saved.state["queue"]["columns"].shape == (18, 1, 16)
    buffers = [state["momentum_buffer"] for state in saved.state["optimizer"]["state"].values()]
    assert len(buffers) > 60 and all(buffer.abs().sum() > 0 for buffer in buffers)
    assert saved.state["loader"]["step"] == TOTAL


def test_same_seed_same_bits_other_seed_other_bits(undisturbed: Path, scenes: Path, run: Path) -> None:
    train.pretrain(settings(scenes, run, loader_threads=2))
    assert_same_run(run, undisturbed)
    shutil.rmtree(run)
    train.pretrain(settings(scenes, run, seed=6, steps=1))
    first = (undisturbed / "metrics.csv").read_text().splitlines()[1]
    assert (run / "metrics.csv").read_text().splitlines()[1] != first


@pytest.mark.parametrize("method", ["moco", "crops-only", "attention-only"])
def test_other_methods(scenes: Path, run: Path, method: str) -> None:
    config = settings(scenes, run, method=method, epochs=1, steps=None)
    if method == "moco":
        config = dataclasses.replace(config, saliency=None)
    outcome = train.pretrain(config)
    assert outcome.finished and outcome.step == 2
    with open(run / "metrics.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    constrained = method == "crops-only"
    assert (rows[0]["fallback_query"] != "") == constrained
    assert (float(rows[0]["loss_cast"]) > 0) == (method == "attention-only")


# Resuming


def test_finished_run_does_nothing_more(
    undisturbed: Path, scenes: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(undisturbed, run)
    with caplog.at_level(logging.INFO, logger="cast_fast"):
        outcome = train.pretrain(settings(scenes, run, resume=True))
    assert outcome.finished and outcome.step == TOTAL
    assert "is finished: all 6 steps are done" in caplog.text
    assert_same_run(run, undisturbed)


def test_resume_of_an_empty_folder_starts(scenes: Path, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cast_fast"):
        assert train.pretrain(settings(scenes, run, steps=1, resume=True)).finished
    assert "holds no run yet, starting a new one" in caplog.text


def test_resume_without_a_checkpoint_starts_over(undisturbed: Path, scenes: Path, run: Path) -> None:
    """A run that was killed before its first checkpoint."""
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "checkpoints")
    assert train.pretrain(settings(scenes, run, resume=True)).finished
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 1), (signal.SIGTERM, 4), (signal.SIGUSR1, 3)])
def test_signal_saves_and_resume_is_bitwise(
    undisturbed: Path, scenes: Path, run: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, at: int
) -> None:
    """N steps = k steps + restart + N − k steps; a second signal changes nothing."""
    before = signal.getsignal(number)

    def send(call: int, batch: Batch) -> None:
        del batch
        if call == at:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch_step(patch, send)
        outcome = train.pretrain(settings(scenes, run))
    assert (outcome.step, outcome.stopped_by, outcome.finished) == (at, number.name, False)
    assert signal.getsignal(number) is before
    assert checkpoint.steps(run)[0] == at
    assert train.pretrain(settings(scenes, run, resume=True)).finished
    assert_same_run(run, undisturbed)
    starts = json.loads((run / "config.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, at]


def test_groups_resume_bitwise(
    undisturbed: Path, scenes: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shuffle goes on where it stopped; without the flag the run keeps its groups, another number is refused."""
    whole = tmp_path / "whole"
    assert train.pretrain(settings(scenes, whole, batch_norm_groups=2)).finished
    assert (whole / "metrics.csv").read_bytes() != (undisturbed / "metrics.csv").read_bytes()
    assert json.loads((whole / "config.json").read_text())["starts"][0]["batch_norm_groups"] == 2
    with monkeypatch.context() as patch:
        patch_step(patch, lambda call, _: os.kill(os.getpid(), signal.SIGTERM) if call == 3 else None)
        assert train.pretrain(settings(scenes, run, batch_norm_groups=2)).step == 3
    with pytest.raises(UserError, match=r"--batch-norm-groups: got 4 on 1 process, expected 2 groups in all"):
        train.pretrain(settings(scenes, run, batch_norm_groups=4, resume=True))
    assert train.pretrain(settings(scenes, run, resume=True)).finished
    assert_same_run(run, whole)
    shutil.rmtree(whole)


@pytest.mark.parametrize(
    ("changes", "processes", "begun", "groups", "said"),
    [
        ({}, 1, None, 8, "8 groups of 32 samples"),
        ({}, 8, None, 1, ""),
        ({"batch": 100}, 1, None, 1, "one group"),
        ({"batch": 32}, 1, None, 1, "one group"),
        ({"key_bn": "local"}, 1, None, 1, ""),
        ({"key_bn": "sync", "query_bn": "sync"}, 1, None, 1, ""),
        ({"batch_norm_groups": 4}, 1, None, 4, ""),
        ({"batch_norm_groups": 4}, 2, None, 4, ""),
        # A run that goes on: with as many groups in all as before, where that is possible.
        ({}, 1, {"processes": 4}, 4, ""),
        ({}, 1, {"processes": 1}, 1, ""),
        ({}, 2, {"processes": 1, "batch_norm_groups": 8}, 4, ""),
        ({}, 3, {"processes": 4, "batch_norm_groups": 1}, 1, "3 groups, one a process, instead of 4"),
        ({"batch": 30}, 1, {"processes": 4}, 1, "1 groups, one a process, instead of 4"),
        ({"batch_norm_groups": 2}, 2, {"processes": 4}, 2, ""),
        ({"key_bn": "sync", "query_bn": "sync"}, 3, {"processes": 4}, 1, ""),
    ],
)
def test_batch_norm_groups(
    changes: dict[str, Any],
    processes: int,
    begun: dict[str, int] | None,
    groups: int,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="cast_fast"):
        assert batch_norm_groups(PretrainConfig(**changes), processes, begun) == groups
    assert said in caplog.text and bool(said) == bool(caplog.text)


def test_signal_during_preparation_ends_at_once(
    scenes: Path, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train, "cam_grid", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    outcome = train.pretrain(settings(scenes, run))
    assert (outcome.stopped_by, outcome.finished) == ("SIGTERM", False)
    assert "before the first step" in caplog.text
    assert not (run).exists()


def test_runs_outside_the_main_thread(undisturbed: Path, scenes: Path, run: Path) -> None:
    """Python sets signal handlers in the main thread only."""
    thread = threading.Thread(target=train.pretrain, args=(settings(scenes, run),))
    thread.start()
    thread.join()
    assert_same_run(run, undisturbed)


KILLED_STEP = """
    import os, signal, sys
    from cast_fast import cli
    from cast_fast.step import TrainStep

    at, original, calls = int(sys.argv[1]), TrainStep.__call__, 0
    def step(self, batch, lr):
        global calls
        calls += 1
        result = original(self, batch, lr)
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    TrainStep.__call__ = step
    sys.exit(cli.main(sys.argv[2:]))
"""
KILLED_SAVE = """
    import os, signal, sys
    from cast_fast import checkpoint, cli

    # Dies in the middle of writing the second checkpoint: some files are there, none is renamed.
    name, original = sys.argv[1], checkpoint._write
    def write(path, *arguments):
        if "step-4" in str(path) and path.name == name:  # in a temporary folder
            path.write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, *arguments)
    checkpoint._write = write
    sys.exit(cli.main(sys.argv[2:]))
"""
PLAIN = "import sys; from cast_fast import cli; sys.exit(cli.main(sys.argv[1:]))"


@pytest.mark.parametrize(
    ("code", "argument", "left"),
    [(KILLED_STEP, "5", 4), (KILLED_SAVE, "state.json", 2)],
    ids=["in-a-step", "in-a-save"],
)
def test_sigkill_and_resume_is_bitwise(
    undisturbed: Path, scenes: Path, run: Path, code: str, argument: str, left: int
) -> None:
    """Real processes: one that dies without a chance to clean up, and one that goes on."""
    killed = python(code, argument, *command_line(settings(scenes, run, checkpoint_every=2)))
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    assert checkpoint.steps(run)[0] == left
    resumed = python(PLAIN, *command_line(settings(scenes, run), "--resume"))
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    assert_same_run(run, undisturbed)
    assert not [entry for entry in (run / "checkpoints").iterdir() if entry.name.startswith(".")]


def test_signal_from_outside_exits_75(scenes: Path, run: Path) -> None:
    """A scheduler's SIGTERM to the real command."""
    process = python(PLAIN, *command_line(settings(scenes, run, steps=100_000, checkpoint_every=50_000)))
    while process.poll() is None and not (
        (run / "metrics.csv").exists() and b"\n3," in (run / "metrics.csv").read_bytes()
    ):
        threading.Event().wait(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    saved = checkpoint.load_last(run)
    assert saved is not None and saved.step >= 3
    assert f"stopped by SIGTERM after step {saved.step} of 100000" in errors
    assert "Traceback" not in errors


def test_damaged_newest_checkpoint_costs_only_its_steps(
    undisturbed: Path, scenes: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(undisturbed, run)
    path = run / "checkpoints" / "step-6" / "rank-0.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, logger="cast_fast"):
        assert train.pretrain(settings(scenes, run, resume=True)).finished
    assert "DAMAGED CHECKPOINT: step-6/rank-0.safetensors" in caplog.text and "going back to step 4" in caplog.text
    assert_same_run(run, undisturbed)
    assert (run / "checkpoints" / "step-6.damaged").is_dir()


# Non-finite steps


def poison(monkeypatch: pytest.MonkeyPatch, *at: int) -> None:
    """Makes the loss of these calls not finite."""

    def before(call: int, batch: Batch) -> None:
        if call in at:
            assert batch.weight is not None
            batch.weight = torch.full_like(batch.weight, float("nan"))
            assert batch.query_saliency is not None
            batch.query_saliency = torch.full_like(batch.query_saliency, float("inf"))

    patch_step(monkeypatch, before)


def test_nonfinite_steps_are_counted_named_and_change_nothing(
    scenes: Path, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, 3, 4)
        assert train.pretrain(settings(scenes, run, max_nonfinite=3, checkpoint_every=2)).finished
    before, after = (checkpoint.load(run / "checkpoints" / f"step-{step}") for step in (2, 4))
    assert_equal_states(before.state["model"], after.state["model"])
    momenta = [saved.state["optimizer"]["state"] for saved in (before, after)]
    assert_equal_states(momenta[0], momenta[1])
    assert after.state["progress"]["nonfinite"] == {"in_a_row": 2, "total": 2}
    with open(run / "nonfinite.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["step"] for row in rows] == ["3", "4"]
    named = json.loads(rows[0]["samples"])
    assert len(named) == 4 and all((scenes / "images" / f"{stem}.jpg").exists() for stem in named)
    assert "step 3: loss" in caplog.text and named[0] in caplog.text
    with open(run / "metrics.csv", newline="") as handle:
        assert [row["finite"] for row in csv.DictReader(handle)] == ["1", "1", "0", "0", "1", "1"]


def test_suspects_of_many_ranks_cost_one_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset of a million pictures takes 0.4 s to permute: not once for each of many ranks."""
    length, batch, ranks = 400, 3, 64
    permuted = []
    monkeypatch.setattr(
        sampling, "epoch_order", lambda *arguments: permuted.append(arguments) or epoch_order(*arguments)
    )
    order = GlobalOrder(length, 5, batch * ranks)
    for bad in ([0.0, 1.0, *[0.0] * 60, 1.0, 0.0], [0.0] * ranks):
        found = samples_of(order, 4, bad)  # the last step but one of the second epoch
        suspects = [rank for rank in range(ranks) if bad[rank]] or range(ranks)
        assert len(permuted) == 1
        own = [GlobalOrder(length, 5, batch, rank, ranks).at(3)[0] for rank in suspects]
        assert found.tolist() == np.concatenate(own).tolist()
        del permuted[1:]


def test_too_many_nonfinite_steps_stop_with_the_last_good_state(
    scenes: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(scenes, run, max_nonfinite=2, steps=12, checkpoint_every=4)
    with monkeypatch.context() as patch:
        poison(patch, *range(5, 13))
        with pytest.raises(
            UserError, match=r"[234] steps in a row.*--max-nonfinite 2.*samples .*last good state is saved"
        ):
            train.pretrain(config)
    saved = checkpoint.load_last(run)
    assert saved is not None and 6 <= saved.step <= 8
    good = checkpoint.load(run / "checkpoints" / "step-4")
    assert_equal_states(saved.state["model"], good.state["model"])
    # The cause gone, the run goes on.
    assert train.pretrain(dataclasses.replace(config, resume=True, max_nonfinite=5)).finished


# Odds and ends


def test_failing_data_keep_what_was_learned(
    undisturbed: Path, scenes: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the loader gives up in the middle of a run, the steps before are saved."""
    original = DaliLoader.__next__

    def fail(self: DaliLoader) -> Batch:
        if self.step == 3:
            raise UserError("too many broken files")
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(DaliLoader, "__next__", fail)
        with pytest.raises(UserError, match="too many broken files"):
            train.pretrain(settings(scenes, run))
    assert checkpoint.steps(run) == [3]
    assert train.pretrain(settings(scenes, run, resume=True)).finished
    assert_same_run(run, undisturbed)


def test_changed_machine_is_said(
    undisturbed: Path, scenes: Path, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "checkpoints" / "step-6")
    versions = {**checkpoint.versions(), "torch": "99.0"}
    monkeypatch.setattr(checkpoint, "versions", lambda: versions)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert train.pretrain(settings(scenes, run, resume=True)).finished
    assert f"torch {torch.__version__} -> 99.0" in caplog.text
    assert "threads changed from 1 to 64" in caplog.text


def test_progress_bar_on_a_terminal(scenes: Path, run: Path) -> None:
    """The command under a pseudo-terminal: losses, rates and log lines, and nothing torn."""
    code = "import sys; from cast_fast import display; display.TIMING_EVERY = 2; " + PLAIN.removeprefix("import sys; ")
    primary, secondary = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "160"}
    command = [sys.executable, "-c", code, *command_line(settings(scenes, run))]
    process = subprocess.Popen(command, stdout=secondary, stderr=secondary, stdin=secondary, env=environment)
    os.close(secondary)
    shown = b""
    # Linux reports the far end's closing as an input/output error.
    with contextlib.suppress(OSError):
        while data := os.read(primary, 1 << 16):
            shown += data
    os.close(primary)
    assert process.wait() == 0, shown.decode()
    text = shown.decode()
    assert "6/6" in text
    for word in ("loss", "CAST", "accuracy", "images/s", "loader", "GiB"):
        assert word in text
    assert "finished: 6 steps" in text


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_began_and_ended_meanwhile_is_not_begun_again(
    resume: bool, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = train.locked_run

    @contextlib.contextmanager
    def late(run: Path) -> Iterator[None]:
        with lock(run):
            (run / "metrics.csv").write_text("step\n1\n")
            yield

    monkeypatch.setattr(train, "locked_run", late)
    with pytest.raises(UserError, match="another process has begun a run in"):
        train.pretrain(settings(scenes, tmp_path / "run", resume=resume))
    assert (tmp_path / "run" / "metrics.csv").read_text() == "step\n1\n"


def test_two_processes_never_share_a_run_folder(scenes: Path, tmp_path: Path) -> None:
    holder = python(
        """
        import fcntl, sys, time
        with open(sys.argv[1], "w") as handle:
            fcntl.lockf(handle, fcntl.LOCK_EX)
            print("locked", file=handle, flush=True)
            print("locked", flush=True)
            time.sleep(600)
        """,
        str(tmp_path / ".lock"),
    )
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    try:
        with pytest.raises(UserError, match=r"another process is training in this folder \(locked\)"):
            train.pretrain(settings(scenes, tmp_path))
    finally:
        holder.kill()
        holder.communicate()
    assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]


@pytest.mark.gpu
def test_trains_on_cuda(cuda: torch.device, scenes: Path, run: Path) -> None:
    del cuda
    config = settings(scenes, run, device="cuda")
    assert train.pretrain(config).finished
    with open(run / "metrics.csv", newline="") as handle:
        assert [row["finite"] for row in csv.DictReader(handle)] == ["1"] * TOTAL


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none(scenes: Path, run: Path) -> None:
    with pytest.raises(UserError, match="--device: got cuda"):
        train.pretrain(settings(scenes, run, device="cuda"))
    with pytest.raises(UserError, match="--kernels: got triton"):
        train.pretrain(settings(scenes, run, kernels="triton"))
    assert not (run).exists()
