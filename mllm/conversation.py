"""Conversations as token ids with labels: one set of pieces builds training samples, prompts and the chat template.

A format is a handful of literal strings around the texts of the turns:

    first  question  middle  answer  end  next  question  middle  answer  end …
    ────── masked ─────────  ─ trained ─  ────── masked ────────  ─ trained ─

Every segment is tokenised on its own, so a label never depends on finding a string in a rendered conversation
(LLaVA's "tokenization mismatch"). Texts are tokenised with special-token parsing off: control tokens and images
enter only where a format or a sample puts them, and a typed `<image>` or `<|im_end|>` stays text. Texts are stripped,
as the saved chat template strips them; then a segment boundary is also a boundary of the tokenizer's own
pre-tokenisation and the ids equal those of the whole rendering.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from clips.errors import UserError

IGNORE = -100
IMAGE_TOKEN = "<image>"

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True, kw_only=True)
class Format:
    """The literal strings of a conversation; control tokens are written as the tokenizer spells them."""

    name: str
    first: str
    """Before the first question, default system text included."""
    system: tuple[str, str] | None
    """Replaces `first` around a system text that the sample brings; None where the format has no system role."""
    middle: str
    end: str
    """Ends an answer and is trained: one control token (`plain`: a newline)."""
    next: str
    tail: str = ""
    """Follows the last `end` in a rendered conversation; not part of a training sample."""
    lead: str = ""
    """Starts each question and each answer, inside the text's own segment (`v1`: the space after the colon)."""
    keeps_question: bool = True
    """False for `plain`: of the question only the images stay."""

    def chat_template(self) -> str:
        """Jinja template with these pieces, for content as a string or as a list of image and text parts."""
        body = "body" if self.keeps_question else f"'{IMAGE_TOKEN}' * (body.split('{IMAGE_TOKEN}') | length - 1)"
        before, after = self.system or ("", "")
        refuse = "{{ raise_exception('This chat format has no system role') }}"
        system = f"{{{{ {_quote(before)} + body + {_quote(after)} }}}}" if self.system else refuse
        return (
            "{%- for message in messages -%}"
            "{%- if message['content'] is string -%}{%- set body = message['content'] | trim -%}"
            "{%- else -%}{%- set parts = namespace(images='', text='') -%}"
            "{%- for part in message['content'] -%}"
            f"{{%- if part['type'] == 'text' -%}}{{%- set parts.text = parts.text + part['text'] -%}}"
            f"{{%- elif part['type'] == 'image' -%}}{{%- set parts.images = parts.images + '{IMAGE_TOKEN}\\n' -%}}"
            "{%- endif -%}{%- endfor -%}"
            "{%- set body = (parts.images + (parts.text | trim)) | trim -%}{%- endif -%}"
            f"{{%- if message['role'] == 'user' and body.split('{IMAGE_TOKEN}') | length == 2 -%}}"
            f"{{%- set body = ('{IMAGE_TOKEN}\\n' + (body | replace('{IMAGE_TOKEN}', '') | trim)) | trim -%}}"
            "{%- endif -%}"
            f"{{%- if message['role'] == 'system' -%}}{system}"
            "{%- elif message['role'] == 'user' -%}"
            f"{{{{ {_quote(self.first)} if loop.first else ('' if messages[loop.index0 - 1]['role'] == 'system' "
            f"else {_quote(self.next)}) }}}}"
            f"{{{{ {_quote(self.lead)} + {body} + {_quote(self.middle)} }}}}"
            f"{{%- else -%}}{{{{ {_quote(self.lead)} + body + {_quote(self.end)} }}}}"
            f"{{{{ {_quote(self.tail)} if loop.last else '' }}}}"
            "{%- endif -%}{%- endfor -%}"
        )


