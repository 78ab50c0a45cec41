"""What every benchmark of this project shares: honest timing, records, the table and the chart.

A script in this folder reads::

    import harness

    device = harness.choose_device("auto")                   # UserError for cuda where there is none
    env = harness.environment(device)
    results = harness.open_results(out, env)                 # UserError where the folder cannot be written
    lines = {"eager": lambda: partial(eager, x), "fused": lambda: partial(fused, x)}
    shape = {"batch": 256, "channels": 2048}

    def on_line(name: str, outcome: harness.Outcome) -> None:   # after a line's first turn, and when the line ends
        results.add(results.record("gradcam_cosine", name, outcome, dtype="bf16", shape=shape, bytes=nbytes))

    outcomes = harness.interleave(lines, device=device, repeats=20, on_line=on_line, on_sample=results.sample)
    harness.print_table("gradcam_cosine", ["variant", "µs"], rows)
    harness.bar_chart(out / "gradcam_cosine.png", [harness.Bar("eager", 12.0)], title="…", xlabel="µs")

The pieces:

``choose_device(name)``
    The device of ``--device auto|cpu|cuda``.
``environment(device)``
    Device name, versions, git commit (``-dirty`` when tracked files differ), date in UTC.
``interleave(lines, device=…, repeats=…, warmup=…, calls=…, settle=…, prepare=…, deadline=…, …)``
    Builds and warms up each line and measures a first turn at once, so that a run that is cut off while a later line
    compiles keeps what it has; then round by round (A B C, A B C, …), so that a drift of the clock or a neighbour's
    load falls on all lines alike. A line that took part in a round is judged by its rounds alone. CUDA events on a
    GPU, ``time.perf_counter`` on a CPU. A line that raises becomes a ``Failure`` with its reason and the others go on.
``Measurement`` / ``Failure``
    A line's outcome: seconds of every call, the rounds they are from and peak memory, or the reason why there are none.
``speed_ratio(first, second)``
    How many times as fast one line is as another, by the rounds that both took.
``Record``
    One JSON line with the fields of the project's contract, and ``rounds``. ``value``, ``p20``, ``p50`` and ``p80`` are
    in ``unit``; ``value`` is the median. For a rate ``p20`` is the slower end.
``Results``
    Writes records to ``results.jsonl`` at once (flushed and synced), raw seconds to ``samples.jsonl``. ``keep()``
    appends a run's records to ``benchmarks/results/DEVICE/DATE_SHA.jsonl``.
``print_table`` / ``bar_chart`` / ``decimals``
    The table on the terminal, a chart as PNG, and numbers as both show them.

Lines are *factories*: each is called once and returns the function to time. What is built stays alive until
``interleave`` ends, so the factories of one call must fit the device side by side without their temporaries.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cast_fast.errors import UserError
from cast_fast.files import whole_file

ROOT = Path(__file__).resolve().parent.parent

Line = Callable[[], Callable[[], object]]
"""A factory: called once, returns the function that is timed."""

_DISTRIBUTIONS = {
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "triton": ("triton",),
    "dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "numpy": ("numpy",),
    "cast_fast": ("cast-fast",),
}


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), linear between order statistics (Hyndman and Fan's type 7, NumPy's default)."""
    if not values:
        raise ValueError("percentile of no values: expected at least one")
    if not 0 <= q <= 100:
        raise ValueError(f"q: got {q}, expected 0 to 100")
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def choose_device(name: str) -> torch.device:
    """The device of ``--device auto | cpu | cuda``; ``auto`` takes CUDA where torch finds it.

    Raises:
        UserError: ``cuda`` without a CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: got cuda, but torch finds no CUDA device")
    return torch.device(name)


@dataclass(frozen=True)
class Environment:
    """Where and with what a run was made."""

    device: str
    """Name of the device as its maker spells it."""
    versions: dict[str, str | None]
    """Version of each package and driver; None where it is absent."""
    commit: str
    """Short git commit, with ``-dirty`` when tracked files differ from it; ``unknown`` outside a checkout."""
    date: str
    """ISO 8601, UTC."""
    details: dict[str, Any] = field(default_factory=dict)
    """Host facts that explain a number: threads, memory, compute capability, load before the run."""


def environment(device: torch.device) -> Environment:
    """Describe this machine, these packages and this commit."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name, distributions in _DISTRIBUTIONS.items():
        versions[name] = _first_version(distributions)
    versions["torch"] = torch.__version__
    versions["cuda"] = torch.version.cuda if torch.cuda.is_available() else None
    details: dict[str, Any] = {
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        # Processes that wanted a core in the minute before, this one hardly among them.
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        # What float32 means in this run: on CUDA torch lets convolutions use TF32 unless it is told otherwise.
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        versions["cudnn"] = str(torch.backends.cudnn.version())
        versions["driver"] = _driver_version()
        details |= {
            "gpu_memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
        }
    else:
        threads = torch.get_num_threads()
        name = f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return Environment(name, versions, git_commit(), _utc_now(), details)


def float32_note(env: Environment) -> str:
    """What float32 means on a CUDA device in this run, in words."""
    convolutions, products = (
        "in TF32 where cuDNN chooses so" if env.details["cudnn_allow_tf32"] else "in full",
        "in TF32" if env.details["matmul_allow_tf32"] else "in full",
    )
    search = "searches" if env.details["cudnn_benchmark"] else "does not search"
    return f"float32: convolutions {convolutions}, matrix products {products}; cuDNN {search} for algorithms"


def load_note(env: Environment) -> list[str]:
    """A warning where other processes kept a quarter of the cores busy when the run began."""
    load, cpus = env.details["load_average"], env.details["cpus"]
    if load < 0.25 * cpus:
        return []
    return [f"the machine was not quiet when this run began (load {load:.1f} on {cpus} cores): trust ratios, not rates"]


def _first_version(distributions: Sequence[str]) -> str | None:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _driver_version() -> str | None:
    text = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return text.splitlines()[0].strip() if text else None


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _utc_now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def git_commit() -> str:
    """Short commit of this checkout, ``-dirty`` appended when tracked files differ from it.

    ``CAST_FAST_COMMIT`` overrides it, for a copy of the tree that travels without its ``.git``.
    """
    override = os.environ.get("CAST_FAST_COMMIT")
    if override:
        return override
    commit = _output(["git", "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return "unknown"
    changes = _output(["git", "status", "--porcelain", "--untracked-files=no"])
    return commit.strip() + ("-dirty" if changes else "")


@dataclass(frozen=True)
class Measurement:
    """A line that ran."""

    seconds: tuple[float, ...]
    """Time of every timed call, in seconds."""
    peak_bytes: int | None = None
    """Most memory allocated on the CUDA device above what was allocated before the line's round; None on a CPU."""
    rounds: tuple[int, ...] = ()
    """For each of ``seconds`` the number of its round, which no other round of this process has. Empty for a first
    turn, which no other line shares, and for what was not measured in rounds."""

    def percentiles(self, scale: Callable[[float], float]) -> tuple[float, float, float]:
        """p20, p50 and p80 of ``scale(seconds)``, ascending in the scaled unit."""
        values = [scale(s) for s in self.seconds]
        return percentile(values, 20), percentile(values, 50), percentile(values, 80)

    @property
    def median(self) -> float:
        """Median seconds a call."""
        return percentile(self.seconds, 50)


@dataclass(frozen=True)
class Failure:
    """A line that did not run, and why."""

    reason: str
    trace: str = ""


Outcome = Measurement | Failure


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one line is as another."""

    value: float
    """The median over the rounds that both took; where they share none, the ratio of the medians."""
    p20: float | None
    p80: float | None
    """Over the rounds; None where they share none."""
    rounds: int
    """Rounds that both took."""


def speed_ratio(first: Measurement, second: Measurement, work: float = 1.0) -> Ratio:
    """The speed of ``first`` over that of ``second``.

    What slows a machine down for some seconds slows all lines of a round, so the two are compared round by round.

    Args:
        work: that of one call of ``first`` over that of one call of ``second``.
    """
    by_round: list[dict[int, list[float]]] = []
    for measurement in (first, second):
        turns: dict[int, list[float]] = {}
        for number, seconds in zip(measurement.rounds, measurement.seconds):
            turns.setdefault(number, []).append(seconds)
        by_round.append(turns)
    ratios = [
        work * percentile(by_round[1][number], 50) / percentile(turn, 50)
        for number, turn in by_round[0].items()
        if number in by_round[1]
    ]
    if not ratios:
        return Ratio(work * second.median / first.median, None, None, 0)
    return Ratio(percentile(ratios, 50), percentile(ratios, 20), percentile(ratios, 80), len(ratios))


@dataclass(frozen=True)
class Record:
    """One line of ``results.jsonl``; the fields are the project's contract for benchmark records."""

    name: str
    """What is measured, e.g. ``step`` or ``info_nce``."""
    variant: str
    """Which way of doing it; for the ladder, the line's name."""
    device: str
    dtype: str
    shape: dict[str, int | str]
    """Named sizes, e.g. ``{"batch": 256, "size": 224}``."""
    value: float | None
    """The median, in ``unit``; None where the line failed."""
    unit: str
    p20: float | None
    p50: float | None
    p80: float | None
    repeats: int
    """Timed calls behind the percentiles; of a ratio, rounds."""
    bytes: int | None
    """Bytes that one call must move, or that it holds, by count; None where nobody counted."""
    flops: int | None
    """Floating-point operations of one call, by count; None where nobody counted."""
    fraction_of_bound: float | None
    """Speed over the speed of the bound named by the script; 1 is the bound itself."""
    versions: dict[str, str | None]
    commit: str
    date: str
    rounds: int | None = None
    """Interleaved rounds behind the percentiles. 0: of a line its first turn alone, cold and not beside the others, as
    the run ended before a round; of a ratio none in common, so that it is the ratio of two medians. None: not measured
    in rounds, counted say."""


class Results:
    """The output folder of one run: ``environment.json``, ``results.jsonl`` and ``samples.jsonl``.

    Every record and every raw sample is on disk when the call returns, so a crash or a time limit loses nothing that
    was computed. A new run in a folder of an earlier one starts its files afresh.
    """

    def __init__(self, out: Path, env: Environment) -> None:
        self.out = out
        self.environment = env
        self.records: list[Record] = []
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "results.jsonl"
        self._samples = out / "samples.jsonl"
        self.path.write_text("")
        self._samples.write_text("")
        (out / "environment.json").write_text(json.dumps(dataclasses.asdict(env), indent=2) + "\n")

    def record(
        self,
        name: str,
        variant: str,
        outcome: Outcome,
        *,
        dtype: str,
        shape: Mapping[str, int | str],
        unit: str = "s",
        scale: Callable[[float], float] = lambda seconds: seconds,
        bytes: int | None = None,
        flops: int | None = None,
        fraction_of_bound: float | None = None,
    ) -> Record:
        """A record from a line's outcome; ``scale`` turns the seconds of a call into ``unit``."""
        if isinstance(outcome, Measurement):
            p20, p50, p80 = outcome.percentiles(scale)
            repeats, rounds = len(outcome.seconds), len(set(outcome.rounds))
        else:
            p20 = p50 = p80 = None
            repeats, rounds = 0, None
        return Record(
            name=name,
            variant=variant,
            device=self.environment.device,
            dtype=dtype,
            shape=dict(shape),
            value=p50,
            unit=unit,
            p20=p20,
            p50=p50,
            p80=p80,
            repeats=repeats,
            bytes=bytes,
            flops=flops,
            fraction_of_bound=fraction_of_bound,
            versions=self.environment.versions,
            commit=self.environment.commit,
            date=_utc_now(),
            rounds=rounds,
        )

    def ratio(self, variant: str, ratio: Ratio, *, dtype: str, shape: Mapping[str, int | str]) -> Record:
        """The record ``ratio`` of two lines; ``variant`` is ``FIRST/SECOND``."""
        record = self.record("ratio", variant, Measurement((ratio.value,)), dtype=dtype, shape=shape, unit="ratio")
        return dataclasses.replace(record, p20=ratio.p20, p80=ratio.p80, repeats=ratio.rounds, rounds=ratio.rounds)

    def add(self, record: Record) -> None:
        """Write a record to ``results.jsonl``, in the place of an earlier one of the same line and sizes."""
        same = [place for place, other in enumerate(self.records) if _subject(other) == _subject(record)]
        if not same:
            self.records.append(record)
            self._append(self.path, dataclasses.asdict(record))
            return
        self.records[same[0]] = record
        with whole_file(self.path, durable=True) as file:
            file.write("".join(json.dumps(dataclasses.asdict(each)) + "\n" for each in self.records).encode())

    def sample(self, line: str, repeat: int, seconds: Sequence[float]) -> None:
        """Append the raw seconds of one turn of a line to ``samples.jsonl``; ``repeat`` 0 is the first turn."""
        self._append(self._samples, {"line": line, "repeat": repeat, "seconds": list(seconds)})

    def keep(self) -> Path:
        """Append this run's records to the results that the repository keeps; see ``result_path``."""
        path = result_path(self.environment)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(dataclasses.asdict(record)) + "\n" for record in self.records)
        return path

    @staticmethod
    def _append(path: Path, row: Mapping[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _subject(record: Record) -> tuple[object, ...]:
    return record.name, record.variant, record.dtype, record.shape


def open_results(out: Path, env: Environment) -> Results:
    """``Results`` for a script's ``--out``.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        return Results(out, env)
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror or error}") from error


def time_calls(
    run: Callable[[], object],
    *,
    device: torch.device,
    calls: int = 1,
    prepare: Callable[[], object] | None = None,
    lead_cycles: int = 0,
) -> list[float]:
    """Seconds of each of ``calls`` calls of ``run``.

    ``prepare`` runs before each call, untimed (rotate inputs, flush a cache). On CUDA each call lies between two events
    and the host waits only once, at the end; ``lead_cycles`` > 0 keeps the device busy that many clock cycles before
    each start event, so that the launch of a short kernel is not part of its time.
    """
    if device.type != "cuda":
        seconds = []
        for _ in range(calls):
            if prepare is not None:
                prepare()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return seconds
    events = []
    for _ in range(calls):
        if prepare is not None:
            prepare()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if lead_cycles:
            torch.cuda._sleep(lead_cycles)
        begin.record()
        run()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


_ROUNDS = itertools.count(1)
"""Numbers the rounds of all calls of ``interleave`` in this process, so that turns of two calls are never paired."""


def interleave(
    lines: Mapping[str, Line],
    *,
    device: torch.device,
    repeats: int,
    warmup: int = 2,
    calls: int = 1,
    settle: int = 0,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    lead_cycles: int = 0,
    release: bool = False,
    deadline: float | None = None,
    on_built: Callable[[str, float], None] | None = None,
    on_sample: Callable[[str, int, Sequence[float]], None] | None = None,
    on_line: Callable[[str, Outcome], None] | None = None,
) -> dict[str, Outcome]:
    """Measure all lines in interleaved rounds and return their outcomes in the order given.

    Each line also makes a first turn right after it is built. It is there for runs that end before a round, by a
    deadline or by force, and is dropped as soon as the line has been in one round: it is taken with cold caches and
    memory that is still being asked of the system, minutes before or after those of the other lines (on a CPU up to 1.4
    times as long as the median of the others), so that more samples would not make it right, and one turn of a round is
    better than the mean with it.

    Args:
        lines: name -> factory of the function to time.
        device: CUDA events are used for a CUDA device, the host's clock otherwise.
        repeats: rounds over all lines.
        warmup: untimed calls of each line right after it is built (compilation falls here).
        calls: timed calls of a line in each turn; ``repeats * calls`` samples a line in all.
        settle: untimed calls at the start of each line's turn, for caches that another line displaced.
        prepare: name -> function called, untimed, before each timed call of that line.
        lead_cycles: see ``time_calls``.
        release: give cached device memory back before each turn, so that one line's pool does not starve the next;
            use it with ``settle`` of at least 1.
        deadline: no further round starts after this ``time.monotonic()``; the first turn of a line is always made.
        on_built: called with a line's name and the seconds that building and warm-up took.
        on_sample: called with name, number and seconds after each turn: 0 for the first turn, then 1 to ``repeats``.
        on_line: called with the first turn of a line as its outcome so far, and again with the outcome once the line
            has failed or made its last turn, also when the run is interrupted (then with the samples so far). What is
            written at the first of these survives a process that is killed.

    An exception in a line (not KeyboardInterrupt) ends that line alone; one that leaves the device broken ends all, and
    what the others have is kept.
    """
    if repeats < 1 or calls < 1:
        raise ValueError(f"repeats and calls: got {repeats} and {calls}, expected at least 1")
    cuda = device.type == "cuda"
    prepare = prepare or {}
    runs: dict[str, Callable[[], object]] = {}
    first: dict[str, tuple[float, ...]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    rounds: dict[str, list[int]] = {name: [] for name in lines}
    peaks: dict[str, int] = {}
    outcomes: dict[str, Outcome] = {}
    lost: list[str] = []  # the line after which every CUDA call raises, by an illegal access say

    def tell(name: str, outcome: Outcome) -> None:
        if on_line is not None:
            on_line(name, outcome)

    def finish(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        tell(name, outcome)

    def measured(name: str) -> Measurement:
        return Measurement(tuple(seconds[name]) or first[name], peaks.get(name), tuple(rounds[name]))

    def fail(name: str, error: Exception) -> None:
        runs.pop(name, None)
        failure = describe(error)
        # The frames of the traceback hold the failed line's tensors; without this an out-of-memory error starves
        # the lines that follow.
        traceback.clear_frames(error.__traceback__)
        finish(name, failure)
        try:
            clear_memory(device)
        except RuntimeError:
            lost.append(name)

    def turn(name: str, repeat: int) -> list[float] | None:
        """Seconds of the calls of a line's turn; None where it failed."""
        try:
            if release:
                clear_memory(device)
            before = torch.cuda.memory_allocated(device) if cuda else 0
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
            for _ in range(settle):
                runs[name]()
            taken = time_calls(
                runs[name], device=device, calls=calls, prepare=prepare.get(name), lead_cycles=lead_cycles
            )
            if cuda:
                used = torch.cuda.max_memory_allocated(device) - before
                peaks[name] = max(peaks.get(name, 0), used)
        except Exception as error:  # any error belongs to its line; the others go on
            fail(name, error)
            return None
        if on_sample is not None:
            on_sample(name, repeat, taken)
        return taken

    try:
        for name, build in lines.items():
            if lost:
                finish(name, Failure(f"not measured: {lost[0]} left the device broken"))
                continue
            begin = time.monotonic()
            try:
                run = build()
                for _ in range(warmup):
                    run()
                if cuda:
                    torch.cuda.synchronize(device)
            except Exception as error:  # as in a turn
                fail(name, error)
                continue
            runs[name] = run
            del run
            if on_built is not None:
                on_built(name, time.monotonic() - begin)
            taken = turn(name, 0)
            if taken is not None:
                first[name] = tuple(taken)
                tell(name, measured(name))
            if release and not lost:
                clear_memory(device)
        for repeat in range(1, repeats + 1):
            if deadline is not None and time.monotonic() >= deadline:
                break
            number = next(_ROUNDS)
            for name in list(runs):
                taken = None if lost else turn(name, repeat)
                if taken is None:
                    continue
                seconds[name].extend(taken)
                rounds[name].extend([number] * calls)
                if repeat == repeats:
                    finish(name, measured(name))
    finally:
        # The deadline came, the device is lost, or an interrupt is on its way up: what was measured is reported.
        for name in first:
            if name not in outcomes:
                finish(name, measured(name))
    return {name: outcomes[name] for name in lines}


def describe(error: BaseException) -> Failure:
    """The failure of a line: one line of reason, and the traceback as text."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    kind = type(error).__name__
    return Failure(f"{kind}: {first}" if first else kind, "".join(traceback.format_exception(error)))


def clear_memory(device: torch.device) -> None:
    """Collect garbage and give cached device memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def tensor_bytes(*holders: object) -> int:
    """Bytes of the distinct storages behind modules (gradients too), optimizers, tensors and lists of these."""
    storages: dict[int, int] = {}

    def visit(holder: object) -> None:
        if isinstance(holder, torch.Tensor):
            storage = holder.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(holder, torch.nn.Module):
            for tensor in (*holder.parameters(), *holder.buffers()):
                visit(tensor)
                visit(tensor.grad if tensor.is_leaf else None)
        elif isinstance(holder, torch.optim.Optimizer):
            visit(holder.state)
        elif isinstance(holder, Mapping):
            for value in holder.values():
                visit(value)
        elif isinstance(holder, (list, tuple)):
            for value in holder:
                visit(value)

    visit(holders)
    return sum(storages.values())


RESULTS = ROOT / "benchmarks" / "results"


def result_path(env: Environment) -> Path:
    """``benchmarks/results/DEVICE/DATE_SHA.jsonl``: where a run is kept in the repository."""
    device = "cpu" if "capability" not in env.details else re.sub(r"[^a-z0-9]+", "-", env.device.lower()).strip("-")
    return RESULTS / device / f"{env.date[:10]}_{env.commit}.jsonl"


def decimals(value: float) -> str:
    """A rate or time to about three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a table on the terminal; the first column is text, the others are aligned as numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    # A pipe or a log has no width of its own; 80 columns would break the numbers.
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=130)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


@dataclass(frozen=True)
class Bar:
    """One bar of a chart."""

    label: str
    value: float | None
    """Length of the bar; None draws no bar, only the note."""
    low: float | None = None
    high: float | None = None
    """p20 and p80, drawn as a whisker."""
    note: str = ""
    """Text at the end of the bar."""
    group: int = 0
    """Bars of one group share a colour: 0 what is compared, 1 what it is compared with, 2 the rest."""


_COLOURS = ("#2f6fb2", "#8a8f98", "#2a9d6f")


def bar_chart(
    path: Path,
    bars: Sequence[Bar],
    *,
    title: str,
    xlabel: str,
    subtitle: str = "",
    groups: Sequence[str] = (),
    limit: float | None = None,
) -> None:
    """Draw horizontal bars, first on top, with whiskers from ``low`` to ``high``, and save them as a PNG.

    A bar longer than ``limit`` is cut there and ends in an arrow, so that one long bar does not flatten the others.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.46 * len(bars)), layout="constrained")
    longest = max((min(bar.high or bar.value or 0.0, limit or math.inf) for bar in bars), default=0.0) or 1.0
    for row, bar in enumerate(bars):
        end = 0.0
        if bar.value is not None:
            colour = _COLOURS[bar.group % len(_COLOURS)]
            end = min(bar.value, longest)
            axes.barh(row, end, height=0.66, color=colour)
            if bar.value > longest:
                axes.plot(end, row, marker=9, markersize=14, color=colour, markeredgewidth=0, clip_on=False)
                end *= 1.02
            elif bar.low is not None and bar.high is not None:
                spread = [[max(bar.value - bar.low, 0.0)], [max(bar.high - bar.value, 0.0)]]
                axes.errorbar(bar.value, row, xerr=spread, color="black", linewidth=1, capsize=3)
                end = max(end, bar.high)
        axes.text(end + 0.012 * longest, row, bar.note, va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    # Notes stand to the right of the bars and need about 40 % of the width.
    axes.set_xlim(0, longest * 1.7)
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{title}\n", loc="left", fontweight="bold")
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="#444444", va="bottom")
    shown = {bar.group for bar in bars if bar.value is not None}
    handles = [Patch(color=_COLOURS[i % len(_COLOURS)], label=text) for i, text in enumerate(groups) if i in shown]
    if handles:
        axes.legend(handles=handles, loc="lower right", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
