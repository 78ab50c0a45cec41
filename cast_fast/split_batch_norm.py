"""BatchNorm with statistics apart for the parts of one batch, so that several batches can share one forward pass.

The step embeds key crops and masked key crops with the same encoder. As one batch with common statistics the keys would
change (cosine 0.91 to those of two passes). With statistics apart the one pass gives what two give, while every
convolution is launched once for twice the samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cast_fast.sync_batch_norm import twin, update_running_statistics


class SplitBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that normalises each of ``parts`` equal runs of samples by its own statistics.

    Running statistics take one step a part, in order, as if the parts had come one after the other. In eval mode, and
    for one part, it is that very module. Under ``torch.compile`` it makes the kernels of an ordinary BatchNorm; eagerly
    it is several times slower than torch's.
    """

    parts: int = 1

    def forward(self, input: Tensor) -> Tensor:
        """(parts · n, C, H, W) → the same shape and dtype; statistics in float32 or wider.

        Raises:
            ValueError: a number of samples that ``parts`` does not divide.
        """
        if not self.training or self.parts == 1:
            return super().forward(input)
        self._check_input_dim(input)
        if input.shape[0] % self.parts:
            raise ValueError(f"input: got {input.shape[0]} samples, expected a multiple of {self.parts} (parts)")
        with torch.autocast(input.device.type, enabled=False):
            values = input.to(torch.promote_types(input.dtype, torch.float32)).unflatten(0, (self.parts, -1))
            variance, mean = torch.var_mean(values, dim=(1, 3, 4), correction=0)
            if self.running_mean is not None:
                count = input.numel() // (input.shape[1] * self.parts)
                for part in range(self.parts):
                    update_running_statistics(self, mean[part].detach(), variance[part].detach(), count)
            factor = torch.rsqrt(variance + self.eps)
            if self.affine:
                factor = factor * self.weight
            result = (values - mean[:, None, :, None, None]) * factor[:, None, :, None, None]
            if self.affine:
                result = result + self.bias[:, None, None]
        return result.flatten(0, 1).to(input.dtype)


def split_batch_norm(module: nn.Module, parts: int) -> None:
    """Turns every BatchNorm below ``module`` into a ``SplitBatchNorm2d`` of ``parts`` parts with the same tensors.

    Raises:
        ValueError: another kind than ``nn.BatchNorm2d`` (for instance a synchronised one), or one without momentum; a
            streaming trunk, which reads the tensors of its BatchNorms and never calls them.
    """
    from cast_fast.streaming_resnet import StreamingBlock

    if any(isinstance(child, StreamingBlock) for child in module.modules()):
        raise ValueError("module: got a streaming trunk, expected one with torch's BatchNorm")
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.modules.batchnorm._BatchNorm):
                continue
            known = type(child) in (nn.BatchNorm2d, SplitBatchNorm2d)
            if not known or not isinstance(child, nn.BatchNorm2d) or child.momentum is None:
                raise ValueError(f"{name}: got {child}, expected nn.BatchNorm2d with a momentum")
            split = twin(child, SplitBatchNorm2d)
            split.parts = parts
            setattr(parent, name, split)
