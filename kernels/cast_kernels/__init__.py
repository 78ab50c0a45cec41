"""GPU kernels for CAST and InfoNCE, usable without the rest of the project.

Each operator is a ``torch.library`` operator with a fake and, on the CPU, the reference of the same name in
``cast_kernels.reference``; the losses have an autograd formula as well.
"""

from cast_kernels.batch_norm import (
    batch_norm_add_reduce,
    batch_norm_apply,
    batch_norm_apply_mask,
    batch_norm_input_gradient,
    batch_norm_input_gradients,
    batch_norm_relu_input_gradient,
    batch_norm_relu_pool,
    batch_norm_relu_pool_input_gradient,
    batch_norm_relu_pool_reduce,
    batch_norm_relu_reduce,
    batch_norm_statistics,
)
from cast_kernels.gradcam_cosine import gradcam_cosine, gradcam_cosine_from_gradient
from cast_kernels.info_nce import info_nce, info_nce_combine, info_nce_partials
from cast_kernels.reference import Partials

__all__ = [
    "Partials",
    "batch_norm_add_reduce",
    "batch_norm_apply",
    "batch_norm_apply_mask",
    "batch_norm_input_gradient",
    "batch_norm_input_gradients",
    "batch_norm_relu_input_gradient",
    "batch_norm_relu_pool",
    "batch_norm_relu_pool_input_gradient",
    "batch_norm_relu_pool_reduce",
    "batch_norm_relu_reduce",
    "batch_norm_statistics",
    "gradcam_cosine",
    "gradcam_cosine_from_gradient",
    "info_nce",
    "info_nce_combine",
    "info_nce_partials",
]
