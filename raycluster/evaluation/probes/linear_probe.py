"""Multinomial logistic regression on frozen features: how much of the classes a linear map can read."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn.functional import cross_entropy

from raycluster.evaluation.base import Declaration, Metric
from raycluster.features.matrix import check_labelled, device

DECLARATION = Declaration(
    metrics=(
        Metric("linear_probe_accuracy", "linear probe", percent=True),
        Metric("linear_probe_train_accuracy", "linear probe train", percent=True, headline=False),
    )
)


def evaluate(
    train_x: NDArray[np.floating],
    train_y: ArrayLike,
    test_x: NDArray[np.floating],
    test_y: ArrayLike,
    *,
    weight_penalty: float = 1e-3,
    iterations: int = 200,
) -> dict[str, float]:
    """Share of rows classified right, as `linear_probe_accuracy` (test) and `linear_probe_train_accuracy`.

    train_x: (N, D), test_x: (M, D), float32 or float16. train_y: (N,), test_y: (M,) classes >= 0. Columns are
    standardised by the training rows. Minimises mean cross-entropy + weight_penalty / 2 |W|^2 in at most `iterations`
    steps of L-BFGS, on a GPU if there is one; scikit-learn's C is 1 / (N weight_penalty).
    Raises UserError on shapes that do not fit, values that are not finite and missing labels.
    """
    known, wanted = check_labelled(train_x, train_y), check_labelled(test_x, test_y)
    mean = train_x.mean(axis=0, dtype=np.float64)
    deviation = train_x.std(axis=0, dtype=np.float64)
    deviation = np.where(deviation > 1e-6 * np.abs(mean), deviation, 1.0)  # a constant column stays one
    train = _standardised(train_x, mean, deviation)
    classes = torch.from_numpy(known).to(device())
    weight, bias = _fit(train, classes, weight_penalty, iterations)
    return {
        "linear_probe_accuracy": _accuracy(_standardised(test_x, mean, deviation), wanted, weight, bias),
        "linear_probe_train_accuracy": _accuracy(train, known, weight, bias),
    }


def _standardised(
    values: NDArray[np.floating], mean: NDArray[np.float64], deviation: NDArray[np.float64]
) -> torch.Tensor:
    return torch.from_numpy(((values - mean) / deviation).astype(np.float32)).to(device())


def _fit(
    rows: torch.Tensor, classes: torch.Tensor, weight_penalty: float, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (D, C) and bias (C,) of least penalised loss; convex, so zeros are as good a start as any."""
    num_classes = int(classes.max()) + 1
    weight = torch.zeros(rows.shape[1], num_classes, device=rows.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=rows.device, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=20, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = cross_entropy(rows @ weight + bias, classes) + weight_penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return weight.detach(), bias.detach()


def _accuracy(rows: torch.Tensor, wanted: NDArray[np.int64], weight: torch.Tensor, bias: torch.Tensor) -> float:
    return float(((rows @ weight + bias).argmax(dim=1).cpu().numpy() == wanted).mean())
