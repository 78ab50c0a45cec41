"""The main job: how many image pairs a second a training step of CAST takes, and what each idea contributes.

    python benchmarks/throughput.py [--quick] [--device cpu|cuda] [--arch resnet50] [--batch N] [--size 224]
                                    [--images DIR --saliency DIR] [--out DIR] [--variants a,b,…]

One run measures a ladder of ways to take the same step (``ladder.py`` says what each line is), interleaved, all with
one trunk and one size. Each line shows images (pairs) a second, its speed-up over ``published``, its overhead over
``moco`` (in theory 5/4: five trunk units against four) and the fraction of ``trunk-bound`` that it reaches; on CUDA
also its peak memory. These are medians of the quotients of each round, for what disturbs one line of a round disturbs
its neighbours; ``~`` marks those of lines without a round in common, which are quotients of medians. One line is what
``cast-fast pretrain`` runs by default, and the table says which. Then ``loader`` is the DALI loader alone,
``end-to-end`` the loader feeding that line's step, with a word on which of the two limits. Without data of your own the
loader reads made scenes, which are kept for the next run.

The output folder gets ``results.jsonl`` (a record as soon as a line has made its first turn, replaced when it ends;
``ratio`` records of lines with rounds in common), ``samples.jsonl`` (raw seconds, repeat 0 being the first turn),
``summary.json``, ``environment.json`` and ``throughput.png``. A line that fails says why and the others go on.

Exit code: 0 all lines that can run here ran, 1 a line failed, 2 a wrong flag, 130 interrupted (what was measured until
then is written).
"""

from __future__ import annotations

import difflib
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness
import ladder
import torch

from cast_fast.cli import EXIT_USER_ERROR, OneLineParser
from cast_fast.data.batch import Batch
from cast_fast.data.saliency_crop import CropRule
from cast_fast.doctor import dali_fault
from cast_fast.encoder import cam_grid
from cast_fast.errors import UserError

if TYPE_CHECKING:
    from cast_fast.data.dali_loader import DaliLoader
    from cast_fast.data.layout import Dataset

LOADING = ("loader", "end-to-end")
LINES = (*ladder.LADDER, *ladder.BESIDE, *LOADING)
ALL_LINES = (*LINES, *ladder.ON_REQUEST)
THEORY = 5 / 4
"""Trunk units of a CAST step over those of a MoCo step."""
TURN = 4
"""Batches in one timed turn of a loader line."""
DRAIN = 3
"""Batches taken untimed before each turn of ``loader``: those that DALI has prefetched would hide its rate."""
STEADY = 3
"""Steps taken untimed before each turn of ``end-to-end``: they leave DALI's queue as full as training keeps it, and
torch's memory allocated."""
CPU_SECONDS = {False: 360.0, True: 200.0}
"""--quick -> on a CPU no further round and no compilation starts after this many seconds, so that a run without flags
ends within eight minutes on two cores, and one with ``--quick`` within five."""
QUOTIENTS = ("published", "published-amp", "trunk-bound")
"""Lines that every CAST step is divided by; ``moco`` is divided by every CAST step, as the overhead is one in time."""
BESIDES = (
    ("streaming", "kernels"),
    ("trunk-streaming", "trunk-bound"),
    ("streaming", "trunk-streaming"),
    ("groups", "kernels"),
)
"""Further quotients that a run records."""
OUT_OF_TIME = "not measured: out of time"


class OutOfTime(Exception):
    """The deadline passed before a line had been compiled."""


@dataclass(frozen=True)
class Plan:
    """What one run does."""

    settings: ladder.Settings
    out: Path
    lines: tuple[str, ...]
    repeats: int
    calls: int
    deadline: float | None
    """``time.monotonic()`` after which no further round and no compilation starts."""
    threads: int
    scenes: int
    keep: bool = False
    compile_only: bool = False


