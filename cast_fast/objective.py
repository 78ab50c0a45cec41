"""InfoNCE and the Grad-CAM attention loss from one forward pass of the query encoder.

CAST (Selvaraju et al., CVPR 2021) asks that the query encoder look at the salient region when it matches the query
with the *masked key* km, the embedding of the key crop with everything but its salient region blanked. Grad-CAM of
d = q · km on the last activations A is M = ReLU(Σ_c α_c A_c), α the spatial mean of ∂d/∂A, and the attention loss is
1 − cos(M, saliency map of the query crop).

With global average pooling p = mean_hw A, a head z = h(p) and q = z/‖z‖, that gradient is the same in each of the HW
cells and has a closed form,

    α = 1/(HW) · J_h(p)ᵀ (km − d q) / ‖z‖,

made of ordinary forward operations. Differentiating it by autograd gives exactly the second-order gradient of the
formulation with ``autograd.grad(..., create_graph=True)``, which ``cast_kernels.reference`` keeps as the reference.

Every function takes plain tensors, so the attention loss can be added to other encoders and other contrastive
methods: compute ``gradcam_weights`` and pass them to ``attention_loss``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cast_fast import distributed
from cast_fast.encoder import EncoderOutput

COMBINATIONS = ("average", "sum")
NORM_FLOOR = 1e-12  # F.normalize divides by max(‖z‖, 1e-12), and so must the gradient


@dataclasses.dataclass(frozen=True)
class Objective:
    """Settings of the objective.

    Raises:
        ValueError: a value out of range.
    """

    lam: float = 3.0
    """Weight λ of the attention loss."""
    loss_combination: str = "average"
    """``"average"``: (L_MoCo + λ L_CAST) / (1 + λ), as published; ``"sum"``: L_MoCo + λ L_CAST."""
    temperature: float = 0.07
    """InfoNCE temperature T."""
    attention: bool = True
    """Whether there is an attention loss; without it the objective is plain MoCo."""

    def __post_init__(self) -> None:
        if not self.lam >= 0:
            raise ValueError(f"lam: got {self.lam}, expected at least 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature}, expected a positive number")
        if self.loss_combination not in COMBINATIONS:
            raise ValueError(f"loss_combination: got {self.loss_combination!r}, expected average or sum")

    def combine(self, moco: Tensor, cast: Tensor) -> Tensor:
        """The total that is optimised."""
        total = moco + self.lam * cast
        return total / (1.0 + self.lam) if self.loss_combination == "average" else total


class AttentionLosses(NamedTuple):
    """The attention loss of each sample, and what it was computed from."""

    loss: Tensor
    """(N,) float32 or wider in [0, 1]: 1 − cos(cam, saliency); 1 where either is zero everywhere."""
    cam: Tensor
    """(N, H, W) float32 or wider, at least 0: the Grad-CAM map."""


class Losses(NamedTuple):
    """Weighted means over the batch (0-dimensional tensors) and the maps.

    On many ranks the mean over ranks of a loss (and of the accuracy) is that of the global batch, for the attention
    loss if ``attention_total`` is given; numbers of samples are those of this rank.
    """

    loss: Tensor
    """The total to be optimised; the only member with a gradient."""
    loss_moco: Tensor
    """Mean InfoNCE loss."""
    loss_cast: Tensor
    """Weighted mean attention loss; 0 when all weights are 0 or there is no attention loss."""
    accuracy: Tensor
    """Share of samples whose positive beats every negative."""
    cast_samples: Tensor
    """Sum of the attention weights."""
    zero_cam: Tensor
    """Number of samples with a positive attention weight whose map is zero everywhere."""
    cam: Tensor | None
    """(N, H, W), or ``None`` without attention loss."""


def pull_back(head: nn.Module, pooled: Tensor, vector: Tensor) -> Tensor:
    """The head's transposed Jacobian at ``pooled`` times ``vector``, differentiable in both and in the head.

    A head with a method ``pullback(pooled, vector)`` does it itself. Any other head is differentiated by
    ``torch.func.vjp``, which evaluates it a second time: exact for deterministic heads, BatchNorm in train mode
    included (its running statistics are updated by the first evaluation only). A head with dropout would draw another
    mask; give it a ``pullback``, or evaluate it once by ``torch.func.vjp`` and pass the result as ``pullback`` to
    ``gradcam_weights``.

    Args:
        head: maps (N, C) to (N, D).
        pooled: (N, C) input of the head.
        vector: (N, D) cotangent.

    Returns:
        (N, C).
    """
    own: Callable[[Tensor, Tensor], Tensor] | None = getattr(head, "pullback", None)
    if own is not None:
        return own(pooled, vector)

    def again(inputs: Tensor) -> Tensor:
        # On copies of the buffers, so that this evaluation updates no running statistics.
        buffers = {name: buffer.clone() for name, buffer in head.named_buffers()}
        return torch.func.functional_call(head, buffers, (inputs,))

    pull = torch.func.vjp(again, pooled)[1]
    return pull(vector)[0]


def gradcam_weights(
    head: nn.Module,
    pooled: Tensor,
    projection: Tensor,
    embedding: Tensor,
    masked_key: Tensor,
    *,
    cells: int = 1,
    pullback: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Channel weights α of Grad-CAM for d = embedding · masked_key, in closed form.

    Valid for activations that are averaged over space and then go through ``head`` and normalisation; not for
    attention pooling, inner layers or class tokens.

    Args:
        head: the projection head.
        pooled: (N, C) spatial mean of the activations.
        projection: (N, D) z = head(pooled).
        embedding: (N, D) z / ‖z‖.
        masked_key: (N, D) km; takes no gradient.
        cells: H·W of the activations. It scales the map and cancels in its cosine; with 1 the result is the gradient
            with respect to ``pooled``.
        pullback: replaces the head's pull-back: cotangent (N, D) → (N, C).

    Returns:
        (N, C) α, differentiable with respect to everything but ``masked_key``.
    """
    masked_key = masked_key.detach()
    norm = torch.linalg.vector_norm(projection, dim=1, keepdim=True).clamp_min(NORM_FLOOR)
    similarity = (embedding * masked_key).sum(dim=1, keepdim=True)
    vector = (masked_key - similarity * embedding) / norm
    pulled = pull_back(head, pooled, vector) if pullback is None else pullback(vector)
    return pulled / cells


