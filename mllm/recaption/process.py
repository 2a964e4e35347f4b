"""Processes at work on one folder: each takes the next free shard until all shards are done.

The processes share nothing but the folder, so processes of other machines may join and leave at any time. The parent
of several processes computes nothing; it restarts a process that was killed.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess
from types import FrameType

from rich.console import Console

from clips import Source, WholeFiles, open_source
from clips.common.errors import BrokenDataError, CommandError, Stopped, UserError, run_command
from clips.common.workers import end_with
from mllm.recaption.manifest import Folder, agree, done_manifest, unfinished
from mllm.recaption.options import Options
from mllm.recaption.progress import Board, Speed
from mllm.recaption.registry import make_captioner
from mllm.recaption.shards import Shard
from mllm.recaption.work import Worker

LOOK = 0.25
"""Seconds between two looks at the processes."""
FAILURES = 3
"""Ends of a process in a row, without a call in between, after which it is not restarted."""
LOOK_AGAIN, LONGEST_WAIT = 1.0, 20.0
"""Seconds between two looks at the shards of other processes: the first wait, and the longest."""


def open_pairs(options: Options) -> Source:
    return open_source(options.data, options.fields, image_root=options.image_root, need_long=False)


def work_on(options: Options, source: Source, shards: Sequence[Shard], board: Board) -> None:
    """Make shards until all are done, here or elsewhere. It waits for the shards that other processes have locked."""
    folder = Folder(options.output)
    owner = f"{platform.node() or 'host'}-{os.getpid()}-{uuid.uuid4().hex[:12]}".replace("/", "_")
    with closing(make_captioner(options.captioner, options.prompt, **options.captioning())) as captioner:
        agree(folder, {**options.settings(), "captioner": captioner.describe()})
        encoder = None
        if options.similarity_encoder is not None:
            from clips import CLIPS  # with transformers, which a process that asks an endpoint does not need

            encoder = CLIPS.from_pretrained(options.similarity_encoder, device=options.device)
        tally: Counter[str] = Counter()
        speed = Speed(folder.speed / f"{owner}.json", tally)

        def changed() -> None:
            speed.write()
            board.show()

        worker = Worker(options, folder, source, captioner, owner, tally, encoder=encoder, changed=changed)
        files = WholeFiles(source, int(options.cache_gb * 1e9))
        waiting, pause, has_told = list(shards), LOOK_AGAIN, False
        with board.showing():
            try:
                while waiting := unfinished(folder, waiting):
                    made = [_made(worker, files, shard, waiting[i + 1 :]) for i, shard in enumerate(waiting)]
                    if any(made):
                        pause = LOOK_AGAIN
                    else:
                        if not has_told:
                            board.say(f"waiting for {len(waiting)} shards that other processes hold ({folder.locks})")
                        has_told = True
                        time.sleep(pause)
                        pause = min(2 * pause, LONGEST_WAIT)
            finally:
                speed.write(now=True)


def _made(worker: Worker, files: WholeFiles, shard: Shard, others: Iterable[Shard]) -> bool:
    """Make the shard and return True; return False if another process makes it or has made it.

    Meanwhile a thread fetches the file of the first of the `others` that nobody has begun.
    """
    folder = worker.folder
    if (held := folder.lock(shard.name)) is None:
        return False
    with held:
        if done_manifest(folder, shard) is not None:  # finished after the last look
            return False
        files.at(shard.url, (other.url for other in others if _is_untouched(folder, other)))
        try:
            worker.make(shard)
        except OSError as error:
            raise CommandError(
                f"shard {shard.name}: {error}. What is written so far stays; the same command goes on"
            ) from error
        return True


def _is_untouched(folder: Folder, shard: Shard) -> bool:
    return not (folder.locks / shard.name).exists() and not folder.manifest(shard.name).is_file()


# ------------------------------------------------------------------------------------------------ several processes
def run_processes(options: Options, shards: Sequence[Shard], count: int, board: Board) -> None:
    """Run `count` processes and restart those that are killed. Raises CommandError if shards remain undone."""
    context = get_context("spawn")
    failures, calls = [0] * count, 0
    running: dict[int, SpawnProcess] = {}

    def start(number: int) -> None:
        os.environ["LOCAL_RANK"] = str(number)  # the process chooses its GPU by it
        running[number] = context.Process(target=_child, args=(options, list(shards), os.getpid()))
        running[number].start()

    try:
        with board.showing():
            for number in range(count):
                start(number)
            while running:
                time.sleep(LOOK)
                tally = board.show()
                if tally["pairs"] > calls:
                    calls, failures = tally["pairs"], [0] * count
                for number, process in list(running.items()):
                    if process.exitcode is None:
                        continue
                    del running[number]
                    if process.exitcode in (UserError.exit_code, BrokenDataError.exit_code):
                        ended = CommandError("a process cannot go on: the reason stands above")
                        ended.exit_code = process.exitcode  # a restart would not mend it
                        raise ended
                    if process.exitcode != 0:
                        failures[number] += 1
                        board.say(f"process {number} ended with exit code {process.exitcode}")
                        if failures[number] < FAILURES:
                            start(number)
    finally:
        os.environ.pop("LOCAL_RANK", None)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
    if unfinished(board.folder, shards):
        raise CommandError(
            f"{FAILURES} times in a row each process ended without a call of its captioner: the reason stands above. "
            "The same command goes on"
        )


def _child(options: Options, shards: list[Shard], parent: int) -> None:
    """One of several processes. It ends as soon as its parent is gone: a kill loses nothing."""
    end_with(parent, exit_code=128 + signal.SIGHUP)
    quiet = Board(Folder(options.output), shards, Console(emoji=False, quiet=True))

    def main() -> None:
        with stopping():
            work_on(options, open_pairs(options), shards, quiet)

    sys.exit(run_command(main))


@contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM, SIGUSR1 (of a scheduler) and Ctrl-C end the work; nothing needs saving first."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped by a signal; the same command goes on where it was", exit_code=128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
