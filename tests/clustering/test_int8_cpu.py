"""The compiled kernel against float64, for every instruction set that this processor has."""

from __future__ import annotations

import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.clustering.search import int8_cpu
from raycluster.clustering.search.assign import assign, nearest, resolve_engine
from raycluster.clustering.search.centroids import prepare
from raycluster.features.matrix import LocalFeatures
from raycluster.types import Block
from tests.clustering.nasty import KINDS, naive, problem

SUPPORT = int8_cpu.support()
pytestmark = pytest.mark.skipif(SUPPORT is None, reason="needs a C compiler")
PROCESSORS = [level for level in (int8_cpu.PORTABLE, int8_cpu.AVX2, int8_cpu.AVX512) if level <= (SUPPORT or 0)]


@pytest.fixture(params=PROCESSORS, ids=lambda level: int8_cpu.SUPPORT_NAMES[level])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(int8_cpu, "support", lambda: request.param)
    return int(request.param)


@pytest.mark.parametrize("dim", [1, 3, 16, 31, 70, 257])
@pytest.mark.parametrize("num_centroids", [1, 2, 63, 64, 65, 200])
def test_labels_are_those_of_float64(processor: int, dim: int, num_centroids: int) -> None:
    rng = np.random.default_rng(dim * num_centroids)
    values = rng.standard_normal((120, dim)).astype(np.float32)
    centroids = (values[rng.integers(120, size=num_centroids)] * 0.7).astype(np.float32)
    wanted = naive(values, centroids)
    prepared = prepare(centroids)
    assert np.array_equal(assign(values, prepared, "int8"), wanted)
    for hint in (wanted, np.full(120, -1), rng.integers(-5, num_centroids + 5, 120)):
        assert np.array_equal(assign(values, prepared, "int8", hint), wanted)


@settings(max_examples=300)
@given(st.data())
def test_nasty_rows_and_centroids(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    num_rows, num_centroids, dim = (data.draw(st.integers(1, most)) for most in (40, 150, 40))
    values, centroids = problem(rng, num_rows, num_centroids, dim, data.draw(st.sampled_from(KINDS)))
    if data.draw(st.booleans()):
        values *= (10.0 ** rng.integers(-4, 5, size=(num_rows, 1))).astype(np.float32)
    prepared = prepare(centroids)
    labels = assign(values, prepared, "int8")
    assert np.array_equal(labels, assign(values, prepared, "torch"))
    assert np.array_equal(labels, naive(values, centroids))


def test_more_candidates_than_capacity(processor: int) -> None:
    rng = np.random.default_rng(0)
    centroids = (1 + 1e-4 * rng.standard_normal((300, 8))).astype(np.float32)
    centroids[0] = -1
    values = (1 + 1e-4 * rng.standard_normal((100, 8))).astype(np.float32)
    assert np.array_equal(assign(values, prepare(centroids), "int8"), naive(values, centroids))


@pytest.mark.parametrize("factor", [1e-38, 1e-20, 1e20, 1e37])
def test_values_that_8_bits_do_not_cover(processor: int, factor: float) -> None:
    rng = np.random.default_rng(0)
    values, centroids = (rng.standard_normal((size, 5)).astype(np.float32) * np.float32(factor) for size in (50, 9))
    with np.errstate(over="ignore"):
        assert np.array_equal(nearest(values, centroids, engine="int8")[0], naive(values, centroids))


def test_sums_and_inertia_are_those_of_numpy(processor: int) -> None:
    values = np.random.default_rng(0).standard_normal((3000, 37)).astype(np.float32)
    features = LocalFeatures([Block(np.arange(3000), values)])
    compiled, plain = (kmeans(features, 30, iterations=6, engine=engine) for engine in ("int8", "torch"))  # type: ignore[arg-type]
    assert compiled.engine == "int8" and plain.engine == "torch"
    assert compiled.centroids.tobytes() == plain.centroids.tobytes()
    assert compiled.inertia == plain.inertia and np.array_equal(compiled.labels, plain.labels)


def test_without_a_compiler_torch_is_used_and_one_line_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    int8_cpu.library.cache_clear()
    int8_cpu.support.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert resolve_engine("auto") == resolve_engine("int8") == "torch"
            values = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
            assert np.array_equal(assign(values, prepare(values[:5]), "int8"), naive(values, values[:5]))
        assert len(caplog.records) == 1 and "no C compiler found" in caplog.text
    finally:
        monkeypatch.undo()
        int8_cpu.library.cache_clear()
        int8_cpu.support.cache_clear()


def test_threads_that_need_a_library_first_compile_it_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "answer.c"
    source.write_text("int answer(void) { return 42; }")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: int8_cpu.load(source, "without"), range(8)))
    assert all(library is not None and library.answer() == 42 for library in found)
    assert len(list((tmp_path / "cache" / "raycluster").iterdir())) == 1


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """A C file, and a foreign file at the place of its cached library."""
    source = tmp_path / "answer.c"
    source.write_text("int answer(void) { return 42; }")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert int8_cpu.load(source, "without") is not None
    (library,) = (tmp_path / "cache" / "raycluster").iterdir()
    library.unlink()  # it is mapped, and must not be written over
    library.write_bytes(b"planted")
    return source, library


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707])
def test_a_cache_folder_that_others_may_write_to_is_not_trusted(
    planted: tuple[Path, Path], caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    source, library = planted
    library.chmod(0o700)
    library.parent.chmod(mode)
    with caplog.at_level(logging.WARNING):
        found = int8_cpu.load(source, "without")
    assert found is not None and found.answer() == 42 and "can be written by other users" in caplog.text
    assert library.read_bytes() == b"planted"
    assert sorted(path.name for path in source.parent.iterdir()) == ["answer.c", "cache"]


def test_a_library_that_others_may_write_to_is_compiled_again(planted: tuple[Path, Path]) -> None:
    source, library = planted
    library.chmod(0o770)
    found = int8_cpu.load(source, "without")
    assert found is not None and found.answer() == 42
    assert library.stat().st_mode & 0o777 == 0o700 and library.parent.stat().st_mode & 0o777 == 0o700


def test_a_broken_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(int8_cpu, "_FLAGS", ["--no-such-flag"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(OSError, match="no-such-flag"):
        int8_cpu._compile("cc", tmp_path / "kernel.so")
    assert list(tmp_path.iterdir()) == []
