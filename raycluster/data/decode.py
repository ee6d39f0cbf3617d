"""Decode JPEG, PNG and WebP files to 8-bit RGB."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

T = TypeVar("T")
Box = tuple[float, float, float, float]

_JPEG_SCALES = (2, 4, 8)  # divisors of width and height at which a JPEG decodes faster
_JPEG_GAP = (
    2  # factor left to the antialiasing filter, as in Image.thumbnail; at 1, edges lose 1 to 4 % of their contrast
)
_MARKER, _START_OF_SCAN = 0xFF, 0xDA
_ORIENTATION_TAG = 0x0112
_ORIENTATION_MARKS = (b"Exif\0\0", b"http://ns.adobe.com/xap")
_ORIENTATION_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_FORMATS = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"8BPS": "Photoshop",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"%PDF-": "PDF",
    b"<svg": "SVG",
    b"<?xml": "XML",
    b"version https://git-lfs": "Git LFS pointer",
    b"PK\x03\x04": "ZIP archive",
    b"\x1f\x8b": "gzip file",
}
_MPEG4_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"avif": "AVIF"}
_TRANSPOSES = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class BrokenImage(ValueError):
    """An image that cannot be decoded; the message is the reason."""


class Jpeg:
    """An upright gray or colour JPEG that is not decoded yet; `scale` will divide its width and height."""

    def __init__(self, data: bytes, size: tuple[int, int]) -> None:
        self.data, self.whole, self.scale = data, size, 1

    @property
    def size(self) -> tuple[int, int]:
        """Width and height at this scale."""
        return -(-self.whole[0] // self.scale), -(-self.whole[1] // self.scale)

    def pixels(self) -> NDArray[np.uint8]:
        """(h, w, 3) RGB. Raises BrokenImage."""
        width, height = self.size
        try:
            found: NDArray[np.uint8] = simplejpeg.decode_jpeg(self.data, min_height=height, min_width=width)
        except ValueError:  # Pillow reads some files that TurboJPEG refuses, and names the defect of others
            image = _guarded(JpegImageFile, io.BytesIO(self.data))
            image.draft(image.mode, self.size)
            return np.asarray(rgb(image))
        assert found.shape[:2] == (height, width), f"asked for {height} x {width}, decoded {found.shape}"
        return found


DecodableImage = Image.Image | Jpeg


def decode(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """(h, w, 3) RGB, upright by its EXIF orientation, transparency over white, 16-bit gray scaled to 8 bits.

    Raises BrokenImage for what is empty, truncated, damaged, of another format, or larger than `max_pixels`. JPEGs of
    up to four times as many pixels are decoded at half size.
    """
    return np.asarray(rgb(opened(data, max_pixels=max_pixels)))


def opened(data: bytes, *, max_pixels: int) -> DecodableImage:
    """An image of final size and orientation. Of a plain JPEG only the header is read, see `set_jpeg_scale`.

    Raises BrokenImage like `decode`.
    """
    if not data:
        raise BrokenImage("the file is empty")
    image: DecodableImage = _plain_jpeg(data) or _guarded(_plugin(data), io.BytesIO(data))
    _check_size(image, max_pixels)
    if isinstance(image, Jpeg):
        return image
    whole = rgb(image)  # before the orientation, which PNG may store after the pixels
    orientation = _orientation(image)
    return whole if orientation is None else whole.transpose(orientation)


def set_jpeg_scale(image: DecodableImage, box: Box, size: tuple[int, int]) -> Box:
    """Make a JPEG decode at 1/2, 1/4 or 1/8 if `box` keeps at least twice `size` pixels; -> the box in the result."""
    shrink_factor = min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]) / _JPEG_GAP
    if shrink_factor < 2 or not isinstance(image, Jpeg):
        return box
    before = image.scale
    image.scale = max(scale for scale in _JPEG_SCALES if scale <= shrink_factor * before)
    left, top, right, bottom = (edge * before / image.scale for edge in box)
    return left, top, min(right, image.size[0]), min(bottom, image.size[1])


def rgb(image: DecodableImage) -> Image.Image:
    """Decode the pixels and convert them to mode RGB. Raises BrokenImage."""
    if isinstance(image, Jpeg):
        return Image.fromarray(image.pixels())
    _guarded(image.load)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    return _guarded(_converted, image)


def _check_size(image: DecodableImage, max_pixels: int) -> None:
    """Halve a JPEG that is too large; raise BrokenImage if that does not suffice or cannot be done."""
    width, height = image.size
    if width * height <= max_pixels:
        return
    if isinstance(image, Jpeg):
        image.scale = _JPEG_SCALES[0]
    elif isinstance(image, JpegImageFile):
        image.draft(image.mode, (width // 2, height // 2))
    if image.size[0] * image.size[1] > max_pixels:
        raise BrokenImage(
            f"{width} x {height} pixels exceed data.max_image_pixels = {max_pixels}; scale it down or raise the limit"
        )


def _plain_jpeg(data: bytes) -> Jpeg | None:
    """The image if it is a JPEG that needs neither conversion nor rotation, else None."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        if _may_be_rotated(data) and _orientation(JpegImageFile(io.BytesIO(data))) is not None:
            return None
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except Exception:  # damaged bytes raise almost any exception; Pillow names the defect
        return None
    return Jpeg(data, (width, height)) if colours in ("YCbCr", "Gray", "RGB") else None


def _may_be_rotated(data: bytes) -> bool:
    """Whether a segment before the pixels holds metadata that may name an orientation, or segments are irregular."""
    at = 2
    while data[at] == _MARKER:
        if data[at + 1] == _START_OF_SCAN:
            return False
        if data.startswith(_ORIENTATION_MARKS, at + 4):
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def _plugin(data: bytes) -> Callable[[io.BytesIO], Image.Image]:
    # Image.open would find the same classes, in twice the time on small images.
    if data.startswith(b"\xff\xd8"):
        return JpegImageFile
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile
    raise BrokenImage(f"{_format_name(data)}: only JPEG, PNG and WebP can be read")


def _format_name(data: bytes) -> str:
    # Nothing of an unknown file is shown: a symbolic link may lead to any file of the machine.
    if data[4:8] == b"ftyp":
        return _MPEG4_BRANDS.get(data[8:12], "MPEG-4")
    if data[:64].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "HTML"
    return next((name for magic, name in _FORMATS.items() if data.startswith(magic)), "unknown format")


def _guarded(function: Callable[..., T], *args: object) -> T:
    try:
        return function(*args)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise almost any exception on damaged bytes
        raise BrokenImage(f"{type(error).__name__}: {error}") from error


def _orientation(image: Image.Image) -> Transpose | None:
    if not any(key in image.info for key in _ORIENTATION_KEYS):
        return None
    try:
        return _TRANSPOSES.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # unreadable metadata does not make an image unusable
        return None


def _converted(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        coloured = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(coloured, mask=coloured)
        return white
    return image.convert("RGB")


def _eight_bits(levels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """round(levels / 257) of 16-bit levels; others are clipped to them."""
    gray = np.clip(levels, 0, 65407).astype(np.uint16)  # 65407 and all above become 255
    gray += 128
    gray //= 257
    return gray.astype(np.uint8)
