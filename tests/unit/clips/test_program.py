"""Whole programs side by side, and the parts of a step: what is timed is what is said, on equal terms."""

from __future__ import annotations

import json
import re
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, run_python

from clips.common.errors import CommandError, UserError
from clips.common.plots import LIGHT
from clips.data.demo import ensure_demo
from clips.model.clips import CLIPSModel
from clips.studies import program
from clips.studies.pictures import merged, profile_plot, write_profile
from clips.studies.program import THEIRS, Turn
from clips.training.cli import config_from_flags, parser

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo(tmp_path_factory.mktemp("demo") / "demo", sizes={"train": 60, "val": 8, "test": 8})


# ------------------------------------------------------------------------------------------------------------ watching
STEADY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("worker", child.pid, flush=True)
time.sleep(0.4)
for step in range(0, 200, 2):
    print(f"Train Epoch: 0 [ {10 * step:>4}/2000 (1%)] Loss: 1", file=sys.stderr, flush=True)
    end = time.process_time() + 0.01
    while time.process_time() < end:
        pass
    time.sleep(0.01)
"""


def test_a_program_is_timed_by_its_log_and_ended_with_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "steady.py"
    script.write_text(STEADY.replace('"worker", child.pid', f'child.pid, file=open("{tmp_path}/pid", "w")'))
    turn = program.watch([sys.executable, str(script)], THEIRS, 400, CPU)
    assert 0 < turn.samples_per_s < 20 / 0.02  # 20 samples in 0.02 s and more
    assert 0 < turn.samples_per_s < turn.samples_per_cpu_s < 1.5 * 20 / 0.01  # counted in hundredths of a second
    assert turn.startup_s >= 0.4
    assert turn.peak_memory_MB > 1
    worker = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_program_that_ends_early_is_told_with_its_last_words() -> None:
    with pytest.raises(CommandError, match=r"ended with 3 before its turn:\nno such shard"):
        program.watch([sys.executable, "-c", "print('no such shard'); exit(3)"], THEIRS, 400, CPU)


def test_a_python_without_the_trainer_is_refused() -> None:
    with pytest.raises(UserError, match=r"nowhere cannot be started"):
        program.compare_programs("demo", "clip", "long", device=CPU, repeats=1, train=Path(), their_python="/nowhere")


def test_ratios_are_of_turns() -> None:
    ours, theirs = [Turn(s, 9, 1, 50) for s in (30, 10, 21)], [Turn(s, 3, 2, 100) for s in (10, 5, 10)]
    found = program.summary(ours, theirs)
    assert found["ratios"] == {
        "samples_per_s": pytest.approx(2.1), "samples_per_s_lowest": 2, "samples_per_s_highest": 3,
        "samples_per_cpu_s": 3, "peak_memory": 0.5,
    }  # fmt: skip
    assert (found["ours"]["samples_per_s"], found["theirs"]["startup_s"]) == (21, 2)
    assert [turn["samples_per_s"] for turn in found["theirs"]["turns"]] == [10, 5, 10]


# --------------------------------------------------------------------------------------------------------- equal terms
@pytest.mark.parametrize(("size", "objective"), [("demo", "clip"), ("demo", "clips"), ("s16", "clip")])
def test_both_programs_train_the_same(size: str, objective: program.Objective, demo: Path, tmp_path: Path) -> None:
    """open_clip's own parser takes the flags, and what they and its configuration say is what our run says."""
    import open_clip
    from open_clip_train.params import parse_args

    run = config_from_flags(parser().parse_args(program.our_flags(size, objective, CPU, demo / "train", tmp_path)))
    stock = program.write_stock_config(run, objective, tmp_path)
    theirs = parse_args(program.their_flags(run, CPU, demo / "train", stock, tmp_path / "logs"))
    phase = run.phases[0]
    assert (theirs.batch_size, theirs.train_num_samples) == (phase.batch_size, phase.samples)
    assert (theirs.lr, theirs.wd, theirs.workers) == (phase.lr, run.optim.weight_decay, run.data.workers)
    assert theirs.log_every_n_steps == run.train.log_every
    assert theirs.train_data.count("::") == len(list((demo / "train").glob("*.tar"))) - 1
    assert (theirs.precision == "amp_bf16") == (run.train.precision == "bf16")
    assert not run.train.activation_checkpointing
    model, _, _ = open_clip.create_model_and_transforms(theirs.model, output_dict=True)
    assert model.visual.image_size == (phase.image_size, phase.image_size)
    theirs.distill, theirs.rank, theirs.world_size = False, 0, 1  # as its main sets them
    assert type(open_clip.create_loss(theirs)).__name__ == ("ClipLoss" if objective == "clip" else "CoCaLoss")
    ours = CLIPSModel(run.model, pad_id=0)
    assert len(model.visual.transformer.resblocks) == run.model.vision.layers
    assert len(model.text.transformer.resblocks) == run.model.text.layers
    if objective == "clip":  # theirs has no patch bias, and a CLS of the text that is no token
        stock_size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert stock_size + run.model.vision.width - run.model.text.width == ours.parameter_counts()["total"]
    texts = open_clip.get_tokenizer(theirs.model)(["a red cat"])
    assert texts.shape[1] == (run.model.text.context_length - 1 if objective == "clip" else run.model.captioner.length)


