"""The command line's promises: one line and exit code 2 for a user's error, lazy imports, help."""

from __future__ import annotations

import logging
import subprocess
import sys
import types
from collections.abc import Iterator

import pytest

from cast_fast import cli
from cast_fast.errors import UserError


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


def test_unknown_command_is_one_line_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretran"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "did you mean 'pretrain'" in error


def install(monkeypatch: pytest.MonkeyPatch, main) -> None:
    module = types.ModuleType("probe_command")
    module.add_arguments = lambda parser: parser.add_argument("--number", type=int)  # type: ignore[attr-defined]
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "probe_command", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_command", "a command for this test"))


def test_user_error_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise UserError("--number: got 1,\nexpected 2")

    install(monkeypatch, fail)
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "cast-fast: error: --number: got 1, expected 2\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise RuntimeError("a bug")

    install(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["probe"])


@pytest.fixture
def levels() -> Iterator[None]:
    """The logger as it was, whatever the command line does to it."""
    logger = logging.getLogger("cast_fast")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("levels")
def test_the_environment_sets_the_log_level_of_this_package_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, lambda args: 0)
    root = logging.getLogger().level
    monkeypatch.setenv("CAST_FAST_LOG", "debug")
    assert cli.main(["probe"]) == 0
    assert logging.getLogger("cast_fast").level == logging.DEBUG and logging.getLogger().level == root
    monkeypatch.setenv("CAST_FAST_LOG", "loud")
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err.startswith("cast-fast: error: CAST_FAST_LOG: got LOUD, expected DEBUG")


def test_bad_flag_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(monkeypatch, lambda args: 0)
    with pytest.raises(SystemExit) as caught:
        cli.main(["probe", "--number", "many"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--number" in error


def test_help_imports_neither_torch_nor_dali() -> None:
    code = "import sys, cast_fast.cli as c; c.main(['--help']); assert not {'torch', 'nvidia.dali'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: cast-fast {name}")
    assert "default: None" not in text
