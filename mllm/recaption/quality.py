"""Whether a caption is one: what machines write instead of captions, found by the text alone and named.

Only what is cheap and sure is looked for; how good a caption is, a training says (scripts/compare_captions.py).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clips import script_of, split_sentences
from mllm.recaption.captioner import Written

# A letter of a script that writes no spaces counts as a word, as in clips/data/sentences.py.
_WORD = re.compile(
    r"[\u0e00-\u0fff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]|[^\W_]+(?:['’-][^\W_]+)*"
)
_ENDED = re.compile(r"[.!?…。！？।۔][\"'”’»)\]]*\s*$")
_REFUSAL = re.compile(
    r"""\s*["'“]?(?:
        (?:oh,?\s|well,?\s)?(?:i['’]?m|i\s+am|we['’]?re)\s+(?:very\s+|so\s+|really\s+)?(?:sorry|unable|afraid|not\s+able)
      | (?:sorry|apologies|unfortunately)\b[,.]?\s+(?:but\s+)?i\b | i\s+(?:sincerely\s+)?apologi[sz]e
      | i\s+(?:can(?:['’]?t|not|\s+not)|could(?:n['’]t|\s+not)|won['’]t|do\s+not|don['’]t|am\s+not)\s
      | as\s+an?\s+(?:ai|artificial|language|large\s+language)\b
      | (?:there\s+is\s+)?no\s+(?:image|picture)\s+(?:is\s+|was\s+|has\s+been\s+)?(?:provided|attached|given|visible)
      | (?:please|could\s+you)\s+(?:please\s+)?(?:provide|share|upload|attach)\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_MARKS = re.compile(
    r"<\|?(?:im_start|im_end|image|endoftext|assistant|user|s|/s|bos|eos|unk|pad)\|?>|\b(?:USER|ASSISTANT):"
)
ECHO = 8
"""Words in a row that a caption shares with the prompt only where it repeats it."""
LONGEST_PERIOD, REPEATS, LEAST = 40, 3, 9
"""A loop: a run of words, at least LEAST, that are those up to LONGEST_PERIOD before them, REPEATS times over."""
REASONS = ("empty", "cut off", "refusal", "prompt echo", "repetition", "short", "long", "script")
"""A caption has the first that holds."""


@dataclass(frozen=True)
class Bounds:
    """What a caption must keep to."""

    least_words: int = 5
    most_words: int = 400
    script: str = "Latin"
    """Unicode's name of the script that most letters must be of; "any" for no such check."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Judged:
    text: str
    """As it is to be written: stripped, a cut-off caption up to its last whole sentence."""
    reason: str
    """Of REASONS, or empty for a good one."""
    trimmed: bool


def words(text: str) -> list[str]:
    return _WORD.findall(text)


def judge(written: Written, web: str, prompt: str, bounds: Bounds) -> Judged:
    """`prompt`: what the captioner was told, without the web caption."""
    text = cleaned(written.text)
    trimmed = False
    if not written.finished and not _ENDED.search(text):
        text, trimmed = whole_sentences(text), True
    return Judged(text, _reason(text, trimmed, web, prompt, bounds), trimmed)


def cleaned(text: str) -> str:
    """Without white space around it, and with nothing in it that UTF-8 cannot hold (half a character)."""
    return text.encode("utf-8", "replace").decode("utf-8").strip()


def whole_sentences(text: str) -> str:
    """`text` without the sentence at its end that has none; empty where that is all there is."""
    last = split_sentences(text)[-1:]
    if not last:
        return ""
    place = text.rfind(last[0])
    return text[:place].rstrip() if place > 0 else ""


def _reason(text: str, trimmed: bool, web: str, prompt: str, bounds: Bounds) -> str:
    if not text:
        return "cut off" if trimmed else "empty"
    if _REFUSAL.match(text):
        return "refusal"
    found = words(text)
    if len(found) > bounds.most_words:  # before what takes the longer the longer it is
        return "repetition" if loops(found[: bounds.most_words]) else "long"
    lower = [word.lower() for word in found]
    if _MARKS.search(text) or lower == words(web.lower()) or _shares(lower, words(prompt.lower())):
        return "prompt echo"
    if loops(lower):
        return "repetition"
    if len(found) < bounds.least_words:
        return "short"
    if bounds.script != "any" and script_of(text) != bounds.script:
        return "script"
    return ""


def _shares(caption: list[str], prompt: list[str]) -> bool:
    runs = {tuple(prompt[i : i + ECHO]) for i in range(len(prompt) - ECHO + 1)}
    return any(tuple(caption[i : i + ECHO]) in runs for i in range(len(caption) - ECHO + 1))


def loops(found: list[str]) -> bool:
    """Whether some words come again and again, at once."""
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in found], dtype=np.int64)
    for period in range(1, min(LONGEST_PERIOD, len(ids) - 1) + 1):
        differs = np.flatnonzero(np.concatenate(([True], ids[period:] != ids[:-period], [True])))
        if np.diff(differs).max() - 1 >= max(LEAST, REPEATS * period):
            return True
    return False
