"""One format from training to every reader, with the same ids; those of LLaVA-1.5 itself, on bare SentencePiece."""

import asyncio
import json
import pickle
import random
import re
from pathlib import Path

import httpx2
import pytest
from PIL import Image
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from serve_process import RED, make_image, user
from tiny_mllm import write_run
from tiny_tokenizers import FORMATS, KINDS, LLAMA_3_REGEX, byte_level, make_tokenizer, write_sentencepiece
from tokenizers import processors
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from clips.common.errors import UserError
from mllm.chat.limits import Limits
from mllm.chat.model import ChatModel, Sampling
from mllm.chat.session import ChatSession
from mllm.data.conversation import IGNORE, ConversationEncoder
from mllm.data.formats import V1_SYSTEM, get_format, saved_format
from mllm.data.images import ImageStore
from mllm.data.questions import Question
from mllm.encoders.load import load_vision
from mllm.evaluation.evaluate import generate_answers
from mllm.model.llava import build_model, save_model
from mllm.model.llm import PROBES, LanguageModel, check_sentencepiece_ids, load_llm, read_tokenizer
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
    """The ids in front of the last answer of a training sample with one image."""
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
    save_model(model, processor, tmp_path / "model", card={})
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
    messages = [user(FIRST, make_image(RED))]
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


WORDS = re.findall(r"\w+", "What is at the top left A red cat Two dogs and 12 trees The model answer below green apple")
ENDS = ["", ".", "?", "!", ",\nthen", " (12)", "…", "猫"]
SPACED = ["It is red.  What is it?", "def f(x):\n    return x\n\tif x:   y =     2\n        z", "a  b   c    d     e"]
"""Runs of spaces: LLaVA-1.5's come from the scores of its pieces, not from their ids."""
Talk = list[tuple[str, str]]


class SlowLlama:
    """`LlamaTokenizer` of transformers 4.37 with use_fast=False, which LLaVA-1.5 was trained with."""

    def __init__(self, directory: Path, *, legacy: bool) -> None:
        proto = sentencepiece_model_pb2.ModelProto.FromString((directory / "tokenizer.model").read_bytes())
        proto.normalizer_spec.add_dummy_prefix = legacy
        self.sp = SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.legacy = legacy

    def __call__(self, text: str) -> list[int]:
        """Ids with the bos in front."""
        ids = [self.sp.bos_id()]
        text = text if self.legacy or not text else f"▁{text}"
        for piece in filter(None, re.split("(</s>)", text)):
            if piece == "</s>":
                ids.append(self.sp.eos_id())
            elif self.legacy or not piece.startswith(("▁", " ")):
                ids += self.sp.encode(piece)
            else:  # SentencePiece would drop a space at the very start of a text
                ids += self.sp.encode(f"<unk>{piece}")[len(self.sp.encode("<unk>")) :]
        return ids


def tokenizer_image_token(text: str, tokenizer: SlowLlama, image: int) -> list[int]:
    chunks = [tokenizer(chunk)[1:] for chunk in text.split("<image>")]
    return [tokenizer.sp.bos_id(), *chunks[0], *(token for chunk in chunks[1:] for token in (image, *chunk))]


def v1_text(talk: Talk, image: bool) -> str:
    text = V1_SYSTEM
    for number, (question, answer) in enumerate(talk):
        shown = f"<image>\n{question}".strip() if image and number == 0 else question
        text += f"{' ' if number == 0 else ''}USER: {shown} ASSISTANT: {answer}</s>"
    return text


def tokenizer_of(directory: Path) -> PreTrainedTokenizerBase:
    tokenizer = read_tokenizer(directory)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def talks(seed: int, count: int) -> list[Talk]:
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 9))) + rng.choice(ENDS)

    return [[(text(), text()) for _ in range(rng.randint(1, 4))] for _ in range(count)]


