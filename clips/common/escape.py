"""Escapes text from data for a plot, a terminal or Markdown; for HTML jinja's autoescape does it.

Captions, questions, answers, keys, labels and paths may hold anything: mathematics for matplotlib, markup for rich,
tags for a browser, escape sequences for a terminal, or a megabyte in one word. Each medium has one function here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

LONGEST = 2000
"""Characters shown of one text from data; longer texts are cut first."""
_BREAKS = re.compile("\r\n|[\r\x85\u2028\u2029]")
# Control characters, changes of the text's direction, and lone surrogates (JSON can hold them) are shown as U+FFFD.
_ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LONG_WORD = re.compile(r"(\S{60})(?=\S)")
_MARKDOWN = re.compile(
    r"""[\\`*|~$]                     # act anywhere
    | (?<![^\W_])_ | _(?![^\W_])      # emphasis, unlike the one in vit_base
    | <(?=[a-zA-Z/!?])                # tag, address
    | \](?=[(\[:])                    # link, definition, unlike [+0.3, +2.1]
    | &(?=\#?\w+;)                    # entity
    | (?:^|(?<=\s))\#                 # heading, or its end
    | ^> | ^[+-](?=[\s-]|$) | ^\[(?=[ xX]\])  # quote, list or line, box to tick
    """,
    re.VERBOSE,
)
_NUMBERED = re.compile(r"^(\d{1,9})([.)])(?=\s|$)")


def clip(text: str, limit: int = LONGEST) -> str:
    """`text`, or its beginning and an ellipsis, `limit` characters together."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def visible(text: str) -> str:
    """`text` with U+FFFD for every character that acts instead of being seen; lines and tabs stay."""
    return _ACTS.sub("\ufffd", _BREAKS.sub("\n", text))


def visible_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """`visible` of a text in pieces; the cuts do not matter."""
    held = ""
    for piece in pieces:
        text = held + piece
        held = "\r" if text.endswith("\r") else ""  # \r and a following \n are one line break
        yield visible(text.removesuffix("\r"))
    yield visible(held)


def one_line(text: str) -> str:
    """`visible`, with spaces for line breaks and tabs."""
    return visible(text).replace("\n", " ").replace("\t", " ")


def for_plot(text: str, limit: int = LONGEST) -> str:
    """One line for matplotlib: `$` begins no mathematics, and every word can be wrapped."""
    return _LONG_WORD.sub(r"\1 ", one_line(clip(text, limit))).replace("$", r"\$")


def for_terminal(text: str, limit: int = LONGEST) -> str:
    """Lines for `print` without escape sequences."""
    return visible(clip(text, limit))


def for_rich(text: str) -> str:
    """One line for rich's console and tables; `[bold]` is no markup."""
    from rich.markup import escape  # rich takes longer to import than a --help may

    return escape(one_line(clip(text)))


def for_markdown(text: str, limit: int | None = None) -> str:
    """One line of Markdown, also in a table's cell or a heading, that reads as `text`."""
    line = one_line(text if limit is None else clip(text, limit)).strip()
    return _NUMBERED.sub(r"\1\\\2", _MARKDOWN.sub(lambda found: "\\" + found[0], line))
