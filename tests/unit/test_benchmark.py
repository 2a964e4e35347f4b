"""tools/benchmark.py compares like with like, and times what it says."""

import shlex
import sys
from pathlib import Path

import pytest
import tiny_llava
import torch
from tiny_llava import INSTRUCT, START

from clips.data.demo import ensure_demo
from clips.model.clips import CLIPSModel
from clips.training.cli import config_from_flags, parser
from tools import benchmark

CPU = torch.device("cpu")
place = tiny_llava.place  # a fixture


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo(tmp_path_factory.mktemp("demo") / "demo", sizes={"train": 60, "val": 8, "test": 8})


@pytest.mark.parametrize("size", ["demo", "s16"])
def test_both_programs_train_the_same(size: str, demo: Path, tmp_path: Path) -> None:
    """open_clip's own parser takes the flags, and what they and its configuration say is what our run says."""
    import open_clip
    from open_clip_train.params import parse_args

    run = config_from_flags(parser().parse_args(benchmark.our_flags(size, CPU, str(demo / "train"))))
    theirs = parse_args(benchmark.their_flags(run, tmp_path))
    phase = run.phases[0]
    assert (theirs.batch_size, theirs.train_num_samples) == (phase.batch_size, phase.samples)
    assert (theirs.lr, theirs.wd, theirs.workers) == (phase.lr, run.optim.weight_decay, run.data.workers)
    assert theirs.log_every_n_steps == run.train.log_every
    assert theirs.train_data.count("::") == len(list((demo / "train").glob("*.tar"))) - 1
    assert (theirs.precision == "amp_bf16") == (run.train.precision == "bf16")
    assert not run.train.activation_checkpointing
    model, _, _ = open_clip.create_model_and_transforms(theirs.model, output_dict=True)
    assert model.visual.image_size == (phase.image_size, phase.image_size)
    theirs.distill, theirs.rank, theirs.world_size = False, 0, 1  # as its main sets them
    assert type(open_clip.create_loss(theirs)).__name__ == "ClipLoss"
    ours = CLIPSModel(run.model, pad_id=0)
    assert len(model.visual.transformer.resblocks) == run.model.vision.layers
    assert len(model.text.transformer.resblocks) == run.model.text.layers
    # Theirs has no patch bias, and a CLS of the text that is no token.
    stock_size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert stock_size + run.model.vision.width - run.model.text.width == ours.parameter_counts()["total"]
    texts = open_clip.get_tokenizer(theirs.model)(["a red cat"])
    assert texts.shape[1] == run.model.text.context_length - 1


@pytest.mark.slow
def test_both_programs_and_the_parts_run(demo, monkeypatch, capsys):
    pytest.importorskip("webdataset", reason="open_clip's trainer needs it: pip install 'open_clip_torch[training]'")
    monkeypatch.setitem(benchmark.SIZES, "demo", ("demo", 8, 10))
    monkeypatch.setattr(benchmark, "ensure_demo", lambda place: demo)
    for what, named in (("program", "open_clip"), ("parts", "captioner's blocks")):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", what, "--repeats", "1", "--device", "cpu"])
        benchmark.main()
        assert named in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--freeze_word_embeddings False", "--freeze_word_embeddings True"])
def test_the_parts_of_a_llava_stage(place, monkeypatch, capsys, words):
    monkeypatch.chdir(place)
    flags = shlex.join([*INSTRUCT, *START, "--cache_dir", str(place / "features"), *words.split()])
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "llava", "--repeats", "1", "--device", "cpu", "--llava", flags])
    benchmark.main()
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("projector, blocks", "output layer and loss", "in the same process"))
