"""Which captions teach an encoder best: the same small encoder on the same pictures with each set of long captions.

The sets are data as pretraining reads it, with the same pictures and web captions and different long captions. What
they have in common goes into one table, a column a set, so that pictures, web captions and their order are the same
for every run. Each set's runs are the claims' variant "web + one sentence + captioner" (clips/studies/claims.py), and
beside them stands the claims' "web caption only".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from rich.console import Console
from tqdm import tqdm

from clips.common.errors import UserError
from clips.common.escape import for_rich
from clips.common.files import read_json, write_atomically
from clips.common.rundir import UNSEEN, deciding_name
from clips.config import Fields, parse_fields, parse_test_data
from clips.data.demo import demo_split, ensure_any_demo
from clips.data.sample import BrokenSample
from clips.data.sources import Source, open_source
from clips.data.splits import held_out_sets, open_split
from clips.lab.pretraining import PretrainingRun, train
from clips.studies.caption_report import write_report
from clips.studies.caption_truth import Truth, is_scene
from clips.studies.claims import DECIDING, FIGURES, MEANS, VARIANTS, Variant
from clips.studies.reproduce import (
    compared,
    environment,
    evaluation_text_tokens,
    plan_table,
    run_seconds,
    variant_record,
    variant_run,
)

WEB = "web"
"""The name of the runs that see no long caption."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
ROWS = 512
"""Of one group of the table."""


@dataclass(frozen=True)
class Common:
    """What the sets have in common, as one table."""

    table: Path
    pictures: int
    sizes: dict[str, int]
    """Samples of each set."""
    truth: dict[str, Truth]
    """Set, and "web" → how right its captions are; empty where the pictures are not the demo's."""


