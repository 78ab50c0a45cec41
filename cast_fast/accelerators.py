"""Optional accelerators that are not dependencies: the fused SGD of NVIDIA apex.

apex is used only where three things hold: it is asked for (``--apex``), it is NVIDIA's (the package of that name on
PyPI is an unrelated one), and a probe on the device shows that it updates weights as torch's own SGD does, including
what the training step asks of an optimizer: a gradient scale and a skip flag that stay on the device. What was chosen,
and why, is recorded in the run's config.json. apex's groupbn is not used: it knows float16 only.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cast_fast.errors import UserError
from cast_fast.optim import build_optimizer, make_gateable

log = logging.getLogger("cast_fast")

PROBE_TOLERANCE = 2e-6
"""Largest relative difference of weights after the probe's steps: a few roundings of float32, since the two kernels
contract multiplications and additions differently."""


class Apex(NamedTuple):
    """What is installed under the name apex."""

    sgd: Any
    """The class ``apex.optimizers.FusedSGD``, or ``None``."""
    reason: str
    """Why it is missing; empty where it is there."""
    parts: tuple[str, ...] = ()
    """Which of the parts that could serve here import."""


def find_apex() -> Apex:
    """Looks for NVIDIA apex by what it can do, not by its name or version.

    Whatever an import raises is an answer, not a failure: a broken build of an optional package must not stop a run.
    """
    if "apex" not in sys.modules and importlib.util.find_spec("apex") is None:
        return Apex(None, "not installed")
    fault = _import_fault("apex")
    if fault is not None:
        return Apex(
            None, f"the installed package apex cannot be imported ({fault}); PyPI's apex is an unrelated project"
        )
    if importlib.util.find_spec("apex.optimizers") is None:
        return Apex(None, "the installed package apex is not NVIDIA's (PyPI's apex is an unrelated project)")
    faults = {
        name: _import_fault(module, attribute)
        for name, module, attribute in (
            ("FusedSGD", "apex.optimizers", "FusedSGD"),
            ("amp_C", "amp_C", "multi_tensor_sgd"),
            ("groupbn", "apex.contrib.groupbn", "BatchNorm2d_NHWC"),
        )
    }
    parts = tuple(name for name, problem in faults.items() if problem is None)
    needed = [f"{name}: {faults[name]}" for name in ("FusedSGD", "amp_C") if faults[name] is not None]
    if needed:
        return Apex(None, f"NVIDIA apex is installed but unusable ({'; '.join(needed)})", parts)
    return Apex(importlib.import_module("apex.optimizers").FusedSGD, "", parts)


def _import_fault(module: str, attribute: str | None = None) -> str | None:
    """Why ``module`` or its ``attribute`` cannot be had, or ``None``."""
    try:
        imported = importlib.import_module(module)
        if attribute is not None:
            getattr(imported, attribute)
    except Exception as error:  # a stand-in or a build for another CUDA may raise anything
        return _describe(error)
    return None


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def gateable_apex_sgd(fused_sgd: type) -> Any:
    """apex's FusedSGD that obeys ``grad_scale`` and ``found_inf``, as torch's fused optimizers do.

    The skip flag is apex's own: its kernel does nothing where the flag is not zero. The scale of apex is a number of
    the host, so a scale on the device costs a pass of its own over the gradients.
    """

    class ApexSGD(fused_sgd):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None) -> Any:
            scale: Tensor | None = getattr(self, "grad_scale", None)
            found_inf: Tensor | None = getattr(self, "found_inf", None)
            if scale is not None:
                gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
                torch._foreach_mul_(gradients, scale.reciprocal())
            if found_inf is None:
                self._dummy_overflow_buf.zero_()
            else:
                self._dummy_overflow_buf.copy_(found_inf.view(1))
            return super().step(closure)

    return ApexSGD


def parity_fault(apex_sgd: type, device: torch.device) -> str | None:
    """Runs ``apex_sgd`` beside torch's fused SGD; returns what differs, or ``None``.

    Four steps with momentum and weight decay on parameters of odd and channels-last shapes: a plain one, one with a
    gradient scale, one that is to be skipped, and a plain one again.
    """
    shapes = ((7,), (1,), (64, 3, 7, 7), (33, 65), (2048, 513))
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)]

    def place(values: list[Tensor]) -> list[Tensor]:
        return [_channels_last(value.to(device)) for value in values]

    def run(optimizer_class: Any, **extra: Any) -> list[Tensor]:
        parameters = [nn.Parameter(value) for value in place(start)]
        optimizer = optimizer_class(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2, **extra)
        make_gateable(optimizer)
        for number, values in enumerate(gradients):
            for parameter, gradient in zip(parameters, place(values)):
                parameter.grad = gradient
            scale = torch.full((), 3.0, device=device) if number == 1 else None
            skip = torch.full((), float(number == 2), device=device)
            vars(optimizer).update(grad_scale=scale, found_inf=skip)
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    try:
        results = run(gateable_apex_sgd(apex_sgd))
    except Exception as error:  # an accelerator that raises is one that is not used
        return _describe(error)
    for shape, got, expected in zip(shapes, results, run(torch.optim.SGD, fused=True)):
        difference = ((got - expected).norm() / expected.norm()).item()
        if not difference <= PROBE_TOLERANCE:
            return f"weights of shape {shape} differ from torch's SGD by {difference:.1e} (at most {PROBE_TOLERANCE})"
    return None


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def build_sgd(
    parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float, *, apex: str
) -> tuple[Optimizer, str]:
    """The optimizer of a run, and one line for its record: which it is and why.

    Args:
        parameters: already on their device.
        lr, momentum, weight_decay: as for ``optim.build_optimizer``.
        apex: ``"off"`` takes torch's fused SGD, ``"auto"`` apex's where it passes the probe, ``"on"`` insists on it.

    Raises:
        UserError: ``apex`` is ``"on"`` and apex cannot be used.
        ValueError: unknown ``apex``.
    """
    if apex not in ("auto", "on", "off"):
        raise ValueError(f"apex: got {apex!r}, expected auto, on or off")
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    device = trained[0].device
    if apex == "off":
        return build_optimizer(trained, lr, momentum, weight_decay), "torch SGD, fused"
    found = find_apex()
    reason = found.reason
    if not reason and device.type != "cuda":
        reason = f"apex runs on CUDA only, not on {device}"
    if not reason and found.sgd is not None:
        reason = parity_fault(found.sgd, device) or ""
        if not reason:
            optimizer = gateable_apex_sgd(found.sgd)(trained, lr=lr, momentum=momentum, weight_decay=weight_decay)
            make_gateable(optimizer)
            log.info("optimizer: apex FusedSGD, which passed the probe against torch's SGD")
            return optimizer, "apex FusedSGD, parity probed"
    if apex == "on":
        raise UserError(f"--apex: got on, but apex cannot be used here: {reason}; expected auto or off")
    log.info("optimizer: torch's fused SGD, because of apex: %s", reason)
    return build_optimizer(trained, lr, momentum, weight_decay), f"torch SGD, fused (apex: {reason})"
