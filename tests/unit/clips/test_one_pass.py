"""The full evaluation reads, decodes and encodes each image of a test set once; its metrics are those of a plain loop
over single images. What a run and the commands measure, export and report."""

import json
import os
import shlex
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_corpus import encode
from conftest import random_model, script_parser, tiny_run
from launched import write_shard
from PIL import Image

from clips.common.errors import CommandError, UserError
from clips.common.live import remember_speed
from clips.common.rundir import has_report, is_finished
from clips.config import DataConfig, EvalConfig, MixPart, NamedSet, RunConfig
from clips.data.images import decode_image, eval_transform
from clips.data.sample import BrokenSample
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.evaluation.encode import encode_images
from clips.evaluation.evaluate import evaluate, evaluate_from_flags, nearest_texts
from clips.evaluation.metrics import linear_probe, retrieval_metrics, zero_shot_metrics
from clips.evaluation.testsets import ImageTestSet, Item, SourceSet, classes_of, open_test_set
from clips.model.clips import CLIPSModel
from clips.model.vision import VisionTower
from clips.training.finish import finish_run, print_next
from clips.training.prepare import print_plan, speed_name
from clips.weights.export import export_from_flags, write_native

SIZES = {"train": 30, "test": 25, "more": 10}
BROKEN = 6
"""The image of each set that cannot be read."""
TEXTS = ["a plain image, number 1 2 3 4 5 6 7 8 9 0.", "a box of kind one is white.", "seen from above"]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return build_tokenizer("wordpiece", TEXTS * 4, vocab_size=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two test sets and training data of noise; each third image has a label, each fourth no long caption."""
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        samples = []
        for i in range(size):
            image = encode(Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)))
            fields = {"org_caption": f"image {name} {i}", "captions": [f"a box {i}", f"number {i} seen from above"]}
            label = {} if i % 3 else {"label": f"kind {i % 2}"}
            long = {} if i % 4 == 1 else {"txt": f"A plain image. It has number {i}.{' A box.' * (i % 5)}".encode()}
            end = 60 if i == BROKEN else None
            samples.append((image[:end], {"json": json.dumps(fields | label).encode(), **long}))
        write_shard(folder / f"{name}.tar", samples)
    paths = {name: str(folder / f"{name}.tar") for name in SIZES}
    tiny = tiny_run()
    further = (NamedSet(name="more", data=paths["more"]),)
    data = replace(tiny.data, train=paths["train"], test=paths["test"], further_tests=further)
    return replace(tiny, data=data, eval=EvalConfig(batch_size=4))


def test_each_image_is_read_decoded_and_encoded_once_and_every_figure_has_chance_and_items(
    run, tokenizer, tmp_path, monkeypatch
):
    read: Counter[str] = Counter()
    opened: Counter[bytes] = Counter()
    encoded: list[int] = []
    really_read, really_open, really_encode = SourceSet.read, Image.open, VisionTower.forward

    def counting_read(self: SourceSet, index: int) -> Item:
        item = really_read(self, index)
        read[item.captions["web"][0]] += 1
        return item

    def counting_open(file: Any, *args: Any, **kwargs: Any) -> Image.Image:
        opened[file.getvalue()] += 1
        return really_open(file, *args, **kwargs)

    def counting_encode(self: VisionTower, images: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        encoded.append(len(images))
        return really_encode(self, images, *args)

    model = random_model(run)
    monkeypatch.setattr(SourceSet, "read", counting_read)
    monkeypatch.setattr(Image, "open", counting_open)
    monkeypatch.setattr(VisionTower, "forward", counting_encode)
    metrics = evaluate(model, tokenizer, run, "test", full=True, out=tmp_path / "found.json")
    evaluation = json.loads((tmp_path / "found.json").read_text())
    assert evaluation["metrics"] == {name: asdict(metric) for name, metric in metrics.items()}
    # Each third image has a label and serves classification, the others retrieval.
    assert (metrics["sentence_i2t_r1"].items, metrics["zero_shot_top1"].items) == (16, 8)
    assert metrics["sentence_i2t_r1"].chance == pytest.approx(100 / 16, abs=1e-3)
    assert metrics["part_t2i_r1"].items == 47  # at most five sentences each
    wanted = {"sentence_i2t_r1", "zero_shot_top1", "caption_token_top1", "linear_probe_top1"}
    assert wanted | {f"more/{name}" for name in wanted} <= evaluation["metrics"].keys()
    assert evaluation["skipped_images"] == 2
    assert read == Counter(f"image {name} {i}" for name, size in SIZES.items() for i in range(size))
    assert len(opened) == sum(SIZES.values())
    assert set(opened.values()) == {1}
    assert sum(encoded) == sum(SIZES.values()) - len(SIZES)
    assert len(encoded) == sum(-(-size // run.eval.batch_size) for size in SIZES.values())


def test_tokens_of_images_are_gone_with_their_batch(run: RunConfig, tokenizer: CaptionTokenizer) -> None:
    """A set of 50,000 images has 30 GB of them, at B/16 and 224 px in fp32."""
    model = random_model(run)
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    model.visual.register_forward_pre_hook(lambda *_: alive.append(sum(ref() is not None for ref in seen)))
    model.visual.register_forward_hook(lambda _, __, out: seen.append(weakref.ref(out[1])))
    images = encode_images(model, open_test_set(run.data, "test")[0], batch_size=4, tokenizer=tokenizer)
    assert images.caption_tokens is not None
    assert alive == [0] * 7
    assert not any(ref() is not None for ref in seen)


@torch.no_grad()
def test_images_are_encoded_at_another_size(run: RunConfig, tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    for i, shape in enumerate([(40, 30), (90, 20), (15, 60)]):
        image = np.random.default_rng(i).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    model, items = random_model(run), ImageTestSet(tmp_path)
    images = encode_images(model, items, image_size=48, batch_size=2)
    assert (images.indices, model.visual.image_size) == ([0, 1, 2], 32)
    model.visual.set_image_size(48)
    for features, index in zip(images.features, images.indices, strict=True):
        pixels = eval_transform(48)(decode_image(items.read(index).image))
        torch.testing.assert_close(features, model.encode_image(pixels[None])[0], atol=1e-5, rtol=1e-5)
    write_native(model, run, tokenizer, tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--data", run.data.test, "--limit", "3", "--image-size"]
    parse = script_parser("evaluate_clips").parse_args
    evaluate_from_flags(parse([*flags, "48"]))
    (out,) = (tmp_path / "model").glob("evaluation-*-3-48px.json")
    assert json.loads(out.read_text())["image_size"] == 48
    for word in ("20", "0", "-16"):
        with pytest.raises(UserError, match=f"--image-size {word} is not a multiple"):
            evaluate_from_flags(parse([*flags, word]))


class Slow:
    """A set that is encoded and captioned image by image, by the whole model's forward pass."""

    def __init__(self, model: CLIPSModel, tokenizer: CaptionTokenizer, run: RunConfig, split: str) -> None:
        self.items: list[Item] = []
        features, pooled = [], []
        self.predicted: list[int] = []
        self.truth: list[int] = []
        for item, pixels in self._read(open_test_set(run.data, split)[0]):
            self.items.append(item)
            pooled.append(model.visual(pixels)[0])
            features.append(model.encode_image(pixels))
            for long in item.captions["long"]:
                caption = tokenizer.caption_ids(tokenizer.encode([long]), run.model.captioner.length)
                web = tokenizer.for_tower(item.captions["web"], run.model.text)
                states = model(pixels, [web], caption).caption_states
                self.predicted += model.captioner.head(states)[0].argmax(dim=-1).tolist()
                self.truth += caption[0, 1:].tolist()
        self.features, self.pooled = torch.cat(features), torch.cat(pooled)

    @staticmethod
    def _read(items: SourceSet) -> Iterator[tuple[Item, torch.Tensor]]:
        for index in range(len(items)):
            item = items.read(index)
            try:
                yield item, eval_transform(32)(decode_image(item.image))[None]
            except BrokenSample:
                continue

    def with_label(self, there: bool) -> list[int]:
        return [row for row, item in enumerate(self.items) if (item.label is not None) is there]

    def labels(self) -> list[str]:
        return [item.label for item in self.items if item.label is not None]


@torch.no_grad()
def slow_metrics(model: CLIPSModel, tokenizer: CaptionTokenizer, run: RunConfig, split: str) -> dict[str, float]:
    test, train = (Slow(model, tokenizer, run, name) for name in (split, "train"))
    metrics: dict[str, Any] = {}

    def encoded(texts: list[str]) -> torch.Tensor:
        return torch.cat([model.encode_text(tokenizer.for_tower([text], run.model.text)) for text in texts])

    for protocol in ("sentence", "part", "web", "long"):
        rows = [row for row in test.with_label(False) if test.items[row].captions[protocol]]
        pairs = [(i, text) for i, row in enumerate(rows) for text in test.items[row].captions[protocol]]
        owners, texts = map(list, zip(*pairs, strict=True))
        scale = float(model.logit_scale.exp())
        of_these = retrieval_metrics(test.features[rows], encoded(texts), owners, texts, scale)
        metrics |= {f"{protocol}_{name}": metric for name, metric in of_these.items()}
    classes = classes_of(test.labels())
    assert classes is not None
    prompts = torch.stack([encoded([form.format(name) for form in classes.templates]) for name in classes.names])
    truth = [classes.names.index(label) for label in test.labels()]
    of_these = zero_shot_metrics(test.features[test.with_label(True)], prompts, truth)
    metrics |= {f"zero_shot_{name}": metric for name, metric in of_these.items()}
    number = {name: i for i, name in enumerate(sorted(set(train.labels())))}
    probe = linear_probe(train.pooled[train.with_label(True)], [number[label] for label in train.labels()])
    metrics["linear_probe_top1"] = probe(test.pooled[test.with_label(True)], [number[label] for label in test.labels()])
    right = sum(p == t for p, t in zip(test.predicted, test.truth, strict=True))
    return {name: metric.value for name, metric in metrics.items()} | {
        "caption_token_top1": round(100 * right / len(test.truth), 4)
    }


@pytest.mark.parametrize("inputs", ["tokens", "queries"])
def test_the_metrics_are_those_of_a_loop_over_single_images(inputs, run, tokenizer):
    captioner = replace(run.model.captioner, inputs=inputs)
    run = replace(run, model=replace(run.model, captioner=captioner))
    model = random_model(run).eval()
    metrics = {name: metric.value for name, metric in evaluate(model, tokenizer, run, "test", full=True).items()}
    for split, prefix in (("test", ""), ("more", "more/")):
        slow = slow_metrics(model, tokenizer, run, split)
        assert slow == {name.removeprefix(prefix): metrics.pop(name) for name in [f"{prefix}{key}" for key in slow]}
    assert not metrics


def test_the_nearest_texts_of_an_image_come_in_order_and_its_own_is_right(run, tokenizer):
    items, _ = open_test_set(run.data, "test")
    cards = nearest_texts(random_model(run), tokenizer, items, image_size=32, batch_size=8, workers=0)
    assert len(cards) == 12
    for card in cards:
        cosines = [float(shown.removeprefix("cosine ")) for shown, *_ in card.texts]
        assert len(cosines) == 5
        assert cosines == sorted(cosines, reverse=True)
    kinds = {(text == card.title, right) for card in cards for _, text, right in card.texts}
    assert kinds == {(True, True), (False, None)}


def test_during_training_fewer_images_and_the_model_is_left_as_it_was(run, tokenizer):
    run = replace(run, data=replace(run.data, val=run.data.test))
    model = random_model(run).train()
    model.visual.set_image_size(48)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "linear_probe_top1" not in evaluate(model, tokenizer, run, "val", image_size=32)
    assert model.training
    assert model.visual.image_size == 48
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.visual.set_image_size(32)
    items, _ = open_test_set(run.data, "val")
    assert len(encode_images(model, items, batch_size=8, limit=16).indices) == 16 - 1, "one of them is broken"
    without = replace(run, data=replace(run.data, val=None))
    with pytest.raises(UserError, match="--val-data"):
        evaluate(model, tokenizer, without, "val")


@pytest.mark.usefixtures("one_pixel")
def test_a_report_that_fails_costs_nothing_and_can_be_made_again(run, tokenizer, tmp_path, capsys):
    model = random_model(run)
    run_dir = tmp_path / "my-[bold]run"
    run_dir.mkdir()
    line = {"kind": "train", "step": 1, "samples": 8, "loss": 4.9, "grad_norm": None}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + '\n{"kind": "train", "st')  # cut by a killed run
    run.save(run_dir / "config.json")
    (run_dir / "report").write_text("in the way")
    finish_run(run, model, tokenizer, run_dir)
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("warning")]
    assert f"the report of {run_dir} is not written" in line
    following = shlex.split(errors.splitlines()[-1])
    assert following[:5] == ["Next:", "bash", "scripts/train_llava.sh", "--vision", f"clips:{run_dir}"]
    assert following[5:7] == ["--output_dir", str(tmp_path / "llava-my-[bold]run")]
    assert following[7:] == ["--data_path", run.data.train, "--test_data", run.data.test, "--small"]
    assert "Traceback" not in errors
    assert is_finished(run_dir)
    assert not has_report(run_dir)
    assert json.loads((run_dir / "evaluation.json").read_text())["metrics"]

    (run_dir / "report").unlink()
    finish_run(run, model, tokenizer, run_dir)
    assert has_report(run_dir)
    assert "warning" not in capsys.readouterr().err


