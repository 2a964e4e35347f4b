"""Recaptioning: write long captions for pairs of image and web caption, in files that pretraining reads.

OUT/part-000000000.parquet   columns key, image, web and long; a part gets this name only when it is complete
OUT/recaption.json           the settings of the run, because a run with other settings may not continue it
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import re
import shlex
import signal
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
from pyarrow import parquet
from tqdm import tqdm

from clips import BrokenSample, Dataset, Fields, decode_image, open_data, parse_fields, split_sentences
from clips.common.errors import BrokenDataError, CommandError, UserError, first_line
from clips.common.escape import clip, one_line
from clips.common.files import check_target, from_json, placing, read_json, write_json
from clips.common.live import say_next
from clips.common.paths import unused
from clips.common.rundir import changed, refuse

PROMPT = (
    "Describe the image in detail: all that can be seen in it, how many there are, where each one is, what it looks "
    "like, what it does, and the background. The caption below is a hint from the web, and it may be wrong. Where the "
    "two disagree, trust the image. Write whole sentences, the description alone.\nCaption: {web}"
)
SURE = 100  # the share of skipped pairs is checked after every so many pairs
KEY_VARIABLE = "CLIPS_API_KEY"
RETRIES = 8  # retries of a failed request, with growing pauses or as the server's Retry-After says
LONGEST, LISTING = 600, 10  # timeouts in seconds: for one caption with all retries, and for a server's list of models
GRACE = 5  # seconds that pending requests get to end after an error or a signal
LONGEST_TEXT = 20_000  # most characters of a server's caption
_REFUSAL = re.compile(
    r"\W*((sorry|unfortunately|i(['’]m| am) (sorry|unable|not able)|i can['’]t|i cannot|as an ai)\b"
    r"|(很|非常)?抱歉|对不起|對不起|我无法|我無法|我不能)",
    re.IGNORECASE,
)
_CONTROL = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]{2,64}\]")
"""Control tokens of known models (<|im_end|>, </s>, <image>, [INST]), which also act if they are typed as text."""
_LOOP = re.compile(r"(?<!\S)(\S.{0,200}?)(?:\s+\1(?!\S)){3}", re.DOTALL)
"""Matches the same words four times in a row."""


@dataclass
class Pair:
    """One image with its web caption, and the long caption or the reason why there is none."""

    key: str
    image: bytes = b""
    web: str = ""
    long: str = ""
    reason: str = ""
    """Why the pair is skipped; empty if its caption is good."""
    detail: str = ""


def turn(prompt: str, pair: Pair, image: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the chat messages that ask about an image, with its web caption as a hint without control tokens."""
    hint = one_line(pair.web, 1000)
    while _CONTROL.search(hint):  # removing a token may join two halves to a new one
        hint = _CONTROL.sub("", hint)
    text = prompt.replace("{web}", hint.strip())
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def whole_sentences(text: str) -> str:
    """Return `text`, which the limit on tokens cut off, without its last and incomplete sentence."""
    last = split_sentences(text)[-1:]
    return text[: text.rfind(last[0])].rstrip() if last else ""


def open_image(pair: Pair) -> Any:
    """Return the decoded image of a pair. If it is broken, return None and set the pair's reason."""
    if pair.reason:
        return None
    try:
        return decode_image(pair.image, pair.key, reduce_to=4_000_000)
    except BrokenSample as broken:
        pair.reason, pair.detail = "broken", broken.reason
        return None


class Endpoint:
    """Servers with the OpenAI API, `URL[,URL…][#MODEL]`.

    Only the server of `--key-for` gets the key. Raises UserError if one lists no models in ten seconds.
    """

    def __init__(self, addresses: str, prompt: str, flags: argparse.Namespace) -> None:
        listed, _, model = addresses.partition("#")
        urls = listed.split(",")
        if flags.key_for is not None and (flags.key_for not in urls or KEY_VARIABLE not in os.environ):
            raise UserError(f"--key-for {flags.key_for} must be one of {listed}, and {KEY_VARIABLE} must hold its key")
        self.prompt, self.flags = prompt, flags
        self.loop = asyncio.new_event_loop()
        self.servers = []
        for url in urls:
            key = os.environ[KEY_VARIABLE] if url == flags.key_for else "none"
            client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=RETRIES)
            self.servers.append((client, asyncio.Semaphore(flags.batch_size)))
        models = [self.loop.run_until_complete(first_model(client)) for client, _ in self.servers]
        self.identity = model or models[0]

    def caption(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        """Yield the pairs in order, after setting `long` or, where there is no caption, `reason` of each in place."""
        tasks: deque[asyncio.Task[Pair]] = deque()
        try:
            for number, pair in enumerate(pairs):
                tasks.append(self.loop.create_task(self._ask(pair, *self.servers[number % len(self.servers)])))
                # With so many requests pending, one slow answer does not hold up the others.
                if len(tasks) >= 4 * self.flags.batch_size * len(self.servers):
                    yield self.loop.run_until_complete(tasks.popleft())
            while tasks:
                yield self.loop.run_until_complete(tasks.popleft())
        finally:
            for task in tasks:
                task.cancel()
            if tasks:  # a timeout, because a signal may have left a task in a state that never ends
                self.loop.run_until_complete(asyncio.wait(tasks, timeout=GRACE))

    async def _ask(self, pair: Pair, client: openai.AsyncOpenAI, slots: asyncio.Semaphore) -> Pair:
        image = await asyncio.to_thread(open_image, pair)
        if image is None:
            return pair
        file = io.BytesIO()
        await asyncio.to_thread(image.save, file, "JPEG", quality=95)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        image = {"type": "image_url", "image_url": {"url": url}}
        messages: Any = turn(self.prompt, pair, image)
        try:
            async with slots:
                request = client.chat.completions.create(
                    model=self.identity, messages=messages, max_tokens=self.flags.max_new_tokens, temperature=0
                )
                choice = (await asyncio.wait_for(request, LONGEST)).choices[0]
            text = choice.message.content or ""
            is_text = isinstance(text, str) and len(text) <= LONGEST_TEXT
            if not is_text or choice.finish_reason not in ("stop", "length"):
                raise ValueError(f"finish_reason {choice.finish_reason}, {type(text).__name__} of length {len(text)}")
            pair.long = whole_sentences(text) if choice.finish_reason == "length" else text
        except Exception as error:
            pair.reason, pair.detail = "not answered", first_line(error.__cause__ or error)
            if isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError):
                raise CommandError(f"{client.base_url} is gone: {pair.detail}; the same command continues") from None
        return pair


