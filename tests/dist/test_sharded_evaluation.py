"""Validation by several ranks: each encodes its share of the batches, and rank 0 has the figures of a single rank."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import random_model, run_python, tiny_run
from launched import pictures, small_data, write_shard

from clips.config import EvalConfig, RunConfig
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
figures = evaluate(model, tokenizer, run, "val", sharded=True)
Path(sys.argv[1], f"rank{dist.get_rank()}.json").write_text(json.dumps({n: asdict(f) for n, f in figures.items()}))
dist.barrier()
dist.destroy_process_group()
"""


def captioned(index: int) -> dict[str, bytes]:
    """A label for every third; the others serve retrieval."""
    fields = {"org_caption": f"stock photo {index}", "captions": [f"a box {index}", f"number {index} is a box"]}
    label = {} if index % 3 else {"label": f"kind {index % 2}"}
    return {"txt": f"A plain picture. It has number {index}.".encode(), "json": json.dumps(fields | label).encode()}


def with_data(folder: Path) -> RunConfig:
    """Batches of four: fifteen of them, the second with one broken picture, the third with nothing else."""
    samples = [(picture, captioned(i)) for i, (picture, _, _) in enumerate(pictures(58))]
    for i in (5, 8, 9, 10, 11):
        samples[i] = (samples[i][0][:40], samples[i][1])
    held_out = write_shard(folder / "val.tar", samples)
    _, train, *_ = small_data(folder / "data")
    run = tiny_run()
    data = replace(run.data, train=train, val=str(held_out))
    return replace(run, data=data, eval=EvalConfig(batch_size=4, max_images=50))


def test_the_figures_are_a_single_rank_s(tmp_path: Path) -> None:
    ranks, run = 3, with_data(tmp_path)
    texts = open_split(run.data, "val", need_long=False).captions()
    tokenizer = build_tokenizer("wordpiece", texts, vocab_size=64)
    model = random_model(run, seed=2).eval()
    alone = {name: asdict(figure) for name, figure in evaluate(model, tokenizer, run, "val").items()}
    assert {"sentence_t2i_r1", "part_i2t_r5", "web_i2t_r1", "long_t2i_r10", "zero_shot_top1"} <= alone.keys()
    assert len({figure["value"] for figure in alone.values()}) > 5, "figures that differ"

    write_native(model, run, tokenizer, tmp_path / "model")
    (tmp_path / "rank.py").write_text(RANK)
    done = run_python(tmp_path / "rank.py", tmp_path / "model", ranks=ranks)
    assert done.returncode == 0, done.stderr
    by_rank = [json.loads((tmp_path / f"model/rank{rank}.json").read_text()) for rank in range(ranks)]
    assert by_rank[0].keys() == alone.keys()
    for name, figure in alone.items():
        assert by_rank[0][name] == pytest.approx(figure, abs=1e-6), name
    assert not any(by_rank[1:]), "one rank has them"
