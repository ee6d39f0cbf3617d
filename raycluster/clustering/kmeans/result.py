"""The result of k-means: labels and centroids, prediction for new rows, and its file."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering.search.assign import Engine, nearest
from raycluster.features.arrays import as_array
from raycluster.io import storage
from raycluster.io.embeddings import check_matrix
from raycluster.io.npz import read_npz


@dataclass(frozen=True, eq=False)
class KMeans:
    """A clustering. Row i belongs to samples[i] (ascending); labels[i] is the nearest of the returned centroids.

    centroids: (K, D) float32. samples, labels: (N,) int64. inertia: sum of squared distances to the centroids, before
    each step and last of the result, in squared units of the rows. sizes: (K,) int64, none zero. num_repaired: number
    of empty clusters that were given new centroids. engine: the one used. spherical: whether rows were divided by their
    norm.
    """

    centroids: NDArray[np.float32]
    samples: NDArray[np.int64]
    labels: NDArray[np.int64]
    inertia: list[float]
    sizes: NDArray[np.int64]
    num_repaired: int
    engine: str = "torch"
    spherical: bool = False

    def predict(self, values: NDArray[np.floating], *, engine: Engine = "auto") -> NDArray[np.int64]:
        """Labels (n,) int64 of other rows: (n, D) or (D,) array or tensor.

        Raises UserError if their width does not fit, or values are NaN or infinite.
        """
        rows = check_matrix(np.atleast_2d(as_array(values, "rows")), "rows")
        rows = rows if rows.dtype == np.float16 else rows.astype(np.float32, copy=False)
        return nearest(unit_rows(rows) if self.spherical else rows, self.centroids, engine=engine)[0]

    def save(self, uri: str) -> None:
        """Write everything to one .npz file at a path or URI, atomically; `raycluster.load_kmeans` reads it."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}
        np.savez(buffer, **arrays)
        storage.write_bytes(uri, buffer.getvalue())


def load_kmeans(uri: str) -> KMeans:
    """The clustering that `KMeans.save` wrote to a path or URI. Raises UserError if there is none, or it is damaged."""
    found: dict[str, Any] = read_npz(os.fspath(uri), [field.name for field in fields(KMeans)])
    arrays: dict[str, Any] = {name: found.pop(name) for name in ("centroids", "samples", "labels", "sizes")}
    return KMeans(**arrays, **{name: value.tolist() for name, value in found.items()})


def unit_rows(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """(n, D) rows divided by their Euclidean norm; zero rows stay zero."""
    rows = values.astype(np.float64)
    norms = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
    return (rows / np.where(norms > 0, norms, 1.0)).astype(np.float32)
