"""Count what a compiled training step launches, moves and keeps, on a machine without a GPU.

    python benchmarks/step_bytes.py                      counts every case and prints a table
    python benchmarks/step_bytes.py --write              stores it in benchmarks/results/static/torch-VERSION.json
    python benchmarks/step_bytes.py --check --only NAME  exits 1 if a case is worse than the stored table

``cast_fast.forward.step_losses`` is traced with tensors that have no storage, lowered by Inductor for an H200 that is
not there (``inductor_bytes``), as ``TrainStep`` calls it (BatchNorm's counters apart), and counted: graphs and graph
breaks; for forward and backward pass the scheduled nodes and the bytes of the buffers that each reads and writes, by
kind; the activations kept in between. A buffer counts once a call, also the upstream gradient that cuDNN reads in two
kernels for the two gradients of a convolution: what that adds stands beside it (``second_reading_bytes``). An operator
of ``cast_kernels`` is one call; its partial sums, a few hundred KB, are left out. The generated source then runs
without storage, and the eager step as well: every allocation and deletion is followed, for the peaks. Nothing is
launched: this says what a GPU is asked to do, not how long it takes. Optimizer and momentum update are outside of the
region.

Counts belong to a version of torch. ``--check`` with another version than the table's says so and exits 3.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

# Before Triton is imported: code is generated for a GPU, not interpreted.
os.environ.pop("TRITON_INTERPRET", None)

import harness
import inductor_bytes
import torch
from torch import Tensor, nn
from torch._inductor.output_code import OutputCode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cast_fast.batch_counters import BatchCounters
from cast_fast.data.batch import random_batch
from cast_fast.encoder import cam_grid
from cast_fast.forward import step_losses
from cast_fast.max_pool import MaxPool2d
from cast_fast.moco import MoCo
from cast_fast.objective import Objective
from cast_fast.split_batch_norm import split_batch_norm

RESULTS = Path(__file__).resolve().parent / "results" / "static"
BYTES_SLACK, NODES_SLACK = 0.005, 0.01
"""Shares by which a count may exceed the stored one."""
SMALL = 1 << 20
"""A kernel that moves less than this is a launch and nothing else."""
OTHER_VERSION = 3
"""Exit code of a check against the table of another torch."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to be counted: bfloat16 (the queue too), channels-last, a linear head, 128 dimensions, 65,536 keys."""

    arch: str
    method: str = "cast"
    """``cast``, ``moco``, or ``trunk``: one encoder forward and backward, no loss worth naming."""
    kernels: bool = True
    """The fused losses of ``cast_kernels``."""
    gathered: bool = True
    """``cast_fast.max_pool``."""
    batch_norm: str = "torch"
    """``torch`` or ``streaming``; see ``cast_fast.encoder.build_trunk``."""
    groups: int = 1
    """Of the batch, with BatchNorm statistics apart; keys are shuffled over them."""
    joined: bool = False
    """Keys and masked keys in one pass."""
    batch: int = 256
    size: int = 224

    @property
    def name(self) -> str:
        losses = [] if self.method == "trunk" else ["kernels" if self.kernels else "torch"]
        parts = [self.arch, self.method, *losses]
        parts += [] if self.batch_norm == "torch" else [self.batch_norm]
        parts += [] if self.groups == 1 else [f"{self.groups} groups"]
        parts += ["joined"] if self.joined else []
        return " ".join(parts if self.gathered else [*parts, "scattered"])


CASES = [
    Case("resnet18"),
    Case("resnet18", gathered=False),
    Case("resnet18", batch_norm="streaming"),
    Case("resnet50"),
    Case("resnet50", method="moco"),
    Case("resnet50", method="trunk"),
    Case("resnet50", method="trunk", gathered=False),
    Case("resnet50", batch_norm="streaming"),
    Case("resnet50", method="trunk", batch_norm="streaming"),
    Case("resnet50", groups=8),
    Case("resnet50", batch_norm="streaming", groups=8),
    Case("resnet18", method="trunk"),
    Case("resnet18", method="trunk", batch_norm="streaming"),
]


@dataclasses.dataclass(frozen=True)
class Counted(inductor_bytes.Kernel):
    """One scheduled kernel, and what it is for."""

    kind: str
    """``convolution``, ``reduction`` or ``pointwise`` (generated), else the name of the library call."""
    again: int
    """Bytes of the upstream gradient that the two kernels behind one call for both gradients of a convolution read
    twice; not in ``bytes``."""


