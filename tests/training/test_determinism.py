from __future__ import annotations

from typing import Any

import pytest
import torch

from raycluster.models.heads import Heads
from raycluster.models.smallnet import Model
from raycluster.training.determinism import reproducible
from raycluster.training.optimiser import Optimisers
from raycluster.training.step import Network, Step
from tests.training.partition import microbatches, settings


def _flags() -> dict[str, Any]:
    return {
        "convolutions": torch.backends.cudnn.allow_tf32,
        "products": torch.backends.cuda.matmul.allow_tf32,
        "product_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "benchmark": torch.backends.cudnn.benchmark,
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_float32_is_float32_unless_tf32_is_requested(before: bool, tf32: bool) -> None:
    with reproducible(1, exact=False, tf32=before):
        outside = _flags()
        with reproducible(1, exact=False, tf32=tf32):
            inside = _flags()
        assert _flags() == outside
    assert (outside["convolutions"], outside["products"]) == (before, before)
    assert (inside["convolutions"], inside["products"]) == (tf32, tf32)


def test_exact_requires_deterministic_kernels_and_everything_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    outside = _flags()
    with pytest.raises(RuntimeError, match="inside"), reproducible(1, exact=True):
        inside = _flags()
        raise RuntimeError("inside")
    assert (inside["deterministic"], inside["fill"], inside["benchmark"], inside["threads"]) == (True, False, False, 1)
    assert _flags() == outside


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_a_step_computes_in_the_precision_of_the_settings(mode: str, precision: str, tf32: bool) -> None:
    chosen = settings(mode, precision=precision)
    backbone = Model(widths=(4, 8)).build(0)
    network = Network(backbone, Heads(8, (7, 5), 0))
    seen: list[tuple[bool, bool]] = []
    network.register_forward_hook(
        lambda *_: seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
    )
    outside = _flags()
    Step(network, Optimisers(backbone, network.heads, chosen), chosen)(microbatches(0), epoch=0)
    assert set(seen) == {(tf32, tf32)}
    assert _flags() == outside
