"""How often the host reads from the device: once a step, for what all ranks must know before it is taken, and to log.

Each read waits for everything that a GPU was given before. That wait cannot be put off to the next step: what is not
finite, a spike that is to be left out and a stop must be known before the weights change.
"""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT, run_python
from host_reads_worker import LOG, LOGGED, STEP

WORKER = ROOT / "tests" / "host_reads_worker.py"
ENV = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
AGREE, COUNTED = "engine.py/agree", ["text.py/count", "text.py/count", "clips.py/counts"]
"""The agreement of the ranks; the counts of a batch that is still on the host: of two texts and of the caption."""
NORM = "utils.py/is_invalid_grad_norm"
"""DeepSpeed's look at the norm, which it takes in ZeRO 1 to 3 whether anybody clips by it or not."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_reads_what_ranks_agree_on_and_nothing_else(kind: str) -> None:
    done = run_python(WORKER, "engine", kind, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["zero0"] == [[AGREE]] * 3
    assert found["zero1"] == found["zero2"] == [[AGREE, NORM]] * 3
    # DeepSpeed compares lists of ranks while ZeRO-3 learns the order of modules, and looks at each gradient that it
    # offloads: this project adds its one read.
    own = {path.name for path in (ROOT / "clips").rglob("*.py")} - {"utils.py"}
    for stage in ("zero3", "offload"):
        for reads in found[stage]:
            assert [read for read in reads if read.split("/")[0] in own] == [AGREE], (stage, set(reads))


@pytest.mark.slow
def test_between_two_logs_each_step_reads_once(shards: tuple[str, ...], tmp_path: Path) -> None:
    flags = ["--debug", *shards, "--output", tmp_path, "--device", "cpu", "--samples", "96"]
    flags += ["--set", "train.log_every=5", "data.workers=0"]
    done = run_python(WORKER, "loop", tmp_path / "reads.json", *flags, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "reads.json").read_text())
    assert (seen.count(STEP), seen.count(LOG)) == (12, 3)  # after steps 5 and 10, and at the end
    steps = [i for i, what in enumerate(seen) if what == STEP]
    for before, at in pairwise(steps):  # what stands before the first is the start
        between = seen[before + 1 : at]
        logged = between.index(LOGGED) + 1 if LOG in between else 0  # reading is what a log is there for
        assert [read for read in between if read in COUNTED] == COUNTED
        assert [read for read in between[logged:] if read not in COUNTED] == [AGREE]
