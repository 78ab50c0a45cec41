"""BatchNorm with statistics apart for the parts of one batch.

Two things make parts of a batch:

* groups: as many samples as one GPU of the published recipes has. They take the place of ranks where Shuffling
  BatchNorm needs several (``shuffle``), and what they leave behind in the running statistics is what ranks would: the
  mean;
* passes: the step may embed key crops and masked key crops in one forward pass. As one batch with common statistics the
  keys would change (cosine 0.91 to those of two passes). With statistics apart the one pass gives what two give, while
  every convolution is launched once for twice the samples.
"""

from __future__ import annotations

from torch import Tensor, nn

from cast_fast.sync_batch_norm import batch_statistics, normalise, twin, update_running_statistics


class SplitBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that normalises each of ``parts`` equal runs of samples by its own statistics.

    The runs are ``passes`` times ``groups``, the groups of one pass beside each other. Running statistics take one step
    a pass, in order, as if the passes had come one after the other, by the mean of its groups' statistics. In eval
    mode, and for one part, it is ``nn.BatchNorm2d`` itself. Under ``torch.compile`` it makes the kernels of an ordinary
    BatchNorm; eagerly it is slower than torch's.
    """

    passes: int = 1
    groups: int = 1

    @property
    def parts(self) -> int:
        """Runs of samples with statistics of their own."""
        return self.passes * self.groups

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{super().extra_repr()}, groups={self.groups}, passes={self.passes}"

    def forward(self, input: Tensor) -> Tensor:
        """(parts · n, C, H, W) → the same shape and dtype; statistics in float32 or wider.

        Raises:
            ValueError: a number of samples that ``parts`` does not divide, parts of one value a channel, or running
                statistics without a momentum.
        """
        if not self.training or self.parts == 1:
            return super().forward(input)
        self._check_input_dim(input)
        if input.shape[0] % self.parts:
            raise ValueError(f"input: got {input.shape[0]} samples, expected a multiple of {self.parts} (parts)")
        count = input.numel() // (input.shape[1] * self.parts)
        if count < 2:
            raise ValueError(f"input: got {count} value a channel in each of {self.parts} parts, expected more")
        moments = batch_statistics(input, self.parts)
        if self.running_mean is not None:
            of_passes = (moment.unflatten(0, (self.passes, -1)).mean(1) for moment in moments)
            for mean, variance in zip(*of_passes):
                update_running_statistics(self, mean, variance, count)
        return normalise(self, input, *moments)


def split_batch_norm(module: nn.Module, groups: int = 1, passes: int = 1) -> None:
    """Turns every BatchNorm below ``module`` into a ``SplitBatchNorm2d`` with the same tensors.

    A streaming trunk never calls its BatchNorms; it reads from them what they are.

    Raises:
        ValueError: another kind than ``nn.BatchNorm2d`` (for instance a synchronised one), one without momentum, or
            fewer than one group or pass.
    """
    if groups < 1 or passes < 1:
        raise ValueError(f"groups, passes: got {groups}, {passes}, expected at least 1 each")
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.modules.batchnorm._BatchNorm):
                continue
            known = type(child) in (nn.BatchNorm2d, SplitBatchNorm2d)
            if not known or not isinstance(child, nn.BatchNorm2d) or child.momentum is None:
                raise ValueError(f"{name}: got {child}, expected nn.BatchNorm2d with a momentum")
            split = twin(child, SplitBatchNorm2d)
            split.groups, split.passes = groups, passes
            setattr(parent, name, split)
