"""The phases of ``gpu_check.sh``: order, time limits, what a second call does; with a stand-in for Python."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ladder import COMPILED

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_check.sh"

STAND_IN = """#!/usr/bin/env bash
# Answers as an interpreter with torch and a GPU would; what a script does is told by files in $PLAY.
case "$*" in
  *"importlib.import_module"*) cat "$PLAY/absent"; exit 0 ;;
  "-c "*) exit 0 ;;
  *"--largest-batch"*) echo 480; exit 0 ;;
  *report.py*) touch "$2/report.md"; exit 0 ;;
  "-m pip"*) exit 0 ;;
esac
echo "$*" >>"$PLAY/calls"
for arg in "$@"; do out=$arg; done
for rule in "$PLAY"/rule-*; do
  [[ -f $rule && "$*" == *"${rule#"$PLAY"/rule-}"* ]] && { source "$rule"; }
done
exit 0
"""


class Bench:
    """A folder for the results and a stand-in interpreter."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "out"
        self.python = root / "python"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)
        self.lacks("nvidia.dali")

    def lacks(self, *modules: str) -> None:
        """The modules that the stand-in cannot import."""
        (self.root / "absent").write_text("".join(f"{name}\n" for name in modules))

    def rule(self, script: str, does: str) -> None:
        """What a script does when the stand-in is asked to run it; nothing for the empty text."""
        path = self.root / f"rule-{script}"
        path.unlink(missing_ok=True)
        if does:
            path.write_text(does)

    def call(self, *flags: str, seconds: int = 530) -> subprocess.CompletedProcess[str]:
        names = {"PYTHON": str(self.python), "PLAY": str(self.root), "GPU_CHECK_SECONDS": str(seconds)}
        (self.root / "calls").write_text("")
        # The tool directory first, so that a sanitizer of this machine is not run.
        path = f"{self.root}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            [str(SCRIPT), str(self.out), *flags],
            env={**os.environ, **names, "PATH": path},
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[str]:
        return (self.root / "calls").read_text().splitlines()

    def status(self, phase: str) -> str:
        path = self.out / phase / "status"
        return path.read_text().splitlines()[0] if path.is_file() else ""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_dry_run_lists_the_phases_and_leaves_no_trace(bench: Bench) -> None:
    done = bench.call("--dry-run")
    assert done.returncode == 0
    phases = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert phases[:4] == ["environment", "ladder-256", "tests", "kernels"]
    ladders = {"ladder-64", "ladder-128", "ladder-512"}
    others = {"memcheck", "racecheck", "profile", "profile-streaming", "memory", "end-to-end", "loader"}
    assert ladders | others < {*phases}
    assert not bench.out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run([str(SCRIPT), str(tmp_path / "out")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "CUDA" in done.stderr or "torch" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["again"], "one OUTDIR"),
        (["--only", "everything"], "expected one of environment"),
        (["--redo"], "expected a phase"),
        (["--fast"], "unknown flag --fast"),
    ],
)
def test_wrong_use(bench: Bench, flags: list[str], message: str) -> None:
    done = bench.call(*flags)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_package_of_every_phase_is_asked_for_at_once(bench: Bench) -> None:
    bench.lacks("rich", "matplotlib", "cv2")
    done = bench.call()
    assert done.returncode == 2
    assert "lacks rich matplotlib, which every phase needs" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not bench.out.exists()


def test_phases_without_their_packages_say_so_and_the_others_run(bench: Bench) -> None:
    bench.lacks("hypothesis", "cv2")
    done = bench.call("--only", "tests", "--only", "ladder-256", "--only", "loader")
    assert done.returncode == 0, done.stdout + done.stderr
    assert bench.status("tests") == "skipped: not installed: hypothesis cv2"
    assert bench.status("ladder-256") == "ok"
    assert bench.status("loader") == "skipped: not installed: cv2"
    assert bench.calls and all("throughput.py" in call for call in bench.calls)


