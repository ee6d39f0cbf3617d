"""Newton's method on the dual of the balanced assignment, from sums over rows only.

The scaling u of a head minimises the convex function mean(log sum_k e^(score_ik + u_k)) - prior . u, whose gradient is
marginals - prior. Sinkhorn's iteration descends it by u += log(prior / marginals), in steps whose number explodes once
the network is confident. A Newton step solves (H + damping * diag(prior)) step = -gradient by conjugate gradients
(Levenberg 1944; Marquardt 1963), where a product with H is one more pass that reduces a K-vector.

Passes see only candidates: the clusters within `depth` of a row's best. As long as max(shift) - min(shift) of the
scaling since they were chosen stays below depth - tau, what was left out has less than e^-tau of a row's mass: the
result is that of all clusters to K e^-tau, a small part of the tolerance. Beyond it candidates are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering.sinkhorn.passes import GAPS, Query, Response
from raycluster.clustering.sinkhorn.sparse import CandidateWindow

_BITS = 61
_NEGLIGIBLE_FACTOR = 40.0  # of the tolerance, what may be left out is this part
_MIN_RANGE = 4.0
_MARGIN = 5.0
_FULL_DEPTH = 1024.0
_DAMPING = 4.0  # of the first step, over the range
_LARGEST_STEP = 100.0
_MIN_DAMPING = 1e-10
_MAX_PRODUCTS = 60
_MIN_SHARE = 1e-12
_BACKTRACKS = 8


@dataclass(frozen=True)
class Problem:
    """One head's problem. prior: (K,). budget: candidates per row that may be kept, on average."""

    head: int
    num_rows: int
    prior: NDArray[np.float64]
    sharpness: float
    tolerance: float
    max_iterations: int
    budget: float


class Solution(NamedTuple):
    """query: the last, at the scaling found. scaling: (K,) with mean 0. error: largest |marginal / prior - 1|.

    iterations: passes that reduced K numbers.
    """

    query: Query
    scaling: NDArray[np.float64]
    error: float
    iterations: int


class _Point(NamedTuple):
    number: int
    shift: NDArray[np.float64]
    gradient: NDArray[np.float64]
    slopes: NDArray[np.float64]
    value: float


