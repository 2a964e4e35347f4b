"""Labels of every format against a slow per-byte reference, and prompts against the saved chat template."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_tokenizers import CHATML, CONTROL, FORMATS, KINDS, TOKENIZERS, make_tokenizer
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from clips.common.errors import UserError
from mllm.data.conversation import IGNORE, ConversationEncoder
from mllm.data.formats import LLAMA_3_SYSTEM, V1_SYSTEM

IMAGE_TOKENS = 3
TALK = ("system", "human", "gpt", "human")
ROLE = {"system": "system", "human": "user", "gpt": "assistant"}


def reference(
    version: str, bos: str, eos: str, turns: list[tuple[str, str]], space: str = ""
) -> list[tuple[bytes | str, bool]]:
    """(one byte, or a control token's name, or "<image>") with whether it is trained. Question one has the image.

    `space`: what LLaVA's own two formats put before the first text and after the image.
    """
    stream: list[tuple[bytes | str, bool]] = []

    def text(value: str, trained: bool = False) -> None:
        stream.extend((bytes([byte]), trained) for byte in value.encode())

    def control(name: str, trained: bool = False) -> None:
        stream.append((name, trained))

    def image() -> None:
        stream.extend([("<image>", False)] * IMAGE_TOKENS)

    if bos and version != "llama_3":
        control(bos)
    if version == "plain":
        image()
        text(space + turns[0][1].strip() + "\n", True)
        return stream
    if version == "v1":
        text(space + V1_SYSTEM + " ")
    elif version == "llama_3":
        if bos:
            control(bos)
        control("<|begin_of_text|>")
        control("<|start_header_id|>")
        text("system")
        control("<|end_header_id|>")
        text("\n\n" + LLAMA_3_SYSTEM)
        control("<|eot_id|>")
    else:
        control("<|im_start|>")
        text("system\n" + ("You are a helpful assistant." if version == "chatml" else "Be kind."))
        control("<|im_end|>")
        text("\n")
    for number, (question, answer) in enumerate(turns):
        for role, value in (("user", question), ("assistant", answer)):
            trained = role == "assistant" and value.strip() != ""
            if version == "v1":
                text("USER:" if role == "user" else " ASSISTANT:")
                text(" ", trained)
            elif version == "llama_3":
                control("<|start_header_id|>")
                text(role)
                control("<|end_header_id|>")
                text("\n\n")
            else:
                control("<|im_start|>")
                text(role + "\n")
            if number == 0 and role == "user":
                image()
                text(space * (version == "v1") + ("\n" if value.strip() else ""))
            text(value.strip(), trained)
            if version == "v1":
                if role == "assistant":
                    control(eos, trained)
            else:
                control("<|eot_id|>" if version == "llama_3" else "<|im_end|>", trained)
                if version != "llama_3":
                    text("\n")
    if version in ("chatml", "auto"):
        stream.pop()  # a training sample ends at the last end token
    return stream


def token_bytes(tokenizer: PreTrainedTokenizerFast, kind: str, token: int) -> bytes:
    piece = tokenizer.convert_ids_to_tokens(token)
    if kind in ("gpt2", "llama3"):
        return bytes(BYTE_OF[symbol] for symbol in piece)
    if piece.startswith("<0x") and len(piece) == 6:
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _byte_symbols() -> dict[int, str]:
    """GPT-2's printable symbol of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_OF = {symbol: byte for byte, symbol in _byte_symbols().items()}


def assert_equals_reference(tokenizer, kind: str, encoded, stream) -> None:
    control = set(CONTROL)
    position = 0
    previous_control = True
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        name = tokenizer.convert_ids_to_tokens(token)
        if name in control:
            assert stream[position][0] == name
            covered = stream[position : position + 1]
            previous_control = True
        else:
            data = token_bytes(tokenizer, kind, token)
            if kind == "sentencepiece_legacy" and previous_control:
                assert data[:1] == b" "
                data = data[1:]  # the space that this kind puts before every text
            previous_control = False
            covered = stream[position : position + len(data)]
            assert b"".join(unit for unit, _ in covered if isinstance(unit, bytes)) == data
        flags = {trained for _, trained in covered}
        assert len(flags) <= 1, "a token covers trained and masked bytes"
        if covered:
            assert label == (token if flags.pop() else IGNORE)
        else:
            assert label == IGNORE or not data  # only the extra space itself
        position += len(covered)
    assert position == len(stream)


def llava(turns: list[tuple[str, str]], image: bool = True) -> list[dict[str, str]]:
    values = [value for turn in turns for value in turn]
    if image:
        values[0] = f"<image>\n{values[0]}"
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


ODD = [
    "cat", " ", "  ", "\n", "\t", "é", "…", "'s", "12", "!?", "<image>", "<|im_end|>", "</s>", "<|eot_id|>", "USER:",
    "猫",
]  # fmt: skip
odd_text = st.lists(st.sampled_from(ODD), max_size=8).map("".join)
# A typed <image> at the edge of a question would be a placeholder: words stand around it.
odd_question = st.one_of(st.just(""), odd_text.map(lambda text: f" a{text}b \n"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", FORMATS)
@settings(max_examples=12, deadline=None)
@given(turns=st.lists(st.tuples(odd_question, odd_text), min_size=1, max_size=4))
def test_labels_equal_the_per_byte_reference(version, kind, turns):
    tokenizer = TOKENIZERS[kind]
    turns = turns[:1] if version == "plain" else turns
    assume(version == "plain" or any(answer.strip() for _, answer in turns))
    encoder = ConversationEncoder(tokenizer, version, IMAGE_TOKENS)
    encoded = encoder.encode(llava(turns), 1, "sample")
    bos = "<s>" if kind.startswith("sentencepiece") else ""
    space = " " * (kind == "sentencepiece")
    assert_equals_reference(tokenizer, kind, encoded, reference(version, bos, tokenizer.eos_token, turns, space))


def make_processor(tokenizer, template: str) -> LlavaProcessor:
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    options = {"patch_size": 16, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    return LlavaProcessor(images, tokenizer, **options, chat_template=template)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [version for version in FORMATS if version != "plain"])
def test_saved_processor_gives_the_same_prompt(version, kind, tmp_path):
    tokenizer = TOKENIZERS[kind]
    encoder = ConversationEncoder(tokenizer, version, num_image_tokens=4)
    make_processor(tokenizer, encoder.format.chat_template()).save_pretrained(tmp_path)
    processor = LlavaProcessor.from_pretrained(tmp_path)
    image = Image.new("RGB", (32, 32))
    question = "What's at the top left, \"red\" or {{ 'blue' }}?"
    contents = [
        f"<image>\n{question}",
        f" {question} <image> ",
        [{"type": "image"}, {"type": "text", "text": question}],
        [{"type": "text", "text": f" {question}\n"}, {"type": "image"}],
    ]
    for content in contents:
        values = ["Be brief.", content, "A cat.", "Where?\nSay it."]
        turns = [{"from": role, "value": value} for role, value in zip(TALK, values, strict=True)]
        chat = [{"role": ROLE[role], "content": value} for role, value in zip(TALK, values, strict=True)]
        for start, stop in ((0, 4), (1, 2)):
            text = processor.apply_chat_template(chat[start:stop], add_generation_prompt=True)
            ids = processor(images=[image], text=text, add_special_tokens=False)["input_ids"][0]
            assert encoder.prompt(turns[start:stop], 1) == list(ids)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
        # the last answer is treated differently, as in templates that insert an empty thought
        CHATML.replace("\n{{ m['content'] }}", "\n{{ 'x' if loop.last }}{{ m['content'] }}"),
    ],
)
def test_auto_refuses_templates_that_it_cannot_cut(template):
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="every turn alike"):
        ConversationEncoder(tokenizer, "auto", IMAGE_TOKENS)