def turns_of(talk: Talk, image: bool) -> list[dict[str, str]]:
    values = [value for turn in talk for value in turn]
    values[0] = f"<image>\n{values[0]}" if image else values[0]
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tokenizer_model_alone_gives_sentencepiece_s_own_ids(legacy: bool, tmp_path: Path) -> None:
    directory = write_sentencepiece(tmp_path, legacy=legacy)
    tokenizer, own = read_tokenizer(directory), SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    for text in [*SPACED, *PROBES, *(answer for talk in talks(3, 40) for _, answer in talk)]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == own.encode(text), text
    check_sentencepiece_ids(tokenizer, directory / "tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer\.model: the tokenizer gives 'def f"):
        check_sentencepiece_ids(AutoTokenizer.from_pretrained(directory), directory / "tokenizer.model")


@pytest.mark.parametrize("legacy", [False, True])
def test_v1_has_the_ids_of_llava(legacy: bool, tmp_path: Path) -> None:
    tokenizer, slow = tokenizer_of(write_sentencepiece(tmp_path, legacy=legacy)), SlowLlama(tmp_path, legacy=legacy)
    encoder = ConversationEncoder(tokenizer, "v1", 1)
    spaced = [[(text, text) for text in SPACED], [(text, text) for text in reversed(SPACED)]]
    for number, talk in enumerate([*talks(1, 80), *spaced, *([] if legacy else [[("", "An image alone")]])]):
        image = number % 3 > 0  # of the last too
        encoded = encoder.encode(turns_of(talk, image), int(image), "sample")
        assert encoded.input_ids == tokenizer_image_token(v1_text(talk, image), slow, encoder.image_id), talk
        # what LLaVA trains of "ASSISTANT: answer"
        replies = [slow(f"x {answer}")[len(slow("x")) :] for _, answer in talk]
        answers = [token for ids in replies for token in (*ids, slow.sp.eos_id())]
        assert [label for label in encoded.labels if label != IGNORE] == answers


def test_white_space_at_the_edges_of_a_text_is_no_part_of_it(tmp_path: Path) -> None:
    """As chat templates have it. LLaVA keeps it, except around an image (docs/llava.md)."""
    tokenizer = tokenizer_of(write_sentencepiece(tmp_path, legacy=False))
    encoder = ConversationEncoder(tokenizer, "v1", 1)
    talk, spaced = [("Where is it?", "At the top.")], [("  Where is it? \n", "\n At the top.  ")]
    for image in (False, True):
        assert encoder.encode(turns_of(spaced, image), image, "s") == encoder.encode(turns_of(talk, image), image, "s")
    theirs = tokenizer_image_token(v1_text(spaced, False), SlowLlama(tmp_path, legacy=False), encoder.image_id)
    assert encoder.encode(turns_of(spaced, False), 0, "s").input_ids != theirs


def test_an_empty_answer_trains_nothing_as_in_llava(tmp_path: Path) -> None:
    """Else the model would learn to say nothing. `plain` trains the newline, as LLaVA does."""
    tokenizer = tokenizer_of(write_sentencepiece(tmp_path, legacy=False))
    encoder = ConversationEncoder(tokenizer, "v1", 1)
    with pytest.raises(UserError, match="it has no answer"):
        encoder.encode(turns_of([("Where?", " ")], False), 0, "sample")
    with pytest.raises(UserError, match="it has no answer"):
        encoder.check(turns_of([("Where?", "")], False), [], "sample")
    encoded = encoder.encode(turns_of([("Where?", ""), ("And now?", "Here.")], False), 0, "sample")
    alone = encoder.encode(turns_of([("And now?", "Here.")], False), 0, "sample")
    trained = [[label for label in one.labels if label != IGNORE] for one in (encoded, alone)]
    assert trained[0] == trained[1]
    plain = ConversationEncoder(tokenizer, "plain", 1).encode(turns_of([("", "")], True), 1, "sample")
    assert tokenizer.decode([label for label in plain.labels if label != IGNORE]).strip() == ""
    assert plain.labels[-1] != IGNORE


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_has_the_ids_of_llava(legacy: bool, tmp_path: Path) -> None:
    tokenizer, slow = tokenizer_of(write_sentencepiece(tmp_path, legacy=legacy)), SlowLlama(tmp_path, legacy=legacy)
    encoder = ConversationEncoder(tokenizer, "plain", 1)
    for (_, caption), *_ in [*talks(2, 40), *([(text, text)] for text in SPACED)]:
        encoded = encoder.encode(turns_of([("Describe it.", caption)], True), 1, "sample")
        expected = tokenizer_image_token(f"<image>{caption}\n", slow, encoder.image_id)
        assert encoded.input_ids == expected
        assert encoded.labels == [IGNORE, IGNORE, *expected[2:]]


