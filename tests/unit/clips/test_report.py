"""A small run on small demo shards: measured, its examples collected, its page written."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import script_parser, tiny_run
from PIL import Image

from clips.common.errors import UserError
from clips.common.rundir import has_report, is_finished
from clips.config import DataConfig, EvalConfig
from clips.data.demo import ensure_demo
from clips.data.tokenizer import build_tokenizer
from clips.evaluation.encode import encode_images
from clips.evaluation.evaluate import evaluate, evaluate_from_flags, nearest_texts
from clips.evaluation.testsets import open_test_set
from clips.model.clips import CLIPSModel
from clips.training.finish import finish_run
from clips.weights.export import export_from_flags, write_native

pytestmark = pytest.mark.usefixtures("one_pixel")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(model, run, tokenizer): untrained, on 24 to 40 demo scenes a split used as ordinary shards."""
    folder = ensure_demo(
        tmp_path_factory.mktemp("data") / "demo", sizes={"train": 40, "val": 24, "test": 24}, image_size=32
    )
    texts = ["a cat on the left of a red dog.", "the background is blue", "there are three birds, at the top right."]
    tokenizer = build_tokenizer("wordpiece", texts * 4, vocab_size=128)
    run = tiny_run(inputs="tokens")
    text = dataclasses.replace(run.model.text, context_length=24, vocab_size=tokenizer.vocab_size)
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, text=text),
        data=DataConfig(**{split: str(folder / split) for split in ("train", "val", "test")}, workers=0),
        eval=EvalConfig(batch_size=7, max_images=16),
    )
    torch.manual_seed(0)
    return CLIPSModel(run.model, tokenizer.pad_id), run, tokenizer


def test_evaluate_gives_every_figure_its_chance_and_items(small, tmp_path):
    model, run, tokenizer = small
    evaluated = evaluate(model, tokenizer, run, "test", full=True, out=tmp_path / "evaluation.json")
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["skipped_images"] == 0
    assert content["figures"] == {name: dataclasses.asdict(figure) for name, figure in evaluated.items()}
    assert {"web_i2t_r5", "linear_probe_top1"} <= evaluated.keys()
    figures = content["figures"]
    # half of the demo's test scenes hold one thing and serve classification, the others retrieval
    assert (figures["sentence_i2t_r1"]["items"], figures["zero_shot_top1"]["items"]) == (12, 12)
    assert figures["sentence_i2t_r1"]["chance"] == pytest.approx(100 / 12, abs=1e-3)
    assert figures["part_t2i_r1"]["items"] == 48  # four sentences each


def test_the_nearest_texts_of_an_image_come_in_order_and_its_own_is_right(small):
    cards = nearest_texts(*small[::2], small[1], "test", 32)
    assert len(cards) == 12
    assert all(len(card.texts) == 5 and card.texts[0][0] >= card.texts[4][0] for card in cards)
    kinds = {(text == card.title, right) for card in cards for _, text, right in card.texts}
    assert kinds == {(True, True), (False, None)}


def test_during_training_fewer_images_and_the_model_is_left_as_it_was(small):
    model, run, tokenizer = small
    model.train()
    model.visual.set_image_size(48)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "linear_probe_top1" not in evaluate(model, tokenizer, run, "val", image_size=32)
    assert model.training
    assert model.visual.image_size == 48
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.visual.set_image_size(32)
    items, _ = open_test_set(run.data, "val")
    assert len(encode_images(model, items, batch_size=8, limit=16).indices) == 16
    without = dataclasses.replace(run, data=dataclasses.replace(run.data, val=None))
    with pytest.raises(UserError, match="--val-data"):
        evaluate(model, tokenizer, without, "val")


def metrics(run_dir):
    run_dir.mkdir(exist_ok=True)
    step = {"kind": "train", "contrastive_loss": 3.0, "caption_loss": 1.0, "lr": 1e-3, "logit_scale": 14.3}
    step |= {"grad_norm": None, "samples_per_s": 700.0, "data_wait_share": 0.01}
    lines = [step | {"step": i, "samples": 8 * i, "loss": 5 - 0.1 * i} for i in range(1, 10)]
    lines.append({"kind": "eval", "step": 9, "samples": 72, "split": "val", "sentence_i2t_r1": 12.0})
    text = "\n".join(map(json.dumps, lines))
    (run_dir / "metrics.jsonl").write_text(text + '\n{"kind": "train", "st')  # cut by a killed run
    return run_dir


def test_a_report_that_fails_costs_nothing_and_can_be_made_again(small, tmp_path, capsys):
    model, run, tokenizer = small
    run_dir = metrics(tmp_path / "my-[bold]run")
    run.save(run_dir / "config.json")
    (run_dir / "report").write_text("in the way")
    finish_run(run, model, tokenizer, run_dir)
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("warning")]
    assert f"the report of {run_dir} is not written" in line
    assert "Traceback" not in errors
    assert is_finished(run_dir)
    assert not has_report(run_dir)
    assert json.loads((run_dir / "evaluation.json").read_text())["figures"]

    (run_dir / "report").unlink()
    finish_run(run, model, tokenizer, run_dir)
    assert has_report(run_dir)
    assert "warning" not in capsys.readouterr().err


def test_commands_evaluate_and_export(small, tmp_path, capsys):
    model, run, tokenizer = small
    native = tmp_path / "native"
    write_native(model, run, tokenizer, native)
    export_from_flags(script_parser("export_clips").parse_args(["--model", str(native), "--image-size", "48"]))
    assert "48 px" in capsys.readouterr().out
    stock = native / "export/open_clip"

    classes, rng = tmp_path / "classes", np.random.default_rng(0)
    for i in range(12):
        folder = classes / ["cat", "dog"][i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    (tmp_path / "names.txt").write_text("cat\ndog\nbird")

    def figures(model_path, *flags):
        out = tmp_path / "out.json"
        parsed = script_parser("evaluate_clips").parse_args(
            ["--model", str(model_path), "--output", str(out), *map(str, flags)]
        )
        evaluate_from_flags(parsed)
        return json.loads(out.read_text())["figures"]

    of_stock = figures(stock, "--data", classes, "--classes", tmp_path / "names.txt", "--probe-train", classes)
    assert of_stock["zero_shot_top1"]["items"] == 12
    assert of_stock["zero_shot_top1"]["chance"] == pytest.approx(100 / 3, abs=1e-3)
    assert of_stock["linear_probe_top1"]["value"] > 70  # tested on what it was fitted on
    assert "zero_shot_top1" in figures(native)  # the run's own test split
    write_native(model, dataclasses.replace(run, data=DataConfig(train="")), tokenizer, tmp_path / "bare")
    with pytest.raises(UserError, match="--data"):
        export_from_flags(script_parser("export_clips").parse_args(["--model", str(tmp_path / "bare")]))
    with pytest.raises(UserError, match="names no test data: give --data,"):  # it named a flag of another command
        figures(tmp_path / "bare")
