"""Metrics against slow references; test sets and class lists with their errors."""

import itertools
import math
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bad_corpus import square
from conftest import script_parser
from launched import write_table

from clips.common.errors import NotFiniteError, UserError
from clips.common.report import metric_rows
from clips.config import Fields
from clips.evaluation.evaluate import _open
from clips.evaluation.metrics import (
    Metric,
    expected_hits,
    expected_log_rank,
    retrieval_metrics,
    token_accuracy,
    zero_shot_metrics,
)
from clips.evaluation.testsets import Classes, FolderSet, classes_of, load_classes


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
    metric = retrieval_metrics(images, texts[order], owners, strings, 20.0, chunk=7)["contrastive_loss"]
    loss = 0.0
    logits = [[20 * float(image @ texts[order[owners.index(i)]]) for i in range(30)] for image in images]
    for own in range(30):
        for line in (logits[own], [row[own] for row in logits]):
            loss += math.log(sum(map(math.exp, line))) - line[own]
    assert metric.value == pytest.approx(loss / 60, abs=1e-4)
    assert (metric.chance, metric.items) == (pytest.approx(math.log(30), abs=1e-4), 30)


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
    for metric in metrics.values():
        assert metric.value == pytest.approx(metric.chance, abs=1e-6)
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


@pytest.mark.parametrize("name", ["image", "prompt"])
def test_features_that_are_not_finite_are_of_no_class(name: str) -> None:
    """They were all right: 100 %."""
    features = {"image": torch.eye(4)[:3], "prompt": torch.eye(4)[:3, None].expand(-1, 2, -1).clone()}
    assert zero_shot_metrics(*features.values(), [0, 1, 2])["top1"].value == 100
    features[name][1] = torch.nan
    with pytest.raises(NotFiniteError, match=f"{name} features"):
        zero_shot_metrics(*features.values(), [0, 1, 2])


NUMBERS = [("evaluate_clips", "--limit"), ("evaluate_clips", "--batch-size"), ("export_clips", "--image-size")]


@pytest.mark.parametrize("number", ["0", "-5"])
@pytest.mark.parametrize(("script", "flag"), NUMBERS)
def test_numbers_of_images_and_pixels_are_above_0(script: str, flag: str, number: str, capsys) -> None:
    """`--limit -5` left out five images, and 0 was as no flag."""
    with pytest.raises(SystemExit, match="2"):
        script_parser(script).parse_args([flag, number])
    assert f"argument {flag}: {number} must be at least 1" in capsys.readouterr().err


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


def test_a_table_says_what_is_at_chance():
    metrics = {
        "web_i2t_r1": Metric(12.0, 10.0, 100),
        "web_t2i_r1": Metric(18.0, 10.0, 100),
        "web_i2t_log_rank": Metric(2.0, 2.0, 100),
        "unseen/web_i2t_r1": Metric(12.0, 10.0, 10_000),
    }
    _, rows = metric_rows({name: asdict(metric) for name, metric in metrics.items()}, "test")
    assert [row[1:3] for row in rows] == [["12.0 (at chance)", "12.0"], ["18.0", ""], ["2.00", ""]]
    asked = {"yes_no": {"value": 53.0, "chance": 50.0, "items": 100, "low": 43.0, "high": 62.0}}
    assert metric_rows(asked, "test")[1][0][1] == "53.0 [43.0, 62.0] (at chance)"


def test_folder_per_class(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(square())
    (tmp_path / "dog/notes.txt").write_text("not an image")
    items = FolderSet(tmp_path)
    assert [items.read(i).label for i in range(len(items))] == ["cat", "dog"]
    with pytest.raises(UserError, match="one folder per class"):
        FolderSet(tmp_path / "cat")


def test_a_folder_with_data_or_train_in_it_is_a_set_and_no_classes(tmp_path: Path) -> None:
    (tmp_path / "own/data").mkdir(parents=True)
    (tmp_path / "own/test").mkdir()
    write_table(tmp_path / "own/data/t.csv", [{"image": "1.png", "text": "a cat"}])
    (tmp_path / "own/data/1.png").write_bytes(square())
    found = _open(str(tmp_path / "own"), Fields(), None)
    assert found.read(0).captions["web"] == ["a cat"]
    for name in ("train", "cat"):  # a class may be called so
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "1.png").write_bytes(square())
    found = _open(str(tmp_path / "classes"), Fields(), None)
    assert [found.read(i).label for i in range(2)] == ["cat", "train"]


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
