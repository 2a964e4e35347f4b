"""Tiny checkpoints of the original LLaVA in its own key names, configurations and files, and LLaVA's own computation.

Written from what LLaVA's code (haotian-liu/LLaVA, transformers 4.37.2) saves and computes; nothing here is taken from
mllm/model/original.py or mllm/model/convert.py.
"""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_tokenizers import make_tokenizer, write_sentencepiece
from torch import Tensor, nn

CLASSES = {
    "LlavaLlamaForCausalLM": ("llava_llama", transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "LlavaMistralForCausalLM": ("llava_mistral", transformers.MistralConfig, transformers.MistralForCausalLM),
    "LlavaQwenForCausalLM": ("llava_qwen", transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}
TEXT = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
TEXT |= {"initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rope_theta": 20000.0}
TEXT |= {"rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16"}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TOWER |= {"image_size": 32, "patch_size": 8}
LORA_R, LORA_ALPHA = 4, 8


def write_tower(directory: Path) -> dict[str, Tensor]:
    """A CLIP vision tower as the hub has it; returns its tensors (fp32, whose values half precision holds)."""
    directory.mkdir(parents=True)
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**TOWER)
    tensors = {
        f"vision_model.{name}": (torch.randn(tensor.shape) * 0.2).half().float()
        for name, tensor in transformers.CLIPVisionModel(config).state_dict().items()
        if not name.endswith("position_ids")
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        directory
    )
    return tensors


def write_base(directory: Path, cls: str = "LlavaLlamaForCausalLM", *, legacy: bool = False) -> dict[str, Tensor]:
    """A language model as Vicuna comes: pytorch_model.bin, tokenizer.model; returns its tensors in half precision.

    Qwen has a byte-level tokenizer with a chat template of its own.
    """
    _, config_cls, model_cls = CLASSES[cls]
    if config_cls is transformers.Qwen2Config:
        make_tokenizer("gpt2").save_pretrained(directory)
    else:
        write_sentencepiece(directory, legacy=legacy, specials=False)
        named = json.loads((directory / "tokenizer_config.json").read_text())
        named |= {"unk_token": "<unk>", "pad_token": "<unk>"}
        (directory / "tokenizer_config.json").write_text(json.dumps(named))
    torch.manual_seed(1)
    fields = TEXT | {"vocab_size": len(transformers.AutoTokenizer.from_pretrained(directory))}
    tensors = model_cls(config_cls(**fields)).half().state_dict()
    torch.save(tensors, directory / "pytorch_model.bin")
    fields |= {"model_type": config_cls.model_type, "architectures": [model_cls.__name__]}
    (directory / "config.json").write_text(json.dumps(fields))
    return tensors


def projector(kind: str, seed: int = 2, sizes: tuple[int, int] = (32, 48)) -> nn.Module:
    """`build_vision_projector` of LLaVA, in half precision."""
    torch.manual_seed(seed)
    first = nn.Linear(*sizes)
    return (first if kind == "linear" else nn.Sequential(first, nn.GELU(), nn.Linear(sizes[1], sizes[1]))).half()


def llava_config(base: Path, tower: Path | str, cls: str, kind: str, **more: object) -> dict[str, object]:
    """config.json as LLaVA's training leaves it."""
    fields = json.loads((base / "config.json").read_text())
    return fields | {
        "_name_or_path": str(base),
        "architectures": [cls],
        "model_type": CLASSES[cls][0],
        **{"freeze_mm_mlp_adapter": False, "tune_mm_mlp_adapter": False, "use_mm_proj": True, "mm_projector_lr": None},
        **{"image_aspect_ratio": "pad", "mm_hidden_size": 32, "mm_patch_merge_type": "flat", "mm_projector_type": kind},
        **{"mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_tower": str(tower)},
        **{"mm_vision_select_feature": "patch", "mm_vision_select_layer": -2, "transformers_version": "4.37.2"},
        **{"tokenizer_model_max_length": 256, "tokenizer_padding_side": "right"},
        **more,
    }


def write_whole(
    root: Path,
    name: str = "llava-v1.5-tiny",
    *,
    cls: str = "LlavaLlamaForCausalLM",
    kind: str = "mlp2x_gelu",
    legacy: bool = False,
    shards: int = 1,
    safe: bool = True,
    with_tower: bool = True,
    **more: object,
) -> Path:
    """One directory, under `root` beside its tower and its base; `more` are further fields of config.json."""
    tower_tensors = write_tower(root / "tower")
    tensors = dict(write_base(root / "base", cls, legacy=legacy))
    tensors |= {f"model.mm_projector.{n}": t for n, t in projector(kind).state_dict().items()}
    if with_tower:
        tensors |= {f"model.vision_tower.vision_tower.{n}": t.half() for n, t in tower_tensors.items()}
    directory = root / name
    directory.mkdir()
    write_tensors(directory, tensors, shards=shards, safe=safe)
    (directory / "config.json").write_text(json.dumps(llava_config(root / "base", root / "tower", cls, kind, **more)))
    for file in tokenizer_files(root / "base"):
        shutil.copy(file, directory)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "temperature": 0.9, "top_p": 0.6}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def tokenizer_files(directory: Path) -> list[Path]:
    return [*directory.glob("tokenizer*"), *directory.glob("*.jinja")]


