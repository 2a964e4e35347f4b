"""Started by test_host_reads.py: where the host reads from the device, which on a GPU it then waits for.

python host_reads_worker.py engine KIND       # three steps of a tiny model in each ZeRO stage
python host_reads_worker.py loop OUT FLAGS …  # scripts/pretrain_clips.py with FLAGS, up to the end of the training
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT, tiny_batch
from torch.utils._python_dispatch import TorchDispatchMode

from clips.common.errors import run_command
from clips.common.runtime import init_distributed
from clips.training import cli, loop
from clips.training.engine import Engine
from clips.training.grad_cache import optimizer_step
from clips.training.meter import Meter

aten = torch.ops.aten
READS = {
    *(aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default),
    *(aten._unique2.default, aten.repeat_interleave.Tensor),
}
"""Operators that wait: item, int(), float() and bool() of a tensor are the first, the others find a size."""
BY_MASK = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""So do these, of a boolean mask."""
METHODS = ("tolist", "numpy", "cpu")
"""Of a tensor, which read without an operator."""
SEEN: list[str] = []
STEP, LOG, LOGGED = "step", "log", "logged"
"""What stands between the reads in SEEN."""


def note() -> None:
    """FILE/FUNCTION of this project or of DeepSpeed that asked for it."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        ours = path.is_relative_to(ROOT / "clips") or "deepspeed" in path.parts
        if ours and not frame.name.startswith("<"):  # a comprehension is part of its function
            SEEN.append(f"{path.name}/{frame.name}")
            return
    SEEN.append("elsewhere")


class Reads(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if function in BY_MASK else ()
        if function in READS or any(index is not None and index.dtype == torch.bool for index in indices):
            note()
        return function(*args, **(kwargs or {}))


def noting(method: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*arguments: Any, **options: Any) -> Any:
        note()
        return method(*arguments, **options)

    return noted


def marking(method: Callable[..., Any], before: str, after: str | None = None) -> Callable[..., Any]:
    def marked(*arguments: Any, **options: Any) -> Any:
        SEEN.append(before)
        result = method(*arguments, **options)
        SEEN.extend([after] if after else [])
        return result

    return marked


def listen() -> None:
    for name in METHODS:
        setattr(torch.Tensor, name, noting(getattr(torch.Tensor, name)))


def engine_steps(kind: str) -> None:
    from zero_worker import CPU, STAGES, build

    init_distributed(CPU)
    found = {}
    for name, zero in STAGES.items():
        engine = build(kind, zero)
        batches = [engine.task.counted(tiny_batch(step)) for step in range(3)]
        with Reads():
            found[name] = [reads_of_step(engine, batch) for batch in batches]
    print(json.dumps(found))


def reads_of_step(engine: Engine, batch: dict[str, Any]) -> list[str]:
    SEEN.clear()
    engine.set_lr(1e-2, 2e-2)
    agreed = optimizer_step(engine, [batch])
    assert agreed.finite
    return list(SEEN)


def main() -> None:
    what, argument, *flags = sys.argv[1:]
    listen()
    if what == "engine":
        engine_steps(argument)
        return
    train = loop._train

    def watched(*arguments: Any) -> None:
        with Reads():
            train(*arguments)
        Path(argument).write_text(json.dumps(SEEN), encoding="utf-8")
        sys.stdout.flush()
        os._exit(0)

    loop._train = watched
    Engine.step = marking(Engine.step, STEP)
    Meter.log = marking(Meter.log, LOG, LOGGED)
    cli.pretrain_from_flags(cli.parser().parse_args(flags))


if __name__ == "__main__":
    sys.exit(run_command(main))
