"""Losses against plain slow references, and on two real ranks against one."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import drawn_tokens, dropping, random_model, tiny_batch, tiny_run

from clips.common.runtime import unused_port
from clips.config import RunConfig
from clips.model.clips import CLIPSModel
from clips.recipes import debug_twin, recipe
from clips.training.losses import IGNORE, caption_loss, gather_features, info_nce, mean_over_ranks
from clips.training.trainer import Task

#: (run, (loss, contrastive loss)); the second is the debug twin of the demo recipe, in fp32.
FIRST_DEMO = ["train.precision=fp32", "model.vision.patch_size=16", "model.vision.image_size=32"]
FIRST_DEMO += ["phases.0.image_size=32", "model.text.context_length=32", "model.text.vocab_size=512"]
"""The sizes of the demo's twin when its loss was noted."""
GOLDEN = [(tiny_run(), (12.8636, 2.9996)), (debug_twin(recipe("demo")).override(FIRST_DEMO), (15.8854, 3.2423))]


def slow_info_nce(image: torch.Tensor, text: torch.Tensor, scale: float) -> float:
    """The textbook double loop, in Python floats."""
    rows = [[scale * sum(a * b for a, b in zip(i, t, strict=True)) for t in text.tolist()] for i in image.tolist()]
    columns = list(map(list, zip(*rows, strict=True)))
    losses = [
        math.log(sum(math.exp(x) for x in row)) - row[k] for table in (rows, columns) for k, row in enumerate(table)
    ]
    return sum(losses) / len(losses)


def slow_caption_loss(model: CLIPSModel, states: torch.Tensor, targets: torch.Tensor) -> float:
    total, count = 0.0, 0
    for state_row, target_row in zip(states, targets.tolist(), strict=True):
        for state, target in zip(state_row, target_row, strict=True):
            if target != IGNORE:
                logits = model.captioner.head(state)
                total += (logits.exp().sum().log() - logits[target]).item()
                count += 1
    return total / count


