"""Saved clusterings with seeded damages: loaded, or refused with a UserError; an interrupted one is not blocked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import raycluster
from raycluster.distributed import cluster_files
from raycluster.distributed.cluster_files import ClusterSettings, cluster
from raycluster.types import UserError
from tests.damage import damages


def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)


def test_damaged_clusterings_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "k.npz"
    found = raycluster.kmeans(rows(), 8, iterations=3)
    found.save(str(file))
    again = raycluster.load_kmeans(file)  # a pathlib.Path
    assert again.centroids.tobytes() == found.centroids.tobytes() and again.inertia == found.inertia
    refused = 0
    for data in damages(file.read_bytes(), 200):
        file.write_bytes(data)
        try:
            again = raycluster.load_kmeans(file)
        except UserError as error:
            refused += 1
            assert "k.npz is damaged or of another program" in str(error)
        else:
            assert again.centroids.tobytes() == found.centroids.tobytes() and again.inertia == found.inertia
    assert refused > 150
    np.savez(file, centroids=np.zeros((2, 2)))
    with pytest.raises(UserError, match="samples"):
        raycluster.load_kmeans(file)
    np.savez(file, **{name: np.array([{}]) for name in ("centroids", "samples", "labels", "inertia")})
    with pytest.raises(UserError, match="damaged or of another program"):
        raycluster.load_kmeans(file)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> ClusterSettings:
    """A clustering of which the state after two iterations is left."""
    folder = tmp_path_factory.mktemp("clustering")
    np.save(folder / "rows.npy", rows())
    config = ClusterSettings(embeddings=str(folder / "rows.npy"), num_clusters=8, out=str(folder / "out"), iterations=2)
    cluster(config)
    return config


def test_damaged_states_start_again(interrupted: ClusterSettings, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(interrupted.out) / "state.npz"
    content = file.read_bytes()
    for data in damages(content, 200):
        file.write_bytes(data)
        state, printed = cluster_files._resume(interrupted), capsys.readouterr().out
        if state is None:
            assert printed.count("\n") == 1
            assert "state.npz is damaged" in printed and "starts again from the beginning" in printed
        else:
            assert state.iteration == 2 and printed == ""
    file.write_bytes(content)


def test_after_a_damaged_state_the_result_is_bitwise_identical(interrupted: ClusterSettings) -> None:
    out = Path(interrupted.out)
    wanted = raycluster.load_kmeans(out / "kmeans.npz")
    (out / "state.npz").write_bytes((out / "state.npz").read_bytes()[:-50])
    cluster(interrupted)
    found = raycluster.load_kmeans(out / "kmeans.npz")
    assert found.centroids.tobytes() == wanted.centroids.tobytes() and found.inertia == wanted.inertia
    assert len((out / "progress.jsonl").read_text().splitlines()) == len(wanted.inertia) - 1
