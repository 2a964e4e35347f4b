"""Short videos with questions in LLaVA's format, made from the demo's films (clips/data/motion.py).

    videos/         train-NNNNNN.mp4, test-NNNNNN.mp4: two things, one after the other, go from place to place
    instruct.json   conversations about the videos of training
    question.jsonl  held-out questions with `kind` and `answer`

The demo's own files stay as they are.
"""

from __future__ import annotations

import json
import random
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from clips import Film, at_place, capital, draw_film, ensure_built, film_artists
from clips.common.errors import UserError
from mllm.data.demo import INSTRUCT, QUESTIONS, QuestionAnswer, turns_of
from mllm.data.video import MISSING

VERSION = 1
"""Raise it if texts or files change: older folders are then built anew."""
VIDEOS = "videos"
SIDE, RATE = 128, 8
"""Of a frame in pixels, and frames a second."""
WHERE_TO = ("Where does the {thing} go?", "At which place does the {thing} end?", "Where does the {thing} move to?")
WHERE_FROM = ("Where does the {thing} come from?", "At which place does the {thing} begin?")
WHAT = {
    "first": ("What comes first?", "Which thing is seen first?", "What can be seen at the beginning?"),
    "second": ("What comes second?", "Which thing is seen last?", "What can be seen at the end?"),
}


def ask_where(film: Film, which: int, end: bool, rng: random.Random) -> QuestionAnswer:
    thing, begins, ends = film.moves[which]
    return rng.choice(WHERE_TO if end else WHERE_FROM).format(thing=thing), capital(at_place(ends if end else begins))


def ask_what(film: Film, which: int, rng: random.Random) -> QuestionAnswer:
    return rng.choice(WHAT[("first", "second")[which]]), f"A {film.moves[which][0]}"


def instruct_record(film: Film, name: str, rng: random.Random) -> dict[str, Any]:
    """A conversation about names or about places: a question about a place would give a name away."""
    if rng.random() < 0.5:
        asked = [ask_what(film, which, rng) for which in (0, 1)]
    else:
        asked = [ask_where(film, which, end, rng) for which in (0, 1) for end in (False, True)]
    rng.shuffle(asked)
    turns = turns_of(asked)
    turns[0]["value"] = f"<video>\n{turns[0]['value']}"
    return {"id": Path(name).stem, "video": name, "conversations": turns}


def film_questions(film: Film, name: str, rng: random.Random) -> list[dict[str, Any]]:
    """One question of each kind."""
    asked = {
        "where_to": ask_where(film, rng.randrange(2), True, rng),
        "where_from": ask_where(film, rng.randrange(2), False, rng),
        "first": ask_what(film, 0, rng),
        "second": ask_what(film, 1, rng),
    }
    return [{"video": name, "text": text, "kind": kind, "answer": answer} for kind, (text, answer) in asked.items()]


def ensure_demo_videos(directory: Path | str, *, train: int = 2_000, test: int = 200, seed: int = 0) -> Path:
    """Write the files above into `directory` as `ensure_built`, unless the same are there; returns the directory.

    `train` and `test` are numbers of videos. Raises UserError if packages are missing, or if the folder holds something
    else.
    """
    sizes = {"train": train, "test": test}
    wanted = {"version": VERSION, "films": sizes, "seed": seed}
    return ensure_built(Path(directory), wanted, partial(_write_all, sizes=sizes, seed=seed), what="demo videos")


def _write_all(work: Path, sizes: dict[str, int], seed: int) -> dict[str, Any]:
    artists = film_artists()
    (work / VIDEOS).mkdir()
    records, questions = [], []
    for split, size in sizes.items():
        for number in tqdm(range(size), f"drawing {split} videos", unit="video", leave=False, disable=None):
            film = draw_film(split, number, seed, SIDE)
            rng, name = random.Random(f"{seed}/videos/{split}/{number}"), f"{split}-{number:06d}.mp4"
            write_video(work / VIDEOS / name, film.frames(artists, rng), RATE)
            if split == "train":
                records.append(instruct_record(film, name, rng))
            else:
                questions += film_questions(film, name, rng)
    (work / INSTRUCT).write_text(json.dumps(records, indent=1))
    lines = [json.dumps({"question_id": number} | question) + "\n" for number, question in enumerate(questions)]
    (work / QUESTIONS).write_text("".join(lines))
    return {"artists": list(artists)}


def write_video(path: Path, frames: list[np.ndarray], rate: int) -> None:
    """Write uint8 [H, W, 3] frames of even sides as an mp4 (H.264). Raises UserError if PyAV is missing."""
    try:
        import av
    except ModuleNotFoundError:
        raise UserError(MISSING) from None
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options={"crf": "18", "threads": "1"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