def test_the_plan_says_how_long_and_how_many_epochs(run, tmp_path, capsys, own_cache):
    model, device = random_model(run), torch.device("cpu")

    def plan(samples: int) -> str:
        print_plan(run, model, samples, tmp_path, device, 1, None)
        return " ".join(capsys.readouterr().err.replace("│", " ").split())

    first = plan(run.samples)
    assert "epochs over your" not in first
    assert "about" not in first, "nothing is known yet"
    remember_speed(speed_name(run, model, 1, device), run.samples / 150)
    assert "time about 2.5 min" in plan(run.samples)
    assert f"{run.samples} epochs over your 1 images" in plan(1)
    (tmp_path / "cache" / "speeds.json").write_text("[]")
    assert "about" not in plan(run.samples)


def test_the_plan_and_the_next_command_show_no_password(run, tmp_path, capsys, own_cache):
    held_out = {"val": "https://me:secret@host/v.tar", "test": "s3://me:secret@host/t.tar"}
    parts = tuple(MixPart(name=name, share=1, data=f"https://me:secret@host/{name}.tar") for name in "ab")
    for data in ({"train": "https://me:secret@host/x.tar"}, {"train": "mix", "mix": parts}):
        own = replace(run, data=DataConfig(**data, **held_out))
        print_plan(own, random_model(run), 64, tmp_path, torch.device("cpu"), 1, None)
        print_next(own.data, tmp_path)
        shown = capsys.readouterr().err
        assert "secret" not in shown
        assert shown.count("https://host/") >= 3


