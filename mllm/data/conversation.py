"""Turn conversations into token ids and labels. Training samples, prompts and chat template come from one format.

A format is a handful of literal strings around the texts of the turns:

    first  question  middle  answer  end  next  question  middle  answer  end …
    ────── masked ─────────  ─ trained ─  ────── masked ────────  ─ trained ─

Every segment is tokenised separately, so labels do not depend on finding a string in a rendered conversation (LLaVA's
"tokenization mismatch"). Texts are tokenised without special tokens: a typed `<image>` or `<|im_end|>` stays text, and
only the format and the sample's images add control tokens. Texts are stripped as in the saved chat template. A segment
boundary is then also a boundary of the tokenizer's pre-tokenisation, so the ids equal those of the full rendering.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from clips.common.errors import UserError
from mllm.data.formats import IMAGE_TOKEN, VIDEO_TOKEN, control_pattern, control_tokens, get_format, token_id
from mllm.data.video import NO_VIDEOS, VideoTokens

IGNORE = -100
NOT_TRAINED = "every label is masked, nothing would be learned"
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


@dataclass(frozen=True)
class Encoded:
    """`input_ids` and `labels` of one sample, of equal length. `truncated` is True if tokens were dropped."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


class _Text(str):
    """A text of the sample, which is tokenised without control tokens."""


@dataclass(frozen=True)
class _Image:
    """One image or video among the parts of a text."""


Images = int | Sequence[int]
"""The number of images of a sample, or the number of tokens of each image (`VideoTokens` for a video)."""
Segment = tuple["str | _Text | _Image", bool]
"""A piece of a conversation, where a plain `str` is a literal of the format, and True if it is trained."""


