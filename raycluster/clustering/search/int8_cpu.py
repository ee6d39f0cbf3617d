"""The compiled kernel, built from `kernel.c` by the machine's C compiler at first use and kept in a cache folder.

Without a compiler one line is logged, and the torch engine is used instead, with bitwise identical results.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import tempfile
import threading
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering.search.bounds import INFLATE, ROUNDING, rounding_error

PORTABLE, AVX2, AVX512 = 0, 1, 2
SUPPORT_NAMES = {PORTABLE: "portable", AVX2: "AVX2", AVX512: "AVX-512 VNNI"}
# AVX2 adds up two products in 16 bits, which 7-bit centroids never overflow.
_LEVELS = {PORTABLE: 127, AVX2: 63, AVX512: 127}
_PANEL = 64
CANDIDATES = 48
_SOURCE = Path(__file__).with_name("kernel.c")
_FLAGS = ["-O3", "-std=c11", "-fPIC", "-shared", "-ffp-contract=off"]
_FLAGS += [f"-DINFLATE={INFLATE}f", f"-DROUNDING={ROUNDING.hex()}f", f"-DCANDIDATES={CANDIDATES}"]

log = logging.getLogger(__name__)
_compiling = threading.Lock()


class _KernelCentroids(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in ("num_centroids", "dim", "levels")]
        + [(name, ctypes.c_void_p) for name in ("exact", "centre", "offsets")]
        + [(name, ctypes.c_void_p) for name in ("packed", "scales", "norms", "errors", "tops")]
        + [(name, ctypes.c_float) for name in ("reach", "slack")]
    )


class PackedCentroids(NamedTuple):
    """Centroids as the kernel reads them, with the arrays that it points to. support: the instructions it is for.

    max_norm: the largest about the centre.
    """

    structure: _KernelCentroids
    arrays: tuple[NDArray[np.generic], ...]
    support: int
    max_norm: float


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The kernel, compiled if needed; None, with one line in the log, where that fails."""
    kernel = load(_SOURCE, "k-means without its compiled kernel, several times slower, same results")
    return None if kernel is None else _declare(kernel)


def load(source: Path, without: str) -> ctypes.CDLL | None:
    """The library of a C file, compiled if needed; where that fails None, and `without` is logged."""
    try:
        name = f"{source.stem}-{sha256(source.read_bytes() + ' '.join(_FLAGS).encode()).hexdigest()[:16]}.so"
        folder = _cache()
        if folder:
            return _load_from(folder / name, source)
        with tempfile.TemporaryDirectory(prefix="raycluster-") as private:  # a loaded library no longer needs its file
            return _load_from(Path(private) / name, source)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s: %s", without, error)
        return None


def _load_from(path: Path, source: Path) -> ctypes.CDLL:
    with _compiling:  # several threads may need it first
        if not path.exists() or not _is_private(path):
            compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
            if compiler is None:
                raise OSError("no C compiler found (cc, gcc, clang, or what CC names)")
            _compile(compiler, path, source)
        return ctypes.CDLL(str(path))


@lru_cache(maxsize=1)
def support() -> int | None:
    """The vector instructions of this processor, one of AVX512, AVX2, PORTABLE; None without a kernel."""
    kernel = library()
    return None if kernel is None else int(kernel.raycluster_support())


