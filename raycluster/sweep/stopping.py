"""Early stopping by asynchronous successive halving (ASHA), deterministic in the order of the trials."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Curve = Sequence[tuple[float, float]]
"""(epoch, objective) by ascending epoch; larger objectives are better."""


def decide(
    curves: Sequence[Curve], over: Sequence[bool], *, rungs: Sequence[float], reduction: float
) -> list[int | None]:
    """Per trial, the index into its curve at which it is stopped; None if it is not.

    At each rung (an epoch), a trial continues if its objective is in the best 1 / reduction of the preceding trials:
    the rule of ASHA (Li et al., A System for Massively Parallel Hyperparameter Tuning, 2020) and of Ray Tune's
    `ASHAScheduler`, except that trials precede each other in the order of `curves`, not of arrival. A trial is decided
    once all preceding ones have reached the rung, were stopped, or are `over`; decisions are thus independent of
    timing, and final.
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
