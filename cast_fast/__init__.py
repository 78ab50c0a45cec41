"""cast_fast: pretrain a visual backbone with CAST (Contrastive Attention-Supervised Tuning).

Read the package in the order in which the data flows: ``config`` → ``data`` → ``encoder`` → ``moco`` →
``key_queue`` → ``objective`` → ``step`` → ``train``. The fused GPU kernels live in ``cast_kernels``.

Source of the method: R. R. Selvaraju, K. Desai, J. Johnson, N. Naik, "CASTing Your Model: Learning to Localize
Improves Self-Supervised Representations", CVPR 2021.
"""

__version__ = "0.1.0"
