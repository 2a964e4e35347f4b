"""The chat of a tiny real model: prompts are training's, cached answers those computed afresh, streams clean.

And the terminal's commands, dropped files, bad images, and one answer for a script.
"""

import copy
import threading
from pathlib import Path

import bad_corpus
import pytest
import tiny_chat
import torch
from conftest import script_parser
from PIL import Image
from serve_process import png
from tiny_chat import SHORT, turn_text
from tiny_mllm import write_llm
from tiny_tokenizers import FORMATS, KINDS, TOKENIZERS
from tokenizers import decoders
from transformers import DynamicCache

from clips.common.errors import UserError
from clips.data.images import MAX_BYTES
from mllm.chat.model import ChatModel, Sampling
from mllm.chat.session import AnswerStreamer, ChatSession
from mllm.chat.terminal import Talk, chat_from_flags, dropped_files, load_image
from mllm.data.conversation import IGNORE, ConversationEncoder
from mllm.encoders.load import load_vision
from mllm.model import load
from mllm.model.llava import build_model, save_model
from mllm.model.llm import load_llm
from mllm.model.tiles import TokenLayout

model, place = tiny_chat.model, tiny_chat.place  # fixtures


@pytest.fixture(scope="module")
def images(place: Path) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted((place / "images").iterdir())]


def ask(session: ChatSession, *arguments, **options) -> str:
    return "".join(session.ask(*arguments, **options))


QUESTIONS = [
    " What  is\tit? \n",
    "Typed <image> and <|im_end|> </s> \n\n<|eot_id|>",
    "ünï 漢字 🦊",
    "<image>",
    "last one",
]


