"""Comparing sets of captions: what the sets have in common, and what the page says."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from lab_runs import STORED
from launched import write_shard

from clips.common.errors import UserError
from clips.config import Fields, NamedSet
from clips.data.sources import open_source
from clips.lab.report import as_html
from clips.recipes import recipe
from clips.studies.captions import Common, captions_page, collect, compare_sets, conclusions, parse_sets, plan
from clips.studies.variants import FIGURES, MEANS, Study, decides, measured

pytestmark = pytest.mark.usefixtures("one_pixel")


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
    assert (common.pictures, common.sizes) == (3, {"a": 5, "b": 5})
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
    test = write_shard(tmp_path / "test.tar", [(b"picture", {"alt": b"web caption"})], "jpg")
    options = {"demo_dir": tmp_path / "demo", "dry_run": True}
    with pytest.raises(UserError, match=r"test\.tar has no web captions.*Name the right one with --fields"):
        compare_sets(sets, tmp_path / "out", test_data=[str(test)], **options)
    with pytest.raises(UserError, match=r"none\.tar"):
        compare_sets(sets, tmp_path / "out", test_data=[sets["a"], f"unseen={tmp_path}/none.tar"], **options)
    compare_sets(sets, tmp_path / "out", test_data=[str(test)], fields=["web=json:org_caption;alt"], **options)


def test_the_names_of_sets() -> None:
    assert parse_sets("a=x/{1,2}.tar,b-2=s3://b/*.tar;y.tar") == {"a": "x/{1,2}.tar", "b-2": "s3://b/*.tar;y.tar"}
    for wrong in ("a", "a=", "web=x", "a=x,a=y", "=x", "a b=x", "a/b=x"):
        with pytest.raises(UserError, match="NAME=DATA"):
            parse_sets(wrong)


def test_every_run_sees_the_same_pairs_and_only_its_captions(tmp_path: Path) -> None:
    common = Common(tmp_path / "pairs.parquet", 10, {"a": 10, "b": 10})

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


def test_the_report_says_which_captions_help_by_artists_never_trained_on() -> None:
    """The result of real trainings; of one set the seen artists say the contrary, of another one nothing is sure."""
    every = (*MEANS, *FIGURES)
    assert decides((*(f"unseen/{name}" for name in every), *every)) == "unseen/sentence_r1"
    result = json.loads((STORED / "real" / "captions.json").read_text(encoding="utf-8"))
    contrasts = {(c["a"], c["b"]): c for c in result["questions"]["captions"]["contrasts"]}
    contrasts["exact", "web"]["figures"]["sentence_r1"] = {"mean": -7.0, "ci95": [-8.0, -6.0]}
    contrasts["clips", "web"]["verdict"] = "tie"
    result["sets"]["exact"]["data"] = "runs/<b>exact</b>"
    _, clips, exact = conclusions(result)
    assert clips.startswith("The captions of clips show no gain over web captions alone: +12.6 [")
    assert exact.startswith("The captions of exact help over web captions alone: +14.3 [+9.9, +18.6] in retrieval ")
    assert exact.endswith("test sentences (unseen artist), −7.0 [−8.0, −6.0] with seen artists.")
    page = as_html(captions_page(result))
    for part in ("3,000 pictures", "runs/&lt;b&gt;exact", exact):
        assert part in page
    assert page.count("−7.0 [−8.0, −6.0]") == 2, "in the sentence and in the table of what does not decide"
