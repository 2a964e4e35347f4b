"""A tiny comparison of encoders, finished without training anything: runs as run_run leaves them, without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_mllm import make_images, write_llm, write_run

from clips.common.files import sha256, write_json
from mllm.compare.analysis import REPORT, collect, keep_encoders
from mllm.compare.commands import fix_plan, stage_config
from mllm.compare.comparison import PLAN, Comparison, EncoderRun, stored_questions
from mllm.evaluation.report import metrics_of
from mllm.evaluation.scores import answer_line, score, scorer_version
from mllm.training.build import encoder_of
from mllm.training.recipes import STAGES

ENCODERS = ("clips:clips-run", "clip:clip-run", "random", "blind")
NAMES = ("clips", "clip", "random", "blind")
SKILL = {"clips": 0.9, "clip": 0.55, "random": 0.5, "blind": 0.3}
FLAGS = (
    *("--model_name_or_path", "llm", "--image_folder", "images", "--batch_size", "4"),
    *("--align.data_path", "align.json", "--instruct.data_path", "instruct.json"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders, a language model, data and questions; `place` makes it the current directory."""
    root = tmp_path_factory.mktemp("compare")
    write_run(root / "clips-run", seed=1)
    write_run(root / "clip-run", "clip", seed=2)
    write_llm(root / "llm")
    names = make_images(root / "images", 12)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red cat"}]
    more = [{"from": "human", "value": "And now?"}, turns[1]]
    captions = [{"id": name, "image": name, "conversations": turns} for name in names]
    records = [{"id": name, "image": name, "conversations": turns + more * (i % 3)} for i, name in enumerate(names)]
    text_only = [{"id": f"t{i}", "conversations": [{"from": "human", "value": "Hello"}, turns[1]]} for i in range(4)]
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


def comparison_of(output: Path, **options: object) -> Comparison:
    settings = {"encoders": ENCODERS, "seeds": 3, "output": output / "out", "train_flags": FLAGS, "device": "cpu"}
    settings |= {"questions": Path("question.jsonl"), "image_folder": Path("images")}
    return Comparison(**settings | options)


def finish(comparison: Comparison) -> Comparison:
    """Fix it, and write every run; an encoder's models are right as often as SKILL says."""
    fix_plan(comparison)
    for run in comparison.runs:
        write_run_record(comparison, run, SKILL[run.kind])
    return comparison


def _fingerprint(comparison: Comparison, run: EncoderRun, number: int) -> str:
    """Of the encoder of a stage. `random` and `blind` are drawn for each seed; other encoders are one in all runs."""
    key = (Path.cwd(), run.vision, run.variant, comparison, number, run.seed * (run.kind in ("random", "blind")))
    if key not in _FINGERPRINTS:
        _FINGERPRINTS[key] = encoder_of(stage_config(comparison, run, number)).fingerprint
    return _FINGERPRINTS[key]


_FINGERPRINTS: dict[Any, str] = {}


def write_run_record(comparison: Comparison, run: EncoderRun, skill: float) -> None:
    """A finished run; a question is answered right with chance `skill`."""
    config = {}
    for number, stage in STAGES.items():
        trains = stage_config(comparison, run, number).on(torch.device("cpu")).what_trains()
        trains["vision_fingerprint"] = _fingerprint(comparison, run, number)
        facts = {"language model": "tiny", "vision encoder": run.vision, "projector": "mlp2x_gelu, random"}
        config[stage.name] = {"trains": trains, "facts": facts, "freeze": {"projector": "full"}}
        done = {"stage": stage.name, "steps": 3, "samples": 12, "samples_per_s": 5.0, "peak_memory_gb": 0.5}
        (run.directory / stage.name).mkdir(parents=True)
        (run.directory / stage.name / "done.json").write_text(json.dumps(done))
    write = {"config": config, "env": {"device": "cpu"}, "cost": {"align": 10.0, "instruct": 20.0, "evaluation": 5.0}}
    write["run"] = {
        "encoder": run.encoder,
        "vision": run.vision,
        "pretraining_seed": run.pretraining_seed,
        "seed": run.seed,
        "evaluation": comparison.evaluation_settings(),
        "plan": sha256(comparison.output / PLAN),
    }
    for name, content in write.items():
        (run.directory / f"{name}.json").write_text(json.dumps(content))
    rng = np.random.default_rng([comparison.names.index(run.encoder), run.seed])
    run.evaluation.mkdir()
    sets, metrics = {}, {}
    for name, path in stored_questions(comparison.output).items():
        questions = comparison.asked(path)
        texts = [q.answer or "an image" if rng.random() < skill else "<b>no" for q in questions]
        answers = run.evaluation / f"{name}.jsonl"
        lines = [json.loads(answer_line(q, text, run.name)) for q, text in zip(questions, texts, strict=True)]
        for line in lines if "likelihood" in comparison.evaluation_settings() else ():
            line |= {"log_likelihood": np.log(skill) - rng.random(), "share": skill * rng.random()}
        answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sets[name] = {"answers": {"file": answers.name, "sha256": sha256(answers)}}
        metrics |= metrics_of(name, score(questions, texts), lines)
    write_json(run.metrics, {"scorer": scorer_version(), "sets": sets, "metrics": metrics})


def collected(comparison: Comparison, measured: Mapping[EncoderRun, Any], command: Sequence[str]) -> dict[str, Any]:
    """The content of report.json, by the plan that was fixed or is asked for now."""
    keep_encoders(comparison.output, measured)
    return collect(comparison, fix_plan(comparison), command)


def reported(comparison: Comparison) -> dict[str, Any]:
    """report.json, written and read again."""
    report = collected(comparison, {run: {} for run in comparison.runs}, ["scripts/compare_encoders.py"])
    write_json(comparison.output / REPORT, report)
    return json.loads((comparison.output / REPORT).read_text())
