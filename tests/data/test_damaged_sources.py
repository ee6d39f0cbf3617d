"""Sources as they are found: files that are none, names that are no text, damaged and hostile archives."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycluster.data.dataset import ensure_manifest
from raycluster.data.loader import load_chunk
from raycluster.data.manifest import DataSettings, Manifest, build_manifest, read_manifest, write_manifest
from raycluster.data.sources.base import entries, repeated
from raycluster.data.transforms import View
from raycluster.types import Chunk, UserError


def built(uri: object, **options: object) -> Manifest:
    return build_manifest(DataSettings(uri=str(uri), **options))


def errors_of(uri: object, folder: Path) -> dict[str, str]:
    """Display name -> error, of all images, read in random order."""
    settings, manifest_uri = DataSettings(uri=str(uri)), str(folder / "manifest.parquet")
    manifest = build_manifest(settings)
    write_manifest(manifest, manifest_uri)
    samples = np.random.default_rng(0).permutation(manifest.num_samples)
    chunk = Chunk(0, 0, 0, samples, np.zeros(len(samples), np.int32))
    blocks = load_chunk(chunk, manifest_uri, View(size=8), seed=0, settings=settings)
    pairs = [(sample, error) for block in blocks for sample, error in zip(block.samples, block.errors, strict=True)]
    return {manifest.paths[sample].as_py(): str(error) for sample, error in pairs}


# ------------------------------------------------------------------------------------------------------------- folders


def test_only_regular_files_of_a_folder_are_images(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(classes)  # the path of a socket may have 107 characters
    os.mkfifo("cat/pipe.png")
    os.symlink("nowhere.jpg", "dog/dangling.jpg")
    os.symlink("self.jpg", "dog/self.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("eel/s.png")
    manifest = built(classes)
    assert manifest.num_samples == 12
    assert manifest.unread_files == {
        "FIFO, socket or device": (2, "cat/pipe.png"),
        "broken symbolic link": (2, "dog/dangling.jpg"),
    }


def test_names_with_newlines_are_images(classes: Path, tmp_path: Path) -> None:
    (classes / "cat" / "cat-0.jpg").rename(classes / "cat" / "cat\n0.jpg")
    assert "cat/cat\n0.jpg" in built(classes).paths.to_pylist()
    assert built(classes / "cat" / "*.jpg").num_samples == 1
    assert errors_of(classes, tmp_path)["cat/cat\n0.jpg"] == ""


def test_each_folder_is_visited_once(classes: Path, tmp_path: Path) -> None:
    before = built(classes).paths
    os.symlink(".", classes / "loop")
    os.symlink("..", classes / "cat" / "up")
    os.symlink("dog", classes / "alias")
    assert built(classes).paths.equals(before)
    shutil.copytree(classes / "eel", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", classes / "b")
    os.symlink(tmp_path / "elsewhere", classes / "a")
    added = set(built(classes).paths.to_pylist()) - set(before.to_pylist())
    assert added == {f"a/eel-{index}.{kind}" for index, kind in enumerate(("jpg", "png", "webp", "JPEG"))}


def test_a_name_that_is_not_utf8_costs_one_image(classes: Path) -> None:
    shutil.copy(classes / "cat" / "cat-0.jpg", os.fsencode(classes / "cat") + b"/caf\xe9.jpg")
    manifest = built(classes)
    assert manifest.num_samples == 12
    assert manifest.unread_files == {"name that is not UTF-8": (1, r"cat/caf\xe9.jpg")}
    assert r"1 name that is not UTF-8 (such as cat/caf\xe9.jpg)" in manifest.unread


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_and_a_file_without_access_cost_their_images(classes: Path) -> None:
    os.chmod(classes / "cat", 0)
    os.chmod(classes / "dog" / "dog-0.jpg", 0)
    for folder in (classes, *list(classes.parents)[:-2]):
        folder.chmod(0o755)
    program = (
        "import os, sys, tempfile\n"
        "from pathlib import Path\n"
        "from test_damaged_sources import built, errors_of\n"
        "os.setuid(65534)\n"
        "print(built(sys.argv[1]).unread_files)\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    print({name: error for name, error in errors_of(sys.argv[1], Path(folder)).items() if error})\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program, str(classes)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    unread, errors = done.stdout.splitlines()
    assert unread == "{'folder without access': (1, 'cat')}"
    assert errors.startswith("{'dog/dog-0.jpg': ") and "Permission denied" in errors


def test_unsupported_images_are_counted_and_reported_once(
    classes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b.tiff", "a.TIFF", "c.heic", "notes.md", ".hidden.gif"):
        (classes / name).write_bytes(b"x")
    settings, uri = DataSettings(uri=str(classes)), str(tmp_path / "manifest.parquet")
    ensure_manifest(uri, settings)
    line = (
        "3 files are not read: 2 .tiff (such as a.TIFF), 1 .heic (such as c.heic); "
        "supported images: .jpg, .jpeg, .png, .webp"
    )
    assert [record.getMessage() for record in caplog.records] == [line]
    assert read_manifest(uri, settings).unread == line
    ensure_manifest(uri, settings)
    assert len(caplog.records) == 1
    assert built(classes / "*" / "*.jpg").unread == ""


def test_a_uri_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for name in ("x", "x.tar", "x.txt"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="FIFO, socket or device"):
            built(tmp_path / name)


# --------------------------------------------------------------------------------------------------------------- lists


def test_entries_of_a_list_that_are_no_files_are_broken_images(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jpg")
    os.mkdir("folder.jpg")
    os.symlink("loop.jpg", "loop.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.png")
    whole = classes / "cat" / "cat-0.jpg"
    odd = ["pipe.jpg", "folder.jpg", "loop.jpg", "s.png", "gone.jpg", "x" * 300, "nul\0.jpg", "nosuch://a/b.jpg"]
    (tmp_path / "list.txt").write_text("\n".join([*odd, "/dev/zero", str(whole)]))
    errors = errors_of("list.txt", tmp_path)
    assert errors.pop(str(whole)) == ""
    assert all(errors.values()), errors
    assert len(errors) == len(odd) + 1


def test_lists_may_begin_with_a_byte_order_mark_and_hold_any_character(classes: Path, tmp_path: Path) -> None:
    name = "line\u2028separator.jpg"
    shutil.copy(classes / "cat" / "cat-0.jpg", tmp_path / name)
    shutil.copy(classes / "cat" / "cat-0.jpg", tmp_path / "first.jpg")
    (tmp_path / "list.txt").write_bytes(f"\ufefffirst.jpg\r\n{name}\r\n".encode())
    assert errors_of(tmp_path / "list.txt", tmp_path) == {"first.jpg": "", name: ""}


# ----------------------------------------------------------------------------------------------------------------- tar


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def member(name: str, content: bytes) -> bytes:
    return header(name, len(content)).tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def sparse_header(name: str, size: int) -> bytes:
    """Of a GNU sparse member without data that unpacks to `size` zeros."""
    raw = bytearray(header(name, 0, tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    raw[483:495] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


END = bytes(1024)


def test_sparse_members_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(sparse_header("a.jpg", 1 << 40) + member("b.jpg", b"b") + END)
    manifest = built(tmp_path / "x.tar")
    assert manifest.paths.to_pylist() == ["x.tar/b.jpg"]
    assert manifest.unread_files == {"sparse tar member": (1, "x.tar/a.jpg")}


@pytest.mark.parametrize(
    "start",
    [
        header("a.jpg", -512).tobuf(tarfile.GNU_FORMAT),
        header("a.jpg", 1 << 40).tobuf(tarfile.GNU_FORMAT),
        header("long", 1 << 33, tarfile.XHDTYPE).tobuf(tarfile.GNU_FORMAT),
        header("long", 1 << 33, tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT),
        header("a.jpg", 0, pax_headers={"size": "-512"}).tobuf(tarfile.PAX_FORMAT),
        header("a.jpg", 0, pax_headers={"GNU.sparse.size": "many"}).tobuf(tarfile.PAX_FORMAT),
        header("a.jpg", 0, pax_headers={"GNU.sparse.map": "1,2,x"}).tobuf(tarfile.PAX_FORMAT),
    ],
    ids=["negative", "beyond the end", "huge attributes", "huge name", "negative by pax", "pax text", "pax map"],
)
def test_damaged_headers_are_named(start: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(member("b.jpg", b"b") + start + member("c.jpg", b"c") + END)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"x\.tar is no complete, uncompressed tar file"):
        built(tmp_path / "x.tar")
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_members_that_are_no_labels_are_unknown(tmp_path: Path) -> None:
    deep, long = b'{"label": ' + b"[" * 100_000, b"7" * 5000
    wrong = [deep, b'{"label": %s}' % long, b'{"label": "%s"}' % long, b'{"label": [1]}', b"[]", b"\xff"]
    parts = [member(f"{index}.jpg", b"x") + member(f"{index}.json", text) for index, text in enumerate(wrong)]
    good = [b"3", b"%d" % 2**70, b"caf\xe9"]
    parts += [member(f"g{index}.jpg", b"x") + member(f"g{index}.cls", text) for index, text in enumerate([*good, long])]
    (tmp_path / "x.tar").write_bytes(b"".join(parts) + END)
    manifest = built(tmp_path / "x.tar")
    assert manifest.labels is not None
    assert manifest.labels.tolist() == [-1] * len(wrong) + [0, 1, 2, -1]
    assert manifest.classes == ["3", str(2**70), "caf\ufffd"]


def test_a_label_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.tar"
    file.write_bytes(member("a.jpg", b"x") + header("a.cls", 1 << 32).tobuf(tarfile.GNU_FORMAT))
    with file.open("r+b") as stream:  # a file with a hole: it takes no space
        stream.truncate(file.stat().st_size + (1 << 32))
        stream.seek(0, io.SEEK_END)
        stream.write(member("b.jpg", b"x") + END)
    tracemalloc.start()
    assert built(file).num_samples == 2
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_an_image_of_gigabytes_is_broken(tmp_path: Path) -> None:
    file = tmp_path / "x.tar"
    file.write_bytes(header("a.jpg", 1 << 32).tobuf(tarfile.GNU_FORMAT))
    with file.open("r+b") as stream:
        stream.truncate(512 + (1 << 32))
        stream.seek(0, io.SEEK_END)
        stream.write(END)
    assert "4294967296 bytes" in errors_of(file, tmp_path)["x.tar/a.jpg"]


def test_member_names_that_are_not_utf8_are_escaped(tmp_path: Path, draw, encode) -> None:
    content = encode(draw())
    info = header("caf\udce9.jpg", len(content)).tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    (tmp_path / "x.tar").write_bytes(info + content + bytes(-len(content) % 512) + END)
    assert errors_of(tmp_path / "x.tar", tmp_path) == {r"x.tar/caf\xe9.jpg": ""}


# ------------------------------------------------------------------------------------------------------------- Parquet


def test_labels_without_sign_and_names_that_are_no_list(tmp_path: Path) -> None:
    labels = pa.array([2**63 + 5, 1, None], pa.uint64())
    table = pa.table({"image": [b"1", b"2", b"3"], "label": labels})
    for names in (5, None, "ab"):
        info = json.dumps({"info": {"features": {"label": {"names": names}}}})
        pq.write_table(table.replace_schema_metadata({"huggingface": info}), tmp_path / "x.parquet")
        manifest = built(tmp_path / "x.parquet")
        assert manifest.classes == ["1", str(2**63 + 5)]
        assert manifest.labels is not None
        assert manifest.labels.tolist() == [1, 0, -1]
    info = json.dumps({"info": {"features": {"label": {"names": ["a", "b"]}}}})
    pq.write_table(table.replace_schema_metadata({"huggingface": info}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=f"label {2**63 + 5} exceeds the 2 class names"):
        built(tmp_path / "x.parquet")


@pytest.mark.parametrize("damaged", ["header", "compressed data"])
def test_a_damaged_row_group_costs_its_images(damaged: str, tmp_path: Path, draw, encode) -> None:
    images = [encode(draw(seed=seed)) for seed in range(30)]
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": images}), file, row_group_size=10, compression="zstd", use_dictionary=False)
    content = file.read_bytes()
    start = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    if damaged == "compressed data":
        start = content.index(b"\x28\xb5\x2f\xfd", start)  # the magic number of a zstd frame
    file.write_bytes(content[:start] + b"\xff" * 16 + content[start + 16 :])
    errors = errors_of(file, tmp_path)
    broken = sorted(int(name.rpartition(":")[2]) for name, error in errors.items() if error)
    assert broken == list(range(10, 20))


# ------------------------------------------------------------------------------------------------------------ manifest


@pytest.mark.parametrize(
    "damage",
    [
        {"starts": [0, 8, 4]},
        {"starts": [0, 4]},
        {"starts": None},
        {"classes": [1, 2, 3]},
        {"classes": 5},
        {"source": []},
        {"unread": {"x": 1}},
        {"unread": 3},
        {"window_shards": 0},
        {"other": 1},
        "[]",
        "{",
        "[" * 100_000,
    ],
    ids=lambda damage: str(damage)[:20],
)
def test_a_damaged_header_is_named(damage: dict[str, object] | str, classes: Path, tmp_path: Path) -> None:
    uri = str(tmp_path / "manifest.parquet")
    write_manifest(built(classes, shard_size=4), uri)
    table = pq.read_table(uri)
    stored = json.loads(table.schema.metadata[b"raycluster"])
    text = json.dumps(stored | damage) if isinstance(damage, dict) else damage
    pq.write_table(table.replace_schema_metadata({"raycluster": text}), uri, row_group_size=4)
    with pytest.raises(UserError, match="is damaged, or of another version; delete it"):
        read_manifest(uri)


def test_manifests_of_earlier_versions_are_read(classes: Path, tmp_path: Path) -> None:
    uri = str(tmp_path / "manifest.parquet")
    manifest = built(classes)
    write_manifest(manifest, uri)
    table = pq.read_table(uri)
    stored = json.loads(table.schema.metadata[b"raycluster"])
    header = json.dumps({key: stored[key] for key in ("starts", "classes", "source", "image_column")})
    table = table.set_column(1, "path", table["path"].cast(pa.string()))
    pq.write_table(table.replace_schema_metadata({"raycluster": header}), uri)
    again = read_manifest(uri)
    assert (again.fingerprint, again.window_shards, again.unread) == (manifest.fingerprint, 1, "")
    assert again.paths.type == pa.large_string()


@pytest.mark.parametrize("source", ["folder", "list", "parquet", "paths in parquet", "tar", "digits"])
def test_paths_have_offsets_of_64_bits(source: str, classes: Path, tmp_path: Path) -> None:
    uri = {"folder": str(classes), "digits": "digits"}.get(source, str(tmp_path / f"x.{source.split()[-1]}"))
    if source == "list":
        uri = str(tmp_path / "x.txt")
        Path(uri).write_text(str(classes / "cat" / "cat-0.jpg"))
    elif source == "tar":
        Path(uri).write_bytes(member("a.jpg", b"x") + END)
    elif source.endswith("parquet"):
        pq.write_table(pa.table({"image": [b"1"]} | ({"path": ["p"]} if " " in source else {})), uri)
    manifest = built(uri)
    write_manifest(manifest, str(tmp_path / "manifest.parquet"))
    again = read_manifest(str(tmp_path / "manifest.parquet"))
    assert [one.entries["path"].type for one in (manifest, again)] == [pa.large_string()] * 2
    assert again.paths.type == pa.large_string()


@pytest.mark.slow
def test_paths_of_more_than_two_gibibytes() -> None:
    count = 1100
    part = entries(["x" * (1 << 20)] * count, repeated(["/data"], [count]))
    paths = Manifest(pa.concat_tables([part, part]), [(0, 2 * count)], [], {}).paths
    assert len(paths) == 2 * count
    assert paths.nbytes > 1 << 31
    assert len(paths[2 * count - 1].as_py()) == 1 << 20
