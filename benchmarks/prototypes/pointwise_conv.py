"""Prototype: a 1×1 convolution whose epilogue leaves the BatchNorm statistics of what it stores.

    python benchmarks/prototypes/pointwise_conv.py --offline [--write]     registers and spills, no GPU needed
    python benchmarks/prototypes/pointwise_conv.py --device cuda --out DIR  against cuDNN and a statistics kernel

No encoder uses this and nothing exports it. It answers one question of ``benchmarks/traffic_model.py``: the design
``statistics`` saves a reading of every output of a 1×1 convolution (17 of 119 MB an image in ResNet-50's forward pass)
if our own matrix product keeps up with cuDNN's. **Not measured on a GPU.**

In channels-last memory a 1×1 convolution of stride 1 is a matrix product: rows r = (n, h, w), R in all, ::

    y_rc = round(sum_k x_rk w_ck)                                      float32 sums, one rounding
    mean_c = sum_r y_rc / R,  var_c = sum_r (y_rc - mean_c)^2 / R      of the *rounded* y: exactly what is stored

Each program computes one tile of y, stores it, and leaves mean and M2 (sum of squared differences from the mean) of the
tile's columns, taken from the rounded values in registers. Two small launches join the tiles by the rule of Chan, Golub
and LeVeque (1983). So no variance is a difference of large numbers, and a mean far from zero costs no digits. (Programs
that walk over several tiles with running statistics need twice the registers: 203 to 254 against 108 to 128 at
128 × 128, and spill on sm_100.)
"""

# Triton's language is typed for its own compiler, not for a type checker.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

# ruff: noqa: E402
import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(BENCHMARKS), str(BENCHMARKS.parent / "kernels")) if path not in sys.path]

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cast_kernels.launch import Launch, check_kernel_dtype, check_same_device, check_shape

RESULTS = BENCHMARKS / "results" / "offline"
BATCH = 256
GROUP = 64
"""Tiles that one program of the first joining launch takes."""
LAYERS = {
    "64 to 256, 56x56": (64, 256, 56),
    "256 to 64, 56x56": (256, 64, 56),
    "64 to 64, 56x56": (64, 64, 56),
    "256 to 128, 56x56": (256, 128, 56),
    "128 to 512, 28x28": (128, 512, 28),
    "512 to 128, 28x28": (512, 128, 28),
    "512 to 256, 28x28": (512, 256, 28),
    "256 to 1024, 14x14": (256, 1024, 14),
    "1024 to 256, 14x14": (1024, 256, 14),
    "1024 to 512, 14x14": (1024, 512, 14),
    "512 to 2048, 7x7": (512, 2048, 7),
    "2048 to 512, 7x7": (2048, 512, 7),
}
"""All 1×1 convolutions of stride 1 in ResNet-50 at 224: channels in, channels out, side. Three downsampling ones have
stride 2 and are left out."""


