"""What the ranks of a run do together: meet, compare what each has found, form a group, and share work.

A rank never enters or skips a collective because of what only it measures, finds or reads: rank 0 decides and
broadcasts, or all ranks compare first. Until the first step both go through the store of the process group, not through
collectives, because a collective that one rank skips ends after half an hour and does not say which rank it was.

torch is imported by the functions that need it, because commands check their flags before that takes seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import logging
import os
import platform
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from clips.common.errors import CommandError, Stopped, UserError, first_line, in_one_line
from clips.common.escape import printable
from clips.common.files import differing
from clips.common.paths import this_machine
from clips.common.signals import end_with_launcher

if TYPE_CHECKING:
    import torch

TELL_EVERY = 60.0
"""Seconds between two lines that say for whom the start waits."""
GRACE = 2.0
"""Seconds in which a rank may end with its own message before it ends with the message of another rank."""
SIGN_EVERY = 1.0
"""Seconds between two signs of life of a rank."""
HURRY = 10.0
"""Seconds without a sign of life after which a rank is reported, once the connection to a rank is lost."""
ANSWER = timedelta(days=7)
"""Time limit for an answer of the store, whose process may be stopped for a while: `_watch` ends a start, not this."""
SETTLED = 10.0
"""Seconds after which a process ends although gloo's threads are still at work."""
LONGEST_VALUE = 200
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that a launcher sets for each of its ranks."""
log = logging.getLogger("clips.start")
_starts = itertools.count()
_stores: list[Any] = []
"""Rank 0's process serves the store for as long as one of its stores is referenced."""
ROOT = f"{Path(__file__).resolve().parents[2]}/"
OURS = (f"{ROOT}clips/", f"{ROOT}mllm/")
LONG_WORK = timedelta(days=30)
"""Timeout for work that grows with the data. The usual timeout of a collective is for ranks that hang."""
T = TypeVar("T")