class ConversationEncoder:
    """Turns LLaVA conversations into ids and labels, and into prompts, for one tokenizer and one format.

    Args:
        tokenizer: a tokenizer with `<image>` as a special token; UserError is raised if it is not a fast one.
        version: a name in `FORMATS`.
        num_image_tokens: number of placeholders per image, or None if it depends on the image's size.
        max_length: the context, to which longer samples are truncated, or None for no limit.

    A turn is `{"from": "human" | "gpt" | "system", "value": text}`. In a human's text the literal `<image>` marks the
    place of an image. `value` may also be a list of `{"type": "image"}` and `{"type": "text", "text": …}` parts, in
    which a typed `<image>` is always text (chat and server use this). A video counts as an image, and in a sample with
    videos the literal `<video>` marks a place too.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        version: str,
        num_image_tokens: int | None,
        max_length: int | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(f"{type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json); convert it first")
        self._arguments = (tokenizer, version, num_image_tokens, max_length)
        self.tokenizer = tokenizer
        self.format = get_format(version, tokenizer)
        self.num_image_tokens = num_image_tokens
        self.max_length = max_length
        self._control = {text: token_id(tokenizer, text) for text in control_tokens(tokenizer)}
        self.image_id: int = self._control[IMAGE_TOKEN]
        self.video_id: int | None = self._control.get(VIDEO_TOKEN)
        self.placeholder_ids = tuple(id for id in (self.image_id, self.video_id) if id is not None)
        self._forbidden = set(self._control.values()) - {tokenizer.unk_token_id}
        self._pattern = control_pattern(tokenizer)
        self._inside = _text_tokenizer(tokenizer, prefix_space=False)
        self._start = _text_tokenizer(tokenizer, prefix_space=True)
        # SentencePiece tokenizers add a space before each text after a control token, or only before the first text.
        probe = tokenizer(f"{IMAGE_TOKEN}a", add_special_tokens=False)["input_ids"][1:]
        self._after_control = self._start if probe == self._start("a") else self._inside
        self._after_image = self._after_control
        if self.format.prefix_space:
            self._start = self._after_image = lambda text: self._inside(f" {text}")
        self._literal = functools.cache(self._split_literal)

    def __reduce__(self) -> tuple[Any, ...]:
        return ConversationEncoder, self._arguments  # the text tokenizers' settings do not survive pickling

    def encode(self, turns: Sequence[dict[str, Any]], images: Images, sample: str) -> Encoded:
        """Return a training sample, whose labels are every answer and its end token. Raises UserError for a bad one."""
        tokens = self._image_tokens(images)
        ids, trained = self._ids(self._segments(turns, tokens, sample), tokens, sample)
        truncated = self.max_length is not None and len(ids) > self.max_length
        if self.max_length is not None and truncated:
            room = self.max_length - sum(tokens)
            if room < 0:
                what = f"its {len(tokens)} image(s) take {sum(tokens)} tokens, more than the context"
                raise UserError(f"{sample}: {what}: raise model_max_length above {self.max_length}")
            # Tokens are dropped from the end, but never those of an image.
            texts = [position for position, token in enumerate(ids) if token not in self.placeholder_ids]
            dropped = set(texts[room:])
            ids = [token for position, token in enumerate(ids) if position not in dropped]
            trained = [train for position, train in enumerate(trained) if position not in dropped]

        if not any(trained):
            why = f"the first {self.max_length} tokens hold no answer" if truncated else "it has no answer"
            raise UserError(f"{sample}: {NOT_TRAINED}: {why}")
        labels = [token if train else IGNORE for token, train in zip(ids, trained, strict=True)]
        return Encoded(ids, labels, truncated)

    def answer(self, text: str) -> list[int]:
        """Return the ids of an answer and its end token, which do not depend on the question."""
        turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\n?"}, {"from": "gpt", "value": text}]
        return [label for label in self.encode(turns, [1], f"answer {text!r}").labels if label != IGNORE]

    def check(self, turns: Sequence[dict[str, Any]], images: Sequence[int], sample: str) -> None:
        """Raise the errors of `encode` about turns and placeholders, without tokenising. Token counts may be wrong."""
        if not any(trained for _, trained in self._segments(turns, images, sample)):
            raise UserError(f"{sample}: {NOT_TRAINED}: it has no answer")

    def prompt(self, turns: Sequence[dict[str, Any]], images: Images, sample: str = "prompt") -> list[int]:
        """Return the ids up to the start of the next answer, a prefix of those of `encode`, without truncation.

        Raises UserError for turns and placeholders that `encode` refuses, and if the last turn is not the human's.
        """
        tokens = self._image_tokens(images)
        segments = self._segments(turns, tokens, sample)
        if ROLES[turns[-1]["from"]] != "human":
            raise UserError(f"{sample}: the last turn of a prompt must be the human's")
        return self._ids(segments, tokens, sample)[0]

    def _image_tokens(self, images: Images) -> Sequence[int]:
        """Return the number of tokens of each image."""
        if not isinstance(images, int):
            return images
        assert self.num_image_tokens is not None, "the images of this model differ in tokens: give those of each"
        return [self.num_image_tokens] * images

    def _segments(self, turns: Sequence[dict[str, Any]], images: Sequence[int], sample: str) -> list[Segment]:
        """Return the segments in order: literals of the format, texts of the sample (`_Text`) and images."""
        checked = check_turns(turns, sample)
        if any(isinstance(tokens, VideoTokens) for tokens in images):
            checked = [
                (role, value.replace(VIDEO_TOKEN, IMAGE_TOKEN) if role == "human" and isinstance(value, str) else value)
                for role, value in checked
            ]
        bodies = place_images(checked, len(images), sample)
        if self.format.name == "plain" and (not images or [role for role, _ in checked] not in PLAIN_ROLES):
            raise UserError(f"{sample}: format plain takes one image question and one caption, nothing else")

        segments: list[Segment] = []
        opening = self.format.first
        for (role, _), body in zip(checked, bodies, strict=True):
            # As in LLaVA, empty answers are not trained, because they would teach the model to say nothing.
            trained = role == "gpt" and (body != [""] or self.format.name == "plain")
            if role == "system":
                if self.format.system is None:
                    raise UserError(f"{sample}: format {self.format.name} has no system role; remove that turn")
                before, opening = self.format.system
                segments.append((before, False))
            elif role == "human":
                segments.append((opening, False))
                opening = self.format.next
                if not self.format.keeps_question:
                    body = [part for part in body if isinstance(part, _Image)]

            parts = [self.format.lead, *body] if role != "system" else body
            # The lead and the text right after it form one segment, so that "▁word" is one token.
            if len(parts) > 1 and isinstance(parts[0], str) and isinstance(parts[1], str):
                parts[:2] = [parts[0] + parts[1]]
            segments += [(part if isinstance(part, _Image) else _Text(part), trained) for part in parts]

            if role == "human":
                segments.append((self.format.middle, False))
            elif role == "gpt" and self._pattern.search(self.format.end):
                segments.append((self.format.end, trained))
            elif role == "gpt":  # `plain`: a full stop and the newline may be one token of the vocabulary
                segments[-1] = (_Text(f"{segments[-1][0]}{self.format.end}"), True)
        return segments

    def _ids(self, segments: list[Segment], image_tokens: Sequence[int], sample: str) -> tuple[list[int], list[bool]]:
        """Return the token ids of the segments, and for each of them True if it is trained."""
        ids: list[int] = []
        trained: list[bool] = []
        counts = iter(image_tokens)
        encode = self._start
        for segment, train in segments:
            for piece in [segment] if isinstance(segment, (_Text, _Image)) else self._literal(segment):
                new: list[int] = []
                if isinstance(piece, _Image):
                    count = next(counts)
                    token = self.video_id if isinstance(count, VideoTokens) else self.image_id
                    if token is None:
                        raise UserError(f"{sample}: {NO_VIDEOS}")
                    new = [token] * count
                    encode = self._after_image
                elif isinstance(piece, int):
                    new = [piece]
                    if ids or not self.format.prefix_space:  # otherwise it is the bos, and the first text comes next
                        encode = self._after_control
                elif piece:
                    new = encode(str(piece))
                    encode = self._inside
                    if not self._forbidden.isdisjoint(new):
                        raise UserError(f"{sample}: the tokenizer turns typed text into a special token: {piece!r}")
                ids += new
                trained += [train] * len(new)
        return ids, trained

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        """The ids of tokens that end an answer. For `plain` these are all tokens that end with its newline."""
        ends = {piece for piece in self._literal(self.format.end) if isinstance(piece, int)}
        if not ends:
            texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
            ends = {token for token, text in enumerate(texts) if text.endswith(self.format.end)}
        return sorted({*ends, self.tokenizer.eos_token_id} - {None})

    def _split_literal(self, literal: str) -> list[str | int]:
        """Split a literal of the format into control token ids and the texts between them."""
        pieces: list[str | int] = []
        position = 0
        for match in self._pattern.finditer(literal):
            assert match.lastindex is not None  # every alternative of the pattern has one group
            pieces += [literal[position : match.start()], self._control[match[match.lastindex]]]
            position = match.end()
        return [piece for piece in [*pieces, literal[position:]] if piece != ""]


def _text_tokenizer(tokenizer: PreTrainedTokenizerBase, *, prefix_space: bool) -> Any:
    """Return a function text → ids without special tokens. With `prefix_space=False` it adds no space before a text."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if not prefix_space:
        for part in ("normalizer", "pre_tokenizer"):
            state[part] = _without_prefix_space(state[part])
    backend = Tokenizer.from_str(json.dumps(state))
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # special tokens are encoded like any other text
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _without_prefix_space(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Remove the prefix space from the description of a normalizer or pre-tokenizer. None if nothing is left of it."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        name = "normalizers" if "normalizers" in part else "pretokenizers"
        inner = [_without_prefix_space(step) for step in part[name]]
        return part | {name: [step for step in inner if step is not None]}
    changes: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
    }
    return part | changes.get(part["type"], {})


