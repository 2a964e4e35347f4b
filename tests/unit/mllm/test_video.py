"""Videos: frames within bounds, tokens as LLaVA-OneVision's and transformers', and every route that takes them."""

import copy
import html
import importlib.util
import io
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_chat
import torch
from PIL import Image
from tiny_chat import SHORT, answers_of
from transformers import LlavaOnevisionForConditionalGeneration, pipeline
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, read_video_pyav

from clips import BrokenSample
from clips.common.errors import UserError
from mllm.chat.model import ChatModel
from mllm.chat.session import ChatSession
from mllm.chat.terminal import dropped_files, load_image
from mllm.chat.transcript import Video
from mllm.chat.web import answers
from mllm.data import video
from mllm.data.dataset import ImageTokens, LlavaDataset
from mllm.data.images import ImageStore, pixel_loader
from mllm.data.video import VIDEO, decode_video
from mllm.data.video_frames import chosen, frames_of
from mllm.encoders.load import load_vision
from mllm.encoders.registry import image_pixels
from mllm.evaluation.evaluate import generate_answers
from mllm.model.tiles import TokenLayout, placeholder_ids, pool_tokens
from mllm.training.features import FeatureCache
from mllm.training.trainer import Collator, TrainingModel

av = pytest.importorskip("av")
model = tiny_chat.model  # a fixture

KEPT = 10**6
"""Pixels of a frame above which it is reduced."""


def written(images: Sequence[np.ndarray], kind: str = "mp4", codec: str = "libx264") -> bytes:
    """A video of `images`, uint8 [H, W, 3], at 10 frames a second."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 5
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def grey(count: int, side: int = 32) -> list[np.ndarray]:
    """Images of one grey each, from dark to light."""
    return [np.full((side, side, 3), 20 + 200 * i // count, np.uint8) for i in range(count)]


def test_indices_are_transformers() -> None:
    """Where a video has fewer frames than are drawn, transformers refuses; here frames repeat."""
    for total in (1, 2, 7, 8, 9, 30, 1001):
        for count in (1, 2, 3, 8, 32):
            indices = chosen(total, count)
            assert len(indices) == count
            assert indices == sorted(indices)
            assert 0 <= indices[0] <= indices[-1] < total
            if count <= total:
                assert indices == default_sample_indices_fn(VideoMetadata(total_num_frames=total), count).tolist()


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "libx264"), ("matroska", "libvpx")])
def test_frames_are_those_of_plain_decoding(kind: str, codec: str, tmp_path: Path) -> None:
    """Seeking changes no frame: each is what decoding everything and then choosing gives."""
    data = written(grey(23), kind, codec)
    with av.open(io.BytesIO(data)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for count in (1, 4, 23, 40):
        expected = [every[i * 23 // count] for i in range(count)]
        frames = frames_of(data, count, KEPT)
        assert all(np.array_equal(a, b) for a, b in zip(frames, expected, strict=True)), count
    if kind == "mp4":
        path = tmp_path / "clip.mp4"
        path.write_bytes(data)
        stock, _ = read_video_pyav(str(path), lambda metadata, **_: default_sample_indices_fn(metadata, 4))
        assert np.array_equal(stock, np.stack([np.asarray(image) for image in decode_video(data, 4)]))


def test_large_frames_are_divided_and_turned_ones_upright(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.zeros((48, 80, 3), np.uint8)
    image[:, 40:] = 255
    data = bytearray(written([image]))
    monkeypatch.setattr(video, "KEPT_PIXELS", 1000)
    assert {image.size for image in decode_video(bytes(data), 3)} == {(40, 24)}
    matrix = data.index(b"tkhd") + 44  # as a phone writes it that is held upright: to be turned clockwise
    for place, value in enumerate((0, 1, 0, -1, 0, 0)):
        data[matrix + 4 * place : matrix + 4 * place + 4] = (value << 16).to_bytes(4, "big", signed=True)
    [turned] = frames_of(bytes(data), 1, KEPT)
    assert turned.shape == (80, 48, 3)
    assert turned[:30].mean() < 20 < 230 < turned[50:].mean()


def refused(data: bytes, seconds: float = 60) -> str:
    with pytest.raises(BrokenSample) as error:
        decode_video(data, 8, "clip.mp4", seconds)
    assert error.value.key == "clip.mp4"
    return error.value.reason


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])
    return file.getvalue()


def test_files_that_are_no_videos(tmp_path: Path) -> None:
    """A playlist would make the demuxer open the file that it names."""
    data = written(grey(6))
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(data)
    playlist = f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode()
    concat = f"ffconcat version 1.0\nfile '{secret}'\n".encode()
    for bad in (data[: len(data) // 2], os.urandom(5000), playlist, concat):
        with pytest.raises(av.error.FFmpegError):
            frames_of(bad, 1, KEPT)
    assert "it is no whole mp4, mov, mkv, webm or avi file" in refused(b"just words\n" * 100)
    assert refused(b"") == "video: the file is empty"
    assert refused(sound()) == "video: the file has no video stream"
    start = data.index(b"mdat") + 4
    broken = data[:start] + bytes(data.index(b"moov") - 4 - start) + data[data.index(b"moov") - 4 :]
    assert "video: " in refused(broken)


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bytes, memory and seconds."""
    data = written(grey(40, 16))
    assert "takes more than 0.01 s" in refused(data, seconds=0.01)
    monkeypatch.setattr(video, "MEMORY", 2**26)
    assert refused(data) == "video: it takes too much memory to decode"
    monkeypatch.setattr(video, "MAX_BYTES", 100)
    assert "above the limit of 100" in refused(data)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package av: pip install 'clips-mllm\[video\]'"):
        decode_video(data, 1)


