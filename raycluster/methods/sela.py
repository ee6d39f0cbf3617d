"""SeLa: labels of equally many images each, by optimal transport from what the heads predict, alternating with training
(Asano et al., Self-labelling via simultaneous clustering and representation learning, ICLR 2020). Heads are kept; where
paper and published code disagree, the code is followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from math import ceil
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from raycluster.clustering.sinkhorn.api import Sinkhorn, sinkhorn
from raycluster.config import settings
from raycluster.methods.base import AssignmentContext, BaseMethod
from raycluster.types import Assignments, FeatureRequest, Features, LabelSet, UserError

Count = Annotated[int, Field(ge=1)]
Clusters = Annotated[int, Field(ge=2)]


@settings
class Method(BaseMethod):
    """Settings of SeLa.

    num_heads: label sets found and learned together. num_clusters: of every head, or a list, one for each. sharpness:
    lambda of the paper, the inverse temperature of the transport. tolerance: largest relative deviation of a cluster's
    mass from the one it should have. max_iterations: of Sinkhorn-Knopp in a round; figures tell where they did not do.
    warm_start: begin with the scalings of the round before. prior: shares of the clusters, the same for all heads, null
    for equal ones. rounding: `argmax` of the plan as published, or `exact`: sizes differ by at most one. schedule: of
    reassignments: `quadratic` as published (many early, few late), `linear`, every so many `epochs` or `steps`.
    num_reassignments: of a quadratic or linear schedule, null for 100. every: epochs or steps, null for 1.
    max_per_epoch: leaves out reassignments beyond it. reassign: `all` heads, or `one` in turn, as published for CIFAR.
    features: `extracted`, from a pass over all images, or `online` while training: of the latest visit of each image,
    augmented; images not visited yet are extracted. view: of extracted features: `eval`, or `train` as published, which
    is augmented. views_averaged: random views of an image.
    """

    name: Literal["sela"] = "sela"
    num_heads: Count = 1
    num_clusters: Clusters | tuple[Clusters, ...] = 3000
    sharpness: Annotated[float, Field(gt=0)] = 25.0
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.01
    max_iterations: Count = 1000
    warm_start: bool = False
    prior: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    rounding: Literal["argmax", "exact"] = "argmax"
    schedule: Literal["quadratic", "linear", "epochs", "steps"] = "quadratic"
    num_reassignments: Annotated[int, Field(ge=2)] | None = None
    every: Count | None = None
    max_per_epoch: Count | None = None
    reassign: Literal["all", "one"] = "all"
    features: Literal["extracted", "online"] = "extracted"
    view: Literal["eval", "train"] = "eval"
    views_averaged: Count = 1

    resets_heads: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if faults := list(_faults(self)):
            raise UserError("; ".join(faults))

    def requested_clusters(self) -> tuple[int, ...]:
        sizes = self.num_clusters
        return (sizes,) * self.num_heads if isinstance(sizes, int) else sizes

    def feature_request(self, round: int) -> FeatureRequest:
        return FeatureRequest(None, "activations", self.view, self.views_averaged, self.features == "online")

    def reassign_steps(self, epochs: int, steps_per_epoch: int) -> list[int]:
        steps: list[int] = []
        in_epoch = [0] * epochs
        for time in self._times(epochs, steps_per_epoch):
            step = max(ceil(time * steps_per_epoch - 1e-9), steps[-1] + 1 if steps else 0)  # at most one before a step
            if step >= epochs * steps_per_epoch:
                break
            if self.max_per_epoch is None or in_epoch[step // steps_per_epoch] < self.max_per_epoch:
                in_epoch[step // steps_per_epoch] += 1
                steps.append(step)
        return steps

    def _times(self, epochs: int, steps_per_epoch: int) -> Iterator[float]:
        """When to reassign, in epochs."""
        if self.schedule in ("epochs", "steps"):
            unit = 1.0 if self.schedule == "epochs" else 1 / steps_per_epoch
            yield from (index * (self.every or 1) * unit for index in count())
        number, power = self.num_reassignments or 100, 2 if self.schedule == "quadratic" else 1
        late = 0.01 if self.schedule == "quadratic" else 0.0001  # so that the last is never reached, as published
        yield from ((epochs + late) * (index / (number - 1)) ** power for index in range(number))

    def assign(self, features: Features | None, context: AssignmentContext) -> Assignments:
        assert features is not None
        heads, previous = context.heads.arrays()[: self.num_heads], context.previous  # type: ignore[operator]
        turn = -1 if previous is None else int(previous.state["turn"])
        chosen = range(len(heads)) if turn < 0 or self.reassign == "all" else [turn]
        state: dict[str, Any] = {} if previous is None else dict(previous.state)
        found = sinkhorn(
            features,
            [heads[head] for head in chosen],
            sharpness=self.sharpness,
            priors=None if self.prior is None else [np.array(self.prior)] * len(chosen),
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            start=[state[f"scaling_{head}"] for head in chosen] if self.warm_start and state else None,
            rounding=self.rounding,
        )
        label_sets = dict(enumerate(() if previous is None else previous.label_sets))
        for head, row, scaling in zip(chosen, found.labels, found.scalings, strict=True):
            labels = np.full(context.num_samples, -1, np.int32)
            labels[found.samples] = row
            label_sets[head] = LabelSet(labels, self.requested_clusters()[head])
            state[f"scaling_{head}"] = scaling
        state["turn"] = np.array((turn + 1) % len(heads))  # the head to reassign next, where it is one at a time
        return Assignments(context.num_samples, tuple(label_sets.values()), _metrics(found), state)


def _metrics(found: Sinkhorn) -> dict[str, float]:
    """Of the worst head where something may have failed, else the mean over heads."""
    return {
        "marginal_error": max(found.marginal_errors),
        "iterations": float(max(found.iterations)),
        "heads_converged": float(np.mean(found.converged)),
        "transport_cost": float(np.mean(found.costs)),
        "rounding_cost": float(np.mean(found.rounding_costs)),
    }


def _faults(method: Method) -> Iterator[str]:
    sizes = method.num_clusters
    if not isinstance(sizes, int) and len(sizes) != method.num_heads:
        yield f"num_clusters names {len(sizes)} heads, num_heads says {method.num_heads}: make them agree"
    if method.prior is not None and set(method.requested_clusters()) != {len(method.prior)}:
        yield f"prior has {len(method.prior)} shares, but the heads have {list(method.requested_clusters())} clusters"
    if method.prior is not None and not sum(method.prior):
        yield "prior sums to 0: give the shares that clusters should have"
    by_number = method.schedule in ("quadratic", "linear")
    unused, used = ("every", "num_reassignments") if by_number else ("num_reassignments", "every")
    if getattr(method, unused) is not None:
        yield f"{unused} has no effect with schedule {method.schedule}: remove it (or set {used})"
    if method.schedule == "epochs" and method.max_per_epoch is not None:
        yield "max_per_epoch has no effect with schedule epochs: remove it"
    if method.features == "online" and (method.view, method.views_averaged) != ("eval", 1):
        yield "view and views_averaged have no effect with online features: remove them"
    if method.reassign == "one" and method.num_heads == 1:
        yield "reassign one has no effect with a single head: remove it, or set num_heads"