def ask(*values: str, images: int, max_length: int | None = None, version: str = "chatml"):
    encoder = ConversationEncoder(TOKENIZERS["gpt2"], version, IMAGE_TOKENS, max_length)
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return encoder, encoder.encode(turns, images, "sample 7 (id x)")


def test_placeholders_and_typed_image_words():
    encoder, encoded = ask("<image>\nWhat does <image> mean?", "The word <image>.", images=1)
    assert encoded.input_ids.count(encoder.image_id) == IMAGE_TOKENS
    encoder, encoded = ask("I type <image> here", "fine", images=0)
    assert encoder.image_id not in encoded.input_ids
    assert "I type <image> here" in encoder.tokenizer.decode(encoded.input_ids)
    encoder, encoded = ask("Compare <image> with <image>.", "same", images=2)
    places = [i for i, token in enumerate(encoded.input_ids) if token == encoder.image_id]
    assert len(places) == 2 * IMAGE_TOKENS
    assert places[IMAGE_TOKENS] > places[IMAGE_TOKENS - 1] + 1, "the two images stay where they stand"
    _, first = ask("<image>\nWhat?", "x", images=1)
    _, last = ask("What?\n<image>", "x", images=1)
    assert first == last, "a single image comes first, as in LLaVA"


def test_a_list_of_parts_holds_no_placeholders():
    encoder = ConversationEncoder(TOKENIZERS["gpt2"], "chatml", IMAGE_TOKENS)
    value = [{"type": "image"}, {"type": "text", "text": "<image>"}]
    prompt = encoder.prompt([{"from": "human", "value": value}], 1)
    assert prompt.count(encoder.image_id) == IMAGE_TOKENS
    assert encoder.tokenizer.decode(prompt).count("<image>") == IMAGE_TOKENS + 1


