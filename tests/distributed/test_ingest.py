"""Ray Data yields the same blocks, in the same order, as loading them one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from raycluster.data.epoch_plan import from_step, plan_epoch, steps
from raycluster.data.loader import load_chunk
from raycluster.data.manifest import DataSettings, build_manifest, write_manifest
from raycluster.data.transforms import View
from raycluster.distributed.ingest import stream
from raycluster.types import Chunk, ImageBlock, UserError

pytestmark = pytest.mark.ray

SETTINGS = DataSettings(uri="digits", shard_size=200)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> partial[Iterator[ImageBlock]]:
    uri = str(tmp_path_factory.mktemp("digits") / "manifest.parquet")
    write_manifest(build_manifest(SETTINGS), uri)
    view = View(size=16, crop_scale=(0.3, 1.0), flip=0.5)
    return partial(load_chunk, manifest_uri=uri, view=view, seed=0, settings=SETTINGS)


def plan() -> list[Chunk]:
    shards = build_manifest(SETTINGS).shards
    counts = np.ones(1797, np.int64)
    counts[: 1920 - 1797] += 1
    return plan_epoch(counts, shards, streams=4, microbatch=16, seed=0, epoch=1, window_shards=2)


def rows_of(blocks: Iterator[ImageBlock], streams: list[int]) -> list[bytes]:
    return [
        rows[stream][0].tobytes() + rows[stream][1].tobytes()
        for rows in steps(blocks, streams, 16)
        for stream in streams
    ]


def test_same_as_loading_one_after_the_other(ray_cluster: None, load: partial[Iterator[ImageBlock]]) -> None:
    here = rows_of((block for chunk in plan() for block in load(chunk)), [0, 1, 2, 3])
    assert len(here) == 1920 // 16
    assert rows_of(stream(plan(), load), [0, 1, 2, 3]) == here


def test_gradients_arrive_as_they_are(ray_cluster: None, load: partial[Iterator[ImageBlock]]) -> None:
    gradients = partial(load, view=View(size=16, crop_scale=(0.3, 1.0), sobel=True))
    part = plan()[:3]
    here = [block for chunk in part for block in gradients(chunk)]
    there = list(stream(part, gradients))
    assert there[0].images.dtype == np.float16
    for name in ("samples", "images"):
        ours, expected = (np.concatenate([getattr(block, name) for block in blocks]) for blocks in (there, here))
        assert ours.dtype == expected.dtype and np.array_equal(ours, expected)


def test_workers_share_streams_and_start_at_any_step(ray_cluster: None, load: partial[Iterator[ImageBlock]]) -> None:
    whole = rows_of(stream(plan(), load), [0, 1, 2, 3])
    rest = from_step(plan(), 11, 16)
    for streams in ([0, 2], [1], [3]):
        part = rows_of(stream([chunk for chunk in rest if chunk.stream in streams], load), streams)
        expected = [whole[step * 4 + stream] for step in range(11, 30) for stream in streams]
        assert part == expected


def test_user_errors_are_raised_unchanged(ray_cluster: None) -> None:
    with pytest.raises(UserError, match="the bucket is gone"):
        list(stream(plan(), _fail))


def _fail(chunk: Chunk) -> Iterator[ImageBlock]:
    raise UserError("the bucket is gone")
    yield
