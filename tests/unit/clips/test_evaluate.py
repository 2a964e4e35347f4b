"""Metrics against slow references, test sets and class lists with their errors; a small run is measured."""

import dataclasses
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bad_corpus import encode
from conftest import script_parser, tiny_run
from PIL import Image

from clips.common.errors import NotFiniteError, UserError
from clips.common.rundir import has_report, is_finished
from clips.config import DataConfig, EvalConfig
from clips.data.demo import ensure_demo
from clips.data.tokenizer import build_tokenizer
from clips.evaluation.encode import encode_images
from clips.evaluation.evaluate import evaluate, evaluate_from_flags, nearest_texts
from clips.evaluation.metrics import (
    expected_hits,
    expected_log_rank,
    linear_probe,
    retrieval_metrics,
    token_accuracy,
    zero_shot_metrics,
)
from clips.evaluation.testsets import Classes, FolderSet, classes_of, load_classes, open_test_set
from clips.model.clips import CLIPSModel
from clips.training.finish import finish_run
from clips.weights.export import export_from_flags, write_native


def slow_ranks(images, texts, text_to_image, strings):
    """Plain loops, no ties: ranks of the best right item, image → text and text → image."""
    captions = [{s for s, i in zip(strings, text_to_image, strict=True) if i == image} for image in range(len(images))]
    i2t, t2i = [], []
    for image in range(len(images)):
        order = sorted(range(len(texts)), key=lambda t: -float(images[image] @ texts[t]))
        i2t.append(next(rank for rank, t in enumerate(order, 1) if strings[t] in captions[image]))
    for text in range(len(texts)):
        order = sorted(range(len(images)), key=lambda i: -float(texts[text] @ images[i]))
        t2i.append(next(rank for rank, image in enumerate(order, 1) if strings[text] in captions[image]))
    return i2t, t2i


@pytest.fixture
def random_set():
    torch.manual_seed(0)
    text_to_image = [i // 3 for i in range(90)]
    strings = [f"caption {i % 40}" for i in range(90)]  # strings recur in other images
    by_string = {s: torch.randn(16) for s in sorted(set(strings))}
    images = F.normalize(torch.randn(30, 16), dim=1)
    # texts lean towards their image, so that recall is neither 0 nor 100 %
    noise = torch.stack([by_string[s] for s in strings])
    texts = F.normalize(images[text_to_image] + 0.35 * noise + 1e-3 * torch.randn(90, 16), dim=1)
    return images, texts, text_to_image, strings


def test_retrieval_equals_plain_loops(random_set):
    metrics = retrieval_metrics(*random_set, chunk=7)
    for suffix, strings in (("", random_set[3]), ("_strict", [str(i) for i in range(90)])):  # of equal strings one
        for way, ranks in zip(("i2t", "t2i"), slow_ranks(*random_set[:3], strings), strict=True):
            for k in (1, 5, 10):
                share = sum(rank <= k for rank in ranks) / len(ranks)
                assert metrics[f"{way}_r{k}{suffix}"].value == pytest.approx(100 * share, abs=1e-3)
            mean = sum(map(math.log, ranks)) / len(ranks)
            assert metrics[f"{way}_log_rank{suffix}"].value == pytest.approx(mean, abs=1e-4)
    assert metrics["t2i_r1_strict"].value < metrics["t2i_r1"].value
    assert 5 < metrics["i2t_r1"].value < 100
    assert (metrics["i2t_r1"].items, metrics["t2i_r1"].items) == (30, 90)


@pytest.mark.parametrize(("better", "tied", "positives"), [(0, 3, 1), (0, 2, 2), (1, 3, 2), (2, 0, 1), (3, 2, 1)])
def test_expected_hits_is_the_mean_over_all_orders_of_the_ties(better, tied, positives):
    for k in (1, 2, 3, 5):
        orders = list(itertools.permutations([True] * positives + [False] * tied))
        mean = sum(any(order[: max(0, k - better)]) for order in orders) / len(orders)
        hits = expected_hits(torch.tensor([better]), torch.tensor([tied]), torch.tensor([positives]), k)
        assert hits.item() == pytest.approx(mean)
    mean = sum(math.log(better + 1 + order.index(True)) for order in orders) / len(orders)
    counts = torch.tensor([[better, tied, positives], [9, 0, 1], [0, 5, 1]]).T
    ranks = expected_log_rank(*counts)
    assert ranks.tolist() == pytest.approx([mean, math.log(10), math.log(math.factorial(6)) / 6])


def test_contrastive_loss_is_that_of_the_whole_matrix_with_each_image_s_first_text(random_set):
    images, texts, text_to_image, _ = random_set
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1)).tolist()
    owners = [text_to_image[t] for t in order]
    strings = [str(t) for t in order]
    figure = retrieval_metrics(images, texts[order], owners, strings, 20.0, chunk=7)["contrastive_loss"]
    loss = 0.0
    logits = [[20 * float(image @ texts[order[owners.index(i)]]) for i in range(30)] for image in images]
    for own in range(30):
        for line in (logits[own], [row[own] for row in logits]):
            loss += math.log(sum(map(math.exp, line))) - line[own]
    assert figure.value == pytest.approx(loss / 60, abs=1e-4)
    assert (figure.chance, figure.items) == (pytest.approx(math.log(30), abs=1e-4), 30)


