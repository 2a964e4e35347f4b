"""`bash scripts/quickstart.sh photos` as a user types it, on a miniature of the set; its trainings are a few steps."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import warm
from conftest import ROOT, run_group
from tiny_mllm import write_llm
from tiny_shop import products, write_hub

PYTHON = """
case "$*" in
  *-m\\ pip*) exit ;;
  *pretrain_clips.py*) set -- "$@" --debug --batch-size 8 --samples 24 ;;
  *build_questions.py*) set -- "$@" --min-count 2 --per-kind 4 ;;
  *train_llava.py*) set -- "$@" --model_name_or_path llm --align.max_steps 1 --instruct.max_steps 2 ;;
esac
exec {python} "$@"
"""
"""The environment's Python, which makes each step short."""


def repository(root: Path) -> Path:
    shutil.copytree(ROOT / "scripts", root / "scripts")
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def quickstart(root: Path, python: str, photos: Path) -> subprocess.CompletedProcess[str]:
    """The quickstart in `root` with `python`, a program of bash, as its environment's Python."""
    place = root.parent / "venv"
    (place / "bin").mkdir(parents=True)
    for name, body in (("python", python), ("pip", "")):
        path = place / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
    env = {"VENV": str(place), "PHOTOS": str(photos), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env["CLIPS_MLLM_CACHE"] = str(root.parent / "cache")
    command = ["bash", str(root / "scripts" / "quickstart.sh"), "photos"]
    return run_group(command, cwd=root.parent, env=os.environ | env, timeout=900)


@pytest.mark.slow
def test_photographs_become_a_model_that_chats(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    photos = write_hub(root / "my photos", products(300))
    write_llm(root / "llm", initializer_range=0.1)
    done = quickstart(root, PYTHON.format(python=warm.program(root)), photos)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].endswith("python scripts/chat.py --web --model runs/llava-photos/model")
    summary = done.stdout[done.stdout.index("Questions about photographs of the test") :]
    asked = r"  data/photos/test.tar/\d+.jpg\n    (W\w+ .*)\? .*\((?:right|wrong: .*)\)\n"
    assert re.findall(asked, summary)[:2] == ["What kind of product is this", "What colour is this product"]
    assert len(re.findall(asked, summary)) == 3
    row = r"(\w.*?) +│ +[\d.]+ │ +([\d.]+) │ +(\d+ to \d+)"
    assert len(re.findall(row, summary)) == 8
    assert ("answers: yes no", "50.0", "77 to 87") in re.findall(row, summary)
    metrics = json.loads(next(root.glob("runs/llava-photos/evaluation/*/results.json")).read_text())
    assert metrics["metrics"]["overall"]["items"] == 4 * 5
    evaluation = json.loads((root / "runs" / "photos" / "evaluation.json").read_text())
    assert "web_i2t_r1" in evaluation["metrics"]


def test_a_folder_of_tars_keeps_its_own_test(tmp_path: Path) -> None:
    root = repository(tmp_path / "repo")
    (root / "data" / "photos").mkdir(parents=True)
    (root / "data" / "photos" / "summary.txt").write_text("test, usage\n")
    (root / "fashion-train.tar").write_text("")
    done = quickstart(root, f'echo "$@" >>"{tmp_path}/calls"', root)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert (
        f"--data {root}/fashion-train.tar --test-data {root}/fashion-test.tar --key image --output data/photos" in calls
    )
    assert "--vision clips:runs/photos" in calls
