"""Public sets of photographs in the layouts in which they are published, opened by the commands of docs/photographs.md.

Names of files, columns and members are the publishers'; the pictures are drawn here.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from bad_corpus import encode
from launched import write_tar
from PIL import Image

from clips.common.errors import UserError
from clips.config import RunConfig
from clips.data.loader import make_loader
from clips.data.sample import Texts
from clips.data.sources import Source
from clips.data.splits import open_split
from clips.data.tokenizer import build_tokenizer
from clips.training.cli import config_from_flags, parser

CLIP = ("--set", "task.objective=clip", "task.caption_weight=0", "model.captioner=null")
FIVE = [f"A dog runs on the grass {i} ." for i in range(5)]
ALL = Texts(tuple(FIVE), others=True)


def jpeg(value: int) -> bytes:
    return encode(Image.new("RGB", (24, 16), (60 * value % 256, 90 + value // 64, value % 256)), "JPEG", quality=90)


def write_parquet(path: Path, count: int, row: dict[str, Any]) -> None:
    """`count` rows with pictures as the `datasets` library writes them, unless the row has a `url`."""
    rows = [row if "url" in row else {"image": {"bytes": jpeg(i), "path": None}} | row for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)


def run_of(*flags: str | Path) -> RunConfig:
    return config_from_flags(parser().parse_args(list(map(str, flags))), {})


def opened(run: RunConfig, split: str = "train") -> Source:
    return open_split(run.data, split, need_long=run.task.captions and split == "train")


def texts(source: Source) -> list[Texts]:
    """The captions of a source, whose pictures are those that were written."""
    assert [source.read(i).image for i in range(len(source))] == [jpeg(i) for i in range(len(source))]
    return [source.read(i).texts for i in range(len(source))]


@pytest.mark.parametrize("name", ["coco", "flickr8k"])
def test_karpathys_files(name: str, tmp_path: Path) -> None:
    """caption_datasets.zip: COCO's pictures lie in two folders, and restval is training data."""
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
            path = tmp_path / "pictures" / images[-1].get("filepath", "") / images[-1]["filename"]
            images[-1] |= {"sentids": [*ids], "imgid": number, "sentences": sentences, "split": split}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(i))
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images, "dataset": name}))
    run = run_of("--karpathy", tmp_path / "dataset.json", "--image-root", tmp_path / "pictures")
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        assert texts(opened(run, split)) == [ALL] * count


def test_flickr8k_as_parquet_of_the_hub(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """jxie/flickr8k: a column for each of the five captions."""
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        row = {f"caption_{n}": text for n, text in enumerate(FIVE)}
        write_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet", count, row)
    run = run_of("--data", tmp_path, "--val-data", tmp_path / "data/validation-*.parquet")
    assert [texts(opened(run, split)) for split in ("train", "val")] == [[ALL] * 3, [ALL] * 2]
    assert "'caption_0' to 'caption_4' are read as one list, 'caption'" in caplog.text
    tokenizer = build_tokenizer("wordpiece", FIVE * 3, vocab_size=64)
    small = run.override(["phases.*.samples=3", "phases.*.batch_size=3", "data.workers=0"])
    batch = next(iter(make_loader(opened(run), tokenizer, small, rank=0, world_size=1)))
    assert (len(batch["web"]), len(batch["sub"])) == (3, 3)


def test_cc3m_as_tar_shards(tmp_path: Path) -> None:
    """pixparse/cc3m-wds, all in one folder, and what img2dataset writes: one caption is enough for CLIP."""
    caption = "a river has burst it 's banks and has spread out onto arable farmland alongside"
    hub, fetched = {}, {}
    for i in range(3):
        key = f"{i:09}"
        hub |= {f"{key}.jpg": jpeg(i), f"{key}.txt": caption.encode()}
        account = json.dumps(img2dataset_json(key, caption=caption)).encode()
        fetched |= {f"{key}.jpg": jpeg(i), f"{key}.json": account, f"{key}.txt": caption.encode()}
    write_tar(tmp_path / "cc3m-wds/cc3m-train-0000.tar", hub.items())
    write_tar(
        tmp_path / "cc3m-wds/cc3m-validation-0000.tar", {"000000000.jpg": jpeg(0), "000000000.txt": b"a dog"}.items()
    )
    write_tar(tmp_path / "cc3m/00000.tar", fetched.items())
    write_parquet(tmp_path / "cc3m/00000.parquet", 3, img2dataset_json("000000000", caption=caption))
    (tmp_path / "cc3m/00000_stats.json").write_text("{}")
    for data in (tmp_path / "cc3m-wds/cc3m-train-*.tar", tmp_path / "cc3m"):
        held_out = ("--val-data", tmp_path / "cc3m-wds/cc3m-validation-*.tar")
        run = run_of("--recipe", "s16", "--data", data, *held_out, *CLIP)
        assert texts(opened(run)) == [Texts((caption,))] * 3
        assert len(opened(run, "val")) == 1
        with pytest.raises(UserError, match="no long captions"):
            opened(run_of("--recipe", "s16", "--data", data))


def img2dataset_json(key: str, **columns: str) -> dict[str, Any]:
    """A JSON member of img2dataset: the table's columns, then its own account."""
    account = {"url": f"http://images.example/{key}.jpg", "key": key, "status": "success", "error_message": None}
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

    members = {}
    for i in range(3):
        key = f"{i:09}"
        columns = {"caption": row["re_caption"], "org_caption": row["org_caption"]}
        members[f"{key}.jpg"] = jpeg(i)
        members[f"{key}.json"] = json.dumps(img2dataset_json(key, **columns)).encode()
        members[f"{key}.txt"] = row["re_caption"].encode()
    write_tar(tmp_path / "recap/00000.tar", members.items())
    run = run_of("--recipe", "b16", "--data", tmp_path / "recap")
    assert texts(opened(run)) == [Texts(("dog.jpg",), ("A dog runs. It is brown.",))] * 3
