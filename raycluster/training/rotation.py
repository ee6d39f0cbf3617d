"""4-way rotation prediction (Gidaris et al., Unsupervised representation learning by predicting image rotations, ICLR
2018): alone, it is RotNet; beside the labels of SeLa, it is SeLa+Rot (Asano et al., ICLR 2020, section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raycluster.seeding import seed_for
from raycluster.training.objective import Batch, CrossEntropy, Objective, cross_entropy
from raycluster.types import UserError

NUM_ROTATIONS = 4


class RotationPrediction(Objective):
    """Each row and its three rotated copies; one head predicts the rotation."""

    copies = NUM_ROTATIONS
    auxiliary = (NUM_ROTATIONS,)
    metrics = ("rotation_accuracy",)

    def expand(self, batch: Batch) -> Batch:
        """The labels of the expanded batch are the rotations alone."""
        rotated = rotate_batch(batch)
        return rotated._replace(labels=rotated.labels[-1:])

    def loss(self, outputs: Sequence[Sequence[Tensor]], batch: Batch) -> Tensor:
        return cross_entropy(outputs[0], batch.labels, batch.weights)

    def measure(self, outputs: Sequence[Sequence[Tensor]], batch: Batch) -> Tensor:
        return _correct(outputs[0][-1], batch.labels[-1], batch.weights)[None]


class CrossEntropyWithRotation(CrossEntropy):
    """Cross-entropy with every label set on the upright rows, plus rotation prediction on all copies."""

    copies = NUM_ROTATIONS
    auxiliary = (NUM_ROTATIONS,)
    metrics = ("rotation_accuracy",)

    def expand(self, batch: Batch) -> Batch:
        return rotate_batch(batch)

    def loss(self, outputs: Sequence[Sequence[Tensor]], batch: Batch) -> Tensor:
        logits, labels, weights = outputs[0], batch.labels, batch.weights
        upright = cross_entropy(logits[:-1], labels[:-1], weights, self.set_weights)
        return NUM_ROTATIONS * upright + cross_entropy(logits[-1:], labels[-1:], weights)

    def measure(self, outputs: Sequence[Sequence[Tensor]], batch: Batch) -> Tensor:
        return _correct(outputs[0][-1], batch.labels[-1], batch.weights)[None]


def with_rotation(objective: Objective) -> Objective:
    """The objective with rotation prediction beside it. Raises UserError where it is no plain cross-entropy."""
    if type(objective) is not CrossEntropy:
        raise UserError(
            f"training.rotation: seen true; wanted false for a method that minimises {type(objective).__name__}, "
            "which cannot predict rotations besides: remove it"
        )
    return CrossEntropyWithRotation(objective.set_weights)


def rotate_batch(batch: Batch) -> Batch:
    """Each row, then its copies rotated by 90, 180 and 270 degrees anticlockwise; one more row of labels.

    Returns images (4n, s, s, 3), or gradients (4n, s, s, 2), per view, labels (label sets + 1, 4n), weights (4n,). Only
    the upright copy keeps its labels; the last row of labels is the rotation, of rows whose weight is not 0.
    """
    labels, weights = batch.labels, batch.weights
    copies = tuple(
        torch.stack([_rotated(images, turn) for turn in range(NUM_ROTATIONS)], dim=1).flatten(0, 1)
        for images in batch.images
    )
    upright = labels.new_full((*labels.shape, NUM_ROTATIONS), -1)
    upright[..., 0] = labels
    rotations = torch.arange(NUM_ROTATIONS, device=labels.device).where((weights > 0)[:, None], -1)
    expanded = torch.cat((upright.flatten(1), rotations.flatten()[None]))
    return Batch(copies, expanded, weights.repeat_interleave(NUM_ROTATIONS))


def draw_rotations(batch: Batch) -> Tensor:
    """(n,) int64 rotations of 0 to 3 times 90 degrees, drawn from the seeds of the microbatches of the rows."""
    rows = len(batch.weights) // len(batch.seeds)
    generators = [torch.Generator().manual_seed(seed_for(seed, "rotation")) for seed in batch.seeds]
    drawn = [torch.randint(NUM_ROTATIONS, (rows,), generator=generator) for generator in generators]
    return torch.cat(drawn).to(batch.weights.device)


def rotate_rows(images: Tensor, rotations: Tensor) -> Tensor:
    """Each image of (n, s, s, C) rotated anticlockwise by its number of 90 degrees, (n,) 0 to 3."""
    copies = torch.stack([_rotated(images, turn) for turn in range(NUM_ROTATIONS)])
    return copies[rotations, torch.arange(len(images), device=images.device)]


def _rotated(images: Tensor, turn: int) -> Tensor:
    """(n, s, s, C) rotated `turn` times by 90 degrees anticlockwise; gradients (C = 2) turn with their image."""
    rotated = torch.rot90(images, turn, (1, 2))
    if images.shape[-1] != 2 or turn == 0:
        return rotated
    across, down = rotated.unbind(-1)
    return torch.stack(((down, -across), (-across, -down), (-down, across))[turn - 1], dim=-1)


def _correct(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == labels) * weights