def compare_sets(
    sets: Mapping[str, str],
    output: Path,
    *,
    fields: Sequence[str] = (),
    test_data: Sequence[str] | None = None,
    demo_dir: Path = Path("data/demo"),
    seeds: int = 3,
    samples: int = 32_000,
    jobs: int = 2,
    settings: Sequence[str] = (),
    notes: Sequence[str] = (),
    dry_run: bool = False,
) -> None:
    """Train what is missing for `sets` (name → data) and write captions.json, captions.md and captions.html.

    Args:
        fields: where the sets and the test data keep their parts, as `PART=FIELD`; alternatives, separated by `;`,
            where they differ.
        test_data: what the encoders are measured on, further sets as NAME=DATA behind the first, of which one named
            `unseen` decides; by default the demo's test pictures, and the same drawn by an artist never trained on.
        settings: `--set` assignments for every run.
        notes: sentences on where the sets come from, for the report.

    Raises UserError for sets without a common picture, test data that lack a part, fewer than two seeds, or an
    `output` whose runs have other settings; CommandError when a run fails.
    """
    if seeds < 2:
        raise UserError(f"--seeds {seeds}: an interval needs at least 2, and 3 to be of use")
    if jobs < 1:
        raise UserError(f"--jobs {jobs} must be at least 1")
    if test_data is None:
        ensure_any_demo(demo_dir)
        test_data = [demo_split(demo_dir, "test")]
        if (demo_dir / UNSEEN).is_dir():  # absent where the drawings of several artists could not be fetched
            test_data.append(f"{UNSEEN}={demo_split(demo_dir, UNSEEN)}")
    console = Console(emoji=False, stderr=True)
    begin = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    named = parse_fields(list(fields), Fields())
    common = collect(sets, output, named)
    runs_of, variants = plan(sets, common, test_data, demo_dir, named, seeds=seeds, samples=samples, settings=settings)
    read = runs_of[WEB][0].config().data
    for name in held_out_sets(read):  # or the first run would say what is missing, after its training
        open_split(read, name, need_long=False)
    console.print(plan_table(f"sets of captions: runs in {output}", runs_of, variants, output, jobs))
    if dry_run:
        return
    everything = [run for runs in runs_of.values() for run in runs]
    was_finished = all(run.is_finished(output) for run in everything)
    train(everything, output, jobs, console)
    names = measured([output / run.name for run in everything])
    records = {name: variant_record(variants[name], runs, output, names) for name, runs in runs_of.items()}
    rows = {name: [run["figures"] for run in record["runs"]] for name, record in records.items()}
    figures = [name for name in rows[WEB][0] if name != "train_seconds"]
    deciding = decides(figures)
    order = [*sets, WEB]
    pairs = [(better, worse) for i, better in enumerate(order) for worse in order[i + 1 :]]
    seconds = read_json(output / "captions.json").get("seconds") if was_finished else None
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "seconds": seconds or round(time.monotonic() - begin),
        "samples": samples,
        "seeds": seeds,
        "jobs": jobs,
        "deciding_figure": deciding,
        "environment": environment(everything, output),
        "test_text_tokens": evaluation_text_tokens(output / everything[0].name),
        "notes": list(notes),
        "pictures": common.pictures,
        "sets": {name: {"data": spec, "samples": common.sizes[name]} for name, spec in sets.items()},
        "truth": {name: truth.shares() for name, truth in common.truth.items()},
        "variants": records,
        "contrasts": [compared(a, b, rows, figures, deciding) for a, b in pairs],
    }
    write_atomically(output / "captions.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    for line in write_report(result, output):
        console.print(for_rich(line), highlight=False, soft_wrap=True)
    written = f"{for_rich(str(output))}/captions.html, captions.md and captions.json"
    console.print(f"\nwritten to {written}", highlight=False, soft_wrap=True)
    best = max(sets, key=lambda name: sum(row[deciding] for row in rows[name]))
    console.print(f"Next: python scripts/pretrain_clips.py --data {for_rich(shlex.quote(sets[best]))}", soft_wrap=True)


def decides(figures: Sequence[str]) -> str:
    """Which of the measured figures decides: the claims' own, else the first there is; on artists never trained on."""
    return deciding_name(next(name for name in (DECIDING, *MEANS, *FIGURES) if name in figures), figures)


def encoders_seconds(sets: int, seeds: int, samples: int, jobs: int) -> float:
    """About what the runs of so many sets take, and those with web captions only, `jobs` at a time, a core each."""
    each = sets * run_seconds(VARIANTS["captioner"], samples) + run_seconds(VARIANTS["web"], samples)
    return seeds * each / min(jobs, os.cpu_count() or 1)


def parse_sets(text: str) -> dict[str, str]:
    """`a=shards-a/,b=shards-b/{0..9}.tar` → name → data; UserError for what is no such list."""
    sets: dict[str, str] = {}
    for entry in re.split(r",(?=[A-Za-z0-9][\w-]*=)", text):
        name, _, data = entry.strip().partition("=")
        if not NAME.fullmatch(name) or name == WEB or not data or name in sets:
            raise UserError(
                f"--sets {entry!r}: it must look like NAME=DATA, with a name of letters, digits, - and _ that is not "
                f"{WEB} and is there once"
            )
        sets[name] = data
    return sets


def plan(
    sets: Mapping[str, str],
    common: Common,
    test_data: Sequence[str],
    demo_dir: Path,
    fields: Fields,
    *,
    seeds: int,
    samples: int,
    settings: Sequence[str],
) -> tuple[dict[str, list[PretrainingRun]], dict[str, Variant]]:
    """The runs and the variant of each set, and of "web". UserError for settings that a run would refuse."""
    test, further = parse_test_data(list(test_data))
    data = [f"data.train={common.table}", f"data.test={test}", f"data.demo_dir={demo_dir}"]
    data.append(f"data.further_tests={json.dumps([asdict(part) for part in further])}")
    # First the table's columns, then where the test data keep the same: a run has one list for both.
    data += [f"data.fields.image=image;{fields.image}", f"data.fields.web=web;{fields.web}"]
    first = next(iter(sets))
    runs_of, variants = {}, {}
    for name in (*sets, WEB):
        kind = "web" if name == WEB else "captioner"
        # "web" trains its vocabulary on the first set's captions too, as the claims' variant does on the demo's.
        column = f"data.fields.long={_column(first if name == WEB else name)};{fields.long}"
        label = "web captions only" if name == WEB else name
        variants[name] = replace(VARIANTS[kind], label=label)
        runs_of[name] = [
            variant_run(kind, seed, samples, (*settings, *data, column), label=name) for seed in range(seeds)
        ]
        for run in runs_of[name]:
            config = run.config()
            if (config.train.seed, config.samples) != (run.seed, samples):
                raise UserError("--set changes seed or samples of the runs: they are given by --seeds and --samples")
    return runs_of, variants


def measured(runs: Sequence[Path]) -> list[str]:
    """The figures of retrieval, zero-shot and probe that every run's test set gave; UserError where there are none."""
    names = [
        name for name in FIGURES if all(name in read_json(run / "evaluation.json").get("figures", {}) for run in runs)
    ]
    if not names:
        raise UserError(
            "the test data give neither retrieval nor zero-shot figures: its samples need `captions` (a list) or a "
            "`label` in their JSON member; name other data by --test-data"
        )
    return names


def _column(name: str) -> str:
    return f"long_{name}"


# ---------------------------------------------------------------------------------------------- the common table
def collect(sets: Mapping[str, str], output: Path, fields: Fields) -> Common:
    """Write the pairs that all sets have, in the first one's order, to `output`/pairs-HASH.parquet.

    A pair is known by its picture's bytes and its web caption. The name has the hash of what is in it, so that runs on
    other captions than today's are never taken for today's.
    """
    sources = {name: open_source(spec, fields, need_long=True) for name, spec in sets.items()}
    places = {name: _places(source, name) for name, source in sources.items()}
    first, *others = sets
    common = [pair for pair in places[first] if all(pair in places[name] for name in others)]
    if not common:
        raise UserError(
            f"the sets {', '.join(sets)} have no picture with the same web caption in common: they must be made of the "
            "same pairs, byte for byte"
        )
    truth: dict[str, Truth] = {}
    columns = [pa.field("image", pa.binary()), *(pa.field(n, pa.string()) for n in ("web", "label"))]
    schema = pa.schema([*columns, *(pa.field(_column(name), pa.string()) for name in sets)])
    digest = hashlib.sha256()
    partial = output / ".pairs.parquet.tmp"
    with pa.parquet.ParquetWriter(partial, schema) as writer:
        rows: list[dict[str, Any]] = []
        for row in _rows(sources, places, common, truth):
            digest.update(json.dumps({**row, "image": hashlib.sha256(row["image"]).hexdigest()}).encode())
            rows.append(row)
            if len(rows) == ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, schema))
    table = output / f"pairs-{digest.hexdigest()[:12]}.parquet"
    if table.exists():  # the index that was made of it goes by its time
        partial.unlink()
    else:
        partial.rename(table)
    return Common(table, len(common), {name: len(source) for name, source in sources.items()}, truth)


