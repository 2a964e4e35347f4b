"""Checkpoints of the original LLaVA become stock models and go back, with equal logits and the very same tensors.

The original package needs transformers 4.37 and is not installed here; tests/tiny_original.py has its names, its files
and its computation.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load_script
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_mllm import make_images, write_llm, write_run, write_siglip
from tiny_original import (
    llava_logits,
    read_all,
    tokenizer_files,
    write_base,
    write_lora,
    write_projector_only,
    write_tensors,
    write_tower,
    write_whole,
)
from tiny_tokenizers import TOKENIZERS
from transformers import AutoProcessor, AutoTokenizer, CLIPVisionModel

from clips.common.errors import UserError
from mllm.chat.model import ChatModel
from mllm.chat.session import ChatSession
from mllm.data.formats import backend_with_bos, get_format, leave_bos_to_template, save_format, saved_format
from mllm.encoders.load import load_vision
from mllm.model.convert import convert_llava
from mllm.model.llava import build_model, save_model
from mllm.model.llm import load_llm
from mllm.model.load import load_llava
from mllm.model.original import is_original_llava, read_original

CPU = torch.device("cpu")
LIMIT = 1e-4
"""Largest difference of two fp32 logits, whose spread is about 2."""
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is at the top left?"}]}]


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def edit_config(directory: Path, **fields: object) -> None:
    (directory / "config.json").write_text(json.dumps(config_of(directory) | fields))


def prompt_of(processor, image: Image.Image) -> dict[str, torch.Tensor]:
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    return processor(images=image, text=text, return_tensors="pt")


def assert_same_as_llava(converted: Path, tensors: dict, config: dict, tower: dict, photo: Path) -> None:
    """Through the stock route a question has LLaVA's logits, and one bos."""
    model, processor = load_llava(str(converted), CPU, torch.float32)
    inputs = prompt_of(processor, Image.open(photo).convert("RGB"))
    ids = inputs["input_ids"][0].tolist()
    image = model.config.image_token_index
    if saved_format(processor.tokenizer).name == "v1":
        assert ids.count(processor.tokenizer.bos_token_id) == 1
        assert ids[0] == processor.tokenizer.bos_token_id
    start, count = ids.index(image), ids.count(image)
    assert count == model.config.image_seq_length
    with torch.no_grad():
        ours = model(**inputs).logits[0]
    theirs = llava_logits(tensors, config, tower, ids[:start], inputs["pixel_values"], ids[start + count :])
    assert theirs.std() > 0.5
    assert (ours[:, : config["vocab_size"]] - theirs).abs().max() < LIMIT