@dataclass
class Report:
    """Outcomes so far, and what is said about them."""

    plan: Plan
    results: harness.Results
    outcomes: dict[str, harness.Outcome] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Line -> why it is not there; not a failure."""
    peaks: dict[str, int] = field(default_factory=dict)
    limit: str | None = None
    """``loader`` or ``step``: what limits the end-to-end rate."""

    def rate(self, name: str) -> float | None:
        """Median images a second of a line, None where it was not measured."""
        outcome = self.outcomes.get(name)
        if not isinstance(outcome, harness.Measurement):
            return None
        return self.images(name) / outcome.median

    def images(self, name: str) -> int:
        """Images of one timed call."""
        return self.plan.settings.batch * (TURN if name in LOADING else 1)

    def ratio(self, top: str, bottom: str) -> harness.Ratio | None:
        """Rate of one line over that of another, None where one was not measured."""
        first, second = self.outcomes.get(top), self.outcomes.get(bottom)
        if not isinstance(first, harness.Measurement) or not isinstance(second, harness.Measurement):
            return None
        return harness.speed_ratio(first, second, self.images(top) / self.images(bottom))

    def add_ratios(self) -> None:
        """Records the quotients of lines that were in the same rounds."""
        steps = [name for name in (*ladder.LADDER, *ladder.ON_REQUEST) if name in self.outcomes]
        pairs = [(name, base) for name in steps for base in QUOTIENTS if name != base]
        pairs += [("moco", name) for name in steps] + [pair for pair in BESIDES if pair not in pairs]
        settings = self.plan.settings
        for top, bottom in pairs:
            ratio = self.ratio(top, bottom)
            if ratio is not None and ratio.rounds:
                dtype = settings.line_precision(top)
                self.results.add(self.results.ratio(f"{top}/{bottom}", ratio, dtype=dtype, shape=settings.shape))

    def allow_compiling(self, name: str) -> None:
        """Notes a line as absent where there is no time left to compile it.

        Raises:
            OutOfTime: the deadline has passed.
        """
        if self.plan.deadline is not None and time.monotonic() >= self.plan.deadline:
            self.absent[name] = OUT_OF_TIME
            raise OutOfTime

    def add(self, name: str, outcome: harness.Outcome, state_bytes: int | None) -> None:
        """Records a line's outcome so far, unless it is absent."""
        if name in self.absent:
            return
        settings, images = self.plan.settings, self.images(name)
        self.outcomes[name] = outcome
        bound = self.ratio(name, "trunk-bound") if name not in LOADING else None  # which have rounds of their own
        units = ladder.TRUNK_UNITS.get(name)
        record = self.results.record(
            name if name in LOADING else "step",
            name,
            outcome,
            dtype="uint8" if name == "loader" else settings.line_precision(name),
            shape=settings.shape,
            unit="images/s",
            scale=lambda seconds: images / seconds,
            flops=units * ladder.trunk_flops(settings) if units else None,
            fraction_of_bound=None if bound is None else bound.value,
        )
        self.results.add(record)
        if isinstance(outcome, harness.Measurement) and outcome.peak_bytes is not None and state_bytes is not None:
            peak = outcome.peak_bytes + state_bytes
            self.peaks[name] = peak
            held = harness.Measurement((float(peak),))
            self.results.add(
                self.results.record(
                    "peak_memory", name, held, dtype=record.dtype, shape=settings.shape, unit="bytes", bytes=peak
                )
            )


