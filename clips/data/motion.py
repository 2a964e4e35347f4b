"""Short films of the demo's things: a thing goes from one place to another and leaves, then a second thing does.

No single frame says where a thing goes or what comes second. A film is a pure function of (seed, split, number). Its
content decides its split.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from clips.data.artists import OPENMOJI, fetch_sets, packages
from clips.data.demo import CONCEPTS, HANDS, LOOKS, PLACES, Scene, draw_hands, draw_scene, drawn

STEPS = 8
"""Frames of each thing."""


@dataclass(frozen=True)
class Film:
    scenes: tuple[Scene, Scene]
    """Each thing where it begins, alone, on one ground."""
    ends: tuple[str, str]
    """The place where each thing goes; a name of PLACES."""

    @property
    def moves(self) -> list[tuple[str, str, str]]:
        """(name, first place, last place) of each thing."""
        things = [scene.things[0] for scene in self.scenes]
        return [(thing.concept, thing.place, end) for thing, end in zip(things, self.ends, strict=True)]

    def frames(self, artists: Sequence[str], rng: random.Random) -> list[np.ndarray]:
        """uint8 [S, S, 3] of each frame, each thing drawn by one of `artists`."""
        pictures: list[Image.Image] = []
        hands = [draw_hands(scene, artists, rng)[0] for scene in self.scenes]
        for scene, end, artist in zip(self.scenes, self.ends, hands, strict=True):
            thing = scene.things[0]
            way = [last - first for first, last in zip(PLACES[thing.place], PLACES[end], strict=True)]
            for step in range(STEPS):
                x, y = (round(part * side * step / (STEPS - 1)) for part, side in zip(way, scene.canvas, strict=True))
                left, top, right, bottom = thing.box
                moved = replace(thing, box=(left + x, top + y, right + x, bottom + y))
                pictures.append(drawn(replace(scene, things=(moved,)), [artist]))
        return [np.asarray(picture) for picture in pictures]


def draw_film(split: str, number: int, seed: int, image_size: int) -> Film:
    """Film `number` of the split `train` or `test`."""
    rng = random.Random(f"{seed}/films/{split}/{number}")
    while True:
        concepts = rng.sample(list(CONCEPTS), 2)
        first, second = (draw_scene(rng, [concept], image_size, LOOKS[split]) for concept in concepts)
        scenes = (first, replace(second, ground=first.ground, background=first.background))
        begins = [scene.things[0].place for scene in scenes]
        ends = [rng.choice([place for place in PLACES if place != begin]) for begin in begins]
        film = Film(scenes, (ends[0], ends[1]))
        is_test = hashlib.sha256(str(film.moves).encode()).digest()[0] % 8 == 0
        if is_test == (split == "test"):
            return film


def film_artists() -> Sequence[str]:
    """The artists of the demo's training, or OpenMoji alone if the others' drawings cannot be fetched.

    Raises UserError if packages are missing.
    """
    packages()
    return [OPENMOJI] if fetch_sets(sorted(HANDS["train"])) else HANDS["train"]
