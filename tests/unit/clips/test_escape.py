"""Text from data is read as it is in every medium: nothing in it acts."""

import html
import io
import re

import pytest
from hostile import HOSTILE
from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table as RichTable

from clips.common.escape import LONGEST, clip, for_markdown, for_rich, one_line, printable

GFM = MarkdownIt("commonmark").enable(["table", "strikethrough"])
each = pytest.mark.parametrize("name", HOSTILE)


@each
def test_markdown_reads_as_the_text(name: str) -> None:
    text = clip(HOSTILE[name])
    for before, after in (("", ""), ("- ", ""), ("said: ", " and more"), ("| a |\n| --- |\n| ", " |")):
        page = GFM.render(f"{before}{for_markdown(text)}{after}\n")
        assert not re.search("<(?!/?(p|ul|li|table|thead|tbody|tr|th|td)>)", page), page
        around = "a" if "---" in before else before.strip("-# ")
        shown = " ".join(html.unescape(re.sub("<[^>]*>", " ", page)).split())
        assert shown == " ".join(f"{around} {one_line(text)} {after.strip('|')}".split())


def test_markdown_leaves_alone_what_does_not_act() -> None:
    text = "+1.2 [+0.3, +2.1] < 0.0001 hf:google/vit_base"
    assert for_markdown(text) == text


@each
def test_a_terminal_shows_it_and_carries_nothing_out(name: str) -> None:
    text = HOSTILE[name]
    for shown in (printable(text), one_line(text)):
        shown.encode("utf-8")
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
        assert len(shown) <= LONGEST
    table = RichTable("a", title=for_rich(text))
    table.add_row(for_rich(text))
    console = Console(file=io.StringIO(), width=5000)
    console.print(f"[bold]{for_rich(text)}[/bold]", highlight=False, soft_wrap=True)
    assert console.file.getvalue().rstrip("\n") == one_line(text)
    console.print(table)
