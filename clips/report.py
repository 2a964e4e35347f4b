"""The report of a run: one offline HTML page with curves and pictures, and the same as PNG files.

`write_report` reads what a run leaves behind (config.json, metrics.jsonl, evaluation*.json) and, where given, the
examples that were drawn from its model. The page holds everything inside itself, follows the reader's light or dark
setting and fits a phone.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Plot

from clips.errors import UserError
from clips.examples import Captioned, Classified, Examples, Retrieved, collect_examples
from clips.plots import (
    DARK,
    LIGHT,
    Panel,
    Theme,
    captions_plot,
    curves_plot,
    pretty,
    retrieval_plot,
    verdict,
    zero_shot_plot,
)

__all__ = ["Examples", "collect_examples", "write_report"]


@dataclass
class RunRecord:
    """What a run directory holds, read for the report."""

    name: str
    config: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    figures: dict[str, dict[str, dict[str, float]]]
    """Test set → figure's name → value, chance, items."""


def read_run(run_dir: Path) -> RunRecord:
    """Raises UserError when `run_dir` holds no metrics.jsonl; a line cut short by a killed run is passed over."""
    run_dir = Path(run_dir)
    if not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"{run_dir} is not a run: it has no metrics.jsonl")
    lines = []
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    config = run_dir / "config.json"
    evaluations = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(run_dir.glob("evaluation*.json"))]
    return RunRecord(
        name=run_dir.resolve().name,
        config=json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {},
        train=[line for line in lines if line.get("kind") == "train"],
        evals=[line for line in lines if line.get("kind") == "eval"],
        figures={found["test_set"]: found["figures"] for found in evaluations},
    )


def headline(names: Iterable[str]) -> list[str]:
    """The figures that matter first: R@1 both ways of the set's first protocol, and zero-shot accuracy."""
    recall = [name for name in dict.fromkeys(names) if name.endswith(("_i2t_r1", "_t2i_r1"))]
    return recall[:2] + (["zero_shot_top1"] if "zero_shot_top1" in names else [])


def panels(record: RunRecord) -> list[Panel]:
    scores = headline({name: None for line in record.evals for name in line})
    return [
        Panel("loss", record.train, ["contrastive_loss", "caption_loss"]),
        Panel("validation, %", record.evals, scores),
        Panel("learning rate", record.train, ["lr"]),
        Panel("logit scale", record.train, ["logit_scale"]),
        Panel("gradient norm", record.train, ["grad_norm"]),
        Panel("samples per second", record.train, ["samples_per_s"]),
    ]


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


def write_report(run_dir: Path, examples: Examples | None = None) -> Path:
    """Write `run_dir`/report/ (index.html and PNG files) and return the page's path."""
    record, examples = read_run(run_dir), examples or Examples()
    directory = Path(run_dir) / "report"
    directory.mkdir(exist_ok=True)
    curves_plot(panels(record), LIGHT).savefig(directory / "curves.png")
    for name, draw, found in (
        ("retrieval", retrieval_plot, examples.retrieval),
        ("zero_shot", zero_shot_plot, examples.zero_shot),
        ("captions", captions_plot, examples.captions),
    ):
        if found:
            draw(found).savefig(directory / f"{name}.png")
    page = directory / "index.html"
    page.write_text(_page(record, examples), encoding="utf-8")
    return page


def _page(record: RunRecord, examples: Examples) -> str:
    captioner = record.config.get("model", {}).get("captioner") or {}
    queries = captioner.get("inputs") == "queries"
    demo = _DEMO_NOTE if record.config.get("data", {}).get("train") == "demo" else ""
    sections = [
        _tiles(record),
        section(
            "Results",
            _RESULTS_NOTE + (_DEMO_NOTE if demo else ""),
            "".join(_results_table(*item) for item in record.figures.items()),
        ),
        section("Curves", "Against samples seen.", _curves(record)),
        section("Retrieval: hits and misses", _RETRIEVAL_NOTE, "".join(map(_retrieved_card, examples.retrieval))),
        section("Zero-shot predictions", _ZERO_SHOT_NOTE, "".join(map(_classified_card, examples.zero_shot))),
        section(
            "Captions",
            _CAPTIONS_NOTE + (_QUERIES_NOTE if queries else ""),
            "".join(map(_captioned_card, examples.captions)),
        ),
        _configuration(record.config),
    ]
    seen = record.train[-1] if record.train else {}
    line = [
        str(record.config.get("recipe", "")),
        f"{int(seen.get('samples', 0)):,} samples",
        _model_line(record.config),
    ]
    return html_page(record.name, " · ".join(filter(None, line)), "".join(sections))


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


_RESULTS_NOTE = "Percent. The mark on each bar is chance. Equal captions count as hits; ties are broken at random."
_DEMO_NOTE = " The demo proves the path and that the measurement works; it is no evidence about natural images."
_RETRIEVAL_NOTE = "A caption of the test set, its own image, and the images found for it, best first; green is its own."
_ZERO_SHOT_NOTE = "Probabilities over all classes, mean of the prompts; green is the true class."
_CAPTIONS_NOTE = "The captioner reads the image and the web caption; it was trained on the long caption."
_QUERIES_NOTE = (
    " With learned queries, the paper's way, a position does not know what the others say: what stands here is each "
    "position's likeliest word on its own, a look at what was learned and no fluent text. "
    "--set model.captioner.inputs=tokens trains a captioner that writes."
)


