"""The paper's claims in small: what differs between the runs, the verdicts, and the report from synthetic figures."""

from __future__ import annotations

import argparse
import html
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from conftest import ROOT
from hostile import HOSTILE
from markdown_it import MarkdownIt

from clips.common.errors import BrokenDataError, CommandError, UserError
from clips.common.escape import one_line, visible
from clips.config import DataConfig, Fields, RunConfig
from clips.config import difference as differing_fields
from clips.data.demo import WITH_ERRORS, split_scene
from clips.data.tokenizer import build_tokenizer
from clips.lab.pretraining import PretrainingRun
from clips.lab.stats import difference
from clips.recipes import recipe
from clips.studies.claims import (
    BLOCK_TOKENS,
    CLAIMS,
    CONTRADICTED,
    FIGURES,
    MEANS,
    OPEN,
    REPRODUCED,
    VARIANTS,
    summary,
    verdict,
)
from clips.studies.claims_report import write_reports
from clips.studies.reproduce import (
    judge,
    judge_llava,
    reproduce,
    run_figures,
    table_of_runs,
    train_text_tokens,
    variant_run,
)


def parser_of(script: str) -> argparse.ArgumentParser:
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parser()


def differing(a: RunConfig, b: RunConfig) -> set[str]:
    return {line.split(":")[0] for line in differing_fields(a, b)}


# --- the runs


@pytest.mark.parametrize("name", VARIANTS)
def test_a_runs_configuration_is_what_its_command_makes(name: str) -> None:
    """On it rests that a finished run is recognised, and that the report's configurations are true."""
    one = variant_run(name, 2, 48_000, ["data.workers=0"])
    run = recipe(VARIANTS[name].recipe)
    assert one.command(Path("runs/claims"))[0] == "scripts/pretrain_clips.py"
    assert one.config().samples == 48_000
    assert one.config().phases[0].warmup_samples == run.phases[0].warmup_samples * 48_000 // run.phases[0].samples
    assert (one.config().train.eval_every, one.config().train.checkpoint_every) == (0, 0)
    assert one.config().train.seed == 2
    assert one.config().model.text.context_length == 80
    assert one.config().data.workers == 0


FREE = {
    "a": {"captions.strategy", "captions.sentence_share"},
    "b": {"recipe", "task.objective", "task.synthetic_share", "task.caption_weight", "model.captioner",
          "phases.0.lr", "phases.0.muon_lr"},
    "c": {"captions.strategy", "captions.sub_caption_tokens"},
    "d": {"task.synthetic_share"},
}  # fmt: skip
"""The fields in which the runs of one claim may differ, apart from the seed."""


@pytest.mark.parametrize("key", CLAIMS)
def test_runs_of_a_claim_are_equal_but_for_what_it_is_about(key: str) -> None:
    configs = [variant_run(name, 0, 48_000).config() for name in CLAIMS[key].variants]
    found = {field for config in configs[1:] for field in differing(configs[0], config)}
    assert {field for field in found if not any(field.startswith(free) for free in FREE[key])} == set()
    assert len({json.dumps(config.to_dict()) for config in configs}) == len(configs)
    assert differing(configs[0], variant_run(CLAIMS[key].variants[0], 1, 48_000).config()) == {"train.seed"}


def test_the_order_of_the_data_is_everybodys() -> None:
    """It depends on the seed and the shards alone, and these are equal."""
    for name in VARIANTS:
        config = variant_run(name, 1, 48_000).config()
        assert (config.train.seed, config.data) == (1, variant_run("web", 1, 48_000).config().data)
        assert replace(config.data, fields=Fields()) == recipe("demo").data
        assert [phase.batch_size for phase in config.phases] == [recipe("demo").phases[0].batch_size]


def test_every_contrast_is_between_variants_of_its_claim() -> None:
    for claim in CLAIMS.values():
        assert {name for pair in claim.contrasts for name in pair} <= set(claim.variants) <= set(VARIANTS)


