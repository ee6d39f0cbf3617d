"""Short runs for comparisons: pre-trained in this process and evaluated on the same images. Not a benchmark."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raycluster.config import load
from raycluster.data.dataset import open_dataset
from raycluster.evaluation.runner import Evaluation
from raycluster.events import Finished, Round
from raycluster.io import storage
from raycluster.models.export import load_backbone
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.run.network import fresh_network
from raycluster.training.determinism import prepare_process

Figures = dict[str, float]
Keep = Callable[[NDArray], NDArray]


def subset(data: str, folder: Path, num_images: int, keep: Keep = lambda labels: labels >= 0) -> str:
    """Write the first `num_images` images, filtered by `keep`, 1000 per file; returns the URI.

    data: folder of Parquet files `train-*` with the columns `image` and `label`. keep: labels (N,) -> mask (N,).
    """
    files = [uri for uri in storage.list_files(data) if uri.rpartition("/")[2].startswith("train")]
    tables = [pq.read_table(io.BytesIO(storage.read_bytes(uri)), columns=["image", "label"]) for uri in files]
    table = pa.concat_tables(tables).slice(0, num_images)
    table = table.filter(pa.array(keep(table["label"].to_numpy())))
    for start in range(0, len(table), 1000):
        pq.write_table(table.slice(start, 1000), folder / f"train-{start // 1000:03d}.parquet")
    return str(folder)


def outcome(config: str, test_uri: str, *overrides: str) -> Figures:
    """Pre-train and evaluate: kNN and linear probe (percent, on halves of `test_uri`), NMI, loss, seconds.

    config: path of a configuration. test_uri: labelled images.
    """
    prepare_process()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        settings = load(
            Config,
            config,
            [*overrides, "evaluation.max_samples=200", "evaluation.test_uri=null", f"run.dir={folder}/run"],
        )
        workers = LocalWorkers()
        events = list(pretrain(settings, workers))
        records = [event.record for event in events if isinstance(event, Round)]
        assert isinstance(events[-1], Finished)
        networks = {
            "trained": load_backbone(f"{folder}/run"),
            "untrained": fresh_network(settings, workers.device).backbone,
        }
        data = replace(settings.data, uri=test_uri)
        seen = replace(settings.evaluation, max_samples=20_000, test_uri=None, test_fraction=0.5)
        evaluation = Evaluation(seen, settings.views.eval, folder, workers)
        dataset = open_dataset(data, f"{folder}/test.parquet", workers, 0)
        accuracies = evaluation.compare(networks, dataset)
    figures = {
        name: sum(record[f"seconds_{name}"] for record in records) for name in ("extracting", "assigning", "training")
    }
    for name, row in accuracies.items():
        figures |= {f"{name} {probe}": 100 * row[f"{probe}_accuracy"] for probe in ("knn", "linear_probe")}
    return figures | {key: records[-1][key] for key in ("nmi_labels", "loss_over_chance")}


def row(title: str, runs: list[Figures], columns: dict[str, str]) -> str:
    """A row of a Markdown table: mean (standard deviation) over runs. columns: {figure: format}."""
    cells = []
    for name, form in columns.items():
        values = [figures[name] for figures in runs]
        cells.append(format(mean(values), form) + (f" ({stdev(values):{form}})" if len(values) > 1 else ""))
    return f"| {title} | {' | '.join(cells)} |"


def head(first: str, columns: dict[str, str]) -> str:
    """The header of that table."""
    return f"| {first} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}"
