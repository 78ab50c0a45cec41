"""What this device can do at most: copy bandwidth, matrix products, and the convolutions of ResNet-50.

    python benchmarks/ceilings.py [--device cpu|cuda] [--batch N] [--repeats N] [--out DIR]

Every other number of the benchmarks is read against these. The copy counts bytes read plus bytes written. Operands are
random: a matrix product on zeros draws less power and runs faster. Convolutions are channels-last, without bias, at the
shapes of ResNet-50 at 224 pixels; ``forward`` is one launch, ``backward`` the gradients of input and weight (of the
weight alone for the stem, whose input needs none). On a CPU the script runs in float32 at a small batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import harness
import torch

from cast_fast.cli import EXIT_USER_ERROR, OneLineParser
from cast_fast.errors import UserError

CONVOLUTIONS: dict[str, tuple[int, int, int, int, int]] = {
    "stem 7×7/2": (3, 64, 7, 2, 224),
    "layer1 1×1 64→256": (64, 256, 1, 1, 56),
    "layer1 3×3 64": (64, 64, 3, 1, 56),
    "layer2 3×3 128": (128, 128, 3, 1, 28),
    "layer3 1×1 1024→256": (1024, 256, 1, 1, 14),
    "layer3 3×3 256": (256, 256, 3, 1, 14),
    "layer4 3×3 512": (512, 512, 3, 1, 7),
    "layer4 1×1 512→2048": (512, 2048, 1, 1, 7),
}
"""Name -> input channels, output channels, kernel side, stride, input side."""


def copy_line(nbytes: int, device: torch.device) -> harness.Line:
    """Copies a buffer of ``nbytes`` to another."""

    def build() -> Callable[[], object]:
        source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
        return partial(torch.empty_like(source).copy_, source)

    return build


def matmul_line(side: int, dtype: torch.dtype, device: torch.device) -> harness.Line:
    """Multiplies two random square matrices."""

    def build() -> Callable[[], object]:
        left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        return partial(torch.mm, left, right, out=torch.empty_like(left))

    return build


def convolution_line(
    shape: tuple[int, int, int, int, int], batch: int, dtype: torch.dtype, device: torch.device, *, backward: bool
) -> harness.Line:
    """One convolution, forward or backward."""
    channels_in, channels_out, side, stride, extent = shape

    def build() -> Callable[[], object]:
        layout = torch.channels_last
        x = torch.randn(batch, channels_in, extent, extent, dtype=dtype, device=device).to(memory_format=layout)
        weight = torch.randn(channels_out, channels_in, side, side, dtype=dtype, device=device).to(memory_format=layout)
        run = partial(torch.nn.functional.conv2d, x, weight, stride=stride, padding=side // 2)
        if not backward:
            return run
        upstream = torch.randn_like(run())
        wants = [channels_in != 3, True, False]
        stride2, padding, dilation = [stride] * 2, [side // 2] * 2, [1, 1]
        return partial(
            torch.ops.aten.convolution_backward.default,
            *(upstream, x, weight, None, stride2, padding, dilation, False, [0, 0], 1, wants),
        )

    return build


def convolution_cost(
    shape: tuple[int, int, int, int, int], batch: int, itemsize: int, *, backward: bool
) -> tuple[int, int]:
    """Floating-point operations and least bytes moved by one convolution line."""
    channels_in, channels_out, side, stride, extent = shape
    out = -(-extent // stride)
    flops = 2 * batch * out * out * channels_out * channels_in * side * side
    x, y = batch * extent * extent * channels_in, batch * out * out * channels_out
    weight = channels_out * channels_in * side * side
    if not backward:
        return flops, itemsize * (x + y + weight)
    if channels_in == 3:
        return flops, itemsize * (x + y + weight)
    # Two products; y's gradient is read for each, x and weight are read once and their gradients written once.
    return 2 * flops, itemsize * (2 * x + 2 * y + 2 * weight)


def measure(device: torch.device, batch: int, repeats: int, results: harness.Results) -> list[list[str]]:
    """Measures every ceiling, writes the records, and returns the rows of the table."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    name = str(dtype).removeprefix("torch.")
    nbytes, side = (1 << 30, 8192) if cuda else (64 << 20, 1024)
    itemsize = dtype.itemsize
    rows: list[list[str]] = []
    rates: dict[str, float] = {}

    copies = harness.interleave({"copy": copy_line(nbytes, device)}, device=device, repeats=repeats, warmup=3, calls=5)
    products = harness.interleave(
        {"matmul": matmul_line(side, dtype, device)}, device=device, repeats=repeats, warmup=3, calls=5
    )
    for kind, outcome, dtype_name, shape, work, unit, counted in (
        ("copy", copies["copy"], "uint8", {"bytes": nbytes}, 2 * nbytes, "GB/s", {"bytes": 2 * nbytes}),
        ("matmul", products["matmul"], name, {"side": side}, 2 * side**3, "TFLOP/s", {"flops": 2 * side**3}),
    ):
        divisor = 1e9 if unit == "GB/s" else 1e12
        scale = partial(_rate, work / divisor)
        record = results.record(
            "ceiling", kind, outcome, dtype=dtype_name, shape=shape, unit=unit, scale=scale, **counted
        )
        results.add(record)
        rates[kind] = (record.value or 0.0) * divisor
        rows.append([kind, *_cells(outcome, record), ""])

    for layer, shape in CONVOLUTIONS.items():
        lines = {
            way: convolution_line(shape, batch, dtype, device, backward=way == "backward")
            for way in ("forward", "backward")
        }
        outcomes = harness.interleave(lines, device=device, repeats=repeats, warmup=3, calls=3, release=True, settle=1)
        for way, outcome in outcomes.items():
            flops, moved = convolution_cost(shape, batch, itemsize, backward=way == "backward")
            floor = max(flops / rates["matmul"], moved / rates["copy"]) if all(rates.values()) else None
            fraction = floor / outcome.median if floor and isinstance(outcome, harness.Measurement) else None
            record = results.record(
                "ceiling",
                f"conv {layer} {way}",
                outcome,
                dtype=name,
                shape={"batch": batch, "in": shape[0], "out": shape[1], "side": shape[2], "extent": shape[4]},
                unit="TFLOP/s",
                scale=partial(_rate, flops / 1e12),
                bytes=moved,
                flops=flops,
                fraction_of_bound=fraction,
            )
            results.add(record)
            rows.append([f"{layer} {way}", *_cells(outcome, record), "" if fraction is None else f"{fraction:.2f}"])
    return rows


