"""A stranger's data, as they lie on a disk, are opened without a flag, and what was guessed is printed."""

import csv
import json
from pathlib import Path

import pytest
from bad_corpus import encode
from PIL import Image

from clips.common.errors import UserError
from clips.config import Fields
from clips.data.guess import guess_fields
from clips.data.sources import Source, open_source


def picture(value: int = 0) -> bytes:
    return encode(Image.new("RGB", (4, 4), (value, 0, 0)))


def pictures(folder: Path, count: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(picture(i))


def opened(spec: Path | str, *, need_long: bool = False, **options: str) -> Source:
    return open_source(str(spec), Fields(), need_long=need_long, **options)


def texts(source: Source) -> list[str]:
    assert [source.read(i).image for i in range(len(source))] == [picture(i) for i in range(len(source))]
    return [source.read(i).web for i in range(len(source))]


def write_csv(path: Path, rows: list[tuple[str, ...]], encoding: str = "utf-8", delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def test_usual_columns() -> None:
    fields = guess_fields("t", Fields(), ["id", "Path", "ALT"])
    assert (fields.image, fields.web, fields.long) == ("Path", "ALT", "")
    assert guess_fields("t", Fields(image="id", web="id2"), ["Path", "ALT"]) == Fields(image="id", web="id2")


def test_the_default_layout_is_never_guessed_anew() -> None:
    recap = ["jpg", "json", "json:caption", "json:org_caption", "txt"]
    assert guess_fields("t", Fields(), recap) == Fields()
    web = guess_fields("t", Fields(), ["jpg", "json", "json:caption", "json:url", "txt"])
    assert (web.image, web.web, web.long) == ("jpg;jpeg;png;webp", "txt", ""), "img2dataset's txt is no long caption"
    both = guess_fields("t", Fields(), ["image", "alt", "long_caption"])
    assert (both.web, both.long) == ("alt", "long_caption")


def test_a_table_from_windows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Semicolons, cp1252, backslashes, umlauts in a folder, numbered captions."""
    pictures(tmp_path / "größe/fotos")
    (tmp_path / "größe\\fotos\\2.png").write_bytes(picture(9))  # a name that is possible here
    rows = [(f"größe\\fotos\\{i}.png", *(f"Schöne Größe {i} {k}" for k in range(5))) for i in range(3)]
    head = ("file_name", *(f"caption_{k}" for k in range(1, 6)))
    source = opened(write_csv(tmp_path / "t.csv", [head, *rows], "cp1252", ";"), need_long=True)
    assert [source.read(i).image for i in range(3)] == [picture(0), picture(1), picture(9)]
    assert [source.texts(i).web for i in range(3)] == [row[1:] for row in rows]
    assert [source.missing(i) for i in range(3)] == [None] * 3
    assert caplog.text.count("backslashes") == 1
    assert caplog.text.count("read as cp1252") == 1
    (tmp_path / "out.csv").write_text("image,text\n..\\x.png,w\n" + "a.png,w\n")
    (tmp_path / "a.png").write_bytes(picture())
    with pytest.raises(UserError, match="leads out"):
        opened(tmp_path / "out.csv").read(0)


def test_open_clips_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """`--train-data` of open_clip: separated by tabs, paths from the current folder."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pics")
    rows = [(f"pics/{i}.png", f"w {i}") for i in range(3)]
    write_csv(tmp_path / "lists/train.csv", [("filepath", "title"), *rows], delimiter="\t")
    assert texts(opened("lists/train.csv")) == ["w 0", "w 1", "w 2"]
    assert "--image-root overrules" in caplog.text


def test_a_wrong_root_names_folder_and_first_path(tmp_path: Path) -> None:
    pictures(tmp_path / "pics")
    rows = [(f"{i}.png", f"w {i}") for i in range(3)]
    table = write_csv(tmp_path / "t.csv", [("image", "text"), *rows])
    with pytest.raises(UserError, match="--image-root") as refused:
        opened(table)
    assert "'0.png' was looked for in " + str(tmp_path) in str(refused.value)
    assert texts(opened(table, image_root=str(tmp_path / "pics"))) == ["w 0", "w 1", "w 2"]


def test_a_folder_of_the_datasets_library(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for suffix in (".csv", ".jsonl"):
        folder = tmp_path / f"imagefolder{suffix}" / "train"
        pictures(folder)
        rows = [{"file_name": f"{i}.png", "text": f"w {i}"} for i in range(3)]
        if suffix == ".csv":
            write_csv(folder / "metadata.csv", [tuple(rows[0]), *(tuple(row.values()) for row in rows)])
        else:
            (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder.parent / "test").mkdir()
        source = opened(folder.parent)
        assert texts(source) == ["w 0", "w 1", "w 2"]
        assert source.read(1).key.endswith("#1 (1.png)"), "a row's number alone names no picture"
        assert f"train taken, {folder.parent}/test left for tests" in caplog.text


def test_a_folder_of_pictures_with_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures(tmp_path / "urlaub/2024", 4)
    for i, data in enumerate([b"plain", "Größe".encode(), "Größe".encode("cp1252")]):
        (tmp_path / f"urlaub/2024/{i}.txt").write_bytes(data)
    assert texts(opened(tmp_path / "urlaub")) == ["plain", "Größe", "Größe"]
    assert "1 images without a text are skipped, the first is 2024/3.png" in caplog.text
    pictures(tmp_path / "none")
    with pytest.raises(UserError, match=r"a\.jpg, a\.txt"):
        opened(tmp_path / "none")
