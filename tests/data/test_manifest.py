from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycluster.data.manifest import DataSettings, Manifest, build_manifest, read_entries, read_manifest, write_manifest
from raycluster.data.sources.base import even_shards, shards_of_units
from raycluster.types import UserError

CIFAR = Path(__file__).parents[3] / "shared/data/cifar10"


def built(uri: object, **options: object) -> Manifest:
    return build_manifest(DataSettings(uri=str(uri), **options))


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def parquet_of(file: Path, row_group_size: int = 1000, /, **columns: object) -> None:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), file, row_group_size=row_group_size)


def test_shards_of_images_are_even() -> None:
    assert even_shards(2500, 1000) == [(0, 833), (833, 1666), (1666, 2500)]
    assert even_shards(1000, 1000) == [(0, 1000)]
    assert even_shards(1, 1000) == [(0, 1)]


@pytest.mark.parametrize(
    ("sizes", "shards"),
    [
        ([1000] * 3, [(0, 1000), (1000, 2000), (2000, 3000)]),
        ([1200, 300], [(0, 1200), (1200, 1500)]),
        ([100] * 25, [(0, 1000), (1000, 2000), (2000, 2500)]),
        ([300, 800, 150], [(0, 300), (300, 1250)]),
        ([10, 2500, 10], [(0, 10), (10, 843), (843, 1676), (1676, 2510), (2510, 2520)]),
        ([0, 5, 0], [(0, 5)]),
    ],
)
def test_shards_keep_row_groups_whole(sizes: list[int], shards: list[tuple[int, int]]) -> None:
    assert shards_of_units(sizes, 1000) == shards


def test_a_folder_of_classes(classes: Path) -> None:
    manifest = built(classes, shard_size=5)
    assert manifest.num_samples == 12
    assert manifest.shards == [(0, 4), (4, 8), (8, 12)]
    assert manifest.classes == ["cat", "dog", "eel"]
    assert manifest.labels is not None
    for path, label in zip(manifest.paths.to_pylist(), manifest.labels, strict=True):
        assert path.startswith(manifest.classes[label])
    assert len(set(manifest.labels[:4].tolist())) > 1, "classes lie mixed, not one after the other"


def test_the_order_depends_on_the_content_only(classes: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(classes, copy)
    assert built(copy).paths.equals(built(classes).paths)
    assert built(copy).fingerprint == built(classes).fingerprint
    (copy / "eel" / "eel-9.jpg").write_bytes(b"x")
    assert built(copy).fingerprint != built(classes).fingerprint


def test_folders_name_classes_only_where_they_are_siblings(classes: Path) -> None:
    assert built(classes, labels="none").labels is None
    assert built(classes / "cat").labels is None
    with pytest.raises(UserError, match="lie in no folders"):
        built(classes / "cat", labels="folder")
    shutil.copy(classes / "cat" / "cat-0.jpg", classes / "flat.jpg")
    assert built(classes).labels is None, "not every image lies in a folder"
    named = built(classes, labels="folder")
    assert named.labels is not None
    assert named.labels.tolist().count(-1) == 1
    with pytest.raises(UserError, match=r"data\.labels = label, but .* has no columns"):
        built(classes, labels="label")


def test_one_image_is_a_data_set(classes: Path) -> None:
    manifest = built(classes / "cat" / "cat-1.png")
    assert manifest.paths.to_pylist() == ["cat-1.png"]
    assert manifest.entries["container"].to_pylist() == [str(classes / "cat")]


def test_a_list_of_paths(classes: Path, tmp_path: Path) -> None:
    names = ["# comment", "", "images/cat/cat-0.jpg", str(classes / "dog" / "dog-1.png"), "s3://b/eel/x.jpg?region=r"]
    (tmp_path / "list.txt").write_text("\n".join(names))
    manifest = built(tmp_path / "list.txt")
    assert sorted(manifest.paths.to_pylist()) == sorted(names[2:])
    where = dict(zip(manifest.paths.to_pylist(), manifest.entries["container"].to_pylist(), strict=True))
    assert where == {names[2]: str(tmp_path), names[3]: "", names[4]: ""}
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="lists no images"):
        built(tmp_path / "empty.txt")


