"""Studies of variants: what differs between the runs, the verdicts, the page, and a study of real, tiny runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from lab_runs import run_main, with_metrics

from clips.common.errors import UserError
from clips.config import Fields, RunConfig, changed_fields
from clips.data.demo import WITH_ERRORS, ensure_demo, split_scene
from clips.data.tokenizer import build_tokenizer
from clips.lab.pretraining import PretrainingRun
from clips.recipes import recipe
from clips.studies.claims import BLOCK_TOKENS, CLAIMS, VARIANTS, reproduce, variant_study
from clips.studies.variants import METRICS

pytestmark = pytest.mark.usefixtures("one_pixel")


def variant_run(name: str, seed: int, settings: tuple[str, ...] = (), samples: int = 48_000) -> PretrainingRun:
    study = variant_study([name], [seed], samples, settings, name="claims", title="The claims", questions={})
    return study.runs[name][0]


def differing(a: RunConfig, b: RunConfig) -> set[str]:
    return {line.split(":")[0] for line in changed_fields(a, b)}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_runs_configuration_is_what_its_command_makes(name: str) -> None:
    """On it rests that a finished run is recognised, and that the result's configurations are true."""
    one = variant_run(name, 2, ("data.workers=0",))
    config, run = one.config(), recipe(VARIANTS[name].recipe)
    assert one.command(Path("runs/claims"))[0] == "scripts/pretrain_clips.py"
    assert config.samples == 48_000 * VARIANTS[name].times
    assert config.phases[0].warmup_samples == run.phases[0].warmup_samples * config.samples // run.phases[0].samples
    assert (config.train.eval_every, config.train.checkpoint_every, config.train.seed) == (0, 0, 2)
    assert (config.model.text.context_length, config.data.workers) == (80, 0)
    # The order of the data is a function of seed and data, and these are equal for all variants.
    assert replace(config.data, fields=Fields(), workers=run.data.workers) == recipe("demo").data
    assert [phase.batch_size for phase in config.phases] == [recipe("demo").phases[0].batch_size]


FREE = {
    "a": {"captions.strategy", "captions.sentence_share"},
    "b": {"recipe", "task.objective", "task.synthetic_share", "task.caption_weight", "task.caption_share",
          "model.captioner", "phases.0.lr", "phases.0.muon_lr"},
    "c": {"captions.strategy", "captions.sub_caption_tokens"},
    "d": {"task.synthetic_share"},
}  # fmt: skip
"""The fields in which the runs of one claim may differ, apart from the seed."""


@pytest.mark.parametrize("key", CLAIMS)
def test_runs_of_a_claim_are_equal_but_for_what_it_is_about(key: str) -> None:
    claim = CLAIMS[key]
    configs = [variant_run(name, 0).config() for name in claim.variants]
    fields = {field for config in configs[1:] for field in differing(configs[0], config)}
    assert {field for field in fields if not any(field.startswith(free) for free in FREE[key])} == set()
    assert len({json.dumps(config.to_dict()) for config in configs}) == len(configs)
    assert differing(configs[0], variant_run(claim.variants[0], 1).config()) == {"train.seed"}
    assert {name for pair in claim.contrasts for name in pair} <= set(claim.variants) <= set(VARIANTS)


def test_settings_for_all_do_not_undo_what_a_claim_is_about() -> None:
    settings = ("captions.strategy=full", "model.text.context_length=32", "optim.weight_decay=0.3")
    config = variant_run("sentence", 0, settings).config()
    assert (config.captions.strategy, config.model.text.context_length) == ("sentence", 80)
    assert config.optim.weight_decay == 0.3
    assert config.data.fields.long == f"json:{WITH_ERRORS};txt"
    assert variant_run("sentence", 0, ("data.fields.long=json:other",)).config().data.fields.long == "json:other"


def test_the_masks_keep_as_many_tokens_as_a_sentence_has() -> None:
    sentences = [text for number in range(500) for text in split_scene("train", number, 0)[1].sentences]
    tokenizer = build_tokenizer("wordpiece", sentences, vocab_size=recipe("demo").model.text.vocab_size)
    assert abs(mean(map(len, tokenizer.encode(sentences))) - BLOCK_TOKENS) < 1


