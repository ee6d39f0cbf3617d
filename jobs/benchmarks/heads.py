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
    pictures: str,
    config: str = "configs/sela_cifar10.yaml",
    heads: str = "1,4",
    images: int = 10_000,
    epochs: int = 6,
    seeds: int = 3,
    head_lr: float = 0.5,
) -> str:
    """A table, mean (standard deviation) over seeds; accuracies in percent, training in seconds.

    head_lr: learning rate of a single head; with several, whose losses are averaged, it grows with their number.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        data = subset(pictures, Path(folder), images)
        lines = [f"{images} images, {epochs} epochs, {seeds} seeds", "", head("heads", COLUMNS)]
        for number in map(int, str(heads).strip("()").split(",")):
            settings = [
                f"data.uri={data}",
                f"training.epochs={epochs}",
                "training.milestones=[]",
                "training.schedule=cosine",
            ]
            of_heads = [f"method.num_heads={number}", f"training.head_lr={head_lr * number}"]
            found = [
                outcome(config, f"{pictures}/test-*.parquet", *settings, *of_heads, f"seed={seed}")
                for seed in range(seeds)
            ]
            lines.append(row(str(number), found, COLUMNS))
    return "\n".join(lines)