@dataclasses.dataclass(frozen=True)
class Graph:
    """One generated graph."""

    kind: str
    """``forward``, ``backward`` or ``inference``."""
    kernels: list[Counted]
    saved: int
    """Bytes handed over from the forward pass; of the backward graph."""
    peak: int
    """Most bytes alive at once in the generated code, parameters and inputs left out."""


class _Traced(OutputCode):
    """Stands in for compiled code: runs the traced graph on tensors without storage."""

    _boxed_call = True

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self.module = module

    def __call__(self, inputs: Any) -> Any:
        return self.module(*inputs)

    def post_compile(self, *arguments: Any, **options: Any) -> None:
        del arguments, options

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        del triton_bundle


def _lower(found: list[Graph], traced: torch.fx.GraphModule, cpu_inputs: Any, **options: Any) -> _Traced:
    """Takes the place of Inductor's inner compiler: everything but writing the source out."""
    from torch._inductor.compile_fx import record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode
    from torch._inductor.virtualized import V
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    kind = "backward" if options.get("is_backward") else "inference" if options.get("is_inference") else "forward"
    module, inputs = inductor_bytes._to_gpu(traced, cpu_inputs)
    view_to_reshape(module)
    FakeTensorProp(module, V.fake_mode).propagate(*inputs)
    record_original_output_strides(module)
    post_grad_passes(module, kind == "inference")
    graph = GraphLowering(
        module, example_inputs=inputs, is_inference=kind == "inference", is_backward=kind == "backward"
    )
    with DebugContext(), V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
        graph.run(*inputs)
        strides = [
            tuple(output.get_layout().stride) if output.has_tensor_output() else None
            for output in graph.graph_outputs
            if hasattr(output, "has_tensor_output")
        ]
        graph.init_wrapper_code()
        graph._update_scheduler()
        scheduler = graph.scheduler
        kernels = [
            Counted(
                kind,
                node.get_name(),
                node.get_read_write_buffers_sizes(),
                isinstance(node, ExternKernelSchedulerNode),
                *_purpose(node),
            )
            for node in scheduler.nodes
        ]
        peak = _generated_peak(graph, traced, inputs)
    context = torch._guards.TracingContext.try_get()
    if kind == "forward" and context is not None and context.output_strides is not None:
        # The backward graph is then traced with the layouts that the forward graph really leaves behind.
        assert len(strides) == len(graph.graph_outputs)
        context.output_strides.extend(strides)  # pyright: ignore[reportArgumentType]
    names = [node.name for node in traced.graph.nodes if node.op == "placeholder"]
    saved = sum(
        value.untyped_storage().nbytes()
        for name, value in zip(names, cpu_inputs)
        if isinstance(value, Tensor) and not name.startswith(("primals", "tangents"))
    )
    found.append(Graph(kind, kernels, saved if kind == "backward" else 0, peak))
    return _Traced(traced)


def _generated_peak(graph: Any, traced: torch.fx.GraphModule, inputs: list[Any]) -> int:
    """Most bytes alive at once while the generated code runs, with tensors without storage and kernels that do nothing.

    Inductor's own source is executed: its allocations, reuses and deletions, in its order. Parameters, inputs of the
    step and upstream gradients are left out; what the forward pass has kept is alive until the source deletes it.
    """
    from torch._inductor.async_compile import AsyncCompile

    wrapper = graph.wrapper_code
    wrapper.push_codegened_graph(graph)
    graph.scheduler.codegen()
    source = wrapper.generate(graph.is_inference)[0].value
    wrapper.pop_codegened_graph()
    idle = types.SimpleNamespace(run=lambda *arguments, **options: None)
    stand_ins = {
        "assert_size_stride": lambda *arguments: None,
        "empty_strided_cuda": functools.partial(_empty_strided, torch.device("cuda", 0)),
        "empty_strided_cpu": functools.partial(_empty_strided, torch.device("cpu")),
        "reinterpret_tensor": _reinterpret,
        "get_raw_stream": lambda device: 0,
    }
    names = [node.name for node in traced.graph.nodes if node.op == "placeholder"]
    arguments: list[Any] = []
    allocations = _Allocations()
    with (
        mock.patch.object(AsyncCompile, "triton", return_value=idle),
        mock.patch.object(AsyncCompile, "wait", return_value=None),
        mock.patch.object(torch.cuda, "_DeviceGuard", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "set_device", return_value=None),
    ):
        scope: dict[str, Any] = {"__name__": "generated", **graph.constants}
        exec(compile(source, "<generated>", "exec"), scope)
        # The source looks its helpers up when it runs.
        scope.update(stand_ins)
        held = []
        for name, value in zip(names, inputs, strict=True):
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            if name.startswith(("primals", "tangents")):
                held.append(made)
                allocations.ignore([made])
            else:
                allocations.hold(made)
            arguments.append(made)
            del made
        with allocations:
            scope["call"](arguments)
    return allocations.peak


