"""Build demo data in LLaVA's format from the demo scenes (clips/data/demo.py), with exact answers.

    images/           the scenes: train-NNNNNN.jpg, val-NNNNNN.jpg, test-NNNNNN.jpg, unseen-NNNNNN.jpg
    align.json        images and short captions, for `plain`
    instruct.json     short captions, conversations of about five questions, some descriptions, some text-only samples
    question.jsonl    held-out questions in LLaVA's format, with `kind` and `answer`
    question_unseen.jsonl  the same questions about the same scenes, in the held-out drawing style
    question_val.jsonl     the same kinds of questions about scenes in the style of validation, for tuning
    talk.jsonl      questions after one or two earlier turns, about scenes in the held-out style
    description.jsonl held-out images to describe, with `references`

A thing is in a scene at most once, at one of five places. The layouts of test images never occur in training images
(`clips.data.demo.split_of`). An answer about identity has an article ("A fox"), because after a space most names are
one token in common vocabularies.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from clips import (
    CONCEPTS,
    NUMBERS,
    PLACES,
    Fields,
    RawSample,
    at_place,
    capital,
    demo_split,
    ensure_any_demo,
    open_data,
)
from clips.common.errors import UserError
from clips.common.files import built_as, ensure_built
from clips.common.rundir import UNSEEN
from mllm.data.questions import TALKS, UNSEEN_ANSWERS

VERSION = 13
"""Increase it if texts or files change, so that older folders are rebuilt."""
ALIGN = "align.json"
INSTRUCT = "instruct.json"
QUESTIONS = "question.jsonl"
UNSEEN_QUESTIONS = "question_unseen.jsonl"
VAL_QUESTIONS = "question_val.jsonl"
TALK_QUESTIONS = "talk.jsonl"
DESCRIPTIONS = "description.jsonl"
IMAGES = "images"
KEPT_SINGLES = 1 / 3
"""Share of the scenes of one thing that are kept for instruction: a scene of several things asks and teaches more."""
CAPTION_SHARE = 0.25
"""Share of the instruction samples that ask for a short caption, which covers all things in few tokens."""
DESCRIBED_SHARE = 0.03
"""Share of the instruction samples that ask for a long description."""
SHOW = (
    "Describe the picture.",
    "What do you see in this picture?",
    "Tell me about the image.",
    "Describe what is shown.",
)
CAPTION_PROMPTS = ("Give a short caption.", "Write a brief caption for this image.", "Summarize the picture in a line.")
WHAT_SINGLE = (
    "What is in the picture?",
    "What does the image show?",
    "Which thing can be seen here?",
    "What is this?",
    "Name the thing in the picture.",
)
WHAT_AT = (
    "What is {at}?",
    "What can be seen {at}?",
    "Which thing is {at}?",
    "Name the thing {at}.",
    "What does the picture show {at}?",
)
HOW_MANY = (
    "How many things are in the picture?",
    "How many objects do you see?",
    "Count the things in the image.",
    "What is the number of things shown?",
)
WHERE = (
    "Where is the {thing}?",
    "Where in the picture is the {thing}?",
    "At which place is the {thing}?",
    "Where can the {thing} be found?",
)
BACKGROUND = (
    "Which color is the background?",
    "What color does the background have?",
    "What is the background color?",
    "Name the background's color.",
)
RELATION = ("What is {side} the {other}?", "Which thing is {side} the {other}?", "Name the thing {side} the {other}.")
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Direction of each side of a thing (x to the right, y downwards)."""
IS_THERE = (
    "Is there a {thing} in the picture?",
    "Do you see a {thing}?",
    "Does the image show a {thing}?",
    "Is there a {thing} {at}?",
    "Is the thing {at} a {thing}?",
)


T = TypeVar("T")
Thing = tuple[str, str]
"""Name and place of one thing."""
QuestionAnswer = tuple[str, str]


@dataclass(frozen=True)
class DemoScene:
    """One demo scene with its true content. `things` are in reading order, and `caption` mentions all of them."""

    name: str
    data: bytes
    things: tuple[Thing, ...]
    background: str
    caption: str
    description: str

    @staticmethod
    def of(sample: RawSample, name: str) -> DemoScene:
        """Return the scene called `name` that a sample of the demo holds."""
        assert sample.long is not None  # `_read_scenes` opens the scenes with need_long
        extra = sample.extra
        places = list(PLACES)
        things = sorted((places.index(thing["place"]), thing["concept"]) for thing in extra["objects"])
        placed = tuple((concept, places[place]) for place, concept in things)
        return DemoScene(name, sample.image, placed, extra["background"], extra["captions"][0], sample.long)


