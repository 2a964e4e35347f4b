"""What a run writes while it trains: the .jsonl files, the loggers of --report_to, the progress line.

Imports no torch, because commands check --report_to before that takes seconds; what is measured is in metrics.py.
"""

import contextlib
import importlib.util
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from clips.common.errors import CommandError, UserError
from clips.common.live import LiveLine, progress_line, say
from clips.common.plots import pretty
from clips.common.rundir import METRICS, keep_lines

SKIPPED, SPIKES = "skipped.jsonl", "spikes.jsonl"
VALIDATED = ("sentence_i2t_r1", "web_i2t_r1", "zero_shot_top1")
"""Metrics of a validation that the terminal shows."""
LOGGERS = ("tensorboard", "wandb", "trackio")
HELP = f"loggers of the losses besides metrics.jsonl, joined by commas: {', '.join(LOGGERS)}, or none"
TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's files in a run directory."""
WANDB_ID = "wandb.id"
"""File in a run directory with the id of its run in wandb."""


class RunLog:
    """Rank 0's log; on other ranks every method does nothing."""

    def __init__(
        self,
        run_dir: Path,
        samples: int,
        config: Mapping[str, Any],
        *,
        start_step: int,
        active: bool,
        report_to: Sequence[str] = (TENSORBOARD,),
        run_name: str | None = None,
        stage: str = "",
    ) -> None:
        """Open the log of a training on `samples` samples that continues after step `start_step`.

        Args:
            config: Settings of the run that the loggers record.
            stage: Name of one of several trainings in `run_dir`. Its lines in metrics.jsonl carry the name, and its
                other files are in the folder of this name.
        """
        self.active, self.stage = active, stage
        if not active:
            return
        self.run_dir = run_dir
        keep_lines(run_dir / METRICS, start_step, **({"stage": stage} if stage else {}))  # no step stands twice
        for name in () if stage else (SKIPPED, SPIKES):  # a stage's data is checked before it begins
            keep_lines(run_dir / name, start_step)
            (run_dir / name).touch()
        self.metrics = (run_dir / METRICS).open("a", encoding="utf-8", buffering=1)
        name = run_name or f"{run_dir.name}/{stage}".rstrip("/")
        self.trackers = Trackers(report_to, run_dir / stage, name, config, start_step)
        self.line, self.total = LiveLine(), samples
        self.newest: dict[str, Any] = {}
        """The newest metrics of training."""
        self.first: tuple[int, float] | None = None
        """(samples, time) after the first step, from which the remaining time is estimated."""

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, send the same scalars to the loggers, and update the progress line.

        Raises CommandError if they cannot be written, so that no run continues silently with gaps in its log.
        """
        if not self.active:
            return
        with self._writing(values["step"]):
            named = {"stage": self.stage} if self.stage else {}
            self.metrics.write(json.dumps({"kind": kind, **named, "time": round(time.time(), 3), **values}) + "\n")
            scalars = {
                f"{values.get('split', kind)}/{key}": value
                for key, value in values.items()
                if isinstance(value, (int, float)) and key not in ("step", "samples")
            }
            self.trackers.log(scalars, values["step"])
        samples = values["samples"]
        if kind != "train":
            metrics = [f"{pretty(name)} {values[name]:.1f} %" for name in VALIDATED if name in values]
            self.say(f"validation after {samples:,} samples: {', '.join(metrics) or 'see metrics.jsonl'}")
            return
        self.newest = values

    def progress(self, samples: int) -> None:
        """Show the progress line after a step."""
        if not self.active:
            return
        now = time.monotonic()
        if self.first is None:
            self.first = (samples, now)
        done = samples - self.first[0]
        left = (now - self.first[1]) / done * (self.total - samples) if done > 0 else None
        words = progress_line(self.newest | {"samples": samples}, self.total, left)
        self.line.show(f"{self.stage}: {words}".removeprefix(": "), final=samples >= self.total)

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CommandError(
                f"the record of step {step} cannot be written to {self.run_dir}: {error}. Make room, then "
                "the same command goes on from the last checkpoint"
            ) from None

    def skipped(self, samples: list[tuple[str, str]], step: int) -> None:
        """Append the broken samples (key, reason) of a step to skipped.jsonl."""
        if self.active and samples:
            self._append(SKIPPED, [{"step": step, "key": key, "reason": reason} for key, reason in samples])

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        with (self.run_dir / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def spike(self, values: dict[str, Any], keys: list[list[str]]) -> None:
        """Append a step to spikes.jsonl (rank 0 only); `keys` are the sample keys of each rank.

        Prints a warning if the loss jumped or the step was skipped; a spike of only the gradient norm is just recorded.
        """
        if self.active:
            with self._writing(values["step"]):
                self._append(SPIKES, [values | {"keys": keys}])
            if values["action"] == "continue" and not values["loss_jumps"]:
                return  # a gradient that the loss does not feel belongs to a healthy run
            norm = ""
            if values["grad_norm"] is not None and values["usual_grad_norm"] is not None:
                norm = f", gradient norm {values['grad_norm']:.4g} (usually {values['usual_grad_norm']:.4g})"
            self.say(
                f"warning: spike at step {values['step']}: loss {values['loss']:.4g} (usually "
                f"{values['usual_loss']:.4g}){norm}; {values['action']}. Its samples are in spikes.jsonl"
            )

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.active:
            say(text)

    def close(self) -> None:
        """Close the files, the loggers and the progress line."""
        if self.active:
            self.line.close()
            for file in (self.metrics, self.trackers):
                with contextlib.suppress(OSError):  # of a full disk, which `record` has reported
                    file.close()


def loggers(text: str) -> list[str]:
    """Return the loggers listed in --report_to. Raises UserError for an unknown name and for a missing package."""
    names = [name for name in text.split(",") if name != "none"]
    for name in names:
        if name not in LOGGERS:
            raise UserError(f"--report_to {name}: no such logger; there are {', '.join(LOGGERS)} and none")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name} needs a package: pip install {name}")
    return names


def _resumes_wandb(folder: Path, step: int) -> dict[str, str]:
    """Return wandb's folder and the id of its run, which is a new one for a training that begins at step 0."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / WANDB_ID
    if step == 0 or not file.is_file():
        file.write_text(uuid.uuid4().hex, encoding="utf-8")
    return {"dir": str(folder), "id": file.read_text(encoding="utf-8"), "resume": "allow"}


class Trackers:
    """The loggers of one run. All take the same scalars. `folder` holds TensorBoard's and wandb's own files.

    `step` is the step from which the training goes on, or 0.
    """

    def __init__(self, names: Sequence[str], folder: Path, name: str, config: Mapping[str, Any], step: int) -> None:
        self.board: Any = None
        if TENSORBOARD in names:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / TENSORBOARD), purge_step=step + 1)  # forgets what came after `step`
        self.others = [import_module(logger) for logger in names if logger != TENSORBOARD]
        for module in self.others:
            resumes = _resumes_wandb(folder, step) if module.__name__ == "wandb" else {}
            if module.__name__ == "trackio" and step > 0:  # which knows a run by its name
                resumes = {"resume": "allow"}
            module.init(project="clips-mllm", name=name, config=dict(config), **resumes)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Send scalars of optimizer step `step` to TensorBoard and the other loggers."""
        if self.board is not None:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, step)
        for module in self.others:
            module.log(dict(scalars), step=step)

    def close(self) -> None:
        """Flush and close all loggers."""
        if self.board is not None:
            self.board.close()
        for module in self.others:
            module.finish()
