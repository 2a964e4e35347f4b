"""Several ranks: one opens the data of its machine for all, and each encodes its share of a validation."""

import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import random_model, run_python, tiny_run
from launched import make_images, recap, small_data, write_shard

from clips.common import distributed
from clips.common.distributed import once_per_machine
from clips.common.runtime import unused_port
from clips.config import EvalConfig, Fields, RunConfig
from clips.data.dataset import Dataset, open_data
from clips.data.splits import open_split
from clips.data.tokenizer import build_tokenizer
from clips.evaluation.evaluate import evaluate
from clips.weights.export import write_native

pytestmark = pytest.mark.slow
RANK = """
import json, sys
from dataclasses import asdict
from pathlib import Path
import torch, torch.distributed as dist
from clips.evaluation.evaluate import evaluate
from clips.weights.load import load_native
model, run, tokenizer = load_native(Path(sys.argv[1]))
dist.init_process_group("gloo")
metrics = evaluate(model, tokenizer, run, "val", sharded=True)
Path(sys.argv[1], f"rank{dist.get_rank()}.json").write_text(json.dumps({n: asdict(f) for n, f in metrics.items()}))
dist.barrier()
dist.destroy_process_group()
"""


def captioned(index: int) -> dict[str, bytes]:
    """A label for every third; the others serve retrieval."""
    fields = {"org_caption": f"stock photo {index}", "captions": [f"a box {index}", f"number {index} is a box"]}
    label = {} if index % 3 else {"label": f"kind {index % 2}"}
    return {"txt": f"A plain image. It has number {index}.".encode(), "json": json.dumps(fields | label).encode()}


def with_data(folder: Path) -> RunConfig:
    """Batches of four: fifteen of them, the second with one broken image, the third with nothing else."""
    samples = [(image, captioned(i)) for i, (image, _, _) in enumerate(make_images(58))]
    for i in (5, 8, 9, 10, 11):
        samples[i] = (samples[i][0][:40], samples[i][1])
    held_out = write_shard(folder / "val.tar", samples)
    _, train, *_ = small_data(folder / "data")
    run = tiny_run()
    data = replace(run.data, train=train, val=str(held_out))
    return replace(run, data=data, eval=EvalConfig(batch_size=4, max_images=50))


def test_the_metrics_are_a_single_rank_s(tmp_path: Path) -> None:
    ranks, run = 3, with_data(tmp_path)
    texts = open_split(run.data, "val", need_long=False).all_captions()
    tokenizer = build_tokenizer("wordpiece", texts, vocab_size=64)
    model = random_model(run, seed=2).eval()
    alone = {name: asdict(metric) for name, metric in evaluate(model, tokenizer, run, "val").items()}
    assert {"sentence_t2i_r1", "part_i2t_r5", "web_i2t_r1", "long_t2i_r10", "zero_shot_top1"} <= alone.keys()
    assert len({metric["value"] for metric in alone.values()}) > 5, "metrics that differ"

    write_native(model, run, tokenizer, tmp_path / "model")
    (tmp_path / "rank.py").write_text(RANK)
    run_python(tmp_path / "rank.py", tmp_path / "model", ranks=ranks)
    by_rank = [json.loads((tmp_path / f"model/rank{rank}.json").read_text()) for rank in range(ranks)]
    assert by_rank[0].keys() == alone.keys()
    for name, metric in alone.items():
        assert by_rank[0][name] == pytest.approx(metric, abs=1e-6), name
    assert not any(by_rank[1:]), "one rank has them"


TIMEOUT = 1.0
"""Seconds of a collective, which the tests' work exceeds."""


def write_small_shards(folder: Path, count: int) -> None:
    """`count` tars of img2dataset's layout, of one and of two samples in turns."""
    samples = [(image, recap(web, long)) for image, web, long in make_images(2)]
    for i in range(count):
        write_shard(folder / f"{i:06d}.tar", samples[: 1 + i % 2])


def in_ranks(work, *arguments) -> list:
    """What `work(rank, …)` returns on each of two ranks of one group."""
    with multiprocessing.get_context("fork").Pool(2) as pool:  # which ends a rank that waits for the other for ever
        return pool.map_async(partial(_in_group, work, arguments, unused_port()), range(2)).get(120)


def _in_group(work, arguments: tuple, port: int, rank: int):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    # Not before: on a busy machine the ranks take longer to find each other, and one that gives up leaves the other.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT))
    try:
        return work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def slowly(calls: Path) -> int:
    time.sleep(2 * TIMEOUT)
    with calls.open("a", encoding="utf-8") as file:
        file.write("called\n")
    return os.getpid()


def opened(rank: int, machine: str, calls: Path) -> tuple[int, int]:
    distributed.this_machine = lambda: machine.format(rank=rank)
    groups, new_group = [], dist.new_group
    dist.new_group = lambda *ranks, **options: groups.append(new_group(*ranks, **options)) or groups[-1]
    try:
        process = once_per_machine(partial(slowly, calls))
        assert once_per_machine(os.getpid) == process, "it may be asked for again"
    finally:
        dist.new_group = new_group
    # One of the same name would meet at the addresses of the first, which nobody listens at any more.
    names = [group.group_name for group in groups if group is not dist.GroupMember.NON_GROUP_MEMBER]
    assert len(set(names)) == len(names) == 2
    return os.getpid(), process


@pytest.mark.parametrize(("machine", "times"), [("the same", 1), ("machine of rank {rank}", 2)])
def test_one_rank_works_and_the_others_wait_beyond_the_timeout(tmp_path: Path, machine: str, times: int) -> None:
    (first, of_first), (second, of_second) = in_ranks(opened, machine, tmp_path / "calls")
    assert (tmp_path / "calls").read_text().count("called") == times
    assert of_first == first
    assert of_second == (first if times == 1 else second)


def read_by(rank: int, spec: str, fields: Fields) -> tuple[list[str], list[str]]:
    """Keys of the source that a rank gets, and below `spec` what it opened, listed or looked at to get it."""
    touched: list[str] = []
    stat, listening = os.stat, True

    def noting(path, *rest, **named):
        touched.append(str(path))
        return stat(path, *rest, **named)

    def heard(event: str, arguments: tuple) -> None:
        if listening and event in ("open", "os.listdir", "os.scandir"):
            touched.append(str(arguments[0]))

    os.stat = noting  # of which there is no audit event
    sys.addaudithook(heard)
    source: Dataset = once_per_machine(partial(open_data, spec, fields, need_long=True))
    listening, before_reading = False, [path for path in touched if path.startswith(spec)]
    return [source.read(i).key for i in range(len(source))], before_reading


@pytest.mark.parametrize("kind", ["shards", "table"])
def test_the_others_read_alike_and_look_at_no_file_before(tmp_path: Path, kind: str) -> None:
    spec, fields, samples = tmp_path / "data", Fields(), 9 + 4
    if kind == "shards":
        write_small_shards(spec, 9)
    else:
        spec, fields, samples = tmp_path / "data.jsonl", Fields(image="image", web="web", long="long"), 5
        rows = [{"image": f"{i}.png", "web": "a tile", "long": "It is teal."} for i in range(samples)]
        for row in rows:
            (tmp_path / row["image"]).write_bytes(b"bytes")
        spec.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (first, looked_at), (others, nothing) = in_ranks(read_by, str(spec), fields)
    assert first == others
    assert len(first) == samples
    assert looked_at
    assert nothing == []