def test_parquet_with_binary_column_labels_and_paths(tmp_path: Path) -> None:
    labels = pa.array(["b", "a", None, "b"]).dictionary_encode()
    parquet_of(tmp_path / "d" / "1.parquet", 3, image=[b"1", b"2", b"3", b"4"], label=labels, path=list("wxyz"))
    parquet_of(tmp_path / "d" / "2.parquet", 3, image=[b"5"], label=pa.array(["c"]).dictionary_encode(), path=["v"])
    manifest = built(tmp_path / "d")
    assert manifest.classes == ["a", "b", "c"]
    assert manifest.labels is not None
    assert manifest.labels.tolist() == [1, 0, -1, 1, 2]
    assert manifest.paths.to_pylist() == ["w", "x", "y", "z", "v"]
    assert manifest.entries["row"].to_pylist() == [0, 1, 2, 3, 0]
    assert manifest.image_column == "image"
    assert built(tmp_path / "d" / "2.parquet").num_samples == 1
    assert built(tmp_path / "d" / "1*.parquet").num_samples == 4
    assert built(tmp_path / "d", shard_size=2).shards == [(0, 3), (3, 5)]


def test_parquet_of_hugging_face(tmp_path: Path) -> None:
    images = [{"bytes": b"1", "path": "p/one.png"}, {"bytes": b"2", "path": None}]
    table = pa.table({"img": images, "labels": pa.array([1, -1])})
    info = {"info": {"features": {"labels": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "x.parquet")
    manifest = built(tmp_path / "x.parquet")
    assert manifest.image_column == "img"
    assert manifest.paths.to_pylist() == ["p/one.png", "x.parquet:1"]
    assert manifest.classes == ["cat", "dog"]
    assert manifest.labels is not None
    assert manifest.labels.tolist() == [1, -1]


def test_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    parquet_of(tmp_path / "n" / "a.parquet", image=[b"1"] * 4, fine=[10, 9, 100, -1], text=["10", "9", "x", "9"])
    numbers, texts = built(tmp_path / "n", labels="fine"), built(tmp_path / "n", labels="text")
    assert numbers.classes == ["9", "10", "100"]
    assert numbers.labels is not None
    assert numbers.labels.tolist() == [1, 0, 2, -1]
    assert texts.classes == ["9", "10", "x"]
    assert built(tmp_path / "n").labels is None


def test_parquet_errors_list_the_columns(tmp_path: Path) -> None:
    parquet_of(tmp_path / "a.parquet", text=["x"], number=[1.5])
    with pytest.raises(UserError, match=r"no column that holds encoded images.*text \(string\), number \(double\)"):
        built(tmp_path / "a.parquet")
    parquet_of(tmp_path / "b.parquet", left=[b"x"], right=[b"x"], score=[1.5])
    with pytest.raises(UserError, match=r"several columns \(left, right\).*data\.image_column"):
        built(tmp_path / "b.parquet")
    assert built(tmp_path / "b.parquet", image_column="right").image_column == "right"
    with pytest.raises(UserError, match=r"data\.image_column = score is no column"):
        built(tmp_path / "b.parquet", image_column="score")
    with pytest.raises(UserError, match=r"data\.labels = nope is no column"):
        built(tmp_path / "b.parquet", image_column="left", labels="nope")
    with pytest.raises(UserError, match=r"data\.labels = score .* type double"):
        built(tmp_path / "b.parquet", image_column="left", labels="score")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"c\.parquet.*damaged, incomplete"):
        built(tmp_path / "c.parquet")


def test_parquet_files_must_agree(tmp_path: Path) -> None:
    parquet_of(tmp_path / "d" / "1.parquet", image=[b"1"], label=[1])
    parquet_of(tmp_path / "d" / "2.parquet", image=[b"1"])
    with pytest.raises(UserError, match=r"2\.parquet has no column \['label'\] like the files before it"):
        built(tmp_path / "d")


def test_webdataset(tmp_path: Path) -> None:
    members = {"./a/0.jpg": b"00", "a/0.cls": b"7", "a/1.png": b"1", "a/1.cls": b"0", "a/1.txt": b"?", "a/2.webp": b"2"}
    tar_of(tmp_path / "x-0.tar", members)
    tar_of(tmp_path / "x-1.tar", {"b.c/3.jpeg": b"333", "b.c/3.json": b'{"label": 2, "other": [1]}'})
    manifest = built(tmp_path)
    assert manifest.paths.to_pylist() == [
        "x-0.tar/./a/0.jpg",
        "x-0.tar/a/1.png",
        "x-0.tar/a/2.webp",
        "x-1.tar/b.c/3.jpeg",
    ]
    assert manifest.classes == ["0", "2", "7"]
    assert manifest.labels is not None
    assert manifest.labels.tolist() == [2, 0, -1, 1]
    raw = (tmp_path / "x-0.tar").read_bytes()
    rows = manifest.entries.slice(0, 3).to_pylist()
    assert [raw[row["offset"] : row["offset"] + row["size"]] for row in rows] == [b"00", b"1", b"2"]
    assert built(tmp_path, labels="txt").classes == ["?"]
    with pytest.raises(UserError, match=r"data\.labels = other: no image"):
        built(tmp_path, labels="other")


def test_tar_errors(tmp_path: Path) -> None:
    tar_of(tmp_path / "none.tar", {"a.txt": b"x", "b.seg.png": b"x"})
    with pytest.raises(UserError, match=r"holds no images but members \.seg\.png, \.txt"):
        built(tmp_path / "none.tar")
    whole = tar_of(tmp_path / "whole.tar", {f"{index}.jpg": bytes(2000) for index in range(9)}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:5000])
    with pytest.raises(UserError, match=r"cut\.tar is no complete"):
        built(tmp_path / "cut.tar")
    with pytest.raises(UserError, match=r"data\.labels = weight: no image"):
        built(tmp_path / "whole.tar", labels="weight")
    with pytest.raises(UserError, match="no effect on tar files"):
        built(tmp_path / "whole.tar", image_column="image")
    shutil.move(tmp_path / "whole.tar", tmp_path / "packed.tar.gz")
    with pytest.raises(UserError, match=r"must not be compressed"):
        built(tmp_path / "packed.tar.gz")