def test_lines_are_compiled_side_by_side_before_they_are_measured(bench: Bench) -> None:
    assert bench.call("--only", "ladder-64").returncode == 0
    *ahead, ladder = bench.calls
    assert "--compile-only" not in ladder and "--batch 64" in ladder
    lines = ladder.split("--variants ")[1].split()[0].split(",")
    assert sorted(call.split("--variants ")[1].split()[0] for call in ahead) == sorted({*lines} & {*COMPILED})
    assert all("--compile-only" in call and "--batch 64" in call for call in ahead)


def test_what_cannot_be_compiled_ahead_is_measured_all_the_same(bench: Bench) -> None:
    bench.rule("compile-only", "exit 1")
    done = bench.call("--only", "ladder-64")
    assert done.returncode == 0
    assert bench.status("ladder-64") == "ok"
    assert "not every line could be compiled ahead" in (bench.out / "ladder-64" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("seconds", "status"), [(200, ""), (530, "failed: over its limit of 300 s; what it wrote before is kept")]
)
def test_a_ladder_without_all_its_lines_is_made_again(bench: Bench, seconds: int, status: str) -> None:
    bench.rule("throughput.py", 'echo "moco: not measured: out of time"')
    done = bench.call("--only", "ladder-64", seconds=seconds)
    assert bench.status("ladder-64") == status
    assert done.returncode == (1 if status else 75)


def test_pytest_is_interrupted_in_time_to_report(bench: Bench) -> None:
    stub = bench.root / "timeout"
    stub.write_text(
        '#!/usr/bin/env bash\necho "timeout $*" >>"$PLAY/calls"\nuntil [[ $1 != -* ]]; do shift; done; exec "${@:2}"\n'
    )
    stub.chmod(0o755)
    bench.call("--only", "tests")
    outer, inner = (call.split() for call in bench.calls if call.startswith("timeout"))
    # In the group of the outer one, whose TERM it must get; pytest has half a minute for what it has to say.
    assert inner[1:4] == ["--foreground", "--signal=INT", "270"]
    assert outer[1:4] == ["--signal=TERM", "--kill-after=10", "300"]


@pytest.mark.parametrize("failing", ["", "build", "pytest"])
def test_tests_that_need_dali_run_whether_or_not_the_operator_is_built(bench: Bench, failing: str) -> None:
    bench.lacks()
    bench.rule(failing or "nothing", "exit 1")
    bench.call("--only", "native")
    build, tests = bench.calls
    assert "build --cuda on" in build
    files = {Path(word) for word in tests.split() if word.startswith("tests/")}
    assert {Path("tests/test_dali_loader.py"), Path("tests/test_dali_plugin.py")} < files
    assert all((SCRIPT.parent.parent / path).is_file() for path in files)
    assert bench.status("native") == ("failed: exit code 1" if failing else "ok")


def test_the_loaders_pictures_are_not_packed(bench: Bench) -> None:
    bench.lacks()
    folders = " ".join(f"$out/{name}/images" for name in ("scenes-4-0", "packed-0", "tiny-32"))
    made = f"touch $out/loader.png; for each in {folders}; do mkdir -p $each; touch $each/0; done"
    bench.rule("loader.py", made)
    bench.call("--only", "loader")
    with tarfile.open(bench.out / "gpu_check.tar.gz") as archive:
        names = archive.getnames()
    assert "./loader/loader.png" in names
    assert not [name for name in names if "images" in name]


def test_tests_of_missing_extras_are_left_out(bench: Bench) -> None:
    bench.call("--only", "tests")
    assert "--ignore" not in bench.calls[-1]
    bench.lacks("timm")
    bench.call("--only", "tests", "--redo", "tests")
    ignored = {Path(word) for word in bench.calls[-1].split() if word.startswith("tests/")}
    assert Path("tests/test_export.py") in ignored
    assert all((SCRIPT.parent.parent / path).is_file() for path in ignored)


