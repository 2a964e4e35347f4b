#!/usr/bin/env python
"""Fill the numbers in README.md and docs/*.md from the files in docs/results/, or take such a file from an archive.

A block of a page is a comment with a template, followed by the text of the template with its numbers filled in:

    <!-- figures: compare
    | kind of question | clips | clips − clip [95 %] |
    |---|---|---|
    | NAME | {clips: IT} | {clips − clip: IT} | ← identity = accuracy/identity; all = accuracy
    -->
    | kind of question | clips | clips − clip [95 %] |
    …
    <!-- /figures -->

`compare` is docs/results/compare.json, a report.json of scripts/compare_encoders.py or a result of
scripts/compare_pretraining.py without its long parts. `{WHO: METRIC}` is a mean with its standard deviation over seeds.
`{WHO − WHOM: METRIC}` is a difference with its interval, bold for a win or a loss, and `{WHO − WHOM: verdict}` the
verdict of a study of pretraining. There `NAME_rank` is the geometric-mean rank that `NAME_neg_log_rank` stands for,
and a ratio of ranks as a difference. `{… @NAME}` reads another file. A row with an arrow stands for several rows, one
for each `A = B` after the arrow, in which A replaces NAME and B replaces IT.
"""

import re
import sys
from collections.abc import Mapping
from functools import partial
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

from clips.common.errors import CommandError, UserError, run_command
from clips.common.files import read_json, sha256, write_atomically, write_json
from clips.common.flags import Parser
from clips.lab.stats import show_difference, show_mean
from mllm.compare.analysis import read_answers
from mllm.compare.comparison import Comparison, comparison_of, stored_questions
from mllm.compare.report import difference_text, mean_and_sd, percent_text
from mllm.compare.verify import opened, verified

ROOT = Path(__file__).resolve().parents[1]
VERDICTS = {"win": "**reproduced**", "loss": "**contradicted**", "tie": "not reproduced", "undecided": "undecided"}
"""Verdict on a claim → its text on a page."""
LONG = ("runs", "examples", "files")
"""Parts of report.json that are kept in the archive only."""
SHORT = ("a", "b", "metric", "mean", "sd", "by_seed", "ci95", "verdict", "seeds", "items")
"""Fields of metrics and differences in report.json that are kept."""
BLOCK = re.compile(r"^(<!-- figures: ([\w-]+)\n(.*?\n)-->\n)(.*?)(^<!-- /figures -->)$", re.DOTALL | re.MULTILINE)
ROWS = re.compile(r"^(\|.*\|) ← (.+)\n", re.MULTILINE)
"""Matches a row of a template that stands for several rows, with their names and values."""
PLACE = re.compile(r"\{((?:[^{}\n]|\{seed\})+): ([^{}\n:]+?)(?: @([\w-]+))?\}")
"""Matches a place for a number. The name of an encoder may be a path with {seed} in it."""


def take(source: Path, name: str, root: Path = ROOT) -> Path:
    """Write docs/results/NAME.json from a comparison (archive or directory), which is verified, or from another study.

    Raises CommandError or UserError if the comparison does not verify, and for a file of another kind.
    """
    target = root / "docs" / "results" / f"{name}.json"
    if source.suffix == ".json":
        content = read_json(source)
        if not {"questions", "variants"} <= content.keys():
            raise UserError(f"{source} is neither an archive nor a result of compare_pretraining.py")
        for variant in content["variants"].values():
            for run in variant["runs"]:
                run.pop("config", None)  # recipe and command determine it
    else:
        with opened(source) as output:
            report = verified(output, source).report
            right = _right(comparison_of(report["plan"], output))
        content = {key: value for key, value in report.items() if key not in LONG}
        content["differences"] = [_short(row) for row in report["differences"]]
        content["encoders"] = {
            name: encoder | {"metrics": {metric: _short(entry) for metric, entry in encoder["metrics"].items()}}
            for name, encoder in report["encoders"].items()
        }
        content["right"] = right
        if source.is_file():
            content["archive"] = {"file": source.name, "bytes": source.stat().st_size, "sha256": sha256(source)}
    write_json(target, content)
    return target


