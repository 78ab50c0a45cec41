"""The one table of tolerances for kernels, and what kernel tests share.

The truth is a float64 run of the reference on the very numbers that the kernel read, so that rounding of the inputs
is no error of the kernel. Every error is measured against the natural scale of the quantity (``scale``), which the
test derives; 0 there demands exact equality.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

KERNEL_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Kernels run compiled on a GPU, and in Triton's interpreter on the CPU without one."""
INTERPRETED = KERNEL_DEVICE.type == "cpu"

STORED = {
    torch.float64: 1e-12,
    torch.float32: 4e-6,
    torch.float16: 2.0**-11 + 4e-6,
    torch.bfloat16: 2.0**-8 + 4e-6,
}
"""By the type that a result is stored in. float64: order of summation only. float32: accumulation in float32 over up
to some thousand terms, each rounded to 2^-24 = 6e-8, at most sqrt(8192) · 6e-8 = 5e-6 for rounding errors of random
sign at the natural scale. float16 and bfloat16 add half a unit in the last place of the stored value."""

CUT_OFF = {torch.bfloat16: 2.0} if INTERPRETED else {}
"""Triton's interpreter cuts bfloat16 off where hardware rounds: a kernel's stored value errs by a whole unit in the
last place instead of half of one."""

INFO_NCE_PRODUCT = {
    torch.float64: 1e-12,
    torch.float32: 2.0**-15,
    torch.float16: 2.0**-19,
    torch.bfloat16: 2.0**-19,
}
"""By the type of the queue: absolute error of q·k for unit rows on a GPU; a logit errs 1 / T times that. float32: three
products of bfloat16 halves leave out low · low, 2^-16, and as much again by rounding the halves. 16-bit numbers are
multiplied exactly in float32, which then adds up to 512 products."""

INFO_NCE_WEIGHT = {
    torch.float64: 1e-12,
    torch.float32: 2.0**-15,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-8,
}
"""By the type of the queue: relative error of a softmax weight where it multiplies a key: half a unit in the last
place, 2^-11 and 2^-9, once more for the margin; a weighted mean of unit vectors errs by no more."""

CASE_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernel_marks(warnings: str = "encountered") -> list[pytest.MarkDecorator]:
    """For a file that tests kernels.

    On a GPU its tests run compiled kernels, and ``-m gpu`` finds them. The interpreter's NumPy gives the warnings where
    NaN and infinity are what a test is about.

    Raises:
        RuntimeError: an interpreter that cannot run a loop.
    """
    if INTERPRETED and _version(triton) < (3, 7) and _version(np) >= (2, 4):
        # A bound of a loop is an array of one element there, which NumPy no longer converts to a number.
        raise RuntimeError(
            f"the interpreter of Triton {triton.__version__} fails with NumPy {np.__version__}: expected NumPy below "
            "2.4, or a later Triton"
        )
    marks = [pytest.mark.filterwarnings(f"ignore:.*{warnings}:RuntimeWarning")]
    return marks if INTERPRETED else [*marks, pytest.mark.gpu]


def _version(package: ModuleType) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(number) for number in package.__version__.split(".")[:2])


def dtype_id(dtype: torch.dtype) -> str:
    """``float32`` rather than ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def shape_id(shape: tuple[int, ...]) -> str:
    """``3x37x7x7``."""
    return "x".join(map(str, shape))


def assert_close(name: str, actual: Tensor, truth: Tensor, scale: Tensor | float, tolerance: float) -> None:
    """Assert ``|actual - truth| <= tolerance * scale`` everywhere; ``scale`` broadcasts. NaN is never close."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if actual.numel() == 0:
        return
    # Where the results are: on a GPU they are large.
    error = (actual.detach().double() - truth.detach().to(actual.device, torch.float64)).abs()
    bound = torch.as_tensor(scale, dtype=torch.float64).to(actual.device).expand_as(error) * tolerance
    bad = ~(error <= bound)
    if bad.any():
        ratio = torch.where(bound > 0, error / bound, torch.inf)
        worst = int(torch.where(error.isnan(), torch.full_like(ratio, torch.inf), ratio).argmax())
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        pytest.fail(
            f"{name}: {int(bad.sum())} of {error.numel()} values are off; worst at {place}: got "
            f"{actual.flatten()[worst].item()!r}, expected {truth.flatten()[worst].item()!r}, error "
            f"{error.flatten()[worst].item():.3e}, allowed {bound.flatten()[worst].item():.3e}"
        )


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``new_empty`` and ``torch.empty`` return with NaN (integers: a value no test expects), so that
    unwritten outputs fail."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: object, **kwargs: object) -> Tensor:
            tensor = make(*args, **kwargs)
            poison = torch.nan if tensor.is_floating_point() else 177 if tensor.dtype == torch.uint8 else -77_777
            return tensor.fill_(poison)

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", filled(torch.empty))


@contextlib.contextmanager
def far_apart(count: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """A flat tensor of ``count`` elements to test 64-bit offsets; on the CPU its untouched pages take no memory."""
    if device.type == "cuda":
        yield torch.zeros(count, dtype=dtype, device=device)
        return
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    yield torch.frombuffer(memory, dtype=dtype)
