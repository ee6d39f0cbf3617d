from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raycluster.data.decode import BrokenImage, decode, opened, rgb, set_jpeg_scale
from raycluster.data.manifest import DataSettings

LARGE = 10_000_000


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return float(np.abs(a.astype(int) - b).mean()) < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_colour_of_each_format(kind: str, draw, encode) -> None:
    pixels = draw()
    assert close(decode(encode(pixels, kind, quality=98), max_pixels=LARGE), pixels)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *(("L", "JPEG"), ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("LA", "PNG")),
        *(("RGBA", "PNG"), ("RGBA", "WEBP"), ("CMYK", "JPEG"), ("I;16", "PNG")),
    ],
)
def test_every_mode_becomes_what_it_looks_like(mode: str, kind: str, draw, encode) -> None:
    original = Image.fromarray(draw())
    if mode == "I;16":
        image = Image.fromarray(np.asarray(original.convert("L")).astype(np.uint16) * 257)
    else:
        image = original.convert(mode)
    looks = original.convert("L") if mode in ("L", "LA", "I;16") else original.convert(mode)
    options = {"quality": 98} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    pixels = decode(encode(image, kind, **options), max_pixels=LARGE)
    assert pixels.shape == (48, 64, 3)
    assert pixels.dtype == np.uint8
    assert close(pixels, np.asarray(looks.convert("RGB")))


def test_sixteen_bits_are_scaled_not_cut(encode) -> None:
    levels = np.array([[0, 255, 256, 1000, 32768, 65407, 65535]], np.uint16)
    pixels = decode(encode(Image.fromarray(levels), "PNG"), max_pixels=LARGE)
    assert pixels[0, :, 0].tolist() == np.round(levels[0] / 257).astype(int).tolist()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_lies_over_white(kind: str, encode) -> None:
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    pixels = decode(encode(image, kind, **options), max_pixels=LARGE)
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[0, 1].tolist() == [127, 127, 127]
    assert pixels[1, 3].tolist() == [255, 255, 255]


def test_a_transparent_palette_colour_lies_over_white(encode) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    pixels = decode(encode(image, "PNG", transparency=0), max_pixels=LARGE)
    assert pixels.tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_rotated_upright(kind: str, orientation: int, draw, encode) -> None:
    upright = Image.fromarray(draw(48, 64))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, kind, exif=exif, quality=98)
    assert close(decode(data, max_pixels=LARGE), np.asarray(upright))
    assert opened(data, max_pixels=LARGE).size == (64, 48)


def test_unreadable_metadata_does_not_cost_the_image(draw, encode) -> None:
    data = encode(draw(), exif=b"Exif\x00\x00garbage" * 3)
    assert decode(data, max_pixels=LARGE).shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"GIF89a" + bytes(20), "GIF: only JPEG, PNG and WebP can be read"),
        (b"\n<!DOCTYPE html><html>", "HTML: only JPEG, PNG and WebP can be read"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "HEIC: only JPEG, PNG and WebP can be read"),
        (b"II*\0" + bytes(20), "TIFF: only JPEG, PNG and WebP can be read"),
        (b"root:x:0:0:secret", "unknown format: only JPEG, PNG and WebP can be read"),
    ],
)
def test_other_files_are_refused_by_format_without_their_content(data: bytes, reason: str) -> None:
    with pytest.raises(BrokenImage) as caught:
        decode(data, max_pixels=LARGE)
    assert str(caught.value) == reason


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_too_many_pixels_are_refused(kind: str, draw, encode) -> None:
    with pytest.raises(BrokenImage, match=r"64 x 48 pixels exceed data.max_image_pixels = 3071"):
        decode(encode(draw(), kind), max_pixels=64 * 48 - 1)
    assert decode(encode(draw(), kind), max_pixels=64 * 48).shape == (48, 64, 3)


@pytest.mark.parametrize("before", [b"", b"\xff\xfe\x00\x06note", b"\xff" * 3], ids=["nothing", "comment", "padding"])
def test_the_orientation_is_found_in_any_segment(before: bytes, draw, encode) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(draw(20, 30), exif=exif)
    data = data[:2] + before + data[2:]
    assert decode(data, max_pixels=LARGE).shape == (30, 20, 3)


