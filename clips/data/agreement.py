"""How well artists agree on drawings: it chose the demo's names (tools/choose_names.py).

A name is good if each artist's drawing of it is nearer to the other artists' drawings of it than to any of their other
drawings. Nearness is that of shape and colour as a person sees them at a glance; no model is involved.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

CELLS, PIXELS, ANGLES = 8, 8, 8
"""A drawing is described by CELLS × CELLS cells of PIXELS × PIXELS pixels, and edges by ANGLES directions."""


def agreement(sets: Mapping[str, Mapping[str, Image.Image]]) -> dict[str, list[float]]:
    """Name → margins, one for each ordered pair of artists that both draw the name.

    `sets` maps artists to their drawings (RGBA, square) by name. A margin is the cosine between the two drawings of
    the name, less the largest cosine to another drawing of the second artist. It is above 0 if the nearest drawing has
    the same name. A drawing may be mirrored.
    """
    described = {artist: {name: _described(d) for name, d in drawn.items()} for artist, drawn in sets.items()}
    margins: dict[str, list[float]] = {name: [] for drawn in sets.values() for name in drawn}
    for first, own in described.items():
        for second, others in described.items():
            if first == second or not others:
                continue
            names = list(others)
            keys = np.stack([others[name][0] for name in names])
            for name, both in own.items():
                if name in others:
                    near = (keys @ both.T).max(1)
                    place = names.index(name)
                    margins[name].append(float(near[place] - np.delete(near, place).max(initial=-1)))
    return margins


def _described(drawing: Image.Image) -> np.ndarray:
    """Edges, colours and outline of a drawing on white and of its mirror image: float32 [2, D] of length 1."""
    side = CELLS * PIXELS
    pixels = np.asarray(drawing.convert("RGBA").resize((side, side)), np.float32) / 255
    return np.stack([_vector(pixels), _vector(pixels[:, ::-1])])


def _vector(pixels: np.ndarray) -> np.ndarray:
    alpha = pixels[..., 3:]
    colours = pixels[..., :3] * alpha + 1 - alpha
    down, right = np.gradient(colours.mean(-1))
    strength, angle = np.hypot(down, right), np.arctan2(down, right) % np.pi / np.pi * ANGLES
    distance = np.abs(angle[..., None] - np.arange(ANGLES))
    edges = strength[..., None] * (1 - np.minimum(distance, ANGLES - distance)).clip(0)
    outline = _cells(alpha)
    parts = (_cells(edges), _cells(colours) - 1, outline - outline.mean())
    return np.concatenate([part.ravel() / (np.linalg.norm(part) + 1e-6) for part in parts]) / np.sqrt(len(parts))


def _cells(values: np.ndarray) -> np.ndarray:
    """[S, S, C] → [CELLS, CELLS, C], the mean of each cell."""
    return values.reshape(CELLS, PIXELS, CELLS, PIXELS, -1).mean((1, 3))
