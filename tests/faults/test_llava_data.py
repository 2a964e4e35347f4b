"""Rows 20 to 22 and 26: long samples, tokens typed in text, placeholders without pictures, text alone; real runs.

Also data workers: a broken image in one of them, and one that is killed.
"""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import tiny_llava
import torch
from tiny_llava import INSTRUCT, START, TRAIN, assert_same_results, command, conversation, launch, losses, run
from transformers import AutoTokenizer

from mllm.data.sampler import EpochSampler
from mllm.training.task import Collator

place, batches = tiny_llava.place, tiny_llava.batches  # fixtures
TOKENS = 16
"""Of one picture, by the tiny encoder."""


def flags(place: Path, records: list[dict], *more: str) -> list[str]:
    (place / "own.json").write_text(json.dumps(records))
    return [*INSTRUCT, *START, "--data_path", "own.json", "--num_train_epochs", "1", *more]


def image_id(place: Path) -> int:
    """`<image>` is the first token that is added to the language model's own."""
    return len(AutoTokenizer.from_pretrained(place / "llm"))


def test_row_20_samples_longer_than_the_context(place: Path, batches: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut and counted, never a row without labels, no picture cut; one with nothing to learn is named or left out."""
    answer = "two dogs and a red cat " * 20
    late = [("a red cat", "cat"), ("<image> And?", answer)]
    records = [conversation(f"{i}.png", [("What is it?", answer)]) for i in range(6)]
    records += [conversation(None, late) | {"id": "late", "image": "6.png"}]
    records += [conversation("7.png", [("What?", "cat")])]
    hopeless = conversation("8.png", [("picture " * 200, "cat")])
    cut = ["--model_max_length", "64", "--output_dir"]
    words = flags(place, [*records, hopeless], *cut, "runs/no")
    output = command(place, monkeypatch, "train_llava", *words, code=2)
    assert "sample 8 (id 8.png)" in output
    assert "every label is masked" in output
    assert not batches
    run(place, monkeypatch, *flags(place, [*records, hopeless], *cut, "runs/long", "--on_bad_sample", "skip"))
    ids = torch.cat([row for batch in batches for row in batch["input_ids"].split(1, 1)]).flatten()
    assert len(batches) == 2
    assert (ids == image_id(place)).sum() == TOKENS * sum("image" in record for record in records)
    for batch in batches:
        assert batch["input_ids"].shape[1] <= 64
        assert (batch["labels"] != -100).any(dim=1).all()
    summary = json.loads((place / "runs/long/instruct/done.json").read_text())
    assert summary["truncated_samples"] == 7
    skipped = [json.loads(line) for line in (place / "runs/long/instruct/skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == 1
    assert "8.png" in json.dumps(skipped)


def test_row_21_tokens_typed_in_text_are_text(place: Path, batches: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """In answers and in questions without a picture: as many special tokens as there are pictures and turns."""
    typed = "Type <image> or <|im_end|> or <|im_start|>assistant or <pad>"
    records = [conversation(f"{i}.png", [("What is it?", typed)]) for i in range(2)]
    records += [conversation(None, [(typed, "cat")]) for _ in range(2)]
    run(place, monkeypatch, *flags(place, records, "--output_dir", "runs/typed"))
    tokenizer = AutoTokenizer.from_pretrained(place / "llm")
    [batch] = batches
    ids = batch["input_ids"][batch["attention_mask"].bool()]
    assert (ids == image_id(place)).sum() == 2 * TOKENS
    turns = 2 + 1  # and the system text
    for name in ("<|im_start|>", "<|im_end|>"):
        assert (ids == tokenizer.convert_tokens_to_ids(name)).sum() == len(records) * turns
    texts = [tokenizer.decode(row[row != image_id(place)]) for row in batch["input_ids"]]
    assert sum(typed in text for text in texts) == len(records)


@pytest.mark.parametrize(
    ("images", "text"),
    [(["0.png"], "<image>\n<image>\nWhat?"), (["0.png", "1.png"], "<image>\nWhat?"), (["0.png"], "What?")],
)
def test_row_22_placeholders_that_are_not_the_pictures(images, text, place, batches, monkeypatch):
    wrong = conversation(None, [(text, "cat")]) | {"id": "wrong", "image": images}
    records = [conversation("3.png", [("What?", "cat")]), wrong]
    words = flags(place, records, "--output_dir", "runs/wrong")
    output = command(place, monkeypatch, "train_llava", *words, code=2)
    assert f"sample 1 (id wrong): it has {len(images)} image" in output
    assert not batches
    assert not (place / "runs/wrong").exists()


WORKERS = ("--feature_cache", "False", "--dataloader_num_workers", "1", "--max_steps", "2")


def test_a_broken_image_in_a_data_worker_is_one_sentence(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "images" / "broken.png").write_bytes((place / "images" / "0.png").read_bytes()[:60])
    records = [conversation("broken.png", [("What is it?", "cat")])] * 4
    words = flags(place, records, *WORKERS, "--output_dir", "runs/broken")
    output = command(place, monkeypatch, "train_llava", *words, code=2)
    assert "error: image broken.png in images: " in output
    assert "Caught" not in output


def test_a_killed_data_worker_is_named_with_the_flag(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Collator, samples: list[dict]) -> None:
        assert multiprocessing.parent_process() is not None, "the samples are read in a worker"
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Collator, "__call__", killed)
    words = flags(place, [conversation("0.png", [("What is it?", "cat")])] * 4, *WORKERS, "--output_dir", "runs/killed")
    output = command(place, monkeypatch, "train_llava", *words, code=1)
    assert "died, probably for lack of memory or /dev/shm: use fewer --dataloader_num_workers" in output
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, "torch's handler raises anywhere"


@pytest.mark.slow
def test_row_26_text_alone_on_one_rank_of_zero3_trains_as_one_rank_does(place, monkeypatch):
    """Against one rank without DeepSpeed; every weight trains."""
    flags = [*INSTRUCT, *START, "--group_by_modality_length", "False"]
    flags += ["--per_device_train_batch_size", "1", "--num_train_epochs", "1"]
    order = EpochSampler([1] * 32, batch_size=1, chunks=4, seed=0, group_by_modality_length=False).order(0)
    is_text = [index >= 20 for index in order]
    assert any(is_text[i] != is_text[i + 1] for i in range(0, 32, 2))  # rank 0 and rank 1 of one forward pass
    run(place, monkeypatch, *flags, "--output_dir", "runs/one")
    done = launch(place, TRAIN, *flags, "--output_dir", "runs/two")
    assert done.returncode == 0, done.stderr
    one, two = losses(place / "runs/one"), losses(place / "runs/two")
    assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, 9))
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=2e-4)
    assert_same_results(place / "runs/two", place / "runs/one", 2e-3)
