"""Evaluate a trained model: exact match for each kind of question, yes/no metrics, and caption quality.

It also answers a user's own questions in LLaVA's `question.jsonl` format, and writes LLaVA's answer format.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache

from clips import BrokenSample
from clips.common.errors import UserError, never_in_the_way
from clips.common.files import read_json, sha256, write_json
from clips.common.hub import model_digest, resolve
from clips.common.live import in_words, say, say_next
from clips.common.page import table_of
from clips.common.report import metric_rows
from clips.common.rundir import METRICS
from clips.common.runtime import choose_device, environment
from mllm.data.captions import TEST, TEST_IMAGES
from mllm.data.conversation import ConversationEncoder
from mllm.data.demo import DEMO_DIR, IMAGES, demo_questions, ensure_any_llava_demo
from mllm.data.formats import IMAGE_TOKEN, VIDEO_TOKEN
from mllm.data.images import ImageStore
from mllm.data.questions import Question, candidates_of, draw_evenly, open_questions, read_questions
from mllm.data.video import is_video
from mllm.evaluation.batches import answer_settings, generate_inputs, likelihoods, make_batches, new_texts, seeded, seen
from mllm.evaluation.report import metrics_of, one_caption, write_answer_report
from mllm.evaluation.scores import answer_line, score, scorer_version
from mllm.model.load import CACHE, answer_dtype, data_of, find_model, load_llava, model_name, newest_model
from mllm.model.tiles import Llava, LlavaProcessors, TokenLayout


@torch.inference_mode()
def generate_answers(
    model: Llava,
    processor: LlavaProcessors,
    questions: Sequence[Question],
    store: ImageStore | None,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    conv_mode: str = "auto",
    temperature: float = 0.0,
    seed: int = 0,
    candidates: Sequence[Sequence[str]] = (),
) -> tuple[list[str], list[dict[str, float]]]:
    """Ask each question, after its earlier turns. Return the answers, and how likely the first of each `candidates` is.

    `candidates` are the possible answers to each question. If there are none, no likelihoods are measured. Otherwise
    they are appended to the prompts, which are read once, `batch_size` candidates at a time (`batches.likelihoods`).

    `conv_mode` "auto" is the format in which the model was trained. Temperature 0 is greedy; above it, equal seeds and
    batch sizes give equal answers. Questions of a batch affect each other only by rounding, because they are padded on
    the left (see batches.py): in fp32 greedy answers are equal at every batch size, in bf16 nearly tied tokens may
    swap. Raises UserError for a question that cannot be asked.
    """
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature must be 0 or more, found {temperature}")
    tokenizer = processor.tokenizer
    layout = TokenLayout.of(model.config)
    encoder = ConversationEncoder(tokenizer, conv_mode, layout.of_every)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    prompts = []
    for question in questions:
        tokens = []
        with _naming(question):
            for name in question.images:
                is_sized = layout.pinpoints or is_video(name)
                tokens.append(layout.tokens(store.size(name)) if is_sized and store else layout.tokens_per_crop)
        ids = encoder.prompt(_turns(question), tokens, f"question {question.id}")
        if context is not None and len(ids) >= context:
            raise UserError(f"question {question.id} has {len(ids)} tokens with its images, the context is {context}")
        prompts.append(ids)
    answer_ids = {text: encoder.answer(text) for text in dict.fromkeys(chain.from_iterable(candidates))}
    answers = [""] * len(questions)
    measured: list[dict[str, float]] = [{} for _ in questions]
    cut = 0
    with tqdm(total=len(questions), desc="answers", unit="question", disable=None) as bar:
        for chosen in make_batches(questions, prompts, batch_size):
            # Each image of a batch is decoded and read once. Without a store no question has one (`open_questions`).
            asking = {name: questions[i] for i in chosen for name in questions[i].images}
            images = []
            for name, question in asking.items():
                assert store is not None
                with _naming(question):
                    images.append(seen(processor, store.shown(name, layout.frames)))
            numbers = {name: number for number, name in enumerate(asking)}
            room = max_new_tokens if context is None else context - max(len(prompts[i]) for i in chosen)
            settings = answer_settings(encoder, min(max_new_tokens, room), temperature)
            shown = [tuple(numbers[name] for name in questions[i].images) for i in chosen]
            inputs = generate_inputs(model, [prompts[i] for i in chosen], shown, images, settings.pad_token_id)
            cache = inputs.setdefault(CACHE, DynamicCache(config=model.config.get_text_config()))
            with seeded(model.device, seed + chosen[0]):
                output = model.generate(**inputs, generation_config=settings)
            responses = new_texts(tokenizer, output[:, inputs["input_ids"].shape[1] :], encoder.stop_ids)
            for i, (text, has_ended) in zip(chosen, responses, strict=True):
                answers[i] = text
                cut += not has_ended
            if candidates:
                rivals = [[answer_ids[text] for text in candidates[i]] for i in chosen]
                for i, likelihood in zip(chosen, likelihoods(model, cache, inputs, rivals, batch_size), strict=True):
                    measured[i] = likelihood
            bar.update(len(chosen))
    if cut:
        say(f"{cut:,} of {len(answers):,} answers are cut off after --max-new-tokens {max_new_tokens}")
    return answers, measured


def _turns(question: Question) -> list[dict[str, Any]]:
    """Return the turns up to the question, with the images before the first text, or in it where it has `<image>`."""
    texts = [*chain.from_iterable(question.earlier), question.text]
    first: Any = texts[0].replace(VIDEO_TOKEN, IMAGE_TOKEN) if any(map(is_video, question.images)) else texts[0]
    if not question.images or first.count(IMAGE_TOKEN) != len(question.images):
        first = [*({"type": "image"} for _ in question.images), {"type": "text", "text": texts[0]}]
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return [{"from": "human", "value": first}, *turns[1:]]


@contextmanager
def _naming(question: Question) -> Iterator[None]:
    try:
        yield
    except BrokenSample as broken:
        raise UserError(f"question {question.id}: image {broken.key}: {broken.reason}") from None
    except UserError as error:  # a video for a model that takes none
        raise UserError(f"question {question.id}: {error}") from None


# ---------------------------------------------------------------------------------------------- the command
def evaluate_from_flags(flags: argparse.Namespace) -> dict[str, Any]:
    """Run scripts/evaluate_llava.py, and return the content of results.json.

    The model answers the user's questions, else the descriptions held out from its training data, else the demo's
    questions. Writes an answer file for each question file, results.json, and the run's report. A partial evaluation
    goes into a subdirectory of `evaluation/`. Raises UserError for flags that do not fit together, and if the output
    directory holds answers to other questions.
    """
    device = choose_device(flags.device)
    directory = find_model(flags.model) if flags.model else str(newest_model())
    name = model_name(directory)
    answers_file = Path(flags.output) if flags.output and Path(flags.output).suffix == ".jsonl" else None
    if flags.questions:
        files = {Path(flags.questions).stem: Path(flags.questions)}
        questions, store = open_questions(Path(flags.questions), flags.image_folder, flags.limit)
        sets = dict.fromkeys(files, questions)
    elif flags.image_folder or answers_file:
        raise UserError("--image-folder and --output FILE.jsonl are for your own questions: give --questions too")
    else:
        data, run_dir = data_of(directory), Path(directory).parent
        if (run_dir / TEST).is_file():
            files, store = {"descriptions": run_dir / TEST}, ImageStore(run_dir / TEST_IMAGES)
        elif data and "demo" not in data:
            what = f"{directory}, trained on {', '.join(data)}"
            raise UserError(f"the demo's questions cannot measure {what}: give --questions and --image-folder")
        else:
            demo = ensure_any_llava_demo(DEMO_DIR)
            files, store = demo_questions(demo), ImageStore(demo / IMAGES)
        sets = {key: draw_evenly(read_questions(file), flags.limit) for key, file in files.items()}
    sources = {
        key: {"file": files[key].name, "sha256": sha256(files[key]), "asked": len(questions)}
        for key, questions in sets.items()
    }
    out = _output(flags, Path(directory), sources)
    model, processor = load_llava(directory, device, answer_dtype(flags.dtype, device))
    out.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, dict[str, Any]] = {}
    answered: dict[str, dict[str, Any]] = {}
    for key, questions in sets.items():
        begin = time.perf_counter()
        candidates = candidates_of(questions, read_questions(files[key])) if flags.likelihood else ()
        answers, measured = generate_answers(
            model, processor, questions, store,
            batch_size=flags.batch_size, max_new_tokens=flags.max_new_tokens, conv_mode=flags.conv_mode,
            temperature=flags.temperature, seed=flags.seed, candidates=candidates,
        )  # fmt: skip
        lines = [json.loads(answer_line(q, a, name)) | m for q, a, m in zip(questions, answers, measured, strict=True)]
        metrics |= metrics_of(key, score(questions, answers), lines) | one_caption(questions)
        path = answers_file or out / f"{key}.jsonl"
        path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
        answered[key] = {"questions": sources[key], "answers": {"file": path.name, "sha256": sha256(path)}}
        seconds = time.perf_counter() - begin
        say(f"{len(answers):,} answers in {in_words(seconds)} → {path}")
    first = next(iter(sets))
    # Records how answers and metrics were made, so that they can be checked, and are not replaced by others.
    content = {
        "model": str(directory),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": model_digest(resolve(directory, "model")),
        "scorer": scorer_version(),
        "sets": answered,
        "flags": vars(flags),
        "command": shlex.join(sys.argv),
        "environment": environment(model.device, world_size=1),
        "test_set": first,
        "unit": "percent; log likelihoods: nats",
        "metrics": metrics,
    }
    write_json(out / "results.json", content)
    if metrics:
        say(table_of(name, *metric_rows(metrics, first)))
        run_dir, is_whole = Path(directory).parent, _part(vars(flags)) == ""
        is_own = flags.questions and not (answers_file or flags.limit)
        if (is_whole or is_own) and store is not None and (run_dir / METRICS).is_file():
            with never_in_the_way(f"the report of {run_dir} is not written"):
                report = write_answer_report(run_dir, store, out, out if is_own else run_dir)
                say(f"report → {report}")
        say(f"metrics → {out / 'results.json'}")
        say_next(f"python scripts/chat.py --model {shlex.quote(str(directory))}")
    return content


def _part(flags: Mapping[str, Any]) -> str:
    """Return the directory of a partial or sampled evaluation inside that of the full one. It is empty for a full one.

    The name has a hash of the user's questions, because several files may have the same base name.
    """
    questions = Path(flags["questions"]) if flags.get("questions") else None
    parts = [f"{questions.stem}-{sha256(questions)[:8]}"] if questions else []
    parts += [f"limit-{flags['limit']}"] if flags.get("limit") else []
    if flags.get("temperature"):
        parts.append(f"temperature-{flags['temperature']:g}-seed-{flags['seed']}")
    return "-".join(parts)


def _output(flags: argparse.Namespace, directory: Path, sources: Mapping[str, Any]) -> Path:
    """Return the output directory: `--output` (A for A.jsonl), or `evaluation/` in the model's run, or in `.`.

    Raises UserError if it has answers to other questions, which only a full evaluation without --output may replace.
    """
    part = _part(vars(flags))
    if not flags.output:
        out = (directory.parent if directory.name == "model" else Path()) / "evaluation" / part
    else:
        out = Path(flags.output)
        out = out.with_suffix("") if out.suffix == ".jsonl" else out
    present = {name: held.get("questions") for name, held in read_json(out / "results.json").get("sets", {}).items()}
    if present not in ({}, sources) and (part or flags.output):
        held = ", ".join(f"{source['asked']} of {source['file']}" for source in present.values())
        raise UserError(f"{out} holds the answers to other questions ({held}): choose another --output, or remove it")
    return out