def _rate(work: float, seconds: float) -> float:
    return work / seconds


def _cells(outcome: harness.Outcome, record: harness.Record) -> list[str]:
    if isinstance(outcome, harness.Failure) or record.value is None:
        return ["failed", getattr(outcome, "reason", ""), ""]
    return [f"{record.value:,.4g} {record.unit}", f"{record.p20:,.4g}–{record.p80:,.4g}", f"{outcome.median * 1e3:.3f}"]


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; returns the exit code."""
    parser = OneLineParser(prog="ceilings.py", description="copy, matrix product and convolution ceilings of a device")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch", type=int, help="images a convolution sees (default: 256 on CUDA, 4 on a CPU)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench_out/ceilings"))
    args = parser.parse_args(argv)
    try:
        device = harness.choose_device(args.device)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # as in training
        batch = args.batch if args.batch is not None else (256 if device.type == "cuda" else 4)
        for flag, value in (("--batch", batch), ("--repeats", args.repeats)):
            if value < 1:
                raise UserError(f"{flag}: got {value}, expected at least 1")
        results = harness.open_results(args.out, harness.environment(device))
    except UserError as error:
        print(f"ceilings.py: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    rows = measure(device, batch, args.repeats, results)
    harness.print_table(
        f"Ceilings of {results.environment.device}, batch {batch}",
        ["what", "rate", "p20–p80", "ms", "of floor"],
        rows,
        ["floor: the larger of operations over the matmul rate and bytes over the copy rate, both measured here"],
    )
    return 1 if any(record.value is None for record in results.records) else 0


if __name__ == "__main__":
    raise SystemExit(main())
