"""Recaptioning in one process: what is written of each layout, what is refused, every pair accounted for."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import script_parser
from hostile import HOSTILE
from launched import pictures, write_shard
from pairs import BROKEN, Known, outcome, write_pairs
from range_server import serving
from rich.console import Console

import mllm.recaption.process as process
import mllm.recaption.shards as shards_module
from clips import Fields, open_source
from clips.common.errors import BrokenDataError, CommandError, UserError
from clips.data.demo import ensure_demo
from mllm.recaption.asking import Prompt
from mllm.recaption.captioner import Pair, Written
from mllm.recaption.manifest import Folder
from mllm.recaption.options import Options
from mllm.recaption.report import training_command
from mllm.recaption.run import choose_gpu, demo_captioners, recaption, recaption_from_flags

QUIET = Console(emoji=False, file=io.StringIO())


@pytest.fixture
def captioner(monkeypatch: pytest.MonkeyPatch) -> Known:
    known = Known()
    monkeypatch.setattr(process, "make_captioner", lambda *_, **__: known)
    return known


def caption(data: str, out: Path, **options: Any) -> None:
    recaption(Options(data, out, "known:0", Prompt("Describe it. Hint: {web}"), **options), QUIET)


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def manifests(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((out / "manifests").glob("*.json"))]


def trained_on(out: Path) -> Iterator[Any]:
    """The samples that pretraining reads without a flag."""
    source = open_source(str(out), Fields(), need_long=True)
    return (source.read(index) for index in range(len(source)))


# ------------------------------------------------------------------------------------------------------- layouts


def test_shards_of_img2dataset(tmp_path: Path, captioner: Known) -> None:
    data = write_pairs(tmp_path / "pairs", 2, 6)
    caption(data, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["00000.tar", "00001.tar"]
    for shard in range(2):
        before, after = (members(tmp_path / folder / f"{shard:05d}.tar") for folder in ("pairs", "out"))
        for name, data_before in before.items():
            kept = name.replace(".txt", ".source.txt")
            if name.endswith(".json"):
                old, new = json.loads(data_before), json.loads(after[name])
                assert new == old | {"org_caption": before[name.replace("json", "txt")].decode()}
            else:
                assert after[kept] == data_before, name
    found = list(trained_on(tmp_path / "out"))
    made = pictures(12)
    assert [(sample.image, sample.web) for sample in found] == [(picture, web) for picture, web, _ in made]
    assert all(sample.long.startswith("A picture of something that is") for sample in found)
    assert captioner.is_closed
    assert (tmp_path / "out/report/index.html").read_text().count("<img") == 12
    for manifest in manifests(tmp_path / "out"):
        assert manifest["counts"]["pairs"] == manifest["counts"]["written"] == 6
        assert manifest["captioner"] == {"kind": "known", "batch_size": 4}
        assert manifest["settings"]["prompt"] == "Describe it. Hint: {web}"
    assert not any((tmp_path / "out" / name).exists() for name in ("locks", "work"))


def test_what_stands_where_the_output_needs_its_place(tmp_path: Path, captioner: Known) -> None:
    """Other fields, an old long caption, an org_caption that is another, a name of a picture that comes before."""
    picture, other = (made[0] for made in pictures(2))
    first = {
        "jpg": other, "alt": b"  the web\r\n", "txt": b"An old long one.", "source.txt": b"older", "cls": b"3",
        "json": b'{"org_caption": "x", "big": 1e400, "n": 0.1}',
    }  # fmt: skip
    shard = tmp_path / "a.tar"
    write_shard(shard, [(picture, first)], extension="img")
    caption(str(shard), tmp_path / "out", fields=Fields(image="img", web="alt"))
    found = members(tmp_path / "out/a.tar")
    stored = json.loads(found.pop("00000.json"))
    assert stored == {"source_org_caption": "x", "big": float("inf"), "n": 0.1, "org_caption": "  the web\r\n"}
    assert found.pop("00000.txt").startswith(b"A picture of something")
    assert found == {
        "00000.jpg": picture, "00000.source.jpg": other, "00000.alt": b"  the web\r\n", "00000.cls": b"3",
        "00000.source.txt": b"older", "00000.source.txt2": b"An old long one.",
    }  # fmt: skip


def test_without_data_it_captions_the_demos_pairs(
    tmp_path: Path, captioner: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pairs of pretraining's demo, also if the demo's conversations exist."""
    monkeypatch.chdir(tmp_path)
    ensure_demo("data/demo", sizes={"train": 12})
    Path("data/llava_demo").mkdir()
    Path("data/llava_demo/align.json").write_text("[]", encoding="utf-8")
    recaption_from_flags(script_parser("recaption").parse_args(["--captioner", "known:0", "--output", "out"]))
    source = open_source("out", Fields(), need_long=True)
    assert len(source) == 12
    assert source.read(0).web == open_source("data/demo/train", Fields(), need_long=True).read(0).web


