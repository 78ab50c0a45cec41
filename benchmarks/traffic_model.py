"""What a step of ResNet-50 must move and multiply, layer by layer, for every way to arrange its BatchNorms.

    python benchmarks/traffic_model.py [--batch 256] [--own 1.0] [--out FILE.json]

A model, not a measurement. Each kernel of a training step takes the larger of its arithmetic over the rate of
convolutions and its bytes over the bandwidth; the step is their sum, so nothing overlaps and launches are free. Every
buffer counts once a kernel. The *designs* differ in what is fused with what:

``eager``              torch's operations one by one
``inductor-scattered`` torch.compile with torch's own gradient of the max pool
``inductor``           torch.compile with ``cast_fast.max_pool``: what the step is today
``streaming``          BatchNorm+ReLU, BatchNorm+add+ReLU and BatchNorm+ReLU+pool in two passes around cuDNN; masks
                       computed again or kept as bits, gradients of a residual joined once ('i+')
``statistics``         and 1×1 convolutions leave the statistics of their output in their epilogue ('ii')
``reductions``         and the input gradients of 1×1 convolutions are joined and reduced in theirs ('ii-b')
``normalise-on-load``  and conv3 normalises its input as it loads it ('iii')
``every-convolution``  and the same for the 3×3 convolutions and the stem ('iv', as in MLPerf entries)

The ``inductor`` rows follow the kernels that torch 2.14 schedules (``step_bytes.py``), which the test compares. The
two rates of a GPU are shares of its peaks, given twice (``SHARES``): fitted to published rates of training, and as
kernels alone might reach them. The less arithmetic is thought to reach, the less is gained by moving fewer bytes, so
the two calibrations bracket the gain of a design. Trust ratios, not rates.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

HALF, SINGLE = 2, 4
"""Bytes of bfloat16 and of float32."""
MASK = 1 / 16
"""Bytes of a mask of one bit an element, in those of a bfloat16 map."""
POINTWISE = frozenset({"conv1", "conv3", "downsample"})
"""Roles of 1×1 convolutions."""
EVERY = POINTWISE | {"conv2", "stem"}
SCATTERED = 16.05e6
"""Bytes an image that torch's gradient of the max pool adds: counted by ``step_bytes.py``, not derived here."""
TILE_ROWS = 128
"""Rows (positions of the output) whose statistics one tile of our own matrix product leaves behind."""


@dataclasses.dataclass(frozen=True)
class Convolution:
    """One convolution of the trunk, for one image."""

    name: str
    role: str
    """``stem``, ``conv1``, ``conv2``, ``conv3`` or ``downsample``."""
    kernel: int
    channels_in: int
    channels_out: int
    side_in: int
    side_out: int

    @property
    def elements_in(self) -> int:
        return self.channels_in * self.side_in**2

    @property
    def elements_out(self) -> int:
        return self.channels_out * self.side_out**2

    @property
    def weights(self) -> int:
        return self.kernel**2 * self.channels_in * self.channels_out

    @property
    def flops(self) -> int:
        """Of the forward pass; either gradient costs the same."""
        return 2 * self.weights * self.side_out**2


@dataclasses.dataclass(frozen=True)
class Block:
    """A bottleneck; ``downsample`` where its identity branch has a convolution."""

    conv1: Convolution
    conv2: Convolution
    conv3: Convolution
    downsample: Convolution | None


@dataclasses.dataclass(frozen=True)
class Part:
    """One kernel, for one image."""

    layer: str
    kind: str
    """``convolution``, ``statistics``, ``normalise``, ``pool``, ``casts``; in the backward pass ``dgrad``, ``wgrad``,
    ``reduction``, ``apply``, ``join``, ``casts``, ``pool``."""
    bytes: float
    flops: float = 0
    own: bool = False
    """A matrix product of ours rather than cuDNN's."""


@dataclasses.dataclass(frozen=True)
class Design:
    """What is fused with what."""

    name: str
    elementwise: str
    """``eager``, ``inductor`` or ``streaming``."""
    statistics: frozenset[str] = frozenset()
    """Roles of convolutions that leave statistics of their output."""
    reductions: frozenset[str] = frozenset()
    """Roles of convolutions whose input gradient is joined, masked and reduced before it is written."""
    on_load: frozenset[str] = frozenset()
    """Roles of convolutions that normalise their input as they load it."""
    scattered: bool = False


