"""FLOPs of a LLaVA step by its layers against what torch counts while the model really trains."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from tiny_mllm import MAPS, SHAPES, write_llm, write_map, write_run
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mllm.encoders.encoder import VisionEncoder
from mllm.encoders.load import load_vision
from mllm.model.forward import Counts
from mllm.model.llava import build_model
from mllm.model.llm import LanguageModel, load_llm
from mllm.training.build import add_lora, apply_freeze
from mllm.training.config import parse_stage
from mllm.training.recipes import STAGES, freeze_table
from mllm.training.trainer import TrainingModel, costs_of, flops_of

CASES = {
    "stage 1, cached, linear": (1, "ViT", {}, ("--mm_projector_type", "linear")),
    "stage 1, pixels": (1, "CLIP", {}, ("--feature_cache", "False")),
    "full": (2, "SigLIP", {}, ()),
    "full, words frozen": (2, "ViT", {"freeze_word_embeddings": True}, ()),
    "full, pixels, two layers": (2, "CLIP", {}, ("--feature_cache", "False")),
    "encoder too, SigLIP": (2, "SigLIP", {"unfreeze_mm_vision_tower": True}, ("--unfreeze_mm_vision_tower", "True")),
    "pixels of a map": (2, "ConvNeXt", {}, ("--feature_cache", "False")),
    "encoder too, map": (2, "EfficientNet", {"unfreeze_mm_vision_tower": True}, ("--unfreeze_mm_vision_tower", "True")),
    "LoRA behind a frozen projector": (2, "ViT", {"lora": True, "freeze_mm_mlp_adapter": True}, ("--lora_enable", "1")),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flops")
    for shape in ("ViT", "CLIP", "SigLIP"):
        write_run(root / shape / "clips-demo", **SHAPES[shape])
    for kind in ("ConvNeXt", "EfficientNet"):
        write_map(root / kind, kind)
    write_llm(root / "llm")
    return root


@functools.cache
def _parts(places: Path, shape: str, layers: tuple[int, ...]) -> tuple[VisionEncoder, LanguageModel]:
    if shape in MAPS:
        return load_vision(f"timm:local-dir:{places / shape}", select_layer=-1), load_llm(str(places / "llm"))
    layer = list(layers) if len(layers) > 1 else layers[0]
    return load_vision("clips", runs=places / shape, select_layer=layer), load_llm(str(places / "llm"))


def batch(image_id: int, image_tokens: int) -> dict[str, Tensor]:
    """Three samples with an image each, of 30 positions with padding at the end of two."""
    ids = torch.randint(3, 90, (3, 30))
    ids[:, :2] = 5  # begin alike
    ids[:, 2 : 2 + image_tokens] = image_id
    mask = torch.ones_like(ids)
    mask[1, 25:] = mask[2, 28:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : 4 + image_tokens] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("packed", "tie"), [(True, False), (False, True)])
def test_a_step_as_torch_counts_it(places: Path, case: str, tie: bool, packed: bool) -> None:
    number, shape, options, words = CASES[case]
    arguments = parse_stage(["--stage", str(number), *words])
    vision, llm = copy.deepcopy(_parts(places, shape, (-1, -2) if "two layers" in case else (-2,)))
    if not tie:
        llm.model.lm_head.weight = torch.nn.Parameter(llm.model.lm_head.weight.detach().clone())
    llava, _ = build_model(vision, llm, projector=arguments.mm_projector_type)
    freeze = freeze_table(STAGES[number], **options)
    model = add_lora(llava, arguments) if freeze["language_model"] == "lora" else llava
    apply_freeze(model, freeze)
    training = TrainingModel(model, features=arguments.caches_features, packed=packed)
    costs = costs_of(training.llava, 0 if arguments.caches_features else vision.image_size)
    inputs = batch(llava.config.image_token_id, vision.num_tokens)
    pixels = torch.randn(3, 3, vision.image_size, vision.image_size)
    if arguments.caches_features:
        inputs["image_features"] = vision.features(pixels).detach()
    else:
        inputs["pixel_values"] = pixels
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        training(inputs)[0].backward()
    inputs |= {"counts": Counts.of(inputs, llava.config.image_token_id)}
    # Behind a frozen projector keys and values of the first layer need no gradient of their input, which is counted.
    flops = flops_of(inputs, costs, packed=training.packed)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.03 if "frozen projector" in case else 0)