def measure_steps(report: Report) -> dict[str, ladder.Built]:
    """Measures every step line that the plan names and that can run here; returns the built lines."""
    plan = report.plan
    cuda = plan.settings.device.type == "cuda"
    built: dict[str, ladder.Built] = {}
    state_bytes: dict[str, int] = {}

    def factory(name: str) -> harness.Line:
        def build() -> Callable[[], object]:
            if name in ladder.COMPILED:
                report.allow_compiling(name)
            built[name] = ladder.build(name, plan.settings)
            return built[name].run

        return build

    def on_line(name: str, outcome: harness.Outcome) -> None:
        if isinstance(outcome, harness.Failure):
            built.pop(name, None)
            say(f"{name}: {report.absent.get(name) or f'failed: {outcome.reason}'}")
        elif name in built:
            state_bytes[name] = harness.tensor_bytes(*built[name].state)
        report.add(name, outcome, state_bytes.get(name))

    order = [name for name in ladder.BUILDING if name in plan.lines]
    for name in order:
        if reason := ladder.absent(name, plan.settings):
            report.absent[name] = reason
    harness.interleave(
        {name: factory(name) for name in order if name not in report.absent},
        device=plan.settings.device,
        repeats=plan.repeats,
        warmup=3 if cuda else 1,
        calls=plan.calls,
        settle=2 if cuda else 0,
        release=cuda,
        deadline=plan.deadline,
        on_built=lambda name, seconds: say(f"{name}: ready after {seconds:.1f} s"),
        on_sample=report.results.sample,
        on_line=on_line,
    )
    return built


def compile_lines(plan: Plan) -> int:
    """Leaves what the plan's lines compile to in the compilers' caches, for a later run; returns the exit code.

    Several of these processes may share a device. Inductor times a few launch shapes of every kernel when it first
    runs: with neighbours on the device those times mislead, so that here they are not kept, and the later run takes
    its own.
    """
    from torch._inductor import config

    config.autotune_local_cache = False
    code = 0
    for name in (name for name in ladder.BUILDING if name in plan.lines and name in ladder.COMPILED):
        if reason := ladder.absent(name, plan.settings):
            say(f"{name}: {reason}")
            continue
        begin = time.monotonic()
        try:
            step = ladder.build(name, plan.settings).run
            for _ in range(2):  # the second step finds the momentum of the optimizer, the first has none
                step()
            if plan.settings.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # the others are compiled all the same
            say(f"{name}: failed: {harness.describe(error).reason}")
            code = 1
            continue
        say(f"{name}: compiled in {time.monotonic() - begin:.1f} s")
    return code


def measure_loading(report: Report, dataset: Dataset, built: dict[str, ladder.Built]) -> None:
    """Measures the loader alone and the loader feeding the product's step."""
    plan = report.plan
    cuda = plan.settings.device.type == "cuda"
    # Here and not before each turn: what a step must allocate anew from the driver is no part of its time in training.
    harness.clear_memory(plan.settings.device)
    loader = build_loader(plan, dataset)
    training: list[Callable[[], object]] = []

    def drain() -> None:
        for _ in range(DRAIN):
            next(loader)

    def take() -> Callable[[], object]:
        def run() -> None:
            for _ in range(TURN):
                next(loader)

        return run

    def train() -> Callable[[], object]:
        name = ladder.default_line(plan.settings)
        line = built.get(name)
        if line is None:
            report.allow_compiling("end-to-end")
            line = ladder.build(name, plan.settings)
        step: Callable[[Batch], object] | None = line.step
        assert step is not None

        def once() -> None:
            step(next(loader))

        once()  # compiles here where the ladder has not
        training.append(once)

        def run() -> None:
            for _ in range(TURN):
                once()

        return run

    def train_on() -> None:
        for _ in range(STEADY):
            training[0]()

    try:
        lines = {name: line for name, line in {"loader": take, "end-to-end": train}.items() if name in plan.lines}
        harness.interleave(
            lines,
            device=plan.settings.device,
            repeats=plan.repeats if cuda else min(plan.repeats, 3),
            warmup=0,
            prepare={"loader": drain, "end-to-end": train_on},
            deadline=plan.deadline,
            on_sample=report.results.sample,
            on_line=lambda name, outcome: report.add(name, outcome, None),
        )
    finally:
        loader.close()
    loading, step = report.rate("loader"), report.rate(ladder.default_line(plan.settings))
    if loading is not None and step is not None:
        report.limit = "loader" if loading < step else "step"


