"""The start of a run: ranks meet, compare what each of them has found, and name the rank that is missing.

What one rank measures, finds or reads alone never decides whether a collective follows: rank 0 decides and tells, or
all ranks compare first. Both go through the store of the process group, not through collectives: a collective that one
rank leaves out ends after half an hour, and names nobody.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

from clips.common.errors import CommandError, UserError, first_line, in_one_line
from clips.common.escape import printable
from clips.common.files import differing
from clips.common.signals import end_with_launcher

TELL_EVERY = 60.0
"""Seconds between two lines that say for whom the start waits."""
GRACE = 2.0
"""Seconds in which a rank may end with its own message before it ends with the message of another rank."""
LONGEST_VALUE = 200
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets for each of its ranks."""
log = logging.getLogger("clips.start")
_starts = itertools.count()
_stores: list[Any] = []
"""Rank 0's process serves the store for as long as one of its stores is referenced."""


def find_ranks() -> tuple[int, int]:
    """(this process's rank, number of ranks); (0, 1) without a launcher.

    Raises UserError if some of a launcher's variables are there and others are missing, and if torchrun would start
    ranks again that then hang.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        # The store would hold the dead ranks' addresses (pytorch issue 135712).
        raise UserError(
            "torchrun --max-restarts: ranks that are started again would hang. "
            "Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, on every host"
        )
    if not os.environ.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
        tasks = {name: os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")}
        if several := [f"{name}={count}" for name, count in tasks.items() if count != "1"]:
            raise UserError(
                f"{several[0]}, but no RANK: each of these processes would train the whole run by itself. Start them "
                "with torchrun or deepspeed (one per node), or set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR"
            )
        return 0, 1
    present = [name for name in RANK_VARIABLES if name in os.environ]
    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"{', '.join(present)} in the environment, but no {', '.join(missing)}: unset the first to train in one "
            "process, or start the ranks with deepspeed or torchrun"
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Start:
    """The ranks of a run from their first line to their first step. Use it as a context around the start.

    An error of one rank inside the context ends every rank with that error's exit code. Every TELL_EVERY seconds rank 0
    names the ranks that are behind. With one rank nothing happens.
    """

    def __init__(self, timeout_minutes: float = 30) -> None:
        """`timeout_minutes`: how long ranks wait for one that does not begin."""
        self.timeout = 60 * timeout_minutes
        self.rank, self.ranks = 0, 1
        self.store: Any = None  # torch.distributed.Store; torch is imported where there are several ranks
        self._part = (0, "joining")
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
            name = f"start/{next(_starts)}"
            server = self._connect()
            self.store = PrefixStore(name, server)
            _stores.append(server)
            self._meet()
            watched = PrefixStore(name, server.clone())  # a store answers one thread at a time
            threading.Thread(target=self._watch, args=(watched,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        is_open = not self._closed.is_set()
        self._is_failing = True
        if isinstance(error, Exception) and is_open:
            if self._failure is None and self.store is not None:
                self._tell(error)
            self.close()
            if self._failure is not None:
                raise self._failure from None
            if isinstance(error, RuntimeError) and "gloo" in str(error):
                raise CommandError(
                    f"rank {self.rank} lost another rank at {self._part[1]}: look for its error above"
                ) from error
        self.close()

    def finish(self) -> None:
        """Wait for the first step of every rank and close: all get here, or all end with one rank's reason."""
        self.at("the first step")
        self.all_have(True)
        self.close()

    def close(self) -> None:
        """End the start: from here on ranks find each other in collectives."""
        self._closed.set()

    def at(self, part: str) -> None:
        """Say what this rank does next, for those who wait for it."""
        self._part = (self._part[0] + 1, part)
        if self.store is not None:
            self.store.set(f"at/{self.rank}", json.dumps(self._part))

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
        """Whether `has` is true on every rank."""
        return self._decide(has, all)

    def of_rank_0(self, value: Any) -> Any:
        """The `value` (of JSON) of rank 0, on every rank."""
        return self._decide(value, lambda values: values[0])

    def _decide(self, value: Any, judge: Callable[[list[Any]], Any]) -> Any:
        """What rank 0 judges of the values of all ranks; the others wait for it without a limit of time."""
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
        """The store that rank 0 serves, or torchrun's own."""
        import torch.distributed as dist

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        begin = time.monotonic()
        while True:
            wait = timedelta(seconds=min(TELL_EVERY, self.timeout))
            try:
                return dist.TCPStore(
                    host, port, self.ranks, serves, timeout=wait, wait_for_workers=False, multi_tenant=True
                )
            except dist.DistError as error:
                if serves and "EADDRINUSE" in str(error):
                    raise UserError(
                        f"port {port} of this machine is taken, by another run perhaps: give the launcher another one, "
                        f"deepspeed --master_port {port + 1} …"
                    ) from None
                if serves or time.monotonic() - begin > self.timeout:
                    raise CommandError(f"rank {self.rank} does not reach {host}:{port}: {first_line(error)}") from None
                log.warning("rank %d waits for rank 0 at %s:%d, which has not begun", self.rank, host, port)

    def _meet(self) -> None:
        """Wait until every rank has begun. Raises CommandError that names the missing ranks after the timeout."""
        self.store.set(f"here/{self.rank}", "yes")
        missing = list(range(self.ranks))
        begin = time.monotonic()
        last_report = begin
        while missing:
            missing = [rank for rank in missing if not self.store.check([f"here/{rank}"])]
            now = time.monotonic()
            names = ", ".join(map(str, missing))
            if missing and now - begin > self.timeout:
                raise CommandError(f"rank {names} of {self.ranks} has not begun: look for its error above")
            if missing and self.rank == 0 and now - last_report > TELL_EVERY:
                last_report = now
                unset = "To train in one process, unset RANK and WORLD_SIZE"
                log.warning("waiting for rank %s of %d to begin. %s", names, self.ranks, unset)
            time.sleep(0.05)

    # ----------------------------------------------------------------------------------------------------- watching

    def _tell(self, error: Exception) -> None:
        """Hand the error to the other ranks, and stay until they have it: rank 0 serves the store."""
        message = str(error) if isinstance(error, CommandError) else in_one_line(error)
        failure = {"rank": self.rank, "message": message, "code": getattr(error, "exit_code", 1)}
        try:
            self.store.compare_set("failure", "", json.dumps(failure))
            self.store.set(f"heard/{self.rank}", "yes")
            end = time.monotonic() + 2 * GRACE
            while time.monotonic() < end and not self.store.check([f"heard/{rank}" for rank in range(self.ranks)]):
                time.sleep(0.05)
        except RuntimeError:  # torch's DistError
            log.warning("rank 0, which serves the store, has ended")

    def _watch(self, store: Any) -> None:
        """End this process if another rank fails, since this one may wait for it in a collective."""
        last_report = time.monotonic()
        while not self._closed.wait(0.2):
            try:
                if store.check(["failure"]):
                    failure = json.loads(store.get("failure"))
                    self._failure = CommandError(f"rank {failure['rank']} ended the start: {failure['message']}")
                    self._failure.exit_code = failure["code"]
                    store.set(f"heard/{self.rank}", "yes")
                    self._end_with(self._failure)
                    return
                if self.rank == 0 and time.monotonic() - last_report > TELL_EVERY:
                    last_report = time.monotonic()
                    log.warning("%s", self._positions(store))
            except RuntimeError:  # torch's DistError
                self._end_with(CommandError("rank 0 has ended the start: look for its error above"))
                return

    def _positions(self, store: Any) -> str:
        """Which ranks are behind, and where."""
        positions = []
        for rank in range(self.ranks):
            is_known = store.check([f"at/{rank}"])
            positions.append(tuple(json.loads(store.get(f"at/{rank}"))) if is_known else (0, "joining"))
        last, part = min(positions)
        behind = [rank for rank, (count, _) in enumerate(positions) if count == last]
        if len(behind) == self.ranks:
            return f"the start goes on: every rank is at {part}"
        return f"the start waits for rank {', '.join(map(str, behind))}, which is at {part}"

    def _end_with(self, error: CommandError) -> None:
        """End the process, whatever its main thread waits in, unless it ends by itself."""
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            if self._is_failing or self._closed.wait(0.05):
                return
        print(f"\nerror: {printable(str(error))}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)


def _lines(values: Mapping[int, Any]) -> str:
    """A line for each value, with the first ranks that have it."""
    ranks_of: dict[str, list[int]] = {}
    for rank, value in sorted(values.items()):
        text = value if isinstance(value, str) else json.dumps(value)
        ranks_of.setdefault(text[:LONGEST_VALUE], []).append(rank)
    return "\n".join(
        f"  rank {', '.join(map(str, ranks[:8]))}{', …' if len(ranks) > 8 else ''}: {text}"
        for text, ranks in ranks_of.items()
    )
