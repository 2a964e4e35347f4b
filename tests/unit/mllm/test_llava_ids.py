"""Token ids of LLaVA-1.5 itself: its tokenisation, written out on bare SentencePiece, against training here."""

import random
import re
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tiny_tokenizers import LLAMA_3_REGEX, byte_level, make_tokenizer, write_sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from clips.common.errors import UserError
from mllm.data.conversation import IGNORE, ConversationEncoder
from mllm.data.formats import V1_SYSTEM
from mllm.model.llm import PROBES, check_sentencepiece_ids, read_tokenizer

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
    for number, talk in enumerate([*talks(1, 80), *spaced, *([] if legacy else [[("", "A picture alone")]])]):
        image = number % 3 > 0  # of the last too
        encoded = encoder.encode(turns_of(talk, image), int(image), "sample")
        assert encoded.input_ids == tokenizer_image_token(v1_text(talk, image), slow, encoder.image_id), talk
        # what LLaVA trains of "ASSISTANT: answer"
        replies = [slow(f"x {answer}")[len(slow("x")) :] for _, answer in talk]
        answers = [token for ids in replies for token in (*ids, slow.sp.eos_id())]
        assert [label for label in encoded.labels if label != IGNORE] == answers


def test_white_space_at_the_edges_of_a_text_is_no_part_of_it(tmp_path: Path) -> None:
    """As chat templates have it. LLaVA keeps it, except around a picture (docs/llava.md)."""
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
