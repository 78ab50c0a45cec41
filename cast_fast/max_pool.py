"""Max pooling whose gradient is gathered, so that it stays in channels-last memory when it is compiled.

``torch.compile`` (2.14) writes the backward pass of max pooling as a scatter: it fills a float32 buffer in NCHW order
with zeros, adds to it at random, and the BatchNorm before the pool then reads that buffer three times (pytorch issue
167318). Here each input pixel collects the gradients of the windows that chose it instead, in ordinary operations that
the compiler fuses with what follows. Nothing global is changed: the module replaces the one pool of a ResNet.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` with a gathered gradient under ``torch.compile``.

    Values and gradients are those of ``nn.MaxPool2d``, ties included; a gradient in bfloat16 or float16 is the sum in
    float32, rounded once. Eager mode uses torch's own kernels, and so does a pool with dilation, with ``ceil_mode`` or
    that returns its indices.

    Args:
        gathered: the switch. By default CUDA gathers and the CPU does not: there the scatter is the faster of the two.
            ``False`` leaves the gradient to torch everywhere.
        others: as for ``nn.MaxPool2d``.
    """

    def __init__(self, *arguments: Any, gathered: bool | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gathered = gathered

    @classmethod
    def like(cls, pool: nn.MaxPool2d, *, gathered: bool | None = None) -> MaxPool2d:
        """The same pool as ``pool``."""
        return cls(
            pool.kernel_size,
            pool.stride,
            pool.padding,
            pool.dilation,
            pool.return_indices,
            pool.ceil_mode,
            gathered=gathered,
        )

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(N, C, H, W) → (N, C, h, w), and with ``return_indices`` the chosen pixels."""
        ordinary = _pair(self.dilation) == (1, 1) and not self.ceil_mode and not self.return_indices
        gathered = input.is_cuda if self.gathered is None else self.gathered
        if gathered and ordinary and torch.compiler.is_compiling() and input.dim() == 4:
            return gathered_max_pool(input, _pair(self.kernel_size), _pair(self.stride), _pair(self.padding))
        return super().forward(input)


def gathered_max_pool(
    input: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Max pooling of (N, C, H, W) whose backward pass gathers; see ``MaxPool2d``."""
    return _GatheredMaxPool.apply(input, kernel, stride, padding)


class _GatheredMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, input: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        output, chosen = F.max_pool2d(input, kernel, stride, padding, return_indices=True)
        ctx.save_for_backward(chosen)
        ctx.shape, ctx.geometry = input.shape, (kernel, stride, padding)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (chosen,) = ctx.saved_tensors
        return gather_gradient(gradient, chosen, ctx.shape, *ctx.geometry), None, None, None


def gather_gradient(
    gradient: Tensor,
    chosen: Tensor,
    shape: torch.Size,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Gradient of max pooling with respect to its input.

    Args:
        gradient: (N, C, h, w) with respect to the output.
        chosen: (N, C, h, w) int64, number y · W + x of the pixel that each window chose.
        shape: (N, C, H, W) of the input.
        kernel, stride, padding: of the pool, without dilation.

    Returns:
        (N, C, H, W) in the dtype of ``gradient``, in channels-last memory.
    """
    # Indexed as (N, H, W, C), so that the result is laid out like this.
    gradient, chosen = gradient.permute(0, 2, 3, 1), chosen.permute(0, 2, 3, 1)
    height, width = shape[-2:]
    rows = _windows(height, gradient.shape[1], kernel[0], stride[0], padding[0], gradient.device)
    columns = _windows(width, gradient.shape[2], kernel[1], stride[1], padding[1], gradient.device)
    pixel = torch.arange(height * width, device=gradient.device).view(height, width, 1)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    total: Tensor | None = None
    # In the order in which torch's kernels add, so that float32 sums are theirs to the bit.
    for row, row_there in rows:
        for column, column_there in columns:
            there = (row_there[:, None] & column_there)[..., None] & (chosen[:, row[:, None], column] == pixel)
            part = torch.where(there, gradient[:, row[:, None], column].to(wide), 0)
            total = part if total is None else total + part
    assert total is not None
    return total.to(gradient.dtype).permute(0, 3, 1, 2)


def _windows(
    length: int, windows: int, kernel: int, stride: int, padding: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Along one axis, the windows over each pixel: (length,) their numbers, clamped, and whether it is one."""
    position = torch.arange(length, device=device) + padding
    first = torch.div(position - kernel, stride, rounding_mode="floor") + 1
    last = torch.div(position, stride, rounding_mode="floor")
    found = []
    for ahead in range(math.ceil(kernel / stride)):
        number = first + ahead
        there = (number >= 0) & (number <= last) & (number < windows)
        found.append((number.clamp(0, windows - 1), there))
    return found


def _pair(value: Any) -> tuple[int, int]:
    """The two numbers of a setting that may be given as one."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
