"""Where the time of a training step goes: torch.profiler over a few steps, summed by kind of work.

    python benchmarks/profile_step.py [--device cpu|cuda] [--arch resnet50] [--batch N] [--size 224]
                                      [--line kernels] [--steps N] [--out DIR]

Writes ``profile.md`` (two tables), ``results.jsonl`` (one record a kind, in ms a step) and, on CUDA,
``trace.json.gz`` for chrome://tracing or Perfetto. On CUDA the kinds add up to the span of the steps on the device;
``idle`` is the part of it in which no kernel ran. On a CPU the operators' own times are summed.

The kind is read off the kernel's name. Inductor fuses BatchNorm with the ReLU and addition around it and names a kernel
after what it fused, so ``BatchNorm`` holds those too.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import ladder
import torch
from torch.profiler import ProfilerActivity, profile

from cast_fast.cli import EXIT_USER_ERROR, OneLineParser
from cast_fast.errors import UserError

KINDS: tuple[tuple[str, str], ...] = (
    ("loss", r"^_(row|wide|partials|combine)_kernel"),
    ("loss", r"gradcam|info_?nce|cosine|logsumexp|log_softmax|nll_loss|cross_entropy"),
    ("convolution", r"conv|fprop|dgrad|wgrad|implicit_gemm|winograd|cudnn.*(gemm|nhwc|nchw)|xmma|im2col"),
    ("BatchNorm", r"^_(statistics|apply|(relu|add)_reduce|input_gradients?|relu_pool\w*|combine_\w+)_kernel"),
    ("BatchNorm", r"batch_?norm|bn_fw|bn_bw|native_batch|var_mean|welford"),
    ("optimizer", r"multi_tensor|foreach|fused_sgd|sgd|lerp|clip_grad"),
    ("matmul", r"gemm|cublas|cutlass|addmm|\bmm\b|\bbmm\b|matmul|gemv"),
    ("copy", r"memcpy|memset|copy_|\bcopy|\bto_copy|_to_copy"),
    ("pooling", r"pool"),
    ("elementwise", r"elementwise|pointwise|triton_poi|vectorized|relu|add|mul|sub|div|where|fill|cat|threshold"),
    ("reduction", r"reduce|triton_red|triton_per|mean|sum|norm"),
)
"""Kind -> regular expression over the lower-case name; the first that matches counts. Names that begin with ``_`` are
those of ``cast_kernels``."""


class Span(NamedTuple):
    """One kernel: its name, and its begin and end in microseconds."""

    name: str
    begin: float
    end: float


def kind_of(name: str) -> str:
    """The kind of work of a kernel or operator."""
    lowered = name.lower()
    for kind, pattern in KINDS:
        # Inductor also names pointwise kernels after the convolution whose input or output they prepare.
        if kind == "convolution" and lowered.startswith("triton_") and not lowered.startswith("triton_tem"):
            continue
        if re.search(pattern, lowered):
            return kind
    return "other"


def busy_time(spans: Sequence[Span]) -> float:
    """Microseconds in which at least one of the kernels ran."""
    busy, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.begin):
        busy += max(span.end - max(span.begin, reached), 0.0)
        reached = max(reached, span.end)
    return busy


def device_spans(trace: Sequence[dict[str, Any]]) -> list[Span]:
    """The kernels, copies and fills among the events of a Chrome trace."""
    return [
        Span(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in trace
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


class Summary(NamedTuple):
    """Milliseconds and launches a step."""

    total: float
    kinds: dict[str, tuple[float, float]]
    """Kind -> milliseconds, launches."""
    names: dict[str, tuple[float, float]]
    """Kernel -> milliseconds, launches."""


def summarise(spans: Sequence[Span], steps: int, *, idle: bool) -> Summary:
    """Sums the kernels of ``steps`` steps by kind and by name, longest first."""
    kinds: dict[str, list[float]] = defaultdict(list)
    names: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        kinds[kind_of(span.name)].append(span.end - span.begin)
        names[span.name].append(span.end - span.begin)

    def sums(groups: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
        per_step = {key: (sum(times) / 1000 / steps, len(times) / steps) for key, times in groups.items()}
        return dict(sorted(per_step.items(), key=lambda item: -item[1][0]))

    by_kind = sums(kinds)
    total = sum(time for time, _ in by_kind.values())
    if idle and spans:
        span = (max(s.end for s in spans) - min(s.begin for s in spans)) / 1000 / steps
        waiting = span - busy_time(spans) / 1000 / steps
        by_kind["idle"] = (waiting, 0.0)
        total = span
    return Summary(total, by_kind, sums(names))


def markdown(summary: Summary, title: str, top: int = 25) -> str:
    """The two tables."""
    lines = [f"### {title}", "", f"{summary.total:.3f} ms a step", ""]
    for heading, rows in (("kind", summary.kinds), (f"the {top} longest", dict(list(summary.names.items())[:top]))):
        lines += [f"| {heading} | ms a step | share | launches a step |", "|---|---:|---:|---:|"]
        for name, (time, launches) in rows.items():
            short = (name if len(name) <= 90 else name[:87] + "…").replace("|", "\\|")
            lines.append(f"| {short} | {time:.3f} | {time / summary.total:.1%} | {launches:.1f} |")
        lines.append("")
    return "\n".join(lines)


def run(settings: ladder.Settings, line: str, steps: int, results: harness.Results) -> Summary:
    """Profiles ``steps`` steps of a line of the ladder and writes the files."""
    device = settings.device
    cuda = device.type == "cuda"
    step = ladder.build(line, settings).run
    for _ in range(3 if cuda else 1):
        step()
    # Recording the host's operators as well would slow the host down and be seen as idle time of the device.
    activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize(device)
    if cuda:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            text = path.read_bytes()
        (results.out / "trace.json.gz").write_bytes(gzip.compress(text, 6))
        spans = device_spans(json.loads(text)["traceEvents"])
    else:
        spans = [
            Span(event.key, 0.0, event.self_cpu_time_total / event.count)
            for event in profiler.key_averages()
            for _ in range(event.count)
        ]
    summary = summarise(spans, steps, idle=cuda)
    for kind, (time, _) in summary.kinds.items():
        outcome = harness.Measurement((time / 1000,))
        results.add(
            results.record(
                "profile",
                kind,
                outcome,
                dtype=settings.precision,
                shape=settings.shape,
                unit="ms",
                scale=lambda seconds: seconds * 1000,
                fraction_of_bound=None,
            )
        )
    title = f"{line}, {settings.arch}, {settings.size} px, batch {settings.batch}, {settings.precision}"
    (results.out / "profile.md").write_text(markdown(summary, title))
    return summary


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; returns the exit code."""
    parser = OneLineParser(prog="profile_step.py", description="torch.profiler over a training step, by kind of work")
    ladder.add_arguments(parser)
    parser.add_argument("--line", choices=(*ladder.LADDER, *ladder.BESIDE), help="default: kernels, compiled on a CPU")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench_out/profile"))
    args = parser.parse_args(argv)
    try:
        settings = ladder.settings_from(args)
        if args.steps < 1:
            raise UserError(f"--steps: got {args.steps}, expected at least 1")
        line = args.line or ("kernels" if settings.device.type == "cuda" else "compiled")
        if reason := ladder.absent(line, settings):
            raise UserError(f"--line: got {line}: {reason}")
        results = harness.open_results(args.out, harness.environment(settings.device))
    except UserError as error:
        print(f"profile_step.py: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    summary = run(settings, line, args.steps, results)
    rows = [
        [kind, f"{time:.3f}", f"{time / summary.total:.1%}", f"{count:.1f}"]
        for kind, (time, count) in summary.kinds.items()
    ]
    harness.print_table(f"{line}: {summary.total:.2f} ms a step", ["kind", "ms a step", "share", "launches"], rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