def test_a_run_with_other_settings_is_not_taken_for_it(tmp_path: Path) -> None:
    one = PretrainingRun("demo", "x", 6_400, 0)
    assert not one.planned(tmp_path).is_done()
    with_metrics(tmp_path / "x", one, {})
    assert one.planned(tmp_path).is_done()
    with pytest.raises(UserError, match=r"(?s)train.seed: 0 → 1.*--output"):
        replace(one, seed=1).planned(tmp_path).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"claims": ["a", "z"]}, "no claim z; known: a, b, c, d"),
        ({"claims": ["a"], "settings": ["train.seed=7"]}, "seed 7 .*--set"),
        ({"claims": ["a"], "samples": 1_000}, "--samples must be whole batches"),
        ({"claims": ["a", "b"], "settings": ["model.captioner.layers=2"]}, "captioner"),
    ],
)
def test_mistakes(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reproduce(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_unseen_artist_decides_and_other_seeds_after_a_look_leave_nothing_decided(tmp_path: Path) -> None:
    """On the demo: what holds for drawings that were trained on does not count."""
    output = tmp_path / "claims"
    for name, seen, unseen in (("sentence", 80, 30.0), ("half", 70, 40.0), ("full", 60, 50.0)):
        for seed in range(6):
            values = {"": seen + seed, "photos/": 5.0 + seed, "unseen/": unseen + seed}
            run = variant_run(name, seed, samples=6_400)
            metrics = {f"{test_set}{metric}": value for test_set, value in values.items() for metric in METRICS}
            with_metrics(output / run.name, run, metrics)
    result = reproduce(output, ["a"], samples=6_400)
    claim = result["questions"]["a"]
    assert result["deciding_metric"] == "unseen/sentence_r1"
    assert [c["metric"] for c in claim["contrasts"]] == ["unseen/sentence_r1"] * 3
    assert {c["verdict"] for c in claim["contrasts"]} == {"loss"}
    assert claim["contrasts"][0]["metrics"]["sentence_r1"]["mean"] > 10  # stands beside it
    assert "32.0 ± 1.6" in (output / "claims.html").read_text()
    stored = json.loads((output / "claims.json").read_text())
    assert stored["variants"]["half"]["runs"][2]["config"]["train"]["seed"] == 2
    exchanged = reproduce(shutil.copytree(output, tmp_path / "copy"), ["a"], samples=6_400, first_seed=1)
    assert exchanged["looks"] == ["5 seeds by sentence_r1", "5 seeds from 1 by sentence_r1"]
    assert exchanged["questions"]["a"]["verdict"] == "undecided"
    again = reproduce(output, ["a"], samples=6_400)
    assert again == result, "the seconds that the runs took are kept"
    for seeds in (6, 5):
        added = reproduce(output, ["a"], samples=6_400, seeds=seeds)
        assert added["looks"] == ["5 seeds by sentence_r1", "6 seeds by sentence_r1"]
        assert added["questions"]["a"]["verdict"] == "undecided"


def test_a_study_may_decide_by_log_ranks(tmp_path: Path) -> None:
    """Lower ranks are better: one percent of a rank is a point."""
    for name, log_rank in (("sentence", 1.2), ("half", 1.5), ("full", 1.5)):
        for seed in range(5):
            run = variant_run(name, seed, samples=6_400)
            metrics = {metric: log_rank + seed / 100 if "log_rank" in metric else 50.0 - seed for metric in METRICS}
            with_metrics(tmp_path / run.name, run, metrics)
    result = reproduce(tmp_path, ["a"], samples=6_400, decides="sentence_neg_log_rank")
    contrast = result["questions"]["a"]["contrasts"][0]
    assert (result["deciding_metric"], contrast["metric"]) == ("sentence_neg_log_rank",) * 2
    assert (contrast["verdict"], contrast["mean"]) == ("win", pytest.approx(30))
    assert contrast["metrics"]["sentence_r1"]["mean"] == 0
    with pytest.raises(UserError, match="--decides sentence_speed"):
        reproduce(tmp_path, ["a"], samples=6_400, decides="sentence_speed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that name small data; the validation split is also an artist never trained on."""
    made = ensure_demo(tmp_path_factory.mktemp("data"), sizes={"train": 300, "val": 40, "test": 80})
    settings = ["phases.*.batch_size=16", "data.workers=0", *(f"data.{s}={made / s}" for s in ("train", "val", "test"))]
    return [*settings, f'data.further_tests=[{{"name": "unseen", "data": "{made / "val"}"}}]']


@pytest.mark.slow
def test_finished_runs_are_never_run_again(tmp_path, data, monkeypatch, capsys):
    output = tmp_path / "claims"
    flags = ["claims", "--claims", "b", "--seeds", "2", "--samples", "64", "--output", output, "--set", *data]
    assert run_main(monkeypatch, "compare_pretraining", *flags) == 0
    result = json.loads((output / "claims.json").read_text())
    runs = [run for variant in result["variants"].values() for run in variant["runs"]]
    assert {run["name"] for run in runs} == {f"{n}-seed{s}" for n in ("web", "sentence", "captioner") for s in (0, 1)}
    for run in runs:
        assert (run["config"]["train"]["seed"], run["config"]["phases"][0]["samples"]) == (run["seed"], 64)
        assert 0 <= run["metrics"]["unseen/long_r1"] <= 100
    assert "Ablation: web caption only" in (output / "claims.html").read_text()

    capsys.readouterr()
    assert run_main(monkeypatch, "compare_pretraining", *flags) == 0
    assert "0 of 6 to run" in capsys.readouterr().err
    again = json.loads((output / "claims.json").read_text())
    assert (again["variants"], again["seconds"]) == (result["variants"], result["seconds"])