def test_tokens_are_counted_against_always_naming_the_commonest():
    accuracy = token_accuracy(torch.tensor([5, 5, 2, 9]), torch.tensor([5, 7, 2, 5]))
    assert (accuracy.value, accuracy.chance, accuracy.items) == (50, 50, 4)
    always = token_accuracy(torch.full((5,), 3), torch.tensor([3, 3, 3, 4, 5]))
    assert always.value == always.chance == 60


def test_constant_features_score_chance(random_set):
    _, _, text_to_image, strings = random_set
    constant = F.normalize(torch.ones(1, 16), dim=1)
    # the rounding of a kernel must not break the ties either
    shaken = constant.expand(30, -1) + 1e-8 * torch.randn(30, 16)
    metrics = retrieval_metrics(shaken, constant.expand(90, -1), text_to_image, strings)
    for figure in metrics.values():
        assert figure.value == pytest.approx(figure.chance, abs=1e-6)
    unique = retrieval_metrics(shaken, constant.expand(90, -1), text_to_image, [str(i) for i in range(90)])
    assert unique["i2t_r1"].value == pytest.approx(100 * 3 / 90, abs=1e-3)
    assert unique["t2i_r10"].value == pytest.approx(100 * 10 / 30, abs=1e-3)
    assert "t2i_r1_strict" not in unique, "the two counts are one where no images share a caption"
    constant = F.normalize(torch.ones(1, 8), dim=-1)
    zero_shot = zero_shot_metrics(constant.expand(20, -1), constant.expand(10, 3, -1), [i % 10 for i in range(20)])
    assert (zero_shot["top1"].value, zero_shot["top5"].value) == (pytest.approx(10), pytest.approx(50))


def test_features_that_are_not_finite_are_refused():
    features = torch.eye(3)
    bad = features.clone()
    bad[1] = torch.nan
    with pytest.raises(NotFiniteError, match="text features"):
        retrieval_metrics(features, bad, [0, 1, 2], ["a", "b", "c"])
    with pytest.raises(ValueError, match="every image at least one"):
        retrieval_metrics(features, features, [0, 1, 1], ["a", "b", "c"])


def test_zero_shot_ensemble_and_single_prompts():
    # class 0 along x, class 1 along y; prompt 1 of class 1 alone points to x and misleads
    prompts = F.normalize(torch.tensor([[[1.0, 0.1], [0.9, 0.1]], [[0.0, 1.0], [1.0, 0.0]]]), dim=-1)
    images = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), dim=-1)
    metrics = zero_shot_metrics(images, prompts, [0, 1])
    assert metrics["top1"].value == 100
    assert metrics["top1"].chance == 50
    # prompt 0: both right. prompt 1: image 0 goes to class 1, image 1 to class 0
    assert metrics["single_prompt_top1"].value == pytest.approx(50)
    assert metrics["top5"].value == 100  # five of two classes