def _right(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Return for each file with known answers and each run a character per question: 1 right, 0 wrong, - not known."""
    answers = read_answers(comparison.runs, stored_questions(comparison.output))
    right: dict[str, dict[str, str]] = {}
    for run, lines in answers.items():
        for line in lines:
            of_file = right.setdefault(line["file"], {})
            of_file[run.name] = of_file.get(run.name, "") + {True: "1", False: "0"}.get(line.get("correct"), "-")
    return {file: of_file for file, of_file in right.items() if any(set(known) - {"-"} for known in of_file.values())}


def _short(metric: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metric.items() if key in SHORT}


def update_pages(*, check: bool, root: Path = ROOT) -> list[Path]:
    """Fill every block of README.md and docs/*.md, and return the pages that changed. With `check` nothing is written.

    Raises UserError with page and place if a number is missing.
    """
    changed = []
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        before = page.read_text(encoding="utf-8")
        starts = len(re.findall("^<!-- figures:", before, re.MULTILINE))
        after, blocks = BLOCK.subn(partial(_filled, page=page, root=root), before)
        if blocks != starts:
            raise UserError(f"{page}: {starts} blocks begin, but tools/update_docs.py can read {blocks}")
        if after != before:
            changed.append(page)
            if not check:
                write_atomically(page, after)
    return changed


def _filled(block: re.Match[str], page: Path, root: Path) -> str:
    head, default, text, _, end = block.groups()

    def metric(place: re.Match[str]) -> str:
        who, name, other = place.groups()
        file = root / "docs" / "results" / f"{other or default}.json"
        content = read_json(file)
        show = _pretraining if "questions" in content else _comparison
        try:
            return show(content, *who.partition(" − ")[::2], name)
        except (KeyError, IndexError, TypeError, StopIteration) as error:
            raise UserError(f"{page}: {place[0]} is not in {file} ({error!r})") from None

    def each_row(line: re.Match[str]) -> str:
        pairs = (pair.partition(" = ") for pair in line[2].split("; "))
        return "".join(re.sub(r"\bIT\b", value, line[1].replace("NAME", name)) + "\n" for name, _, value in pairs)

    return head + PLACE.sub(metric, ROWS.sub(each_row, text)) + end


def _comparison(report: Mapping[str, Any], first: str, other: str, name: str) -> str:
    if other:
        row = {(row["a"], row["b"], row["metric"]): row for row in report["differences"]}[first, other, name]
        return _decided(row["verdict"], difference_text(row))
    encoder = report["encoders"][first]
    is_intrinsic = name not in encoder["metrics"]
    return percent_text(encoder["intrinsic"].get(name)) if is_intrinsic else mean_and_sd(name, encoder["metrics"][name])


def _pretraining(content: Mapping[str, Any], first: str, other: str, name: str) -> str:
    """Return the text of a metric of a variant, or of a contrast of two variants, in a study of pretraining."""
    is_rank = name.endswith("_rank") and not name.endswith("_neg_log_rank")
    name = name.removesuffix("_rank") + "_neg_log_rank" if is_rank else name
    if not other:
        values = [run["metrics"][name] for run in content["variants"][first]["runs"]]
        return f"{exp(-fmean(values) / 100):.0f}" if is_rank else show_mean(values).replace("-", "−")
    contrasts = [contrast for question in content["questions"].values() for contrast in question.get("contrasts", ())]
    contrast = next(entry for entry in contrasts if (entry["a"], entry["b"]) == (first, other))
    if name == "verdict":
        return VERDICTS[contrast[name]]
    row = contrast.get("metrics", {contrast["metric"]: contrast})[name]
    if is_rank:
        ratio, high, low = (exp(-value / 100) for value in (row["mean"], *row["ci95"]))
        return f"× {ratio:.2f} [{low:.2f}, {high:.2f}]"
    return _decided(contrast["verdict"] if name == contrast["metric"] else "", show_difference(row))


def _decided(verdict: str, text: str) -> str:
    return f"**{text}**" if verdict in ("win", "loss") else text


def parser() -> Parser:
    p = Parser((__doc__ or "").partition("\n")[0])
    what = "of compare_encoders.py --pack, which is verified, or this result of compare_pretraining.py"
    p.add_argument("--take", metavar="FILE", help=f"first write docs/results/NAME.json from this archive {what}")
    p.add_argument("--name", help="name of the file in docs/results that --take writes, such as claims-fashion")
    p.add_argument("--check", action="store_true", help="write nothing, and exit with 1 if a page would change")
    return p


def main() -> None:
    flags = parser().parse_args()
    if (flags.take is None) != (flags.name is None):
        raise UserError("--take FILE and --name NAME belong together: give both or neither")
    if flags.take is not None:
        print(f"written to {take(Path(flags.take), flags.name)}")
    changed = ", ".join(str(page.relative_to(ROOT)) for page in update_pages(check=flags.check))
    if flags.check and changed:
        raise CommandError(f"numbers differ from docs/results: {changed}; run `python tools/update_docs.py`")
    print(f"changed: {changed or 'nothing'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
