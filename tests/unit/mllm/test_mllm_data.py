"""LLaVA data: records, images, order, collation; and the demo data made of it."""

import io
import json
import pickle
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_tokenizers import make_tokenizer
from torch.utils.data import DataLoader

from clips.common.errors import BrokenDataError, UserError
from clips.common.files import read_json_records, write_json
from clips.common.rundir import UNSEEN
from clips.data.demo import NUMBERS, PLACES, ensure_demo
from mllm.data.batches import EpochSampler, pad_rows
from mllm.data.captions import open_store
from mllm.data.conversation import IGNORE, ConversationEncoder
from mllm.data.dataset import LlavaDataset
from mllm.data.demo import (
    DESCRIPTIONS,
    IMAGES,
    KINDS,
    QUESTIONS,
    UNSEEN_QUESTIONS,
    DemoScene,
    ensure_llava_demo,
    instruct_scenes,
)
from mllm.data.images import ImageStore, pixel_loader
from mllm.data.questions import UNSEEN_ANSWERS
from mllm.evaluation.summary import print_summary
from mllm.training.build import data_of
from mllm.training.config import TrainFlags
from mllm.training.trainer import Collator

TOKENS = 3
OPTIONS = {"align": 50, "instruct": 50, "text_only": 6, "per_kind": 20}


@pytest.fixture(scope="module")
def encoder() -> ConversationEncoder:
    return ConversationEncoder(make_tokenizer("gpt2"), "chatml", TOKENS, 2048)


def record(name: str | None, question: str = "What?", answer: str = "A cat.", **extra) -> dict:
    value = f"<image>\n{question}" if name else question
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": f"id-{name}", "conversations": turns} | ({"image": name} if name else {}) | extra


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images" / "sub"
    images.mkdir(parents=True)
    for number, size in enumerate([(8, 8), (12, 6), (5, 9)]):
        Image.new("RGB", size, (40 * number, 10, 200)).save(images / f"{number}.png")
    return tmp_path / "images"


