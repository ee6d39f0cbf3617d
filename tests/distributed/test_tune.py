"""Sweeps on a cluster: trials equal ordinary runs, whatever they share, and a killed sweep resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raycluster.config import dump, load, parse
from raycluster.data.dataset import ImageDataset, open_dataset
from raycluster.data.transforms import View
from raycluster.features.extraction import FeatureSpec, extract
from raycluster.run.checkpoint import load_newest
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.run.network import fresh_network
from raycluster.sweep.config import SweepConfig
from raycluster.types import UserError

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent.parent
PATIENCE_SECONDS = 300
SEARCH = "{method.num_clusters: [10, 20, 40], method.pca_dim: [4, 8]}"
HALVING = ["sweep.early_stopping=asha", "sweep.grace_epochs=1", "sweep.reduction=2", "training.epochs=4"]
Make = Callable[..., SweepConfig]


@pytest.fixture(scope="module")
def make(tiny_yaml: str) -> Make:
    """make(run_dir, "key=value", ...): the tiny run as a sweep of six trials, of which four run at a time."""

    def made(run_dir: Path, *overrides: str) -> SweepConfig:
        words = [f"run.dir={run_dir}", f"search={SEARCH}", "run.workers=0"]
        return parse(SweepConfig, tiny_yaml, [*words, *HALVING, *overrides])

    return made


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from raycluster.distributed.tune import tune

    folder = tmp_path_factory.mktemp("undisturbed")
    text = tune(make(folder))
    assert "best.yaml" in text and "sweep.html" in text
    return folder


def table(folder: Path) -> dict[str, Any]:
    """sweep.json, without what the speed of the machine decides."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(one) for key, one in value.items() if "second" not in key}
        return [cleaned(one) for one in value] if isinstance(value, list) else value

    found: dict[str, Any] = cleaned(json.loads((folder / "sweep.json").read_text()))
    return found


def results(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if "second" not in key} for record in records]


@pytest.mark.slow
def test_some_trials_end_and_some_are_stopped(undisturbed: Path) -> None:
    found = table(undisturbed)
    statuses = {trial["status"] for trial in found["trials"]}
    assert len(found["trials"]) == 6 and statuses == {"finished", "stopped"}
    assert all(trial["last_round"]["epoch"] == 4 for trial in found["trials"] if trial["status"] == "finished")
    assert found["objective"] == "knn_accuracy" and found["best"] is not None


@pytest.mark.slow
def test_every_trial_equals_the_run_of_its_configuration(undisturbed: Path, tmp_path: Path) -> None:
    """Images and first features of the last trial come from earlier trials, which must not change its results."""
    name = [trial["name"] for trial in table(undisturbed)["trials"] if trial["status"] == "finished"][-1]
    run = undisturbed / "trials" / name
    alone = load(Config, run / "config.yaml", [f"run.dir={tmp_path}"])
    list(pretrain(alone, LocalWorkers()))
    assert results(run) == results(tmp_path)
    one, two = (load_newest(str(folder), torch.device("cpu")) for folder in (run, tmp_path))
    assert one is not None and two is not None
    assert all(torch.equal(tensor, two["network"][key]) for key, tensor in one["network"].items())
    assert json.loads((run / "report.json").read_text())["accuracies"]
    assert (run / "backbone.safetensors").exists() and list((run / "tensorboard").iterdir())


@pytest.mark.slow
def test_the_best_is_linked_and_ready_to_run(undisturbed: Path) -> None:
    best = table(undisturbed)["best"]
    assert (undisturbed / "best").resolve() == undisturbed / "trials" / f"{best:03d}"
    config = load(Config, undisturbed / "best.yaml")
    assert config.run.dir == str(undisturbed / "best-again")
    again, there = (yaml.safe_load(text) for text in (dump(config), (undisturbed / "best/config.yaml").read_text()))
    assert {**again, "run": None} == {**there, "run": None}


