"""Evaluations declare what they return and read; the runner hands each what it declares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raycluster.data.dataset import open_dataset
from raycluster.data.manifest import DataSettings
from raycluster.data.transforms import View
from raycluster.evaluation import probes
from raycluster.evaluation.base import declared_metrics, label_free_metrics, labelled_metrics, probe, probe_names
from raycluster.evaluation.metrics import agreement, label_free
from raycluster.evaluation.runner import Evaluation, EvaluationSettings
from raycluster.models.smallnet import Model
from raycluster.run.local_workers import LocalWorkers

TOYS = {
    "of_maps": """
from raycluster.evaluation.base import Declaration, Metric
DECLARATION = Declaration((Metric("map_side", "side"), Metric("num_classes", "classes")), "maps", "label_matrix")
def evaluate(train_x, train_y, test_x, test_y):
    assert train_x.ndim == 4 and train_y.shape == (len(train_x), 10) and (test_y.sum(1) == 1).all()
    return {"map_side": float(train_x.shape[2]), "num_classes": float(test_y.shape[1])}
""",
    "of_a_network": """
from raycluster.evaluation.base import Declaration, Metric
DECLARATION = Declaration((Metric("millions", "parameters", higher_is_better=False),), "network")
def evaluate(backbone, data):
    assert data.tests is None and data.train.manifest.num_samples == 1797
    return {"millions": sum(p.numel() for p in backbone.parameters()) / 1e6}
""",
}


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more files in the folder of probes."""
    for name, source in TOYS.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(probes, "__path__", [*probes.__path__, str(tmp_path)])
    declared_metrics.cache_clear()


def test_what_is_declared_is_what_is_returned() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 5)).astype(np.float32), rng.integers(3, size=60)
    for name in probe_names():
        assert set(probe(name).evaluate(x, y, x, y)) == {metric.name for metric in probe(name).DECLARATION.metrics}
    assert set(label_free.evaluate(x, y)) == {metric.name for metric in label_free.DECLARATION.metrics}
    assert set(agreement.evaluate(y, y)) == {metric.name for metric in agreement.DECLARATION.metrics}


def test_headlines_by_what_they_need() -> None:
    assert labelled_metrics() == ["knn_accuracy", "linear_probe_accuracy", "svm_accuracy", "whitened_knn_accuracy"]
    assert label_free_metrics() == ["loss_over_chance", "nmi_previous", "intra_cluster_edges", "effective_rank"]
    assert not declared_metrics()["loss_over_chance"].higher_is_better


def test_one_file_is_an_evaluation(toys: None, tmp_path: Path) -> None:
    settings = EvaluationSettings(probes=("knn", "of_maps", "of_a_network"), max_samples=300, layer="conv1")
    dataset = open_dataset(DataSettings(uri="digits"), str(tmp_path / "manifest.parquet"), LocalWorkers(), 0)
    evaluation = Evaluation(settings, View(size=16), str(tmp_path), LocalWorkers())
    backbone = Model(widths=(4, 8)).build(0)
    found = evaluation.compare({"untrained": backbone}, dataset)["untrained"]
    assert found["map_side"] == 16 and found["num_classes"] == 10
    assert found["millions"] == sum(p.numel() for p in backbone.parameters()) / 1e6
    assert 0 < found["knn_accuracy"] < 1
    assert {"map_side", "millions"} < declared_metrics().keys()
