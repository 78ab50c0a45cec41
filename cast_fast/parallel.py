"""The losses of a step on many ranks: shuffled key crops, a shared queue, averaged gradients.

The order of a step's collectives, all on one process group and the same on every rank:

1. the rank's part of the queue sets out to the others, if the exchange is ``gather``; it travels while the key encoder
   computes;
2. shuffled BatchNorm: uint8 key crops and masks go to random ranks (one all-to-all), are embedded there, and the
   embeddings come back (another one; ``shuffle`` says why and where to). Masked keys are formed after the shuffle. Four
   bytes a pixel leave a rank once, where the usual all-gather of float images sends 12·W;
3. the sum of the attention weights, outside of what is compiled: nothing else there would depend on it, and the
   compiler orders independent operations as sizes suggest, which need not be the same sizes on every rank;
4. query forward and losses, under DistributedDataParallel; with the exchange ``reduce`` queries and keys are gathered
   and partial sums come back in its midst;
5. backward: DistributedDataParallel averages the gradients bucket by bucket. Under ``torch.compile`` Dynamo's
   DDPOptimizer cuts the one captured graph at bucket boundaries, so that a bucket travels while the backward pass of
   earlier layers goes on;
6. the step's metrics, with which every rank learns of every other's trouble.

Key encoder and losses are two compiled graphs here, where one rank has one; each is captured whole (``fullgraph``).
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cast_fast import distributed
from cast_fast.compilation import compiled
from cast_fast.distributed import World
from cast_fast.encoder import Encoder
from cast_fast.forward import attention_weights, embed_keys, query_losses
from cast_fast.moco import MoCo
from cast_fast.objective import Objective
from cast_fast.shuffle import shuffle_plan, unshuffled
from cast_fast.split_batch_norm import split_batch_norm
from cast_fast.sync_batch_norm import synchronise_batch_norm

if TYPE_CHECKING:
    from cast_fast.data.batch import Batch

KEY_BATCH_NORMS = ("shuffle", "sync", "local")
QUERY_BATCH_NORMS = ("local", "sync")
COMPRESSIONS = {"none": None, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class RankSettings:
    """What there is to choose on many ranks, and on one whose batch is divided as if it were many.

    Raises:
        ValueError: an unknown choice, or fewer groups than one.
    """

    world: World = World()
    key_bn: str = "shuffle"
    """BatchNorm of the key encoder: over groups of shuffled samples, over all ranks, or over the queries' groups."""
    query_bn: str = "local"
    """BatchNorm of the query encoder: over groups of the rank's own samples, or over all ranks."""
    exchange: str = "auto"
    """See ``distributed.EXCHANGES``."""
    compression: str = "none"
    """``bf16``: gradients travel in bfloat16."""
    seed: int = 0
    """Of the shuffling."""
    groups: int = 1
    """Groups of a rank's batch with BatchNorm statistics apart; see ``shuffle``."""

    def __post_init__(self) -> None:
        for name, known in (
            ("key_bn", KEY_BATCH_NORMS),
            ("query_bn", QUERY_BATCH_NORMS),
            ("exchange", distributed.EXCHANGES),
            ("compression", tuple(COMPRESSIONS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.groups < 1:
            raise ValueError(f"groups: got {self.groups}, expected at least 1")

    @property
    def key_groups(self) -> int:
        """Groups of the key encoder's BatchNorms; statistics of all ranks have none."""
        return 1 if self.key_bn == "sync" else self.groups

    @property
    def query_groups(self) -> int:
        """Groups of the query encoder's BatchNorms."""
        return 1 if self.query_bn == "sync" else self.groups


def set_batch_norms(model: MoCo, settings: RankSettings, key_passes: int = 1) -> None:
    """Makes the BatchNorms of both encoders take the statistics that ``settings`` ask for.

    Args:
        model: its modules are replaced where need be; its tensors stay.
        settings: see there.
        key_passes: batches that share one forward pass of the key encoder.

    Raises:
        ValueError: a BatchNorm that cannot be split or synchronised.
    """
    for encoder, across_ranks, groups, passes in (
        (model.query, settings.query_bn == "sync", settings.query_groups, 1),
        (model.key, settings.key_bn == "sync", settings.key_groups, key_passes),
    ):
        if groups * passes > 1:
            split_batch_norm(encoder, groups, passes)
        elif across_ranks and settings.world.size > 1:
            synchronise_batch_norm(encoder)


class RankLosses(NamedTuple):
    """What ``ParallelLosses`` returns; the mean over ranks of a loss is that of the global batch."""

    loss: Tensor
    loss_moco: Tensor
    loss_cast: Tensor
    accuracy: Tensor
    cast_samples: Tensor
    zero_cam: Tensor


class ParallelLosses:
    """Forward passes and losses of this rank's part of the global batch.

    Args:
        model: on its device, the same on every rank, its BatchNorm as ``set_batch_norms`` leaves it. Its queue is
            shared out here (unless it is already).
        settings: see there.
        objective, dtype, kernels, compile, scale, shift: as for ``step.TrainStep`` and
            ``forward.step_losses``.
    """

    def __init__(
        self,
        model: MoCo,
        settings: RankSettings,
        *,
        objective: Objective,
        dtype: torch.dtype,
        kernels: bool,
        compile: bool,
        scale: Tensor,
        shift: Tensor,
    ) -> None:
        world = settings.world
        if distributed.world_size() != world.size:
            raise ValueError(f"world: got size {world.size}, expected the {distributed.world_size()} of the group")
        if not model.queue.sharded:
            model.queue.shard(world.rank, world.size)
        self._model, self._settings = model, settings
        self._scale, self._shift, self._dtype = scale, shift, dtype
        self._attention = objective.attention
        self._exchange: str | None = None
        self._embed = compiled(embed_keys) if compile else embed_keys
        self._region = _Region(model.query, objective, dtype, kernels, compile, scale, shift, settings.query_groups)
        # Statistics are averaged by the step itself. torch renames the flag; older versions know the old name only.
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        self._parallel = DistributedDataParallel(
            self._region,
            gradient_as_bucket_view=True,
            static_graph=True,
            **buffers,
        )
        # A function without annotations: torch compares them with types, and ours are strings.
        self._parallel.register_comm_hook(
            COMPRESSIONS[settings.compression], lambda state, bucket: distributed.gradient_hook(state, bucket)
        )
        self._members = distributed.subgroup_size(world.size)
        self._first = world.rank // self._members * self._members

    def exchange(self, batch: int) -> str:
        """How the ranks compare N queries each with the queue: ``gather`` or ``reduce``."""
        queue, settings = self._model.queue, self._settings
        dim, element = queue.keys.shape[1], queue.keys.element_size()
        return distributed.choose_exchange(settings.exchange, batch, len(queue), dim, settings.world.size, element)

    def __call__(self, batch: Batch, step: int) -> tuple[RankLosses, Tensor, Tensor]:
        """Takes the forward pass of one step.

        Args:
            batch: of this rank, N pairs; N the same on every rank.
            step: number of the step in the run, which decides the shuffle.

        Returns:
            losses, the keys (N, D) of this rank's samples, and its number of empty key masks.
        """
        if self._exchange is None:
            self._exchange = self.exchange(len(batch.query))
        queue = self._model.queue
        gathering = queue.begin_gather() if self._exchange == "gather" else None
        key_mask = batch.key_mask if self._attention else None
        if self._settings.key_bn == "shuffle":
            keys, masked_key = self._embed_shuffled(batch.key, key_mask, step)
        else:
            keys, masked_key = self._embed_here(
                batch.key, key_mask, unshuffled(len(batch.key), self._settings.key_groups)
            )
        weight, empty = attention_weights(key_mask, batch.weight if self._attention else None, keys)
        total = None
        if weight is not None:
            total = distributed.all_reduce(weight.sum(), "attention weights") / self._settings.world.size
        rows = queue.keys if gathering is None else queue.finish_gather(gathering)
        saliency = batch.query_saliency if self._attention else None
        losses = self._parallel(batch.query, keys, rows, masked_key, saliency, weight, total, gathering is None)
        return RankLosses(*losses), keys, empty

    def _embed_here(self, key: Tensor, key_mask: Tensor | None, order: Tensor | None) -> tuple[Tensor, Tensor | None]:
        order = None if order is None else order.to(key.device, non_blocking=True)
        return self._embed(self._model.key, key, key_mask, self._scale, self._shift, self._dtype, order=order)

    def _embed_shuffled(self, key: Tensor, key_mask: Tensor | None, step: int) -> tuple[Tensor, Tensor | None]:
        settings = self._settings
        plan = shuffle_plan(settings.seed, step, len(key), settings.world.rank, self._members, settings.groups)
        order = plan.order.to(key.device, non_blocking=True)
        pixels = key.permute(0, 2, 3, 1)
        if key_mask is not None:
            pixels = torch.cat([pixels, key_mask[..., None]], dim=3)
        there = distributed.all_to_all(pixels[order], plan.send, plan.receive, "key shuffle", self._first)
        crops = there[..., :3].contiguous().permute(0, 3, 1, 2)
        masks = None if key_mask is None else there[..., 3].contiguous()
        keys, masked_key = self._embed_here(crops, masks, plan.groups)
        embeddings = keys if masked_key is None else torch.cat([keys, masked_key], dim=1)
        back = distributed.all_to_all(embeddings, plan.receive, plan.send, "key return", self._first)
        embeddings = torch.empty_like(back).index_copy_(0, order, back)
        if masked_key is None:
            return embeddings, None
        keys, masked_key = embeddings.tensor_split(2, dim=1)
        return keys.contiguous(), masked_key.contiguous()


class _Region(nn.Module):
    """What DistributedDataParallel sees: one forward pass of the query encoder, with everything up to the losses."""

    def __init__(
        self,
        query: Encoder,
        objective: Objective,
        dtype: torch.dtype,
        kernels: bool,
        compile: bool,
        scale: Tensor,
        shift: Tensor,
        groups: int,
    ) -> None:
        super().__init__()
        self.query = query
        self._settings: tuple[Any, ...] = (scale, shift, objective, dtype, kernels)
        self._groups = groups
        self._losses = compiled(_rank_losses) if compile else _rank_losses

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        queue: Tensor,
        masked_key: Tensor | None,
        saliency: Tensor | None,
        weight: Tensor | None,
        total: Tensor | None,
        sharded: bool,
    ) -> RankLosses:
        """Arguments as for ``forward.query_losses``."""
        arguments = (self.query, query, keys, queue, masked_key, saliency, weight, *self._settings)
        return self._losses(*arguments, groups=self._groups, total=total, sharded=sharded)


def _rank_losses(*arguments: Any, **options: Any) -> RankLosses:
    losses = query_losses(*arguments, **options)
    return RankLosses(
        losses.loss, losses.loss_moco, losses.loss_cast, losses.accuracy, losses.cast_samples, losses.zero_cam
    )
