"""Tiny real parts for tests of mllm/: a CLIPS run with its exports, a language model directory, images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from conftest import tiny_run
from PIL import Image
from timm.models import save_for_hf
from tiny_tokenizers import CHATML, byte_level
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from clips.config import ModelConfig, RunConfig, TaskConfig, TextConfig, VisionConfig
from clips.data.tokenizer import build_tokenizer
from clips.model.clips import CLIPSModel
from clips.weights.export import write_native
from clips.weights.hf_vit import write_hf_vit
from mllm.encoders.load import load_vision
from mllm.model.llava import build_model, save_model
from mllm.model.llm import load_llm

SHAPES: dict[str, dict[str, Any]] = {
    "ViT": {},
    "CLIP": {"pre_norm": True},
    "SigLIP": {"cls": False, "activation": "gelu_tanh"},
    "SigLIP, learned": {"cls": False, "pos_embed": "learned", "activation": "gelu_tanh"},
    "OpenAI's CLIP": {
        **{"pre_norm": True, "pool": "cls", "activation": "quick_gelu", "pos_embed": "learned", "patch_bias": False},
        "norm_eps": 1e-5,
    },
    "ViT, learned": {"pool": "cls", "pos_embed": "learned", "activation": "gelu_tanh"},
}
"""Fields of image towers of every shape that transformers has a class for."""


def clips_model(*, seed: int = 0, **vision: Any) -> CLIPSModel:
    """A CLIPS model whose every tensor is random, so that no part can be left out unnoticed."""
    torch.manual_seed(seed)
    config = ModelConfig(
        vision=VisionConfig(width=32, layers=3, heads=4, image_size=32, patch_size=8, **vision),
        text=TextConfig(width=32, layers=1, heads=4, context_length=16, vocab_size=64, pad_mask=True),
        captioner=None,
        embed_dim=32,
    )
    model = CLIPSModel(config, 0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def write_run(directory: Path, objective: str = "clips", *, seed: int = 0, **vision: Any) -> CLIPSModel:
    """A finished run as `clips.train` leaves it, as far as mllm/ looks: config.json and export/hf_vit."""
    model = clips_model(seed=seed, **vision)
    run = replace(tiny_run(), model=model.config, task=TaskConfig(objective=objective, caption_weight=0.0))
    directory.mkdir(parents=True)
    run.save(directory / "config.json")
    write_hf_vit(model.visual, directory / "export" / "hf_vit")
    return model


def write_siglip(directory: Path, **options: object) -> str:
    """A random SigLIP tower of 32 px with its image processor; returns the encoder's name."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = SiglipVisionConfig(**shape | {"image_size": 32, "patch_size": 8} | options)
    SiglipVisionModel(config).save_pretrained(directory)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(directory)
    return f"hf:{directory}"


MAPS: dict[str, tuple[str, dict[str, Any]]] = {
    "EfficientNet": ("test_efficientnet", {}),
    "ConvNeXt": ("test_convnext", {}),
    "FastViT": ("fastvit_t8", {"layers": [1, 1, 1, 1], "embed_dims": [16, 32, 64, 128]}),
    "ResNet": ("test_resnet", {}),
    "hybrid": ("test_coatnet", {"img_size": 64}),
}
"""timm's smallest model of each kind of tower with a feature map, and its arguments."""


def write_map(directory: Path, kind: str, **look: object) -> str:
    """A random tower of MAPS for 64 px (4 tokens), with batch statistics of its own; returns the encoder's name."""
    torch.manual_seed(0)
    name, options = MAPS[kind]
    tower = timm.create_model(name, **options)
    for module in tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    save_for_hf(tower, str(directory), model_args=options, data_config={"input_size": (3, 64, 64)} | look)
    return f"timm:local-dir:{directory}"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose padding token is its end token, like SmolLM2's."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["What is in the picture? A red cat and two dogs."] * 3, 400, specials),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
        model_max_length=256,
    )


def write_llm(directory: Path, *, tie: bool = True, chat_template: str | None = CHATML, **options: object) -> Path:
    """A tiny Llama with its tokenizer in `directory`."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    torch.manual_seed(1)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tie,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.3,
    }
    LlamaForCausalLM(LlamaConfig(**settings | options)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_llava(root: Path, *, context: int, **options: Any) -> None:
    """`runs/llava/model` of the run `runs/clips-demo` and the language model `llm`, all below `root`.

    `options` are those of the encoder.
    """
    vision = load_vision("clips", runs=root / "runs", **options)
    llm = load_llm(str(write_llm(root / "llm", max_position_embeddings=context)), videos=bool(vision.frames))
    model, processor = build_model(vision, llm, seed=3)
    # A random model must not answer the same whatever it sees: enlarge what comes from the image.
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=2.0)
    save_model(model, processor, root / "runs" / "llava" / "model", card={})


def make_images(directory: Path, count: int, *, seed: int = 0) -> list[str]:
    """`count` PNGs of several sizes in `directory`; returns their names."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        array = random.integers(0, 256, (24 + 4 * (i % 5), 40, 3), dtype=np.uint8)
        Image.fromarray(array).save(directory / f"{i}.png")
    return [f"{i}.png" for i in range(count)]


def write_export(run: Path) -> CLIPSModel:
    """A finished run with export/hf_vit and export/native."""
    model = write_run(run)
    tokenizer = build_tokenizer("wordpiece", ["a cat", "a dog"] * 8, vocab_size=model.config.text.vocab_size)
    write_native(model, RunConfig.load(run / "config.json"), tokenizer, run / "export" / "native")
    return model


def make_image(width: int = 60, height: int = 40, *, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_llava_on(run: Path, export: Path, **options: object) -> Path:
    """An untrained stock model on the encoder of `export` as a trained run leaves it; its answers rarely end early.

    `options` are the language model's (`write_llm`).
    """
    llm = write_llm(run / "llm", **options)
    vision = load_vision(f"clips:{export}")
    model, processor = build_model(vision, load_llm(str(llm)))
    save_model(model, processor, run / "model", card={})
    return run / "model"
