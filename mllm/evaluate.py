"""How well a trained model reads pictures: exact match per kind of question, yes/no figures, caption quality.

Also answers a user's own questions in LLaVA's `question.jsonl` format and writes LLaVA's answer format.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest
from tqdm import tqdm
from transformers import AutoProcessor, GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from clips.data.sample import BrokenSample
from clips.engine import choose_device, has_bf16
from clips.errors import UserError
from mllm.caption_metrics import cider
from mllm.conversation import ConversationEncoder
from mllm.data import ImageStore, pad_rows, read_json_records
from mllm.demo import DESCRIPTIONS, IMAGES, QUESTIONS, ensure_llava_demo
from mllm.features import image_pixels
from mllm.hub import check_complete, loading, resolve
from mllm.train import DEMO_DIR


@dataclass(frozen=True, kw_only=True)
class Question:
    """One line of a question file; `answer` and `references` are there where it can be scored."""

    id: Any
    text: str
    image: str | None = None
    kind: str = "question"
    answer: str | None = None
    references: tuple[str, ...] = ()


def read_questions(path: Path) -> list[Question]:
    """LLaVA's question.jsonl (`question_id`, `text`, `image`), with `kind`, `answer` or `references` where known.

    Raises UserError naming the record and the field.
    """
    questions = []
    for index, raw in enumerate(read_json_records(path)):
        where = f"{path}: record {index} (question_id {raw.get('question_id') if isinstance(raw, dict) else '?'})"
        if not isinstance(raw, dict) or "question_id" not in raw:
            raise UserError(f"{where}: it must be an object with question_id, text and image")
        wrong = [n for n in ("image", "kind", "answer") if not isinstance(raw.get(n, ""), (str, type(None)))]
        wrong += [] if isinstance(raw.get("text"), str) and raw["text"].strip() else ["text"]
        if wrong:
            raise UserError(f"{where}: {', '.join(wrong)} must be a text")
        references = raw.get("references") or []
        if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
            raise UserError(f"{where}: references must be a list of texts")
        questions.append(
            Question(
                id=raw["question_id"],
                text=raw["text"],
                image=raw.get("image"),
                kind=raw.get("kind") or "question",
                answer=raw.get("answer"),
                references=tuple(references),
            )
        )
    return questions


# ---------------------------------------------------------------------------------------------- answers


def load_model(
    name: str, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A stock LLaVA model by directory or hub id, in eval mode; bf16 on a GPU and fp32 on a CPU unless `dtype` says.

    Raises UserError for what cannot be loaded.
    """
    directory = resolve(name, "model")
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Fused attention in bf16 is slow on CPUs at the length of a question, see mllm/train.py.
    slow = device.type == "cpu" and dtype == torch.bfloat16
    with loading("model", directory):
        processor = AutoProcessor.from_pretrained(directory)
        model, info = LlavaForConditionalGeneration.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager" if slow else None, output_loading_info=True
        )
    check_complete(info, "model", directory)
    return model.to(device).eval(), processor


def model_name(directory: str) -> str:
    """How a model is called: its run's name where it is a run's `model` directory, else its own."""
    path = Path(directory)
    return path.resolve().parent.name if path.name == "model" else path.name


def newest_model(runs: Path = Path("runs")) -> Path:
    """The model directory written last under `runs`; UserError where there is none."""
    found = [(path.stat().st_mtime, path.parent) for path in runs.glob("*/model/config.json")]
    if not found:
        raise UserError(f"no trained model under {runs}/: run bash scripts/train_llava.sh, or name one by --model-path")
    return max(found)[1]


@torch.inference_mode()
def generate_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: Sequence[Question],
    store: ImageStore | None,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
) -> list[str]:
    """Greedy answers in the order of `questions`, each asked alone.

    Batches are padded on the left, so an answer does not depend on its neighbours (up to the arithmetic's rounding).
    Raises UserError naming a question whose picture is missing or broken, or that is longer than the context.
    """
    tokenizer = processor.tokenizer
    encoder = ConversationEncoder(tokenizer, "auto", model.config.image_seq_length)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    prompts = []
    for question in questions:
        parts = [{"type": "image"}] if question.image else []
        turn = {"from": "human", "value": [*parts, {"type": "text", "text": question.text}]}
        ids = encoder.prompt([turn], len(parts), f"question {question.id}")
        if context is not None and len(ids) >= context:
            raise UserError(f"question {question.id} takes {len(ids)} tokens, the model's context is {context}")
        if question.image and store is None:
            raise UserError(f"question {question.id} has an image, but no --image-folder is given")
        prompts.append(ids)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        eos_token_id=encoder.stop_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda i: (questions[i].image is None, len(prompts[i])))
    with tqdm(total=len(questions), desc="answers", unit="question") as bar:
        for chosen in _chunks(order, batch_size, lambda i: questions[i].image is None):
            rows = [prompts[i] for i in chosen]
            inputs = {
                "input_ids": pad_rows(rows, tokenizer.pad_token_id, left=True),
                "attention_mask": pad_rows([[1] * len(row) for row in rows], 0, left=True),
            }
            if questions[chosen[0]].image is not None:
                pixels = [_pixels(processor, store, questions[i]) for i in chosen]
                inputs["pixel_values"] = torch.stack(pixels).to(model.dtype)
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            output = model.generate(**inputs, generation_config=settings)
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text.strip()
            bar.update(len(chosen))
    return answers


