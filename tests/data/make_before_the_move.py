#!/usr/bin/env python
"""Make before_the_move.tar.xz: run directories as the last commit before the modules moved into rooms wrote them.

    git worktree add ../before 72df3d0
    python tests/data/make_before_the_move.py ../before

Everything in it was written by that commit's own scripts on one CPU thread, in an empty directory that they were
started from, so that all paths are relative. Models are as small as they can be; nothing but their tests needs them.

    data/ images/ align.json instruct.json question.jsonl llm/    what the commands read
    runs/finished    a pretraining run to its end (Muon)          runs/llava            both stages, evaluated
    runs/stopped     killed after its first checkpoint (AdamW)    runs/llava-stopped    killed in stage 2 (LoRA)
    runs/compare     two encoders pretrained, two cells           talk.json talk_0.png  /save of a chat with runs/llava
    commands.json    what was run: name → script and flags
    expected/        what the old code made of it: features, and the weights where the killed runs came to in the end

Changed after the old code wrote them, and nothing else:
- left out: TensorBoard's files (named after the host), logs, locks, curves, the pictures in report/ (inside its page
  too), a comparison's page; of the comparison also weights and checkpoints, but for the exports that its cells load
- env.json and report.json say "Linux" without the kernel's version
"""

from __future__ import annotations

import importlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

OUTPUT = Path(__file__).resolve().parent / "before_the_move.tar.xz"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (245, 245, 245)}
LEFT_OUT = ("tensorboard", "report/*.png", "*.log", ".lock", "*.lock", "curves.png", "report.html", "report.md")
LEFT_OUT_OF_COMPARISON = ("checkpoints", "LATEST", "native", "open_clip", "model", "adapter", "mm_projector.bin")

TINY = (
    "train.precision=fp32 train.log_every=1 train.checkpoint_every=48 train.keep_checkpoints=1 model.embed_dim=8 "
    "model.vision.width=8 model.vision.layers=1 model.vision.image_size=32 "
    "model.text.width=8 model.text.layers=1 model.text.vocab_size=80 model.text.context_length=16"
)
CAPTIONER = "model.captioner.width=8 model.captioner.length=16"
PRETRAIN = "--debug --data data/train.tar --val-data data/test.tar --test-data data/test.tar"
LLAVA = (
    "--model_name_or_path llm --image_folder images --align.data_path align.json --instruct.data_path instruct.json "
    "--batch_size 4 --learning_rate 1e-2 --bf16 False --logging_steps 1"
)
LORA = "--lora_enable --lora_r 2 --lora_alpha 4 --save_steps 10"
TRAIN_LLAVA = f"train_llava.py --vision clips:runs/finished --device cpu {LLAVA} --num_train_epochs 30"
COMMANDS = {
    "finished": f"pretrain_clips.py --name finished --device cpu {PRETRAIN} --samples 48 --set {TINY} {CAPTIONER}",
    "stopped": f"pretrain_clips.py --name stopped --device cpu {PRETRAIN} --samples 480 --set {TINY} {CAPTIONER} "
    "optim.kind=adamw",
    "llava, align": f"{TRAIN_LLAVA} --stage 1 --output_dir runs/llava",
    "llava, instruct": f"{TRAIN_LLAVA} --stage 2 --output_dir runs/llava",
    "llava-stopped": f"{TRAIN_LLAVA} --stage 2 --output_dir runs/llava-stopped {LORA}",
    "evaluate": "evaluate_llava.py --model-path runs/llava/model --question-file question.jsonl "
    "--image-folder images --dtype float32 --device cpu",
    "chat": "chat.py --model-path runs/llava/model --device cpu",
    "compare": "compare_encoders.py --encoders clips,clip --seeds 1 --jobs 1 --output runs/compare --device cpu "
    f"--question-file question.jsonl --question-images images '--pretrain-flags={PRETRAIN} --samples 48 --set {TINY}' "
    f"'--train-flags={LLAVA} --num_train_epochs 12'",
}
"""Name → script and flags; the tests give the same ones to today's scripts."""


