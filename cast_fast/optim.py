"""SGD whose update a device flag can suppress, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer


def build_optimizer(
    parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.9, weight_decay: float = 1e-4
) -> SGD:
    """Fused SGD over the parameters that require a gradient, made ready for ``step.TrainStep``.

    Args:
        parameters: for instance ``moco.query.parameters()``, already on their device.
        lr: rate of the first step; the step function sets it anew each time.
        momentum: SGD momentum, 0 for none.
        weight_decay: of every parameter, BatchNorm included, as in MoCo and CAST.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    make_gateable(optimizer)
    return optimizer


def make_gateable(optimizer: Optimizer) -> None:
    """Prepares an optimizer of torch for steps that a flag on the device may suppress (``found_inf``).

    Momentum buffers of SGD are created as zeros, which gives the same first step: torch itself would allocate them
    uninitialised and leave them so when the very first step is suppressed. State that is loaded later is brought to
    its parameter's strides, because torch's fused CPU kernel walks over raw memory and never looks at strides.

    Raises:
        ValueError: an optimizer that is not fused; its update cannot be suppressed on the device.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(f"optimizer: got {type(optimizer).__name__} without fused=True, expected a fused optimizer")
    if isinstance(optimizer, SGD):
        for group in optimizer.param_groups:
            if group["momentum"] == 0:
                continue
            if group["dampening"] != 0:
                raise ValueError(f"optimizer: got dampening {group['dampening']}, expected 0")
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
    match_layout(optimizer)
    optimizer.register_load_state_dict_post_hook(match_layout)


def match_layout(optimizer: Optimizer) -> None:
    """Brings every tensor of the optimizer's state that is shaped like its parameter to the parameter's strides."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def cosine_lr(base_lr: float, global_batch: int, step: int, total_steps: int) -> float:
    """Rate of step ``step`` of ``total_steps``: half a cosine from base_lr · global_batch / 256 down to 0.

    Args:
        base_lr: rate per 256 images of the global batch.
        global_batch: images a step, over all processes.
        step: 0 for the first step.
        total_steps: length of the run; the rate stays 0 beyond it.
    """
    progress = min(step / max(total_steps, 1), 1.0)
    return base_lr * global_batch / 256 * 0.5 * (1.0 + math.cos(math.pi * progress))