async def first_model(client: openai.AsyncOpenAI) -> str:
    """Return the id of the first model that a server lists.

    Raises UserError if the server gives no valid list within LISTING seconds.
    """
    try:
        request = client.with_options(max_retries=0).models.with_raw_response.list()
        response = await asyncio.wait_for(request, LISTING)
        return str(from_json(response.text)["data"][0]["id"])
    except (openai.OpenAIError, asyncio.TimeoutError, ValueError, LookupError, TypeError) as error:
        what = f"{client.base_url} lists no models within {LISTING} seconds: {first_line(error.__cause__ or error)}"
        raise UserError(f"{what}. Most addresses end with /v1; a key needs --key-for") from None


def read_pairs(source: Dataset, indices: Iterable[int]) -> Iterator[Pair]:
    """Yield the pair at each index; one that cannot be read has a reason instead of an image."""
    for index in indices:
        try:
            sample = source.read(index)
            yield Pair(sample.key, sample.image, sample.web)
        except BrokenSample as broken:
            yield Pair(broken.key, reason="broken", detail=broken.reason)


def judge(pair: Pair) -> None:
    """Strip a pair's texts in place, and set its `reason` if the caption is empty, a refusal or repetitive."""
    for name in ("key", "web", "long"):  # UTF-8 cannot encode a lone surrogate
        setattr(pair, name, getattr(pair, name).encode("utf-8", "replace").decode().strip())
    if not pair.long:
        pair.reason = "empty"
    elif _REFUSAL.match(pair.long) or _CONTROL.match(pair.long):  # <think>
        pair.reason, pair.detail = "refusal", pair.long
    elif pair.long == pair.web:
        pair.reason = "the web caption"
    elif _LOOP.search(pair.long):
        pair.reason = "repetition"


def leave_out_messages(pairs: Sequence[Pair]) -> None:
    """Mark captions as "repeated" if a tenth of `pairs`, of at least three images, share at least their first half.

    Such a text is an error message of the server, or the prompt. Digits are ignored, because a message may contain the
    number of its request. Only texts that agree in their first 32 bytes are compared.
    """
    groups: defaultdict[bytes, list[tuple[str, Pair]]] = defaultdict(list)
    for pair in pairs:
        text = re.sub(r"\d+", "0", pair.long)
        groups[text.encode()[:32]].append((text, pair))
    for group in groups.values():
        beginning = os.path.commonprefix([text for text, _ in group])  # noqa: RUF071 - of texts
        is_common = len({pair.image for _, pair in group}) >= max(3, len(pairs) / 10)
        for text, pair in group:
            if is_common and not pair.reason and len(beginning) >= len(text) / 2:
                pair.reason, pair.detail = "repeated", pair.long


