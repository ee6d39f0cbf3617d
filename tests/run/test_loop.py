"""The whole loop without Ray: real images, real files, one process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import raycluster
from raycluster.config import load
from raycluster.events import Finished, Progress, Round
from raycluster.run.checkpoint import list_checkpoints, load_newest
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.run.state import open_run
from raycluster.run.validation import validate_and_initialize
from raycluster.types import RunStopped, UserError

Tiny = Callable[..., Config]


def run(config: Config, workers: LocalWorkers | None = None) -> list[dict]:
    """The records of the rounds that this call finished."""
    return [event.record for event in pretrain(config, workers or LocalWorkers()) if isinstance(event, Round)]


def result(config: Config) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Assignments of all rounds and the final weights of a finished run."""
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    state = load_newest(config.run.dir, torch.device("cpu"))
    assert state is not None
    return [json.loads(line)["assignments"] for line in lines], state["network"]


def assert_same(one: Config, other: Config) -> None:
    (assignments, weights), (others, other_weights) = result(one), result(other)
    assert assignments == others
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())


def stop_after(steps: int) -> LocalWorkers:
    """Workers that are asked to stop once they were asked so many times."""
    asked = iter(range(10**9))
    return LocalWorkers(stopping=lambda: next(asked) >= steps)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Config:
    config = tiny(tmp_path_factory.mktemp("run"))
    run(config)
    return config


def test_judging_every_round_adds_figures_and_changes_nothing(finished: Config, tiny: Tiny, tmp_path: Path) -> None:
    judged = tiny(tmp_path / "1", "evaluation.every_rounds=1")
    first, last = run(judged)
    assert_same(judged, finished)
    report = json.loads((tmp_path / "1" / "report.json").read_text())
    accuracies = report["accuracies"]["pre-trained"]
    assert accuracies == {name: last[name] for name in accuracies} != {name: first[name] for name in accuracies}
    assert -1 <= first["intra_cluster_edges"] <= 1 <= first["effective_rank"] <= 16

    unlabelled = tiny(tmp_path / "2", "evaluation.every_rounds=2", "data.labels=none")
    first, last = run(unlabelled)
    assert "effective_rank" in last and not {"effective_rank", "knn_accuracy"} & first.keys()
    assert "knn_accuracy" not in last


def test_directory_tells_what_happened(finished: Config) -> None:
    folder = Path(finished.run.dir)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [0, 1]
    assert records[0]["loss_over_chance"] == pytest.approx(1, abs=0.3)
    assert 0 < records[1]["nmi_previous"] <= 1 and 0 < records[1]["nmi_labels"] <= 1
    table = pq.read_table(folder / "assignments")
    assert table.column_names == ["sample", "path", "label_0"]
    assert np.array_equal(np.unique(table["label_0"]), np.arange(10))
    assert len(table) == 1797
    assert (folder / "skipped.jsonl").read_text() == ""
    assert set(json.loads((folder / "report.json").read_text())["accuracies"]) == {"untrained", "pre-trained"}


def test_exported_backbone_is_a_plain_module(finished: Config) -> None:
    backbone = raycluster.load_backbone(finished.run.dir)
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        features = backbone(images)
        assert torch.equal(features, backbone(images))
        assert torch.allclose(features, backbone(images / 255), atol=1e-4)
    trained = load_newest(finished.run.dir, torch.device("cpu"))["network"]
    assert torch.equal(backbone.state_dict()["body.conv1.0.weight"], trained["backbone.body.conv1.0.weight"])


@pytest.mark.parametrize("asked", [0, 7, 15], ids=["extracting", "training", "in the second round"])
def test_stopped_anywhere_and_resumed_equals_undisturbed(
    finished: Config, tiny: Tiny, tmp_path: Path, asked: int
) -> None:
    config = tiny(tmp_path)
    with pytest.raises(RunStopped):
        run(config, stop_after(asked))
    run(config)
    assert_same(config, finished)