def _chunks(order: list[int], size: int, key: Any) -> list[list[int]]:
    """Batches of at most `size`, with and without pictures apart."""
    groups = [[i for i in order if not key(i)], [i for i in order if key(i)]]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def _pixels(processor: LlavaProcessor, store: ImageStore, question: Question) -> torch.Tensor:
    try:
        return image_pixels(processor.image_processor, store.load(question.image))
    except BrokenSample as broken:
        raise UserError(f"question {question.id}: picture {broken.key}: {broken.reason}") from None


# ---------------------------------------------------------------------------------------------- figures


def normalise(text: str) -> str:
    """Lower case, without articles, without the full stop at the end, single spaces."""
    kept = re.sub(r"\b(a|an|the)\b", " ", text.lower().strip().rstrip("."))
    return " ".join(kept.split())


def is_right(answer: str, expected: str) -> bool:
    return normalise(answer) == normalise(expected)


def says_yes(text: str) -> bool:
    """POPE's reading of an answer: "no" when the first sentence has the word no or not, else "yes"."""
    return not {"no", "not"} & set(text.lower().split(".")[0].replace(",", "").split())


def yes_no_figures(answers: Sequence[str], expected: Sequence[bool]) -> dict[str, float]:
    """POPE's figures (Li et al. 2023), "yes" being the positive class."""
    said = [says_yes(answer) for answer in answers]
    true_positive = sum(s and e for s, e in zip(said, expected, strict=True))
    precision = true_positive / max(1, sum(said))
    recall = true_positive / max(1, sum(expected))
    return {
        "accuracy": sum(s == e for s, e in zip(said, expected, strict=True)) / len(said),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_share": sum(said) / len(said),
        "n": len(said),
    }