def open_dataset(plan: Plan) -> Dataset:
    """The user's images, or made scenes.

    Raises:
        UserError: a folder is missing or has faults.
    """
    # Here, because the ladder needs no pictures and so none of the libraries that read and draw them.
    from cast_fast.data import layout, shards
    from cast_fast.data.synthetic import write_dataset

    config = plan.settings.config
    if config.data is not None:
        packed = layout.usable(shards.scan_shards(config.data), skip_invalid=False, on_empty_saliency="error")
        return _large_enough(packed, config.batch)
    images, saliency = config.images, config.saliency
    if images is None or saliency is None:
        count = max(plan.scenes, plan.settings.batch)
        folder = plan.out / f"scenes-{count}-{config.seed}"
        say(f"made scenes: {count} in {folder}")
        write_dataset(folder, count, config.seed)
        images, saliency = folder / "images", folder / "saliency"
    dataset = layout.usable(layout.scan(images, saliency), skip_invalid=False, on_empty_saliency="error")
    return _large_enough(dataset, config.batch)


def _large_enough(dataset: Dataset, batch: int) -> Dataset:
    if len(dataset) < batch:
        raise UserError(f"--batch: got {batch}, but {dataset.images} holds {len(dataset)} images")
    return dataset


def build_loader(plan: Plan, dataset: Dataset) -> DaliLoader:
    """The product's loader with the settings of the steps."""
    from cast_fast.data.dali_loader import Augmentation, DaliLoader

    config = plan.settings.config
    return DaliLoader(
        dataset,
        batch=config.batch,
        size=config.size,
        cam_grid=cam_grid(config.arch, config.size),
        augmentation=Augmentation.from_config(config),
        rule=CropRule(config.phi, config.pair_constraint),
        constrained=config.constrained_crops,
        attention=config.attention_loss,
        seed=config.seed,
        device=plan.settings.device.type,
        threads=plan.threads,
    )


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def entry_of(report: Report, name: str) -> dict[str, Any]:
    """What ``summary.json`` says about a line."""
    if name in report.absent:
        return {"status": "absent", "reason": report.absent[name]}
    outcome = report.outcomes.get(name, harness.Failure("not measured"))
    if isinstance(outcome, harness.Failure):
        return {"status": "failed", "reason": outcome.reason}
    images = report.images(name)
    low, rate, high = outcome.percentiles(lambda seconds: images / seconds)
    entry: dict[str, Any] = {"status": "ok", "images_per_second": rate, "p20": low, "p80": high}
    entry |= {"samples": len(outcome.seconds), "rounds": len(set(outcome.rounds))}
    for key, top, bottom in (
        ("speedup_over_published", name, "published"),
        ("overhead_over_moco", "moco", name),
        ("fraction_of_trunk_bound", name, "trunk-bound"),
    ):
        ratio = report.ratio(top, bottom) if name != "loader" else None
        entry[key] = None if ratio is None else ratio.value
        entry[f"{key}_rounds"] = None if ratio is None else ratio.rounds
    return {**entry, "peak_bytes": report.peaks.get(name)}


def row_of(name: str, entry: dict[str, Any], batch: int) -> list[str]:
    """A line of the table."""
    if entry["status"] != "ok":
        return [name, entry["status"], *[""] * 7]
    rate = entry["images_per_second"]
    spread = f"{harness.decimals(entry['p20'])}–{harness.decimals(entry['p80'])}"
    cells = []
    for key in ("speedup_over_published", "overhead_over_moco", "fraction_of_trunk_bound"):
        value = entry[key]
        cells.append("–" if value is None else f"{'' if entry[f'{key}_rounds'] else '~'}{value:.2f}")
    peak = entry["peak_bytes"]
    cells.append("–" if peak is None else f"{peak / 2**30:.2f}")
    rounds = str(entry["rounds"] or "first turn")
    return [name, harness.decimals(rate), spread, rounds, harness.decimals(1000 * batch / rate), *cells]


