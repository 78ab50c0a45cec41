"""Pooled features of every picture, computed once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cast_fast.evaluate.pictures import Pictures, batches, central_box, cut
from cast_fast.evaluate.weights import Model

logger = logging.getLogger("cast_fast")

_VERSION = "1 central crop, bilinear"


def default_cache() -> Path:
    """``${XDG_CACHE_HOME:-~/.cache}/cast_fast/features``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cast_fast" / "features"


def weights_digest(model: Model) -> str:
    """A hash of the trunk's tensors, whatever file they came from."""
    digest = hashlib.sha256(model.arch.encode())
    for name, value in sorted(model.trunk.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def central_images(pictures: Pictures, indices: list[int], size: int) -> Tensor:
    """Central crops of a few pictures: uint8 (n, 3, size, size)."""
    return stack([central_image(pictures, i, size) for i in indices])


def central_image(pictures: Pictures, index: int, size: int) -> np.ndarray:
    """The central crop of one picture, uint8 (size, size, 3)."""
    image = pictures.image(index)
    return cut(image, central_box(*image.size), size)


def stack(images: list[np.ndarray]) -> Tensor:
    """Images (S, S, 3) → uint8 (n, 3, S, S)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def extract(
    model: Model,
    pictures: Pictures,
    *,
    size: int,
    batch: int,
    device: torch.device,
    cache: Path | None = None,
) -> Tensor:
    """Features of the central crop of every picture.

    Args:
        model: the encoder; moved to ``device``.
        pictures: what to look at.
        size: side of the crops in pixels.
        batch: images a forward pass.
        device: where to compute.
        cache: folder in which features are kept by a hash of weights, pictures and size; None keeps nothing.

    Returns:
        (n, C) float32 on the CPU, in the order of the pictures.
    """
    path = None
    if cache is not None:
        key = json.dumps([_VERSION, weights_digest(model), pictures.fingerprint(), size, model.mean, model.std])
        path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if path.is_file():
            try:
                found = load_file(path)["features"]
                if len(found) == len(pictures):
                    logger.info("%s: features taken from %s", model.name, path)
                    return found
            except (SafetensorError, KeyError, OSError) as error:
                logger.warning("%s is damaged and computed again (%s)", path, error)
    model.to(device)
    parts = [
        model.features(stack(images).to(device)).cpu()
        for _, images in batches(
            range(len(pictures)), lambda i: central_image(pictures, i, size), batch, text=f"{model.name}: features"
        )
    ]
    features = torch.cat(parts)
    if path is not None:
        from cast_fast.export import save_safetensors

        about = {"model": model.name, "pictures": len(pictures), "size": size}
        try:
            save_safetensors({"features": features}, path, about)
        except OSError as error:  # costs only time, when they are wanted again
            logger.warning("features are not kept: cannot write %s (%s); see --cache", path, error.strerror or error)
    return features