def _quote(text: str) -> str:
    """`text` as a Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _plain(tokenizer: PreTrainedTokenizerBase) -> Format:
    return Format(name="plain", first="", system=None, middle="", end="\n", next="", keeps_question=False)


def _v1(tokenizer: PreTrainedTokenizerBase) -> Format:
    if tokenizer.eos_token is None:
        raise UserError("conversation format v1 ends answers with the tokenizer's eos token, and it has none")
    return Format(
        name="v1",
        first=f"{V1_SYSTEM} USER:",
        system=("", " USER:"),
        middle=" ASSISTANT:",
        end=tokenizer.eos_token,
        next="USER:",
        lead=" ",
    )


def _llama_3(tokenizer: PreTrainedTokenizerBase) -> Format:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    before, after = f"<|begin_of_text|>{header('system')}", f"<|eot_id|>{header('user')}"
    return Format(
        name="llama_3",
        first=before + LLAMA_3_SYSTEM + after,
        system=(before, after),
        middle=f"<|eot_id|>{header('assistant')}",
        end="<|eot_id|>",
        next=header("user"),
    )


def _chatml(tokenizer: PreTrainedTokenizerBase) -> Format:
    before, after = "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"
    return Format(
        name="chatml",
        first=f"{before}You are a helpful assistant.{after}",
        system=(before, after),
        middle="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        next="\n<|im_start|>user\n",
        tail="\n",
    )


def _auto(tokenizer: PreTrainedTokenizerBase) -> Format:
    """Cut the tokenizer's own chat template into pieces by rendering it around sentinel texts."""
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: choose --version v1, llama_3 or chatml")
    system, *texts = [f"sentinel{i}text" for i in range(5)]
    roles = ["user", "assistant", "user", "assistant"]
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]

    def cut(messages: list[dict[str, str]], generate: bool = False) -> list[str]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        return re.split("|".join(message["content"] for message in messages), text)

    try:
        first, middle, between, second_middle, closing = cut(turns)
        prompt = cut(turns[:1], generate=True)
        closing_1 = cut(turns[:2])[-1]
    except (TemplateError, ValueError) as error:
        raise UserError(f"the tokenizer's chat template cannot be cut into turns ({error}): choose --version") from None
    try:
        system_pieces = cut([{"role": "system", "content": system}, *turns])
        fits = len(system_pieces) == 6 and system_pieces[2:] == [middle, between, second_middle, closing]
    except (TemplateError, ValueError):
        fits = False
    control = _control_pattern(tokenizer).match(closing.lstrip())
    if not (middle == second_middle and prompt == [first, middle] and closing_1 == closing and control):
        raise UserError(
            "the tokenizer's chat template does not treat every turn alike, or ends answers without a special token, "
            "so training and chat would differ: choose --version v1, llama_3 or chatml"
        )
    end = closing[: len(closing) - len(closing.lstrip())] + control.group()
    if not between.startswith(end):
        raise UserError("the tokenizer's chat template ends its last answer in another way: choose --version")
    return Format(
        name="auto",
        first=first,
        system=(system_pieces[0], system_pieces[1]) if fits else None,
        middle=middle,
        end=end,
        next=between[len(end) :],
        tail=closing[len(end) :],
    )


FORMATS = {"plain": _plain, "v1": _v1, "llama_3": _llama_3, "chatml": _chatml, "auto": _auto}


def get_format(name: str, tokenizer: PreTrainedTokenizerBase) -> Format:
    """The pieces of format `name` for `tokenizer`; UserError for an unknown name or missing control tokens."""
    if name not in FORMATS:
        raise UserError(f"conversation format {name!r} is not known; choose one of: {', '.join(FORMATS)}")
    chosen = FORMATS[name](tokenizer)
    literals = " ".join([chosen.first, chosen.middle, chosen.end, chosen.next])
    missing = sorted(set(re.findall(r"<\|\w+\|>", literals)) - set(_control_tokens(tokenizer)))
    if missing:
        raise UserError(
            f"conversation format {name} needs the special tokens {', '.join(missing)}, which this tokenizer does not "
            "have: choose --version auto or v1"
        )
    # What the tokenizer puts in front of every text (a bos) belongs to the pieces, so that ids and template agree.
    leading = tokenizer.bos_token if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    if leading and not chosen.first.startswith(leading):
        system = chosen.system and (leading + chosen.system[0], chosen.system[1])
        chosen = replace(chosen, first=leading + chosen.first, system=system)
    return chosen


def chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja chat template to save with a model that is trained in format `name`."""
    return get_format(name, tokenizer).chat_template()


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}


def _control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches one control token, with the white space that the tokenizer swallows around it (lstrip, rstrip)."""
    tokens = sorted(_control_tokens(tokenizer).values(), key=lambda token: -len(token.content))
    alternatives = [r"\s*" * token.lstrip + f"({re.escape(token.content)})" + r"\s*" * token.rstrip for token in tokens]
    return re.compile("|".join(alternatives) or r"(?!)")


@dataclass(frozen=True)
class Encoded:
    """`input_ids` and `labels` of one sample, equally long; `truncated` says that something was cut."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


class _Text(str):
    """A text of the sample: tokenised without looking for control tokens."""


@dataclass(frozen=True)
class _Image:
    """Stands for one image among the parts of a text."""


Segment = tuple["str | _Text | _Image", bool]
"""A piece of a conversation (plain `str`: a literal of the format), and whether it is trained."""


class ConversationEncoder:
    """Turns LLaVA conversations into ids and labels, and into prompts, for one tokenizer and one format.

    Args:
        tokenizer: a fast tokenizer with `<image>` as a special token.
        version: a name of `FORMATS`.
        num_image_tokens: placeholders per image.
        max_length: the context; longer samples are truncated (None: never).

    A turn is `{"from": "human" | "gpt" | "system", "value": text}`. In a human's text the literal `<image>` marks the
    place of an image; `value` may also be a list of `{"type": "image"}` and `{"type": "text", "text": …}` parts, in
    which a typed `<image>` is always text (chat and server use this).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, version: str, num_image_tokens: int, max_length: int | None = None
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(f"{type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json); convert it first")
        self._arguments = (tokenizer, version, num_image_tokens, max_length)
        self.tokenizer = tokenizer
        self.format = get_format(version, tokenizer)
        self.num_image_tokens = num_image_tokens
        self.max_length = max_length
        self._control = {text: tokenizer.convert_tokens_to_ids(text) for text in _control_tokens(tokenizer)}
        if IMAGE_TOKEN not in self._control:
            raise UserError(f"the tokenizer has no special token {IMAGE_TOKEN}: add it before building conversations")
        self.image_id = self._control[IMAGE_TOKEN]
        self._forbidden = set(self._control.values()) - {tokenizer.unk_token_id}
        self._pattern = _control_pattern(tokenizer)
        self._at_start = _text_tokenizer(tokenizer, prefix_space=True)
        self._inside = _text_tokenizer(tokenizer, prefix_space=False)
        # SentencePiece kinds put a space before a text: some before each one that follows a control token, some only
        # before the very first one.
        probe = tokenizer(f"{IMAGE_TOKEN}a", add_special_tokens=False)["input_ids"][1:]
        self._after_control = self._at_start if probe == self._at_start("a") else self._inside
        self._literal = functools.cache(self._split_literal)
        ends = [
            piece if isinstance(piece, int) else self._inside(piece)[-1] for piece in self._literal(self.format.end)
        ]
        self.stop_ids = sorted({*ends, tokenizer.eos_token_id} - {None})

    def __reduce__(self) -> tuple[Any, ...]:
        return ConversationEncoder, self._arguments  # the text tokenizers' settings do not survive pickling

    def encode(self, turns: Sequence[dict[str, Any]], images: int, sample: str) -> Encoded:
        """One training sample; the loss is on every answer and its end token.

        Raises UserError naming `sample` for bad turns, for another number of placeholders than `images`, and where
        nothing would be trained.
        """
        ids, trained = self._ids(self._segments(turns, images, sample), sample)
        truncated = self.max_length is not None and len(ids) > self.max_length
        if truncated:
            room = self.max_length - ids.count(self.image_id)
            if room < 0:
                raise UserError(
                    f"{sample}: its {images} image(s) take {ids.count(self.image_id)} tokens, more than the context "
                    f"(model_max_length) of {self.max_length}: raise it, or use fewer tokens per image"
                )
            kept = []
            for position, token in enumerate(ids):  # drop other tokens from the end, never those of an image
                room -= token != self.image_id
                if token == self.image_id or room >= 0:
                    kept.append(position)
            ids, trained = [ids[i] for i in kept], [trained[i] for i in kept]
        if not any(trained):
            why = f"the first {self.max_length} tokens hold no answer" if truncated else "it has no answer"
            raise UserError(f"{sample}: every label is masked, nothing would be learned: {why}")
        labels = [token if train else IGNORE for token, train in zip(ids, trained, strict=True)]
        return Encoded(ids, labels, truncated)

    def check(self, turns: Sequence[dict[str, Any]], images: int, sample: str) -> None:
        """Raise what `encode` would raise for the turns and placeholders, without tokenising."""
        self._segments(turns, images, sample)

    def prompt(self, turns: Sequence[dict[str, Any]], images: int, sample: str = "prompt") -> list[int]:
        """Ids up to the place where the next answer starts: a prefix of what `encode` builds. Not truncated."""
        segments = self._segments(turns, images, sample)
        if not turns or ROLES[turns[-1]["from"]] != "human":
            raise UserError(f"{sample}: the last turn of a prompt must be the human's")
        return self._ids(segments, sample)[0]

    def _segments(self, turns: Sequence[dict[str, Any]], images: int, sample: str) -> list[Segment]:
        """The conversation in order: literals of the format, the sample's texts (`_Text`) and images."""
        turns = check_turns(turns, sample)
        bodies = place_images(turns, images, sample)
        if self.format.name == "plain" and (images == 0 or [role for role, _ in turns] not in PLAIN_ROLES):
            raise UserError(f"{sample}: format plain takes one image question and one caption, nothing else")
        segments: list[Segment] = []
        opening = self.format.first
        for (role, _), body in zip(turns, bodies, strict=True):
            trained = role == "gpt"
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
            # The lead and a text right after it are one segment, so that "▁word" is one token.
            if len(parts) > 1 and isinstance(parts[1], str):
                parts[:2] = [parts[0] + parts[1]]
            segments += [(part if isinstance(part, _Image) else _Text(part), trained) for part in parts]
            if role == "human":
                segments.append((self.format.middle, False))
            elif role == "gpt":
                segments.append((self.format.end, True))
        return segments

    def _ids(self, segments: list[Segment], sample: str) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        trained: list[bool] = []
        encode = self._at_start
        for segment, train in segments:
            for piece in [segment] if isinstance(segment, (_Text, _Image)) else self._literal(segment):
                if isinstance(piece, _Image):
                    new, encode = [self.image_id] * self.num_image_tokens, self._after_control
                elif isinstance(piece, int):
                    new, encode = [piece], self._after_control
                elif piece:
                    new, encode = encode(str(piece)), self._inside
                    if not self._forbidden.isdisjoint(new):
                        raise UserError(f"{sample}: the tokenizer turns typed text into a special token: {piece!r}")
                else:
                    new = []
                ids += new
                trained += [train] * len(new)
        return ids, trained

    def _split_literal(self, literal: str) -> list[str | int]:
        """A format's string as control token ids and the texts between them."""
        pieces: list[str | int] = []
        position = 0
        for match in self._pattern.finditer(literal):
            pieces += [literal[position : match.start()], self._control[match[match.lastindex]]]
            position = match.end()
        return [piece for piece in [*pieces, literal[position:]] if piece != ""]


