"""Whole runs on several processes, some under a real torchrun: signals, deaths, hangs, other numbers of ranks."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_checks
import torch
from test_checkpoint import assert_equal_states

from cast_fast import checkpoint
from cast_fast.config import PretrainConfig
from cast_fast.data.sampling import GlobalOrder
from cast_fast.data.synthetic import write_dataset

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
import tiny_pretrain

SCENES = 18
GLOBAL_BATCH = 8
TOTAL = 8


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small made scenes: two steps an epoch."""
    folder = tmp_path_factory.mktemp("ranks") / "made"
    write_dataset(folder, SCENES, seed=1, size=(96, 80), workers=1)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keeps the tests' manifests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


def settings(scenes: Path, out: Path, ranks: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "images": scenes / "images",
        "saliency": scenes / "saliency",
        "out": out,
        "arch": "resnet18",  # tiny_pretrain puts a tiny trunk in its place
        "size": 32,
        "batch": GLOBAL_BATCH // ranks,
        "queue_size": 19,  # no multiple of the batch, nor of the ranks
        "steps": TOTAL,
        "dim": 8,
        "device": "cpu",
        "precision": "fp32",
        "compile": False,
        "loader_threads": 1,
        "seed": 5,
        "checkpoint_every": 2,
        "keep_checkpoints": 10,
    }
    return {**values, **changes}


def run_in_ranks(ranks: int, values: dict[str, Any], scratch: Path, fault: str = "none") -> list[dict[str, Any]]:
    """``train.pretrain`` in so many processes, without torchrun's seconds."""
    function = functools.partial(rank_checks.pretrain, settings=values, fault=fault)
    return rank_checks.run_ranks(function, ranks, scratch, group=False)


