"""One format from training to every reader: evaluation, chat, server and stock transformers ask with the same ids."""

import asyncio
import json
import pickle
from pathlib import Path

import httpx2
import pytest
from PIL import Image
from serve_process import RED, picture, user
from tiny_mllm import write_run
from tiny_tokenizers import FORMATS, KINDS, make_tokenizer, write_sentencepiece
from tokenizers import processors
from transformers import AutoProcessor, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mllm.chat.limits import Limits
from mllm.chat.model import ChatModel, Sampling
from mllm.chat.session import ChatSession
from mllm.data.conversation import IGNORE, ConversationEncoder
from mllm.data.formats import get_format, saved_format
from mllm.data.images import ImageStore
from mllm.data.questions import Question
from mllm.encoders.registry import load_vision
from mllm.evaluation.evaluate import generate_answers
from mllm.model.llava import build_model, save_model
from mllm.model.llm import LanguageModel, load_llm
from mllm.serve.app import create_app

FIRST, ANSWER, SECOND = "What's at the top left?", "A red cat.", "Where?\nSay it."
ONE_TOKEN = Sampling(max_new_tokens=1)


def adding_bos(kind: str, directory: Path) -> PreTrainedTokenizerFast:
    """`llama`: transformers' own class, as Llama 2's; `vicuna`: that from a tokenizer.model; `llama3_bos`: bos in a
    sequence, as Llama 3's."""
    if kind.startswith("vicuna"):
        return AutoTokenizer.from_pretrained(write_sentencepiece(directory, legacy=kind == "vicuna_legacy"))
    if kind == "llama":
        make_tokenizer("sentencepiece_legacy").save_pretrained(directory)
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        path.write_text(json.dumps(config))
        return AutoTokenizer.from_pretrained(directory)
    tokenizer = make_tokenizer("llama3")
    tokenizer.bos_token = "<|begin_of_text|>"
    bos = [("<|begin_of_text|>", tokenizer.bos_token_id)]
    template = processors.TemplateProcessing(single=f"{bos[0][0]} $A", special_tokens=bos)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return tokenizer


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    write_run(root / "clips-demo")
    Image.new("RGB", (40, 28), "red").save(root / "red.png")
    return root


def language_model(directory: Path, kind: str, version: str) -> LanguageModel:
    """A tiny Llama with a tokenizer of `kind`, prepared for training in format `version`."""
    tokenizer = make_tokenizer(kind) if kind in KINDS else adding_bos(kind, directory / "base")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    if kind.startswith("vicuna"):
        write_sentencepiece(directory, legacy=kind == "vicuna_legacy")
    else:
        tokenizer.save_pretrained(directory)
    return load_llm(str(directory), version=version)


