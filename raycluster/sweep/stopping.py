"""Early stopping: asynchronous successive halving, decided in the order of the trials instead of that of arrival."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Curve = Sequence[tuple[float, float]]
"""(epoch, objective), ascending in the epoch; more is better."""


def decide(
    curves: Sequence[Curve], over: Sequence[bool], *, rungs: Sequence[float], reduction: float
) -> list[int | None]:
    """Per trial, at which point of its curve it is stopped; None while it may go on.

    At each rung (an epoch), a trial goes on if it is as good as the best 1 / reduction of those before it: ASHA's rule
    (Li et al., A System for Massively Parallel Hyperparameter Tuning, 2020), as Ray Tune's `ASHAScheduler` has it,
    except that "before" is the order of `curves`, not of arrival. A trial is judged once all before it have come to the
    rung, were stopped, or are `over`; so no decision depends on who was faster, nor ever changes.
    """
    stopped: list[int | None] = [None] * len(curves)
    for rung in rungs:
        seen: list[float] = []
        for index, curve in enumerate(curves):
            if stopped[index] is not None:
                continue
            place = next((place for place, (epoch, _) in enumerate(curve) if epoch >= rung), None)
            if place is None and over[index]:
                continue
            if place is None:
                break
            value = curve[place][1]
            if seen and value < np.quantile(seen, 1 - 1 / reduction):
                stopped[index] = place
            seen.append(value)
    return stopped
