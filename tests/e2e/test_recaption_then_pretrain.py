"""A user's pairs become long captions and a pretraining, by the words of docs/recaption.md; kills cost nothing."""

import re
import shlex
import signal
import time
from pathlib import Path

import pytest
from caption_server import echo, serving, write_pairs
from conftest import ROOT
from launched import python, run, started

pytestmark = pytest.mark.slow
PARTS, EACH = 5, 16


def slowly(text: str) -> str:
    time.sleep(0.2)
    return echo(text)


def parts(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.parquet"))}


def test_a_recaptioning_is_killed_goes_on_and_is_trained_on(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "recaption.md").read_text()
    told, *_ = re.findall(r"^python scripts/recaption\.py --data 'my_pairs.*$", page, flags=re.MULTILINE)
    data, out, whole = (
        write_pairs(tmp_path / "pairs.tar", PARTS * EACH, (7, 50)),
        tmp_path / "my out",
        tmp_path / "whole",
    )

    with serving(slowly) as captioner:

        def command(out: Path) -> list[str]:
            words = shlex.split(told)[1:]
            for flag, value in (("--data", data), ("--output", str(out)), ("--captioner", captioner)):
                words[words.index(flag) + 1] = value
            return python(*words, "--part-size", str(EACH), "--batch-size", "4")

        assert run(command(whole)).code == 0
        for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
            before = len(parts(out))
            with started(command(out), tmp_path / f"{number}.log") as process:
                end = time.monotonic() + 120
                while len(parts(out)) == before and time.monotonic() < end:
                    time.sleep(0.02)
                process.send_signal(number)
                assert process.wait(60) == code
            assert before < len(parts(out)) < PARTS
        done = run(command(out))
    assert done.code == 0, done.text
    assert parts(out) == parts(whole)

    (following,) = re.findall(r"^Next: python (scripts/pretrain_clips\.py .*)$", done.text, flags=re.MULTILINE)
    sets = ("--val-data", whole, "--test-data", whole, "--output", tmp_path / "runs")
    trained = run(python(*shlex.split(following), "--debug", "--samples", "16", "--set", "data.workers=0", *sets))
    assert trained.code == 0, trained.text
