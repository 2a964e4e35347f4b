#!/usr/bin/env python
"""Choose the demo's names: of all candidates those on whose drawings the artists agree best (clips/data/agreement.py).

The artist of the split `unseen` has no say. The chosen names stand in clips/data/demo.py.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from clips.common.flags import Parser
from clips.data.agreement import agreement
from clips.data.artists import drawings, fetch_sets
from clips.data.demo import CONCEPTS, HANDS, TRAINING

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


if __name__ == "__main__":
    main()
