"""The frame of every HTML page this project writes: one file, light and dark, tables, tiles, pictures inside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure as Plot

from clips.common.plots import DARK, LIGHT, Theme

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --page: #f4f5f8; --ink: #1d222c; --soft: #687083; --line: #e3e6ec;
  --accent: #2f6fde; --good: #17805f; --bad: #c2512e; --bar: #9aa3b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #1a1d23; --page: #121419; --ink: #e6e9ef; --soft: #98a0b0;
  --line: #31363f; --accent: #78a4f5; --good: #4cc79c; --bad: #f08a64; --bar: #6b7485; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 16px 64px; }
h1 { font-size: 1.6rem; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 4px; }
p.note { color: var(--soft); margin: 0 0 14px; max-width: 76ch; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 18px;
  margin-top: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 18px; }
.tile { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 12px 16px; }
.tile b { display: block; font-size: 1.55rem; font-variant-numeric: tabular-nums; letter-spacing: -.02em; }
.tile span, .tile small { color: var(--soft); display: block; font-size: .83rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 10px; }
picture img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; } .scroll + .scroll { margin-top: 18px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: .83rem; }
td.n, th.n { text-align: right; }
.meter { position: relative; width: 100%; min-width: 110px; height: 8px; background: var(--line); border-radius: 4px; }
.meter i { position: absolute; inset: 0 auto 0 0; background: var(--accent); border-radius: 4px; }
.meter u { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--ink); }
@media (max-width: 560px) { td.bar-cell, th.bar-cell { display: none; } }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 470px), 1fr)); gap: 14px; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: 12px; min-width: 0; }
.card p { margin: 0 0 8px; overflow-wrap: anywhere; }
.row { display: flex; gap: 8px; overflow-x: auto; }
figure { margin: 0; text-align: center; font-size: .75rem; color: var(--soft); flex: 0 0 auto; }
figure img { width: 68px; height: 68px; object-fit: cover; border-radius: 6px; display: block;
  border: 3px solid transparent; }
figure.true img { border-color: var(--good); }
figure.first { padding-right: 8px; border-right: 1px solid var(--line); }
.badge { font-size: .75rem; font-weight: 600; padding: 1px 8px; border-radius: 99px; border: 1px solid;
  margin-right: 6px; }
.hit { color: var(--good); } .miss { color: var(--bad); }
.split { display: flex; gap: 14px; align-items: flex-start; }
.split > img { width: 104px; height: 104px; object-fit: cover; border-radius: 8px; flex: none; }
.split > div { flex: 1; min-width: 0; }
.bar { display: grid; grid-template-columns: minmax(70px, 34%) 1fr auto; gap: 8px; align-items: center;
  font-size: .83rem; }
.bar span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar span:last-child { text-align: right; min-width: 3.6em; color: var(--soft); font-variant-numeric: tabular-nums; }
.bar i { display: block; height: 9px; border-radius: 3px; background: var(--bar); }
.bar.right i { background: var(--good); } .bar.right span:first-child { font-weight: 600; }
dl { margin: 0; font-size: .85rem; } dt { color: var(--soft); } dd { margin: 0 0 6px; overflow-wrap: anywhere; }
details summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: .78rem; line-height: 1.45; }
"""


def names_and_numbers(column: int, text: str) -> str:
    """CSS class of a table's cell: names in the first column, figures in the others."""
    return "n" if column else ""


@dataclass
class Table:
    """Rows of text, for pages and for Markdown."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)

    def html(self, css_class: Callable[[int, str], str] = names_and_numbers) -> str:
        """`css_class`: column and text → class of a cell or heading."""

        def line(cells: Sequence[str], tag: str) -> str:
            classes = (css_class(column, text) for column, text in enumerate(cells))
            cells = (f'<{tag} class="{c}">{html.escape(text)}</{tag}>' for c, text in zip(classes, cells, strict=True))
            return f"<tr>{''.join(cells)}</tr>"

        rows = "".join(line(row, "td") for row in self.rows)
        return f'<div class="scroll"><table>{line(self.head, "th")}{rows}</table></div>'


def html_page(title: str, note: str, content: str, style: str = "") -> str:
    """A whole page around `content` (HTML): one file, light and dark, desktop and phone. `style` adds CSS."""
    title = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{style}</style></head><body><main>"
        f'<h1>{title}</h1><p class="note">{html.escape(note)}</p>{content}</main></body></html>\n'
    )


def section(title: str, note: str, content: str) -> str:
    """A titled box around `content` (HTML); nothing when there is no content."""
    cards = f'<div class="cards">{content}</div>' if content.startswith('<div class="card') else content
    return f'<section><h2>{title}</h2><p class="note">{note}</p>{cards}</section>' if content else ""


def tile_row(tiles: Iterable[tuple[str, str, str]]) -> str:
    """Boxes with (value, label, note)."""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span>{html.escape(label)}</span><b>{value}</b><small>{note}</small></div>'
            for value, label, note in tiles
        )
        + "</div>"
    )


def themed(draw: Callable[[Theme], Plot], alt: str) -> str:
    """A plot inside the page, drawn once for light and once for dark."""
    light, dark = (data_uri(_png(draw(theme))) for theme in (LIGHT, DARK))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(alt)}"></picture>'
    )


def _png(plot: Plot) -> bytes:
    out = io.BytesIO()
    plot.savefig(out, format="png")
    return out.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG as something that `src` takes."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
