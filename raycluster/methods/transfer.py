"""Label transfer: no clustering at all, but the labels that another run found, as they are (Asano et al., ICLR 2020,
section 4.3: labels of a ResNet-50 train a better AlexNet than its own).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from raycluster.config import settings
from raycluster.data.sampling import one_visit_each
from raycluster.io import storage
from raycluster.io.run_paths import RunPaths
from raycluster.types import Assignments, Features, Head, UserError


@settings
class Method:
    """Settings of label transfer; `jobs/transfer.py` fills them in.

    labels: directory of the run whose assignments are learned. num_clusters: of each of its label sets. A round is an
    epoch, so that there are figures of each.
    """

    name: Literal["transfer"] = "transfer"
    labels: str
    num_clusters: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)]

    resets_heads: ClassVar[bool] = False

    def heads(self) -> tuple[int, ...]:
        return self.num_clusters

    def feature_request(self) -> None:
        return None

    def reassignments(self, epochs: int, steps_per_epoch: int) -> list[int]:
        return [epoch * steps_per_epoch for epoch in range(epochs)]

    def assign(
        self,
        features: Features | None,
        *,
        num_samples: int,
        seed: int,
        heads: Sequence[Head],
        previous: Assignments | None,
    ) -> Assignments:
        labels = _read(self.labels) if previous is None else previous.labels
        wanted = (len(self.num_clusters), num_samples)
        if labels.shape != wanted or (labels.max(axis=1, initial=-1) >= self.num_clusters).any():
            raise UserError(
                f"{self.labels} holds {labels.shape} labels up to {labels.max(initial=-1)}, but this run {wanted} "
                f"of {list(self.num_clusters)} clusters: start it by jobs/transfer.py, with the images of that run"
            )
        return Assignments(labels, self.num_clusters)

    def visit_counts(self, labels: NDArray[np.int32], num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return one_visit_each(labels.max(axis=0), num_rows, rng)

    def sample_weights(self, labels: NDArray[np.int32]) -> NDArray[np.float32]:
        return np.asarray((labels >= 0).any(axis=0), np.float32)


def _read(run_dir: str) -> NDArray[np.int32]:
    """(heads, N) labels by sample id."""
    files = storage.list_files(RunPaths(run_dir).assignments)
    table = pa.concat_tables([pq.read_table(pa.BufferReader(storage.read_bytes(uri))) for uri in files])
    table = table.sort_by("sample")
    return np.stack([table[name].to_numpy() for name in table.column_names if name.startswith("label_")])
