"""What the meter counts, and what it leaves out."""

import torch

from clips.training.meter import Meter
from clips.weights.checkpoint import TrainState


def test_broken_samples_are_pairs_however_they_were_pinned() -> None:
    """An older torch pins a tuple as a list, which no dict takes: too many broken samples were a TypeError."""
    measuring = Meter(torch.device("cpu"), TrainState(seed=0))
    measuring.add({"loss": torch.zeros(())}, [["a.tar#0", "image: cut off"], ["a.tar#0", "image: cut off"]])
    assert list(dict.fromkeys(measuring.skipped)) == [("a.tar#0", "image: cut off")]
