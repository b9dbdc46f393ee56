"""How a cartoon face is drawn: signed distances in pixels, anti-aliased, thousands of pictures at a time.

A shape is its signed distance d (negative inside); a pixel is covered to the extent clip(1/2 - d, 0, 1), and what is
painted later lies on top. Lengths are pixels, tones run from 0 (black) to 1 (white). The origin is the middle of the
face, x to the right and y downwards; paired parts are drawn once, at |x|. Only additions, products, quotients, square
roots and comparisons of float32 numbers occur, one array operation each, which IEEE 754 fixes to the last bit: the
pixels are the same on every machine.

In the shapes of arrays: x is (n, 1, 32), y is (n, 32, 1), a parameter (n, 1, 1) or a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .source import Array

SIDE = 32
"""Pixels of a row and of a column."""
MIDDLE = (15.5, 17.0)
"""Where an unshifted face has its origin, in pixels from the left and from the top."""
ATTRIBUTES = ("glasses", "hat", "beard", "long hair", "earrings", "thick brows", "wide face")
SHAPES = {
    "eye distance": (3.3, 4.7),
    "eye height": (-1.9, -0.8),
    "eye size": (1.2, 1.9),
    "brow tilt": (-0.5, 0.5),
    "nose length": (1.6, 3.4),
    "nose width": (0.35, 1.0),
    "mouth width": (2.4, 4.2),
    "mouth height": (5.0, 6.2),
    "face height": (9.4, 10.8),
    "skin tone": (0.62, 0.82),
    "hair tone": (0.12, 0.36),
    "hat tone": (0.10, 0.50),
}
"""What varies continuously between identities, and its range: tones, or lengths in pixels from the face's origin."""
_CHUNK = 128
"""Pictures drawn at once: few enough for their arrays to stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class Views:
    """What varies from picture to picture.

    shift: (n, 2) pixels to the right and downwards; smile: (n,) 1 for a full smile, 0 for none; gain: (n,) factor on
    all tones; slope: (n, 2) what the factor gains from the middle to the right and to the lower edge; noise:
    (n, 32, 32) grey levels of 255 that are added."""

    shift: Array
    smile: Array
    gain: Array
    slope: Array
    noise: Array


def draw(attributes: Array, shapes: Array, views: Views) -> Array:
    """(n, 32, 32) uint8 pictures. attributes: (n, 7) bool, by ATTRIBUTES; shapes: (n, 12) numbers, by SHAPES."""
    pictures = np.empty((len(attributes), SIDE, SIDE), dtype=np.uint8)
    for start in range(0, len(pictures), _CHUNK):
        rows = slice(start, start + _CHUNK)
        has = dict(zip(ATTRIBUTES, _columns(attributes[rows]), strict=True))
        shape = dict(zip(SHAPES, _columns(shapes[rows]), strict=True))
        dx, dy = _columns(views.shift[rows])
        pixels = np.arange(SIDE, dtype=np.float32)
        x = pixels[None, None, :] - (dx + np.float32(MIDDLE[0]))
        y = pixels[None, :, None] - (dy + np.float32(MIDDLE[1]))
        smile = views.smile[rows].astype(np.float32)[:, None, None]
        canvas = np.full((len(dx), SIDE, SIDE), 0.85, dtype=np.float32)
        _paint_head(canvas, x, y, has, shape)
        _paint_face(canvas, x, y, has, shape, smile)
        _paint_hat(canvas, x, y, has, shape)
        pictures[rows] = _lit(canvas, views, rows)
    return pictures


def _columns(table: Array) -> list[Array]:
    return [column[:, None, None] for column in np.ascontiguousarray(table.T, dtype=np.float32)]


def _lit(canvas: Array, views: Views, rows: slice) -> Array:
    across, down = _columns(views.slope[rows])
    place = (np.arange(SIDE, dtype=np.float32) - np.float32(15.5)) / np.float32(15.5)
    light = across * place[None, None, :] + down * place[None, :, None]
    canvas *= (light + np.float32(1)) * views.gain[rows].astype(np.float32)[:, None, None]
    canvas *= np.float32(255)
    levels = np.rint(canvas) + views.noise[rows]
    pictures: Array = np.clip(levels, 0, 255).astype(np.uint8)
    return pictures


def _paint_head(canvas: Array, x: Array, y: Array, has: Mapping[str, Array], shape: Mapping[str, Array]) -> None:
    """Hair, ears, earrings, and the bare face with its fringe and beard."""
    side, width, height = np.abs(x), face_width(has), shape["face height"]
    hair, skin = shape["hair tone"], shape["skin tone"]
    _paint(canvas, hair, _ellipse(x, y + 1.5, width + 1.1, height + 0.6), 1.0)
    _paint(canvas, hair, _box(x, y - 2.5, width + 2.6, height + 0.6, 5.0), has["long hair"])
    _paint(canvas, skin, _box(x, y - 11.0, 3.0, 5.0, 1.0), 1.0)
    _paint(canvas, skin * np.float32(0.93), _ellipse(side - width, y - 0.3, 1.5, 2.1), 1.0)
    _paint(canvas, 0.05, _ellipse(side - width - 0.9, y - 4.7, 2.0, 2.8), has["earrings"])
    _paint(canvas, 1.0, _ellipse(side - width - 0.9, y - 4.7, 1.2, 2.0), has["earrings"])
    face = _ellipse(x, y, width, height)
    _paint(canvas, skin, face, 1.0)
    _paint(canvas, hair, np.maximum(face, y + 0.66 * height - 0.012 * x * x), 1.0)
    lips = _ellipse(x, y - shape["mouth height"], shape["mouth width"] + 0.6, 2.2)
    chin = np.maximum(face - 0.6, (2.2 - y) + np.maximum(4.6 - side, 0) * 0.35)
    _paint(canvas, hair * np.float32(0.8), np.maximum(chin, -lips), has["beard"])


def _paint_face(
    canvas: Array, x: Array, y: Array, has: Mapping[str, Array], shape: Mapping[str, Array], smile: Array
) -> None:
    """Eyes, brows, glasses, nose and mouth."""
    side, apart, level, size = np.abs(x), shape["eye distance"], shape["eye height"], shape["eye size"]
    _paint(canvas, 1.0, _ellipse(side - apart, y - level, size, size * np.float32(0.75)), 1.0)
    _paint(canvas, 0.05, _disc(side - apart, y - level, 0.85), 1.0)
    above, tilt = level - 3.2, shape["brow tilt"]
    brow = _segment(side, y, (apart - 1.7, above + tilt), (apart + 1.7, above - tilt))
    _paint(canvas, shape["hair tone"] * np.float32(0.6), brow - (has["thick brows"] * 0.7 + 0.3), 1.0)
    rim = np.abs(_disc(side - apart, y - level, 2.6)) - 0.42
    bridge = _box(x, y - level, apart - 2.6, 0.4, 0.0)
    arm = _box(side - 0.5 * (apart + 2.6 + face_width(has)), y - level, 0.5 * (face_width(has) - apart - 2.6), 0.4, 0.0)
    _paint(canvas, 0.04, np.minimum(np.minimum(rim, bridge), arm), has["glasses"])
    tip = level + 1.2 + shape["nose length"]
    nose = np.minimum(
        _segment(x, y, (0.0, level + 1.2), (0.0, tip)) - 0.25, _segment(side, y, (0.0, tip), (0.9, tip)) - 0.2
    )
    _paint(canvas, shape["skin tone"] * np.float32(0.62), nose - (shape["nose width"] - 0.35), 1.0)
    line, teeth = _mouth(x, y, shape["mouth width"], shape["mouth height"], smile)
    _paint(canvas, 1.0, teeth, 1.0)
    _paint(canvas, 0.15, line, 1.0)


def _paint_hat(canvas: Array, x: Array, y: Array, has: Mapping[str, Array], shape: Mapping[str, Array]) -> None:
    """A crown, its lighter band and a brim, down to a little above the brows."""
    width, brim = face_width(has), -0.66 * shape["face height"]
    tone = shape["hat tone"]
    _paint(canvas, tone, _box(x, y - brim + 4.0, width - 1.2, 4.2, 1.6), has["hat"])
    _paint(canvas, tone + np.float32(0.4), _box(x, y - brim + 1.7, width - 1.2, 0.6, 0.0), has["hat"])
    _paint(canvas, tone, _box(x, y - brim, width + 3.0, 0.9, 0.8), has["hat"])


def face_width(has: Mapping[str, Array]) -> Array:
    """Half the width of the face in pixels."""
    wide: Array = has["wide face"] * np.float32(2.4) + np.float32(7.6)
    return wide


def _paint(canvas: Array, tone: Array | float, distance: Array, share: Array | float) -> None:
    """Lay `tone` over the canvas where `distance` is negative, in the pictures whose `share` is 1."""
    cover = np.clip(np.float32(0.5) - distance, 0, 1) * share
    canvas += cover * (tone - canvas)


def _disc(x: Array, y: Array, radius: float) -> Array:
    distance: Array = np.sqrt(x * x + y * y) - radius
    return distance


def _ellipse(x: Array, y: Array, across: Array | float, down: Array | float) -> Array:
    """Half-axes across and down. The distance to first order: (k - 1) k / |grad k^2| * 2, k = |(x/across, y/down)|."""
    u, v = x / across, y / down
    k = np.sqrt(u * u + v * v)
    slope = np.sqrt((u / across) ** 2 + (v / down) ** 2)
    distance: Array = (k - 1) * ((k + 1e-6) / (slope + 1e-6))
    return distance


def _box(x: Array, y: Array, across: Array | float, down: Array | float, radius: float) -> Array:
    """Half-sides across and down; corners rounded by `radius`."""
    u, v = np.abs(x) - across + radius, np.abs(y) - down + radius
    outside = np.sqrt(np.maximum(u, 0) ** 2 + np.maximum(v, 0) ** 2)
    distance: Array = outside + np.minimum(np.maximum(u, v), 0) - radius
    return distance


def _segment(x: Array, y: Array, start: tuple[Array | float, ...], end: tuple[Array | float, ...]) -> Array:
    """The distance to the line from start to end, each (x, y)."""
    along, down = end[0] - start[0], end[1] - start[1]
    u, v = x - start[0], y - start[1]
    t = np.clip((u * along + v * down) / (along * along + down * down), 0, 1)
    distance: Array = np.sqrt((u - t * along) ** 2 + (v - t * down) ** 2)
    return distance


def _mouth(x: Array, y: Array, width: Array, height: Array, smile: Array) -> tuple[Array, Array]:
    """A parabola, its corners up to 3 pixels above its middle with a smile and a little below without; and the teeth
    between it and its chord, which only a smile shows."""
    rise = smile * np.float32(3.4) - np.float32(0.4)
    bend = rise / (width * width)
    below = (y - height - rise * np.float32(0.5) + bend * x * x) / np.sqrt(1 + (2 * bend * x) ** 2)
    beyond = np.abs(x) - width
    teeth = np.maximum(np.maximum(below, height - rise * np.float32(0.5) - y), beyond)
    return np.maximum(np.abs(below) - 0.55, beyond), teeth
