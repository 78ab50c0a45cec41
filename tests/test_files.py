"""Files whole or absent, results complete or not there: also where the disk is full."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import killed
import numpy as np
import pytest
import torchvision
from full_disk import full_disk
from PIL import Image

from cast_fast import cli
from cast_fast.errors import UserError
from cast_fast.export import save_safetensors
from cast_fast.files import Results, claimed, remove_parts, whole_file, write_whole


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "old")
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        write_whole(tmp_path / "a", bytes(2000))
    assert contents(tmp_path) == {"a": b"old"}
    write_whole(tmp_path / "a", "é")
    assert contents(tmp_path) == {"a": b"\xc3\xa9"}


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: before.append((tmp_path / "a").exists()))
    write_whole(tmp_path / "a", "quick")
    assert before == []
    (tmp_path / "a").unlink()
    write_whole(tmp_path / "a", "sure", durable=True)
    assert before == [False, True]  # the file, then the folder with its name
    assert contents(tmp_path) == {"a": b"sure"}


def test_a_killed_write_leaves_a_part_that_the_next_one_clears(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    for ends, parts in ("before its name", 1), ("while it is written", 1), ("after it has its name", 0):
        program = (
            "import os, signal, sys\n"
            "from pathlib import Path\n"
            "from cast_fast.files import whole_file\n"
            "rename = os.replace\n"
            "def die(*paths):\n"
            f"    if {ends!r} != 'before its name': rename(*paths)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "os.replace = die\n"
            "with whole_file(Path(sys.argv[1])) as file:\n"
            "    file.write(b'new' * 10000)\n"
            f"    if {ends!r} == 'while it is written': os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "a")]
        assert subprocess.run(command, env=killed.environment()).returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob(".cast-fast-*.part"))) == parts
        assert (tmp_path / "a").read_bytes() == (b"old" if parts else b"new" * 10000)
        (tmp_path / "mine.part").write_text("somebody's")
        remove_parts(tmp_path)
        assert contents(tmp_path).keys() == {"a", "mine.part"}


def test_parts_being_written_stay(tmp_path: Path) -> None:
    with Results(tmp_path) as files, whole_file(tmp_path / "a") as file:
        files.write("b", "b")
        file.write(b"a")
        remove_parts(tmp_path)
        with Results(tmp_path) as more:
            more.write("c", "c")
    assert contents(tmp_path) == {"a": b"a", "b": b"b", "c": b"c"}


def test_results_of_a_killed_call_are_cleared_by_the_next(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from cast_fast.files import Results\n"
        "with Results(Path(sys.argv[1])) as files:\n"
        "    files.write('model/weights', bytes(1000))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.run(command, env=killed.environment()).returncode == -signal.SIGKILL
    assert [path.stat().st_size for path in tmp_path.rglob("weights")] == [1000]
    with Results(tmp_path) as files:
        files.write("table.csv", "1")
    assert contents(tmp_path) == {"table.csv": b"1"}


def test_results_that_cannot_all_move_do_not_move_at_all(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "c").write_text("a file, where a folder comes")
    for name in ("b", "c/d"):

        def write(name: str = name) -> None:
            with Results(tmp_path) as files:
                files.write("a", "new")
                files.write(name, "new")

        with pytest.raises(UserError, match="no result of this call is kept"):
            write()
        assert {path.name for path in tmp_path.iterdir()} == {"b", "c"}


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    write_whole(tmp_path / ("n" * 255), "content")
    assert contents(tmp_path) == {"n" * 255: b"content"}


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for target in ("there/old", "there/new"):
        (tmp_path / "link").symlink_to(target)
        (tmp_path / "there/old").write_text("old")
        write_whole(tmp_path / "link", "content")
        assert (tmp_path / "link").is_symlink() and (tmp_path / target).read_text() == "content"
        (tmp_path / "link").unlink()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(tmp_path / "pipe", "content")
        assert os.read(reader, 100) == b"content" and (tmp_path / "pipe").is_fifo()
    finally:
        os.close(reader)


def test_a_file_system_without_locks_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", none)
    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / ".cast-fast-0.part").write_text("whose?")
    with claimed(tmp_path, "record.json", "test"):
        write_whole(tmp_path / "record.json", "{}")
    assert "Function not implemented" in caplog.text and "no other process writes there" in caplog.text
    assert contents(tmp_path) == {".cast-fast-0.part": b"whose?", ".cast-fast.lock": b"", "record.json": b"{}"}


def test_results_come_together(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with Results(out) as files:
        staged = files.write("table.csv", "1\n")
        files.write("model/weights", b"2")
        assert staged.read_text() == "1\n"
        assert not (out / "table.csv").exists()
    assert contents(out) == {"table.csv": b"1\n", "model/weights": b"2"}
    assert files.written == [out / "table.csv", out / "model" / "weights"]
    with Results(out) as files:
        files.write("model/more", "3")
        files.write("table.csv", "4\n")
    assert contents(out) == {"table.csv": b"4\n", "model/weights": b"2", "model/more": b"3"}


@pytest.mark.parametrize("how", ["disk", "error", "interrupt"])
def test_results_that_fail_leave_what_was_there(how: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("earlier")
    error = {"disk": UserError, "error": ValueError, "interrupt": KeyboardInterrupt}[how]

    def fail() -> None:
        with Results(tmp_path) as files:
            files.write("table.csv", "later")
            if how == "disk":
                files.write("picture.png", bytes(2000))
            raise error

    with full_disk(1000), pytest.raises(error) as caught:
        fail()
    if how == "disk":
        expected = f"--out: cannot write into {tmp_path} (File too large); no result of this call is kept"
        assert str(caught.value) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert contents(tmp_path) == {"table.csv": b"earlier"}


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"--out: cannot write into .*file/out \(Not a directory\)"),
        Results(tmp_path / "file" / "out"),
    ):
        pass


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled pictures with maps, an encoder and a classifier of them."""
    root = tmp_path_factory.mktemp("setting")
    rng = np.random.default_rng(0)
    for name in ("images", "saliency"):
        (root / name).mkdir()
    rows = ["stem,class"]
    for number in range(8):
        mask = np.zeros((72, 96), np.uint8)
        mask[20:50, 30:70] = 255
        Image.fromarray(rng.integers(0, 256, (72, 96, 3), np.uint8)).save(root / "images" / f"p{number}.png")
        Image.fromarray(mask).save(root / "saliency" / f"p{number}.png")
        rows.append(f"p{number},{'ab'[number % 2]}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    network = torchvision.models.resnet18(num_classes=2)
    state = network.state_dict()
    save_safetensors(state, root / "classifier.safetensors", {"arch": "resnet18", "classes": ["a", "b"], "name": "c"})
    trunk = {name: value for name, value in state.items() if not name.startswith("fc.")}
    save_safetensors(trunk, root / "encoder.safetensors", {"arch": "resnet18", "name": "e"})
    return root


DATA = ["--images", "images", "--saliency", "saliency"]
LABELLED = [*DATA, "--labels", "labels.csv"]
SMALL = ["--size", "32", "--resamples", "20", "--device", "cpu"]
COMMANDS = {
    "grounding": (["encoder.safetensors", *DATA, *SMALL], 20_000),
    "probe": (["encoder.safetensors", *LABELLED, *SMALL, "--epochs", "2", "--no-cache"], 1_000_000),
    "downstream": (["classifier.safetensors", "classifier.safetensors", *LABELLED, *SMALL], 5_000),
    "backgrounds": (["classifier.safetensors", "set", "--resamples", "20", "--device", "cpu"], 5_000),
    "backgrounds-make": ([*LABELLED, "--size", "64"], 20_000),
    "export": (["encoder.safetensors", "--format", "timm"], 1_000_000),
    "crops": ([*DATA], 20_000),
}
"""What is called, and a size between those of the files that it writes."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_a_line_and_leaves_nothing(
    command: str, setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(setting)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if command == "backgrounds" and not (setting / "set").exists():
        assert cli.main(["backgrounds-make", *LABELLED, "--size", "64", "--out", "set"]) == 0
    flags, limit = COMMANDS[command]
    out = tmp_path / ("out/sheet.png" if command == "crops" else "out")
    with full_disk(limit):
        assert cli.main([command, *flags, "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("cast-fast: error: --out: cannot write") and "File too large" in error
    assert contents(tmp_path / "out") == {}
    assert cli.main([command, *flags, "--out", str(out)]) == 0  # with room it is the same call
    assert max(len(content) for content in contents(tmp_path / "out").values()) > limit


def test_features_that_cannot_be_kept_cost_nothing_but_time(
    setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(setting)
    (tmp_path / "cache").write_text("a file, where a folder is wanted")
    flags = ["encoder.safetensors", *LABELLED, *SMALL, "--epochs", "2", "--cache", str(tmp_path / "cache")]
    assert cli.main(["probe", *flags, "--out", str(tmp_path / "out")]) == 0
    assert "features are not kept: cannot write" in caplog.text
