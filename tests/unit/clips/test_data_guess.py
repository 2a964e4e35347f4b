"""A stranger's data, as they lie on a disk, are opened without a flag, and what was guessed is printed.

Public sets are in the layouts in which they are published, opened by the commands of docs/photographs.md. Names of
files, columns and members are the publishers'; the images are drawn here.
"""

import csv
import json
import re
from pathlib import Path
from typing import Any

import fsspec
import pytest
from bad_corpus import encode
from bad_corpus import square as make_image
from launched import write_shard, write_table
from PIL import Image

from clips.common.errors import UserError
from clips.config import Fields, RunConfig
from clips.data.dataset import Dataset, open_data
from clips.data.importing.layouts import expand, guess_fields, warn_once
from clips.data.loader import make_loader
from clips.data.sample import Texts
from clips.data.splits import open_split
from clips.data.tokenizer import build_tokenizer
from clips.training.cli import config_from_flags, parser
from clips.training.finish import print_next
from mllm.data.captions import is_captions


def make_images(folder: Path, count: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(make_image(i))


def guessed(spec: Path | str, *, need_long: bool = False, **options: str) -> Dataset:
    return open_data(str(spec), Fields(), need_long=need_long, **options)


def webs(source: Dataset) -> list[str]:
    assert [source.read(i).image for i in range(len(source))] == [make_image(i) for i in range(len(source))]
    return [source.read(i).web for i in range(len(source))]


def write_csv(path: Path, rows: list[tuple[str, ...]], encoding: str = "utf-8", delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def test_usual_columns() -> None:
    fields = guess_fields(Fields(), ["id", "Path", "ALT"])
    assert (fields.image, fields.web, fields.long) == ("Path", "ALT", "")
    assert guess_fields(Fields(image="id", web="id2"), ["Path", "ALT"]) == Fields(image="id", web="id2")
    fashion = guess_fields(Fields(), ["id", "gender", "articleType", "usage", "productDisplayName", "image"])
    assert (fashion.image, fashion.web, fashion.long) == ("image", "productDisplayName", "")


def test_headings_of_a_spreadsheet(tmp_path: Path) -> None:
    make_images(tmp_path)
    rows = [(f"{i}.png", *FIVE) for i in range(3)]
    table = write_csv(tmp_path / "t.csv", [("Image File", *(f"Caption {k}" for k in range(1, 6))), *rows])
    assert [guessed(table, need_long=True).captions(i) for i in range(3)] == [ALL] * 3


def test_the_default_layout_is_never_guessed_anew() -> None:
    recap = ["jpg", "json", "json:caption", "json:org_caption", "txt"]
    assert guess_fields(Fields(), recap) == Fields()
    web = guess_fields(Fields(), ["jpg", "json", "json:caption", "json:url", "txt"])
    assert (web.image, web.web, web.long) == ("jpg;jpeg;png;webp", "txt", ""), "img2dataset's txt is no long caption"
    both = guess_fields(Fields(), ["image", "alt", "long_caption"])
    assert (both.web, both.long) == ("alt", "long_caption")


def test_a_table_from_windows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Semicolons, cp1252, backslashes, umlauts in a folder, numbered captions."""
    make_images(tmp_path / "größe/fotos")
    (tmp_path / "größe\\fotos\\2.png").write_bytes(make_image(9))  # a name that is possible here
    rows = [(f"größe\\fotos\\{i}.png", *(f"Schöne Größe {i} {k}" for k in range(5))) for i in range(3)]
    head = ("file_name", *(f"caption_{k}" for k in range(1, 6)))
    source = guessed(write_csv(tmp_path / "t.csv", [head, *rows], "cp1252", ";"), need_long=True)
    assert [source.read(i).image for i in range(3)] == [make_image(0), make_image(1), make_image(9)]
    assert [source.captions(i).web for i in range(3)] == [row[1:] for row in rows]
    assert [source.missing(i) for i in range(3)] == [None] * 3
    assert caplog.text.count("backslashes") == 1
    assert caplog.text.count("read as cp1252") == 1
    (tmp_path / "out.csv").write_text("image,text\n..\\x.png,w\n" + "a.png,w\n")
    (tmp_path / "a.png").write_bytes(make_image())
    assert re.search("1 of 2 rows .*image outside: '../x.png'.*--image-root", guessed(tmp_path / "out.csv").notes[-1])


def test_open_clips_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """`--train-data` of open_clip: separated by tabs, paths from the current folder."""
    monkeypatch.chdir(tmp_path)
    warn_once.cache_clear()  # other tests' tables have this relative path, too
    make_images(tmp_path / "pics")
    rows = [(f"pics/{i}.png", f"w {i}") for i in range(3)]
    write_csv(tmp_path / "lists/train.csv", [("filepath", "title"), *rows], delimiter="\t")
    assert webs(guessed("lists/train.csv")) == ["w 0", "w 1", "w 2"]
    assert "--image-root overrules" in caplog.text


def test_a_wrong_root_names_folder_and_first_path(tmp_path: Path) -> None:
    make_images(tmp_path / "pics")
    rows = [(f"{i}.png", f"w {i}") for i in range(3)]
    table = write_csv(tmp_path / "t.csv", [("image", "text"), *rows])
    with pytest.raises(UserError, match="--image-root") as refused:
        guessed(table)
    assert "'0.png' was looked for in " + str(tmp_path) in str(refused.value)
    assert webs(guessed(table, image_root=str(tmp_path / "pics"))) == ["w 0", "w 1", "w 2"]


def test_the_image_root_is_that_of_a_mix_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was passed over, and the error asked for it."""
    make_images(tmp_path / "pics")
    make_images(tmp_path / "others")
    for name in "ab":
        write_csv(tmp_path / f"lists/{name}.csv", [("image", "text"), *((f"{i}.png", f"{name} {i}") for i in range(2))])
    mix = ("--mix", *(f"{name}=1:{tmp_path}/lists/{name}.csv" for name in "ab"))
    run = run_of("--recipe", "small", *mix, "--image-root", tmp_path / "pics")
    source = open_split(run.data, "train", need_long=False)
    assert [source.read(i).web for i in range(len(source))] == ["a 0", "a 1", "b 0", "b 1"]
    print_next(run.data, tmp_path / "r")
    assert f"--image_folder {tmp_path / 'pics'}" in capsys.readouterr().err
    (tmp_path / "others/1.png").write_bytes(make_image(7))
    own = run.override([f"data.mix.1.image_root={tmp_path / 'others'}"])
    source = open_split(own.data, "train", need_long=False)
    assert [source.read(i).image for i in (1, 3)] == [make_image(1), make_image(7)], "a part may have its own"


@pytest.mark.parametrize("spec", ["{0..3.tar", "x}.tar"])
def test_a_brace_that_was_forgotten_is_named(spec: str) -> None:
    with pytest.raises(UserError, match=r"Unbalanced braces.*\{00000\.\.00009\}\.tar"):
        expand(spec)


def test_a_folder_of_the_datasets_library(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for suffix in (".csv", ".jsonl"):
        folder = tmp_path / f"imagefolder{suffix}" / "train"
        make_images(folder)
        write_table(folder / f"metadata{suffix}", [{"file_name": f"{i}.png", "text": f"w {i}"} for i in range(3)])
        (folder.parent / "test").mkdir()
        source = guessed(folder.parent)
        assert webs(source) == ["w 0", "w 1", "w 2"]
        assert source.read(1).key.endswith("#1 (1.png)"), "a row's number alone names no image"
        assert f"train taken, {folder.parent}/test left for tests" in caplog.text


def test_a_folder_of_images_with_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path / "urlaub/2024", 4)
    for i, data in enumerate([b"plain", "Größe".encode(), "Größe".encode("cp1252")]):
        (tmp_path / f"urlaub/2024/{i}.txt").write_bytes(data)
    assert webs(guessed(tmp_path / "urlaub")) == ["plain", "Größe", "Größe"]
    assert "1 images without a text are skipped, the first is 2024/3.png" in caplog.text
    make_images(tmp_path / "none")
    with pytest.raises(UserError, match=r"a\.jpg, a\.txt"):
        guessed(tmp_path / "none")


def test_each_line_of_a_text_is_a_caption(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("\r\n".join([*FIVE, ""]))
    assert [guessed(tmp_path, need_long=True).captions(i) for i in range(3)] == [ALL] * 3
    assert "each line of a text is a caption" in caplog.text
    whole = open_data(str(tmp_path), Fields(web="whole"), need_long=False).captions(0)
    assert (len(whole.web), whole.long, whole.web[0].splitlines()) == (1, (), FIVE)
    (tmp_path / "1.txt").write_text("One paragraph.\n\nAnother one.")
    (tmp_path / "2.txt").write_text("One line.")
    assert webs(guessed(tmp_path))[1] == "One paragraph.\n\nAnother one."


CLIP = ("--set", "task.objective=clip", "task.caption_weight=0", "model.captioner=null")
FIVE = [f"A dog runs on the grass {i} ." for i in range(5)]
ALL = Texts(tuple(FIVE), others=True)


def jpeg(value: int) -> bytes:
    return encode(Image.new("RGB", (24, 16), (60 * value % 256, 90 + value // 64, value % 256)), "JPEG", quality=90)


def write_jpegs(path: Path, count: int, texts: dict[str, bytes]) -> None:
    """A tar with `count` images, each with the members `texts`."""
    write_shard(path, [(jpeg(i), texts) for i in range(count)], "jpg")


def write_parquet(path: Path, count: int, row: dict[str, Any]) -> None:
    """`count` rows with images as the `datasets` library writes them, unless the row has a `url`."""
    write_table(
        path, [row if "url" in row else {"image": {"bytes": jpeg(i), "path": None}} | row for i in range(count)]
    )


def run_of(*flags: str | Path) -> RunConfig:
    return config_from_flags(parser().parse_args(list(map(str, flags))), {})


def opened(run: RunConfig, split: str = "train") -> Dataset:
    return open_split(run.data, split, need_long=run.task.captions and split == "train")


def texts(source: Dataset) -> list[Texts]:
    """The captions of a source, whose images are those that were written."""
    assert [source.read(i).image for i in range(len(source))] == [jpeg(i) for i in range(len(source))]
    return [source.read(i).texts for i in range(len(source))]


@pytest.mark.parametrize("name", ["coco", "flickr8k", "flickr30k"])
def test_karpathys_files(name: str, tmp_path: Path) -> None:
    """caption_datasets.zip: COCO's images lie in two folders, and restval is training data."""
    images: list[dict[str, Any]] = []
    third = "restval" if name == "coco" else "train"
    for split, numbers in (("train", (0, 1)), (third, (2,)), ("val", (0, 1)), ("test", (0,))):
        for i in numbers:
            number = len(images)
            ids = range(5 * number, 5 * number + 5)
            words = [{"tokens": text.lower().split()[:-1], "raw": text, "imgid": number} for text in FIVE]
            sentences = [own | {"sentid": ids[n]} for n, own in enumerate(words)]
            folder = "train2014" if split == "train" else "val2014"
            coco = {"filepath": folder, "cocoid": number, "filename": f"COCO_{folder}_{number:012}.jpg"}
            images.append(coco if name == "coco" else {"filename": f"{1000092795 + number}.jpg"})
            path = tmp_path / "images" / images[-1].get("filepath", "") / images[-1]["filename"]
            images[-1] |= {"sentids": [*ids], "imgid": number, "sentences": sentences, "split": split}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(i))
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images, "dataset": name}))
    run = run_of("--karpathy", tmp_path / "dataset.json", "--image-root", tmp_path / "images")
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        assert texts(opened(run, split)) == [ALL] * count


def write_coco(folder: Path, images: int = 3, captions: int = 5) -> Path:
    """COCO's own captions, in its folders. Of the last image there are none."""
    (folder / "annotations").mkdir(parents=True)
    make_images(folder / "val2017", images)
    entries = [{"license": 1, "file_name": f"{i}.png", "coco_url": "http://x", "id": 100 + i} for i in range(images)]
    texts = [{"image_id": 100 + i, "id": i, "caption": FIVE[k]} for k in range(captions) for i in range(images - 1)]
    path = folder / "annotations/captions_val2017.json"
    path.write_text(json.dumps({"info": {}, "images": entries, "annotations": texts}))
    return path


def test_cocos_own_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    coco = write_coco(tmp_path / "coco")
    for root in ({}, {"image_root": str(tmp_path / "coco")}):
        source = guessed(coco, need_long=True, **root)
        assert [source.read(i).image for i in range(2)] == [make_image(0), make_image(1)]
        assert [source.captions(i) for i in range(2)] == [ALL, ALL]
        assert source.parts[0].facts["skipped"] == {"web caption is empty": 1}
    assert caplog.text.count("looked for in " + str(tmp_path / "coco/val2017")) == 1
    assert is_captions(coco)
    with pytest.raises(UserError, match=r"COCO's own file.* --data"):
        opened(run_of("--karpathy", coco))
    (tmp_path / "k.json").write_text('{"images": [{"split": "train", "sentences": []}]}')
    with pytest.raises(UserError, match="--karpathy"):
        guessed(tmp_path / "k.json")


def test_a_list_of_objects_and_flickrs_tokens(tmp_path: Path) -> None:
    make_images(tmp_path)
    rows = [{"image": f"{i}.png", "text": f"w {i}"} for i in range(3)]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    assert webs(guessed(tmp_path / "list.json")) == ["w 0", "w 1", "w 2"]
    assert is_captions(tmp_path / "list.json")
    (tmp_path / "llava.json").write_text(json.dumps([{"id": "0", "conversations": []}], indent=1))
    assert not is_captions(tmp_path / "llava.json")
    lines = [f'{i}.png#{k}\t{text} "{i}\n' for i in range(3) for k, text in enumerate(FIVE)]
    (tmp_path / "Flickr8k.token.txt").write_text("".join(lines))
    source = guessed(tmp_path / "Flickr8k.token.txt", need_long=True)
    assert source.captions(2) == Texts(tuple(f'{text} "2' for text in FIVE), others=True)
    (tmp_path / "Flickr8k.lemma.txt").write_text("0.png#0\tw\n")
    with pytest.raises(UserError, match=r"first line is image,caption"):
        guessed(tmp_path / "Flickr8k.lemma.txt")


def test_nested_keys_and_struct_fields(tmp_path: Path) -> None:
    """An object is named by its keys, but an image of the datasets library stays whole."""
    make_images(tmp_path)
    rows: list[dict[str, Any]] = [
        {"file": {"name": f"{i}.png", "size": 1}, "note": {"captions": FIVE, "by": "me"}} for i in range(3)
    ]
    named = Fields(image="file.name", web="note.captions")
    for name in ("t.jsonl", "t.parquet"):
        source = open_data(str(write_table(tmp_path / name, rows)), named, need_long=True)
        assert [source.read(i).image for i in range(3)] == [make_image(i) for i in range(3)]
        assert source.captions(1) == ALL
        with pytest.raises(UserError, match=r"found: file.name, file.size, note.captions, note.by"):
            open_data(str(tmp_path / name), Fields(image="file", web="note.captions"), need_long=False)
    inside = [{"photo": {"data": {"bytes": make_image(i), "path": None}}, "text": f"w {i}"} for i in (0, 1, 2, 2)]
    write_table(tmp_path / "i.parquet", inside)
    source = open_data(str(tmp_path / "i.parquet"), Fields(image="photo.data"), need_long=False)
    assert webs(source) == ["w 0", "w 1", "w 2"]
    write_jpegs(tmp_path / "a.tar", 2, {"json": json.dumps(rows[0]).encode()})
    source = open_data(str(tmp_path / "a.tar"), Fields(web="json:note.captions"), need_long=True)
    assert texts(source) == [ALL, ALL]


FLICKR8K = {f"caption_{n}": text for n, text in enumerate(FIVE)}
"""jxie/flickr8k: a column for each of the five captions."""
FLICKR30K = {"alt_text": FIVE, "original_alt_text": FIVE, "sentids": ["0", "1"], "split": "train", "img_id": "0"}
"""AnyModal/flickr30k, with Karpathy's splits."""


@pytest.mark.parametrize(("row", "said"), [(FLICKR8K, "'caption_0' to 'caption_4'"), (FLICKR30K, "'alt_text'")])
def test_parquet_of_the_hub(row: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        write_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet", count, row)
    run = run_of("--data", tmp_path, "--val-data", tmp_path / "data/validation-*.parquet")
    assert [texts(opened(run, split)) for split in ("train", "val")] == [[ALL] * 3, [ALL] * 2]
    assert said in caplog.text
    tokenizer = build_tokenizer("wordpiece", FIVE * 3, vocab_size=64)
    small = run.override(["phases.*.samples=3", "phases.*.batch_size=3", "data.workers=0"])
    batch = next(iter(make_loader(opened(run), tokenizer, small, rank=0, world_size=1)))
    assert (len(batch["web"]), len(batch["sub"])) == (3, 3)


def test_cc3m_as_tar_shards(tmp_path: Path) -> None:
    """pixparse/cc3m-wds, all in one folder, and what img2dataset writes: one caption is enough for CLIP."""
    caption = "a river has burst it 's banks and has spread out onto arable farmland alongside"
    account, text = img2dataset_json(caption=caption), {"txt": caption.encode()}
    write_jpegs(tmp_path / "cc3m-wds/cc3m-train-0000.tar", 3, text)
    write_jpegs(tmp_path / "cc3m-wds/cc3m-validation-0000.tar", 1, {"txt": b"a dog"})
    write_jpegs(tmp_path / "cc3m/00000.tar", 3, {"json": json.dumps(account).encode()} | text)
    write_parquet(tmp_path / "cc3m/00000.parquet", 3, account)
    (tmp_path / "cc3m/00000_stats.json").write_text("{}")
    for data in (tmp_path / "cc3m-wds/cc3m-train-*.tar", tmp_path / "cc3m"):
        held_out = ("--val-data", tmp_path / "cc3m-wds/cc3m-validation-*.tar")
        run = run_of("--recipe", "s16", "--data", data, *held_out, *CLIP)
        assert texts(opened(run)) == [Texts((caption,))] * 3
        assert len(opened(run, "val")) == 1
        with pytest.raises(UserError, match="no long captions"):
            opened(run_of("--recipe", "s16", "--data", data))


def test_a_data_set_of_the_hub_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is played by a file system in memory with the paths of huggingface_hub's."""
    memory = fsspec.filesystem("memory")
    for module in ("importing.layouts", "remote"):
        monkeypatch.setattr(f"clips.data.{module}.store_of", lambda url: (memory, f"/{url.partition('://')[2]}"))
    monkeypatch.setenv("CLIPS_MLLM_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        write_parquet(tmp_path / "t.parquet", 3, FLICKR8K | {"split": split})
        data = (tmp_path / "t.parquet").read_bytes()
        memory.pipe(f"/datasets/me/flickr/data/{split}-00000-of-00001.parquet", data)
    source = opened(run_of("--data", "hf:me/flickr"))
    assert texts(source) == [ALL] * 3
    for folder in ("valentines", "development", "val"):
        memory.pipe(f"/datasets/me/days/{folder}/0.parquet", data)
    assert len(expand("hf:me/days")) == 2, "only val/ is a split"
    assert source.read(0).extra["split"] == "train"
    with pytest.raises(UserError, match="hf:me/none"):
        opened(run_of("--data", "hf:me/none"))


def img2dataset_json(**columns: str) -> dict[str, Any]:
    """A JSON member of img2dataset: the table's columns, then its own account."""
    account = {"url": "http://images.example/0.jpg", "key": "000000000", "status": "success", "error_message": None}
    sizes = {"width": 24, "height": 16, "original_width": 240, "original_height": 160}
    return columns | account | sizes | {"exif": "{}", "sha256": "0" * 64}


def test_recap_datacomp_as_urls_and_as_img2dataset_fetches_it(tmp_path: Path) -> None:
    """UCSC-VLAA/Recap-DataComp-1B."""
    row = {"url": "http://images.example/a.jpg", "re_caption": "A dog runs. It is brown.", "org_caption": "dog.jpg"}
    row |= {"sha256": "0" * 64, "key": "0", "re_clip_score": 0.3, "org_clip_score": 0.2}
    row |= {"re_length": 6, "org_length": 1, "re_gpt4v_score": 5, "org_gpt4v_score": 2}
    write_parquet(tmp_path / "hub/data/train_data/train-00000-of-00001.parquet", 1, row)
    with pytest.raises(UserError, match="img2dataset"):
        opened(run_of("--recipe", "b16", "--data", tmp_path / "hub/data/train_data"))

    account = img2dataset_json(caption=row["re_caption"], org_caption=row["org_caption"])
    members = {"json": json.dumps(account).encode(), "txt": row["re_caption"].encode()}
    write_jpegs(tmp_path / "recap/00000.tar", 3, members)
    run = run_of("--recipe", "b16", "--data", tmp_path / "recap")
    assert texts(opened(run)) == [Texts(("dog.jpg",), ("A dog runs. It is brown.",))] * 3