def _empty_strided(device: torch.device, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def _reinterpret(tensor: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)


def _purpose(node: Any) -> tuple[str, int]:
    """``Counted.kind`` and ``Counted.again`` of a scheduled node."""
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    if not isinstance(node, ExternKernelSchedulerNode):
        return ("reduction" if node.is_reduction() else "pointwise"), 0
    call: Any = node.node
    name = str(getattr(call, "op_overload", None) or getattr(call, "python_kernel_name", None) or type(call).__name__)
    again = 0
    if name.startswith("aten.convolution_backward"):
        wanted = call.unflatten_args(call.inputs, call.constant_args)[0][-1]
        if wanted[0] and wanted[1]:
            again = int(call.inputs[0].get_numel()) * call.inputs[0].get_dtype().itemsize
    return ("convolution" if "convolution" in name else name.removeprefix("cast_kernels.").split(".")[0]), again


def _without_storage(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces every parameter and buffer by one without storage."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)


class _Allocations(TorchDispatchMode):
    """Follows the storages that operations make: bytes alive now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def ignore(self, tensors: list[Tensor]) -> None:
        """These were there before."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = 0

    def hold(self, tensor: Tensor) -> None:
        """This one is alive already."""
        storage = tensor.untyped_storage()
        self._seen[storage] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self.hold(tensor)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


@contextlib.contextmanager
def _case(case: Case) -> Iterator[tuple[Any, list[Any], MoCo]]:
    """The function of a case, its arguments, and the model, all without storage."""
    mode = FakeTensorMode()
    queue_dtype = torch.bfloat16 if case.kernels else torch.float32  # as ``--queue-dtype auto`` has it
    model = MoCo(case.arch, 128, "linear", 65536, batch_norm=case.batch_norm, queue_dtype=queue_dtype).train()
    for module in model.modules():
        if isinstance(module, MaxPool2d):
            module.gathered = case.gathered
    if case.groups > 1 or case.joined:
        split_batch_norm(model.query, case.groups)
        split_batch_norm(model.key, case.groups, passes=2 if case.joined else 1)
    grid = cam_grid(case.arch, case.size)
    _without_storage(model, mode)
    with mode:
        batch = random_batch(case.batch, case.size, grid, "cpu", attention=case.method == "cast")
        scale, shift = torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
        maps = [batch.key_mask, batch.query_saliency, batch.weight]
        rest = [scale, shift, Objective(attention=case.method == "cast"), torch.bfloat16, case.kernels, case.joined]
        rest += [case.groups, None if case.groups == 1 else torch.zeros(2, case.batch, dtype=torch.int64)]
        if case.method == "trunk":
            yield _trunk_only, [model.query.trunk, batch.query, scale, shift], model
        else:
            yield step_losses, [model, batch.query, batch.key, *maps, *rest], model


def _trunk_only(trunk: nn.Module, images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The trunk with the cheapest loss."""
    images = (images * scale + shift).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return trunk(images).mean(dtype=torch.float32)


def count_compiled(case: Case) -> tuple[int, int, list[Graph]]:
    """Graphs, graph breaks, and what is in the generated graphs."""
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    found: list[Graph] = []
    graphs = 0

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return compile_fx(module, inputs, inner_compile=functools.partial(_lower, found))

    torch._dynamo.reset()
    counters.clear()
    options = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    with (
        inductor_bytes.pretended_gpu(),
        torch._functorch.config.patch(options),
        _case(case) as (function, arguments, model),
        BatchCounters(model.query).apart(),
        BatchCounters(model.key).apart(),
    ):
        torch.compile(function, backend=backend, dynamic=False)(*arguments)
    return graphs, sum(counters["graph_break"].values()), found


def eager_peak(case: Case) -> int:
    """Most bytes alive at once in an eager forward and backward pass, parameters and inputs left out."""
    with _case(case) as (function, arguments, model), _Allocations() as allocations:
        allocations.ignore([*model.parameters(), *model.buffers()])
        allocations.ignore([x for x in arguments if isinstance(x, Tensor)])
        result = function(*arguments)
        loss = result if isinstance(result, Tensor) else result[0].loss
        loss.backward()
    return allocations.peak


def count(case: Case) -> dict[str, Any]:
    """The row of a case."""
    graphs, breaks, found = count_compiled(case)
    row: dict[str, Any] = {**dataclasses.asdict(case), "graphs": graphs, "graph_breaks": breaks}
    for graph in found:
        generated = [kernel for kernel in graph.kernels if not kernel.extern]
        total = sum(kernel.bytes for kernel in graph.kernels)
        row[graph.kind] = {
            # A library call with several results has a node for each, which launches nothing.
            "nodes": len(graph.kernels),
            "generated": len(generated),
            "small": sum(kernel.bytes < SMALL for kernel in graph.kernels),
            "bytes": total,
            "generated_bytes": sum(kernel.bytes for kernel in generated),
            "megabytes_per_image": round(total / case.batch / 1e6, 2),
            "second_reading_bytes": sum(kernel.again for kernel in graph.kernels),
            "kinds": _kinds(graph.kernels),
        }
    row["saved_bytes"] = sum(graph.saved for graph in found)
    row["compiled_peak_bytes"] = max(graph.peak for graph in found)
    row["eager_peak_bytes"] = eager_peak(case)
    return row


def _kinds(kernels: list[Counted]) -> dict[str, list[int]]:
    """Kind of work -> calls and bytes."""
    sums: dict[str, list[int]] = {}
    for kernel in kernels:
        entry = sums.setdefault(kernel.kind, [0, 0])
        entry[0] += 1
        entry[1] += kernel.bytes
    return {kind: entry for kind, entry in sorted(sums.items()) if entry[1]}


def worse(row: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """What grew beyond the stored row."""
    faults = [
        f"{name}: {row[name]}, expected {stored[name]}"
        for name in ("graphs", "graph_breaks")
        if row[name] != stored[name]
    ]
    limits = [("bytes", BYTES_SLACK), ("nodes", NODES_SLACK), ("generated", NODES_SLACK)]
    pairs = [
        (f"{part} {what}", row[part][what], stored[part][what], slack)
        for part in ("forward", "backward")
        for what, slack in limits
    ]
    memory = ("saved_bytes", "compiled_peak_bytes", "eager_peak_bytes")
    pairs += [(what, row[what], stored[what], BYTES_SLACK) for what in memory]
    for what, value, limit, slack in pairs:
        if value > limit * (1 + slack):
            faults.append(f"{what}: {value:,}, at most {limit:,} expected")
    return faults


def version() -> str:
    """torch's version without the tag of its build."""
    return torch.__version__.split("+")[0]


def summary(name: str, row: dict[str, Any]) -> str:
    """One line for the terminal."""
    again = row["backward"]["second_reading_bytes"] / row["batch"] / 1e6
    parts = [
        f"{part} {row[part]['nodes']} nodes, {row[part]['generated']} generated kernels, "
        f"{row[part]['megabytes_per_image']:.1f} MB an image"
        for part in ("forward", "backward")
    ]
    parts[1] += f" and {again:.1f} MB read a second time"
    saved, compiled, eager = (row[f"{what}_bytes"] / 1e9 for what in ("saved", "compiled_peak", "eager_peak"))
    memory = f"saved {saved:.2f} GB, peak {compiled:.2f} GB, eager {eager:.2f} GB"
    return f"{name}: {row['graphs']} graph, {row['graph_breaks']} breaks; {'; '.join(parts)}; {memory}"


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; returns the exit code."""
    parser = argparse.ArgumentParser(prog="step_bytes.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="count this case; may be repeated")
    parser.add_argument("--write", action="store_true", help="store what was counted; other rows stay")
    parser.add_argument("--check", action="store_true", help="compare with the stored table")
    parser.add_argument("--table", type=Path, help="the table to write or to compare with")
    args = parser.parse_args(argv)
    cases = {case.name: case for case in CASES}
    for name in args.only or ():
        if name not in cases:
            parser.error(f"--only: got {name!r}, expected one of {', '.join(cases)}")
    path = args.table or RESULTS / f"torch-{version()}.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    if args.check and stored.get("torch") != version():
        print(f"no table for torch {version()}: {path.name} is for {stored.get('torch', 'none')}")
        return OTHER_VERSION
    failed = False
    for name in args.only or cases:
        row = count(cases[name])
        print(summary(name, row), flush=True)
        if args.check:
            for fault in worse(row, stored["rows"][name]):
                failed = True
                print(f"    {fault}", file=sys.stderr)
        if args.write:
            stored.update(torch=version(), target="H200 (sm_90), pretended: nothing ran on a GPU")
            row.update(commit=harness.git_commit(), date=harness._utc_now())
            stored["rows"][name] = row
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(stored, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
