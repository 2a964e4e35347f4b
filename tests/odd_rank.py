"""The real training commands as a rank that has found something else than the others: python odd_rank.py FACT COMMAND …

COMMAND: pretrain or llava, with its flags. RANK, WORLD_SIZE and the rest are in the environment: no launcher stands
above the ranks, which would end the others if one fails.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clips.common import rundir, runtime, start
from clips.common.errors import UserError, run_command
from clips.model.clips import CLIPSModel
from clips.training import cli, loop, prepare
from clips.training.engine import Engine
from mllm.data.dataset import LlavaDataset
from mllm.training import features, run, trainer
from mllm.training import prepare as preparing
from mllm.training.arguments import TrainArguments, parse_train_arguments

start.TELL_EVERY = 2.0


def failing(*_: object, **__: object) -> Any:
    raise UserError("this rank alone fails")


def without(name: str) -> None:
    """This machine does not see files of this name yet."""
    real = Path.stat

    def stat(path: Path, **options: Any) -> Any:
        if path.name == name:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return real(path, **options)

    Path.stat = stat


def shorter(data: type) -> None:
    data.__len__ = lambda _: 7


def other_sources() -> None:
    """The data that this rank gets has one sample less."""
    real = prepare.once_per_machine

    class Short:
        def __init__(self, source: Any) -> None:
            self.source = source

        def __getattr__(self, name: str) -> Any:
            return getattr(self.source, name)

        def __len__(self) -> int:
            return len(self.source) - 1

    def shortened(make: Callable[[], Any]) -> tuple[Any, ...]:
        source, *others = real(make)
        return Short(source), *others

    prepare.once_per_machine = shortened


FACTS: dict[str, Callable[[], object]] = {
    # What is measured or claimed
    "bf16 here": lambda: setattr(runtime, "claims_bf16", lambda _: True),
    "a version": lambda: setattr(runtime, "version", lambda name: "9.9" if name == "torch" else "1.0"),
    # What is seen in the run directory
    "no config.json": lambda: without("config.json"),
    "no done.json": lambda: without("done.json"),
    "finished": lambda: setattr(loop, "is_finished", lambda _: True),
    "no checkpoint": lambda: setattr(prepare.checkpoint, "latest", lambda _: None),
    # The data
    "fewer samples": other_sources,
    "fewer conversations": lambda: shorter(LlavaDataset),
    # An error of one rank, in each part of the start
    "fails at the device": lambda: setattr(runtime, "choose_device", failing),
    "fails at the group": lambda: setattr(loop, "init_distributed", failing),
    "fails at the run directory": lambda: setattr(loop, "open_run_dir", failing),
    "fails at the lock": lambda: setattr(rundir, "hold", failing),
    "fails at the data": lambda: setattr(prepare, "open_split", failing),
    "fails at the tokenizer": lambda: setattr(prepare.CaptionTokenizer, "load", failing),
    "fails at the model": lambda: setattr(CLIPSModel, "freeze", failing),
    "fails at the engine": lambda: setattr(Engine, "__init__", failing),
    "fails at the flags": lambda: setattr(TrainArguments, "resolve", failing),
    "fails at the parts": lambda: setattr(preparing, "load_vision", failing),
    "fails at the features": lambda: setattr(features.FeatureCache, "fill", failing),
    "fails at the projector's start": lambda: setattr(run, "fit_to_captions", failing),
    "fails at the trainer": lambda: setattr(trainer.LlavaTrainer, "create_optimizer", failing),
    "nothing": lambda: None,
}


def main() -> None:
    fact, command, *flags = sys.argv[1:]
    FACTS[fact]()
    if command == "pretrain":
        cli.pretrain_from_flags(cli.parser().parse_args(flags))
    else:
        run.run_stage(parse_train_arguments(flags))


if __name__ == "__main__":
    sys.exit(run_command(main))