def test_settings_for_all_do_not_undo_what_a_claim_is_about() -> None:
    settings = ["captions.strategy=full", "model.text.context_length=32", "optim.weight_decay=0.3"]
    config = variant_run("sentence", 0, 48_000, settings).config()
    assert (config.captions.strategy, config.model.text.context_length) == ("sentence", 80)
    assert config.optim.weight_decay == 0.3
    assert config.data.fields.long == f"json:{WITH_ERRORS};txt"
    own = variant_run("sentence", 0, 48_000, ["data.fields.long=json:other"]).config()
    assert own.data.fields.long == "json:other"


def test_the_masks_keep_as_many_tokens_as_a_sentence_has() -> None:
    sentences = [text for number in range(500) for text in split_scene("train", number, 0)[1].sentences]
    tokenizer = build_tokenizer("wordpiece", sentences, vocab_size=recipe("demo").model.text.vocab_size)
    assert abs(mean(map(len, tokenizer.encode(sentences))) - BLOCK_TOKENS) < 1


def test_a_run_with_other_settings_is_not_taken_for_it(tmp_path: Path) -> None:
    one = PretrainingRun("demo", "x", 6_400, 0)
    assert not one.is_finished(tmp_path)
    finish(tmp_path / "x", one.config(), {})
    assert one.is_finished(tmp_path)
    with pytest.raises(UserError, match=r"(?s)train.seed: 0 → 1.*--output"):
        replace(one, seed=1).is_finished(tmp_path)
    with pytest.raises(UserError, match=r"phases.0.samples: 6400 → 12800"):
        replace(one, samples=12_800).is_finished(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"claims": ["a", "z"]}, "no claim z; known: a, b, c, d, e"),
        ({"claims": ["a"], "seeds": 1}, "at least 2"),
        ({"claims": ["a"], "jobs": 0}, "--jobs 0"),
        ({"claims": ["a"], "settings": ["train.seed=7"]}, "given by --seeds and --samples"),
        ({"claims": ["a"], "settings": ["phases.*.samples=1000"]}, "given by --seeds and --samples"),
        ({"claims": ["a", "b"], "settings": ["bogus.field=1"]}, "bogus"),
        ({"claims": ["a", "b"], "settings": ["model.captioner.layers=2"]}, "captioner"),
    ],
)
def test_mistakes(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        reproduce(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_what_is_done_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = variant_run("web", 0, 6_400)
    finish(tmp_path / done.name, done.config(), {})
    before = sorted(tmp_path.rglob("*"))
    reproduce(tmp_path, ["b"], samples=6_400, dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().err
    assert re.search(r"1/3", printed)
    assert printed.count("0/3") == 2
    assert "minutes, 2 runs" in " ".join(printed.split())


def test_the_default_runs_fit_the_time() -> None:
    """75 minutes with two runs beside each other on two cores."""
    defaults = parser_of("reproduce_claims").parse_args([])
    runs_of = {name: [variant_run(name, seed, defaults.samples) for seed in range(defaults.seeds)] for name in VARIANTS}
    table = table_of_runs(runs_of, list(CLAIMS), Path("nowhere"), defaults.jobs)
    assert sum(float(minutes) for minutes in table.columns[-1].cells) / 2 <= 75


# --- the verdicts


@pytest.mark.parametrize(
    ("ci95", "expected"),
    [
        ((0.1, 2.0), REPRODUCED),
        ((-2.0, -0.1), CONTRADICTED),
        ((-0.1, 9.0), OPEN),
        ((-9.0, 0.1), OPEN),
        ((0.0, 1.0), OPEN),
        (None, OPEN),
    ],
)
def test_verdict_by_the_interval_alone(ci95: tuple[float, float] | None, expected: str) -> None:
    assert verdict(ci95) == expected


def test_summary_of_several() -> None:
    assert summary([OPEN, OPEN]) == OPEN
    assert summary([OPEN, REPRODUCED, OPEN, CONTRADICTED]) == (
        f"1 of 4 {REPRODUCED}, 1 of 4 {CONTRADICTED}, 2 of 4 {OPEN}"
    )


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Three seeds each, equal systems: about one in twenty intervals misses 0."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(400):
        ours, theirs = ([{"x": value} for value in rng.normal(80, 2, 3)] for _ in range(2))
        missed += verdict(difference(ours, theirs, "x")["ci95"]) != OPEN
    assert missed / 400 < 0.08


def test_equal_figures_without_spread_have_no_interval() -> None:
    found = difference([{"x": 100.0}] * 3, [{"x": 99.0}] * 3, "x")
    assert found == {"mean": 1.0, "ci95": None}
    assert verdict(found["ci95"]) == OPEN


@pytest.mark.filterwarnings("error")
def test_one_side_without_spread_still_has_an_interval() -> None:
    low, high = difference([{"x": 100.0}] * 3, [{"x": x} for x in (90.0, 91.0, 92.0)], "x")["ci95"]
    assert (low + high) / 2 == pytest.approx(9)
    assert high - low == pytest.approx(2 * 4.303 / 3**0.5, rel=1e-3)  # t with 2 degrees of freedom, by hand


def test_direction_follows_the_claim() -> None:
    found = judge("a", made_up({"sentence": 80, "half": 80.2, "full": 60}))
    verdicts = {(c["a"], c["b"]): c["verdict"] for c in found["contrasts"]}
    assert verdicts == {("sentence", "full"): REPRODUCED, ("sentence", "half"): OPEN, ("half", "full"): REPRODUCED}
    assert judge("a", made_up({"sentence": 40, "half": 50, "full": 60}))["verdict"] == CONTRADICTED


def compare_report(path: Path, entries: list[dict]) -> Path:
    path.write_text(json.dumps({"differences": entries}))
    return path


def entry(a: str, b: str, metric: str, ci95: list[float]) -> dict:
    return {"a": a, "b": b, "metric": metric, "mean": mean(ci95), "ci95": ci95, "seeds": 3, "items": 800}


def test_llava_is_read_from_the_other_report_whichever_way_round(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert "compare_encoders.py" in judge_llava(path)["missing"]
    others = [entry("clips", "blind", "accuracy", [0.2, 0.3]), entry("clips", "clip", "f1", [-0.9, -0.1])]
    found = judge_llava(compare_report(path, [*others, entry("clips", "clip", "accuracy", [0.01, 0.03])]))
    assert found["verdict"] == REPRODUCED
    turned = judge_llava(compare_report(path, [*others, entry("clip", "clips", "accuracy", [-0.03, -0.01])]))
    assert turned["contrasts"] == found["contrasts"]
    assert found["contrasts"][0]["mean"] == pytest.approx(2)  # percentage points, from shares
    assert found["contrasts"][0]["ci95"] == pytest.approx([1, 3])
    single = judge_llava(compare_report(path, [entry("clips", "clip", "accuracy", [0.01, 0.03]) | {"seeds": 1}]))
    assert single["verdict"] == "not run"
    assert "one seed" in single["missing"]
    for broken in ([], others, [{"a": "clips", "b": "clip", "metric": "accuracy"}]):
        with pytest.raises(UserError, match=r"report\.json .*clips and clip"):
            judge_llava(compare_report(path, broken))


# --- from finished runs to the reports


def finish(run: Path, config: RunConfig, figures: dict[str, float]) -> None:
    """What a finished run leaves behind, as far as it is read here."""
    (run / "export").mkdir(parents=True)
    config.save(run / "config.json")
    values = {name: {"value": value, "chance": 0.2, "items": 500} for name, value in figures.items()}
    (run / "evaluation.json").write_text(json.dumps({"figures": values}))
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "train", "samples": 48_000, "samples_per_s": 400.0}) + "\n")


def test_figures_of_a_run(tmp_path: Path) -> None:
    given = {name: float(place) for place, name in enumerate(FIGURES)}
    finish(tmp_path / "x", recipe("demo"), given)
    found = run_figures(tmp_path / "x")
    assert {name: found[name] for name in FIGURES} == given
    assert found["long_r1"] == mean((given["long_i2t_r1"], given["long_t2i_r1"]))
    assert found["train_seconds"] == 120
    finish(tmp_path / "y", recipe("demo"), {"zero_shot_top1": 1.0})
    with pytest.raises(UserError, match=r"evaluation\.json has no 'sentence_i2t_r1'"):
        run_figures(tmp_path / "y")


def test_the_unseen_artist_decides_where_there_is_one(tmp_path: Path) -> None:
    """On the demo: what holds for drawings that were trained on does not count."""
    variants = made_up({"sentence": 80, "full": 60, "half": 70})
    assert judge("a", variants)["contrasts"][0]["metric"] == "sentence_r1"
    for name, unseen in (("sentence", 30.0), ("full", 50.0), ("half", 40.0)):
        for seed, run in enumerate(variants[name]["runs"]):
            given = {figure: value for figure, value in run["figures"].items() if figure in FIGURES}
            given |= {f"photos/{figure}": 5.0 + seed for figure in FIGURES}
            given |= {f"unseen/{figure}": unseen + seed for figure in FIGURES}
            finish(tmp_path / run["name"], recipe("demo"), given)
            run["figures"] = run_figures(tmp_path / run["name"])
            assert run["figures"]["unseen/sentence_r1"] == unseen + seed
    claim = judge("a", variants)
    assert [c["metric"] for c in claim["contrasts"]] == ["unseen/sentence_r1"] * 3
    assert {c["verdict"] for c in claim["contrasts"]} == {CONTRADICTED}
    assert claim["contrasts"][0]["figures"]["sentence_r1"]["mean"] > 10  # stands beside it
    report = compare_report(tmp_path / "report.json", [entry("clips", "clip", "accuracy", [0.004, 0.052])])
    own = {"claims": {"a": claim}, "variants": variants, "deciding_figure": "unseen/sentence_r1"}
    write_reports(made_up_result(report) | own, tmp_path)
    shown = (tmp_path / "claims.md").read_text()
    assert "the difference in retrieval R@1, test sentences (unseen artist)" in shown
    assert "| comparison | R@1 test sentences (unseen artist) | verdict |" in shown
    rows = [shown.index(f"| retrieval R@1, test sentences{which} |") for which in (" (unseen artist)", "", " (photos)")]
    assert rows == sorted(rows)
    for which, value in ((" (unseen artist)", 31), (" (photos)", 6)):
        assert f"| retrieval R@1, test sentences{which} | {value}.0 ± 1.0 |" in shown


def test_data_that_cannot_be_read_any_more_is_said(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("image,web,long\n" + "gone.png,a cat,A cat sleeps.\n" * 8)
    data = DataConfig(train=str(tmp_path / "train.csv"), fields=Fields(image="image", web="web", long="long"))
    config = replace(recipe("demo"), data=data)
    config.save(tmp_path / "config.json")
    build_tokenizer("wordpiece", ["a cat"], vocab_size=64).save(tmp_path / "tokenizer")
    with pytest.raises(BrokenDataError, match=r"gone\.png"):
        train_text_tokens(tmp_path, samples=8)


def made_up(centres: dict[str, float], seeds: int = 3) -> dict[str, dict]:
    """Variants with figures around the given values."""
    rng = np.random.default_rng(0)
    shift = {"long": -8, "part": -15, "web": -60, "zero_shot_top1": -5, "linear_probe_top1": -12}
    found = {}
    for name, centre in centres.items():
        variant = VARIANTS[name]
        runs = []
        for seed in range(seeds):
            figures = {
                figure: float(np.clip(centre + shift.get(figure.split("_")[0], shift.get(figure, 0)) + noise, 0, 100))
                for figure, noise in zip(FIGURES, rng.normal(0, 1.5, len(FIGURES)), strict=True)
            }
            figures |= {name: mean(figures[way] for way in both) for name, both in MEANS.items()}
            config = {"data": {"train": "demo"}}
            runs.append({"name": f"{name}-seed{seed}", "seed": seed, "config": config})
            runs[-1]["figures"] = figures | {"train_seconds": 91.0}
        found[name] = {
            "label": variant.label,
            "recipe": variant.recipe,
            "settings": variant.settings,
            "text_tokens": {"web": 5.4} | ({"sub": 12.7} if variant.recipe == "demo" else {}),
            "runs": runs,
        }
    return found


CENTRES = {
    "web": 22,
    "synthetic20": 61,
    "synthetic50": 78,
    "synthetic100": 83,
    "sentence": 88,
    "half": 86.5,
    "full": 74,
    "truncation": 91,
    "random_mask": 79,
    "block_mask": 86,
    "captioner": 93,
}


def made_up_result(llava: Path) -> dict:
    variants = made_up(CENTRES)
    claims = {key: judge(key, variants) for key in CLAIMS}
    return {
        "command": "python scripts/reproduce_claims.py",
        "seconds": 1980,
        "samples": 48_000,
        "seeds": 3,
        "jobs": 2,
        "deciding_figure": "sentence_r1",
        "environment": {"cpus": 2, "python": "3.11.7", "device": "cpu × 1", "packages": {"torch": "2.13.0"}},
        "test_text_tokens": {"sentence": 21.1, "part": 12.7, "web": 5.4, "long": 55.2},
        "claims": claims | {"e": judge_llava(llava)},
        "variants": variants,
    }


def test_the_page_and_the_markdown_say_the_same(tmp_path: Path) -> None:
    report = compare_report(tmp_path / "report.json", [entry("clips", "clip", "accuracy", [0.004, 0.052])])
    result = json.loads(json.dumps(made_up_result(report), allow_nan=False))
    write_reports(result, tmp_path)
    page, text = (tmp_path / "claims.html").read_text(), (tmp_path / "claims.md").read_text()
    for claim in result["claims"].values():
        assert claim["verdict"] in page
        assert claim["verdict"] in text
        for contrast in claim["contrasts"]:
            found = f"{contrast['mean']:+.1f} [{contrast['ci95'][0]:+.1f}, {contrast['ci95'][1]:+.1f}]"
            assert found.replace("-", "−") in page
            assert found.replace("-", "−") in text
    assert {REPRODUCED, CONTRADICTED, OPEN} <= {c["verdict"] for k in "abcd" for c in result["claims"][k]["contrasts"]}
    assert not re.findall(r"""(?:src|href|srcset)=["'](?!data:)""", page)
    assert "http" not in re.sub(r"data:[^\"]+", "", page)
    assert page.count("<picture>") == 4
    assert page.count("t interval of that mean") == 4
    assert "48,000 samples seen by every run, 3 seeds · the demo's drawings" in html.unescape(page)
    for key in CLAIMS:
        assert f"(claim-{key}.png)" in text
        assert (tmp_path / f"claim-{key}.png").stat().st_size > 5_000
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"\|", row)) >= 3 for row in rows)