def test_a_decoder_that_crashes_costs_its_video_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(video, "PROGRAM", tmp_path / "decoder.py")
    for number, reason in (("SIGSEGV", "ended with -11"), ("SIGXCPU", "more than 60 s")):
        video.PROGRAM.write_text(f"import os, signal\nos.kill(os.getpid(), signal.{number})\n")
        assert reason in refused(b"any")


FRAMES, TEXT = 4, "What comes second?"


def write_place(root: Path) -> None:
    """A model that sees videos in four frames, six images and two clips."""
    tiny_chat.write_place(root, image_aspect_ratio="anyres", frames=FRAMES)
    random = np.random.default_rng(0)
    for name in ("a.mp4", "b.mp4"):
        images = [np.full((28, 40, 3), random.integers(0, 256, 3), np.uint8) for _ in range(6)]
        (root / "images" / name).write_bytes(written(images))


@pytest.fixture(scope="module")
def place(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return made_once("tiny-video", write_place)


def test_frames_are_pooled_as_transformers_pools_them(model: ChatModel) -> None:
    assert isinstance(model.model, LlavaOnevisionForConditionalGeneration)
    layout, inner = model.layout, model.model.model
    assert layout == TokenLayout(16, 32, layout.pinpoints, FRAMES) == TokenLayout.of(model.model.config)
    cells = torch.randn(2 * FRAMES + layout.crops((30, 80)), 16, 48)
    assert torch.equal(pool_tokens(cells), inner.apply_pooling(cells))
    newline, (first, image, last) = torch.randn(48), cells.split([FRAMES, len(cells) - 2 * FRAMES, FRAMES])
    [tiles], _ = inner.pack_image_features([image], torch.tensor([[30, 80]]), newline)
    videos = [torch.cat([inner.apply_pooling(frames).flatten(0, 1), newline[None]]) for frames in (first, last)]
    rows = layout.arranged(cells, newline, [VIDEO, (30, 80), VIDEO])
    assert torch.equal(rows, torch.cat([videos[0], tiles, videos[1]]))
    stock = model.processor._get_num_multimodal_tokens(image_sizes=[(30, 80)], video_sizes=[(FRAMES, 28, 40)])
    assert [layout.tokens(VIDEO), layout.tokens((30, 80))] == [*stock["num_video_tokens"], *stock["num_image_tokens"]]
    assert (layout.most_crops, layout.tokens(VIDEO), str(layout)) == (5, 17, "16 to 88, 17 for a video,")


def test_pixels_are_the_stock_processor_s(model: ChatModel, place: Path) -> None:
    frames = decode_video((place / "images" / "a.mp4").read_bytes(), FRAMES)
    stock = model.processor.video_processor(
        videos=[np.stack([np.asarray(frame) for frame in frames])], do_sample_frames=False, return_tensors="pt"
    )["pixel_values_videos"][0]
    assert torch.equal(image_pixels(model.processor.image_processor, frames), stock)


def records() -> list[dict[str, Any]]:
    """A video, an image between videos, and neither; `<image>` and `<video>` mark a video alike."""
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat and two dogs."}]
    mixed = [{"from": "human", "value": "<image> and <image> and <video>?"}, {"from": "gpt", "value": "Red."}]
    none = [{"from": "human", "value": "Say <video>"}, {"from": "gpt", "value": "the image"}]
    return [
        {"video": "a.mp4", "conversations": turns},
        {"image": ["b.mp4", "1.png", "a.mp4"], "conversations": mixed},
        {"conversations": none},
    ]


def test_training(model: ChatModel, place: Path, tmp_path: Path) -> None:
    """The loss is the stock model's: on pixels, packed, and on cached features up to their rounding."""
    (tmp_path / "data.json").write_text(json.dumps(records()))
    layout, store = model.layout, ImageStore(place / "images")
    tokens = ImageTokens(layout.most, layout.tokens, layout.frames)
    dataset = LlavaDataset(tmp_path / "data.json", model.encoder, store, tokens=tokens)
    pad = model.processor.tokenizer.pad_token_id
    image_ids = placeholder_ids(model.model.config)
    preprocess = partial(image_pixels, model.processor.image_processor)
    batch = Collator(pad, image_ids, pixel_loader(store, preprocess, FRAMES))([dataset[i] for i in range(3)])
    assert batch["image_sizes"] == [VIDEO, VIDEO, store.size("1.png"), VIDEO]
    ids, pixels = model.encoder, batch["pixel_values"]
    counts = [int((batch["input_ids"] == token).sum()) for token in (ids.video_id, ids.image_id)]
    assert counts == [3 * 17, layout.tokens(store.size("1.png"))]
    crops = layout.crops(store.size("1.png"))
    first, second, image, third = pixels.split([FRAMES, FRAMES, crops, FRAMES])
    shown = {"pixel_values": image, "image_sizes": torch.tensor([store.size("1.png")])}
    stock = {name: batch[name] for name in ("input_ids", "labels", "attention_mask")} | shown
    with torch.no_grad():
        expected = model.model(**stock, pixel_values_videos=torch.stack([first, second, third])).loss
        for packed in (False, True):
            loss = TrainingModel(copy.deepcopy(model.model), features=False, packed=packed)(batch)[0]
            assert torch.allclose(loss, expected, rtol=1e-5)
        vision = load_vision("clips", runs=place / "runs", image_aspect_ratio="anyres", frames=FRAMES)
        cache = FeatureCache(vision, store, tmp_path)
        assert cache.fill(["a.mp4", "b.mp4", "1.png"]) == 3
        cached = Collator(pad, image_ids, cache.get, "image_features")([dataset[i] for i in range(3)])
        loss = TrainingModel(copy.deepcopy(model.model), features=True, packed=False)(cached)[0]
    assert torch.allclose(loss, expected, rtol=2e-3)
    assert vision.fingerprint != load_vision("clips", runs=place / "runs", image_aspect_ratio="anyres").fingerprint


def test_data_that_cannot_be_trained_on(model: ChatModel, place: Path, tmp_path: Path) -> None:
    path, store, layout = tmp_path / "data.json", ImageStore(place / "images"), model.layout
    turns = records()[0]["conversations"]
    for fields, reason in (
        ({"video": "a.gif"}, r"\.mp4"),
        ({"video": "a.mp4", "image": "1.png"}, "'image' and 'video'"),
        ({"video": "none.mp4"}, "is not in"),
    ):
        path.write_text(json.dumps([fields | {"conversations": turns}]))
        with pytest.raises(UserError, match=reason):
            LlavaDataset(path, model.encoder, store, tokens=ImageTokens(layout.most, layout.tokens, FRAMES))
    path.write_text(json.dumps([{"video": "a.mp4", "conversations": turns}]))
    with pytest.raises(UserError, match=r"sample 0 .*takes no videos: train it with .* --frames_upbound 8"):
        LlavaDataset(path, model.encoder, store, tokens=ImageTokens(layout.most, layout.tokens))


@pytest.fixture(scope="module")
def stock(model: ChatModel, place: Path) -> Callable[..., str]:
    """The stock pipeline's answer to TEXT about files. It draws the frames of a video itself."""
    pipe = pipeline("image-text-to-text", model=model.model, processor=model.processor)

    def part(name: str) -> dict[str, Any]:
        path = place / "images" / name
        if not video.is_video(name):
            return {"type": "image", "image": Image.open(path).convert("RGB")}
        with av.open(str(path)) as container:
            every = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        return {"type": "video", "video": every}

    def said(*names: str) -> str:
        messages = [{"role": "user", "content": [*map(part, names), {"type": "text", "text": TEXT}]}]
        [found] = pipe(text=messages, max_new_tokens=8, do_sample=False, return_full_text=False)
        return found["generated_text"].strip()

    return said


@pytest.fixture(scope="module")
def expected(stock: Callable[..., str]) -> str:
    """Of one clip; it is another text for the other clip."""
    assert stock("a.mp4") != stock("b.mp4")
    return stock("a.mp4")


def test_evaluation(model: ChatModel, place: Path, expected: str, stock: Callable[..., str], tmp_path: Path) -> None:
    lines = [{"video": "a.mp4", "text": TEXT}, {"image": "a.mp4", "text": TEXT}, {"image": "0.png", "text": TEXT}]
    lines += [{"image": ["b.mp4", "0.png"], "text": f"<video> and <image>: {TEXT}"}, {"text": TEXT}]
    asked, answers = answers_of(model, lines, place / "images", tmp_path / "questions.jsonl")
    assert [*answers[:3], answers[4]] == [expected, expected, stock("0.png"), stock()]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"question 0: image a.mp4: video: it is no whole mp4"):
        generate_answers(model.model, model.processor, asked[:1], ImageStore(broken))


