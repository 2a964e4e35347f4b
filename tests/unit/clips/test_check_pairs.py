"""The check of pretraining pairs counts and prints what is there."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from launched import pictures, recap, write_shard
from PIL import Image

from clips.common.errors import BrokenDataError, CommandError, UserError
from clips.common.preflight import check
from clips.config import DataConfig, Fields, RunConfig
from clips.data.check import check_pairs
from clips.recipes import recipe

COLUMNS = Fields(image="image", web="web", long="long")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPS_MLLM_CACHE", str(tmp_path / "cache"))


def run_on(train: object, **data: object) -> RunConfig:
    return replace(recipe("b16"), data=DataConfig(train=str(train), max_broken_share=data.pop("limit", 1.0), **data))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """300 samples: 10 cut off, 3 without a web caption, 20 of one web caption, a long one, 5 pictures twice."""
    samples = pictures(300)
    rows = []
    for i, (picture, web, long) in enumerate(samples):
        if i < 5:
            picture = samples[100 + i][0]
        picture = picture[:60] if 10 <= i < 20 else picture
        web = "" if 20 <= i < 23 else "stock photo" if 30 <= i < 50 else web
        rows.append((picture, recap(web, "word " * 500 if i == 90 else long)))
    write_shard(tmp_path / "data/0.tar", rows[:150])
    write_shard(tmp_path / "data/1.tar", rows[150:])
    return tmp_path / "data"


def test_everything_is_counted(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = check_pairs(run_on(data, held_out=0.05))
    assert found.checked == 300
    assert found.faults == {"image": 10, "web caption is empty": 3}
    assert found.cut == {"long caption": 1}
    assert found.repeated == {"web caption": 19}
    printed = capsys.readouterr().out
    assert printed.count("image: image file is truncated") == 10
    assert "10 × image" in printed
    assert "287 of 300 samples checked would be trained on. The first is\n  data/0.tar#00000" in printed.replace(
        f"{data.parent}/", ""
    )


def test_processes_find_what_one_finds(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = check_pairs(run_on(data), limit=200)
    assert alone.checked == 200
    printed = capsys.readouterr().out
    assert check_pairs(run_on(data), limit=200, jobs=2) == alone
    assert capsys.readouterr().out == printed


def test_a_process_that_dies_is_one_sentence() -> None:
    with pytest.raises(CommandError, match="fewer than --jobs 2"):
        check(lambda _: os._exit(1), range(9), 2)


def test_the_exit_is_that_of_the_training(data: Path) -> None:
    with pytest.raises(BrokenDataError, match="13 of 300") as raised:
        check_pairs(run_on(data, limit=0.01))
    assert raised.value.exit_code == 4
    assert "--set data.max_broken_share" in str(raised.value)
    check_pairs(run_on(data, limit=0.05))


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_would_stop_a_training_ends_the_check(tmp_path: Path, jobs: int) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [json.dumps({"image": name, "web": "w", "long": "l"}) for name in ("a.png", "../b.png")]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"^[^\n]*t.jsonl#1: .*\.\./b.png"):
        check_pairs(run_on(tmp_path / "t.jsonl", fields=COLUMNS), jobs=jobs)
