"""The plan of a run: what fits, what is proposed where it does not, and figures that follow from their assumptions."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_model, run_python, tiny_run

from clips.common.cards import BUS, CARDS, Machine, card
from clips.common.errors import UserError
from clips.common.memory import gigabytes
from clips.config import DataConfig
from clips.model.flops import forward_flops
from clips.recipes import recipe
from clips.training.memory import count_parameters
from clips.training.plan import (
    ENGINES,
    TABLE,
    agreements,
    collective_bytes,
    engine_settings,
    fits,
    memory_of,
    memory_rows,
    plan,
    planning_table,
)
from clips.training.prepare import flops_per_sample, most_memory, print_plan, usual_shape

SCRIPT = ROOT / "scripts" / "plan_run.py"
H100 = CARDS["h100"]
SIZES = {"square": "[[112,112]]", "wide": "[[224,112]]", "both": "[[112,112],[224,112]]"}


def on(gpus: int, kind: str = "h100", **more: float) -> Machine:
    return Machine(card(kind), gpus, **{"mfu": 0.2} | more)


def test_every_engine_of_the_repository_is_planned_with_and_every_card_has_a_peak() -> None:
    names = {path.stem for path in (ROOT / "ds_configs").glob("zero*.json")}
    assert names == set(ENGINES)
    assert [engine_settings(name)["stage"] for name in ENGINES] == [0, 1, 2, 3, 2, 3]
    assert all(card(kind).peak > 1e14 for kind in CARDS)


def test_what_does_not_fit_is_refused_and_what_is_proposed_fits() -> None:
    run = recipe("h14")
    with pytest.raises(UserError, match=r"does not fit 8 × H100 of 80 GB \(72 GB usable\)") as refused:
        plan(run, on(8))
    (count,) = re.findall(r"--set train\.accumulation=(\d+) train\.contrastive=global", str(refused.value))
    proposed = run.override([f"train.accumulation={count}"])
    found = plan(proposed, on(8))
    assert all(part.fit.accumulation == int(count) for part in found.phases)
    assert all(part.fit.usage.total <= H100.usable for part in found.phases)
    # It is the largest micro-batch: with fewer cuts no engine would do.
    fewer = int(count) // 2
    assert all(
        any(memory_of(run, phase, on(8), engine, fewer).total > H100.usable for phase in run.phases)
        for engine in ENGINES
    )
    assert plan(run, on(8), strict=False).phases == found.phases


def test_without_checkpointing_that_is_proposed_too() -> None:
    run = recipe("l14").override(["train.activation_checkpointing=false"])
    with pytest.raises(UserError, match=r"or --set train\.activation_checkpointing=true"):
        plan(run, on(64))
    assert plan(recipe("l14"), on(64)).phases[0].fit.accumulation == 1


def test_what_cannot_fit_at_all_says_what_it_is_made_of() -> None:
    with pytest.raises(UserError, match=r"h14 does not fit 1 × RTX 4090 of 24 GB .* weights, .* optimizer") as refused:
        plan(recipe("h14"), on(1, "rtx4090"), engine="zero0")
    assert "another --engine" in str(refused.value)


def test_time_and_communication_follow_from_their_assumptions() -> None:
    run, machine = recipe("b16"), on(64, price=2.0)
    found = plan(run, machine, engine="zero0")
    first = found.phases[0]
    assert first.time.compute_s == pytest.approx(512 * flops_per_sample(run, run.phases[0]) / (989e12 * 0.2))
    parameters = count_parameters(run.model, run.optim, "none")
    features = 3 * 4 * 3 * 32_768 * run.model.embed_dim
    moved = 2 * 4 * parameters.trained + features
    assert collective_bytes(run, run.phases[0], first.fit, 64, parameters) == moved
    assert first.time.communication_s == pytest.approx(moved * 63 / 64 / (BUS * 400e9))
    assert found.gpu_hours == pytest.approx(64 * sum(p.phase.steps * p.time.step_s for p in found.phases) / 3600)
    assert machine.cost(10) == ", 20 at 2 a GPU hour"
    assert found.checkpoint_bytes == 4 * 3 * parameters.trained  # weights, and AdamW's two
    assert on(1).collective_seconds(1e9) == 0


def test_cut_steps_pay_one_more_forward_pass_of_the_towers() -> None:
    run = recipe("b16")
    cut = replace(run, train=replace(run.train, accumulation=4))
    whole, pieces = (plan(r, on(64), engine="zero0").phases[0] for r in (run, cut))
    forward = forward_flops(run.model, usual_shape(run, run.phases[0].image_size))
    more = (pieces.time.compute_s - whole.time.compute_s) * 989e12 * 0.2 / 512
    assert more == pytest.approx(forward["vision"] + forward["text"])
    assert pieces.fit.usage.working < 0.6 * whole.fit.usage.working


def test_the_largest_size_decides_the_memory_and_the_mean_the_time() -> None:
    run = recipe("b16")
    sizes = {name: run.override([f"phases.0.sizes={size}"]) for name, size in SIZES.items()}
    costs, memory = (
        {name: measure(run) for name, run in sizes.items()}
        for measure in (
            lambda run: flops_per_sample(run, run.phases[0]),
            lambda run: memory_of(run, run.phases[0], on(8), "zero1", 16).total,
        )
    )
    assert costs["square"] == flops_per_sample(run, run.phases[0])
    assert costs["both"] == (costs["square"] + costs["wide"]) // 2 > costs["square"]
    assert memory["both"] == memory["wide"] > memory["square"]


def test_the_memory_table_has_every_engine_with_and_without_checkpointing() -> None:
    run = recipe("l14").override(["train.precision=bf16"])
    rows = memory_rows(run, on(8))
    assert [row[:2] for row in rows] == [[engine, how] for engine in ENGINES for how in ("yes", "no")]
    for row in rows:
        for asked, fitting in zip(row[2:-1:2], row[3:-1:2], strict=True):
            assert ("✗" in asked) == (not fitting.startswith("1 ×"))
    assert [row[-1] != "–" for row in rows] == ["offload" in row[0] for row in rows]


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(UserError, match="not divisible by 3 ranks"):
        plan(recipe("s16"), on(3))
    assert fits(recipe("demo").override(["train.precision=bf16"]), recipe("demo").phases, on(1), "zero0") is not None


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_the_command_prints() -> None:
    """Its first recipe, in one piece, and one that is cut; a rehearsal of each would take half a minute."""
    page = (ROOT / "docs" / "planning.md").read_text()
    assert set(planning_table("h100", 2.5, 0.2, ("s16", "l14")).splitlines()) <= set(page.splitlines())
    assert all(f"| `{name}` | {gpus} |" in page for name in TABLE for gpus in (8, 64))


def test_the_docs_say_how_near_the_formula_is_to_a_rehearsal() -> None:
    """In the row that takes least time."""
    page = (ROOT / "docs" / "planning.md").read_text()
    assert [f"| {' | '.join(row)} |" in page for row in agreements(("s16",))] == [True]


def test_memory_and_time_stand_in_the_plan_of_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    run = replace(tiny_run(), data=DataConfig(train="mine"))  # of the demo, which has a test set, the plan builds it
    for zero, host in (({"stage": 0}, False), ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, True)):
        print_plan(run, random_model(run), 100, Path("runs/x"), torch.device("cpu"), 1, None, zero, 1e9)
        said = " ".join(capsys.readouterr().err.split())
        total = most_memory(run, "cpu", 1, zero)
        assert f"about {gigabytes(total.total + total.host)} GB a rank at most" in said
        assert " 0.0 " not in said
        assert ("the machine's" in said) == host
        assert "time" in said


@pytest.mark.slow
def test_the_command() -> None:
    done = run_python(SCRIPT, "--recipe", "l14", "--gpus", "64", "--kind", "h100", "--price", "2.5")
    assert done.returncode == 0, done.stderr
    for said in ("l14 on 64 × H100 of 80 GB", "zero3_offload", "GPU hours", "a GPU hour", "assumed, speed: 20%"):
        assert said in done.stdout
    done = run_python(SCRIPT, "--recipe", "h14", "--gpus", "8")
    assert done.returncode == 2
    assert "Give --set train.accumulation=" in done.stderr
    for wrong in (["--kind", "h9"], ["--gpus", "0"], ["--mfu", "2"], ["--engine", "zero9"], ["--recipe", "x"]):
        assert run_python(SCRIPT, *wrong).returncode == 2
