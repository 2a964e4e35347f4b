"""Runs that differ in nothing but the encoder, what is never run twice, and metrics and report from finished runs."""

from __future__ import annotations

import dataclasses
import html
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import script_parser
from tiny_compare import ENCODERS, FLAGS, NAMES, collected, comparison_of, finish, made, place, reported

from clips.common.errors import UserError
from clips.common.files import write_json
from clips.common.page import as_html
from clips.recipes import recipe
from mllm.compare.analysis import (
    benchmark_folder,
    benchmark_results,
    encoder_groups,
    item_scores,
    read_answers,
)
from mllm.compare.commands import check_run, lab_run, pretrain_config, stage_config, stage_samples
from mllm.compare.comparison import RECIPES, Comparison, PretrainedEncoder, comparison_from_flags, stored_questions
from mllm.compare.report import floors, page
from mllm.compare.run import check_request, check_same_samples, compare, load_encoders
from mllm.compare.verify import verify
from mllm.data.batches import EpochSampler
from mllm.encoders.load import load_vision
from mllm.model.projector import save_projector
from mllm.training.build import PROJECTOR, build_stage

__all__ = ["made", "place"]  # fixtures


@pytest.fixture(scope="module")
def original(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comparison]:
    """Finished once; the current directory is where its encoders are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        yield finish(comparison_of(tmp_path_factory.mktemp("original")))


@pytest.fixture
def finished(original: Comparison, place: Path) -> Comparison:
    """A copy for the test to change."""
    return dataclasses.replace(original, output=shutil.copytree(original.output, place / "out"))


def check_runs(comparison: Comparison, *numbers: int) -> None:
    """All runs, or those of these numbers."""
    for number, run in enumerate(comparison.runs):
        if not numbers or number in numbers:
            check_run(comparison, run)


def checked(comparison: Comparison) -> None:
    """Everything that is refused before anything runs."""
    compare(comparison, dry_run=True)


def shown(report: dict) -> str:
    """The text of the page, without images."""
    return html.unescape(as_html(page(report, None)))


# --------------------------------------------------------------------------------------------- equal but the encoder


def test_runs_of_one_seed_are_equal_but_for_the_encoder(place: Path) -> None:
    """Settings, data order, the start of the projector and that of the adapters; `random` has the run's seed."""
    comparison = comparison_of(
        place, encoders=(ENCODERS[0], *ENCODERS[2:]), train_flags=(*FLAGS, "--instruct.lora_enable"), seeds=2
    )
    for stage, dataset_size in ((1, 12), (2, 16)):
        seen = {}
        for run in comparison.runs:
            arguments = stage_config(comparison, run, stage).on(torch.device("cpu"))
            prepared = build_stage(arguments, torch.device("cpu"), {})
            sampler = EpochSampler(
                prepared.dataset.modality_lengths,
                batch_size=arguments.per_device_train_batch_size,
                chunks=arguments.gradient_accumulation_steps,
                seed=arguments.seed,
                group_by_modality_length=bool(arguments.group_by_modality_length),
            )
            trains = arguments.what_trains()
            assert trains.pop("vision_tower") == run.vision
            weights = {n: p for n, p in prepared.model.named_parameters() if "vision_tower" not in n}
            if stage == 1:  # what stage 2 starts from: no training here, so the very start
                save_projector(prepared.model.model.multi_modal_projector, run.directory / "align" / PROJECTOR)
                write_json(run.directory / "align" / "done.json", {})
            seen[run] = (trains, sampler.order(0), prepared.dataset[0]["input_ids"], weights)
            assert sorted(seen[run][1]) == list(range(dataset_size))
        for seed in range(comparison.seeds):
            first, *others = [seen[run] for run in comparison.runs if run.seed == seed]
            for other in others:
                assert other[:3] == first[:3]
                assert other[3].keys() == first[3].keys()
                assert all(torch.equal(other[3][name], first[3][name]) for name in first[3])
        a, b = (seen[run] for run in comparison.runs if run.encoder == "blind")
        assert a[1] != b[1]
        started = [name for name in a[3] if "projector" in name or "lora_A" in name]
        assert any(not torch.equal(a[3][name], b[3][name]) for name in started)
    seeds = [run for run in comparison.runs if run.encoder == "random"]
    assert len({load_vision(run.vision, seed=run.seed).fingerprint for run in seeds}) == 2


