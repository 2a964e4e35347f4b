"""Every layout of data that needs no flag (docs/data.md): samples, order, pixels and token ids are the stored ones.

`PYTHONPATH=.:tests python tests/numerics/test_layouts.py DIR` stores them anew; DIR is an empty folder. Each part has
a hash of its own, so that a failure says what differs.
"""

import csv
import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import pytest
from bad_corpus import encode, noise
from launched import recap, write_shard, write_table, write_tar
from PIL import Image

from clips import open_split
from clips.common.errors import UserError
from clips.config import Fields, RunConfig, parse_mix
from clips.data.loader import make_loader
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.recipes import recipe

pytestmark = pytest.mark.usefixtures("own_cache")
STORED = Path(__file__).with_name("layouts.json")
MANY, FEW = 120, 20
"""Images of a set of which a share is held out, and of one that is too small for that."""
TEXT = "Ein Hund läuft über die Wiese , and two red Cats sit near a café's window ; it's “late” | 7.5 % off !"
Layout = dict[str, Any]
"""The arguments of a DataConfig, and `long`: True if CLIPS trains on the set, False if CLIP does."""
LAYOUTS: dict[str, Callable[[Path], Layout]] = {}


def layout(make: Callable[[Path], Layout]) -> Callable[[Path], Layout]:
    LAYOUTS[make.__name__] = make
    return make


# --------------------------------------------------------------------------------------------------- parts
@cache
def picture(number: int) -> bytes:
    """A PNG of noise; it is not packed, because its bytes decide whether it is held out, and packers differ."""
    return encode(Image.fromarray(noise(24 + number % 17, 40 - number % 13, 3, seed=number)), compress_level=0)


