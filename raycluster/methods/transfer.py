"""Label transfer: no clustering at all, only the labels that another run found (Asano et al., ICLR 2020,
section 4.3: labels of a ResNet-50 train a better AlexNet than its own).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raycluster.config import settings
from raycluster.io.assignments import read_label_sets
from raycluster.io.run_paths import RunPaths
from raycluster.methods.base import AssignmentContext, BaseMethod
from raycluster.types import Assignments, Features, LabelSet, UserError


@settings
class Method(BaseMethod):
    """Settings of label transfer; `jobs/transfer.py` fills them in.

    labels: directory of the run whose assignments are learned. num_clusters: of each of its label sets. A round is an
    epoch, so that there are figures of each.
    """

    name: Literal["transfer"] = "transfer"
    labels: str
    num_clusters: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)]

    resets_heads: ClassVar[bool] = False

    def requested_clusters(self) -> tuple[int, ...]:
        return self.num_clusters

    def assign(self, features: Features | None, context: AssignmentContext) -> Assignments:
        if context.previous is not None:
            return context.previous
        label_sets, wanted = (
            read_label_sets(RunPaths(self.labels).assignments),
            (len(self.num_clusters), context.num_samples),
        )
        found = (len(label_sets), len(label_sets[0].labels) if label_sets else 0)
        largest = max((int(one.labels.max(initial=-1)) for one in label_sets), default=-1)
        fits = all(one.labels.max(initial=-1) < size for one, size in zip(label_sets, self.num_clusters, strict=False))
        if found != wanted or not fits:
            raise UserError(
                f"{self.labels} holds {found} labels up to {largest}, but this run {wanted} "
                f"of {list(self.num_clusters)} clusters: start it by jobs/transfer.py, with the images of that run"
            )
        sized = zip(label_sets, self.num_clusters, strict=True)
        return Assignments(context.num_samples, tuple(LabelSet(one.labels, size) for one, size in sized))
