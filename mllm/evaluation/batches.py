"""Batch questions for `generate`: questions about one image go side by side, and their common beginning is read once.

A prompt is a system text, images and a question. If several rows of a batch show the same images, the model reads the
prompt up to the last image once for each distinct list of images, and its keys and values are copied to the rows.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, DynamicLayer, GenerationConfig, PreTrainedTokenizerBase

from mllm.data.batches import pad_rows
from mllm.data.conversation import IGNORE, ConversationEncoder
from mllm.data.questions import Question
from mllm.data.video import VIDEO, Size
from mllm.encoders.registry import image_pixels
from mllm.model.load import CACHE
from mllm.model.tiles import Llava, LlavaProcessors, newline_of, placeholder_ids

COLDEST = 1e-3
"""Below this temperature decoding is greedy: it is nearly the same, and dividing logits by less would overflow."""


def make_batches(questions: Sequence[Question], prompts: Sequence[list[int]], size: int) -> list[list[int]]:
    """Return batches of at most `size` indices, by length. Questions about one image stay together, or about none."""
    longest: dict[tuple[str, ...], int] = {}
    for question, prompt in zip(questions, prompts, strict=True):
        longest[question.images] = max(longest.get(question.images, 0), len(prompt))
    with_image = [i for i, question in enumerate(questions) if question.images]
    without = [i for i, question in enumerate(questions) if not question.images]
    with_image.sort(key=lambda i: (longest[questions[i].images], questions[i].images, len(prompts[i])))
    without.sort(key=lambda i: len(prompts[i]))
    return [group[start : start + size] for group in (with_image, without) for start in range(0, len(group), size)]


def generate_inputs(
    model: Llava, rows: Sequence[list[int]], shown: Sequence[tuple[int, ...]], images: Sequence[Seen], pad_id: int
) -> dict[str, Any]:
    """Return the arguments of `generate` for the prompts `rows`, with padding between the shared and the other tokens.

    `images` holds the distinct images of the batch. Row i shows those with the indices `shown[i]`, in this order. If
    rows show the same images, the model reads the shared tokens here, once for each distinct list of images, and the
    arguments hold its cache instead of pixels. A model with other than full attention reads them in `generate`.
    """
    device, openings = model.device, list(dict.fromkeys(shown))
    shared = _shared_length(rows, placeholder_ids(model.config)) if len(openings) < len(rows) else 0
    cache = DynamicCache(config=model.config.get_text_config())
    inputs: dict[str, Any] = {}
    # Padding comes after the shared tokens. A sliding window would count it, and a recurrent state would change by it.
    if shared and all(type(layer) is DynamicLayer for layer in cache.layers):
        ids = torch.tensor([rows[0][:shared]], device=device).expand(len(openings), -1)
        model.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), **_pixels(images, openings, model), **{CACHE: cache}
        )
        cache.batch_select_indices(torch.tensor([openings.index(numbers) for numbers in shown], device=device))
        inputs[CACHE] = cache
    else:
        shared = 0
        inputs |= _pixels(images, shown, model)
    begin = torch.tensor([row[:shared] for row in rows], dtype=torch.long)
    ids, mask = (
        torch.cat([first, pad_rows([row[shared:] for row in filled], value, left=True)], 1).to(device)
        for first, filled, value in ((begin, rows, pad_id), (torch.ones_like(begin), [[1] * len(r) for r in rows], 0))
    )
    return inputs | {"input_ids": ids, "attention_mask": mask}


def likelihoods(
    model: Llava, cache: DynamicCache, inputs: dict[str, Any], answers: Sequence[Sequence[list[int]]], size: int
) -> list[dict[str, float]]:
    """Return how likely the first of each row's `answers` (token ids, end included) is, or {} for a row without any.

    `log_likelihood` is in nats per token. `share` is the probability of this answer over that of all answers of the
    row. `cache` was filled by `generate` from `inputs`, and is cut to the prompts. `size` answers are read at a time.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache.crop(ids.shape[1] - 1 - cache.get_seq_length())  # a prompt's last token is read again, before an answer
    pairs = [(row, answer) for row, tried in enumerate(answers) for answer in tried]
    nats: list[float] = []
    for start in range(0, len(pairs), size):
        rows = torch.tensor([row for row, _ in pairs[start : start + size]], device=model.device)
        labels = pad_rows([answer for _, answer in pairs[start : start + size]], IGNORE).to(model.device)
        positions = mask[rows].sum(1, keepdim=True) - 1 + torch.arange(labels.shape[1], device=model.device)
        later = copy.deepcopy(cache)
        later.batch_select_indices(rows)
        logits = model(
            input_ids=torch.cat([ids[rows, -1:], labels[:, :-1].clamp(min=0)], 1),
            attention_mask=torch.cat([mask[rows], torch.ones_like(labels[:, 1:])], 1),
            position_ids=positions,
            **{CACHE: later},
        ).logits
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
        nats += (-losses.sum(1)).tolist()

    measured: list[dict[str, float]] = []
    for tried in answers:
        by_answer, nats = nats[: len(tried)], nats[len(tried) :]
        share = torch.tensor(by_answer).softmax(0)[:1].tolist()
        measured.append({"log_likelihood": by_answer[0] / len(tried[0]), "share": share[0]} if by_answer else {})
    return measured


