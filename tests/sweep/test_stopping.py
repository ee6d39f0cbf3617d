"""Early stopping: worked by hand, against Ray Tune's scheduler, and under any order of arrival."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from raycluster.sweep.stopping import decide

Curves = list[list[tuple[float, float]]]


def test_by_hand() -> None:
    """Rungs at epochs 1 and 2, one in two continues. At 1: 3 < 5 stops; 6 >= median(5, 3) = 4; 5 >= median(5, 3, 6)."""
    curves: Curves = [[(1, 5), (2, 9), (3, 9)], [(1, 3), (2, 3)], [(1, 6), (2, 8), (3, 8)], [(1, 5), (2, 10), (3, 10)]]
    # At 2, among those that are left: 8 < 9 stops; 10 >= median(9, 8) = 8.5.
    assert decide(curves, [True] * 4, rungs=[1, 2], reduction=2.0) == [None, 0, 1, None]


def test_only_later_trials_wait_for_a_slow_one() -> None:
    curves: Curves = [[(1, 5)], [], [(1, 1)], [(1, 2)]]
    assert decide(curves, [False] * 4, rungs=[1], reduction=2.0) == [None, None, None, None]
    assert decide(curves, [False, True, False, False], rungs=[1], reduction=2.0) == [None, None, 0, 0]


def test_a_round_longer_than_a_rung_is_compared_at_its_end() -> None:
    assert decide([[(1, 5)], [(3, 4), (6, 9)]], [True, True], rungs=[2], reduction=2.0) == [None, None]
    assert decide([[(2, 5)], [(3, 4), (6, 9)]], [True, True], rungs=[2], reduction=2.0) == [None, 0]


def random_curves(seed: int) -> Curves:
    rng = np.random.default_rng(seed)
    limits = rng.random(12)
    return [[(epoch, float(end + rng.normal() / epoch)) for epoch in range(1, 10)] for end in limits]


@pytest.mark.parametrize("seed", range(5))
def test_decisions_are_independent_of_timing_and_final(seed: int) -> None:
    curves = random_curves(seed)
    final = decide(curves, [True] * 12, rungs=[1, 3], reduction=3.0)
    assert any(place is not None for place in final) and any(place is None for place in final)
    rng = np.random.default_rng(seed)
    arrived = [0] * 12
    while any(count < 9 for count in arrived):
        arrived[int(rng.choice([trial for trial in range(12) if arrived[trial] < 9]))] += 1
        now = decide(
            [curve[:count] for curve, count in zip(curves, arrived, strict=True)],
            [count == 9 for count in arrived],
            rungs=[1, 3],
            reduction=3.0,
        )
        assert all(place in (None, end) for place, end in zip(now, final, strict=True))
    assert now == final


@pytest.mark.parametrize("seed", range(5))
def test_sequential_trials_agree_with_ray_tune(seed: int) -> None:
    from ray.tune.schedulers import ASHAScheduler

    curves = random_curves(seed)
    scheduler = ASHAScheduler(
        time_attr="epoch", metric="score", mode="max", grace_period=1, max_t=9, reduction_factor=3
    )
    theirs: list[int | None] = []
    for number, curve in enumerate(curves):
        trial = SimpleNamespace(trial_id=str(number))
        scheduler.on_trial_add(None, trial)
        actions = (scheduler.on_trial_result(None, trial, {"epoch": epoch, "score": score}) for epoch, score in curve)
        stopped = next(place for place, action in enumerate(actions) if action == scheduler.STOP)
        theirs.append(None if stopped == len(curve) - 1 else stopped)  # at max_t it ends every trial
    assert decide(curves, [True] * 12, rungs=[1, 3], reduction=3.0) == theirs
