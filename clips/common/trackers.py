"""The loggers of --report_to, the same in both halves: TensorBoard, Weights & Biases, trackio."""

import importlib.util
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from clips.common.errors import UserError

LOGGERS = ("tensorboard", "wandb", "trackio")
HELP = f"loggers of the losses besides metrics.jsonl, joined by commas: {', '.join(LOGGERS)}, or none"
TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's files in a run directory."""


def loggers(text: str) -> list[str]:
    """Return the loggers listed in --report_to. Raises UserError for an unknown name and for a missing package."""
    names = [name for name in text.split(",") if name != "none"]
    for name in names:
        if name not in LOGGERS:
            raise UserError(f"--report_to {name}: no such logger; there are {', '.join(LOGGERS)} and none")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name} needs a package: pip install {name}")
    return names


class Trackers:
    """The loggers of one run. All take the same scalars. `folder` holds TensorBoard's and wandb's own files."""

    def __init__(self, names: Sequence[str], folder: Path, name: str, config: Mapping[str, Any], step: int) -> None:
        self.board: Any = None
        if TENSORBOARD in names:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / TENSORBOARD), purge_step=step)  # forgets what came after `step`
        self.others = [import_module(logger) for logger in names if logger != TENSORBOARD]
        for module in self.others:
            where = {"dir": str(folder)} if module.__name__ == "wandb" else {}
            module.init(project="clips-mllm", name=name, config=dict(config), **where)

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