def write(path: Path, records: list) -> Path:
    path.write_text(
        "\n".join(map(json.dumps, records)) if path.suffix == ".jsonl" else json.dumps(records), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_dataset_reads_both_formats_and_multi_image(suffix, tmp_path, folder, encoder):
    two = record("sub/0.png", "And <image>?") | {"image": ["sub/0.png", "sub/1.png"]}
    records = [record("sub/0.png", "a line\u2028separator"), record(None), two]
    dataset = LlavaDataset(write(tmp_path / f"data{suffix}", records), encoder, ImageStore(folder))
    assert [dataset[i]["images"] for i in range(3)] == [["sub/0.png"], [], ["sub/0.png", "sub/1.png"]]
    assert [dataset[i]["input_ids"].count(encoder.image_id) for i in range(3)] == [TOKENS, 0, 2 * TOKENS]
    assert dataset[~2] == dataset[2] | {"labels": [IGNORE] * len(dataset[2]["labels"])}, "nothing is learned of it"
    signs = [length > 0 for length in dataset.modality_lengths]
    assert signs == [True, False, True]
    assert not dataset.truncated.any()


@pytest.mark.parametrize("length", [*range(20, 70, 3)])
def test_what_passes_the_check_at_the_start_can_be_trained_on(tmp_path, folder, length):
    """The format's own texts, a leading answer and an empty one count too; else a run ends hours later."""
    short = ConversationEncoder(make_tokenizer("gpt2"), "chatml", TOKENS, length)
    late = record(None, "word " * 100)
    late["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
    empty = record(None, "word " * 5, "")
    empty["conversations"] += record(None, "word " * 20)["conversations"]
    records = [record("sub/0.png", "word " * 2), late, empty, record(None, "Hi", "Yes.")]
    data, store = write(tmp_path / "data.json", records), ImageStore(folder)
    try:
        dataset = LlavaDataset(data, short, store, "skip")
    except UserError:
        assert length < 40, "not even the shortest sample fits"
        return
    assert 1 in {problem["index"] for problem in dataset.skipped}
    assert all(any(label != IGNORE for label in dataset[i]["labels"]) for i in range(len(dataset)))
    with pytest.raises(UserError, match="cannot be trained on"):
        LlavaDataset(data, short, store)


def test_unreadable_files_and_images_without_a_folder(tmp_path, encoder):
    for name, text, noun in (("data.json", "[]", "empty"), ("data.jsonl", '{"id": 1}\n{', "line 2")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=noun):
            LlavaDataset(tmp_path / name, encoder, None)
    with pytest.raises(UserError, match="--image_folder"):
        ImageStore(tmp_path / "none")
    with pytest.raises(UserError, match="--image_folder"):
        LlavaDataset(write(tmp_path / "data.json", [record("a.png")]), encoder, None)


def test_tar_gives_the_same_images_in_every_process(tmp_path, folder):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder, arcname=".")
    store, names = ImageStore(tmp_path / "images.tar"), [f"sub/{i}.png" for i in range(3)]
    expected = [ImageStore(folder).read(name) for name in names]
    assert [store.read(name) for name in names] == expected  # opens the file before the workers fork
    assert [pickle.loads(pickle.dumps(store)).read(name) for name in names] == expected
    loader = DataLoader(names * 40, batch_size=1, num_workers=2, collate_fn=lambda batch: store.read(batch[0]))
    assert list(loader) == expected * 40
    assert store.problem("link.png")


def test_collator_pads_right_and_keeps_image_order(tmp_path, folder, encoder):
    records = [record("sub/1.png", "A longer question here?"), record(None), record("sub/0.png")]
    dataset = LlavaDataset(write(tmp_path / "data.json", records), encoder, ImageStore(folder))
    batches = []

    def load(names: list[str]) -> torch.Tensor:
        batches.append(names)
        return torch.arange(len(names))

    pad = encoder.tokenizer.pad_token_id
    samples = [dataset[i] for i in range(3)]
    batch = Collator(pad, (encoder.image_id,), load, image_key="image_rows")(samples)
    assert batches == [["sub/1.png", "sub/0.png"]]
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == sample["input_ids"]
        assert (batch["input_ids"][row, length:] == pad).all()
        assert batch["labels"][row, :length].tolist() == sample["labels"]
        assert (batch["labels"][row, length:] == IGNORE).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
    assert "image_rows" not in Collator(pad, (encoder.image_id,), load, image_key="image_rows")([dataset[1]])
    assert pad_rows([[1], [2, 3]], 0, left=True).tolist() == [[0, 1], [2, 3]]


def lengths() -> list[int]:
    rng = np.random.default_rng(0)
    return [int(n) * (1 if rng.random() < 0.7 else -1) for n in rng.integers(1, 500, 403)]


def sampler(seed: int = 0, epoch: int = 0, group: bool = True) -> list[int]:
    return EpochSampler(lengths(), batch_size=2, chunks=4, seed=seed, group_by_modality_length=group).order(epoch)


@pytest.mark.parametrize("group", [False, True])
def test_order_is_a_pure_function_of_seed_and_epoch(group):
    first = sampler(group=group)
    assert sorted(first) == list(range(403))
    assert sampler(group=group) == first
    assert sampler(epoch=1, group=group) != first
    assert sampler(seed=1, group=group) != first


@pytest.mark.parametrize("group", [False, True])
def test_any_number_of_ranks_trains_on_the_same_batches(group):
    """403 samples are 50 steps of 8 and one of 3: with 8 micro-batches five of them learn nothing."""
    steps: dict[int, list] = {}
    for chunks in (1, 2, 8):
        order = EpochSampler(lengths(), batch_size=8 // chunks, chunks=chunks, seed=0, group_by_modality_length=group)
        for ranks in {1, chunks}:
            of_ranks = [order.batches(rank=rank, ranks=ranks, step=45) for rank in range(ranks)]
            parts = [[next(indices) for indices in of_ranks for _ in range(chunks // ranks)] for _ in range(60)]
            learned = [sorted(i for micro in step for i in micro if i >= 0) for step in parts]
            assert [sum(i < 0 for micro in step for i in micro) for step in parts][5] == max(0, chunks - 3)
            assert learned[5:57] == steps.setdefault(1, learned)[5:57], "the same samples in each step"
    assert [len(step) for step in steps[1]][:8] == [8, 8, 8, 8, 8, 3, 8, 8]
    assert sorted(i for step in steps[1][6:57] for i in step) == list(range(403)), "an epoch has each sample once"


def test_grouping_keeps_modality_and_balances():
    sizes = np.array(lengths())
    order = np.array(sampler())
    left_over = sum((count % 8) for count in ((sizes > 0).sum(), (sizes < 0).sum()))
    whole = order[: len(order) - left_over].reshape(-1, 4, 2)
    spread = []
    for batch in whole:
        assert len({*(sizes[batch.ravel()] > 0)}) == 1, "one modality in a global batch"
        sums = np.abs(sizes[batch]).sum(axis=1)
        spread.append(np.ptp(np.abs(sizes[batch])))
        assert sums.max() - sums.min() <= np.abs(sizes[batch]).max()
    assert np.mean(spread) < 60, "similar lengths: random batches of 8 spread over 390 words"
    assert len(whole) > 40
    means = [np.abs(sizes[batch]).mean() for batch in whole]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4, "the batches are shuffled, not sorted"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("demo")
    ensure_demo(root / "scenes", sizes={"train": 100, "val": 2, "test": 70, UNSEEN: 70})
    return ensure_llava_demo(root / "llava", root / "scenes", **OPTIONS), root


def truths(root: Path) -> dict[str, dict]:
    scenes = {}
    for split in ("train", "test", UNSEEN):
        for path in sorted((root / "scenes" / split).glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        scenes[f"{member.name[:-5]}.jpg"] = json.load(
                            io.TextIOWrapper(tar.extractfile(member), encoding="utf-8")
                        )
    return scenes


def placed(truth: dict) -> dict[str, str]:
    return {thing["concept"]: thing["place"] for thing in truth["objects"]}


def at(place: str) -> str:
    return "in the center" if place == "center" else f"at the {place}"


def test_demo_answers_are_true(demo):
    """Every question about an image is answered again from the scene's own truth, by reading the question."""
    directory, root = demo
    truth = truths(root)
    files = [directory / name for name in (QUESTIONS, UNSEEN_QUESTIONS) if (directory / name).is_file()]
    questions = [(q["image"], q["text"], q["answer"], q["kind"]) for file in files for q in read_json_records(file)]
    for sample in json.loads((directory / "instruct.json").read_text()):
        values = [turn["value"].replace("<image>", "").strip() for turn in sample["conversations"]]
        if "image" in sample:
            questions += [(sample["image"], q, a, None) for q, a in zip(values[::2], values[1::2], strict=True)]
    seen = Counter()
    for image, question, answer, kind in questions:
        things, background = placed(truth[image]), truth[image]["background"]
        here = [thing for thing, place in things.items() if at(place) in question]
        named = [thing for thing in things if re.search(rf"\b{thing}\b", question)]
        if answer in ("Yes", "No"):
            expected = "yes_no"
            if " at the " in question or " in the center" in question:
                true = f"a {here[0]}?" in question or f"a {here[0]} {at(things[here[0]])}?" in question
            else:
                true = any(re.search(rf"\ba {thing}\b", question) for thing in things)
            assert answer == ("Yes" if true else "No"), (question, truth[image])
        elif answer.lower() in NUMBERS:
            expected = "count"
            assert NUMBERS.index(answer.lower()) == len(things)
        elif answer.lower() in map(at, PLACES):
            expected = "where"
            (thing,) = named
            assert answer.lower() == at(things[thing]), (question, answer, things)
        elif answer.lower() == background:
            expected = "background"
            assert "color" in question
        elif side := re.search(r" (left of|right of|above|below) the ", question):
            expected = "relation"
            (other,) = named
            axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[side[1]]
            begin = PLACES[things[other]][axis]
            assert [answer[2:]] == [name for name in things if (PLACES[things[name]][axis] - begin) * sign > 0]
        elif len(answer.split()) <= 4 and answer.startswith("A ") and not answer.endswith("."):
            expected = "identity"
            assert answer[2:] in (here or list(things)[:1]), (question, answer, things)
        else:
            expected = "description"
            assert all(thing in answer.lower() for thing in things)
        assert kind in (None, expected)
        seen[expected] += 1
    assert set(seen) == {*KINDS, "background", "description"}


def test_most_scenes_for_instruction_have_several_things():
    things = [[("fox", "center")] * (1 + number % 2) for number in range(3_000)]
    scenes = [DemoScene(f"{n}.jpg", b"", tuple(shown), "red", "", "") for n, shown in enumerate(things)]
    some = instruct_scenes(iter(scenes), 1_000, seed=0)
    singles = sum(len(scene.things) == 1 for scene in some)
    assert some == sorted(some, key=lambda scene: int(scene.name[:-4])), "in their order"
    assert singles / 1_000 == pytest.approx(0.25, abs=0.04)  # of 3 scenes of several things and 1 of 3 of one thing
    assert len(instruct_scenes(iter(scenes), 2_500, seed=0)) == 2_500, "the others with one thing fill up"


def test_demo_questions_are_balanced_and_held_out(demo):
    directory, root = demo
    truth = truths(root)
    questions = read_json_records(directory / QUESTIONS)
    assert Counter(q["kind"] for q in questions) == dict.fromkeys(KINDS, 20)
    assert [q["question_id"] for q in questions] == list(range(len(questions)))
    assert len({(q["image"], q["text"]) for q in questions}) == len(questions)
    assert Counter(q["answer"] for q in questions if q["kind"] == "yes_no") == {"Yes": 10, "No": 10}
    assert max(Counter(q["answer"] for q in questions if q["kind"] == "count").values()) <= 7

    if (directory / UNSEEN_QUESTIONS).is_file():  # the same questions about the same scenes
        unseen = read_json_records(directory / UNSEEN_QUESTIONS)
        assert [q | {"image": q["image"].replace(UNSEEN, "test")} for q in unseen] == questions
        assert all((directory / IMAGES / q["image"]).is_file() for q in unseen)

    def layout(name: str) -> tuple:
        things = placed(truth[name])
        return (*sorted(things.items()), *([truth[name]["background"]] if len(things) == 1 else []))

    trained = {sample["image"] for sample in json.loads((directory / "align.json").read_text())}
    instruct = {s["image"] for s in json.loads((directory / "instruct.json").read_text()) if "image" in s}
    assert (len(trained), len(instruct)) == (50, 50)
    assert not trained & instruct
    tested = {q["image"] for q in questions} | {row["image"] for row in read_json_records(directory / DESCRIPTIONS)}
    assert not {layout(name) for name in trained | instruct} & {layout(name) for name in tested}


def test_demo_is_deterministic_and_kept(demo, tmp_path):
    directory, root = demo
    before = (directory / "align.json").stat().st_mtime_ns
    ensure_llava_demo(directory, root / "scenes", **OPTIONS)
    assert (directory / "align.json").stat().st_mtime_ns == before
    again = ensure_llava_demo(tmp_path / "again", root / "scenes", **OPTIONS)
    for path in directory.rglob("*"):
        if path.is_file():
            assert (again / path.relative_to(directory)).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="train scenes"):
        ensure_llava_demo(tmp_path / "more", root / "scenes", align=100, instruct=50)


def test_the_summary_of_the_demo_says_whose_images_are_asked_about(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = Path("runs/demo"), Path("runs/llava-clips/evaluation")
    for folder in folders:
        folder.mkdir(parents=True)
    line = {"kind": "identity", "prompt": "What?", "text": "A cat", "expected": "A dog", "image": "0.jpg"}
    for place, file, artists in (("", "answers", "seen"), (f"{UNSEEN}/", UNSEEN_ANSWERS, UNSEEN)):
        write_json(folders[0] / "evaluation.json", {"metrics": {f"{place}zero_shot_top1": {"value": 50, "chance": 3}}})
        write(folders[1] / f"{file}.jsonl", [line | {"correct": False}])
        answered = {
            "identity": {"value": 0, "chance": 3.1},
            "colour": {"value": 9, "chance": 8},
            "cider_d": {"value": 1},
        }
        write_json(folders[1] / "results.json", {"metrics": {place + name: row for name, row in answered.items()}})
        print_summary()
        text = capsys.readouterr().out
        assert f"images in {'an unseen' if artists == 'unseen' else 'a known'} drawing style" in text
        assert "What? – A cat (wrong: A dog)" in text
        assert re.search(r"answers: identity +│ +0.0 │ +3.1 │ +50 to 70", text)
        assert re.search(r"zero-shot top 1 +│ +50.0 │ +3.0 │ +62 to 77", text)
        assert re.search(r"answers: colour +│ +9.0 │ +8.0 │ +│", text), "a metric without a normal range"
        assert ("test in an unseen drawing style is missing" in text) == (artists == "seen")


def test_captions_train_as_they_are(tmp_path, folder, encoder, caplog, monkeypatch):
    """Captions had no way into the second half but lines of Python that one had to type."""
    rows = "".join(f"sub/{number}.png;Größe {number}\n" for number in range(3))
    table = tmp_path / "my.csv"
    table.write_text(f"file_name;caption\n{rows}sub/3.png;gone\n./sub/0.png;\n", encoding="cp1252")
    with pytest.raises(BrokenDataError, match=r"2 of 5 rows cannot be used"):
        open_store(table, folder)
    assert re.search(r"2 of 5 rows are skipped .*sub/3\.png", caplog.text)
    table.write_text(f"file_name;caption\n{rows}", encoding="cp1252")
    store, images = open_store(table, folder), ImageStore(folder)
    dataset = LlavaDataset(table, encoder, store)
    assert [dataset[i]["images"] for i in range(3)] == [["0"], ["1"], ["2"]]
    assert [record.turns[1]["value"] for record in dataset.records] == ["Größe 0", "Größe 1", "Größe 2"]
    for number in range(3):
        name = f"sub/{number}.png"
        assert store.load(str(number)).tobytes() == images.load(name).tobytes()
        assert store.size(str(number)) == images.size(name)
    (folder / "sub/2.png").rename(tmp_path / "away.png")
    with pytest.raises(UserError, match=r"my\.csv#2.*sub/2\.png"):
        pixel_loader(store, lambda image: image)(["2"])
    (tmp_path / "away.png").rename(folder / "sub/2.png")
    with pytest.raises(UserError, match="--image_folder"):
        open_store(table, tmp_path / "elsewhere")
    monkeypatch.chdir(folder)
    open_store(table, None)
    assert "the current folder" in caplog.text
    lines = [{"file_name": f"sub/{i}.png", "captions": [f"a {i}", f"b {i}"]} for i in range(3)]
    jsonl = write(tmp_path / "my.jsonl", lines)
    assert LlavaDataset(jsonl, encoder, open_store(jsonl, folder)).records[2].turns[1]["value"] == "a 2"
    remote = TrainFlags(stage=1, data_path="https://host/0.tar", image_folder="s3://bucket/images")
    assert data_of(remote) == ("https://host/0.tar", "s3://bucket/images"), "one slash of // was lost"
