"""Cells that differ in nothing but the encoder, what is never run twice, and figures and report from finished cells."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hostile import HOSTILE
from markdown_it import MarkdownIt
from rich.console import Console
from tiny_mllm import pictures, write_llm, write_run

from clips.common.errors import CommandError, UserError
from clips.common.escape import clip, one_line, visible
from clips.common.jobs import Commands, locked
from clips.config import Fields
from clips.data.loader import BatchDataset
from clips.data.sources import open_source
from clips.data.tokenizer import build_tokenizer
from clips.recipes import debug_twin, recipe
from mllm.compare import figures as compare_figures
from mllm.compare.checks import assert_same_samples, check_cells, check_inputs, load_encoders
from mllm.compare.plan import RECIPES, Cell, Plan, is_done, stage_samples
from mllm.compare.report import markdown, sentence, write_report
from mllm.compare.run import run_cell
from mllm.compare.view import print_plan, seconds_of_cell
from mllm.data.sampler import EpochSampler
from mllm.encoders.registry import load_vision
from mllm.model.projector import save_projector
from mllm.training.prepare import PROJECTOR, encoder_of, prepare
from mllm.training.stages import STAGES

ENCODERS = ("clips:clips-run", "clip:clip-run", "random", "blind")
NAMES = ("clips", "clip", "random", "blind")
SKILL = {"clips": 0.9, "clip": 0.55, "random": 0.5, "blind": 0.3}
FLAGS = (
    *("--model_name_or_path", "llm", "--image_folder", "images", "--batch_size", "4"),
    *("--align.data_path", "align.json", "--instruct.data_path", "instruct.json"),
)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    write_run(root / "clips-run", seed=1)
    write_run(root / "clip-run", "clip", seed=2)
    write_llm(root / "llm")
    names = pictures(root / "images", 12)
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red cat"}]
    more = [{"from": "human", "value": "And now?"}, said[1]]
    captions = [{"id": name, "image": name, "conversations": said} for name in names]
    records = [{"id": name, "image": name, "conversations": said + more * (i % 3)} for i, name in enumerate(names)]
    text_only = [{"id": f"t{i}", "conversations": [{"from": "human", "value": "Hello"}, said[1]]} for i in range(4)]
    (root / "align.json").write_text(json.dumps(captions))
    (root / "instruct.json").write_text(json.dumps(records + text_only))
    questions = [
        {"question_id": 10 * i + j, "image": name, "text": f"{kind}?", "kind": kind, "answer": "yes"}
        for i, name in enumerate(names)
        for j, kind in enumerate(("identity", "where", "yes_no"))
    ]
    (root / "question.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return root


@pytest.fixture
def place(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(made)
    monkeypatch.setenv("CLIPS_MLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def plan_of(output: Path, **options: object) -> Plan:
    settings = {"encoders": ENCODERS, "seeds": 3, "output": output / "out", "train_flags": FLAGS, "device": "cpu"}
    settings |= {"question_file": Path("question.jsonl"), "question_images": Path("images")}
    return Plan(**settings | options)


def write_cell(plan: Plan, cell: Cell, skill: float) -> None:
    """A finished cell as run_cell leaves it, without the model; a question is answered right with chance `skill`."""
    config = {}
    for number, stage in STAGES.items():
        trains = plan.arguments(cell, number).what_trains()
        trains["vision_fingerprint"] = encoder_of(plan.arguments(cell, number)).fingerprint
        facts = {"language model": "tiny", "vision encoder": cell.vision, "projector": "mlp2x_gelu, random"}
        config[stage.name] = {"trains": trains, "facts": facts, "freeze": {"projector": "full"}}
        done = {"stage": stage.name, "steps": 3, "samples": 12, "samples_per_s": 5.0, "peak_memory_gb": 0.5}
        (cell.directory / stage.name).mkdir(parents=True)
        (cell.directory / stage.name / "done.json").write_text(json.dumps(done))
    write = {"config": config, "env": {"device": "cpu"}, "cost": {"align": 10.0, "instruct": 20.0, "evaluation": 5.0}}
    write["cell"] = {"evaluation": plan.evaluation}
    for name, content in write.items():
        (cell.directory / f"{name}.json").write_text(json.dumps(content))
    rng = np.random.default_rng([plan.names.index(cell.encoder), cell.seed])
    lines = []
    for question in map(json.loads, Path(plan.question_file).read_text().splitlines()):
        right = bool(rng.random() < skill)
        line = {"question_id": question["question_id"], "prompt": question["text"], "image": question["image"]}
        line |= {"kind": question["kind"], "expected": "yes", "text": "yes" if right else "<b>no", "correct": right}
        lines.append(json.dumps(line))
    cell.figures.parent.mkdir()
    (cell.figures.parent / f"{plan.question_file.stem}.jsonl").write_text("\n".join(lines) + "\n")
    accuracy = np.mean(['"correct": true' in line for line in lines])
    cell.figures.write_text(json.dumps({"exact_match": {"overall": {"accuracy": accuracy}}}))


@pytest.fixture
def finished(place: Path) -> Plan:
    plan = plan_of(place)
    for cell in plan.cells:
        write_cell(plan, cell, SKILL[cell.encoder])
    return plan


class Recorder(Commands):
    """Writes down what would have been run, and runs nothing."""

    def __init__(self) -> None:
        super().__init__(1)
        self.commands: list[list[str]] = []

    def run(self, command, log, **popen) -> None:
        self.commands.append(list(command))


# --------------------------------------------------------------------------------------------- equal but the encoder


def test_cells_of_one_seed_are_equal_but_for_the_encoder(place: Path) -> None:
    """Settings, data order, the start of the projector and that of the adapters."""
    plan = plan_of(place, train_flags=(*FLAGS, "--instruct.lora_enable"), seeds=2)
    for stage, dataset_size in ((1, 12), (2, 16)):
        seen = {}
        for cell in plan.cells:
            arguments = plan.arguments(cell, stage)
            prepared = prepare(arguments, cell.directory, torch.device("cpu"), None)
            sampler = EpochSampler(
                prepared.dataset.modality_lengths,
                batch_size=arguments.per_device_train_batch_size,
                chunks=arguments.gradient_accumulation_steps,
                seed=arguments.seed,
                group_by_modality_length=bool(arguments.group_by_modality_length),
            )
            trains = arguments.what_trains()
            assert trains.pop("vision_tower") == cell.vision
            weights = {n: p for n, p in prepared.model.named_parameters() if "vision_tower" not in n}
            if stage == 1:  # what stage 2 starts from: no training here, so the very start
                save_projector(prepared.model.model.multi_modal_projector, cell.directory / "align" / PROJECTOR)
            seen[cell] = (trains, list(sampler), weights, prepared.dataset[0]["input_ids"])
            assert sorted(seen[cell][1]) == list(range(dataset_size))
        for seed in range(plan.seeds):
            first, *others = [seen[cell] for cell in plan.cells if cell.seed == seed]
            for other in others:
                assert other[0] == first[0]
                assert other[1] == first[1]
                assert other[3] == first[3]
                assert other[2].keys() == first[2].keys()
                assert all(torch.equal(other[2][name], first[2][name]) for name in first[2])
        a, b = (seen[cell] for cell in plan.cells if cell.encoder == "blind")
        assert a[1] != b[1]
        started = [name for name in a[2] if "projector" in name or "lora_A" in name]
        assert any(not torch.equal(a[2][name], b[2][name]) for name in started)
        if stage == 2:
            assert any("lora_A" in name for name in started)


def test_the_seed_of_a_cell_is_that_of_the_random_encoder_too(place: Path) -> None:
    cells = [cell for cell in plan_of(place).cells if cell.encoder == "random"]
    assert {cell.vision for cell in cells} == {"random:clips-run"}
    assert len({load_vision(cell.vision, seed=cell.seed).fingerprint for cell in cells}) == 3


def test_the_baseline_is_told_the_same_samples_and_refused_when_it_saw_others(tmp_path: Path) -> None:
    """Both recipes agree in data, seed, steps and order; a run that saw more samples is no baseline."""
    runs = []
    for kind, name in RECIPES.items():
        run, config = tmp_path / kind, recipe(name)
        run.mkdir()
        config.save(run / "config.json")
        line = {"kind": "train", "step": 625, "samples": 80_000}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        runs.append(run)
    assert_same_samples(*runs)
    (runs[1] / "metrics.jsonl").write_text(json.dumps(line | {"samples": 147_000, "step": 1148}) + "\n")
    with pytest.raises(UserError, match=r"no fair baseline.*\n.*samples and steps seen: .*80000.*147000"):
        assert_same_samples(*runs)
    config = recipe("clip_baseline")
    longer = dataclasses.replace(config.phases[0], samples=147_000)
    dataclasses.replace(config, phases=(longer,)).save(runs[1] / "config.json")
    with pytest.raises(UserError, match="phases"):
        assert_same_samples(*runs)


def test_the_baseline_gets_the_same_pictures_in_the_same_order(tmp_path: Path) -> None:
    """Batches of both recipes at the same positions: equal samples, equal pixels, augmentation included."""
    rows = [{"path": f"images/{name}", "alt": f"a thing {name}", "caption": f"A thing. It is {name}."}
            for name in pictures(tmp_path / "images", 12)]  # fmt: skip
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(str(tmp_path / "table.jsonl"), Fields(image="path", web="alt", long="caption"), need_long=True)
    tokenizer = build_tokenizer("wordpiece", [row["caption"] for row in rows], vocab_size=100)
    batches = []
    for name in RECIPES.values():
        run = debug_twin(recipe(name))
        data = BatchDataset(source, tokenizer, run, run.phases[0])
        batches.append([data[range(begin, begin + 8)] for begin in range(0, 32, 8)])
    for ours, theirs in zip(*batches, strict=True):
        assert ours["keys"] == theirs["keys"]
        assert torch.equal(ours["images"], theirs["images"])
    assert len({key for batch in batches[0] for key in batch["keys"]}) == 12


def test_names_stand_for_directories(tmp_path: Path) -> None:
    plan = Plan(encoders=("clips", "clip", "random", "blind"), output=tmp_path)
    assert [cell.name for cell in plan.cells][:5] == [
        "clips-seed0",
        "clip-seed0",
        "random-seed0",
        "blind-seed0",
        "clips-seed1",
    ]
    assert {p.name for p in plan.pretraining} == {f"{kind}-seed{s}" for kind in ("clips", "clip") for s in range(3)}
    by_name = {cell.name: cell.vision for cell in plan.cells}
    assert by_name["clip-seed2"] == f"clip:{tmp_path}/encoders/clip-seed2"
    assert by_name["random-seed1"] == f"random:{tmp_path}/encoders/clips-seed1"
    quick = dataclasses.replace(plan, quick=True)
    assert {p.name for p in quick.pretraining} == {"clips-seed0", "clip-seed0"}
    assert {cell.vision for cell in quick.cells if cell.encoder == "clip"} == {f"clip:{tmp_path}/encoders/clip-seed0"}
    given = Plan(encoders=("clips:runs/x-{seed}", "blind"), seeds=2, output=tmp_path)
    assert [cell.vision for cell in given.cells] == [
        "clips:runs/x-0",
        "blind:runs/x-0",
        "clips:runs/x-1",
        "blind:runs/x-1",
    ]
    assert not given.pretraining
    assert given.names == ["clips", "blind"]
    both = Plan(encoders=("clips:a", "clips:b", "blind"), seeds=1, output=tmp_path)
    assert both.names == ["clips:a", "clips:b", "blind"]
    assert {p.name for p in Plan(encoders=("random", "blind"), seeds=1, output=tmp_path).pretraining} == {"clips-seed0"}


def test_quick_trains_a_share_of_the_samples(place: Path) -> None:
    full, quick = plan_of(place), plan_of(place, quick=True)
    cell = full.cells[0]
    assert stage_samples(full, cell, 1) == 12
    assert stage_samples(quick, cell, 1) == 2
    assert stage_samples(dataclasses.replace(quick, budget=0.5), cell, 1) == 6
    steps = plan_of(place, quick=True, train_flags=(*FLAGS, "--instruct.max_steps", "40"))
    assert (steps.arguments(cell, 2).max_steps, steps.arguments(cell, 1).max_steps) == (6, -1)
    assert stage_samples(steps, cell, 2) == 24
    assert [plan.evaluation["limit"] for plan in (full, quick, dataclasses.replace(quick, limit=7))] == [None, 400, 7]
    demo = dataclasses.replace(full, train_flags=())
    assert (demo.share, full.share) == (0.75, 1.0)
    with pytest.raises(UserError, match=r"--budget 1\.5 must be above 0 and at most 1"):
        dataclasses.replace(full, budget=1.5)


# ------------------------------------------------------------------------------------------------------ never twice


def test_a_finished_cell_is_never_run_again_and_the_rest_of_a_cut_one_is(finished: Plan) -> None:
    done, cut = finished.cells[:2]
    cut.figures.unlink()
    assert [is_done(finished, cell) for cell in (done, cut)] == [True, False]
    commands, said = Recorder(), []
    for cell in (done, cut):
        run_cell(finished, cell, commands, lambda cell, state: said.append((cell.name, state)))
    (only,) = commands.commands
    assert only[1].endswith("evaluate_llava.py")
    assert str(cut.directory / "model") in only
    (cut.directory / "instruct" / "done.json").unlink()
    run_cell(finished, cut, commands, lambda cell, state: None)
    assert [Path(command[1]).name for command in commands.commands[1:]] == ["train_llava.py", "evaluate_llava.py"]
    assert commands.commands[1][2:4] == ["--stage", "2"]


def test_a_cell_with_other_settings_is_refused_by_name(finished: Plan) -> None:
    check_cells(finished)
    cell = finished.cells[5]
    changed = dataclasses.replace(finished, train_flags=(*FLAGS, "--instruct.learning_rate", "0.5"))
    with pytest.raises(
        UserError, match=rf"cell {finished.cells[0].name} .*\n  instruct.learning_rate: .* there, 0.5 asked"
    ):
        check_cells(changed)
    path = cell.directory / "config.json"
    config = json.loads(path.read_text())
    config["align"]["trains"]["vision_tower"] = "clip:the/same/weights/by/another/path"
    path.write_text(json.dumps(config))
    check_cells(finished)
    config["align"]["trains"]["vision_fingerprint"] = "of weights that were trained again since"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"cell {cell.name} .*\n.*other weights than those it was trained on"):
        check_cells(finished)


def test_other_questions_cost_the_answers_only(finished: Plan, tmp_path: Path) -> None:
    shorter = dataclasses.replace(finished, limit=7)
    place = finished.cells[0].figures.parent
    with pytest.raises(UserError, match=rf"limit: None there, 7 asked\n.*remove {place}"):
        check_cells(shorter)
    mended = tmp_path / "question.jsonl"
    mended.write_text(finished.question_file.read_text().replace('"yes"', '"no"'))
    with pytest.raises(UserError, match=r"sha256: \w+ there, \w+ asked"):
        check_cells(dataclasses.replace(finished, question_file=mended))
    for cell in finished.cells:
        shutil.rmtree(cell.figures.parent)
    check_cells(shorter)
    assert not is_done(shorter, finished.cells[0])


def test_answers_to_other_questions_are_refused(finished: Plan) -> None:
    path = finished.cells[2].figures.parent / "question.jsonl"
    before = path.read_text()
    path.write_text(before.replace('"expected": "yes"', '"expected": "no"'))
    with pytest.raises(UserError, match=f"cell {finished.cells[2].name} answered other questions"):
        compare_figures.read_answers(finished)
    path.write_text(before)
    path = finished.cells[3].figures.parent / "question.jsonl"
    path.write_text(path.read_text().replace('"where?"', '"Where, please?"'))
    with pytest.raises(UserError, match=f"cell {finished.cells[3].name} answered other questions"):
        compare_figures.read_answers(finished)


def test_a_cell_is_locked_for_a_child_that_outlives_its_parent(tmp_path: Path) -> None:
    commands = Commands(1)
    with locked(tmp_path / "cell", commands) as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    got = threading.Event()

    def wait() -> None:
        with locked(tmp_path / "cell", commands):
            got.set()

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    assert not got.wait(1.5)
    child.communicate(b"\n")
    assert got.wait(60)
    waiter.join()


def test_a_failing_command_ends_the_rest_and_shows_the_end_of_its_log(tmp_path: Path) -> None:
    commands, begun = Commands(1), []

    def work(item: int) -> None:
        begun.append(item)
        code = "print('all is lost'); raise SystemExit(3)" if item == 1 else "pass"
        commands.run([sys.executable, "-c", code], tmp_path / f"{item}.log")

    with pytest.raises(CommandError, match=r"1 ended with exit code 3.*\n  all is lost"):
        commands.map(work, list(range(50)))
    assert begun[:2] == [0, 1]
    assert len(begun) < 50


def test_a_failure_beside_a_longer_one_begins_nothing_more() -> None:
    failed, begun = threading.Event(), []

    def work(item: int) -> None:
        begun.append(item)
        if item == 1:
            failed.set()
            raise CommandError("all is lost")
        assert failed.wait(60)
        time.sleep(1)

    with pytest.raises(CommandError, match="all is lost"):
        Commands(2).map(work, list(range(8)))
    assert set(begun) <= {0, 1, 2}


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoders": ("clips",)}, "at least two"),
        ({"encoders": ("blind", "blind")}, "at least two different"),
        ({"seeds": 0}, "--seeds"),
        ({"pretraining_seeds": 4}, "--pretraining-seeds 4"),
        ({"train_flags": ("--seed", "3")}, "--train-flags: --seed is what the comparison itself sets"),
        ({"train_flags": ("--seed=3",)}, "--seed is what the comparison itself sets"),
        ({"train_flags": ("--instruct.seed", "3")}, "--seed is what the comparison itself sets"),
        ({"train_flags": ("--align.vision=blind",)}, "--vision_tower is what the comparison itself sets"),
        ({"train_flags": ("--data-path=mine.json",)}, "the demo's questions say nothing about them"),
        ({"pretrain_flags": ("--seed", "4")}, "--pretrain-flags: --seed is what the comparison itself sets"),
        ({"pretrain_flags": ("--recipe=s16", "--data", "x")}, "--recipe is what the comparison itself sets"),
        ({"encoders": ("rnadom", "blind")}, "'rnadom' is not known"),
        ({"encoders": ("timm", "blind")}, "timm:NAME"),
        ({"jobs": 2, "gpus": 2}, "--jobs 2 with --gpus 2"),
        ({"karpathy": Path("coco.json")}, "name clips or clip"),
        ({"train_flags": FLAGS}, "the demo's questions say nothing about them"),
        ({"benchmarks": ("gqa",)}, "pip install lmms-eval"),
    ],
)
def test_flags_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Plan(**{"encoders": ("random", "blind")} | options)


def test_a_flag_that_training_does_not_know_is_refused_before_anything_runs(place: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan_of(place, train_flags=(*FLAGS, "--lora_rr", "3"))
    assert stopped.value.code == 2


def test_what_would_fail_hours_later_is_refused_at_once(place: Path, made: Path) -> None:
    check_inputs(plan_of(place))
    with pytest.raises(UserError, match=r"question 0 has an image, .*--question-images"):
        check_inputs(plan_of(place, question_images=None))
    for change, message in (({"image": "gone.png"}, "question 0: image 'gone.png'"), ({"answer": None}, "nothing to")):
        lines = [json.loads(line) | change for line in Path("question.jsonl").read_text().splitlines()]
        kept = [{key: value for key, value in line.items() if value is not None} for line in lines]
        (place / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        with pytest.raises(UserError, match=message):
            check_inputs(plan_of(place, question_file=place / "mine.jsonl"))
    with pytest.raises(UserError, match="is not a Karpathy split file"):
        check_inputs(plan_of(place, karpathy=place / "mine.jsonl"))
    with pytest.raises(UserError, match="nowhere"):
        load_encoders(plan_of(place, encoders=("hf:nowhere", "blind:clips-run")))


def test_encoders_pretrained_with_other_settings_are_refused(place: Path) -> None:
    plan = plan_of(place, encoders=("clips", "clip"))
    path, (kind, seed) = next(iter(plan.pretraining.items()))
    path.mkdir(parents=True)
    dataclasses.replace(plan, pretrain_flags=("--debug",)).pretraining_config(path, kind, seed).save(
        path / "config.json"
    )
    with pytest.raises(UserError, match=rf"encoder {path} holds other settings:\n(.*\n)+.*another --output"):
        check_inputs(plan)
    check_inputs(dataclasses.replace(plan, pretrain_flags=("--debug",)))
    own = ("--debug", "--set", "task.objective=clips", "task.caption_weight=0")
    both = dataclasses.replace(plan, output=place / "other", pretrain_flags=own)
    with pytest.raises(UserError, match="clip would be trained with the objective clips"):
        check_inputs(both)


# ------------------------------------------------------------------------------------------------ figures and report


@pytest.fixture
def report(finished: Plan) -> dict:
    measured = {
        cell: {"zero_shot_top1": {"value": 90.0 - cell.seed, "chance": 1.6, "items": 500}}
        if cell.encoder.startswith("cl")
        else {}
        for cell in finished.cells
    }
    return compare_figures.collect(finished, measured, ["scripts/compare_encoders.py", "--seeds", "3"])


def test_the_report_has_every_difference_in_the_agreed_form(report: dict, finished: Plan) -> None:
    rows = report["differences"]
    assert len(rows) == 6 * 4  # pairs × (all questions and three kinds)
    (row,) = [r for r in rows if r["a"] == NAMES[0] and r["b"] == "blind" and r["metric"] == "accuracy"]
    keys = {"a", "b", "metric", "mean", "ci95", "seeds", "items", "p_mcnemar", "p_holm", "verdict", "items_needed"}
    assert keys <= row.keys()
    assert (row["seeds"], row["items"], row["verdict"]) == (3, 36, "win")
    assert row["ci95"][0] < row["mean"] < row["ci95"][1]
    means = {name: encoder["metrics"]["accuracy"]["mean"] for name, encoder in report["encoders"].items()}
    assert row["mean"] == pytest.approx(means[NAMES[0]] - means["blind"])
    for name, encoder in report["encoders"].items():
        answers = [json.loads(line)["correct"] for cell in finished.cells if cell.encoder == name
                   for line in (cell.figures.parent / "question.jsonl").read_text().splitlines()]  # fmt: skip
        assert encoder["metrics"]["accuracy"]["mean"] == pytest.approx(np.mean(answers))
        assert len(encoder["metrics"]["accuracy"]["by_seed"]) == 3
    kinds = [r for r in rows if (r["a"], r["b"]) == (NAMES[0], "blind") and "/" in r["metric"]]
    assert all(r["p_holm"] >= r["p_mcnemar"] for r in kinds)
    smallest = min(kinds, key=lambda r: r["p_mcnemar"])
    assert smallest["p_holm"] == pytest.approx(min(1, 3 * smallest["p_mcnemar"]))


def test_every_cell_s_config_and_seed_are_in_the_report(report: dict) -> None:
    assert [(cell["encoder"], cell["seed"]) for cell in report["cells"]] == [(e, s) for s in range(3) for e in NAMES]
    for cell in report["cells"]:
        trains = cell["config"]["instruct"]["trains"]
        assert trains["seed"] == cell["seed"]
        assert trains["vision_tower"] == cell["vision"]
    assert report["encoders"]["blind"]["cost"]["seconds"] == 35.0
    assert report["encoders"][NAMES[0]]["intrinsic"]["zero_shot_top1"]["mean"] == 89.0
    assert report["command"] == "python scripts/compare_encoders.py --seeds 3"


def test_examples_are_questions_that_one_model_alone_got_right(report: dict) -> None:
    assert report["examples"]
    for example in report["examples"]:
        a, b = example["answers"]
        right = {name: text == "yes" for name, text in example["answers"].items()}
        assert right[example["right"]]
        assert right[a] != right[b]
    assert {example["right"] for example in report["examples"]} == set(NAMES[:2])


def test_the_page_is_one_offline_file_with_every_part(report: dict, finished: Plan) -> None:
    page = write_report(report, finished.output, Path("images")).read_text()
    assert not re.search(r'(?:src|href|srcset)="(?!data:)', page)
    assert "@import" not in page
    assert "url(" not in page
    for part in (
        "What was found", "Differences, points", "Kinds of question", "The encoders themselves", "Where two models",
        "Controls", "What is not shown", "Cost", "Environment", "python scripts/compare_encoders.py", "viewport",
        "prefers-color-scheme: dark",
    ):  # fmt: skip
        assert part in page, part
    assert "&lt;b&gt;no" in page  # an answer is text, whatever it looks like
    assert "<b>no" not in page
    assert page.count('class="track"') == 6 + 6 * 3
    text = (finished.output / "report.md").read_text()
    assert "| blind |" in text
    assert json.loads((finished.output / "report.json").read_text()) == report


def test_texts_of_other_people_are_shown_as_they_are(report: dict, finished: Plan) -> None:
    """Questions and answers on the page; names of models and the command in the Markdown too."""
    example = report["examples"][0]
    texts = [clip(text) for text in HOSTILE.values()]
    report["examples"] = [
        example | {"question": text, "truth": text, "answers": dict.fromkeys(NAMES[:2], text)}
        for text in HOSTILE.values()
    ]
    report["settings"]["language_model"] = texts[0]
    report["command"] = "\n".join(texts)
    for encoder, text in zip(report["encoders"].values(), texts, strict=False):
        encoder["described"] = text
    page = write_report(report, finished.output, Path("images")).read_text("utf-8")
    assert not re.search(r"<(?:script|a|em)\b", page)
    assert "onerror" not in re.sub("<img src=x onerror=", "", html.unescape(page))
    for text in texts:
        assert html.unescape(page).count(visible(text)) >= 4  # question, truth, both answers
    markdown = (finished.output / "report.md").read_text("utf-8")
    found = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)
    assert not re.search(r"<(?:script|img|a|em|s|blockquote)\b", found)
    for text in texts[: len(NAMES)]:
        assert one_line(text) in html.unescape(found)
    (fence,) = re.findall("<pre><code>(.*?)</code></pre>", found, re.DOTALL)
    assert html.unescape(fence) == visible(report["command"]) + "\n"


def test_a_report_that_fails_loses_nothing_and_can_be_made_again(report: dict, finished: Plan) -> None:
    (finished.output / "report.html").mkdir()
    with pytest.raises(CommandError, match=r"every cell is finished. IsADirectoryError.*writes it again") as failed:
        write_report(report, finished.output, Path("images"))
    assert failed.value.exit_code == 1
    (finished.output / "report.html").rmdir()
    assert write_report(report, finished.output, Path("images")).is_file()


def test_the_words_follow_the_interval() -> None:
    row = {"a": "x", "b": "y", "metric": "accuracy", "mean": 0.04, "ci95": [-0.01, 0.09], "verdict": "tie"}
    assert "tie" in sentence(row | {"items_needed": 5000})
    assert "5,000 questions" in sentence(row | {"items_needed": 5000})
    assert "more questions alone" in sentence(row | {"items_needed": None})
    assert sentence(row | {"verdict": "win"}).startswith("x answers 4.0 points [−1.0, +9.0] more questions right")


def test_an_encoder_that_is_no_better_than_blind_is_named(finished: Plan) -> None:
    for cell in finished.cells:
        if cell.encoder == "random":
            blind = next(c for c in finished.cells if c.encoder == "blind" and c.seed == cell.seed)
            (cell.figures.parent / "question.jsonl").write_text((blind.figures.parent / "question.jsonl").read_text())
    text = markdown(compare_figures.collect(finished, {cell: {} for cell in finished.cells}, []))
    assert "random does not beat blind" in text
    assert "clips does not beat blind" not in text


def test_encoders_that_serve_several_seeds_are_named(finished: Plan) -> None:
    text = markdown(compare_figures.collect(finished, {cell: {} for cell in finished.cells}, []))
    assert "3 training runs stand on fewer different encoders (1 of clips, 1 of clip)" in text


def test_descriptions_are_compared_by_cider(place: Path, made: Path) -> None:
    lines = [
        {"question_id": i, "image": f"{i}.png", "text": "Describe.", "references": [f"a red cat number {i} on grass"]}
        for i in range(12)
    ]
    (place / "described.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = plan_of(place, encoders=ENCODERS[:2], seeds=1, question_file=place / "described.jsonl")
    answers = {
        cell: [
            {"question_id": i, "prompt": "Describe.", "image": f"{i}.png", "file": "described"}
            | {"text": f"a red cat number {i} on grass" if good else "nothing"}
            for i in range(12)
        ]
        for cell, good in zip(plan.cells, (True, False), strict=True)
    }
    found = compare_figures.metrics(plan, answers)
    assert list(found) == ["cider_d"]
    summary, (row,) = compare_figures.compare_metrics(plan, found)
    assert (row["metric"], row["verdict"], row["p_mcnemar"]) == ("cider_d", "win", None)
    assert summary[NAMES[1]]["cider_d"]["mean"] == 0


def test_a_report_of_descriptions_alone_has_its_differences(finished: Plan) -> None:
    report = compare_figures.collect(finished, {cell: {} for cell in finished.cells}, [])
    report["differences"] = [
        row | {"metric": "cider_d"} for row in report["differences"] if row["metric"] == "accuracy"
    ]
    for encoder in report["encoders"].values():
        encoder["metrics"] = {"cider_d": encoder["metrics"]["accuracy"]}
    page = write_report(report, finished.output, Path("images")).read_text()
    for text in (page, (finished.output / "report.md").read_text()):
        assert "CIDEr-D" in text
        assert "clips − blind" in text


def test_results_of_lmms_eval_are_joined(finished: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file as lmms-eval 0.7 writes it: task → "metric,filter" → value, with standard errors beside."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    plan = dataclasses.replace(finished, benchmarks=("gqa",))
    assert plan.benchmark_command(plan.cells[0])[2:7] == ["lmms_eval", "--model", "llava_hf", "--batch_size", "1"]
    for cell in plan.cells:
        folder = cell.directory / "benchmarks" / "model"
        folder.mkdir(parents=True)
        value = 0.6 if cell.encoder == NAMES[0] else 0.5 + 0.01 * cell.seed
        found = {"gqa": {"alias": "gqa", "exact_match,none": value, "exact_match_stderr,none": 0.01}}
        (folder / "20260101_000000_results.json").write_text(json.dumps({"results": found}))
    assert not is_done(plan, plan.cells[0])
    assert "gqa,pope" in dataclasses.replace(plan, benchmarks=("gqa", "pope")).benchmark_command(plan.cells[0])
    (plan.cells[0].directory / "benchmarks" / "tasks.json").write_text('{"tasks": ["gqa"]}')
    assert is_done(plan, plan.cells[0])
    assert "pope" in dataclasses.replace(plan, benchmarks=("gqa", "pope")).benchmark_command(plan.cells[0])
    report = compare_figures.collect(plan, {cell: {} for cell in plan.cells}, [])
    assert report["encoders"]["blind"]["benchmarks"] == {
        "gqa/exact_match": {"mean": pytest.approx(0.51), "sd": pytest.approx(0.01), "by_seed": [0.5, 0.51, 0.52]}
    }
    row = report["benchmark_differences"][0]
    assert (row["mean"], row["metric"]) == (pytest.approx(0.09), "gqa/exact_match")
    assert row["ci95"] == pytest.approx([0.09 - 0.0248414, 0.09 + 0.0248414], abs=1e-5)  # t of 2 degrees: 4.3027
    assert "gqa/exact_match" in markdown(report)


def test_the_estimate_comes_from_finished_cells_or_says_that_it_is_assumed(finished: Plan, place: Path) -> None:
    seconds, source = seconds_of_cell(finished)
    assert (seconds, source) == (35.0, "the mean of 12 finished cells")
    _, source = seconds_of_cell(plan_of(place / "elsewhere"))
    assert "assumption" in source
    with (place / "plan.txt").open("w") as file:
        print_plan(finished, Console(file=file, width=200))
    text = (place / "plan.txt").read_text()
    assert "0 of 12 to run" in text
    assert "about 0 min" in text


def test_the_script_refuses_and_explains_without_a_traceback(made: Path) -> None:
    words = ["--encoders", "random,blind", "--train-flags", "--align.data_path align.json --vision clip"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "compare_encoders.py", *words],
        cwd=made, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--vision_tower is what the comparison itself sets" in done.stderr
    assert "Traceback" not in done.stderr
