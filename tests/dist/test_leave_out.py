"""A step that is left out leaves no trace: bit for bit, in every ZeRO stage, two ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_python
from zero_worker import LEFT_OUT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found: optimizer → stage → findings."""
    out: Path = tmp_path_factory.mktemp("leave_out") / "found.pt"
    done = run_python(ROOT / "tests" / "zero_worker.py", "leave_out", out, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_a_step_left_out_changes_nothing_and_leaves_nothing_behind(ranks: list[dict], kind: str) -> None:
    for stage in LEFT_OUT[kind]:
        outcome = ranks[0][kind][stage]
        assert outcome["unchanged"], stage
        assert outcome["as if never seen"], stage


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_all_ranks_and_stages_see_the_same_loss_and_gradient_norm(ranks: list[dict], kind: str) -> None:
    first, second = (rank[kind] for rank in ranks)
    for stage in LEFT_OUT[kind]:
        finite, stopping, unsaved, loss, norm = first[stage]["agreed"]
        assert second[stage]["agreed"] == first[stage]["agreed"], "bit for bit: they decide alike"
        assert (finite, stopping, unsaved) == (True, 0, False)
        assert loss == pytest.approx(first["zero0"]["agreed"][3], rel=1e-3)
        if stage == "offload3":
            assert norm is None, "out of sight"
        else:
            assert norm == pytest.approx(first["zero0"]["agreed"][4], rel=2e-2), stage