def _text_tokenizer(tokenizer: PreTrainedTokenizerBase, *, prefix_space: bool) -> Any:
    """A function text → ids that knows no special tokens; `prefix_space=False`: and adds no space in front."""
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
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return part | {"add_prefix_space": False}
    if part["type"] == "Sequence":
        name = "normalizers" if "normalizers" in part else "pretokenizers"
        return part | {name: [kept for kept in map(_without_prefix_space, part[name]) if kept is not None]}
    return part


def _is_content(turn: dict[str, Any]) -> bool:
    """A text, or a list of text parts and (in a human turn) image parts."""
    value = turn.get("value")
    return isinstance(value, str) or (
        isinstance(value, list)
        and all(
            isinstance(part, dict)
            and (
                (part.get("type") == "text" and isinstance(part.get("text"), str))
                or (part.get("type") == "image" and ROLES[turn["from"]] == "human")
            )
            for part in value
        )
    )


PLAIN_ROLES = [["human", "gpt"], ["human"]]


def check_turns(turns: Sequence[dict[str, Any]], sample: str) -> list[tuple[str, Any]]:
    """(role, value) of each turn: [system] human gpt human gpt …, as LLaVA without an answer that starts the sample.

    Raises UserError naming `sample` and the turn.
    """
    if not isinstance(turns, (list, tuple)) or not turns:
        raise UserError(f"{sample}: 'conversations' must be a list of turns that is not empty")
    checked = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or not _is_content(turn):
            raise UserError(
                f'{sample}: turn {number} must look like {{"from": "human" or "gpt" or "system", "value": "text"}}, '
                f"found {str(turn)[:120]}"
            )
        checked.append((ROLES[turn["from"]], turn["value"]))
    start = 1 if checked[0][0] == "system" else 0
    if len(checked) > start and checked[start][0] == "gpt":
        del checked[start]
    for number, (role, _) in enumerate(checked[start:]):
        if role != ("human", "gpt")[number % 2]:
            raise UserError(f"{sample}: human and gpt must take turns, but turn {number + start} is from {role}")
    if len(checked) == start:
        raise UserError(f"{sample}: it has no question")
    return checked


