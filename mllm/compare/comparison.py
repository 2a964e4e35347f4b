"""The flags of a comparison, the runs that follow from them, and the plan that is fixed before the first run.

OUTPUT/compare.json is the plan:

    format       2
    comparison   the flags that decide what is compared (encoders, seeds, budget, limit, …), but not where or how fast
    decides      the metric that decides, on the deciding column: `accuracy`, `log_likelihood` or `share`, or one of
                 them as METRIC/KIND, or `cider_d`
    is_demo      true if the runs train on the demo's data
    budget       share and number of each stage's samples (also of variants), and how each stage's projector starts
    questions    name → file, column (kind of images), SHA-256, number of questions, number asked, numbers by kind
    scorer       version of the scorer (`mllm.evaluation.scores.scorer_version`)
    runs_begun   number of runs that had begun when the plan was written; it was fixed before only if this is 0

OUTPUT/questions/NAME.jsonl is a copy of the questions that RUN/evaluation/NAME.jsonl answers, so that a finished
comparison can be verified without other files.

Imports that need torch are inside the functions that train, because verifying needs no torch.
"""

import argparse
import dataclasses
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from clips.common.errors import UserError
from clips.common.files import read_json, sha256
from clips.common.flags import Parser, add_options, at_least, check_fields, from_flags, option
from clips.common.rundir import METRICS, UNSEEN, read_metrics
from mllm.data.questions import LIKELIHOODS, UNSEEN_ANSWERS, Question, draw_evenly, read_questions
from mllm.encoders.registry import parse_vision_name
from mllm.training.recipes import STAGES

ENCODERS = ("clips", "clip", "random", "blind")
QUICK_ENCODERS = ("clips", "random")
SHARE = 0.5
"""Default share of each stage's samples for the demo and with --quick. On other data all samples are used."""
QUICK_PRETRAINING = 0.5
"""Share of the pretraining samples that an encoder is trained on with --quick."""
SEEDS = 5
QUICK_LLAVA_RUNS = 4
LIMIT = 400
"""Default number of questions from each file for the demo and with --quick. From other files all are asked."""
DATA_FLAG = re.compile(rf"--(?:(?:{'|'.join(s.name for s in STAGES.values())})\.)?(?:data[_-]path|karpathy)(?:=|$)")
"""Matches a flag, for one stage or for both, that replaces the demo's data by other data."""
DRAWN = "evenly over kinds and answers"
"""How a limit draws questions. A run whose questions were drawn otherwise is evaluated again."""
RECIPES = {"clips": "demo", "clip": "clip_baseline"}
"""Recipe of each kind of encoder that is pretrained if it is missing."""
PLAN = "compare.json"
LLAVA_STEP = 1000
"""Distance between the LLaVA seeds of one pretraining seed: the first run on encoder 3 has seed 3, the second 1003.

No two runs on different encoders then share a seed, and a comparison with more seeds can reuse its runs.
"""
QUESTIONS = "questions"
FORMAT = 2
NOT_FIXED = {*("output", "jobs", "device", "questions", "image_folder", "include_path", "decides")}
"""Fields of `Comparison` about place and speed, and two that the plan records under keys of its own."""
LATER = {"variants", "first_seed"}
"""Fields that older plans do not have, so a plan leaves them out if they are empty or 0."""
SEEN = "seen"
COLUMNS = {"answers": SEEN, "descriptions": SEEN, UNSEEN_ANSWERS: UNSEEN}
"""The column (kind of images) of each file of answers to the demo's questions. Other files are columns of their own."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, text.split(","))))


def _words(text: str) -> tuple[str, ...]:
    return tuple(shlex.split(text))


def _variant(text: str) -> tuple[str, tuple[str, ...]]:
    name, equals, flags = text.partition("=")
    if not (equals and re.fullmatch(r"\w+", name)):
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=FLAGS, such as 'tiles=--image_aspect_ratio anyres'")
    return name, _words(flags)


def _option(kind: Any, default: Any, text: str) -> Any:
    return option(default, text, type=kind, nargs=None, action="store")


@dataclass(frozen=True)
class PretrainedEncoder:
    """An encoder that the comparison pretrains itself: a run of scripts/pretrain_clips.py."""

    kind: str
    seed: int
    directory: Path


@dataclass(frozen=True)
class EncoderRun:
    """One run on one encoder: a directory with both stages, the answers and the costs."""

    encoder: str
    kind: str
    argument: str
    """The argument in the encoder's name (mllm/encoders/registry.py), such as runs/x in clips:runs/x."""
    pretraining_seed: int
    seed: int
    """The LLaVA seed, for the projector, the adapters, the order of samples, and the encoder `random`."""
    directory: Path
    variant: str = ""

    @property
    def seeds(self) -> str:
        """The seeds of the run in words, such as `seed 0, LLaVA seed 1`."""
        first = f"seed {self.pretraining_seed}"
        return first if self.seed == self.pretraining_seed else f"{first}, LLaVA seed {self.seed}"

    @property
    def vision(self) -> str:
        """The encoder as --vision takes it."""
        return f"{self.kind}:{self.argument}" if self.argument else self.kind

    @property
    def pretraining_run(self) -> Path | None:
        """The run directory of an encoder that was trained here, or None for any other encoder."""
        return Path(self.argument) if self.kind in RECIPES and Path(self.argument or "-").is_dir() else None

    @property
    def name(self) -> str:
        """Name of the run, which is that of its directory."""
        return self.directory.name

    @property
    def evaluation(self) -> Path:
        """Directory of the answers and metrics."""
        return self.directory / "evaluation"

    @property
    def metrics(self) -> Path:
        """File with the metrics of the answers."""
        return self.evaluation / "results.json"

    def read(self, name: str) -> dict[str, Any]:
        """Return the JSON object in the file `name` of the run's directory, or {} if there is no such file.

        Raises UserError if the file is damaged.
        """
        return read_json(self.directory / name)

    def fingerprint(self) -> str:
        """Return the fingerprint of the vision encoder that stage 2 recorded."""
        return self.read("config.json")["instruct"]["trains"]["vision_fingerprint"]


