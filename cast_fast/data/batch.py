"""What the loader hands to the training step."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass
class Batch:
    """One training batch of N image pairs; all tensors but ``index`` and ``fallback`` are on the step's device.

    The crops are not normalised: the step normalises them, so that the loader moves one byte a channel. Where the
    method has no attention loss, the three maps are ``None`` and nothing was spent on them.
    """

    query: Tensor
    """(N, 3, S, S) uint8 RGB, channels-last memory: the query crops."""
    key: Tensor
    """(N, 3, S, S) uint8 RGB, channels-last memory: the key crops."""
    query_saliency: Tensor | None
    """(N, G_h, G_w) float32 in [0, 1]: salient share of each cell of the CAM grid within the query window."""
    key_mask: Tensor | None
    """(N, S, S) uint8, 1 where the key crop is salient."""
    weight: Tensor | None
    """(N,) float32: CAST weight of each sample, 0 where its map is empty."""
    index: Tensor
    """(N,) int64 on the CPU: positions in the dataset, to name samples in reports."""
    fallback: Tensor | None = None
    """(N, 2) bool on the CPU: query and key window are the crop rule's fallback; ``None`` for unconstrained crops."""

    def __len__(self) -> int:
        return self.query.shape[0]

    @property
    def has_attention(self) -> bool:
        """Whether the maps that the attention loss needs are there."""
        return self.query_saliency is not None


def random_batch(
    count: int, size: int, grid: tuple[int, int], device: torch.device | str, *, seed: int = 0, attention: bool = True
) -> Batch:
    """A batch of noise crops with elliptical masks, for benchmarks of the step without a loader.

    Args:
        count: N, number of pairs.
        size: S, side of the crops in pixels.
        grid: (G_h, G_w), the trunk's output grid.
        device: where the tensors live.
        seed: of the generator; equal seeds give equal batches on every device.
        attention: whether to make the maps of the attention loss.
    """
    generator = torch.Generator().manual_seed(seed)
    crops = torch.randint(0, 256, (2, count, size, size, 3), dtype=torch.uint8, generator=generator).to(device)
    query, key = crops[0].permute(0, 3, 1, 2), crops[1].permute(0, 3, 1, 2)
    index = torch.arange(count)
    if not attention:
        return Batch(query, key, None, None, None, index)
    centre = 0.25 + 0.5 * torch.rand(2, count, 2, generator=generator)
    radius = 0.15 + 0.25 * torch.rand(2, count, 2, generator=generator)
    axis = (torch.arange(size) + 0.5) / size
    distance = ((axis - centre[..., :1]) / radius[..., :1]).square()[..., :, None]
    distance = distance + ((axis - centre[..., 1:]) / radius[..., 1:]).square()[..., None, :]
    masks = (distance < 1).to(torch.uint8)
    saliency = torch.nn.functional.adaptive_avg_pool2d(masks[0].float(), grid).contiguous()
    return Batch(query, key, saliency.to(device), masks[1].to(device), torch.ones(count, device=device), index)