def ask_identity(scene: DemoScene, about: Thing, rng: random.Random) -> QuestionAnswer:
    """Ask what is at the place of `about`."""
    thing, place = about
    wordings = WHAT_AT if len(scene.things) > 1 else (*WHAT_SINGLE, *WHAT_AT)
    return rng.choice(wordings).format(at=at_place(place)), f"A {thing}"


def ask_count(scene: DemoScene, about: Thing, rng: random.Random) -> QuestionAnswer:
    """Ask how many things there are."""
    return rng.choice(HOW_MANY), capital(NUMBERS[len(scene.things)])


def ask_where(scene: DemoScene, about: Thing, rng: random.Random) -> QuestionAnswer:
    """Ask where the thing `about` is."""
    thing, place = about
    return rng.choice(WHERE).format(thing=thing), capital(at_place(place))


def ask_background(scene: DemoScene, about: Thing, rng: random.Random) -> QuestionAnswer:
    """Ask for the background."""
    return rng.choice(BACKGROUND), capital(scene.background)


def ask_relation(scene: DemoScene, about: Thing, rng: random.Random) -> QuestionAnswer | None:
    """Ask for the only thing on one side of another thing, or return None if no side of a thing has exactly one."""
    relations = relations_of(scene)
    return relation_question(rng.choice(relations), rng) if relations else None


def relations_of(scene: DemoScene) -> list[tuple[str, str, Thing]]:
    """Return (thing, side, other) for each side of another thing that has exactly one thing."""
    relations = []
    for other in scene.things:
        other_x, other_y = PLACES[other[1]]
        for side, (right, down) in SIDES.items():
            things = []
            for thing, place in scene.things:
                x, y = PLACES[place]
                if right * (x - other_x) + down * (y - other_y) > 0:
                    things.append(thing)
            if len(things) == 1:
                relations.append((things[0], side, other))
    return relations


def relation_question(relation: tuple[str, str, Thing], rng: random.Random) -> QuestionAnswer:
    """Ask for the thing on that side of the other thing in `relation`."""
    thing, side, (other, _) = relation
    return rng.choice(RELATION).format(side=side, other=other), f"A {thing}"


def ask_yes_no(scene: DemoScene, about: Thing, rng: random.Random) -> QuestionAnswer:
    """Ask about a thing that is in the image or, in half of the cases, about one that is not."""
    yes = rng.random() < 0.5
    return is_there(about[0] if yes else rng.choice(absent_from(scene)), about[1], yes, rng)


def absent_from(scene: DemoScene, names: Iterable[str] = CONCEPTS) -> list[str]:
    """Return the `names` of things that are not in the scene."""
    return [name for name in names if name not in dict(scene.things)]


def is_there(thing: str, place: str, yes: bool, rng: random.Random) -> QuestionAnswer:
    """Ask whether a thing is there, with `yes` as the right answer."""
    return rng.choice(IS_THERE).format(thing=thing, at=at_place(place)), "Yes" if yes else "No"


KINDS: dict[str, Callable[[DemoScene, Thing, random.Random], QuestionAnswer | None]] = {
    "identity": ask_identity,
    "count": ask_count,
    "where": ask_where,
    "relation": ask_relation,
    "yes_no": ask_yes_no,
}
"""The kinds of held-out questions. Training also asks for the colour of the background, but no test does, because a
model with an untrained encoder answers nearly all of these questions too."""
FIRST = {ask_count: 0.8, ask_background: 0.2}
"""Questions that mention no thing, and the share of conversations that begin with each; later turns give them away."""
SUBJECTS = {"identity": 4, "where": 1, "relation": 8, "yes_no": 6}
"""Relative frequency of each kind of the other questions of a conversation."""
WITHOUT_RELATION = ("identity", "yes_no")
"""Kinds that stand in for a relation in scenes without one."""