class Arm(NamedTuple):
    """One candidate of the comparison: an encoder and a variant of the training on it."""

    name: str
    encoder: str
    variant: str

    @property
    def folder(self) -> str:
        """Encoder and variant in a form that can be part of a directory's name."""
        return re.sub(r"[^\w.-]+", "-", f"{self.encoder}-{self.variant}").strip("-")


def is_pretrained_anew(encoder: str) -> bool:
    """Return True if this name means another encoder for each pretraining seed."""
    kind, argument = parse_vision_name(encoder)
    return ("{seed}" in argument and kind not in ("random", "blind")) or (kind in RECIPES and not argument)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The flags of scripts/compare_encoders.py. Equal comparisons have equal runs."""

    encoders: tuple[str, ...] = _option(
        _names,
        ENCODERS,
        "names as for train_llava.sh --vision, separated by commas; plain clips and clip are pretrained here, and in "
        "clips:DIR {seed} is the pretraining seed (default: clips,clip,random,blind; --quick: clips,random)",
    )
    seeds: int = option(SEEDS, f"seeds of encoders pretrained here (default: {SEEDS}, --quick: 1)", type=at_least(1))
    first_seed: int = option(0, "first of the consecutive --seeds", type=at_least(0))
    llava_runs: int | None = option(
        None,
        "LLaVA runs of each kind of encoder, on its pretrained encoders in turn (default: one more than --seeds; "
        f"--quick: {QUICK_LLAVA_RUNS}; as many as --seeds if no encoder is trained here)",
        type=at_least(1),
    )
    output: Path = option(Path("runs/compare"), "directory for encoders, runs and the report")
    jobs: int = option(1, "runs at the same time (default: two on a CPU, one on a GPU)", type=at_least(1))
    quick: bool = option(False, "compare clips with random: one encoder on half of the samples, four LLaVA runs")
    budget: float | None = option(
        None, "share of a stage's samples (default: 0.5 for the demo and --quick, else 1)", bounds={"above": 0}
    )
    train_flags: tuple[str, ...] = _option(_words, (), "more flags of train_llava.sh for every run, in one string")
    variants: tuple[tuple[str, tuple[str, ...]], ...] = option(
        (), "train again with these flags: 'tiles=--image_aspect_ratio anyres'", type=_variant, metavar="NAME=FLAGS"
    )
    pretrain_flags: tuple[str, ...] = _option(_words, (), "more flags of pretrain_clips.py, in one string")
    device: str = option("auto", "auto, cpu or cuda")
    gpus: int = option(1, "GPUs of each run", type=at_least(1))
    questions: Path | None = option(None, "your own questions with answers (default: the demo's)")
    image_folder: Path | None = option(None, "folder or tar with the images of --questions")
    limit: int | None = option(None, "questions per file (default: 400 for the demo and --quick)", type=at_least(1))
    benchmarks: tuple[str, ...] = _option(_names, (), "tasks of lmms-eval, for example gqa,pope,textvqa_val,mme")
    include_path: Path | None = option(None, "folder with more tasks of lmms-eval, in its YAML format")
    decides: str | None = option(
        None, "accuracy, log_likelihood or share, also as NAME/KIND, or cider_d (default: accuracy)", metavar="METRIC"
    )

    def __post_init__(self) -> None:
        check_fields(self, "--")

    @property
    def is_demo(self) -> bool:
        """True if the runs train on the demo's data.

        The flags are searched, not parsed, because a parser would act on a `--help` in an archive that is verified.
        """
        words = chain(self.train_flags, *(flags for _, flags in self.variants))
        return not any(map(DATA_FLAG.match, words))

    @property
    def asks_questions(self) -> bool:
        """True if the runs answer questions, and not only benchmarks."""
        return self.is_demo or self.questions is not None

    @property
    def budget_share(self) -> float:
        """Share of the stages' samples that is trained on; 1 is the full training."""
        return self.budget or (SHARE if self.quick or self.is_demo else 1.0)

    @property
    def question_limit(self) -> int | None:
        """How many questions of each file every run answers, or None for all."""
        is_full = self.questions is not None or not self.is_demo
        return self.limit or (LIMIT if self.quick or not is_full else None)

    def question_files(self) -> tuple[dict[str, Path], Path | None]:
        """Return {name of an answer file: question file} and the images' folder. Builds the demo if it is missing.

        There are no files if there are only benchmarks.
        """
        from mllm.data.demo import DEMO_DIR, IMAGES, demo_questions, ensure_any_llava_demo

        if not self.asks_questions:
            return {}, None
        if self.questions is not None:
            return {self.questions.stem: self.questions}, self.image_folder
        demo = ensure_any_llava_demo(DEMO_DIR)
        files = {name: file for name, file in demo_questions(demo).items() if name in COLUMNS}
        return files, demo / IMAGES

    def asked(self, path: Path) -> list[Question]:
        """Return the questions of a file that every run answers, in their order."""
        return draw_evenly(read_questions(path), self.question_limit)

    def evaluation_settings(self) -> dict[str, Any]:
        """Return the settings on which it depends which questions a run answers, and how."""
        from clips.common.runtime import choose_device
        from mllm.model.load import answer_dtype

        dtype = answer_dtype("auto", choose_device(self.device))
        questions, limit = self.questions, self.question_limit
        return {
            "questions": questions.name if questions else "the demo's",
            "limit": limit,
            "dtype": str(dtype).removeprefix("torch."),
            **({"sha256": sha256(questions)} if questions else {}),
            **({"drawn": DRAWN} if limit is not None else {}),
            **({"likelihood": True} if (self.decides or "").startswith(LIKELIHOODS) else {}),
        }

    @property
    def arms(self) -> list[Arm]:
        """Each encoder without a variant, then with each variant. Its name is its kind if no other has that kind."""
        kinds = [parse_vision_name(encoder)[0] for encoder in self.encoders]
        names = [k if kinds.count(k) == 1 else e for k, e in zip(kinds, self.encoders, strict=True)]
        arms = [Arm(name, encoder, "") for name, encoder in zip(names, self.encoders, strict=True)]
        return arms + [Arm(f"{arm.name}, {name}", arm.encoder, name) for name, _ in self.variants for arm in arms]

    @property
    def names(self) -> list[str]:
        """Names of the arms, in the order of the report."""
        return [arm.name for arm in self.arms]

    @property
    def runs_per_encoder(self) -> int:
        """LLaVA runs of each kind of encoder: --llava-runs, or --seeds, plus one if a kind has several encoders."""
        nested = self.seeds > 1 and any(map(is_pretrained_anew, self.encoders))
        return self.llava_runs or self.seeds + nested

    @property
    def runs(self) -> list[EncoderRun]:
        """All runs, seed by seed, so that complete comparisons exist early. Raises UserError for an unknown encoder."""
        runs = []
        for number in range(self.runs_per_encoder):
            pretraining = self.first_seed + number % self.seeds
            seed = pretraining + LLAVA_STEP * (number // self.seeds)
            suffix = f"seed{pretraining}" if seed == pretraining else f"seed{pretraining}-llava{seed}"
            for arm in self.arms:
                kind, argument = self._vision_of(arm.encoder, pretraining)
                directory = self.output / "runs" / f"{arm.folder}-{suffix}"
                runs.append(EncoderRun(arm.name, kind, argument, pretraining, seed, directory, arm.variant))
        return runs

    def _vision_of(self, encoder: str, seed: int) -> tuple[str, str]:
        """Return (kind, argument) of an encoder for a pretraining seed, which replaces `{seed}`."""
        kind, argument = parse_vision_name(encoder)
        if kind in RECIPES and not argument:
            argument = str(self._directory_of(kind, seed))
        elif kind in ("random", "blind") and not argument:  # the architecture of the CLIPS encoder beside them
            clips = next((name for name in self.encoders if parse_vision_name(name)[0] == "clips"), "clips")
            argument = self._vision_of(clips, seed)[1]
        return kind, argument.replace("{seed}", str(seed))

    def _directory_of(self, kind: str, seed: int) -> Path:
        return self.output / "encoders" / f"{kind}-seed{seed}"

    @property
    def pretrained(self) -> list[PretrainedEncoder]:
        """Every encoder that the runs need and that is pretrained here, even if it exists already."""
        needed = {run.argument for run in self.runs}
        encoders = [
            PretrainedEncoder(kind, seed, self._directory_of(kind, seed))
            for kind in RECIPES
            for seed in range(self.first_seed, self.first_seed + self.seeds)
        ]
        return [encoder for encoder in encoders if str(encoder.directory) in needed]


def flags_of(parser: Parser) -> None:
    """Add the flags of a comparison to `parser`."""
    add_options(parser, Comparison)
    parser.set_defaults(encoders=None, seeds=None, jobs=None)  # these depend on other flags and on the machine


def comparison_from_flags(flags: argparse.Namespace) -> Comparison:
    """Return the comparison that `flags` ask for. mllm/compare/run.py checks that they do not contradict each other."""
    from clips.common.runtime import choose_device

    one_at_a_time = choose_device(flags.device).type == "cuda" or (os.cpu_count() or 1) < 2
    return from_flags(
        Comparison,
        flags,
        encoders=(QUICK_ENCODERS if flags.quick else ENCODERS) if flags.encoders is None else flags.encoders,
        seeds=(1 if flags.quick else SEEDS) if flags.seeds is None else flags.seeds,
        llava_runs=QUICK_LLAVA_RUNS if flags.quick and flags.llava_runs is None else flags.llava_runs,
        jobs=(1 if one_at_a_time else 2) if flags.jobs is None else flags.jobs,
    )


def samples_seen(run: Path) -> dict[str, int]:
    """Return samples and steps of the last logged step of a pretraining run. Raises UserError if none was logged."""
    lines = read_metrics(run, "train")
    if not lines:
        raise UserError(f"{run / METRICS} has no training step: remove {run} to pretrain the encoder again")
    return {"samples": lines[-1]["samples"], "steps": lines[-1]["step"]}


# ------------------------------------------------------------------------------------------- the plan
def columns_of(files: Iterable[str]) -> list[str]:
    """Return the columns (kinds of images) of question files. The first one decides; it is `unseen` if there is one."""
    columns = dict.fromkeys(COLUMNS.get(name, name) for name in files)
    return sorted(columns, key=lambda column: column != UNSEEN)


def of_deciding_column(by_file: Mapping[str, list[Question]]) -> list[Question]:
    """Return the questions of the first of `columns_of`, on which the comparison is decided."""
    columns = columns_of(by_file)
    return [q for name, questions in by_file.items() if COLUMNS.get(name, name) == columns[0] for q in questions]


def check_format(plan: Mapping[str, Any], output: Path) -> None:
    """Raise UserError if another version of this program made `plan`, the content of compare.json in `output`."""
    if plan.get("format") != FORMAT:
        raise UserError(
            f"{output} was planned by another version of this program (its format is {plan.get('format')}, not "
            f"{FORMAT}): give a new --output, or check out the commit in its report.json"
        )


def comparison_of(plan: Mapping[str, Any], output: Path) -> Comparison:
    """Return the comparison of a `plan` whose files are in `output`.

    Raises UserError if another version of this program made the plan, or if it does not have the flags of a comparison.
    """
    flags = plan.get("comparison")
    known = {field.name for field in dataclasses.fields(Comparison)} - NOT_FIXED
    check_format(plan, output)
    if not isinstance(flags, dict) or flags.keys() | LATER != known:
        raise UserError(f"{output / PLAN} does not have the flags of a comparison: restore it, or give a new --output")
    fixed: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    return Comparison(output=output, decides=plan.get("decides"), **fixed)


def stored_questions(output: Path) -> dict[str, Path]:
    """Return {name of an answer file: stored copy of its question file}, in the order in which they are compared."""
    return {path.stem: path for path in sorted((output / QUESTIONS).glob("*"))}


def kinds_of(questions: Iterable[Question]) -> dict[str, int]:
    """Return how many questions of each kind have a known answer."""
    return dict(Counter(question.kind for question in questions if question.answer is not None))


def deciding(decides: str | None, questions: Iterable[Question]) -> str | None:
    """Return the metric that decides the comparison: `decides` (--decides), or by default the first one of `questions`.

    Return None if the questions give no metric at all. Raises UserError if they do not give the metric `decides`.
    """
    questions = list(questions)
    kinds = list(kinds_of(questions))
    suffixes = [""] * bool(kinds) + [f"/{kind}" for kind in kinds if len(kinds) > 1]
    metrics = [f"{name}{suffix}" for name in ("accuracy", *LIKELIHOODS) for suffix in suffixes]
    metrics += ["cider_d"] * any(question.references for question in questions)
    if decides is not None and decides not in metrics:
        raise UserError(f"--decides {decides}: these questions give {', '.join(metrics) or 'no metric'}")
    return decides or next(iter(metrics), None)
