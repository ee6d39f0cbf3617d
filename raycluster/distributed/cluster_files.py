"""Clusters files of embeddings into files of labels; reports progress and resumes after an interruption."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from importlib import import_module
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from raycluster.clustering.kmeans.lloyd import LloydProgress, LloydState, kmeans
from raycluster.clustering.kmeans.result import KMeans
from raycluster.clustering.whitening import whiten
from raycluster.config import NonEmpty, Seed, settings
from raycluster.evaluation.metrics.balance import balance
from raycluster.features.arrays import as_features
from raycluster.io import storage
from raycluster.io.npz import read_npz
from raycluster.types import Features, UserError

_FREE = ("out", "engine", "actors", "max_block_bytes")  # they do not change the result
_ARRAYS = ("centroids", "velocity", "sizes", "inertia")


@settings
class ClusterSettings:
    """Settings of a clustering of embeddings.

    embeddings: .npy or Parquet file, or a folder of them, at a path or URI. out: folder or URI of the results. column:
    of Parquet files, null for the only one that fits. iterations: maximum. init, spherical, seed, engine, plain: see
    `raycluster.kmeans`. whiten: columns to whiten to first, null for no whitening. actors: of a Ray cluster that the
    rows are sharded over, with bitwise identical results; 0 to work in this process. max_block_bytes: size of the rows
    that an actor reads at a time.
    """

    embeddings: NonEmpty
    num_clusters: Annotated[int, Field(ge=1)]
    out: NonEmpty
    column: str | None = None
    iterations: Annotated[int, Field(ge=1)] = 20
    init: Literal["random", "k-means++"] = "random"
    spherical: bool = False
    seed: Seed = 0
    engine: Literal["auto", "int8", "torch", "faiss"] = "auto"
    plain: bool = False
    whiten: Annotated[int, Field(ge=1)] | None = None
    actors: Annotated[int, Field(ge=0)] = 0
    max_block_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20


def cluster(config: ClusterSettings) -> str:
    """Write kmeans.npz, labels.parquet and progress.jsonl, or resume an interrupted call. Returns what to print."""
    with _opened(config) as features:
        return _cluster(config, features)


@contextmanager
def _opened(config: ClusterSettings) -> Iterator[Features]:
    if config.actors:  # by name, so that Ray is loaded for actors only
        limits = {"num_actors": config.actors, "max_block_bytes": config.max_block_bytes}
        pooled_files = import_module("raycluster.distributed.features.dataset").pooled_files
        with pooled_files(config.embeddings, config.column, **limits) as features:
            yield features
    else:
        yield as_features(config.embeddings, column=config.column)


def _cluster(config: ClusterSettings, features: Features) -> str:
    if config.whiten:
        features = whiten(features, config.whiten)
    state = _resume(config)
    lines = _lines(config) if state else []

    def report(progress: LloydProgress) -> None:
        record = {
            "iteration": progress.iteration,
            "inertia": progress.inertia / features.num_rows,
            "changed_share": progress.changed,
            "seconds": progress.seconds,
            "rows_per_second": progress.rate,
        }
        lines.append(json.dumps(record))
        _write_state(config, progress.state)
        storage.write_bytes(storage.join(config.out, "progress.jsonl"), ("\n".join(lines) + "\n").encode())
        print(
            f"{progress.iteration}/{config.iterations}: inertia per row {record['inertia']:.6g}, "
            f"{progress.changed:.2%} changed, {progress.seconds:.2f} s, {progress.rate:,.0f} rows/s",
            flush=True,
        )

    options = {name: getattr(config, name) for name in ("iterations", "spherical", "seed", "engine", "plain")}
    found = kmeans(features, config.num_clusters, init=state or config.init, report=report, **options)
    return _write(config, found)


def _fingerprint(config: ClusterSettings) -> str:
    """16 hex digits that identify all settings that change the result."""
    deciding = {name: value for name, value in asdict(config).items() if name not in _FREE}
    return sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def _state_uri(config: ClusterSettings) -> str:
    return storage.join(config.out, "state.npz")


def _write_state(config: ClusterSettings, state: LloydState) -> None:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray(getattr(state, name)) for name in _ARRAYS}
    numbers = np.array([state.iteration, state.num_repaired])
    np.savez(buffer, numbers=numbers, fingerprint=np.array(_fingerprint(config)), **arrays)
    storage.write_bytes(_state_uri(config), buffer.getvalue())


def _resume(config: ClusterSettings) -> LloydState | None:
    """State of an interrupted call with the same settings; None if there is none or it is damaged.

    Raises UserError if `out` holds a clustering with other settings.
    """
    if not storage.exists(_state_uri(config)):
        return None
    try:
        saved = read_npz(_state_uri(config), ("numbers", "fingerprint", *_ARRAYS))
    except UserError as error:
        print(f"{error}; clustering starts again from the beginning", flush=True)
        return None
    if str(saved["fingerprint"]) != _fingerprint(config):
        raise UserError(
            f"{storage.shown(config.out)} holds a clustering with other settings: choose another out, or delete it"
        )
    iteration, num_repaired = saved["numbers"].tolist()
    centroids, velocity, sizes, inertia = (saved[name] for name in _ARRAYS)
    return LloydState(iteration, centroids, velocity, sizes, inertia.tolist(), num_repaired)


def _lines(config: ClusterSettings) -> list[str]:
    uri = storage.join(config.out, "progress.jsonl")
    return storage.read_bytes(uri).decode(errors="replace").splitlines() if storage.exists(uri) else []


def _write(config: ClusterSettings, found: KMeans) -> str:
    found.save(storage.join(config.out, "kmeans.npz"))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"sample": found.samples, "label": found.labels.astype(np.int32)}), sink)
    storage.write_bytes(storage.join(config.out, "labels.parquet"), sink.getvalue())
    figures = balance(found.sizes)
    return (
        f"{len(found.labels)} rows in {config.num_clusters} clusters of {found.sizes.min()} to {found.sizes.max()} rows"
        f", inertia per row {found.inertia[-1] / len(found.labels):.6g}, {found.num_repaired} repaired, size entropy "
        f"{figures['size_entropy']:.3f}, engine {found.engine}; labels and centroids in {storage.shown(config.out)}"
    )
