"""Runs that start from the weights of another run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import raycluster
from raycluster.events import Progress, Round
from raycluster.run.checkpoint import load_newest
from raycluster.run.config import Config
from raycluster.run.directory import read_config_text
from raycluster.run.label_transfer import transfer_config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.run.network import fresh_network
from raycluster.run.state import open_run, restore
from raycluster.run.validation import validate_and_initialize
from raycluster.types import UserError

Tiny = Callable[..., Config]
SHORT = ("training.epochs=1", "data.labels=none")


def run(config: Config) -> list[dict]:
    return [event.record for event in pretrain(config, LocalWorkers()) if isinstance(event, Round)]


def report_of(config: Config) -> dict:
    return json.loads((Path(config.run.dir) / "report.json").read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Config:
    config = tiny(tmp_path_factory.mktemp("first"), "seed=5", "training.epochs=1")
    run(config)
    return config


@pytest.fixture
def plain_file(first: Config, tmp_path: Path) -> Path:
    """The exported weights of the first run as a file of their own, with a head besides."""
    exported = safetensors.torch.load_file(Path(first.run.dir) / "backbone.safetensors")
    safetensors.torch.save_file(exported | {"fc.weight": torch.zeros(10, 16)}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_a_run_starts_from_the_weights_and_reports_random_ones_as_untrained(
    first: Config, tiny: Tiny, tmp_path: Path, plain_file: Path
) -> None:
    config = tiny(tmp_path / "run", f"model.weights={first.run.dir}", "training.epochs=1")
    started = restore(open_run(config, LocalWorkers())).network.backbone.body.state_dict()
    exported = raycluster.load_backbone(first.run.dir).body.state_dict()
    assert all(torch.equal(started[name], exported[name]) for name in exported)
    records = run(config)
    report, before = report_of(config), report_of(first)
    assert report["weights"] == first.run.dir and "weights" not in before
    random = tiny(tmp_path / "random", "training.epochs=1")
    assert [record["assignments"] for record in run(random)] != [record["assignments"] for record in records]
    assert report["accuracies"]["untrained"] == report_of(random)["accuracies"]["untrained"]
    same = tiny(tmp_path / "file", f"model.weights={plain_file}", *SHORT)
    assert [record["assignments"] for record in run(same)] == [record["assignments"] for record in records]


def test_a_resumed_run_needs_the_weights_no_more(tiny: Tiny, tmp_path: Path, plain_file: Path) -> None:
    options = f"model.weights={plain_file}", "run.checkpoint_minutes=1e-9", *SHORT
    whole, config = tiny(tmp_path / "whole", *options), tiny(tmp_path / "run", *options)
    run(whole)
    for event in pretrain(config, LocalWorkers()):
        if isinstance(event, Progress) and event.phase == "training" and event.done == 5:
            break
    plain_file.unlink()
    validate_and_initialize(config)
    run(config)
    ours, theirs = (load_newest(one.run.dir, torch.device("cpu")) for one in (config, whole))
    assert ours and theirs
    assert all(torch.equal(tensor, theirs["network"][name]) for name, tensor in ours["network"].items())


def test_label_transfer_trains_from_scratch(first: Config, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", f"model.weights={first.run.dir}", *SHORT)
    run(config)
    assert f"weights: {first.run.dir}" in read_config_text(config.run.dir)
    assert transfer_config([f"labels={config.run.dir}"]).model.weights is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["model.widths=[4, 8, 12]"],
            r"does not fit the model in \d+ of \d+ tensors: conv3\.2\.weight is \[16, 8, 3, 3\], wanted \[12, ",
        ),
        (["model={name: resnet18}"], r"conv1\.weight is missing; .* and \d+ more\. Choose the model"),
        (["model.input=sobel"], r"in 1 of \d+ tensors: conv1\.0\.weight is \[4, 3, 3, 3\], wanted \[4, 2, 3, 3\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_starts(
    first: Config, tiny: Tiny, tmp_path: Path, options: list[str], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        config = tiny(tmp_path, *options, f"model.weights={first.run.dir}", "method.layer=null")
        validate_and_initialize(config)
    assert not (tmp_path / "manifest.parquet").exists()


def test_sources_without_weights_are_named(tiny: Tiny, tmp_path: Path, plain_file: Path) -> None:
    with pytest.raises(UserError, match=r"holds no backbone\.safetensors; wanted the directory of a finished run"):
        validate_and_initialize(tiny(tmp_path / "run", f"model.weights={tmp_path}"))
    with pytest.raises(UserError, match=r"cannot read .*gone\.safetensors"):
        validate_and_initialize(tiny(tmp_path / "run", f"model.weights={tmp_path / 'gone.safetensors'}"))
    plain_file.write_bytes(plain_file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"w\.safetensors is no intact \.safetensors file"):
        validate_and_initialize(tiny(tmp_path / "run", f"model.weights={plain_file}"))


def test_the_untrained_network_is_random(first: Config, tiny: Tiny, tmp_path: Path) -> None:
    device = torch.device("cpu")
    ours = fresh_network(tiny(tmp_path, f"model.weights={first.run.dir}"), device).backbone.state_dict()
    theirs = fresh_network(tiny(tmp_path), device).backbone.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
