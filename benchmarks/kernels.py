"""Each kernel against eager PyTorch, torch.compile of its reference and its floor.

    python benchmarks/kernels.py [--device auto|cpu|cuda] [--out DIR] [--only NAME …] [--quick]

For the losses a line computes the loss and its gradient with respect to the small input (alpha, the query), which is
what a training step needs from it; ∂A is left to the compiler in all of them (it fuses with what reads it). ``launch``
is the bare kernel without autograd. The BatchNorm operators are timed one by one against their references;
``batch_norm_layers`` sets a row of them against torch: BatchNorm with its surroundings, forward and backward, eager
(torch's own BatchNorm kernels) and compiled; where apex's groupbn imports, in float16 against that as well.

Inputs rotate through more memory than the last-level cache holds, so every call reads from device memory. The floor is
the larger of bytes over the copy rate and operations over the matrix rate, both measured in the same run; ``of floor``
is the floor's time over the line's. A line whose results differ from the reference fails and reports no time.

On a CPU the operators are the references by formula; the same lines run at reduced sizes, so the script cannot rot.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import ceilings
import harness
import torch
import torch.nn.functional as F
from torch import Tensor

import cast_kernels
from cast_fast.cli import EXIT_USER_ERROR, OneLineParser
from cast_fast.errors import UserError
from cast_kernels import reference

gradcam_module = importlib.import_module("cast_kernels.gradcam_cosine")
info_nce_module = importlib.import_module("cast_kernels.info_nce")
batch_norm_module = importlib.import_module("cast_kernels.batch_norm")

BATCH_NORM = (
    "batch_norm_statistics",
    "batch_norm_apply",
    "batch_norm_apply_mask",
    "batch_norm_relu_reduce",
    "batch_norm_relu_input_gradient",
    "batch_norm_add_reduce",
    "batch_norm_input_gradient",
    "batch_norm_input_gradients",
    "batch_norm_relu_pool",
    "batch_norm_relu_pool_reduce",
    "batch_norm_relu_pool_input_gradient",
)
NAMES = ("gradcam_cosine", "gradcam_cosine_from_gradient", "info_nce", *BATCH_NORM, "batch_norm_layers")
CACHE_BYTES = 128 << 20
"""Inputs rotate through at least this much: more than twice the L2 of an H200 (50 MB) or an A100 (40 MB)."""
LEAD_CYCLES = 2_000_000
"""The device idles this long before a timed call, about 1 ms, so that the host has launched everything by then: a layer
is up to ten launches, forward and backward."""
AGREEMENT = 2e-2
"""Relative error of loss and gradient, by norm, beyond which a line is wrong rather than rounded (bfloat16: 4e-3)."""

LOSS = ("loss", "gradient")
EPS = 1e-5

Function = Callable[..., tuple[Tensor, ...]]
Lines = dict[str, Callable[..., list[Tensor]]]


@dataclasses.dataclass(frozen=True)
class Work:
    """One kernel at one size."""

    name: str
    dtype: torch.dtype
    shape: dict[str, int | str]
    make: Callable[[torch.Generator], tuple[object, ...]]
    """Arguments of the operator."""
    truth: Callable[..., list[Tensor]]
    """What every line must agree with, from arguments in float64 where that is possible."""
    results: tuple[str, ...]
    """Names of what a line returns."""
    lines: Lines
    bytes: int
    flops: int
    input_bytes: int


def loss_and_gradient(function: Function, small: int, *arguments: object) -> list[Tensor]:
    """The loss of ``function`` and the gradient of its sum with respect to one argument."""
    leaf = arguments[small]
    assert isinstance(leaf, Tensor)
    leaf = leaf.detach().requires_grad_()
    loss = function(*arguments[:small], leaf, *arguments[small + 1 :])[0]
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]


def gradcam_work(
    samples: int, channels: int, side: int, dtype: torch.dtype, device: torch.device, *, from_gradient: bool
) -> Work:
    """Grad-CAM and cosine loss of N samples of C x side x side activations in channels-last memory."""
    name = "gradcam_cosine_from_gradient" if from_gradient else "gradcam_cosine"

    def make(generator: torch.Generator) -> tuple[object, ...]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        layout = torch.channels_last
        activations = random(samples, channels, side, side).relu().to(dtype).to(memory_format=layout)
        saliency = (random(samples, side, side) > 0).float()
        if from_gradient:
            return activations, random(samples, channels, side, side).to(dtype).to(memory_format=layout), saliency
        return activations, random(samples, channels), saliency

    def launch(*arguments: Tensor) -> list[Tensor]:
        if from_gradient:
            # The gradient of the gradient is alpha's, spread evenly; writing it is not the kernel's work.
            loss, _, _, change, _ = gradcam_module._launch_from_gradient(*arguments, True)
        else:
            loss, _, _, change = gradcam_module._launch(*arguments, True)
        return [loss, change]

    lines = operator_lines(name, 1)
    if device.type == "cuda":
        lines["launch"] = launch
    elements = samples * channels * side * side
    # Read A (and its gradient) once; read or write alpha and its gradient, and the maps s, cam and slope, in float32.
    inputs = elements * dtype.itemsize * (2 if from_gradient else 1)
    moved = inputs + 2 * samples * channels * 4 + 3 * samples * side * side * 4 + samples * 4
    shape: dict[str, int | str] = {"N": samples, "C": channels, "H": side, "W": side}
    # One multiply-add an element for the map and one for each of the two sums; one addition for the mean.
    flops = 6 * elements + (elements if from_gradient else 0)
    truth = partial(loss_and_gradient, getattr(reference, name), 1)
    return Work(name, dtype, shape, make, truth, LOSS, lines, moved, flops, inputs)


def info_nce_work(samples: int, keys: int, dimension: int, dtype: torch.dtype, device: torch.device) -> Work:
    """InfoNCE of N queries against K keys of length D, at temperature 0.07."""
    temperature = 0.07

    def make(generator: torch.Generator) -> tuple[object, ...]:
        def unit(rows: int) -> Tensor:
            return F.normalize(torch.randn(rows, dimension, generator=generator, device=device), dim=1)

        query = unit(samples)
        return query, F.normalize(query + unit(samples), dim=1), unit(keys).to(dtype), temperature

    def launch(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> list[Tensor]:
        loss, gradient, _, _ = info_nce_module._launch(query, key, queue, temperature, True)
        return [loss, gradient]

    lines = operator_lines("info_nce", 0)
    if device.type == "cuda":
        lines["launch"] = launch
    inputs = keys * dimension * dtype.itemsize
    moved = inputs + 3 * samples * dimension * 4 + samples * 12
    shape: dict[str, int | str] = {"N": samples, "K": keys, "D": dimension}
    truth = partial(loss_and_gradient, reference.info_nce, 0)
    flops = 4 * samples * keys * dimension
    return Work("info_nce", dtype, shape, make, truth, LOSS, lines, moved, flops, inputs)


def batch_norm_works(samples: int, channels: int, side: int, dtype: torch.dtype, device: torch.device) -> list[Work]:
    """Every operator of the BatchNorm family on (N, C, side, side), with a shortcut where it takes one."""
    small = (side + 1) // 2
    shape: dict[str, int | str] = {"N": samples, "C": channels, "H": side, "W": side}
    element = samples * channels * dtype.itemsize
    full, pooled, choices = element * side * side, element * small * small, samples * channels * small * small
    bits = samples * ((channels + 7) // 8) * side * side
    # Arguments in the operator's order: x a map, p a pooled one, c choices, m a mask, v a vector, n how many values
    # a channel, e eps; and bytes read and written.
    table = {
        "batch_norm_statistics": ("xe", full),
        "batch_norm_apply": ("xvvvvxvvvv", 3 * full),
        "batch_norm_apply_mask": ("xvvvvxvvvv", 3 * full + bits),
        "batch_norm_relu_reduce": ("xxvvvv", 2 * full),
        "batch_norm_relu_input_gradient": ("xxvvvvvvn", 3 * full),
        "batch_norm_add_reduce": ("xxmxvvxvv", 5 * full + bits),
        "batch_norm_input_gradient": ("xxvvvvvn", 3 * full),
        "batch_norm_input_gradients": ("xxvvvvvxvvvvn", 5 * full),
        "batch_norm_relu_pool": ("xvvvv", full + pooled + choices),
        "batch_norm_relu_pool_reduce": ("ppcxvvvv", full + 2 * pooled + choices),
        "batch_norm_relu_pool_input_gradient": ("ppcxvvvvvvn", 2 * full + 2 * pooled + choices),
    }
    assert tuple(table) == BATCH_NORM
    return [
        batch_norm_work(name, kinds, moved, shape, dtype, device, (full, pooled))
        for name, (kinds, moved) in table.items()
    ]


def batch_norm_work(
    name: str,
    kinds: str,
    moved: int,
    shape: dict[str, int | str],
    dtype: torch.dtype,
    device: torch.device,
    sizes: tuple[int, int],
) -> Work:
    """One operator; ``kinds`` and ``sizes`` (bytes of a map, of a pooled one) as in ``batch_norm_works``."""
    samples, channels, side = (int(shape[key]) for key in ("N", "C", "H"))
    small = (side + 1) // 2

    def make(generator: torch.Generator) -> tuple[object, ...]:
        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        def argument(kind: str) -> object:
            if kind in "ne":
                return samples * side * side if kind == "n" else EPS
            if kind == "v":
                return random(channels)
            if kind == "m":
                octets = (samples, (channels + 7) // 8, side, side)
                mask = torch.randint(256, octets, generator=generator, device=device, dtype=torch.uint8)
                return mask.to(memory_format=torch.channels_last)
            edge = side if kind == "x" else small
            if kind == "c":
                # Of the centre alone it is certain that it lies in the image.
                return torch.full((samples, channels, edge, edge), 4, dtype=torch.uint8, device=device).to(
                    memory_format=torch.channels_last
                )
            return random(samples, channels, edge, edge).to(dtype).to(memory_format=torch.channels_last)

        return tuple(argument(kind) for kind in kinds)

    plain, operator = getattr(reference, name), getattr(cast_kernels, name)
    kernel = next(value for value in vars(batch_norm_module).values() if getattr(value, "name", None) == name)
    # No reference compiled: it takes half a minute, and what matters is a layer.
    functions = {"eager": plain, "operator": operator}
    if device.type == "cuda":
        functions["launch"] = kernel.launch

    def tensors(function: Callable[..., object], *arguments: object) -> list[Tensor]:
        results = function(*arguments)
        found = [results] if isinstance(results, Tensor) else list(results)  # pyright: ignore[reportArgumentType]
        # A choice is a matter of rounding where two pixels are nearly as large; its values are compared.
        return [tensor for tensor in found if tensor.is_floating_point()]

    lines: Lines = {line: partial(tensors, function) for line, function in functions.items()}
    inputs = kinds.count("x") * sizes[0] + kinds.count("p") * sizes[1]
    results = tuple(f"result {place}" for place in range(2))
    return Work(name, dtype, shape, make, partial(tensors, plain), results, lines, moved, 0, inputs)


def torch_layer(form: str, x: Tensor, shortcut: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """BatchNorm in training mode, [shortcut, added,] ReLU [and max pool] by torch: output and gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, shortcut, weight, bias)]
    y = F.batch_norm(leaves[0], None, None, leaves[2], leaves[3], training=True, eps=EPS)
    if form == "add":
        y = y + leaves[1]
    y = y.relu()
    if form == "pool":
        y = F.max_pool2d(y, 3, 2, 1)
    wanted = leaves if form == "add" else [leaves[0], *leaves[2:]]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def streamed_layer(form: str, x: Tensor, shortcut: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """The same by the operators, in a row."""
    rows = x.numel() // x.shape[1]
    mean, _, inverse = cast_kernels.batch_norm_statistics(x, EPS).unbind()
    vectors = (mean, inverse, weight, bias)
    g = choice = dy
    if form == "relu":
        y = cast_kernels.batch_norm_apply(x, *vectors)
        sums = cast_kernels.batch_norm_relu_reduce(dy, x, *vectors)
    elif form == "add":
        y, mask = cast_kernels.batch_norm_apply_mask(x, *vectors, shortcut)
        g, sums = cast_kernels.batch_norm_add_reduce(dy, None, mask, x, mean, inverse)
    else:
        y, choice = cast_kernels.batch_norm_relu_pool(x, *vectors)
        sums = cast_kernels.batch_norm_relu_pool_reduce(dy, None, choice, x, *vectors)
    dbias, dweight = sums.unbind()
    if form == "relu":
        dx = cast_kernels.batch_norm_relu_input_gradient(dy, x, *vectors, dbias, dweight, rows)
    elif form == "add":
        dx = cast_kernels.batch_norm_input_gradient(g, x, mean, inverse, weight, dbias, dweight, rows)
        return [y, dx, g, dweight, dbias]
    else:
        dx = cast_kernels.batch_norm_relu_pool_input_gradient(dy, None, choice, x, *vectors, dbias, dweight, rows)
    return [y, dx, dweight, dbias]


def groupbn() -> Any:
    """apex's ``BatchNorm2d_NHWC``, the peer of the streamed layers, or None where it does not import.

    It knows float16 alone, and is built only where apex is told to.
    """
    try:
        return importlib.import_module("apex.contrib.groupbn").BatchNorm2d_NHWC
    except Exception:  # whatever an optional package raises is an answer
        return None


def groupbn_layer(module: Any, form: str) -> Callable[..., list[Tensor]]:
    """``torch_layer`` by apex's module; its tensors are (N, H, W, C)."""
    built: dict[int, Any] = {}

    def run(x: Tensor, shortcut: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        channels = x.shape[1]
        if channels not in built:
            built[channels] = module(channels, fuse_relu=True).to(x.device)
        norm = built[channels]
        norm.weight, norm.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        maps = [tensor.detach().permute(0, 2, 3, 1).requires_grad_() for tensor in (x, shortcut)]
        maps = maps if form == "add" else maps[:1]
        y = norm(*maps)
        gradients = torch.autograd.grad(y, [*maps, norm.weight, norm.bias], dy.permute(0, 2, 3, 1))
        return [t.permute(0, 3, 1, 2) if t.dim() == 4 else t for t in (y.detach(), *gradients)]

    return run


def groupbn_works(module: Any, samples: int, stages: Iterable[tuple[int, int]], device: torch.device) -> list[Work]:
    """Layers in float16, with apex's beside the others."""
    found = []
    for (channels, side), form in itertools.product(stages, ("relu", "add")):
        work = layer_work(form, samples, channels, side, torch.float16, device)
        work.lines["groupbn"] = groupbn_layer(module, form)
        found.append(work)
    return found


def layer_work(form: str, samples: int, channels: int, side: int, dtype: torch.dtype, device: torch.device) -> Work:
    """A whole layer; ``form`` is relu, add (with an identity shortcut) or pool."""
    small = (side + 1) // 2 if form == "pool" else side

    def make(generator: torch.Generator) -> tuple[object, ...]:
        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        def maps(edge: int) -> Tensor:
            return random(samples, channels, edge, edge).to(dtype).to(memory_format=torch.channels_last)

        return maps(side), maps(side if form == "add" else 1), maps(small), random(channels), random(channels)

    lines: Lines = {
        "eager": partial(torch_layer, form),
        "compiled": torch.compile(partial(torch_layer, form), dynamic=False),
        "operator": partial(streamed_layer, form),
    }
    element = samples * channels * dtype.itemsize
    full, pooled, choices = element * side * side, element * small * small, samples * channels * small * small
    bits = samples * ((channels + 7) // 8) * side * side
    # Forward: x twice, y. Backward: relu dy, x; dy, x, dx. add dy, mask, x, g; g, x, dx. pool dy, choice, x; the same
    # and dx.
    moved = {
        "relu": 8 * full,
        "add": 4 * full + bits + 6 * full + bits,
        "pool": 2 * full + pooled + choices + (full + pooled + choices) + (2 * full + pooled + choices),
    }[form]
    shape: dict[str, int | str] = {"form": form, "N": samples, "C": channels, "H": side, "W": side}
    results = ("y", "dx", "dshortcut", "dweight", "dbias") if form == "add" else ("y", "dx", "dweight", "dbias")
    inputs = full * (3 if form == "add" else 2)
    return Work("batch_norm_layers", dtype, shape, make, partial(torch_layer, form), results, lines, moved, 0, inputs)


def operator_lines(name: str, small: int) -> Lines:
    """The reference, the reference compiled, and the operator, each with its gradient."""
    plain, operator = getattr(reference, name), getattr(cast_kernels, name)
    return {
        "eager": partial(loss_and_gradient, plain, small),
        "compiled": partial(loss_and_gradient, torch.compile(plain, dynamic=False), small),
        "operator": partial(loss_and_gradient, operator, small),
    }


def works(device: torch.device, quick: bool) -> list[Work]:
    """The sizes of ResNet-50 at 224 on a GPU, small ones on a CPU."""
    if device.type != "cuda":
        sizes = ((4, 64),) if quick else ((8, 512), (16, 512))
        queues = ((8, 512),) if quick else ((32, 4096), (32, 16_384))
        found = [gradcam_work(n, c, 7, torch.float32, device, from_gradient=False) for n, c in sizes]
        found += [gradcam_work(n, c, 7, torch.float32, device, from_gradient=True) for n, c in sizes[:1]]
        found += [info_nce_work(n, k, 128, torch.float32, device) for n, k in queues]
        n, side = (2, 8) if quick else (8, 28)
        found += batch_norm_works(n, 64, side, torch.float32, device)
        return found + [layer_work(form, n, 64, side, torch.float32, device) for form in ("relu", "add", "pool")]
    bf16 = torch.bfloat16
    batches = (256,) if quick else (64, 256, 512)
    queues = (65_536,) if quick else (4096, 65_536, 1_048_576)
    # What the training step runs comes first, for time may end before the last.
    found = [
        gradcam_work(256, 2048, 7, bf16, device, from_gradient=False),
        info_nce_work(256, 65_536, 128, bf16, device),
    ]
    found += batch_norm_works(256, 64, 112, bf16, device)
    stages = ((256, 56),) if quick else ((256, 56), (512, 28), (1024, 14), (2048, 7))
    found += [layer_work(form, 256, c, side, bf16, device) for c, side in stages for form in ("relu", "add")]
    found.append(layer_work("pool", 256, 64, 112, bf16, device))
    if (module := groupbn()) is not None:
        found += groupbn_works(module, 256, stages, device)
    found += [gradcam_work(n, 2048, 7, bf16, device, from_gradient=True) for n in batches]
    if quick:
        return found
    sizes = [size for size in itertools.product(batches, queues) if size != (256, 65_536)]
    found += [info_nce_work(n, k, 128, bf16, device) for n, k in sizes]
    found += [gradcam_work(n, 2048, 7, bf16, device, from_gradient=False) for n in batches if n != 256]
    found.append(gradcam_work(256, 2048, 7, torch.float32, device, from_gradient=False))
    return [*found, info_nce_work(256, 65_536, 128, torch.float32, device)]


def rotation(work: Work, device: torch.device) -> list[tuple[object, ...]]:
    """Sets of arguments that together exceed the cache."""
    generator = torch.Generator(device).manual_seed(0)
    count = max(2, -(-CACHE_BYTES // work.input_bytes)) if device.type == "cuda" else 2
    return [work.make(generator) for _ in range(count)]


def timed_line(
    line: Callable[..., list[Tensor]], sets: list[tuple[object, ...]], truth: list[Tensor], names: tuple[str, ...]
) -> harness.Line:
    """A factory that checks the line against ``truth``, the results for the first set, then rotates through all."""

    def build() -> Callable[[], object]:
        for name, got, expected in zip(names, line(*sets[0]), truth, strict=False):
            # The gradient of the form from the gradient is constant over space; a bare launch returns it once.
            if got.dim() == 2 and expected.dim() == 4:
                expected = expected[:, :, 0, 0] * expected[0, 0].numel()
            error = float((got.detach().double() - expected.double()).norm() / expected.double().norm())
            if not error <= AGREEMENT:
                raise RuntimeError(f"{name} differs from the reference by {error:.1e}; its time would mean nothing")
        turn = itertools.cycle(sets)
        return lambda: line(*next(turn))

    return build


def measure(
    work: Work, device: torch.device, rates: dict[str, float], repeats: int, quick: bool, results: harness.Results
) -> list[harness.Record]:
    """Time every line of one kernel at one size, and write the records."""
    # One compiled function serves all sizes otherwise, and torch stops compiling it after eight.
    torch.compiler.reset()
    sets = rotation(work, device)
    wide = [
        x.double() if isinstance(x, Tensor) and x.is_floating_point() and device.type == "cpu" else x for x in sets[0]
    ]
    truth = work.truth(*wide)
    cuda = device.type == "cuda"
    # Compiling takes most of a quick run on a CPU, and what it compiles there is not what it compiles on a GPU.
    names = [name for name in work.lines if not (name == "compiled" and quick and not cuda)]
    lines = {name: timed_line(work.lines[name], sets, truth, work.results) for name in names}
    # The matrix rate is measured in bfloat16; a product of float32 takes three of them.
    operations = work.flops * (3 if work.name == "info_nce" and cuda and work.dtype == torch.float32 else 1)
    matrix = operations / rates["matmul"] if work.name == "info_nce" else 0.0
    floor = max(work.bytes / rates["copy"], matrix)
    outcomes = harness.interleave(
        lines,
        device=device,
        repeats=repeats,
        warmup=3,
        calls=20 if cuda else 3,
        settle=2,
        lead_cycles=LEAD_CYCLES if cuda else 0,
    )
    records = []
    for name, outcome in outcomes.items():
        fraction = floor / outcome.median if isinstance(outcome, harness.Measurement) else None
        record = results.record(
            work.name,
            name,
            outcome,
            dtype=str(work.dtype).removeprefix("torch."),
            shape=work.shape,
            unit="µs",
            scale=lambda seconds: seconds * 1e6,
            bytes=work.bytes,
            flops=work.flops,
            fraction_of_bound=fraction,
        )
        results.add(record)
        records.append(record)
        if isinstance(outcome, harness.Failure):
            print(f"{work.name} {name} {work.shape}: {outcome.reason}", file=sys.stderr)
    return records


def ceiling_rates(device: torch.device, repeats: int, results: harness.Results) -> dict[str, float]:
    """Bytes a second of a copy (read plus written) and operations a second of a matrix product, measured now."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    nbytes, side = (1 << 30, 8192) if cuda else (32 << 20, 512)
    lines = {"copy": ceilings.copy_line(nbytes, device), "matmul": ceilings.matmul_line(side, dtype, device)}
    outcomes = harness.interleave(lines, device=device, repeats=repeats, warmup=3, calls=5)
    rates = {}
    for name, amount, key, shape in (
        ("copy", 2 * nbytes, "bytes", {"bytes": nbytes}),
        ("matmul", 2 * side**3, "flops", {"side": side}),
    ):
        outcome = outcomes[name]
        if isinstance(outcome, harness.Failure):
            raise UserError(f"{name}: the device's ceiling could not be measured: {outcome.reason}")
        rates[name] = amount / outcome.median
        kind = "uint8" if name == "copy" else str(dtype).removeprefix("torch.")
        record = results.record("ceiling", name, outcome, dtype=kind, shape=shape, unit="s")
        results.add(dataclasses.replace(record, **{key: amount}))
    return rates


def report(results: harness.Results, rates: dict[str, float]) -> None:
    """Table and chart."""
    records = [record for record in results.records if record.name != "ceiling"]
    eager = {
        (record.name, str(record.shape), record.dtype): record.value for record in records if record.variant == "eager"
    }
    rows, bars = [], []
    for record in records:
        size = "×".join(str(value) for value in record.shape.values())
        label = f"{record.name} {record.dtype} {size}"
        if record.value is None:
            rows.append([label, record.variant, "failed", "", "", "", ""])
            continue
        base = eager.get((record.name, str(record.shape), record.dtype))
        rate = (record.bytes or 0) / record.value / 1e3
        rows.append(
            [
                label,
                record.variant,
                f"{record.value:,.1f}",
                f"{record.p20:,.1f}–{record.p80:,.1f}",
                f"{rate:,.0f}",
                f"{record.fraction_of_bound:.2f}" if record.fraction_of_bound is not None else "",
                f"{base / record.value:.2f}" if base else "",
            ]
        )
        if record.fraction_of_bound is not None:
            note = f"{record.value:,.1f} µs"
            group = {"operator": 0, "launch": 0, "eager": 1}.get(record.variant, 2)
            bars.append(harness.Bar(f"{label} {record.variant}", record.fraction_of_bound, note=note, group=group))
    harness.print_table(
        f"Kernels on {results.environment.device}",
        ["kernel", "line", "µs", "p20–p80", "GB/s", "of floor", "× eager"],
        rows,
        [
            f"floor, measured now: copy {rates['copy'] / 1e9:,.0f} GB/s, matrix {rates['matmul'] / 1e12:,.3g} TFLOP/s",
            "GB/s: the least bytes over the line's time",
        ],
    )
    harness.bar_chart(
        results.out / "kernels.png",
        bars,
        title="Speed as a fraction of the floor",
        xlabel="floor's time / line's time (1 = at the device's limit)",
        subtitle=results.environment.device,
        groups=("cast_kernels", "eager reference", "compiled reference"),
    )


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; returns the exit code."""
    parser = OneLineParser(prog="kernels.py", description="kernels against eager, compiled and their floors")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="these kernels alone")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds over the lines of one size")
    parser.add_argument("--quick", action="store_true", help="one size each; on a CPU without the compiled lines")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="no kernel or size is started later than this")
    parser.add_argument("--out", type=Path, default=Path("bench_out/kernels"))
    args = parser.parse_args(argv)
    deadline = None if args.max_seconds is None else time.monotonic() + args.max_seconds
    try:
        device = harness.choose_device(args.device)
        if args.repeats < 1:
            raise UserError(f"--repeats: got {args.repeats}, expected at least 1")
        results = harness.open_results(args.out, harness.environment(device))
        rates = ceiling_rates(device, args.repeats, results)
    except UserError as error:
        print(f"kernels.py: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    if groupbn() is None:
        print("groupbn: no line of apex.contrib.groupbn, which does not import here", file=sys.stderr)
    for work in works(device, args.quick):
        if args.only and work.name not in args.only:
            continue
        if deadline is not None and time.monotonic() > deadline:
            print(f"{work.name} {work.shape}: not measured, out of time", file=sys.stderr)
            continue
        measure(work, device, rates, args.repeats, args.quick, results)
        harness.clear_memory(device)
    report(results, rates)
    return 1 if any(record.value is None for record in results.records) else 0


if __name__ == "__main__":
    raise SystemExit(main())
