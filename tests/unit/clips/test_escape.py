"""Text from data is read as it is in every medium: nothing in it acts."""

from __future__ import annotations

import html
import io
import re
import time

import pytest
from hostile import HOSTILE
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as RichTable

from clips.common.escape import (
    LONGEST,
    clip,
    for_markdown,
    for_plot,
    for_rich,
    for_terminal,
    one_line,
    visible,
    visible_pieces,
)
from clips.common.page import png

GFM = MarkdownIt("commonmark").enable(["table", "strikethrough"])
each = pytest.mark.parametrize("name", HOSTILE)


def read(found: str) -> str:
    """The text of HTML, as a browser shows it."""
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", found)).split())


def expected(text: str) -> str:
    return " ".join(one_line(text).split())


@each
def test_a_plot_draws_it(name: str, recwarn: pytest.WarningsRecorder) -> None:
    plot = Figure(figsize=(9, 3), layout="constrained")
    axes = plot.subplots()
    axes.text(0, 0.5, for_plot(HOSTILE[name], 200), wrap=True)
    axes.plot([0, 1], label=for_plot(HOSTILE[name], 20))
    axes.set_yticks([0], [for_plot(HOSTILE[name], 20)])
    axes.legend()
    axes.set_title(for_plot(HOSTILE[name], 20))
    assert len(png(plot)) > 1000
    # What another test left open may be collected, and warned of, just here: no warning of the plot.
    assert [str(found.message) for found in recwarn if not issubclass(found.category, ResourceWarning)] == []


def test_a_plot_shows_the_dollars_themselves() -> None:
    def drawn(text: str, **options: object) -> bytes:
        plot = Figure(figsize=(2, 1))
        plot.text(0, 0.5, text, **options)
        return png(plot)

    for text in ("$a$", "\\$ 5 for $x$", "50 $"):
        assert drawn(for_plot(text)) == drawn(text, parse_math=False)
    assert drawn("$a$") != drawn("$a$", parse_math=False)


@each
def test_a_text_in_pieces_is_shown_as_in_one(name: str) -> None:
    text = HOSTILE[name][:3000]
    for length in (1, 2, 3, 7):
        pieces = [text[start : start + length] for start in range(0, len(text), length)]
        assert "".join(visible_pieces(pieces)) == visible(text)


def test_a_line_break_that_is_cut_is_one_and_a_last_one_is_shown() -> None:
    assert list(visible_pieces(["a\r", "\nb", "\r", "c\r"])) == ["a", "\nb", "", "\nc", "\n"]


@each
def test_markdown_reads_as_the_text(name: str) -> None:
    text = clip(HOSTILE[name])
    shown, wanted = for_markdown(text), expected(text)
    for before, after in (("", ""), ("- ", ""), ("### ", ""), ("said: ", " and more"), ("| a |\n| --- |\n| ", " |")):
        found = GFM.render(f"{before}{shown}{after}\n")
        assert not re.search("<(?!/?(p|ul|li|h3|table|thead|tbody|tr|th|td)>)", found), found
        around = "a" if "---" in before else before.strip("-# ")
        assert read(found) == " ".join(f"{around} {wanted} {after.strip('|')}".split())


@pytest.mark.parametrize("text", ["+1.2 [+0.3, +2.1]", "< 0.0001", "hf:google/vit_base", "1.5", "–", "a − b (3 seeds)"])
def test_markdown_leaves_alone_what_does_not_act(text: str) -> None:
    assert for_markdown(text) == text


@each
def test_a_terminal_shows_it_and_carries_nothing_out(name: str) -> None:
    text = HOSTILE[name]
    for shown in (for_terminal(text), one_line(clip(text))):
        shown.encode("utf-8")
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
        assert len(shown) <= LONGEST
    table = RichTable("a", title=for_rich(text))
    table.add_row(for_rich(text))
    console = Console(file=io.StringIO(), width=5000)
    console.print(f"[bold]{for_rich(text)}[/bold]", highlight=False, soft_wrap=True)
    assert console.file.getvalue().rstrip("\n") == one_line(clip(text))
    console.print(table)


def test_the_cost_of_a_megabyte_is_bounded() -> None:
    begin = time.process_time()
    for text in HOSTILE.values():
        for shown in (for_plot(text), for_terminal(text), for_rich(text), for_markdown(text, LONGEST)):
            assert len(shown) <= 2.1 * LONGEST
    assert time.process_time() - begin < 2
