"""Real images, made on the spot, and an object store in this process."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

Draw = Callable[..., NDArray[np.uint8]]
Encode = Callable[..., bytes]


@pytest.fixture(scope="session")
def draw() -> Draw:
    """(height, width, seed) -> smooth RGB noise, which survives JPEG."""

    def drawn(height: int = 48, width: int = 64, seed: int = 0) -> NDArray[np.uint8]:
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))

    return drawn


@pytest.fixture(scope="session")
def encode() -> Encode:
    """(pixels or image, format, options of Pillow) -> the file."""

    def encoded(image: NDArray[np.uint8] | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
        buffer = io.BytesIO()
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return encoded


@pytest.fixture
def classes(tmp_path: Path, draw: Draw, encode: Encode) -> Path:
    """A folder with 3 classes of 4 images each, and clutter."""
    folder = tmp_path / "images"
    for label, name in enumerate(("cat", "dog", "eel")):
        (folder / name).mkdir(parents=True)
        for index, (kind, suffix) in enumerate((("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("JPEG", "JPEG"))):
            image = encode(draw(seed=10 * label + index), kind)
            (folder / name / f"{name}-{index}.{suffix}").write_bytes(image)
    (folder / "README.md").write_text("clutter")
    (folder / ".hidden.jpg").write_text("clutter")
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """host:port of an S3 server in this process."""
    server_module = pytest.importorskip("moto.server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = server_module.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a new, empty bucket."""
    import http.client

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    for path in ("/moto-api/reset", "/images"):
        connection = http.client.HTTPConnection(s3_server)
        connection.request("POST" if "reset" in path else "PUT", path)
        assert connection.getresponse().status == 200
        connection.close()
    return f"s3://images?endpoint_override={s3_server}&scheme=http"
