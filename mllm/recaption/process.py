"""One process at work: it takes shards of the folder until each is done, here or by others."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from types import FrameType

from rich.console import Console

from clips import CLIPS, Source, WholeFiles, open_source
from clips.common.errors import CommandError, Stopped, run_command
from clips.common.workers import end_with
from mllm.recaption.claims import BEATS, Claims
from mllm.recaption.manifest import Folder, agree, done_manifest
from mllm.recaption.options import Options
from mllm.recaption.progress import Board, Speed
from mllm.recaption.registry import make_captioner
from mllm.recaption.shards import Shard
from mllm.recaption.work import LostClaim, Tally, Worker

LOOK_AGAIN = 1.0
"""Seconds between two looks at shards that others work on, to begin with."""


def open_pairs(options: Options) -> Source:
    return open_source(options.data, options.fields, image_root=options.image_root, need_long=False)


def work_on(options: Options, source: Source, shards: Sequence[Shard], board: Board) -> None:
    """Take shards until each is done, here or by others; those that others hold are waited for, and missed if lost."""
    folder = Folder(options.out)
    encoder = None
    with closing(make_captioner(options.captioner, options.prompt, **options.captioning())) as captioner:
        agree(folder, {**options.settings(), "captioner": captioner.describe()})
        if options.similarity_encoder is not None:
            encoder = CLIPS.from_pretrained(options.similarity_encoder, device=options.device)
        tally = Tally()
        with (
            Claims(folder.claims, options.claim_timeout) as claims,
            board.showing(),
            Speed(folder.speed / f"{claims.owner}.json", tally) as speed,
        ):

            def changed() -> None:
                speed.changed()
                board.show()

            worker = Worker(options, folder, source, captioner, claims, tally, encoder=encoder, changed=changed)
            files = WholeFiles(source, int(options.cache_gb * 1e9))
            waiting, pause = list(shards), LOOK_AGAIN
            while waiting := [shard for shard in waiting if done_manifest(folder, shard) is None]:
                if any(
                    [
                        made(worker, files, folder, claims, shard, islice(waiting, i + 1, None))
                        for i, shard in enumerate(waiting)
                    ]
                ):
                    pause = LOOK_AGAIN
                else:
                    time.sleep(pause)
                    pause = min(2 * pause, max(LOOK_AGAIN, options.claim_timeout / BEATS))


def made(
    worker: Worker, files: WholeFiles, folder: Folder, claims: Claims, shard: Shard, others: Iterable[Shard]
) -> bool:
    """Whether this process made the shard; False where another does, or has.

    Meanwhile the file is fetched of the first of the `others` that nobody has begun.
    """
    if not claims.take(shard.name):
        return False
    try:
        if done_manifest(folder, shard) is not None:  # between the look and the claim
            return False
        files.at(shard.url, (other.url for other in others if _is_untouched(folder, claims, other)))
        worker.make(shard)
        return True
    except LostClaim:
        return False
    except OSError as error:
        if claims.holds(shard.name):
            raise CommandError(
                f"shard {shard.name}: {error}. What is written so far stays; the same command goes on"
            ) from error
        return False  # the one that took the shard over has cleared up
    finally:
        claims.release(shard.name)


def _is_untouched(folder: Folder, claims: Claims, shard: Shard) -> bool:
    return claims.is_free(shard.name) and not folder.manifest(shard.name).is_file()


def child(options: Options, shards: list[Shard], parent: int) -> None:
    """One of several processes; it ends at once when its parent is gone, which is as good as any other kill."""
    end_with(parent, exit_code=128 + signal.SIGHUP)
    quiet = Board(Folder(options.out), shards, Console(emoji=False, quiet=True))

    def main() -> None:
        with stopping():
            work_on(options, open_pairs(options), shards, quiet)

    sys.exit(run_command(main))


@contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM, SIGUSR1 (a scheduler's) and Ctrl-C end the work; nothing needs saving first."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped by a signal; the same command goes on where it was", exit_code=128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