def test_llava_alone_that_was_not_run(tmp_path: Path) -> None:
    reproduce(tmp_path, ["e"], llava_report=tmp_path / "none.json")
    found = json.loads((tmp_path / "claims.json").read_text())
    assert found["claims"]["e"]["verdict"] == "not run"
    assert "python scripts/compare_encoders.py" in (tmp_path / "claims.html").read_text()


def test_texts_of_other_people_are_shown_as_they_are(tmp_path: Path) -> None:
    """The command, the environment and the path of the other report are not this project's words."""
    report = compare_report(tmp_path / "report.json", [entry("clips", "clip", "accuracy", [0.004, 0.052])])
    result = made_up_result(report)
    for hostile in HOSTILE.values():
        text = hostile[:300]  # this reader of Markdown takes time that grows with the square of a text's length
        result |= {"command": text, "environment": {"device": text, "packages": {"torch": text}}}
        result["claims"] = {"e": result["claims"]["e"] | {"report": text}}
        write_reports(result | {"variants": {}}, tmp_path)
        page, markdown = (tmp_path / "claims.html").read_text("utf-8"), (tmp_path / "claims.md").read_text("utf-8")
        assert not re.search(r"<(?:script|img|a|i)\b", page)
        found = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)
        assert not re.search(r"<(?:script|img|a|em|s|code|hr|blockquote)\b", found)
        assert " ".join(one_line(text).split()) in " ".join(html.unescape(found).split())
        assert visible(text) in html.unescape(page)


def test_a_report_that_fails_loses_nothing_and_can_be_made_again(tmp_path: Path) -> None:
    (tmp_path / "claims.md").mkdir()
    with pytest.raises(
        CommandError, match=r"report in .* cannot be written.*claims.json are there. IsADirectoryError"
    ) as e:
        reproduce(tmp_path, ["e"], llava_report=tmp_path / "none.json")
    assert e.value.exit_code == 1
    assert (tmp_path / "claims.json").is_file()
    (tmp_path / "claims.md").rmdir()
    reproduce(tmp_path, ["e"], llava_report=tmp_path / "none.json")
    assert (tmp_path / "claims.html").is_file()
