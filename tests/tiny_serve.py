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
    "text named .png": (with_picture(data_url(b"dear picture")), "messages", "cannot identify image file"),
    "empty picture": (with_picture("data:image/png;base64,"), "messages", "empty"),
    "huge picture": (with_picture(data_url(png_header(50_000, 50_000))), "messages", "pixels"),
    "truncated picture": (with_picture(data_url(png()[:45])), "messages", "cannot be read"),
    "broken base64": (with_picture("data:image/png;base64,!!!"), "messages", "base64 is broken"),
    "base64 cut short": (with_picture(RED[:-3]), "messages", "base64 is broken"),
    "no base64": (with_picture("data:image/svg+xml,<svg/>"), "messages", "must look like"),
    "no URL": (with_picture("cat.png"), "messages", "http:// and https:// addresses only"),
    "21 pictures": (with_picture(RED, 21), "messages", "21 pictures are above this server's limit of 20"),
    "1 MB of text": (CHAT | {"messages": [user("a " * 500_000)]}, "messages", "1,000,000 characters"),
    "longer than the context": (
        CHAT | {"messages": [user("a " * 49_000)]},
        "messages",
        "the model reads 32,768 at most",
    ),
    "negative tokens": (CHAT | {"max_tokens": -1}, "max_tokens", "greater than or equal to 1"),
    "no tokens": (CHAT | {"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
    "huge tokens": (CHAT | {"max_tokens": 10**30}, "max_tokens", "limit of 30000"),
    "tokens as text": (CHAT | {"max_tokens": "many"}, "max_tokens", "valid integer"),
    "NaN": (CHAT | {"temperature": float("nan")}, "temperature", "finite"),
    "infinite": (CHAT | {"top_p": float("inf")}, "top_p", "finite"),
    "cold": (CHAT | {"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    "top_p 0": (CHAT | {"top_p": 0}, "top_p", "greater than 0"),
    "empty stop": (CHAT | {"stop": [""]}, "stop[0]", "at least 1 character"),
    "five stops": (CHAT | {"stop": list("abcde")}, "stop", "at most 4"),
    "a stop of 1 MB": (CHAT | {"stop": "a" * 2**20}, "stop[0]", "at most 256 characters"),
    "seed": (CHAT | {"seed": -1}, "seed", "greater than or equal to 0"),
    "no messages": (CHAT | {"messages": []}, "messages", "at least 1 item"),
    "empty message": (CHAT | {"messages": [user(" \n")]}, "messages[0].content", "message is empty"),
    "no content": (CHAT | {"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    "null content": (CHAT | {"messages": [{"role": "user", "content": None}]}, "messages[0].content", "valid array"),
    "unknown part": (CHAT | {"messages": [user({"type": "input_audio"})]}, "messages[0].content[0]", "expected tags"),
    "picture without URL": (
        CHAT | {"messages": [user({"type": "image_url", "image_url": {}})]},
        "messages[0].content[0].image_url.url",
        "required",
    ),
    "picture of the assistant": (
        CHAT | {"messages": [user("a"), user(picture(RED)) | {"role": "assistant"}, user("b")]},
        "messages",
        "only messages from role 'user'",
    ),
    "unknown role": (turns("tool"), "messages[0].role", "'assistant'"),
    "assistant first": (turns("assistant", "user"), "messages[0].role", "must be 'user', found 'assistant'"),
    "two users": (turns("user", "user"), "messages[1].role", "must be 'assistant', found 'user'"),
    "late system": (turns("user", "system", "user"), "messages[1].role", "found 'system'"),
    "two systems": (turns("system", "system", "user"), "messages[1].role", "must be 'user', found 'system'"),
    "assistant last": (turns("user", "assistant"), "messages", "last one must be from role 'user'"),
    "system only": (turns("system"), "messages", "last one must be from role 'user'"),
    "no model": ({"messages": [user("Hello")]}, "model", "required"),
    "tools": (CHAT | {"tools": [{"type": "function"}]}, "tools", "not supported"),
    "n 2": (CHAT | {"n": 2}, "n", "not supported"),
    "logprobs": (CHAT | {"logprobs": True}, "logprobs", "not supported"),
    "JSON format": (CHAT | {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    "wrong JSON": (b'{"model": "llava", ', None, "Invalid JSON"),
    "deep JSON": (b"[" * 100_000, None, "Invalid JSON"),
    "half a character": (rb'{"model": "llava", "messages": "\ud800"}', None, "Invalid JSON"),
    "not UTF-8": (b'{"model": "\xff"}', None, "Invalid JSON"),
    "a list": ([], None, "object"),
    "many messages": (b'{"model": "llava", "messages": [' + b"{}," * 600_000, None, "limit of JSON values"),
    "many parts": (
        b'{"model": "llava", "messages": [{"role": "user", "content": [' + b"0," * 900_000,
        None,
        "limit of JSON values",
    ),
    "many small messages": (turns(*["user"] * 1001), "messages", "at most 1000 items"),
    "nothing": (b"", None, "Invalid JSON"),
}