def talk_about(
    kind: str, scene: DemoScene, rng: random.Random, names: Iterable[str] = CONCEPTS
) -> list[QuestionAnswer]:
    """Return turns with questions of one kind, of which none helps to guess a later answer without the image.

    Several relations would name each other's answers, so there is one, after the place of the thing that it mentions.
    Places of several things exclude each other, as they do in an image. Returns [] if the scene has no such question.

    Args:
        names: Names among which those of absent things are drawn.
    """
    things = rng.sample(scene.things, len(scene.things))
    if kind == "yes_no":
        absent = iter(rng.sample(absent_from(scene, names), 2 * len(things)))
        return by_coin(things, lambda thing, yes: is_there(thing[0] if yes else next(absent), thing[1], yes, rng), rng)
    if kind == "relation":
        if not (relations := relations_of(scene)):
            return []
        relation = rng.choice(relations)
        return [ask_where(scene, relation[2], rng), relation_question(relation, rng)]
    ask = KINDS[kind]
    return [pair for thing in things[: 1 if kind == "count" else None] if (pair := ask(scene, thing, rng))]


def by_coin(facts: Sequence[T], ask: Callable[[T, bool], QuestionAnswer], rng: random.Random) -> list[QuestionAnswer]:
    """Return yes/no questions about `facts` in random order, at most twice as many as there are facts.

    For each question a coin decides whether it is about the current fact or about something untrue in its place. After
    a "Yes" the next fact follows. So earlier answers influence which questions are asked, but not what is right.

    Args:
        ask: Makes a question from a fact and from whether its answer is "Yes".
    """
    left = rng.sample(facts, len(facts))
    pairs: list[QuestionAnswer] = []
    while left and len(pairs) < 2 * len(facts):
        yes = rng.random() < 0.5
        pairs.append(ask(left[-1], yes))
        if yes:
            left.pop()
    return pairs


def align_record(scene: DemoScene, rng: random.Random) -> dict[str, Any]:
    """Return a record of stage 1: a prompt and the long caption."""
    return _record(scene.name, [(rng.choice(CAPTION_PROMPTS), scene.caption)], scene.name, rng)


def instruct_record(scene: DemoScene, rng: random.Random) -> dict[str, Any]:
    """Return a record with a short caption, a long description, or a conversation.

    No turn of a conversation may give away a later answer. Therefore captions and descriptions stand alone, and after
    the questions in `FIRST` all are of one kind.
    """
    if rng.random() < CAPTION_SHARE:
        return align_record(scene, rng)
    if rng.random() < DESCRIBED_SHARE / (1 - CAPTION_SHARE):
        return _record(scene.name, [(rng.choice(SHOW), scene.description)], scene.name, rng)
    first = [ask(scene, scene.things[0], rng) for ask, share in FIRST.items() if rng.random() < share]
    kind = rng.choices([*SUBJECTS], [*SUBJECTS.values()])[0]
    talk = talk_about(kind, scene, rng) or talk_about(rng.choice(WITHOUT_RELATION), scene, rng)
    return _record(scene.name, [*first, *talk], scene.name, rng)


def text_record(number: int, rng: random.Random) -> dict[str, Any]:
    """Return a text-only conversation about simple facts."""
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    digits = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    opposites = ("big small", "hot cold", "left right", "above below", "old new", "day night", "open closed", "up down")
    pairs = []
    for _ in range(rng.randint(1, 3)):
        a = rng.randint(0, 9)
        b = rng.randint(0, 9 - a)
        day = rng.randrange(7)
        pair = rng.choice(opposites).split()
        rng.shuffle(pair)
        things = rng.sample(list(CONCEPTS), 3)
        facts = (
            (f"What is {digits[a]} plus {digits[b]}?", capital(digits[a + b])),
            (f"Which day comes after {days[day]}?", days[(day + 1) % 7]),
            (f"What is the opposite of {pair[0]}?", capital(pair[1])),
            (f"Which word comes first: {', '.join(things)}?", capital(things[0])),
        )
        pairs.append(rng.choice(facts))
    return _record(f"text-{number:06d}", pairs, None, rng)


def turns_of(pairs: list[QuestionAnswer]) -> list[dict[str, str]]:
    """Return questions and answers as LLaVA's turns."""
    turns = []
    for question, answer in pairs:
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": answer})
    return turns


def _record(name: str, pairs: list[QuestionAnswer], image: str | None, rng: random.Random) -> dict[str, Any]:
    """Return a LLaVA record, with the placeholder before or after the first question, as in LLaVA's data."""
    turns = turns_of(pairs)
    if image is None:
        return {"id": name, "conversations": turns}
    question = turns[0]["value"]
    turns[0]["value"] = f"<image>\n{question}" if rng.random() < 0.5 else f"{question}\n<image>"
    return {"id": Path(name).stem, "image": image, "conversations": turns}


