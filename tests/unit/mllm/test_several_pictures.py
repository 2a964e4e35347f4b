"""Two images in one question through every route: training, evaluation, chat, terminal, page, server, stock pipeline.

The routes must agree to the letter, and the training's loss must be the stock model's on the same ids. Both models
walk them: the one that sees an image in a square, and the one that sees it in tiles.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny_chat
import torch
from PIL import Image
from serve_process import CHAT, ask, client_of, data_url, make_image, png, post, served, user, with_image
from tiny_chat import SHORT, answers_of, turn_text
from transformers import pipeline

from clips.common.errors import UserError
from mllm.chat.limits import Limits
from mllm.chat.model import ChatModel
from mllm.chat.session import ChatSession, ContextError
from mllm.chat.terminal import Talk, load_image
from mllm.data.dataset import ImageTokens, LlavaDataset
from mllm.data.images import ImageStore, pixel_loader
from mllm.data.questions import images_of, read_questions
from mllm.encoders.registry import image_pixels
from mllm.evaluation.scores import answer_line
from mllm.model.tiles import placeholder_ids
from mllm.training.trainer import Collator, TrainingModel

model = tiny_chat.model  # a fixture
TEXT, NAMES = "What is in the two images?", ("0.png", "3.png")
"""A question, and images of two shapes."""


@pytest.fixture(scope="module", params=["square", "tiles"])
def place(request: pytest.FixtureRequest, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    if request.param == "square":
        return made_once("tiny-chat", tiny_chat.write_place)
    return made_once("tiny-tiles", partial(tiny_chat.write_place, image_aspect_ratio="anyres"))


@pytest.fixture(scope="module")
def files(place: Path) -> list[Path]:
    return [place / "images" / name for name in NAMES]


@pytest.fixture(scope="module")
def stock(model: ChatModel) -> Callable[..., str]:
    """The stock pipeline's answer to a text about images."""
    pipe = pipeline("image-text-to-text", model=model.model, processor=model.processor)

    def said(text: str, *shown: Path) -> str:
        content = [{"type": "image", "image": Image.open(path).convert("RGB")} for path in shown]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        [found] = pipe(text=messages, max_new_tokens=8, do_sample=False, return_full_text=False)
        return found["generated_text"].strip()

    return said


@pytest.fixture(scope="module")
def expected(stock: Callable[..., str], files: list[Path]) -> str:
    """The answer, which is another one if the images change places."""
    assert stock(TEXT, *files) != stock(TEXT, *files[::-1])
    return stock(TEXT, *files)


def test_evaluation(model, place, expected, stock, files, tmp_path):
    """Images stand before the text, or at the places that the text names; both batched with other questions."""
    placed = {"image": list(NAMES), "text": f"<image>\n<image>\n{TEXT}"}
    between = {"image": list(NAMES), "text": f"<image> and <image>: {TEXT}"}
    lines = [{"image": list(NAMES), "text": TEXT}, placed, between, {"image": NAMES[0], "text": TEXT}, {"text": TEXT}]
    lines += [{"image": list(NAMES), "text": "A cat?"}, {"image": NAMES[0], "text": f"<image>\n{TEXT}"}]
    path = tmp_path / "questions.jsonl"
    asked, answers = answers_of(model, lines, place / "images", path)
    assert answers[:2] == [expected] * 2
    assert answers[3:] == [stock(TEXT, files[0]), stock(TEXT), stock("A cat?", *files), answers[3]]
    assert len({*answers}) == 5
    assert [images_of(json.loads(answer_line(q, "", ""))) for q in asked] == [images_of(line) for line in lines]
    path.write_text(json.dumps({"question_id": 0, "text": TEXT, "image": ["0.png", 3]}))
    with pytest.raises(UserError, match=r"record 0 .* image must be a path or a list of paths"):
        read_questions(path)


