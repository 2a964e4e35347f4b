"""What captioning costs beside the bare model, and how busy an endpoint is kept: ratios within one run.

Of a model in this process: the same demo pairs through the captioner and through the stock processor and `generate`, in
turns, equal numbers of new tokens; each pair of turns gives one ratio, and their median counts. On a CPU the time is
what its threads computed: what else runs there counts little.
"""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import closing
from typing import Any

import torch
from transformers import GenerationConfig

from clips import Fields, decode_image, demo_split, ensure_any_demo, open_source
from clips.common.errors import UserError
from clips.common.timing import busy_seconds
from mllm.model.load import newest_model
from mllm.recaption.asking import Prompt, hint_of
from mllm.recaption.captioner import Pair
from mllm.recaption.endpoint import EndpointCaptioner
from mllm.recaption.llava import LlavaCaptioner
from mllm.recaption.options import DEMO

ROWS = 16
"""Pairs of one `generate`."""
NEW_TOKENS = 48
"""A caption of the demo."""
SAMPLED_S = 0.1
"""Between two looks at the requests in flight."""


def benchmark_captions(model_path: str | None, *, device: str, repeats: int) -> dict[str, Any]:
    """Pictures per second of `llava:` ("ours") and of the stock way ("theirs"), from encoded pictures to texts."""
    if repeats < 1:
        raise UserError(f"--repeats {repeats} must be at least 1")
    name = model_path or str(newest_model())
    with closing(LlavaCaptioner(name, Prompt(), device=device, batch_size=ROWS, max_new_tokens=NEW_TOKENS)) as ours:
        ours.encoder.stop_ids = [ours.encoder.image_id]  # which no model says: every caption has its full length
        pairs = demo_pairs((repeats + 1) * ours.batch_size)
        measured = []
        for number in range(repeats + 1):
            group = pairs[number * ours.batch_size : (number + 1) * ours.batch_size]
            seconds = {}
            for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                begin = busy_seconds(ours.device)
                if side == "ours":
                    ours.write(group, 0)
                else:
                    _stock(ours, group)
                seconds[side] = busy_seconds(ours.device) - begin
            measured.append(seconds)
        size = ours.batch_size
    measured = measured[1:]  # the first pair warms up
    return {
        "what": f"captions/s, batches of {ROWS}, {NEW_TOKENS} new tokens, against bare generate",
        "ours": size * repeats / sum(seconds["ours"] for seconds in measured),
        "theirs": size * repeats / sum(seconds["theirs"] for seconds in measured),
        "ratio": statistics.median(seconds["theirs"] / seconds["ours"] for seconds in measured),
    }


@torch.inference_mode()
def _stock(captioner: LlavaCaptioner, pairs: list[Pair]) -> list[str]:
    """What one writes with transformers alone: batches in the order of the data, processor, `generate`."""
    processor: Any = captioner.processor  # whose annotation knows no lists of parts
    model = captioner.model
    processor.tokenizer.padding_side = "left"
    settings: Any = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=captioner.encoder.stop_ids,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    texts: list[str] = []
    for start in range(0, len(pairs), ROWS):
        rows = pairs[start : start + ROWS]
        asked = [{"type": "image"}, {"type": "text", "text": ""}]
        prompts = []
        for pair in rows:
            asked[1]["text"] = captioner.prompt.fill(hint_of(pair.web))
            turn = {"role": "user", "content": asked}
            prompts.append(processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))
        images = [decode_image(pair.image, pair.key) for pair in rows]
        inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        output = model.generate(**inputs, generation_config=settings)
        texts += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def benchmark_endpoint(addresses: str, *, in_flight: int, calls: int) -> dict[str, Any]:
    """Requests in flight over time while `calls` calls of an endpoint captioner follow each other.

    "ours" is their mean from the first answer until fewer pairs are left than places, "theirs" the places; `in_flight`
    has one figure a second.
    """
    if calls < 1:
        raise UserError(f"--repeats {calls} must be at least 1")
    captioner = EndpointCaptioner(addresses, Prompt(), max_new_tokens=NEW_TOKENS, in_flight=in_flight)
    with closing(captioner):
        pairs = demo_pairs(calls * captioner.batch_size)
        places = in_flight * len(captioner.servers)
        seen: list[tuple[int, int]] = []
        done = threading.Event()

        def look() -> None:
            while not done.wait(SAMPLED_S):
                seen.append((sum(server.answers for server in captioner.servers), captioner.in_flight))

        looker = threading.Thread(target=look, daemon=True)
        begin = time.perf_counter()
        looker.start()
        try:
            written = []
            for start in range(0, len(pairs), captioner.batch_size):
                written += captioner.write(pairs[start : start + captioner.batch_size], 0)
        finally:
            done.set()
            looker.join()
        seconds = time.perf_counter() - begin
    if failed := [error for error in written if isinstance(error, Exception)]:
        raise UserError(f"{len(failed)} of {len(pairs)} pairs have no caption, the first: {failed[0]}")
    middle = [count for answers, count in seen if 0 < answers <= len(pairs) - places]
    if not middle:
        raise UserError(f"{len(pairs)} pairs were answered within {seconds:.1f} s, too fast to look: more --repeats")
    step = round(1 / SAMPLED_S)
    return {
        "what": f"requests in flight at {len(captioner.servers)} server(s), of the places",
        "ours": statistics.mean(middle),
        "theirs": places,
        "ratio": statistics.mean(middle) / places,
        "captions_per_s": len(pairs) / seconds,
        "in_flight": [count for _, count in seen[::step]],
    }


def demo_pairs(count: int) -> list[Pair]:
    """The first training pairs of the demo; UserError where there are fewer."""
    ensure_any_demo(DEMO)
    source = open_source(demo_split(DEMO, "train"), Fields(), need_long=False)
    if count > len(source):
        raise UserError(f"the demo has {len(source):,} pairs, and {count:,} are asked for: fewer --repeats")
    samples = (source.read(index) for index in range(count))
    return [Pair(sample.key, sample.image, sample.web) for sample in samples]
