#!/usr/bin/env python
"""Choose the demo's names: of all candidates those on whose drawings the artists agree best (clips/data/agreement.py).

The artist of the split `unseen` has no say. The chosen names stand in clips/data/demo.py.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from clips.common.flags import Parser
from clips.data.agreement import agreement
from clips.data.artists import drawings, fetch_sets
from clips.data.demo import HANDS, TRAINING

PLAIN = (
    "lion fox panda frog chicken penguin duck turtle fish crab butterfly bat bear koala shrimp snail spider "
    "scorpion crocodile lizard snake dragon dolphin shark gorilla camel deer wolf "
    "banana strawberry pineapple watermelon carrot lemon pizza mushroom tomato pear peach potato cucumber taco cookie "
    "bicycle rocket sailboat helicopter tractor bus motorcycle ship "
    "guitar drum violin trumpet saxophone microphone radio camera telephone laptop "
    "flashlight candle watch key hammer wrench gear shield bomb spoon pencil microscope telescope pill thermometer "
    "door bed bathtub house tent castle factory church fountain volcano mountain "
    "cactus sunflower rose tulip bouquet cloud rainbow snowflake sun star "
    "balloon crown bell ghost dress skull snowman trophy basketball baseball backpack ring"
)
RENAMED = (
    "tiger: tiger_face, cow: cow_face, dog: dog_face, cat: cat_face, pig: pig_face, mouse: mouse_face, "
    "rabbit: rabbit_face, horse: horse_face, monkey: monkey_face, sheep: ewe, rhino: rhinoceros, "
    "whale: spouting_whale, bee: honeybee, ladybug: lady_beetle, shell: spiral_shell, burger: hamburger, "
    "donut: doughnut, cake: birthday_cake, car: automobile, truck: delivery_truck, train: locomotive, "
    "plane: airplane, clock: alarm_clock, mailbox: closed_mailbox_with_raised_flag, bulb: light_bulb, "
    "sofa: couch_and_lamp, lantern: red_paper_lantern, globe: globe_showing_Americas, padlock: locked, "
    "palm: palm_tree, tree: deciduous_tree, clover: four_leaf_clover, moon: crescent_moon, "
    "pumpkin: jack-o-lantern, gift: wrapped_gift, soccer ball: soccer_ball, football: american_football, "
    "shirt: t-shirt, sneaker: running_shoe, boot: woman’s_boot, hat: top_hat, diamond: gem_stone, "
    "heart: red_heart"
)
CANDIDATES = {name: name for name in PLAIN.split()} | dict(pair.split(": ") for pair in RENAMED.split(", "))
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