def test_chat_and_terminal(model, files, expected, capsys):
    session = ChatSession(model)
    images = [load_image(str(path)) for path in files]
    assert "".join(session.ask(TEXT, images, SHORT)) == expected
    cached = "".join(session.ask("And now?", (), SHORT))
    assert session.last.cached_tokens > sum(model.image_tokens(images))
    assert cached == "".join(ChatSession.from_turns(model, session.turns[:-1], images).answer(SHORT))
    session.keep(0)
    swapped = "".join(session.ask(TEXT, images[::-1], SHORT))
    assert session.last.cached_tokens == 0
    assert swapped == "".join(ChatSession.from_turns(model, session.turns[:-1], images[::-1]).answer(SHORT)) != expected
    talk = Talk(ChatSession(model), SHORT)
    lines = iter([f"/image {files[0]}", str(files[1]), TEXT])
    with pytest.raises(StopIteration):
        talk.run(lambda: next(lines))
    assert turn_text(talk.session.turns[-1]) == expected
    assert "image 2: " in capsys.readouterr().out


def test_the_server_and_its_limit(model: ChatModel, files: list[Path], expected: str) -> None:
    """More images than the context holds are refused unread."""
    shown = [make_image(data_url(path.read_bytes())) for path in files]
    with served(model, Limits(images=200)) as address:
        client = client_of(address)
        assert ask(client, user(*shown, TEXT)).choices[0].message.content == expected
        for size in ((1, 20_000), (20_000, 1)):
            assert post(address, with_image(data_url(png(size=size)))).status_code == 200, size
        assert post(address, with_image(shown[0]["image_url"]["url"], 200)).status_code == 400
        assert post(address, CHAT).status_code == 200
    with_tiles = bool(model.layout.pinpoints)
    with served(model, Limits(crops=5)) as address:
        costly = post(address, CHAT | {"messages": [user(*shown, TEXT)]})
    assert costly.status_code == (400 if with_tiles else 200)
    assert not with_tiles or "2 images are split into 8 crops" in costly.text
    with pytest.raises(ContextError, match=r"\(16( to 88)? for each image"):
        ChatSession(model).ask(TEXT, [load_image(str(files[0]))] * 32)


def test_training(model: ChatModel, place: Path, files: list[Path], tmp_path: Path) -> None:
    """LLaVA-Interleave's form: a list of images, `<image>` at the start or between words; the prompt is chat's."""
    messages = [
        {"from": "human", "value": f"<image>\n<image>\n{TEXT}"}, {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "<image> against <image>?"}, {"from": "gpt", "value": "Two dogs."},
    ]  # fmt: skip
    layout = model.layout
    tokens = ImageTokens(layout.most, layout.tokens if layout.pinpoints else None)
    record = {"sample_id": 7, "image": [*NAMES, "1.png", "2.png"], "conversations": messages, "metadata": {}}
    path, store = tmp_path / "data.json", ImageStore(place / "images")
    path.write_text(json.dumps([record, record | {"image": [*record["image"], "4.png"]}]))
    with pytest.raises(UserError, match=r"sample 1 .* 5 image\(s\) but 4 <image>"):
        LlavaDataset(path, model.encoder, store, tokens=tokens)
    path.write_text(json.dumps([record]))
    dataset = LlavaDataset(path, model.encoder, store, tokens=tokens)
    load = pixel_loader(store, partial(image_pixels, model.processor.image_processor))
    batch = Collator(model.processor.tokenizer.pad_token_id, placeholder_ids(model.model.config), load)([dataset[0]])
    session = ChatSession(model)
    "".join(session.ask(TEXT, [load_image(str(path)) for path in files], SHORT))
    prompt = session.prompt_ids(session.turns[:1], model.image_tokens(session.images))
    assert batch["input_ids"][0, : len(prompt)].tolist() == prompt
    with torch.no_grad():
        stock = batch | ({"image_sizes": torch.tensor(batch["image_sizes"])} if layout.pinpoints else {})
        expected = model.model(**stock).loss
        loss = TrainingModel(model.model, features=False, packed=False)(batch)[0]
    assert torch.allclose(loss, expected, rtol=1e-5)
    short = type(model.encoder)(model.processor.tokenizer, "auto", model.encoder.num_image_tokens, max_length=60)
    with pytest.raises(UserError, match=r"its 4 image\(s\) take \d+ tokens, more than the context"):
        LlavaDataset(path, short, store, tokens=tokens)