class Solver:
    """Finds the scaling of one head; `steps` yields queries and is sent the responses."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.used = problem.prior > 0
        self.prior = problem.prior[self.used]
        self.passes = 0
        self.points = 0
        self.damping = 0.0
        self.tau = math.log(_NEGLIGIBLE_FACTOR * len(self.prior) / problem.tolerance)
        self.scale = 2.0 ** min(50, _BITS - problem.num_rows.bit_length())

    def steps(self, start: NDArray[np.float64]) -> Generator[Query, Response, Solution]:
        """start: (K,) scaling, -inf where the prior is 0."""
        scaling, window_id = start, 0
        while True:
            query = yield from self._choose_window(scaling, window_id)
            query, error = yield from self._descend(query)
            scaling = query.window.scaling + query.shift
            scaling = scaling - scaling[self.used].mean()
            if error <= self.problem.tolerance or self.passes >= self.problem.max_iterations:
                return Solution(query, scaling, error, self.passes)
            window_id += 1

    def _choose_window(self, scaling: NDArray[np.float64], window_id: int) -> Generator[Query, Response, Query]:
        """Choose the depth of candidates: as deep as the budget allows, or do not keep them."""
        problem = self.problem
        window = CandidateWindow(problem.sharpness, scaling, np.inf)
        shift = np.full(len(scaling), float(problem.num_rows))
        counts, rows = yield Query("gaps", problem.head, window, window_id, False, shift)
        below = np.concatenate([[0], np.cumsum(counts)[:-1]]) / max(int(rows[0]), 1)
        affordable = float(GAPS[max(int(np.searchsorted(below[1:], problem.budget, side="right")) - 1, 0)])
        min_depth = self.tau + _MIN_RANGE
        kept = affordable >= min_depth
        window = window._replace(depth=affordable if kept else _FULL_DEPTH)
        zeros = np.zeros(len(scaling))
        bits = math.frexp(window.depth + 64)[1]
        value_scale = 2.0 ** min(50 - bits, _BITS - bits - problem.num_rows.bit_length())
        return Query(
            "marginals",
            problem.head,
            window,
            window_id,
            kept,
            zeros,
            negligible=self.tau + _MARGIN,
            scale=self.scale,
            value_scale=value_scale,
        )

    def _evaluate(self, query: Query) -> Generator[Query, Response, _Point]:
        self.passes += 1
        self.points += 1
        shares, slopes, value = yield query._replace(point=self.points)
        unit = self.scale * self.problem.num_rows
        gradient = shares[self.used] / unit - self.prior
        shift = query.shift[self.used]
        mean = int(value[0]) / query.value_scale / self.problem.num_rows
        return _Point(self.points, shift, gradient, slopes[self.used] / unit, mean - float((self.prior * shift).sum()))

    def _error(self, point: _Point) -> float:
        return float(np.abs(point.gradient / self.prior).max())

    def _at(self, query: Query, shift: NDArray[np.float64]) -> Query:
        full = np.zeros(len(self.used))
        full[self.used] = shift
        return query._replace(shift=full)

    def _descend(self, query: Query) -> Generator[Query, Response, tuple[Query, float]]:
        """Steps until the tolerance, or the end of the range that these candidates cover."""
        max_range = query.window.depth - self.tau
        point = yield from self._evaluate(query)
        best = self._error(point), point.shift
        self.damping = self.damping or _DAMPING / min(max_range, _LARGEST_STEP) * min(1.0, best[0])
        while best[0] > self.problem.tolerance and self.passes < self.problem.max_iterations:
            step = yield from self._step(query, point)
            wanted = min(1.0, max_range / 3 / (float(np.ptp(step)) or 1.0))
            length = _longest(point.shift, wanted * step, max_range) * wanted
            if length < wanted / 4:
                break
            point = yield from self._search(query, point, step, length)
            best = min(best, (self._error(point), point.shift), key=lambda pair: pair[0])
        if best[0] <= self.problem.tolerance or self.passes >= self.problem.max_iterations:
            return self._at(query, best[1]), best[0]
        return self._at(query, point.shift), self._error(point)

    def _step(self, query: Query, point: _Point) -> Generator[Query, Response, NDArray[np.float64]]:
        """Conjugate gradients for (H + damping * diag(prior)) step = -gradient, with accuracy adapted to the error."""
        if not query.kept and point.number == 1:  # Sinkhorn's own step: good far from the solution
            return -np.log(np.maximum(point.gradient / self.prior + 1, _MIN_SHARE))
        accuracy = min(0.1, max(1e-3, 10 * self._error(point)))
        diagonal = np.maximum(point.slopes, 0) + self.damping * self.prior
        step, residual = np.zeros_like(self.prior), -point.gradient
        scaled = residual / diagonal
        direction, size = scaled, _dot(residual, scaled)
        first = size
        for _ in range(_MAX_PRODUCTS):
            if size <= accuracy**2 * first or self.passes >= self.problem.max_iterations:
                break
            image = yield from self._product(self._at(query, point.shift)._replace(point=point.number), direction)
            image += self.damping * self.prior * direction
            length = size / _dot(direction, image)
            step = step + length * direction
            residual = residual - length * image
            scaled = residual / diagonal
            size, before = _dot(residual, scaled), size
            direction = scaled + size / before * direction
        return step

    def _product(self, query: Query, vector: NDArray[np.float64]) -> Generator[Query, Response, NDArray[np.float64]]:
        self.passes += 1
        largest = float(np.abs(vector).max()) or 1.0
        full = self._at(query, vector / largest).shift
        (sums,) = yield query._replace(kind="product", vector=full)
        result: NDArray[np.float64] = sums[self.used] / (self.scale * self.problem.num_rows) * largest
        return result

    def _search(
        self, query: Query, point: _Point, step: NDArray[np.float64], length: float
    ) -> Generator[Query, Response, _Point]:
        """Line search along the step, shortened while it overshoots."""
        start_slope, first_length = _dot(point.gradient, step), length
        for _ in range(_BACKTRACKS):
            trial = yield from self._evaluate(self._at(query, point.shift + length * step))
            slope = _dot(trial.gradient, step)
            # Convex: where the slope still falls the value has fallen, and values need not be compared.
            level = trial.value <= point.value + 1e-12 * abs(point.value) + 1e-12
            if (
                slope <= 0
                or trial.value <= point.value + 1e-4 * length * start_slope
                or (level and slope < -start_slope / 10)
            ):
                break
            length *= min(max(start_slope / (start_slope - slope), 0.1), 0.5)
        if length < first_length:
            self.damping *= 4
        elif length >= 1:
            good = abs(slope) < -start_slope / 2
            self.damping = max(self.damping * (0.1 if good else 0.3), _MIN_DAMPING)
        return trial


def _longest(shift: NDArray[np.float64], step: NDArray[np.float64], max_range: float) -> float:
    """The largest factor, to 1%, by which step can be added to shift such that its range stays within max_range."""
    if np.ptp(shift + step) <= max_range:
        return 1.0
    low, high = 0.0, 1.0
    while high - low > 0.01 * high and high > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if np.ptp(shift + middle * step) <= max_range else (low, middle)
    return low


def _dot(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    return float((left * right).sum())
