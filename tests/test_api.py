"""The public functions on arrays, tensors and files of embeddings."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
import torch

import raycluster
from raycluster.distributed import cluster_files
from raycluster.distributed.cluster_files import ClusterSettings, cluster
from raycluster.types import UserError


def _rows(num_rows: int = 400, dim: int = 6) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((8, dim))[rng.integers(8, size=num_rows)] * 3 + rng.standard_normal((num_rows, dim))
    ).astype(np.float32)


def test_arrays_tensors_and_files_give_the_same(tmp_path: Path) -> None:
    rows = _rows()
    wanted = raycluster.kmeans(rows, 8).labels
    np.save(tmp_path / "rows.npy", rows)
    pq.write_table(pa.table({"id": range(400), "embedding": list(rows)}), tmp_path / "rows.parquet", row_group_size=90)
    (tmp_path / "folder").mkdir()
    for part, values in enumerate(np.array_split(rows, 3)):
        np.save(tmp_path / "folder" / f"{part}.npy", values)
    for x in (torch.from_numpy(rows), rows.astype(np.float64), np.asfortranarray(rows), str(tmp_path / "rows.npy")):
        assert np.array_equal(raycluster.kmeans(x, 8).labels, wanted)
    for x in (tmp_path / "rows.parquet", tmp_path / "folder"):
        assert np.array_equal(raycluster.kmeans(x, 8).labels, wanted)
    whole = np.arange(24, dtype=np.uint8).reshape(8, 3)
    assert np.array_equal(raycluster.kmeans(whole, 3).labels, raycluster.kmeans(whole.astype(np.float32), 3).labels)


def test_inputs_that_are_no_embeddings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reshape\(-1, 1\)"):
        raycluster.kmeans(np.arange(5.0), 2)
    with pytest.raises(UserError, match="complex128"):
        raycluster.kmeans(np.ones((3, 2), complex), 2)
    with pytest.raises(UserError, match=r"holds no .npy or .parquet"):
        raycluster.kmeans(str(tmp_path), 2)
    pq.write_table(pa.table({"a": [[1.0], [2.0]], "b": [[1.0, 2.0], [2.0]]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="2 columns of lists"):
        raycluster.kmeans(tmp_path / "t.parquet", 1)
    with pytest.raises(UserError, match="no column 'c'"):
        raycluster.kmeans(tmp_path / "t.parquet", 1, column="c")
    with pytest.raises(UserError, match="of one length"):
        raycluster.kmeans(tmp_path / "t.parquet", 1, column="b")
    rows = _rows()
    rows[7, 1] = np.nan
    with pytest.raises(UserError, match=r"\[7\]"):
        raycluster.kmeans(rows, 2)


def test_predict_save_and_load(tmp_path: Path) -> None:
    rows = _rows()
    found = raycluster.kmeans(rows, 8, spherical=True, init="k-means++")
    assert np.array_equal(found.predict(rows * 5), found.labels)
    found.save(str(tmp_path / "k.npz"))
    again = raycluster.load_kmeans(str(tmp_path / "k.npz"))
    assert np.array_equal(again.predict(torch.from_numpy(rows)), found.labels)
    assert again.inertia == found.inertia and again.spherical and again.engine == found.engine
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged or of another program"):
        raycluster.load_kmeans(str(tmp_path / "other"))


def test_a_tree_shares_its_clusters_out_by_size() -> None:
    rows = np.concatenate([_rows(300), _rows(20) + 100, np.full((5, 6), -100, np.float32)])
    tree = raycluster.kmeans_tree(rows, [3, 33], iterations=5)
    assert [len(level) for level in tree.centroids] == [3, 33]
    assert np.array_equal(tree.parents[1][tree.labels[1]], tree.labels[0])
    shares = np.bincount(tree.parents[1])
    assert sorted(shares.tolist()) == [1, 2, 30]
    assert np.bincount(tree.labels[1], minlength=33).min() >= 1
    with pytest.raises(UserError, match="not decreasing"):
        raycluster.kmeans_tree(rows, [5, 3])


def test_a_tree_of_equal_shares() -> None:
    rows = np.concatenate([_rows(300), _rows(20) + 100, np.full((5, 6), -100, np.float32)])
    tree = raycluster.kmeans_tree(rows, [3, 33], iterations=5, shares="equal")
    assert sorted(np.bincount(tree.parents[1]).tolist()) == [1, 11, 11], "one has a single distinct row"
    assert np.array_equal(tree.parents[1][tree.labels[1]], tree.labels[0]) and len(tree.centroids[1]) == 23
    flat = raycluster.kmeans_tree(rows, [11], shares="equal")
    assert np.array_equal(flat.labels[0], raycluster.kmeans(rows, 11).labels)
    with pytest.raises(UserError, match=r"equal shares need sizes that are multiples .* seen \[3, 32\]"):
        raycluster.kmeans_tree(rows, [3, 32], shares="equal")
    with pytest.raises(UserError, match="shares must be one of rows, equal; seen 'even'"):
        raycluster.kmeans_tree(rows, [3, 33], shares="even")  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [1, 7, 399])
def test_neighbours_are_exact_and_never_the_row_itself(k: int) -> None:
    for rows in (_rows(), np.rint(_rows() / 3), np.repeat(_rows(100), 4, axis=0)):
        graph = raycluster.knn(rows, k)
        distance = np.square(rows.astype(np.float64)[:, None] - rows[None].astype(np.float64)).sum(axis=2)
        np.fill_diagonal(distance, np.inf)
        assert np.array_equal(graph.indices, np.argsort(distance, axis=1, kind="stable")[:, :k])
        np.testing.assert_allclose(graph.distances, np.sort(distance, axis=1)[:, :k], rtol=1e-6)


def test_the_job_writes_labels_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(2000)
    np.save(tmp_path / "rows.npy", rows)

    def config(out: str, **changes: object) -> ClusterSettings:
        options = {
            "embeddings": str(tmp_path / "rows.npy"),
            "num_clusters": 40,
            "out": str(tmp_path / out),
            "iterations": 8,
        }
        return ClusterSettings(**{**options, **changes})  # type: ignore[arg-type]

    assert "2000 rows in 40 clusters" in cluster(config("whole"))
    wanted = raycluster.load_kmeans(str(tmp_path / "whole" / "kmeans.npz"))
    assert np.array_equal(pq.read_table(tmp_path / "whole" / "labels.parquet")["label"].to_numpy(), wanted.labels)

    real, calls = cluster_files._write_state, []

    def stop_after_three(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cluster_files, "_write_state", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        cluster(config("broken"))
    cluster(config("broken"))
    found = raycluster.load_kmeans(str(tmp_path / "broken" / "kmeans.npz"))
    assert found.centroids.tobytes() == wanted.centroids.tobytes() and found.inertia == wanted.inertia
    with pytest.raises(UserError, match="other settings"):
        cluster(config("broken", num_clusters=41))


def test_integers_may_be_written_as_floats_and_nothing_else() -> None:
    rows = _rows(60)
    assert np.array_equal(
        raycluster.kmeans(rows, 5.0, iterations=np.int64(3)).labels, raycluster.kmeans(rows, 5, iterations=3).labels
    )  # type: ignore[arg-type]
    for value in (2.5, "5", None, float("nan"), float("inf"), [5, 6]):
        with pytest.raises(UserError, match="num_clusters must be an integer; seen"):
            raycluster.kmeans(rows, value)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="dim must be an integer"):
            raycluster.whiten(rows, value)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="k must be an integer"):
            raycluster.knn(rows, value)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="sizes must list"):
        raycluster.kmeans_tree(rows, 5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"sizes must be an integer; seen 7\.5"):
        raycluster.kmeans_tree(rows, [2, 7.5])  # type: ignore[list-item]


def test_unknown_choices_list_the_known_ones() -> None:
    rows = _rows(60)
    for call in (
        lambda: raycluster.kmeans(rows, 3, engine="cuda"),
        lambda: raycluster.kmeans(rows, 3).predict(rows, engine="cuda"),
    ):  # type: ignore[arg-type]
        with pytest.raises(UserError, match="engine must be one of auto, int8, torch, faiss; seen 'cuda'"):
            call()
    with pytest.raises(UserError, match=r"init must be 'random', 'k-means\+\+'.*seen 'kmeans'"):
        raycluster.kmeans(rows, 3, init="kmeans")
    with pytest.raises(UserError, match=r"init must be 'random'.*seen object"):
        raycluster.kmeans(rows, 3, init=None)
    with pytest.raises(UserError, match="rounding must be one of argmax, exact; seen 'floor'"):
        raycluster.sinkhorn(rows, rounding="floor")  # type: ignore[arg-type]


def test_bfloat16_tensors_are_rows() -> None:
    rows = torch.from_numpy(_rows()).bfloat16()
    found, wanted = raycluster.kmeans(rows, 8), raycluster.kmeans(rows.float(), 8)
    assert np.array_equal(found.labels, wanted.labels) and np.array_equal(found.predict(rows), wanted.labels)
    assert raycluster.kmeans(rows, 8, init=rows[:8]).labels.shape == (400,)


def test_sparse_masked_and_ragged_rows_are_refused() -> None:
    rows = _rows(20)
    masked = np.ma.masked_array(rows, rows > 3)
    for x, message in (
        (torch.from_numpy(rows).to_sparse(), r"Pass x\.to_dense\(\)"),
        (scipy.sparse.csr_matrix(rows), r"csr_matrix of shape \(20, 6\). Pass x\.toarray\(\)"),
        (masked, f"seen {(rows > 3).sum()} masked values"),
        ([[1.0, 2.0], [3.0]], "rows of one length; seen list"),
    ):
        with pytest.raises(UserError, match=message):
            raycluster.kmeans(x, 2)
        with pytest.raises(UserError, match=message):
            raycluster.kmeans(rows, 2).predict(x)
    assert raycluster.kmeans(np.ma.masked_array(rows), 2).labels.shape == (20,)


def test_parquet_columns_of_large_and_fixed_size_lists(tmp_path: Path) -> None:
    rows = _rows()
    wanted = raycluster.kmeans(rows, 8).labels
    for kind in (pa.large_list(pa.float32()), pa.list_(pa.float32(), 6), pa.large_list(pa.float64())):
        table = pa.table({"id": range(400), "embedding": pa.array(list(rows), kind)})
        pq.write_table(table, tmp_path / "rows.parquet", row_group_size=90)
        assert np.array_equal(raycluster.kmeans(tmp_path / "rows.parquet", 8).labels, wanted)
    with pytest.raises(UserError, match="each row must be a list of numbers; seen int64"):
        raycluster.kmeans(tmp_path / "rows.parquet", 8, column="id")


def test_rows_that_only_float64_tells_apart_are_named() -> None:
    rows = np.random.default_rng(0).random((100, 2))
    with pytest.raises(UserError, match=r"rows that differ are equal in float32.*Subtract their mean first"):
        raycluster.kmeans(rows + 1e8, 20)
    with pytest.raises(UserError, match="Subtract their mean first"):
        raycluster.kmeans_tree(rows + 1e8, [1, 20])
    assert raycluster.kmeans(rows + 1e8 - (rows + 1e8).mean(axis=0), 20).sizes.min() >= 1
    with pytest.raises(UserError, match=r"only 1 distinct rows.*remove duplicates") as caught:
        raycluster.kmeans(np.ones((100, 2)), 20)
    assert "image" not in str(caught.value)


def test_messages_for_embeddings_do_not_speak_of_images() -> None:
    rows = _rows(20)
    broken = np.where(np.arange(20)[:, None] == 3, 1e300, rows.astype(np.float64))
    calls = (
        lambda: raycluster.kmeans(rows, 21),
        lambda: raycluster.whiten(rows, 7),
        lambda: raycluster.kmeans(broken, 2),
        lambda: raycluster.knn(rows, 20),
    )
    for call in calls:
        with pytest.raises(UserError) as caught:
            call()
        assert "image" not in str(caught.value)


def test_rows_that_argmax_cannot_divide_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r'45 of 50 rows .*rounding="exact"'):
        found = raycluster.sinkhorn(np.zeros((50, 10)))
    assert found.converged == [True] and found.sizes[0].max() == 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert raycluster.sinkhorn(np.zeros((50, 10)), rounding="exact").sizes[0].tolist() == [5] * 10
        raycluster.sinkhorn(np.random.default_rng(0).standard_normal((500, 10)))
        raycluster.sinkhorn(np.random.default_rng(0).standard_normal((5, 40)))
