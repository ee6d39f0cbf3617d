"""Some images of a source, drawn at random: the same for every run, and for every seed of a run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from raycluster.data.sources.base import Found, shards_of_units
from raycluster.seeding import generator


def draw_subset(found: Found, count: int | None, shard_size: int) -> Found:
    """At most `count` images in the order of the source, all if None; those of a smaller count are among them.

    Which ones depends on the number of images alone. Shards of the source stay together, so that what is read as a
    whole still is.
    """
    total = found.entries.num_rows
    if count is None or count >= total:
        return found
    rows = np.sort(generator(0, "manifest subset", total).permutation(total)[:count])
    edges = np.searchsorted(rows, [*(start for start, _ in found.shards), total])
    return replace(
        found,
        entries=found.entries.take(rows),
        shards=shards_of_units(np.diff(edges).tolist(), shard_size),
        labels=None if found.labels is None else found.labels.take(pa.array(rows)),
        folders=None if found.folders is None else [found.folders[row] for row in rows.tolist()],
    )