def test_the_packages_of_this_interpreter_are_really_tried(tmp_path: Path) -> None:
    """The probe itself, with a package that is there but does not import."""
    (tmp_path / "rich.py").write_text("raise OSError('a shared library is missing')")
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: True)\n")
    for name in ("triton", "torchvision", "PIL", "numpy", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("print('PIL')")
    done = subprocess.run(
        [str(SCRIPT), str(tmp_path / "out")],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "lacks rich, which" in done.stderr


def test_all_phases_then_nothing_is_done_twice(bench: Bench) -> None:
    (bench.root / "compute-sanitizer").write_text('#!/usr/bin/env bash\nexec "$PYTHON" "${@: -1}"\n')
    (bench.root / "compute-sanitizer").chmod(0o755)
    done = bench.call()
    calls = bench.calls
    assert done.returncode == 0, done.stdout + done.stderr
    phases = [line.split()[0] for line in bench.call("--dry-run").stdout.splitlines()[1:]]
    assert all(bench.status(name) for name in phases)
    assert bench.status("loader") == "skipped: not installed: nvidia.dali"
    ladders = [call for call in calls if "throughput.py" in call and "--compile-only" not in call]
    assert [call.split("--batch ")[1].split()[0] for call in ladders] == ["256", "64", "480", "512", "128"]
    assert sum("sanitizer_cases.py" in call for call in calls) == 2
    assert (bench.out / "report.md").exists()
    with tarfile.open(bench.out / "gpu_check.tar.gz") as archive:
        assert "./ladder-256/status" in archive.getnames()

    again = bench.call()
    assert again.returncode == 0
    assert bench.calls == []
    skipped = {"end-to-end", "native", "loader"}
    assert again.stdout.count("ended in an earlier call") == len(phases) - len(skipped)
    bench.lacks()
    assert bench.call().returncode == 0
    assert {bench.status(phase) for phase in skipped} == {"ok"}
    assert not any("sanitizer" in call or "profile" in call for call in bench.calls)


def test_a_failed_phase_does_not_stop_the_others_and_is_repeated_on_demand(bench: Bench) -> None:
    bench.rule("junit.xml", "exit 1")
    done = bench.call("--only", "tests", "--only", "kernels")
    assert done.returncode == 1
    assert "tests: failed: exit code 1, 0 s (--redo tests runs it again)" in done.stdout
    assert bench.status("tests") == "failed: exit code 1"
    assert bench.status("kernels") == "ok"
    bench.rule("junit.xml", "")
    assert bench.call("--only", "tests").returncode == 1
    assert bench.call("--only", "tests", "--redo", "tests").returncode == 0
    assert bench.status("tests") == "ok"


def test_the_next_call_goes_on_where_time_ran_out(bench: Bench) -> None:
    bench.rule("kernels.py", "exit 124")  # what timeout says; the phase had less than its limit of 300 s
    done = bench.call("--only", "environment", "--only", "kernels", "--only", "ladder-256", seconds=170)
    assert done.returncode == 75
    assert bench.status("environment") == "ok"
    assert "kernels: cut off" in done.stdout
    assert "ladder-256: left for the next call" in done.stdout
    assert "call again with the same OUTDIR" in done.stdout
    bench.rule("kernels.py", "")
    again = bench.call("--only", "environment", "--only", "kernels", "--only", "ladder-256")
    assert again.returncode == 0
    assert not any("ceilings.py" in call for call in bench.calls)
    assert [bench.status(name) for name in ("kernels", "ladder-256")] == ["ok", "ok"]


def test_a_phase_over_its_own_limit_has_failed(bench: Bench) -> None:
    bench.rule("kernels.py", "exit 124")
    assert bench.call("--only", "kernels").returncode == 1
    assert bench.status("kernels") == "failed: over its limit of 300 s; what it wrote before is kept"


def _wait_until(happened: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["kernels.py", "compile-only"])
def test_an_interrupted_call_ends_its_phase_and_keeps_what_there_is(
    bench: Bench, number: signal.Signals, where: str
) -> None:
    """Also while lines are compiled ahead, in a process group of their own: nothing is left running."""
    play = bench.root
    phase = "kernels" if where == "kernels.py" else "ladder-64"
    ends = f"sleep 0.5; touch {play}/ended-$$ $PLAY/out/{phase}/last.txt; exit 143"
    bench.rule(where, f"trap '{ends}' TERM; touch {play}/began-$$; sleep 60 & wait $!")
    env = {**os.environ, "PYTHON": str(bench.python), "PLAY": str(play)}
    flags = [str(SCRIPT), str(bench.out), "--only", "environment", "--only", phase, "--only", "pointwise"]
    # A job that a shell put in the background inherits SIGINT ignored, and so would the script.
    script = subprocess.Popen(
        flags,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    try:
        _wait_until(lambda: any(play.glob("began-*")))
        script.send_signal(number)
        out, _ = script.communicate(timeout=30)
    finally:
        script.kill()
    assert script.returncode == 130, out
    assert f"{phase}: interrupted" in out
    began = {path.name.removeprefix("began-") for path in play.glob("began-*")}
    ended = {path.name.removeprefix("ended-") for path in play.glob("ended-*")}
    assert set() != began <= ended  # one that was told before it could say that it began has only ended
    assert [bench.status(name) for name in ("environment", phase, "pointwise")] == ["ok", "", ""]
    assert not (bench.out / "pointwise").exists()
    assert (bench.out / "report.md").exists()
    with tarfile.open(bench.out / "gpu_check.tar.gz") as archive:
        assert {f"./{phase}/log.txt", f"./{phase}/last.txt"} < {*archive.getnames()}
    bench.rule(where, "")
    assert bench.call("--only", phase).returncode == 0
    assert bench.status(phase) == "ok"


def test_the_archive_is_made_after_each_phase(bench: Bench) -> None:
    bench.rule("kernels.py", "cp $PLAY/out/gpu_check.tar.gz $PLAY/earlier.tar.gz")
    bench.call("--only", "environment", "--only", "kernels")
    with tarfile.open(bench.root / "earlier.tar.gz") as archive:
        assert "./environment/status" in archive.getnames()
    assert not list(bench.out.glob("*.part"))


def test_sigint_reaches_what_a_phase_runs(bench: Bench) -> None:
    """What a script runs in the background ignores SIGINT, unless it is told not to; pytest is ended by it."""
    bench.rule("junit.xml", "kill -INT $$; touch $PLAY/survived")
    bench.call("--only", "tests")
    assert not (bench.root / "survived").exists()
    assert bench.status("tests").startswith("failed")


def test_the_state_of_the_gpu_is_kept_around_a_phase(bench: Bench) -> None:
    tool = bench.root / "nvidia-smi"
    tool.write_text('#!/usr/bin/env bash\n[[ $* == *--query-gpu* ]] && echo "now, 12 MiB, 0 %, 1980 MHz, 40, 70 W"\n')
    tool.chmod(0o755)
    for _ in range(2):  # a phase that is done again begins anew
        bench.call("--only", "kernels", "--redo", "kernels")
        assert (bench.out / "kernels" / "gpu.csv").read_text() == "now, 12 MiB, 0 %, 1980 MHz, 40, 70 W\n" * 2


@pytest.mark.parametrize("ends", ["sleep 0.5; touch $PLAY/ended; exit 143", ""])
def test_what_is_over_time_is_gone_when_the_next_phase_begins(bench: Bench, ends: str) -> None:
    """Also what takes its time to write what it has, and what does not end by itself, as a kernel that hangs."""
    real = shutil.which("timeout")
    stub = bench.root / "timeout"
    stub.write_text(f'#!/usr/bin/env bash\nexec {real} "$1" --kill-after=1 1 "${{@:4}}"\n')
    stub.chmod(0o755)
    bench.rule("ceilings.py", f"trap '{ends}' TERM; echo $$ >$PLAY/process; sleep 60 & wait $!; wait $!")
    # A dead process may still be listed, where nobody asks for its exit code.
    bench.rule("kernels.py", "grep -q '^State:.[^ZX]' /proc/$(<$PLAY/process)/status && touch $PLAY/beside")
    done = bench.call("--only", "environment", "--only", "kernels")
    assert bench.status("environment") == "failed: over its limit of 90 s; what it wrote before is kept"
    assert bench.status("kernels") == "ok", done.stdout
    assert (bench.root / "ended").exists() == bool(ends)
    assert not (bench.root / "beside").exists()
