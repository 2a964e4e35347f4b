"""What a run prepares before its first step: its directory, data and tokenizer, and the plan that it prints."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clips.common import rundir
from clips.common.distributed import Start, once_per_machine
from clips.common.errors import UserError
from clips.common.files import read_json, write_json
from clips.common.live import expected_time, say
from clips.common.page import table_of
from clips.common.paths import without_secrets
from clips.common.runtime import has_bf16
from clips.config import ModelConfig, PhaseConfig, RunConfig, TaskConfig, changed_fields
from clips.data.dataset import Dataset
from clips.data.loader import counted
from clips.data.splits import check_readable, held_out_images, held_out_sets, holds_out, open_split, split_spec
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.engine import checkpoint
from clips.engine.engine import Batch
from clips.model.clips import CLIPSModel
from clips.weights.initial import Beginning, InitialWeights, check_agrees, read_initial

MANY_EPOCHS = 50
"""Number of epochs above which the plan warns; the recipes are meant for 0.1 to 20."""


def open_run(
    run: RunConfig, run_dir: Path, resume: str, start: Start, device: torch.device, *, allow_config_change: bool,
    dry_run: bool,
) -> tuple[RunConfig, checkpoint.Checkpoint | None, bool]:  # fmt: skip
    """Create or check the run directory, and find the checkpoint to resume from. Collective.

    Rank 0 locks the directory and removes what interrupted saves left behind, except in a `dry_run`. One rank of each
    machine hashes the checkpoint. config.json is written later, once the data is known to be right. `resume` is `auto`,
    `never`, or a checkpoint directory. Raises UserError if the directory holds another configuration or cannot be
    written, if `resume` does not fit it, or if the phases do not fit the checkpoint (`check_progress`), and
    NoCheckpointError if none of its checkpoints is usable.

    Returns:
        `run` with its precision decided, the checkpoint or None, and whether the run has config.json already.
    """
    config_file = run_dir / "config.json"
    saved = RunConfig.load(config_file) if config_file.exists() else None
    if resume == "never" and (saved is not None or rundir.checkpoints(run_dir)):
        raise UserError(f"{run_dir} holds a run already; give another --name, or leave --resume never out")
    if saved is not None and not allow_config_change:
        mend = "Give the new run another --name, or go on with the changes by --allow-config-change"
        rundir.refuse(changed_fields(saved, run), f"{run_dir} holds a run with another configuration", mend)
    if not dry_run:
        try:
            (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=run_dir).close()
        except OSError as error:
            raise UserError(f"cannot write to {run_dir}: {error}; choose another --output") from None
        if start.rank == 0:
            rundir.hold(run_dir)
            checkpoint.remove_leftovers(run_dir)
    newest = resume in ("auto", "never")
    previous = once_per_machine(lambda: checkpoint.latest(run_dir) if newest else checkpoint.load(Path(resume)))
    if previous is not None:
        if checkpoint.run_of(previous.path) != run_dir.resolve():
            raise UserError(f"--resume {resume} is of another run; for a branch copy that run under another --name")
        check_progress(run, previous)
    has_begun, precision = start.of_rank_0((saved is not None, precision_of(run, saved, device)))
    return replace(run, train=replace(run.train, precision=precision)), previous, has_begun


def precision_of(run: RunConfig, saved: RunConfig | None, device: torch.device) -> str:
    """Return the precision of a run; for "auto" that in which it was `saved`, or else bf16 if `device` has it.

    Otherwise bf16 is emulated: on a CPU with only AVX2, the demo trains at 8 samples/s with it and at 110 in fp32.
    """
    if run.train.precision != "auto":
        return run.train.precision
    if saved is not None:
        return saved.train.precision
    return "bf16" if has_bf16(device) else "fp32"


def check_progress(run: RunConfig, previous: checkpoint.Checkpoint) -> None:
    """Raise UserError if the phases of `run` do not lead to the step and the samples of its checkpoint.

    The progress is kept in both. If they differed, samples would be repeated or left out, and the run would end too
    early, or go beyond its last phase.
    """
    state = previous.state
    *ended, current = run.phases[: state.phase + 1]
    planned = sum(phase.seen for phase in ended) + state.phase_step * current.batch_size
    if len(ended) < state.phase or state.phase_step > current.steps or planned != state.samples:
        raise UserError(
            f"{previous.path} is at {state.samples:,} samples, step {state.phase_step:,} of phase {state.phase}, to "
            "which the changed phases do not lead: a phase that has begun keeps its batch size, and only the one that "
            "runs may get more samples. Leave them as they were, or give another --name with --init-from "
            f"{checkpoint.run_of(previous.path)}"
        )


def read_given_weights(run: RunConfig, run_dir: Path) -> InitialWeights | None:
    """Read the initial weights of a run, or return None if they are random; not called for a run that resumes.

    Raises UserError if this run started from other weights before it ended without a checkpoint.
    """
    if run.train.init_from is None:
        return None
    initial = read_initial(run.train.init_from)
    check_agrees(run, initial)
    before = rundir.began_with(run_dir)
    if before is not None and before["sha256"] != initial.sha256:
        raise UserError(
            f"--init-from {initial.source} holds other weights now than those with which {run_dir} began, and "
            "there is no checkpoint of it to go on from: give another --name"
        )
    return initial


def prepare_data(
    run: RunConfig,
    run_dir: Path,
    initial: InitialWeights | None,
    start: Start,
    *,
    has_begun: bool,
    dry_run: bool,
    verify: bool = False,
) -> tuple[Dataset, CaptionTokenizer, str]:
    """Open the training data, once on each machine, and the run's tokenizer. Collective, without a time limit.

    Rank 0 builds a missing tokenizer, or takes the one of the `initial` weights' text tower, and saves it and
    data.json. All other splits are opened once, so that a wrong path shows now; the third result describes the
    validation data of this machine. Raises UserError for other data than the run began with (if it
    `has_begun`), and for a tokenizer larger than the model's vocabulary; BrokenDataError for too many unusable rows.
    """
    need_long = run.task.captions

    def opened() -> tuple[Dataset, str]:
        train = open_split(run.data, "train", need_long=need_long)  # builds the demo under a lock
        check_readable(train, run.data.max_broken_share)
        if verify:
            train.verify()
        held_out = {
            split: open_split(run.data, split, need_long=False)  # a wrong path is found now, not after the training
            for split in ("val", *held_out_sets(run.data))
            if split_spec(run.data, split)
        }
        train.metadata()  # reads the captions of a selection, once on each machine
        return train, _described(held_out["val"]) if "val" in held_out else "none"

    dataset, val = once_per_machine(opened)
    if has_begun:
        dataset = same_data(run_dir, dataset)
    start.all_have(True)  # machines are not equally fast, and a collective has a time limit
    directory = run_dir / "tokenizer"

    def make() -> CaptionTokenizer:
        if initial is not None and initial.tokenizer is not None:
            return initial.tokenizer
        return build_tokenizer(run.captions.tokenizer, dataset.all_captions(), vocab_size=run.model.text.vocab_size)

    # Without config.json a tokenizer is of a run that never began.
    if dist.get_rank() == 0 and not has_begun and not dry_run:
        make().save(directory)
        write_json(run_dir / rundir.DATA, dataset.metadata())
    start.all_have(True)
    is_present = has_begun or not dry_run
    tokenizer = CaptionTokenizer.load(directory) if is_present else make()
    if tokenizer.vocab_size > run.model.text.vocab_size:
        raise UserError(
            f"model.text.vocab_size is {run.model.text.vocab_size} but the {run.captions.tokenizer} tokenizer has "
            f"{tokenizer.vocab_size} tokens; --set model.text.vocab_size={tokenizer.vocab_size}"
        )
    return dataset, tokenizer, val


def same_data(run_dir: Path, dataset: Dataset) -> Dataset:
    """Return the samples with which the run in `run_dir` began. Raises UserError if `dataset` has others.

    Rows that could not be used at first stay out, even if they can be used now. Runs without a record pass.
    """
    before = read_json(run_dir / rundir.DATA)
    if "contents" in before or not before:  # of a version that had no imports: names, sizes and counts of files
        if not before or before["sha256"] == dataset.listing():
            return dataset
        raise UserError(
            f"{run_dir} began with {before['samples']:,} samples, before data were imported, and {len(dataset):,} can "
            f"be used now: give another --name, or another --name with --init-from {run_dir}"
        )
    unusable = before.get("unusable", [])
    if len(dataset) > before["samples"] and unusable:
        dataset = dataset.without(unusable)
    now = dataset.metadata()
    names = {"samples": "the number of samples", "files": "the number of files", "captions_sha256": "captions"}
    names["hashes_sha256"] = "images"
    changed = [f"{what} ({before[name]} before, {now[name]} now)" if isinstance(now[name], int) else what
               for name, what in names.items() if before[name] != now[name]]  # fmt: skip
    if changed:
        raise UserError(
            f"{run_dir} has trained on other data; what differs: {', '.join(changed)}. Give another --name to begin "
            f"anew, or another --name with --init-from {run_dir} to go on from its weights"
        )
    return dataset


def facts_of_data(
    dataset: Dataset, val: str, tokenizer: CaptionTokenizer, initial: InitialWeights | None
) -> dict[str, Any]:
    """Return what must be equal on all ranks before they train together, for `Start.agree`.

    Otherwise a node that lacks a shard would silently train on other data, or add other images to a validation, which
    all ranks share. `val` is what `prepare_data` returns.
    """
    return {
        "the weights to begin with": initial.sha256 if initial else "none",
        "the training data": _described(dataset),
        "the validation data": val,
        "the tokenizer": f"{tokenizer.vocab_size} tokens",
    }


def _described(dataset: Dataset) -> str:
    """Return the number of samples and files, and a hash of captions and images, in words."""
    facts = dataset.metadata()
    digest = f"{facts['captions_sha256'][:8]} {facts['hashes_sha256'][:8]}"
    return f"{len(dataset):,} samples in {facts['files']:,} files ({digest})"


def full_batch(
    model: ModelConfig, task: TaskConfig, image_size: int, samples: int, device: torch.device, *,
    words: int | None = None, share: float = 1,
) -> Batch:  # fmt: skip
    """Return a micro-batch in the layout of clips/data/loader.py, without padding.

    Its images are on `device` ("meta" too), and all else is on the host.

    Args:
        words: Slots of each text; None: the full context.
        share: Share of the samples that have a caption, each of full length.
    """
    vision, captioner = model.vision, model.captioner
    words = words or model.text.context_length
    batch: Batch = {name: torch.full((samples, words), 5) for name in task.texts}
    batch["images"] = torch.empty(samples, 3, image_size, image_size, dtype=torch.uint8, device=device)
    seen = vision.kept_tokens(image_size)
    if vision.patch_dropout:
        batch["patches"] = torch.arange(seen).expand(samples, -1)
    if captioner is not None and task.captions:
        batch["caption"] = torch.full((samples, captioner.length), 5)
        batch["caption"][round(share * samples) :] = 0
        if captioner.image_token_keep < 1:
            batch["image_tokens"] = torch.arange(captioner.kept_tokens(seen)).expand(samples, -1)
    return counted(batch, model, pad_id=0)


def print_plan(
    run: RunConfig,
    model: CLIPSModel,
    samples: int,
    run_dir: Path,
    device: torch.device,
    ranks: int,
    previous: checkpoint.Checkpoint | None,
    beginning: Beginning | None = None,
) -> None:
    """Print what is about to happen. Nothing is measured or simulated here; scripts/plan_run.py has memory and days."""
    begun = previous.state.samples if previous is not None else 0
    parts = "  ".join(f"{name} {count / 1e6:.2f} M" for name, count in model.parameter_counts().items())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = [
        ("model", f"{parts} parameters, of which {trained / 1e6:.2f} M train (train.freeze={run.train.freeze})"),
        ("objective", f"{run.task.objective}, caption weight {run.task.caption_weight if run.model.captioner else 0}"),
    ]
    rows.append(("data", f"{split_spec(run.data, 'train')}: {samples:,} samples"))
    shares = sum(part.share for part in run.data.mix)
    rows += [("", f"{part.share / shares:.1%} {part.name}: {part.data}") for part in run.data.mix]
    for name in dict.fromkeys(("val", "test", *held_out_sets(run.data))):
        spec = split_spec(run.data, name) or f"none (give --{name}-data to measure how good it is)"
        if name == "val" and holds_out(run.data):
            spec = held_out_images(run.data)[1]
        rows.append((f"  {name}", spec))
    rows += [(f"phase {phase.name}", phase_line(run, phase, samples, ranks)) for phase in run.phases]
    if run.samples > MANY_EPOCHS * samples:
        hint = "which it may learn by heart: give fewer --samples, or --init-from pretrained weights"
        rows.append(("", f"{run.samples / max(samples, 1):,.0f} epochs over your {samples:,} images, {hint}"))
    if time := expected_time(speed_name(run, model, ranks, device), run.samples - begun):
        rows.append(("time", time))
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads each (OMP_NUM_THREADS)"
    is_slow = run.train.precision == "bf16" and not has_bf16(device)
    slow = f", which this {device.type} only emulates: train.precision=fp32 is many times faster" if is_slow else ""
    decay = f", layer decay {run.optim.layer_decay:g}" if run.optim.layer_decay < 1 else ""
    rows.append(("optimizer", f"{run.optim.kind}{decay}, {run.train.precision}{slow}"))
    rows.append(("on", f"{ranks} × {device.type}{threads}"))
    rows.append(("writes to", str(run_dir)))
    if previous is not None:
        rows.append(("goes on from", f"{previous.path} ({begun:,} samples)"))
        if holds_out(run.data) and not (run_dir / rundir.DATA).is_file():
            rows.append(("  but", "it began when rows were held out, so it has trained on images that now validate"))

    say(table_of(f"recipe {run.recipe}", (), [(name, without_secrets(words)) for name, words in rows]))
    if beginning is not None:
        say(beginning.table(run))


def speed_name(run: RunConfig, model: CLIPSModel, ranks: int, device: torch.device) -> str:
    """Return a description that trainings of equal speed have in common, the key for `expected_time`."""
    sizes = ", ".join(f"{phase.image_size} px" for phase in run.phases)
    parameters = sum(p.numel() for p in model.parameters())
    on = f"{ranks} × {device.type}, {torch.get_num_threads()} threads"
    return f"{run.recipe}: {parameters:,} parameters, {sizes}, {run.train.precision} on {on}"


def phase_line(run: RunConfig, phase: PhaseConfig, samples: int, ranks: int) -> str:
    """Return the steps, batches, rates and schedule of a phase in words."""
    count = run.train.accumulation
    micro = phase.batch_size // (ranks * count)
    contrasts = f" (train.contrastive={run.train.contrastive})" if count > 1 else ""
    muon = f", Muon lr {phase.muon_lr:g}" if run.optim.kind == "muon" else ""
    fresh = ", a fresh optimizer" if phase.fresh_optimizer and phase is not run.phases[0] else ""
    return (
        f"{phase.steps:,} steps × {phase.batch_size} = {ranks} ranks × {count} × {micro}{contrasts}, {phase.seen:,} "
        f"samples ({phase.seen / max(samples, 1):.1f} epochs) at {phase.image_size} px,\n"
        f"lr {phase.lr:g}{muon}, {phase.schedule}{fresh}"
    )
