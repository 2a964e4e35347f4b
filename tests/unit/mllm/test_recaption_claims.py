"""Claims on shards: one owner at a time, lost by the dead, kept by the living, whatever the clocks say."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from mllm.recaption.claims import Claims

OWNER = """
import sys, time
from pathlib import Path
from mllm.recaption.claims import Claims
with Claims(Path(sys.argv[1]), 60) as claims:
    print(claims.take("a"), flush=True)
    time.sleep(600)
"""


def old(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def elsewhere(path: Path) -> None:
    """Make the claim one of a machine of which nothing is known here."""
    record = json.loads(path.read_text()) | {"machine": "another one"}
    path.write_text(json.dumps(record))


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    with Claims(tmp_path, 60) as one, Claims(tmp_path, 60) as other:
        assert one.take("a")
        assert not other.take("a")
        assert other.take("b")
        assert one.holds("a")
        assert not other.holds("a")
        one.release("a")
        assert other.take("a")
        one.release("a")  # no longer its own
        assert other.holds("a")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_of_this_machine_is_missed_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "True\n"
        with Claims(tmp_path, 60) as claims:
            assert not claims.take("a")
            owner.send_signal(signal.SIGSTOP)
            assert not claims.take("a")
            owner.kill()
            owner.wait()
            assert claims.take("a")


def test_another_machine_is_given_time(tmp_path: Path) -> None:
    with Claims(tmp_path, 60) as gone, Claims(tmp_path, 60) as claims:
        assert gone.take("a")
        path = tmp_path / "a.claim"
        elsewhere(path)
        old(path, 50)
        assert not claims.take("a")
        old(path, 70)
        assert claims.take("a")
        assert not gone.holds("a")
        gone.release("a")
        assert claims.holds("a")


def test_a_claim_is_kept_alive_while_its_process_works(tmp_path: Path) -> None:
    with Claims(tmp_path, 1) as one, Claims(tmp_path, 1) as other:
        assert one.take("a")
        elsewhere(tmp_path / "a.claim")
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            assert not other.take("a")
            time.sleep(0.1)


def test_a_claim_made_between_the_look_and_the_taking_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Claims(tmp_path, 60) as gone, Claims(tmp_path, 60) as quick, Claims(tmp_path, 60) as slow:
        assert gone.take("a")
        path = tmp_path / "a.claim"
        elsewhere(path)
        old(path, 70)
        rename = os.rename

        def late(source: Path, target: Path) -> None:
            monkeypatch.setattr(os, "rename", rename)
            assert quick.take("a")
            rename(source, target)

        monkeypatch.setattr(os, "rename", late)
        assert not slow.take("a")
        assert quick.holds("a")


def test_a_claim_that_was_cut_off_is_taken_when_it_is_old(tmp_path: Path) -> None:
    (tmp_path / "a.claim").touch()
    with Claims(tmp_path, 60) as claims:
        assert not claims.take("a")
        old(tmp_path / "a.claim", 70)
        assert claims.take("a")


def _race(folder: str, begin: float, names: list[str], won: multiprocessing.Queue) -> None:
    with Claims(Path(folder), 60) as claims:
        time.sleep(max(0, begin - time.time()))
        taken = [name for name in names if claims.take(name)]
        time.sleep(1)  # until all have tried
        won.put([name for name in taken if claims.holds(name)])
        while not (Path(folder) / "end").exists():
            time.sleep(0.01)


def test_of_many_at_once_one_takes_what_is_old(tmp_path: Path) -> None:
    """Nearly always: a claim that is given back may cost both a turn."""
    names = [str(i) for i in range(50)]
    for name in names:
        path = tmp_path / f"{name}.claim"
        path.write_text(json.dumps({"owner": "gone", "machine": "another one"}))
        old(path, 70)
    context = multiprocessing.get_context("spawn")
    won: multiprocessing.Queue = context.Queue()
    racers = [context.Process(target=_race, args=(str(tmp_path), time.time() + 4, names, won)) for _ in range(3)]
    for racer in racers:
        racer.start()
    taken = [won.get(timeout=60) for _ in racers]
    (tmp_path / "end").touch()
    for racer in racers:
        racer.join()
    together = [name for names_of_one in taken for name in names_of_one]
    assert len(together) == len(set(together))
    assert len(together) > 40
