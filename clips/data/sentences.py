"""Sentences of a long caption, and the sub-captions that are drawn from them (paper, section 3.1)."""

from __future__ import annotations

import random
import re
from itertools import chain

import numpy as np

from clips.config import CaptionsConfig, SentenceSplitter

# --- sentences ---------------------------------------------------------------------------------------------
_ALWAYS = "。！？；｡।॥؟۔"  # ends a sentence wherever it stands
_OPENERS = "\"'“‘«([{¿¡*_—–-"
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_STOP = re.compile(rf"([.!?…{_ALWAYS}](?:[ \t]?[.!?…{_ALWAYS}])*)([\"'”’»)\]}}」』）】》〉*_]*)")
_ALWAYS_STOP = re.compile(f"[{_ALWAYS}]")
_AFTER = re.compile(rf"$|[\s{_CJK}]")
_NEXT_WORD = re.compile(rf"[\s{re.escape(_OPENERS)}]*([^\W_]+(?:['’][^\W_]+)*)(\.?)")
_INITIALS = re.compile(r"\d*(?:[^\W\d_]\.)+[^\W\d_]|[A-Za-zÀ-ɏͰ-ӿ]")  # "U.S", "e.g", "9a.m", "J"
_WORD_CHARACTER = re.compile(r"[^\W_]")
_REFERENCE_STOP = re.compile(r"[.!]+")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Never the end of a sentence.
_MID_SENTENCE = _words("e.g i.e vs cf viz")
# Not the end when a number follows.
_NUMBERED = _words("no nos fig figs vol ch pp p art sec")
# Rarely the end: only when the next word is one that starts sentences.
_ABBREVIATIONS = _words(
    "mr mrs ms mx messrs dr drs prof rev fr hon gen col maj capt cmdr lt sgt cpl adm gov sen rep pres st ste mt ft jr "
    "sr esq ph.d inc ltd co corp bros dept univ assn ave blvd rd apt bldg hwy approx avg est ca al feat lb lbs oz "
    "jan feb apr aug sept oct nov dec"
)
_STARTERS = _words(
    "The A An This That These Those There Here It Its He She They We You I His Her Their Our My In On At To From With "
    "Behind Beside Below Above Beneath Beyond Under Over Near Nearby Next Between Around Across Along Overall Another "
    "Other One Two Three Some Many Several Both Each All Not And But Or If For After Before By As When While Where "
    "What Who How Why Also However Additionally Furthermore Moreover Meanwhile"
)


def split_sentences(text: str, splitter: SentenceSplitter = "smart") -> list[str]:
    """The sentences of `text` in order, stripped, none of them empty.

    `reference` is the rule of the paper's code (OpenVision's `bert_ops.py`): runs of `.` or `!`
    separate, and are dropped. `smart` keeps every character that is not white space; line ends separate, and
    a piece without a letter or digit joins its neighbour, so that no sentence is mere punctuation.
    """
    if splitter == "reference":
        return [piece for part in _REFERENCE_STOP.split(text) if (piece := part.strip())]
    sentences: list[str] = []
    prefix = ""
    for piece in chain.from_iterable(map(_split_line, text.splitlines())):
        if not piece:
            continue
        if _WORD_CHARACTER.search(piece):
            sentences.append(prefix + piece)
            prefix = ""
        elif sentences:
            sentences[-1] += " " + piece
        else:
            prefix += piece + " "
    return sentences


def _split_line(line: str) -> list[str]:
    pieces, start = [], 0
    for stop in _STOP.finditer(line):
        if _ends_sentence(line, start, stop):
            pieces.append(line[start : stop.end()].strip())
            start = stop.end()
    pieces.append(line[start:].strip())
    return pieces


def _ends_sentence(line: str, start: int, stop: re.Match[str]) -> bool:
    """Whether `stop` (a run of stops and closing marks) ends the sentence that begins at `start`."""
    stops, closers = stop.groups()
    if not stops.isascii() and _ALWAYS_STOP.search(stops):
        return True
    if not _AFTER.match(line, stop.end()):
        return False  # "3.50", "example.com", "Wait...what"
    following = _NEXT_WORD.match(line, stop.end())
    if following is None:
        return True
    word = following[1]
    lower = word[0].islower()
    if lower and closers:
        return False  # '"Stop!" he said.'
    if "!" in stops or "?" in stops:
        return True
    if stops != ".":
        return not lower  # an ellipsis
    window = max(start, stop.start() - 32)  # longer than any word known here; keeps hostile lines linear
    last = line[window : stop.start()].rsplit(None, 1)
    if not last:
        return True
    before = last[-1].lstrip(_OPENERS).lower()
    if len(last) == 1 and before.isdigit():
        return False  # "1. A dog": the number of a list
    if before in _MID_SENTENCE or (before in _NUMBERED and word[0].isdigit()):
        return False
    if before in _ABBREVIATIONS or _INITIALS.fullmatch(before):
        return word in _STARTERS and not following[2]  # not "A." in "J. A. Smith"
    return not (before == "etc" and lower)


# --- sub-captions ------------------------------------------------------------------------------------------

# A word with the space before it; scripts written without spaces count by the character.
_WORD = re.compile(rf"\s*(?:[{_CJK}]|[^\s{_CJK}]+)")


def sub_caption(web: str, long: str | None, config: CaptionsConfig, rng: random.Random | np.random.Generator) -> str:
    """The piece of the long caption that the text tower sees in this step.

    sentence draws one sentence uniformly, or `config.sentence_share` of them in a row; truncation, block_mask and
    random_mask keep the first, a contiguous and a scattered `config.sub_caption_tokens` words, in order; full keeps
    everything (the text layout cuts it).
    Where the long caption holds no word or sentence, the web caption takes its place. Pure in `rng`, of which
    only `random()` is used.
    """
    if not long or not _WORD_CHARACTER.search(long):
        return web
    if config.strategy == "full":
        return long
    if config.strategy == "sentence":
        sentences = split_sentences(long, config.splitter)
        count = max(1, round(config.sentence_share * len(sentences)))
        return " ".join(_block(sentences, count, rng))
    words = _WORD.findall(long)
    count = min(config.sub_caption_tokens, len(words))
    if config.strategy == "truncation":
        words = words[:count]
    elif config.strategy == "block_mask":
        words = _block(words, count, rng)
    else:  # random_mask: the places of the `count` smallest of as many random keys
        keys = [rng.random() for _ in words]
        words = [words[i] for i in sorted(sorted(range(len(words)), key=keys.__getitem__)[:count])]
    return "".join(words).strip()


def _block(pieces: list[str], count: int, rng: random.Random | np.random.Generator) -> list[str]:
    """`count` pieces in a row, every place alike."""
    first = int(rng.random() * (len(pieces) - count + 1))
    return pieces[first : first + count]