def test_the_baseline_is_told_the_same_samples_and_refused_when_it_saw_others(tmp_path: Path) -> None:
    """All recipes agree in data, seed, steps and order; a run that saw more samples is no baseline."""
    runs, encoders = [], []
    for kind, name in RECIPES.items():
        run, config = tmp_path / kind, recipe(name)
        run.mkdir()
        config.save(run / "config.json")
        line = {"kind": "train", "step": 625, "samples": 80_000}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        runs.append(run)
        encoders.append(PretrainedEncoder(kind, 0, run))
    check_same_samples(encoders)
    (runs[1] / "metrics.jsonl").write_text(json.dumps(line | {"samples": 147_000, "step": 1148}) + "\n")
    with pytest.raises(UserError, match="80000 → 147000"):
        check_same_samples(encoders)
    config = recipe("clip_baseline")
    longer = dataclasses.replace(config.phases[0], samples=147_000)
    dataclasses.replace(config, phases=(longer,)).save(runs[1] / "config.json")
    with pytest.raises(UserError, match="phases"):
        check_same_samples(encoders)


def pretrained(comparison: Comparison) -> set[str]:
    return {encoder.directory.name for encoder in comparison.pretrained}


def test_names_stand_for_directories(tmp_path: Path) -> None:
    def visions(comparison: Comparison) -> dict[str, str]:
        return {run.name: run.vision for run in comparison.runs}

    comparison = Comparison(encoders=("clips", "clip", "random", "blind"), output=tmp_path)
    assert [*visions(comparison)][:5] == ["clips-seed0", "clip-seed0", "random-seed0", "blind-seed0", "clips-seed1"]
    assert pretrained(comparison) == {f"{kind}-seed{s}" for kind in ("clips", "clip") for s in range(5)}
    assert visions(comparison)["random-seed1"] == f"random:{tmp_path}/encoders/clips-seed1"
    given = Comparison(encoders=("clips:runs/x-{seed}", "blind"), seeds=2, llava_runs=2, output=tmp_path)
    assert [*visions(given).values()] == ["clips:runs/x-0", "blind:runs/x-0", "clips:runs/x-1", "blind:runs/x-1"]
    assert not pretrained(given)
    later = dataclasses.replace(given, first_seed=5)
    assert [*visions(later).values()] == ["clips:runs/x-5", "blind:runs/x-5", "clips:runs/x-6", "blind:runs/x-6"]
    assert pretrained(dataclasses.replace(comparison, first_seed=5)) == {
        f"{kind}-seed{s}" for kind in ("clips", "clip") for s in range(5, 10)
    }
    both = Comparison(encoders=("clips:a", "clips:b", "blind"), seeds=1, output=tmp_path)
    assert both.names == ["clips:a", "clips:b", "blind"]


def test_llava_runs_lie_within_pretraining_seeds(tmp_path: Path) -> None:
    """One run more than encoders by default; more of either kind of seed keep the runs that are there."""
    comparison = Comparison(encoders=("clips", "hf:some/model", "random", "blind"), output=tmp_path)
    clips = [run for run in comparison.runs if run.encoder == "clips"]
    assert [(run.pretraining_seed, run.seed) for run in clips] == [(s, s) for s in range(5)] + [(0, 1000)]
    assert clips[5].vision == clips[0].vision == f"clips:{tmp_path}/encoders/clips-seed0"
    few = dataclasses.replace(comparison, seeds=3)
    grid = dataclasses.replace(comparison, llava_runs=10)
    assert set(few.runs[:12]) < set(comparison.runs) < set(grid.runs)
    fixed = Comparison(encoders=("hf:some/model", "blind"), output=tmp_path)
    assert len(fixed.runs) == 2 * 5  # one encoder for all runs: there are no two kinds of seed to tell apart
    groups = {name: encoder_groups(comparison, name).tolist() for name in ("clips", "hf", "random", "blind")}
    assert groups["clips"] == encoder_groups(comparison, "clips", "random").tolist() == [0, 1, 2, 3, 4, 0]
    assert groups["random"] == encoder_groups(comparison, "hf", "random").tolist() == [0, 1, 2, 3, 4, 5]
    assert groups["hf"] == groups["blind"] == [0] * 6