def find_ranks() -> tuple[int, int]:
    """Return (rank of this process, number of ranks) from the launcher's environment, or (0, 1) without a launcher.

    Raises UserError for an incomplete environment, for tasks of SLURM or MPI without RANK, and for torchrun restarts
    that would hang.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        # The store would hold the dead ranks' addresses (pytorch issue 135712).
        raise UserError("torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or restarted ranks hang")
    if not os.environ.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
        tasks = {name: os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")}
        if several := [f"{name}={count}" for name, count in tasks.items() if count != "1"]:
            raise UserError(f"{several[0]}, but no RANK: start the processes with torchrun or deepspeed, one per node")
        return 0, 1
    values = [os.environ.get(name, "") for name in RANK_VARIABLES]
    rank, ranks, local_rank, _, port = (int(value) if value.isdecimal() else -1 for value in values)
    first = 0 if ranks == 1 else 1  # with port 0 the store of one rank takes a port itself
    if not (0 <= rank < ranks and local_rank >= 0 and values[3] and first <= port < 2**16):
        pairs = zip(RANK_VARIABLES, values, strict=True)
        found = ", ".join(f"{name}={value}" if value else f"no {name}" for name, value in pairs)
        raise UserError(f"the environment has {found}: unset RANK, WORLD_SIZE and LOCAL_RANK, or use a launcher")
    return rank, ranks


class Start:
    """Context manager that watches the ranks of a run from the start of the program to the first optimizer step.

    An error of one rank inside the context ends every rank with that error's exit code. Each rank gives signs of life,
    whatever its main thread does. Rank 0 watches all others, they watch rank 0, and a rank that is silent for the
    timeout ends all. Every TELL_EVERY seconds rank 0 names the ranks that are behind. With one rank nothing happens.
    """

    def __init__(self, timeout_minutes: float = 30) -> None:
        """`timeout_minutes`: how long ranks wait for one that does not begin, or gives no sign of life.

        Raises UserError if it is not above 0 and below a million.
        """
        if not 0 < timeout_minutes < 1e6:
            raise UserError(f"--timeout-minutes {timeout_minutes:g}: give a number above 0 and below a million")
        self.patience = 60 * timeout_minutes
        self.rank, self.ranks = 0, 1
        self.store: Any = None  # torch.distributed.Store; torch is imported where there are several ranks
        self._beat = min(SIGN_EVERY, self.patience / 8)
        self._part = (0, "joining")
        self._signs: dict[int, bytes] = {}
        self._silence: dict[int, float] = {}
        """For each rank that is watched: its last sign of life, and the seconds since then or since the start."""
        self._decisions = itertools.count()
        self._closed = threading.Event()
        self._is_failing = False
        self._failure: CommandError | None = None
        """The error of another rank."""

    def __enter__(self) -> Start:
        self.rank, self.ranks = find_ranks()
        if self.ranks > 1:
            from torch.distributed import PrefixStore

            end_with_launcher()
            self._silence = dict.fromkeys(range(1, self.ranks) if self.rank == 0 else [0], 0.0)
            name = f"start/{next(_starts)}"
            with contextlib.ExitStack() as met:
                met.push(self)
                threading.Thread(target=self._watch, daemon=True).start()
                server = self._connect()
                server.set_timeout(ANSWER)
                _stores.append(server)
                self.store = PrefixStore(name, server)
                clone = PrefixStore(name, server.clone())  # a store answers one thread at a time
                threading.Thread(target=self._exchange, args=(clone,), daemon=True).start()
                self.all_have(True)
                met.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End every rank with the same error: this rank's own, or that of the rank whose loss caused it."""
        self._is_failing = error is not None
        lost = None
        if error is not None and self.ranks > 1 and not self._closed.is_set():
            from torch.distributed import DistError

            if isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
                lost = CommandError(f"rank {self.rank} lost another rank at {self._part[1]}: {first_line(error)}")
                self.patience = min(self.patience, HURRY)
                end = time.monotonic() + self.patience + 2 * GRACE
                while self._failure is None and time.monotonic() < end:
                    time.sleep(0.05)
            if self._failure is None or self.rank == 0:
                self._tell(lost or error)
            lost = self._failure or lost
        self.close()
        if lost is not None:
            raise lost from None

    def finish(self) -> None:
        """Wait for the first step of every rank and close: either all get here, or all end with one rank's error."""
        self.at("the first step")
        self.all_have(True)
        self.close()

    def close(self) -> None:
        """Stop watching the other ranks: from here on ranks wait for each other in collectives.

        Rank 0 serves the store, so it stays for some seconds until the others have read its last decision.
        """
        if self.store is not None and not self._is_failing and not self._closed.is_set():
            others = [f"closed/{rank}" for rank in range(1, self.ranks)]
            end = time.monotonic() + 2 * GRACE
            with contextlib.suppress(RuntimeError):  # torch's DistError: rank 0 has ended
                self.store.set(f"closed/{self.rank}", "yes")
                while self.rank == 0 and not self.store.check(others) and time.monotonic() < end:
                    time.sleep(0.005)
        self._closed.set()

    def at(self, part: str) -> None:
        """Record what this rank does next; its next sign of life reports that to the ranks that wait for it."""
        self._part = (self._part[0] + 1, part)

    # --------------------------------------------------------------------------------------------------- agreements

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise UserError on every rank unless `facts` (values of JSON) are equal on all ranks.

        The message names each fact that differs, with the value of every rank.
        """

        def compare(values: list[Any]) -> str:
            values_of: dict[str, dict[int, Any]] = {}
            for rank, other in enumerate(values):
                for path, first, value in differing(values[0], other):
                    values_of.setdefault(path, {0: first})[rank] = value
            return "\n".join(f"ranks do not agree on {path}:\n{_lines(v)}" for path, v in values_of.items())

        self.at("the comparison of the ranks")
        if problem := self._decide(dict(facts), compare):
            raise UserError(f"{problem}\nGive every rank the same command, packages and files")

    def all_have(self, has: bool) -> bool:
        """Return True if `has` is true on every rank."""
        return self._decide(has, all)

    def of_rank_0(self, value: Any) -> Any:
        """Return the `value` (JSON) of rank 0, on every rank."""
        return self._decide(value, lambda values: values[0])

    def _decide(self, value: Any, judge: Callable[[list[Any]], Any]) -> Any:
        """Return what rank 0 concludes from the values of all ranks; the others wait for it without a time limit."""
        if self.store is None:
            return judge([value])
        name = f"decision/{next(self._decisions)}"
        self.store.set(f"{name}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            keys = [f"{name}/{rank}" for rank in range(self.ranks)]
            self._wait_for(keys)
            values = [json.loads(self.store.get(key)) for key in keys]
            self.store.set(f"{name}/all", json.dumps(judge(values)))
        self._wait_for([f"{name}/all"])
        return json.loads(self.store.get(f"{name}/all"))

    def _wait_for(self, keys: list[str]) -> None:
        pause = 0.005
        while not self.store.check(keys):
            if self._failure is not None:
                raise self._failure
            time.sleep(pause)
            pause = min(2 * pause, 0.2)

    # ------------------------------------------------------------------------------------------------------ meeting

    def _connect(self) -> Any:
        """Connect to the store that rank 0 serves, or to torchrun's own."""
        import torch.distributed as dist

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while True:
            wait = timedelta(seconds=min(TELL_EVERY, self.patience))
            try:
                if not serves:
                    _wait_for_server(host, port, wait.total_seconds())
                return dist.TCPStore(
                    host, port, self.ranks, serves, timeout=wait, wait_for_workers=False, multi_tenant=True
                )
            except (dist.DistError, OSError) as error:
                if serves and "EADDRINUSE" in str(error):
                    raise UserError(f"port {port} is taken: give deepspeed --master_port {port + 1}") from None
                text = f"rank {self.rank} does not reach rank 0 at {host}:{port}: {first_line(error)}"
                if serves or self._failure is not None:
                    raise self._failure or CommandError(text) from None
                log.warning("the start waits: %s", text)

    # ------------------------------------------------------------------------------------------------- signs of life

    def _exchange(self, store: Any) -> None:
        """Give signs of life, read those of the watched ranks, and look for the error of another rank.

        The store does not answer while the process that serves it is stopped, so `_watch` needs no store.
        """
        try:
            part = None
            for count in itertools.count():
                if count % 5 == 0 or part is not self._part:
                    part = self._part
                    store.set(f"sign/{self.rank}", json.dumps((count, self.patience, *part)))
                    self._read_signs(store)
                if store.check(["failure"]):
                    failure = json.loads(store.get("failure"))
                    store.set(f"heard/{self.rank}", "yes")
                    if failure["rank"] != self.rank:
                        error = CommandError(f"rank {failure['rank']} ended the start: {failure['message']}")
                        error.exit_code = failure["code"]
                        self._failure = error
                    return
                if self._closed.wait(self._beat / 5):
                    return
        except RuntimeError:  # torch's DistError
            self._failure = CommandError("rank 0 has ended the start: look for its error above")

    def _read_signs(self, store: Any) -> None:
        present = [rank for rank in self._silence if rank in self._signs or store.check([f"sign/{rank}"])]
        signs = store.multi_get([f"sign/{rank}" for rank in present]) if present else []
        for rank, sign in zip(present, signs, strict=True):
            if sign != self._signs.get(rank):
                self._signs[rank] = sign
                self._silence[rank] = 0.0
                self.patience = min(self.patience, json.loads(sign)[1])

    def _tell(self, error: BaseException) -> None:
        """Hand the error to the other ranks. Rank 0 serves the store, so it stays until all have heard of an error."""
        if isinstance(error, KeyboardInterrupt):
            error = Stopped("stopped by Ctrl-C", exit_code=128 + signal.SIGINT)
        message = str(error) if isinstance(error, CommandError) else in_one_line(error)
        failure = json.dumps({"rank": self.rank, "message": message, "code": getattr(error, "exit_code", 1)})

        def tell() -> None:
            alive = [rank for rank, silence in self._silence.items() if silence < self.patience]
            with contextlib.suppress(RuntimeError):  # torch's DistError: rank 0 has ended
                self.store.compare_set("failure", "", failure)
                self.store.set(f"heard/{self.rank}", "yes")
                while not self.store.check([f"heard/{rank}" for rank in alive]):
                    time.sleep(0.05)

        if self.store is not None:
            thread = threading.Thread(target=tell, daemon=True)  # the store may not answer
            thread.start()
            thread.join(2 * GRACE)

    def _watch(self) -> None:
        """End this process if another rank fails or is silent, whatever the main thread waits for."""
        last = last_report = time.monotonic()
        while not self._closed.wait(self._beat):
            now = time.monotonic()
            for rank in self._silence:  # if this process was stopped itself, it has heard nothing meanwhile
                self._silence[rank] += min(now - last, 5 * self._beat)
            last = now
            lost = self._silent_for(self.patience)
            if self._failure is None and lost:
                error = CommandError(f"{lost}: look for its error above")
                if self.rank == 0:  # the others miss rank 0 by themselves
                    self._tell(error)
                self._failure = error
            if self._failure is not None:
                self._end_with(self._failure)
                return
            if self.rank == 0 and now - last_report > TELL_EVERY:
                last_report = now
                log.warning("%s", self._silent_for(5 * self._beat) or self._positions())

    def _silent_for(self, seconds: float) -> str:
        """Return which ranks have given no sign of life for more than `seconds`, in words; "" for none."""
        silent = [rank for rank, silence in self._silence.items() if silence > seconds]
        missing = [rank for rank in silent if rank not in self._signs]
        if missing:
            return f"rank {_names(missing)} of {self.ranks} has not begun (for one process unset RANK and WORLD_SIZE)"
        if silent:
            part = json.loads(self._signs[silent[0]])[-1]
            return f"rank {_names(silent)} has given no sign of life for {self._silence[silent[0]]:.0f} s, at {part}"
        return ""

    def _positions(self) -> str:
        """Return which ranks are behind, and where, in words."""
        parts = {0: self._part} | {rank: tuple(json.loads(sign)[2:]) for rank, sign in list(self._signs.items())}
        last = min(parts.values())
        behind = [rank for rank in sorted(parts) if parts[rank] == last]
        if len(behind) == self.ranks:
            return f"the start goes on: every rank is at {last[1]}"
        return f"the start waits for rank {_names(behind)}, which is at {last[1]}"

    def _end_with(self, error: CommandError) -> None:
        """End the process, whatever its main thread waits for, unless it ends by itself."""
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            if self._is_failing or self._closed.wait(0.05):
                return
        print(f"\nerror: {printable(str(error))}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)


def _wait_for_server(host: str, port: int, seconds: float) -> None:
    """Wait until something listens at the address. Raises the last OSError after `seconds`.

    torch's own client prints 20 lines of C++ frames if nothing does.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, port), seconds).close()
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def _lines(values: Mapping[int, Any]) -> str:
    """Return a line for each value, with the first ranks that have it."""
    ranks_of: dict[str, list[int]] = {}
    for rank, value in sorted(values.items()):
        text = value if isinstance(value, str) else json.dumps(value)
        ranks_of.setdefault(text[:LONGEST_VALUE], []).append(rank)
    return "\n".join(f"  rank {_names(ranks)}: {text}" for text, ranks in ranks_of.items())


def _names(ranks: Sequence[int]) -> str:
    return f"{', '.join(map(str, ranks[:8]))}{', …' if len(ranks) > 8 else ''}"


# ---------------------------------------------------------------------------------------------------- the process group
COMPARED = ("torch", "deepspeed", "transformers", "accelerate", "peft", "bitsandbytes")
"""Packages that must have the same version on every rank."""
KERNELS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "NVIDIA_TF32_OVERRIDE", "DS_ACCELERATOR")
"""Environment variables that decide what a rank computes with."""


def meet_on(start: Start, device: str) -> torch.device:
    """Return this rank's device for `--device`, after comparing its kind and the packages with all other ranks.

    Raises UserError on every rank if they differ, and for a device that this rank lacks. bf16 counts as available if
    every rank's processor claims it and rank 0 computes in it.
    """
    from clips.common import runtime

    chosen = runtime.choose_device(device)
    packages = runtime.package_versions()
    start.agree(
        {
            "device": chosen.type,
            "python": platform.python_version(),
            **{name: packages.get(name) for name in COMPARED},
            **{name: os.environ.get(name) for name in KERNELS},
        }
    )
    measure = runtime.has_bf16 if start.rank == 0 else runtime.claims_bf16
    runtime.BF16[chosen.type] = start.all_have(measure(chosen))
    return chosen


def init_distributed(device: torch.device, timeout_minutes: float = 30) -> None:
    """Join the process group of `deepspeed` or torchrun; a plain `python script.py` becomes a group of one."""
    import torch
    import torch.distributed as dist

    from clips.common.runtime import bound_kernel_caches, import_deepspeed, keep_freed_memory

    if device.type == "cpu":
        keep_freed_memory()
        bound_kernel_caches()
        os.environ["DS_ACCELERATOR"] = "cpu"  # read by deepspeed when it is imported
    find_ranks()
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        # The store itself takes a free port: one that was looked up before could be another process's by then.
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    end_with_launcher()
    # The CPU accelerator reads LOCAL_SIZE; the deepspeed launcher sets it, torchrun calls it LOCAL_WORLD_SIZE.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    deepspeed = import_deepspeed()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False)
    # DeepSpeed reduces gradients in groups of its own, made without a timeout: they would take torch's default.
    defaults: Any = dist.distributed_c10d
    defaults.default_pg_timeout = defaults.default_pg_nccl_timeout = timeout
    atexit.register(_settle)


def _settle() -> None:
    """Wait at the end of the process until gloo's threads have released the tensors of the last collective.

    A thread that asks for Python while the interpreter ends aborts the process with exit code 134 (torch 2.13, Python
    < 3.14). Destroying the groups does not help, since DeepSpeed holds them too.
    """
    idle, end = 0, time.monotonic() + SETTLED
    while idle < 2 and time.monotonic() < end:  # a thread that waits for Python seems idle once
        time.sleep(0.002)
        idle = idle + 1 if all(state == "S" for state in _gloo_threads()) else 0


def _gloo_threads() -> list[str]:
    """Return the state of each gloo thread as in proc(5), where S is asleep. Empty without /proc."""
    states = []
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended
            name, _, fields = (task / "stat").read_text(encoding="utf-8").partition("(")[2].rpartition(")")
            if name.startswith("pt_gloo"):
                states.append(fields.split()[0])
    return states


def shutdown() -> None:
    """Wait for all ranks and leave the process group, if there is one. Collective."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ work that ranks share
def my_share(items: Sequence[T], *, sharded: bool) -> Sequence[T]:
    """Return the `items` that this rank works on: every n-th for n ranks, or all of them unless `sharded`."""
    import torch.distributed as dist

    return items[dist.get_rank() :: dist.get_world_size()] if sharded else items


def all_shares(mine: list[T], *, sharded: bool) -> list[T]:
    """Return the results of all ranks in the order of the items, on every rank. Collective if `sharded`."""
    import torch.distributed as dist

    if not sharded:
        return mine
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def once_per_machine(make: Callable[[], T]) -> T:
    """Run `make` on the first rank of each machine, and return its result on all ranks of that machine.

    Collective. The other ranks wait however long it takes, and receive the result by pickle. If `make` raises, only its
    own rank gets the error, and the others go on waiting until something else ends them.
    """
    import torch.distributed as dist

    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, f"{platform.node()} {this_machine()}")
    # Every rank makes all groups: a group that only its members make is named after them, and a second group of that
    # name meets at the addresses of the first.
    groups: dict[str, Any] = {}
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, other in enumerate(hosts) if other == host]
        groups[host] = dist.new_group(ranks, timeout=LONG_WORK, backend="gloo")

    host = hosts[dist.get_rank()]
    first = hosts.index(host)
    result: list[Any] = [make() if dist.get_rank() == first else None]
    dist.broadcast_object_list(result, src=first, group=groups[host])
    dist.destroy_process_group(groups[host])
    return result[0]


