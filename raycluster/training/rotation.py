"""A second task beside the labels: by how many quarter turns was a picture turned (Gidaris et al., Unsupervised
representation learning by predicting image rotations, ICLR 2018)? With it, SeLa becomes SeLa+Rot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raycluster.training.objective import cross_entropy

TURNS = 4


def rotate_batch(images: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row, then its copies turned by 90, 180 and 270 degrees anticlockwise; one more row of labels.

    images: (n, s, s, 3). labels: (heads, n). weights: (n,). Returns (4n, s, s, 3), (heads + 1, 4n), (4n,). Only the
    upright copy keeps its labels; the last head is to tell the number of turns, of rows that have any label.
    """
    copies = torch.stack([torch.rot90(images, turn, (1, 2)) for turn in range(TURNS)], dim=1).flatten(0, 1)
    upright = labels.new_full((*labels.shape, TURNS), -1)
    upright[..., 0] = labels
    turns = torch.arange(TURNS, device=labels.device).where((labels >= 0).any(0)[:, None], -1)
    return copies, torch.cat((upright.flatten(1), turns.flatten()[None])), weights.repeat_interleave(TURNS)


def rotation_loss(logits: Sequence[Tensor], labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy, mean over the heads but the last and over upright copies, plus that of the last over all copies.

    Arguments as `rotate_batch` made them; returns (4n,), whose mean is the loss.
    """
    return TURNS * cross_entropy(logits[:-1], labels[:-1], weights) + cross_entropy(logits[-1:], labels[-1:], weights)
