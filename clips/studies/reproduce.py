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
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from clips.common.errors import CommandError, UserError
from clips.common.escape import for_rich
from clips.common.files import read_json, write_atomically
from clips.common.rundir import by_test_set, deciding_name
from clips.config import RunConfig
from clips.data.loader import BatchDataset
from clips.data.splits import open_split
from clips.data.tokenizer import CaptionTokenizer
from clips.evaluation.testsets import PROTOCOLS, open_test_set
from clips.lab.pretraining import PretrainingRun, read_figures, train
from clips.lab.stats import difference
from clips.studies.claims import (
    CAPTIONS,
    CLAIMS,
    CONTEXT,
    DECIDING,
    FIGURES,
    LLAVA,
    LLAVA_PAPER,
    LLAVA_TITLE,
    MEANS,
    OVERHEAD_SECONDS,
    VARIANTS,
    Variant,
    summary,
    verdict,
)
from clips.studies.claims_report import write_reports


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
    runs_of = {name: [variant_run(name, seed, samples, settings) for seed in range(seeds)] for name in names}
    everything = [run for runs in runs_of.values() for run in runs]
    for run in everything:
        config = run.config()  # a setting that one variant does not allow is refused before another trains
        if (config.train.seed, config.samples) != (run.seed, samples):
            raise UserError("--set changes seed or samples of the runs: they are given by --seeds and --samples")
    llava = judge_llava(llava_report) if LLAVA in claims else None
    console = Console(emoji=False, stderr=True)
    console.print(table_of_runs(runs_of, claims, output, jobs))
    if dry_run:
        return
    output.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    seconds = _seconds_before(output) if all(run.is_finished(output) for run in everything) else None
    train(everything, output, jobs, console)
    variants = {name: variant_record(VARIANTS[name], runs, output) for name, runs in runs_of.items()}
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "seconds": seconds or round(time.monotonic() - begin),
        "samples": samples,
        "seeds": seeds,
        "jobs": jobs,
        "deciding_figure": deciding_name(DECIDING, variants[names[0]]["runs"][0]["figures"]) if names else DECIDING,
        "environment": environment(everything, output),
        "test_text_tokens": evaluation_text_tokens(output / everything[0].name) if names else {},
        "claims": {key: judge(key, variants) if key in CLAIMS else llava for key in sorted(set(claims))},
        "variants": variants,
    }
    write_atomically(output / "claims.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    write_reports(result, output)
    for key, claim in result["claims"].items():
        console.print(f"({key}) {claim['title']}: [bold]{claim['verdict']}[/bold]", highlight=False)
    written = f"{for_rich(str(output))}/claims.html, claims.md and claims.json"
    console.print(f"\nwritten to {written}", highlight=False, soft_wrap=True)
    if "missing" in result["claims"].get(LLAVA, {}):
        console.print(f"Next: {for_rich(result['claims'][LLAVA]['missing'])}", highlight=False, soft_wrap=True)


def _seconds_before(output: Path) -> int | None:
    """How long the runs took that are all there already, by the report that they were trained for."""
    return read_json(output / "claims.json").get("seconds")


def variant_run(
    name: str, seed: int, samples: int, settings: Sequence[str] = (), label: str | None = None
) -> PretrainingRun:
    """One run of variant `name`; `settings` are everybody's, the variant's own come last. Runs are called `label`."""
    variant = VARIANTS[name]
    own = (CAPTIONS, *settings, CONTEXT, *variant.settings)
    return PretrainingRun(variant.recipe, f"{label or name}-seed{seed}", samples, seed, own)


def table_of_runs(runs_of: dict[str, list[PretrainingRun]], claims: Sequence[str], output: Path, jobs: int) -> Table:
    """The plan of the runs of some claims."""
    used = {
        name: ", ".join(key for key in claims if key in CLAIMS and name in CLAIMS[key].variants) for name in runs_of
    }
    captions = {run.config().data.fields.long for runs in runs_of.values() for run in runs}
    title = f"claims {', '.join(claims)}: runs in {output}"
    title += f", long captions from {' '.join(sorted(captions))}" if captions else ""
    return plan_table(title, runs_of, VARIANTS, output, jobs, claims=used)


def plan_table(
    title: str,
    runs_of: Mapping[str, list[PretrainingRun]],
    variants: Mapping[str, Variant],
    output: Path,
    jobs: int,
    **more: Mapping[str, str],
) -> Table:
    """Which runs there are of each variant, which of them are finished, and how long the others take.

    `more` are further columns, each of texts by variant.
    """
    out = Table(title=for_rich(title), title_justify="left")
    for column in ("variant", *more, "recipe", "settings"):
        out.add_column(column, overflow="fold")
    for column in ("samples", "done", "minutes"):
        out.add_column(column, justify="right")
    total = 0.0
    for name, runs in runs_of.items():
        variant = variants[name]
        done = sum(run.is_finished(output) for run in runs)
        samples = runs[0].config().samples
        seconds = (len(runs) - done) * run_seconds(variant, samples)
        total += seconds
        row = (for_rich(variant.label), *(texts[name] for texts in more.values()), variant.recipe)
        row += (for_rich(" ".join(variant.settings)), f"{samples:,}")
        out.add_row(*row, f"{done}/{len(runs)}", f"{seconds / 60:.1f}")
    cores = min(jobs, os.cpu_count() or 1)
    out.caption = f"all with {CONTEXT}; about {math.ceil(total / 60 / cores)} minutes, {jobs} runs beside each other"
    return out


def run_seconds(variant: Variant, samples: int) -> float:
    """About what one run takes on one core."""
    return samples / variant.rate + OVERHEAD_SECONDS


def variant_record(
    variant: Variant, runs: list[PretrainingRun], output: Path, names: Sequence[str] = FIGURES
) -> dict[str, Any]:
    """Everything about a variant that a reader needs: its runs with configuration, command and figures (percent)."""
    records = [
        {
            "name": run.name,
            "seed": run.seed,
            "command": shlex.join(["python", *run.command(output)]),
            "figures": run_figures(output / run.name, names),
            "config": RunConfig.load(output / run.name / "config.json").to_dict(),
        }
        for run in runs
    ]
    return {**asdict(variant), "text_tokens": train_text_tokens(output / runs[0].name), "runs": records}


def run_figures(run: Path, names: Sequence[str] = FIGURES) -> dict[str, float]:
    """A run's figures and the means of both ways. Raises UserError when its test set does not give them all."""
    try:
        found = read_figures(run, names)
    except KeyError as error:
        raise UserError(
            f"{run}/evaluation.json has no {error}: the claims are measured on the demo's test set, or on one whose "
            "samples carry `captions` and `label` in their JSON member, as the demo's do"
        ) from None
    # Rounded: what floating point leaves over must not pass for a spread over seeds.
    means = {
        f"{test_set}/{name}" if test_set else name: round(mean(figures[way] for way in both), 6)
        for test_set, figures in by_test_set(found, "").items()
        for name, both in MEANS.items()
        if set(both) <= set(figures)
    }
    return found | means


def judge(key: str, variants: dict[str, Any]) -> dict[str, Any]:
    """A claim with its contrasts: every figure's difference, and the verdict by the deciding one's interval."""
    claim = CLAIMS[key]
    rows = {name: [run["figures"] for run in variants[name]["runs"]] for name in claim.variants}
    measured = [name for name in rows[claim.variants[0]][0] if name != "train_seconds"]
    decides = deciding_name(DECIDING, measured)
    contrasts = [compared(better, worse, rows, measured, decides) for better, worse in claim.contrasts]
    for contrast in contrasts:
        contrast["verdict"] = verdict(contrast["ci95"])
    return asdict(claim) | {"contrasts": contrasts, "verdict": summary([c["verdict"] for c in contrasts])}


def compared(
    a: str, b: str, rows: Mapping[str, list[dict[str, float]]], figures: Sequence[str], deciding: str = DECIDING
) -> dict[str, Any]:
    """a − b: the deciding figure's difference with its interval, and that of every figure; `rows` are runs' figures."""
    found = {figure: difference(rows[a], rows[b], figure) for figure in figures}
    return {"a": a, "b": b, "metric": deciding, **found[deciding], "seeds": len(rows[a]), "figures": found}


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


def environment(runs: Sequence[PretrainingRun], output: Path) -> dict[str, Any]:
    """What the runs found, and the processors of this machine."""
    found = read_json(output / runs[0].name / "env.json") if runs else {}
    names = ("python", "platform", "device", "packages")
    kept: dict[str, Any] = {name: found[name] for name in names if name in found}
    return {"cpus": os.cpu_count(), **kept}


def train_text_tokens(run_dir: Path, samples: int = 256) -> dict[str, float]:
    """Mean tokens of the texts that a run's text tower was fed (bos, eos and CLS not counted), from its own data.

    Raises CommandError where the data cannot be read any more.
    """
    run = RunConfig.load(run_dir / "config.json")
    tokenizer = CaptionTokenizer.load(run_dir / "tokenizer")
    source = open_split(run.data, "train", need_long=True)
    batch = BatchDataset(source, tokenizer, run)[0, range(samples)]
    if isinstance(batch, CommandError):
        raise batch
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
