"""Multi-crop: an image is seen in several views at once, which learn the same labels (Caron et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raycluster.training.objective import Batch, CrossEntropy


class MultiCropCrossEntropy(CrossEntropy):
    """Cross-entropy with every label set in every view: the mean over sets and views.

    views: sections of `views`, one for each view; those of other sizes share the network.
    """

    def __init__(self, views: tuple[str, ...]) -> None:
        super().__init__()
        self.views = views

    def loss(self, outputs: Sequence[Sequence[Tensor]], batch: Batch) -> Tensor:
        return torch.stack([super(MultiCropCrossEntropy, self).loss([logits], batch) for logits in outputs]).mean(0)