def test_web_captions_stand_where_open_clip_reads(demo: Path, tmp_path: Path) -> None:
    folder = program._with_web_captions(demo / "train", tmp_path / "web")
    (shard, *_) = sorted(folder.glob("*.tar"))
    with tarfile.open(shard) as new, tarfile.open(demo / "train" / shard.name) as old:
        assert new.getnames() == old.getnames()
        for name in new.getnames():
            got, before = new.extractfile(name).read(), old.extractfile(name).read()
            if name.endswith(".txt"):
                before = json.loads(old.extractfile(name.replace(".txt", ".json")).read())["org_caption"].encode()
            assert got == before


@pytest.mark.slow
def test_both_programs_run(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset", reason="open_clip's trainer needs it: pip install 'open_clip_torch[training]'")
    monkeypatch.setitem(program.SIZES, "demo", ("clip_baseline", "demo", 8, 10))
    found = program.compare_programs(
        "demo", "clip", "long", device=CPU, repeats=1, train=demo / "train", their_python=sys.executable
    )
    assert all(found[name]["samples_per_s"] > 0 for name in ("ours", "theirs"))


# ------------------------------------------------------------------------------------------------------ parts of a step
PARTS = """
import json, torch
from conftest import tiny_batch, tiny_run
from clips.common.runtime import init_distributed
from clips.data.tokenizer import build_tokenizer
from clips.model.flops import training_flops
from clips.studies.benchmark import clips_engine
from clips.studies.measuring import in_child, in_ranks
from clips.studies.step_parts import part_rows
CPU = torch.device("cpu")
def measured():
    init_distributed(CPU)
    batches = [tiny_batch(seed) | {"skipped": [], "keys": []} for seed in range(6)]
    engine = clips_engine(tiny_run(), build_tokenizer("wordpiece", ["a cat"] * 8, vocab_size=64), CPU)
    rows = part_rows(engine, iter(batches), 1e12)
    flops = [sum(training_flops(engine.model.config, engine.task.shape(batch)).values()) for batch in batches[3:]]
    return {"rows": rows, "flops": flops}
if __name__ == "__main__":
    print(json.dumps([in_child(measured), in_ranks(2, measured)]))
"""


@pytest.mark.slow
def test_the_parts_make_up_the_step(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(PARTS)
    done = run_python(tmp_path / "parts.py", env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert done.returncode == 0, done.stderr
    ways = [f"{part}, {way}" for way in ("forward", "backward")
            for part in ("image tower", "text tower", "captioner", "head and losses")]  # fmt: skip
    parts = ["data wait", "copy to the device", *ways, "communication", "finite check", "optimiser"]
    sent = []
    for found in json.loads(done.stdout.splitlines()[-1]):
        *rows, whole = found["rows"]
        assert [row["part"] for row in rows] == parts
        assert sum(row["ms"] for row in rows) == pytest.approx(whole["ms"])
        assert sum(row["share_%"] for row in rows) == pytest.approx(100)
        computed = sum(1e9 * row["tflops"] * row["ms"] for row in rows if "tflops" in row)
        assert min(found["flops"]) * 0.9 < computed < max(found["flops"]) * 1.1  # medians over three batches
        assert whole["of_peak_%"] == pytest.approx(100 * whole["tflops"])
        sent.append(rows[-3]["share_%"])
    assert sent[1] > 2 * sent[0]  # the gradients of two ranks beside one rank's agreement with itself


def test_the_parts_are_drawn_with_both_ways_as_one_bar(tmp_path: Path) -> None:
    rows = [
        {"setting": "a", "part": "data wait", "ms": 1.0, "share_%": 10.0},
        {"setting": "a", "part": "image tower, forward", "ms": 3.0, "share_%": 30.0, "of_peak_%": 40.0},
        {"setting": "a", "part": "image tower, backward", "ms": 6.0, "share_%": 60.0, "of_peak_%": 10.0},
        {"setting": "a", "part": "whole step", "ms": 10.0, "share_%": 100.0, "of_peak_%": 18.0},
    ]
    wait, tower, whole = merged([{"of_peak_%": 0.0, **row} for row in rows])
    assert (wait["ms"], wait["of_peak_%"]) == ([1.0, 0.0], 0.0)
    assert (tower["ms"], tower["share_%"], tower["of_peak_%"]) == ([3.0, 6.0], 90.0, pytest.approx(20.0))
    assert whole["of_peak_%"] == pytest.approx(18.0)
    report = tmp_path / "profile.json"
    report.write_text(json.dumps({"machine": {"device": "cpu, 1 threads"}, "rows": rows}))
    picture = write_profile(report, tmp_path / "made" / "profile.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    (axes,) = profile_plot({"a": [wait, tower, whole]}, "cpu", LIGHT).axes
    assert [bar.get_width() for bar in axes.patches] == [1.0, 3.0, 0.0, 6.0]
    assert [text.get_text() for text in axes.texts] == ["10 %", "90 %, 20 % of peak"]


@pytest.mark.parametrize(("content", "name"), [("{", "a.png"), ('{"rows": [{}]}', "a.png"), ("[]", "a.jpg")])
def test_what_is_no_profile_is_not_drawn(tmp_path: Path, content: str, name: str) -> None:
    report = tmp_path / "profile.json"
    report.write_text(content)
    with pytest.raises(UserError, match=r"not written by|name it \.png or \.svg"):
        write_profile(report, tmp_path / name)


FAULTS = """
import resource, torch
from clips.common.runtime import keep_freed_memory
print(keep_freed_memory())
for turn in range(6):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="an option of glibc")
def test_freed_memory_is_kept_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    """40 MB five times over are 48,828 pages of 4 KB."""
    (tmp_path / "faults.py").write_text(FAULTS)
    kept = run_python(tmp_path / "faults.py").stdout.split()
    asked = run_python(tmp_path / "faults.py", env={"MALLOC_TRIM_THRESHOLD_": "131072"}).stdout.split()
    assert (kept[0], asked[0]) == ("True", "False")
    assert int(kept[1]) < 0.2 * int(asked[1])


BITS = """
import hashlib, torch
from clips.common.runtime import init_distributed
from clips.studies.accumulation import a_run, an_engine, random_batches, step_of
CPU = torch.device("cpu")
init_distributed(CPU)
run = a_run(CPU, 1, 64, "micro")
torch.manual_seed(0)
batches, engine = random_batches(run, 1, 64), an_engine(run, CPU)
step = step_of(engine, batches)
for _ in range(3):
    step()
digest = hashlib.sha256()
for _, weights in sorted(engine.state.gather_weights().items()):
    digest.update(weights.numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_memory_that_is_kept_changes_no_bit(tmp_path: Path) -> None:
    """Three steps of the demo's model, in memory of glibc's own ways and in memory that was used before."""
    (tmp_path / "bits.py").write_text(BITS)
    found = [run_python(tmp_path / "bits.py", env=env) for env in ({}, {"MALLOC_TRIM_THRESHOLD_": "131072"})]
    assert all(done.returncode == 0 for done in found), found[0].stderr[-3000:] + found[1].stderr[-3000:]
    kept, asked = (done.stdout.splitlines()[-1] for done in found)
    assert len(kept) == 64
    assert kept == asked


def test_progress_of_both_logs_is_found() -> None:
    ours = re.search(program.OURS, "[   12,800/80,000]  /s 645  loss 3.2")
    theirs = THEIRS.search("2026-01-01,00:00:00 | INFO | Train Epoch: 0 [ 1280/12800 (10%)] Data (t): 0.1")
    assert (ours and ours[1], theirs and theirs[1]) == ("12,800", "1280")
