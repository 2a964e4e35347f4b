"""The report of a run: one offline HTML page with curves and pictures, and the same as PNG files.

`write_report` reads what a run leaves behind (config.json, metrics.jsonl, evaluation*.json) and, where given, the
examples that were drawn from its model. The page holds everything inside itself, follows the reader's light or dark
setting and fits a phone.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clips.common.files import read_json
from clips.common.page import data_uri, html_page, section, themed, tile_row
from clips.common.plots import LIGHT, Panel, curves_plot, pretty
from clips.common.rundir import read_metrics
from clips.evaluation.examples import Captioned, Classified, Examples, Retrieved
from clips.evaluation.plots import captions_plot, retrieval_plot, verdict, zero_shot_plot


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
    """Raises UserError when `run_dir` holds no metrics.jsonl."""
    run_dir = Path(run_dir)
    lines = read_metrics(run_dir)
    evaluations = [read_json(path) for path in sorted(run_dir.glob("evaluation*.json"))]
    return RunRecord(
        name=run_dir.resolve().name,
        config=read_json(run_dir / "config.json"),
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
