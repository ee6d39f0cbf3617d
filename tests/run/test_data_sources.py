"""Whole runs on data sets that are not tidy."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.run.state import open_run


def report_of(config: Config) -> dict:
    list(pretrain(config, LocalWorkers()))
    return json.loads((Path(config.run.dir) / "report.json").read_text())


def test_entries_that_are_no_files_are_skipped(
    tiny: Callable[..., Config], tmp_path: Path, digits_folder: Path
) -> None:
    os.mkfifo(digits_folder / "pipe.png")
    os.mkdir(digits_folder / "folder.png")
    paths = [*sorted(map(str, digits_folder.iterdir()))]
    (tmp_path / "list.txt").write_text("\n".join(paths))
    config = tiny(tmp_path / "run", f"data.uri={tmp_path / 'list.txt'}", "training.epochs=1")
    report = report_of(config)
    assert (report["images"], report["skipped"]) == (302, 2)
    skipped = [json.loads(line)["path"] for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(skipped) == [str(digits_folder / "folder.png"), str(digits_folder / "pipe.png")]


def test_images_ordered_by_class_are_mixed_and_evaluated_on_all_classes(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.argsort(digits.target, kind="stable")
    images = []
    for image in digits.images[order]:
        buffer = io.BytesIO()
        Image.fromarray((image * 15).astype("uint8")).save(buffer, "PNG")
        images.append(buffer.getvalue())
    table = pa.table({"image": images, "label": digits.target[order]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=30)
    data = [f"data.uri={tmp_path / 'x.parquet'}", "data.shard_size=30"]
    config = tiny(tmp_path / "run", *data, "training.epochs=1", "evaluation.max_samples=600")
    report = report_of(config)
    dataset = open_run(config, LocalWorkers()).dataset
    assert dataset.window_shards > 1
    labels = dataset.manifest.labels
    assert labels is not None
    assert len(np.unique(labels[dataset.manifest.evaluation_samples(600)])) == 10
    assert len(np.unique(labels[:600])) < 5
    assert all(0.3 < accuracy < 1 for accuracy in report["accuracies"]["untrained"].values())