@pytest.mark.parametrize("version", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_what_training_builds(model: ChatModel, images: list, kind: str, version: str) -> None:
    """For every turn: the prompt's ids are those in front of the answer's labels in the training sample."""
    system = "Be <image> brief." if version not in ("plain",) else None
    encoder = ConversationEncoder(TOKENIZERS[kind], version, 3)
    chat = ChatModel.__new__(ChatModel)  # the prompt depends on nothing but the encoder
    chat.encoder, chat.layout, chat.context_length = encoder, TokenLayout(3), None
    session = ChatSession(chat, system=system)
    counts = [1] if version == "plain" else [2, 0, 1, 0, 0]
    for question, count in zip(QUESTIONS, counts, strict=False):
        parts = [{"type": "image"}] * count + [{"type": "text", "text": question}]
        session.turns.append({"from": "human", "value": parts})
        session.images += images[:1] * count
        answer = {"from": "gpt", "value": [{"type": "text", "text": " An <image> answer. "}]}
        first = [{"from": "system", "value": [{"type": "text", "text": system}]}] if system else []
        sample = encoder.encode([*first, *session.turns, answer], len(session.images), "sample")
        prompt = session.prompt_ids(session.turns, len(session.images))
        trained = [i for i, label in enumerate(sample.labels) if label != IGNORE]
        answer_at = next(i for i in reversed(trained) if i - 1 not in trained)
        assert prompt == sample.input_ids[:answer_at]
        session.turns.append(answer)


def fresh(session: ChatSession, sampling: Sampling = SHORT) -> str:
    """The last answer computed by a session that knows nothing."""
    again = ChatSession.from_turns(session.model, session.turns[:-1], session.images)
    again.system = session.system
    text = "".join(again.answer(sampling))
    assert again.last.cached_tokens == 0
    return text


def test_cached_answers_are_those_computed_afresh(model: ChatModel, images: list, request) -> None:
    session = ChatSession(model)
    encoded: list[int] = []
    tower = model.model.model.vision_tower
    hook = tower.register_forward_pre_hook(
        lambda _, arguments, options: encoded.append(len((*arguments, *options.values())[0])), with_kwargs=True
    )
    request.addfinalizer(hook.remove)
    answers = []

    def check(text: str, images_encoded: int) -> None:
        count = sum(encoded)
        encoded.clear()
        assert count == images_encoded
        assert text == turn_text(session.turns[-1])
        assert text == fresh(session)
        encoded.clear()
        answers.append(text)

    check(ask(session, "What is in the image?", [images[0]], SHORT), 1)
    assert session.last.cached_tokens == 0
    check(ask(session, "And two dogs?", (), SHORT), 0)
    first_prompt = len(session.prompt_ids(session.turns[:1], 1))
    assert session.last.cached_tokens >= first_prompt
    check(ask(session, "A red cat?", [images[1], images[2]], SHORT), 2)
    session.keep(2)
    assert session.images == [images[0]]
    check(ask(session, "A red cat?", [images[2], images[1]], SHORT), 3)  # another prompt than the one that was read
    session.system = "Be rude."
    check(ask(session, "What?", (), SHORT), 3)  # the system text stands before everything
    session.keep(0)
    check(ask(session, "What is in the image?", [images[3]], SHORT), 1)
    assert len(set(answers)) > 3  # otherwise equality would say nothing


def test_a_cache_that_cannot_be_cut_is_left(model: ChatModel, images: list, monkeypatch) -> None:
    """Layers with a sliding window cannot be cut."""

    def refuse(cache: DynamicCache, count: int) -> None:
        raise RuntimeError("the window has moved")

    monkeypatch.setattr(DynamicCache, "crop", refuse)
    session = ChatSession(model)
    ask(session, "What is it?", images[:1], SHORT)

    assert session.last.cached_tokens == 0
    again = ask(session, "And two dogs?", (), Sampling(max_new_tokens=4))
    assert session.last.cached_tokens == 0
    assert again == fresh(session, Sampling(max_new_tokens=4))


def stream(tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], AnswerStreamer]:
    streamer = AnswerStreamer(tokenizer, stop, threading.Event())
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        if not streamer.is_stopped:
            streamer.put(torch.tensor([token]))
    streamer.end()
    return list(streamer), streamer


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_whole_characters_and_join_to_the_text(kind: str) -> None:
    tokenizer = copy.deepcopy(TOKENIZERS[kind])
    if kind.startswith("sentencepiece"):
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.backend_tokenizer.decoder = decoders.Sequence(parts)  # as Llama 2's
    text = "Hi, a 🦊 and 漢字 \n\n ünd\ttwo  spaces: é!"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, _ = stream(tokenizer, [*ids, tokenizer.eos_token_id])
    assert "".join(pieces) == text
    assert len(pieces) > 8
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream(tokenizer, tokenizer(" \n ", add_special_tokens=False)["input_ids"])[0] == []


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(("STOP",), "one ST OP two"), (("two", "OP t"), "one ST"), (("\n\n",), "one ST OP two STO"), (("ne ST",), "o")],
)
def test_a_stop_text_does_not_leak(stop: tuple[str, ...], expected: str) -> None:
    tokenizer = TOKENIZERS["gpt2"]
    text = "one ST OP two STO\n\nSTOP after" if stop != ("STOP",) else "one ST OP two STOP after"
    pieces, streamer = stream(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], stop)
    assert "".join(pieces) == expected
    assert streamer.is_stopped
    started, streamer = stream(tokenizer, tokenizer("it is ST", add_special_tokens=False)["input_ids"], ("STOP",))
    assert "".join(started) == "it is ST"  # the start of a stop text that did not come
    assert not streamer.is_stopped


def test_a_stop_text_ends_generation(model: ChatModel, images: list) -> None:
    session = ChatSession(model)
    long = Sampling(max_new_tokens=200)
    whole = ask(session, "What is it?", images[:1], long)
    stop = whole[10:12]
    session.keep(0)
    cut = ask(session, "What is it?", images[:1], Sampling(max_new_tokens=200, stop=(stop,)))
    assert cut == whole[: whole.index(stop)].rstrip()
    assert session.last.finish_reason == "stop"
    assert session.last.new_tokens < 200
    session.keep(0)
    assert ask(session, "What is it?", images[:1], long) == whole == fresh(session, long)  # the cache is in order


