"""Bytes from shapes against what autograd really keeps, and what DeepSpeed's engines really hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, drawn_tokens, dropping, generative, run_python, tiny_batch, tiny_run
from torch.autograd.graph import saved_tensors_hooks
from zero_worker import STAGES

from clips.common.memory import held
from clips.config import RunConfig
from clips.model.clips import CLIPSModel
from clips.model.flops import BatchShape
from clips.recipes import RECIPES, recipe
from clips.training.memory import Place, Usage, count_parameters, parts_of, usage
from clips.training.task import Task

Batch = dict[str, torch.Tensor]


def full_batch(run: RunConfig, size: int, image_size: int, length: int, caption: int) -> Batch:
    g = torch.Generator().manual_seed(0)
    slots = {"web": length, "sub": length - 8, "caption": caption}
    ids = {name: torch.randint(4, run.model.text.vocab_size, (size, n), generator=g) for name, n in slots.items()}
    return {"images": torch.randn(size, 3, image_size, image_size, generator=g), **ids}


def kept_by_autograd(task: Task, batch: Batch) -> int:
    """Bytes of the storages that one forward pass leaves for the backward pass, the weights and the batch left out.

    What is inside a checkpoint is not seen here, neither is its input.
    """
    there = [*task.parameters(), *task.buffers(), *batch.values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in there}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that its place is not used again
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = task(batch)
    assert loss.requires_grad
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["tiny", "S/16", "S/16 at 336 px", "S/16 dropping", "S/16 dropping, caption", "S/16 dropping, caption+web"]
)
def test_activations_are_what_autograd_keeps(name: str, precision: str) -> None:
    """At 336 px the captioner is beyond the length up to which a CPU uses plain products."""
    if name == "tiny":
        run, batch = tiny_run(precision=precision), tiny_batch(0)
    else:
        run = recipe("s16").override([f"train.precision={precision}", "train.activation_checkpointing=false"])
        shorter = {part: replace(getattr(run.model, part), layers=4) for part in ("vision", "text", "captioner")}
        run = replace(run, model=replace(run.model, **shorter))
        batch = full_batch(run, 2, 336 if "336" in name else 112, 40, 100)
    if "dropping" in name:
        run, batch = dropping(run), batch | drawn_tokens(0, size=2, patches=196)
    if "caption" in name:
        run = generative(run, name.split()[-1])
        batch = {key: batch[key] for key in batch if key not in ("web", "sub") or key in run.task.texts}
    model = CLIPSModel(run.model, pad_id=0)
    model.visual.set_image_size(batch["images"].shape[-1])
    place = Place("cpu", bf16=precision == "bf16", checkpointing=False)
    task = Task(model, run)
    parts = parts_of(run, task.shape(batch), place)
    assert list(parts) == ["vision", "text", "captioner", "contrastive", "head"]
    copies = 2 * count_parameters(run.model, run.optim, "none").products if place.bf16 else 0
    if place.bf16:  # the head's copy is made, and goes, inside its checkpoint
        copies -= 2 * sum(p.numel() for p in model.captioner.head.parameters())
    expected = copies + sum(part.kept for name, part in parts.items() if name != "head")
    assert expected == pytest.approx(kept_by_autograd(task, batch), rel=0.05)


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_are_those_of_the_model(name: str) -> None:
    run = recipe(name)
    parameters = count_parameters(run.model, run.optim, "none")
    with torch.device("meta"):
        model = CLIPSModel(run.model, pad_id=0)
    untrained = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert (untrained == 0) == run.task.contrasts, "else nothing reaches the norms behind the towers"
    assert parameters.trained == model.parameter_counts()["total"] - untrained
    assert parameters.frozen == untrained
    assert ("muon" in parameters.groups) == (run.optim.kind == "muon")
    frozen = count_parameters(run.model, run.optim, "vision")
    towers = sum(p.numel() for name, p in model.visual.named_parameters() if not name.startswith("proj."))
    others = sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith("visual.") and not p.requires_grad
    )
    assert frozen.frozen == towers + others
    assert frozen.trained + frozen.frozen == model.parameter_counts()["total"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bucket"), [("adamw", 30_000), ("muon", 200_000)])
def test_engines_hold_what_is_said_in_every_stage(kind: str, bucket: int, tmp_path: Path) -> None:
    """Two ranks; weights, the state and the fp32 copy, in whatever tensors DeepSpeed keeps them. The model has more
    parameters than the first bucket and fewer than the second one.
    """
    out = tmp_path / "held.json"
    done = run_python(ROOT / "tests" / "held_worker.py", out, kind, bucket, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tiny_run(kind=kind)
    parameters = count_parameters(run.model, run.optim, "none")
    for name, ranks in json.loads(out.read_text()).items():
        expected = held(parameters, STAGES[name] | {"reduce_bucket_size": bucket}, ranks=2)
        # With offload on a CPU "the machine's memory" is where everything is.
        optimizer = expected.optimizer + (expected.host - 2 * 4 * -(-parameters.trained // 2) if expected.host else 0)
        made = expected.gradients + expected.buffers + expected.reducing
        if name == "zero3":  # its bucket, gradients and whole weights were there before
            made -= expected.gradients + 4 * (bucket + parameters.trained)
        # A gradient on its way into a bucket comes on top, and a collective may keep what it sent a little longer. In
        # ZeRO 1 the rank with the smaller share of the first bucket is below the plan, which is of the fullest rank.
        assert min(rank["made"] for rank in ranks) == pytest.approx(made, abs=0.8 * parameters.trained), name
        for rank in ranks:
            # Partitions are padded; of a matrix that is cut in two Muon's momentum is whole on both ranks.
            assert rank["weights"] == pytest.approx(expected.weights, rel=0.02), name
            assert rank["optimizer"] == pytest.approx(optimizer, rel=0.06 if kind == "muon" else 0.02), name
            if name in ("zero0", "zero3"):  # those of the others lie in DeepSpeed's buckets as well
                assert rank["gradients"] == pytest.approx(expected.gradients, rel=0.02), name


def at(run: RunConfig, samples: int, **changes: object) -> Usage:
    shape = BatchShape(samples, 84, (80, 80), 128, predicted=samples * 127, world_size=8)
    return usage(run, shape, "cuda", {"stage": 0}, **changes)


def test_memory_with_gradcache_is_flat_in_the_number_of_micro_batches() -> None:
    """What grows are the features of all, and a micro-batch's logits against them."""
    run = recipe("s16").override(["train.precision=bf16"])
    totals = {count: at(run, 64, accumulation=count, whole_step=True).total for count in (2, 4, 16, 64)}
    growth = [totals[count] - totals[2] for count in (4, 16)]
    assert all(0 < more < 0.05 * totals[2] for more in growth)
    whole = at(run, 64 * 16, accumulation=1).total
    assert totals[16] < 0.4 * whole
