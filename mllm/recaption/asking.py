"""The question to a captioner: the prompt with the web caption as a hint, and the temperature of each attempt."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clips.common.errors import UserError
from clips.common.escape import clip, one_line
from clips.common.files import read_regular

HINT = "{web}"
"""The place of the web caption in a prompt."""
LONGEST_HINT = 1000
"""Characters of a web caption that the captioner reads; an alt text has about 60."""
LONGEST_PROMPT = 20_000
DEFAULT = (
    "Describe the picture in detail: everything that can be seen in it, how many there are, where each one is, what it "
    "looks like, what it does, and the background. The picture was found on the web with the caption below. Take that "
    "as a hint: it may name what is shown, and it may be wrong or about something else. Where the two disagree, trust "
    "the picture, and do not mention the caption. Write whole sentences, the description alone.\n"
    "Caption: {web}"
)
RETRY_TEMPERATURE = 0.7
"""Greedy decoding would repeat the caption that was refused."""
_TAG = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]{2,64}\]")
"""The form of known models' control tokens: <|im_end|>, </s>, <image>, <start_of_turn>, [INST]."""


@dataclass(frozen=True)
class Prompt:
    """A template; each `{web}` in it is replaced by the web caption. Raises UserError if it is empty or too long."""

    template: str = DEFAULT

    def __post_init__(self) -> None:
        if not self.template.strip():
            raise UserError("the prompt is empty: say what the captioner is to write")
        if len(self.template) > LONGEST_PROMPT:
            raise UserError(f"the prompt has {len(self.template):,} characters, the limit is {LONGEST_PROMPT:,}")

    @classmethod
    def read(cls, path: str | Path | None) -> Prompt:
        """The prompt in a file, the default prompt for None. Raises UserError if the file cannot be read."""
        if path is None:
            return cls()
        try:
            return cls(read_regular(path, 4 * LONGEST_PROMPT + 1).decode("utf-8-sig").strip())
        except OSError as error:
            raise UserError(f"--prompt {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"--prompt {path} is not UTF-8") from None

    @property
    def digest(self) -> str:
        """SHA-256 of the template, for the manifests."""
        return hashlib.sha256(self.template.encode("utf-8", "surrogatepass")).hexdigest()

    def fill(self, hint: str) -> str:
        """The prompt for one web caption. Braces inside `hint` stay as they are."""
        return self.template.replace(HINT, hint)


def hint_of(web: str) -> str:
    """A web caption as a hint: one line of bounded length, without control characters."""
    return one_line(clip(web, LONGEST_HINT)).strip()


def without_control_tokens(text: str, tokens: Iterable[str] = ()) -> str:
    """`text` without `tokens` and without anything that looks like a control token.

    It protects models whose chat template is filled as text and tokenised afterwards. There a typed `<image>` would
    be a picture's place, and a typed end of turn would end the question. A removal may join two halves to a new token,
    so it repeats until nothing changes; each round shortens the text.
    """
    words = sorted({token.strip() for token in tokens} - {""}, key=len, reverse=True)
    patterns = [_TAG] + ([re.compile("|".join(map(re.escape, words)))] if words else [])
    before = None
    while text != before:
        before = text
        for pattern in patterns:
            text = pattern.sub("", text)
    return text.strip()


def temperature_of(attempt: int) -> float:
    """0 (greedy) for the first attempt, RETRY_TEMPERATURE for the second."""
    return RETRY_TEMPERATURE if attempt else 0.0
