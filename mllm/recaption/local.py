"""A model in this process as a captioner, with its own processor and chat template.

Threads decode the pictures. A batch costs as much as its largest row, so one call takes several batches (`GROUP`) and
sorts their pairs by size.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from clips import BrokenSample, decode_image
from clips.common.errors import UserError, first_line
from clips.common.hub import model_digest, resolve
from clips.common.opening import check_size
from clips.common.runtime import choose_device
from clips.common.stock import NO_CODE, REPORTED, check_complete, loading
from mllm.chat.limits import KEPT_PIXELS
from mllm.evaluation.batches import drawn_at, new_texts, seeded
from mllm.evaluation.evaluate import answer_dtype
from mllm.model.load import load_llava
from mllm.model.tiles import Layout
from mllm.recaption.asking import RETRY_TEMPERATURE, Prompt, hint_of, temperature_of, without_control_tokens
from mllm.recaption.captioner import Pair, Written

GROUP = 4
"""Batches of `generate` in one call of `write`."""


@dataclass(frozen=True)
class _Item:
    """A pair in the model's form."""

    text: str
    image: Image.Image
    size: int


class LocalCaptioner:
    """`llava:DIR_OR_ID` (a LLaVA-style model) or `hf:ID_OR_DIR` (any image-text-to-text model of transformers).

    The chat template is filled as text, so control tokens are removed from each hint.

    Args:
        batch_size: pairs of one `generate`.

    Raises UserError if the model cannot be loaded, has no chat template, or cannot read one picture.
    """

    def __init__(
        self, kind: str, name: str, prompt: Prompt, *, device: str, batch_size: int, max_new_tokens: int
    ) -> None:
        self.kind, self.prompt, self.max_new_tokens = kind, prompt, max_new_tokens
        self.batch_size, self._rows = GROUP * batch_size, batch_size
        self.device = choose_device(device)
        directory, dtype = resolve(name, "captioner"), answer_dtype("auto", self.device)
        if kind == "llava":
            self.model, self.processor = load_llava(str(directory), self.device, dtype)
        else:
            self.model, self.processor = _load(directory, self.device, dtype)
        # Rows differ in their pictures' tokens, not only in their texts.
        self._by_area = kind != "llava" or bool(Layout.of(self.model.config).pinpoints)
        self._weights = model_digest(directory, whole=True)
        self._readers = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="pictures")
        self._set_tokens(directory)
        try:
            self._inputs([self._item(Image.new("RGB", (64, 48)), "")])
        except (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise UserError(f"captioner: {directory} cannot be asked about one picture: {first_line(error)}") from None

    def _set_tokens(self, directory: Path) -> None:
        """Set tokenizer, end tokens, control tokens and context. Raises UserError if the processor lacks a part."""
        processor, model = self.processor, self.model
        self.tokenizer: Any = getattr(processor, "tokenizer", None)
        if self.tokenizer is None or getattr(processor, "image_processor", None) is None:
            raise UserError(f"captioner: {directory} has no processor for pictures and text (processor_config.json)")
        if not (getattr(processor, "chat_template", None) or self.tokenizer.chat_template):
            raise UserError(f"captioner: {directory} has no chat template")
        self.tokenizer.padding_side = "left"  # answers begin where the rows end
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        stop = model.generation_config.eos_token_id
        stop = self.tokenizer.eos_token_id if stop is None else stop
        self.stop_ids = set(stop) if isinstance(stop, list) else {stop} - {None}
        marks = [value for key, value in vars(processor).items() if key.endswith("_token") and isinstance(value, str)]
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        # A single character or a run of spaces is no control token, and every text has them.
        self.control = {text for text in (*added, *marks) if len(text.strip()) > 1}
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "weights": self._weights,
            "prompt": self.prompt.digest,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "batch_size": self._rows,  # rounding depends on a row's neighbours
            "max_new_tokens": self.max_new_tokens,
            "retry_temperature": RETRY_TEMPERATURE,
        }

    @torch.inference_mode()
    def write(self, pairs: Sequence[Pair], attempt: int) -> list[Written | Exception]:
        written: dict[int, Written | Exception] = {}
        items: dict[int, _Item] = {}
        for i, (pair, read) in enumerate(zip(pairs, self._readers.map(_decoded, pairs), strict=True)):
            if isinstance(read, BrokenSample):
                written[i] = read
            else:
                items[i] = self._item(read, hint_of(pair.web))
        order = sorted(items, key=lambda i: (-items[i].size, i))  # the largest first: a full GPU shows at once
        for start in range(0, len(order), self._rows):
            chosen = order[start : start + self._rows]
            with seeded(self.device, attempt):
                found = self._generate([items[i] for i in chosen], temperature_of(attempt))
            written |= zip(chosen, found, strict=True)
        return [written[i] for i in range(len(pairs))]

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _item(self, image: Image.Image, hint: str) -> _Item:
        """The size of a row is its text where pictures are one square, else its picture's area."""
        text = self.prompt.fill(without_control_tokens(hint, self.control))
        turn: Any = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        rendered: Any = self.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        return _Item(rendered, image, image.width * image.height if self._by_area else len(rendered))

    def _inputs(self, items: list[_Item]) -> Any:
        bos = self.tokenizer.bos_token
        has_bos = bos is not None and items[0].text.startswith(bos)  # of the template; the tokenizer would add another
        texts, images = [item.text for item in items], [[item.image] for item in items]
        return self.processor(
            text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=not has_bos
        )

    def _generate(self, items: list[_Item], temperature: float) -> list[Written | Exception]:
        """The result for each item. If a batch fails, each item is tried alone, and the failing item is refused."""
        try:
            inputs = self._inputs(items).to(self.device, self.model.dtype)
            length = inputs["input_ids"].shape[1] + self.max_new_tokens
            if self.context is not None and length > self.context:
                raise ValueError(
                    f"the prompt and {self.max_new_tokens} new tokens take {length} tokens, more than the context of "
                    f"{self.context}"
                )
        except (ValueError, IndexError) as error:  # a long text, or a shape that the processor refuses
            if len(items) == 1:
                return [ValueError(f"the model cannot read this pair: {first_line(error)}")]
            return [found for item in items for found in self._generate([item], temperature)]
        settings = copy.deepcopy(self.model.generation_config)
        settings.update(
            **{"temperature": None, "top_p": None, "top_k": None} | drawn_at(temperature),
            num_beams=1,
            max_length=None,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(self.stop_ids) or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        output: Any = self.model.generate(**inputs, generation_config=settings)
        begin = 1 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return [Written(*found) for found in new_texts(self.tokenizer, output[:, begin:], self.stop_ids)]


def _load(directory: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    # Fused attention in bf16 is slow on CPUs, see mllm/model/load.py.
    attention = "eager" if device.type == "cpu" and dtype == torch.bfloat16 else None
    with loading("captioner", directory):
        config = AutoConfig.from_pretrained(directory, **NO_CODE)
        check_size("captioner", directory, lambda: AutoModelForImageTextToText.from_config(config, **NO_CODE))
        processor = AutoProcessor.from_pretrained(directory, **NO_CODE)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=dtype, attn_implementation=attention, **REPORTED, **NO_CODE
        )
    model, info = loaded
    check_complete(info, "captioner", directory)
    return model.to(device).eval(), processor


def _decoded(pair: Pair) -> Image.Image | BrokenSample:
    try:
        return decode_image(pair.image, pair.key, reduce_to=KEPT_PIXELS)
    except BrokenSample as broken:
        return broken
