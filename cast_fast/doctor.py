"""``cast-fast doctor``: what is installed, what will run where, and why.

Each line is one finding. A *fault* means that ``cast-fast pretrain`` would fail on this machine, and makes the exit
code 1; a *note* says that something slower or smaller takes its place, with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from cast_fast.config import PretrainConfig
from cast_fast.errors import UserError

HELP = "say what is installed, what will run where, and why"

OK, NOTE, FAULT = "ok", "note", "fault"
DALI_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
LEAST_OPEN_FILES = 4096
"""A loader of many shards and NCCL's sockets together stay well below this."""
LEAST_SHARED_MEMORY = 1 << 30
"""Bytes of /dev/shm: NCCL passes data between the processes of a node through it (containers often have 64 MiB)."""


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    state: str
    """``ok``, ``note`` or ``fault``."""
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``cast-fast doctor``."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where you want to train")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--no-compile", action="store_true", help="leave out the trial of torch.compile (some seconds)")


def main(args: argparse.Namespace) -> int:
    """Prints the findings; returns 1 where pretraining would fail, else 0."""
    findings = list(examine(args.device, compile=not args.no_compile))
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        table = Table(show_header=False, box=None, pad_edge=False)
        for _ in range(3):
            table.add_column(overflow="fold")
        style = {OK: "green", NOTE: "yellow", FAULT: "bold red"}
        for finding in findings:
            table.add_row(finding.name, f"[{style[finding.state]}]{finding.state}[/]", finding.text)
        Console(soft_wrap=True).print(table)
    return int(any(finding.state == FAULT for finding in findings))


def examine(device: str = "auto", *, compile: bool = True) -> Iterator[Finding]:
    """Looks at everything a run depends on, in the order in which the run meets it.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``, as for ``cast-fast pretrain``.
        compile: whether to try ``torch.compile``.
    """
    import torch

    yield Finding("platform", OK, f"{platform.platform()}, Python {platform.python_version()}, {_cpus()} CPU cores")
    yield _torch(torch)
    yield from _gpus(torch, device)
    where = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    yield from _libraries(torch, where)
    yield from _native()
    yield from _accelerators()
    if compile:
        yield _compile(where)
    yield from _limits(where)
    yield from _choices(where)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _torch(torch: Any) -> Finding:
    built = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if torch.version.cuda else "no CUDA"
    text = f"torch {torch.__version__} ({built}), {_version('torchvision') or 'torchvision missing'}"
    new_enough = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 11)
    return Finding(
        "torch", OK if new_enough else FAULT, text if new_enough else f"{text}; expected torch 2.11 or newer"
    )