def trained_prompt(encoder: ConversationEncoder, *texts: str) -> list[int]:
    """The ids in front of the last answer of a training sample with one picture."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate([*texts, "Yes."])]
    turns[0]["value"] = f"<image>\n{texts[0]}"
    sample = encoder.encode(turns, 1, "sample")
    trained = {i for i, label in enumerate(sample.labels) if label != IGNORE}
    return sample.input_ids[: next(i for i in sorted(trained, reverse=True) if i - 1 not in trained)]


async def ask_server(chat: ChatModel, body: dict) -> None:
    app = create_app(chat, Limits())
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://localhost") as client:
        response = await client.post("/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text


ASKED = {
    "vicuna": FORMATS,
    "vicuna_legacy": ("plain", "v1"),
    "llama": ("v1", "auto"),
    "llama3_bos": ("plain", "llama_3", "chatml"),
    **{"gpt2": ("auto",), "llama3": ("llama_3",), "sentencepiece": ("v1",), "sentencepiece_legacy": ("chatml",)},
}
"""Of these four kinds tests/unit/mllm/test_conversation.py and test_chat.py have every format."""


@pytest.mark.parametrize(("kind", "version"), [(kind, version) for kind in ASKED for version in ASKED[kind]])
def test_every_reader_asks_as_training_did(kind, version, clips, tmp_path, monkeypatch):
    llm = language_model(tmp_path / "llm", kind, version)
    vision = load_vision("clips", runs=clips)
    model, processor = build_model(vision, llm)
    training = ConversationEncoder(llm.tokenizer, version, model.config.image_seq_length)
    talk = [FIRST] if version == "plain" else [FIRST, ANSWER, SECOND]
    single, whole = trained_prompt(training, FIRST), trained_prompt(training, *talk)
    bos = llm.tokenizer.bos_token_id
    assert whole.count(bos) == (kind not in ("gpt2", "llama3"))
    save_model(model, processor, tmp_path / "model", vision=vision, card={})
    chat = ChatModel.load(str(tmp_path / "model"), device="cpu", dtype="float32")

    calls: list[list[int]] = []
    build = ConversationEncoder.prompt

    def recorded(self: ConversationEncoder, *arguments: object) -> list[int]:
        calls.append(build(self, *arguments))
        return calls[-1]

    monkeypatch.setattr(ConversationEncoder, "prompt", recorded)
    question = Question(id=0, text=FIRST, images=("red.png",))
    generate_answers(chat.model, chat.processor, [question], ImageStore(clips), max_new_tokens=1)
    assert calls.pop() == single
    parts = [{"type": "image"}, {"type": "text", "text": FIRST}]
    turns = [{"from": "human", "value": parts}]
    turns += [{"from": ("human", "gpt")[i % 2], "value": [{"type": "text", "text": t}]} for i, t in enumerate(talk)][1:]
    image = Image.open(clips / "red.png").convert("RGB")
    list(ChatSession.from_turns(chat, turns, [image]).answer(ONE_TOKEN))
    assert calls.pop() == whole
    messages = [user(FIRST, picture(RED))]
    messages += [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(talk)][1:]
    asyncio.run(ask_server(chat, {"model": chat.name, "messages": messages, "max_tokens": 1}))
    assert calls.pop() == whole

    if version == "plain":  # its chat template is still the language model's
        return
    stock = AutoProcessor.from_pretrained(tmp_path / "model")
    messages[0] = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": FIRST}]}
    messages[1:] = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages[1:]]
    tokenized = stock.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert list(tokenized["input_ids"][0]) == whole
    rendered = stock.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert list(stock(images=image, text=rendered)["input_ids"][0]) == whole
    # A server's way: the tokenizer alone, image tokens multiplied afterwards.
    ids = stock.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    at = ids.index(training.image_id)
    assert ids[:at] + [training.image_id] * training.num_image_tokens + ids[at + 1 :] == whole


@pytest.mark.parametrize("version", [v for v in FORMATS if v != "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_saved_before_the_format_was_is_read_by_rendering(kind: str, version: str, capsys) -> None:
    """Its template writes the bos that its tokenizer adds too, and nothing else says the format."""
    tokenizer = make_tokenizer(kind)
    training = ConversationEncoder(tokenizer, version, 4)
    tokenizer.chat_template = training.format.chat_template()
    encoder = ConversationEncoder(tokenizer, "auto", 4)
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate([FIRST, ANSWER, SECOND])]
    for talk in (turns[:1], turns):
        assert encoder.prompt(talk, 0) == training.prompt(talk, 0)
    assert encoder.format.system == training.format.system
    assert encoder.stop_ids == training.stop_ids
    assert capsys.readouterr().err == "", "it is exactly this format"


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_format_survives_where_another_would_fit(kind: str, tmp_path: Path) -> None:
    """A v1 model on a tokenizer with ChatML's control tokens; other formats can still be asked for, with one bos."""
    llm = language_model(tmp_path / "llm", kind, "v1")
    llm.tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved_format(loaded) == get_format("v1", llm.tokenizer) == get_format("vicuna_v1", make_tokenizer(kind))
    for version in ("chatml", "llama_3", "plain"):
        assert get_format(version, loaded) == get_format(version, make_tokenizer(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_training_finds_its_format_again(kind: str, tmp_path: Path) -> None:
    """`auto` without a template is v1, in the encoder too; a data worker's copy of the encoder keeps the bos."""
    bare = make_tokenizer(kind)
    bare.chat_template = None
    config = LlamaConfig(vocab_size=len(bare), hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    bare.save_pretrained(tmp_path / "llm")
    llm = load_llm(str(tmp_path / "llm"))
    training = ConversationEncoder(llm.tokenizer, "auto", 4)
    expected = trained_prompt(ConversationEncoder(bare, "v1", 4), FIRST, ANSWER, SECOND)
    assert trained_prompt(training, FIRST, ANSWER, SECOND) == expected
    for version in ("auto", "v1"):
        copy = pickle.loads(pickle.dumps(ConversationEncoder(llm.tokenizer, version, 4)))
        assert trained_prompt(copy, FIRST, ANSWER, SECOND) == expected