def torchrun(
    values: dict[str, Any], ranks: int, *extra: str, faults: str = "none", options: tuple[str, ...] = ()
) -> Any:
    """The real command under a real torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *options]
    return subprocess.Popen(
        [*launcher, str(Path(tiny_pretrain.__file__)), faults, "pretrain", *command_line(values), *extra],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip


def environment() -> dict[str, str]:
    """For a process with this one's import path and one thread."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def command_line(values: dict[str, Any]) -> list[str]:
    """The settings as flags."""
    flags = []
    config = PretrainConfig(**values)
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags += [f"--{name}", str(value)]
    return flags


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until metrics.csv has the step, or the process has ended."""
    row = f"\n{step},".encode()
    while process.poll() is None and not ((run / "metrics.csv").exists() and row in (run / "metrics.csv").read_bytes()):
        threading.Event().wait(0.05)


@pytest.fixture(scope="module")
def undisturbed(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run on two ranks that nothing interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    results = run_in_ranks(2, settings(scenes, folder / "run", 2), folder)
    return folder / "run", results


def last(run: Path) -> checkpoint.Checkpoint:
    saved = checkpoint.load_last(run)
    assert saved is not None
    return saved


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def assert_same_run(run: Path, reference: Path) -> None:
    """The same bits in every tensor of the last checkpoint, and the same bytes in metrics.csv."""
    left, right = last(run), last(reference)
    assert left.step == right.step
    assert_equal_states(left.state, right.state)
    assert (run / "metrics.csv").read_bytes() == (reference / "metrics.csv").read_bytes()


def oldest_first(saved: checkpoint.Checkpoint) -> torch.Tensor:
    return saved.state["queue"]["columns"].flatten(0, 1)[-19:]


# Whole runs


def test_two_ranks_leave_one_run_folder(undisturbed: tuple[Path, list[dict[str, Any]]]) -> None:
    run, results = undisturbed
    assert [result["end"] for result in results] == ["finished", "finished"]
    order = GlobalOrder(SCENES, 5, GLOBAL_BATCH)
    for step in range(1, TOTAL + 1):
        together = np.stack([result["samples"][step] for result in results], axis=1).ravel()
        assert together.tolist() == order.at(step - 1)[0].tolist()
    table = rows(run / "metrics.csv")
    assert [int(row["step"]) for row in table] == list(range(1, TOTAL + 1))
    assert all(int(float(row["cast_samples"])) + int(float(row["empty_key_mask"])) == GLOBAL_BATCH for row in table)
    assert float(table[0]["lr"]) == pytest.approx(0.5 * GLOBAL_BATCH / 256)
    assert checkpoint.steps(run) == [8, 6, 4, 2]
    saved = last(run)
    assert int(saved.state["queue"]["pointer"]) == TOTAL * GLOBAL_BATCH % 19
    assert saved.state["queue"]["columns"].shape == (10, 2, 8)
    files = {path.name for path in saved.path.iterdir()}
    assert files == {"rank-0.safetensors", "rank-1.safetensors", "state.json", "config.json", "manifest.json"}
    (start,) = json.loads((run / "config.json").read_text())["starts"]
    assert start["processes"] == 2
    beats = [json.loads((run / "heartbeats" / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [(beat["rank"], beat["step"]) for beat in beats] == [(0, TOTAL), (1, TOTAL)]


def test_two_nodes_are_two_launchers(
    undisturbed: tuple[Path, list[dict[str, Any]]], scenes: Path, tmp_path: Path
) -> None:
    """One torchrun a node, with one rank each: the run of two ranks on one node, with the same bits."""
    values = settings(scenes, tmp_path / "run", 2)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ("--nnodes", "2", "--rdzv-id", "nodes", "--rdzv-endpoint", f"localhost:{port}")
    nodes = [torchrun(values, 1, options=options) for _ in range(2)]
    said = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert_same_run(tmp_path / "run", undisturbed[0])


def test_saving_in_the_background_saves_the_same(
    undisturbed: tuple[Path, list[dict[str, Any]]], scenes: Path, tmp_path: Path
) -> None:
    """On two ranks, every other step: the same files, though training went on while they were written."""
    results = run_in_ranks(2, settings(scenes, tmp_path / "run", 2, async_save=True), tmp_path)
    assert [result["end"] for result in results] == ["finished", "finished"]
    assert checkpoint.steps(tmp_path / "run") == checkpoint.steps(undisturbed[0]) == [8, 6, 4, 2]
    for step in (2, 4, 6, 8):
        found, expected = (
            checkpoint.load(run / "checkpoints" / f"step-{step}") for run in (tmp_path / "run", undisturbed[0])
        )
        assert_equal_states(found.state, expected.state)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (undisturbed[0] / "metrics.csv").read_bytes()


@pytest.mark.parametrize("changes", [{"key_bn": "sync", "query_bn": "sync"}, {}], ids=["synchronised", "groups"])
def test_other_numbers_of_ranks_continue_the_run(scenes: Path, tmp_path: Path, changes: dict[str, str]) -> None:
    """Four ranks, then two, one, and four again: BatchNorm over all, or over as many groups as there were ranks.

    Nothing but the order of sums differs.
    """
    whole = tmp_path / "four"
    results = run_in_ranks(4, settings(scenes, whole, 4, **changes), tmp_path)
    expected, table = last(whole), rows(whole / "metrics.csv")
    for begun, ranks, before in (("four", 2, 4), ("four", 1, 4), ("then-2", 4, 6)):
        run = tmp_path / f"then-{ranks}"
        shutil.copytree(tmp_path / begun, run)
        for step in checkpoint.steps(run):
            if step > before:
                shutil.rmtree(run / "checkpoints" / f"step-{step}")
        resumed = checkpoint.load_last(run)
        again = run_in_ranks(ranks, settings(scenes, run, ranks, **changes, resume=True), tmp_path)
        assert [result["end"] for result in again] == ["finished"] * ranks
        for step in range(before + 1, 9):
            samples, others = (
                np.stack([result["samples"][step] for result in every], axis=1).ravel().tolist()
                for every in (results, again)
            )
            assert samples == others
        found = last(run)
        assert found.state["queue"]["columns"].shape == (-(-19 // ranks), ranks, 8)
        # The keys that were there before the restart are the same bits in the same order.
        kept = 19 - (8 - before) * GLOBAL_BATCH
        assert resumed is not None and (kept > 0) == (before == 6)
        assert torch.equal(oldest_first(found)[: max(kept, 0)], oldest_first(resumed)[19 - max(kept, 0) :])
        # Float32, four steps: a wrong sample or key would show in the first digit.
        torch.testing.assert_close(oldest_first(found), oldest_first(expected), rtol=0, atol=1e-4)
        assert found.state["queue"]["pointer"] == expected.state["queue"]["pointer"]
        for name, value in expected.state["model"].items():
            torch.testing.assert_close(found.state["model"][name], value, rtol=1e-3, atol=1e-4)
        for row, other in zip(table, rows(run / "metrics.csv")):
            assert row["step"] == other["step"] and row["cast_samples"] == other["cast_samples"]
            assert float(other["loss"]) == pytest.approx(float(row["loss"]), rel=1e-4)
    run = tmp_path / "then-1"
    refused = run_in_ranks(2, settings(scenes, run, 1, **changes, resume=True), tmp_path)
    assert "the global batch differs" in refused[0]["end"] and ": 8 -> 16 (--batch 8 on 2" in refused[0]["end"]
    assert refused[1]["end"] == "leaves with 2"


def test_a_users_error_is_told_once(scenes: Path, tmp_path: Path) -> None:
    results = run_in_ranks(2, settings(scenes, tmp_path / "run", 2, images=tmp_path / "missing"), tmp_path)
    assert "missing" in results[0]["end"] and results[1]["end"] == "leaves with 2"
    assert not (tmp_path / "run").exists()


def test_nan_on_one_rank_changes_nothing(scenes: Path, tmp_path: Path) -> None:
    """Steps 5 and on are bad on rank 1 alone: its samples are named, and all ranks stop."""
    run = tmp_path / "run"
    values = settings(scenes, run, 2, steps=20, max_nonfinite=3)
    results = run_in_ranks(2, values, tmp_path, fault="nan:1:5")
    for result in results:
        assert "steps in a row had a non-finite loss or gradient (--max-nonfinite 3)" in result["end"]
    good, saved = checkpoint.load(run / "checkpoints" / "step-4"), last(run)
    assert saved.step in (7, 8)
    assert_equal_states(good.state["model"], saved.state["model"])
    assert_equal_states(good.state["optimizer"]["state"], saved.state["optimizer"]["state"])
    noted = rows(run / "nonfinite.csv")
    assert [int(row["step"]) for row in noted][:3] == [5, 6, 7]
    stems = sorted(path.stem for path in (scenes / "images").iterdir())
    assert json.loads(noted[0]["samples"]) == [stems[index] for index in results[1]["samples"][5]]


def test_no_rank_compiles_where_one_cannot(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    results = run_in_ranks(2, settings(scenes, run, 2, steps=1, compile=True), tmp_path, fault="compile:1:0")
    assert [result["end"] for result in results] == ["finished", "finished"]
    (start,) = json.loads((run / "config.json").read_text())["starts"]
    assert start["compiled"] is False


@pytest.mark.parametrize("at", [5, 6, 8])
def test_a_failing_loader_on_one_rank_saves_on_all(
    undisturbed: tuple[Path, list[dict[str, Any]]], scenes: Path, tmp_path: Path, at: int
) -> None:
    """The step before is saved, whether a checkpoint is due in between or the run at its end; and goes on as ever."""
    run = tmp_path / "run"
    failed = run_in_ranks(2, settings(scenes, run, 2), tmp_path, fault=f"loader:1:{at}")
    assert failed[0]["end"] == f"the loader of rank 1 gave up, see its message; step {at - 1} is saved"
    assert failed[1]["end"] == "too many broken files"
    assert checkpoint.steps(run)[0] == at - 1
    again = run_in_ranks(2, settings(scenes, run, 2, resume=True), tmp_path)
    assert [result["end"] for result in again] == ["finished", "finished"]
    assert_same_run(run, undisturbed[0])
    assert not (run / "nonfinite.csv").exists()


def test_sigterm_to_a_single_worker(scenes: Path, tmp_path: Path) -> None:
    """From outside, to rank 1 alone, without a launcher: both save the same step and exit 75."""
    run = tmp_path / "run"
    flags = command_line(settings(scenes, run, 2, steps=100_000, checkpoint_every=50_000))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {name: str(value) for name, value in place.items()}
        command = [sys.executable, str(Path(tiny_pretrain.__file__)), "none", "pretrain", *flags]
        workers.append(
            subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**environment(), **variables},
            )
        )
    wait_for_step(run, 3, workers[1])
    workers[1].send_signal(signal.SIGTERM)
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [75, 75], errors
    saved = last(run)
    assert saved.step >= 3 and checkpoint.steps(run) == [saved.step]
    assert f"stopped by a signal to another rank after step {saved.step} of 100000" in errors[0]
    assert f"stopped by SIGTERM after step {saved.step} of 100000" in errors[1]


# Under torchrun


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "in-the-background"])
def test_a_rank_that_dies_in_mid_save(
    undisturbed: tuple[Path, list[dict[str, Any]]], scenes: Path, tmp_path: Path, background: bool
) -> None:
    """Half of its file is there, the others' are whole: the checkpoint before is used, and the run ends as ever."""
    run = tmp_path / "run"
    values = settings(scenes, run, 2, async_save=background)
    process = torchrun(values, 2, faults="killsave:1:4")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "exitcode  : -9" in errors, errors
    assert checkpoint.steps(run) == [2]
    process = torchrun(values, 2, "--resume")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same_run(run, undisturbed[0])
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-2", "step-4", "step-6", "step-8", "last"}


