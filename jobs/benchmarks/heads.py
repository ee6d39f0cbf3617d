"""SeLa with one head against several, at equal steps."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.runs import head, outcome, row, subset

COLUMNS = {
    "untrained knn": ".1f",
    "trained knn": ".1f",
    "trained linear_probe": ".1f",
    "nmi_labels": ".3f",
    "training": ".0f",
}


def run(
    data: str,
    config: str = "configs/sela_cifar10.yaml",
    heads: str = "1,4",
    images: int = 10_000,
    epochs: int = 6,
    seeds: int = 3,
    head_lr: float = 0.5,
) -> str:
    """A table, mean (standard deviation) over seeds; accuracies in percent, training in seconds.

    data: see `runs.subset`. heads: numbers of heads, separated by commas. head_lr: learning rate of each head.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        train = subset(data, Path(folder), images)
        lines = [f"{images} images, {epochs} epochs, {seeds} seeds", "", head("heads", COLUMNS)]
        for number in map(int, heads.split(",")):
            settings = [
                f"data.uri={train}",
                f"training.epochs={epochs}",
                "training.milestones=[]",
                "training.schedule=cosine",
            ]
            head_options = [f"method.num_heads={number}", f"training.head_lr={head_lr}"]
            found = [
                outcome(config, f"{data}/test-*.parquet", *settings, *head_options, f"seed={seed}")
                for seed in range(seeds)
            ]
            lines.append(row(str(number), found, COLUMNS))
    return "\n".join(lines)
