"""What the generated posts show: a drawn market stall, its weather above and its fruit below.

Place, size, colours, noise and file format vary at random and tell nothing about the label.
"""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
HORIZON = 34
SKIES = ((150, 190, 235), (205, 215, 225), (235, 205, 185), (175, 215, 205))
GROUNDS = ((150, 120, 85), (110, 140, 90), (165, 155, 140), (120, 105, 120))

Colour = tuple[int, int, int]


def draw_stall(weather: int, fruit: int, rng: random.Random) -> bytes:
    """An encoded picture, PNG or JPEG, of 64 × 64 pixels.

    Args:
        weather: 0 sunshine, 1 rain.
        fruit: 0 apples, 1 grapes.
        rng: decides everything else.
    """
    image = Image.new("RGB", (SIZE, SIZE), _vary(rng.choice(SKIES), rng))
    draw = ImageDraw.Draw(image)
    (_draw_sun, _draw_rain)[weather](draw, rng)
    draw.rectangle((0, HORIZON + rng.randint(-2, 2), SIZE, SIZE), fill=_vary(rng.choice(GROUNDS), rng))
    (_draw_apples, _draw_grapes)[fruit](draw, rng)
    return _encode(_add_noise(image, rng), rng)


def _draw_sun(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    x, y, radius = rng.randint(14, 50), rng.randint(12, 18), rng.randint(6, 9)
    colour = _vary((250, 205, 60), rng)
    for dx, dy in ((1, 0), (0, 1), (0.7, 0.7), (0.7, -0.7)):
        reach = radius + 4
        draw.line((x - dx * reach, y - dy * reach, x + dx * reach, y + dy * reach), fill=colour, width=2)
    _disc(draw, x, y, radius, colour)


def _draw_rain(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    x, y = rng.randint(18, 46), rng.randint(8, 12)
    cloud, drops = _vary((105, 110, 125), rng), _vary((50, 90, 190), rng)
    for dx, dy, radius in ((-9, 1, 5), (0, -1, 7), (9, 1, 5)):
        _disc(draw, x + dx, y + dy, radius, cloud)
    slant = rng.randint(-3, 3)
    for dx in range(-11, 12, 5):
        top = y + rng.randint(7, 10)
        draw.line((x + dx, top, x + dx + slant, top + 9), fill=drops, width=2)


def _draw_apples(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    x, y = rng.randint(14, 50), rng.randint(47, 53)
    for dx in (-9, 0, 9):
        _disc(draw, x + dx, y + rng.randint(-2, 2), 5, _vary((205, 50, 45), rng))
        draw.line((x + dx, y - 4, x + dx + 2, y - 8), fill=(85, 60, 35), width=1)


def _draw_grapes(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    x, y = rng.randint(12, 52), rng.randint(43, 47)
    for row, count in enumerate((4, 3, 2, 1)):
        for k in range(count):
            _disc(draw, x + (2 * k - count + 1) * 3, y + row * 4, 3, _vary((105, 45, 150), rng))
    draw.line((x, y - 3, x, y - 7), fill=(70, 110, 50), width=2)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: Colour) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _vary(colour: Colour, rng: random.Random, by: int = 18) -> Colour:
    red, green, blue = (min(255, max(0, channel + rng.randint(-by, by))) for channel in colour)
    return red, green, blue


def _add_noise(image: Image.Image, rng: random.Random) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0, rng.uniform(2, 10), (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def _encode(image: Image.Image, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    if rng.random() < 0.5:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=rng.randint(70, 92))
    return buffer.getvalue()
