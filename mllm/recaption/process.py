"""A process at work on a folder: it takes the next free shard until all shards are done.

Processes share nothing but the folder, so processes of this and of other machines may join and leave at any time.
"""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing

from clips import Source, WholeFiles, open_source
from clips.common.errors import CommandError
from mllm.recaption.manifest import Folder, agree, done_manifest, unfinished
from mllm.recaption.options import Options
from mllm.recaption.progress import Board, Speed
from mllm.recaption.registry import make_captioner
from mllm.recaption.shards import Shard
from mllm.recaption.work import Worker

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
        tally: Counter[str] = Counter()
        speed = Speed(folder.speed / f"{owner}.json", tally)

        def changed() -> None:
            speed.write()
            board.show()

        worker = Worker(options, folder, source, captioner, owner, tally, changed=changed)
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
        untouched = (
            s for s in others if not (folder.locks / s.name).exists() and not folder.manifest(s.name).is_file()
        )
        files.at(shard.url, (other.url for other in untouched))
        try:
            worker.make(shard)
        except OSError as error:
            raise CommandError(
                f"shard {shard.name}: {error}. What is written so far stays; the same command goes on"
            ) from error
        return True
