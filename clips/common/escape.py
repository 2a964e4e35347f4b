"""Text from data, made fit for where it is shown: a plot, a terminal, Markdown. In HTML jinja's autoescape does it.

Captions, questions, answers, keys, labels and paths come from elsewhere and may hold anything: mathematics to
matplotlib, markup to rich, tags to a browser, escape sequences that a terminal carries out, or a megabyte in one word.
Each medium has one function here, named where the text goes in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

LONGEST = 2000
"""Characters shown of one text from data; what is longer is cut before anything is made of it."""
_BREAKS = re.compile("\r\n|[\r\x85\u2028\u2029]")
# Control characters, what turns the direction of the text after it, and half of a character (JSON can hold one, no
# encoding can): each is shown as U+FFFD.
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
    """`text` with everything in it that acts instead of being seen as U+FFFD; its lines and tabs stay."""
    return _ACTS.sub("\ufffd", _BREAKS.sub("\n", text))


def visible_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """`visible` of a text that comes in pieces: wherever it is cut, the same is shown."""
    held = ""
    for piece in pieces:
        text = held + piece
        held = "\r" if text.endswith("\r") else ""  # what follows may make one line break with it
        yield visible(text.removesuffix("\r"))
    yield visible(held)


def one_line(text: str) -> str:
    """As `visible`, its lines and tabs joined by spaces."""
    return visible(text).replace("\n", " ").replace("\t", " ")


def for_plot(text: str, limit: int = LONGEST) -> str:
    """One line for matplotlib, in which `$` begins no mathematics and no word is too long to be wrapped."""
    return _LONG_WORD.sub(r"\1 ", one_line(clip(text, limit))).replace("$", r"\$")


def for_terminal(text: str, limit: int = LONGEST) -> str:
    """Lines for `print`, without escape sequences."""
    return visible(clip(text, limit))


def for_rich(text: str, limit: int = LONGEST) -> str:
    """One line for rich's console and tables, in which `[bold]` is no markup."""
    from rich.markup import escape  # rich takes longer to import than a --help may

    return escape(one_line(clip(text, limit)))


def for_markdown(text: str, limit: int | None = None) -> str:
    """One line of Markdown (also of a table's cell or a heading) that reads as `text`."""
    line = one_line(text if limit is None else clip(text, limit)).strip()
    return _NUMBERED.sub(r"\1\\\2", _MARKDOWN.sub(lambda found: "\\" + found[0], line))


def code_block(text: str) -> str:
    """A fenced block of Markdown that holds `text` as it is."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}\n{visible(text)}\n{fence}"