def test_linear_probe_separates_what_is_separable():
    generator = torch.Generator().manual_seed(0)
    labels = [i % 4 for i in range(200)]
    features = 3 * torch.eye(4)[labels] + torch.randn(200, 4, generator=generator)
    figure = linear_probe(features[:100], labels[:100])(features[100:], labels[100:])
    assert figure.value > 80
    assert (figure.items, figure.chance) == (100, 25)


PICTURE = encode(Image.new("RGB", (12, 8), "red"))


def test_folder_per_class(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(PICTURE)
    (tmp_path / "dog/notes.txt").write_text("not a picture")
    items = FolderSet(tmp_path)
    assert [items.read(i).label for i in range(len(items))] == ["cat", "dog"]
    with pytest.raises(UserError, match="one folder per class"):
        FolderSet(tmp_path / "cat")


def test_class_lists(tmp_path):
    imagenet = load_classes("imagenet")
    assert (len(imagenet.names), len(imagenet.templates)) == (1000, 80)
    assert "a bad photo of a tench." in imagenet.prompts()

    (tmp_path / "plain.txt").write_text("cat\n\ndog\n")
    assert load_classes(tmp_path / "plain.txt").names == ("cat", "dog")
    (tmp_path / "own.json").write_text('{"classes": ["cat", "dog"], "templates": ["a {}", "the {}"]}')
    own = load_classes(tmp_path / "own.json")
    assert own.prompts() == ["a cat", "the cat", "a dog", "the dog"]
    assert own.index(["dog", "cat"]) == [1, 0]
    with pytest.raises(UserError, match="bird"):
        own.index(["bird"])

    for name, content in [("none.json", "{}"), ("twice.txt", "cat\ncat")]:
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=name):
            load_classes(tmp_path / name)
    with pytest.raises(UserError, match="absent"):
        load_classes(tmp_path / "absent.txt")


def test_numbers_are_places_in_the_class_list_and_no_names(caplog):
    """A `label` column of the datasets library holds numbers: "a photo of a 2" was 33 %, which is chance."""
    assert Classes(("ball", "box", "tent"), ("{}",)).index(["2", "0"]) == [2, 0]
    with pytest.raises(UserError, match="not in the class list: 3"):
        Classes(("ball", "box", "tent"), ("{}",)).index(["3", "0"])
    assert Classes(("7", "0"), ("{}",)).index(["0"]) == [1]
    assert classes_of(["0", "2"]) is None
    assert "zero-shot is skipped" in caplog.text
    assert classes_of(["0", "box"]).names == ("0", "box")


