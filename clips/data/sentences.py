"""Sentences of a long caption, and the sub-captions that are drawn from them (paper, section 3.1)."""

import random
import re
from itertools import chain
from typing import TypeVar

import numpy as np

from clips.config import CaptionsConfig

Piece = TypeVar("Piece")

# --- sentences ---------------------------------------------------------------------------------------------
_ALWAYS = "。！？；｡।॥؟۔"  # ends a sentence wherever it stands
_OPENERS = "\"'“‘«([{¿¡*_—–-"
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_EMOJI = "\u2600-\u27bf\U0001f000-\U0001faff\ufe0f\u200d"
_STOP = re.compile(rf"([.!?…{_ALWAYS}](?:[ \t]?[.!?…{_ALWAYS}])*)([\"'”’»)\]}}」』）】》〉*_]*)(?:[ \t]?[{_EMOJI}])*")
_ALWAYS_STOP = re.compile(f"[{_ALWAYS}]")
_AFTER = re.compile(rf"$|[\s{_CJK}]")
_QUOTE_PARTICLE = re.compile("[\u3041-\u3096]")  # "「はい。」と言う"
_NEXT_WORD = re.compile(rf"[\s{re.escape(_OPENERS)}$€£¥#~]*(?:([^\W_]+)(?:['’][^\W_]+)*(\.?)|[&+/=|])")
_INITIALS = re.compile(r"\d*(?:[^\W\d_]\.)+[^\W\d_]|[^\W\d_]")  # "U.S", "e.g", "9a.m", "J"
_LIST_NUMBER = re.compile(r"(?<!\S)(\d{1,2})\.(?=\s)")
_WORD_CHARACTER = re.compile(r"[^\W_]")
_VOWEL = re.compile("[^\\W\\d_b-df-hj-np-tv-xz]")  # of the Latin letters; every letter of other scripts


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Never the end of a sentence.
_MID_SENTENCE = _words(
    "e.g i.e vs cf viz mr mrs ms mx messrs mme mlle dr drs prof rev hon gen col maj capt cmdr lt sgt cpl adm gov "
    "sen rep pres fr"
)
# Not the end if a number or a price follows.
_NUMBERED = _words(
    "no nos nr fig figs vol ch chap pp p pg art cat sec rm approx temp est ca circa avg max min incl excl wt ht dia "
    "diam qty tel ext ft yd lb lbs"
)
# The end only if the next word is in _STARTERS.
_ABBREVIATIONS = _words(
    "st ste mt ft jr sr esq inc ltd co corp mfg bros dept univ assn assoc ave blvd rd hwy apt bldg approx avg est "
    "ca circa al feat incl excl max temp wt ht dia diam qty tel ext sq nr jan feb apr aug sept oct nov dec"
)
# Measures end a sentence like any word, unless a small letter follows.
_MEASURES = _words(
    "in ft yd mi cm mm km kg mg ml lb lbs oz qt pt gal doz pkg pc pcs tsp tbsp tbs min mins hr hrs sec secs deg mph "
    "lg sm"
)
_AFTER_PRICES = _words("and or to per each up off plus")
_TIMES = _words("a.m p.m")
_AFTER_TIMES = _words(
    "Mon Tue Wed Thu Fri Sat Sun Eastern Pacific Central Mountain EST EDT PST PDT CST ET PT GMT UTC CET"
)
# These follow a name: a capital after them begins a sentence.
_DEGREES = _words("ph.d m.d b.a m.a m.b.a b.s m.s b.sc m.sc d.d.s j.d ll.b ll.m ed.d r.n")
_EXCLAIMED_NAMES = _words("yahoo jeopardy")
_STARTERS = _words(
    "The A An This That These Those There Here It Its He She They We You I His Her Their Our My Your In On At To "
    "From With Without Behind Beside Besides Below Above Beneath Beyond Under Over Near Nearby Next Between Among "
    "Around Across Along Inside Outside Atop Against Despite During Since Because Although Though Until Upon Within "
    "Through Throughout Toward Towards Overall Another Other Others One Two Three Four Five Six Seven Eight Nine "
    "Ten Some Many Much Most More Few Several Both Each Every All Any None Nobody Nothing Someone Something "
    "Everyone Everything People Not No Yes And But Or So If For After Before By As When While Where What Who Which "
    "Why How Whether Then Now Once Only Even Just Still Also Again Perhaps Maybe However Additionally Furthermore "
    "Moreover Meanwhile Finally Please Is Are Was Were Do Does Did Has Have Had Can Could Will Would Should May Let"
)


def split_sentences(text: str) -> list[str]:
    """Return the sentences of `text` in order, stripped, none empty; only white space is lost.

    Line ends separate sentences, and a piece without a letter or digit joins its neighbour.
    """
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
    numbers = _list_numbers(line)
    for stop in _STOP.finditer(line):
        if stop.start() not in numbers and _ends_sentence(line, start, stop):
            pieces.append(line[start : stop.end()].strip())
            start = stop.end()
    pieces.append(line[start:].strip())
    return pieces


