"""The CLIPS paper's claims in small, on the demo: what is trained, which comparison decides, and the verdict.

Every variant is a recipe with a few settings, trained for the same number of samples with each seed: an ordinary run
of scripts/pretrain_clips.py under `output`/, so that whatever is finished is never run again. Variants that several
claims need are trained once. What decides is written down here, before anything is trained: the interval of one
figure's difference between two variants, never the means.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from clips import compare
from clips.captions import CaptionTokenizer
from clips.checkpoint import write_atomically
from clips.compare import Cell, difference
from clips.config import RunConfig
from clips.data.loader import BatchDataset
from clips.data.splits import open_split
from clips.errors import UserError
from clips.testsets import PROTOCOLS, open_test_set

DECIDING = "sentence_r1"
"""The figure that decides every claim: retrieval with the test set's sentences, as the paper's own tables have it."""
MEANS = {f"{protocol}_r1": (f"{protocol}_i2t_r1", f"{protocol}_t2i_r1") for protocol in PROTOCOLS}
"""R@1 of a protocol as the mean of both ways."""
FIGURES = (*(name for both in MEANS.values() for name in both), "zero_shot_top1", "linear_probe_top1")
CONTEXT = "model.text.context_length=80"
"""The demo's text tower reads 32 slots and would cut most long captions (47 tokens on average, 72 at most)."""
BLOCK_WORDS = 11
"""Words that truncation and the masks keep: as many as a sentence of the demo's long captions has on average."""
OVERHEAD_SECONDS = 25
"""Of each run, beside training: start, evaluation, export, report."""


@dataclass(frozen=True)
class Variant:
    label: str
    recipe: str
    settings: tuple[str, ...]
    rate: int
    """Samples per second on one core, for the estimate of the plan."""


NO_CAPTIONER = ("model.captioner=null", "task.caption_weight=0")
SENTENCE = "captions.strategy=sentence"


def _masked(strategy: str) -> tuple[str, ...]:
    return (*NO_CAPTIONER, f"captions.strategy={strategy}", f"captions.sub_caption_tokens={BLOCK_WORDS}")


VARIANTS = {
    "web": Variant("web caption only", "clip_baseline", ("task.synthetic_share=0",), 900),
    "synthetic20": Variant("20 % synthetic", "clip_baseline", ("task.synthetic_share=0.2",), 410),
    "synthetic50": Variant("50 % synthetic", "clip_baseline", ("task.synthetic_share=0.5",), 410),
    "synthetic100": Variant("100 % synthetic", "clip_baseline", ("task.synthetic_share=1",), 410),
    "sentence": Variant("web + one sentence", "demo", (*NO_CAPTIONER, SENTENCE), 600),
    "half": Variant(
        "web + half of the sentences", "demo", (*NO_CAPTIONER, SENTENCE, "captions.sentence_share=0.5"), 460
    ),
    "full": Variant("web + full caption", "demo", (*NO_CAPTIONER, "captions.strategy=full"), 370),
    "truncation": Variant(f"web + first {BLOCK_WORDS} words", "demo", _masked("truncation"), 600),
    "random_mask": Variant(f"web + {BLOCK_WORDS} scattered words", "demo", _masked("random_mask"), 600),
    "block_mask": Variant(f"web + {BLOCK_WORDS} words in a row", "demo", _masked("block_mask"), 600),
    "captioner": Variant("web + one sentence + captioner", "demo", (SENTENCE,), 337),
}


@dataclass(frozen=True)
class Claim:
    title: str
    paper: str
    """What the paper says."""
    variants: tuple[str, ...]
    contrasts: tuple[tuple[str, str], ...]
    """(better, worse) according to the paper; each is decided by itself."""
    caution: str
    """What else could explain a difference here."""
    line: bool = False
    """Whether the variants are steps of one quantity, drawn as a line."""


