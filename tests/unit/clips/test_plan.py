"""What plan_run.py says of a run, and the plan that a run prints before its start."""

from __future__ import annotations

import pytest
from conftest import ROOT, run_python

from clips.common.errors import UserError
from clips.common.peaks import CARDS, Machine, stated_peak
from clips.recipes import recipe
from clips.training.plan import print_memory, print_pretraining
from clips.training.rehearsal import rehearse

SCRIPT = ROOT / "scripts" / "plan_run.py"


def test_days_follow_from_flops_and_the_share_of_the_peak() -> None:
    machine = Machine("h100", 64, mfu=0.2)
    assert machine.days(86_400 * 64 * 0.2 * 989e12) == pytest.approx(1)
    assert (machine.fits(72e9), machine.fits(72.1e9)) == (True, False)
    assert all(stated_peak(name) for name, _ in CARDS.values())
    for wrong in (("h9", 1, 0.2), ("h100", 0, 0.2), ("h100", 1, 2.0)):
        with pytest.raises(UserError, match="--"):
            Machine(*wrong)


def test_a_phase_that_does_not_fit_is_refused_behind_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    run = recipe("demo")
    print_pretraining(run, Machine("h100", 8, 0.2), "zero0")
    assert "parameters train" in capsys.readouterr().out
    run = run.override(["phases.*.batch_size=8192"])
    with pytest.raises(UserError, match="does not fit"):
        print_pretraining(run, Machine("rtx4090", 1, 0.2), "zero1")
    assert "8,192" in capsys.readouterr().out


def test_a_dry_run_says_what_the_fullest_phase_takes(capsys: pytest.CaptureFixture[str]) -> None:
    run = recipe("demo")
    print_memory(run, 8, {"stage": 0})
    step = rehearse(run, run.phases[0], 8)
    assert f"{step.on_rank({}, 8) / 1e9:.3g} GB" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command() -> None:
    done = run_python(SCRIPT, "--recipe", "s16", "--gpus", "512")
    assert done.returncode == 0, done.stderr
    assert "s16 on 512 × H100 of 80 GB" in done.stdout
    assert run_python(SCRIPT, "--engine", "zero9").returncode == 2