def write_tensors(directory: Path, tensors: dict[str, Tensor], *, shards: int, safe: bool) -> None:
    stem, ending = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    parts = [f"-{i + 1:05}-of-{shards:05}" for i in range(shards)] if shards > 1 else [""]
    names = [f"{stem}{part}.{ending}" for part in parts]
    weight_map = {name: names[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in names:
        part = {name: tensors[name].contiguous() for name in tensors if weight_map[name] == file}
        if safe:
            save_file(part, directory / file, metadata={"format": "pt"})
        else:
            torch.save(part, directory / file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def read_all(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory of either kind, without regard to an index."""
    tensors: dict[str, Tensor] = {}
    for path in directory.glob("model*.safetensors"):
        tensors |= load_file(path)
    for path in directory.glob("pytorch_model*.bin"):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def write_projector_only(root: Path) -> Path:
    """mm_projector.bin and config.json, as LLaVA's stage 1 leaves them."""
    directory = root / "llava-pretrain-tiny"
    directory.mkdir()
    trained = projector("mlp2x_gelu", 5).state_dict()
    torch.save({f"model.mm_projector.{n}": t for n, t in trained.items()}, directory / "mm_projector.bin")
    write_part_config(root, directory)
    return directory


def write_part_config(root: Path, directory: Path) -> None:
    """config.json of a part, which names the language model's class as its own."""
    config = llava_config(root / "base", root / "tower", "LlavaLlamaForCausalLM", "mlp2x_gelu")
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))


def write_lora(root: Path) -> tuple[Path, dict[str, Tensor]]:
    """Adapters, non_lora_trainables.bin and config.json; returns the merged tensors under LLaVA's names besides."""
    directory = root / "llava-lora-tiny"
    directory.mkdir()
    merged = torch.load(root / "base" / "pytorch_model.bin", weights_only=True)
    torch.manual_seed(6)
    adapters = {}
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for name in [n for n in merged if n.split(".")[-2] in kinds]:
        rows, columns = merged[name].shape
        a, b = torch.randn(LORA_R, columns).half() * 0.1, torch.randn(rows, LORA_R).half() * 0.1
        module = f"base_model.model.{name.removesuffix('.weight')}"
        adapters |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        merged[name] = merged[name] + (LORA_ALPHA / LORA_R * (b.float() @ a.float())).half()  # as PEFT rounds
    torch.save(adapters, directory / "adapter_model.bin")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": LORA_R, "lora_alpha": LORA_ALPHA, "bias": "none"}
    config |= {"target_modules": list(kinds), "lora_dropout": 0.05, "base_model_name_or_path": str(root / "base")}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    trained = projector("mlp2x_gelu", 7).state_dict()
    torch.save({f"base_model.model.model.mm_projector.{n}": t for n, t in trained.items()},
               directory / "non_lora_trainables.bin")  # fmt: skip
    write_part_config(root, directory)
    return directory, merged | {f"model.mm_projector.{n}": t for n, t in trained.items()}


@torch.no_grad()
def llava_logits(
    tensors: dict[str, Tensor],
    config: dict,
    tower: dict[str, Tensor],
    before: list[int],
    pixels: Tensor,
    after: list[int],
) -> Tensor:
    """fp32 logits [T, V] of LLaVA's `prepare_inputs_labels_for_multimodal` and language model, on plain stock parts."""
    _, config_cls, model_cls = CLASSES[config["architectures"][0]]
    language = model_cls(config_cls(**TEXT, vocab_size=config["vocab_size"])).eval()
    known = language.state_dict().keys()
    language.load_state_dict({n: t.float() for n, t in tensors.items() if n in known})
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER)).eval()
    own = vision.state_dict()
    vision.load_state_dict(own | {
        name: tower[f"vision_model.{name.removeprefix('vision_model.')}"].float()
        for name in own if not name.endswith("position_ids")
    })  # fmt: skip
    layers = projector(config["mm_projector_type"]).float()
    layers.load_state_dict({
        n.removeprefix("model.mm_projector."): t.float() for n, t in tensors.items() if "mm_projector" in n
    })  # fmt: skip
    features = vision(pixels, output_hidden_states=True).hidden_states[config["mm_vision_select_layer"]]
    if config["mm_vision_select_feature"] == "patch":
        features = features[:, 1:]
    words = language.model.embed_tokens
    parts = [words(torch.tensor(before))[None], layers(features), words(torch.tensor(after))[None]]
    return language(inputs_embeds=torch.cat(parts, dim=1)).logits[0]
