"""The Slurm job: the script is checked by bash and run for real between stand-ins for srun, scontrol and torchrun."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from cast_fast import cli, launch
from cast_fast.errors import UserError

FLAGS = ["--images", "/data/my images", "--saliency", "/data/maps", "--queue-size", "65536"]


def write(tmp_path: Path, *job_flags: str, pretrain: list[str] | None = None) -> tuple[int, Path]:
    script = tmp_path / "job.sbatch"
    flags = [*(FLAGS if pretrain is None else pretrain), "--out", str(tmp_path / "run")]
    return cli.main(["launch", "--script", str(script), *job_flags, "--", *flags]), script


def test_script_is_valid_bash_and_carries_every_setting(tmp_path: Path) -> None:
    code, script = write(
        tmp_path, "--nodes", "16", "--time", "2-00:00:00", "--partition", "gpu", "--setup", "source env"
    )
    text = script.read_text()
    assert code == 0
    subprocess.run(["bash", "-n", str(script)], check=True)
    for line in (
        "--nodes=16",
        "--gpus-per-node=8",
        "--time=2-00:00:00",
        "--signal=B:USR1@300",
        "--partition=gpu",
        "--requeue",
    ):
        assert f"#SBATCH {line}" in text
    assert "--account" not in text
    assert "\nexport SRUN_CPUS_PER_TASK=64\n" in text and "#SBATCH --cpus-per-task=64" in text
    assert "SIGUSR1" in text and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270" in text
    command = launch.node_command(text)
    assert "source env && exec torchrun" in command
    assert command.count("--resume") == 1 and "'/data/my images'" in command


def test_what_the_job_amounts_to_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "shards"
    for there in (False, True):
        code, _ = write(tmp_path, "--nodes", "2", pretrain=["--data", str(data), "--batch", "128"])
        text = capsys.readouterr().out
        assert code == 0 and "2 nodes × 8 GPUs, global batch 2048, learning rate 4\n" in text
        assert ("is not on this machine: it must be on the nodes" in text) == (not there)
        data.mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("job_flags", "words"),
    [
        (("--nodes", "0"), "--nodes: got 0"),
        (("--time", "soon"), "--time: got 'soon'"),
        (("--partition", "a b"), "--partition: got 'a b'"),
        (("--port", "80"), "--port: got 80"),
        (("--nodes", "64"), "--queue-size: got 65536, expected at least the global batch of 131072"),
    ],
)
def test_bad_flags_are_one_line(tmp_path: Path, capsys, job_flags: tuple[str, ...], words: str) -> None:
    code, script = write(tmp_path, *job_flags)
    assert code == 2 and not script.exists()
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_pretrain_flags_are_checked_on_the_login_node(tmp_path: Path, capsys) -> None:
    code, script = write(tmp_path, pretrain=[*FLAGS, "--lr", "0"])
    assert code == 2 and "--lr: got 0.0" in capsys.readouterr().err and not script.exists()


@pytest.mark.parametrize(("time", "minutes"), [("90", 90), ("24:00:00", 1440), ("2-12:00:00", 3600), ("10:30", 11)])
def test_time_limits_in_minutes(time: str, minutes: int) -> None:
    assert launch._minutes(time) == minutes


def stand_ins(tmp_path: Path, torchrun: str) -> dict[str, str]:
    """Programs of a node on a PATH of their own: srun runs its command in place, scontrol keeps a log."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in {
        "srun": 'shift; exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo node0; else echo "$@" >> {tmp_path}/scontrol.log; fi',
        "torchrun": torchrun,
    }.items():
        path = programs / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node0", "SLURM_JOB_NUM_NODES": "1"}
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", **slurm}


def requeued(tmp_path: Path) -> bool:
    log = tmp_path / "scontrol.log"
    return log.exists() and log.read_text() == "requeue 7\n"


def test_the_notice_reaches_torchrun_and_the_job_is_requeued(tmp_path: Path) -> None:
    _, script = write(tmp_path)
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    # Like torchrun: passes the signal on, waits for its ranks to save, and ends with 1 whatever they ended with.
    environment = stand_ins(
        tmp_path, f"trap 'sleep 0.3; touch {saved}; exit 1' USR1; touch {ready}; while :; do sleep 0.1; done"
    )
    job = subprocess.Popen(["bash", str(script)], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        output, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    assert saved.exists() and job.returncode == 0
    assert "stopped with code 1, requeueing" in output and requeued(tmp_path)


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (75, True)])
def test_only_a_stopped_run_is_requeued(tmp_path: Path, code: int, again: bool) -> None:
    _, script = write(tmp_path)
    job = subprocess.run(["bash", str(script)], env=stand_ins(tmp_path, f"exit {code}"), check=False, timeout=60)
    assert job.returncode == (0 if again else code)
    assert requeued(tmp_path) == again


def test_torchrun_gets_its_arguments_whole(tmp_path: Path) -> None:
    _, script = write(tmp_path, "--gpus", "4")
    seen = tmp_path / "arguments"
    subprocess.run(
        ["bash", str(script)], env=stand_ins(tmp_path, f'printf "%s\\n" "$@" > {seen}'), check=True, timeout=60
    )
    arguments = seen.read_text().splitlines()
    assert {"--nnodes=1", "--nproc-per-node=4", "--rdzv-endpoint=node0:29500", "--rdzv-id=7"} <= set(arguments)
    assert arguments[arguments.index("--images") + 1] == "/data/my images"
    assert arguments[-1] == "--resume"


def test_without_slurm_the_script_is_written_and_the_error_says_so(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    code, script = write(tmp_path, "--submit", "sbatch")
    assert code == 2 and script.exists() and "sbatch is not on this machine" in capsys.readouterr().err


def test_sbatch_submits_and_its_refusal_is_passed_on(tmp_path: Path, monkeypatch, capsys) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    sbatch = programs / "sbatch"
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    sbatch.write_text('#!/bin/sh\necho "Submitted batch job 7"\n')
    sbatch.chmod(0o755)
    assert write(tmp_path, "--submit", "sbatch")[0] == 0
    assert "Submitted batch job 7" in capsys.readouterr().out
    sbatch.write_text('#!/bin/sh\necho "invalid partition" >&2\nexit 1\n')
    assert write(tmp_path, "--submit", "sbatch")[0] == 2
    assert "invalid partition" in capsys.readouterr().err


def test_submitit_runs_a_nodes_command(tmp_path: Path, monkeypatch) -> None:
    submitit = pytest.importorskip("submitit")
    _, script = write(tmp_path)
    environment = stand_ins(tmp_path, "exit 75")
    for name in ("PATH", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES"):
        monkeypatch.setenv(name, environment[name])
    assert launch.NodeTask(script)() == 75
    job = launch.job_from_args(launch_args(tmp_path))
    said = launch.submit_with_submitit(script, job, tmp_path / "run", cluster="debug")
    assert "submitted job" in said
    assert isinstance(launch.NodeTask(script).checkpoint(), submitit.helpers.DelayedSubmission)


def launch_args(tmp_path: Path):
    import argparse

    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    return parser.parse_args(["--script", str(tmp_path / "job.sbatch"), "--gpus", "1"])


def test_submitit_without_the_package_is_one_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="submitit is not installed"):
        launch.submit_with_submitit(tmp_path / "job.sbatch", launch.job_from_args(launch_args(tmp_path)), tmp_path)
