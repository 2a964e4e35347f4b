"""Which captions teach an encoder best: the same small encoder on the same pictures with each set of long captions.

The sets are data as pretraining reads it. The pairs that all sets have go into one table with a column of captions for
each set, so pictures, web captions and their order are the same for every run. The runs of each set are the claims'
variant "web + one sentence + captioner". Beside them stands the claims' "web caption only".
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

from clips.common.errors import UserError
from clips.common.escape import for_rich
from clips.common.page import Table
from clips.common.rundir import UNSEEN
from clips.config import Fields, parse_fields, parse_test_data
from clips.data.demo import demo_split, ensure_any_demo
from clips.data.guess import GuessFlags
from clips.data.sample import BrokenSample
from clips.data.sources import Source, open_source
from clips.data.splits import held_out_sets, open_split
from clips.lab.report import Page, Paragraph, Section
from clips.lab.stats import show_difference
from clips.studies.claims import CAPTIONS, CONTEXT, VARIANTS
from clips.studies.variants import Question, Study, check_counts, check_settings, terminal
from clips.studies.variants_page import called, page

WEB = "web"
"""The name of the runs that see no long caption."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
ROWS = 512
"""Of one group of the table."""
FLAGS = GuessFlags(image_root="")
TITLE = "Sets of captions"
CAUTION = (
    "Equal samples are not equal time. The runs with long captions have two texts a picture and a captioner; the runs "
    "with web captions only have one text, no captioner and the baseline's learning rates. Captions in the style of "
    "the test's texts have an advantage; the linear probe reads no text."
)


@dataclass(frozen=True)
class Common:
    """What the sets have in common, as one table."""

    table: Path
    pictures: int
    sizes: dict[str, int]
    """Set → its samples."""


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
    dry_run: bool = False,
) -> dict[str, Any] | None:
    """Train what is missing for `sets` (name → data), and write captions.json and captions.html into `output`.

    Args:
        fields: where the sets and the test data keep their parts, as `PART=FIELD`; alternatives, separated by `;`.
        test_data: what the encoders are measured on, with further sets as NAME=DATA behind the first. A set `unseen`
            decides. Default: the demo's test pictures, and the same drawn by an artist never trained on.
        settings: `--set` assignments for every run.

    Raises UserError for sets without a common picture, test data that lack a part, fewer than two seeds, or an
    `output` whose runs have other settings; CommandError when a run fails.
    """
    check_counts(seeds, jobs)
    if test_data is None:
        ensure_any_demo(demo_dir)
        test_data = [demo_split(demo_dir, "test")]
        if (demo_dir / UNSEEN).is_dir():  # missing if the drawings of several artists could not be fetched
            test_data.append(f"{UNSEEN}={demo_split(demo_dir, UNSEEN)}")
    output.mkdir(parents=True, exist_ok=True)
    named = parse_fields(list(fields), Fields())
    common = collect(sets, output, named)
    study = plan(sets, common, test_data, demo_dir, named, seeds=seeds, samples=samples, settings=settings)
    read = study.runs[WEB][0].config().data
    for name in held_out_sets(read):  # otherwise the first run reports what is missing, after its training
        open_split(read, name, need_long=False, flags=FLAGS)
    more = {
        "pictures": common.pictures,
        "sets": {name: {"data": spec, "samples": common.sizes[name]} for name, spec in sets.items()},
    }
    result = study.carry_out(output, jobs, captions_page, dry_run=dry_run, more=more)
    if result is None:
        return None
    for line in conclusions(result):
        terminal().print(for_rich(line), highlight=False, soft_wrap=True)
    deciding = result["deciding_figure"]
    best = max(sets, key=lambda name: sum(run["figures"][deciding] for run in result["variants"][name]["runs"]))
    terminal().print(
        f"Next: python scripts/pretrain_clips.py --data {for_rich(shlex.quote(sets[best]))}", soft_wrap=True
    )
    return result


def parse_sets(text: str) -> dict[str, str]:
    """`a=shards-a/,b=shards-b/{0..9}.tar` → name → data. UserError for a list that cannot be read."""
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
) -> Study:
    """The study of the sets and of "web". UserError for settings that a run would refuse."""
    test, further = parse_test_data(list(test_data))
    data = [f"data.train={common.table}", f"data.test={test}", f"data.demo_dir={demo_dir}"]
    data.append(f"data.further_tests={json.dumps([asdict(part) for part in further])}")
    # First the table's columns, then where the test data keep the same part: a run has one list for both.
    data += [f"data.fields.image=image;{fields.image}", f"data.fields.web=web;{fields.web}"]
    order, first, runs = (*sets, WEB), next(iter(sets)), {}
    variants = {name: replace(VARIANTS["captioner"], label=name) for name in sets}
    variants[WEB] = replace(VARIANTS["web"], label="web captions only")
    for name in order:
        # "web" trains its vocabulary on the first set's captions too, as the claims' variant does on the demo's.
        column = f"data.fields.long={_column(first if name == WEB else name)};{fields.long}"
        own = (CAPTIONS, *settings, *data, column, CONTEXT)
        runs[name] = [variants[name].run(name, seed, samples, own) for seed in range(seeds)]
    pairs = tuple((better, worse) for i, better in enumerate(order) for worse in order[i + 1 :])
    study = Study("captions", TITLE, variants, runs, {"captions": Question(TITLE, order, pairs, CAUTION)})
    check_settings(study.everything())
    return study


