"""PIC through the whole loop, on real images: the number of clusters is found, and the heads follow."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from raycluster.config import load, parse
from raycluster.events import Finished
from raycluster.features.matrix import LocalFeatures
from raycluster.methods.base import AssignmentContext
from raycluster.methods.pic import Method
from raycluster.run.checkpoint import load_newest
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.types import Assignments, Block, RunStopped, UserError

ROOT = Path(__file__).parents[2]
PIC = """
data: {uri: digits, shard_size: 300}
views: {train: {size: 16, crop_scale: [0.5, 1.0]}, eval: {size: 16}}
model: {name: smallnet, widths: [4, 8, 16]}
method: {name: pic, layer: conv3, descriptor: pooled, pca_dim: 16, num_neighbours: 1, singletons: discard}
training: {epochs: 2, global_batch: 128, microbatch: 32, mode: exact, threads: 1}
evaluation: {max_samples: 600}
run: {dir: unset}
"""


def pic(run_dir: Path, *overrides: str) -> Config:
    return parse(Config, PIC, [f"run.dir={run_dir}", *overrides])


def state(config: Config) -> dict:
    found = load_newest(config.run.dir, torch.device("cpu"))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = pic(tmp_path_factory.mktemp("pic"))
    list(pretrain(config, LocalWorkers()))
    return config


def test_heads_follow_the_clusters_that_were_found(finished: Config) -> None:
    records = [json.loads(line) for line in (Path(finished.run.dir) / "metrics.jsonl").read_text().splitlines()]
    sizes = [record["num_clusters"] for record in records]
    assert len(set(sizes)) == 2 and all(20 < size < 900 for size in sizes)
    assert all(record["singletons"] > 0 and 0 < record["largest_share"] < 0.5 for record in records)
    assert all(record["loss_over_chance"] == pytest.approx(1, abs=0.1) for record in records), "new heads know nothing"
    saved = state(finished)
    assert [size for _, size, _ in saved["assignments"]["label_sets"]] == sizes[-1:]
    assert [shape[0] for name, shape in saved["head_shapes"].items() if name.endswith("weight")] == sizes[-1:]


def test_discarded_singletons_are_excluded_and_not_reported_as_broken(finished: Config) -> None:
    last = json.loads((Path(finished.run.dir) / "metrics.jsonl").read_text().splitlines()[-1])
    labels = pq.read_table(Path(finished.run.dir) / "assignments")["label_0"].to_numpy()
    assert (labels == -1).sum() == last["singletons"] > 0.01 * len(labels), "more than may be broken"
    assert np.bincount(labels[labels >= 0]).min() > 1
    assert last["num_skipped"] == 0


@pytest.mark.parametrize("asked", [9, 22, 40])
def test_stopped_anywhere_and_resumed_equals_undisturbed(finished: Config, tmp_path: Path, asked: int) -> None:
    config, questions = pic(tmp_path, "run.checkpoint_minutes=1e-9"), count()
    with pytest.raises(RunStopped):
        list(pretrain(config, LocalWorkers(stopping=lambda: next(questions) >= asked)))
    list(pretrain(config, LocalWorkers()))
    found, expected = state(config), state(finished)
    assert [r["assignments"] for r in found["records"]] == [r["assignments"] for r in expected["records"]]
    assert all(torch.equal(tensor, expected["network"][name]) for name, tensor in found["network"].items())


def assigned(rows: np.ndarray, num_blocks: int, method: Method) -> Assignments:
    order = np.random.default_rng(num_blocks).permutation(len(rows))
    features = LocalFeatures([Block(part, rows[part]) for part in np.array_split(order, num_blocks)])
    return method.assign(features, AssignmentContext(len(rows) + 3, 0, 1, nn.Identity(), None))


@pytest.mark.parametrize("search", ["exact", "approximate"])
def test_any_blocks_give_bitwise_identical_labels(search: str) -> None:
    rows = np.random.default_rng(0).standard_normal((700, 20)).astype(np.float32)
    method = Method(pca_dim=8, search=search)  # type: ignore[arg-type]
    found = [assigned(rows, num_blocks, method) for num_blocks in (1, 2, 7, 64)]
    assert len({one.labels.tobytes() for one in found}) == 1
    assert (found[0].labels[0, -3:] == -1).all() and (found[0].labels[0, :-3] >= 0).all(), "-1: without features"


def test_a_round_without_clusters_is_refused() -> None:
    rows = np.ones((6, 4), np.float32)
    with pytest.raises(UserError, match=r"all 6 images are clusters of their own.*raise method\.sigma \(seen 0\.2\)"):
        assigned(rows, 1, Method(singletons="discard"))


@pytest.mark.slow
def test_smoke_configuration_improves_on_the_untrained_network(tmp_path: Path) -> None:
    config = load(Config, ROOT / "configs/smoke/pic.yaml", [f"run.dir={tmp_path}"])
    *_, last = pretrain(config, LocalWorkers())
    assert isinstance(last, Finished)
    before, after = (last.report["accuracies"][name] for name in ("untrained", "pre-trained"))
    assert after["knn_accuracy"] > before["knn_accuracy"] + 0.1
    assert after["linear_probe_accuracy"] > before["linear_probe_accuracy"]
