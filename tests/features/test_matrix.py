from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from raycluster.features.matrix import LocalFeatures, check_labelled, feature_stats
from raycluster.types import Block, UserError


def _features(num_rows: int, num_blocks: int, dim: int = 3) -> tuple[LocalFeatures, np.ndarray]:
    values = np.random.default_rng(0).standard_normal((num_rows, dim)).astype(np.float32)
    order = np.random.default_rng(1).permutation(num_rows)
    return LocalFeatures([Block(part, values[part]) for part in np.array_split(order, num_blocks)]), values


def _count(block: Block, factor: int) -> tuple[int, np.ndarray]:
    return factor * len(block.samples), np.bincount(block.samples % 7, minlength=7)


def _double(block: Block) -> np.ndarray:
    return np.hstack([block.values, block.values])


def _first_sample(block: Block) -> int:
    return int(block.samples[0])


def _fail(block: Block) -> tuple[int]:
    raise RuntimeError(f"row {block.samples[0]}")


def _threads_inside(block: Block) -> tuple[int]:
    return (torch.get_num_threads(),)


def _maximum(left: tuple[int], right: tuple[int]) -> tuple[int]:
    return (max(left[0], right[0]),)


@pytest.mark.parametrize("num_blocks", [1, 3, 64])
def test_fold_sees_every_row_once(num_blocks: int) -> None:
    features, _ = _features(5000, num_blocks)
    total, histogram = features.fold(_count, 2)
    assert total == 10_000
    assert np.array_equal(histogram, np.bincount(np.arange(5000) % 7))


def test_rows_come_in_the_order_asked_and_repeat() -> None:
    features, values = _features(100, 7)
    wanted = np.array([99, 0, 50, 50, 3])
    assert np.array_equal(features.rows(wanted), values[wanted])
    assert features.rows(np.array([], np.int64)).shape == (0, 3)


def test_map_and_collect_keep_shard_order() -> None:
    features, values = _features(100, 7)
    doubled = features.map(_double)
    assert (doubled.num_rows, doubled.dim) == (100, 6)
    assert np.array_equal(doubled.rows(np.arange(100)), np.hstack([values, values]))
    assert doubled.collect(_first_sample) == features.collect(_first_sample)
    assert len(features.collect(_first_sample)) == 7


def test_a_failure_in_a_function_is_not_swallowed() -> None:
    features, _ = _features(100, 7)
    with pytest.raises(RuntimeError, match="row"):
        features.fold(_fail)
    with pytest.raises(RuntimeError, match="row"):
        features.collect(_fail)


def test_functions_compute_on_one_thread_each_and_leave_the_count_alone() -> None:
    features, _ = _features(100, 7)
    before = torch.get_num_threads()
    assert features.fold(_threads_inside, combine=_maximum) == (1,)
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *seen] == [before, before]


def test_extent_measures_columns_and_accepts_empty_blocks() -> None:
    values = np.array([[1, -2], [3, 0]], np.float16)
    nothing = Block(np.array([], np.int64), np.empty((0, 2), np.float16))
    stats = feature_stats(LocalFeatures([nothing, Block(np.array([4, 5]), values)]))
    assert stats.num_rows == 2
    assert stats.low.tolist() == [1, -2] and stats.high.tolist() == [3, 0]


def test_extent_names_the_samples_that_are_not_finite() -> None:
    values = np.ones((40, 3), np.float32)
    values[[3, 30], 1] = [np.nan, -np.inf]
    features = LocalFeatures([Block(part + 100, values[part]) for part in np.array_split(np.arange(40), 5)[::-1]])
    with pytest.raises(UserError, match=r"2 of 40 rows.*\[103, 130\]"):
        feature_stats(features)


def test_blocks_that_are_no_matrix_are_refused() -> None:
    row = np.ones((1, 2), np.float32)
    with pytest.raises(UserError, match="0 rows"):
        LocalFeatures([])
    with pytest.raises(UserError, match=r"widths \[2, 3\]"):
        LocalFeatures([Block(np.array([0]), row), Block(np.array([1]), np.ones((1, 3), np.float32))])
    with pytest.raises(UserError, match="7 occurs again"):
        LocalFeatures([Block(np.array([7]), row), Block(np.array([7]), row)])
    with pytest.raises(UserError, match="no features of sample 8"):
        LocalFeatures([Block(np.array([7]), row)]).rows(np.array([7, 8]))


def test_labelled_rows_are_checked() -> None:
    values = np.ones((2, 3), np.float32)
    assert check_labelled(values, [0, 4]).tolist() == [0, 4]
    with pytest.raises(UserError, match="N labels"):
        check_labelled(values, [0])
    with pytest.raises(UserError, match="1 of 2 missing"):
        check_labelled(values, [0, -1])
    with pytest.raises(UserError, match="row 1"):
        check_labelled(np.array([[0.0], [np.nan]]), [0, 1])
