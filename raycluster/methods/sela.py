"""SeLa: labels of equally many images each, by optimal transport from what the heads predict, alternating with training
(Asano et al., Self-labelling via simultaneous clustering and representation learning, ICLR 2020). Heads are kept; where
paper and published code disagree, the code is followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import count
from math import ceil
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.clustering.sinkhorn.api import Sinkhorn, sinkhorn
from raycluster.config import settings
from raycluster.methods.base import AssignmentContext, BaseMethod, by_sample
from raycluster.seeding import generator, seed_for
from raycluster.types import Assignments, FeatureRequest, Features, LabelSet, UserError

Count = Annotated[int, Field(ge=1)]
Clusters = Annotated[int, Field(ge=2)]
Labels = NDArray[np.integer]

_TRANSPORT = ("sharpness", "tolerance", "max_iterations", "warm_start", "prior", "rounding")
_FEATURES = ("labels", "reassign", "max_per_epoch", "features", "view", "views_averaged", "network_mode")


class _Found(NamedTuple):
    """samples: (n,) ids. labels: of each head asked for, (n,). state: what the next call needs."""

    samples: NDArray[np.int64]
    labels: Sequence[Labels]
    metrics: dict[str, float]
    state: dict[str, NDArray[np.float64]]


@settings
class Method(BaseMethod):
    """Settings of SeLa.

    num_heads: label sets found and learned together. num_clusters: of every head, or a list, one for each. labels: by
    optimal transport (`sinkhorn`), or by `kmeans` on what the heads read, from the labels before (the comparison of the
    paper's table 8). sharpness: lambda of the paper, the inverse temperature of the transport. tolerance: largest
    relative deviation of a cluster's mass from the one it should have. max_iterations: of Sinkhorn-Knopp in a round;
    figures tell where they did not do. warm_start: begin with the scalings of the round before. prior: shares of the
    clusters, the same for all heads, null for equal ones. rounding: `argmax` of the plan as published, or `exact`:
    sizes differ by at most one. schedule: of reassignments: `quadratic` as published (many early, few late), `linear`,
    every so many `epochs` or `steps`. num_reassignments: of a quadratic or linear schedule, null for 100; 0 for random
    labels that stay. every: epochs or steps, null for 1. max_per_epoch: leaves out reassignments beyond it. reassign:
    `all` heads, or `one` in turn, as published for CIFAR. features: `extracted`, from a pass over all images, or
    `online` while training: of the latest visit of each image, augmented; images not visited yet are extracted. view:
    of extracted features: `eval`, or `train` as published, which is augmented. views_averaged: random views of an
    image. network_mode: in extraction: `eval`, or `train` as published, with dropout and batch norm over
    `training.microbatch` images.
    """

    name: Literal["sela"] = "sela"
    num_heads: Count = 1
    num_clusters: Clusters | tuple[Clusters, ...] = 3000
    labels: Literal["sinkhorn", "kmeans"] = "sinkhorn"
    sharpness: Annotated[float, Field(gt=0)] = 25.0
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.01
    max_iterations: Count = 1000
    warm_start: bool = False
    prior: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    rounding: Literal["argmax", "exact"] = "argmax"
    schedule: Literal["quadratic", "linear", "epochs", "steps"] = "quadratic"
    num_reassignments: Annotated[int, Field(ge=0)] | None = None
    every: Count | None = None
    max_per_epoch: Count | None = None
    reassign: Literal["all", "one"] = "all"
    features: Literal["extracted", "online"] = "extracted"
    view: Literal["eval", "train"] = "eval"
    views_averaged: Count = 1
    network_mode: Literal["eval", "train"] = "eval"

    resets_heads: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if faults := [*_size_faults(self), *_schedule_faults(self), *_feature_faults(self)]:
            raise UserError("; ".join(faults))

    def requested_clusters(self) -> tuple[int, ...]:
        sizes = self.num_clusters
        return (sizes,) * self.num_heads if isinstance(sizes, int) else sizes

    def feature_request(self, round: int) -> FeatureRequest | None:
        if self.num_reassignments == 0:
            return None
        online, training = self.features == "online", self.network_mode == "train"
        return FeatureRequest(None, "activations", self.view, self.views_averaged, online, training)

    def reassign_steps(self, epochs: int, steps_per_epoch: int) -> list[int]:
        if self.num_reassignments == 0:  # a round is an epoch, so that there are figures of each
            return super().reassign_steps(epochs, steps_per_epoch)
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
        yield from ((epochs + late) * (index / max(1, number - 1)) ** power for index in range(number))

    def assign(self, features: Features | None, context: AssignmentContext) -> Assignments:
        if features is None:
            return context.previous or self._random_labels(context)
        previous = context.previous
        turn = -1 if previous is None else int(previous.state["turn"])
        chosen = range(self.num_heads) if turn < 0 or self.reassign == "all" else [turn]
        found = (self._transport if self.labels == "sinkhorn" else self._kmeans)(features, context, chosen)
        label_sets = dict(enumerate(() if previous is None else previous.label_sets))
        for head, row in zip(chosen, found.labels, strict=True):
            labels = by_sample(context.num_samples, found.samples, row)
            label_sets[head] = LabelSet(labels, self.requested_clusters()[head])
        state: dict[str, Any] = {**({} if previous is None else previous.state), **found.state}
        state["turn"] = np.array((turn + 1) % self.num_heads)  # the head to reassign next, where it is one at a time
        return Assignments(context.num_samples, tuple(label_sets.values()), found.metrics, state)

    def _transport(self, features: Features, context: AssignmentContext, chosen: Sequence[int]) -> _Found:
        heads = context.heads.arrays()  # type: ignore[operator]
        state: dict[str, Any] = {} if context.previous is None else context.previous.state
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
        scalings = {f"scaling_{head}": scaling for head, scaling in zip(chosen, found.scalings, strict=True)}
        return _Found(found.samples, list(found.labels), _metrics(found), scalings)

    def _kmeans(self, features: Features, context: AssignmentContext, chosen: Sequence[int]) -> _Found:
        """From the labels before, so that the numbers of clusters keep their meaning for the heads, which are kept."""
        before = {} if context.previous is None else dict(enumerate(context.previous.label_sets))
        found = [
            kmeans(
                features,
                self.requested_clusters()[head],
                seed=seed_for(context.seed, "kmeans", head),
                init=before[head].labels if before else "random",
                plain=True,
            )
            for head in chosen
        ]
        metrics = {
            "inertia": float(np.mean([one.inertia[-1] / len(one.samples) for one in found])),
            "num_repaired": float(sum(one.num_repaired for one in found)),
            "iterations": float(max(len(one.inertia) for one in found)),
        }
        return _Found(found[0].samples, [one.labels for one in found], metrics, {})

    def _random_labels(self, context: AssignmentContext) -> Assignments:
        """Clusters whose sizes differ by at most one."""
        label_sets = []
        for head, size in enumerate(self.requested_clusters()):
            order = generator(context.seed, "random labels", head).permutation(context.num_samples)
            label_sets.append(LabelSet((order % size).astype(np.int32), size))
        return Assignments(context.num_samples, tuple(label_sets))


def _metrics(found: Sinkhorn) -> dict[str, float]:
    """Of the worst head where something may have failed, else the mean over heads."""
    return {
        "marginal_error": max(found.marginal_errors),
        "iterations": float(max(found.iterations)),
        "heads_converged": float(np.mean(found.converged)),
        "transport_cost": float(np.mean(found.costs)),
        "rounding_cost": float(np.mean(found.rounding_costs)),
    }


def _size_faults(method: Method) -> Iterator[str]:
    sizes = method.num_clusters
    if not isinstance(sizes, int) and len(sizes) != method.num_heads:
        yield f"num_clusters names {len(sizes)} heads, num_heads says {method.num_heads}: make them agree"
    if method.prior is not None and set(method.requested_clusters()) != {len(method.prior)}:
        yield f"prior has {len(method.prior)} shares, but the heads have {list(method.requested_clusters())} clusters"
    if method.prior is not None and not sum(method.prior):
        yield "prior sums to 0: give the shares that clusters should have"


def _schedule_faults(method: Method) -> Iterator[str]:
    by_number = method.schedule in ("quadratic", "linear")
    unused, used = ("every", "num_reassignments") if by_number else ("num_reassignments", "every")
    if getattr(method, unused) is not None:
        yield f"{unused} has no effect with schedule {method.schedule}: remove it (or set {used})"
    if method.schedule == "epochs" and method.max_per_epoch is not None:
        yield "max_per_epoch has no effect with schedule epochs: remove it"
    if method.reassign == "one" and method.num_heads == 1:
        yield "reassign one has no effect with a single head: remove it, or set num_heads"


def _feature_faults(method: Method) -> Iterator[str]:
    if method.features == "online" and (method.view, method.views_averaged, method.network_mode) != ("eval", 1, "eval"):
        yield "view, views_averaged and network_mode have no effect with online features: remove them"
    unused: tuple[str, ...] = _TRANSPORT if method.labels == "kmeans" else ()
    cause = "labels kmeans"
    if method.num_reassignments == 0:
        unused, cause = (*_TRANSPORT, *_FEATURES), "num_reassignments 0"
    for field in fields(method):
        if field.name in unused and getattr(method, field.name) != field.default:
            yield f"{field.name} has no effect with {cause}: remove it, or set it to its default, {field.default}"
