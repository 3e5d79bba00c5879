"""Images of every kind become squares, and damaged ones are told apart."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from crossguard.data.loading.decode import EXIF_ORIENTATION, MediaError, check_image, decode_image

SIZE = 64


def picture() -> Image.Image:
    """Coloured blobs, 400 x 300, the same every time."""
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((400, 300), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reference(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left.astype(int) - right).mean())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_decoding_agrees_with_pillow(kind: str) -> None:
    data = encoded(picture(), kind)
    decoded = decode_image(data, SIZE)
    assert decoded.shape == (3, SIZE, SIZE)
    assert decoded.dtype == np.uint8
    assert distance(decoded, reference(Image.open(io.BytesIO(data)))) < 2
    assert check_image(data) is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("turned", [False, True])
def test_the_middle_of_an_image_is_cropped(kind: str, turned: bool) -> None:
    image = picture().transpose(Image.Transpose.ROTATE_90) if turned else picture()
    data = encoded(image, kind)
    fitted = ImageOps.fit(Image.open(io.BytesIO(data)), (SIZE, SIZE), Image.Resampling.BILINEAR)
    cropped = decode_image(data, SIZE, "crop")
    assert distance(cropped, np.asarray(fitted).transpose(2, 0, 1)) < 2
    assert distance(cropped, decode_image(data, SIZE)) > 5


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "1"), ("PNG", "L"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "RGBA")],
)
def test_every_colour_mode_becomes_rgb(kind: str, mode: str) -> None:
    image = picture().convert(mode)
    assert distance(decode_image(encoded(image, kind), SIZE), reference(image)) < 4


def test_transparency_is_laid_over_white_and_16_bits_are_scaled() -> None:
    assert decode_image(encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "PNG"), 4).min() == 255
    deep = Image.fromarray(np.full((9, 9), 128 << 8, dtype=np.uint16))
    assert np.unique(decode_image(encoded(deep, "PNG"), 4)).tolist() == [128]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    data = encoded(picture(), kind, exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert distance(decode_image(data, SIZE), reference(upright)) < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.98])
def test_truncated_files_are_found(kind: str, kept: float) -> None:
    data = encoded(picture(), kind)
    assert check_image(data[: int(len(data) * kept)]) is not None


def test_a_hole_in_a_jpeg_is_found() -> None:
    data = encoded(picture(), "JPEG")
    middle = len(data) // 2
    assert check_image(data[:middle] + bytes(2000) + data[middle + 2000 :]) is not None
    assert check_image(data[:middle] + b"\xff\xd9") is not None


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"no image", encoded(Image.new("L", (8, 8)), "GIF")])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(MediaError, match="not a JPEG, PNG or WebP image"):
        decode_image(data, SIZE)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_bombs_are_refused_before_they_are_unpacked(kind: str) -> None:
    assert "pixels" in (check_image(encoded(Image.new("L", (10_000, 10_000)), kind)) or "")
