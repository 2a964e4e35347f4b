"""The commands of each encoder and each run of a comparison, their settings, and the plan compare.json."""

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from clips import RunConfig, config_from_flags
from clips import parser as pretraining_parser
from clips.common.files import read_json, replacing, sha256
from clips.common.launch import launcher
from clips.common.paths import SCRIPTS
from clips.common.rundir import changed, deciding_name, refuse
from clips.common.runtime import choose_device
from clips.lab.grid import RECORD, Run, Step, fix
from mllm.compare.analysis import benchmark_folder, benchmark_results
from mllm.compare.comparison import (
    COLUMNS,
    FORMAT,
    LATER,
    NOT_FIXED,
    PLAN,
    QUESTIONS,
    QUICK_PRETRAINING,
    RECIPES,
    Comparison,
    EncoderRun,
    PretrainedEncoder,
    check_format,
    deciding,
    kinds_of,
    of_deciding_column,
)  # fmt: skip
from mllm.data.captions import count_records
from mllm.data.questions import read_questions
from mllm.evaluation.scores import scorer_version
from mllm.model.projector_start import start_in_words
from mllm.training.build import data_of, encoder_of, open_data
from mllm.training.config import StageConfig, parse_stages
from mllm.training.recipes import STAGES
from mllm.training.trainer import samples_after, steps_of

MODEL = "llava_hf"
"""lmms-eval's name for a stock LLaVA model of transformers."""


# ------------------------------------------------------------------------------------------- both stages of a run
def stage_config(comparison: Comparison, run: EncoderRun, stage: int) -> StageConfig:
    """Return the configuration of stage 1 or 2 of a run, its steps or epochs scaled by the comparison's budget.

    Raises UserError for flags that train_llava.sh would refuse.
    """
    flags = ["--vision", run.vision, "--seed", str(run.seed), "--output_dir", str(run.directory)]
    flags += ["--device", comparison.device, *comparison.train_flags]
    flags += dict(comparison.variants).get(run.variant, ())
    full = parse_stages(flags, lambda device: comparison.gpus)[stage - 1]
    share = comparison.budget_share
    if share == 1:
        return full
    if full.max_steps > 0:
        return replace(full, max_steps=max(1, round(share * full.max_steps)))
    return replace(full, num_train_epochs=float(f"{share * full.num_train_epochs:g}"))


def stage_samples(comparison: Comparison, run: EncoderRun, stage: int) -> int:
    """Return how many samples one stage of a run trains on."""
    config = stage_config(comparison, run, stage)
    samples = dataset_size(config)
    return samples_after(steps_of(config, samples), samples, config.batch_size)


def samples_of_runs(comparison: Comparison, runs: list[EncoderRun]) -> dict[str, dict[str, int]]:
    """Return for each variant and stage the number of samples on which each of its runs trains."""
    one_of_each = {run.variant: run for run in runs}
    return {
        variant: {stage.name: stage_samples(comparison, run, number) for number, stage in STAGES.items()}
        for variant, run in one_of_each.items()
    }


def dataset_size(config: StageConfig) -> int:
    """Return how many samples one epoch of a stage has."""
    return count_records(data_of(config)[0], open_data(config))


# ------------------------------------------------------------------------------------------- runs for the engine
def lab_run(comparison: Comparison, run: EncoderRun) -> Run:
    """Return `run` as a `Run` (clips/lab/grid.py). Its steps are both stages, the answers and the benchmarks."""
    train = [sys.executable, *launcher(comparison.gpus), str(SCRIPTS / "train_llava.py")]
    steps = []
    for number, stage in STAGES.items():
        command = [*train, "--config", stage_config(comparison, run, number).to_json()]
        done = run.directory / stage.name / "done.json"
        steps.append(Step(stage.name, tuple(command), done.is_file))
    if comparison.asks_questions:
        limit = comparison.question_limit
        command = [sys.executable, str(SCRIPTS / "evaluate_llava.py"), "--model", str(run.directory / "model")]
        command += ["--output", str(run.evaluation), "--device", comparison.device]
        command += ["--questions", str(comparison.questions)] if comparison.questions else []
        command += ["--image-folder", str(comparison.image_folder)] if comparison.image_folder else []
        command += ["--limit", str(limit)] if limit else []
        command += ["--likelihood"] * ("likelihood" in comparison.evaluation_settings())
        steps.append(Step("evaluation", tuple(command), run.metrics.is_file))
    steps += [benchmark_step(comparison, run.directory, task) for task in comparison.benchmarks]
    record = {name: getattr(run, name) for name in ("encoder", "vision", "pretraining_seed", "seed")}
    record["evaluation"] = comparison.evaluation_settings()

    def result() -> str:
        metrics = read_json(run.metrics).get("metrics", {})  # there is no file if only benchmarks run
        overall = metrics.get(deciding_name("overall", metrics))
        return f", {overall['value']:.1f}% right" if overall else ""

    check = partial(check_run, comparison, run)
    return Run(run.encoder, run.seeds, run.directory, tuple(steps), check, record=record, result=result)


