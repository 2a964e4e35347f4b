"""Token ids of LLaVA-1.5 itself: its tokenisation, written out on bare SentencePiece, against training here."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tiny_tokenizers import LLAMA_3_REGEX, byte_level, write_sentencepiece
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from clips.common.errors import UserError
from mllm.data.conversation import IGNORE, ConversationEncoder
from mllm.data.formats import V1_SYSTEM, get_format, save_format
from mllm.model.llm import load_llm, read_tokenizer

WORDS = re.findall(r"\w+", "What is at the top left A red cat Two dogs and 12 trees The model answer below green apple")
ENDS = ["", ".", "?", "!", ",\nthen", " (12)", "…", "猫"]
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
def test_v1_has_the_ids_of_llava(legacy: bool, tmp_path: Path) -> None:
    tokenizer, slow = tokenizer_of(write_sentencepiece(tmp_path, legacy=legacy)), SlowLlama(tmp_path, legacy=legacy)
    encoder = ConversationEncoder(tokenizer, "v1", 1)
    for number, talk in enumerate([*talks(1, 80), *([] if legacy else [[("", "A picture alone")]])]):
        image = number % 3 > 0  # of the last too
        encoded = encoder.encode(turns_of(talk, image), int(image), "sample")
        assert encoded.input_ids == tokenizer_image_token(v1_text(talk, image), slow, encoder.image_id), talk
        said = [slow(f"x {answer}")[len(slow("x")) :] for _, answer in talk]  # what LLaVA trains of "ASSISTANT: answer"
        answers = [token for ids in said for token in (*ids, slow.sp.eos_id())]
        assert [label for label in encoded.labels if label != IGNORE] == answers


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_has_the_ids_of_llava(legacy: bool, tmp_path: Path) -> None:
    tokenizer, slow = tokenizer_of(write_sentencepiece(tmp_path, legacy=legacy)), SlowLlama(tmp_path, legacy=legacy)
    encoder = ConversationEncoder(tokenizer, "plain", 1)
    for (_, caption), *_ in talks(2, 40):
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


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tokenizer_keeps_its_kind_when_it_is_saved(legacy: bool, tmp_path: Path) -> None:
    """transformers 5 leaves `legacy` out of what it saves, and reads the other kind."""
    write_sentencepiece(tmp_path / "llm", legacy=legacy, specials=False)
    config = LlamaConfig(vocab_size=430, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    llm = load_llm(str(tmp_path / "llm"))  # no chat template: v1
    save_format(llm.tokenizer, get_format("auto", llm.tokenizer))
    llm.tokenizer.save_pretrained(tmp_path / "saved")
    again = read_tokenizer(tmp_path / "saved")
    text = "x<image>\nWhat?</s>USER: hi"
    assert again(text)["input_ids"] == llm.tokenizer(text)["input_ids"]
    assert get_format("auto", again).prefix_space == (not legacy)


def test_a_tokenizer_model_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sentencepiece(tmp_path, legacy=False)
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model"):
        read_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"has no tokenizer\.json.* pip install sentencepiece protobuf$"):
        read_tokenizer(tmp_path)