Seen = tuple[Tensor, Size]
"""The crops [T, 3, S, S] of an image or video, which the encoder reads, and its (height, width), or VIDEO."""


def seen(processor: LlavaProcessors, image: Image.Image | list[Image.Image]) -> Seen:
    """Return the preprocessed crops of an image, or of a video given by its frames, and its size."""
    size = VIDEO if isinstance(image, list) else (image.height, image.width)
    return image_pixels(processor.image_processor, image), size


def pixel_inputs(visuals: Sequence[Seen], model: Llava) -> dict[str, Tensor]:
    """Return the model's arguments for images and videos in the order of their placeholders, or {} without any."""
    inputs = {}
    images = [(pixels, size) for pixels, size in visuals if size != VIDEO]
    videos = [pixels for pixels, size in visuals if size == VIDEO]
    if images:
        inputs["pixel_values"] = torch.cat([pixels for pixels, _ in images]).to(model.device, model.dtype)
        if newline_of(model) is not None:
            inputs["image_sizes"] = torch.tensor([size for _, size in images])
    if videos:
        inputs["pixel_values_videos"] = torch.stack(videos).to(model.device, model.dtype)
    return inputs


def _pixels(images: Sequence[Seen], shown: Sequence[tuple[int, ...]], model: Llava) -> dict[str, Tensor]:
    """Return the model's arguments for the images that the rows show, one row after the other."""
    return pixel_inputs([images[number] for numbers in shown for number in numbers], model)


def answer_settings(
    encoder: ConversationEncoder, max_new_tokens: int, temperature: float, top_p: float = 1.0
) -> GenerationConfig:
    """Return the settings of `generate`, with every field that the model's own settings could change."""
    pad = encoder.tokenizer.pad_token_id
    drawn: dict[str, Any] = {"do_sample": False}
    if temperature >= COLDEST:
        drawn = {"do_sample": True, "temperature": float(temperature), "top_p": top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        num_beams=1,
        eos_token_id=encoder.stop_ids,
        pad_token_id=encoder.stop_ids[0] if pad is None else pad,
        **drawn,
    )


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch inside the block, and restore its random state afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def new_texts(tokenizer: PreTrainedTokenizerBase, new_ids: Tensor, stop_ids: Collection[int]) -> list[tuple[str, bool]]:
    """Return for each row of generated ids [B, T] its text, and True if it ended before the limit on tokens."""
    texts = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    ended = [any(token in stop_ids for token in row) for row in new_ids.tolist()]
    return [(text.strip(), has_ended) for text, has_ended in zip(texts, ended, strict=True)]


def _shared_length(rows: Sequence[list[int]], image_ids: Collection[int]) -> int:
    """Return how many first tokens all rows share, or 0 if a later one is an image. Each keeps a token of its own."""
    limit = min(map(len, rows)) - 1
    shared = next((i for i in range(limit) if len({row[i] for row in rows}) > 1), limit)
    return 0 if any(token in image_ids for row in rows for token in row[shared:]) else shared
