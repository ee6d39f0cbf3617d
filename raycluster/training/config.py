"""The configuration section `training`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raycluster.config import settings
from raycluster.types import UserError

Decay = Annotated[float, Field(gt=0, lt=1)]


@settings
class LayerSettings:
    """What differs from the other layers.

    lr_factor: on the learning rate. weight_decay: null for that of the others.
    """

    lr_factor: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] | None = None


@settings
class TrainingSettings:
    """How labels train the network.

    epochs: length of the run. images_per_round: so many images are drawn at random for each round, of which features
    are extracted, clustered and trained on; null for all (algorithm 2 of Caron's thesis). An epoch is then a pass over
    the drawn ones. global_batch: rows of one optimiser step, whatever the number of workers. microbatch: rows that
    share batch norm statistics and go to the same worker. optimiser: of the backbone: `sgd`, `adamw`, or `lars`, for
    large batches. lr, momentum, weight_decay: of this optimiser; for adamw the momentum is beta1. head_lr: of each
    head, as if it were alone, null for the same as lr; the backbone learns from the mean of the loss over heads. The
    optimiser of heads is always SGD. head_momentum: of the heads. layers: exceptions by name: a layer of the backbone,
    `neck`, `heads`, or `biases` of all layers, whose factor multiplies that of their layer. schedule: `constant`,
    `cosine` to zero, or `step`: times decay (one factor, or one for each; null for 0.1) at each of milestones, in
    epochs. warmup_epochs: linear warm-up, on top of any schedule. mode: `exact` is bitwise identical for any number of
    workers on the same kind of hardware, `fast` agrees to about 1e-5. precision: of the forward and backward pass of a
    step; weights, gradients and the input layer are always float32. `fp32` is float32 throughout; `tf32` lets CUDA
    round the inputs of convolutions and matrix products to TensorFloat-32; `bf16` and `fp16` use autocast. threads: per
    worker on a CPU; changes the result. forward_rows: in fast mode, at most so many rows share a forward pass, which
    bounds memory; null for 256. rotation: one more head predicts rotations (4-way); each image then becomes four rows,
    and only the upright one has labels. partial_softmax: the softmax runs over so many clusters, those of the labels in
    a microbatch and drawn ones; null for all.
    """

    epochs: Annotated[int, Field(ge=1, le=100_000)] = 100
    images_per_round: Annotated[int, Field(ge=1)] | None = None
    global_batch: Annotated[int, Field(ge=2)] = 256
    microbatch: Annotated[int, Field(ge=2)] = 32
    optimiser: Literal["sgd", "adamw", "lars"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    head_lr: Annotated[float, Field(gt=0)] | None = None
    head_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    layers: dict[str, LayerSettings] = Field(default_factory=dict)
    schedule: Literal["constant", "cosine", "step"] = "constant"
    milestones: tuple[Annotated[float, Field(gt=0)], ...] = ()
    decay: Decay | tuple[Decay, ...] | None = None
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    mode: Literal["fast", "exact"] = "fast"
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    threads: Annotated[int, Field(ge=1)] = 2
    forward_rows: Annotated[int, Field(ge=2)] | None = None
    rotation: bool = False
    partial_softmax: Annotated[int, Field(ge=2)] | None = None

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one optimiser step, over all workers."""
        return self.global_batch // self.microbatch

    def microbatches_per_forward(self, copies: int) -> int:
        """How many microbatches go through the network together at most. copies: rows that it sees of each image."""
        return 1 if self.mode == "exact" else max(1, (self.forward_rows or 256) // (self.microbatch * copies))

    def __post_init__(self) -> None:
        if faults := [*self._size_faults(), *self._mode_faults(), *self._schedule_faults()]:
            raise UserError("; ".join(faults))

    def _size_faults(self) -> list[str]:
        if self.global_batch % self.microbatch == 0:
            return []
        lower = max(1, self.global_batch // self.microbatch) * self.microbatch
        return [
            f"global_batch {self.global_batch} is not a multiple of microbatch {self.microbatch}: "
            f"set global_batch to {lower} or {lower + self.microbatch}"
        ]

    def _mode_faults(self) -> list[str]:
        faults = []
        if self.mode == "exact" and self.precision == "fp16":
            faults.append(
                "mode exact does not support the changing loss scale of fp16: set precision to bf16 or mode to fast"
            )
        if self.mode == "exact" and self.forward_rows is not None:
            faults.append("forward_rows has no effect in mode exact, which takes one microbatch at a time: remove it")
        if self.mode == "fast" and self.forward_rows is not None and self.forward_rows % self.microbatch:
            faults.append(f"forward_rows {self.forward_rows} is not a multiple of microbatch, {self.microbatch} rows")
        return faults

    def _schedule_faults(self) -> list[str]:
        faults = []
        if self.schedule == "step" and not self.milestones:
            faults.append("schedule step needs milestones, e.g. [60, 80]")
        if self.schedule != "step" and (self.milestones or self.decay is not None):
            faults.append(
                f"milestones and decay have no effect with schedule {self.schedule}: remove them or set it to step"
            )
        if list(self.milestones) != sorted(set(self.milestones)) or any(m >= self.epochs for m in self.milestones):
            faults.append(f"milestones {list(self.milestones)} must increase and be less than epochs {self.epochs}")
        if isinstance(self.decay, tuple) and len(self.decay) != len(self.milestones):
            faults.append(
                f"decay {list(self.decay)} must hold a factor for each of milestones {list(self.milestones)}, or be "
                "one number for all of them"
            )
        if self.warmup_epochs >= self.epochs:
            faults.append(f"warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}")
        return faults
