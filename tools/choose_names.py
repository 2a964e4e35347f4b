#!/usr/bin/env python
"""Choose the demo's names: of all candidates those on whose drawings the artists agree best.

A name is good if each artist's drawing of it is nearer to the other artists' drawings of it than to any of their other
drawings. Nearness is that of shape and colour as a person sees them at a glance; no model is involved. The artist of
the split `unseen` has no say. The chosen names stand in clips/data/demo.py.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from clips.common.flags import Parser
from clips.data.artists import drawings, fetch_sets
from clips.data.demo import CONCEPTS, HANDS, TRAINING

CELLS, PIXELS, ANGLES = 8, 8, 8
"""A drawing is described by CELLS × CELLS cells of PIXELS × PIXELS pixels, and edges by ANGLES directions."""
PLAIN = (
    "lion chicken penguin duck turtle fish crab butterfly bat koala shrimp snail scorpion crocodile lizard snake "
    "dragon dolphin shark gorilla camel deer wolf banana strawberry pineapple carrot pizza tomato pear peach potato "
    "cucumber taco sailboat motorcycle ship drum violin trumpet laptop flashlight hammer wrench gear spoon bed tent "
    "castle factory fountain volcano mountain rose tulip bouquet cloud rainbow bell ghost skull snowman basketball "
    "baseball backpack"
)
RENAMED = (
    "tiger: tiger_face, cow: cow_face, dog: dog_face, cat: cat_face, pig: pig_face, horse: horse_face, sheep: ewe, "
    "rhino: rhinoceros, whale: spouting_whale, bee: honeybee, ladybug: lady_beetle, shell: spiral_shell, burger: "
    "hamburger, donut: doughnut, cake: birthday_cake, truck: delivery_truck, train: locomotive, mailbox: "
    "closed_mailbox_with_raised_flag, sofa: couch_and_lamp, clover: four_leaf_clover, gift: wrapped_gift, soccer "
    "ball: soccer_ball, sneaker: running_shoe"
)
OTHERS = {name: name for name in PLAIN.split()} | dict(pair.split(": ") for pair in RENAMED.split(", "))
CANDIDATES = CONCEPTS | OTHERS
"""Spoken name → the emoji's name. All are countable and begin with a consonant, so "a" is always right."""


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--names", type=int, default=64, help="how many names to choose")
    p.add_argument("--hands", type=int, default=5, help="a name needs drawings by this many artists of training")
    return p


def main() -> None:
    flags = parser().parse_args()
    artists = sorted({*HANDS["train"], *HANDS["val"]})
    if reason := fetch_sets(artists):
        raise SystemExit(f"error: {reason}")
    sets = {artist: drawings(artist, CANDIDATES) for artist in artists}
    left = [name for name in CANDIDATES if sum(name in sets[artist] for artist in TRAINING) >= flags.hands]
    left = [name for name in left if all(name in sets[artist] for artist in HANDS["val"])]
    print(f"all {len(CANDIDATES)} names: {nearest(agreement(sets)):.1%} of the nearest drawings have the same name")
    while True:
        margins = agreement({artist: {n: d for n, d in drawn.items() if n in left} for artist, drawn in sets.items()})
        mean = {name: float(np.mean(margins[name])) for name in left}
        if len(left) <= flags.names:
            break
        left.remove(min(left, key=mean.__getitem__))  # alone: a name that leaves changes the others' rivals
    print(f"the {len(left)} names: {nearest(margins):.1%}")
    for name in sorted(left, key=mean.__getitem__):
        hands = sum(name in sets[artist] for artist in TRAINING)
        print(f"{name:12} margin {mean[name]:+.3f}  {hands} artists of training  {CANDIDATES[name]}")


def nearest(margins: Mapping[str, Sequence[float]]) -> float:
    """The share of drawings whose nearest drawing by another artist has the same name."""
    return float(np.mean([margin > 0 for found in margins.values() for margin in found]))


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


if __name__ == "__main__":
    main()
