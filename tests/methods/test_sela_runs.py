"""SeLa and label transfer through the whole loop, on real images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from raycluster.config import load, parse
from raycluster.events import Finished, Round
from raycluster.features.extraction import Progress
from raycluster.run.checkpoint import load_newest
from raycluster.run.config import Config
from raycluster.run.label_transfer import transfer_config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.run.validation import validate_and_initialize
from raycluster.types import RunStopped, UserError

ROOT = Path(__file__).parents[2]
SELA = """
data: {uri: digits, shard_size: 300}
views: {train: {size: 16, crop_scale: [0.5, 1.0]}, eval: {size: 16}}
model: {name: smallnet, widths: [4, 8, 16]}
method: {name: sela, num_heads: 2, num_clusters: [10, 20], schedule: steps, every: 11}
training: {epochs: 2, global_batch: 128, microbatch: 32, mode: exact, threads: 1}
evaluation: {max_samples: 600}
run: {dir: unset}
"""


def sela(run_dir: Path, *overrides: str) -> Config:
    return parse(Config, SELA, [f"run.dir={run_dir}", *overrides])


def run(config: Config, workers: LocalWorkers | None = None) -> list[dict]:
    return [event.record for event in pretrain(config, workers or LocalWorkers()) if isinstance(event, Round)]


def stop_after(steps: int) -> LocalWorkers:
    asked = iter(range(10**9))
    return LocalWorkers(stopping=lambda: next(asked) >= steps)


def assert_same(one: Config, other: Config) -> None:
    found, others = (load_newest(config.run.dir, torch.device("cpu")) for config in (one, other))
    assert found is not None and others is not None
    assert [r["assignments"] for r in found["records"]] == [r["assignments"] for r in others["records"]]
    assert all(torch.equal(tensor, others["network"][name]) for name, tensor in found["network"].items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = sela(tmp_path_factory.mktemp("sela"))
    run(config)
    return config


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = sela(tmp_path_factory.mktemp("online"), "method.features=online")
    run(config)
    return config


def test_labels_are_assigned_anew_inside_epochs(finished: Config) -> None:
    folder = Path(finished.run.dir)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [11, 22, 30]
    assert records[0]["loss_over_chance"] == pytest.approx(1, abs=0.1)
    for record in records:
        assert record["heads_converged"] == 1 and record["marginal_error"] <= 0.01
        assert 0 < record["nmi_labels"] < 1 and record["size_entropy"] > 0.8
    table = pq.read_table(folder / "assignments")
    assert table.column_names == ["sample", "path", "label_0", "label_1"]
    assert [len(np.unique(table[name])) for name in ("label_0", "label_1")] == [10, 20]


def test_random_labels_stay_for_the_whole_run(tmp_path: Path) -> None:
    records = run(sela(tmp_path, "method.schedule=quadratic", "method.every=null", "method.num_reassignments=0"))
    assert [record["step"] for record in records] == [15, 30] and len({r["assignments"] for r in records}) == 1
    assert records[1]["changed_share"] == 0 and records[1]["size_entropy"] == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_labels_in_training_mode_resume_bitwise(tmp_path: Path) -> None:
    words = ["method.view=train", "method.network_mode=train", "run.checkpoint_minutes=1e-9"]
    expected = sela(tmp_path / "whole", *words)
    run(expected)
    config = sela(tmp_path / "stopped", *words)
    with pytest.raises(RunStopped):
        run(config, stop_after(15))
    run(config)
    assert_same(config, expected)


@pytest.mark.parametrize(
    "asked", [pytest.param(8, marks=pytest.mark.slow), 15, pytest.param(24, marks=pytest.mark.slow)]
)
def test_stopped_anywhere_and_resumed_equals_undisturbed(finished: Config, tmp_path: Path, asked: int) -> None:
    config = sela(tmp_path, "run.checkpoint_minutes=1e-9")
    with pytest.raises(RunStopped):
        run(config, stop_after(asked))
    run(config)
    assert_same(config, finished)


def test_online_features_survive_being_killed(online: Config, tmp_path: Path) -> None:
    config = sela(tmp_path, "method.features=online", "run.checkpoint_minutes=1e-9")
    for at in ((0, 10), (1, 9)):
        rounds = 0
        for event in pretrain(config, LocalWorkers()):
            rounds += isinstance(event, Round)
            if isinstance(event, Progress) and event.phase == "training" and (rounds, event.done) == (at[0], at[1]):
                break  # as if the process had died here, after the checkpoint at step 8
    run(config)
    assert_same(config, online)


def test_only_images_not_visited_yet_are_extracted(tmp_path: Path) -> None:
    """An epoch has 15 steps, so all are visited before the third reassignment, at step 22."""
    config = sela(tmp_path, "method.features=online", "training.epochs=5", "run.keep_checkpoints=1")
    extracted: list[set[int]] = []
    totals: set[int] = set()
    for event in pretrain(config, LocalWorkers()):
        if isinstance(event, Progress) and event.phase == "extracting" and len(extracted) < 7:
            totals.add(event.total)
        elif isinstance(event, Progress) and event.phase == "clustering":
            extracted.append(totals)
            totals = set()
    assert extracted[0] == {1797} and 0 < max(extracted[1]) < 1797
    assert extracted[2:] == [set()] * 5
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "online-features").iterdir())
    assert steps == [44, 55, 66, 75], "what the kept checkpoint may need: two epochs"


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.view=train", "method.views_averaged=2"],
        pytest.param(
            ["method.reassign=one", "method.warm_start=true", "method.rounding=exact"], marks=pytest.mark.slow
        ),
        ["training.rotation=true", "method.features=online", "views.train.equalize=0.2", "views.train.sharpness=0.5"],
        ["method.view=train", "method.network_mode=train"],
        ["method.labels=kmeans"],
    ],
)
def test_variants_run(tmp_path: Path, overrides: list[str]) -> None:
    records = run(sela(tmp_path, *overrides))
    assert len(records) == 3 and all(np.isfinite(record["loss"]) for record in records)
    assert records[0]["loss_over_chance"] == pytest.approx(1, abs=0.1)


def test_views_that_are_always_the_same_cannot_be_averaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"averages 2 views .* views\.eval is always the same"):
        validate_and_initialize(sela(tmp_path, "method.views_averaged=2"))


@pytest.mark.slow
def test_smoke_configuration_improves_on_the_untrained_network(tmp_path: Path) -> None:
    config = load(Config, ROOT / "configs/smoke/sela.yaml", [f"run.dir={tmp_path}"])
    *_, last = pretrain(config, LocalWorkers())
    assert isinstance(last, Finished)
    before, after = (last.report["accuracies"][name] for name in ("untrained", "pre-trained"))
    assert after["knn_accuracy"] > before["knn_accuracy"] + 0.1
    assert after["linear_probe_accuracy"] > before["linear_probe_accuracy"]


def test_labels_train_another_network(finished: Config, tmp_path: Path) -> None:
    words = [f"labels={finished.run.dir}", "model={name: smallnet, widths: [4, 12]}", "training.rotation=true"]
    config = transfer_config([*words, f"run.dir={tmp_path}"])
    assert config.method.requested_clusters() == (10, 20) and config.views == finished.views
    records = run(config)
    assert len(records) == 2 and records[1]["nmi_previous"] == 1
    assert records[1]["loss_over_chance"] < records[0]["loss_over_chance"] < 1
    theirs, ours = (pq.read_table(Path(one.run.dir) / "assignments") for one in (finished, config))
    assert ours.equals(theirs)


def test_transfer_is_refused_where_labels_are_missing_or_of_other_images(
    finished: Config, tmp_path: Path, digits_folder: Path
) -> None:
    with pytest.raises(UserError, match="labels: seen nothing; wanted labels=RUN"):
        transfer_config(["model=resnet18"])
    with pytest.raises(UserError, match=r"labels: seen .*nowhere"):
        transfer_config(["labels=nowhere"])
    with pytest.raises(UserError, match="did you mean resnet18"):
        transfer_config([f"labels={finished.run.dir}", "model=resnet19"])
    with pytest.raises(UserError, match=r"holds 300 images, but .* belongs to 1797 others"):
        transfer_config([f"labels={finished.run.dir}", f"data.uri={digits_folder}", f"run.dir={tmp_path}"])


@pytest.mark.slow
@pytest.mark.ray
def test_workers_end_bitwise_identical_to_one_process(ray_cluster: None, online: Config, tmp_path: Path) -> None:
    from raycluster.distributed.train.trainer import fit

    config = sela(tmp_path, "method.features=online", "run.workers=2", "run.actors=2")
    fit(config)
    assert_same(config, online)
