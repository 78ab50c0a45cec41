"""Forward passes and losses of a step, from uint8 crops: what ``torch.compile`` captures.

On one rank ``step_losses`` is all of it, one graph. On many ranks ``parallel`` sends crops around between its parts:
keys first, then the query and the losses.

Where the batch is cut into groups (``shuffle``) the encoders see it group after group, so that a group is a run of
samples to ``split_batch_norm``. That needs no pass over the images of its own when compiled: the kernels that
normalise the crops read them in that order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cast_fast.encoder import Encoder
from cast_fast.moco import MoCo
from cast_fast.objective import Losses, Objective, contrastive_attention_loss
from cast_fast.shuffle import by_group


def step_losses(
    model: MoCo,
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    saliency: Tensor | None,
    weight: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    objective: Objective,
    dtype: torch.dtype,
    kernels: bool,
    join_keys: bool = False,
    groups: int = 1,
    order: Tensor | None = None,
) -> tuple[Losses, Tensor, Tensor]:
    """Forward passes and losses of a step on one rank.

    Args:
        model: its BatchNorm statistics are updated, its queue is only read.
        query, key: (N, 3, S, S) uint8 RGB crops.
        key_mask: (N, S, S) uint8, 1 where the key crop is salient; ``None`` without attention loss.
        saliency: (N, H, W) salient share of the cells of the query crop; ``None`` without attention loss.
        weight: (N,) attention weights, 1 by default.
        scale, shift: (1, 3, 1, 1); normalised = value · scale + shift.
        objective: settings.
        dtype: arithmetic of the trunk; bfloat16 is autocast.
        kernels: use the fused losses of ``cast_kernels``.
        join_keys: one pass of the key encoder, whose BatchNorms are split in two passes, instead of two passes.
        groups: G, groups of the query encoder's BatchNorms.
        order: in which the key encoder sees its crops, see ``embed_keys``.

    Returns:
        the losses, the keys (N, D) to enqueue, and how many samples lost their attention weight to an empty key mask.
    """
    keys, masked_key = embed_keys(model.key, key, key_mask, scale, shift, dtype, join=join_keys, order=order)
    weight, empty_key_mask = attention_weights(key_mask, weight, keys)
    losses = query_losses(
        model.query,
        query,
        keys,
        model.queue.keys,
        masked_key,
        saliency,
        weight,
        scale,
        shift,
        objective,
        dtype,
        kernels,
        groups=groups,
    )
    return losses, keys, empty_key_mask


def embed_keys(
    encoder: Encoder,
    key: Tensor,
    key_mask: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
    *,
    join: bool = False,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Keys (N, D) and, where there are masks, masked keys (N, D), each with the batch statistics of its own crops.

    With ``join`` both are one batch of the encoder, whose BatchNorms must be split in two (``split_batch_norm``).
    With ``order``, (2, N) int64, the encoder's i-th crop is ``key[order[0, i]]``, and key j is its embedding
    ``order[1, j]``: what is returned is in the order of ``key``.
    """
    with torch.autocast(key.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16), torch.no_grad():
        if order is not None:
            key = key[order[0]]
            key_mask = None if key_mask is None else key_mask[order[0]]
        images = normalise(key, scale, shift)
        if join and key_mask is not None:
            # In the trunk's type before they are joined: the compiler writes a concatenation out as it is.
            images = images.to(dtype)
            masked = torch.where((key_mask > 0)[:, None], images, 0)
            both = encoder(torch.cat([images, masked]).contiguous(memory_format=torch.channels_last)).embedding
            keys, masked_key = both[: len(key)], both[len(key) :]
        else:
            keys, masked_key = encoder(images).embedding, None
            if key_mask is not None:
                masked_key = encoder(torch.where((key_mask > 0)[:, None], images, 0)).embedding
        if order is None:
            return keys, masked_key
        return keys[order[1]], None if masked_key is None else masked_key[order[1]]


def attention_weights(key_mask: Tensor | None, weight: Tensor | None, like: Tensor) -> tuple[Tensor | None, Tensor]:
    """Weights of the attention loss: zero where the key mask is empty; and how many that cost their weight."""
    if key_mask is None:
        return weight, torch.zeros((), dtype=torch.int64, device=like.device)
    weight = torch.ones_like(like[:, 0]) if weight is None else weight
    empty = ~(key_mask > 0).flatten(1).any(dim=1)
    return torch.where(empty, 0, weight), (empty & (weight > 0)).sum()


def query_losses(
    encoder: Encoder,
    query: Tensor,
    keys: Tensor,
    queue: Tensor,
    masked_key: Tensor | None,
    saliency: Tensor | None,
    weight: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    objective: Objective,
    dtype: torch.dtype,
    kernels: bool,
    *,
    groups: int = 1,
    total: Tensor | None = None,
    sharded: bool = False,
) -> Losses:
    """The one pass of the query encoder and the losses.

    Arguments are as for ``step_losses``, and for ``contrastive_attention_loss`` (``total`` is ``attention_total``).
    """
    # Losses are means over samples, in whatever order: what belongs to a sample goes where its crop goes.
    query, keys = by_group(query, groups), by_group(keys, groups)
    masked_key, saliency, weight = (
        None if rows is None else by_group(rows, groups) for rows in (masked_key, saliency, weight)
    )
    with torch.autocast(query.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = encoder(normalise(query, scale, shift))
    return contrastive_attention_loss(
        output,
        encoder.head,
        keys,
        queue,
        objective,
        masked_key=masked_key,
        saliency=saliency,
        attention_weight=weight,
        attention_total=total,
        kernels=kernels,
        sharded=sharded,
    )


def normalise(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """uint8 (N, 3, S, S) → normalised, in the dtype of ``scale`` and in channels-last memory."""
    return (images.to(scale.dtype) * scale + shift).contiguous(memory_format=torch.channels_last)
