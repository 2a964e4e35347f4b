"""train.contrastive: accumulated steps of every kind under DeepSpeed against plain torch, which has no engine at all.

"global" must give what one whole batch gives, "micro" the average of the micro-batches' own gradients.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, random_model, run_python
from grad_cache_worker import BATCH, CASES_OF, CPU, MICRO, STEPS, Case, a_run, samples, without_bf16

from clips.training.optim import build_optimizer, parameter_groups
from clips.training.trainer import Task

WORKER = ROOT / "tests" / "grad_cache_worker.py"
pytestmark = pytest.mark.slow


RANKS = pytest.mark.parametrize("ranks", CASES_OF)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Number of ranks → what the worker found."""
    results = {}
    for ranks in CASES_OF:
        out: Path = tmp_path_factory.mktemp("grad_cache") / "out.pt"
        run_python(WORKER, out, ranks=ranks)
        results[ranks] = torch.load(out, weights_only=True)
    return results


@functools.cache
def by_hand(case: Case, size: int) -> dict[str, Any]:
    """Two steps in plain torch, without an engine: the mean of the gradients of batches of `size`, then the step."""
    torch._dynamo.config.disable = True  # as the engine does: Muon's kernels are decorated with torch.compile
    without_bf16()
    run = a_run(case, accumulation=1)
    task, logged = Task(random_model(run), run.task, run.train), []
    optimizer = build_optimizer(parameter_groups(task, run.optim), run.optim)
    for group in optimizer.param_groups:
        group["lr"] = 2e-2 if group["name"] == "muon" else 1e-2
    for step in range(STEPS):
        means: dict[str, float] = {}
        for begin in range(0, BATCH, size):
            loss, parts = task(task.to_device(samples(case, step, begin, begin + size), CPU))
            (loss * size / BATCH).backward()
            for name, value in parts.items():
                means[name] = means.get(name, 0.0) + value.item() * size / BATCH
        optimizer.step()
        optimizer.zero_grad()
        logged.append(means)
    return {"weights": {name: p.detach().clone() for name, p in task.model.named_parameters()}, "logged": logged}


@pytest.mark.parametrize(
    ("ranks", "case"),
    [(ranks, case) for ranks, cases in CASES_OF.items() for case in cases],
    ids=lambda given: f"{given} ranks" if isinstance(given, int) else given.name,
)
def test_accumulated_steps_are_those_of_the_plain_gradient(found: dict[int, dict], ranks: int, case: Case) -> None:
    result = found[ranks][case.name]
    plain = case._replace(stage=0, checkpointing=False, contrastive="global")
    expected = by_hand(plain, BATCH if case.contrastive == "global" else MICRO * ranks)
    begun = random_model(a_run(case, 1))
    assert result["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        assert (result["weights"][name] - value).abs().max() < 1e-5, name
    assert (expected["weights"]["logit_scale"] - begun.logit_scale).abs() > 1e-3
    for logged, means in zip(result["logged"], expected["logged"], strict=True):
        assert logged == pytest.approx(means, rel=1e-5)


@RANKS
def test_the_two_modes_learn_differently(found: dict[int, dict], ranks: int) -> None:
    for kind in ("adamw", "muon"):
        both = [found[ranks][Case(0, kind, contrastive=mode).name]["weights"] for mode in ("micro", "global")]
        assert (both[0]["visual.proj.weight"] - both[1]["visual.proj.weight"]).abs().max() > 1e-3


@RANKS
@pytest.mark.parametrize("stage", [0, 3])
def test_a_broken_sample_breaks_the_step_and_its_own_micro_batch_alone_is_named(found, ranks, stage):
    finite = [[True] * (BATCH // (MICRO * ranks)) for _ in range(ranks)]
    finite[-1][1] = False
    assert found[ranks][f"poisoned{stage}"] == {"finite": finite, "agreed": False}
