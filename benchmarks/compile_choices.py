"""Ways to compile the training step: what each asks of a GPU, counted without one, and its time on one.

    python benchmarks/compile_choices.py --count [--arch resnet18] [--only NAME]… [--write]
    python benchmarks/compile_choices.py --device cuda --out DIR [--batch 256 64]… [--max-seconds S]

``--count`` traces the step for an invented H200 (``step_bytes.py``) and prints launches, bytes and kept memory of every
choice that changes them. Without it every choice is timed next to the default step, in turns, and checked to give the
same losses. ``docs/compile_choices.md`` has what was expected and what came of it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__" and "--count" in sys.argv:
    # Before Triton is imported: code is generated for a GPU, not interpreted.
    os.environ.pop("TRITON_INTERPRET", None)

import harness
import ladder
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cast_fast import forward
from cast_fast.batch_counters import BatchCounters
from cast_fast.compilation import compiled, own_code
from cast_fast.encoder import Encoder, EncoderOutput
from cast_fast.errors import UserError
from cast_fast.objective import contrastive_attention_loss
from cast_fast.optim import build_optimizer
from cast_fast.step import COMPILE_MODES, TrainStep

RESULTS = Path(__file__).resolve().parent / "results" / "static"
TOLERANCE = 0.02
"""Largest relative difference of a choice's first loss from the default's, in bfloat16."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to compile the step; everything else is the default."""

    name: str
    expected: str
    """What was thought before anything was counted or measured."""
    inductor: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Changed settings of ``torch._inductor.config``."""
    functorch: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Changed settings of ``torch._functorch.config``."""
    mode: str = "default"
    join_keys: bool = False
    regions: str = "one"
    """``one`` compiled region, ``three`` (keys, query, losses), or ``stream``: three, the keys on a second stream."""
    stem: int = 3
    """Channels of the stem's input; those beyond three are zeros."""
    countable: bool = True
    """Whether it changes what ``--count`` can see."""


CHOICES = {
    choice.name: choice
    for choice in (
        Choice("default", "the step as it is"),
        Choice(
            "combo-kernels",
            "small kernels share launches: two thirds fewer of them; no bytes",
            inductor={"combo_kernels": True, "combo_kernel_max_num_nodes": 32},
        ),
        Choice(
            "reduce-overhead",
            "CUDA graphs: nothing at batch 256, where the GPU is busy anyway; launches vanish at 64",
            mode="reduce-overhead",
            countable=False,
        ),
        Choice("join-keys", "fewer launches, full convolutions at small batches; no bytes", join_keys=True),
        Choice("second-stream", "little: each kernel fills the GPU by itself", regions="stream", countable=False),
        Choice(
            "coordinate-descent",
            "better launch shapes of generated kernels: some per cent of the elementwise half",
            inductor={"coordinate_descent_tuning": True},
            countable=False,
        ),
        Choice("three-regions", "the same kernels, so nothing; one graph is only simpler", regions="three"),
        Choice(
            "combo-pointwise",
            "only casts and counters share launches",
            inductor={"combo_kernels": True, "combo_kernels_pointwise_only": True, "combo_kernel_max_num_nodes": 32},
        ),
        Choice("stem-8", "as stem-4", stem=8),
        Choice("stem-4", "cuDNN pads to 4 or 8 by itself; we spend a third more on the images' bytes", stem=4),
        Choice(
            "memory-0.7",
            "less kept, more recomputed: pays only where it makes room for a larger batch",
            functorch={"activation_memory_budget": 0.7},
        ),
        Choice(
            "no-layout-optimisation",
            "nothing: model and images are channels-last before Inductor looks",
            inductor={"layout_optimization": False},
        ),
        Choice(
            "max-autotune-no-cudagraphs",
            "convolutions stay cuDNN's unless Triton's win the search; minutes of compilation",
            mode="max-autotune-no-cudagraphs",
            countable=False,
        ),
    )
}
"""Name → choice, in the order in which a GPU should time them: the most hopeful first, long searches last."""


