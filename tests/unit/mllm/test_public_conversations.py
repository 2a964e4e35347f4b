"""LLaVA's published data in their own layouts, opened by the commands of docs/photographs.md."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_tokenizers import make_tokenizer

from mllm.data.conversation import ConversationEncoder
from mllm.data.dataset import LlavaDataset
from mllm.data.images import ImageStore
from mllm.training.arguments import parse_train_arguments
from mllm.training.check_data import check_data
from mllm.training.prepare import data_of


def record(name: str | None, *values: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    own = {"id": "i6IyJda_0"} if name is None else {"id": Path(name).stem, "image": name}
    return own | more | {"conversations": turns}


PRETRAIN = [  # liuhaotian/LLaVA-Pretrain: the picture stands before or behind the words
    record("00453/004539375.jpg", "Render a clear and concise summary of the photo.\n<image>", "a mattress"),
    record("00211/002112457.jpg", "<image>\nWrite a terse but informative summary of the picture.", "a dog"),
]
FOLDERS = ("gqa/images/2354786", "ocr_vqa/images/140031996X", "textvqa/train_images/011e7e629fb9ae7b")
SHORT = "<image>\nWhat is it?\nAnswer the question using a single word or phrase."
MIX = [  # liuhaotian/LLaVA-Instruct-150K, llava_v1_5_mix665k.json: five folders of pictures, and texts of ShareGPT
    record("coco/train2017/000000033471.jpg", "<image>\nWhat is it?", "A bus.", "Is it driving?", "Yes."),
    *(record(f"{name}.jpg", SHORT, "Tree") for name in (*FOLDERS, "vg/VG_100K/4", "vg/VG_100K_2/51")),
    record(None, "How to tell if a customer segment is well segmented?", "1. Homogeneity", model=""),
]


@pytest.mark.parametrize(
    ("stage", "file", "folder", "records"),
    [
        (1, "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images", PRETRAIN),
        (2, "llava_v1_5_mix665k.json", "", MIX),
    ],
)
def test_llavas_own_data(stage: int, file: str, folder: str, records: list[dict[str, Any]], tmp_path: Path) -> None:
    for name in (entry["image"] for entry in records if "image" in entry):
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8), "green").save(path)
    (tmp_path / file).write_text(json.dumps(records))

    part = ("align", "instruct")[stage - 1]
    words = [f"--{part}.data_path", str(tmp_path / file), f"--{part}.image_folder", str(tmp_path / folder)]
    data_path, image_folder = data_of(parse_train_arguments(["--stage", str(stage), "--both_stages", *words]))
    encoder = ConversationEncoder(make_tokenizer("gpt2"), "plain" if stage == 1 else "chatml", 4, 2048)
    store = ImageStore(str(image_folder))
    samples = list(LlavaDataset(data_path, encoder, store))
    assert [sample["images"] for sample in samples] == [[e["image"]] if "image" in e else [] for e in records]
    found = check_data(data_path, encoder, store)
    assert (found.checked, found.faults.total()) == (len(records), 0)
