"""SIGKILL at any moment, any number of times, with several processes on one folder: the same bytes come out."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from launched import python, run, started
from pairs import outcome, write_pairs
from processes import wait_until_gone

pytestmark = pytest.mark.slow
SHARDS, EACH = 5, 24
KILLS = 4


def calls(out: Path) -> int:
    """Calls that are written down of shards which are not whole, and shards that are: it grows while work is done."""
    lines = sum(path.read_bytes().count(b"\n") for path in (out / "work").glob("*/*.jsonl") if path.exists())
    return lines + 1000 * len(list((out / "manifests").glob("*.json")))


def is_done(out: Path) -> bool:
    return len(list((out / "manifests").glob("*.json"))) == SHARDS


def workers(parent: int) -> list[int]:
    """Process ids of those that caption."""
    found = []
    for process in psutil.Process(parent).children():
        with contextlib.suppress(psutil.Error):  # it was killed and is not yet gone
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def test_workers_and_parents_are_killed_under_two_commands(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs", SHARDS, EACH, broken=(7, 50))
    flags = ("--data", data)

    def command(out: Path, seconds: float, processes: int) -> list[str]:
        captioner = ("--captioner", f"known:{seconds}", "--jobs", str(processes))
        return python("tests/recaption_process.py", *flags, *captioner, "--output", out)

    whole = run(command(tmp_path / "whole", 0.3, 1))
    assert whole.code == 0, whole.text
    out, draw = tmp_path / "out", random.Random(0)
    killed = {"worker": 0, "parent": 0}
    with ExitStack() as stack:
        running: list[subprocess.Popen[bytes]] = []

        def begin() -> None:
            log = tmp_path / f"{sum(killed.values())}-{len(running)}.log"
            running.append(stack.enter_context(started(command(out, 0.3, 2), log)))

        begin()
        begin()
        while sum(killed.values()) < KILLS and not is_done(out):
            before = calls(out)
            end = time.monotonic() + 120
            while calls(out) <= before and not is_done(out) and time.monotonic() < end:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 0.5))
            kind = ("worker", "parent")[sum(killed.values()) % 3 == 2]
            parent = draw.choice(running)
            below = workers(parent.pid)
            victim = parent.pid if kind == "parent" else draw.choice(below) if below else None
            if victim is None:
                continue
            os.kill(victim, signal.SIGKILL)
            killed[kind] += 1
            if kind == "parent":
                running.remove(parent)
                parent.wait()
                begin()
        for process in running:
            assert process.wait(timeout=240) == 0
    assert killed["worker"] >= 3, killed
    assert killed["parent"] >= 1, killed
    assert is_done(out)
    wait_until_gone(out)
    assert same(outcome(out), outcome(tmp_path / "whole"))
    assert not (out / "work").exists()
    assert not (out / "locks").exists()


def same(one: dict[str, bytes], other: dict[str, bytes]) -> bool:
    """But for the folder's own name on the page."""
    page = "report/index.html"
    assert one.keys() == other.keys()
    assert {name for name in one if name != page and one[name] != other[name]} == set()
    return one[page] == other[page].replace(b"/whole", b"/out")