class PaddedStem(nn.Module):
    """A convolution whose input and weight get zero channels up to ``channels``; the same numbers."""

    def __init__(self, conv: nn.Conv2d, channels: int) -> None:
        super().__init__()
        self.conv, self.channels = conv, channels

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) → as the convolution."""
        if torch.is_autocast_enabled(images.device.type):
            # Narrowed before they are padded: otherwise the padded images are written in float32 first.
            images = images.to(torch.get_autocast_dtype(images.device.type))
        missing = (0, 0, 0, 0, 0, self.channels - images.shape[1])
        padded = F.pad(images, missing).contiguous(memory_format=torch.channels_last)
        weight = F.pad(self.conv.weight, missing).contiguous(memory_format=torch.channels_last)
        return F.conv2d(padded, weight, None, self.conv.stride, self.conv.padding)


def pad_stem(encoder: Encoder, channels: int) -> None:
    """Puts a ``PaddedStem`` in the place of the trunk's first convolution."""
    name, conv = next(iter(encoder.trunk.named_children()))
    assert isinstance(conv, nn.Conv2d) and conv.bias is None
    setattr(encoder.trunk, name, PaddedStem(conv, channels))


def _query(encoder: Encoder, query: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> EncoderOutput:
    with torch.autocast(query.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return encoder(forward.normalise(query, scale, shift))


def _losses(output: EncoderOutput, head: nn.Module, *arguments: Any, **maps: Any) -> Any:
    return contrastive_attention_loss(output, head, *arguments, **maps)


def three_regions(wrap: Callable[[Any], Any], stream: Any = None) -> Callable[..., Any]:
    """``forward.step_losses`` as three functions, each wrapped; with ``stream`` the keys run beside the query."""
    embed, query_pass, losses_of = wrap(forward.embed_keys), wrap(_query), wrap(_losses)

    def step_losses(
        model: Any,
        query: Tensor,
        key: Tensor,
        key_mask: Tensor | None,
        saliency: Tensor | None,
        weight: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        objective: Any,
        dtype: torch.dtype,
        kernels: bool,
        join_keys: bool = False,
        groups: int = 1,
        order: Tensor | None = None,
    ) -> tuple[Any, Tensor, Tensor]:
        assert groups == 1 and order is None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            keys, masked_key = embed(model.key, key, key_mask, scale, shift, dtype, join=join_keys)
        output = query_pass(model.query, query, scale, shift, dtype)
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
            for tensor in (keys, masked_key):
                if tensor is not None:
                    tensor.record_stream(torch.cuda.current_stream())
        weight, empty = forward.attention_weights(key_mask, weight, keys)
        losses = losses_of(
            output,
            model.query.head,
            keys,
            model.queue.keys,
            objective,
            masked_key=masked_key,
            saliency=saliency,
            attention_weight=weight,
            kernels=kernels,
        )
        return losses, keys, empty

    return step_losses


@contextlib.contextmanager
def patched(choice: Choice) -> Iterator[None]:
    """The settings of a choice, in force while it is compiled. What this torch does not know is left out, and said."""
    import torch._functorch.config
    import torch._inductor.config

    with contextlib.ExitStack() as stack:
        for config, settings in (
            (torch._inductor.config, choice.inductor),
            (torch._functorch.config, choice.functorch),
        ):
            known = {name: value for name, value in settings.items() if hasattr(config, name)}
            for name in settings.keys() - known.keys():
                print(f"{choice.name}: torch {torch.__version__} has no {name}, left out", file=sys.stderr)
            stack.enter_context(config.patch(known))
        yield


def count(choice: Choice, arch: str) -> dict[str, Any]:
    """Launches, bytes and kept bytes of the step as ``choice`` compiles it, in bfloat16 at batch 256."""
    import inductor_bytes
    import step_bytes
    import torch._functorch.config
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.scheduler import ForeachKernelSchedulerNode

    case = step_bytes.Case(arch, joined=choice.join_keys)
    found: list[Any] = []
    graphs = 0

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return compile_fx(module, inputs, inner_compile=lower)

    def lower(traced: torch.fx.GraphModule, cpu_inputs: Any, **options: Any) -> Any:
        places = {node: place for place, node in enumerate(n for n in traced.graph.nodes if n.op == "placeholder")}
        written = {places[n.args[0]] for n in traced.graph.nodes if n.target is copy and n.args[0] in places}
        moving.extend(written - set(options.get("static_input_idxs", ())))
        return step_bytes._lower(found, traced, cpu_inputs, **options)

    def bytes_apart(kernel: Any) -> int:
        # torch takes what stays inside of one part of a combined kernel for written and read.
        return sum(part.get_read_write_buffers_sizes() for part in kernel.snodes)

    copy = torch.ops.aten.copy_.default
    moving: list[int] = []
    torch._dynamo.reset()
    counters.clear()
    settings = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    with (
        inductor_bytes.pretended_gpu(),
        torch._functorch.config.patch(settings),
        patched(choice),
        mock.patch.object(ForeachKernelSchedulerNode, "get_read_write_buffers_sizes", bytes_apart),
        step_bytes._case(case) as (function, arguments, model),
        BatchCounters(model.query).apart(),
        BatchCounters(model.key).apart(),
    ):
        if choice.stem > 3:
            for encoder in (model.query, model.key):
                pad_stem(encoder, choice.stem)

        def wrap(part: Any) -> Any:
            return torch.compile(own_code(part, f"{part.__name__}_counted"), backend=backend, dynamic=False)

        compiled = wrap(function) if choice.regions == "one" else three_regions(wrap)
        compiled(*arguments)
    # CUDA graphs replay addresses: what the graph writes to must be a parameter or a buffer, which stay where they are.
    row: dict[str, Any] = {
        "written_inputs_that_move": len(moving),
        "graphs": graphs,
        "graph_breaks": sum(counters["graph_break"].values()),
    }
    for kind in ("forward", "backward"):
        kernels = [k for g in found if (g.kind == "backward") == (kind == "backward") for k in g.kernels]
        row[kind] = {
            "nodes": len(kernels),
            "generated": sum(not k.extern for k in kernels),
            "small": sum(k.bytes < step_bytes.SMALL for k in kernels if not k.extern),
            "megabytes_per_image": round(sum(k.bytes for k in kernels) / case.batch / 1e6, 2),
        }
    # Of three regions only the backward graph of the trunk keeps activations worth counting.
    row["saved_bytes"] = sum(graph.saved for graph in found)
    return row


def build_step(choice: Choice, settings: ladder.Settings) -> TrainStep:
    """The product's step as ``choice`` compiles it; compiled when it first runs, inside ``patched``."""
    config = settings.config
    model = ladder._model("kernels", settings)
    if choice.stem > 3:
        for encoder in (model.query, model.key):
            pad_stem(encoder, choice.stem)
    recorded = COMPILE_MODES[choice.mode]
    step = TrainStep(
        model,
        build_optimizer(model.query.parameters(), ladder.RATE, config.sgd_momentum, config.weight_decay),
        objective=ladder._objective(settings, attention=True),
        momentum=config.momentum,
        precision=settings.precision,
        kernels=settings.device.type == "cuda",
        clip_grad=config.clip_grad,
        join_keys=choice.join_keys,
        compile_mode=choice.mode,
    )
    mode = None if choice.mode == "default" else choice.mode
    suffix = f"{choice.name}_{config.batch}".replace("-", "_").replace(".", "_")

    def wrap(function: Any) -> Any:
        return compiled(own_code(function, f"{function.__name__}_{suffix}"), mode)

    if choice.regions == "one":
        step._losses = wrap(forward.step_losses)
    else:
        assert not recorded
        step._losses = three_regions(wrap, torch.cuda.Stream() if choice.regions == "stream" else None)
    return step


def time_choices(
    names: list[str], settings: ladder.Settings, results: harness.Results, repeats: int, deadline: float
) -> list[list[str]]:
    """Times each choice in turns with the default; a choice whose first loss differs gets no time."""
    batch = ladder._batch(settings)
    rows, baseline = [], None
    for name in names:
        if time.monotonic() > deadline:
            print(f"{name}, batch {settings.batch}: not measured, out of time")
            continue
        first_losses: dict[str, float] = {}

        def line(choice: Choice, losses: dict[str, float] = first_losses) -> harness.Line:
            def build() -> Callable[[], object]:
                step = build_step(choice, settings)
                with patched(choice):
                    losses[choice.name] = float(step(batch, ladder.RATE).loss)
                default = losses["default"]
                if not abs(losses[choice.name] - default) <= TOLERANCE * abs(default):
                    raise RuntimeError(f"its first loss is {losses[choice.name]}, the default's {default}")
                return lambda: step(batch, ladder.RATE)

            return build

        lines = {each: line(CHOICES[each]) for each in dict.fromkeys(("default", name))}
        outcomes = harness.interleave(lines, device=settings.device, repeats=repeats, warmup=3, calls=5, settle=2)
        for each, outcome in outcomes.items():
            if each == "default" and name != "default":
                continue
            record = results.record(
                "compile_choice",
                each,
                outcome,
                dtype=settings.precision,
                shape=settings.shape,
                unit="ms",
                scale=lambda seconds: seconds * 1e3,
            )
            results.add(record)
        outcome, base = outcomes[name], outcomes["default"]
        if isinstance(outcome, harness.Measurement) and isinstance(base, harness.Measurement):
            baseline = base.median
            peak = f"{outcome.peak_bytes / 1e9:.1f}" if outcome.peak_bytes else ""
            gain = f"{baseline / outcome.median - 1:+.1%}"
            rows.append([str(settings.batch), name, f"{outcome.median * 1e3:,.2f}", gain, peak, CHOICES[name].expected])
        else:
            fault = outcome if isinstance(outcome, harness.Failure) else base
            reason = fault.reason if isinstance(fault, harness.Failure) else ""
            print(f"{name}, batch {settings.batch}: {reason}", file=sys.stderr)
            rows.append([str(settings.batch), name, "failed", "", "", reason])
        harness.clear_memory(settings.device)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; returns the exit code."""
    parser = argparse.ArgumentParser(prog="compile_choices.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", action="store_true", help="count offline instead of measuring")
    parser.add_argument("--write", action="store_true", help="with --count: store the table")
    parser.add_argument("--only", action="append", metavar="NAME", help="this choice; may be repeated")
    parser.add_argument("--arch", default="resnet50", help="torchvision ResNet")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 64], help="image pairs a step")
    parser.add_argument("--size", type=int, default=224, help="side of the crops")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("bench_out/compile_choices"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-seconds", type=float, default=270.0, help="no choice is started later than this")
    args = parser.parse_args(argv)
    for name in args.only or ():
        if name not in CHOICES:
            parser.error(f"--only: got {name!r}, expected one of {', '.join(CHOICES)}")
    names = args.only or list(CHOICES)
    if args.count:
        path = RESULTS / f"compile-choices-{args.arch}-torch-{torch.__version__.split('+')[0]}.json"
        table = json.loads(path.read_text())["choices"] if args.write and path.is_file() else {}
        for name in names:
            if CHOICES[name].countable:
                table[name] = count(CHOICES[name], args.arch)
                print(f"{name}: {json.dumps(table[name])}", flush=True)
        if args.write:
            path.write_text(json.dumps({"torch": torch.__version__, "choices": table}, indent=1) + "\n")
        return 0
    deadline = time.monotonic() + args.max_seconds
    rows: list[list[str]] = []
    try:
        device = harness.choose_device(args.device)
        results = harness.open_results(args.out, harness.environment(device))
        everything = []
        for batch in args.batch:
            flags = ["--device", device.type, "--arch", args.arch, "--batch", str(batch), "--size", str(args.size)]
            ladder_parser = argparse.ArgumentParser()
            ladder.add_arguments(ladder_parser)
            everything.append(ladder.settings_from(ladder_parser.parse_args(flags)))
        # All batches of a choice before the next choice: where time runs out, the most hopeful are complete.
        for name in args.only or [name for name in CHOICES if name != "default"]:
            for settings in everything:
                rows += time_choices([name], settings, results, args.repeats, deadline)
    except UserError as error:
        print(f"compile_choices.py: error: {error}", file=sys.stderr)
        return 2
    columns = ["batch", "choice", "ms a step", "against default", "peak GB", "expected"]
    harness.print_table(f"Ways to compile the step on {results.environment.device}", columns, rows)
    return 1 if any(row[2] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