def test_cancelling_keeps_what_was_said(model: ChatModel, images: list) -> None:
    session, cancel = ChatSession(model), threading.Event()
    sampling = Sampling(max_new_tokens=200)
    whole = ask(ChatSession(model), "What is it?", images[:1], sampling)
    pieces = []
    for piece in session.ask("What is it?", images[:1], sampling, cancel):
        pieces.append(piece)
        cancel.set()
    assert session.last.finish_reason == "cancelled"
    assert 0 < session.last.new_tokens < 200
    assert turn_text(session.turns[-1]) == "".join(pieces)
    assert whole.startswith("".join(pieces).rstrip("\ufffd"))  # part of a character
    session.keep(0)
    answers = session.ask("What is it?", images[:1], sampling)
    next(answers)
    answers.close()  # a reader who leaves
    assert session.last.finish_reason == "cancelled"
    assert len(session.turns) == 2
    text = ask(session, "And then?", (), SHORT)
    assert text == fresh(session)
    cancel.set()
    assert ask(session, "Never read", (), SHORT, cancel) == ""
    assert (session.last.new_tokens, turn_text(session.turns[-1])) == (0, "")
    assert ask(session, "Still there?", (), SHORT) == fresh(session)


def test_a_failure_leaves_the_talk_as_it_was(model: ChatModel, images: list, monkeypatch) -> None:
    session = ChatSession(model)
    ask(session, "What is it?", images[:1], SHORT)
    before = (list(session.turns), list(session.images), session.last)

    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("too much")

    with monkeypatch.context() as patch:
        patch.setattr(model.model, "generate", fail)
        with pytest.raises(UserError, match="too little memory"):
            ask(session, "And?", images[1:2], SHORT)
    with pytest.raises(UserError, match="the question is empty"):
        session.ask("  ")
    with pytest.raises(UserError, match="512"):
        session.ask("w\n" * 250)
    assert (session.turns, session.images, session.last) == before
    assert ask(session, "And?", (), SHORT) == fresh(session)
    assert session.last.cached_tokens == 0


def test_an_answer_ends_where_the_context_does(model: ChatModel) -> None:
    session = ChatSession(model)
    question = "w\n" * 251
    while len(session.prompt_ids([{"from": "human", "value": question}], 0)) > 508:
        question = question[:-2]
    list(session.ask(question, (), Sampling(max_new_tokens=100)))
    assert 500 < session.last.prompt_tokens < 512
    assert session.last.prompt_tokens + session.last.new_tokens <= 512