def exact_match_figures(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Kind → accuracy with its 95 % Wilson interval; "overall" last. Questions without an answer do not count."""
    scored = [(q.kind, is_right(a, q.answer)) for q, a in zip(questions, answers, strict=True) if q.answer is not None]
    groups = {kind: [right for k, right in scored if k == kind] for kind in dict.fromkeys(kind for kind, _ in scored)}
    groups["overall"] = [right for _, right in scored]
    figures = {}
    for kind, right in groups.items():
        if right:
            interval = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
            figures[kind] = {"accuracy": sum(right) / len(right), "low": interval.low, "high": interval.high}
            figures[kind]["n"] = len(right)
    return figures


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """All figures that these questions allow: `exact_match`, `yes_no`, `cider`."""
    figures: dict[str, Any] = {}
    exact = exact_match_figures(questions, answers)
    if exact:
        figures["exact_match"] = exact
    binary = [
        (a, normalise(q.answer) == "yes")
        for q, a in zip(questions, answers, strict=True)
        if q.answer is not None and normalise(q.answer) in ("yes", "no")
    ]
    if binary:
        figures["yes_no"] = yes_no_figures([a for a, _ in binary], [e for _, e in binary])
    described = [(a, q.references) for q, a in zip(questions, answers, strict=True) if q.references]
    if described:
        mean, _ = cider([a for a, _ in described], [r for _, r in described])
        figures["cider"] = {"cider_d": mean, "n": len(described)}
    return figures


def answer_line(question: Question, answer: str, model_name: str) -> str:
    """LLaVA's answer format, JSON in a line, with `kind`, `expected` and `correct` where the answer is known."""
    line = {"question_id": question.id, "prompt": question.text, "text": answer}
    line |= {"answer_id": uuid.uuid4().hex[:22], "model_id": model_name, "metadata": {}}
    if question.image is not None:
        line["image"] = question.image
    if question.answer is not None:
        line |= {"kind": question.kind, "expected": question.answer, "correct": is_right(answer, question.answer)}
    return json.dumps(line, ensure_ascii=False) + "\n"


def figures_tables(figures: dict[str, Any], title: str) -> list[Table]:
    tables = []
    if "exact_match" in figures:
        table = Table("kind", "right", "95 % interval", "questions", title=title, title_justify="left")
        for kind, row in figures["exact_match"].items():
            interval = f"{row['low']:.1%} … {row['high']:.1%}"
            table.add_row(kind, f"{row['accuracy']:.1%}", interval, f"{row['n']:,}", end_section=kind != "overall")
        tables.append(table)
    others = {f"yes/no: {name}": f"{value:.1%}" for name, value in figures.get("yes_no", {}).items() if name != "n"}
    if "cider" in figures:
        others["CIDEr-D of descriptions"] = f"{figures['cider']['cider_d']:.2f}"
    if others:
        table = Table("figure", "value", title_justify="left")
        for name, value in others.items():
            table.add_row(name, value)
        tables.append(table)
    return tables


# ---------------------------------------------------------------------------------------------- the command


def answer_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it.

    Chat keeps float32 on a CPU, though bfloat16 halves its time to the first token (0.14 s → 0.07 s for the demo's
    model on two cores, equal tokens/s): a turn answered from the kept cache must read as one computed afresh.
    """
    if name == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return getattr(torch, name)


def open_questions(
    path: Path, image_folder: Path | str | None, limit: int | None
) -> tuple[list[Question], ImageStore | None]:
    """`limit` questions of a file and their pictures; UserError naming a question whose picture is not there."""
    questions, store = _spread(read_questions(path), limit), ImageStore(image_folder) if image_folder else None
    for question in questions:
        if question.image and store is None:
            raise UserError(
                f"{path}: question {question.id} has an image, but its folder is not given (--image-folder; "
                "of compare_encoders.py: --question-images)"
            )
        problem = store.problem(question.image) if question.image else None
        if problem:
            raise UserError(f"{path}: question {question.id}: {problem}")
    return questions, store


def evaluate_from_flags(flags: argparse.Namespace) -> dict[str, Any]:
    """Answer the demo's held-out questions and descriptions, or the user's own; write answers and figures."""
    device = choose_device(flags.device)
    directory = flags.model_path or str(newest_model())
    name = model_name(directory)
    out = Path(flags.out) if flags.out else _default_output(Path(directory))
    if flags.question_file:
        own, store = open_questions(Path(flags.question_file), flags.image_folder, flags.limit)
        sets = {Path(flags.question_file).stem: own}
    elif flags.image_folder or flags.answers_file:
        raise UserError("--image-folder and --answers-file are for your own questions: give --question-file, too")
    else:
        demo = ensure_llava_demo(DEMO_DIR)
        store = ImageStore(demo / IMAGES)
        files = {"answers": QUESTIONS, "descriptions": DESCRIPTIONS}
        sets = {key: _spread(read_questions(demo / file), flags.limit) for key, file in files.items()}
    model, processor = load_model(directory, device, answer_dtype(flags.dtype, device))
    console = Console(stderr=True)
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    for key, questions in sets.items():
        begin = time.perf_counter()
        answers = generate_answers(
            model, processor, questions, store, batch_size=flags.batch_size, max_new_tokens=flags.max_new_tokens
        )
        figures |= score(questions, answers)
        path = Path(flags.answers_file) if flags.answers_file else out / f"{key}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [answer_line(q, a, name) for q, a in zip(questions, answers, strict=True)]
        path.write_text("".join(lines), encoding="utf-8")
        console.print(f"{len(answers):,} answers in {time.perf_counter() - begin:.0f} s → {path}", highlight=False)
    for table in figures_tables(figures, f"{name}: exact match"):
        console.print(table)
    if figures:
        figures = {"model": str(directory), "dtype": str(model.dtype).removeprefix("torch.")} | figures
        (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
        console.print(f"figures → {out / 'figures.json'}\nNext: python scripts/chat.py --model-path {directory}")
    return figures


def _spread(questions: list[Question], limit: int | None) -> list[Question]:
    """At most `limit` of them, evenly spread, because question files are sorted by kind."""
    if limit is None or limit >= len(questions):
        return questions
    return [questions[i * len(questions) // limit] for i in range(limit)]


def _default_output(directory: Path) -> Path:
    """`evaluation/` in the run directory of a model that was trained here, else below the current directory."""
    out = directory.parent / "evaluation" if directory.name == "model" else Path("evaluation")
    out.mkdir(parents=True, exist_ok=True)
    return out