CLAIMS = {
    "a": Claim(
        title="Inverse effect: a short piece of the long caption teaches more than all of it",
        paper="The shorter the piece of the synthetic caption that the text encoder is fed, the better the encoder.",
        variants=("sentence", "half", "full"),
        contrasts=(("sentence", "full"), ("sentence", "half"), ("half", "full")),
        caution="The test sentences have about 22 tokens: as many as half of the sentences (24) have on average, and "
        "nearer to one sentence (13) than to the full caption (47); with the web caption (5) as second text the "
        "full-caption model hardly saw a text of that length. So part of a gain may be the length alone. Two figures "
        "show how much: retrieval with the full long captions as texts, where it is the other way round, and the "
        "linear probe, which reads no text at all. All three are trained with the web caption as second text and "
        "without the captioner, so that only the length differs.",
        line=True,
    ),
    "b": Claim(
        title="Ablation: web caption only → + sub-caption → + captioner",
        paper="A sub-caption as second text beats the web caption alone; the captioner on top is better still.",
        variants=("web", "sentence", "captioner"),
        contrasts=(("sentence", "web"), ("captioner", "sentence")),
        caution="Equal samples seen is not equal time: see the seconds of training. The demo's web captions have about "
        "5 tokens and a fifth of them is wrong, so whatever reads the exact long captions has better and longer "
        "texts too. The web-only variant runs at the baseline recipe's learning rates, the others at the demo "
        "recipe's.",
    ),
    "c": Claim(
        title="Sub-caption strategies at equal mean length",
        paper="Of the four ways to shorten a caption, the sub-caption (a sentence) and the block mask work best.",
        variants=("sentence", "truncation", "random_mask", "block_mask"),
        contrasts=(
            ("sentence", "truncation"),
            ("sentence", "random_mask"),
            ("block_mask", "truncation"),
            ("block_mask", "random_mask"),
        ),
        caution="Equal on average only: one sentence has 7 to 28 tokens, the three others 11 to 16, so only it ever "
        "trains texts as long as the test's (18 to 27). The comparisons with one sentence are partly that; “in a "
        "row” against “scattered”, and the linear probe, are not. First words: most captions begin with the sentence "
        "that names everything, but 11 words cut it wherever there are two or three things.",
    ),
    "d": Claim(
        title="Share of synthetic captions for the CLIP baseline",
        paper="The paper's baseline draws the synthetic caption for 20 % of the images. What that choice implies is "
        "tested: better than none, and better than synthetic captions only.",
        variants=("web", "synthetic20", "synthetic50", "synthetic100"),
        contrasts=(("synthetic20", "web"), ("synthetic20", "synthetic100")),
        caution="The demo's long captions are exact; synthetic captions of photographs err, and are less varied than "
        "what people write, which speaks for a small share there. The one text has 5, 13, 24 and 47 tokens on "
        "average: the shares differ in lengths, too, and web captions as texts (beside) go the other way. The "
        "learning rates were found at 20 %.",
        line=True,
    ),
}
LLAVA = "e"
LLAVA_TITLE = "LLaVA with CLIPS against LLaVA with CLIP"
LLAVA_PAPER = "With the CLIPS encoder LLaVA answers better than with a CLIP encoder."


