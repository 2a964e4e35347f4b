"""Comparing sets of captions: how right they are, what the sets have in common, and what the page says."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab_runs import run_main

from clips.common.errors import UserError
from clips.common.plots import LIGHT
from clips.config import Fields, NamedSet
from clips.data.artists import OPENMOJI
from clips.data.demo import CONCEPTS, NUMBERS, Description, Scene, split_scene, truth
from clips.data.sources import open_source
from clips.lab.report import as_html
from clips.recipes import recipe
from clips.studies.caption_truth import Truth, is_scene, placements
from clips.studies.captions import Common, captions_page, collect, compare_sets, conclusions, parse_sets, plan
from clips.studies.variants import FIGURES, MEANS, Question, Study, decides, judge, measured
from clips.studies.variants_page import NAMES, draw, write_chart

# ------------------------------------------------------------------------------------------------------ the truth


def record_of(scene: Scene, description: Description) -> dict[str, Any]:
    return truth(scene, description, [OPENMOJI] * len(scene.things))


def test_the_demo_s_own_captions_are_right() -> None:
    """Every place said and every count is; every thing is named, and nothing else."""
    found = Truth()
    for number in range(200):
        scene, description = split_scene("train", number, seed=3)
        record = record_of(scene, description)
        assert is_scene(record)
        found.add(" ".join(description.sentences), record)
    shares = found.shares()
    assert {shares[name] for name in ("things_right", "things_found", "counts_right", "places_right")} == {100}
    assert shares["places_said"] == 100
    assert 0 < shares["counts_said"] < 100


def test_captions_of_other_scenes_are_wrong_and_what_is_not_said_is_not_counted() -> None:
    found = Truth()
    scenes = [split_scene("train", number, seed=3) for number in range(200)]
    for (scene, description), (_, other) in itertools.pairwise(scenes):
        found.add(" ".join(other.sentences), record_of(scene, description))
    shares = found.shares()
    assert shares["things_right"] < 20
    assert shares["places_right"] < 10
    assert shares["counts_right"] < 60
    silent = Truth()
    silent.add("", record_of(*scenes[0]))
    nothing = dict.fromkeys(shares, 0) | dict.fromkeys(("things_right", "counts_right", "places_right"))
    assert silent.shares() == nothing
    assert set(Truth().shares().values()) == {None}


BOTH = {("fox", "top left"), ("key", "bottom right")}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("the picture shows a fox at the top left and a key at the bottom right.", BOTH),
        ("At the top left there is a fox and at the bottom right there is a key.", BOTH),
        ("In the center one sees a small thermometer.", {("thermometer", "center")}),
        ("The fox is small. The picture has a center.", set()),
        ("The fox is above the key in this picture. The key is at the top right.", {("key", "top right")}),
        ("foxes at the top left", {("fox", "top left")}),
        ("a foxglove at the top left", set()),
    ],
)  # fmt: skip
def test_things_and_their_places(caption: str, expected: set[tuple[str, str]]) -> None:
    assert set(placements(caption)) == expected


def test_counts_are_those_of_things() -> None:
    scene, description = split_scene("train", 1, seed=0)
    record, found = record_of(scene, description), Truth()
    for word in NUMBERS:
        found.add(f"There are {word} things in the picture.", record)
    found.add("one fox and two keys", record)
    assert (found.sums["counts"], found.sums["counts_right"]) == (len(NUMBERS), 1)


# ------------------------------------------------------------------------------------------------------ the sets


def write_set(path: Path, captions: dict[str, str], *, broken: tuple[str, ...] = (), label: bool = False) -> str:
    """A shard of pairs "k" with picture k and web caption "web k"."""
    with tarfile.open(path, "w") as tar:
        for key, long in captions.items():
            record = {"org_caption": f"web {key[0]}"} | ({"label": key[0]} if label else {})
            members = {"jpg": f"picture {key[0]}", "json": json.dumps(record), "txt": "" if key in broken else long}
            for extension, text in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(text.encode())
                tar.addfile(info, io.BytesIO(text.encode()))
    return str(path)


def test_the_common_pairs_of_shards_in_any_order(tmp_path: Path) -> None:
    """Left out is what one set lacks or has broken; of a pair that is there twice the first counts."""
    sets = {
        "a": write_set(tmp_path / "a.tar", {k: f"a says {k}" for k in ("1", "2", "3", "4", "1-again")}, label=True),
        "b": write_set(tmp_path / "b.tar", {k: f"b says {k}" for k in ("4", "3", "2", "1", "5")}, broken=("3",)),
    }
    common = collect(sets, tmp_path, Fields())
    assert (common.pictures, common.sizes, common.truth) == (3, {"a": 5, "b": 5}, {})
    for name in sets:
        source = open_source(str(common.table), Fields(image="image", web="web", long=f"long_{name}"), need_long=True)
        samples = [source.read(i) for i in range(len(source))]
        assert [s.image for s in samples] == [b"picture 1", b"picture 2", b"picture 4"]
        assert [s.web for s in samples] == ["web 1", "web 2", "web 4"]
        assert [s.long for s in samples] == [f"{name} says {k}" for k in "124"]
        assert [s.extra["label"] for s in samples] == ["1", "2", "4"]
    again = collect(sets, tmp_path, Fields())
    assert again.table == common.table
    write_set(tmp_path / "b.tar", {k: f"b says {k}!" for k in "4321"})
    assert collect(sets, tmp_path, Fields()).table != common.table
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == []


def test_sets_of_other_pictures_are_refused(tmp_path: Path) -> None:
    sets = {"a": write_set(tmp_path / "a.tar", {"1": "x"}), "b": write_set(tmp_path / "b.tar", {"2": "y"})}
    with pytest.raises(UserError, match="no picture with the same web caption in common"):
        collect(sets, tmp_path, Fields())


def test_test_data_without_a_part_are_refused_before_anything_trains(tmp_path: Path) -> None:
    sets = {name: write_set(tmp_path / f"{name}.tar", {"1": f"{name} says 1"}) for name in "ab"}
    test = tmp_path / "test.tar"
    with tarfile.open(test, "w") as tar:
        for name, data in (("1.jpg", b"picture"), ("1.alt", b"web caption")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    options = {"demo_dir": tmp_path / "demo", "dry_run": True}
    with pytest.raises(UserError, match=r"test\.tar has no web captions.*Name the right one with --fields"):
        compare_sets(sets, tmp_path / "out", test_data=[str(test)], **options)
    with pytest.raises(UserError, match=r"none\.tar"):
        compare_sets(sets, tmp_path / "out", test_data=[sets["a"], f"unseen={tmp_path}/none.tar"], **options)
    compare_sets(sets, tmp_path / "out", test_data=[str(test)], fields=["web=json:org_caption;alt"], **options)


@pytest.mark.parametrize("flag", [["--shards", "3"], ["--model", "m"]])
def test_flags_of_the_demo_study_are_refused_beside_given_sets(
    flag: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "compare_captions", "--sets", "a=a.tar,b=b.tar", *flag) == 2
    assert "--shards and --model are of the demo study" in capsys.readouterr().err


def test_the_names_of_sets() -> None:
    assert parse_sets("a=x/{1,2}.tar,b-2=s3://b/*.tar;y.tar") == {"a": "x/{1,2}.tar", "b-2": "s3://b/*.tar;y.tar"}
    for wrong in ("a", "a=", "web=x", "a=x,a=y", "=x", "a b=x", "a/b=x"):
        with pytest.raises(UserError, match="NAME=DATA"):
            parse_sets(wrong)


def test_every_run_sees_the_same_pairs_and_only_its_captions(tmp_path: Path) -> None:
    common = Common(tmp_path / "pairs.parquet", 10, {"a": 10, "b": 10}, {})

    def planned(setting: str) -> Study:
        given = ({"a": "x", "b": "y"}, common, ["test/", "unseen=other/"], tmp_path, Fields())
        return plan(*given, seeds=2, samples=6400, settings=[setting])

    study = planned("data.workers=0")
    assert {name: [run.name for run in runs] for name, runs in study.runs.items()} == {
        name: [f"{name}-seed0", f"{name}-seed1"] for name in ("a", "b", "web")
    }
    a, b, web = (study.runs[name][1].config() for name in ("a", "b", "web"))
    assert a.data.train == b.data.train == web.data.train == str(common.table)
    assert (a.data.fields.long, b.data.fields.long) == ("long_a;txt", "long_b;txt")
    assert a.task == b.task == recipe("demo").task
    assert a.data.test == web.data.test == "test/"
    assert a.data.further_tests == web.data.further_tests == (NamedSet(name="unseen", data="other/"),)
    assert a.model == b.model
    assert a.model.captioner is not None
    assert web.task.synthetic_share == 0
    assert web.model.vision == a.model.vision
    assert study.variants["a"].label == "a"
    assert study.questions["captions"].contrasts == (("a", "b"), ("a", "web"), ("b", "web"))
    for setting in ("train.seed=7", "phases.0.samples=640"):
        with pytest.raises(UserError, match="--seeds and --samples"):
            planned(setting)


def test_the_figures_that_every_run_has(tmp_path: Path) -> None:
    for name, figures in {"one": FIGURES, "two": (*FIGURES[2:], "other"), "three": ("other",)}.items():
        (tmp_path / name).mkdir()
        found = {figure: {"value": 1} for figure in figures}
        (tmp_path / name / "evaluation.json").write_text(json.dumps({"figures": found}))
    assert measured([tmp_path / "one", tmp_path / "two"]) == list(FIGURES[2:])
    with pytest.raises(UserError, match="neither retrieval nor zero-shot"):
        measured([tmp_path / "one", tmp_path / "three"])


# ------------------------------------------------------------------------------------------------------ the report


def made_up(centres: dict[str, float], figures: tuple[str, ...], truths: dict[str, dict]) -> dict:
    """The content of captions.json with figures around the given values."""
    rng, order = np.random.default_rng(0), tuple(centres)
    rows = {
        name: [{f: centre + rng.normal(0, 0.3) for f in figures} | {"train_seconds": 60.0} for _ in range(3)]
        for name, centre in centres.items()
    }
    pairs = tuple((a, b) for i, a in enumerate(order) for b in order[i + 1 :])
    return {
        "command": "python scripts/compare_captions.py",
        "seconds": 1800,
        "samples": 32_000,
        "seeds": 3,
        "jobs": 2,
        "deciding_figure": decides(figures),
        "environment": {"cpus": 2},
        "notes": ["hostile: <b>bold</b> | $x$"],
        "pictures": 4000,
        "sets": {name: {"data": f"runs/{name}", "samples": 4000} for name in order if name != "web"},
        "truth": truths,
        "questions": {"captions": judge(Question("Sets", order, pairs), rows)},
        "variants": {
            name: {
                "label": name,
                "recipe": "demo",
                "settings": ["a=1"],
                "runs": [{"figures": row} for row in rows[name]],
            }
            for name in order
        },
    }


EVERY = (*MEANS, *FIGURES)


def test_the_report_says_which_captions_help_and_how_right_they_are() -> None:
    scene, description = split_scene("train", 0, seed=0)
    record = record_of(scene, description)
    good, bad = Truth(), Truth()
    good.add(" ".join(description.sentences), record)
    absent = next(name for name in CONCEPTS if name not in {thing.concept for thing in scene.things})
    bad.add(f"There are zero things at the top left: a {absent}.", record)
    truths = {"exact": good.shares(), "mllm": bad.shares(), "web": Truth().shares()}
    result = made_up({"mllm": 50.0, "exact": 60.0, "web": 50.1}, EVERY, truths)
    mllm, exact = conclusions(result)
    assert mllm.startswith("The captions of mllm show no gain over web captions alone: ")
    assert "Right of what they say: things 0 %" in mllm
    assert exact.startswith("The captions of exact help over web captions alone: +")
    assert "things 100 %" in exact
    page = as_html(captions_page(result))
    for part in ("How often the captions are right", "4,000 pictures", "runs/exact", exact):
        assert part in page
    assert "<b>bold</b>" not in page


def test_artists_never_trained_on_decide_and_the_others_stand_beside_them() -> None:
    unseen = tuple(f"unseen/{name}" for name in EVERY)
    assert decides((*unseen, *EVERY)) == "unseen/sentence_r1"
    result = made_up({"a": 60.0, "web": 50.0}, (*unseen, *EVERY), {})
    (contrast,) = result["questions"]["captions"]["contrasts"]
    contrast["figures"]["sentence_r1"] = {"mean": -7.0, "ci95": [-8.0, -6.0]}  # the seen artists say the contrary
    (said,) = conclusions(result)
    assert said.startswith("The captions of a help over web captions alone: +")
    assert "in retrieval R@1, test sentences (unseen artist), −7.0 [−8.0, −6.0] with seen artists." in said
    page = as_html(captions_page(result))
    assert page.count("−7.0 [−8.0, −6.0]") == 2, "in the sentence and in the table of what does not decide"
    assert "How often" not in page


def test_the_chart_is_drawn_from_a_stored_result(tmp_path: Path) -> None:
    """Small figures have an axis of their own, and the test set that decides is named."""
    result = made_up({"a": 16.0, "web": 3.0}, ("unseen/sentence_r1", *EVERY), {})
    (axes,) = draw(result["variants"], result["deciding_figure"], LIGHT).axes
    assert axes.get_title() == "unseen artist"
    drawn = [bar.get_height() for bar in axes.patches]
    figures = [[run["figures"]["unseen/sentence_r1"] for run in v["runs"]] for v in result["variants"].values()]
    assert drawn[: len(figures)] == pytest.approx([sum(values) / 3 for values in figures])
    assert max(drawn) < axes.get_ylim()[1] < 30
    (tmp_path / "captions.json").write_text(json.dumps(result))
    picture = write_chart(tmp_path / "captions.json", tmp_path / "made" / "captions.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    for content, name in (("{", "a.png"), ('{"questions": {}}', "a.png"), ("{}", "a.jpg")):
        (tmp_path / "captions.json").write_text(content)
        with pytest.raises(UserError, match=r"is no result of a study|name it \.png or \.svg"):
            write_chart(tmp_path / "captions.json", tmp_path / name)


@pytest.mark.parametrize("figure", sorted(NAMES))
def test_any_figure_may_be_the_one_that_the_test_data_give(figure: str) -> None:
    assert decides([figure]) == figure
    result = made_up({"a": 40.0, "web": 50.0}, (figure,), {})
    (said,) = conclusions(result)
    assert said.startswith("The captions of a do harm against web captions alone: −")
    assert f" in {NAMES[figure]}." in said
    assert NAMES[figure] in as_html(captions_page(result))