def test_a_rank_that_hangs_in_mid_save(scenes: Path, tmp_path: Path) -> None:
    """The other gives up after the time-out of collectives, says where, and leaves the checkpoint before."""
    run = tmp_path / "run"
    process = torchrun(
        settings(scenes, run, 2, collective_timeout=20), 2, faults="hangsave:1:4", options=("--shutdown-timeout", "2")
    )
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "rank 0 of 2 gives up" in errors, errors
    (waiting,) = [line for line in errors.splitlines() if line.startswith("rank 0 (process")]
    assert "in 'checkpoint' for" in waiting
    assert last(run).step == 2 and checkpoint.steps(run) == [2]


def test_signal_to_one_rank_then_random_kills(
    undisturbed: tuple[Path, list[dict[str, Any]]], scenes: Path, tmp_path: Path
) -> None:
    """All ranks save the same step; then three deaths that torchrun answers with restarts; not a bit is lost."""
    run = tmp_path / "run"
    process = torchrun(settings(scenes, run, 2), 2, faults="usr1:1:2")
    _, errors = process.communicate(timeout=300)
    # torchrun knows only success and failure, and ends the other worker when one has left: it may be faster.
    assert process.returncode == 1 and "exitcode  : 75" in errors, errors
    assert "SIGUSR1: already stopping" in errors  # the second signal is harmless
    assert "stopped by SIGUSR1 after step 4 of 8" in errors
    assert "stopped by a signal to another rank after step 4 of 8" in errors
    assert checkpoint.steps(run)[0] == 4

    kills = random_kills(seed=1, count=3, first=5)
    process = torchrun(settings(scenes, run, 2), 2, "--resume", faults=kills, options=("--max-restarts", "3"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert len(json.loads((run / "config.json").read_text())["starts"]) == 5, errors
    assert_same_run(run, undisturbed[0])


def random_kills(seed: int, count: int, first: int) -> str:
    """A SIGKILL a start, of a random rank in a random step that is still to come; ``first`` is the run's next step."""
    generator = random.Random(seed)
    kills = []
    for attempt in range(count):
        step = generator.randint(first, TOTAL)
        kills.append(f"kill:{generator.randrange(2)}:{step}:{attempt}")
        first = (step - 1) // 2 * 2 + 1  # after the newest checkpoint, one every two steps
    return ",".join(kills)


@pytest.mark.parametrize(
    ("number", "options", "code"),
    [
        (signal.SIGTERM, (), 1),
        (signal.SIGUSR1, ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"), 1),
        (signal.SIGKILL, (), -signal.SIGKILL),
    ],
    ids=["SIGTERM", "SIGUSR1", "SIGKILL"],
)
def test_signal_to_torchrun(
    scenes: Path, tmp_path: Path, number: signal.Signals, options: tuple[str, ...], code: int
) -> None:
    """torchrun hands the signal to its workers, waits, and exits 1: a scheduler must look at the run folder.

    When torchrun itself is killed, the workers hear of it from the kernel.
    """
    run = tmp_path / "run"
    process = torchrun(settings(scenes, run, 2, steps=100_000, checkpoint_every=50_000), 2, options=options)
    wait_for_step(run, 3, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)  # until the workers too have closed their end of the pipe
    assert process.returncode == code, errors
    saved = last(run)
    assert saved.step >= 3 and checkpoint.steps(run) == [saved.step]
    heard = "SIGTERM" if number == signal.SIGKILL else number.name
    assert f"stopped by {heard} after step {saved.step} of 100000" in errors, errors


def test_hung_rank(scenes: Path, tmp_path: Path) -> None:
    """The rank that waits gives up after the time-out and says where all stand; torchrun ends the hung one."""
    run = tmp_path / "run"
    process = torchrun(
        settings(scenes, run, 2, collective_timeout=5), 2, faults="hang:1:4", options=("--shutdown-timeout", "2")
    )
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "rank 0 of 2 gives up" in errors, errors
    (waiting,) = [line for line in errors.splitlines() if line.startswith("rank 0 (process")]
    (hung,) = [line for line in errors.splitlines() if line.startswith("rank 1 (process")]
    assert "step 4, in 'key shuffle' for" in waiting
    assert "step 4, after 'running statistics' for" in hung
    assert "exitcode  : -9" in errors
    assert last(run).step == 2


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_thirty_random_kills(undisturbed: tuple[Path, list[dict[str, Any]]], scenes: Path, tmp_path: Path) -> None:
    """Ten runs with three deaths each: all end with the bits of the undisturbed run."""
    for seed in range(10):
        run = tmp_path / f"run-{seed}"
        kills = random_kills(seed=100 + seed, count=3, first=1)
        process = torchrun(settings(scenes, run, 2), 2, "--resume", faults=kills, options=("--max-restarts", "3"))
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        assert_same_run(run, undisturbed[0])
