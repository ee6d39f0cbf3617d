from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raycluster.data.epoch_plan import StepRows, from_step, plan_epoch, shard_chunks, split_chunks, steps
from raycluster.types import Chunk, ImageBlock


def blocks(chunks: Iterable[Chunk], rows: int = 3) -> Iterator[ImageBlock]:
    """What a loader would give: pixels that name their visit."""
    for chunk in chunks:
        for start in range(0, len(chunk.samples), rows):
            part = slice(start, start + rows)
            samples = chunk.samples[part]
            images = np.stack([samples, chunk.repeats[part], np.full(len(samples), chunk.epoch)], -1).astype(np.uint8)
            errors = np.full(len(samples), "", np.str_)
            yield ImageBlock(chunk.stream, chunk.start + start, samples, images[:, None, None, :], errors)


def visits(batches: Iterable[dict[int, StepRows]]) -> list[dict[int, list[tuple[int, ...]]]]:
    return [
        {stream: [tuple(i) for i in images[:, 0, 0]] for stream, (_, images, *_) in step.items()} for step in batches
    ]


@st.composite
def plans(draw):
    """(counts, shards, options) of an epoch."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    edges = np.cumsum([0, *sizes]).tolist()
    streams, microbatch = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    counts = np.array(draw(st.lists(st.integers(0, 4), min_size=edges[-1], max_size=edges[-1])), np.int64)
    counts[draw(st.integers(0, edges[-1] - 1))] += -counts.sum() % (streams * microbatch)
    options = {
        "streams": streams,
        "microbatch": microbatch,
        "seed": draw(st.integers(0, 3)),
        "epoch": draw(st.integers(0, 3)),
    }
    return counts, list(pairwise(edges)), options | {"window_shards": draw(st.integers(1, 3))}


def test_a_plan_by_hand() -> None:
    counts = np.array([1, 0, 2, 1, 1, 3])
    chunks = plan_epoch(counts, [(0, 3), (3, 6)], streams=2, microbatch=2, seed=0, epoch=0, window_shards=2)
    assert [(chunk.stream, chunk.start, len(chunk.samples)) for chunk in chunks] == [(0, 0, 4), (1, 0, 4)]
    rows = [{*zip(chunk.samples.tolist(), chunk.repeats.tolist(), strict=True)} for chunk in chunks]
    first, second = {(0, 0), (2, 0), (2, 1)}, {(3, 0), (4, 0), (5, 0), (5, 1), (5, 2)}
    assert rows in (
        [first | {(3, 0)}, second - {(3, 0)}],
        [second - {(5, 2)}, first | {(5, 2)}],
    )


@given(plan=plans())
def test_every_visit_that_was_promised_happens_once(plan) -> None:
    counts, shards, options = plan
    chunks = plan_epoch(counts, shards, **options)
    seen = Counter(
        (sample, repeat)
        for chunk in chunks
        for sample, repeat in zip(chunk.samples.tolist(), chunk.repeats.tolist(), strict=True)
    )
    assert seen == Counter((sample, repeat) for sample, count in enumerate(counts) for repeat in range(count))
    for stream in range(options["streams"]):
        own = plan_epoch(counts, shards, **options, only=[stream])
        assert list(map(repr, own)) == [repr(chunk) for chunk in chunks if chunk.stream == stream]
    assert all(chunk.samples.dtype == np.int64 and chunk.repeats.dtype == np.int32 for chunk in chunks)


@given(plan=plans())
def test_streams_are_equal_and_have_no_gap(plan) -> None:
    counts, shards, options = plan
    length = int(counts.sum()) // options["streams"]
    covered = {stream: 0 for stream in range(options["streams"])} if length else {}
    needed = []
    for chunk in plan_epoch(counts, shards, **options):
        assert chunk.start == covered[chunk.stream]
        assert chunk.epoch == options["epoch"]
        covered[chunk.stream] += len(chunk.samples)
        needed.append((chunk.start // options["microbatch"], chunk.stream, chunk.start))
    assert set(covered.values()) <= {length}
    assert needed == sorted(needed)


@given(plan=plans(), data=st.data())
def test_starting_at_a_step_is_skipping_the_steps_before(plan, data) -> None:
    counts, shards, options = plan
    microbatch, streams = options["microbatch"], range(options["streams"])
    chunks = plan_epoch(counts, shards, **options)
    whole = visits(steps(blocks(chunks), streams, microbatch))
    assert len(whole) == counts.sum() // (len(streams) * microbatch)
    step = data.draw(st.integers(0, len(whole)))
    rest = from_step(chunks, step, microbatch)
    assert visits(steps(blocks(rest), streams, microbatch)) == whole[step:]
    small = split_chunks(rest, data.draw(st.integers(1, 5)), microbatch)
    assert visits(steps(blocks(small), streams, microbatch)) == whole[step:]


@given(plan=plans(), data=st.data())
def test_any_dealing_of_streams_gives_the_same_microbatches(plan, data) -> None:
    counts, shards, options = plan
    microbatch = options["microbatch"]
    chunks = plan_epoch(counts, shards, **options)
    whole = visits(steps(blocks(chunks), range(options["streams"]), microbatch))
    owner = [data.draw(st.integers(0, 2)) for _ in range(options["streams"])]
    together: list[dict[int, list[tuple[int, ...]]]] = [{} for _ in whole]
    for worker in set(owner):
        streams = [stream for stream, other in enumerate(owner) if other == worker]
        mine = [chunk for chunk in chunks if chunk.stream in streams]
        for step, part in enumerate(visits(steps(blocks(mine, rows=2), streams, microbatch))):
            together[step] |= part
    assert together == whole


def test_no_stream_waits_for_more_than_it_holds() -> None:
    """Blocks in the order of the plan suffice for each step as early as possible: little is kept."""
    counts = np.ones(400, np.int64)
    shards = [(start, start + 50) for start in range(0, 400, 50)]
    chunks = plan_epoch(counts, shards, streams=4, microbatch=5, seed=0, epoch=0, window_shards=1)
    arrived: list[int] = []

    def counted() -> Iterator[ImageBlock]:
        for block in blocks(chunks, rows=5):
            arrived.append(len(block.samples))
            yield block

    used = 0
    for step in steps(counted(), range(4), 5):
        used += sum(len(rows.samples) for rows in step.values())
        assert sum(arrived) - used <= 4 * 50


def test_epochs_and_seeds_shuffle_shards_and_rows() -> None:
    counts = np.ones(64, np.int64)
    shards = [(start, start + 16) for start in range(0, 64, 16)]

    def order(seed: int, epoch: int) -> list[int]:
        chunks = plan_epoch(counts, shards, streams=1, microbatch=4, seed=seed, epoch=epoch, window_shards=2)
        return np.concatenate([chunk.samples for chunk in chunks]).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert sorted(np.array(order(0, 0)[:32]) // 16) in [sorted([a] * 16 + [b] * 16) for a in range(4) for b in range(a)]


def test_rows_that_fill_no_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="7 rows do not fill 2 streams with microbatches of 2"):
        plan_epoch(np.ones(7, np.int64), [(0, 7)], streams=2, microbatch=2, seed=0, epoch=0, window_shards=1)


def test_extraction_visits_every_sample_of_its_shard_in_order() -> None:
    first, second = shard_chunks([(0, 3), (3, 5)], epoch=4)
    assert (first.stream, first.start, first.epoch, first.samples.tolist()) == (0, 0, 4, [0, 1, 2])
    assert (second.stream, second.samples.tolist(), second.repeats.tolist()) == (1, [3, 4], [0, 0])


def test_extraction_can_visit_a_sample_several_times() -> None:
    (chunk,) = shard_chunks([(3, 5)], visits=3)
    assert (chunk.samples.tolist(), chunk.repeats.tolist()) == ([3, 3, 3, 4, 4, 4], [0, 1, 2, 0, 1, 2])


def test_a_gap_in_a_stream_is_noticed() -> None:
    chunks = shard_chunks([(0, 6)])
    broken = [block for block in blocks(chunks, rows=2) if block.start != 2]
    with pytest.raises(AssertionError, match="stream 0 got row 4 instead of 2"):
        list(steps(broken, [0], 2))
    with pytest.raises(AssertionError, match="left over"):
        list(steps(blocks(chunks), [0], 4))
