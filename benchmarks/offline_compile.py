"""Compile every kernel for GPUs that are not there, and record what the assembler made of it.

``python benchmarks/offline_compile.py`` compiles the launches that the launchers of ``cast_kernels`` make (same tiles,
warps, stages and argument specialisation) for sm_80, sm_90 and sm_100, prints registers, local memory, shared memory
and the widths of the global loads, and with ``--write`` stores them in
``benchmarks/results/offline/triton-VERSION.json``. ``--check`` compares with that table and exits 1 where it is
stale, where a kernel uses local memory (registers spilled) or where activations or keys are loaded by less than 128
bits. No GPU is used; ``TRITON_INTERPRET`` must be unset.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cast_kernels.launch import Launch

# The functions of the same names hide these modules as attributes of the package.
batch_norm = importlib.import_module("cast_kernels.batch_norm")
gradcam_cosine = importlib.import_module("cast_kernels.gradcam_cosine")
info_nce = importlib.import_module("cast_kernels.info_nce")

RESULTS = Path(__file__).resolve().parent / "results" / "offline"
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Compute capability -> multiprocessors of the A100, the H200 and the B200."""
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A launch under a name, and how its large input must be loaded."""

    name: str
    launch: Launch
    wide_loads: int
    """128-bit loads that one thread needs for one tile of the large input; 0 where there is none."""
    narrow_bits: int
    """A load of this many bits or fewer can only be one of the large input, badly vectorised; 0 where any may
    occur."""


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def _gradcam(
    name: str,
    dtype: torch.dtype,
    *,
    channels: int = 2048,
    height: int = 7,
    width: int = 7,
    from_gradient: bool = False,
    with_gradient: bool = True,
) -> Case:
    activations = _meta(256, channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)
    saliency = _meta(256, height, width, dtype=torch.float32)
    outputs = gradcam_cosine.allocate(activations, with_gradient, torch.float32)
    alpha = _meta(256, channels, dtype=torch.float32)
    source = torch.empty_like(activations) if from_gradient else alpha
    launch = gradcam_cosine.plan(activations, source, saliency, outputs, alpha if from_gradient else None)
    tile = launch.constants["ROWS"] * launch.constants["BLOCK_C"] * dtype.itemsize
    return Case(name, launch, tile // (launch.num_warps * 32 * 16), 16 if dtype.itemsize == 2 else 0)


def _info_nce(
    name: str, dtype: torch.dtype, temperature: float, capability: int, *, dimension: int = 128
) -> list[Case]:
    query, key = (_meta(256, dimension, dtype=torch.float32) for _ in range(2))
    queue = _meta(65536, dimension, dtype=dtype)
    tiles = info_nce.choose_tiles(256, 65536, dimension, dtype, capability, MULTIPROCESSORS[capability])
    partials, outputs = info_nce.allocate(query, tiles.splits)
    first, second = info_nce.plan(query, key, queue, temperature, tiles, partials, outputs, True)
    tile = first.constants["BLOCK_K"] * first.constants["BLOCK_D"] * dtype.itemsize
    cases = [Case(name, first, tile // (first.num_warps * 32 * 16), 16 if dtype.itemsize == 2 else 0)]
    if name == "info_nce bf16 T=0.07":
        cases.append(Case("info_nce combine", second, 0, 0))
    return cases


def _batch_norm(
    dtype: torch.dtype, *, samples: int = 256, channels: int = 256, side: int = 56, parts: int = 1
) -> list[Case]:
    """Every operator of the BatchNorm family, with each of its optional arguments."""
    norm = batch_norm
    x, dy, dy_skip, shortcut = (_maps(samples, channels, side, dtype) for _ in range(4))
    mask = _maps(samples, (channels + 7) // 8, side, torch.uint8)
    pooled, pooled_skip = (_maps(samples, channels, (side + 1) // 2, dtype) for _ in range(2))
    choice = _maps(samples, channels, (side + 1) // 2, torch.uint8)
    parted = [parts] if parts > 1 else []
    mean, inverse, dbias, dweight, mean2, inverse2, dweight2 = (
        _meta(*parted, channels, dtype=torch.float32) for _ in range(7)
    )
    weight, bias, weight2, bias2 = (_meta(channels, dtype=torch.float32) for _ in range(4))
    first, second = (mean, inverse, weight, bias), (mean2, inverse2, weight2, bias2)
    gradients = (dbias, dweight, samples * side * side)
    both = (*(mean, inverse, weight, dbias, dweight), *(shortcut, mean2, inverse2, weight2, dweight2), gradients[2])
    # How many tiles of activations one program reads at a time: the pool's windows and pixels are four of each.
    plans = [
        ("statistics", 1, norm._statistics.plan(x, 1e-5, parts)),
        ("apply", 1, norm._apply.plan(x, *first)),
        ("apply, shortcut", 2, norm._apply.plan(x, *first, shortcut)),
        ("apply, two", 2, norm._apply.plan(x, *first, shortcut, *second)),
        ("apply_mask, shortcut", 2, norm._apply_mask.plan(x, *first, shortcut)),
        ("apply_mask, two", 2, norm._apply_mask.plan(x, *first, shortcut, *second)),
        ("relu_reduce", 2, norm._relu_reduce.plan(dy, x, *first)),
        ("relu_input_gradient", 2, norm._relu_input_gradient.plan(dy, x, *first, *gradients)),
        ("add_reduce, one", 2, norm._add_reduce.plan(dy, None, mask, x, mean, inverse)),
        ("add_reduce", 3, norm._add_reduce.plan(dy, dy_skip, mask, x, mean, inverse)),
        ("add_reduce, two", 4, norm._add_reduce.plan(dy, dy_skip, mask, x, mean, inverse, shortcut, mean2, inverse2)),
        ("input_gradient", 2, norm._input_gradient.plan(dy, x, mean, inverse, weight, *gradients)),
        ("input_gradients", 3, norm._input_gradients.plan(dy, x, *both)),
        ("relu_pool", 9, norm._relu_pool.plan(x, *first)),
        ("relu_pool_reduce", 12, norm._relu_pool_reduce.plan(pooled, pooled_skip, choice, x, *first)),
        (
            "relu_pool_input_gradient",
            12,
            norm._relu_pool_input_gradient.plan(pooled, pooled_skip, choice, x, *first, *gradients),
        ),
    ]
    suffix = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    if channels % 16:
        suffix += f" C={channels}"
    if parts > 1:
        suffix += " parts"
    found: list[Case] = []
    for name, tiles, (sweep, *combine) in plans:
        elements = sweep.constants["BLOCK_R"] * sweep.constants["BLOCK_C"] * dtype.itemsize
        wide = 0 if channels % 16 else tiles * elements // (sweep.num_warps * 32 * 16)
        # A thread's two bytes of a mask are a load of 16 bits.
        narrow = 16 if dtype.itemsize == 2 and not channels % 16 and not name.startswith("add_reduce") else 0
        found.append(Case(f"batch_norm {name} {suffix}", sweep, wide, narrow))
        if combine and parts == 1 and dtype == torch.bfloat16 and name in ("statistics", "relu_reduce"):
            found.append(Case(f"batch_norm {name} {suffix}, combine", combine[0], 0, 0))
    return found


def _maps(samples: int, channels: int, side: int, dtype: torch.dtype) -> Tensor:
    return _meta(samples, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)


def cases(capability: int) -> Iterator[Case]:
    """The launches of the sizes that the project trains with, and the corners that differ in code."""
    yield _gradcam("gradcam_cosine bf16", torch.bfloat16)
    yield _gradcam("gradcam_cosine fp16", torch.float16)
    yield _gradcam("gradcam_cosine fp32", torch.float32)
    yield _gradcam("gradcam_cosine bf16 forward only", torch.bfloat16, with_gradient=False)
    yield _gradcam("gradcam_cosine bf16 512x14x14", torch.bfloat16, channels=512, height=14, width=14)
    yield _gradcam("gradcam_cosine bf16 8192x32x32", torch.bfloat16, channels=8192, height=32, width=32)
    yield _gradcam("gradcam_cosine bf16 16384x7x7", torch.bfloat16, channels=16384)
    yield _gradcam("gradcam_cosine_from_gradient bf16", torch.bfloat16, from_gradient=True)
    yield _gradcam("gradcam_cosine_from_gradient fp32", torch.float32, from_gradient=True)
    yield from _info_nce("info_nce bf16 T=0.07", torch.bfloat16, 0.07, capability)
    yield from _info_nce("info_nce bf16 T=0.01", torch.bfloat16, 0.01, capability)
    yield from _info_nce("info_nce fp16", torch.float16, 0.07, capability)
    yield from _info_nce("info_nce fp32 T=0.07", torch.float32, 0.07, capability)
    yield from _info_nce("info_nce fp32 T=0.01", torch.float32, 0.01, capability)
    yield from _info_nce("info_nce fp32 D=256", torch.float32, 0.07, capability, dimension=256)
    yield from _info_nce("info_nce fp32 D=512", torch.float32, 0.07, capability, dimension=512)
    yield from _info_nce("info_nce bf16 D=256", torch.bfloat16, 0.07, capability, dimension=256)
    yield from _info_nce("info_nce bf16 D=512", torch.bfloat16, 0.07, capability, dimension=512)
    yield from _batch_norm(torch.bfloat16)
    yield from _batch_norm(torch.float16)
    yield from _batch_norm(torch.float32)
    yield from _batch_norm(torch.bfloat16, channels=65, side=7)
    yield from _batch_norm(torch.bfloat16, parts=2)


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and attributes as Triton's own launcher derives them from these arguments."""
    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, (name, value) in enumerate(zip(names, launch.arguments)):
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            # Allocations are aligned; only a view can start elsewhere.
            aligned = value.storage_offset() * value.dtype.itemsize % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
            aligned = False
        elif value == 1:
            signature[name] = "constexpr"
            constants[name] = 1
            aligned = False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    for name in launch.constants:
        signature[name] = "constexpr"
    return {name: signature[name] for name in names}, constants, attributes