def test_the_end_of_a_caption_is_one_token_where_the_vocabulary_has_it() -> None:
    """Llama 3's and Qwen's have ".\\n"; a frozen language model knows no other end of a sentence and line."""
    backend = byte_level(["A cat.\nA dog.\n"] * 9, 300, ["<s>", "</s>", "<image>"], LLAMA_3_REGEX)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", additional_special_tokens=["<image>"]
    )
    encoder = ConversationEncoder(tokenizer, "plain", 1)
    encoded = encoder.encode(turns_of([("", "A cat.")], True), 1, "sample")
    assert encoded.input_ids[1:] == tokenizer("A cat.\n")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids[-1]) == ".Ċ"
    assert encoded.input_ids[-1] in encoder.stop_ids


# haotian-liu/LLaVA at c121f04, llava/conversation.py: `conv_templates` → system, roles, separators. `TWO` puts `sep`
# after the system and each question, and `sep2` after each answer. `MPT` puts `sep` after every text, and no colon.
ROLES = ("user", "assistant")
CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
TWO = {"roles": ("USER: ", "ASSISTANT: "), "seps": (" ", "</s>")}
MPT = {"roles": ("<|im_start|>user\n", "<|im_start|>assistant\n"), "seps": ("<|im_end|>", "<|im_end|>")}
TEMPLATES = {
    "v1": TWO | {"system": CURIOUS.format("user") + " "},
    "llava_v1": TWO | {"system": CURIOUS.format("human") + " "},
    "chatml_direct": MPT | {"system": "<|im_start|>system\nAnswer the questions.<|im_end|>"},
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_format_by_llava_s_name_is_llava_s_prompt(name: str) -> None:
    """The ids of the whole conversation, the prompt of the next answer, and the saved chat template."""
    template, tokenizer = TEMPLATES[name], make_tokenizer("gpt2")
    talk = [("Where is it?", "At the top."), ("And now?", "Below.")]
    text = template["system"]
    for turn in talk:
        for role, content, sep in zip(template["roles"], turn, template["seps"], strict=True):
            text += role + content + sep
    if template["seps"][1] == "</s>":
        text = text.replace("</s>", tokenizer.eos_token)
    encoder = ConversationEncoder(tokenizer, name, 1)
    encoded = encoder.encode(turns_of(talk, False), 0, "sample")
    assert tokenizer.decode(encoded.input_ids).removeprefix(tokenizer.bos_token) == text
    assert encoded.input_ids == tokenizer(text)["input_ids"]
    prompt = tokenizer.decode(encoder.prompt(turns_of(talk, False)[:3], 0)).removeprefix(tokenizer.bos_token)
    assert text.startswith(prompt)
    assert prompt.endswith(template["roles"][1].rstrip(" "))
    shown = [{"role": role, "content": content} for turn in talk for role, content in zip(ROLES, turn, strict=True)]
    rendered = tokenizer.apply_chat_template(shown, chat_template=encoder.format.chat_template(), tokenize=False)
    assert rendered == text