def reproduce(
    output: Path,
    claims: Sequence[str],
    *,
    seeds: int = 3,
    samples: int = 48_000,
    jobs: int = 2,
    llava_report: Path = Path("runs/compare/report.json"),
    settings: Sequence[str] = (),
    dry_run: bool = False,
) -> None:
    """Train what is missing for `claims` (letters) and write claims.json, claims.md and claims.html into `output`.

    `settings` are `--set` assignments for every run. Raises UserError for an unknown claim, fewer than two seeds (no
    interval), or an `output` whose runs have other settings; CommandError when a run fails.
    """
    if unknown := [key for key in claims if key not in (*CLAIMS, LLAVA)]:
        raise UserError(f"--claims: no claim {', '.join(unknown)}; known: {', '.join((*CLAIMS, LLAVA))}")
    if seeds < 2:
        raise UserError(f"--seeds {seeds}: an interval needs at least 2, and 3 to be of use")
    if jobs < 1:
        raise UserError(f"--jobs {jobs} must be at least 1")
    names = list(dict.fromkeys(name for key in claims if key in CLAIMS for name in CLAIMS[key].variants))
    grid = {name: [cell(name, seed, samples, settings) for seed in range(seeds)] for name in names}
    everything = [one for cells in grid.values() for one in cells]
    for one in everything:
        config = one.config()  # a setting that one variant does not allow is refused before another trains
        if (config.train.seed, config.samples) != (one.seed, samples):
            raise UserError("--set changes seed or samples of the runs: they are given by --seeds and --samples")
    llava = judge_llava(llava_report) if LLAVA in claims else None
    console = Console(stderr=True)
    console.print(plan(grid, claims, output, jobs))
    if dry_run:
        return
    from clips.claims_report import write_reports  # matplotlib: not for a plan

    output.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    seconds = _seconds_before(output) if all(one.is_finished(output) for one in everything) else None
    compare.train(everything, output, jobs, console)
    variants = {name: variant_record(name, cells, output) for name, cells in grid.items()}
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "seconds": seconds or round(time.monotonic() - begin),
        "samples": samples,
        "seeds": seeds,
        "jobs": jobs,
        "deciding_figure": DECIDING,
        "environment": environment(next(iter(grid.values()), []), output),
        "test_text_tokens": evaluation_text_tokens(output / grid[names[0]][0].name) if names else {},
        "claims": {key: judge(key, variants) if key in CLAIMS else llava for key in sorted(set(claims))},
        "variants": variants,
    }
    write_atomically(output / "claims.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    write_reports(result, output)
    for key, claim in result["claims"].items():
        console.print(f"({key}) {claim['title']}: [bold]{claim['verdict']}[/bold]", highlight=False)
    console.print(f"\nwritten to {output}/claims.html, claims.md and claims.json", highlight=False, soft_wrap=True)
    if "missing" in result["claims"].get(LLAVA, {}):
        console.print(f"Next: {result['claims'][LLAVA]['missing']}", highlight=False, soft_wrap=True)


def _seconds_before(output: Path) -> int | None:
    """How long the runs took that are all there already, by the report that they were trained for."""
    report = output / "claims.json"
    return json.loads(report.read_text())["seconds"] if report.is_file() else None


def cell(name: str, seed: int, samples: int, settings: Sequence[str] = ()) -> Cell:
    """One run of variant `name`; `settings` are everybody's, the variant's own come last."""
    variant = VARIANTS[name]
    return Cell(variant.recipe, f"{name}-seed{seed}", samples, seed, (*settings, CONTEXT, *variant.settings))


def plan(grid: dict[str, list[Cell]], claims: Sequence[str], output: Path, jobs: int) -> Table:
    """Which runs there are, which of them are finished, and how long the others take."""
    out = Table(title=f"claims {', '.join(claims)}: runs in {output}", title_justify="left")
    for column in ("variant", "claims", "recipe", "settings"):
        out.add_column(column, overflow="fold")
    for column in ("samples", "done", "minutes"):
        out.add_column(column, justify="right")
    total = 0.0
    for name, cells in grid.items():
        variant = VARIANTS[name]
        done = sum(one.is_finished(output) for one in cells)
        seconds = (len(cells) - done) * (cells[0].samples / variant.rate + OVERHEAD_SECONDS)
        total += seconds
        used = ", ".join(key for key in claims if key in CLAIMS and name in CLAIMS[key].variants)
        row = (variant.label, used, variant.recipe, " ".join(variant.settings), f"{cells[0].samples:,}")
        out.add_row(*row, f"{done}/{len(cells)}", f"{seconds / 60:.1f}")
    cores = min(jobs, os.cpu_count() or 1)
    out.caption = f"all with {CONTEXT}; about {math.ceil(total / 60 / cores)} minutes, {jobs} runs beside each other"
    return out


def variant_record(name: str, cells: list[Cell], output: Path) -> dict[str, Any]:
    """Everything about a variant that a reader needs: its runs with configuration, command and figures (percent)."""
    runs = [
        {
            "name": one.name,
            "seed": one.seed,
            "command": shlex.join(["python", *one.command(output)]),
            "figures": run_figures(output / one.name),
            "config": RunConfig.load(output / one.name / "config.json").to_dict(),
        }
        for one in cells
    ]
    return {**asdict(VARIANTS[name]), "text_tokens": train_text_tokens(output / cells[0].name), "runs": runs}


def run_figures(run: Path) -> dict[str, float]:
    """A run's figures and the means of both ways. Raises UserError when its test set does not give them all."""
    try:
        found = compare.figures(run, FIGURES)
    except KeyError as error:
        raise UserError(
            f"{run}/evaluation.json has no {error}: the claims are measured on the demo's test set, or on one whose "
            "samples carry `captions` and `label` in their JSON member, as the demo's do"
        ) from None
    # Rounded: what floating point leaves over must not pass for a spread over seeds.
    return found | {name: round(mean(found[way] for way in both), 6) for name, both in MEANS.items()}


def judge(key: str, variants: dict[str, Any]) -> dict[str, Any]:
    """A claim with its contrasts: every figure's difference, and the verdict by the deciding one's interval."""
    claim = CLAIMS[key]
    rows = {name: [run["figures"] for run in variants[name]["runs"]] for name in claim.variants}
    contrasts = []
    for better, worse in claim.contrasts:
        found = {figure: difference(rows[better], rows[worse], figure) for figure in (*MEANS, *FIGURES)}
        contrasts.append(
            {"a": better, "b": worse, "metric": DECIDING, **found[DECIDING], "seeds": len(rows[better])}
            | {"verdict": verdict(found[DECIDING]["ci95"]), "figures": found}
        )
    return asdict(claim) | {"contrasts": contrasts, "verdict": summary([c["verdict"] for c in contrasts])}


REPRODUCED, CONTRADICTED, OPEN = "reproduced here", "contradicted here", "not reproduced here"


def verdict(ci95: Sequence[float] | None) -> str:
    """What the 95 % interval of (better − worse) says about a claim; without an interval nothing is shown."""
    if ci95 is None or ci95[0] <= 0 <= ci95[1]:
        return OPEN
    return REPRODUCED if ci95[0] > 0 else CONTRADICTED


def summary(verdicts: Sequence[str]) -> str:
    """One line for several comparisons."""
    counts = {kind: verdicts.count(kind) for kind in (REPRODUCED, CONTRADICTED, OPEN) if kind in verdicts}
    if len(counts) == 1:
        return verdicts[0]
    return ", ".join(f"{count} of {len(verdicts)} {kind}" for kind, count in counts.items())


def judge_llava(report: Path) -> dict[str, Any]:
    """Claim (e) from the report of scripts/compare_encoders.py: clips − clip, or how to get there.

    That report counts in shares of the questions; here it is percentage points, as everywhere.
    """
    claim = {"title": LLAVA_TITLE, "paper": LLAVA_PAPER, "report": str(report)}
    if not report.exists():
        missing = f"python scripts/compare_encoders.py writes {report}; then run this command again"
        return claim | {"verdict": "not run", "missing": missing}
    try:
        found = [
            entry
            for entry in json.loads(report.read_text())["differences"]
            if {entry["a"], entry["b"]} == {"clips", "clip"} and entry["metric"] == "accuracy"
        ]
        entry = {name: found[0][name] for name in ("metric", "seeds", "items")}
        sign = 100 if found[0]["a"] == "clips" else -100
        entry |= {"a": "clips", "b": "clip", "mean": sign * found[0]["mean"]}
        entry |= {"ci95": sorted(sign * end for end in found[0]["ci95"])}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{report} holds no difference in accuracy between clips and clip ({error!r}): write it with "
            "python scripts/compare_encoders.py, or leave e out of --claims"
        ) from None
    if entry["seeds"] < 2:
        missing = f"{report} has one seed, whose interval knows nothing of other runs: compare with --seeds 3"
        return claim | {"verdict": "not run", "missing": missing}
    return claim | {"contrasts": [entry | {"verdict": verdict(entry["ci95"])}], "verdict": verdict(entry["ci95"])}


