"""Images: from the bytes of a JPEG, PNG or WebP file to square RGB arrays."""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image

from crossguard.configs.schema.encoders import CROP, STRETCH

# Larger images are refused before they are decoded (Pillow's own limit): a small file can unpack to gigabytes.
MAX_PIXELS = 89_478_485
FORMATS = ("JPEG", "PNG", "WEBP")
JPEG_MAGIC = b"\xff\xd8\xff"
START_OF_SCAN = b"\xda"
# libjpeg's warnings that mean lost picture; Pillow would fill the hole with grey and say nothing.
JPEG_DAMAGE = ("premature end", "bad Huffman")
EXIF_ORIENTATION = 0x0112
# EXIF orientation -> (transpose first, then flip upside down, then flip left to right); CIPA DC-008, tag 274.
ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class MediaError(Exception):
    """An image that cannot be decoded; the message is the reason and holds nothing of its content."""


def decode_image(data: bytes, size: int, resize: str = STRETCH) -> np.ndarray:
    """Decode an image and make it a square by antialiased bilinear resampling.

    The image is turned as its EXIF orientation says, since that is how people see it. Transparency is laid over white;
    of an animation the first frame is taken.

    Args:
        data: the file's bytes.
        size: side S of the result in pixels.
        resize: "stretch" the whole image, or "crop" its middle: the largest square there.

    Returns:
        uint8[3, S, S], RGB; a view of [S, S, 3], not contiguous: collating copies it into place.

    Raises:
        MediaError: truncated, damaged, of another format, or too large.
    """
    pixels = _decode_jpeg(data, size) if data.startswith(JPEG_MAGIC) else _decode_with_pillow(data)
    square = _resized(pixels, size, crop=resize == CROP)
    return _oriented(square, _orientation(data)).transpose(2, 0, 1)


def check_image(data: bytes) -> str | None:
    """Why an image cannot be used, or None when it can. All of the file is decoded: a truncated one is found."""
    try:
        decode_image(data, size=1)
    except MediaError as error:
        return str(error)
    return None


def _decode_jpeg(data: bytes, size: int) -> np.ndarray | Image.Image:
    """Decode at the smallest of libjpeg's scales that still covers `size`: several times faster than in full."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(height, width)
        decoded: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=size, min_width=size)
        return decoded
    except ValueError as error:
        if any(damage in str(error) for damage in JPEG_DAMAGE):
            raise MediaError(f"damaged or truncated image ({error})") from None
        # Unusual colour spaces and harmless irregularities: Pillow decides.
        return _decode_with_pillow(data)


def _decode_with_pillow(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(image.height, image.width)
            image.load()
            return _to_rgb(image)
    except Image.UnidentifiedImageError:
        raise MediaError("not a JPEG, PNG or WebP image") from None
    except Image.DecompressionBombError:
        raise MediaError(f"more than {MAX_PIXELS} pixels") from None
    except MediaError:
        raise
    except Exception as error:  # Pillow raises errors of many types on damaged files
        raise MediaError(f"damaged or truncated image ({type(error).__name__})") from None


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise MediaError(f"{width} x {height} pixels, the limit is {MAX_PIXELS} in all")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip instead of scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _resized(pixels: np.ndarray | Image.Image, size: int, crop: bool) -> np.ndarray:
    """uint8[S, S, 3]. What libjpeg has scaled to the size already is not touched again."""
    if isinstance(pixels, np.ndarray):
        if pixels.shape[:2] == (size, size):
            return pixels
        pixels = Image.fromarray(pixels)
    width, height = pixels.size
    beside = max(width - height, 0) / 2 if crop else 0
    above = max(height - width, 0) / 2 if crop else 0
    box = (beside, above, width - beside, height - above)
    # A reducing gap of 2 shrinks very large images by whole factors first, at the same quality to the eye.
    return np.asarray(pixels.resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=2.0))


def _orientation(data: bytes) -> int:
    """The EXIF orientation, 1 … 8; 1 is upright. Only files with an EXIF block are opened a second time."""
    if not _has_exif(data):
        return 1
    try:
        return int(Image.open(io.BytesIO(data), formats=FORMATS).getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block says nothing about the image
        return 1


def _has_exif(data: bytes) -> bool:
    if not data.startswith(JPEG_MAGIC):
        return b"eXIf" in data or b"EXIF" in data
    # Segments of a JPEG, up to its pixels: 0xFF, what it is, bytes that follow (ITU-T T.81, B.1.1.4). Searching all of
    # the file takes a sixth of the time of decoding it.
    start = 2
    while data[start : start + 1] == b"\xff" and data[start + 1 : start + 2] != START_OF_SCAN:
        if data[start + 4 : start + 10] == b"Exif\0\0":
            return True
        fill = data[start + 1 : start + 2] == b"\xff"  # one more 0xFF before the marker
        start += 1 if fill else 2 + int.from_bytes(data[start + 2 : start + 4])
    return False


def _oriented(square: np.ndarray, orientation: int) -> np.ndarray:
    """Turn [S, S, 3] upright; after resizing to a square this is the same as before, and cheaper."""
    transpose, upside_down, mirrored = ORIENTATIONS.get(orientation, (False, False, False))
    if transpose:
        square = square.transpose(1, 0, 2)
    if upside_down:
        square = square[::-1]
    return square[:, ::-1] if mirrored else square