def test_info_nce_equals_the_double_loop() -> None:
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    fast = info_nce(image, text, image, text, torch.tensor([14.0]))
    assert fast.item() == pytest.approx(slow_info_nce(image, text, 14.0), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_caption_loss_equals_the_loop_over_positions_whatever_the_chunk(chunk: int) -> None:
    torch.manual_seed(0)
    model = CLIPSModel(tiny_run().model, pad_id=0)
    states = torch.randn(4, 9, 32, requires_grad=True)
    targets = torch.randint(0, 64, (4, 9))
    targets[torch.rand(4, 9) < 0.4] = IGNORE
    total, count = caption_loss(states, targets, model.captioner.head, chunk)
    assert (total / count).item() == pytest.approx(slow_caption_loss(model, states.detach(), targets), rel=1e-5)
    (total / count).backward()
    reference = torch.nn.functional.cross_entropy(model.captioner.head(states).flatten(0, 1), targets.flatten())
    (expected,) = torch.autograd.grad(reference, states)
    torch.testing.assert_close(states.grad, expected, atol=1e-6, rtol=1e-5)


def test_caption_loss_never_holds_more_logits_than_a_chunk() -> None:
    seen = []

    def head(states: torch.Tensor) -> torch.Tensor:
        seen.append(len(states))
        return states

    total, count = caption_loss(torch.randn(4, 9, 5), torch.zeros(4, 9, dtype=torch.long), head, 10)
    assert count == 36
    assert max(seen) <= 10
    assert total.isfinite()


def test_a_batch_without_caption_tokens_gives_zero_not_nan() -> None:
    total, count = caption_loss(torch.randn(2, 3, 4), torch.full((2, 3), IGNORE), torch.nn.Linear(4, 5), 10)
    assert mean_over_ranks(total, count).item() == 0


def test_task_is_alpha_contrastive_plus_beta_caption() -> None:
    run = tiny_run()
    task, batch = Task(random_model(run), run.task, run.train), tiny_batch(0)
    loss, parts = task(batch)
    model = task.model
    image = model.encode_image(batch["images"])
    scale = model.logit_scale.exp().item()
    contrastive = 0.5 * sum(slow_info_nce(image, model.encode_text(batch[name]), scale) for name in ("web", "sub"))
    _, tokens = model.visual(batch["images"])
    ((_, states, visible),) = model.text(batch["web"])
    hidden = model.captioner(tokens[:, 1:], states, visible, batch["caption"][:, :-1])
    targets = batch["caption"][:, 1:].masked_fill(batch["caption"][:, 1:] == 0, IGNORE)
    caption = slow_caption_loss(model, hidden, targets)
    assert parts["contrastive_loss"].item() == pytest.approx(contrastive, rel=1e-5)
    assert parts["caption_loss"].item() == pytest.approx(caption, rel=1e-5)
    assert loss.item() == pytest.approx(contrastive + 2 * caption, rel=1e-5)  # α = 1, β = 2


@pytest.mark.parametrize("captioned", [[], [0, 3, 6]])
def test_only_the_captioned_samples_are_predicted(captioned: list[int]) -> None:
    """As if the others were in no captioner's batch; of no sample at all, which a rank's share may hold."""
    run = tiny_run()
    task, batch = Task(random_model(run), run.task, run.train), tiny_batch(0)
    rows = torch.tensor(captioned, dtype=torch.long)
    expected = 0.0
    if captioned:
        expected = task({name: x[rows] for name, x in batch.items()})[1]["caption_loss"].item()
    others = torch.ones(8, dtype=torch.bool).index_fill(0, rows, False)
    loss, parts = task(batch | {"caption": batch["caption"].masked_fill(others[:, None], 0)})
    assert parts["caption_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert parts["contrastive_loss"].item() == task(batch)[1]["contrastive_loss"].item()
    loss.backward()
    gradients = [p.grad for p in task.model.captioner.parameters()]
    assert all(gradient is not None for gradient in gradients), "all ranks reduce the same gradients"
    assert any(gradient.any() for gradient in gradients) == bool(captioned)


def slow_dropped_states(model: CLIPSModel, batch: dict[str, torch.Tensor], row: int) -> tuple[torch.Tensor, ...]:
    """One sample, its tokens put together one by one: (pooled [D], caption states [T, D])."""
    tower, captioner = model.visual, model.captioner
    image, grid = batch["images"][row], tower.image_size // 8
    tokens = [tower.cls_token + tower.pos_embed[0]]
    for place in batch["patches"][row].tolist():
        y, x = 8 * (place // grid), 8 * (place % grid)
        pixels = image[:, y : y + 8, x : x + 8]
        patch = (tower.patch_embed.weight * pixels).sum(dim=(1, 2, 3)) + tower.patch_embed.bias
        tokens.append(patch + tower.pos_embed[1 + place])
    seen = tower.blocks(torch.stack(tokens)[None])[0, 1:]
    prefix = [captioner.image_proj(seen[place]) for place in batch["image_tokens"][row].tolist()]
    ((_, states, visible),) = model.text(batch["web"][row : row + 1])
    prefix += [captioner.text_proj(state) for state, there in zip(states[0], visible[0], strict=True) if there]
    ids = batch["caption"][row, :-1].tolist()
    queries = list(captioner.queries[: len(ids)])
    out = []
    for k in range(len(ids)):  # causal: position k alone with what it may see; the prefix never sees queries
        states = torch.stack(prefix + queries[: k + 1])[None]
        mask = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool).tril()
        mask[:, : len(prefix)] = True
        out.append(captioner.norm(captioner.blocks(states, mask)[0, -1]))
    return seen.mean(dim=0), torch.stack(out)


def test_dropped_tokens_against_a_tower_and_a_captioner_that_never_had_them() -> None:
    run = dropping(tiny_run())
    task, batch = Task(random_model(run), run.task, run.train), tiny_batch(0) | drawn_tokens(0)
    model = task.model
    loss, parts = task(batch)
    slow = [slow_dropped_states(model, batch, row) for row in range(8)]
    targets = batch["caption"][:, 1:].masked_fill(batch["caption"][:, 1:] == 0, IGNORE)
    caption = slow_caption_loss(model, torch.stack([states for _, states in slow]), targets)
    assert parts["caption_loss"].item() == pytest.approx(caption, rel=1e-5)
    pooled = model.visual.norm(torch.stack([pooled for pooled, _ in slow]))
    image = torch.nn.functional.normalize(model.visual.proj(pooled), dim=-1)
    texts, scale = [model.encode_text(batch[name]) for name in ("web", "sub")], model.logit_scale.exp().item()
    contrastive = sum(slow_info_nce(image, text, scale) for text in texts) / 2
    assert parts["contrastive_loss"].item() == pytest.approx(contrastive, rel=1e-5)
    assert loss.item() == pytest.approx(contrastive + 2 * caption, rel=1e-5)
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not without, "every parameter that trains is reached"


def test_tokens_that_were_not_drawn_are_missed() -> None:
    run = dropping(tiny_run())
    task = Task(random_model(run), run.task, run.train)
    for name in ("patches", "image_tokens"):
        batch = tiny_batch(0) | drawn_tokens(0)
        del batch[name]
        with pytest.raises(KeyError, match=name):
            task(batch)


@pytest.mark.parametrize(("run", "expected"), GOLDEN)
def test_golden_loss(run: RunConfig, expected: tuple[float, float]) -> None:
    """The first loss of a seeded model on a seeded batch; a change of it is a change of the method."""
    loss, parts = Task(random_model(run), run.task, run.train)(tiny_batch(0))
    assert loss.item() == pytest.approx(expected[0], abs=2e-4)
    assert parts["contrastive_loss"].item() == pytest.approx(expected[1], abs=2e-4)


def _two_ranks(rank: int, port: int, results: dict) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results[rank] = _loss_and_gradient({k: v[rank * 4 : rank * 4 + 4] for k, v in tiny_batch(0).items()})
    dist.destroy_process_group()


def _loss_and_gradient(batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    run = tiny_run()
    task = Task(random_model(run), run.task, run.train)
    loss, _ = task(batch)
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in task.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_two_ranks_average_to_the_loss_and_gradient_of_one() -> None:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_two_ranks, (unused_port(), results), nprocs=2, start_method="fork")
        (loss_0, grad_0), (loss_1, grad_1) = results[0], results[1]
    loss, grad = _loss_and_gradient(tiny_batch(0))
    assert (loss_0 + loss_1) / 2 == pytest.approx(loss, rel=1e-5)
    for name, expected in grad.items():
        mean = (torch.from_numpy(grad_0[name]) + torch.from_numpy(grad_1[name])) / 2
        expected = torch.from_numpy(expected)
        assert (mean - expected).norm() <= 1e-5 * expected.norm() + 1e-6, name


def test_gathering_on_one_rank_is_the_identity() -> None:
    x = torch.randn(3, 4)
    assert gather_features(x) is x