@pytest.mark.parametrize("orientation", [1, 6])
def test_jpegs_with_too_many_pixels_are_decoded_at_half_size(orientation: int, draw, encode) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = draw(96, 128)
    data = encode(pixels, exif=exif, quality=98)
    whole, half = decode(data, max_pixels=128 * 96), decode(data, max_pixels=64 * 48)
    assert whole.shape[:2] == ((96, 128) if orientation == 1 else (128, 96))
    assert close(half, np.asarray(Image.fromarray(whole).reduce(2)))
    with pytest.raises(BrokenImage, match=r"128 x 96 pixels exceed data.max_image_pixels = 3071"):
        decode(data, max_pixels=64 * 48 - 1)


def test_a_halved_jpeg_is_scaled_further_for_a_small_view(draw, encode) -> None:
    data = encode(draw(480, 640), quality=98)
    for size, expected in ((100, (320, 240)), (60, (160, 120)), (30, (80, 60))):
        image = opened(data, max_pixels=320 * 240)
        assert image.size == (320, 240)
        box = set_jpeg_scale(image, (80, 0, 320, 240), (size, size))
        assert rgb(image).size == expected
        assert np.allclose(np.array(box) / expected[0], np.array((80, 0, 320, 240)) / 320)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("RGBA", "WEBP"), ("RGB", "JPEG")]
)
def test_decoding_takes_at_most_16_bytes_a_pixel(mode: str, kind: str, tmp_path: Path, encode) -> None:
    side = 2500
    image = Image.fromarray(np.zeros((side, side), np.uint16)) if mode == "I;16" else Image.new(mode, (side, side))
    (tmp_path / "image").write_bytes(encode(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    script = f"""if True:
        import resource, sys
        from raycluster.data.decode import decode
        decode({encode(Image.new(mode, (8, 8)), kind)!r}, max_pixels=64)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        decode(open(sys.argv[1], "rb").read(), max_pixels={side**2})
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", script, str(tmp_path / "image")]
    used = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(used) * 1024 / side**2 < 17


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    def piece(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)  # less than Pillow's own limit
    bomb = b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", header) + piece(b"IDAT", zlib.compress(b"")) + piece(b"IEND", b"")
    with pytest.raises(BrokenImage, match=r"13000 x 13000 pixels exceed data.max_image_pixels = 64000000"):
        decode(bomb, max_pixels=DataSettings(uri="x").max_image_pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_no_damage_causes_anything_but_broken_image(kind: str, draw, encode) -> None:
    data = encode(draw(), kind)
    for length in range(1, len(data) - 20, max(1, len(data) // 40)):
        with pytest.raises(BrokenImage):
            decode(data[:length], max_pixels=LARGE)
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 8):
            damaged[position] = rng.integers(256)
        try:
            assert decode(bytes(damaged), max_pixels=LARGE).ndim == 3
        except BrokenImage as error:
            assert str(error)


def test_a_jpeg_decodes_itself_smaller_only_if_nothing_is_lost(draw, encode) -> None:
    data = encode(draw(480, 640), quality=98)
    for box, size, expected in (
        ((0, 0, 640, 480), (50, 50), (160, 120)),
        ((0, 0, 640, 480), (160, 120), (320, 240)),
        ((0, 0, 640, 480), (161, 120), (640, 480)),
        ((100, 100, 300, 300), (50, 50), (320, 240)),
        ((100, 100, 300, 299), (50, 50), (640, 480)),
    ):
        image = opened(data, max_pixels=LARGE)
        scaled = set_jpeg_scale(image, box, size)
        small = rgb(image)
        assert small.size == expected
        assert np.allclose(np.array(scaled) / expected[0], np.array(box) / 640)
        part = Image.fromarray(draw(480, 640)).resize(size, Image.Resampling.BILINEAR, box)
        assert close(np.asarray(small.resize(size, Image.Resampling.BILINEAR, scaled)), np.asarray(part))


def test_what_cannot_be_decoded_smaller_stays_as_it_is(draw, encode) -> None:
    image = opened(encode(draw(480, 640), "PNG"), max_pixels=LARGE)
    assert set_jpeg_scale(image, (0, 0, 640, 480), (10, 10)) == (0, 0, 640, 480)
    assert rgb(image).size == (640, 480)


def test_a_camera_file_with_several_images_gives_the_first(draw, encode) -> None:
    buffer = io.BytesIO()
    first, second = (Image.fromarray(draw(seed=seed)) for seed in (1, 2))
    first.save(buffer, "MPO", save_all=True, append_images=[second], quality=98)
    assert close(decode(buffer.getvalue(), max_pixels=LARGE), draw(seed=1))
