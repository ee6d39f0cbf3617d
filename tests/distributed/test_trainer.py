"""Ray Train: any number of workers gives the bitwise identical result of one process without Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raycluster.distributed.train.trainer import fit
from raycluster.run.checkpoint import load_newest
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.types import UserError

pytestmark = pytest.mark.ray

Tiny = Callable[..., Config]


def state(config: Config) -> dict:
    found = load_newest(config.run.dir, torch.device("cpu"))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> dict:
    config = tiny(tmp_path_factory.mktemp("local"))
    list(pretrain(config, LocalWorkers()))
    return state(config)


def assert_same(one: dict, other: dict) -> None:
    records, others = ([record["assignments"] for record in found["records"]] for found in (one, other))
    assert records == others
    assert all(torch.equal(tensor, other["network"][name]) for name, tensor in one["network"].items())


@pytest.mark.parametrize("workers", ["0", pytest.param("{min: 1, max: 3}", marks=pytest.mark.slow)])
def test_bitwise_identical_for_any_number_of_workers(
    ray_cluster: None, undisturbed: dict, tiny: Tiny, tmp_path: Path, workers: str
) -> None:
    config = tiny(tmp_path, f"run.workers={workers}", "run.actors=2")
    text = fit(config)
    assert "pre-trained" in text and str(tmp_path) in text
    assert_same(state(config), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    "overrides",
    [
        ["method={name: deepercluster, num_super_clusters: 2, num_clusters: 20}"],
        ["method={name: pic, pca_dim: 8}"],
        ["method={name: pic, pca_dim: 8, search: approximate, singletons: discard}"],
        ["method.num_clusters=100", "training.partial_softmax=40"],
    ],
    ids=["deepercluster", "pic", "pic, approximate", "partial softmax"],
)
def test_every_method_is_bitwise_identical(
    ray_cluster: None, tiny: Tiny, tmp_path: Path, overrides: list[str], workers: int
) -> None:
    alone, together = (tiny(tmp_path / name, *overrides) for name in ("alone", "together"))
    list(pretrain(alone, LocalWorkers()))
    fit(replace(together, run=replace(together.run, workers=workers, actors=2)))
    assert_same(state(together), state(alone))


@pytest.mark.slow
def test_fast_mode_agrees_closely(ray_cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    options = ["training.mode=fast", "training.epochs=1"]
    alone, together = tiny(tmp_path / "1", *options), tiny(tmp_path / "2", *options, "run.workers=2")
    list(pretrain(alone, LocalWorkers()))
    fit(together)
    one, two = state(alone)["network"], state(together)["network"]
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=1e-4, rtol=1e-4), name


def test_more_workers_than_microbatches_are_refused(ray_cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds only 4 microbatches"):
        fit(tiny(tmp_path, "run.workers=9"))


def test_user_errors_in_workers_are_raised_unchanged(ray_cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="5000 clusters"):
        fit(tiny(tmp_path, "method.num_clusters=5000", "run.workers=1"))
