"""scripts/pretrain_clips.py with a fault in what the data gives: python faulty_run.py FAULT RANK FLAGS …

RANK: whose data has it, or "all". Everything else is the real run. FAULT, from step SOON or AT on (0-based):
    nan, inf     one value of one image in that step
    slow         every batch comes late
    raise        decoding raises what no code expects, in a worker of the loader
    spike        the images of that step are shuffled and its captions are noise, as from a shard with wrong captions;
    spikes       of that step and all after it; nothing is saved before step SAVED, which leaves time for the tests
    data=FOLDER  its training data are those in FOLDER, from the first step on
    val=FILE     its validation data
    last         SIGTERM comes in the validation after the last step
    full         no file grows beyond 1 MiB, as on a full disk
    hang         the rank stops after the first backward pass, before the ranks reduce their gradients
    record       none: each batch's positions and keys are written to OUTPUT/NAME/keys.jsonl as they are trained on
"""

import itertools
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clips.common import distributed
from clips.common.errors import run_command
from clips.data.images import Preprocess
from clips.engine.engine import Engine
from clips.engine.log import RunLog
from clips.training import cli, prepare, trainer
from clips.training.trainer import Task

SOON = 5
AT = 40
"""Of a spike. Before it the debug twin learns its samples."""
BATCH = 8
SAVED = 34
SECONDS = 0.3
"""By which a slow batch is late."""
calls = itertools.count()
real_loader, real_to_device, real_decoded = trainer.make_loader, Task.to_device, Preprocess.decoded
real_saves, real_validates = trainer.CLIPSTrainer.saves, trainer.CLIPSTrainer.validate_if_due


def spoiled(fault: str, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch on its device, with the fault if it is of a step that has it."""
    step = batch["positions"][0] // BATCH
    begin = AT if fault.startswith("spike") else SOON
    if step < begin or (step > begin and fault != "spikes"):
        return batch
    if fault in ("nan", "inf"):
        batch["images"][0, 0, 0, 0] = float(fault)
        return batch
    noise = torch.Generator().manual_seed(batch["positions"][0])
    caption = batch["caption"]
    words = torch.randint(5, 40, caption.shape, generator=noise)
    return batch | {"images": batch["images"].flip(0), "caption": torch.where(caption > 4, words, caption)}


def recorded(file: Path, batch: dict[str, Any]) -> dict[str, Any]:
    line = json.dumps({"positions": batch["positions"], "keys": batch["keys"]}) + "\n"
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())  # at once: several ranks write here
    os.close(descriptor)
    return batch


def late(*arguments: Any, **named: Any) -> Iterator[dict[str, Any]]:
    for batch in real_loader(*arguments, **named):
        time.sleep(SECONDS)
        yield batch


def raising(preprocess: Preprocess, data: bytes, key: str, rng: random.Random) -> Any:
    if next(calls) >= SOON * BATCH // 2:  # of two ranks
        raise ZeroDivisionError(f"a defect that {key} brings out")
    return real_decoded(preprocess, data, key, rng)


def hanging(real: Callable[..., None], engine: Engine, loss: torch.Tensor, **options: Any) -> None:
    first = next(engine.module.parameters())  # the last one to get a gradient
    first.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGSTOP))
    real(engine, loss, **options)


def other_machine_with(spec: str, of: str) -> None:
    """This rank's machine has other files under the same name."""
    real_open = prepare.open_split
    distributed.this_machine = lambda: "another one"
    prepare.open_split = lambda data, split, **options: real_open(
        replace(data, **{of: spec}) if split == of else data, split, **options
    )


def stopped_at_the_end(running: trainer.CLIPSTrainer, log: RunLog) -> None:
    if running.state.samples == running.samples:
        os.kill(os.getpid(), signal.SIGTERM)
    real_validates(running, log)


def main() -> None:
    parser = cli.parser()
    parser.add_argument("fault")
    parser.add_argument("rank")
    flags = parser.parse_args()
    if flags.rank in ("all", os.environ.get("RANK", "0")):
        if flags.fault == "raise":
            Preprocess.decoded = raising
        elif flags.fault.startswith(("data=", "val=")):
            name, _, spec = flags.fault.partition("=")
            other_machine_with(spec, "train" if name == "data" else name)
        elif flags.fault == "last":
            trainer.CLIPSTrainer.validate_if_due = stopped_at_the_end
        elif flags.fault == "slow":
            trainer.make_loader = late
        elif flags.fault == "hang":
            real = Engine.backward
            Engine.backward = lambda engine, loss, **options: hanging(real, engine, loss, **options)
        elif flags.fault == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        elif flags.fault == "record":
            file = Path(flags.output) / flags.name / "keys.jsonl"
            Task.to_device = lambda task, batch, device: real_to_device(task, recorded(file, batch), device)
        else:
            if flags.fault.startswith("spike"):
                trainer.CLIPSTrainer.saves = lambda run: run.state.samples >= SAVED * BATCH and real_saves(run)
            Task.to_device = lambda task, batch, device: spoiled(flags.fault, real_to_device(task, batch, device))
    cli.pretrain_from_flags(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
