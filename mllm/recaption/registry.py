"""Captioners by name. Nothing behind `make_captioner` asks for the kind.

llava:DIR|ID                a LLaVA-style model trained here, or any other of that kind
hf:ID|DIR                   any image-text-to-text model of transformers
endpoint:URL[,URL…][#MODEL] OpenAI-style servers: vLLM, SGLang, scripts/serve.py, …
clips:RUN                   the captioner of a CLIPS encoder trained with model.captioner.inputs=tokens
"""

from __future__ import annotations

from pathlib import Path

from clips import is_of_demo
from clips.common.errors import UserError
from clips.common.files import read_json
from mllm.recaption.asking import Prompt
from mllm.recaption.captioner import Captioner

KINDS = {"llava": "DIR_OR_ID", "hf": "ID_OR_DIR", "endpoint": "URL[,URL…][#MODEL]", "clips": "RUN"}
"""Kind → what follows the colon."""


def parse_captioner(spec: str) -> tuple[str, str]:
    """(kind, argument) of a captioner's name. Raises UserError if the kind is unknown or the argument is missing."""
    kind, _, argument = spec.partition(":")
    if kind not in KINDS or not argument:
        known = ", ".join(f"{name}:{what}" for name, what in KINDS.items())
        raise UserError(f"captioner {spec!r} is not known; known are: {known}")
    return kind, argument


def knows_the_demo_alone(spec: str) -> bool:
    """Whether the captioner was trained here, on the demo: it has names for its drawings and for nothing else.

    A model without a record of its data, and a captioner elsewhere, count as trained on other data.
    """
    kind, _, argument = spec.partition(":")
    directory = Path(argument)
    if kind != "clips":
        from mllm.model.load import data_of

        return "demo" in data_of(directory)
    configs = (directory / place / "config.json" for place in ("", "native", "export/native"))
    config = next((read_json(path) for path in configs if path.is_file()), {})
    return is_of_demo((config.get("data") or {}).get("train") or "")


def finds_the_demo_in(data: str, spec: str) -> bool:
    """Whether the captioner was trained on the demo and `data` is other data: its captions are wrong then."""
    return not is_of_demo(data) and knows_the_demo_alone(spec)


def make_captioner(
    spec: str,
    prompt: Prompt | None = None,
    *,
    device: str = "auto",
    batch_size: int = 32,
    max_new_tokens: int = 256,
    in_flight: int = 32,
) -> Captioner:
    """The captioner `spec` (see the top of this file), ready to write.

    A `clips` captioner reads no prompt and has its own longest caption. `batch_size` counts the pairs that a model in
    this process reads at once, `in_flight` the requests at each server. Raises UserError for an unknown name, a model
    that cannot be loaded, and a setting out of range.
    """
    kind, argument = parse_captioner(spec)
    if batch_size < 1 or max_new_tokens < 1:
        raise UserError(f"a batch of {batch_size} pairs or {max_new_tokens} new tokens: both must be at least 1")
    prompt = prompt or Prompt()
    # Each kind has heavy imports of its own; an endpoint has none.
    if kind == "endpoint":
        from mllm.recaption.endpoint import EndpointCaptioner

        return EndpointCaptioner(argument, prompt, max_new_tokens=max_new_tokens, in_flight=in_flight)
    if kind == "clips":
        from mllm.recaption.clips_captioner import ClipsCaptioner

        return ClipsCaptioner(argument, device=device, batch_size=batch_size)
    from mllm.recaption.local import LocalCaptioner

    return LocalCaptioner(kind, argument, prompt, device=device, batch_size=batch_size, max_new_tokens=max_new_tokens)
