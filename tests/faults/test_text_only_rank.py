"""Row 26: under ZeRO-3 one rank has pictures and the other one has none; every rank still meets in every gather."""

import pytest
import torch
from tiny_llava import INSTRUCT, START, TRAIN, launch, losses, results, run, write_place

from mllm.data.sampler import EpochSampler

pytestmark = pytest.mark.slow


def test_row_26_text_alone_on_one_rank_of_zero3_trains_as_one_rank_does(tmp_path, monkeypatch):
    """Against one rank without DeepSpeed; every weight trains."""
    place = write_place(tmp_path)
    flags = [*INSTRUCT, *START, "--group_by_modality_length", "False"]
    flags += ["--per_device_train_batch_size", "1", "--num_train_epochs", "1"]
    order = list(EpochSampler([1] * 32, batch_size=1, chunks=4, seed=0, group_by_modality_length=False))
    is_text = [index >= 20 for index in order]
    assert any(is_text[i] != is_text[i + 1] for i in range(0, 32, 2))  # rank 0 and rank 1 of one forward pass
    run(place, monkeypatch, *flags, "--output_dir", "runs/one")
    done = launch(place, TRAIN, *flags, "--output_dir", "runs/two")
    assert done.returncode == 0, done.stderr
    one, two = losses(place / "runs/one"), losses(place / "runs/two")
    assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, 9))
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=2e-4)
    first, second = results(place / "runs/one"), results(place / "runs/two")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=2e-3, rtol=2e-3, msg=name)
