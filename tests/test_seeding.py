"""Generators follow from the work they are named by, in any order and thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from raycluster.seeding import generator, reseeded_generator


def test_reseeded_generators_draw_the_same_numbers() -> None:
    def draws(work: int) -> bool:
        expected = generator(3, "augment", work, 7)
        found = reseeded_generator(3, "augment", work, 7)
        return found.random() == expected.random() and np.array_equal(
            found.integers(9, size=5), expected.integers(9, size=5)
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(draws, range(400)))
