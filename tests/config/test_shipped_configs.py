"""Every configuration of the repository loads, starts to train, states what to expect, and survives being written."""

from __future__ import annotations

import re
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from raycluster.config import dump, load, parse
from raycluster.data.manifest import DataSettings, build_manifest
from raycluster.events import Progress
from raycluster.io.assignments import write_assignments
from raycluster.io.run_paths import RunPaths
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.sweep.config import SweepConfig
from raycluster.types import Assignments, LabelSet

ROOT = Path(__file__).parents[2]
RUNS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name not in ("search", "cluster")]
SEARCHES = sorted((ROOT / "configs" / "search").glob("*.yaml"))
LARGE = re.compile("alexnet|imagenet|yfcc")  # networks that take seconds for one step


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_loads_and_survives(path: Path) -> None:
    config = load(Config, path)
    again = parse(Config, dump(config))
    assert again == config
    assert dump(again) == dump(config)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_value_is_kept(path: Path) -> None:
    written = yaml.safe_load(dump(load(Config, path)))
    for section, key, value in leaves(yaml.safe_load(path.read_text())):
        kept = written[section][key] if key else written[section]
        assert kept == pytest.approx(value) if isinstance(value, float) else kept == value, f"{section}.{key}"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_says_what_it_gives(path: Path) -> None:
    head = " ".join(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    for word in ("Expected", "Hardware", f"python jobs/pretrain.py {path.relative_to(ROOT)}"):
        assert word in head, f"the first lines of {path.name} should state {word}"
    assert re.search(r"\b(seconds?|minutes?|hours?|days?)\b", head), (
        f"the first lines of {path.name} should state a time"
    )


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, marks=[pytest.mark.slow] if re.search("alexnet|imagenet|yfcc", path.name) else [], id=path.stem
        )
        for path in (*RUNS, *SEARCHES)
    ],
)
def test_trains_one_step(path: Path, images: Path, tmp_path: Path) -> None:
    overrides = [
        f"data={{uri: {images}, labels: none}}",
        "evaluation.test_uri=null",
        "training.global_batch=4",
        "training.microbatch=4",
        f"run={{dir: {tmp_path / 'run'}, workers: 0}}",
    ]
    if "name: transfer" in path.read_text():
        overrides += [f"method.labels={tmp_path / 'labels'}", "method.num_clusters=[3]"]
        write_labels(tmp_path / "labels", images)
    elif "num_clusters" in path.read_text():
        overrides.append("method.num_clusters=3")
    if "name: exemplar," in path.read_text():
        overrides.append("method.num_classes=3")
    if "num_super_clusters" in path.read_text():
        overrides.append("method.num_super_clusters=3")
    if "name: pic" in path.read_text():
        overrides.append("method.num_neighbours=5")  # fewer than there are images
    if re.search(r"name: (deepcluster|pic)\b", path.read_text()):
        overrides.append("method.pca_dim=8")  # not more than there are images
    config = load(SweepConfig if path in SEARCHES else Config, path, overrides)
    if isinstance(config, SweepConfig):
        config = Config(**config.run_fields())
    with closing(pretrain(config, LocalWorkers())) as events:
        first = next(event for event in events if isinstance(event, Progress) and event.phase == "training")
    assert re.fullmatch(r"loss \d+\.\d{3}", first.note)


def write_labels(run_dir: Path, images: Path) -> None:
    """What a finished run leaves of its assignments."""
    paths = build_manifest(DataSettings(uri=str(images), labels="none")).paths
    labels = np.arange(len(paths), dtype=np.int32) % 3
    write_assignments(RunPaths(str(run_dir)).assignments, Assignments(len(paths), (LabelSet(labels, 3),)), paths, None)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of noise as PNG files."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def leaves(tree: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """(section, key, value) of plain values; the loader may write numbers like 1e-3 and nested views otherwise."""
    return [
        (section, key, value)
        for section, values in tree.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
        if not isinstance(value, dict)
    ]