def divide(pairs: Sequence[Pair], limit: float, before: tuple[int, int] = (0, 0)) -> tuple[list[Pair], Counter[str]]:
    """Return the good pairs, and the counts of the others by reason. Raises BrokenDataError above the share `limit`.

    `before` are the numbers of pairs and of skipped pairs in other parts. They count too if `pairs` are fewer than
    `SURE`: one bad pair in a last part of two is no evidence, and the command could never finish.
    A caption that several images share describes none of them, whether it comes from a server or from a poor model.
    """
    leave_out_messages(pairs[-SURE:])
    images: defaultdict[str, set[bytes]] = defaultdict(set)
    for pair in pairs:
        images[pair.long].add(pair.image)
    for pair in pairs:
        if not pair.reason and len(images[pair.long]) > 1:
            pair.reason, pair.detail = "repeated", pair.long
    good = [pair for pair in pairs if not pair.reason]
    left_out = Counter(pair.reason for pair in pairs if pair.reason)
    every, bad = len(pairs), len(pairs) - len(good)
    if len(pairs) < SURE:
        every, bad = every + before[0], bad + before[1]
    if bad > limit * every or bad == every:
        last = [pair for pair in pairs if pair.reason][-1]
        what = f"of {len(pairs):,} pairs {dict(left_out)} would be left out, more than --max-left-out-share"
        raise BrokenDataError(f"{what}: {last.key}: {last.reason} {clip(one_line(last.detail), 200)}")
    return good, left_out


def write_part(
    path: Path, pairs: Iterable[Pair], limit: float, bar: tqdm[Any], before: tuple[int, int]
) -> Counter[str]:
    """Write the good pairs to `path`. Return the counts of the skipped pairs, which the file's metadata holds too.

    If a small part has no good pair, a JSON file of its name holds the counts alone.
    Raises BrokenDataError like `divide`.
    """
    captioned: list[Pair] = []
    for pair in pairs:
        if not pair.reason:
            judge(pair)
        captioned.append(pair)
        if len(captioned) % SURE == 0:
            divide(captioned, limit)
        bar.update()
    good, left_out = divide(captioned, limit, before)
    columns = {name: [getattr(pair, name) for pair in good] for name in ("key", "image", "web", "long")}
    if not good:  # pretraining refuses a table without rows
        write_json(path.with_suffix(".json"), left_out)
        return left_out
    table = pa.table(columns).replace_schema_metadata({"left_out": json.dumps(left_out)})
    with placing(path) as file:
        parquet.write_table(table, file, row_group_size=512)
    return left_out


def left_out_of(path: Path) -> Counter[str]:
    """Return the counts of skipped pairs that a part holds. Raises UserError if its file is damaged."""
    if not path.is_file():
        return Counter(read_json(path.with_suffix(".json")))
    try:
        return Counter(from_json(parquet.read_schema(path).metadata[b"left_out"]))
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}. Remove it and repeat the command") from None


def recaption_from_flags(flags: argparse.Namespace) -> None:
    """Run scripts/recaption.py. Raises UserError for wrong flags, BrokenDataError if too many pairs are skipped."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    output: Path = flags.output
    check_target(output)
    if not flags.captioner.startswith(("http://", "https://")):
        raise UserError(f"--captioner {flags.captioner!r} must be URL[,URL…][#MODEL] of servers (docs/recaption.md)")
    fields = parse_fields(flags.fields, Fields())
    source = open_data(flags.data, fields, image_root=flags.image_root, need_long=False)
    if any(Path(file).resolve().is_relative_to(output.resolve()) for file in source.files):
        raise UserError(f"--data {flags.data} contains {output}, the output of this command: choose other data")

    prompt = flags.prompt.read_text(encoding="utf-8-sig").strip() if flags.prompt else PROMPT
    captioner = Endpoint(flags.captioner, prompt, flags)
    settings = {name: getattr(flags, name) for name in ("data", "fields", "image_root", "part_size", "max_new_tokens")}
    settings |= {"pairs": len(source), "captioner": captioner.identity, "prompt": prompt}
    output.mkdir(parents=True, exist_ok=True)
    if any(output.glob("*.parquet")):
        changes = changed(read_json(output / "recaption.json"), settings)
        refuse(changes, f"{output} holds captions of a run with other settings", "Choose another --output")
    write_json(output / "recaption.json", settings)

    every = range(len(source))
    parts = {output / f"part-{i:09d}.parquet": every[i : i + flags.part_size] for i in every[:: flags.part_size]}
    left_out = {path: left_out_of(path) for path in parts if path.is_file() or path.with_suffix(".json").is_file()}
    missing = {path: indices for path, indices in parts.items() if path not in left_out}
    captioned = captioner.caption(read_pairs(source, itertools.chain.from_iterable(missing.values())))
    done = len(source) - sum(map(len, missing.values()))
    with tqdm(total=len(source), initial=done, unit="pair", disable=None) as bar:
        for path, indices in missing.items():
            before = sum(len(parts[other]) for other in left_out), sum(bad.total() for bad in left_out.values())
            part = itertools.islice(captioned, len(indices))
            left_out[path] = write_part(path, part, flags.max_left_out_share, bar, before)

    counts = dict(sum(left_out.values(), Counter())) | {"no pair": source.skipped[0]}
    print(f"{len(source):,} pairs are captioned in {output}; left out: {counts}")
    name = unused(Path("runs/recaptioned")).name
    say_next(f"python scripts/pretrain_clips.py --name {name} --data {shlex.quote(str(output))}")


def stop(number: int, frame: Any) -> None:
    """Exit with the code of a signal. It is a SystemExit, because the client retries after any other exception."""
    print("\nstopped by a signal; the same command continues after the last full part", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)
