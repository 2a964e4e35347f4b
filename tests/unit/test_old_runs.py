"""What the code wrote before its modules moved into rooms is read by today's: runs load, go on, chat and compare.

The directories are real ones, packed by tests/data/make_before_the_move.py, which says how they came about. Figures
are compared within tolerances, for matrix products round differently on other processors.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_python
from PIL import Image
from safetensors.torch import load_file

from clips.common.files import seal
from clips.common.runtime import has_bf16
from clips.config import Fields
from clips.data.sources import open_source
from clips.weights.export import sample_inputs
from clips.weights.load import load_model
from mllm.chat.model import ChatModel
from mllm.chat.session import ChatSession
from mllm.encoders.registry import load_vision

ARCHIVE = ROOT / "tests" / "data" / "before_the_move.tar.xz"
FEATURES = {"atol": 1e-6, "rtol": 0.0}
"""Of L2-normalised features, which one forward pass gives."""
AFTER_TRAINING = {"atol": 1e-5, "rtol": 1e-5}
"""Of losses and weights after dozens of steps. On the machine that made the archive they are equal bit by bit; with the
kernels of processors without AVX they differ by 3e-7 at most."""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(place, filter="data")
    for path in place.glob("runs/*/checkpoints/*/state.json"):
        state = json.loads(path.read_text())
        del state["best"]  # no release ever wrote it
        path.write_text(json.dumps(state))
        seal(path.parent)
    return place


@pytest.fixture
def place(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that the old commands were started from, for one test to write in."""
    monkeypatch.setenv("CLIPS_MLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(shutil.copytree(unpacked, tmp_path / "place"))
    return tmp_path / "place"


RENAMED = {"evaluate_llava.py": {"--model-path": "--model", "--question-file": "--questions"}}
"""Script → the flags that it took then → their names now."""


def same_command(place: Path, name: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Today's script with the flags that the old one was given, and the recipe that it knew."""
    script, *flags = shlex.split(json.loads((place / "commands.json").read_text())[name])
    flags = [RENAMED.get(script, {}).get(flag, flag) for flag in flags]
    done = run_python(ROOT / "tests" / "first_demo.py", script, *flags, *more, cwd=place, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(path: Path) -> list[tuple[str, int, float]]:
    """(stage, step, loss) of each line of a metrics.jsonl that tells of training."""
    return [(line.get("stage", ""), line["step"], line["loss"]) for line in json_lines(path) if "loss" in line]


def files(directory: Path) -> dict[str, int]:
    """Path → when it was written."""
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Every value of nested JSON, by its path."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {path: tree}
    return {name: leaf for key, value in items for name, leaf in leaves(value, f"{path}/{key}").items()}


def assert_same_figures(old: Any, new: Any) -> None:
    """Everything in the JSON `old` stands in `new` too, numbers within rounding; `new` may hold more."""
    before, after = leaves(old), leaves(new)
    pairs = {path: (value, after.get(path, "lacking")) for path, value in before.items()}
    assert pairs
    assert not {path: (a, b) for path, (a, b) in pairs.items() if a != b and not is_rounding(a, b)}


def is_rounding(a: Any, b: Any) -> bool:
    return isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def assert_went_on(run_dir: Path, weights: str, expected: Path) -> None:
    """Every step stands once in metrics.jsonl, and losses and final weights are those that the old code came to."""
    found, wanted = losses(run_dir / "metrics.jsonl"), losses(expected.with_suffix(".jsonl"))
    assert [line[:2] for line in found] == [line[:2] for line in wanted]
    logged = [torch.tensor([line[2] for line in lines]) for lines in (found, wanted)]
    torch.testing.assert_close(*logged, **AFTER_TRAINING)
    tensors = [without_key_biases(load_file(path)) for path in (run_dir / weights, expected)]
    torch.testing.assert_close(*tensors, **AFTER_TRAINING)


def without_key_biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Attention does not see a bias of its keys, so its gradient is nothing but rounding, of which AdamW, which divides
    a gradient by its own size, makes whole steps: on another processor they go elsewhere."""
    for name, tensor in weights.items():
        if name.endswith("attn.qkv.bias"):
            tensor.chunk(3)[1].zero_()
    return weights


# ---------------------------------------------------------------------------------------------- pretraining


def test_runs_exports_and_checkpoints_give_the_features_that_they_gave(place: Path) -> None:
    expected = load_file(place / "expected" / "features.safetensors")
    images, texts = sample_inputs(open_source("data/test.tar", Fields(), image_root=None, need_long=False), 32)

    def check(directory: str, name: str) -> None:
        loaded = load_model(place / "runs" / directory)
        ids = loaded.tokenizer(texts, loaded.model.config.text.context_length, trim=False)
        with torch.no_grad():
            found = {"images": loaded.model.encode_image(images), "texts": loaded.model.encode_text(ids)}
        for kind, features in found.items():
            torch.testing.assert_close(features, expected[f"{name}: {kind}"], **FEATURES)

    for directory in ("finished", "finished/export", "finished/export/native", "finished/export/open_clip", "stopped"):
        check(directory, "finished/export" if directory.endswith("native") else directory)
    shutil.rmtree(place / "runs" / "finished" / "export")
    check("finished", "finished")  # from its checkpoint


def test_an_encoder_has_the_fingerprint_that_trainings_on_it_wrote_down(place: Path) -> None:
    """On it depend caches of features, resumed stages and the cells of a comparison."""
    for stage, record in json.loads((place / "runs" / "llava" / "config.json").read_text()).items():
        trains = record["trains"]
        vision = load_vision(
            trains["vision_tower"],
            select_layer=trains["mm_vision_select_layer"],
            image_aspect_ratio=trains["image_aspect_ratio"],
        )
        assert vision.fingerprint == trains["vision_fingerprint"], stage


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_measures_what_it_measured(place: Path) -> None:
    run_dir = place / "runs" / "finished"
    before = files(run_dir)
    assert "Next:" in same_command(place, "finished").stderr
    assert {name: time for name, time in files(run_dir).items() if not name.endswith(".lock")} == before

    figures = place / "figures.json"
    flags = ("--model", "runs/finished", "--device", "cpu", "--output", figures)
    done = run_python(ROOT / "scripts" / "evaluate_clips.py", *flags, cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    found, wanted = (json.loads(path.read_text())["figures"] for path in (figures, run_dir / "evaluation.json"))
    # Shares of eight images: rounding does not reach them. Figures that are measured since then stand beside them.
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_end_that_the_old_code_came_to(place: Path) -> None:
    run_dir = place / "runs" / "stopped"
    done = same_command(place, "stopped")
    assert "goes on from" in done.stderr
    assert_went_on(run_dir, "export/native/model.safetensors", place / "expected" / "stopped.safetensors")
    assert (run_dir / "report" / "index.html").is_file()


# ---------------------------------------------------------------------------------------------- LLaVA


def test_a_finished_model_chats_as_the_saved_talk_says(place: Path) -> None:
    (record,) = json.loads((place / "talk.json").read_text())
    turns, pictures = record["conversations"], iter(record["image"])
    model = ChatModel.load("runs/llava/model", device="cpu")
    session = ChatSession(model)
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        images = [Image.open(next(pictures)) for _ in range(question["value"].count("<image>\n"))]
        text = question["value"].replace("<image>\n", "")
        assert "".join(session.ask(text, images)) == answer["value"]
    session.save("again.json")
    (again,) = json.loads(Path("again.json").read_text())
    assert (again["conversations"], again["model"]) == (record["conversations"], record["model"])


@pytest.mark.slow
def test_a_finished_model_answers_questions_as_it_did(place: Path) -> None:
    old = place / "runs" / "llava" / "evaluation"
    same_command(place, "evaluate", "--output", "new")
    found, wanted = (json_lines(folder / "question.jsonl") for folder in (place / "new", old))
    assert [(line["question_id"], line["text"]) for line in found] == [(q["question_id"], q["text"]) for q in wanted]
    found, wanted = (json.loads((folder / "figures.json").read_text()) for folder in (place / "new", old))
    assert_same_figures(wanted["exact_match"], found["exact_match"])


# ---------------------------------------------------------------------------------------------- comparison


@pytest.mark.slow
def test_a_finished_comparison_runs_nothing_again_and_reports_the_same(place: Path) -> None:
    comparison = place / "runs" / "compare"
    old = json.loads((comparison / "report.json").read_text())
    if has_bf16(torch.device("cpu")):  # then answers are computed in it by default, which that of the archive's lacked
        for path in comparison.glob("cells/*/cell.json"):
            cell = json.loads(path.read_text())
            cell["evaluation"]["dtype"] = old["settings"]["evaluation"]["dtype"] = "bfloat16"
            path.write_text(json.dumps(cell))
    before = {part: files(comparison / part) for part in ("encoders", "cells")}
    done = same_command(place, "compare")
    assert "0 of 2 to run" in done.stderr
    assert {part: files(comparison / part) for part in before} == before
    new = json.loads((comparison / "report.json").read_text())
    assert new["time"] != old["time"], "it was written again"
    for stage in old["settings"]["stages"].values():
        del stage["projector"]  # where it started from, which is worded otherwise since
    for cell in old["cells"]:
        cell["directory"] = f"cells/{Path(cell['directory']).name}"  # below the comparison's own, since
    figures = [figure for encoder in old["encoders"].values() for figure in encoder["metrics"].values()]
    for row in [*old["differences"], *figures]:  # intervals are those of crossed random effects since
        row.pop("ci95")
        row.pop("items_needed", None)
    assert_same_figures({key: old[key] for key in old.keys() - {"command", "time", "environment"}}, new)
    assert new["fixed"]["differs"] == ["compare.json was written when 2 cell(s) had begun already"]
    assert (comparison / "report.html").stat().st_size > 10_000
