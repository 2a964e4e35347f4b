"""scripts/train_llava.sh as a user runs it, on a tiny language model; the result loads where this project cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT, run_group
from tiny_llava import conversation
from tiny_mllm import make_images, write_llm, write_run

from mllm.training.recipes import FREEZE

pytestmark = pytest.mark.slow

STOCK = """
import sys
sys.modules["clips"] = sys.modules["mllm"] = None  # cannot be imported, installed or not
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline

directory, image, output = sys.argv[1:]
model, info = LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
assert not any(info.values()), info
messages = [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": "What is it?"}]}]
chat = pipeline("image-text-to-text", model=directory)
answer = chat(text=messages, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
inputs = AutoProcessor.from_pretrained(directory).apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    logits = model.eval()(**inputs).logits
torch.save({"answer": answer, "logits": logits, "norm": sum(p.double().norm() for p in model.parameters())}, output)
"""


def command(place: Path, *words: str, script: str = "train_llava.sh") -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHON": str(warm.program(place)), "OMP_NUM_THREADS": "1"}
    env["CLIPS_MLLM_CACHE"] = str(place / "cache")
    start = ["bash"] if script.endswith(".sh") else [sys.executable]
    return run_group([*start, str(ROOT / "scripts" / script), *words], cwd=place, env=env, timeout=400)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    write_run(root / "runs" / "clips-demo")
    write_llm(root / "llm", initializer_range=0.1)
    names = make_images(root / "images", 8)
    for data, answer in (("align", "A red cat"), ("instruct", "two dogs")):
        records = [conversation(name, [("What is it?", answer)]) for name in names]
        (root / f"{data}.json").write_text(json.dumps(records))
    question = {"question_id": 1, "image": "0.png", "text": "What is it?", "kind": "what", "answer": "two dogs"}
    (root / "question.jsonl").write_text(json.dumps(question) + "\n")
    return root


FLAGS = ["--vision", "clips", "--model_name_or_path", "llm", "--image_folder", "images", "--device", "cpu"]
FLAGS += ["--align.data_path", "align.json", "--instruct.data_path", "instruct.json", "--batch_size", "4"]
FLAGS += ["--num_train_epochs", "40", "--learning_rate", "5e-3", "--logging_steps", "20"]


def test_one_command_trains_both_stages_and_leaves_a_stock_model_that_has_learned(place: Path) -> None:
    done = command(place, *FLAGS)
    assert done.returncode == 0, done.stderr[-3000:]
    run = place / "runs" / "llava-clips"
    config = json.loads((run / "config.json").read_text())
    assert set(config) == {"align", "instruct"}
    assert config["instruct"]["freeze"] == FREEZE["instruct"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in metrics} == {"align", "instruct"}
    units = ("samples_per_s", "samples_per_s_per_gpu", "tflops", "peak_memory_gb")
    assert all(line[unit] > 0 for line in metrics for unit in units)
    for stage in ("align", "instruct"):
        summary = json.loads((run / stage / "done.json").read_text())
        assert "mfu" not in summary, "nobody states the peak of a CPU"
        assert summary["samples_per_s_per_gpu"] == summary["samples_per_s"]
        assert summary["steps"] == 80
        assert min(summary["samples_per_s"], summary["tokens_per_s"], summary["peak_memory_gb"]) > 0
        assert (run / stage / "mm_projector.bin").is_file()
        assert f"{summary['samples_per_s']:.1f} samples/s" in done.stderr
    assert "'s peak" not in done.stderr
    assert (run / "env.json").is_file()
    assert (run / "curves.png").is_file()
    assert f"from {Path('runs/llava-clips/align/mm_projector.bin')}" in done.stderr
    card = (run / "model" / "README.md").read_text()
    assert "instruct.json: 8 samples" in card
    assert "align.json: 8 samples" in card

    stock = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, str(run / "model"), str(place / "images" / "0.png"), str(place / "out.pt")],
        cwd=place, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert stock.returncode == 0, stock.stderr[-3000:]
    output = torch.load(place / "out.pt", weights_only=True)
    assert output["answer"].strip() == "two dogs"
    assert torch.isfinite(output["logits"]).all()

    words = ["--model", "runs/llava-clips", "--questions", "question.jsonl", "--image-folder", "images"]
    evaluated = command(place, *words, "--device", "cpu", script="evaluate_llava.py")
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    (out,) = (run / "evaluation").glob("question-*")
    measured = json.loads((out / "results.json").read_text())
    assert measured["metrics"]["what"]["value"] == 100
    assert json.loads((out / "question.jsonl").read_text())["text"] == "two dogs"


def test_dry_run_prints_both_commands_and_the_plan_and_writes_nothing(place: Path) -> None:
    done = command(place, *FLAGS, "--output_dir", "runs/dry", "--dry-run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (place / "runs" / "dry").exists()
    commands = [f"python scripts/train_llava.py --stage {number}" for number in (1, 2)]
    for what in (*commands, "stage 1: align", "stage 2: instruct", "80 of 4 samples", "no ZeRO"):
        assert what in done.stderr, what


def test_one_file_of_captions_trains_both_halves_and_the_descriptions_are_measured(place: Path) -> None:
    """Odd columns are named once, for the encoder; an image that was held out is nowhere in training."""
    folder = place / "my"
    names = make_images(folder, 120, seed=1)
    rows = [
        {"Bild": name, "Saetze": ["two dogs" if i % 3 else "a red cat sits", f"dogs {i}"]}
        for i, name in enumerate(names)
    ]
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data", "my/my.jsonl", "--debug", "--name", "mine", "--device", "cpu", "--fields", "image=Bild"]
    done = command(place, *words, "web=Saetze", "long=others", script="pretrain_clips.py")
    assert done.returncode == 0, done.stderr[-3000:]
    words = [
        "--vision",
        "clips:runs/mine",
        "--data_path",
        "my/my.jsonl",
        "--output_dir",
        "runs/tells",
        "--device",
        "cpu",
    ]
    words += ["--model_name_or_path", "llm", "--batch_size", "8", "--num_train_epochs", "12", "--learning_rate", "5e-3"]
    words += ["--mm_vision_select_layer", "-1", "--align.mm_projector_init", "captions"]
    done = command(place, *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "projector's start: " in done.stderr, "it was silent"
    questions = [
        json.loads(line) for line in (place / "runs/tells/held_out/description.jsonl").read_text().splitlines()
    ]
    assert 0 < len(questions) < 60
    assert all(len(question["references"]) == 2 for question in questions)
    assert f"{120 - len(questions):,} samples, format plain, {len(questions)} held out" in done.stderr
    metrics = json.loads((place / "runs/tells/evaluation/results.json").read_text())
    assert metrics["metrics"]["cider_d"]["items"] == len(questions)
    assert metrics["metrics"]["cider_d_of_one_caption"]["caption"] == "two dogs"
    assert "cider d of one caption" in done.stderr
    assert (done.stderr.count("Next: "), "Next: python scripts/chat.py" in done.stderr) == (1, True)
    assert ">cider d</td>" in (place / "runs/tells/report/index.html").read_text()
    leaks = command(place, *words, "--stage", "2", "--held_out", "0.5")
    assert (leaks.returncode, "has seen images that stage 2 would hold out" in leaks.stderr) == (2, True)