@pytest.mark.parametrize(
    ("turns", "noun"),
    [
        ([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], "turn 1"),
        ([{"from": "human", "value": [{"type": "audio"}]}], "turn 0"),
        ([{"from": "human", "value": "\ud83d"}], "surrogate"),
        ([{"from": "human", "value": "a"}], "masked"),
        ([{"from": "gpt", "value": "a"}], "no question"),
    ],
)
def test_bad_turns_name_the_sample(turns, noun):
    encoder = ConversationEncoder(TOKENIZERS["gpt2"], "chatml", IMAGE_TOKENS)
    with pytest.raises(UserError, match=rf"sample 7 \(id x\).*{noun}"):
        encoder.encode(turns, 0, "sample 7 (id x)")


def test_plain_takes_one_caption():
    with pytest.raises(UserError, match="format plain"):
        ask("<image>", "b", "c", "d", images=1, version="plain")
    encoder, encoded = ask("Describe it.\n<image>", "A cat.", images=1, version="plain")
    assert encoder.tokenizer.decode(encoded.input_ids) == "<image>" * IMAGE_TOKENS + "A cat.\n"


def test_truncation_keeps_images_and_counts():
    question, answer = "word " * 30, "cat " * 30
    _, whole = ask(f"<image>\n{question}", answer, images=1)
    assert not whole.truncated
    limit = len(whole.input_ids) - 5
    _, cut = ask(f"<image>\n{question}", answer, images=1, max_length=limit)
    assert cut.truncated
    assert cut.input_ids == whole.input_ids[:limit]
    assert cut.labels == whole.labels[:limit]
    # a late image: text before it is dropped rather than its tokens
    encoder, late = ask("hello", answer, f"{question} <image> <image>", "ok", images=2, max_length=80)
    assert len(late.input_ids) == 80
    assert late.input_ids.count(encoder.image_id) == 2 * IMAGE_TOKENS
    labels = zip(late.input_ids, late.labels, strict=True)
    assert all(label == IGNORE for token, label in labels if token == encoder.image_id)
    with pytest.raises(UserError, match="context"):
        ask("<image>", "x", images=1, max_length=2)
    with pytest.raises(UserError, match="masked"):
        ask(question, "x", images=0, max_length=30)