@triton.jit
def _product_kernel(
    x,
    weight,
    y,
    partial,
    rows,
    channels_in,
    channels_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of y = x wᵀ, and of each of its columns: mean and M2 → partial (tiles of rows, 2, C_out).

    Programs of the same rows are neighbours, so that all but the first find x in the cache.
    """
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = column < channels_out
    tile = tl.program_id(1)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < rows
    x_row = x + row.to(tl.int64)[:, None] * channels_in
    w_column = weight + column[None, :] * channels_in
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if ONE_STEP:
        inner = tl.arange(0, BLOCK_K)
        held = inner < channels_in
        left = tl.load(x_row + inner[None, :], mask=there[:, None] & held[None, :], other=0.0)
        right = tl.load(w_column + inner[:, None], mask=held[:, None] & known[None, :], other=0.0)
        sums = tl.dot(left, right, input_precision=PRECISION)
    else:
        for start in range(0, channels_in, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            held = inner < channels_in
            left = tl.load(x_row + inner[None, :], mask=there[:, None] & held[None, :], other=0.0)
            right = tl.load(w_column + inner[:, None], mask=held[:, None] & known[None, :], other=0.0)
            sums = tl.dot(left, right, sums, input_precision=PRECISION)
    stored = sums.to(y.dtype.element_ty)
    inside = there[:, None] & known[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * channels_out + column[None, :], stored, mask=inside)
    # What was stored, not what was summed. Rows beyond the end are zeros, and are left out of the count.
    value = stored.to(tl.float32)
    mean = tl.sum(value, axis=0) / tl.minimum(rows - tile * BLOCK_M, BLOCK_M).to(tl.float32)
    difference = tl.where(there[:, None], value - mean[None, :], 0.0)
    out = partial + tile.to(tl.int64) * 2 * channels_out + column
    tl.store(out, mean, mask=known)
    tl.store(out + channels_out, tl.sum(difference * difference, axis=0), mask=known)


@triton.jit
def _join_kernel(partial, joined, rows, share, parts, group, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Joins groups of parts: mean and M2 of ``share`` rows each, the last of fewer → joined (groups, 2, C)."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = column < channels
    first = tl.program_id(1) * group
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, tl.minimum(first + group, parts), BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        used = (part < parts) & (part < first + group)
        place = partial + part.to(tl.int64)[:, None] * 2 * channels + column[None, :]
        inside = used[:, None] & known[None, :]
        number = tl.where(used, tl.minimum(rows - part * share, share), 0).to(tl.float32)
        part_mean = tl.load(place, mask=inside, other=0.0)
        part_m2 = tl.load(place + channels, mask=inside, other=0.0)
        more = tl.sum(number)
        block_mean = tl.sum(part_mean * (number / more)[:, None], axis=0)
        apart = part_mean - block_mean[None, :]
        block_m2 = tl.sum(part_m2 + apart * apart * number[:, None], axis=0)
        # Chan, Golub & LeVeque: the set so far (empty at first) and this block.
        total = count + more
        difference = block_mean - mean
        mean += difference * (more / total)
        m2 += block_m2 + difference * difference * (count * (more / total))
        count = total
    out = joined + tl.program_id(1) * 2 * channels + column
    tl.store(out, mean, mask=known)
    tl.store(out + channels, m2, mask=known)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a launch."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}x{self.inner}, {self.warps} warps, {self.stages} stages"


def candidates(channels_in: int, channels_out: int) -> list[Tiles]:
    """Tiles worth timing for one layer, none of which spills; the first is the choice made without a GPU.

    Where one step takes all of a row of x, nothing is loaded ahead, and several programs a multiprocessor must hide the
    loads instead: narrow tiles of few registers. Longer rows are loaded ahead, and wide tiles read x less often.
    """
    inner = min(max(16, triton.next_power_of_2(channels_in)), 64)
    all_columns = max(16, triton.next_power_of_2(channels_out))
    wide, narrow = min(all_columns, 128), min(all_columns, 64)
    if channels_in <= inner:
        found = [Tiles(128, narrow, inner, 8, 2), Tiles(128, wide, inner, 8, 2), Tiles(64, wide, inner, 4, 2)]
    else:
        found = [
            Tiles(128, wide, inner, 8, 3),
            Tiles(128, narrow, inner, 8, 3),
            Tiles(64, wide, inner, 4, 3),
            Tiles(64, narrow, inner, 4, 4),
            Tiles(128, wide, inner, 8, 4),
        ]
    return list(dict.fromkeys(found))


def plan(x: Tensor, weight: Tensor, y: Tensor, joined: Tensor, tiles: Tiles) -> tuple[Launch, Launch, Launch]:
    """The three launches for channels-last ``x`` and ``y``; ``joined`` (1, 2, C_out) gets mean and M2."""
    channels_in, channels_out = x.shape[1], y.shape[1]
    rows = y.numel() // channels_out
    parts, columns = triton.cdiv(rows, tiles.rows), triton.cdiv(channels_out, tiles.columns)
    groups = triton.cdiv(parts, GROUP)
    partial = x.new_empty((parts, 2, channels_out), dtype=torch.float32)
    between = x.new_empty((groups, 2, channels_out), dtype=torch.float32)
    constants = {
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.columns,
        "BLOCK_K": tiles.inner,
        "ONE_STEP": channels_in <= tiles.inner,
        "PRECISION": "ieee",
    }
    arguments = (x, weight, y, partial, rows, channels_in, channels_out)
    product = Launch(_product_kernel, (columns, parts), arguments, constants, tiles.warps, tiles.stages)
    block = {"BLOCK_P": GROUP, "BLOCK_C": 32}
    blocks = triton.cdiv(channels_out, 32)
    first = Launch(
        _join_kernel, (blocks, groups), (partial, between, rows, tiles.rows, parts, GROUP, channels_out), block, 4
    )
    second = Launch(
        _join_kernel,
        (blocks, 1),
        (between, joined, rows, tiles.rows * GROUP, groups, groups, channels_out),
        block,
        4,
    )
    return product, first, second


def pointwise_conv(x: Tensor, weight: Tensor, tiles: Tiles | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A 1×1 convolution of stride 1 without bias, and the statistics of its output. Without gradient.

    Args:
        x: (N, C_in, H, W), bfloat16, float16 or float32, channels-last, not empty.
        weight: (C_out, C_in, 1, 1) in the dtype of x.
        tiles: sizes of the tiles; by default the first of ``candidates``.

    Returns:
        y (N, C_out, H, W) in the dtype of x, channels-last; mean (C_out,) and biased variance (C_out,) of y as stored,
        float32.

    Raises:
        ValueError: shapes, dtypes, devices or memory formats that do not fit.
    """
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, C_in, H, W), not empty")
    check_kernel_dtype("x", x)
    if x.dtype == torch.float64:
        raise ValueError("x: got dtype torch.float64, expected bfloat16, float16 or float32")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x: got strides {x.stride()}, expected channels-last")
    check_shape("weight", weight, (weight.shape[0], x.shape[1], 1, 1), "(C_out, C_in, 1, 1)")
    check_same_device("x", x, weight=weight)
    if weight.dtype != x.dtype:
        raise ValueError(f"weight: got dtype {weight.dtype}, expected {x.dtype}, that of x")
    samples, channels_in, height, width = x.shape
    channels_out = weight.shape[0]
    y = x.new_empty((samples, height, width, channels_out)).permute(0, 3, 1, 2)
    joined = x.new_empty((1, 2, channels_out), dtype=torch.float32)
    tiles = tiles or candidates(channels_in, channels_out)[0]
    rows_of_weight = weight.reshape(channels_out, channels_in).contiguous()
    for launch in plan(x, rows_of_weight, y, joined, tiles):
        launch.run()
    mean, m2 = joined[0]
    return y, mean, m2 / (y.numel() // channels_out)


def reference(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in torch: a convolution, rounded to the dtype of x, and the statistics of the rounded output."""
    y = F.conv2d(x, weight)
    var, mean = torch.var_mean(y.to(torch.promote_types(y.dtype, torch.float32)), (0, 2, 3), correction=0)
    return y, mean, var


def case_name(tiles: Tiles, channels_in: int) -> str:
    """Tiles, and whether the product over the channels of the input takes one step or a loop: other code."""
    return f"{tiles.name}, {'one step' if channels_in <= tiles.inner else 'a loop'}"


def offline(capabilities: tuple[int, ...]) -> dict[str, dict[str, dict[str, Any]]]:
    """Tiles → architecture → what the assembler made of the product kernel.

    The numbers of channels are arguments at run time, so that layers with the same tiles share their code.
    """
    import offline_compile

    chosen: dict[tuple[Tiles, bool], tuple[int, int, int]] = {}
    others: dict[tuple[Tiles, bool], tuple[int, int, int]] = {}
    for channels_in, channels_out, side in LAYERS.values():
        first, *rest = candidates(channels_in, channels_out)
        chosen.setdefault((first, channels_in <= first.inner), (channels_in, channels_out, side))
        for tiles in rest:
            others.setdefault((tiles, channels_in <= tiles.inner), (channels_in, channels_out, side))
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for (tiles, _), (channels_in, channels_out, side) in {**chosen, **others}.items():
        name = case_name(tiles, channels_in)
        meta = {"device": "meta", "dtype": torch.bfloat16}
        x = torch.empty((BATCH, channels_in, side, side), **meta).to(memory_format=torch.channels_last)
        y = torch.empty((BATCH, channels_out, side, side), **meta).to(memory_format=torch.channels_last)
        weight = torch.empty((channels_out, channels_in), **meta)
        joined = weight.new_empty((1, 2, channels_out), dtype=torch.float32)
        launch = plan(x, weight, y, joined, tiles)[0]
        for capability in capabilities:
            row = offline_compile.compile_case(offline_compile.Case(name, launch, 0, 0), capability)
            table.setdefault(name, {})[f"sm_{capability}"] = row
            line = f"{name:42} sm_{capability:<4} registers {row['registers']:3}  local {row['local']:3}"
            print(f"{line}  shared {row['shared']:6}  async {row['async_copies']:3}  {row['loads']}", flush=True)
    return table


def time_layers(out: Path, device: torch.device, repeats: int, deadline: float) -> int:
    """Times every layer: this prototype with each of its tiles, cuDNN alone, and cuDNN with a statistics kernel."""
    import harness

    results = harness.open_results(out, harness.environment(device))
    statistics = torch.compile(
        lambda y: torch.var_mean(y.float(), (0, 2, 3), correction=0), fullgraph=True, dynamic=False
    )
    batch, dtype = (BATCH, torch.bfloat16) if device.type == "cuda" else (2, torch.float32)
    rows, failed = [], False
    for name, (channels_in, channels_out, side) in LAYERS.items():
        if time.monotonic() > deadline:
            print(f"{name}: not measured, out of time")
            continue
        generator = torch.Generator(device).manual_seed(0)
        shape = (batch, channels_in, side, side)
        x = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        x = x.to(memory_format=torch.channels_last)
        weight = torch.randn((channels_out, channels_in, 1, 1), generator=generator, device=device, dtype=dtype)
        expected = reference(x, weight)

        def apart(x: Tensor = x, weight: Tensor = weight) -> object:
            return statistics(F.conv2d(x, weight))

        lines: dict[str, harness.Line] = {
            "cuDNN": lambda x=x, weight=weight: lambda: F.conv2d(x, weight),
            "cuDNN + statistics": lambda run=apart: run,
        }
        for tiles in candidates(channels_in, channels_out):
            lines[tiles.name] = _checked(x, weight, tiles, expected)
        outcomes = harness.interleave(
            lines, device=device, repeats=repeats, warmup=3, calls=20 if device.type == "cuda" else 1, settle=2
        )
        moved = dtype.itemsize * (x.numel() + expected[0].numel() + weight.numel())
        sizes: dict[str, int | str] = {"N": batch, "C_in": channels_in, "C_out": channels_out, "side": side}
        for line, outcome in outcomes.items():
            record = results.record(
                "pointwise_conv",
                line,
                outcome,
                dtype=str(dtype).removeprefix("torch."),
                shape=sizes,
                unit="µs",
                scale=lambda seconds: seconds * 1e6,
                bytes=moved,
                flops=2 * expected[0].numel() * channels_in,
            )
            results.add(record)
            if isinstance(outcome, harness.Failure):
                failed = True
                print(f"{name}, {line}: {outcome.reason}", file=sys.stderr)
        times = {key: o.median * 1e6 for key, o in outcomes.items() if isinstance(o, harness.Measurement)}
        ours = {key: value for key, value in times.items() if not key.startswith("cuDNN")}
        if ours and len(times) == len(ours) + 2:
            best = min(ours, key=lambda key: ours[key])
            first = candidates(channels_in, channels_out)[0].name
            rows.append(
                [
                    name,
                    f"{times['cuDNN']:,.1f}",
                    f"{times['cuDNN + statistics']:,.1f}",
                    f"{ours.get(first, float('nan')):,.1f}",
                    f"{ours[best]:,.1f}",
                    best,
                    f"{times['cuDNN'] / ours[best]:.2f}",
                    f"{times['cuDNN + statistics'] / ours[best]:.2f}",
                ]
            )
    columns = ["layer", "cuDNN µs", "+ statistics", "chosen", "best", "its tiles", "× cuDNN", "× both"]
    harness.print_table(
        f"1×1 convolutions with statistics on {results.environment.device}",
        columns,
        rows,
        ["× cuDNN is the share of cuDNN's rate that traffic_model.py asks for (--own); × both above 1 is a gain"],
    )
    return 1 if failed else 0


def _checked(
    x: Tensor, weight: Tensor, tiles: Tiles, expected: tuple[Tensor, ...]
) -> Callable[[], Callable[[], object]]:
    """A line that is timed only if its results are right."""

    def build() -> Callable[[], object]:
        y, mean, var = pointwise_conv(x, weight, tiles)
        exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        for name, got, want, limit in (
            ("y", y, expected[0], 2.0**-7),
            ("mean", (mean - exact_mean) / exact_var.sqrt(), torch.zeros_like(exact_mean), 1e-5),
            ("variance", var / exact_var, torch.ones_like(exact_var), 1e-4),
        ):
            error = float((got.double() - want.double()).norm() / max(float(want.double().norm()), 1.0))
            if not error <= limit:
                raise RuntimeError(f"{name} is off by {error:.1e}; its time would mean nothing")
        return lambda: pointwise_conv(x, weight, tiles)

    return build


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; returns the exit code."""
    parser = argparse.ArgumentParser(prog="pointwise_conv.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--offline", action="store_true", help="compile for GPUs that are not there")
    parser.add_argument("--write", action="store_true", help="with --offline: store the table")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("bench_out/pointwise_conv"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-seconds", type=float, default=150.0, help="no layer is started later than this")
    args = parser.parse_args(argv)
    if args.offline:
        if os.environ.get("TRITON_INTERPRET") == "1":
            parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
        table = offline((80, 90, 100))
        if args.write:
            path = RESULTS / f"pointwise-conv-triton-{triton.__version__.split('+')[0]}.json"
            path.write_text(json.dumps({"triton": triton.__version__, "tiles": table}, indent=1) + "\n")
        return 0
    import harness

    device = harness.choose_device(args.device)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--device cpu needs TRITON_INTERPRET=1, and shows only that the script works")
    return time_layers(args.out, device, args.repeats, time.monotonic() + args.max_seconds)


if __name__ == "__main__":
    sys.exit(main())
