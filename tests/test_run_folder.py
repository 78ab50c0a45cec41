"""The folder of a run: its lock, what a killed run left in it, and what else may stand there."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import killed
import pytest

from cast_fast.config import PretrainConfig
from cast_fast.errors import UserError
from cast_fast.files import whole_file
from cast_fast.run_folder import check_run_folder, holds_run, locked_run, require_same_config


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """As a user who may read nothing of ours."""
    if os.geteuid() != 0:
        pytest.skip("needs to be root, to become somebody else")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def begun(run: Path, content: Any) -> None:
    run.mkdir()
    (run / "metrics.csv").write_text("step,loss\n1,2.0\n")
    (run / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_what_a_killed_run_left_half_written_is_removed_by_who_holds_the_lock(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from cast_fast.files import whole_file\n"
        "from cast_fast.run_folder import locked_run\n"
        "run = Path(sys.argv[1])\n"
        "with locked_run(run), whole_file(run / 'config.json') as file:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = tmp_path / "new" / "run"
    assert subprocess.run([sys.executable, "-c", program, run], env=killed.environment()).returncode == -9
    assert len(list(run.glob("*.part"))) == 1
    with whole_file(run / "by another command") as file, locked_run(run):
        file.write(b"!")
    assert {path.name for path in run.iterdir()} == {".lock", "by another command"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[" * 100_000,
        [],
        {"config": {}},
        {"config": [], "starts": []},
        {"config": {}, "starts": {}},
        {"config": {}, "starts": ["x"]},
        {"config": {}, "starts": [{"processes": "2"}]},
        {"config": {}, "starts": [{"batch_norm_groups": 0}]},
    ],
    ids=["empty", "deep", "list", "no-starts", "config", "starts", "start", "processes", "groups"],
)
def test_a_damaged_record_is_a_users_error(tmp_path: Path, content: Any) -> None:
    begun(tmp_path / "run", content)
    with pytest.raises(UserError, match=r"cannot read .*config\.json.*move it away to go by the checkpoints alone"):
        check_run_folder(tmp_path / "run", PretrainConfig(resume=True), 1)


@pytest.mark.parametrize("settings", [{"lr": "x"}, {"batch": [1]}, {"images": 5}])
def test_settings_of_other_kinds_are_a_users_error(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--resume: run/config\.json holds no settings"):
        require_same_config(settings, {}, PretrainConfig(), 1, "run/config.json")


def test_a_folder_that_may_not_be_read_is_a_users_error(tmp_path: Path) -> None:
    begun(tmp_path / "run", {"config": {}, "starts": []})
    assert holds_run(tmp_path / "run")
    tmp_path.chmod(0o700)
    with nobody(), pytest.raises(UserError, match=r"--out: cannot read .*run: Permission denied"):
        check_run_folder(tmp_path / "run", PretrainConfig(resume=True), 1)