PLAIN_ROLES = [["human", "gpt"], ["human"]]


def check_turns(turns: Sequence[dict[str, Any]], sample: str) -> list[tuple[str, Any]]:
    """Return (role, value) of each turn, [system] human gpt human gpt …, and drop a leading answer, as LLaVA does.

    Raises UserError, with the name `sample`, for a turn of another form, and for turns in another order.
    """
    checked = []
    for number, turn in enumerate(turns):
        texts = _texts_of(turn)
        if texts is None:
            form = '{"from": "human", "gpt" or "system", "value": "text"}'
            raise UserError(f"{sample}: turn {number} must look like {form}, found {str(turn)[:120]}")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise UserError(f"{sample}: turn {number} has half a character (a lone surrogate)") from None
        checked.append((ROLES[turn["from"]], turn["value"]))

    start = 1 if checked and checked[0][0] == "system" else 0
    if len(checked) > start and checked[start][0] == "gpt":
        del checked[start]
    if len(checked) == start:
        raise UserError(f"{sample}: it has no question")
    for number, (role, _) in enumerate(checked[start:]):
        if role != ("human", "gpt")[number % 2]:
            raise UserError(f"{sample}: human and gpt must take turns, but turn {number + start} is from {role}")
    return checked


def _texts_of(turn: Any) -> list[str] | None:
    """Return the texts of a turn, or None unless its value is a text, or a list of text and, if human, image parts."""
    if not isinstance(turn, dict) or turn.get("from") not in ROLES:
        return None
    value = turn.get("value")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return None
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind != "image" or ROLES[turn["from"]] != "human":
            return None
    return texts