def section(title: str, note: str, content: str) -> str:
    """A titled box around `content` (HTML); nothing when there is no content."""
    cards = f'<div class="cards">{content}</div>' if content.startswith('<div class="card') else content
    return f'<section><h2>{title}</h2><p class="note">{note}</p>{cards}</section>' if content else ""


def _tiles(record: RunRecord) -> str:
    tiles = []
    figures = next(reversed(record.figures.values()), {})
    last = record.evals[-1] if record.evals else {}
    for name in headline(figures or last):
        figure = figures.get(name, {"value": last.get(name)})
        chance = f"chance {figure['chance']:.1f} %" if "chance" in figure else "validation"
        tiles.append((f"{figure['value']:.1f} %", pretty(name), chance))
    if speeds := [line["samples_per_s"] for line in record.train if line.get("samples_per_s")]:
        wait = [line["data_wait_share"] for line in record.train if line.get("data_wait_share") is not None]
        note = f"{100 * sum(wait) / len(wait):.1f} % waiting for data" if wait else ""
        tiles.append((f"{sorted(speeds)[len(speeds) // 2]:,.0f}", "samples per second", note))
    if record.train and math.isfinite(record.train[-1].get("loss", math.nan)):
        tiles.append((f"{record.train[-1]['loss']:.3f}", "last loss", f"step {record.train[-1]['step']:,}"))
    return tile_row(tiles)


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


def _results_table(name: str, figures: Mapping[str, Mapping[str, float]]) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(pretty(key))}</td><td class="n">{figure["value"]:.1f}</td>'
        f'<td class="n">{figure["chance"]:.2f}</td><td class="n">{figure["items"]:,}</td>'
        f'<td class="bar-cell" style="width:45%"><div class="meter"><i style="width:{figure["value"]:.1f}%"></i>'
        f'<u style="left:{figure["chance"]:.1f}%"></u></div></td></tr>'
        for key, figure in figures.items()
    )
    columns = "".join(f'<th class="n">{column}</th>' for column in ("%", "chance", "items"))
    head = f'<tr><th>{html.escape(name)}</th>{columns}<th class="bar-cell"></th></tr>'
    return f'<div class="scroll"><table>{head}{rows}</table></div>'


def _curves(record: RunRecord) -> str:
    if not record.train:
        return ""
    content = ""
    for panel in panels(record):
        content += themed(partial(curves_plot, [panel]), panel.title)
    return f'<div class="curves">{content}</div>'


def _retrieved_card(e: Retrieved) -> str:
    found = "".join(
        f'<figure{" class=true" if i == e.rank else ""}><img src="{data_uri(image)}" alt="">{i}</figure>'
        for i, image in enumerate(e.found, 1)
    )
    kind = "hit" if e.rank == 1 else "miss"
    return (
        f'<div class="card"><p><span class="badge {kind}">{verdict(e.rank)}</span>{html.escape(e.query)}</p>'
        f'<div class="row"><figure class="first"><img src="{data_uri(e.truth)}" alt="">own image</figure>{found}</div>'
        "</div>"
    )


def _classified_card(e: Classified) -> str:
    kind, word = ("hit", "right") if e.classes[0] == e.label else ("miss", "wrong")
    bars = "".join(
        f'<div class="bar{" right" if name == e.label else ""}"><span>{html.escape(name)}</span>'
        f'<span><i style="width:{100 * p:.1f}%"></i></span><span>{100 * p:.1f} %</span></div>'
        for name, p in zip(e.classes, e.probabilities, strict=True)
    )
    return (
        f'<div class="card split"><img src="{data_uri(e.image)}" alt=""><div>'
        f'<p><span class="badge {kind}">{word}</span>'
        f"{html.escape(e.label)}</p>{bars}</div></div>"
    )


def _captioned_card(e: Captioned) -> str:
    return (
        f'<div class="card split"><img src="{data_uri(e.image)}" alt=""><div><dl><dt>generated</dt>'
        f"<dd>{html.escape(e.generated)}</dd><dt>long caption</dt><dd>{html.escape(e.truth)}</dd>"
        f"<dt>web caption</dt><dd>{html.escape(e.web)}</dd></dl></div></div>"
    )


def _configuration(config: Mapping[str, Any]) -> str:
    text = html.escape(json.dumps(config, indent=2))
    return f"<section><details><summary>Configuration</summary><pre>{text}</pre></details></section>" if config else ""


def _model_line(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    vision, text = config["model"]["vision"], config["model"]["text"]
    return (
        f"image tower {vision['width']}×{vision['layers']}, patch {vision['patch_size']} at {vision['image_size']} px, "
        f"text tower {text['width']}×{text['layers']}"
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