# LLaVA's places of an image: where a human's text starts or ends.
_EDGE = re.compile(rf"\A(?:{IMAGE_TOKEN}\s*)+|(?:\s*{IMAGE_TOKEN})+\Z")


def place_images(turns: list[tuple[str, Any]], images: int, sample: str) -> list[list[str | _Image]]:
    """Each turn's value as stripped text parts and images.

    The `<image>` of human turns are as many as the sample has images. Where they are more, those at the start or the
    end of a text are the placeholders and the others are typed text. Any other count raises UserError naming `sample`.
    """
    human = [value for role, value in turns if role == "human"]
    texts = [value.strip() for value in human if isinstance(value, str)]
    listed = sum(_count_images(value) for value in human if isinstance(value, list))
    found = listed + sum(text.count(IMAGE_TOKEN) for text in texts)
    pattern = re.compile(re.escape(IMAGE_TOKEN))
    if found > images:
        pattern = _EDGE
        found = listed + sum(match.count(IMAGE_TOKEN) for text in texts for match in pattern.findall(text))
    if found != images:
        raise UserError(
            f"{sample}: it has {images} image(s) but {found} {IMAGE_TOKEN} placeholder(s) in its human turns: "
            "give one per image"
        )
    return [_parts(role, value, pattern) for role, value in turns]


def _count_images(parts: list[dict[str, Any]]) -> int:
    return sum(part["type"] == "image" for part in parts)


def _parts(role: str, value: str | list[dict[str, Any]], placeholder: re.Pattern[str]) -> list[str | _Image]:
    if isinstance(value, list):
        images = _count_images(value)
        text = "".join(part["text"] for part in value if part["type"] == "text").strip()
    elif role != "human":
        images, text = 0, value.strip()
    else:
        text = value.strip()
        images = sum(match.count(IMAGE_TOKEN) for match in placeholder.findall(text))
        if images > 1 and placeholder is not _EDGE:  # interleaved: every image stays where it stands
            return [part for piece in text.split(IMAGE_TOKEN) for part in (piece, _Image())][:-1]
        text = placeholder.sub("", text).strip()
    # Images first, each on a line of its own, as LLaVA does and as the chat template renders a list of parts.
    parts: list[str | _Image] = [part for _ in range(images) for part in (_Image(), "\n")][:-1]
    return [*parts, "\n" + text] if parts and text else parts or [text]
