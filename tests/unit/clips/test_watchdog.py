"""When a loss or gradient norm counts as a spike, and a rank as slow."""

import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clips.common.errors import CommandError
from clips.engine import watchdog
from clips.engine.checkpoint import TrainState
from clips.engine.engine import Reduced
from clips.engine.log import RunLog
from clips.engine.metrics import Meter


def agreed(loss: float, norm: float | None = 1.0) -> Reduced:
    return Reduced(finite=True, stopping=0, unsaved=False, loss=loss, grad_norm=norm)


def spikes(losses: list[float], norms: list[float | None]) -> list[int]:
    """Steps that are spikes, all of them taken."""
    state, indices = TrainState(seed=0), []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if watchdog.find_spike(state, agreed(loss, norm)):
            indices.append(step)
        watchdog.remember(state, agreed(loss, norm))
    return indices


def training(steps: int, seed: int = 0) -> list[float]:
    """A loss that falls from 15 to 3, steeply at first, with noise of 5 %."""
    rng = random.Random(seed)
    return [(3 + 12 * math.exp(-step / 20)) * (1 + 0.05 * rng.gauss(0, 1)) for step in range(steps)]


@pytest.mark.parametrize("at", [16, 25, 40, 300])
def test_a_jump_of_the_loss_or_of_the_gradient_is_found_while_the_loss_falls(at: int) -> None:
    losses, quiet = training(400), [1.0] * 400
    assert spikes(losses, quiet) == []
    losses[at] = 2.5 * losses[at - 1] + 5
    assert spikes(losses, quiet) == [at]
    assert spikes(training(400), [*quiet[:at], 1.6, *quiet[at + 1 :]]) == [at]


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_spike(seed: int) -> None:
    rng = random.Random(seed)
    norms = [rng.lognormvariate(0, 0.5) for _ in range(2000)]
    assert spikes(training(2000, seed), norms) == []


def test_nothing_counts_before_there_is_a_past_nor_a_norm_that_cannot_be_seen() -> None:
    assert spikes([1.0] * 15 + [100.0], [1.0] * 16) == []
    assert spikes([1.0] * 16 + [100.0], [None] * 17) == [16]
    assert spikes([0.0] * 16 + [1.0], [None] * 17) == [16]


def test_a_level_that_stays_is_got_used_to() -> None:
    indices = spikes([1.0] * 50 + [3.0] * 50, [1.0] * 100)
    assert indices == list(range(50, 50 + watchdog.WINDOW // 2 + 1))


@given(st.lists(st.floats(1e-6, 1e6), min_size=16, max_size=40), st.floats(0.01, 100))
def test_the_limit_is_never_below_what_is_usual_and_follows_the_scale(recent: list[float], scale: float) -> None:
    bound = watchdog.limit(recent)
    assert bound > 1.4 * sorted(recent)[(len(recent) - 1) // 2]
    assert watchdog.limit([scale * r for r in recent]) == pytest.approx(scale * bound, rel=1e-6)


def test_a_record_that_cannot_be_written_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 100, {}, start_step=0, active=True)
    log.metrics = open("/dev/full", "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by the log
    with pytest.raises(CommandError, match="record of step 3 cannot be written") as ended:
        log.record("train", {"step": 3, "samples": 30, "loss": 1.0})
    assert "No space left" in str(ended.value)
    log.close()


def test_a_spike_is_told_where_no_norm_was_seen_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in a run that goes on from ZeRO-3 with offload in another stage."""
    state = TrainState(seed=0)
    for _ in range(32):
        watchdog.remember(state, agreed(1.0, None))
    spike = watchdog.find_spike(state, agreed(9.0, 2.0))
    log = RunLog(tmp_path, 100, {}, start_step=0, active=True)
    log.spike({"step": 33, "action": "skip", **spike}, [["a.tar#0"]])
    log.close()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "spike" in line]
    assert "loss 9 (usually 1); skip" in line


def test_broken_samples_are_pairs_however_they_were_pinned() -> None:
    """An older torch pins a tuple as a list, which no dict takes: too many broken samples were a TypeError."""
    measuring = Meter(torch.device("cpu"), TrainState(seed=0))
    measuring.add({"loss": torch.zeros(())}, [["a.tar#0", "image: cut off"], ["a.tar#0", "image: cut off"]])
    assert list(dict.fromkeys(measuring.skipped)) == [("a.tar#0", "image: cut off")]
