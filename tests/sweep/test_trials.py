"""Trials are runs of their own, and invalid search spaces are refused before any trial starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from raycluster.config import parse
from raycluster.run.config import Config
from raycluster.sweep.config import SweepConfig
from raycluster.sweep.open import open_sweep
from raycluster.sweep.trials import check_space, make_trial, ready_to_run
from raycluster.types import UserError

ROOT = Path(__file__).parent.parent.parent
TinySweep = Callable[..., SweepConfig]


def config_errors(sweep: SweepConfig) -> str:
    with pytest.raises(UserError) as caught:
        open_sweep(sweep)
    assert not (Path(sweep.run.dir) / "trials").exists()
    return str(caught.value)


def test_a_trial_is_the_run_with_the_searched_keys_changed(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    sweep = tiny_sweep(tmp_path, "{method.num_clusters: [10, 20], views.train.crop_scale: [[0.2, 1], [0.8, 1]]}")
    trial = make_trial(sweep, 7, {"method.num_clusters": 20, "views.train.crop_scale": [0.8, 1]}, 5)
    assert trial.run_dir == f"{tmp_path}/trials/007" and trial.name == "007"
    config = trial.config
    assert (config.method.num_clusters, config.views.train.crop_scale, config.seed) == (20, (0.8, 1.0), 5)
    assert config.evaluation.every_rounds == 1
    assert (config.method.pca_dim, config.data, config.training) == (8, sweep.data, sweep.training)
    again = parse(Config, ready_to_run(trial, "elsewhere", "# head\n"))
    assert again.run.dir == "elsewhere" and again.method == config.method


def test_whole_sections_can_be_searched(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    sections = "[{name: deepcluster, num_clusters: 10}, {name: deepcluster, num_clusters: 20, pca_dim: 4}]"
    _, combinations = check_space(tiny_sweep(tmp_path, f"{{method: {sections}}}"))
    assert [values["method"]["num_clusters"] for values in combinations] == [10, 20]


def test_bad_spaces_are_refused_all_at_once(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    text = config_errors(
        tiny_sweep(
            tmp_path,
            "{method.num_heads: [1, 4], metod.pca_dim: [1, 2], method.pca_dim: [8, 0, -1], run.workers: [0, 1],"
            " evaluation.layer: [conv1, conv2], seed: [1, 2], method.engine: [torch, int8], training.lr: [high, 0.1]}",
        )
    )
    for expected in (
        "method.num_heads: seen 1; wanted one of the settings",
        "metod: ",
        "did you mean method?",
        "method.pca_dim: seen 0; wanted greater than or equal to 1",
        "method.pca_dim: seen -1",
        "search.run.workers: nothing in `run` changes a result",
        "search.evaluation.layer: it changes how trials are evaluated",
        "search.seed: set sweep.seeds",
        "search.method.engine: all engines give the same",
        "training.lr: seen high; wanted a number",
    ):
        assert expected in text, text


def test_values_that_cannot_be_together_are_refused(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    search = "{training.global_batch: [128, 192], training.microbatch: [32, 64, 128]}"
    assert "global_batch 192 is not a multiple of microbatch 128" in config_errors(tiny_sweep(tmp_path, search))


def test_values_of_the_same_effect_are_refused(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    text = config_errors(tiny_sweep(tmp_path, "{method.reassign_every_epochs: [1, 2, 10]}"))  # of 2 epochs
    assert "search.method.reassign_every_epochs: 2 and 10 have the same effect; remove one" in text


def test_values_that_the_data_or_the_network_cannot_serve_are_refused(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    text = config_errors(tiny_sweep(tmp_path, "{method.num_clusters: [10, 5000], method.layer: [conv3, conv9]}"))
    assert "5000 clusters, but digits holds 1797 images" in text and "method.layer: seen conv9" in text


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sweep.strategy=random", "strategy random needs trials"),
        ("sweep.trials=3", "trials has no effect with strategy grid"),
        ("sweep.batch=3", "batch has no effect with strategy grid"),
        ("sweep.reduction=3", "no effect without early_stopping"),
    ],
)
def test_settings_without_effect_are_refused(tiny_sweep: TinySweep, tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_sweep(tmp_path, "{method.num_clusters: [10, 20]}", override)


def test_a_directory_belongs_to_one_sweep(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    open_sweep(tiny_sweep(tmp_path, "{method.num_clusters: [10, 20]}"))
    open_sweep(tiny_sweep(tmp_path, "{method.num_clusters: [10, 20]}", "run.keep_checkpoints=1"))
    assert "holds a sweep with other settings" in config_errors(tiny_sweep(tmp_path, "{method.num_clusters: [10, 30]}"))
    never = tiny_sweep(tmp_path, "{method.num_clusters: [10, 20]}", "run.resume=never")
    assert "already holds a sweep" in config_errors(never)


def test_without_labels_the_objective_needs_none(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    search = "{method.num_clusters: [10, 20]}"
    assert open_sweep(tiny_sweep(tmp_path / "1", search)).objective == "knn_accuracy"
    assert open_sweep(tiny_sweep(tmp_path / "2", search, "data.labels=none")).objective == "effective_rank"
    assert open_sweep(tiny_sweep(tmp_path / "3", search, "sweep.objective=loss")).objective == "loss"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "search").glob("*.yaml")), ids=lambda path: path.name)
def test_the_searches_that_come_with_raycluster(path: Path) -> None:
    text = path.read_text()
    config = parse(SweepConfig, text, source=path.name)
    _, combinations = check_space(config)
    number = len(combinations) or config.sweep.trials  # a Bayesian search has no list of them
    head = " ".join(line for line in text.splitlines() if line.startswith("#"))
    for word in (
        "Expected",
        "Hardware",
        f"{number} trials",
        f"python jobs/tune.py configs/search/{path.name}",
    ):
        assert word in head, f"the first lines of {path.name} should state {word}"
    assert yaml.safe_load(text)["search"]
