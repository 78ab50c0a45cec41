"""A kernel launch as a value, so that the program that is measured offline is the program that is launched.

A launcher in this package builds a ``Launch`` from tensors alone: real ones to run it, ``meta`` ones to compile it
for a GPU that is not there (``benchmarks/offline_compile.py``).
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels read. float64 exists on the CPU only, where the reference runs."""


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel."""

    kernel: Any
    """The ``triton.jit`` function."""
    grid: tuple[int, ...]
    arguments: tuple[Tensor | int | float, ...]
    """Run-time arguments in the order of the kernel's parameters."""
    constants: dict[str, Any]
    """The kernel's ``tl.constexpr`` parameters."""
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None
    """Of a thread. Left alone, the assembler may spill some to fit one more program on a multiprocessor."""

    def run(self) -> None:
        """Launch on the device of the first tensor. An empty grid launches nothing."""
        if 0 in self.grid:
            return
        device = next(argument.device for argument in self.arguments if isinstance(argument, Tensor))
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with guard:
            self.kernel[self.grid](*self.arguments, **self.constants, **self.options())

    def options(self) -> dict[str, int]:
        """What Triton's compiler is told beside the arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


@functools.cache
def device_properties(device: torch.device) -> tuple[int, int]:
    """Compute capability (80, 90, ...) and number of multiprocessors; those of an H200 for a device that is no GPU."""
    if device.type != "cuda":
        return 90, 132
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def check_kernel_dtype(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor's type is one that the kernels (on the CPU: the references) take."""
    allowed = KERNEL_DTYPES if tensor.device.type == "cuda" else (*KERNEL_DTYPES, torch.float64)
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{name}: got dtype {tensor.dtype} on {tensor.device.type}, expected one of {names}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless the tensor has the expected shape; ``meaning`` names the dimensions."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {meaning} = {expected}")


def check_same_device(first: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device."""
    for name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise ValueError(f"{name}: got device {other.device}, expected {tensor.device}, that of {first}")