def test_imagenet_folders_are_classes_in_sorted_order():
    synsets = [f"n{10_000_000 + 7 * i}" for i in range(3)]
    classes = Classes(("tench", "goldfish", "shark"), ("{}",))
    shuffled = random.Random(0).sample(synsets, 3)
    assert classes.index(shuffled) == [synsets.index(name) for name in shuffled]
    with pytest.raises(UserError):
        classes.index(synsets[:2])  # one missing: the order would be wrong


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(model, run, tokenizer): untrained, on 24 to 40 demo scenes a split used as ordinary shards."""
    folder = ensure_demo(
        tmp_path_factory.mktemp("data") / "demo", sizes={"train": 40, "val": 24, "test": 24}, image_size=32
    )
    texts = ["a cat on the left of a red dog.", "the background is blue", "there are three birds, at the top right."]
    tokenizer = build_tokenizer("wordpiece", texts * 4, vocab_size=128)
    run = tiny_run(inputs="tokens")
    text = dataclasses.replace(run.model.text, context_length=24, vocab_size=tokenizer.vocab_size)
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, text=text),
        data=DataConfig(**{split: str(folder / split) for split in ("train", "val", "test")}, workers=0),
        eval=EvalConfig(batch_size=7, max_images=16),
    )
    torch.manual_seed(0)
    return CLIPSModel(run.model, tokenizer.pad_id), run, tokenizer


def test_evaluate_gives_every_figure_its_chance_and_items(small, tmp_path):
    model, run, tokenizer = small
    evaluated = evaluate(model, tokenizer, run, "test", full=True, out=tmp_path / "evaluation.json")
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["skipped_images"] == 0
    assert content["figures"] == {name: dataclasses.asdict(figure) for name, figure in evaluated.items()}
    assert {"web_i2t_r5", "linear_probe_top1"} <= evaluated.keys()
    figures = content["figures"]
    # half of the demo's test scenes hold one thing and serve classification, the others retrieval
    assert (figures["sentence_i2t_r1"]["items"], figures["zero_shot_top1"]["items"]) == (12, 12)
    assert figures["sentence_i2t_r1"]["chance"] == pytest.approx(100 / 12, abs=1e-3)
    assert figures["part_t2i_r1"]["items"] == 48  # four sentences each


def test_the_nearest_texts_of_an_image_come_in_order_and_its_own_is_right(small):
    cards = nearest_texts(*small[::2], small[1], "test", 32)
    assert len(cards) == 12
    assert all(len(card.texts) == 5 and card.texts[0][0] >= card.texts[4][0] for card in cards)
    kinds = {(text == card.title, right) for card in cards for _, text, right in card.texts}
    assert kinds == {(True, True), (False, None)}


def test_during_training_fewer_images_and_the_model_is_left_as_it_was(small):
    model, run, tokenizer = small
    model.train()
    model.visual.set_image_size(48)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "linear_probe_top1" not in evaluate(model, tokenizer, run, "val", image_size=32)
    assert model.training
    assert model.visual.image_size == 48
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.visual.set_image_size(32)
    items, _ = open_test_set(run.data, "val")
    assert len(encode_images(model, items, batch_size=8, limit=16).indices) == 16
    without = dataclasses.replace(run, data=dataclasses.replace(run.data, val=None))
    with pytest.raises(UserError, match="--val-data"):
        evaluate(model, tokenizer, without, "val")


@pytest.mark.usefixtures("one_pixel")
def test_a_report_that_fails_costs_nothing_and_can_be_made_again(small, tmp_path, capsys):
    model, run, tokenizer = small
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
    assert "Traceback" not in errors
    assert is_finished(run_dir)
    assert not has_report(run_dir)
    assert json.loads((run_dir / "evaluation.json").read_text())["figures"]

    (run_dir / "report").unlink()
    finish_run(run, model, tokenizer, run_dir)
    assert has_report(run_dir)
    assert "warning" not in capsys.readouterr().err


def test_commands_evaluate_and_export(small, tmp_path, capsys):
    model, run, tokenizer = small
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

    def figures(model_path, *flags):
        out = tmp_path / "out.json"
        parsed = script_parser("evaluate_clips").parse_args(
            ["--model", str(model_path), "--output", str(out), *map(str, flags)]
        )
        evaluate_from_flags(parsed)
        return json.loads(out.read_text())["figures"]

    of_stock = figures(stock, "--data", classes, "--classes", tmp_path / "names.txt", "--probe-train", classes)
    assert of_stock["zero_shot_top1"]["items"] == 12
    assert of_stock["zero_shot_top1"]["chance"] == pytest.approx(100 / 3, abs=1e-3)
    assert of_stock["linear_probe_top1"]["value"] > 70  # tested on what it was fitted on
    assert "zero_shot_top1" in figures(native)  # the run's own test split
    write_native(model, dataclasses.replace(run, data=DataConfig(train="")), tokenizer, tmp_path / "bare")
    with pytest.raises(UserError, match="--data"):
        export_from_flags(script_parser("export_clips").parse_args(["--model", str(tmp_path / "bare")]))
    with pytest.raises(UserError, match="names no test data: give --data,"):  # it named a flag of another command
        figures(tmp_path / "bare")
