"""What the console prints for records and reports."""

from __future__ import annotations

from pathlib import Path

from raycluster.monitoring.console import agreement_table, summary, table, warnings
from raycluster.monitoring.tensorboard import TensorBoard

HEALTHY = {"round": 5, "loss_over_chance": 0.5, "largest_share": 0.1, "empty_clusters": 0, "size_entropy": 0.9}


def test_warnings_take_the_number_of_clusters_of_the_round() -> None:
    record = {**HEALTHY, "empty_clusters": 5, "largest_share": 0.4}
    assert warnings(record) == [], "nothing is known of the sizes"
    assert warnings({**record, "num_clusters": 1000}) == []
    assert warnings({**record, "num_clusters": 20.0}) == ["5 of 20 clusters are empty; try fewer clusters"]
    assert "one cluster holds 60%" in warnings({**HEALTHY, "largest_share": 0.6, "num_clusters": 20})[0]


def test_summary_without_labels() -> None:
    report = {"images": 300, "skipped": 2, "rounds": 12, "last_round": {"loss": 1.25}}
    assert summary(report, "run") == "300 images (2 skipped), 12 rounds, loss 1.250\n\nrun directory: run"


def test_tables() -> None:
    accuracies = {"conv1": {"knn_accuracy": 0.5, "linear_probe_accuracy": 0.25}, "conv2": {"knn_accuracy": 1.0}}
    assert [line.rstrip() for line in table(accuracies).splitlines()] == [
        "accuracy, %      knn  linear probe",
        "conv1           50.0          25.0",
        "conv2          100.0",
    ]
    assert agreement_table({"label_0": {"nmi": 0.5}}) == "agreement      nmi\nlabel_0      0.500"
    assert agreement_table(None).startswith("agreement: not computed, these are other images than the run's")


def test_tensorboard_files_are_written(tmp_path: Path) -> None:
    board = TensorBoard(str(tmp_path / "tensorboard"))
    board.write({"step": 7, "loss": 1.5, "assignments": "no number"})
    board.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in file.read_bytes() and b"no number" not in file.read_bytes()
