"""``torch.compile`` for functions that one process may compile many times.

torch keeps what it compiled by the function's code object and refuses the ninth version of one: a notebook that builds
its ninth step, or a trial under another number of threads, would fail. So what is compiled here is a copy with a code
object of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """The function compiled as one graph for fixed shapes, apart from whatever was compiled of it before.

    Args:
        function: defined in Python; a graph break in it is an error when it is called.
        mode: of ``torch.compile``.
    """
    return torch.compile(own_code(function), fullgraph=True, dynamic=False, mode=mode)


def own_code(function: Any, name: str | None = None) -> Any:
    """A copy of a function with a code object of its own, on demand under another name."""
    name = name or function.__name__
    code = function.__code__.replace(co_name=name)
    copied = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def compile_fault(device: torch.device) -> str | None:
    """Why ``torch.compile`` does not work for this device, or ``None`` where a small trial compiles and runs."""
    try:
        compiled(_trial)(torch.ones(8, device=device))
    except Exception as error:  # whatever the compiler throws is the answer
        # torch tells on its first line which backend failed and on the next what it said.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return ": ".join([type(error).__name__, *(line.rstrip(":") for line in lines[:2])])
    return None


def _trial(x: Tensor) -> Tensor:
    return (x + 1).relu()