def _column(name: str) -> str:
    return f"long_{name}"


# ------------------------------------------------------------------------------------------- the common table
def collect(sets: Mapping[str, str], output: Path, fields: Fields) -> Common:
    """Write the pairs that all sets have, in the first set's order, to `output`/pairs-HASH.parquet.

    A pair is known by its picture's bytes and its web caption. HASH is of the table's content, so that runs on other
    captions are never treated as runs on these. UserError if no pair is in all sets.
    """
    sources = {name: open_source(spec, fields, need_long=True, flags=FLAGS) for name, spec in sets.items()}
    places = {name: _places(source, name) for name, source in sources.items()}
    first, *others = sets
    common = [pair for pair in places[first] if all(pair in places[name] for name in others)]
    if not common:
        raise UserError(
            f"the sets {', '.join(sets)} have no picture with the same web caption in common: they must be made of the "
            "same pairs, byte for byte"
        )
    columns = [pa.field("image", pa.binary()), *(pa.field(n, pa.string()) for n in ("web", "label"))]
    schema = pa.schema([*columns, *(pa.field(_column(name), pa.string()) for name in sets)])
    digest = hashlib.sha256()
    partial = output / ".pairs.parquet.tmp"
    with pa.parquet.ParquetWriter(partial, schema) as writer:
        rows: list[dict[str, Any]] = []
        for row in _rows(sources, places, common):
            digest.update(json.dumps({**row, "image": hashlib.sha256(row["image"]).hexdigest()}).encode())
            rows.append(row)
            if len(rows) == ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, schema))
    table = output / f"pairs-{digest.hexdigest()[:12]}.parquet"
    if table.exists():  # its index knows it by its time
        partial.unlink()
    else:
        partial.rename(table)
    return Common(table, len(common), {name: len(source) for name, source in sources.items()})


def _places(source: Source, name: str) -> dict[bytes, int]:
    """Pair → its index. Broken samples are left out; of equal pairs the first counts."""
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
    sources: Mapping[str, Source], places: Mapping[str, dict[bytes, int]], common: list[bytes]
) -> Iterator[dict[str, Any]]:
    first, *others = sources
    for pair in tqdm(common, "writing the common pairs", unit="pair", leave=False, disable=None):
        sample = sources[first].read(places[first][pair])
        captions = {first: sample.long, **{name: sources[name].texts(places[name][pair])[1] for name in others}}
        label = sample.extra.get("label", sample.extra.get("cls"))
        row = {"image": sample.image, "web": sample.web, "label": None if label is None else str(label)}
        yield row | {_column(name): text for name, text in captions.items()}


# ------------------------------------------------------------------------------------------- the report
def conclusions(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each set: whether its captions help over web captions alone."""
    deciding, lines = result["deciding_figure"], []
    test_set, _, plain = deciding.rpartition("/")
    for c in result["questions"]["captions"]["contrasts"]:
        if c["b"] != WEB:
            continue
        verb = {"win": "help over", "loss": "do harm against", "tie": "show no gain over"}[c["verdict"]]
        line = f"The captions of {c['a']} {verb} web captions alone: {show_difference(c)} in {called(deciding)}"
        lines.append(line + (f", {show_difference(c['figures'][plain])} with seen artists." if test_set else "."))
    return lines


def captions_page(result: Mapping[str, Any]) -> Page:
    note = f"{result['pictures']:,} pictures that all sets have, {result['samples']:,} samples seen by every run, "
    table = [(name, entry["data"], f"{entry['samples']:,}") for name, entry in result["sets"].items()]
    common = f"{result['pictures']:,} pairs of picture and web caption are in all sets; every run sees these alone."
    sets = Table(("set", "data", "samples"), table, lambda column, text: "wrap" if column == 1 else "")
    more = [Section("The sets", [sets, Paragraph(common)])]
    return page(result, TITLE, f"{note}{result['seeds']} seeds", CAUTION, findings=conclusions(result), more=more)
