"""SeLa with features collected online during training against features extracted before each reassignment."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.runs import head, outcome, row, subset

COLUMNS = {
    "extracting": ".1f",
    "assigning": ".1f",
    "training": ".1f",
    "trained knn": ".1f",
    "trained linear_probe": ".1f",
    "nmi_labels": ".3f",
}


def run(
    data: str,
    config: str = "configs/sela_cifar10.yaml",
    images: int = 10_000,
    epochs: int = 6,
    seeds: int = 1,
    heads: int = 4,
) -> str:
    """A table, mean (standard deviation) over seeds, one reassignment per epoch; seconds of the run, and percent."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        train = subset(data, Path(folder), images)
        lines = [f"{images} images, {epochs} epochs, {heads} heads, {seeds} seeds", "", head("features", COLUMNS)]
        settings = [f"data.uri={train}", f"method.num_heads={heads}", f"training.epochs={epochs}"]
        settings += ["training.head_lr=0.5", "training.milestones=[]", "training.schedule=cosine"]
        for features in ("extracted", "online"):
            source = [f"method.features={features}", "method.schedule=epochs", "method.every=1"]
            found = [
                outcome(config, f"{data}/test-*.parquet", *settings, *source, f"seed={seed}") for seed in range(seeds)
            ]
            lines.append(row(features, found, COLUMNS))
    return "\n".join(lines)
