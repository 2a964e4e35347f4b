"""Figures in the pages of the documentation, written there by a command from files under docs/results/, never typed.

A block of a page is a comment that holds its text with places for figures, and the text with the figures:

    <!-- figures: compare
    | kind of question | clips | clips − clip [95 %] |
    |---|---|---|
    | identity | {clips: accuracy/identity} | {clips − clip: accuracy/identity} |
    -->
    | kind of question | clips | clips − clip [95 %] |
    …
    <!-- /figures -->

`compare` is docs/results/compare.json: a report.json of scripts/compare_encoders.py without what is long in it, taken
from an archive that was verified. `{WHO: FIGURE}` is a mean with its standard deviation over seeds, `{WHO − WHOM:
FIGURE}` a difference with its interval, bold where that leaves zero out; `{… @NAME}` takes another file. The file may
also be the comparison.json of scripts/compare_pretraining.py, or the claims.json of scripts/reproduce_claims.py without
the runs' configurations (WHO is a variant, `{WHO − WHOM: verdict}` what was decided).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from clips.common.errors import CommandError, UserError
from clips.common.files import read_json, sha256, write_atomically, write_json
from mllm.compare.verify import opened, verified
from mllm.compare.words import difference_text, mean_and_sd, percent_text

ROOT = Path(__file__).resolve().parents[2]
LONG = ("cells", "examples", "files")
"""Parts of report.json that stay in the archive."""
SHORT = ("a", "b", "metric", "mean", "sd", "by_seed", "ci95", "verdict", "seeds", "items")
"""What of a figure and of a difference is taken from it."""
BLOCK = re.compile(r"^(<!-- figures: ([\w-]+)\n(.*?\n)-->\n)(.*?)(^<!-- /figures -->)$", re.DOTALL | re.MULTILINE)
PLACE = re.compile(r"\{((?:[^{}\n]|\{seed\})+): ([^{}\n:]+?)(?: @([\w-]+))?\}")
"""An encoder may be called by its path, in which {seed} stands for the pretraining seed."""


def take(source: Path, name: str, root: Path = ROOT) -> Path:
    """Write docs/results/NAME.json from an archive (or output directory), which is verified, or from another study.

    Raises CommandError or UserError for what does not verify, and for a file that is neither an archive, nor a
    comparison.json or claims.json.
    """
    target = root / "docs" / "results" / f"{name}.json"
    if source.suffix == ".json":
        content = read_json(source)
        if not content.keys() & {"groups", "claims"}:
            raise UserError(
                f"{source} is neither comparison.json of compare_pretraining.py nor claims.json of "
                "reproduce_claims.py: give one of them, or an archive"
            )
        for variant in content.get("variants", {}).values():
            for run in variant["runs"]:
                del run["config"]  # what is not the recipe's stands in the command
    else:
        with opened(source) as output:
            report = verified(output, source).report
        content = {key: value for key, value in report.items() if key not in LONG}
        content["differences"] = [_short(row) for row in report["differences"]]
        content["encoders"] = {
            name: encoder | {"metrics": {metric: _short(figure) for metric, figure in encoder["metrics"].items()}}
            for name, encoder in report["encoders"].items()
        }
        if source.is_file():
            content["archive"] = {"file": source.name, "bytes": source.stat().st_size, "sha256": sha256(source)}
    write_json(target, content)
    return target


def update_pages(*, check: bool, root: Path = ROOT) -> list[Path]:
    """Write the figures into every block of README.md and docs/*.md; returns the pages whose blocks were others.

    With `check` nothing is written. Raises UserError naming the page and the place of a figure that is not there.
    """
    changed = []
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        before = page.read_text(encoding="utf-8")
        starts = len(re.findall("^<!-- figures:", before, re.MULTILINE))
        after, blocks = BLOCK.subn(partial(_filled, page=page, root=root), before)
        if blocks != starts:
            raise UserError(f"{page}: {starts} blocks of figures begin, {blocks} are as mllm/compare/pages.py says")
        if after != before:
            changed.append(page)
            if not check:
                write_atomically(page, after)
    return changed


def update_from_flags(source: str | None, name: str, *, check: bool) -> None:
    """What scripts/update_docs.py does; CommandError where `check` finds figures that are not those of the files."""
    if source is not None:
        print(f"written to {take(Path(source), name)}")
    changed = [str(page.relative_to(ROOT)) for page in update_pages(check=check)]
    if check and changed:
        pages = ", ".join(changed)
        raise CommandError(f"not the figures of docs/results: {pages}; `python scripts/update_docs.py` mends it")
    print(f"changed: {', '.join(changed) or 'nothing'}")


def _short(figure: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in figure.items() if key in SHORT}


def _filled(block: re.Match[str], page: Path, root: Path) -> str:
    head, default, text, _, end = block.groups()

    def figure(place: re.Match[str]) -> str:
        who, name, other = place.groups()
        file = root / "docs" / "results" / f"{other or default}.json"
        content = read_json(file)
        try:
            if "groups" in content:
                return _pretraining(content, who, name)
            return _claims(content, who, name) if "claims" in content else _comparison(content, who, name)
        except (KeyError, IndexError, TypeError, StopIteration) as error:
            raise UserError(f"{page}: {place[0]} is not in {file} ({error!r})") from None

    return head + PLACE.sub(figure, text) + end


def _comparison(report: Mapping[str, Any], who: str, name: str) -> str:
    first, _, other = who.partition(" − ")
    if other:
        rows = {(row["a"], row["b"], row["metric"]): row for row in report["differences"]}
        return _difference(rows[first, other, name], lambda value: difference_text(name, value))
    encoder = report["encoders"][first]
    is_own = name not in encoder["metrics"]
    return percent_text(encoder["intrinsic"].get(name)) if is_own else mean_and_sd(name, encoder["metrics"][name])


def _pretraining(content: Mapping[str, Any], who: str, name: str) -> str:
    """Of comparison.json: groups with a row of figures for each seed, and CLIPS minus each other group."""
    first, _, other = who.partition(" − ")
    if other:
        return _difference(content["clips_minus"][other][name], _points)
    return _over_seeds([row[name] for row in content["groups"][first]])


def _claims(content: Mapping[str, Any], who: str, name: str) -> str:
    """Of claims.json: variants with their runs' figures, and the comparisons that the claims make."""
    first, _, other = who.partition(" − ")
    if not other:
        return _over_seeds([run["figures"][name] for run in content["variants"][first]["runs"]])
    contrasts = [contrast for claim in content["claims"].values() for contrast in claim.get("contrasts", ())]
    contrast = next(found for found in contrasts if (found["a"], found["b"]) == (first, other))
    if name == "verdict":
        text = contrast[name].removesuffix(" here")
        return text if text.startswith("not") else f"**{text}**"
    return _difference(contrast.get("figures", {contrast["metric"]: contrast})[name], _points)


def _points(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _over_seeds(values: list[float]) -> str:
    return percent_text({"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None})


def _difference(row: Mapping[str, Any], number: Callable[[float], str]) -> str:
    if row["ci95"] is None:
        return number(row["mean"])
    low, high = row["ci95"]
    text = f"{number(row['mean'])} [{number(low)}, {number(high)}]"
    return f"**{text}**" if low > 0 or high < 0 else text