@pytest.mark.slow
def test_killed_and_run_again_equals_undisturbed(
    ray_cluster: None, make: Make, undisturbed: Path, tmp_path: Path
) -> None:
    import ray

    from raycluster.distributed.tune import tune

    config = tmp_path / "sweep.yaml"
    config.write_text(dump(make(tmp_path / "sweep")))
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
    job = subprocess.Popen(
        [sys.executable, "jobs/tune.py", str(config)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    trials = tmp_path / "sweep" / "trials"
    until = time.monotonic() + PATIENCE_SECONDS
    while not (finished := list(trials.glob("*/report.json"))):
        assert job.poll() is None and time.monotonic() < until, job.communicate()[0]
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.communicate(timeout=PATIENCE_SECONDS)
    before = {path: (path.stat().st_mtime_ns, (path.parent / "metrics.jsonl").stat().st_mtime_ns) for path in finished}
    assert len(before) < 6

    tune(make(tmp_path / "sweep"))
    assert before == {
        path: (path.stat().st_mtime_ns, (path.parent / "metrics.jsonl").stat().st_mtime_ns) for path in finished
    }
    assert table(tmp_path / "sweep") == table(undisturbed)


def test_first_features_and_images_are_computed_once(ray_cluster: None, make: Make, tmp_path: Path) -> None:
    import ray

    from raycluster.distributed.features.trial_cache import SharedImages, SharingWorkers, start_feature_cache

    config = make(tmp_path)
    uri = str(tmp_path / "manifest.parquet")
    all_images = open_dataset(config.data, uri, LocalWorkers(), 0)
    backbone = fresh_network(config, torch.device("cpu")).backbone  # type: ignore[arg-type]
    feature_cache, shared = start_feature_cache(), SharedImages()
    shared.add(uri, config.data, 16)

    def features(workers: LocalWorkers, version: str, images: ImageDataset = all_images) -> Any:
        shards = range(len(images.manifest.shards))
        feature_spec = FeatureSpec(View(size=16), "conv3", "pooled")
        list(extract(backbone, images, workers, feature_spec=feature_spec, version=version, shards=shards))
        return workers.features(version).rows(samples)

    samples = torch.arange(1797).numpy()
    decoded = shared(uri, samples)
    assert decoded is not None and len(list(decoded)) == 1797  # all tasks have read their images
    expected = features(LocalWorkers(), "first")
    (tmp_path / "manifest.parquet").rename(tmp_path / "away.parquet")  # from here on nothing can be read
    with pytest.raises(UserError, match="no manifest"):
        features(LocalWorkers(), "first")
    assert (features(SharingWorkers(shared, feature_cache, "a", begins=True), "first") == expected).all()
    ray.get(feature_cache.find.remote("a first"))
    nothing = SharedImages()
    assert (features(SharingWorkers(nothing, feature_cache, "a", begins=True), "first") == expected).all()
    for key, version, begins in (("b", "first", True), ("a", "second", True), ("a", "first", False)):
        with pytest.raises(UserError, match="no manifest"):
            features(SharingWorkers(nothing, feature_cache, key, begins=begins), version)


def test_infeasible_sweeps_are_refused_at_once(ray_cluster: None, make: Make, tmp_path: Path) -> None:
    from raycluster.distributed.tune import tune

    with pytest.raises(UserError, match="wanted a fixed number in a sweep"):
        tune(make(tmp_path, "run.workers={min: 1, max: 2}"))
    with pytest.raises(UserError, match="but the cluster has 3 train_slot"):
        tune(make(tmp_path, "run.workers=4"))
    assert not (tmp_path / "trials").exists()


@pytest.mark.slow
def test_an_objective_that_no_trial_reports_is_refused(ray_cluster: None, make: Make, tmp_path: Path) -> None:
    from raycluster.distributed.tune import tune

    with pytest.raises(UserError, match=r"seen acuracy; wanted a number of metrics.jsonl, here .*knn_accuracy"):
        tune(make(tmp_path / "objective", "sweep.objective=acuracy"))


@pytest.mark.slow
def test_a_trial_that_diverges_does_not_end_the_sweep(ray_cluster: None, make: Make, tmp_path: Path) -> None:
    from raycluster.distributed.tune import tune

    search = ["search={training.lr: [1.0e6, 0.05]}", "sweep.early_stopping=none", "sweep.grace_epochs=null"]
    text = tune(make(tmp_path, *search, "sweep.reduction=null", "training.epochs=1"))
    assert [trial["status"] for trial in table(tmp_path)["trials"]] == ["failed", "finished"]
    assert "training diverged" in table(tmp_path)["trials"][0]["reason"] and "best.yaml" in text
