"""llama.cpp's own server on a pair of GGUF files (package xllamacpp), in a process of its own: it aborts on errors."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image

# One thread, one talk at a time. Keys and values in fp32 and plain attention, so that what is left of a difference is
# the files' and not the server's economy.
SERVE = """
import sys
import xllamacpp as x
params = x.CommonParams()
params.model.path, params.mmproj.path = sys.argv[1:]
params.n_ctx, params.n_parallel, params.use_jinja, params.warmup = 1024, 1, True, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
server = x.Server(params)
print("listening on", server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaServer:
    """A context that serves `model` and `mmproj` on a free port of this machine."""

    def __init__(self, model: Path, mmproj: Path) -> None:
        self._files = [str(model), str(mmproj)]

    def __enter__(self) -> LlamaServer:
        command = [sys.executable, "-c", SERVE, *self._files]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        words = self._process.stdout.readline().split()
        if words[:2] != ["listening", "on"]:
            raise AssertionError(self._process.communicate()[1])
        self._address = words[2]
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=60)  # closes its input, and it ends

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(f"{self._address}{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)

    def answer(self, messages: list[dict[str, Any]], tokens: int) -> str:
        """The greedy answer."""
        sampling = {"temperature": 0, "max_tokens": tokens}
        choice = self.post("/v1/chat/completions", {"messages": messages} | sampling)["choices"][0]
        return choice["message"]["content"]

    def first_token(self, messages: list[dict[str, Any]]) -> dict[int, float]:
        """Log-probabilities of the ten likeliest first tokens of the answer.

        They are taken before any bias. What is said is forced to be a letter: an end token, or half a character, comes
        without them.
        """
        letter = self.post("/tokenize", {"content": "A"})["tokens"][0]
        asked = {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 10}
        body = {"messages": messages, "logit_bias": {str(letter): 1000}} | asked
        choice = self.post("/v1/chat/completions", body)["choices"][0]
        return {token["id"]: token["logprob"] for token in choice["logprobs"]["content"][0]["top_logprobs"]}

    def prompt_ids(self, messages: list[dict[str, Any]], picture: list[int]) -> list[int]:
        """What the language model reads, with the ids `picture` where a picture's tokens are."""
        prompt = self.post("/apply-template", {"messages": messages})["prompt"]
        before, *after = prompt.split("<__media")
        texts = [before, *(piece.split("__>", 1)[1] for piece in after)]
        ids: list[int] = []
        for i, text in enumerate(texts):
            ids += picture if i else []
            ids += self.post("/tokenize", {"content": text, "parse_special": True})["tokens"]
        return ids


def user(image: Image.Image | None, *texts: str) -> dict[str, Any]:
    """A user's message: texts, and behind them the picture."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text} for text in texts]
    if image is not None:
        file = io.BytesIO()
        image.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": parts}
