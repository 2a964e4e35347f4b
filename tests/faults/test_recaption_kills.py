"""SIGKILL at any moment, any number of times, with several processes on one folder: the same bytes come out."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from launched import python, run, started
from pairs import outcome, write_pairs

pytestmark = pytest.mark.slow
SHARDS, EACH = 4, 24
KILLS = 3


def calls(out: Path) -> int:
    """Calls that are written down of shards which are not whole, and shards that are: it grows while work is done."""
    lines = sum(path.read_bytes().count(b"\n") for path in (out / "work").glob("*/*.jsonl") if path.exists())
    return lines + 1000 * len(list((out / "manifests").glob("*.json")))


def is_done(out: Path) -> bool:
    return len(list((out / "manifests").glob("*.json"))) == SHARDS


def test_processes_of_one_folder_are_killed(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs", SHARDS, EACH, broken=(7, 50))

    def command(out: Path) -> list[str]:
        return python("tests/recaption_process.py", "--data", data, "--captioner", "known:0.3", "--output", out)

    whole = run(command(tmp_path / "whole"))
    assert whole.code == 0, whole.text
    out, draw, killed = tmp_path / "out", random.Random(0), 0
    with ExitStack() as stack:
        running = [stack.enter_context(started(command(out), tmp_path / f"{i}.log")) for i in range(2)]
        while killed < KILLS and not is_done(out):
            before, end = calls(out), time.monotonic() + 120
            while calls(out) <= before and not is_done(out) and time.monotonic() < end:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 0.5))
            victim = running.pop(draw.randrange(2))
            victim.kill()
            victim.wait()
            killed += 1
            running.append(stack.enter_context(started(command(out), tmp_path / f"again-{killed}.log")))
        for process in running:
            assert process.wait(timeout=240) == 0
    assert killed == KILLS
    assert is_done(out)
    assert same(outcome(out), outcome(tmp_path / "whole"))
    assert not (out / "work").exists()
    assert not (out / "locks").exists()


def same(one: dict[str, bytes], other: dict[str, bytes]) -> bool:
    """But for the folder's own name on the page."""
    page = "report/index.html"
    assert one.keys() == other.keys()
    assert {name for name in one if name != page and one[name] != other[name]} == set()
    return one[page] == other[page].replace(b"/whole", b"/out")
