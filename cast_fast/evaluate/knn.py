"""Weighted k-nearest-neighbour classification on frozen features.

Z. Wu, Y. Xiong, S. Yu, D. Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018:
the k training features with the largest cosine vote with weight exp(cosine / T).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 20
TEMPERATURE = 0.07
_CHUNK = 1024


def knn_scores(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, *, k: int = NEIGHBOURS, temperature: float = TEMPERATURE
) -> Tensor:
    """Votes of the nearest training features.

    Args:
        train: (n, F) features with known classes.
        labels: (n,) int64 in [0, classes).
        test: (m, F) features to classify.
        classes: number of classes.
        k: neighbours; at most n are taken.
        temperature: T of the weights.

    Returns:
        (m, classes) float32: sum of the votes of each class.

    Raises:
        ValueError: ``train`` is empty, or ``k`` or ``temperature`` is out of range.
    """
    if len(train) == 0 or k < 1 or temperature <= 0:
        raise ValueError(
            f"got {len(train)} training features, k {k}, temperature {temperature}; expected at least 1, 1, > 0"
        )
    bank = F.normalize(train.float(), dim=1)
    scores = []
    for chunk in F.normalize(test.float(), dim=1).split(_CHUNK):
        cosine, nearest = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
        # relative to the best neighbour, since exp(1 / T) leaves float32 for small T
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = torch.zeros(len(chunk), classes, device=chunk.device)
        scores.append(votes.scatter_add_(1, labels[nearest], weight))
    return torch.cat(scores) if scores else torch.zeros(0, classes)
