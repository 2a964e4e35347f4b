#!/usr/bin/env python
"""Ask an OpenAI-style server the questions that evaluate_llava.py answered, and compare the answers text by text.

A server that reads the model otherwise gives other texts. Rounding turns texts, too: give both programs float32.
"""

from __future__ import annotations

import argparse
import base64
import json
import mimetypes
import os
import sys
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from clips import BrokenSample
from clips.common.errors import CommandError, UserError, first_line, run_command
from clips.common.escape import one_line
from clips.common.files import read_json_records
from clips.common.flags import Parser
from mllm.data.images import ImageStore, broken_picture
from mllm.data.questions import images_of
from mllm.data.video import is_video

KEY_VARIABLE = "CLIPS_API_KEY"
NAMED = 10
"""Differing answers that are shown."""
MOST_BYTES = 10_000_000
"""Of one answer."""


def shown(store: ImageStore, name: str) -> dict[str, Any]:
    """The part of a request that shows a picture or a video; UserError if it is missing."""
    try:
        data = base64.b64encode(store.read(name)).decode()
    except BrokenSample as broken:
        raise broken_picture(store, broken) from None
    kind = "video_url" if is_video(name) else "image_url"
    return {"type": kind, kind: {"url": f"data:{mimetypes.guess_type(name)[0] or 'image/jpeg'};base64,{data}"}}


def sent(flags: argparse.Namespace, path: str, body: dict[str, Any] | None = None) -> Any:
    """The server's JSON, of at most MOST_BYTES; UserError if it refuses the request or sends something else."""
    url = f"{flags.url.rstrip('/')}/{path}"
    headers = {"Authorization": f"Bearer {os.environ.get(KEY_VARIABLE, 'none')}", "Content-Type": "application/json"}
    request = Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urlopen(request, timeout=600) as response:  # it unpacks nothing
            content = response.read(MOST_BYTES + 1)
    except HTTPError as error:
        text = error.read(500).decode(errors="replace")
        raise UserError(f"{path}: the server answers {error.code}: {text}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(f"{flags.url} does not answer: {first_line(error)}") from None
    try:
        if len(content) <= MOST_BYTES:
            return json.loads(content)
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{url} does not answer as OpenAI's API does; most addresses end with /v1")


def ask(flags: argparse.Namespace, model: str, store: ImageStore, line: dict[str, Any]) -> str:
    """The server's greedy answer to a line of evaluate_llava.py."""
    content = [*(shown(store, name) for name in images_of(line)), {"type": "text", "text": line["prompt"]}]
    messages = [{"role": "user", "content": content}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": flags.max_new_tokens}
    answer = sent(flags, "chat/completions", body)
    try:
        return answer["choices"][0]["message"]["content"].strip()
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"question {line['question_id']}: the answer has no text: {str(answer)[:500]}") from None


def check(flags: argparse.Namespace) -> None:
    """Print how many texts are equal; CommandError if any text differs."""
    if flags.limit is not None and flags.limit < 1:
        raise UserError(f"--limit {flags.limit} must be at least 1")
    lines = read_json_records(flags.answers)[: flags.limit]
    if not lines or not all({"question_id", "prompt", "text"} <= set(line) for line in lines):
        raise UserError(f"{flags.answers}: a line has no question_id, prompt and text, as of evaluate_llava.py")
    store = ImageStore(flags.image_folder)
    models = {"data": [{"id": flags.model}]} if flags.model else sent(flags, "models")
    try:
        model = str(models["data"][0]["id"])
    except (LookupError, TypeError):
        raise UserError(f"{flags.url}/models names no model: give --model") from None

    # One after the other: in a batch of a server, rounding depends on the neighbours.
    answers = [ask(flags, model, store, line) for line in tqdm(lines, unit="answer", disable=None)]

    differing = [(line, answer) for line, answer in zip(lines, answers, strict=True) if line["text"].strip() != answer]
    for line, answer in differing[:NAMED]:
        prompt, before, now = (one_line(text) for text in (line["prompt"], line["text"], answer))
        print(f"question {line['question_id']}: {prompt}\n  evaluation: {before}\n  server:     {now}")
    if differing:
        raise CommandError(f"the texts of {model} differ in {len(differing):,} of {len(lines):,} answers")
    print(f"all {len(lines):,} answers of {one_line(model)} are equal")


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
