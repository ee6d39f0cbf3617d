"""Diagnoses of runs without progress, from observations written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raycluster.distributed.control.stall_detector import RunObservation, diagnose

WAITING = RunObservation("starting", 90, workers=0, slot="train_slot", least=2, total={"CPU": 4.0}, free={"CPU": 4.0})
READING = RunObservation(
    "extracting", 200, workers=2, slot="train_slot", least=1, total={"CPU": 4.0, "train_slot": 2}, free={"CPU": 0.5}
)


@pytest.mark.parametrize(
    ("observation", "says"),
    [
        (replace(WAITING, seconds=30), []),
        (WAITING, ["needs at least 2 train_slot, the cluster has 0", "--resources='{\"train_slot\": 1}'"]),
        (replace(WAITING, slot="GPU"), ["at least 2 GPU", "start nodes with GPUs"]),
        (replace(WAITING, total={"train_slot": 3.0}), ["waiting for Ray to start"]),
        (
            replace(WAITING, total={"train_slot": 3.0}, seconds=300),
            ["of the 3 train_slot of the cluster only 0 are free", "end the other actors"],
        ),
        (replace(WAITING, total={"train_slot": 3.0}, free={"train_slot": 2.0}), ["waiting for Ray to start"]),
        (READING, ["no image has been read for 3 min", "none of the 4 CPUs", "end the other actors and jobs"]),
        (replace(READING, seconds=60), []),
        (replace(READING, phase="clustering", seconds=5000), []),
        (replace(READING, free={"CPU": 2.0}), []),
        (replace(READING, free={"CPU": 2.0}, seconds=700), ["no progress for 12 min while extracting"]),
    ],
)
def test_causes_and_remedies(observation: RunObservation, says: list[str]) -> None:
    found = diagnose(observation)
    assert bool(found) == bool(says)
    for part in says:
        assert part in found
