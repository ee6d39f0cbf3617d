"""Around a run: shards made small before it, tables made of it afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import raycluster
from raycluster.config import parse
from raycluster.distributed.evaluate import evaluate_run
from raycluster.distributed.prepare import PrepareSettings, prepare
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.types import UserError

pytestmark = pytest.mark.ray

Tiny = Callable[..., Config]


@pytest.fixture(scope="module")
def by_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 of the digits, enlarged, in one folder a class."""
    root, digits = tmp_path_factory.mktemp("digits"), load_digits()
    for index, (digit, target) in enumerate(zip(digits.images[:300], digits.target[:300], strict=True)):
        folder = root / f"class {target}"
        folder.mkdir(exist_ok=True)
        Image.fromarray((digit * 15).astype("uint8")).resize((48, 40)).save(folder / f"{index:03d}.png")
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Config:
    config = tiny(tmp_path_factory.mktemp("run"))
    list(pretrain(config, LocalWorkers()))
    return config


def settings(source: Path, out: Path, *overrides: str) -> PrepareSettings:
    return parse(
        PrepareSettings, "", [f"data.uri={source}", f"out={out}", "image_size=16", "data.shard_size=100", *overrides]
    )


def test_prepared_shards_are_pre_trained_on(ray_cluster: None, tiny: Tiny, by_class: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    (by_class / "class 0" / "broken.png").write_bytes(b"nothing")
    try:
        told = prepare(settings(by_class, out))
    finally:
        (by_class / "class 0" / "broken.png").unlink()
    assert re.fullmatch(rf"300 images in 4 shards, 0\.\d MB, 1 skipped; pre-train with data\.uri={out}", told)
    assert [json.loads(line)["path"] for line in (out / "skipped.jsonl").read_text().splitlines()] == [
        "class 0/broken.png"
    ]
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"shard-0000{n}.parquet" for n in range(4)),
        "skipped.jsonl",
    ]
    assert pq.read_table(sorted(out.glob("*.parquet")))["label"].to_pylist().count("class 3") == 29

    config = tiny(tmp_path / "run", f"data.uri={out}", "training.epochs=1")
    list(pretrain(config, LocalWorkers()))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["images"] == 300 and set(report["accuracies"]) == {"untrained", "pre-trained"}

    with pytest.raises(UserError, match="choose an empty folder"):
        prepare(settings(by_class, out))


def test_too_many_broken_images_are_a_user_error(ray_cluster: None, digits_folder: Path, tmp_path: Path) -> None:
    (digits_folder / "broken.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="1 of 301 images could not be read"):
        prepare(settings(digits_folder, tmp_path / "out", "data.max_broken_fraction=0"))


def test_tables_of_every_layer(ray_cluster: None, finished: Config) -> None:
    text = evaluate_run(finished.run.dir, ["evaluation.layer=all"])
    accuracies, agreement = text.split("\n\n")
    assert re.match(r"accuracy, % +knn +linear probe\n", accuracies)
    assert [line.split()[0] for line in accuracies.splitlines()[1:]] == ["conv1", "conv2", "conv3", "avgpool"]
    titles, _, rows = agreement.partition("\n")
    assert re.fullmatch(
        "agreement +nmi arithmetic +nmi geometric +ami +ari +purity +matched accuracy +class entropy", titles
    )
    assert rows.startswith("label_0 ")
    record = json.loads((Path(finished.run.dir) / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(agreement.splitlines()[1].split()[1]) == pytest.approx(record["nmi_labels"], abs=5e-4)
    trained = json.loads((Path(finished.run.dir) / "report.json").read_text())["accuracies"]["pre-trained"]
    assert float(accuracies.splitlines()[-1].split()[1]) == pytest.approx(100 * trained["knn_accuracy"], abs=0.05)


def test_other_images(ray_cluster: None, finished: Config, by_class: Path) -> None:
    text = evaluate_run(finished.run.dir, [f"data.uri={by_class}"])
    assert re.search(r"avgpool +\d+\.\d +\d+\.\d\n", text)
    assert "agreement: not computed, these are other images than the run's" in text


def test_errors(ray_cluster: None, finished: Config, digits_folder: Path) -> None:
    with pytest.raises(UserError, match=r"conv7.*conv1, conv2, conv3, avgpool"):
        evaluate_run(finished.run.dir, ["evaluation.layer=conv7"])
    with pytest.raises(UserError, match="has no labels to evaluate against"):
        evaluate_run(finished.run.dir, [f"data.uri={digits_folder}"])


def test_backbone_loads_as_a_plain_module(finished: Config) -> None:
    backbone = raycluster.load_backbone(finished.run.dir)
    with torch.no_grad():
        assert backbone(torch.rand(2, 3, 16, 16)).shape == (2, 16)
        assert backbone(torch.rand(2, 3, 16, 16), "conv1").shape == (2, 4, 16, 16)
