"""How often captions of the demo's scenes are right: things, counts and places, against what the scene holds.

The words are those of the demo's own texts, which captioners trained on them use too; what a caption says in other
words is not counted, neither as right nor as wrong.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from clips.data.demo import CONCEPTS, NUMBERS, PLACES
from clips.data.sentences import split_sentences


@dataclass
class Truth:
    """Sums over the captions of a set."""

    captions: int = 0
    shown: int = 0
    """Things in the pictures."""
    found: int = 0
    """Of these, named."""
    named: int = 0
    """Different things that captions name."""
    named_right: int = 0
    counts: int = 0
    """Captions that say how many things there are."""
    counts_right: int = 0
    places: int = 0
    """Things of which captions say where they are."""
    places_right: int = 0
    """Of these, those that are there."""

    def add(self, caption: str, scene: Mapping[str, Any]) -> None:
        """`scene` is the JSON member of a demo sample (`clips.data.demo.truth`)."""
        where = {(thing["concept"], thing["place"]) for thing in scene["objects"]}
        shown = {concept for concept, _ in where}
        named = {match["thing"] for match in _words().finditer(caption.lower()) if match["thing"]}
        self.captions += 1
        self.shown += len(shown)
        self.found += len(shown & named)
        self.named += len(named)
        self.named_right += len(shown & named)
        if said := _COUNT.search(caption.lower()):
            self.counts += 1
            self.counts_right += NUMBERS.index(said[1]) == len(scene["objects"])
        placed = set(placements(caption))
        self.places += len(placed)
        self.places_right += len(placed & where)

    def shares(self) -> dict[str, float | None]:
        """Percent; None where nothing of the kind was said."""
        parts = {
            "things_right": (self.named_right, self.named),
            "things_found": (self.found, self.shown),
            "counts_said": (self.counts, self.captions),
            "counts_right": (self.counts_right, self.counts),
            "places_said": (self.places, self.shown),
            "places_right": (self.places_right, self.places),
        }
        return {name: round(100 * part / whole, 1) if whole else None for name, (part, whole) in parts.items()}


SHARES = {
    "things_right": "things named that are there",
    "things_found": "things there that are named",
    "counts_said": "captions that say how many",
    "counts_right": "of these right",
    "places_said": "places said, of the things there",
    "places_right": "of these right",
}
"""What `Truth.shares` has, in words."""


def is_scene(extra: Mapping[str, Any]) -> bool:
    """Whether a sample's extra fields say what is in its picture, as the demo's do."""
    things = extra.get("objects")
    return isinstance(things, list) and all(isinstance(t, dict) and {"concept", "place"} <= t.keys() for t in things)


def placements(caption: str) -> Iterator[tuple[str, str]]:
    """(thing, place) as a caption says them: "a fox at the top left", "at the top left there is a fox".

    In a sentence that begins with a place each place belongs to the thing after it, in any other to the one before.
    """
    for sentence in split_sentences(caption.lower()):
        found = [(match["thing"], match["place"]) for match in _words().finditer(sentence)]
        place_first = bool(found) and found[0][1] is not None
        for (thing, place), (next_thing, next_place) in itertools.pairwise(found):
            if place_first and place and next_thing:
                yield next_thing, place
            elif not place_first and thing and next_place:
                yield thing, next_place


@cache
def _words() -> re.Pattern[str]:
    """A thing, also in the plural, or a place; of two names that begin alike the longer one."""
    things, places = ("|".join(map(re.escape, sorted(names, key=len, reverse=True))) for names in (CONCEPTS, PLACES))
    return re.compile(rf"\b(?:(?P<thing>{things})(?:e?s)?|(?P<place>{places}))\b")


_COUNT = re.compile(rf"\b({'|'.join(NUMBERS)}) (?:things?|objects?)\b")
