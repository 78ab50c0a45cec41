"""Work in child processes: results in order, and what a killed, interrupted or orphaned process leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import killed
import numpy as np
import pytest

from cast_fast import cli
from cast_fast.data import children, synthetic
from cast_fast.data.children import Child, ChildCrash, in_children
from cast_fast.errors import UserError

PROGRAM = """
import json, os, signal, sys
sys.path[:] = {path!r}
from cast_fast.data.children import serve
def answer(request, notes):
    if request == "pid":
        return json.dumps(os.getpid()).encode() + b"\\n"
    if isinstance(request, str):
        os.kill(os.getpid(), getattr(signal, request))
    return json.dumps(2 * request).encode() + b"\\n"
serve(answer)
"""


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children double numbers, say who they are, and end themselves by the signal that is asked for."""

    def start(module: str) -> subprocess.Popen[bytes]:
        assert module == "doubling"
        program = PROGRAM.format(path=sys.path)
        return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(children, "start_child", start)


def ask(child: Child, request: Any) -> Any:
    return child.ask(request, lambda line, _: json.loads(line))


def ends(process: int) -> bool:
    """Whether a process is gone within a minute."""
    for _ in range(600):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)
                continue
        return True
    return False


def children_of(process: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize(("count", "workers"), [(0, 2), (1, None), (40, 3)])
def test_results_come_in_order_and_nobody_is_left(doubling: None, count: int, workers: int | None) -> None:
    before = children_of(os.getpid())
    assert list(in_children("doubling", ask, list(range(count)), workers)) == [2 * item for item in range(count)]
    assert set(children_of(os.getpid())) <= set(before)


def test_closing_early_ends_the_children(doubling: None) -> None:
    results = in_children("doubling", ask, ["pid"] * 100, 2)
    process = next(results)
    results.close()
    assert ends(process)


def test_a_crash_is_the_requests_fault_and_the_next_one_gets_a_new_process(doubling: None) -> None:
    child = Child("doubling")
    try:
        first = ask(child, "pid")
        with pytest.raises(ChildCrash, match="code -11"):
            ask(child, "SIGSEGV")
        assert ask(child, "pid") != first
    finally:
        child.close()


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("answered", [False, True])
def test_a_signal_from_outside_is_no_fault_of_the_request(doubling: None, signal_name: str, answered: bool) -> None:
    """As the system's out-of-memory killer sends it, or a scheduler."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup children would inherit that it is ignored
    child = Child("doubling")
    try:
        assert not answered or ask(child, 1) == 2
        with pytest.raises(UserError, match=f"ended by {signal_name}, as happens when memory runs out.*fewer --work"):
            ask(child, signal_name)
    finally:
        child.close()
        signal.signal(signal.SIGHUP, before)


def test_no_intact_file_is_remembered_as_faulty_because_a_decoder_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = tmp_path / "images"
    images.mkdir()
    for name in "abc":
        assert cv2.imwrite(str(images / f"{name}.jpg"), np.zeros((32, 32, 3), np.uint8))
    start, started = children.start_child, []

    def killed_at_once(module: str) -> subprocess.Popen[bytes]:
        process = start(module)
        if not started:
            process.kill()
            process.wait()
        started.append(process)
        return process

    monkeypatch.setattr(children, "start_child", killed_at_once)
    assert cli.main(["validate", "--images", str(images), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert "ended by SIGKILL" in error and error.count("\n") == 1
    assert cli.main(["validate", "--images", str(images), "--workers", "1"]) == 0
    assert "3 intact images" in capsys.readouterr().out


def test_nothing_in_the_current_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((32, 32, 3), np.uint8))
    for name in ("cv2", "json", "runpy"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')\nraise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["validate", "--images", ".", "--workers", "1"]) == 0
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def drawing(tmp_path: Path) -> Any:
    """``demo-data`` at work with two children: its process, its children, its folder."""
    out = tmp_path / "made"
    command = [sys.executable, "-m", "cast_fast", "demo-data", out, "--count", "30", "--size", "320x240"]
    command += ["--workers", "2"]
    process = subprocess.Popen(command, env=killed.environment(), stderr=subprocess.PIPE, start_new_session=True)
    workers: list[int] = []
    while len(workers) < 2 and process.poll() is None:
        workers = children_of(process.pid)
        time.sleep(0.01)
    yield process, workers, out
    process.kill()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()


def test_interrupting_says_nothing_even_while_children_start(drawing: Any) -> None:
    """Ctrl-C reaches the whole group of processes."""
    process, workers, _ = drawing
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate()[1] == b"" and process.returncode == 130
    assert all(map(ends, workers))


def test_children_do_not_outlive_a_killed_parent_and_what_they_left_is_completed(drawing: Any, tmp_path: Path) -> None:
    process, workers, out = drawing
    while process.poll() is None and not list(out.glob("images/*.jpg")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert all(map(ends, workers))
    (out / "images" / ".cast-fast-0.part").write_bytes(b"of a child that was killed as well")
    next(out.glob("images/*.jpg")).write_bytes(b"")  # as after a power failure
    synthetic.write_dataset(out, 30, 0, size=(320, 240), workers=2)
    synthetic.write_dataset(tmp_path / "whole", 30, 0, size=(320, 240), workers=2)
    made = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.*") if path.suffix != ".lock"}
    for name, content in made.items():
        assert content == (tmp_path / "whole" / name).read_bytes()
    assert len(made) == 63


def test_a_killed_child_of_demo_data_is_one_line(drawing: Any) -> None:
    process, workers, _ = drawing
    os.kill(workers[0], signal.SIGKILL)
    error = process.communicate()[1].decode()
    assert process.returncode == 2 and error.count("\n") == 1 and "ended by SIGKILL" in error