def environment(cells: Sequence[Cell], output: Path) -> dict[str, Any]:
    """What the runs found, and the processors of this machine."""
    found = json.loads((output / cells[0].name / "env.json").read_text()) if cells else {}
    kept = {name: found[name] for name in ("python", "platform", "device", "packages") if name in found}
    return {"cpus": os.cpu_count(), **kept}


def train_text_tokens(run_dir: Path, samples: int = 256) -> dict[str, float]:
    """Mean tokens of the texts that a run's text tower was fed (bos, eos and CLS not counted), from its own loader."""
    run = RunConfig.load(run_dir / "config.json")
    tokenizer = CaptionTokenizer.load(run_dir / "tokenizer")
    source = open_split(run.data, "train", need_long=True)
    batch = BatchDataset(source, tokenizer, run, run.phases[0])[range(samples)]
    texts = {name: batch[name] for name in ("web", "sub") if name in batch}
    return {name: round(float((ids != tokenizer.pad_id).sum(1).float().mean()) - 3, 1) for name, ids in texts.items()}


def evaluation_text_tokens(run_dir: Path) -> dict[str, float]:
    """Mean tokens of the test set's texts, by protocol (images with a class are for zero-shot, not for retrieval)."""
    run = RunConfig.load(run_dir / "config.json")
    tokenizer = CaptionTokenizer.load(run_dir / "tokenizer")
    source, _ = open_test_set(run.data, "test", run.captions.splitter)
    items = [item for item in map(source.read, range(len(source))) if item.label is None]
    texts = {name: [text for item in items for text in item.captions[name]] for name in PROTOCOLS}
    return {name: round(mean(map(len, tokenizer.encode(found))), 1) for name, found in texts.items() if found}