def test_what_a_person_reads_at_the_end(tmp_path: Path, captioner: Known) -> None:
    """How many were left out and why; where nothing is left, what to change in place of a command that would fail.

    A path with `;` and a space is one path, in the report and in the command.
    """
    made = pictures(6)
    write_shard(tmp_path / "so; me.tar", [(made[i][0], {"txt": b"refuse" if i < 2 else b"web"}) for i in range(6)])
    write_shard(tmp_path / "none.tar", [(picture, {"txt": b"refuse"}) for picture, _, _ in made])
    expected = {
        "so; me": ("4 of 6 pairs written, 1 →", "left out: refusal 2;", f"--data '{tmp_path}/so; me'\n"),
        "none": ("0 of 6 pairs written\n", "left out: refusal 6;"),
    }
    for name, said in expected.items():
        shown = io.StringIO()
        options = Options(f"{tmp_path / name}.tar", tmp_path / name, "known:0", Prompt("Describe it."))
        ends = pytest.raises(BrokenDataError, match="no pair was written") if name == "none" else nullcontext()
        with ends:
            recaption(options, Console(emoji=False, file=shown))
        assert (tmp_path / name / "report/index.html").exists()
        for text in (*said, "1 shards, 6 of 6 captions, "):
            assert text in shown.getvalue()
        assert ("Next:" in shown.getvalue()) == (name == "so; me")