def test_one_chats_in_the_precision_of_the_evaluation(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that computes in bf16 the chat was fp32, and the evaluation bf16."""
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(load, "has_bf16", lambda _, has=has_bf16: has)
        assert load.answer_dtype("auto", torch.device("cpu")) == dtype  # the evaluation's
        assert ChatModel.load(str(place / "runs" / "llava" / "model"), device="cpu").model.dtype == dtype


def test_a_quantised_model_answers(place: Path, tmp_path: Path, images: list) -> None:
    write_llm(tmp_path / "llm", hidden_size=64, max_position_embeddings=512)  # whole blocks of 64
    vision = load_vision("clips", runs=place / "runs")
    built = build_model(vision, load_llm(str(tmp_path / "llm")))
    save_model(*built, tmp_path / "llava" / "model", card={})
    chat = ChatModel.load(str(tmp_path / "llava" / "model"), device="cpu", bits=4)
    assert any("bit" in type(layer).__name__ for layer in chat.model.modules())
    session = ChatSession(chat)
    assert ask(session, "What is it?", images[:1], SHORT) == turn_text(session.turns[-1])
    assert session.last.new_tokens > 0


@pytest.fixture
def talk(model: ChatModel) -> Talk:
    return Talk(ChatSession(model), SHORT)


def say(talk: Talk, *lines: str) -> None:
    """Run the talk on these lines, as if typed, then Ctrl-D."""
    waiting = iter(lines)

    def read() -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    talk.run(read)


def questions(talk: Talk) -> list[str]:
    return [turn_text(turn) for turn in talk.session.turns[::2]]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """An image under a name that must be quoted or escaped."""
    path = tmp_path / "my red 'cat' (1).png"
    Image.new("RGB", (8, 6), "red").save(path)
    return path


def test_a_dropped_file_is_recognised_however_it_is_written(odd: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    escaped = str(odd)
    for character in " '()":
        escaped = escaped.replace(character, "\\" + character)
    quoted_home = f'"~/{odd.name}"'
    for line in (str(odd), f'"{odd}"', escaped, f"  {odd} ", odd.name, quoted_home, "./" + odd.name):
        (found,) = dropped_files(line)
        assert load_image(found).size == (6, 8), line
    Image.new("RGB", (2, 2)).save("b.png")
    assert dropped_files(f'{escaped} "b.png"') == [str(odd), "b.png"]
    Path("notes").write_text("", encoding="utf-8")
    texts = ["notes", "What is b.png", "it's b.png", "missing.png", "/help", "", "''", "/", "~", "a" * 10_000, "\0.png"]
    for line in texts:
        assert dropped_files(line) == [], line


def test_bad_images_are_one_line_each_and_the_talk_goes_on(talk: Talk, tmp_path: Path, capsys) -> None:
    files = {"text.png": b"hello", "empty.png": b"", "cut.png": png()[:45], "huge.png": bad_corpus.png(50_000, 50_000)}
    files["big.png"] = b"x" * (MAX_BYTES + 1)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in (*files, "missing.png", "."):
        say(talk, f"/image {tmp_path / name}")
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"error: {tmp_path / name}: ")
    say(talk, "/image http://127.0.0.1:1/a.png", f"{tmp_path / 'text.png'}")
    assert [line[:6] for line in capsys.readouterr().out.splitlines()] == ["error:"] * 2
    assert talk.waiting == []
    say(talk, "Still there?")
    assert questions(talk) == ["Still there?"]


def test_a_model_cannot_steer_the_terminal(talk: Talk, capsys) -> None:
    talk.show(piece for piece in ["a\x1b[2Jb\x07", "c\x9b31md\n\te"])
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffdc\ufffd31md\n\te\n"


def test_an_answer_that_a_limit_cut_off_says_so(talk: Talk, capsys) -> None:
    talk.show(talk.session.ask("What is it?", (), SHORT))
    assert capsys.readouterr().out.endswith(" (cut off after 8 tokens: --max-new-tokens sets the limit)\n")


@pytest.mark.parametrize("name", ["prompt", "image", "system", "stop"])
def test_a_flag_that_the_page_would_drop_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name} is not for --web"):
        chat_from_flags(script_parser("chat").parse_args(["--web", f"--{name}", "x"]))


def test_one_answer_alone_on_stdout(model: ChatModel, place: Path, capsys) -> None:
    image = str(place / "images" / "0.png")
    parser = script_parser("chat")
    common = ["--model", model.directory, "--device", "cpu", "--max-new-tokens", "8"]
    chat_from_flags(parser.parse_args([*common, "--prompt", "What is it?", "--image", image]))
    printed = capsys.readouterr()
    expected = "".join(ChatSession(model).ask("What is it?", [load_image(image)], SHORT))
    assert printed.out == expected + "\n"
    assert "cut off after 8 tokens: --max-new-tokens sets the limit" in printed.err
    with pytest.raises(UserError, match="tokens"):
        chat_from_flags(parser.parse_args([*common, "--prompt", "w " * 5000]))
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"missing\.png"):
        chat_from_flags(parser.parse_args([*common, "--prompt", "What?", "--image", "missing.png"]))