def test_several_images_are_tiles_as_in_a_flat_list_of_the_stock_processor(model, place, tmp_path):
    """Which is vLLM's, too. The pipeline's nested list makes one square of each: other tokens, other texts."""
    names = ["0.png", "1.png"]
    _, [answer] = answers_of(model, [{"image": names, "text": TEXT}], place / "images", tmp_path / "questions.jsonl")
    photos = [Image.open(place / "images" / name).convert("RGB") for name in names]
    content = [*({"type": "image"} for _ in names), {"type": "text", "text": TEXT}]
    text = model.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    flat, nested = (model.processor(text=[text], images=images, return_tensors="pt") for images in (photos, [photos]))
    count = [int((inputs["input_ids"] == model.encoder.image_id).sum()) for inputs in (flat, nested)]
    assert count == [sum(model.image_tokens(photos)), 2 * (model.layout.tokens_per_crop + 1)]
    output = model.model.generate(**flat, max_new_tokens=8, do_sample=False)
    response = model.processor.tokenizer.decode(output[0, flat["input_ids"].shape[1] :], skip_special_tokens=True)
    assert response.strip() == answer


def test_chat_and_the_page(model: ChatModel, place: Path, expected: str, tmp_path: Path) -> None:
    """A second question reads nothing again."""
    clip = place / "images" / "a.mp4"
    assert dropped_files(str(clip)) == [str(clip)]
    shown, session = load_image(str(clip)), ChatSession(model)
    assert isinstance(shown, Video)
    assert "".join(session.ask(TEXT, [shown], SHORT)) == expected
    later = "".join(session.ask("And now?", [load_image(str(place / "images" / "0.png"))], SHORT))
    assert session.last.cached_tokens > 17
    assert later == "".join(ChatSession.from_turns(model, session.turns[:-1], session.images).answer(SHORT))
    (tmp_path / "no.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="mp4"):
        load_image(str(tmp_path / "no.mp4"))
    assert (
        html.unescape([*answers(model, {"text": TEXT, "files": [str(clip)]}, [], {}, 0.0, 8)][-1])
        == f"{expected}\n\n(cut off after 8 tokens)"
    )
