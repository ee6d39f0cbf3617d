"""Random generators keyed by the work, not by the worker, so that results do not depend on the number of workers."""

from __future__ import annotations

import struct
import threading
from hashlib import blake2b
from typing import Any

import numpy as np


def _digest(seed: int, purpose: str, work: tuple[int, ...], size: int) -> bytes:
    return blake2b(
        struct.pack(f"<{len(work) + 1}q", seed, *work), digest_size=size, person=purpose.encode()[:16]
    ).digest()


def seed_for(seed: int, purpose: str, *work: int) -> int:
    """A 63-bit seed for other generators (torch, faiss), e.g. ``seed_for(0, "head", round)``."""
    return int.from_bytes(_digest(seed, purpose, work, 8), "little") >> 1


def generator(seed: int, purpose: str, *work: int) -> np.random.Generator:
    """An independent generator for one unit of work, e.g. ``generator(0, "augment", epoch, sample, repeat)``.

    seed: of the run. purpose: at most 16 bytes. work: integers that identify the unit.
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(seed, purpose, work, 16), "little")))


class _Reused(threading.local):
    def __init__(self) -> None:
        self.bits = np.random.Philox(key=0)
        self.generator = np.random.Generator(self.bits)
        self.state: Any = self.bits.state


_REUSED = _Reused()


def reseeded_generator(seed: int, purpose: str, *work: int) -> np.random.Generator:
    """The numbers of `generator` in an eighth of the time: an object of this thread that the next call seeds again."""
    state = _REUSED.state
    state["state"]["key"] = np.frombuffer(_digest(seed, purpose, work, 16), "<u8")
    _REUSED.bits.state = state
    return _REUSED.generator