class OldCode:
    """The checkout of the old commit: its scripts as processes, its modules in this one."""

    def __init__(self, checkout: Path, place: Path, cache: Path) -> None:
        self.checkout, self.place = checkout, place
        paths = os.pathsep.join([str(checkout), str(checkout / "tests" / "unit")])
        self.env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.env["CLIPS_MLLM_CACHE"] = str(cache)
        sys.path[:0] = paths.split(os.pathsep)
        torch.set_num_threads(1)

    def module(self, name: str):
        found = importlib.import_module(name)
        assert Path(found.__file__).is_relative_to(self.checkout), f"{name} is not the old commit's: {found.__file__}"
        return found

    def command(self, name: str) -> list[str]:
        script, *flags = shlex.split(COMMANDS[name])
        return [sys.executable, f"../checkout/scripts/{script}", *flags]  # a report quotes its command

    def run(self, name: str, text: str | None = None) -> None:
        print(f"--- {name}", file=sys.stderr)
        subprocess.run(self.command(name), cwd=self.place, env=self.env, input=text, text=True, check=True)

    def run_and_kill(self, name: str, when: Callable[[], bool]) -> None:
        print(f"--- {name}, killed on the way", file=sys.stderr)
        process = subprocess.Popen(self.command(name), cwd=self.place, env=self.env, start_new_session=True)
        while not when():
            assert process.poll() is None, f"{name} ended before it could be killed"
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def picture(colour: str, number: int) -> bytes:
    image = Image.new("RGB", (32, 28), COLOURS[colour])
    image.paste((0, 0, 0), (number % 20, number % 16, number % 20 + 6, number % 16 + 6))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_inputs(place: Path, old: OldCode) -> None:
    """Captioned pictures in shards, conversations and questions about pictures, a tiny Llama."""
    (place / "data").mkdir()
    for split, numbers in (("train", range(24)), ("test", range(24, 32))):
        with tarfile.open(place / "data" / f"{split}.tar", "w") as tar:
            for number in numbers:
                colour = list(COLOURS)[number % 4]
                long = f"A {colour} picture. It has a black box. The number is {number}."
                parts = {"png": picture(colour, number), "txt": long.encode()}
                parts["json"] = json.dumps({"org_caption": f"{colour} picture {number}"}).encode()
                for extension, data in parts.items():
                    member = tarfile.TarInfo(f"{number:03d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (place / "images").mkdir()
    align, instruct, questions = [], [], []
    for number in range(8):
        colour, name = list(COLOURS)[number % 4], f"{number}.png"
        (place / "images" / name).write_bytes(picture(colour, 3 * number))
        for records, answer in ((align, f"A {colour} picture"), (instruct, colour)):
            said = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": answer}]
            records.append({"id": name, "image": name, "conversations": said})
        questions.append({"question_id": number, "image": name, "text": "Which colour?", "kind": "colour"})
        questions[-1]["answer"] = colour
    (place / "align.json").write_text(json.dumps(align))
    (place / "instruct.json").write_text(json.dumps(instruct))
    (place / "question.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "initializer_range": 0.1}
    old.module("tiny_mllm").write_llm(place / "llm", **tiny)


def features(old: OldCode, place: Path) -> dict[str, torch.Tensor]:
    """What the old code makes of every way to name the two runs: normalised image and text features, [8, 8] each."""
    export = old.module("clips.export")
    source = old.module("clips.data.sources").open_source(
        str(place / "data" / "test.tar"), old.module("clips.config").Fields(), image_root=None, need_long=False
    )
    images, texts = export.sample_inputs(source, 32)
    found = {}
    for name in ("finished", "finished/export", "finished/export/open_clip", "stopped"):
        loaded = export.load_model(place / "runs" / name)
        ids = loaded.tokenizer(texts, loaded.model.config.text.context_length, trim=False)
        with torch.no_grad():
            found[f"{name}: images"] = loaded.model.encode_image(images)
            found[f"{name}: texts"] = loaded.model.encode_text(ids)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def make(old: OldCode, place: Path) -> None:
    runs, expected = place / "runs", place / "expected"
    write_inputs(place, old)
    expected.mkdir()
    (place / "commands.json").write_text(json.dumps(COMMANDS, indent=2) + "\n")
    old.run("finished")
    old.run_and_kill("stopped", (runs / "stopped" / "LATEST").exists)
    save_file(features(old, place), expected / "features.safetensors")
    old.run("llava, align")
    shutil.copytree(runs / "llava", runs / "llava-stopped")
    old.run("llava, instruct")
    old.run("evaluate")
    stage = runs / "llava-stopped" / "instruct"
    old.run_and_kill("llava-stopped", lambda: any(stage.glob("checkpoint-*/MANIFEST.json")))
    old.run("chat", "/image images/5.png\nWhich colour?\n/image images/2.png\nWhich colour?\n/save talk.json\n")
    old.run("compare")

    for name, weights in (("stopped", "export/native"), ("llava-stopped", "model")):
        shutil.copytree(runs / name, place / "as-killed")
        old.run(name)
        shutil.copy(runs / name / weights / "model.safetensors", expected / f"{name}.safetensors")
        shutil.copy(runs / name / "metrics.jsonl", expected / f"{name}.jsonl")
        shutil.rmtree(runs / name)
        (place / "as-killed").rename(runs / name)


def tidy(place: Path) -> None:
    """See "Changed" at the top of this file."""
    comparison = place / "runs" / "compare"
    unwanted = [path for pattern in LEFT_OUT for path in place.rglob(pattern)]
    unwanted += [path for pattern in LEFT_OUT_OF_COMPARISON for path in comparison.rglob(pattern)]
    for path in unwanted:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for page in place.rglob("report/index.html"):
        page.write_text(re.sub(r"data:image/[^\"']+", "data:,", page.read_text()))
    for path in (*place.rglob("env.json"), comparison / "report.json"):
        path.write_text(path.read_text().replace(platform.platform(), "Linux"))


def assert_names_nobody(place: Path, paths: list[str], host: str) -> None:
    """No file holds a path of this machine, nor its name (which random weights may spell, if it is short)."""
    for file in filter(Path.is_file, place.rglob("*")):
        data = file.read_bytes()
        found = [path for path in paths if path.encode() in data]
        if b"\0" not in data:
            found += re.findall(rf"\b{re.escape(host)}\b", data.decode(errors="replace"))
        assert not found, f"{file} holds {found}"


def pack(place: Path, output: Path) -> None:
    """The directory as one archive, without its maker's name; times stay, for an export is used if it is the newer."""

    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(output, "w:xz", preset=9) as tar:
        for path in sorted(place.iterdir()):
            tar.add(path, path.name, filter=anonymous)


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    directory = Path(tempfile.mkdtemp())  # stays if something fails
    (directory / "checkout").symlink_to(checkout)
    place = directory / "place"
    place.mkdir()
    make(OldCode(checkout, place, directory / "cache"), place)
    tidy(place)
    assert_names_nobody(place, [str(directory), str(checkout), str(Path.home())], platform.node())
    pack(place, OUTPUT)
    shutil.rmtree(directory)
    print(f"{OUTPUT}: {OUTPUT.stat().st_size / 1e3:.0f} KB", file=sys.stderr)


if __name__ == "__main__":
    main()
