"""GPU kernels for CAST and InfoNCE, usable without the rest of the project.

Each operator is a ``torch.library`` operator with a fake, an autograd formula and, on the CPU, the reference of the same
name in ``cast_kernels.reference``.
"""

from cast_kernels.gradcam_cosine import gradcam_cosine, gradcam_cosine_from_gradient

__all__ = ["gradcam_cosine", "gradcam_cosine_from_gradient"]