@pytest.mark.usefixtures("one_pixel")
def test_a_run_that_holds_nothing_out_names_only_what_is_there(run, tokenizer, tmp_path, capsys):
    """It named an evaluation.json that was never written."""
    run = replace(run, data=replace(run.data, train=run.data.test, test=None, val=None, further_tests=()))
    run_dir = tmp_path / "own"
    run_dir.mkdir()
    run.save(run_dir / "config.json")
    finish_run(run, random_model(run), tokenizer, run_dir)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "holds the finished run" in line]
    assert "evaluation.json" not in line
    assert not (run_dir / "evaluation.json").exists()


def test_commands_evaluate_and_export(run, tokenizer, tmp_path, capsys):
    model = random_model(run)
    native = tmp_path / "native"
    write_native(model, run, tokenizer, native)
    export_from_flags(script_parser("export_clips").parse_args(["--model", str(native), "--image-size", "48"]))
    assert "48 px" in capsys.readouterr().out
    stock = native / "export/open_clip"

    classes, rng = tmp_path / "classes", np.random.default_rng(0)
    for i in range(12):
        folder = classes / ["cat", "dog"][i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    (tmp_path / "names.txt").write_text("cat\ndog\nbird")

    def metrics(model_path, *flags):
        out = tmp_path / "out.json"
        parsed = script_parser("evaluate_clips").parse_args(
            ["--model", str(model_path), "--output", str(out), *map(str, flags)]
        )
        evaluate_from_flags(parsed)
        return json.loads(out.read_text())["metrics"]

    of_stock = metrics(stock, "--data", classes, "--classes", tmp_path / "names.txt", "--probe-train", classes)
    assert of_stock["zero_shot_top1"]["items"] == 12
    assert of_stock["zero_shot_top1"]["chance"] == pytest.approx(100 / 3, abs=1e-3)
    probed = of_stock["linear_probe_top1"]
    assert probed["value"] > 70  # tested on what it was fitted on
    assert (probed["items"], probed["chance"]) == (12, 50)
    assert "zero_shot_top1" in metrics(native)  # the run's own test split
    write_native(model, replace(run, data=DataConfig(train="")), tokenizer, tmp_path / "bare")
    with pytest.raises(UserError, match="--data"):
        export_from_flags(script_parser("export_clips").parse_args(["--model", str(tmp_path / "bare")]))
    with pytest.raises(UserError, match="names no test data: give --data,"):  # it named a flag of another command
        metrics(tmp_path / "bare")


def exported(*words: object) -> None:
    export_from_flags(script_parser("export_clips").parse_args(list(map(str, words))))


def test_an_export_replaces_an_export_and_nothing_else(run, tokenizer, tmp_path, monkeypatch):
    """`--output runs/demo` removed the run."""
    write_native(random_model(run), run, tokenizer, tmp_path / "run" / "native")
    for _ in range(2):
        exported("--model", tmp_path / "run")
    out = tmp_path / "run" / "export"
    assert {path.name for path in out.iterdir()} == {"native", "open_clip", "hf_vit"}
    exported("--model", tmp_path / "run", "--output", out)
    (out / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match=r"run/export, which holds notes\.txt: .* --output"):
        exported("--model", tmp_path / "run")
    for wrong in (out, tmp_path / "run", "..", "."):
        with pytest.raises(UserError, match="would replace all of"):
            exported("--model", "no-model", "--output", wrong)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_target_that_cannot_be_written_costs_no_measurement(run, tokenizer, tmp_path, monkeypatch, capsys):
    """And metrics that cannot be written are on the terminal."""
    write_native(random_model(run), run, tokenizer, tmp_path / "native")

    def evaluated(out: Path) -> None:
        words = ["--model", str(tmp_path / "native"), "--output", str(out)]
        evaluate_from_flags(script_parser("evaluate_clips").parse_args(words))

    (tmp_path / "out.json").mkdir()
    with pytest.raises(IsADirectoryError):
        evaluated(tmp_path / "out.json")
    assert "zero-shot" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("clips.evaluation.evaluate.encode_images", lambda *_, **__: pytest.fail("it measures"))
    with pytest.raises(UserError, match="nothing can be written to"):
        evaluated(tmp_path / "file" / "out.json")


class Failing:
    """A test set whose samples end the process that reads them, or raise a user's error."""

    def __init__(self, is_fatal: bool) -> None:
        self.is_fatal = is_fatal

    def __len__(self) -> int:
        return 3

    def read(self, index: int) -> Item:
        if self.is_fatal:
            os._exit(1)
        raise UserError(f"sample {index} is outside")


@pytest.mark.parametrize(("is_fatal", "said"), [(True, "use fewer workers"), (False, "^sample 0 is outside$")])
def test_a_worker_of_an_evaluation_ends_it_in_one_sentence(is_fatal: bool, said: str, run: RunConfig) -> None:
    with pytest.raises(CommandError, match=said):
        encode_images(random_model(run), Failing(is_fatal), batch_size=2, workers=1)
