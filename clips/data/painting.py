"""The things and grounds of the demo's scenes, and how they are painted."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Look:
    """How a drawing is changed, or the limits of the change in both directions; half of the drawings are mirrored."""

    turn: float
    """Degrees, counter-clockwise."""
    slant: float
    """Upright lines lean by this many degrees."""
    stretch: float
    """The width grows by this share and the height shrinks, to the same area."""
    hue: float
    """Turn of the colours, as a share of the colour circle."""
    saturation: float
    """The colours' distance from gray grows by this share."""
    tint: tuple[float, float, float]
    """Red, green and blue grow by these shares."""
    mirrored: bool = True

    def drawn(self, rng: random.Random) -> Look:
        """Draw a look within these limits."""

        def within(limit: float) -> float:
            return round(rng.uniform(-limit, limit), 3)

        red, green, blue = map(within, self.tint)
        return Look(
            turn=within(self.turn),
            slant=within(self.slant),
            stretch=within(self.stretch),
            hue=within(self.hue),
            saturation=within(self.saturation),
            tint=(red, green, blue),
            mirrored=rng.random() < 0.5,
        )


@dataclass(frozen=True)
class Thing:
    """A drawing in a scene: what it shows, where, how large, and how it is changed."""

    concept: str
    place: str
    size: str
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels: the square that the drawing is fitted into before it is turned."""
    look: Look


@dataclass(frozen=True)
class Ground:
    """A background: one colour, lightened and darkened by a pattern and by light from one side."""

    colour: tuple[int, int, int]
    second: tuple[int, int, int]
    """The pattern's colour; equal to `colour` if the pattern has none."""
    pattern: str
    contrast: float
    angle: float
    """The pattern's angle in radians."""
    cycles: float
    shade: tuple[float, float]
    """How much lighter the right and the lower edge are than the middle, as a share."""
    seed: int
    """Seed of the noise."""


@dataclass(frozen=True)
class Scene:
    """A demo scene before it is drawn."""

    things: tuple[Thing, ...]
    """From back to front."""
    background: str
    ground: Ground
    image_size: int


def paint_ground(ground: Ground, image_size: int) -> Image.Image:
    """Return an RGB image of only the ground, painted at half its size and enlarged, because patterns are soft."""
    side = math.ceil(image_size / 2)
    x, y = _grid(side)
    turned = 2 * math.pi * ground.cycles
    along = x * math.cos(ground.angle) + y * math.sin(ground.angle)
    across = y * math.cos(ground.angle) - x * math.sin(ground.angle)
    if ground.pattern == "stripes":
        pattern = (2 * np.sin(turned * along) - 0.4).clip(-1, 1)
    elif ground.pattern == "dots":
        pattern = (3 * np.sin(turned * along) * np.sin(turned * across) - 0.5).clip(-1, 1)
    elif ground.pattern == "gradient":
        pattern = (3 * along).clip(-1, 1)
    else:
        grains = np.random.default_rng(ground.seed).normal(0, 0.8, (16, 16)).astype(np.float32)
        pattern = np.asarray(Image.fromarray(grains).resize((side, side), Image.Resampling.BICUBIC)).clip(-1, 1)
    first, second = (np.array(colour, np.float32) for colour in (ground.colour, ground.second))
    colours = first + (8 * (pattern - 0.5)).clip(0, 1)[..., None] * (second - first)
    light = 1 + ground.contrast * pattern + 2 * (ground.shade[0] * x + ground.shade[1] * y)
    painted = Image.fromarray((light[..., None] * colours).clip(0, 255).round().astype(np.uint8))
    return painted.resize((image_size, image_size), Image.Resampling.BICUBIC)


@cache
def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of each pixel of a square, [S, S] each, from -0.5 to 0.5."""
    x = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    return np.broadcast_to(x, (side, side)), np.broadcast_to(x[:, None], (side, side))


def paste(painting: Image.Image, thing: Thing, drawing: Image.Image) -> None:
    """Draw a thing onto the painting in place; the rotated drawing may reach beyond its box."""
    left, top, right, bottom = thing.box
    look, side = thing.look, right - left
    if look.mirrored:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawing = drawing.resize((side, side), Image.Resampling.BICUBIC)
    turn, lean, wide = math.radians(look.turn), math.tan(math.radians(look.slant)), math.sqrt(1 + look.stretch)
    cos, sin = math.cos(turn), math.sin(turn)
    # From the painting to the drawing, about the middle: undo the rotation, then the slant, then the stretch.
    a, b, c, d = (cos - lean * sin) / wide, (-sin - lean * cos) / wide, sin * wide, cos * wide
    over = math.ceil(1.3 * side)
    middle, centre = over / 2, side / 2
    placed = drawing.transform(
        (over, over),
        Image.Transform.AFFINE,
        (a, b, centre - a * middle - b * middle, c, d, centre - c * middle - d * middle),
        Image.Resampling.BILINEAR,
    )
    coloured = placed.convert("RGB").convert("RGB", _colour_matrix(look))
    painting.paste(coloured, ((left + right - over) // 2, (top + bottom - over) // 2), placed.getchannel("A"))


def _colour_matrix(look: Look) -> tuple[float, ...]:
    """Return the look's change of colours as the 3 × 4 matrix that Pillow takes, row by row."""
    angle, axis = 2 * math.pi * look.hue, np.full((3, 3), 1 / 3)
    turned = math.cos(angle) * np.eye(3) + (1 - math.cos(angle)) * axis
    turned += math.sin(angle) / math.sqrt(3) * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    matrix = (1 + look.saturation) * (turned - axis) + axis
    rows = matrix * (1 + np.array(look.tint))[:, None]
    return tuple(float(v) for row in rows for v in (*row, 0.0))
