"""The real training commands as a rank that has found something else than the others: python odd_rank.py FACT COMMAND …

COMMAND: pretrain or llava, with its flags, or a start without a training: start, of a few parts; pause, in which rank 0
stands still for longer than a request to the store may take; or leave, in which rank 0 ends before rank 1 has looked.
RANK, WORLD_SIZE and the rest are in the environment: no launcher stands above the ranks, which would end the others if
one fails.
"""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from clips.common import distributed, rundir, runtime
from clips.common.errors import UserError, run_command
from clips.engine import checkpoint
from clips.engine.engine import Engine
from clips.model.clips import CLIPSModel
from clips.training import cli, prepare, pretraining
from mllm.data.dataset import LlavaDataset
from mllm.training import build as preparing
from mllm.training import features, run
from mllm.training.config import StageConfig, parse_stage

distributed.TELL_EVERY = 2.0
MINUTES = 0.1


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

    def shortened(make: Callable[[], Any]) -> Any:
        result = real(make)  # the checkpoint, or the data with what else was read of it
        return (Short(result[0]), *result[1:]) if isinstance(result, tuple) else result

    prepare.once_per_machine = shortened


def other_machine_without_checkpoints() -> None:
    """This rank's machine sees another run directory under the same name."""
    distributed.this_machine = lambda: "another one"
    checkpoint.latest = lambda _: None


def lost(how: str) -> None:
    """End or stop this process: os._exit, or a signal's name."""
    if how == "os._exit":
        os._exit(0)
    os.kill(os.getpid(), signal.Signals[how])


def only_start(how: str, where: str) -> None:
    """The parts of a start. This rank is lost at `where`; in the last part the others work meanwhile."""
    if where == "the beginning":
        lost(how)
    connect = distributed.Start._connect

    def connected(begun: distributed.Start) -> Any:
        store = connect(begun)
        if where == "the connection":
            lost(how)
        return store

    distributed.Start._connect = connected
    parts: dict[str, Callable[[], object]] = {
        "the comparison": lambda: begun.agree({}),
        "the group": lambda: dist.init_process_group("gloo"),
        "the collective": dist.barrier,
        "the work": lambda: time.sleep(60),
    }
    with distributed.Start(MINUTES) as begun:
        for part, work in parts.items():
            begun.at(part)
            if part == where:
                lost(how)
            work()


def pause() -> None:
    """A start in which rank 0 is stopped, as a debugger or a full machine stops it, and goes on before the timeout."""
    with distributed.Start() as begun:
        end = time.monotonic() + 3 * distributed.TELL_EVERY
        if begun.rank == 0:
            goes_on = f"sleep {2 * distributed.TELL_EVERY}; kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", goes_on], start_new_session=True)
            lost("SIGSTOP")
        while time.monotonic() < end:
            begun.at("the work")  # so that each of its requests reads the signs of life, too
            time.sleep(0.01)
        begun.finish()


def leave() -> None:
    """A start that rank 0 leaves with its process, as from a run that is finished, and whose end rank 1 sees later."""
    wait_for = distributed.Start._wait_for

    def later(begun: distributed.Start, keys: list[str]) -> None:
        time.sleep(begun.rank)
        wait_for(begun, keys)

    with distributed.Start() as begun:
        distributed.Start._wait_for = later
        begun.finish()


def with_full_disk(write: Callable[..., None]) -> Callable[..., None]:
    def written(*arguments: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        write(*arguments)

    return written


FACTS: dict[str, Callable[[], object]] = {
    # What is measured or claimed
    "bf16 here": lambda: setattr(runtime, "claims_bf16", lambda _: True),
    "a version": lambda: setattr(runtime, "version", lambda name: "9.9" if name == "torch" else "1.0"),
    # What is seen in the run directory
    "no config.json": lambda: without("config.json"),
    "no done.json": lambda: without("done.json"),
    "finished": lambda: setattr(pretraining, "is_finished", lambda _: True),
    "no checkpoint": other_machine_without_checkpoints,
    # The data
    "fewer samples": other_sources,
    "fewer conversations": lambda: setattr(LlavaDataset, "__len__", lambda _: 7),
    # An error of one rank, in each part of the start
    "fails at the device": lambda: setattr(runtime, "choose_device", failing),
    "fails at the group": lambda: setattr(pretraining, "init_distributed", failing),
    "fails at the run directory": lambda: setattr(pretraining, "open_run", failing),
    "fails at the lock": lambda: setattr(rundir, "hold", failing),
    "fails at the data": lambda: setattr(prepare, "open_split", failing),
    "fails at the tokenizer": lambda: setattr(prepare.CaptionTokenizer, "load", failing),
    "fails at the model": lambda: setattr(CLIPSModel, "freeze", failing),
    "fails at the engine": lambda: setattr(Engine, "__init__", failing),
    "fails at the flags": lambda: setattr(StageConfig, "on", failing),
    "fails at the parts": lambda: setattr(preparing, "load_vision", failing),
    "fails at the features": lambda: setattr(features.FeatureCache, "fill", failing),
    "fails at the projector's start": lambda: setattr(run, "fit_to_captions", failing),
    "fails at the trainer": lambda: setattr(run, "make_optimizer", failing),
    "SIGKILL at the engine": lambda: setattr(Engine, "__init__", lambda *_: lost("SIGKILL")),
    "SIGSTOP at the data": lambda: setattr(prepare, "check_readable", lambda *_: lost("SIGSTOP")),
    "a full disk at the end": lambda: setattr(run, "write_results", with_full_disk(run.write_results)),
    "nothing": lambda: None,
}


def main() -> None:
    fact, command, *flags = sys.argv[1:]
    if command == "pause":
        return pause()
    if command == "leave":
        return leave()
    if command == "start":
        how, _, where = fact.partition(" at ")
        return only_start(how, where)
    FACTS[fact]()
    if command == "pretrain":
        cli.pretrain_from_flags(cli.parser().parse_args(flags))
    else:
        run.run_stage(parse_stage(flags))


if __name__ == "__main__":
    sys.exit(run_command(main))