def _places(source: Source, name: str) -> dict[bytes, int]:
    """Pair → its index; broken samples are passed over, of equal pairs the first counts."""
    places: dict[bytes, int] = {}
    for index in tqdm(range(len(source)), f"reading {name}", unit="pair", leave=False, disable=None):
        try:
            sample = source.read(index)
        except BrokenSample:
            continue
        digest = hashlib.sha256(hashlib.sha256(sample.image).digest() + sample.web.encode("utf-8", "surrogatepass"))
        places.setdefault(digest.digest(), index)
    return places


def _rows(
    sources: Mapping[str, Source], places: Mapping[str, dict[bytes, int]], common: list[bytes], truth: dict[str, Truth]
) -> Iterator[dict[str, Any]]:
    first, *others = sources
    for pair in tqdm(common, "writing the common pairs", unit="pair", leave=False, disable=None):
        sample = sources[first].read(places[first][pair])
        long = {name: sources[name].texts(places[name][pair])[1] for name in others}
        captions = {first: sample.long, **long}
        if is_scene(sample.extra):
            for name, text in {**captions, WEB: sample.web}.items():
                truth.setdefault(name, Truth()).add(text or "", sample.extra)
        label = sample.extra.get("label", sample.extra.get("cls"))
        row = {"image": sample.image, "web": sample.web, "label": None if label is None else str(label)}
        yield row | {_column(name): text for name, text in captions.items()}
