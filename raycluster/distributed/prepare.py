"""Resized Parquet shards, written by Ray Data with one task per shard."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any

import ray
from pydantic import Field
from ray.data import DataContext
from tqdm import tqdm

from raycluster.config import NonEmpty, settings
from raycluster.data.manifest import DataSettings, build_manifest, write_manifest
from raycluster.data.resize import prepare_shard
from raycluster.distributed.errors import user_errors
from raycluster.distributed.ingest import quiet_context
from raycluster.distributed.session import ray_session
from raycluster.io import storage
from raycluster.types import UserError


@settings
class PrepareSettings:
    """Input and output of `prepare`.

    data: the images, as in a run. out: folder or URI of the new shards; it must be empty. image_size: length of the
    short side in pixels; smaller images keep their size.
    """

    data: DataSettings
    out: NonEmpty
    image_size: Annotated[int, Field(ge=8)] = 256


def prepare(config: PrepareSettings) -> str:
    """Write the shards; returns a summary for the user.

    Raises UserError if more images are broken than data.max_broken_fraction allows, or if `out` is not empty.
    """
    manifest = build_manifest(config.data)
    manifest_uri = storage.join(config.out, "_source", "manifest.parquet")
    _check_empty(config.out, manifest_uri)
    write_manifest(manifest, manifest_uri)
    task = partial(_prepare, manifest_uri=manifest_uri, out=config.out, image_size=config.image_size, data=config.data)
    with ray_session(), DataContext.current(quiet_context()), user_errors():
        items = [{"shard": shard} for shard in range(len(manifest.shards))]
        done = ray.data.from_items(items, override_num_blocks=len(items)).map(task).iter_rows()
        rows = list(tqdm(done, total=len(items), desc="shards", leave=False, disable=None))
    storage.delete(storage.join(config.out, "_source"))
    broken = {path: reason for row in rows for path, reason in json.loads(row["broken"]).items()}
    lines = "".join(json.dumps({"path": path, "reason": reason}) + "\n" for path, reason in sorted(broken.items()))
    storage.write_bytes(storage.join(config.out, "skipped.jsonl"), lines.encode())
    if len(broken) > config.data.max_broken_fraction * manifest.num_samples:
        raise UserError(
            f"{len(broken)} of {manifest.num_samples} images could not be read, more than data.max_broken_fraction = "
            f"{config.data.max_broken_fraction} allows; see {storage.join(config.out, 'skipped.jsonl')}; "
            "the shards hold the other images and can be used"
        )
    images, size = sum(row["images"] for row in rows), sum(row["bytes"] for row in rows)
    return (
        f"{images} images in {len(rows)} shard{'s' * (len(rows) > 1)}, {size / 1e6:.1f} MB, {len(broken)} skipped; "
        f"pre-train with data.uri={config.out}"
    )


def _check_empty(out: str, manifest_uri: str) -> None:
    """Refuse a folder with other files, whose shards would be read as part of the result; clear an interrupted one."""
    there = storage.list_files(out) if storage.exists(out) else []
    if there and not storage.exists(manifest_uri):
        raise UserError(f"out = {out} already holds {len(there)} files, such as {there[0]}; choose an empty folder")
    for file in there:
        storage.delete(file)


def _prepare(
    row: dict[str, Any], *, manifest_uri: str, out: str, image_size: int, data: DataSettings
) -> dict[str, Any]:
    done = prepare_shard(manifest_uri, row["shard"], out, image_size, settings=data)
    return {"images": done.images, "bytes": done.bytes, "broken": json.dumps(done.broken)}
