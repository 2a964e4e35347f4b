"""A step that is left out leaves no trace: bit for bit, in every ZeRO stage, two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_python

pytestmark = pytest.mark.slow
KINDS = ("adamw", "muon")
STAGES = ["zero0", "zero1", "zero2", "zero3", "offload", "offload3"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out: Path = tmp_path_factory.mktemp("leave_out") / "found.json"
    done = run_python(ROOT / "tests" / "leave_out_worker.py", out, *KINDS, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(params=KINDS)
def ranks(request: pytest.FixtureRequest, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each rank found with one kind of optimizer."""
    return [rank[request.param] for rank in found]


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_left_out_changes_nothing_and_leaves_nothing_behind(ranks: list[dict], stage: str) -> None:
    found = ranks[0][stage]
    assert found["unchanged"]
    assert found["as if never seen"]


def test_all_ranks_and_stages_see_the_same_loss_and_gradient_norm(ranks: list[dict]) -> None:
    for stage in STAGES:
        finite, stopping, unsaved, loss, norm = ranks[0][stage]["agreed"]
        assert ranks[1][stage]["agreed"] == ranks[0][stage]["agreed"], "bit for bit: they decide alike"
        assert (finite, stopping, unsaved) == (True, 0, False)
        assert loss == pytest.approx(ranks[0]["zero0"]["agreed"][3], rel=1e-3)
        if stage == "offload3":
            assert norm is None, "out of sight"
        else:
            assert norm == pytest.approx(ranks[0]["zero0"]["agreed"][4], rel=2e-2), stage