def compile_case(case: Case, capability: int) -> dict[str, Any]:
    """Compile one case and read its resources from the binary."""
    signature, constants, attributes = specialise(case.launch)
    source = ASTSource(fn=case.launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.launch.options())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        assembly = _cuobjdump("-sass", file.name)
    loads: Counter[int] = Counter()
    for opcode in re.findall(r"\b(LDG(?:STS)?\.[A-Z0-9_.]+)", assembly):
        loads[_width(opcode)] += 1
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage),
        "local": _number(r"LOCAL:(\d+)", usage) + len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        "shared": int(compiled.metadata.shared),
        "loads": {str(bits): count for bits, count in sorted(loads.items())},
        "async_copies": len(re.findall(r"\bLDGSTS\b", assembly)),
        "matrix": sorted(set(re.findall(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA)\b", assembly))),
    }


def _cuobjdump(flag: str, path: str) -> str:
    done = subprocess.run([str(CUOBJDUMP), flag, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no {pattern!r}")
    return int(found.group(1))


def _width(opcode: str) -> int:
    """Bits of a global load in SASS; 32 is the default and is not spelled out."""
    for part, bits in (("128", 128), ("64", 64), ("U16", 16), ("S16", 16), ("U8", 8), ("S8", 8)):
        if part in opcode.split("."):
            return bits
    return 32


def faults(case: Case, row: dict[str, Any]) -> list[str]:
    """What a committed table must not contain."""
    found = []
    if row["local"]:
        found.append(f"{row['local']} uses of local memory: registers were spilled")
    wide = row["loads"].get("128", 0) + row["loads"].get("256", 0) * 2
    if wide < case.wide_loads:
        found.append(
            f"{wide} loads of 128 bits, expected at least {case.wide_loads}: the large input is loaded narrowly"
        )
    narrow = sum(count for bits, count in row["loads"].items() if int(bits) <= case.narrow_bits)
    if narrow:
        found.append(f"{narrow} loads of {case.narrow_bits} bits or fewer: the large input is loaded narrowly")
    return found


def measure(capabilities: Iterable[int]) -> tuple[dict[str, Any], list[str]]:
    """The table (case -> architecture -> launch and resources) and every fault found in it."""
    table: dict[str, Any] = {}
    found: list[str] = []
    for capability in capabilities:
        for case in cases(capability):
            launch = case.launch
            row = compile_case(case, capability)
            sizes = {**launch.constants, **launch.options()}
            table.setdefault(case.name, {})[f"sm_{capability}"] = {"launch": sizes, **row}
            found += [f"{case.name}, sm_{capability}: {fault}" for fault in faults(case, row)]
    return table, found


def table_path(version: str = triton.__version__) -> Path:
    """Where the table of a Triton version is kept."""
    return RESULTS / f"triton-{version.split('+')[0]}.json"


def differences(table: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Where a fresh table differs from a committed one."""
    found = [f"{name}: not in the committed table" for name in table if name not in committed]
    found += [f"{name}: in the committed table, but no longer compiled" for name in committed if name not in table]
    for name in table.keys() & committed.keys():
        for column in sorted(table[name].keys() | committed[name].keys()):
            now, then = table[name].get(column), committed[name].get(column)
            if now != then:
                found.append(f"{name}, {column}: committed {then}, now {now}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="store the table of this Triton version")
    parser.add_argument("--capability", type=int, choices=tuple(MULTIPROCESSORS), help="this architecture alone")
    parser.add_argument("--check", action="store_true", help="fail on spills, narrow loads or a stale table")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
    if args.write and args.capability:
        parser.error("--write stores all architectures: leave --capability out")
    table, found = measure([args.capability] if args.capability else tuple(MULTIPROCESSORS))
    for name, rows in table.items():
        for column, row in rows.items():
            print(
                f"{name:36} {column:7} registers {row['registers']:3}  local {row['local']:3}  "
                f"shared {row['shared']:6}  async {row['async_copies']:3}  loads {row['loads']}  {row['matrix']}"
            )
    if args.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        document = {"triton": triton.__version__, "cases": table}
        table_path().write_text(json.dumps(document, indent=1) + "\n")
    if args.check:
        path = table_path()
        if path.exists():
            committed = json.loads(path.read_text())["cases"]
            if args.capability:
                column = f"sm_{args.capability}"
                committed = {name: {column: rows[column]} for name, rows in committed.items()}
            found += differences(table, committed)
        else:
            print(f"no table for Triton {triton.__version__} ({path.name}): only spills and load widths are checked")
    for fault in found:
        print(f"fault: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
