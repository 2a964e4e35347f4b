"""The experiment engine: what is never run twice, failures, locks, the page; text from data acts nowhere."""

import html
import io
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hostile import HOSTILE
from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table as RichTable

from clips.common.errors import CommandError, UserError
from clips.common.escape import LONGEST, clip, for_markdown, for_rich, one_line, printable
from clips.common.page import Bullets, Card, Cards, Code, Folded, Page, Paragraph, Section, Table, Tile, as_html
from clips.lab.grid import Run, Step
from clips.lab.pretraining import PretrainingRun
from clips.lab.report import forest, verdict_class
from clips.lab.run import Commands, Runner, failed_steps, locked


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def run(directory: Path, *parts: str, code: str = "open({file!r}, 'w')", may_fail: str = "") -> Run:
    """A run whose steps each leave a file of their name."""
    steps = [
        Step(
            part,
            python(code.format(file=str(directory / part))),
            (directory / part).is_file,
            folder=directory / "own" / part if part == may_fail else None,
            may_fail=part == may_fail,
        )
        for part in parts
    ]
    return Run("a", directory.name, directory, tuple(steps), record={"of": 1})


def test_a_run_with_other_settings_is_refused_before_any_run_runs(tmp_path: Path) -> None:
    def refuse() -> None:
        raise UserError("it holds other settings")

    first = run(tmp_path / "first", "one")
    other = Run("b", "seed 0", tmp_path / "other", (), check=refuse)
    with pytest.raises(UserError, match="other settings"):
        Runner([first, other], 1).run([first, other])
    assert not first.directory.exists()
    with pytest.raises(UserError, match="sample"):  # of a pretraining run: settings that the command would refuse
        PretrainingRun("demo", "a-seed0", 0, 0).planned(tmp_path)


def test_a_step_that_may_fail_is_named_in_the_end_and_tried_again_in_an_empty_folder(tmp_path: Path) -> None:
    fragile = run(tmp_path / "c", "one", "two", code="raise SystemExit('all is lost')", may_fail="one")
    runner = Runner([fragile], 1)
    with pytest.raises(CommandError, match=r"c ended with exit code 1.*\n  all is lost"):
        runner.run([fragile])  # "two" ends the study, "one" has not
    ((name, log),) = failed_steps([fragile])
    assert (name, log.read_text().strip()) == ("one", "all is lost")
    (log.parent / "left behind").write_text("")
    good = run(tmp_path / "c", "one", "two", may_fail="one")
    runner = Runner([good], 1)
    runner.run([good])
    assert failed_steps([good]) == []
    assert [path.name for path in log.parent.iterdir()] == ["log.txt"]


def test_a_run_is_locked_for_a_child_that_outlives_its_parent(tmp_path: Path) -> None:
    commands = Commands(1)
    with locked(tmp_path / "run", commands) as lock:
        child = subprocess.Popen(python("input()"), stdin=subprocess.PIPE, pass_fds=[lock])
    got = threading.Event()

    def wait() -> None:
        with locked(tmp_path / "run", commands):
            got.set()

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    assert not got.wait(0.5)
    child.communicate(b"\n")
    assert got.wait(60)
    waiter.join()


def test_after_a_failure_beside_a_longer_run_nothing_more_begins() -> None:
    failed, begun = threading.Event(), []

    def work(item: int) -> None:
        begun.append(item)
        if item == 1:
            failed.set()
            raise CommandError("all is lost")
        assert failed.wait(60)
        time.sleep(0.5)

    with pytest.raises(CommandError, match="all is lost"):
        Commands(2).map(work, list(range(8)))
    assert set(begun) <= {0, 1, 2}


def test_every_block_shows_texts_as_texts_on_one_offline_page(tmp_path: Path) -> None:
    for text in (text[:3000] for text in HOSTILE.values()):
        blocks = [
            Paragraph(text, text),
            Bullets([text]),
            Code(text),
            Table([text, ""], [[text, "reproduced"]], verdict_class({"reproduced": "good"})),
            forest([(text, {"mean": -0.02, "ci95": [-0.03, -0.01], "verdict": "loss"})], scale=100),
            Cards([Card(text, texts=[(text, text, True), (text, text, None)])]),
            Folded(text, [Paragraph(text)]),
        ]
        page = as_html(Page(text, text, [Section(text, blocks, text)], tiles=[Tile(text, [(text, "good")], text)]))
        assert not re.search(r"<(?:script|a|em|img)\b|@import|url\(", page)
        assert html.unescape(page).count(printable(text, None)) >= 15
        assert "−2.0 [−3.0, −1.0] ▼ loss" in page
        assert 'class="wrap verdict good"' in page


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
