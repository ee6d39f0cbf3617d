from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raycluster.data.manifest import DataSettings, Manifest, build_manifest, read_manifest, write_manifest


def built(uri: Path, **options: object) -> Manifest:
    return build_manifest(DataSettings(uri=str(uri), **options))


def numbers(folder: Path) -> None:
    """Five Parquet files of 40 rows that hold their number, with classes and folders."""
    folder.mkdir()
    for file in range(5):
        rows = range(40 * file, 40 * file + 40)
        columns = {"image": [b"%d" % row for row in rows], "label": [row % 3 for row in rows]}
        table = pa.table(columns | {"path": [f"{row % 2}/{row}.png" for row in rows]})
        pq.write_table(table, folder / f"{file}.parquet", row_group_size=20)


def test_a_subset_is_drawn_from_all_files_and_smaller_ones_lie_inside(tmp_path: Path) -> None:
    numbers(tmp_path / "d")
    options = {"shard_size": 40}
    whole, larger, smaller = (built(tmp_path / "d", max_samples=count, **options) for count in (None, 100, 30))
    paths = [manifest.paths.to_pylist() for manifest in (whole, larger, smaller)]
    assert [len(some) for some in paths] == [200, 100, 30] and set(paths[2]) < set(paths[1]) < set(paths[0])
    assert paths[1] == [path for path in paths[0] if path in set(paths[1])], "in the order of the source"
    files = np.bincount([int(path.split("/")[1].split(".")[0]) // 40 for path in paths[1]])
    assert files.min() > 10
    labels = dict(zip(paths[0], whole.labels, strict=True))
    assert [labels[path] for path in paths[1]] == larger.labels.tolist()
    assert larger.shards[0][0] == 0 and larger.shards[-1][1] == 100
    assert all(stop - start <= 60 for start, stop in larger.shards) and len(larger.shards) < len(whole.shards)
    assert built(tmp_path / "d", max_samples=100, **options).fingerprint == larger.fingerprint


def test_more_than_there_are_means_all(tmp_path: Path) -> None:
    numbers(tmp_path / "d")
    assert built(tmp_path / "d", max_samples=5000).fingerprint == built(tmp_path / "d").fingerprint


def test_the_manifest_names_the_subset(tmp_path: Path) -> None:
    numbers(tmp_path / "d")
    uri, drawn = str(tmp_path / "manifest.parquet"), DataSettings(uri=str(tmp_path / "d"), max_samples=50)
    write_manifest(build_manifest(drawn), uri)
    assert read_manifest(uri, drawn).num_samples == 50
    assert "max_samples" not in built(tmp_path / "d").source, "manifests of whole sources are what they were"


def test_folders_are_those_of_the_images(classes: Path) -> None:
    manifest = built(classes, max_samples=7)
    assert manifest.labels is not None
    for path, label in zip(manifest.paths.to_pylist(), manifest.labels, strict=True):
        assert path.startswith(manifest.classes[label])
