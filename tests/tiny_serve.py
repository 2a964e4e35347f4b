"""A tiny chat model and a tiny encoder on disk, and pictures as data URLs, for tests of the server."""

from __future__ import annotations

import base64
import dataclasses
import io
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tiny_mllm import clips_model, write_llava, write_run

from clips.config import RunConfig
from clips.data.tokenizer import build_tokenizer
from clips.model.clips import CLIPSModel
from clips.weights.export import write_native

LONG = "Tell me a long story"
"""A question that the tiny model answers until it is stopped."""


def write_models(root: Path, context: int = 4096) -> None:
    """`runs/llava/model` with 16 tokens a picture, and the encoder `runs/clips-demo`."""
    run = root / "runs" / "clips-demo"
    write_run(run)
    tokenizer = build_tokenizer("wordpiece", ["a red cat and two dogs"] * 3, vocab_size=64)
    model = clips_model()
    text = dataclasses.replace(model.config.text, vocab_size=tokenizer.vocab_size)
    config = RunConfig.load(run / "config.json")
    config = dataclasses.replace(config, model=dataclasses.replace(model.config, text=text))
    torch.manual_seed(0)
    encoder = CLIPSModel(config.model, tokenizer.pad_id)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    write_native(encoder, config, tokenizer, run / "export" / "native")
    write_llava(root, context=context)


def models(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The folder of `write_models` with a long context, written once per session."""
    return made_once("tiny-serve", partial(write_models, context=32_768))


def png(colour: str = "red", size: tuple[int, int] = (40, 28)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: str | dict) -> dict:
    """A user's message of texts and pictures."""
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and ends after a few bytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


RED, BLUE = data_url(png("red")), data_url(png("blue"))
CHAT = {"model": "llava", "messages": [user("Hello")], "max_tokens": 4}


def with_picture(url: str, count: int = 1) -> dict:
    return CHAT | {"messages": [user("What is it?", *[picture(url)] * count)]}


def turns(*roles: str) -> dict:
    return CHAT | {"messages": [{"role": role, "content": "Hello"} for role in roles]}


BAD = {
    "no picture": (with_picture(data_url(b"dear picture")), "cannot identify"),
    "a bomb": (with_picture(data_url(png_header(50_000, 50_000))), "pixels"),
    "broken base64": (with_picture("data:image/png;base64,!!!"), "base64"),
    "a file": (with_picture("file:///etc/hostname"), "no address"),
    "a path that climbs out": (with_picture("../../etc/passwd"), "no address"),
    "many pictures": (with_picture(RED, 21), "pictures"),
    "1 MB of text": (CHAT | {"messages": [user("a " * 500_000)]}, "characters"),
    "longer than the context": (CHAT | {"messages": [user("a " * 49_000)]}, "32,768"),
    "huge tokens": (CHAT | {"max_tokens": 10**6}, "max_tokens"),
    "NaN": (CHAT | {"temperature": float("nan")}, "temperature"),
    "empty stop": (CHAT | {"stop": [""]}, "stop"),
    "picture of the assistant": (
        CHAT | {"messages": [user("a"), user(picture(RED)) | {"role": "assistant"}, user("b")]},
        "turn",
    ),
    "unknown role": (turns("tool"), "role"),
    "two users": (turns("user", "user"), "turn"),
    "late system": (turns("user", "system", "user"), "turn"),
    "assistant last": (turns("user", "assistant"), "turn"),
    "no model": ({"messages": [user("Hello")]}, "model"),
    "two answers": (CHAT | {"n": 2}, "n:"),
    "tools": (CHAT | {"tools": [{"type": "function"}]}, "tools"),
    "wrong JSON": (b'{"model": "llava", ', "JSON"),
    "deep JSON": (b"[" * 100_000, "JSON"),
    "not UTF-8": (b'{"model": "\xff"}', "JSON"),
    "millions of values": (b'{"model": "llava", "messages": [' + b"{}," * 600_000, "JSON values"),
}
"""Bodies that get 400 → a word of the reason."""
