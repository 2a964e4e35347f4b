"""The loggers of --report_to, the same in both packages: TensorBoard, Weights & Biases, trackio."""

import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from clips.common.errors import UserError

LOGGERS = ("tensorboard", "wandb", "trackio")
HELP = f"loggers of the losses besides metrics.jsonl, joined by commas: {', '.join(LOGGERS)}, or none"
TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's files in a run directory."""
WANDB_ID = "wandb.id"
"""File in a run directory with the id of its run in wandb."""


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

            self.board = SummaryWriter(str(folder / TENSORBOARD), purge_step=step)  # forgets what came after `step`
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
