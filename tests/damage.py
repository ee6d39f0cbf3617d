"""Seeded damages to the content of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

JSON_VALUES = [None, [], {}, "", "text", -1, 0, 2**70, 1e300, True, [None], {"a": 1}, float("nan"), float("inf")]


def damages(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Truncated, flipped, overwritten, empty and foreign contents."""
    rng = np.random.default_rng(seed)
    yield from (b"", b"\xff\xfe\x00", b"null", b"[]", b"{}", b"0", b'"text"', b"PK\x03\x04")
    for index in range(count - 8):
        data = bytearray(content)
        place = int(rng.integers(len(data)))
        if index % 4 == 0:
            del data[place:]
        elif index % 4 == 1:
            data[place] ^= 1 << int(rng.integers(8))
        elif index % 4 == 2:
            data[place : place + 16] = rng.bytes(16)
        else:
            data[place : place + int(rng.integers(1, 64))] = b""
        yield bytes(data)


def json_damages(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """The same object with another value, or without one, somewhere."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        tree = json.loads(content)
        node, key = tree, None
        while isinstance(node, (dict, list)) and node and (key is None or rng.random() < 0.6):
            parent, key = node, list(node)[int(rng.integers(len(node)))] if isinstance(node, dict) else 0
            node = node[key]
        if rng.random() < 0.3:
            del parent[key]
        else:
            parent[key] = JSON_VALUES[int(rng.integers(len(JSON_VALUES)))]
        yield json.dumps(tree).encode()
