"""A few steps of a small ResNet on any number of ranks, with torch's modules or with streaming blocks."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch._dynamo
from rank_checks import part
from torch import Tensor, nn
from torchvision.models import resnet

from cast_fast.data.batch import random_batch
from cast_fast.distributed import World
from cast_fast.encoder import Encoder, LinearHead
from cast_fast.moco import MoCo
from cast_fast.objective import Objective
from cast_fast.optim import build_optimizer
from cast_fast.parallel import RankSettings
from cast_fast.step import TrainStep
from cast_fast.streaming_resnet import StreamingTrunk

COUNT, STEPS, LR = 8, 2, 0.05


def small_resnet(block: Any, depth: int) -> nn.Sequential:
    """The trunk of torchvision's ResNet with ``depth`` blocks a layer."""
    trunk = nn.Sequential()
    for name, module in resnet.ResNet(block, [depth] * 4).named_children():
        if name not in ("avgpool", "fc"):
            trunk.add_module(name, module)
    return trunk


def small_step(batch_norm: str, dtype: torch.dtype = torch.float64, **settings: Any) -> TrainStep:
    """A step of CAST around ``small_resnet``, always from the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = small_resnet(resnet.BasicBlock, 1)
        trunk = StreamingTrunk(trunk) if batch_norm == "streaming" else trunk
        model = MoCo.from_encoder(Encoder(trunk, LinearHead(512, 8)), 8, 2 * COUNT).to(dtype)
    return TrainStep(
        model,
        build_optimizer(model.query.parameters(), LR),
        objective=Objective(temperature=0.2),
        momentum=0.9,
        precision="fp32",
        clip_grad=0.5,
        **{"compile": False, **settings},
    )


def steps(world: World, batch_norm: str, compile: bool = False) -> dict[str, Tensor]:
    """Losses, first gradients and final weights with statistics over all ranks, in float64."""
    original = torch.compile
    torch.compile = functools.partial(original, backend="aot_eager")
    try:
        ranks = RankSettings(world, "sync", "sync", "reduce")
        step = small_step(batch_norm, compile=compile, ranks=ranks)
    finally:
        torch.compile = original
    found: dict[str, Tensor] = {}
    for number in range(STEPS):
        metrics = step(part(random_batch(COUNT, 64, (2, 2), "cpu", seed=number), world), LR)
        found[f"losses {number}"] = torch.stack([metrics.loss, metrics.loss_moco, metrics.loss_cast, metrics.grad_norm])
        if number == 0:
            for name, parameter in step.model.query.named_parameters():
                assert parameter.grad is not None
                found[f"gradient {name}"] = parameter.grad.clone()
    return found | {name: value for name, value in step.model.state_dict().items() if not name.startswith("queue.")}


def eager_and_compiled(world: World) -> list[dict[str, Tensor]]:
    """Streaming blocks, once each."""
    return [steps(world, "streaming", compile) for compile in (False, True)]
