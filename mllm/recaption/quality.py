"""The faults of captions that the text alone shows, cheaply and surely.

How good a caption is, only a training shows (scripts/compare_encoders.py).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from clips import split_sentences
from mllm.recaption.captioner import Written
from mllm.recaption.options import Bounds

# A letter of a script without spaces counts as a word, as in clips/data/sentences.py.
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
"""A caption that shares so many words in a row with the prompt repeats the prompt."""
LONGEST_PERIOD, REPEATS, LEAST = 40, 3, 9
"""A loop: at most LONGEST_PERIOD words that come REPEATS more times, at least LEAST words in all."""
REASONS = ("empty", "cut off", "refusal", "prompt echo", "repetition", "short", "long", "script")
"""A caption has the first reason that holds."""


@dataclass(frozen=True)
class Judged:
    text: str
    """Stripped; a cut-off caption up to its last whole sentence."""
    reason: str
    """One of REASONS, empty for a good caption."""
    trimmed: bool


def words(text: str) -> list[str]:
    return _WORD.findall(text)


def judge(written: Written, web: str, prompt: str, bounds: Bounds) -> Judged:
    """`prompt`: the captioner's prompt without the web caption."""
    text = written.text.encode("utf-8", "replace").decode("utf-8").strip()  # UTF-8 cannot hold half a character
    trimmed = False
    if not written.finished and not _ENDED.search(text):
        text, trimmed = whole_sentences(text), True
    return Judged(text, _reason(text, trimmed, web, prompt, bounds), trimmed)


def whole_sentences(text: str) -> str:
    """`text` without its last sentence."""
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
    if len(found) > bounds.most_words:  # the checks below are slow for long texts
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
    """True if the same words come again and again without others between."""
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in found], dtype=np.int64)
    for period in range(1, min(LONGEST_PERIOD, len(ids) - 1) + 1):
        differs = np.flatnonzero(np.concatenate(([True], ids[period:] != ids[:-period], [True])))
        if np.diff(differs).max() - 1 >= max(LEAST, REPEATS * period):
            return True
    return False


@lru_cache(1 << 16)
def _script_of_letter(letter: str) -> str:
    """The first word of the letter's Unicode name; wide and styled forms are normalised first."""
    name = unicodedata.name(unicodedata.normalize("NFKC", letter)[0], "OTHER").split()[0].split("-")[0]
    return {"CJK": "Han"}.get(name, name.title())


def script_of(text: str) -> str:
    """The Unicode script of most letters of `text`; "none" if it has no letter."""
    letters = Counter(filter(str.isalpha, text))
    scripts: Counter[str] = Counter()
    for letter, count in letters.items():
        scripts["Latin" if letter.isascii() else _script_of_letter(letter)] += count
    return scripts.most_common(1)[0][0] if scripts else "none"
