"""A LLaVA-style model trained here as a captioner, asked in the format that it was trained with."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from clips.common.hub import resolve
from clips.common.runtime import choose_device
from mllm.data.conversation import answering_encoder
from mllm.encoders.registry import image_pixels
from mllm.evaluation.batches import drawn_at, generate_inputs, new_texts
from mllm.evaluation.evaluate import answer_dtype
from mllm.model.load import load_llava
from mllm.recaption.asking import Prompt
from mllm.recaption.batched import BatchedCaptioner
from mllm.recaption.captioner import Written


class LlavaCaptioner(BatchedCaptioner[tuple[list[int], Tensor]]):
    """`llava:DIR` or a hub id. A typed `<image>` or end of turn stays text (mllm/data/conversation.py).

    Raises UserError if the model cannot be loaded.
    """

    kind = "llava"

    def __init__(self, name: str, prompt: Prompt, *, device: str, batch_size: int, max_new_tokens: int) -> None:
        directory, place = resolve(name, "captioner"), choose_device(device)
        self.model, self.processor = load_llava(str(directory), place, answer_dtype("auto", place))
        config = self.model.config
        self.encoder = answering_encoder(self.processor.tokenizer, "auto", config.image_seq_length)
        self.context = getattr(config.get_text_config(), "max_position_embeddings", None)
        super().__init__(directory, prompt, place, batch_size=batch_size, max_new_tokens=max_new_tokens)

    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def pixels(self, image: Image.Image) -> Tensor:
        return image_pixels(self.processor.image_processor, image)

    def item(self, pixels: Tensor, hint: str) -> tuple[int, tuple[list[int], Tensor]]:
        value = [{"type": "image"}, {"type": "text", "text": self.prompt.fill(hint)}]
        ids = self.encoder.prompt([{"from": "human", "value": value}], 1)
        if self.context is not None and len(ids) + self.max_new_tokens > self.context:
            raise ValueError(
                f"the prompt takes {len(ids)} tokens, with {self.max_new_tokens} new ones more than the context of "
                f"{self.context}"
            )
        return len(ids), (ids, pixels)

    def generate(self, items: list[tuple[list[int], Tensor]], temperature: float) -> list[Written | Exception]:
        rows, pixels = [ids for ids, _ in items], torch.stack([found for _, found in items])
        pad_id = self.processor.tokenizer.pad_token_id
        settings: Any = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=1.0,
            eos_token_id=self.encoder.stop_ids,
            pad_token_id=pad_id,
            **drawn_at(temperature),
        )
        pixels = pixels.to(self.device, self.model.dtype)
        inputs = generate_inputs(self.model, rows, range(len(rows)), pixels, pad_id)
        output = self.model.generate(**inputs, generation_config=settings)
        new_ids = output[:, inputs["input_ids"].shape[1] :]
        return [Written(*found) for found in new_texts(self.processor.tokenizer, new_ids, self.encoder.stop_ids)]
