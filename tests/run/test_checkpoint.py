"""Checkpoints that are damaged, foreign, or of another version: nothing intact is lost, nothing restarts silently."""

from __future__ import annotations

import io
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from raycluster.run.checkpoint import list_checkpoints, list_places, load_newest, save_checkpoint
from raycluster.types import UserError

CPU = torch.device("cpu")


def state(step: int) -> dict[str, Any]:
    return {"round": 0, "step": step, "assigned": 0, "weights": torch.full((100,), float(step))}


def named(content: bytes, step: int) -> str:
    return f"round-00000-step-{step:07d}-{sha256(content).hexdigest()[:16]}.pt"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_a_foreign_tensor(path: Path) -> None:
    """A valid torch file of another program, under a valid checkpoint name."""
    buffer = io.BytesIO()
    torch.save({"epoch": 3, "weights": torch.zeros(3)}, buffer)
    path.unlink()
    path.with_name(named(buffer.getvalue(), step_of(path))).write_bytes(buffer.getvalue())


def replace_by_text(path: Path) -> None:
    """Not even a torch file, under a name with a valid checksum."""
    path.unlink()
    path.with_name(named(b"text", step_of(path))).write_bytes(b"text")


def step_of(path: Path) -> int:
    return int(path.name.split("-")[3])


DAMAGES = [truncate, flip_a_bit, empty, replace_by_a_foreign_tensor, replace_by_text]
Damage = Callable[[Path], None]


def steps(folder: Path) -> list[int]:
    return [step for _, step in list_places(str(folder))]


def newest_step(folder: Path) -> int:
    loaded = load_newest(str(folder), CPU)
    assert loaded is not None and torch.equal(loaded["weights"], state(loaded["step"])["weights"])
    return int(loaded["step"])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_takes_no_place_of_an_intact_one(tmp_path: Path, damage: Damage) -> None:
    run_dir = str(tmp_path)
    for step in (10, 20):
        save_checkpoint(run_dir, state(step), keep=2)
    damage(Path(list_checkpoints(run_dir)[-1]))
    assert newest_step(tmp_path) == 10
    save_checkpoint(run_dir, state(15), keep=2)
    assert steps(tmp_path) == [10, 15], "the damaged one is deleted, though its step is the latest"
    damage(Path(list_checkpoints(run_dir)[-1]))
    assert newest_step(tmp_path) == 10, "a second damage"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_between_two_saves_deletes_no_intact_checkpoint(tmp_path: Path, damage: Damage) -> None:
    run_dir = str(tmp_path)
    for step in (10, 20, 30):
        save_checkpoint(run_dir, state(step), keep=3)
    damage(Path(list_checkpoints(run_dir)[1]))
    damage(Path(list_checkpoints(run_dir)[2]))
    save_checkpoint(run_dir, state(40), keep=2)
    assert steps(tmp_path) == [10, 40]


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_an_intact_checkpoint_nothing_restarts_silently(tmp_path: Path, damage: Damage) -> None:
    run_dir = str(tmp_path)
    for step in (10, 20):
        save_checkpoint(run_dir, state(step), keep=2)
    for uri in list_checkpoints(run_dir):
        damage(Path(uri))
    files = list_checkpoints(run_dir)
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* is intact.* delete the folder") as caught:
        load_newest(run_dir, CPU)
    assert all(Path(uri).name in str(caught.value) for uri in files)
    assert list_checkpoints(run_dir) == files, "nothing is deleted"
    for uri in files:
        Path(uri).unlink()
    assert load_newest(run_dir, CPU) is None, "after that, the run starts from the beginning"


def test_the_newest_intact_ones_are_kept(tmp_path: Path) -> None:
    for step in range(10, 60, 10):
        save_checkpoint(str(tmp_path), state(step), keep=2)
    assert steps(tmp_path) == [40, 50]
    save_checkpoint(str(tmp_path), state(60), keep=1)
    assert steps(tmp_path) == [60] and newest_step(tmp_path) == 60


def test_a_checkpoint_of_another_version_is_refused_and_kept(tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path), state(10), keep=2)
    buffer = io.BytesIO()
    torch.save({"format": "raycluster checkpoint", "version": 2, "state": {}}, buffer)
    (tmp_path / "checkpoints" / named(buffer.getvalue(), 20)).write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="format version 2; wanted 1"):
        load_newest(str(tmp_path), CPU)
    assert steps(tmp_path) == [10, 20]