def test_quick_trains_a_share_of_the_samples(place: Path) -> None:
    full, quick = comparison_of(place), comparison_of(place, quick=True)
    run = full.runs[0]
    budgets = (full, quick, dataclasses.replace(quick, budget=0.25))
    assert [stage_samples(comparison, run, 1) for comparison in budgets] == [12, 8, 4], "whole steps"
    steps = comparison_of(place, quick=True, train_flags=(*FLAGS, "--instruct.max_steps", "40"))
    assert (stage_config(steps, run, 2).max_steps, stage_samples(steps, run, 2)) == (20, 80)
    given = comparison_from_flags(script_parser("compare_encoders").parse_args(["--quick"]))
    assert (given.encoders, given.seeds, given.runs_per_encoder) == (("clips", "random"), 1, 4)
    assert [comparison.evaluation_settings()["limit"] for comparison in (full, quick)] == [None, 400]
    demo = dataclasses.replace(full, train_flags=(), questions=None)
    assert (demo.budget_share, demo.question_limit) == (0.5, 400)
    here = dataclasses.replace(full, encoders=("clips", "clip"))
    short = dataclasses.replace(here, quick=True)
    for comparison, samples in ((here, 128_000), (short, 64_000)):
        encoders = comparison.pretrained
        assert {pretrain_config(comparison, encoder).samples for encoder in encoders} == {samples}


# ------------------------------------------------------------------------------------------------------ never twice


def test_each_encoder_also_trains_as_every_variant_says(place: Path) -> None:
    """A variant is a column of the same encoders with further flags; report and verification know it."""
    tiles = "--image_aspect_ratio anyres --instruct.num_train_epochs 0.5"
    words = ["--encoders", "clips:clips-run,blind", "--seeds", "2", "--variants", f"tiles={tiles}"]
    given = comparison_from_flags(script_parser("compare_encoders").parse_args(words))
    fields = ("output", "train_flags", "questions", "image_folder", "device")
    comparison = finish(dataclasses.replace(given, **{name: getattr(comparison_of(place), name) for name in fields}))
    assert comparison.names == ["clips", "blind", "clips, tiles", "blind, tiles"]
    runs = {run.name: run for run in comparison.runs}
    plain, tiled = runs["clips-clips-run-seed1"], runs["clips-clips-run-tiles-seed1"]
    assert (plain.vision, plain.seed, plain.variant) == (tiled.vision, tiled.seed, "")
    now, then = (stage_config(comparison, run, 2) for run in (plain, tiled))
    assert (now.image_aspect_ratio, then.image_aspect_ratio) == ("pad", "anyres")
    assert [stage_samples(comparison, run, 2) for run in (plain, tiled)] == [16, 8]
    assert encoder_groups(comparison, "clips", "clips, tiles").tolist() == [0, 0]
    report = reported(comparison)
    assert report["plan"]["budget"]["samples of variants"] == {"tiles": {"align": 12, "instruct": 8}}
    assert ("clips", "clips, tiles") in {(row["a"], row["b"]) for row in report["differences"]}
    assert not verify(comparison.output).differs
    with pytest.raises(UserError, match="--variants"):
        checked(dataclasses.replace(comparison, variants=comparison.variants * 2))
    with pytest.raises(UserError, match="--variants: --seed"):
        checked(dataclasses.replace(comparison, variants=(("other", ("--seed", "7")),)))


def test_a_run_with_other_settings_is_refused_by_name(finished: Comparison) -> None:
    check_runs(finished)
    run = finished.runs[5]
    changed = dataclasses.replace(finished, train_flags=(*FLAGS, "--instruct.learning_rate", "0.5"))
    with pytest.raises(UserError, match=r"instruct.learning_rate: .* → 0.5"):
        check_runs(changed)
    path = run.directory / "config.json"
    config = json.loads(path.read_text())
    config["align"]["trains"]["vision_tower"] = "clip:the/same/weights/by/another/path"
    path.write_text(json.dumps(config))
    check_runs(finished, 5)
    config["align"]["trains"]["vision_fingerprint"] = "of weights that were trained again since"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="other weights"):
        check_runs(finished, 5)


