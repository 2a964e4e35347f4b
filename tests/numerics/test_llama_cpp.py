"""What leaves as GGUF is what llama.cpp then computes: its own server answers as transformers does."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from conftest import run_python
from llama_cpp import LlamaServer, user
from PIL import Image
from tiny_mllm import write_llm, write_siglip
from tiny_tokenizers import TOKENIZERS
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mllm.data.conversation import IGNORE, ConversationEncoder, answering_encoder
from mllm.encoders.registry import load_vision
from mllm.gguf.export import export_gguf
from mllm.model.llava import build_model, save_model
from mllm.model.llm import load_llm

SIDE = 32
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (40, 60, 220),
    "white": (245, 245, 245),
    "black": (10, 10, 10),
    "yellow": (230, 220, 40),
}


def scenes(count: int, seed: int) -> list[tuple[Image.Image, str, str]]:
    """(picture of two coloured halves with noise, question, answer)."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        left, right = torch.randperm(len(COLOURS), generator=g)[:2].tolist()
        names = list(COLOURS)
        colours = torch.tensor([COLOURS[names[left]], COLOURS[names[right]]], dtype=torch.float)
        array = colours.repeat_interleave(SIDE // 2, dim=0).expand(SIDE, SIDE, 3)
        array = (array + 12 * torch.randn(SIDE, SIDE, 3, generator=g)).clamp(0, 255).byte()
        which = int(torch.randint(3, (1,), generator=g))
        question = ("What is on the left?", "What is on the right?", "What is in the picture?")[which]
        answer = (f"A {names[left]} cat.", f"A {names[right]} dog.", f"A {names[left]} cat and a {names[right]} dog.")[
            which
        ]
        found.append((Image.fromarray(array.numpy()), question, answer))
    return found


def train(model: LlavaForConditionalGeneration, processor: LlavaProcessor, steps: int) -> None:
    """Until answers are sure: with a random model every token is nearly a tie, and a tie says nothing."""
    encoder = ConversationEncoder(processor.tokenizer, "auto", model.config.image_seq_length)
    parameters = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        batch = scenes(24, seed=1000 + step)
        turns = [[{"from": "human", "value": f"<image>\n{q}"}, {"from": "gpt", "value": a}] for _, q, a in batch]
        encoded = [encoder.encode(turn, 1, "sample") for turn in turns]
        ids = pad_sequence([torch.tensor(e.input_ids) for e in encoded], batch_first=True)
        labels = pad_sequence([torch.tensor(e.labels) for e in encoded], batch_first=True, padding_value=IGNORE)
        pixels = processor.image_processor([image for image, _, _ in batch], return_tensors="pt")["pixel_values"]
        loss = model(input_ids=ids, pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def build(folder, *, llm=None, tower=None, projector="mlp2x_gelu", version="auto", **select):
    # CLIP's mean is the colour that llama.cpp pads with, and each channel has its own.
    look = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
    place = write_siglip(folder / "tower", look, **(tower or {}))
    vision = load_vision(place, **select)
    language = load_llm(str(llm or write_llm(folder / "llm", initializer_range=0.02)), version=version)
    model, processor = build_model(vision, language, projector=projector, seed=3)
    return vision, model, processor


def files(folder, dtype="f32"):
    return folder / "tiny" / "gguf" / f"tiny-{dtype}.gguf", folder / "tiny" / "gguf" / f"mmproj-tiny-{dtype}.gguf"


def save_and_export(folder, vision, model, processor):
    """The two files of a model, by way of its directory."""
    save_model(model, processor, folder / "tiny" / "model", vision=vision, card={})
    export_gguf(str(folder / "tiny" / "model"), dtype="f32")
    return files(folder)


@torch.no_grad()
def transformers_answer(model, processor, image, question, tokens):
    """The greedy answer, and log-probabilities of all first tokens [V]."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    settings = {"max_new_tokens": tokens, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**inputs, **settings)
    answer = processor.tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer, output.logits[0][0].float().log_softmax(dim=-1)


def difference(ours: torch.Tensor, theirs: dict[int, float]) -> float:
    return max(abs(ours[token].item() - value) for token, value in theirs.items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    vision, model, processor = build(folder)
    train(model, processor, steps=160)
    return folder, vision, model.eval(), processor


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_fifty_questions_have_the_same_answers(trained, dtype):
    """On pictures that the model was not trained on, of its own size and of others, the picture behind the text."""
    folder, vision, model, processor = trained
    expected, found, worst = [], [], 0.0
    save_model(model, processor, folder / "tiny" / "model", vision=vision, card={})
    done = run_python("scripts/export_gguf.py", "--model", folder / "tiny" / "model", "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    *_, next_command = done.stdout.splitlines()
    assert next_command == f"next: llama-server -m {files(folder, dtype)[0]} --mmproj {files(folder, dtype)[1]}"
    with LlamaServer(*files(folder, dtype)) as server:
        for i, (picture, question, _) in enumerate(scenes(50, seed=0)):
            image = picture.resize((48, 40)) if i % 2 else picture
            answer, logs = transformers_answer(model, processor, image, question, tokens=24)
            expected.append(answer)
            found.append(server.answer([user(image, question)], tokens=24))
            worst = max(worst, difference(logs, server.first_token([user(image, question)])))
    assert len(set(expected)) > 15
    assert found == expected
    assert worst < {"f32": 0.02, "f16": 0.05}[dtype]


LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LANGUAGE_MODELS = {
    "llama": (LlamaConfig, {"attention_bias": True, "tie_word_embeddings": False}),
    "llama_3_rope": (LlamaConfig, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10_000.0} | LLAMA_3}),
    "llama_linear_rope": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}, "head_dim": 16},
    ),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
}


@needs_llama_cpp
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_logits_of_every_language_model(tmp_path, kind):
    """With weights that are all random, each at the place where the other side looks for it."""
    model, _, _ = compare_logits(tmp_path, llm=write_language_model(tmp_path / "llm", kind))
    assert model.config.text_config.model_type == kind.split("_")[0]


@needs_llama_cpp
@pytest.mark.parametrize(
    ("projector", "tower", "select"),
    [
        ("linear", {"hidden_act": "quick_gelu"}, {"select_layer": -1}),
        ("mlp2x_gelu", {"layer_norm_eps": 1e-3, "hidden_act": "gelu"}, {"select_layer": [-3, -1]}),
        ("mlp2x_gelu", {"patch_size": 16}, {"select_layer": 1}),
    ],
)
def test_logits_of_every_tower_and_projector(tmp_path, projector, tower, select):
    compare_logits(tmp_path, projector=projector, tower=tower, **select)


@needs_llama_cpp
def test_padded_pictures(tmp_path):
    """Padded before they are resized here and after it there: only the edge of the picture between them differs."""
    model, processor, server = compare_logits(tmp_path, size=(96, 96), image_aspect_ratio="pad")
    wide = scenes(1, seed=2)[0][0].resize((64, 32))
    with server:
        theirs = server.first_token([user(wide, "What is it?")])
    padded = transformers_answer(model, processor, wide, "What is it?", tokens=1)[1]
    squeezed = transformers_answer(model, processor, wide.resize((SIDE, SIDE)), "What is it?", tokens=1)[1]
    assert difference(padded, theirs) < 0.3 * difference(squeezed, theirs)


def compare_logits(folder, *, size=(SIDE, SIDE), **options):
    vision, model, processor = build(folder, **options)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        fixed = options.get("projector") == "linear" and "linear_2" in name
        if not fixed:
            parameter.data += 0.1 * torch.randn_like(parameter)
    logs = []
    with LlamaServer(*save_and_export(folder, vision, model, processor)) as server:
        for picture, _, _ in scenes(3, seed=2):
            image = picture.resize(size)
            _, ours = transformers_answer(model, processor, image, "What is it?", tokens=1)
            assert difference(ours, server.first_token([user(image, "What is it?")])) < 0.003
            logs.append(ours)
    assert (logs[0] - logs[1]).abs().max() > 0.1  # what is seen matters
    return model, processor, server


def write_language_model(directory, kind):
    config, options = LANGUAGE_MODELS[kind]
    write_llm(directory)  # its tokenizer
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 400}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "max_position_embeddings": 512}
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config(**sizes | heads | ids | options)).save_pretrained(directory)
    return directory


@needs_llama_cpp
@pytest.mark.parametrize(
    ("kind", "version"),
    [*((kind, "v1") for kind in TOKENIZERS), *((kind, "chatml") for kind in ("gpt2", "sentencepiece_legacy"))]
    + [(kind, "llama_3") for kind in ("llama3", "sentencepiece")],
)
def test_prompts_are_those_of_training(tmp_path, kind, version):
    """The same ids, one bos, the picture where it was in training."""
    tokenizer = TOKENIZERS[kind]
    write_llm(tmp_path / "llm", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "llm")
    vision, model, processor = build(tmp_path, llm=tmp_path / "llm", version=version)
    encoder = answering_encoder(processor.tokenizer, "auto", model.config.image_seq_length)
    questions = ["What is at the top  left?\nThe model's", "  Two dogs, and 12345 trees! Ünïcode — 日本 "]
    turns = [
        {"from": "system", "value": "Be kind: it's 2 o'clock."},
        {"from": "human", "value": f"<image>\n{questions[0]}"},
        {"from": "gpt", "value": "A red cat."},
        {"from": "human", "value": questions[1].strip()},
    ]
    picture = scenes(1, seed=0)[0][0]
    messages = [
        {"role": "system", "content": turns[0]["value"]},
        user(picture, questions[0]),
        {"role": "assistant", "content": "A red cat."},
        user(None, questions[1]),
    ]
    seen = [encoder.image_id] * model.config.image_seq_length
    with LlamaServer(*save_and_export(tmp_path, vision, model, processor)) as server:
        assert server.prompt_ids(messages, seen) == encoder.prompt(turns, 1)
        assert server.prompt_ids(messages[1:2], seen) == encoder.prompt(turns[1:2], 1)