def pack(exact: NDArray[np.float32], centre: NDArray[np.float32], instructions: int) -> PackedCentroids:
    """Pack centroids (K, D) about a centre (D,) near them."""
    num_centroids, dim = exact.shape
    padded = -(-num_centroids // _PANEL) * _PANEL
    offsets, packed = np.empty(num_centroids, np.float32), np.empty((padded, -(-dim // 4) * 4), np.uint8)
    outputs = (offsets, packed, *np.empty((4, padded), np.float32))
    kernel = library()
    assert kernel is not None
    sizes = num_centroids, dim, _LEVELS[instructions]
    arrays = [_at(array) for array in (exact, centre, *outputs)]
    max_norm = float(kernel.raycluster_prepare(*arrays[:2], *sizes, instructions, *arrays[2:]))
    if max_norm < 0:
        raise MemoryError("no memory left for packing centroids")
    structure = _KernelCentroids(*sizes, *arrays, max_norm, rounding_error(dim))
    return PackedCentroids(structure, (exact, centre, *outputs), instructions, max_norm)


def search(
    values: NDArray[np.float32], prepared: PackedCentroids, previous: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], int]:
    """Labels (n,) of the nearest centroids, -1 for ties left to the caller, and how many these are."""
    kernel = library()
    assert kernel is not None
    rows, labels = np.ascontiguousarray(values), np.empty(len(values), np.int64)
    hint = None if previous is None else np.ascontiguousarray(previous, np.int64)
    undecided = kernel.raycluster_search(
        _at(rows),
        len(rows),
        ctypes.byref(prepared.structure),
        None if hint is None else _at(hint),
        prepared.support,
        _at(labels),
    )
    if undecided < 0:
        raise MemoryError("no memory left for the search of nearest centroids")
    return labels, undecided


def nearest(
    values: NDArray[np.float32],
    own: NDArray[np.int64],
    places: NDArray[np.intp],
    prepared: PackedCentroids,
    samples: NDArray[np.int64],
    found: tuple[NDArray[np.int64], NDArray[np.float64]],
) -> None:
    """Improve, in place, the nearest of the rows at some places by centroids; of equal distances the lowest sample id.

    values: (n, D). own: (n,) sample ids, which are not found. samples: (K,) those of the centroids. found: (n, k)
    sample ids and squared distances, nearest first; of what is farther than the last nothing is found.
    """
    kernel = library()
    assert kernel is not None
    arrays = [_at(array) for array in (values, own, places)]
    structure, outputs = ctypes.byref(prepared.structure), [_at(array) for array in found]
    width = found[0].shape[1]
    if kernel.raycluster_nearest(*arrays, len(places), structure, _at(samples), width, prepared.support, *outputs):
        raise MemoryError("no memory left for the search of nearest rows")


def reaching(
    values: NDArray[np.float32], prepared: PackedCentroids, floors: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Per row how many centroids have a score about the centre of at least floors (n,), and which they are.

    Returns counts (n,), -1 for a row that is left to the caller, and columns (n, CANDIDATES), unordered. A few of these
    may miss the floor by rounding.
    """
    kernel = library()
    assert kernel is not None
    rows, limits = np.ascontiguousarray(values), np.ascontiguousarray(floors, np.float32)
    counts, found = np.empty(len(rows), np.int32), np.empty((len(rows), CANDIDATES), np.int32)
    structure = ctypes.byref(prepared.structure)
    arguments = _at(rows), len(rows), structure, _at(limits), prepared.support, _at(counts), _at(found)
    if kernel.raycluster_reaching(*arguments):
        raise MemoryError("no memory left for the search of nearest rows")
    return counts, found


def add_rows(
    values: NDArray[np.float32],
    labels: NDArray[np.int64],
    scale: float,
    totals: NDArray[np.int64],
) -> None:
    """Add round(values * scale) to the totals (K, D) of their labels, in place."""
    kernel = library()
    assert kernel is not None
    rows, ids = np.ascontiguousarray(values), np.ascontiguousarray(labels)
    kernel.raycluster_sums(_at(rows), _at(ids), *rows.shape, scale, support(), _at(totals))


def inertia_sum(
    values: NDArray[np.float32], labels: NDArray[np.int64], scale: float, centroids: NDArray[np.float32]
) -> int:
    """Sum of round((x - c)^2 * scale) over all values, c the centroid of the row's label."""
    kernel = library()
    assert kernel is not None
    rows, ids = np.ascontiguousarray(values), np.ascontiguousarray(labels)
    return int(kernel.raycluster_inertia(_at(rows), _at(ids), *rows.shape, scale, support(), _at(centroids)))


def _at(array: NDArray[Any]) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


def _declare(kernel: ctypes.CDLL) -> ctypes.CDLL:
    pointer, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    kernel.raycluster_prepare.argtypes = [*[pointer] * 2, *[whole] * 4, *[pointer] * 6]
    kernel.raycluster_prepare.restype = ctypes.c_float
    kernel.raycluster_search.argtypes = [pointer, whole, pointer, pointer, whole, pointer]
    kernel.raycluster_search.restype = whole
    kernel.raycluster_nearest.argtypes = [*[pointer] * 3, whole, *[pointer] * 2, whole, whole, *[pointer] * 2]
    kernel.raycluster_nearest.restype = whole
    kernel.raycluster_reaching.argtypes = [pointer, whole, pointer, pointer, whole, pointer, pointer]
    kernel.raycluster_reaching.restype = whole
    kernel.raycluster_sums.argtypes = [pointer, pointer, whole, whole, real, whole, pointer]
    kernel.raycluster_sums.restype = None
    kernel.raycluster_inertia.argtypes = [pointer, pointer, whole, whole, real, whole, pointer]
    kernel.raycluster_inertia.restype = whole
    return kernel


def _cache() -> Path | None:
    """The folder that keeps libraries; None if it cannot be written, or if other users could put a library there."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "raycluster"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        private, writable = _is_private(folder), os.access(folder, os.W_OK)
    except OSError:
        return None
    if not private:
        log.warning(
            "%s can be written by other users: kernels are compiled anew in every process; chmod 700 it", folder
        )
    return folder if private and writable else None


def _is_private(path: Path) -> bool:
    """Whether this user owns a file or folder and no other user may write to it."""
    info = path.stat()
    return info.st_uid == os.getuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _compile(compiler: str, path: Path, source: Path = _SOURCE) -> None:
    """Compile into a temporary file beside `path`, then move it there in one step: many processes may start at once."""
    temporary = path.with_suffix(f".{os.getpid()}.part")
    command = [compiler, *_FLAGS, "-o", str(temporary), str(source), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise OSError(f"{' '.join(command)} failed: {done.stderr.strip()[:300]}")
        temporary.chmod(0o700)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