def test_killed_in_the_middle_and_resumed_equals_undisturbed(finished: Config, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(tmp_path, "run.checkpoint_minutes=1e-9")
    for event in pretrain(config, LocalWorkers()):
        if isinstance(event, Progress) and event.phase == "training" and event.done == 13:
            break  # as if the process had died here
    newest = int(re.findall(r"round-00000-step-(\d+)", list_checkpoints(config.run.dir)[-1])[0])
    resumed = [
        event for event in pretrain(config, LocalWorkers()) if isinstance(event, Progress) and event.phase == "training"
    ]
    assert 1 < resumed[0].done == newest + 1 <= 14, "went on from the newest checkpoint"
    assert_same(config, finished)


def test_damaged_newest_checkpoint_falls_back(
    finished: Config, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny(tmp_path)
    run(config)
    newest = Path(list_checkpoints(config.run.dir)[-1])
    newest.write_bytes(newest.read_bytes()[:-100])
    (tmp_path / "report.json").unlink(missing_ok=True)
    assert [record["round"] for record in run(config)] == [1]
    assert "damaged" in caplog.text
    assert_same(config, finished)


def test_finished_run_is_not_repeated(finished: Config) -> None:
    events = list(pretrain(finished, LocalWorkers()))
    assert len(events) == 1 and isinstance(events[0], Finished)


def test_run_section_does_not_change_results(finished: Config, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(
        tmp_path, "run.checkpoint_minutes=1e-9", "run.keep_checkpoints=1", "run.actors=3", "run.max_failures=1"
    )
    run(config)
    assert len(list_checkpoints(config.run.dir)) == 1
    assert_same(config, finished)


def test_other_settings_in_the_same_directory_are_refused(finished: Config, tiny: Tiny) -> None:
    config = tiny(Path(finished.run.dir), "training.lr=0.01")
    with pytest.raises(UserError, match=r"training\.lr: 0\.05 there, 0\.01 here"):
        run(config)
    with pytest.raises(UserError, match="already holds a run"):
        validate_and_initialize(tiny(Path(finished.run.dir), "run.resume=never"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "method.layer=conv9",
            "method.layer: seen conv9; wanted a layer of smallnet, one of conv1, conv2, conv3, avgpool",
        ),
        ("evaluation.layer=conv4", "did you mean conv3"),
        ("evaluation.test_uri=/nowhere", "there is nothing at /nowhere"),
        ("data.uri=/nowhere", "there is nothing at /nowhere"),
        ("method.num_clusters=5000", "5000 clusters, but digits holds 1797 images"),
    ],
)
def test_errors_are_told_before_any_work_and_can_be_mended(
    tiny: Tiny, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        validate_and_initialize(tiny(tmp_path, override))
    validate_and_initialize(tiny(tmp_path))
    assert load(Config, tmp_path / "config.yaml") == tiny(tmp_path)


def test_probes_are_checked_with_the_other_settings(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation: probes: seen agreement; wanted some of knn, linear_probe"):
        tiny(tmp_path, "evaluation.probes=[knn, agreement]")


def test_test_images_without_labels_are_refused_early(tiny: Tiny, tmp_path: Path, digits_folder: Path) -> None:
    with pytest.raises(UserError, match="has no labels to evaluate against"):
        validate_and_initialize(tiny(tmp_path / "run", f"evaluation.test_uri={digits_folder}"))


def test_what_never_reached_a_checkpoint_is_begun_anew(tiny: Tiny, tmp_path: Path, digits_folder: Path) -> None:
    validate_and_initialize(tiny(tmp_path / "run", f"data.uri={digits_folder}"))
    (digits_folder / "000.png").unlink()
    config = tiny(tmp_path / "run", f"data.uri={digits_folder}", "training.lr=0.01")
    validate_and_initialize(config)
    assert open_run(config, LocalWorkers()).dataset.manifest.num_samples == 299


def test_more_clusters_than_images_is_refused_early(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"5000 clusters.*1797 images"):
        next(pretrain(tiny(tmp_path, "method.num_clusters=5000"), LocalWorkers()))


def test_drawing_all_images_changes_nothing(finished: Config, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(tmp_path, "training.images_per_round=1797")
    run(config)
    assert_same(config, finished)


SUBSETS = ["training.images_per_round=600"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.num_clusters=10"],
        pytest.param(
            ["method={name: sela, num_clusters: 10, num_heads: 2, schedule: epochs, reassign: one, features: online}"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["method={name: rotnet}"], marks=pytest.mark.slow),
    ],
    ids=["deepcluster", "sela", "rotnet"],
)
def test_each_round_draws_other_images_and_resumes(tiny: Tiny, tmp_path: Path, overrides: list[str]) -> None:
    config = tiny(tmp_path / "1", *SUBSETS, *overrides)
    opened, seen = open_run(config, LocalWorkers()), []
    assert opened.steps_per_epoch == -(-600 // config.training.global_batch)
    for event in pretrain(config, LocalWorkers()):
        if isinstance(event, Round):
            seen.append(opened.draw(event.record["round"]))
            assert event.record["num_skipped"] == 0, "images that are not drawn are not skipped"
    assert [drawn.sum() for drawn in seen] == [600, 600]
    assert 100 < (seen[0] & seen[1]).sum() < 300
    if (tmp_path / "1" / "assignments").exists():
        table = pq.read_table(tmp_path / "1" / "assignments")
        assert np.array_equal(table["drawn"].to_numpy(), seen[1])
        assert (table["label_0"].to_numpy()[seen[1]] >= 0).all()
    for number, asked in enumerate([0, 7, 9]):
        again = tiny(tmp_path / f"stopped{number}", *SUBSETS, *overrides)
        with pytest.raises(RunStopped):
            run(again, stop_after(asked))
        run(again)
        assert_same(again, config)


def test_drawing_more_images_than_there_are_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"images_per_round: seen 1798; wanted at most the 1797 images"):
        validate_and_initialize(tiny(tmp_path / "1", "training.images_per_round=1798"))
    with pytest.raises(UserError, match=r"10 clusters, but a round draws training.images_per_round = 9 images"):
        validate_and_initialize(tiny(tmp_path / "2", "training.images_per_round=9"))


def test_broken_images_are_named_and_skipped(tiny: Tiny, tmp_path: Path, digits_folder: Path) -> None:
    (digits_folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (digits_folder / "empty.png").write_bytes(b"")
    options = [f"data.uri={digits_folder}", "data.shard_size=100", "data.max_broken_fraction=0.02", "training.epochs=1"]
    config = tiny(tmp_path / "run", *options)
    run(config)
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(Path(line["path"]).name for line in skipped) == ["broken.png", "empty.png"]
    labels = pq.read_table(tmp_path / "run" / "assignments")
    assert (labels["label_0"].to_numpy() == -1).sum() == 2
    with pytest.raises(UserError, match=r"2 of 302 images could not be read"):
        run(tiny(tmp_path / "strict", *options, "data.max_broken_fraction=0.001"))


@pytest.mark.parametrize(
    "overrides",
    [["method.sampling=weighted"], ["method.start=previous"], ["method.descriptor=flat", "method.layer=conv2"]],
)
def test_variants_run(tiny: Tiny, tmp_path: Path, overrides: list[str]) -> None:
    records = run(tiny(tmp_path, *overrides))
    assert len(records) == 2 and all(np.isfinite(record["loss"]) for record in records)


def test_config_of_a_run_loads_again(finished: Config) -> None:
    assert load(Config, Path(finished.run.dir) / "config.yaml") == finished