def _gpus(torch: Any, device: str) -> Iterator[Finding]:
    driver = _driver()
    if not torch.cuda.is_available():
        reason = f"driver {driver} but torch finds no CUDA device" if driver else "no NVIDIA driver found"
        yield Finding(
            "GPU", FAULT if device == "cuda" else NOTE, f"{reason}; training runs on the CPU, for trying only"
        )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        text = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{capability[0]}{capability[1]}, "
            f"driver {driver or 'unknown'}"
        )
        if capability < (8, 0):
            yield Finding(f"GPU {index}", NOTE, f"{text}: below sm_80 there are no bf16 matrix units; --precision fp32")
        else:
            yield Finding(f"GPU {index}", OK, text)
    if torch.distributed.is_nccl_available():
        yield Finding("NCCL", OK, ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding("NCCL", NOTE, "torch was built without NCCL: one GPU only")


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    lines = answer.stdout.split()
    return lines[0] if lines else None


def _libraries(torch: Any, where: Any) -> Iterator[Finding]:
    triton = _version("triton")
    if triton is None:
        state = FAULT if where.type == "cuda" else NOTE
        yield Finding("Triton", state, "not installed: no fused losses and no torch.compile on a GPU")
    else:
        yield Finding("Triton", OK, triton if where.type == "cuda" else f"{triton} (compiles for GPUs only)")
    fault = dali_fault()
    dali = _version(*DALI_PACKAGES)
    wanted = _dali_extra(torch)
    if fault is not None:
        yield Finding("DALI", FAULT, fault)
    elif where.type == "cuda" and dali is not None and wanted.removeprefix("cuda") not in dali:
        note = f"{dali}, but torch is built for CUDA {torch.version.cuda}: prefer the extra {wanted}"
        yield Finding("DALI", NOTE, note)
    else:
        yield Finding("DALI", OK, dali or "installed, version unknown")


def _dali_extra(torch: Any) -> str:
    return "cuda12" if (torch.version.cuda or "13").startswith("12") else "cuda13"


def dali_fault() -> str | None:
    """Why DALI cannot load pictures here and what to install, or ``None``."""
    import torch

    hint = f"pip install 'cast_fast[{_dali_extra(torch)}]'"
    try:
        importlib.import_module("nvidia.dali")
    except ModuleNotFoundError:
        if _version("nvidia-dali") is not None and _version(*DALI_PACKAGES) is None:
            return f"NVIDIA DALI is not installed (the package nvidia-dali is only a signpost): {hint}"
        return f"NVIDIA DALI is not installed, and nothing else can load the pictures: {hint}"
    except (ImportError, OSError) as error:
        return f"NVIDIA DALI does not load ({error}): {hint}"
    return None


def _native() -> Iterator[Finding]:
    from cast_kernels import dali_plugin

    reason = dali_plugin.unavailable_reason()
    if reason is None:
        status = dali_plugin.status()
        backends = "CPU and CUDA backends" if status.cuda else "CPU backend"
        yield Finding("native crops", OK, f"{backends}, {status.library}")
    else:
        yield Finding("native crops", NOTE, f"windows come from the NumPy rule (the same windows, slower): {reason}")


def _accelerators() -> Iterator[Finding]:
    from cast_fast.accelerators import find_apex

    apex = find_apex()
    parts = f"parts: {', '.join(apex.parts)}" if apex.parts else "no part of it"
    if apex.sgd is not None:
        yield Finding("apex", OK, f"NVIDIA's, {parts}; used with --apex auto, after a parity probe")
    else:
        yield Finding("apex", OK, f"{apex.reason}; optional")


def _compile(where: Any) -> Finding:
    from cast_fast.compilation import compile_fault

    fault = compile_fault(where)
    if fault is None:
        return Finding("torch.compile", OK, f"a trial on {where} compiled and ran")
    return Finding("torch.compile", NOTE, f"the step runs eager, which is slower: {fault}")


def _limits(where: Any) -> Iterator[Finding]:
    cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir()) / f"torchinductor_{_user()}")
    parent = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if os.access(parent, os.W_OK):
        free = shutil.disk_usage(parent).free
        yield Finding("compile cache", OK, f"{cache}, {free / 2**30:.0f} GiB free")
    else:
        yield Finding("compile cache", FAULT, f"{cache} is not writable: set TORCHINDUCTOR_CACHE_DIR")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= LEAST_OPEN_FILES
    text = f"{soft} of {hard}" if enough else f"{soft} of {hard}: expected {LEAST_OPEN_FILES} (ulimit -n)"
    yield Finding("open files", OK if enough else NOTE, text)
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        enough = size >= LEAST_SHARED_MEMORY or where.type != "cuda"
        advice = "" if enough else ": NCCL may run out between the GPUs of a node (docker run --shm-size=8g)"
        yield Finding("shared memory", OK if enough else NOTE, f"{size / 2**20:.0f} MiB{advice}")


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _choices(where: Any) -> Iterator[Finding]:
    import logging

    from cast_fast.step import resolve_precision, resolve_queue_dtype
    from cast_fast.train import use_kernels

    level = logging.getLogger("cast_fast").level
    logging.getLogger("cast_fast").setLevel(logging.ERROR)  # the choices are printed here, not logged
    try:
        dtype = str(resolve_precision("auto", where)).removeprefix("torch.")
        kernels = use_kernels("auto", where)
        losses = "fused Triton kernels" if kernels else "plain torch, fused by torch.compile"
        queue = resolve_queue_dtype("auto", "auto", where, kernels)
    except UserError as error:
        yield Finding("a run here", FAULT, str(error))
        return
    finally:
        logging.getLogger("cast_fast").setLevel(level)
    decode = "JPEGs on the GPU, maps and windows on the CPU" if where.type == "cuda" else "everything on the CPU"
    yield Finding("a run here", OK, f"trains on {where} in {dtype}; losses: {losses}; loader: {decode}")
    yield _batch_norm(where)
    yield _exchange(queue)


def _batch_norm(where: Any) -> Finding:
    """Which BatchNorm a run takes unless told otherwise, and why not the other one."""
    from cast_fast.run_folder import GROUP_SIZE

    default = PretrainConfig.batch_norm
    if where.type != "cuda":
        other = "streaming computes the same here, without gain: its kernels are for GPUs"
    else:
        other = (
            "streaming (fused Triton sweeps, the same within rounding) moves a seventh less memory in the trunk by "
            "count, and is not the default because no GPU has timed it: benchmarks/gpu_check.sh does"
        )
    groups = f"one process takes statistics of {GROUP_SIZE} samples at a time, as many ranks would"
    return Finding("BatchNorm", OK, f"--batch-norm {default}, the default; {other}. {groups} (--batch-norm-groups)")


def _exchange(queue: Any) -> Finding:
    """What the ranks would send each other to share a queue of keys of the type ``queue``."""
    from cast_fast.distributed import choose_exchange, exchange_bytes

    default, ranks = PretrainConfig(), 8
    sizes = (default.batch, default.queue_size, default.dim, ranks, queue.itemsize)
    sent = " and ".join(f"{count / 1e6:.1f} MB by {name}" for name, count in exchange_bytes(*sizes).items())
    return Finding(
        "queue exchange",
        OK,
        f"on {ranks} ranks of {default.batch} pairs and {default.queue_size:,} keys in "
        f"{str(queue).removeprefix('torch.')} a step sends {sent}: --queue-exchange auto takes "
        f"{choose_exchange('auto', *sizes)}",
    )