DESIGNS = {
    design.name: design
    for design in (
        Design("eager", "eager"),
        Design("inductor-scattered", "inductor", scattered=True),
        Design("inductor", "inductor"),
        Design("streaming", "streaming"),
        Design("statistics", "streaming", POINTWISE),
        Design("reductions", "streaming", POINTWISE, POINTWISE),
        Design("normalise-on-load", "streaming", POINTWISE, POINTWISE, frozenset({"conv3"})),
        Design("every-convolution", "streaming", EVERY, EVERY, frozenset({"conv2", "conv3"})),
    )
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a GPU sustains."""

    name: str
    flops: float
    """FLOP a second of cuDNN's convolutions where arithmetic limits them."""
    bandwidth: float
    """Bytes a second of kernels that memory limits."""


PEAKS = {"A100": (312e12, 2.039e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
"""GPU → FLOP a second (dense bfloat16) and bytes a second, from NVIDIA's data sheets of the 80 GB A100 and of the SXM
modules of H100 and H200."""
SHARES = {
    "anchored": {"A100": (0.36, 0.92), "H100": (0.26, 0.92), "H200": (0.26, 0.92)},
    "optimistic": {"A100": (0.60, 0.87), "H100": (0.52, 0.80), "H200": (0.52, 0.80)},
}
"""Calibration → GPU → shares of the two peaks. ``anchored``: a pair, in steps of 0.02, with which the model is within
3 % of ``ANCHORS``, one for the A100 and one for H100 and H200. ``optimistic``: what good kernels alone should
reach; it leaves out launches, tails, data and optimizer, which the anchors contain, and exceeds them by 19 to 40 %."""
GPUS = {
    calibration: {
        name: Gpu(name, PEAKS[name][0] * flops, PEAKS[name][1] * bandwidth)
        for name, (flops, bandwidth) in shares.items()
    }
    for calibration, shares in SHARES.items()
}

ANCHORS = (
    ("A100", "every-convolution", 3474, "MLPerf Training 2.0, MXNet, 408 images a GPU"),
    ("H100", "every-convolution", 7295, "MLPerf Training 4.0, middle of 7,140 to 7,449"),
    ("H200", "every-convolution", 7950, "MLPerf Training 4.0, MXNet, 400 images a GPU"),
    ("A100", "eager", 2470, "NVIDIA DeepLearningExamples, PyTorch AMP channels-last, 256 images"),
)
"""(GPU, design, images a second of supervised training that were published, where)."""


def resnet50(size: int = 224) -> tuple[Convolution, list[Block]]:
    """The stem and the sixteen blocks of torchvision's ResNet-50 (stride in the 3×3 convolution)."""
    side = size // 2
    stem = Convolution("stem", "stem", 7, 3, 64, size, side)
    side, channels, blocks = side // 2, 64, []
    for stage, (count, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for number in range(count):
            after = side // 2 if stage > 1 and number == 0 else side
            name = f"layer{stage}.{number}"
            down = None
            if number == 0:
                down = Convolution(f"{name}.downsample", "downsample", 1, channels, 4 * width, side, after)
            blocks.append(
                Block(
                    Convolution(f"{name}.conv1", "conv1", 1, channels, width, side, side),
                    Convolution(f"{name}.conv2", "conv2", 3, width, width, side, after),
                    Convolution(f"{name}.conv3", "conv3", 1, width, 4 * width, after, after),
                    down,
                )
            )
            side, channels = after, 4 * width
    return stem, blocks


def convolutions(size: int = 224) -> list[Convolution]:
    """All 53, in the order of the forward pass."""
    stem, blocks = resnet50(size)
    inner = [(b.conv1, b.conv2, b.conv3, *([b.downsample] if b.downsample else [])) for b in blocks]
    return [stem, *(convolution for block in inner for convolution in block)]


def forward(design: Design, batch: int = 256, size: int = 224) -> list[Part]:
    """Kernels of one forward pass of the trunk in training mode, with their bytes and FLOPs an image."""
    return list(_forward(design, batch, size))


def backward(design: Design, batch: int = 256, size: int = 224) -> list[Part]:
    """Kernels of the backward pass, from the gradient of the pooled activations."""
    parts = list(_backward(design, batch, size))
    return [*parts, Part("stem", "pool", SCATTERED)] if design.scattered else parts


def _forward(design: Design, batch: int, size: int) -> Iterator[Part]:
    stem, blocks = resnet50(size)
    pixels = stem.elements_in
    # uint8 crops become normalised bfloat16 in one kernel; eagerly in float32, which autocast then rounds.
    eager = design.elementwise == "eager"
    yield Part("input", "casts", pixels * (1 + (2 * SINGLE if eager else 0) + (SINGLE if eager else 0) + HALF))
    yield Part("weights", "casts", sum(c.weights for c in convolutions(size)) * (SINGLE + HALF) / batch)
    yield from _convolve(design, stem, batch)
    pooled = stem.elements_out // 4
    if design.elementwise == "streaming":
        yield Part("stem", "normalise", HALF * (stem.elements_out + pooled) + pooled)
    else:
        relu = 2 if eager else 0
        yield Part("stem", "normalise", HALF * (2 + relu) * stem.elements_out)
        # Which of the nine was the largest: one byte, in torch's own operator eight.
        yield Part("stem", "pool", HALF * (stem.elements_out + pooled) + (8 if eager else 1) * pooled)
    for block in blocks:
        for convolution, consumer in ((block.conv1, "conv2"), (block.conv2, "conv3")):
            yield from _convolve(design, convolution, batch)
            if consumer not in design.on_load:
                passes = 4 if eager else 2
                yield Part(convolution.name, "normalise", HALF * passes * convolution.elements_out)
        yield from _convolve(design, block.conv3, batch)
        if block.downsample:
            yield from _convolve(design, block.downsample, batch)
        # Eagerly: normalise (2), add (3), ReLU (2), and the branch's own normalisation (2). Fused: two read, one
        # written.
        passes = (7 + (2 if block.downsample else 0)) if eager else 3
        yield Part(block.conv3.name, "normalise", HALF * passes * block.conv3.elements_out)


def _convolve(design: Design, c: Convolution, batch: int) -> Iterator[Part]:
    fused = c.role in design.statistics
    moved = HALF * (c.elements_in + c.elements_out + c.weights / batch)
    partial = 2 * SINGLE * c.elements_out / TILE_ROWS
    own = fused or c.role in design.on_load
    yield Part(c.name, "convolution", moved + (partial if fused else 0), c.flops, own)
    yield Part(c.name, "statistics", partial if fused else HALF * c.elements_out)


def _backward(design: Design, batch: int, size: int) -> Iterator[Part]:
    stem, blocks = resnet50(size)
    yield Part("weights", "casts", sum(c.weights for c in convolutions(size)) * (SINGLE + HALF) / batch)
    written = True
    """Whether the gradient that reaches the identity branch from above lies in memory in one piece."""
    for index in reversed(range(len(blocks))):
        block, above = blocks[index], blocks[index + 1] if index + 1 < len(blocks) else None
        written = yield from _block_end(design, block, above, written)
        yield from _gradients(design, block.conv3, batch, block.conv2)
        yield from _inner_norm(design, block.conv2, "conv3")
        yield from _gradients(design, block.conv2, batch, block.conv1)
        yield from _inner_norm(design, block.conv1, "conv2")
        if block.downsample:
            yield from _gradients(design, block.downsample, batch, None)
        below = blocks[index - 1] if index else None
        extra = 0
        if "conv1" in design.reductions:
            # The other gradient that joins; mask and the convolutions' outputs whose BatchNorm is reduced.
            x = block.conv1.elements_in
            extra = x if below is None else x * (2 + MASK + (1 if below.downsample else 0))
        yield from _gradients(design, block.conv1, batch, None, extra)
    yield from _stem(design, stem)
    yield Part(stem.name, "wgrad", HALF * (stem.elements_in + stem.elements_out + stem.weights / batch), stem.flops)


def _gradients(
    design: Design, c: Convolution, batch: int, reduced: Convolution | None, extra: float = 0
) -> Iterator[Part]:
    """Both gradients of a convolution; ``reduced`` has the BatchNorm that an epilogue reduces by reading its input."""
    fused = c.role in design.reductions
    moved = HALF * (c.elements_in + c.elements_out + c.weights / batch)
    if fused and reduced is not None:
        extra = reduced.elements_out
    yield Part(c.name, "dgrad", moved + HALF * extra, c.flops, fused and (reduced is not None or extra > 0))
    yield Part(c.name, "wgrad", moved, c.flops)


def _inner_norm(design: Design, c: Convolution, consumer: str) -> Iterator[Part]:
    """BatchNorm and ReLU between two convolutions of a block."""
    e = HALF * c.elements_out
    if design.elementwise == "eager":
        yield Part(c.name, "apply", 3 * e)  # gradient of the ReLU
    masks = 1 if design.elementwise == "inductor" else 0
    if consumer not in design.reductions:
        yield Part(c.name, "reduction", (2 + masks) * e)
    yield Part(c.name, "apply", (3 + masks) * e)


def _block_end(design: Design, block: Block, above: Block | None, written: bool) -> Generator[Part, None, bool]:
    """BatchNorm, add and ReLU at the end of a block, and the BatchNorm of its downsampling branch.

    Its gradient is the sum of what the next block's conv1 sends back and of what comes along that block's identity
    branch: the input gradient of its downsampling convolution, or the masked gradient of its own end. Returns whether
    the masked gradient of this end is in memory in one piece.
    """
    e = HALF * block.conv3.elements_out
    down = 1 if block.downsample else 0
    name = block.conv3.name
    if design.elementwise == "eager":
        if above is not None:
            yield Part(name, "join", 3 * e)
        yield Part(name, "apply", 3 * e)
        yield Part(name, "reduction", 2 * e * (1 + down))
        yield Part(name, "apply", 3 * e * (1 + down))
        return True
    if design.elementwise == "streaming":
        # The mask is written in the forward pass, but in the query's alone: counted here, not in every forward pass.
        yield Part(name, "normalise", e * MASK)
        if above is None:
            yield Part(name, "reduction", e * (1 + MASK + down) + e)
        elif "conv1" not in design.reductions:
            yield Part(name, "reduction", e * (3 + MASK + down) + e)
        yield Part(name, "apply", e * (2 + down) + e * (1 + down))
        return True
    # Inductor: the sum is evaluated anew in each kernel that needs it, unless one of its terms is itself such a sum;
    # then it is written once. So of the blocks of a stage every second one writes.
    if above is None:
        # The gradient of the pooling is a number a channel; the mask is kept as bytes.
        mask = block.conv3.elements_out
        yield Part(name, "reduction", mask + e)
        yield Part(name, "apply", mask + 2 * e)
        return False
    if above.downsample is not None or written:
        yield Part(name, "reduction", e * (4 + down))
        yield Part(name, "apply", e * (4 + down) + e * (1 + down))
        return False
    # Two masks, three terms, one result.
    yield Part(name, "join", 6 * e)
    yield Part(name, "reduction", e * (2 + down))
    yield Part(name, "apply", e * (2 + down) + e * (1 + down))
    return True


def _stem(design: Design, stem: Convolution) -> Iterator[Part]:
    """Gradient of BatchNorm, ReLU and pool; what the two branches of the first block send back is joined here."""
    e, pooled = HALF * stem.elements_out, stem.elements_out // 4
    if design.elementwise == "eager":
        yield Part("stem", "join", 3 * HALF * pooled)
        yield Part("stem", "pool", e + (HALF + 8) * pooled)
        yield Part("stem", "apply", 3 * e)
        yield Part("stem", "reduction", 2 * e)
        yield Part("stem", "apply", 3 * e)
        return
    terms = HALF * pooled * (1 if "conv1" in design.reductions else 2) + pooled
    if design.elementwise == "inductor":
        yield Part("stem", "pool", terms + 2 * e)
        yield Part("stem", "reduction", 2 * e)
        yield Part("stem", "apply", 3 * e)
        return
    yield Part("stem", "reduction", terms + e)
    yield Part("stem", "apply", terms + 2 * e)


def seconds(parts: list[Part], gpu: Gpu, own: float = 1.0) -> float:
    """Time an image: for each kernel the larger of arithmetic and traffic.

    Args:
        parts: of ``forward`` or ``backward``.
        gpu: rates.
        own: rate of our own matrix products as a share of cuDNN's.
    """
    return sum(max(part.flops / (gpu.flops * (own if part.own else 1)), part.bytes / gpu.bandwidth) for part in parts)


def rates(design: Design, gpu: Gpu, batch: int = 256, own: float = 1.0) -> dict[str, float]:
    """Images (for ``cast`` and ``moco`` pairs) a second: ``supervised``, ``moco``, ``cast``."""
    once, back = (seconds(parts(design, batch), gpu, own) for parts in (forward, backward))
    return {name: 1 / (count * once + back) for name, count in (("supervised", 1), ("moco", 2), ("cast", 3))}


def break_even(design: Design, base: Design, gpu: Gpu) -> float:
    """Share of cuDNN's rate below which our own matrix products lose more than ``design`` gains over ``base``."""
    target = rates(base, gpu)["cast"]
    low, high = 0.01, 1.0
    if rates(design, gpu, own=high)["cast"] <= target:
        return 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if rates(design, gpu, own=middle)["cast"] > target else (middle, high)
    return high


def megabytes(parts: list[Part], *kinds: str) -> float:
    """MB (10⁶ bytes) an image, of some kinds of kernels or of all."""
    return sum(part.bytes for part in parts if not kinds or part.kind in kinds) / 1e6


def table(batch: int = 256, own: float = 1.0) -> dict[str, dict[str, float]]:
    """Design → MB an image, and CAST images a second for each calibration and GPU."""
    rows = {}
    for name, design in DESIGNS.items():
        row = {"forward_mb": megabytes(forward(design, batch)), "backward_mb": megabytes(backward(design, batch))}
        for calibration, gpus in GPUS.items():
            for gpu in gpus.values():
                row[f"{calibration} {gpu.name}"] = rates(design, gpu, batch, own)["cast"]
        rows[name] = row
    return rows


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; returns the exit code."""
    parser = argparse.ArgumentParser(prog="traffic_model.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=256, help="images a step: weights are read once a step")
    parser.add_argument("--own", type=float, default=1.0, help="rate of our own matrix products, in cuDNN's")
    parser.add_argument("--out", type=Path, help="store the table as JSON")
    args = parser.parse_args(argv)
    if args.batch < 1 or not args.own > 0:
        parser.error("--batch and --own: expected positive numbers")
    rows = table(args.batch, args.own)
    now = rows["inductor"]
    for calibration, gpus in GPUS.items():
        print(f"{calibration}: CAST images a second, and the gain over the step of today")
        print(f"{'design':20} {'MB forward':>11} {'backward':>9}" + "".join(f" {gpu:>7} {'gain':>6}" for gpu in gpus))
        for name, row in rows.items():
            line = f"{name:20} {row['forward_mb']:11.1f} {row['backward_mb']:9.1f}"
            for gpu in gpus:
                column = f"{calibration} {gpu}"
                line += f" {row[column]:7,.0f} {row[column] / now[column] - 1:+6.1%}"
            print(line)
        print("  our own matrix products may fall to this share of cuDNN's rate before streaming alone is as fast:")
        for name in ("statistics", "reductions", "normalise-on-load"):
            shares = (f"{gpu.name} {break_even(DESIGNS[name], DESIGNS['streaming'], gpu):.2f}" for gpu in gpus.values())
            print(f"    {name:18} {', '.join(shares)}")
        print("  supervised training, modelled against published:")
        for gpu, design, published, source in ANCHORS:
            value = rates(DESIGNS[design], gpus[gpu])["supervised"]
            print(f"    {gpu} {design:18} {value:6,.0f} / {published:6,} = {value / published:.2f}  ({source})")
    if args.out:
        args.out.write_text(json.dumps({"batch": args.batch, "own": args.own, "designs": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