def test_equal_names_of_several_folders_and_a_json_member_that_has_the_web_caption(
    tmp_path: Path, captioner: Known
) -> None:
    text = b'{ "org_caption" :"w\\u0065b", "org_caption": "web 7" }  \n'
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "c.tar", [(pictures(1)[0][0], {"json": text, "txt": b"Long."})])
    caption(f"{tmp_path}/a/*.tar;{tmp_path}/b/*.tar", tmp_path / "out")
    shards = list((tmp_path / "out").glob("*.tar"))
    assert len({path.stem.rpartition("-")[2] for path in shards}) == 2
    for shard in shards:
        found = members(shard)
        assert found["00000.json"] == text
        assert found["00000.source.txt"] == b"Long."


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables(kind: str, tmp_path: Path, captioner: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "ROWS", 4)
    made = pictures(6)
    rows: list[dict[str, Any]] = []
    for i, (picture, web, _) in enumerate(made):
        (tmp_path / f"{i}.png").write_bytes(picture)
        rows.append({"file": f"{i}.png", "caption": web, "size": str(i)})
    table = tmp_path / f"set.{kind}"
    if kind == "csv":
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        for row, (picture, _, _) in zip(rows, made, strict=True):
            row |= {"file": {"bytes": picture, "path": row["file"]}, "mask": b"\0\1"}
        pa.parquet.write_table(pa.Table.from_pylist(rows), table)
    caption(str(table), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["set-00000.tar", "set-00001.tar"]
    found = list(trained_on(tmp_path / "out"))
    assert [(sample.image, sample.web) for sample in found] == [(picture, web) for picture, web, _ in made]
    assert [sample.extra["file"] for sample in found] == [f"{i}.png" for i in range(6)]
    assert [sample.extra["size"] for sample in found] == [str(i) for i in range(6)]
    if kind == "parquet":
        assert members(tmp_path / "out/set-00001.tar")["000000004.mask"] == b"\0\1"


def test_remote_shards_come_one_ahead_and_give_the_same_bytes(
    tmp_path: Path, captioner: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One ahead and no more; it is there before the captioner has done with the shard before."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("CLIPS_MLLM_CACHE", str(cache))
    write_pairs(tmp_path / "pairs", 4, 5)
    seen, write = [], captioner.write

    def copies() -> int:
        return sum("-" in path.name and not path.name.endswith(".part") for path in (cache / "remote").iterdir())

    def slowly(asked: Sequence[Pair], attempt: int) -> list[Written | Exception]:
        shard = (len(captioner.calls) // 2) + 1  # two calls a shard
        end = time.monotonic() + 20
        while copies() < min(shard + 1, 4) and time.monotonic() < end:
            time.sleep(0.01)
        seen.append((shard, copies()))
        return write(asked, attempt)

    monkeypatch.setattr(captioner, "write", slowly)
    with serving(tmp_path / "pairs") as server:
        caption(f"{server.url}/{{00000..00003}}.tar", tmp_path / "out")
    assert seen == [(1, 2), (1, 2), (2, 3), (2, 3), (3, 4), (3, 4), (4, 4), (4, 4)]
    monkeypatch.undo()
    monkeypatch.setattr(process, "make_captioner", lambda *_, **__: Known())
    caption(f"{tmp_path}/pairs/*.tar", tmp_path / "near")
    far, near = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")} for name in ("out", "near"))
    assert far == near
    hashes = [[m["input"]["sha256"] for m in manifests(tmp_path / name)] for name in ("out", "near")]
    assert hashes[0] == hashes[1]


# --------------------------------------------------------------------------------------------------- what is refused


def test_bad_captions_are_tried_again_once_and_each_pair_is_accounted_for(tmp_path: Path, captioner: Known) -> None:
    webs = ["web 1", "once 2", "refuse 3", "error 4", "web 5", "web 6"]
    samples = [(made[0], {"txt": web.encode()}) for made, web in zip(pictures(6), webs, strict=True)]
    samples[4] = (BROKEN, samples[4][1])
    write_shard(tmp_path / "a.tar", samples)
    caption(str(tmp_path / "a.tar"), tmp_path / "out", max_broken_share=0.2)
    assert [sample.web for sample in trained_on(tmp_path / "out")] == ["web 1", "once 2", "error 4", "web 6"]
    (manifest,) = manifests(tmp_path / "out")
    assert manifest["first_attempts_refused"] == {"not captioned": 1, "refusal": 2}
    assert manifest["rejected"] == {"broken": 1, "refusal": 1}
    assert manifest["counts"]["mended"] == 2
    attempts = [(attempt, len(keys)) for attempt, keys in captioner.calls]
    assert attempts == [(0, 4), (0, 2), (1, 3)]
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected/a.jsonl").read_text().splitlines()]
    assert [(record["row"], record["key"], record["reason"]) for record in rejected] == [
        (2, "00002", "refusal"), (4, "00004", "broken"),
    ]  # fmt: skip
    page = (tmp_path / "out/report/index.html").read_text()
    assert "a refusal" in page
    assert "I&#39;m sorry" in page

    caption(str(tmp_path / "a.tar"), tmp_path / "kept", max_broken_share=0.2, on_bad="keep")
    kept = [sample.long for sample in trained_on(tmp_path / "kept")]
    assert len(kept) == 5
    assert kept[2].startswith("I'm sorry")


def test_captions_of_any_kind_come_back_as_they_were_written(tmp_path: Path, captioner: Known) -> None:
    texts = {"quotes": 'It says "a\'b" — \\n {web} %s', "lines": "One\ntwo\r\nthree\x85four.", "nul": "a\0b " * 5}
    texts |= {f"hostile {name}": text for name, text in HOSTILE.items()}
    captioner.texts = texts
    made = pictures(len(texts))
    write_shard(tmp_path / "a.tar", [(made[i][0], {"txt": web.encode()}) for i, web in enumerate(texts)])
    caption(str(tmp_path / "a.tar"), tmp_path / "out", on_bad="keep", words=(0, 10**7), script="any")
    found = members(tmp_path / "out/a.tar")
    for i, text in enumerate(texts.values()):
        assert found[f"{i:05d}.txt"] == text.encode("utf-8", "replace").decode().strip().encode()
    assert len(list(trained_on(tmp_path / "out"))) == len(texts)
    page = (tmp_path / "out/report/index.html").read_text()
    assert "<script>alert" not in page
    assert "\x1b" not in page


def test_too_many_broken_pictures_end_the_command(tmp_path: Path, captioner: Known) -> None:
    data = write_pairs(tmp_path / "pairs", 1, 10, broken=(2, 5))
    with pytest.raises(BrokenDataError, match=r"2 of 10 pairs are broken, 20\.0%: above --max-broken-share 0\.1"):
        caption(data, tmp_path / "out", max_broken_share=0.1)
    caption(data, tmp_path / "out", max_broken_share=0.2)
    assert len(list(trained_on(tmp_path / "out"))) == 8


def test_samples_that_lack_a_member_are_told_and_keys_that_come_twice_are_one(tmp_path: Path, captioner: Known) -> None:
    picture = pictures(1)[0][0]
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        members = [("x.png", picture), ("x.txt", b"web 1"), ("y.png", picture), ("x.png", b"other"), ("x.txt", b"2")]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    caption(str(shard), tmp_path / "out")
    (sample,) = trained_on(tmp_path / "out")
    assert (sample.image, sample.web) == (picture, "web 1")
    assert manifests(tmp_path / "out")[0]["counts"]["left_out"] == 1


# ----------------------------------------------------------------------------------------- going on, and several


def test_the_same_command_goes_on_call_by_call(
    tmp_path: Path, captioner: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_pairs(tmp_path / "pairs", 2, 10)
    caption(data, tmp_path / "whole")
    calls = list(captioner.calls)
    captioner.calls.clear()
    write = captioner.write

    def failing(pairs: Sequence[Pair], attempt: int) -> list[Written | Exception]:
        if len(captioner.calls) in (2, 4):
            captioner.calls.append((9, []))
            raise RuntimeError("CUDA out of memory")
        return write(pairs, attempt)

    monkeypatch.setattr(captioner, "write", failing)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            caption(data, tmp_path / "out")
    caption(data, tmp_path / "out")
    made = [call for call in captioner.calls if call[0] != 9]
    assert sorted(made) == sorted(calls)  # no call twice
    after = outcome(tmp_path / "out")
    assert {name: data for name, data in after.items() if name != "report/index.html"} == {
        name: data for name, data in outcome(tmp_path / "whole").items() if name != "report/index.html"
    }
    captioner.calls.clear()
    caption(data, tmp_path / "out")
    assert captioner.calls == []


def test_calls_that_were_made_of_other_data_do_not_count(tmp_path: Path, captioner: Known) -> None:
    data = write_pairs(tmp_path / "pairs", 1, 8)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mllm.recaption.work.Worker._write", full)
        with pytest.raises(CommandError, match=r"shard 00000: no space left on device.*the same command goes on"):
            caption(data, tmp_path / "out")
    captioner.calls.clear()
    write_pairs(tmp_path / "pairs", 1, 8, broken=(1,))
    caption(data, tmp_path / "out", max_broken_share=0.5)
    assert [(attempt, len(keys)) for attempt, keys in captioner.calls] == [(0, 4), (0, 4)]
    assert manifests(tmp_path / "out")[0]["rejected"] == {"broken": 1}


def test_a_changed_setting_and_changed_data_are_refused_with_the_difference(tmp_path: Path, captioner: Known) -> None:
    data = write_pairs(tmp_path / "pairs", 1, 4)
    caption(data, tmp_path / "out")
    write_pairs(tmp_path / "pairs", 1, 5)
    with pytest.raises(UserError, match=r"has 5 pairs, and .*00000.json was made when it had 4: remove"):
        caption(data, tmp_path / "out")
    captioner.batch_size = 8
    (tmp_path / "out/00000.tar").unlink()
    with pytest.raises(UserError, match=r"made otherwise(.|\n)*captioner.batch_size: 4 → 8(.|\n)*--output"):
        caption(data, tmp_path / "out")
    captioner.batch_size = 4
    with pytest.raises(UserError, match='on_bad: "drop" → "keep"'):
        caption(data, tmp_path / "out", on_bad="keep")
    write_pairs(tmp_path / "elsewhere", 1, 2)
    with pytest.raises(UserError, match="no recaptioning wrote"):
        caption(data, tmp_path / "elsewhere")


def test_flags_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for wrong, name in (
        ({"batch_size": 0}, "--batch-size"),
        ({"words": (9, 3)}, "--words 9 3"),
        ({"max_broken_share": 1.5}, "--max-broken-share"),
    ):
        with pytest.raises(UserError, match=name):
            Options("x", tmp_path, "known:0", Prompt(), **wrong)


def test_a_kill_between_the_shard_and_its_manifest(tmp_path: Path, captioner: Known) -> None:
    data = write_pairs(tmp_path / "pairs", 2, 4)
    caption(data, tmp_path / "out")
    before = outcome(tmp_path / "out")
    (tmp_path / "out/manifests/00000.json").unlink()
    shard = tmp_path / "out/00001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])  # and a copy that was cut
    captioner.calls.clear()
    caption(data, tmp_path / "out")
    assert outcome(tmp_path / "out") == before
    assert len(captioner.calls) == 2


def test_captioners_of_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"train_llava.sh.*captioner.inputs=tokens"):
        demo_captioners(Path("out"))
    for run, inputs in (("a", "queries"), ("b", "tokens"), ("study/c", "tokens")):
        (tmp_path / "runs" / run / "export").mkdir(parents=True)
        config = tmp_path / "runs" / run / "config.json"
        config.write_text(json.dumps({"model": {"captioner": {"inputs": inputs}}}))
        os.utime(config, (len(run), len(run)))
    assert demo_captioners(Path("out")) == [("clips:runs/b", Path("out/clips"))], "no cell of an experiment"
    (tmp_path / "runs/chat/model").mkdir(parents=True)
    (tmp_path / "runs/chat/model/config.json").write_text("{}")
    assert demo_captioners(Path("out"))[0] == ("llava:runs/chat/model", Path("out/llava"))


@pytest.mark.parametrize("kind", ["llava", "clips"])
def test_a_captioner_of_the_demo_is_refused_for_other_data(
    tmp_path: Path, monkeypatch, kind: str, capsys, captioner: Known
) -> None:
    """It wrote "A gorilla at the bottom left and a koala" for a photograph of a pagoda. Forced, nothing is "Next"."""
    monkeypatch.chdir(tmp_path)
    data, model = write_pairs(tmp_path / "pairs", 1, 2), tmp_path / "runs/newest/model"
    model.mkdir(parents=True)
    known, own = ({"trained_on": {"align": name, "instruct": name}} for name in ("demo", "mine.json"))
    write = (model / "clips_mllm.json").write_text
    (model / "config.json").write_text(json.dumps({"data": {"train": "demo"}}))
    write(json.dumps(known))
    command = ["--data", data, "--output", "out", "--dry-run"]
    parse = script_parser("recaption").parse_args
    with pytest.raises(UserError, match="--captioner is missing"):
        recaption_from_flags(parse(command))
    command += ["--captioner", f"{kind}:runs/newest/model"]
    with pytest.raises(UserError, match=r"trained on the demo.*--force"):
        recaption_from_flags(parse(command))
    recaption_from_flags(parse([*command, "--force"]))
    write(json.dumps(own))
    (model / "config.json").write_text(json.dumps({"data": {"train": data}}))
    recaption_from_flags(parse(command))
    assert "runs/newest/model" in capsys.readouterr().err
    for of_demo in (True, False):
        write(json.dumps(known if of_demo else own))
        (model / "config.json").write_text(json.dumps({"data": {"train": "demo" if of_demo else data}}))
        recaption_from_flags(parse(["--data", data, "--output", f"{of_demo}", *command[5:], "--force"]))
        said = " ".join(capsys.readouterr().err.split())
        assert "2 of 2 pairs written" in said
        assert ("Next:" in said, "do not train on them" in said) == (not of_demo, of_demo)
        page = Path(f"{of_demo}/report/index.html").read_text(encoding="utf-8")
        assert (training_command(Folder(Path(f"{of_demo}"))) in page) == (not of_demo)


def test_the_plan_writes_nothing_and_ranks_choose_their_gpu(tmp_path: Path, captioner: Known) -> None:
    data = write_pairs(tmp_path / "pairs", 2, 6)
    told = io.StringIO()
    options = Options(data, tmp_path / "out", "known:0", Prompt("{web}"))
    recaption(options, Console(emoji=False, file=told, width=200), dry_run=True)
    assert "12 in 2 shards, of which 12 in 2 are not done" in told.getvalue()
    assert not (tmp_path / "out").exists()
    slurm = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    choose_gpu(slurm)
    assert slurm["LOCAL_RANK"] == "1"


def test_a_shard_that_another_process_holds_is_waited_for(
    tmp_path: Path, captioner: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_pairs(tmp_path / "pairs", 2, 4)
    held = Folder(tmp_path / "out").lock("00000")
    assert held is not None
    seen = []

    def sleep(seconds: float) -> None:
        if seconds == process.LOOK_AGAIN:
            seen.append(sorted(path.name for path in (tmp_path / "out").glob("*.tar")))
            held.close()

    monkeypatch.setattr(process.time, "sleep", sleep)
    caption(data, tmp_path / "out")
    assert seen == [["00001.tar"]]
    assert len(list(trained_on(tmp_path / "out"))) == 8


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(UserError, match=r"Function not implemented.*name a folder on a file system with locks"):
        Folder(tmp_path).lock("a")