def check_run(comparison: Comparison, run: EncoderRun) -> None:
    """Raise UserError if the directory of a run was made with other settings or another encoder."""
    present, changes = run.read("config.json"), []
    for number, stage in STAGES.items():
        if stage.name in present:
            config, before = stage_config(comparison, run, number), dict(present[stage.name]["trains"])
            now = json.loads(json.dumps(config.on(choose_device(comparison.device)).what_trains()))
            fingerprint = before.pop("vision_fingerprint", None)
            before.pop("packed", None)  # says how batches are computed, and no flag sets it
            before["vision_tower"] = now["vision_tower"]  # its path may change, but its weights may not
            by_stage = [f"{stage.name}.{line}" for line in changed(before, now)]
            if not by_stage and fingerprint != encoder_of(config).fingerprint:
                by_stage = [f"{run.vision} holds other weights than those it was trained on"]
            changes += by_stage
    mend = "Give the comparison another --output, or remove"
    refuse(changes, f"run {run.name} ({run.directory}) holds other settings", f"{mend} {run.directory}")
    evaluated = run.read(RECORD).get("evaluation") if run.evaluation.is_dir() else None
    changes = changed(evaluated, comparison.evaluation_settings()) if evaluated else []
    refuse(changes, f"run {run.name} was evaluated otherwise: {run.evaluation}", f"{mend} {run.evaluation}")


# ------------------------------------------------------------------------------------------- the encoders
def pretrain_flags(comparison: Comparison, encoder: PretrainedEncoder) -> list[str]:
    """Return the flags of scripts/pretrain_clips.py for an encoder of the comparison."""
    flags = ["--recipe", RECIPES[encoder.kind], "--name", encoder.directory.name, "--seed", str(encoder.seed)]
    flags += ["--output", str(encoder.directory.parent), "--device", comparison.device]
    if comparison.quick:
        flags += ["--samples", str(round(QUICK_PRETRAINING * _config_of(flags).samples))]
    return [*flags, *comparison.pretrain_flags]


def pretrain_config(comparison: Comparison, encoder: PretrainedEncoder) -> RunConfig:
    """Return the configuration that `pretrain_flags` give. Raises UserError for flags that would be refused."""
    return _config_of(pretrain_flags(comparison, encoder))


def _config_of(flags: list[str]) -> RunConfig:
    return config_from_flags(pretraining_parser().parse_args(flags))


def benchmark_step(comparison: Comparison, run: Path, task: str) -> Step:
    """Return the step that runs lmms-eval on a run's saved model, in the precision of the run's answers."""
    device, dtype = choose_device(comparison.device), comparison.evaluation_settings()["dtype"]
    folder = benchmark_folder(run, task)
    command = [sys.executable, "-m", "lmms_eval", "--model", MODEL, "--batch_size", "1", "--device", str(device)]
    # transformers does not accept lmms-eval's default for device_map, "".
    command += ["--model_args", f"pretrained={run / 'model'},device_map={device},dtype={dtype}", "--tasks", task]
    command += ["--include_path", str(comparison.include_path)] if comparison.include_path else []
    command += ["--output_path", str(folder), "--log_samples"]
    return Step(task, tuple(command), lambda: bool(benchmark_results(run, [task])), folder=folder, may_fail=True)


# ------------------------------------------------------------------------------------------- the plan
def fix_plan(comparison: Comparison) -> dict[str, Any]:
    """Write compare.json, unless runs have begun under an existing plan, and copy the question files.

    Return the plan that the flags ask for now.
    """
    output = comparison.output
    if (output / PLAN).is_file():
        check_format(read_json(output / PLAN), output)
    plan = plan_of(comparison)
    with replacing(output / QUESTIONS) as copies:
        for name, path in comparison.question_files()[0].items():
            shutil.copyfile(path, copies / f"{name}.{'jsonl' if path.suffix == '.jsonl' else 'json'}")
    begun = len(list((output / "runs").glob(f"*/{RECORD}")))  # also of other encoders and seeds than now
    fix(output / PLAN, plan, begun)
    return plan


def plan_of(comparison: Comparison) -> dict[str, Any]:
    """Return the content of compare.json. Raises UserError for a deciding metric that the questions do not give."""
    runs = comparison.runs
    files = comparison.question_files()[0]
    samples = samples_of_runs(comparison, runs)
    questions = {name: comparison.asked(path) for name, path in files.items()}
    stages = {stage.name: number for number, stage in STAGES.items()}
    fixed = {name: value for name, value in vars(comparison).items() if name not in NOT_FIXED}
    for name in LATER:
        if not fixed[name]:
            del fixed[name]
    flags = json.loads(json.dumps(fixed))
    return {
        "format": FORMAT,
        "comparison": flags,
        "decides": deciding(comparison.decides, of_deciding_column(questions)),
        "is_demo": comparison.is_demo,
        "budget": {
            "share": comparison.budget_share,
            "samples": samples.pop(""),
            "projector": {name: _projector(stage_config(comparison, runs[0], n)) for name, n in stages.items()},
            **({"samples of variants": samples} if samples else {}),
        },
        "questions": {
            name: {
                "file": path.name,
                "column": COLUMNS.get(name, name),
                "sha256": sha256(path),
                "questions": len(read_questions(path)),
                "asked": len(questions[name]),
                "kinds": kinds_of(questions[name]),
            }
            for name, path in files.items()
        },
        "scorer": scorer_version(),
    }


def _projector(config: StageConfig) -> str:
    """Return kind and initialisation of the projector, which are the same in every run, as a text."""
    start = "from stage 1"
    if config.pretrain_mm_mlp_adapter is not None:
        start = f"from {config.pretrain_mm_mlp_adapter}"
    elif config.stage == 1:
        start = start_in_words(config.mm_projector_init or "random", dataset_size(config))
    return f"{config.mm_projector_type}, {start}"