def test_what_holds_no_images_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing at .*nowhere"):
        built(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no files"):
        built(tmp_path)
    for name in ("a.gif", "b.gif", "c.md", "plain"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"2 x \.gif, 1 x \.md, 1 without extension; wanted \.jpg"):
        built(tmp_path)
    (tmp_path / "d.jpg").write_text("x")
    parquet_of(tmp_path / "e.parquet", image=[b"x"])
    with pytest.raises(UserError, match="holds Parquet files and images"):
        built(tmp_path)
    assert built(tmp_path / "*.jpg").num_samples == 1


def test_the_digits_come_with_the_package() -> None:
    manifest = built("digits")
    assert manifest.num_samples == 1797
    assert manifest.classes == [str(digit) for digit in range(10)]
    with pytest.raises(UserError, match="no effect on digits"):
        built("digits", image_column="x")


def test_what_is_written_is_read_again_shard_by_shard(classes: Path, tmp_path: Path) -> None:
    settings = DataSettings(uri=str(classes), shard_size=5)
    manifest, uri = build_manifest(settings), str(tmp_path / "run" / "manifest.parquet")
    write_manifest(manifest, uri)
    again = read_manifest(uri, settings)
    assert again.entries.to_pylist() == manifest.entries.to_pylist()
    assert (again.shards, again.classes, again.fingerprint) == (manifest.shards, manifest.classes, manifest.fingerprint)
    file = pq.ParquetFile(uri)
    assert file.schema_arrow.names == ["sample", "path", "container", "offset", "size", "row", "label"]
    assert [file.metadata.row_group(shard).num_rows for shard in range(3)] == [4, 4, 4]
    wanted = np.array([11, 2, 2, 0, 9])
    _, entries = read_entries(uri, wanted)
    assert entries["sample"].to_pylist() == wanted.tolist()
    assert entries["path"].to_pylist() == [manifest.paths[int(sample)].as_py() for sample in wanted]


def test_a_manifest_of_other_data_is_noticed(classes: Path, tmp_path: Path) -> None:
    uri = str(tmp_path / "manifest.parquet")
    write_manifest(built(classes), uri)
    for other in ({"uri": "digits"}, {"uri": str(classes), "shard_size": 7}, {"uri": str(classes), "labels": "none"}):
        with pytest.raises(UserError, match=r"was built from .* but the configuration asks for"):
            read_manifest(uri, DataSettings(**other))
    assert read_manifest(uri, DataSettings(uri=str(classes), max_image_pixels=5)).num_samples == 12
    write_manifest(built("digits"), uri)
    assert read_manifest(uri).num_samples == 1797, "a file written anew is read anew"
    with pytest.raises(UserError, match="there is no manifest at"):
        read_manifest(str(tmp_path / "gone.parquet"))
    parquet_of(tmp_path / "other.parquet", x=[1])
    with pytest.raises(UserError, match="but no manifest"):
        read_manifest(str(tmp_path / "other.parquet"))


@pytest.mark.skipif(not CIFAR.is_dir(), reason="CIFAR-10 is not here")
def test_cifar() -> None:
    manifest = built(CIFAR / "train-*.parquet")
    assert manifest.num_samples == 50_000
    assert manifest.labels is not None
    assert np.bincount(manifest.labels).tolist() == [5000] * 10
    assert manifest.shards[0] == (0, 1000)


def test_damaged_manifest_is_named(tmp_path: Path) -> None:
    uri = str(tmp_path / "manifest.parquet")
    write_manifest(build_manifest(DataSettings(uri="digits")), uri)
    content = bytearray((tmp_path / "manifest.parquet").read_bytes())
    content[100] ^= 1
    (tmp_path / "manifest.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the manifest .*manifest\.parquet"):
        read_manifest(uri)
