"""Packed rows against padded batches: the same loss, and the same gradient in every part that trains."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_mllm import make_images, write_llm, write_run
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mllm.data.conversation import ConversationEncoder
from mllm.data.formats import FORMATS
from mllm.data.images import ImageStore, pixel_loader
from mllm.encoders.load import load_vision
from mllm.encoders.registry import image_pixels
from mllm.model.forward import MODEL_TYPES, shared_length
from mllm.model.llava import build_model
from mllm.model.llm import load_llm
from mllm.model.tiles import placeholder_ids
from mllm.training.build import add_lora, apply_freeze
from mllm.training.config import parse_stage
from mllm.training.recipes import STAGES, freeze_table
from mllm.training.trainer import Collator, TrainingModel

TALKS: list[list[tuple[str, ...]]] = [
    [("<image>\nWhat is in the image?", "A red cat."), ("And behind it?", "Two dogs, a cat and an image of dogs.")],
    [("What is red? What is it that is in the image of the cat?", "A cat.")],
    [("Is <image> like <image>?", "No, it is red.")],
    [("<image>\nWhat?", "Two.")],
]
"""Several turns, text only, several images, one short one."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packing")
    write_run(root / "runs" / "clips-demo")
    write_llm(root / "llama")
    write_llm(root / "llama_3", vocab_size=320)
    tokenizer = AutoTokenizer.from_pretrained(root / "llama_3")
    names = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
    tokenizer.save_pretrained(root / "llama_3")
    make_images(root / "images", 4)
    for kind in MODEL_TYPES[1:]:
        options = {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2} if kind != "mistral" else {}
        config = AutoConfig.from_pretrained(root / "llama").to_dict()
        config = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "dtype")}
        made = AutoConfig.for_model(kind, **config | {"sliding_window": 9} | options)
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(made).save_pretrained(root / kind)
        AutoTokenizer.from_pretrained(root / "llama").save_pretrained(root / kind)
    return root


def made(place: Path, *, llm: str = "llama", version: str = "auto") -> tuple[Any, dict[str, Tensor]]:
    """A LLaVA model and a batch of `TALKS` (in stage 1's format the captions of images)."""
    vision, language = load_vision("clips", runs=place / "runs"), load_llm(str(place / llm), version=version)
    model, processor = build_model(vision, language, seed=3)
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=0.5)
    encoder = ConversationEncoder(language.tokenizer, version, vision.num_tokens, 256)
    store, samples = ImageStore(place / "images"), []
    talks = [[("<image>", answer)] for talk in TALKS for _, answer in talk] if version == "plain" else TALKS
    for number, talk in enumerate(talks):
        turns = [
            {"from": who, "value": text} for pair in talk for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
        count = sum(turn["value"].count("<image>") for turn in turns)
        encoded = encoder.encode(turns, count, str(number))
        names = [f"{(number + i) % 4}.png" for i in range(count)]
        samples.append({"key": "0", "input_ids": encoded.input_ids, "labels": encoded.labels, "images": names})
    load = pixel_loader(store, partial(image_pixels, processor.image_processor))
    return model, Collator(processor.tokenizer.pad_token_id, placeholder_ids(model.config), load)(samples)


def check_equal(model: Any, batch: dict[str, Tensor], num_items: int | None = None) -> None:
    """Loss within 1e-5, and in each trained tensor a gradient of the same direction and length."""
    results = []
    for packed in (True, False):
        training = TrainingModel(copy.deepcopy(model), features=False, packed=packed)
        assert training.packed is packed
        loss = training(batch, num_items)[0]
        loss.backward()
        results.append((float(loss.detach()), {name: p.grad for name, p in training.trained().items()}))
    (loss, gradients), (expected, others) = results
    assert loss == pytest.approx(expected, abs=1e-5)
    assert expected > 0
    assert gradients.keys() == others.keys()
    none = 1e-7 * max(float(other.norm()) for other in others.values() if other is not None)
    for name, other in others.items():
        gradient = gradients[name]
        # An encoder's layer behind the chosen one, or the bias of keys, which changes no attention.
        if other is None or other.norm() < none:
            assert gradient is None or gradient.norm() < none, name
            continue
        assert torch.cosine_similarity(gradient.flatten(), other.flatten(), 0) > 0.9999, name
        assert torch.allclose(gradient.norm(), other.norm(), rtol=1e-4), name


@pytest.mark.parametrize("llm", MODEL_TYPES)
def test_everything_trains_as_in_a_padded_batch(place: Path, llm: str) -> None:
    model, batch = made(place, llm=llm)
    apply_freeze(model, freeze_table(STAGES[2], unfreeze_mm_vision_tower=True))
    shared = shared_length(batch["input_ids"], batch["attention_mask"], batch["labels"], model.config.image_token_id)
    assert shared > 5  # the system text
    assert not batch["attention_mask"].all()
    check_equal(model, batch)


@pytest.mark.parametrize("version", [name for name in FORMATS if name != "plain"])
def test_adapters_and_projector_in_each_format(place: Path, version: str) -> None:
    model, batch = made(place, llm="llama_3" if version == "llama_3" else "llama", version=version)
    arguments = parse_stage(["--stage", "2", "--lora_enable", "True", "--lora_dropout", "0"])
    model = add_lora(model, arguments)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)  # at its start of zero lora_A has no gradient
    apply_freeze(model, freeze_table(STAGES[2], lora=True))
    check_equal(model, batch, num_items=77)


def test_stage_1_and_a_language_model_without_gradient(place: Path) -> None:
    model, batch = made(place, version="plain")
    apply_freeze(model, freeze_table(STAGES[1]))
    check_equal(model, batch)


def test_text_alone_and_one_sample(place: Path) -> None:
    model, batch = made(place)
    apply_freeze(model, freeze_table(STAGES[2]))
    for rows in (slice(1, 2), slice(0, 1)):
        one = {name: batch[name][rows] for name in ("input_ids", "labels", "attention_mask")}
        check_equal(model, one | ({"pixel_values": batch["pixel_values"][:1]} if rows.start == 0 else {}))


def test_recomputed_activations_change_nothing(place: Path) -> None:
    model, batch = made(place)
    apply_freeze(model, freeze_table(STAGES[2]))
    model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    check_equal(model.train(), batch)


def test_shared_is_what_no_sample_learns_and_no_image_is_in() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 1], [5, 6, 7, 9, 1], [5, 6, 7, 0, 0]])
    mask = torch.ones_like(ids)
    labels = torch.full_like(ids, -100)
    assert shared_length(ids, mask, labels, 99) == 3
    mask[2, 3:] = 0  # its third position is its last: it must keep one of its own
    assert shared_length(ids, mask, labels, 99) == 2
    labels[0, 2] = 7  # predicted at the second position, for one sample only
    assert shared_length(ids, mask, labels, 99) == 1
    assert shared_length(ids, mask, labels, 5) == 0
    assert shared_length(ids[:1], mask[:1], labels[:1], 99) == 0