def bar_of(name: str, entry: dict[str, Any]) -> harness.Bar:
    """A bar of the chart."""
    group = 1 if name in ladder.BESIDE else 2 if name in LOADING else 0
    if entry["status"] != "ok":
        return harness.Bar(name, None, note=f"{entry['status']}: {entry['reason']}"[:90], group=group)
    rate, speedup, fraction = (
        entry[key] for key in ("images_per_second", "speedup_over_published", "fraction_of_trunk_bound")
    )
    notes = [harness.decimals(rate)]
    notes += [f"{speedup:.2f}× published"] if speedup is not None and name != "published" else []
    notes += [f"{fraction:.0%} of bound"] if fraction is not None and name != "trunk-bound" else []
    return harness.Bar(name, rate, entry["p20"], entry["p80"], " · ".join(notes), group)


def default_note(settings: ladder.Settings, lines: tuple[str, ...]) -> str:
    """Which line is the product's default at this batch, in words."""
    name, groups = ladder.default_line(settings), ladder.groups(settings)
    what = f"BatchNorm over {groups} groups of {settings.batch // groups}" if groups > 1 else "BatchNorm over the batch"
    note = f"`cast-fast pretrain --batch {settings.batch}` runs the line {name} ({what})"
    if name not in lines:
        return f"{note}, which is not in this table"
    return f"{note}; the others have one group" if groups > 1 else note


