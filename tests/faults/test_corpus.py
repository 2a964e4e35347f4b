"""A corpus of bad pictures and records through everything that reads data: exact counts, bounded memory, an end."""

import json
import re
from pathlib import Path

import bad_corpus
import pytest
from conftest import ROOT, run_python

MEMORY_MIB = 1024


@pytest.mark.slow
@pytest.mark.parametrize("route", bad_corpus.ROUTES)
def test_each_kind_comes_out_as_it_must(route: str, tmp_path: Path) -> None:
    done = run_python(
        "tests/bad_corpus.py", tmp_path, route,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "CLIPS_MLLM_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    wrong = []
    assert result["reasons"].keys() <= result["wanted"].keys()
    for name, outcome in result["wanted"].items():
        reason = result["reasons"].get(name)
        if (reason is None) != (outcome == bad_corpus.USED) or not re.search(outcome, reason or ""):
            wrong.append(f"{name}: wanted {outcome or 'used'!r}, found {reason!r:.200}")
    assert not wrong, "\n".join(wrong)
    assert result["grown_mib"] < MEMORY_MIB, result["grown_mib"]
