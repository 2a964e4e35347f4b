"""Rows 20 to 22 and 26: long samples, tokens typed in text, placeholders without images, text alone; real runs.

Also data workers: a broken image in one of them, and one that is killed. And data that changes between two commands.
"""

import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

import pytest
import tiny_llava
import torch
from llava_worker import stop_in_step
from tiny_llava import ALIGN, INSTRUCT, START, TRAIN, assert_same_results, command, conversation, launch, losses, run
from tiny_mllm import make_images
from transformers import AutoTokenizer

from clips.common.errors import UserError
from clips.data.splits import held_out_images
from mllm.data.batches import EpochSampler
from mllm.training.trainer import Collator, LlavaTrainer

place, batches = tiny_llava.place, tiny_llava.batches  # fixtures
TOKENS = 16
"""Of one image, by the tiny encoder."""


def flags(place: Path, records: list[dict], *more: str) -> list[str]:
    (place / "own.json").write_text(json.dumps(records))
    return [*INSTRUCT, *START, "--data_path", "own.json", "--num_train_epochs", "1", *more]


def image_id(place: Path) -> int:
    """`<image>` is the first token that is added to the language model's own."""
    return len(AutoTokenizer.from_pretrained(place / "llm"))


def test_row_20_samples_longer_than_the_context(place: Path, batches: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut and counted, never a row without labels, no image cut; one with nothing to learn is named or left out."""
    answer = "two dogs and a red cat " * 20
    late = [("a red cat", "cat"), ("<image> And?", answer)]
    records = [conversation(f"{i}.png", [("What is it?", answer)]) for i in range(6)]
    records += [conversation(None, late) | {"id": "late", "image": "6.png"}]
    records += [conversation("7.png", [("What?", "cat")])]
    hopeless = conversation("8.png", [("image " * 200, "cat")])
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
    """In answers and in questions without an image: as many special tokens as there are images and turns."""
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
def test_row_22_placeholders_that_are_not_the_images(images, text, place, batches, monkeypatch):
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


def test_a_stopped_stage_goes_on_with_the_same_data_only(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It went on in silence with other records, or in another order, and with fewer ended in islice's ValueError."""
    records = [conversation(f"{i}.png", [("What is it?", f"cat {i}")]) for i in range(12)]

    def ended(code: int, of: list[dict]) -> str:
        words = flags(place, of, "--num_train_epochs", "2", "--output_dir", "runs/stopped")
        return command(place, monkeypatch, "train_llava", *words, code=code)

    with monkeypatch.context() as patch:
        patch.setattr(LlavaTrainer, "begin_step", LlavaTrainer.begin_step)  # undone at the end of the block
        stop_in_step(4)
        ended(143, records)
    another = conversation("12.png", [("What is it?", "a dog")])
    for of, changed in (
        (records[::-1], "as many, 12 samples"),
        ([*records[1:], another], "as many, 12 samples"),
        ([*records, another], "12 samples, now 13"),
        (records[:4], "12 samples, now 4"),
    ):
        output = ended(2, of)
        assert f"runs/stopped/instruct has trained on other data ({changed}): give another --output_dir" in output
    record = place / "runs/stopped/instruct/data.json"
    record.rename(place / "kept.json")  # as in a run that an older version began
    assert "(step 4 is beyond the end with the 4 samples of now)" in ended(2, records[:4])
    assert not record.exists()
    (place / "kept.json").replace(record)
    assert "goes on from runs/stopped/instruct/checkpoints/step-0000000" in ended(0, records)


def test_stage_2_holds_no_image_out_that_stage_1_trained_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 99 images none is held out. With 61 more 12 were, of which stage 1 had seen 8."""
    names = make_images(place / "many", 160)

    def ended(code: int, stage: int, images: int, output_dir: str, *more: str) -> str:
        held_out_images.cache_clear()  # a command is a process of its own
        rows = "".join(f"{name},a red cat {name}\n" for name in names[:images])
        (place / "many" / "t.csv").write_text(f"image,text\n{rows}")
        words = [*(ALIGN if stage == 1 else INSTRUCT), "--data_path", "many/t.csv", "--image_folder", "many"]
        words += ["--max_steps", "1", "--held_out", "0.08", "--output_dir", output_dir, *more]
        return command(place, monkeypatch, "train_llava", *words, code=code)

    ended(0, 1, 99, "runs/few")
    assert "runs/few/align has trained on other data (99 samples, now 1" in ended(2, 1, 160, "runs/few")
    leaks = ended(2, 2, 160, "runs/few")
    assert re.search(r"stage 1 in runs/few has trained on \d+ of the \d+ images that stage 2 would hold out", leaks)
    assert not (place / "runs/few/held_out").exists()
    ended(0, 2, 160, "runs/few", "--instruct.held_out", "0")
    ended(0, 1, 120, "runs/more")  # from 100 on an image stays on its side
    assert "held out" in ended(0, 2, 160, "runs/more")


def test_the_held_out_test_is_of_the_data_that_a_stage_trains_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that died before its first checkpoint took other data, and kept the test of the old ones."""
    names = make_images(place / "replaced", 160)

    def ended(code: int, text: str) -> set[str]:
        held_out_images.cache_clear()  # a command is a process of its own
        (place / "replaced/t.csv").write_text("image,text\n" + "".join(f"{name},{text} {name}\n" for name in names))
        words = [*INSTRUCT, *START, "--data_path", "replaced/t.csv", "--image_folder", "replaced", "--max_steps", "1"]
        command(place, monkeypatch, "train_llava", *words, "--output_dir", "runs/replaced", code=code)
        lines = (place / "runs/replaced/held_out/description.jsonl").read_text().splitlines()
        return {reference.rpartition(" ")[0] for line in lines for reference in json.loads(line)["references"]}

    with monkeypatch.context() as patch:
        patch.setattr("mllm.training.run.train", lambda *_: (_ for _ in ()).throw(UserError("it dies here")))
        assert ended(2, "a red cat") == {"a red cat"}
    assert ended(0, "two dogs") == {"two dogs"}
    record = json.loads((place / "runs/replaced/instruct/data.json").read_text())
    assert len(record["held_out"]) == 160 - record["samples"]


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