def gradcam_map(activations: Tensor, alpha: Tensor) -> Tensor:
    """ReLU(Σ_c α_c A_c): (N, C, H, W) activations and (N, C) weights → (N, H, W) map in the weights' dtype."""
    return F.relu((activations * alpha[:, :, None, None]).sum(dim=1))


def cosine_loss(cam: Tensor, saliency: Tensor) -> Tensor:
    """1 − cosine between each map and its target over the H·W cells; (N, H, W) twice → (N,).

    Either is divided by its largest value first, so that neither large nor small magnitudes leave the range of
    float32; the factor cancels, in the gradient too. Where map or target is zero everywhere (or below the smallest
    normal number) the loss is 1 and the gradient zero. Both must be at least 0 everywhere.
    """
    unit_cam, cam_present = _unit_peak(cam.flatten(1))
    unit_saliency, saliency_present = _unit_peak(saliency.to(cam.dtype).flatten(1))
    present = cam_present & saliency_present
    squared = unit_cam.square().sum(dim=1) * unit_saliency.square().sum(dim=1)
    cosine = (unit_cam * unit_saliency).sum(dim=1) * torch.where(present, squared, 1).rsqrt()
    return 1 - torch.where(present, cosine, 0)


def _unit_peak(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, L) divided by their maximum, zero where that is zero; and whether it is not (N,)."""
    peak = rows.detach().amax(dim=1)
    present = ~(peak < torch.finfo(rows.dtype).tiny)  # so that NaN counts as present, and shows in the loss
    return torch.where(present[:, None], rows / torch.where(present, peak, 1)[:, None], 0), present


def attention_loss(
    activations: Tensor, alpha: Tensor, saliency: Tensor, *, weight: Tensor | None = None, kernels: bool = False
) -> AttentionLosses:
    """Grad-CAM map of each sample and one minus its cosine with the sample's saliency map.

    Args:
        activations: (N, C, H, W), any float dtype, channels-last preferred.
        alpha: (N, C) float32 or float64 from ``gradcam_weights``.
        saliency: (N, H, W) in [0, 1]: salient share of each cell.
        weight: (N,) weights at least 0. A sample of weight 0 gets loss 1, map 0 and gradient 0 whatever its α and
            saliency hold, even NaN; other weights are not applied here (see ``weighted_mean``).
        kernels: use the fused ``cast_kernels.gradcam_cosine`` instead of plain torch.

    Raises:
        ValueError: shapes that do not fit.
    """
    count, channels, height, width = activations.shape
    if alpha.shape != (count, channels):
        raise ValueError(f"alpha: got shape {tuple(alpha.shape)}, expected {(count, channels)}")
    if saliency.shape != (count, height, width):
        raise ValueError(f"saliency: got shape {tuple(saliency.shape)}, expected {(count, height, width)}")
    if weight is not None:
        used = weight > 0
        alpha = torch.where(used[:, None], alpha, 0)
        saliency = torch.where(used[:, None, None], saliency, 0)
    if kernels:
        import cast_kernels

        return AttentionLosses(*cast_kernels.gradcam_cosine(activations, alpha, saliency))
    cam = gradcam_map(activations, alpha)
    return AttentionLosses(cosine_loss(cam, saliency), cam)


def info_nce(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, *, kernels: bool = False
) -> tuple[Tensor, Tensor]:
    """InfoNCE of each query with its key as the positive and the whole queue as negatives (van den Oord et al. 2018).

    Args:
        query: (N, D) normalised, takes the gradient.
        key: (N, D) normalised, no gradient.
        queue: (K, D) normalised, no gradient; may be narrower than ``query``.
        temperature: T.
        kernels: use the fused ``cast_kernels.info_nce``, which never writes the (N, K) logits, and rounds query and key
            to the queue's type.

    Returns:
        (N,) loss −log softmax of the positive, and (N,) int64 number of negatives that beat the positive.
    """
    key, queue = key.detach(), queue.detach()
    if kernels:
        import cast_kernels

        return cast_kernels.info_nce(query, key, queue, temperature)
    positive = (query * key).sum(dim=1) / temperature
    negative = query @ queue.to(query.dtype).T / temperature
    beaten = (negative.detach() > positive.detach()[:, None]).sum(dim=1)
    return -F.logsigmoid(positive - torch.logsumexp(negative, dim=1)), beaten


def sharded_info_nce(
    query: Tensor, key: Tensor, shard: Tensor, temperature: float, *, kernels: bool = False
) -> tuple[Tensor, Tensor]:
    """``info_nce`` against a queue of which each rank holds a part: every rank meets all queries with its own keys.

    Two collectives: queries and keys are all-gathered, and one reduce-scatter brings each sample its sum over all
    negatives, their weighted sum, from which loss and gradient follow, and the number that beat the positive.

    Args:
        query: (N, D) normalised, takes the gradient; N the same on every rank.
        key: (N, D) normalised, no gradient.
        shard: (K_r, D) normalised, this rank's rows of the queue.
        temperature: T.
        kernels: use the fused ``cast_kernels.info_nce_partials``.
    """
    import cast_kernels
    from cast_kernels import reference

    every = distributed.all_gather(torch.stack([query.detach(), key.detach()], dim=1), "queries")
    partials_of = cast_kernels.info_nce_partials if kernels else reference.info_nce_partials
    total, weighted, beaten, maximum = partials_of(every[:, 0], every[:, 1], shard, temperature)
    if not reference.has_fixed_maximum(temperature, shard.dtype):
        own, maximum = maximum, distributed.all_reduce_max(maximum, "largest logits")
        rescale = torch.where(own == maximum, 1, (own - maximum).exp())
        total, weighted = total * rescale, weighted * rescale[:, None]
    # The count travels as a float: exact for up to 2^24 keys.
    packed = torch.cat([total[:, None], beaten[:, None].to(total.dtype), weighted], dim=1)
    mine = distributed.reduce_scatter(packed, "partial sums")
    first = distributed.rank() * len(query)
    partials = reference.Partials(mine[:, 0], mine[:, 2:], mine[:, 1].long(), maximum[first : first + len(query)])
    return reference.info_nce_combine(query, key.detach(), [partials], temperature, shard.dtype)


def weighted_mean(values: Tensor, weight: Tensor | None, total: Tensor | None = None) -> Tensor:
    """Σ w v / Σ w over the batch; entries of weight 0 contribute nothing, even NaN; 0 where all weights are 0.

    Args:
        values: (N,).
        weight: (N,) at least 0, or ``None`` for the plain mean.
        total: 0-dimensional, divides instead of Σ w.
    """
    if weight is None:
        return values.mean()
    total = weight.sum() if total is None else total
    weighted = torch.where(weight > 0, values, 0) * weight
    return weighted.sum() / torch.where(total > 0, total, 1)


def contrastive_attention_loss(
    query: EncoderOutput,
    head: nn.Module,
    key: Tensor,
    queue: Tensor,
    objective: Objective,
    *,
    masked_key: Tensor | None = None,
    saliency: Tensor | None = None,
    weight: Tensor | None = None,
    attention_weight: Tensor | None = None,
    attention_total: Tensor | None = None,
    pullback: Callable[[Tensor], Tensor] | None = None,
    kernels: bool = False,
    sharded: bool = False,
) -> Losses:
    """The whole objective from one forward pass of the query encoder.

    Args:
        query: output of the query encoder, with its graph.
        head: the query encoder's head.
        key: (N, D) normalised keys.
        queue: (K, D) normalised negatives.
        objective: settings.
        masked_key: (N, D) normalised masked keys; needed for the attention loss.
        saliency: (N, H, W) in [0, 1] on the grid of the activations; needed for the attention loss.
        weight: (N,) weights of the samples in both losses, 1 by default.
        attention_weight: (N,) further factor in the attention loss alone, 1 by default: 0 where a sample has no map.
        attention_total: 0-dimensional, divides the attention loss instead of the sum of this batch's weights. With the
            mean over ranks of those sums, the mean over ranks of the loss is the weighted mean over the global batch,
            and DistributedDataParallel, which averages gradients, weighs every sample alike.
        pullback: see ``gradcam_weights``.
        kernels: use the fused kernels of ``cast_kernels``.
        sharded: ``queue`` holds this rank's part of the negatives; see ``sharded_info_nce``.

    Raises:
        ValueError: an attention loss without masked keys or saliency maps, or shapes that do not fit.
    """
    compare = sharded_info_nce if sharded else info_nce
    per_sample, beaten = compare(query.embedding, key, queue, objective.temperature, kernels=kernels)
    moco = weighted_mean(per_sample, weight)
    accuracy = weighted_mean((beaten == 0).to(moco.dtype), weight)
    if not objective.attention:
        nothing = torch.zeros_like(accuracy)
        return Losses(moco, moco.detach(), nothing, accuracy, nothing, nothing, None)
    if masked_key is None or saliency is None:
        raise ValueError("the attention loss needs masked_key and saliency")
    share = torch.ones_like(per_sample).detach() if attention_weight is None else attention_weight.to(per_sample.dtype)
    if weight is not None:
        share = share * weight
    # A masked key of zero gives d = 0 and α = 0, so a sample without weight is also out of the sums over the batch
    # inside a head with BatchNorm.
    masked_key = torch.where((share > 0)[:, None], masked_key.detach(), 0)
    cells = query.activations.shape[2] * query.activations.shape[3]
    alpha = gradcam_weights(
        head, query.pooled, query.projection, query.embedding, masked_key, cells=cells, pullback=pullback
    )
    attention = attention_loss(query.activations, alpha, saliency, weight=share, kernels=kernels)
    cast = weighted_mean(attention.loss, share, attention_total)
    cam = attention.cam.detach()
    zero_cam = ((cam.flatten(1).amax(dim=1) == 0) & (share > 0)).sum()
    return Losses(objective.combine(moco, cast), moco.detach(), cast.detach(), accuracy, share.sum(), zero_cam, cam)