@contextlib.contextmanager
def naming_lost_ranks(step: Callable[[], int]) -> Iterator[None]:
    """Turn a failed or timed-out collective into a CommandError that shows this rank, the place and the lost ranks.

    NCCL's watchdog ends its process by itself instead, with a report of its own. gloo's errors are plain
    RuntimeErrors, known by their text.
    """
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(OURS)]
        place = f"{frames[-1].filename.removeprefix(ROOT)}:{frames[-1].lineno}" if frames else "the engine"
        lost = ", ".join(map(str, lost_ranks()))
        raise CommandError(
            f"rank {dist.get_rank()}: a collective of step {step()} failed at {place}: {str(error).splitlines()[0]}\n"
            + (f"No sign of life from rank {lost}: look for its error above" if lost else "Every rank is alive")
            + ". The same command goes on from the last checkpoint"
        ) from error


def lost_ranks(seconds: float = 10) -> list[int]:
    """Return the ranks that do not call this too within `seconds`, or rank 0 if its store does not answer."""
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    waiting = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    end = time.monotonic() + seconds
    try:
        store.set_timeout(timedelta(seconds=seconds))
        store.set(f"alive/{dist.get_rank()}", "yes")
        while waiting and time.monotonic() < end:
            waiting = [rank for rank in waiting if not store.check([f"alive/{rank}"])]
            time.sleep(0.1)
    except RuntimeError:
        return [0]
    return waiting