def pictures(folder: Path, count: int, first: int = 0) -> list[str]:
    """Write pictures whose names do not sort as their numbers; return the names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i * 7919 % 1000:03}_{i}.png" for i in range(first, first + count)]
    for i, name in enumerate(names, first):
        (folder / name).write_bytes(picture(i))
    return names


def caption(number: int, kind: int = 0) -> str:
    """A text of its own for each image and kind."""
    rng = random.Random(f"{number} {kind}")
    return " ".join([*rng.choices(TEXT.split(), k=rng.randint(2, 9)), f"{number}.{kind}"])


def captions(number: int, count: int = 5) -> list[str]:
    return [caption(number, kind) for kind in range(count)]


def long_caption(number: int) -> str:
    return " ".join(f"The {caption(number, 10 + kind)}." for kind in range(1 + number % 4))


def write_rows(path: Path, rows: Iterable[Sequence[object]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def recap_samples(numbers: Iterable[int]) -> list[tuple[bytes, dict[str, bytes]]]:
    return [(picture(i), recap(caption(i), long_caption(i))) for i in numbers]


def shuffled(rows: list[Any]) -> list[Any]:
    return random.Random(0).sample(rows, len(rows))


# --------------------------------------------------------------------------------------------------- tables
@layout
def csv_of_usual_columns(folder: Path) -> Layout:
    names = pictures(folder / "pics", MANY)
    rows = [
        {"id": i, "file_name": f"pics/{name}", "caption": caption(i), "long_caption": long_caption(i), "note": ""}
        for i, name in enumerate(names)
    ]
    return {"train": str(write_table(folder / "my.csv", rows)), "long": True}


@layout
def csv_from_windows(folder: Path) -> Layout:
    names = pictures(folder / "größe/fotos", FEW)
    rows = [(f"größe\\fotos\\{name}", f"Schöne Größe {i}; „{i}“", i) for i, name in enumerate(names)]
    return {"train": str(write_rows(folder / "t.csv", [("Image File", "Title", "Ort"), *rows], ";", "cp1252"))}


@layout
def csv_with_named_fields_and_a_root(folder: Path) -> Layout:
    names = pictures(folder / "elsewhere/a", MANY)
    rows = [(f"a/{name}", caption(i), long_caption(i), f"w {i}") for i, name in enumerate(names)]
    table = write_rows(folder / "lists/t.csv", [("where", "what", "more", "text"), *rows])
    fields = Fields(image="nothing;where", web="what", long="more")
    return {"train": str(table), "fields": fields, "image_root": str(folder / "elsewhere"), "long": True}


@layout
def tsv_of_open_clip(folder: Path) -> Layout:
    """Its paths begin at the current folder, and its name ends in .csv."""
    names = pictures(folder / "pics", MANY)
    rows = [(f"pics/{name}", caption(i)) for i, name in enumerate(names)]
    write_rows(folder / "lists/train.csv", [("filepath", "title"), *rows], "\t")
    return {"train": "lists/train.csv"}


@layout
def json_list(folder: Path) -> Layout:
    names = pictures(folder, FEW)
    rows = [{"image": n, "text": caption(i), "by": {"who": f"me {i}", "at": [i, 1.5]}} for i, n in enumerate(names)]
    (folder / "my.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return {"train": str(folder / "my.json")}


@layout
def jsonl_of_caption_lists(folder: Path) -> Layout:
    names = pictures(folder, MANY)
    rows = [{"image": n, "captions": captions(i, 2 + i % 4), "label": i % 3} for i, n in enumerate(names)]
    return {"train": str(write_table(folder / "my.jsonl", rows)), "long": True}


@layout
def jsonl_of_nested_keys(folder: Path) -> Layout:
    names = pictures(folder, FEW)
    rows = [{"file": {"name": n, "size": i}, "note": {"alt": caption(i), "by": None}} for i, n in enumerate(names)]
    fields = Fields(image="file.name", web="note.alt")
    return {"train": str(write_table(folder / "my.jsonl", rows)), "fields": fields}


@layout
def parquet_of_paths(folder: Path) -> Layout:
    names = pictures(folder / "pics", MANY)
    rows = [
        {"path": f"pics/{n}", "alt": caption(i), "re_caption": long_caption(i), "at": datetime(2024, 5, 1 + i % 28)}
        | {"score": i / 4, "tags": ["a", str(i)], "none": None}
        for i, n in enumerate(names)
    ]
    return {"train": str(write_table(folder / "my.parquet", rows)), "long": True}


@layout
def datasets_parquet(folder: Path) -> Layout:
    """As on the hub: images inside, in several files, with a held-out split beside."""
    rows = [
        {"image": {"bytes": picture(i), "path": f"{i}.png"}}
        | {f"caption_{kind}": text for kind, text in enumerate(captions(i))}
        | {"label": i % 3}
        for i in range(MANY)
    ]
    for part, (first, last) in {"train-00000-of-00002": (0, 70), "train-00001-of-00002": (70, MANY)}.items():
        write_table(folder / f"hub/data/{part}.parquet", rows[first:last])
    write_table(folder / "hub/data/test-00000-of-00001.parquet", rows[:3])
    return {"train": str(folder / "hub"), "long": True}


@layout
def datasets_imagefolder(folder: Path) -> Layout:
    names = pictures(folder / "set/train", MANY)
    rows = [{"file_name": n, "text": caption(i), "additional": i} for i, n in enumerate(names)]
    write_table(folder / "set/train/metadata.csv", rows)
    pictures(folder / "set/test", 2)
    return {"train": str(folder / "set")}


@layout
def datasets_imagefolder_of_jsonl(folder: Path) -> Layout:
    names = pictures(folder / "set/train", FEW)
    rows = [{"file_name": n, "text": caption(i), "objects": {"bbox": [[i, 2]]}} for i, n in enumerate(names)]
    write_table(folder / "set/train/metadata.jsonl", rows)
    return {"train": str(folder / "set")}


@layout
def csv_of_caption_columns(folder: Path) -> Layout:
    names = pictures(folder, FEW)
    rows = [(n, *captions(i, 3), i) for i, n in enumerate(names)]
    head = ("image", "caption_1", "caption_2", "caption_3", "id")
    return {"train": str(write_rows(folder / "t.csv", [head, *rows])), "long": True}


@layout
def csv_of_caption_headings(folder: Path) -> Layout:
    names = pictures(folder, FEW)
    rows = [(n, *captions(i, 2), "" if i % 2 else caption(i, 2)) for i, n in enumerate(names)]
    return {"train": str(write_rows(folder / "t.csv", [("Image", "Caption 1", "Caption 2", "Caption 3"), *rows]))}


@layout
def csv_of_a_few_repeated_images(folder: Path) -> Layout:
    """Their captions are gathered, yet the set has one per image."""
    names = pictures(folder, FEW)
    rows = [(n, caption(i), i) for i, n in enumerate(names)] + [(names[i], caption(i, 1), 100 + i) for i in (3, 1)]
    return {"train": str(write_rows(folder / "t.csv", [("image", "text", "id"), *rows]))}


@layout
def parquet_of_a_row_per_caption(folder: Path) -> Layout:
    """Images inside, whose rows are not neighbours."""
    rows = [{"image": picture(n // 3), "caption": caption(n // 3, n % 3), "id": n} for n in range(3 * FEW)]
    return {"train": str(write_table(folder / "t.parquet", shuffled(rows))), "long": True}


@layout
def flickr8k_of_kaggle(folder: Path) -> Layout:
    names = pictures(folder / "Images", MANY)
    rows = [(n, text) for i, n in enumerate(names) for text in captions(i)]
    table = write_rows(folder / "captions.txt", [("image", "caption"), *rows])
    return {"train": str(table), "image_root": str(folder / "Images"), "long": True}


@layout
def flickr8k_tokens(folder: Path) -> Layout:
    names = pictures(folder / "Images", FEW)
    lines = [f'{n}#{k}\t{text} "{i}\n' for i, n in enumerate(names) for k, text in enumerate(captions(i))]
    (folder / "Flickr8k.token.txt").write_text("".join(lines), encoding="utf-8")
    return {"train": str(folder / "Flickr8k.token.txt"), "image_root": str(folder / "Images"), "long": True}


@layout
def flickr30k_of_kaggle(folder: Path) -> Layout:
    names = pictures(folder / "flickr30k_images", FEW)
    rows = [f"{n}| {k}| {text.replace('|', '/')}\n" for i, n in enumerate(names) for k, text in enumerate(captions(i))]
    (folder / "results.csv").write_text("image_name| comment_number| comment\n" + "".join(rows), encoding="utf-8")
    return {"train": str(folder / "results.csv"), "image_root": str(folder / "flickr30k_images"), "long": True}


@layout
def coco(folder: Path) -> Layout:
    names = pictures(folder / "coco/train2017", MANY)
    entries = [{"license": 1, "file_name": n, "coco_url": "http://x", "id": 900 - i} for i, n in enumerate(names)]
    notes = [{"image_id": 900 - i, "id": 5 * i + k, "caption": caption(i, k)} for i in range(MANY) for k in range(5)]
    path = folder / "coco/annotations/captions_train2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"info": {}, "images": entries, "annotations": shuffled(notes)}), encoding="utf-8")
    return {"train": str(path), "long": True}


@layout
def karpathy(folder: Path) -> Layout:
    images = []
    for split, first, count in (("train", 0, 12), ("restval", 12, 6), ("val", 18, 5)):
        place = "train2014" if split == "train" else "val2014"
        for i, name in enumerate(pictures(folder / "coco" / place, count, first), first):
            sentences = [{"raw": text, "tokens": text.split(), "imgid": i} for text in captions(i)]
            images.append({"filepath": place, "filename": name, "split": split, "imgid": i, "sentences": sentences})
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"dataset": "coco", "images": shuffled(images)}), encoding="utf-8")
    return {"train": f"{path}#train+restval", "val": f"{path}#val", "image_root": str(folder / "coco"), "long": True}


@layout
def several_tables(folder: Path) -> Layout:
    """Of two kinds, the second one in another folder and with images of the first one, which keep to their side."""
    names = pictures(folder / "pics", MANY)
    first = write_rows(folder / "a.csv", [("image", "text"), *((f"pics/{n}", caption(i)) for i, n in enumerate(names))])
    rows = [{"text": caption(i, 1), "image": f"pics/{names[i]}"} for i in range(0, MANY, 3)]
    second = write_table(folder / "b/b.jsonl", rows)
    return {"train": f"{first};{second}", "image_root": str(folder)}


@layout
def csv_with_a_key(folder: Path) -> Layout:
    names = pictures(folder, 2 * MANY)
    rows = [{"image": n, "text": caption(i), "thing": f"t{i // 2}" if i % 5 else ""} for i, n in enumerate(names)]
    return {"train": str(write_table(folder / "t.csv", rows)), "key": "thing"}


# --------------------------------------------------------------------------------------------------- folders
@layout
def folder_of_images_and_texts(folder: Path) -> Layout:
    for place, first in (("set", 0), ("set/b/c", 40), ("set/a", 80)):
        for i, name in enumerate(pictures(folder / place, 50, first), first):
            text = caption(i).encode("utf-8" if i % 9 else "cp1252")
            (folder / place / name).with_suffix(".txt").write_bytes(text)
    return {"train": str(folder / "set")}


@layout
def folder_of_texts_of_several_lines(folder: Path) -> Layout:
    for i, name in enumerate(pictures(folder / "set", MANY)):
        (folder / "set" / name).with_suffix(".txt").write_text("\r\n".join([*captions(i), ""]), encoding="utf-8")
    return {"train": str(folder / "set"), "long": True}


@layout
def folder_of_whole_texts(folder: Path) -> Layout:
    return folder_of_texts_of_several_lines(folder) | {"fields": Fields(web="whole"), "long": False}


# --------------------------------------------------------------------------------------------------- shards
@layout
def recap_shards(folder: Path) -> Layout:
    for shard in range(3):
        write_shard(folder / f"{shard:05}.tar", recap_samples(range(shard * 40, shard * 40 + 40)))
    return {"train": f"{folder}/*.tar", "long": True}


@layout
def recap_shards_for_clip(folder: Path) -> Layout:
    return recap_shards(folder) | {"train": str(folder), "long": False}


@layout
def img2dataset_shards(folder: Path) -> Layout:
    """The text is the web caption; the account of img2dataset stays with the sample."""
    for shard in range(2):
        samples = []
        for i in range(shard * 60, shard * 60 + 60):
            account = {"caption": caption(i), "url": f"http://x/{i}.jpg", "key": f"{i:09}", "status": "success"}
            account |= {"width": 24, "exif": "{}", "error_message": None, "label": i % 3}
            samples.append((picture(i), {"json": json.dumps(account).encode(), "txt": caption(i).encode()}))
        write_shard(folder / f"{shard:05}.tar", samples, "jpg")
    return {"train": f"{folder}/{{00000..00001}}.tar"}


@layout
def shards_without_json(folder: Path) -> Layout:
    """Folders and capitals in names, classes, members that nobody needs."""
    members = []
    for i in range(FEW):
        stem = f"./part{i % 2}/Näme {i}"
        parts = {"txt": caption(i).encode(), "PNG": picture(i), "cls": b"%d\n" % (i % 3), "seg.png": b"x"}
        members += [(f"{stem}.{extension}", data) for extension, data in parts.items()]
    return {"train": str(write_tar(folder / "s.tar", members))}


@layout
def shards_of_caption_lists(folder: Path) -> Layout:
    samples = [(picture(i), {"json": json.dumps({"captions": captions(i), "id": i}).encode()}) for i in range(FEW)]
    return {"train": str(write_shard(folder / "s.tar", samples)), "long": True}


@layout
def shards_with_named_fields(folder: Path) -> Layout:
    samples = []
    for i in range(FEW):
        meta = json.dumps({"text": {"alt": caption(i)}, "dense": long_caption(i)}).encode()
        samples.append((picture(i), {"meta": meta, "txt": b"no"}))
    fields = Fields(image="jpg;img", web="meta:text.alt;txt", long="meta:dense")
    return {"train": str(write_shard(folder / "s.tar", samples, "img")), "fields": fields, "long": True}


@layout
def several_shards(folder: Path) -> Layout:
    """Not in the order of their names, the second one in another folder."""
    first = write_shard(folder / "b.tar", recap_samples(range(70)))
    second = write_shard(folder / "x/a.tar", recap_samples(range(70, MANY)))
    return {"train": f"{first};{second}", "long": True}


@layout
def shards_with_a_key(folder: Path) -> Layout:
    samples = []
    for i in range(2 * MANY):
        meta = json.dumps({"org_caption": caption(i), "thing": i // 2}).encode()
        samples.append((picture(i), {"json": meta, "txt": long_caption(i).encode()}))
    return {"train": str(write_shard(folder / "s.tar", samples)), "key": "thing", "long": True}


@layout
def remote_shards(folder: Path) -> Layout:
    """Their images are held out by name, because reading them all could take days."""
    for shard in range(3):
        path = write_shard(folder / f"{shard}.tar", recap_samples(range(shard * 40, shard * 40 + 40)))
        fsspec.filesystem("memory").pipe(f"/layouts/{shard}.tar", path.read_bytes())
    return {"train": "memory://layouts/{0..2}.tar", "long": True}


@layout
def remote_parquet(folder: Path) -> Layout:
    rows = [{"image": {"bytes": picture(i), "path": None}, "caption": caption(i)} for i in range(MANY)]
    data = write_table(folder / "t.parquet", rows).read_bytes()
    fsspec.filesystem("memory").pipe("/layouts/t.parquet", data)
    return {"train": "memory://layouts/t.parquet"}


# --------------------------------------------------------------------------------------------------- mixes
@layout
def mix_of_shards_and_a_table(folder: Path) -> Layout:
    for shard in range(2):
        write_shard(folder / f"recap/{shard}.tar", recap_samples(range(shard * 20, shard * 20 + 20)))
    names = pictures(folder / "pics", FEW, 200)
    rows = [{"image": n, "alt": caption(200 + i), "caption": long_caption(200 + i)} for i, n in enumerate(names)]
    table = write_table(folder / "t.jsonl", rows)
    recapped, own = parse_mix([f"recap=3:{folder}/recap/*.tar", f"own=1:{table}"])
    own = replace(own, fields=Fields(image="image", web="alt", long="caption"), image_root=str(folder / "pics"))
    return {"train": "mix", "mix": (recapped, own), "long": True}


@layout
def mix_of_tables_under_one_root(folder: Path) -> Layout:
    names = pictures(folder / "pics", 2 * FEW)
    for k, part in enumerate("ab"):
        rows = [(n, caption(i, k)) for i, n in enumerate(names[k * FEW :])]
        write_rows(folder / f"lists/{part}.csv", [("image", "text"), *rows])
    mix = parse_mix([f"{part}={share}:{folder}/lists/{part}.csv" for part, share in (("a", 0.7), ("b", 0.3))])
    return {"train": "mix", "mix": mix, "image_root": str(folder / "pics")}


# --------------------------------------------------------------------------------------------------- what is stored
@cache
def tokenizer() -> CaptionTokenizer:
    return build_tokenizer("wordpiece", [caption(i, kind) for i in range(40) for kind in range(5)], vocab_size=300)


def run_of(data: Layout) -> RunConfig:
    """`small` in little: CLIPS with its captioner if the set has long captions, else CLIP."""
    data = dict(data)
    run = recipe("small_captioner" if data.pop("long", False) else "small_clip")
    model = replace(run.model, vision=replace(run.model.vision, image_size=20))
    return replace(run, model=model, data=replace(run.data, workers=0, held_out=0.1, **data))


def digest(parts: Iterable[bytes | str]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        whole.update(b"%d:" % len(data) + data)
    return whole.hexdigest()[:16]


def record(make: Callable[[Path], Layout], folder: Path) -> dict[str, Any]:
    """Write a set into the current folder `folder`; return hashes of what its splits hold and of two epochs."""
    run = run_of(make(folder))
    source = open_split(run.data, "train", need_long=run.task.captions)

    def named(key: str) -> str:
        return key.replace(f"{folder}/", "")

    samples = [source.read(i) for i in range(len(source))]
    texts = [json.dumps([sample.texts.web, sample.texts.long, sample.texts.others]) for sample in samples]
    found: dict[str, Any] = {
        "samples": len(source),
        "first": [named(samples[0].key), samples[0].extra],
        "keys": digest(named(sample.key) for sample in samples),
        "images": digest(sample.image for sample in samples),
        "captions": digest(texts),
        "extra": digest(json.dumps(sample.extra, sort_keys=True, default=str) for sample in samples),
    }
    steps = -(-2 * len(source) // 8)
    phase = replace(run.phases[0], samples=8 * steps, batch_size=8, image_size=20, warmup_samples=0)
    run = replace(run, phases=(phase,))
    batches = list(make_loader(source, tokenizer(), run, rank=0, world_size=1))
    assert len(batches) == steps
    assert not any(batch["skipped"] for batch in batches), "every sample is a good one"
    found["positions"] = digest(str(batch["positions"]) for batch in batches)
    found["order"] = digest(named(key) for batch in batches for key in batch["keys"])
    found["pixels"] = digest(batch["images"].numpy().tobytes() for batch in batches)
    for name in ("web", "sub", "caption"):
        if name in batches[0]:
            found[name] = digest(json.dumps(batch[name].tolist()) for batch in batches)
    try:
        held_out = open_split(run.data, "val", need_long=False)
    except UserError:  # none is held out
        found["val"] = None
    else:
        keys = [named(held_out.read(i).key) for i in range(len(held_out))]
        found["val"] = {"samples": len(keys), "first": keys[0], "keys": digest(keys)}
    return json.loads(json.dumps(found, default=str))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_samples_are_the_stored_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert record(LAYOUTS[name], tmp_path) == json.loads(STORED.read_text(encoding="utf-8"))[name]


if __name__ == "__main__":
    stored = {}
    with pytest.MonkeyPatch.context() as patch:
        root = Path(sys.argv[1]).resolve()
        patch.setenv("CLIPS_MLLM_CACHE", str(root / "cache"))
        for name, make in LAYOUTS.items():
            (root / name).mkdir(parents=True)
            patch.chdir(root / name)
            stored[name] = record(make, root / name)
    STORED.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