WHOLE = {
    "as_llava_1_5": {"shards": 3, "safe": False},
    "linear_legacy_no_tower": {"kind": "linear", "legacy": True, "with_tower": False, "image_aspect_ratio": None},
    "all_tokens_sharded": {"shards": 2, "mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1},
    "mistral": {"cls": "LlavaMistralForCausalLM"},
    "qwen": {"cls": "LlavaQwenForCausalLM"},
}


@pytest.mark.parametrize("variant", WHOLE)
def test_whole_checkpoints_both_ways(tmp_path, variant):
    original = write_whole(tmp_path, **WHOLE[variant])
    converted = tmp_path / "converted"
    difference, mode = convert_llava(str(original), converted, "transformers")
    assert (difference < 1e-2, mode) == (True, "auto" if variant == "qwen" else "v1")
    config, tensors = config_of(original), read_all(original)
    (image,) = make_images(tmp_path / "images", 1)
    image = tmp_path / "images" / image
    assert_same_as_llava(converted, tensors, config, load_file(tmp_path / "tower" / "model.safetensors"), image)

    processor = AutoProcessor.from_pretrained(converted)
    stock = config_of(converted)
    if variant != "qwen":  # whose tokenizer has both tokens
        assert stock["image_token_index"] == config["vocab_size"]
    assert stock["dtype"] == "float16"
    assert bool(getattr(processor.image_processor, "do_pad", False)) == (config["image_aspect_ratio"] == "pad")
    assert saved_format(processor.tokenizer).name == mode
    if mode == "v1":
        tokens = processor.tokenizer.convert_ids_to_tokens(prompt_of(processor, Image.open(image))["input_ids"][0])
        after = len(tokens) - tokens[::-1].index("<image>")
        assert tokens[1:2] + tokens[after : after + 2] == ["▁A", "▁", "<0x0A>"]  # LLaVA's, legacy or not
    for path in converted.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path

    name = {"mistral": "llava-mistral-back", "qwen": "llava-qwen-back"}.get(variant, "llava-back")
    back = tmp_path / name
    assert convert_llava(str(converted), back, "llava")[1] == mode
    assert (converted / "README.md").is_file()  # a conversion has a card
    again, written = config_of(back), read_all(back)
    assert {k: v for k, v in config.items() if k not in ("_name_or_path", "mm_vision_tower")} == {
        k: v for k, v in again.items() if k != "mm_vision_tower"
    }
    assert all(torch.equal(written[n], t) and written[n].dtype == t.dtype for n, t in tensors.items())
    assert all(n in tensors or "vision_tower" in n for n in written)
    for file in [*tokenizer_files(original), original / "generation_config.json"]:
        assert (back / file.name).read_bytes() == file.read_bytes()
    assert again["mm_vision_tower"] == str(back / "vision_tower")
    tower = load_file(back / "vision_tower" / "model.safetensors")
    assert all(torch.equal(tower[n].float(), t) for n, t in load_file(tmp_path / "tower" / "model.safetensors").items())
    preprocessor = json.loads((back / "vision_tower" / "preprocessor_config.json").read_text())
    assert preprocessor["crop_size"] == {"height": 32, "width": 32}
    assert preprocessor["image_processor_type"] == "CLIPImageProcessor"

    shutil.move(back, tmp_path / "moved")  # the absolute path leads nowhere, the copy beside it is found
    convert_llava(str(tmp_path / "moved"), tmp_path / "second", "transformers")
    first, second = load_file(converted / "model.safetensors"), load_file(tmp_path / "second" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_tower_by_its_hub_id(tmp_path):
    original = write_whole(tmp_path)
    edit_config(original, mm_vision_tower="openai/clip-tiny")
    with pytest.raises(UserError, match=r"openai/clip-tiny; another place: --vision-tower DIR"):
        convert_llava(str(original), tmp_path / "converted", "transformers")
    convert_llava(str(original), tmp_path / "converted", "transformers", vision_tower=str(tmp_path / "tower"))
    convert_llava(str(tmp_path / "converted"), tmp_path / "llava-back", "llava")
    expected = {k: v for k, v in config_of(original).items() if k != "_name_or_path"}
    assert config_of(tmp_path / "llava-back") == expected
    assert not (tmp_path / "llava-back" / "vision_tower").exists()

    stock = load_file(tmp_path / "converted" / "model.safetensors")  # trained on in place: the name is no longer true
    name = next(n for n in stock if n.endswith("patch_embedding.weight"))
    stock[name] += 1
    save_file(stock, tmp_path / "converted" / "model.safetensors", metadata={"format": "pt"})
    convert_llava(str(tmp_path / "converted"), tmp_path / "llava-trained", "llava")
    assert config_of(tmp_path / "llava-trained")["mm_vision_tower"] == str(tmp_path / "llava-trained" / "vision_tower")
    with pytest.raises(UserError, match="its vision tower is not"):
        convert_llava(str(tmp_path / "converted"), tmp_path / "llava-x", "llava", vision_tower=str(tmp_path / "tower"))


def test_a_tower_that_was_trained_comes_from_the_checkpoint(tmp_path):
    original = write_whole(tmp_path)
    tensors = {n: t + 0.1 if "vision_tower" in n else t for n, t in read_all(original).items()}
    write_tensors(original, tensors, shards=1, safe=True)
    with pytest.raises(UserError, match="unfreeze_mm_vision_tower"):
        convert_llava(str(original), tmp_path / "converted", "transformers")
    edit_config(original, unfreeze_mm_vision_tower=True)
    convert_llava(str(original), tmp_path / "converted", "transformers")
    (image,) = make_images(tmp_path / "images", 1)
    trained = {n.removeprefix("model.vision_tower.vision_tower."): t for n, t in tensors.items() if "vision_tower" in n}
    image = tmp_path / "images" / image
    assert_same_as_llava(tmp_path / "converted", tensors, config_of(original), trained, image)


@pytest.fixture
def parts(tmp_path):
    """A base with its tower, LoRA and a projector beside them."""
    tower = write_tower(tmp_path / "tower")
    base = write_base(tmp_path / "base")
    lora, merged = write_lora(tmp_path)
    pretrained = write_projector_only(tmp_path)
    trained = torch.load(pretrained / "mm_projector.bin", weights_only=True)
    return {lora: merged, pretrained: base | trained}, tower


def test_parts_on_a_base(tmp_path, parts):
    checkpoints, tower = parts
    (image,) = make_images(tmp_path / "images", 1)
    for directory, tensors in checkpoints.items():
        assert is_original_llava(directory)
        with pytest.raises(UserError, match=rf"--base .*{tmp_path}/base\)"):
            convert_llava(str(directory), tmp_path / "converted", "transformers")
        converted = tmp_path / f"{directory.name}-hf"
        convert_llava(str(directory), converted, "transformers", base=str(tmp_path / "base"))
        config = config_of(directory) | {"architectures": ["LlavaLlamaForCausalLM"]}
        assert_same_as_llava(converted, tensors, config, tower, tmp_path / "images" / image)
        back = tmp_path / directory.name.replace("lora", "merged").replace("pretrain", "whole")
        convert_llava(str(converted), back, "llava")
        written = read_all(back)
        assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
        assert (back / "tokenizer.model").read_bytes() == (tmp_path / "base" / "tokenizer.model").read_bytes()


def test_lora_on_a_llava_checkpoint(tmp_path, parts):
    """What LLaVA's finetune_task_lora.sh makes: the base is itself an original LLaVA."""
    (lora, merged), *_ = parts[0].items()
    shutil.rmtree(tmp_path / "tower"), shutil.rmtree(tmp_path / "base")
    whole = write_whole(tmp_path, kind="mlp2x_gelu")
    tensors = read_original(lora, str(whole)).tensors
    assert all(torch.equal(tensors[name], tensor) for name, tensor in merged.items())
    with pytest.raises(UserError, match="is a full model: leave out --base"):
        read_original(whole, str(tmp_path / "base"))


def test_adapters_that_do_not_fit_are_refused(tmp_path, parts):
    lora = next(iter(parts[0]))
    adapters = torch.load(lora / "adapter_model.bin", weights_only=True)
    renamed = {n.replace("layers.1.", "layers.7."): t for n, t in adapters.items()}
    torch.save(renamed, lora / "adapter_model.bin")
    with pytest.raises(UserError, match=r"do not fit the base: .*lora_"):
        read_original(lora, str(tmp_path / "base"))
    config = json.loads((lora / "adapter_config.json").read_text())
    for asked, named in (({"r": 10**9}, "r must be"), ({"use_dora": True}, "use_dora")):
        (lora / "adapter_config.json").write_text(json.dumps(config | asked))
        with pytest.raises(UserError, match=named):
            read_original(lora, str(tmp_path / "base"))


REFUSED = {
    "mm_projector_type": "mlp3x_gelu",
    "mm_vision_select_feature": "slicefour_patch",
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_use_im_start_end": True,
    "mm_vision_select_layer": None,
    "s2": True,
}


def test_what_a_stock_model_cannot_hold_is_named(tmp_path):
    original = write_whole(tmp_path)
    config = config_of(original)
    for name, value in REFUSED.items():
        edit_config(original, **config | {name: value})
        with pytest.raises(UserError, match=rf"config\.json: a stock .* cannot hold this model: {name} is "):
            read_original(original)
    edit_config(original, **config | {"architectures": ["LlavaMptForCausalLM"], "model_type": "llava_mpt"})
    with pytest.raises(UserError, match="LlavaMptForCausalLM is not one of LlavaLlamaForCausalLM, "):
        read_original(original)


def test_weights_that_are_missing_or_of_no_part_are_named(tmp_path):
    original = write_whole(tmp_path)
    tensors = read_all(original)
    cases = {
        "missing model.norm.weight": {n: t for n, t in tensors.items() if n != "model.norm.weight"},
        r"to no part .*: model.vision_resampler.query": tensors | {"model.vision_resampler.query": torch.zeros(2)},
        r"holds no projector": {n: t for n, t in tensors.items() if "mm_projector" not in n},
    }
    for message, changed in cases.items():
        write_tensors(original, changed, shards=1, safe=True)
        with pytest.raises(UserError, match=message):
            convert_llava(str(original), tmp_path / "converted", "transformers")
    (original / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights: expected one of model\.safetensors"):
        read_original(original)
    write_tensors(original, tensors, shards=2, safe=False)
    (original / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"no weight file .*pytorch_model-00002-of-00002\.bin"):
        read_original(original)


@pytest.fixture
def own(tmp_path):
    """A model of this project on a tower that LLaVA has a class for."""
    write_run(tmp_path / "run", pre_norm=True)
    return save_own(tmp_path, load_llm(str(write_llm(tmp_path / "llm")), version="v1"))


def save_own(tmp_path, llm, tower=None):
    vision = load_vision(tower or f"clips:{tmp_path / 'run'}", image_aspect_ratio="pad")
    model, processor = build_model(vision, llm, seed=3)
    save_model(model, processor, tmp_path / "model", card={})
    return tmp_path / "model"


def test_a_model_of_this_project_as_an_original(tmp_path, own):
    for name in ("own", "llava-lora", "llava-mistral"):  # LLaVA's loader goes by it
        with pytest.raises(UserError, match="must contain llava, and none of lora, mistral, mpt, qwen"):
            convert_llava(str(own), tmp_path / name, "llava")
    directory = tmp_path / "llava-own"
    assert convert_llava(str(own), directory, "llava") == (0.0, "v1")
    config = config_of(directory)
    expected = {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "torch_dtype": "float32"}
    expected |= {"rope_theta": 10000.0, "rope_scaling": None, "image_aspect_ratio": "pad"}
    expected |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_tower": str(directory / "vision_tower")}
    expected |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    assert expected.items() <= config.items()
    assert "rope_parameters" not in config
    names = load_file(directory / "vision_tower" / "model.safetensors").keys()
    assert all(name.startswith("vision_model.") for name in names)
    CLIPVisionModel.from_pretrained(directory / "vision_tower")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    assert all(isinstance(merge, str) for merge in tokenizer["model"]["merges"])  # tokenizers 0.15 knows no pairs

    convert_llava(str(directory), tmp_path / "again", "transformers")  # ours → LLaVA → ours
    first, second = (load_llava(str(place), CPU, torch.float32) for place in (own, tmp_path / "again"))
    image = Image.effect_noise((40, 56), 80).convert("RGB")
    inputs, others = (prompt_of(processor, image) for _, processor in (first, second))
    assert torch.equal(inputs["input_ids"], others["input_ids"])
    assert torch.equal(inputs["pixel_values"], others["pixel_values"])
    with torch.no_grad():
        assert torch.equal(first[0](**inputs).logits, second[0](**inputs).logits)


def test_a_tokenizer_that_adds_a_bos_does_so_again(tmp_path):
    tokenizer = TOKENIZERS["sentencepiece_legacy"]
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    before = tokenizer("a dog")["input_ids"]
    save_format(tokenizer, get_format("v1", tokenizer))
    leave_bos_to_template(tokenizer)
    assert tokenizer("a dog")["input_ids"] == before[1:]
    assert backend_with_bos(tokenizer).encode("a dog").ids == before


def test_a_sentencepiece_tokenizer_needs_its_file(tmp_path):
    write_run(tmp_path / "run", pre_norm=True)
    write_base(tmp_path / "vicuna")
    write_llm(tmp_path / "other")
    own = save_own(tmp_path, load_llm(str(tmp_path / "vicuna"), version="v1"))
    with pytest.raises(UserError, match=r"tokenizer\.model.*--base"):
        convert_llava(str(own), tmp_path / "llava-own", "llava")
    with pytest.raises(UserError, match="its tokenizer is not that of"):
        convert_llava(str(own), tmp_path / "llava-own", "llava", base=str(tmp_path / "other"))
    convert_llava(str(own), tmp_path / "llava-own", "llava", base=str(tmp_path / "vicuna"))
    made, vicuna = tmp_path / "llava-own", tmp_path / "vicuna"
    expected, config = config_of(vicuna), config_of(made)
    assert [config[n] for n in ("vocab_size", "pad_token_id")] == [expected[n] for n in ("vocab_size", "pad_token_id")]
    assert len(read_all(made)["model.embed_tokens.weight"]) == expected["vocab_size"]
    assert (made / "tokenizer.model").read_bytes() == (vicuna / "tokenizer.model").read_bytes()


def test_what_llava_has_no_class_for_is_named(tmp_path):
    write_run(tmp_path / "run")
    llm = load_llm(str(write_llm(tmp_path / "llm")), version="v1")
    with pytest.raises(UserError, match="CLIPVisionModel, not a ViTModel"):
        convert_llava(str(save_own(tmp_path, llm)), tmp_path / "llava-own", "llava")
    own = save_own(tmp_path, llm, write_siglip(tmp_path / "siglip"))
    with pytest.raises(UserError, match="not a SiglipVisionModel"):
        convert_llava(str(own), tmp_path / "llava-own", "llava")
    wide = load_llm(str(write_llm(tmp_path / "wide", head_dim=20)), version="v1")
    with pytest.raises(UserError, match="head_dim"):
        convert_llava(str(save_own(tmp_path, wide)), tmp_path / "llava-own", "llava")


def test_ids_are_compared_with_sentencepiece_s_own(tmp_path, monkeypatch):
    """The logits of both sides have the same ids, so they would not show it."""
    original = write_whole(tmp_path)
    monkeypatch.setattr("mllm.model.llm._merge_by_scores", lambda backend, sentencepiece: None)  # as transformers does
    with pytest.raises(UserError, match=r"llava-v1\.5-tiny/tokenizer\.model: .* other ids than SentencePiece"):
        convert_llava(str(original), tmp_path / "converted", "transformers", check_only=True)


def test_an_encoder_is_no_llava_model(tmp_path):
    (tmp_path / "config.json").write_text('{"recipe": "demo"}')
    with pytest.raises(UserError, match=r"model_type.*train_llava\.sh --vision"):
        convert_llava(str(tmp_path), tmp_path / "llava-x", "llava")


def test_convert_py_and_a_talk_with_what_it_wrote(tmp_path, capsys, monkeypatch):
    original, converted = write_whole(tmp_path), tmp_path / "converted"

    def convert(source, target, to, *flags):
        monkeypatch.setattr("sys.argv", ["convert.py", str(source), str(target), "--to", to, *flags])
        load_script("scripts/convert.py").main()

    convert(original, converted, "transformers", "--check")
    assert "can be converted; nothing was written" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "llava-v1.5-tiny", "tower"]
    convert(original, converted, "transformers")
    assert f"next: python scripts/chat.py --model {converted}" in capsys.readouterr().out
    model = ChatModel.load(str(converted), device="cpu")
    assert model.encoder.format.name == "v1"
    answer = "".join(ChatSession(model).ask("What is it?", [Image.new("RGB", (40, 30), "red")]))
    assert isinstance(answer, str)
    convert(converted, tmp_path / "llava-back", "llava")
    assert "--conv-mode vicuna_v1" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"exists; convert\.py overwrites nothing"):
        convert(original, converted, "transformers")
    with pytest.raises(UserError, match=r"--to llava .* original LLaVA"):
        convert(original, tmp_path / "llava-x", "llava")