def _list_numbers(line: str) -> set[int]:
    """Return the positions of the stops in "1.", "2." … that count from 1, as in "1. chop, 2. fry"."""
    if "1." not in line:
        return set()
    numbers, last = [], 0
    for number in _LIST_NUMBER.finditer(line):
        if int(number[1]) in (1, last + 1):
            numbers.append(number)
            last = int(number[1])
    # A lone "1." is a list's number only at the start of the line.
    return {n.end() - 1 for n in numbers} if last > 1 or (numbers and not line[: numbers[0].start()].strip()) else set()


def _ends_sentence(line: str, start: int, stop: re.Match[str]) -> bool:
    """Return True if `stop`, a run of stops and closing marks, ends the sentence that begins at `start`."""
    stops, closers = stop.groups()
    if not stops.isascii() and _ALWAYS_STOP.search(stops):
        return not (closers and _QUOTE_PARTICLE.match(line, stop.end()))
    if not _AFTER.match(line, stop.end()):
        return False  # "3.50", "example.com", "Wait...what"
    following = _NEXT_WORD.match(line, stop.end())
    if following is None:
        return True
    word, abbreviated = following.groups()
    lower = word is not None and word[0].islower()
    if lower and closers:
        return False  # '"Stop!" he said.'
    window = max(start, stop.start() - 32)  # longer than any known word; keeps hostile lines linear
    last = line[window : stop.start()].rsplit(None, 1)
    before = last[-1].lstrip(_OPENERS).lower() if last else ""
    if "!" in stops or "?" in stops:
        return before not in _EXCLAIMED_NAMES
    if stops != ".":
        return not lower  # an ellipsis
    if not last:
        return True
    if word is None:
        return following[0][-1] == "|" and not (before in _ABBREVIATIONS or before in _NUMBERED)  # "Mr. & Mrs."
    if lower and (
        before in _MEASURES or (word in _AFTER_PRICES if before[-1:].isdigit() else not _VOWEL.search(before))
    ):
        return False  # "12 in. wide", "$5. and up", "3 pkgs. yeast"
    if word[0].isdigit() and before in _NUMBERED:
        return False
    if len(last) == 1 and before.isdigit():
        return False  # "3. A dog": the number of a list
    if before in _MID_SENTENCE:
        return False
    starts = word.capitalize() in _STARTERS and not abbreviated  # not "A." in "J. A. Smith"
    if before in _DEGREES or (before in _TIMES and word not in _AFTER_TIMES and not word[0].isdigit()):
        return not lower
    if before in _ABBREVIATIONS or _INITIALS.fullmatch(before):
        return starts and not lower
    return not (before == "etc" and lower)


# --- sub-captions ------------------------------------------------------------------------------------------


def has_words(text: str | None) -> bool:
    """Return True if a caption has a word. If a long caption has none, the web caption replaces it everywhere."""
    return text is not None and _WORD_CHARACTER.search(text) is not None


def sub_caption(web: str, long: str | None, config: CaptionsConfig, rng: random.Random | np.random.Generator) -> str:
    """Return the piece of the long caption that the text tower reads in this step, before tokenising.

    Strategy `sentence` draws one sentence, or `config.sentence_share` of them in a row. The other strategies work on
    tokens (`kept_tokens`) and keep all of it here. The web caption replaces a long caption without a word. Only
    `random()` of `rng` is used.
    """
    if long is None or not has_words(long):
        return web
    if config.strategy != "sentence":
        return long
    sentences = split_sentences(long)
    count = max(1, round(config.sentence_share * len(sentences)))
    return " ".join(_block(sentences, count, rng))


def kept_tokens(ids: list[int], config: CaptionsConfig, rng: random.Random | np.random.Generator) -> list[int]:
    """Return the tokens of a sub-caption that the strategy keeps, in order.

    truncation keeps the first `config.sub_caption_tokens`, block_mask as many in a row, random_mask as many at random
    places; sentence and full keep all. Only `random()` of `rng` is used.
    """
    count = config.sub_caption_tokens
    if config.strategy in ("sentence", "full") or len(ids) <= count:
        return ids
    if config.strategy == "truncation":
        return ids[:count]
    if config.strategy == "block_mask":
        return _block(ids, count, rng)
    keys = [rng.random() for _ in ids]  # random_mask: keep the tokens with the smallest keys
    return [ids[i] for i in sorted(sorted(range(len(ids)), key=keys.__getitem__)[:count])]


def _block(pieces: list[Piece], count: int, rng: random.Random | np.random.Generator) -> list[Piece]:
    """Return `count` pieces in a row, from a uniformly drawn position."""
    first = int(rng.random() * (len(pieces) - count + 1))
    return pieces[first : first + count]
