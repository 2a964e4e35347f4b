"""Makes text from data printable: on a terminal, for rich and in Markdown; for HTML jinja's autoescape does the rest.

Captions, questions, keys and paths may hold anything: escape sequences, markup, or a megabyte in one word.
"""

import re

LONGEST = 2000
"""Characters shown of one text from data; longer texts are cut first."""
_BREAKS = re.compile("\r\n|[\r\x85\u2028\u2029]")
# Control characters, changes of the text's direction, and lone surrogates (JSON can hold them) are shown as U+FFFD.
_ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKDOWN = re.compile(
    r"""[\\`*|~$]                     # act anywhere
    | (?<![^\W_])_ | _(?![^\W_])      # emphasis, but not the one in vit_base
    | <(?=[a-zA-Z/!?])                # tag, address
    | \](?=[(\[:])                    # link, definition, but not [+0.3, +2.1]
    | &(?=\#?\w+;)                    # entity
    | (?:^|(?<=\s))\#                 # heading, or its end
    | ^> | ^[+-](?=[\s-]|$) | ^\[(?=[ xX]\])  # quote, list or line, box to tick
    """,
    re.VERBOSE,
)
_NUMBERED = re.compile(r"^(\d{1,9})([.)])(?=\s|$)")


def clip(text: str, limit: int = LONGEST) -> str:
    """Return `text`, or its beginning and an ellipsis if it is longer than `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str, limit: int | None = LONGEST) -> str:
    """Return `text` with U+FFFD in place of characters that act instead of being seen; line ends and tabs stay.

    A text of more than `limit` characters is cut, unless `limit` is None.
    """
    if limit is not None:
        text = clip(text, limit)
    return _ACTS.sub("\ufffd", _BREAKS.sub("\n", text))


def one_line(text: str, limit: int | None = LONGEST) -> str:
    """Return `printable(text)` with spaces in place of line breaks and tabs."""
    return printable(text, limit).replace("\n", " ").replace("\t", " ")


def for_rich(text: str) -> str:
    """Return one line for rich's console and tables, in which `[bold]` is shown and not applied."""
    from rich.markup import escape  # rich takes longer to import than a --help may

    return escape(one_line(text))


def for_markdown(text: str, limit: int | None = None) -> str:
    """Return one line of Markdown that reads as `text`, also in a heading or in the cell of a table."""
    line = one_line(text, limit).strip()
    return _NUMBERED.sub(r"\1\\\2", _MARKDOWN.sub(lambda match: "\\" + match[0], line))