def show(report: Report) -> None:
    """Prints the table, records the quotients, and writes ``summary.json`` and the chart."""
    report.add_ratios()
    plan, env = report.plan, report.results.environment
    settings = plan.settings
    entries = {name: entry_of(report, name) for name in plan.lines}
    columns = ["line", "images/s", "p20–p80", "rounds", "ms a step", "× published", "× moco time", "of trunk bound"]
    columns.append("peak GiB")
    shown = len(columns) if settings.device.type == "cuda" else len(columns) - 1
    rows = [row_of(name, entry, settings.batch)[:shown] for name, entry in entries.items()]
    title = f"CAST step, {settings.arch}, {settings.size} px, batch {settings.batch}, {settings.precision}"
    where = f"{env.device}; torch {env.versions['torch']}; commit {env.commit}; {env.date}"
    notes = [where, *harness.load_note(env), default_note(settings, plan.lines)]
    if settings.device.type == "cuda":
        notes.append(harness.float32_note(env))
    notes += [f"{name}: {entry['reason']}" for name, entry in entries.items() if entry["status"] != "ok"]
    notes.append(f"× moco time: {THEORY:.2f} in theory (five trunk units against four)")
    notes.append("quotients: medians over rounds; those with ~ are of medians, as the two lines share no round")
    if report.limit == "loader":
        notes.append("end-to-end: the loader limits; the step waits for pictures")
    elif report.limit == "step":
        notes.append("end-to-end: the step limits; the loader is faster")
    harness.print_table(title, columns[:shown], rows, notes)
    summary = {
        "settings": {**settings.shape, "precision": settings.precision, "device": env.device, "commit": env.commit},
        "default_line": ladder.default_line(settings),
        "lines": entries,
        "end_to_end_limited_by": report.limit,
    }
    (plan.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    steps = [
        entry["images_per_second"] for name, entry in entries.items() if entry["status"] == "ok" and name != "loader"
    ]
    harness.bar_chart(
        plan.out / "throughput.png",
        [bar_of(name, entry) for name, entry in entries.items()],
        title=title,
        subtitle=where,
        xlabel="image pairs a second (median; whiskers p20–p80)",
        groups=("CAST step", "compared with", "with loader"),
        limit=1.1 * max(steps) if steps else None,
    )


def parse(argv: list[str] | None) -> Plan:
    """The plan that the flags mean.

    Raises:
        UserError: a value out of range or an unknown line.
    """
    parser = OneLineParser(
        prog="throughput.py", description="measure the training step as a ladder", allow_abbrev=False
    )
    ladder.add_arguments(parser)
    parser.add_argument("--images", type=Path, metavar="DIR", help="your images for the loader (default: made scenes)")
    parser.add_argument("--saliency", type=Path, metavar="DIR", help="their saliency maps")
    parser.add_argument("--data", type=Path, metavar="SHARDS", help="WebDataset shards instead")
    parser.add_argument("--scenes", type=int, metavar="N", help="made scenes to draw (default: 1024 on CUDA, 64)")
    parser.add_argument("--loader-threads", type=int, default=0, metavar="N", help="DALI's CPU threads (0: all cores)")
    parser.add_argument("--variants", metavar="A,B", help=f"only these lines, of {','.join(ALL_LINES)}")
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="interleaved rounds (default: 10 on CUDA, 7; --quick 3)"
    )
    parser.add_argument(
        "--max-seconds", type=float, metavar="S", help="start no further round or compilation after this"
    )
    parser.add_argument("--out", type=Path, default=Path("bench_out/throughput"), metavar="DIR", help="output folder")
    parser.add_argument("--compile-only", action="store_true", help="fill the compilers' caches and measure nothing")
    parser.add_argument("--keep", action="store_true", help="add the records to benchmarks/results/ as well")
    args = parser.parse_args(argv)
    start = time.monotonic()
    settings = ladder.settings_from(args)
    cuda = settings.device.type == "cuda"
    repeats = args.repeats if args.repeats is not None else 3 if args.quick else 10 if cuda else 7
    scenes = args.scenes if args.scenes is not None else 1024 if cuda and not args.quick else 64
    seconds = args.max_seconds if args.max_seconds is not None else None if cuda else CPU_SECONDS[args.quick]
    for flag, value, low in (
        ("--repeats", repeats, 1),
        ("--scenes", scenes, 1),
        ("--loader-threads", args.loader_threads, 0),
    ):
        if value < low:
            raise UserError(f"{flag}: got {value}, expected at least {low}")
    if seconds is not None and not seconds > 0:
        raise UserError(f"--max-seconds: got {seconds}, expected more than 0")
    lines = LINES
    if args.variants is not None:
        names = [name.strip() for name in args.variants.split(",") if name.strip()]
        for name in names:
            if name not in ALL_LINES:
                near = difflib.get_close_matches(name, ALL_LINES, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise UserError(f"--variants: got {name!r}{hint}, expected some of {', '.join(ALL_LINES)}")
        if not names:
            raise UserError(f"--variants: got nothing, expected some of {', '.join(ALL_LINES)}")
        lines = tuple(name for name in ALL_LINES if name in names)
    deadline = None if seconds is None else start + seconds
    calls = 3 if cuda else 1
    return Plan(
        settings, args.out, lines, repeats, calls, deadline, args.loader_threads, scenes, args.keep, args.compile_only
    )


def run(plan: Plan) -> int:
    """Measures what the plan says, shows it, and returns the exit code."""
    if plan.compile_only:
        return compile_lines(plan)
    loading = [name for name in LOADING if name in plan.lines]
    fault = dali_fault() if loading else None
    # Before anything is measured or overwritten, so that a fault in the user's data costs nothing.
    dataset = open_dataset(plan) if loading and fault is None else None
    results = harness.open_results(plan.out, harness.environment(plan.settings.device))
    report = Report(plan, results)
    if fault is not None:
        report.absent |= dict.fromkeys(loading, fault)
    code = 0
    try:
        built = measure_steps(report)
        if dataset is not None:
            try:
                measure_loading(report, dataset, built)
            except Exception as error:  # building or closing the loader; the ladder is measured all the same
                failure = harness.describe(error)
                for name in loading:
                    if name not in report.outcomes:
                        report.add(name, failure, None)
    except KeyboardInterrupt:
        code = 130
    show(report)
    for name, outcome in report.outcomes.items():
        if isinstance(outcome, harness.Failure):
            (plan.out / f"failure-{name}.txt").write_text(outcome.trace)
            code = code or 1
    say(f"results: {plan.out}")
    if plan.keep:
        say(f"kept: {results.keep()}")
    return code


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; returns the exit code."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        return run(parse(argv))
    except UserError as error:
        print(f"throughput.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    raise SystemExit(main())