def test_other_questions_cost_the_answers_only(finished: Comparison, tmp_path: Path) -> None:
    shorter = dataclasses.replace(finished, limit=7)
    with pytest.raises(UserError, match="limit"):
        check_runs(shorter)
    mended = tmp_path / "question.jsonl"
    mended.write_text(finished.questions.read_text().replace('"yes"', '"no"'))
    with pytest.raises(UserError, match="sha256"):
        check_runs(dataclasses.replace(finished, questions=mended))
    shutil.rmtree(finished.runs[0].evaluation)
    check_runs(shorter, 0)
    first = lab_run(shorter, shorter.runs[0])
    (missing,) = [step for step in first.steps if not step.is_done()]
    assert [Path(word).name for word in missing.command[1:4]] == ["evaluate_llava.py", "--model", "model"]
    assert missing.command[-2:] == ("--limit", "7")


def test_answers_to_other_questions_are_refused(finished: Comparison) -> None:
    path = finished.runs[2].evaluation / "question.jsonl"
    path.write_text(path.read_text().replace("where?", "Where, please?"))
    with pytest.raises(UserError, match=f"{finished.runs[2].name} answered other questions"):
        read_answers(finished.runs, stored_questions(finished.output))


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"encoders": ("clips",)}, "--encoders"),
        ({"train_flags": ("--align.vision=blind",)}, "--vision_tower"),
        ({"pretrain_flags": ("--recipe=s16", "--data", "x")}, "--pretrain-flags: --recipe"),
        ({"train_flags": FLAGS}, "--questions"),
    ],
)
def test_flags_that_do_not_fit_are_refused(options: dict, flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        check_request(Comparison(**{"encoders": ("random", "blind")} | options))


def test_what_would_fail_hours_later_is_refused_at_once(place: Path, made: Path) -> None:
    checked(comparison_of(place))
    with pytest.raises(UserError, match="--image-folder"):
        checked(comparison_of(place, image_folder=None))
    lines = [json.loads(line) for line in Path("question.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        del line["answer"]
    (place / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="nothing to compare"):
        checked(comparison_of(place, questions=place / "mine.jsonl"))
    comparison = comparison_of(place, encoders=("hf:nowhere", "blind:clips-run"))
    with pytest.raises(UserError, match="nowhere"):
        load_encoders(comparison, [], comparison.runs)


def test_encoders_of_every_seed_are_opened(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr("mllm.compare.run.encoder_of", lambda arguments: opened.append(arguments.vision_tower))
    comparison = comparison_of(place, encoders=("blind:clips-run", "hf:a-{seed}"))
    load_encoders(comparison, [], comparison.runs)
    assert sorted(opened) == ["blind:clips-run", "hf:a-0", "hf:a-1", "hf:a-2"]


@pytest.mark.parametrize("words", [("--data-path", "x"), ("--align.data-path=x",), ("--data_path", "x")])
def test_data_of_one_s_own_are_no_demo_in_either_spelling(words: tuple[str, ...]) -> None:
    assert not Comparison(encoders=("random", "blind"), train_flags=words).is_demo


def test_captions_of_one_question_id_keep_their_references(tmp_path: Path) -> None:
    asked = [{"question_id": [0], "text": text, "references": [f"{text} {text} cat"]} for text in ("red", "blue")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    run = Comparison(encoders=("random", "blind")).runs[0]
    lines = [
        {"file": "q", "question_id": line["question_id"], "prompt": line["text"], "text": line["references"][0]}
        for line in asked
    ]
    scores = item_scores({run: lines}, {"q": tmp_path / "q.jsonl"})["cider_d"]
    assert (scores.by_encoder[run.encoder] > 0).all()


def test_encoders_pretrained_with_other_settings_are_refused(place: Path) -> None:
    comparison = comparison_of(place, encoders=("clips", "clip"))
    tiny = dataclasses.replace(comparison, pretrain_flags=("--debug",))
    encoder = comparison.pretrained[0]
    encoder.directory.mkdir(parents=True)
    pretrain_config(tiny, encoder).save(encoder.directory / "config.json")
    with pytest.raises(UserError, match="other settings"):
        checked(comparison)
    checked(tiny)
    own = ("--debug", "--set", "task.objective=clips", "task.caption_weight=0")
    with pytest.raises(UserError, match="objective"):
        checked(dataclasses.replace(comparison, output=place / "other", pretrain_flags=own))


# ------------------------------------------------------------------------------------------------ metrics and report


def test_a_floor_that_was_not_beaten_is_named() -> None:
    """Each variant has a blind column of its own, and all were called blind."""
    kinds = {"clips": "clips", "blind": "blind", "clips, tiles": "clips", "blind, tiles": "blind"}
    rows = [("clips", "blind", "win"), ("clips", "blind, tiles", "tie"), ("blind", "clips, tiles", "win")]
    differences = [{"metric": "accuracy", "a": a, "b": b, "verdict": verdict} for a, b, verdict in rows]
    texts = floors({"encoders": {name: {"kind": kind} for name, kind in kinds.items()}, "differences": differences})
    assert [line.partition(" beyond")[0] for line in texts] == [
        "clips does not beat blind, tiles",
        "clips, tiles does not beat blind",
    ]


def test_results_of_lmms_eval_are_joined(finished: Comparison) -> None:
    """Its file as lmms-eval 0.7.3 writes it: task → "metric,filter" → value, with standard errors beside."""
    comparison = dataclasses.replace(finished, benchmarks=("gqa",))
    runs = comparison.runs
    assert not any(lab_run(comparison, run).is_done() for run in runs)
    for run in runs:
        value = 0.6 if run.encoder == NAMES[0] else 0.5 + 0.01 * run.seed
        errors = {"exact_match_stderr,none": 0.01, "exact_match_stderr_clustered,none": "N/A"}
        write_benchmark(run.directory, "gqa", {"gqa": {"alias": "gqa", "exact_match,none": value, **errors}})
    assert all(lab_run(comparison, run).is_done() for run in runs)
    members = {"mmmu": {"alias": "mmmu", " ": " "}, "mmmu_val": {"mmmu_acc,none": 0.3, "mmmu_acc,strict": 0.2}}
    write_benchmark(runs[0].directory, "mmmu", members)  # a group has no score of its own
    assert benchmark_results(runs[0].directory, ("mmmu",)) == {
        "mmmu_val/mmmu_acc": 0.3,
        "mmmu_val/mmmu_acc (strict)": 0.2,
    }
    report = collected(comparison, {run: {} for run in runs}, [])
    row = report["benchmark_differences"][0]
    assert (row["mean"], row["metric"]) == (pytest.approx(0.09), "gqa/exact_match")
    assert row["ci95"] == pytest.approx([0.09 - 0.0248414, 0.09 + 0.0248414], abs=1e-5)  # t of 2 degrees: 4.3027
    assert "gqa/exact_match" in shown(report)


def write_benchmark(run: Path, task: str, results: dict) -> Path:
    folder = run / "benchmarks" / task / "blind-seed0__model"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "20260101_000000_results.json"
    path.write_text(json.dumps({"results": results}))
    return path


@pytest.mark.parametrize(
    ("results", "log"),
    [
        ({"gqa": {"alias": "gqa", "exact_match_stderr_clt,none": 0.0}}, ""),
        ({"gqa": {"exact_match,none": 0.4}}, "ERROR - Error CUDA out of memory. in generating\n"),
    ],
)
def test_a_benchmark_without_a_score_or_with_answers_that_failed_is_not_done(
    tmp_path: Path, results: dict, log: str
) -> None:
    """lmms-eval scores an empty answer if `generate` raised, for example for want of memory."""
    write_benchmark(tmp_path, "gqa", results)
    (benchmark_folder(tmp_path, "gqa") / "log.txt").write_text(log)
    assert benchmark_results(tmp_path, ("gqa",)) == {}
