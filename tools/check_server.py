#!/usr/bin/env python
"""Ask an OpenAI-style server the questions that evaluate_llava.py answered, and compare the answers text by text.

A server that reads the model otherwise gives other texts. Rounding turns texts, too: give both programs float32.
"""

from __future__ import annotations

import argparse
import base64
import mimetypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from clips import BrokenSample
from clips.common.errors import CommandError, UserError, run_command
from clips.common.escape import clip, one_line
from clips.common.files import read_json_records
from clips.common.flags import Parser
from mllm.data.images import ImageStore, broken_picture
from mllm.data.questions import images_of
from mllm.data.video import is_video

if TYPE_CHECKING:
    import httpx2

KEY_VARIABLE = "CLIPS_API_KEY"
NAMED = 10
"""Differing answers that are shown."""


def shown(store: ImageStore, name: str) -> dict[str, Any]:
    """The part of a request that shows a picture or a video; UserError if it is missing."""
    try:
        data = base64.b64encode(store.read(name)).decode()
    except BrokenSample as broken:
        raise broken_picture(store, broken) from None
    kind = "video_url" if is_video(name) else "image_url"
    return {"type": kind, kind: {"url": f"data:{mimetypes.guess_type(name)[0] or 'image/jpeg'};base64,{data}"}}


def sent(client: httpx2.Client, method: str, path: str, what: str, body: dict[str, Any] | None = None) -> Any:
    """The server's JSON; UserError if it refuses the request."""
    answer = client.request(method, path, json=body)
    if answer.status_code != 200:
        raise UserError(f"{what}: the server answers {answer.status_code}: {answer.text[:500]}")
    return answer.json()


def ask(client: httpx2.Client, model: str, store: ImageStore, most: int, line: dict[str, Any]) -> str:
    """The server's greedy answer to a line of evaluate_llava.py."""
    parts = [*(shown(store, name) for name in images_of(line)), {"type": "text", "text": line["prompt"]}]
    body = {"model": model, "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": most}
    answer = sent(client, "POST", "chat/completions", f"question {line['question_id']}", body)
    return str(answer["choices"][0]["message"]["content"]).strip()


def check(flags: argparse.Namespace) -> None:
    """Print how many texts are equal; CommandError if any text differs."""
    import httpx2  # of the extra chat

    lines = read_json_records(flags.answers)[: flags.limit]
    if not all({"question_id", "prompt", "text"} <= set(line) for line in lines):
        raise UserError(f"{flags.answers}: a line has no question_id, prompt and text, as of evaluate_llava.py")
    store, answers = ImageStore(flags.image_folder), []
    url, headers = flags.url.rstrip("/") + "/", {"Authorization": f"Bearer {os.environ.get(KEY_VARIABLE, 'none')}"}
    try:
        with httpx2.Client(base_url=url, timeout=600, headers=headers) as client:
            model = flags.model or sent(client, "GET", "models", "its list of models")["data"][0]["id"]
            # One after the other: in a batch of a server, rounding depends on the neighbours.
            for line in tqdm(lines, unit="answer", disable=None):
                answers.append(ask(client, model, store, flags.max_new_tokens, line))
    except httpx2.HTTPError as error:
        raise UserError(f"{flags.url} does not answer: {error}") from None
    except (LookupError, ValueError):
        raise UserError(f"{flags.url} does not answer as OpenAI's API does; most addresses end with /v1") from None
    differing = [(line, answer) for line, answer in zip(lines, answers, strict=True) if line["text"].strip() != answer]
    for line, answer in differing[:NAMED]:
        prompt, before, now = (one_line(clip(text)) for text in (line["prompt"], line["text"], answer))
        print(f"question {line['question_id']}: {prompt}\n  evaluation: {before}\n  server:     {now}")
    if differing:
        raise CommandError(f"the texts of {model} differ in {len(differing):,} of {len(lines):,} answers")
    print(f"all {len(lines):,} answers of {model} are equal")


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    p.add_argument("answers", type=Path, help="answers that evaluate_llava.py wrote")
    p.add_argument(
        "--url", default="http://127.0.0.1:8000/v1", help=f"the server's address; {KEY_VARIABLE} may hold its key"
    )
    p.add_argument("--model", help="the model's name there (default: the first of the server's list)")
    p.add_argument("--image-folder", type=Path, default=Path(), help="that of evaluate_llava.py: a folder or a tar")
    p.add_argument("--max-new-tokens", type=int, default=64, help="that of evaluate_llava.py")
    p.add_argument("--limit", type=int, help="only the first so many answers (default: all)")
    return p


if __name__ == "__main__":
    sys.exit(run_command(lambda: check(parser().parse_args())))