def eval_questions(scenes: list[DemoScene], per_kind: int, seed: int) -> list[dict[str, Any]]:
    """Return `per_kind` questions of each kind, with answers as evenly distributed as the images allow."""
    questions: list[dict[str, Any]] = []
    for kind, ask in KINDS.items():
        rng = random.Random(f"{seed}/questions/{kind}")
        by_answer: dict[str, list[dict[str, Any]]] = {}
        for scene in rng.sample(scenes, len(scenes)):
            pair = ask(scene, rng.choice(scene.things), rng)
            if pair is not None:
                text, answer = pair
                question = {"image": scene.name, "text": text, "category": "conv", "kind": kind, "answer": answer}
                by_answer.setdefault(answer, []).append(question)
        left = per_kind
        while left and any(by_answer.values()):
            for answer in sorted(by_answer):
                if by_answer[answer] and left:
                    questions.append({"question_id": len(questions)} | by_answer[answer].pop())
                    left -= 1
    return questions


def talk_questions(scenes: list[DemoScene], per_kind: int, seed: int) -> list[dict[str, Any]]:
    """Return up to `per_kind` questions of each of six kinds, with the `earlier` turns of their conversations.

    Four kinds ask whether a thing is in a scene of one thing: as the first question, after one or two questions that
    were answered "No", and after a question about the same thing that was answered "Yes". In half of the questions the
    thing is there. The other two kinds are the second question of a conversation about the names or the places of
    things.
    """
    single = [scene for scene in scenes if len(scene.things) == 1]
    several = [scene for scene in scenes if len(scene.things) > 1]
    questions: list[dict[str, Any]] = []

    def add(kind: str, scene: DemoScene, pairs: list[QuestionAnswer]) -> None:
        *earlier, (text, answer) = pairs
        questions.append({"question_id": len(questions), "image": scene.name, "text": text, "category": "conv"})
        questions[-1] |= {"kind": kind, "answer": answer, "earlier": earlier}

    earlier_answers = {"alone": (), "after_no": (False,), "after_two_no": (False, False), "after_yes": (True,)}
    for kind, answers in earlier_answers.items():
        rng = random.Random(f"{seed}/talks/{kind}")
        for number, scene in enumerate(rng.sample(single, min(per_kind, len(single)))):
            ((thing, place),) = scene.things
            absent = iter(rng.sample(absent_from(scene), 3))
            pairs: dict[str, str] = {}
            for yes in (*answers, number % 2 == 0):
                name, before = thing if yes else next(absent), len(pairs)
                while len(pairs) == before:  # the same thing in other words
                    pairs |= [is_there(name, place, yes, rng)]
            add(kind, scene, [*pairs.items()])
    for kind in ("identity", "where"):
        rng = random.Random(f"{seed}/talks/{kind}")
        for scene in rng.sample(several, min(per_kind, len(several))):
            add(f"second_{kind}", scene, talk_about(kind, scene, rng)[:2])
    return questions


def ensure_llava_demo(
    directory: Path | str,
    demo_dir: Path | str = "data/demo",
    *,
    align: int = 8_000,
    instruct: int = 4_000,
    text_only: int = 200,
    per_kind: int = 8 * len(CONCEPTS),
    seed: int = 0,
) -> Path:
    """Write the files that the module's docstring lists into `directory`, unless equal ones exist, and return it.

    `align` and `instruct` are numbers of different images of the demo's training split, `text_only` of samples without
    an image, and `per_kind` of test questions of each kind (by default each name is the answer eight times). Missing
    demo scenes are built in `demo_dir`. Raises UserError for too few scenes, or if the folder holds other files.
    """
    demo_dir = Path(demo_dir)
    ensure_any_demo(demo_dir)
    settings = {
        "version": VERSION,
        "scenes": built_as(demo_dir),
        "seed": seed,
        "align": align,
        "instruct": instruct,
        "text_only": text_only,
        "per_kind": per_kind,
    }
    write = partial(_write_all, demo_dir=demo_dir, settings=settings)
    return ensure_built(Path(directory), settings, write, what="LLaVA demo data")


