"""GPU kernels for CAST and InfoNCE, usable without the rest of the project.

Each operator is a ``torch.library`` operator with a fake, an autograd formula and, on the CPU, the reference of the
same name in ``cast_kernels.reference``.
"""

from cast_kernels.gradcam_cosine import gradcam_cosine, gradcam_cosine_from_gradient
from cast_kernels.info_nce import info_nce, info_nce_combine, info_nce_partials
from cast_kernels.reference import Partials

__all__ = [
    "Partials",
    "gradcam_cosine",
    "gradcam_cosine_from_gradient",
    "info_nce",
    "info_nce_combine",
    "info_nce_partials",
]