# LLaVA's places for images: the start or the end of a human's text.
_EDGE = re.compile(rf"\A(?:{IMAGE_TOKEN}\s*)+|(?:\s*{IMAGE_TOKEN})+\Z")


def place_images(turns: list[tuple[str, Any]], images: int, sample: str) -> list[list[str | _Image]]:
    """Split each turn's value into stripped texts and images.

    Human turns must have as many `<image>` as the sample has images. If they have more, those at the start or the end
    of a text are placeholders, and the others are typed text. Raises UserError for any other number.
    """
    human = [value for role, value in turns if role == "human"]
    pattern = re.compile(re.escape(IMAGE_TOKEN))
    if sum(_count_images(value, pattern) for value in human) > images:
        pattern = _EDGE
    placeholders = sum(_count_images(value, pattern) for value in human)
    if placeholders != images:
        what = f"{images} image(s) but {placeholders} {IMAGE_TOKEN} in its human turns"
        raise UserError(f"{sample}: it has {what}: give one per image")
    return [_parts(role, value, pattern) for role, value in turns]


def _count_images(value: str | list[dict[str, Any]], placeholder: re.Pattern[str]) -> int:
    """Return the number of images in the value of a human's turn."""
    if isinstance(value, list):
        return sum(part["type"] == "image" for part in value)
    return sum(match.count(IMAGE_TOKEN) for match in placeholder.findall(value.strip()))


def _parts(role: str, value: str | list[dict[str, Any]], placeholder: re.Pattern[str]) -> list[str | _Image]:
    images = _count_images(value, placeholder) if role == "human" else 0
    if isinstance(value, list):
        text = "".join(part["text"] for part in value if part["type"] == "text").strip()
    elif role != "human":
        text = value.strip()
    elif images > 1 and placeholder is not _EDGE:  # interleaved: every image keeps its place
        return [part for piece in value.strip().split(IMAGE_TOKEN) for part in (piece, _Image())][:-1]
    else:
        text = placeholder.sub("", value.strip()).strip()
    # Images come first, each on its own line, as in LLaVA and as the chat template renders a list of parts.
    parts: list[str | _Image] = [part for _ in range(images) for part in (_Image(), "\n")][:-1]
    return [*parts, "\n" + text] if parts and text else parts or [text]
