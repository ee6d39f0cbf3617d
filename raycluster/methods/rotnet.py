"""RotNet: no clusters, only the rotation of each image is predicted (Gidaris et al., Unsupervised representation
learning by predicting image rotations, ICLR 2018).
"""

from __future__ import annotations

from typing import Literal

from raycluster.config import settings
from raycluster.methods.base import AssignmentContext, BaseMethod
from raycluster.training.objective import Objective
from raycluster.training.rotation import RotationPrediction
from raycluster.types import Assignments, Features


@settings
class Method(BaseMethod):
    """RotNet has no settings of its own. A round is an epoch; each image is four rows, one per rotation."""

    name: Literal["rotnet"] = "rotnet"

    def assign(self, features: Features | None, context: AssignmentContext) -> Assignments:
        return Assignments(context.num_samples, ())

    def objective(self, assignments: Assignments | None) -> Objective:
        return RotationPrediction()
