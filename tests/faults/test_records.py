"""Faults in shards, records and paths, through the real commands: named, skipped and counted, or refused."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from launched import SCRIPT, assert_said, lines, pictures, python, recap, run, run_all, write_shard

pytestmark = pytest.mark.slow
PAIRS = [(picture, recap(web, long)) for picture, web, long in pictures(300)]


def train(out: Path, name: str, data: Path | str, *flags: str) -> list[str]:
    return python(SCRIPT, "--debug", "--recipe", "demo", "--data", data, "--output", out, "--name", name, *flags)


def append(shard: Path, name: str, data: bytes = b"", **fields: object) -> None:
    with tarfile.open(shard, "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(data))


def test_row_17_damaged_shards_are_named_and_their_good_samples_used(tmp_path: Path) -> None:
    data = tmp_path / "data"
    damaged = write_shard(data / "damaged.tar", PAIRS[:40])
    content = bytearray(damaged.read_bytes())
    with tarfile.open(damaged) as tar:
        place = next(member.offset for member in tar if member.name == "00020.json")
    content[place : place + 512] = os.urandom(512)
    damaged.write_bytes(content)
    cut = write_shard(data / "cut.tar", PAIRS[40:80])
    with tarfile.open(cut) as tar:
        place = next(member.offset_data for member in tar if member.name == "00030.txt")
    cut.write_bytes(cut.read_bytes()[: place + 5])
    incomplete = [
        (picture, {"json": rest["json"]} if i == 7 else rest) for i, (picture, rest) in enumerate(PAIRS[80:120])
    ]
    write_shard(data / "incomplete.tar", incomplete)
    append(write_shard(data / "twice.tar", PAIRS[120:160]), "00003.txt", b"another caption")
    done = run(train(tmp_path, "r", data))
    assert_said(
        done, 0,
        "damaged.tar: damaged at byte", "after member 00020.txt",
        "cut.tar: member 00030.txt is cut off",
        "incomplete.tar: 1 samples are left out for want of a member, the first is 00007, without long",
        "twice.tar: member 00003.txt appears twice",
        f"{39 + 30 + 39 + 40} samples",
    )  # fmt: skip
    assert lines(tmp_path / "r", "skipped.jsonl") == []


def test_row_18_bad_records_are_skipped_counted_and_listed_before_a_run(tmp_path: Path) -> None:
    bad: dict[int, tuple[str, dict[str, bytes]]] = {
        30: ("json: bad JSON", {"json": b'{"org_caption": "w'}),
        80: ("json: bad JSON", {"json": '{"org_caption": "é"}'.encode("latin-1")}),
        130: ("web caption is empty", {"json": b'{"org_caption": null}'}),
        180: ("web caption is empty", {"json": b'{"org_caption": ""}'}),
        230: ("txt: not UTF-8", {"txt": "é".encode("latin-1")}),
        280: ("long caption is empty", {"txt": b" "}),
    }
    samples = [(picture, rest | bad.get(i, ("", {}))[1]) for i, (picture, rest) in enumerate(PAIRS)]
    write_shard(tmp_path / "data/0.tar", samples)
    check = ("scripts/check_data.py", "--data", tmp_path / "data")
    done = run_all({"run": train(tmp_path, "r", tmp_path / "data", "--samples", "300"), "check": python(*check)})
    assert_said(done["run"], 0)
    skipped = lines(tmp_path / "r", "skipped.jsonl")
    reasons = {int(line["key"].rpartition("#")[2]): line["reason"] for line in skipped}
    assert reasons.keys() == bad.keys()
    for place, (reason, _) in bad.items():
        assert reasons[place].startswith(reason)
    assert len(skipped) == [line for line in lines(tmp_path / "r") if line["kind"] == "train"][-1]["skipped"]

    assert_said(done["check"], 4, "6 of 300 samples are broken, 2.0%", "data.max_broken_share = 1.0%")
    printed = done["check"].text
    assert "2 × web caption is empty" in printed
    for place in bad:
        assert f"0.tar#{place:05d}" in printed


def test_row_19_paths_that_climb_out_are_refused(tmp_path: Path) -> None:
    picture = PAIRS[0][0]
    (tmp_path / "secret.png").write_bytes(picture)
    members = {
        "climbing": ({}, "../00099.png"),
        "absolute": ({}, "/etc/00099.png"),
        "symbolic": ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "00099.png"),
        "hard": ({"type": tarfile.LNKTYPE, "linkname": "../secret.png"}, "00099.png"),
    }
    commands = {}
    for name, (fields, member) in members.items():
        shard = write_shard(tmp_path / f"{name}/0.tar", PAIRS[:20])
        append(shard, member, b"" if fields else picture, **fields)
        commands[name] = train(tmp_path / "runs", name, shard)
    table = tmp_path / "table"
    table.mkdir()
    (table / "0.png").write_bytes(picture)
    (table / "link.png").symlink_to(tmp_path / "secret.png")
    for name, path in (("dots", "../secret.png"), ("root", str(tmp_path / "secret.png")), ("link", "link.png")):
        rows = [{"i": path if i % 4 == 0 else "0.png", "w": "a photo", "l": "A photo. Of one."} for i in range(16)]
        (table / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        fields = ("--fields", "image=i", "web=w", "long=l")
        commands[name] = train(tmp_path / "runs", name, table / f"{name}.jsonl", *fields)
    reasons = {
        "climbing": "'../00099.png' points outside", "absolute": "'/etc/00099.png' points outside",
        "symbolic": "is a link", "hard": "is a link", 
        "dots": "leads out of", "root": "leads out of", "link": "leads out of",
    }  # fmt: skip
    for name, done in run_all(commands).items():
        assert_said(done, 2, reasons[name])
        assert not lines(tmp_path / "runs" / name), "nothing was trained on"
