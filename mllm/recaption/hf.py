"""Any image-text-to-text model of transformers as a captioner, with its own processor and chat template."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from clips.common.errors import UserError, first_line
from clips.common.hub import resolve
from clips.common.runtime import choose_device
from clips.common.stock import NO_CODE, REPORTED, check_complete, loading
from mllm.evaluation.batches import drawn_at, new_texts
from mllm.evaluation.evaluate import answer_dtype
from mllm.recaption.asking import Prompt, without_control_tokens
from mllm.recaption.batched import BatchedCaptioner
from mllm.recaption.captioner import Written


class TransformersCaptioner(BatchedCaptioner[tuple[str, Image.Image]]):
    """`hf:ID_OR_DIR`. The chat template is filled as text, so control tokens are removed from each hint.

    Raises UserError if the model cannot be loaded, has no chat template, or cannot read one picture.
    """

    kind = "hf"

    def __init__(self, name: str, prompt: Prompt, *, device: str, batch_size: int, max_new_tokens: int) -> None:
        directory, place = resolve(name, "captioner"), choose_device(device)
        dtype = answer_dtype("auto", place)
        # Fused attention in bf16 is slow on CPUs, see mllm/model/load.py.
        attention = "eager" if place.type == "cpu" and dtype == torch.bfloat16 else None
        with loading("captioner", directory):
            processor = AutoProcessor.from_pretrained(directory, **NO_CODE)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                directory, dtype=dtype, attn_implementation=attention, **REPORTED, **NO_CODE
            )
        model, info = loaded
        check_complete(info, "captioner", directory)
        self.model, self.processor = model.to(place).eval(), processor
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
        super().__init__(directory, prompt, place, batch_size=batch_size, max_new_tokens=max_new_tokens)
        try:
            self._inputs([self.item(Image.new("RGB", (64, 48)), "")[1]])
        except (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise UserError(f"captioner: {directory} cannot be asked about one picture: {first_line(error)}") from None

    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def pixels(self, image: Image.Image) -> Image.Image:
        return image

    def item(self, pixels: Image.Image, hint: str) -> tuple[int, tuple[str, Image.Image]]:
        """The size is the number of pixels, which decides the number of tokens for many models."""
        text = self.prompt.fill(without_control_tokens(hint, self.control))
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        rendered = self.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        return pixels.width * pixels.height, (rendered, pixels)

    def _inputs(self, items: list[tuple[str, Image.Image]]) -> Any:
        texts, images = [text for text, _ in items], [[image] for _, image in items]
        bos = self.tokenizer.bos_token
        has_bos = bos is not None and texts[0].startswith(bos)  # of the template; the tokenizer would add another
        return self.processor(
            text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=not has_bos
        )

    def generate(self, items: list[tuple[str, Image.Image]], temperature: float) -> list[Written | Exception]:
        try:
            inputs = self._inputs(items).to(self.device, self.model.dtype)
        except (ValueError, IndexError) as error:  # the processor refuses a shape
            if len(items) == 1:
                return [ValueError(f"image: the model's processor refuses it: {first_line(error)}")]
            return [found for item in items for found in self.generate([item], temperature)]
        settings = copy.deepcopy(self.model.generation_config)
        settings.update(
            **{"temperature": None, "top_p": None, "top_k": None} | drawn_at(temperature),
            num_beams=1,
            max_length=None,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(self.stop_ids) or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        output = self.model.generate(**inputs, generation_config=settings)
        begin = 1 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return [Written(*found) for found in new_texts(self.tokenizer, output[:, begin:], self.stop_ids)]