def ensure_any_llava_demo(directory: Path | str, demo_dir: Path | str = "data/demo") -> Path:
    """Build the files with `ensure_llava_demo`, unless there are any of this version and scenes. Return `directory`."""
    ensure_any_demo(demo_dir)
    built = built_as(Path(directory)) or {}
    if (built.get("version"), built.get("scenes")) != (VERSION, built_as(Path(demo_dir))):
        ensure_llava_demo(directory, demo_dir)
    return Path(directory)


def _write_all(work: Path, demo_dir: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write all files listed above into `work`."""
    (work / IMAGES).mkdir()
    align = settings["align"]
    per_kind = settings["per_kind"]
    seed = settings["seed"]
    count = settings["instruct"]
    train = _read_scenes(demo_dir, "train", align + count)
    captioned = _write_images(itertools.islice(train, align), work / IMAGES)
    asked = _write_images(instruct_scenes(train, count, seed), work / IMAGES)
    test = _write_images(_read_scenes(demo_dir, "test"), work / IMAGES)
    records = [instruct_record(scene, random.Random(f"{seed}/instruct/{scene.name}")) for scene in asked]
    records += [text_record(number, random.Random(f"{seed}/text/{number}")) for number in range(settings["text_only"])]
    random.Random(f"{seed}/order").shuffle(records)
    conversations = {
        ALIGN: [align_record(scene, random.Random(f"{seed}/align/{scene.name}")) for scene in captioned],
        INSTRUCT: records,
    }
    for name, rows in conversations.items():
        (work / name).write_text(json.dumps(rows, indent=1))

    questions = {
        QUESTIONS: eval_questions(test, per_kind, seed),
        DESCRIPTIONS: [
            {"question_id": number, "image": scene.name, "text": SHOW[0], "references": [scene.description]}
            for number, scene in enumerate(test[: min(per_kind, len(CONCEPTS))])
        ],
    }
    if (demo_dir / UNSEEN).is_dir():
        unseen = _write_images(_read_scenes(demo_dir, UNSEEN), work / IMAGES)
        questions[UNSEEN_QUESTIONS] = eval_questions(unseen, per_kind, seed)
        questions[TALK_QUESTIONS] = talk_questions(unseen, per_kind // 2, seed)
        val = _write_images(_read_scenes(demo_dir, "val"), work / IMAGES)
        questions[VAL_QUESTIONS] = eval_questions(val, per_kind, seed)
    for name, rows in questions.items():
        (work / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(demo_dir / "ATTRIBUTION.md", work)
    return {}


def _read_scenes(demo_dir: Path, split: str, least: int = 0) -> Iterator[DemoScene]:
    source = open_data(demo_split(demo_dir, split), Fields(), need_long=True)
    if least > len(source):
        raise UserError(f"{demo_dir} has {len(source)} {split} scenes, {least} are needed: build more scenes")
    for index in tqdm(range(len(source)), desc=f"reading {split} scenes", unit="scene", leave=False, disable=None):
        yield DemoScene.of(source.read(index), f"{split}-{index:06d}.jpg")


def instruct_scenes(scenes: Iterable[DemoScene], count: int, seed: int) -> list[DemoScene]:
    """Return `count` of the scenes in their order: all of several things, and the share `KEPT_SINGLES` of the others.

    If these are too few, the scenes that were left out follow.
    """
    kept: list[DemoScene] = []
    left: list[DemoScene] = []
    for scene in scenes:
        if len(kept) == count:
            break
        keep = len(scene.things) > 1 or random.Random(f"{seed}/kept/{scene.name}").random() < KEPT_SINGLES
        (kept if keep else left).append(scene)
    return kept + left[: count - len(kept)]


def _write_images(scenes: Iterable[DemoScene], target: Path) -> list[DemoScene]:
    """Write the images of the scenes into `target` and return the scenes."""
    written = []
    for scene in scenes:
        (target / scene.name).write_bytes(scene.data)
        written.append(scene)
    return written


def demo_questions(directory: Path) -> dict[str, Path]:
    """Return the question files in `directory`, keyed by the name of the file that their answers get."""
    files = {"answers": QUESTIONS, "descriptions": DESCRIPTIONS}
    files |= {UNSEEN_ANSWERS: UNSEEN_QUESTIONS, TALKS: TALK_QUESTIONS}
    return {name: directory / file for name, file in files.items() if (directory / file).is_file()}


DEMO_DIR = Path("data/llava_demo")
