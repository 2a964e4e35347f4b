"""How often captions of the demo's scenes are right: things, counts and places, against what the scene holds.

The words are those of the demo's own texts, which captioners trained on them use too. What a caption says in other
words is counted neither as right nor as wrong.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from clips.data.demo import CONCEPTS, NUMBERS, PLACES
from clips.data.sentences import split_sentences

SHARES = {
    "things_right": ("things named that are there", "named_right", "named"),
    "things_found": ("things there that are named", "named_right", "shown"),
    "counts_said": ("captions that say how many", "counts", "captions"),
    "counts_right": ("of these right", "counts_right", "counts"),
    "places_said": ("places said, of the things there", "places", "shown"),
    "places_right": ("of these right", "places_right", "places"),
}
"""What `Truth.shares` has: in words, and as a share of one sum in another."""


class Truth:
    """Sums over the captions of a set."""

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()
        """shown, named: different things in pictures, in captions. counts: captions that say how many things there
        are. places: things whose place a caption says. X_right: how many of X are right."""

    def add(self, caption: str, scene: Mapping[str, Any]) -> None:
        """`scene` is the JSON member of a demo sample (`clips.data.demo.truth`)."""
        where = {(thing["concept"], thing["place"]) for thing in scene["objects"]}
        shown = {concept for concept, _ in where}
        named = {match["thing"] for match in _words().finditer(caption.lower()) if match["thing"]}
        placed = set(placements(caption))
        self.sums.update(captions=1, shown=len(shown), named=len(named), named_right=len(shown & named))
        self.sums.update(places=len(placed), places_right=len(placed & where))
        if said := _COUNT.search(caption.lower()):
            self.sums.update(counts=1, counts_right=int(NUMBERS.index(said[1]) == len(scene["objects"])))

    def shares(self) -> dict[str, float | None]:
        """Percent; None if nothing of the kind was said."""
        sums = self.sums
        return {
            name: round(100 * sums[part] / sums[whole], 1) if sums[whole] else None
            for name, (_, part, whole) in SHARES.items()
        }


def is_scene(extra: Mapping[str, Any]) -> bool:
    """Whether a sample's extra fields say what is in its picture, as the demo's fields do."""
    things = extra.get("objects")
    return isinstance(things, list) and all(isinstance(t, dict) and {"concept", "place"} <= t.keys() for t in things)


def placements(caption: str) -> Iterator[tuple[str, str]]:
    """(thing, place) as a caption says them: "a fox at the top left", "at the top left there is a fox".

    In a sentence that begins with a place each place belongs to the thing after it, else to the thing before it.
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
