"""What reading a picture once for all its questions saves: the demo's questions, in turns within one run.

Both sides get the same batches and the same number of new tokens. Each batch gives one ratio, and their median counts.
On a CPU the time is what its threads computed, each of them: what else runs there counts little.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from clips.common.errors import UserError
from clips.common.runtime import choose_device
from clips.common.timing import busy_seconds
from mllm.data.conversation import answering_encoder
from mllm.data.demo import DEMO_DIR, IMAGES, QUESTIONS, ensure_llava_demo
from mllm.data.images import ImageStore
from mllm.data.questions import read_questions
from mllm.encoders.registry import image_pixels
from mllm.evaluation.batches import generate_inputs, make_batches
from mllm.evaluation.evaluate import answer_dtype
from mllm.model.load import load_llava, newest_model

NEW_TOKENS = 4
"""A short answer."""


@torch.inference_mode()
def benchmark_questions(model_path: str | None, *, device: str, repeats: int, batch_size: int = 32) -> dict[str, Any]:
    """Questions per second on `repeats` of the demo's batches, with the picture read once ("ours") and for each."""
    if repeats < 1:
        raise UserError(f"--repeats {repeats} must be at least 1")
    on = choose_device(device)
    model, processor = load_llava(model_path or str(newest_model()), on, answer_dtype("auto", on))
    demo = ensure_llava_demo(DEMO_DIR)
    store, questions = ImageStore(demo / IMAGES), read_questions(demo / QUESTIONS)
    encoder = answering_encoder(processor.tokenizer, "auto", model.config.image_seq_length)
    pad_id = processor.tokenizer.pad_token_id
    turns = [[{"type": "image"}, {"type": "text", "text": question.text}] for question in questions]
    prompts = [encoder.prompt([{"from": "human", "value": turn}], 1) for turn in turns]
    settings = GenerationConfig(min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, pad_token_id=pad_id)

    def answer(rows: list[list[int]], owners: list[int], pixels: Tensor) -> float:
        begin = busy_seconds(on)
        model.generate(**generate_inputs(model, rows, owners, pixels, pad_id), generation_config=settings)
        return busy_seconds(on) - begin

    batches = make_batches(questions, prompts, batch_size)
    step = max(len(batches) // (repeats + 1), 1)
    pairs: list[tuple[int, float, float]] = []
    for chosen in batches[::step][: repeats + 1]:
        rows, shown = [prompts[i] for i in chosen], [str(questions[i].image) for i in chosen]
        distinct = list(dict.fromkeys(shown))
        owners = [distinct.index(name) for name in shown]
        found = [image_pixels(processor.image_processor, store.load(name)) for name in distinct]
        pixels = torch.stack(found).to(on, model.dtype)
        # As many pictures as rows: nothing is shared.
        once, each = answer(rows, owners, pixels), answer(rows, list(range(len(rows))), pixels[owners])
        pairs.append((len(rows), once, each))
    measured = pairs[1:]  # the first pair warms up
    if not measured:
        raise UserError(f"the demo's questions make {len(batches)} batch(es) only")
    return {
        "what": f"questions/s, batches of {batch_size}, {NEW_TOKENS} new tokens",
        "ours": sum(count for count, _, _ in measured) / sum(ours for _, ours, _ in measured),
        "theirs": sum(count for count, _, _ in measured) / sum(theirs for _, _, theirs in measured),
        "ratio": statistics.median(theirs / ours for _, ours, theirs in measured),
    }
